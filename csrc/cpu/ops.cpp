// The library's door: tensors of LibTorch's stable ABI to plain pointers and strides, implementations to the schemas that
// soap_kernels/cpp.py defines, and a Python module with what needs no tensor. Arguments come checked (soap_kernels/op.py).
//
// Only the stable ABI (torch/csrc/stable, torch/headeronly) is used, at the version that TORCH_TARGET_VERSION names: one
// build serves every later torch.
#include <pybind11/pybind11.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "backend.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Floats = std::vector<double>;
using Ints = std::vector<int64_t>;

// ATen's own threads: torch.set_num_threads holds, and DataLoader workers, which run with one, stay alone.
class TorchPool final : public soap::Pool {
 public:
  int threads() const override { return static_cast<int>(torch::stable::get_num_threads()); }
  void spread(int threads, const std::function<void()>& body) override {
    torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) { body(); });
  }
};

soap::Dtype dtype_of(ScalarType t) {
  switch (t) {
    case ScalarType::Float: return soap::Dtype::f32;
    case ScalarType::Half: return soap::Dtype::f16;
    case ScalarType::BFloat16: return soap::Dtype::bf16;
    case ScalarType::Byte: return soap::Dtype::u8;
    default: break;
  }
  STD_TORCH_CHECK(false, "soap_kernels on the CPU serves float32, float16, bfloat16 and uint8");
}

// (B, T, C, H, W), or (N, C, H, W) as clips of one frame.
soap::Shape shape_of(const Tensor& x) {
  const auto s = x.sizes();
  const size_t d = s.size();
  soap::Shape out;
  out.clips = s[0];
  out.frames = d == 5 ? static_cast<int>(s[1]) : 1;
  out.channels = static_cast<int>(s[d - 3]);
  out.height = static_cast<int>(s[d - 2]);
  out.width = static_cast<int>(s[d - 1]);
  return out;
}

// A tensor as a Source or a Sink, with the table of planes that they point into.
struct View {
  explicit View(const Tensor& t) : tensor(t), shape(shape_of(t)) {
    const auto s = t.strides();
    const size_t d = s.size();
    for (int f = 0; f < shape.frames; ++f)
      for (int c = 0; c < shape.channels; ++c) planes.push_back(f * (d == 5 ? s[1] : 0) + c * s[d - 3]);
    clip = s[0];
    row = s[d - 2];
    col = s[d - 1];
  }

  soap::Source source() const {
    return {tensor.const_data_ptr(), dtype_of(tensor.scalar_type()), clip, row, col, planes.data(),
            scale.empty() ? nullptr : scale.data(), shift.empty() ? nullptr : shift.data()};
  }
  soap::Sink sink() const {
    return {tensor.mutable_data_ptr(), dtype_of(tensor.scalar_type()), clip, row, col, planes.data()};
  }

  // uint8 frames: (value / 255 - mean) / std.
  void normalize(const Floats& mean, const Floats& std) {
    for (int f = 0; f < shape.frames && !mean.empty(); ++f)
      for (int c = 0; c < shape.channels; ++c) {
        scale.push_back(static_cast<float>(1. / (255. * std[c])));
        shift.push_back(static_cast<float>(-mean[c] / std[c]));
      }
  }

  Tensor tensor;
  soap::Shape shape;
  std::vector<int64_t> planes;
  int64_t clip, row, col;
  std::vector<float> scale, shift;
};

Tensor empty(const Ints& sizes, ScalarType dtype, const Tensor& like) {
  return torch::stable::empty(sizes, dtype, std::nullopt, like.device());
}

// A large output is fresh memory: its first write faults page by page, a fifth of `fuse`'s time with pages of 4 KB. Asks
// for large pages where the system gives them on request (it may decline, and nothing else changes).
Tensor empty_large(const Ints& sizes, ScalarType dtype, const Tensor& like) {
  Tensor t = empty(sizes, dtype, like);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kLarge = uintptr_t{1} << 21;
  const auto begin = reinterpret_cast<uintptr_t>(t.mutable_data_ptr());
  const uintptr_t end = begin + static_cast<uintptr_t>(t.numel()) * t.element_size();
  const uintptr_t from = (begin + kLarge - 1) / kLarge * kLarge, to = end / kLarge * kLarge;
  if (to >= from + 2 * kLarge) madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);
#endif
  return t;
}

Ints sizes_of(const Tensor& t) { return Ints(t.sizes().begin(), t.sizes().end()); }

// Weights are small and many: each is read and written where it lies, since a conversion by torch costs more than SOAP
// itself on a small clip. Other types and strides than dense fp32 go through torch.
template <class T>
std::vector<T> numbers_of(const Tensor& t) {
  if (t.scalar_type() == ScalarType::Float && t.is_contiguous()) {
    const float* p = static_cast<const float*>(t.const_data_ptr());
    return std::vector<T>(p, p + t.numel());
  }
  const Tensor dense = torch::stable::contiguous(torch::stable::to(t, ScalarType::Double));
  const double* p = static_cast<const double*>(dense.const_data_ptr());
  return std::vector<T>(p, p + dense.numel());
}

Tensor tensor_of(const soap::Numbers& numbers, const Ints& sizes, ScalarType dtype, const Tensor& like) {
  const bool single = dtype == ScalarType::Float;
  const Tensor t = empty(sizes, single ? ScalarType::Float : ScalarType::Double, like);
  if (single) {
    float* to = static_cast<float*>(t.mutable_data_ptr());
    for (const double n : numbers) *to++ = static_cast<float>(n);
    return t;
  }
  std::copy(numbers.begin(), numbers.end(), static_cast<double*>(t.mutable_data_ptr()));
  return torch::stable::to(t, dtype);
}

soap::SoapCall call_of(const View& x, const std::vector<Tensor>& weights, int64_t parts, const Ints& tuple_sizes,
                       bool strict) {
  soap::SoapCall call;
  call.shape = x.shape;
  call.x = x.source();
  call.strict = strict;
  soap::Weights& w = call.weights;
  w.frames = x.shape.frames;
  w.channels = x.shape.channels;
  w.parts = parts;
  w.tuple_sizes.assign(tuple_sizes.begin(), tuple_sizes.end());
  for (const Tensor& t : weights) w.tensor.push_back(numbers_of<double>(t));
  if (w.has(soap::kCwem)) w.hidden = static_cast<int>(weights[w.cwem()].size(0));
  return call;
}

std::tuple<Tensor, Tensor> soap_op(const Tensor& x, const std::vector<Tensor>& weights, int64_t parts,
                                   const Ints& tuple_sizes, bool strict, const Floats& mean, const Floats& std,
                                   ScalarType out_dtype, bool out_channels_last) {
  Ints sizes = sizes_of(x);
  if (out_channels_last) sizes = {sizes[0], sizes[1], sizes[3], sizes[4], sizes[2]};
  Tensor y = empty_large(sizes, out_dtype, x);
  if (out_channels_last) y = torch::stable::transpose(torch::stable::transpose(y, 2, 4), 3, 4);  // (B, T, C, H, W)
  View in(x);
  in.normalize(mean, std);
  const Tensor prepared = empty({soap::prepared_size(in.shape, parts)}, ScalarType::Float, x);
  if (x.numel() > 0) {
    TorchPool pool;
    const View out(y);
    soap::soap_forward(call_of(in, weights, parts, tuple_sizes, strict), out.sink(),
                       static_cast<float*>(prepared.mutable_data_ptr()), pool);
  }
  return {y, prepared};
}

std::tuple<Tensor, std::vector<Tensor>> soap_backward_op(const Tensor& grad, const Tensor& x, const Tensor& prepared,
                                                         const std::vector<Tensor>& weights, int64_t parts,
                                                         const Ints& tuple_sizes, bool strict, const Floats& mean,
                                                         const Floats& std, bool needs_x, bool needs_weights) {
  const Tensor dx = empty_large(needs_x ? sizes_of(x) : Ints{0}, x.scalar_type(), x);
  std::vector<Tensor> dweights;
  View in(x);
  in.normalize(mean, std);
  const soap::SoapCall call = call_of(in, weights, parts, tuple_sizes, strict);
  std::vector<soap::Numbers> found;
  if (x.numel() > 0) {
    TorchPool pool;
    const View upstream(grad);
    const View out(needs_x ? dx : x);
    found = soap::soap_backward(call, upstream.source(), static_cast<const float*>(prepared.const_data_ptr()),
                                needs_x ? out.sink() : soap::Sink{}, needs_weights, pool).weights;
  } else if (needs_weights) {
    for (const soap::Numbers& w : call.weights.tensor) found.emplace_back(w.size(), 0.);
  }
  for (size_t k = 0; k < found.size(); ++k)
    dweights.push_back(tensor_of(found[k], sizes_of(weights[k]), weights[k].scalar_type(), x));
  return {dx, dweights};
}

Tensor window_sums_op(const Tensor& x) {
  const View in(x);
  const Tensor out = empty({in.shape.clips, in.shape.channels, 3, 3}, ScalarType::Float, x);
  TorchPool pool;
  if (x.numel() > 0)
    soap::window_sums_forward(in.shape, in.source(), static_cast<float*>(out.mutable_data_ptr()), pool);
  return out;
}

Tensor window_sums_backward_op(const Tensor& grad, const Tensor& x) {
  const Tensor dx = empty(sizes_of(x), x.scalar_type(), x);
  const std::vector<float> g = numbers_of<float>(grad);
  const View out(dx);
  TorchPool pool;
  if (x.numel() > 0) soap::window_sums_backward(out.shape, g.data(), out.sink(), pool);
  return dx;
}

soap::PriorsCall priors_of(const View& x, const std::optional<Tensor>& stencil, const std::optional<Tensor>& gate,
                           const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, bool multiplicative,
                           double offset, bool interleaved, bool strict) {
  soap::PriorsCall call;
  call.shape = x.shape;
  call.x = x.source();
  call.strict = strict;
  call.multiplicative = multiplicative;
  call.interleaved = interleaved;
  call.offset = offset;
  if (stencil) call.stencil = numbers_of<double>(*stencil);
  if (gate) call.gate = numbers_of<float>(*gate);
  if (weight) call.conv = numbers_of<float>(*weight);
  if (bias) call.conv_bias = numbers_of<double>(*bias);
  return call;
}

Tensor fuse_priors_op(const Tensor& x, const std::optional<Tensor>& stencil, const std::optional<Tensor>& gate,
                      const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, bool multiplicative,
                      double offset, bool interleaved, bool strict) {
  const Tensor y = empty_large(sizes_of(x), x.scalar_type(), x);
  if (x.numel() == 0) return y;
  const View in(x), out(y);
  TorchPool pool;
  soap::fuse_priors_forward(priors_of(in, stencil, gate, weight, bias, multiplicative, offset, interleaved, strict),
                            out.sink(), pool);
  return y;
}

// Gradients of x, stencil, gate, weight, bias; empty(0) for one that is not given or, for x, not needed.
std::vector<Tensor> fuse_priors_backward_op(const Tensor& grad, const Tensor& x, const std::optional<Tensor>& stencil,
                                            const std::optional<Tensor>& gate, const std::optional<Tensor>& weight,
                                            const std::optional<Tensor>& bias, bool multiplicative, double offset,
                                            bool interleaved, bool strict, bool needs_x) {
  const Tensor dx = empty_large(needs_x ? sizes_of(x) : Ints{0}, x.scalar_type(), x);
  soap::PriorGradients d;
  const View in(x), upstream(grad), out(needs_x ? dx : x);
  const soap::PriorsCall call =
      priors_of(in, stencil, gate, weight, bias, multiplicative, offset, interleaved, strict);
  if (x.numel() > 0) {
    TorchPool pool;
    d = soap::fuse_priors_backward(call, upstream.source(), needs_x ? out.sink() : soap::Sink{}, pool);
  }
  std::vector<Tensor> all = {dx};
  const auto add = [&](const std::optional<Tensor>& like, const soap::Numbers& numbers) {
    if (!like) return all.push_back(empty({0}, ScalarType::Float, x));
    soap::Numbers whole = numbers;
    whole.resize(like->numel(), 0.);
    all.push_back(tensor_of(whole, sizes_of(*like), like->scalar_type(), x));
  };
  add(stencil, d.stencil);
  add(gate, d.gate);
  add(weight, d.conv);
  add(bias, d.conv_bias);
  return all;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(soap_kernels, CPU, m) {
  m.impl("cpp_soap", TORCH_BOX(&soap_op));
  m.impl("cpp_soap_backward", TORCH_BOX(&soap_backward_op));
  m.impl("cpp_window_sums", TORCH_BOX(&window_sums_op));
  m.impl("cpp_window_sums_backward", TORCH_BOX(&window_sums_backward_op));
  m.impl("cpp_fuse_priors", TORCH_BOX(&fuse_priors_op));
  m.impl("cpp_fuse_priors_backward", TORCH_BOX(&fuse_priors_backward_op));
}

PYBIND11_MODULE(_cpp, m) {
  m.doc() = "SOAP's CPU kernels: build information and the choice of the instruction set.";
  m.def("isas", []() {
    std::vector<std::string> names;
    for (const soap::Stages* s : soap::available_stages()) names.emplace_back(s->name);
    pybind11::list out;
    for (const std::string& n : names) out.append(n);
    return out;
  }, "The instruction sets that this machine can run, best first.");
  m.def("isa", []() { return std::string(soap::stages().name); }, "The instruction set in use.");
  m.def("set_isa", [](const std::string& name) { return soap::choose_stages(name.c_str()); },
        "Use another one (\"auto\": the best). False if it is unknown or this machine has not got it.");
  m.def("build_info", []() {
    pybind11::dict d;
    d["compiler"] = SOAP_COMPILER;
    d["torch_built_with"] = SOAP_TORCH_VERSION;
    d["torch_target"] = SOAP_TORCH_TARGET;
    return d;
  });
}
