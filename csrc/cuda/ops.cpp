// The library's door: tensors of LibTorch's stable ABI to plain pointers and strides, and implementations to the schemas
// that soap_kernels/cuda.py defines. Arguments come checked (soap_kernels/op.py). The tests build the same file on the CPU
// with SOAP_CUDA_SHIM, where there is no stream and no device to guard.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "kernels.h"

#ifdef SOAP_CUDA_SHIM
#define SOAP_KEY CPU
#else
#define SOAP_KEY CUDA
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#endif

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Floats = std::vector<double>;
using Ints = std::vector<int64_t>;

// The tensors' device, current for as long as this lives, and its current stream.
class OnDevice {
 public:
#ifdef SOAP_CUDA_SHIM
  explicit OnDevice(const Tensor&) {}
#else
  explicit OnDevice(const Tensor& x) : guard_(x.get_device_index()) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream) == AOTI_TORCH_SUCCESS, "no current CUDA stream");
  }
#endif
  void* stream = nullptr;

#ifndef SOAP_CUDA_SHIM
 private:
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

int dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return soap::F32;
    case ScalarType::Half: return soap::F16;
    case ScalarType::BFloat16: return soap::BF16;
    case ScalarType::Byte: return soap::U8;
    default: STD_TORCH_CHECK(false, "soap_kernels on CUDA serves float32, float16, bfloat16 and uint8");
  }
}

soap::Array array_of(const Tensor& t) { return {t.data_ptr(), dtype_of(t)}; }

soap::Frames frames_of(const Tensor& x) { return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2), x.stride(3), x.stride(4), dtype_of(x)}; }

soap::Shape shape_of(const Tensor& x) { return {x.size(0), int(x.size(1)), int(x.size(2)), int(x.size(3)), int(x.size(4))}; }

enum Flag : int64_t { STENCIL = 1, CWEM = 2, HMEM = 4, GATE = 8, CONV = 16, BIAS = 32, MULTIPLICATIVE = 64, INTERLEAVED = 128 };

// settings: flags, mode, tuple sizes. numbers: offset, then scale and shift of each channel.
soap::Options options_of(const Ints& settings, const Floats& numbers) {
  const int64_t flags = settings[0];
  soap::Options o{};
  o.stencil = flags & STENCIL;
  o.cwem = flags & CWEM;
  o.hmem = flags & HMEM;
  o.direct = flags & CONV;
  o.given_gate = flags & GATE;
  o.multiplicative = flags & MULTIPLICATIVE;
  o.interleaved = flags & INTERLEAVED;
  o.mode = int(settings[1]);
  o.offset = float(numbers[0]);
  for (int c = 0; c < soap::MAX_CHANNELS; ++c) {
    o.scale[c] = float(numbers[1 + c]);
    o.shift[c] = float(numbers[1 + soap::MAX_CHANNELS + c]);
  }
  return o;
}

// Tensors in the order of SOAP's state_dict, or stencil, gate, conv weight, conv bias; an empty list leaves all null.
soap::Weights weights_of(const std::vector<Tensor>& tensors, const Ints& settings, const soap::Shape& shape) {
  soap::Weights w{};
  const int64_t flags = settings[0];
  w.num_sizes = int(settings.size()) - 2;
  STD_TORCH_CHECK(w.num_sizes <= soap::MAX_TUPLE_SIZES, "soap_kernels on CUDA takes at most ", soap::MAX_TUPLE_SIZES, " tuple sizes");
  for (int k = 0; k < w.num_sizes; ++k) {
    w.tuple_sizes[k] = int(settings[2 + k]);
    w.num_maps += shape.frames - w.tuple_sizes[k];
  }
  if (tensors.empty()) return w;
  size_t next = 0;
  const auto take = [&] { return array_of(tensors.at(next++)); };
  if (flags & STENCIL) w.stencil = take();
  if (flags & CWEM) {
    w.hidden = int(tensors.at(next).size(0));
    w.expand = take();
    w.temporal = take();
    w.temporal_bias = take();
    w.squeeze = take();
  }
  if (flags & HMEM) {
    for (int k = 0; k < w.num_sizes; ++k) {
      w.motion[k] = take();
      w.motion_bias[k] = take();
    }
    for (int k = 0; k < w.num_sizes; ++k) {
      w.project[k] = take();
      w.project_bias[k] = take();
    }
    w.restore = take();
    w.restore_bias = take();
  }
  if (flags & GATE) w.gate = take();
  if (flags & CONV) w.conv = take();
  if (flags & BIAS) w.conv_bias = take();
  return w;
}

Tensor floats(const Tensor& like, int64_t numel) { return torch::stable::new_empty(like, {numel}, ScalarType::Float); }

float* data(const std::optional<Tensor>& t) { return t ? static_cast<float*>(t->data_ptr()) : nullptr; }

void forward(const Tensor& x, const std::vector<Tensor>& weights, const Ints& settings, const Floats& numbers, const Tensor& y, const Tensor& prepared) {
  const OnDevice on(x);
  const soap::Shape shape = shape_of(x);
  const soap::Options options = options_of(settings, numbers);
  const soap::Weights w = weights_of(weights, settings, shape);
  STD_TORCH_CHECK(prepared.numel() == soap::layout(shape, options).total, "prepared holds ", prepared.numel(), " numbers, expected ", soap::layout(shape, options).total);
  float* p = static_cast<float*>(prepared.data_ptr());
  soap::prepare(shape, options, frames_of(x), w, p, nullptr, on.stream);
  soap::fuse(shape, options, frames_of(x), w, p, frames_of(y), on.stream);
}

void prepare(const Tensor& x, const std::vector<Tensor>& weights, const Ints& settings, const Floats& numbers, const Tensor& prepared) {
  const OnDevice on(x);
  const soap::Shape shape = shape_of(x);
  soap::prepare(shape, options_of(settings, numbers), frames_of(x), weights_of(weights, settings, shape), static_cast<float*>(prepared.data_ptr()), nullptr, on.stream);
}

// dz, through, dense and dmeans are for x's gradient: see kernels.h.
void backward(const Tensor& grad, const Tensor& x, const Tensor& prepared, const std::vector<Tensor>& weights, const Ints& settings,
              const Floats& numbers, const std::vector<Tensor>& dweights, const std::optional<Tensor>& dz,
              const std::optional<Tensor>& through, const std::optional<Tensor>& dense, const std::optional<Tensor>& dmeans) {
  const OnDevice on(x);
  const soap::Shape shape = shape_of(x);
  const soap::Options options = options_of(settings, numbers);
  const soap::Weights w = weights_of(weights, settings, shape);
  STD_TORCH_CHECK(prepared.numel() == soap::layout(shape, options).total, "prepared holds ", prepared.numel(), " numbers, expected ", soap::layout(shape, options).total);
  const float* p = static_cast<const float*>(prepared.data_ptr());
  const soap::SweepPlan plan = soap::plan_sweep(shape, options);
  const Tensor workspace = floats(x, plan.partial + plan.gate_partial + plan.sums + plan.gates);
  float* partial = static_cast<float*>(workspace.data_ptr());
  float* sums = partial + plan.partial;
  float* gates = sums + plan.sums;
  float* gate_partial = gates + plan.gates;
  soap::sweep(shape, options, frames_of(x), frames_of(grad), w, p, partial, gate_partial, data(dz), data(through), on.stream);
  soap::reduce(shape, options, p, partial, gate_partial, sums, gates, on.stream);
  soap::finish(shape, options, w, p, sums, gates, weights_of(dweights, settings, shape), data(dmeans), on.stream);
  if (dense) {  // the folded weights once more, plain
    soap::Options plain = options;
    plain.cwem = false;
    const Tensor scratch = floats(x, soap::layout(shape, plain).total);
    soap::prepare(shape, plain, frames_of(x), w, static_cast<float*>(scratch.data_ptr()), data(dense), on.stream);
  }
}

soap::Frames images_of(const Tensor& x) { return {x.data_ptr(), x.stride(0), 0, x.stride(1), x.stride(2), x.stride(3), dtype_of(x)}; }

void window_sums(const Tensor& x, const Tensor& sums) {
  const OnDevice on(x);
  soap::window_sums(x.size(0), int(x.size(1)), int(x.size(2)), int(x.size(3)), images_of(x), static_cast<float*>(sums.data_ptr()), on.stream);
}

void window_sums_backward(const Tensor& grad, const Tensor& dx) {
  const OnDevice on(dx);
  soap::window_sums_backward(dx.size(0) * dx.size(1), int(dx.size(2)), int(dx.size(3)), static_cast<const float*>(grad.data_ptr()), dx.data_ptr(), dtype_of(dx), on.stream);
}

const float* floats_of(const std::optional<Tensor>& t) { return t ? static_cast<const float*>(t->data_ptr()) : nullptr; }

// settings: whether z has rows of the planes, rows of the frames, and whether the priors multiply x.
soap::Wide wide_of(const std::optional<Tensor>& z, const std::optional<Tensor>& bias, const std::optional<Tensor>& gate, const Ints& settings, double offset) {
  soap::Wide w{};
  if (z) w.z = array_of(*z);
  w.bias = floats_of(bias);
  w.gate = floats_of(gate);
  w.planes = settings[0];
  w.stencil = settings[1];
  w.multiplicative = settings[2];
  w.offset = float(offset);
  return w;
}

void join(const Tensor& x, const std::optional<Tensor>& z, const std::optional<Tensor>& bias, const std::optional<Tensor>& gate, const Ints& settings, double offset, const Tensor& y) {
  const OnDevice on(x);
  soap::join(wide_of(z, bias, gate, settings, offset), shape_of(x), frames_of(x), frames_of(y), on.stream);
}

// Fills dz and direct; returns the sums over pixels of the gradient of the gates and of the bias, (2, B, T, C, chunks).
Tensor part(const Tensor& grad, const Tensor& x, const std::optional<Tensor>& z, const std::optional<Tensor>& bias, const std::optional<Tensor>& gate, const Ints& settings,
            double offset, const std::optional<Tensor>& dz, const std::optional<Tensor>& direct) {
  const OnDevice on(x);
  soap::Wide w = wide_of(z, bias, gate, settings, offset);
  const soap::Shape shape = shape_of(x);
  const int64_t chunks = soap::wide_chunks(shape, frames_of(x), frames_of(grad));
  const Tensor shares = torch::stable::new_empty(x, {2, x.size(0), x.size(1), x.size(2), chunks}, ScalarType::Float);
  w.dz = dz ? dz->data_ptr() : nullptr;
  w.direct = data(direct);
  w.shares = static_cast<float*>(shares.data_ptr());
  soap::part(w, shape, frames_of(x), frames_of(grad), on.stream);
  return shares;
}

int64_t launches() { return soap::launches(); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(soap_kernels, SOAP_KEY, m) {
  m.impl("cuda_forward", TORCH_BOX(&forward));
  m.impl("cuda_prepare", TORCH_BOX(&prepare));
  m.impl("cuda_backward", TORCH_BOX(&backward));
  m.impl("cuda_join", TORCH_BOX(&join));
  m.impl("cuda_part", TORCH_BOX(&part));
  m.impl("cuda_window_sums", TORCH_BOX(&window_sums));
  m.impl("cuda_window_sums_backward", TORCH_BOX(&window_sums_backward));
}

STABLE_TORCH_LIBRARY_IMPL(soap_kernels, CompositeExplicitAutograd, m) { m.impl("cuda_launches", TORCH_BOX(&launches)); }
