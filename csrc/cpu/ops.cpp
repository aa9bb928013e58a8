// The library's door: tensors of LibTorch's stable ABI to plain pointers and strides, implementations to the schemas
// that soap_kernels/backends/cpp.py defines, which allocates what they fill, and a Python module with what needs no
// tensor. Arguments come checked and never empty (soap_kernels/op.py).
//
// Only the stable ABI (torch/csrc/stable, torch/headeronly) is used, at the version that TORCH_TARGET_VERSION names:
// one build serves every later torch.
#include <pybind11/pybind11.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "backend.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace soap::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Floats = std::vector<double>;
using Ints = std::vector<int64_t>;
using Tensors = std::vector<Tensor>;
using MaybeTensor = std::optional<Tensor>;

// ATen's own threads: torch.set_num_threads holds, and DataLoader workers, which run with one, stay alone.
class TorchPool final : public Pool {
 public:
  int threads() const override { return static_cast<int>(torch::stable::get_num_threads()); }
  void spread(int threads, const std::function<void()>& body) override {
    torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) { body(); });
  }
};

Dtype dtype_of(ScalarType t) {
  switch (t) {
    case ScalarType::Float: return Dtype::f32;
    case ScalarType::Half: return Dtype::f16;
    case ScalarType::BFloat16: return Dtype::bf16;
    case ScalarType::Byte: return Dtype::u8;
    default: break;
  }
  STD_TORCH_CHECK(false, "soap_kernels on the CPU serves float32, float16, bfloat16 and uint8");
}

// (B, T, C, H, W), or (N, C, H, W) as clips of one frame.
Shape shape_of(const Tensor& x) {
  const auto s = x.sizes();
  const size_t d = s.size();
  const auto size = [&](size_t k) { return static_cast<int>(s[k]); };
  return {s[0], d == 5 ? size(1) : 1, size(d - 3), size(d - 2), size(d - 1)};
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

  Source source() const {
    return {tensor.const_data_ptr(), dtype_of(tensor.scalar_type()), clip, row, col, planes.data(),
        scale.empty() ? nullptr : scale.data(), shift.empty() ? nullptr : shift.data()};
  }
  Sink sink() const {
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
  Shape shape;
  std::vector<int64_t> planes;
  int64_t clip, row, col;
  std::vector<float> scale, shift;
};

// A large output is fresh memory: its first write faults page by page, a fifth of `fuse`'s time with pages of 4 KB.
// Asks for large pages where the system gives them on request (it may decline, and nothing else changes).
const Tensor& in_large_pages(const Tensor& t) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t LARGE = uintptr_t{1} << 21;
  const auto begin = reinterpret_cast<uintptr_t>(t.mutable_data_ptr());
  const uintptr_t end = begin + static_cast<uintptr_t>(t.numel()) * t.element_size();
  const uintptr_t from = (begin + LARGE - 1) / LARGE * LARGE, to = end / LARGE * LARGE;
  if (to >= from + 2 * LARGE) madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);
#endif
  return t;
}

// Weights are small and many: fp32 is read and written where it lies, since a conversion by torch costs more than SOAP
// itself on a small clip.
template <class T> std::vector<T> numbers_of(const Tensor& t) {
  const Tensor floats = t.scalar_type() == ScalarType::Float ? t : torch::stable::to(t, ScalarType::Float);
  STD_TORCH_CHECK(floats.is_contiguous(), "soap_kernels on the CPU takes contiguous weights");
  const float* p = static_cast<const float*>(floats.const_data_ptr());
  return std::vector<T>(p, p + floats.numel());
}

template <class T> std::vector<T> numbers_of(const MaybeTensor& t) { return t ? numbers_of<T>(*t) : std::vector<T>{}; }

float* floats_of(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

void fill(const Tensor& t, const Numbers& numbers) { std::copy(numbers.begin(), numbers.end(), floats_of(t)); }

SoapCall call_of(
    const View& x, const Tensors& weights, bool three_dem, bool cwem, const Ints& tuple_sizes, bool strict) {
  SoapCall call;
  call.shape = x.shape;
  call.x = x.source();
  call.strict = strict;
  Weights& w = call.weights;
  w.frames = x.shape.frames;
  w.channels = x.shape.channels;
  w.three_dem = three_dem;
  w.cwem = cwem;
  w.tuple_sizes.assign(tuple_sizes.begin(), tuple_sizes.end());
  for (const Tensor& t : weights) w.tensor.push_back(numbers_of<double>(t));
  if (w.cwem) w.hidden = static_cast<int>(weights[w.cwem_at()].size(0));
  return call;
}

void soap_op(const Tensor& x, const Tensors& weights, bool three_dem, bool cwem, const Ints& tuple_sizes, bool strict,
    const Floats& mean, const Floats& std, double offset, const Tensor& y, const Tensor& prepared) {
  TorchPool pool;
  View in(x);
  in.normalize(mean, std);
  const View out(in_large_pages(y));
  SoapCall call = call_of(in, weights, three_dem, cwem, tuple_sizes, strict);
  call.offset = offset;
  soap_forward(call, out.sink(), floats_of(prepared), pool);
}

void soap_backward_op(const Tensor& grad, const Tensor& x, const Tensor& prepared, const Tensors& weights,
    bool three_dem, bool cwem, const Ints& tuple_sizes, bool strict, const Floats& mean, const Floats& std,
    const MaybeTensor& dx, const Tensors& dweights) {
  TorchPool pool;
  View in(x);
  in.normalize(mean, std);
  const View upstream(grad), out(dx ? in_large_pages(*dx) : x);
  const std::vector<Numbers> found = soap_backward(call_of(in, weights, three_dem, cwem, tuple_sizes, strict),
      upstream.source(), floats_of(prepared), dx ? out.sink() : Sink{}, !dweights.empty(), pool);
  for (size_t k = 0; k < dweights.size(); ++k) fill(dweights[k], found[k]);
}

void window_sums_op(const Tensor& x, const Tensor& sums) {
  TorchPool pool;
  const View in(x);
  window_sums_forward(in.shape, in.source(), floats_of(sums), pool);
}

void window_sums_backward_op(const Tensor& grad, const Tensor& dx) {
  TorchPool pool;
  const View out(dx);
  window_sums_backward(out.shape, floats_of(grad), out.sink(), pool);
}

PriorsCall priors_of(const View& x, const MaybeTensor& stencil, const MaybeTensor& gate, const MaybeTensor& weight,
    const MaybeTensor& bias, bool multiplicative, double offset, bool interleaved, bool strict) {
  PriorsCall call;
  call.shape = x.shape;
  call.x = x.source();
  call.strict = strict;
  call.multiplicative = multiplicative;
  call.interleaved = interleaved;
  call.offset = offset;
  call.stencil = numbers_of<double>(stencil);
  call.gate = numbers_of<float>(gate);
  call.conv = numbers_of<float>(weight);
  call.conv_bias = numbers_of<double>(bias);
  return call;
}

void fuse_priors_op(const Tensor& x, const MaybeTensor& stencil, const MaybeTensor& gate, const MaybeTensor& weight,
    const MaybeTensor& bias, bool multiplicative, double offset, bool interleaved, bool strict, const Tensor& y) {
  TorchPool pool;
  const View in(x), out(in_large_pages(y));
  fuse_priors_forward(
      priors_of(in, stencil, gate, weight, bias, multiplicative, offset, interleaved, strict), out.sink(), pool);
}

void fuse_priors_backward_op(const Tensor& grad, const Tensor& x, const MaybeTensor& stencil, const MaybeTensor& gate,
    const MaybeTensor& weight, const MaybeTensor& bias, bool multiplicative, double offset, bool interleaved,
    bool strict, const MaybeTensor& dx, const MaybeTensor& dstencil, const MaybeTensor& dgate,
    const MaybeTensor& dweight, const MaybeTensor& dbias) {
  TorchPool pool;
  const View in(x), upstream(grad), out(dx ? in_large_pages(*dx) : x);
  const PriorGradients d =
      fuse_priors_backward(priors_of(in, stencil, gate, weight, bias, multiplicative, offset, interleaved, strict),
          upstream.source(), dx ? out.sink() : Sink{}, pool);
  if (dstencil) fill(*dstencil, d.stencil);
  if (dgate) fill(*dgate, d.gate);
  if (dweight) fill(*dweight, d.conv);
  if (dbias) fill(*dbias, d.conv_bias);
}

}  // namespace
}  // namespace soap::cpu

using namespace soap::cpu;

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
  m.def(
      "isas",
      []() {
        pybind11::list names;
        for (const Stages* s : available_stages()) names.append(s->name);
        return names;
      },
      "The instruction sets that this machine can run, best first.");
  m.def("isa", []() { return std::string(stages().name); }, "The instruction set in use.");
  m.def(
      "set_isa", [](const std::string& name) { return choose_stages(name.c_str()); },
      "Use another one (\"auto\": the best). False if it is unknown or this machine has not got it.");
  m.def("build_info", []() {
    pybind11::dict d;
    d["compiler"] = SOAP_COMPILER;
    d["torch_built_with"] = SOAP_TORCH_VERSION;
    d["torch_target"] = SOAP_TORCH_TARGET;
    return d;
  });
}
