// The library's door: tensors of LibTorch's stable ABI to plain pointers and strides, and implementations to the
// schemas that soap_kernels/backends/cuda.py defines, which allocates what they fill. Arguments come checked and never
// empty (soap_kernels/op.py). The tests build the same file on the CPU with SOAP_CUDA_SHIM, where there is no stream.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "kernels.h"

#ifdef SOAP_CUDA_SHIM
#define SOAP_KEY CPU
#else
#define SOAP_KEY CUDA
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#endif

namespace soap::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Floats = std::vector<double>;
using Ints = std::vector<int64_t>;
using Tensors = std::vector<Tensor>;
using MaybeTensor = std::optional<Tensor>;

// The current stream of the tensors' device, which the op has made the current one.
void* stream_of(const Tensor& x) {
  void* stream = nullptr;
#ifndef SOAP_CUDA_SHIM
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream) == AOTI_TORCH_SUCCESS,
      "no current CUDA stream");
#endif
  return stream;
}

int dtype_of(ScalarType t) {
  switch (t) {
    case ScalarType::Float: return F32;
    case ScalarType::Half: return F16;
    case ScalarType::BFloat16: return BF16;
    case ScalarType::Byte: return U8;
    default: STD_TORCH_CHECK(false, "soap_kernels on CUDA serves float32, float16, bfloat16 and uint8");
  }
}

int dtype_of(const Tensor& t) { return dtype_of(t.scalar_type()); }

Array array_of(const Tensor& t) { return {t.data_ptr(), dtype_of(t)}; }
Array array_of(const MaybeTensor& t) { return t ? array_of(*t) : Array{}; }

Frames frames_of(const Tensor& x) {
  return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2), x.stride(3), x.stride(4), dtype_of(x)};
}

Shape shape_of(const Tensor& x) { return {x.size(0), int(x.size(1)), int(x.size(2)), int(x.size(3)), int(x.size(4))}; }

// How the folded convolution is multiplied out.
Mode mode_of(int x, int y, bool strict, bool fast) {
  if (strict) return EXACT;
  if (x == BF16) return BF16X1;
  if (x == F16) return F16X1;
  if (x == F32) return fast ? BF16X1 : BF16X3;
  return y == F32 && !fast ? BF16X3 : F16X1;
}

void set_parts(Call& call, bool three_dem, bool cwem, const Ints& tuple_sizes) {
  STD_TORCH_CHECK(tuple_sizes.size() <= MAX_TUPLE_SIZES, "soap_kernels on CUDA: too many tuple sizes");
  call.options.stencil = three_dem;
  call.options.cwem = cwem;
  call.options.hmem = !tuple_sizes.empty();
  for (const int64_t o : tuple_sizes) {
    call.weights.tuple_sizes[call.weights.num_sizes++] = int(o);
    call.weights.num_maps += call.shape.frames - int(o);
  }
}

// Tensors in the order of SOAP's state_dict.
void set_weights(Weights& w, const Tensors& tensors, const Options& o) {
  size_t next = 0;
  const auto take = [&] { return array_of(tensors.at(next++)); };
  if (o.stencil) w.stencil = take();
  if (o.cwem) {
    w.hidden = int(tensors.at(next).size(0));
    w.expand = take();
    w.temporal = take();
    w.temporal_bias = take();
    w.squeeze = take();
  }
  if (!o.hmem) return;
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

// `y`: the output or its gradient.
Call soap_call(const Tensor& x, const Tensors& weights, bool three_dem, bool cwem, const Ints& tuple_sizes, bool strict,
    bool fast, const Floats& mean, const Floats& std, const Tensor& y) {
  Call call{shape_of(x), frames_of(x)};
  Options& o = call.options;
  o.mode = mode_of(dtype_of(x), dtype_of(y), strict, fast);
  for (size_t c = 0; c < mean.size(); ++c) {  // from uint8 to normalised frames
    o.scale[c] = float(1 / (255 * std[c]));
    o.shift[c] = float(-mean[c] / std[c]);
  }
  set_parts(call, three_dem, cwem, tuple_sizes);
  set_weights(call.weights, weights, o);
  return call;
}

Weights priors_of(
    const MaybeTensor& stencil, const MaybeTensor& gate, const MaybeTensor& weight, const MaybeTensor& bias) {
  Weights w{};
  w.stencil = array_of(stencil);
  w.gate = array_of(gate);
  w.conv = array_of(weight);
  w.conv_bias = array_of(bias);
  return w;
}

Call priors_call(const Tensor& x, const MaybeTensor& stencil, const MaybeTensor& gate, const MaybeTensor& weight,
    const MaybeTensor& bias, bool multiplicative, double offset, bool interleaved, bool strict, bool fast) {
  Call call{shape_of(x), frames_of(x), {}, priors_of(stencil, gate, weight, bias)};
  Options& o = call.options;
  o.stencil = stencil.has_value();
  o.given_gate = gate.has_value();
  o.direct = weight.has_value();
  o.multiplicative = multiplicative;
  o.interleaved = interleaved;
  o.offset = float(offset);
  o.mode = mode_of(dtype_of(x), dtype_of(x), strict, fast);
  return call;
}

Tensor floats(const Tensor& like, int64_t numel) { return torch::stable::new_empty(like, {numel}, ScalarType::Float); }

float* data(const Tensor& t) { return static_cast<float*>(t.data_ptr()); }
float* data(const MaybeTensor& t) { return t ? data(*t) : nullptr; }

void prepare_in(const Tensor& prepared, const Call& c, void* stream) {
  const int64_t total = layout(c.shape, c.options).total;
  STD_TORCH_CHECK(prepared.numel() == total, "prepared holds ", prepared.numel(), " numbers, expected ", total);
  // Without rows `prepare` writes no biases. The other kernels read them all the same, and take the result 0 times.
  Tensor all = prepared;
  if (!c.options.rows()) torch::stable::zero_(all);
  prepare(c, data(prepared), nullptr, stream);
}

// dz, through, dense and dmeans are for x's gradient: see kernels.h.
void go_back(const Call& c, const Tensor& grad, const Tensor& prepared, const Weights& dweights, const MaybeTensor& dz,
    const MaybeTensor& through, const MaybeTensor& dense, const MaybeTensor& dmeans, void* stream) {
  const float* p = data(prepared);
  const SweepPlan plan = plan_sweep(c.shape, c.options);
  const Tensor workspace = floats(grad, plan.partial + plan.gate_partial + plan.sums + plan.gates);
  float* partial = data(workspace);
  float* sums = partial + plan.partial;
  float* gates = sums + plan.sums;
  float* gate_partial = gates + plan.gates;
  sweep(c, frames_of(grad), p, partial, gate_partial, data(dz), data(through), stream);
  reduce(c, p, partial, gate_partial, sums, gates, stream);
  finish(c, p, sums, gates, dweights, data(dmeans), stream);
  if (!dense) return;
  Call plain = c;
  plain.options.cwem = false;
  const Tensor scratch = floats(grad, layout(c.shape, plain.options).total);
  prepare(plain, data(scratch), data(dense), stream);
}

// Of `prepared` the floats whatever the clips and those a clip, and the shared memory in bytes of the largest block.
std::tuple<int64_t, int64_t, int64_t> sizes_op(int64_t frames, int64_t channels, int64_t hidden, ScalarType x,
    ScalarType y, bool three_dem, bool cwem, bool conv, const Ints& tuple_sizes, bool strict, bool fast) {
  Call call{{1, int(frames), int(channels), 1, 1}, {}};
  call.x.dtype = dtype_of(x);
  call.options.direct = conv;
  call.options.mode = mode_of(dtype_of(x), dtype_of(y), strict, fast);
  set_parts(call, three_dem, cwem, tuple_sizes);
  call.weights.hidden = int(hidden);
  const Layout l = layout(call.shape, call.options);
  return {l.means, l.total - l.means, int64_t(shared_memory(call, dtype_of(y)))};
}

void soap_op(const Tensor& x, const Tensors& weights, bool three_dem, bool cwem, const Ints& tuple_sizes, bool strict,
    bool fast, const Floats& mean, const Floats& std, double offset, const Tensor& y, const Tensor& prepared) {
  Call c = soap_call(x, weights, three_dem, cwem, tuple_sizes, strict, fast, mean, std, y);
  c.options.offset = float(offset);
  prepare_in(prepared, c, stream_of(x));
  fuse(c, data(prepared), frames_of(y), stream_of(x));
}

void soap_backward_op(const Tensor& grad, const Tensor& x, const Tensor& prepared, const Tensors& weights,
    bool three_dem, bool cwem, const Ints& tuple_sizes, bool strict, bool fast, const Floats& mean, const Floats& std,
    const Tensors& dweights, const MaybeTensor& dz, const MaybeTensor& through, const MaybeTensor& dense,
    const MaybeTensor& dmeans) {
  const Call c = soap_call(x, weights, three_dem, cwem, tuple_sizes, strict, fast, mean, std, grad);
  Weights d{};
  if (!dweights.empty()) {
    d.num_sizes = c.weights.num_sizes;
    set_weights(d, dweights, c.options);
  }
  go_back(c, grad, prepared, d, dz, through, dense, dmeans, stream_of(x));
}

void fuse_priors_op(const Tensor& x, const MaybeTensor& stencil, const MaybeTensor& gate, const MaybeTensor& weight,
    const MaybeTensor& bias, bool multiplicative, double offset, bool interleaved, bool strict, bool fast,
    const Tensor& y) {
  const Call c = priors_call(x, stencil, gate, weight, bias, multiplicative, offset, interleaved, strict, fast);
  const Tensor prepared = floats(x, layout(c.shape, c.options).total);
  prepare_in(prepared, c, stream_of(x));
  fuse(c, data(prepared), frames_of(y), stream_of(x));
}

void fuse_priors_backward_op(const Tensor& grad, const Tensor& x, const MaybeTensor& stencil, const MaybeTensor& gate,
    const MaybeTensor& weight, const MaybeTensor& bias, bool multiplicative, double offset, bool interleaved,
    bool strict, bool fast, const MaybeTensor& dstencil, const MaybeTensor& dgate, const MaybeTensor& dweight,
    const MaybeTensor& dbias, const MaybeTensor& dz, const MaybeTensor& through, const MaybeTensor& dense) {
  const Call c = priors_call(x, stencil, gate, weight, bias, multiplicative, offset, interleaved, strict, fast);
  const Tensor prepared = floats(x, layout(c.shape, c.options).total);
  prepare_in(prepared, c, stream_of(x));
  const Weights d = priors_of(dstencil, dgate, dweight, dbias);
  go_back(c, grad, prepared, d, dz, through, dense, std::nullopt, stream_of(x));
}

Frames images_of(const Tensor& x) {
  return {x.data_ptr(), x.stride(0), 0, x.stride(1), x.stride(2), x.stride(3), dtype_of(x)};
}

void window_sums_op(const Tensor& x, const Tensor& sums) {
  window_sums(x.size(0), int(x.size(1)), int(x.size(2)), int(x.size(3)), images_of(x), data(sums), stream_of(x));
}

void window_sums_backward_op(const Tensor& grad, const Tensor& dx) {
  window_sums_backward(dx.size(0) * dx.size(1), int(dx.size(2)), int(dx.size(3)), data(grad), dx.data_ptr(),
      dtype_of(dx), stream_of(dx));
}

Wide wide_of(const MaybeTensor& z, const MaybeTensor& bias, const MaybeTensor& gate, bool planes, bool stencil,
    bool multiplicative, double offset) {
  return {
      array_of(z), data(bias), data(gate), planes, stencil, multiplicative, float(offset), nullptr, nullptr, nullptr};
}

void join_op(const Tensor& x, const MaybeTensor& z, const MaybeTensor& bias, const MaybeTensor& gate, bool planes,
    bool stencil, bool multiplicative, double offset, const Tensor& y) {
  const Wide w = wide_of(z, bias, gate, planes, stencil, multiplicative, offset);
  join(w, shape_of(x), frames_of(x), frames_of(y), stream_of(x));
}

// Fills dz and direct; returns the sums over pixels of the gradient of the gates and of the bias, (2, B, T, C, chunks).
Tensor join_backward_op(const Tensor& grad, const Tensor& x, const MaybeTensor& z, const MaybeTensor& bias,
    const MaybeTensor& gate, bool planes, bool stencil, bool multiplicative, double offset, const MaybeTensor& dz,
    const MaybeTensor& direct) {
  Wide w = wide_of(z, bias, gate, planes, stencil, multiplicative, offset);
  const Shape shape = shape_of(x);
  const int64_t chunks = wide_chunks(shape, frames_of(x), frames_of(grad));
  const Tensor shares = torch::stable::new_empty(x, {2, x.size(0), x.size(1), x.size(2), chunks}, ScalarType::Float);
  w.dz = dz ? dz->data_ptr() : nullptr;
  w.direct = data(direct);
  w.shares = data(shares);
  join_backward(w, shape, frames_of(x), frames_of(grad), stream_of(x));
  return shares;
}

}  // namespace
}  // namespace soap::cuda

using namespace soap::cuda;

STABLE_TORCH_LIBRARY_IMPL(soap_kernels, SOAP_KEY, m) {
  m.impl("cuda_soap", TORCH_BOX(&soap_op));
  m.impl("cuda_soap_backward", TORCH_BOX(&soap_backward_op));
  m.impl("cuda_fuse_priors", TORCH_BOX(&fuse_priors_op));
  m.impl("cuda_fuse_priors_backward", TORCH_BOX(&fuse_priors_backward_op));
  m.impl("cuda_join", TORCH_BOX(&join_op));
  m.impl("cuda_join_backward", TORCH_BOX(&join_backward_op));
  m.impl("cuda_window_sums", TORCH_BOX(&window_sums_op));
  m.impl("cuda_window_sums_backward", TORCH_BOX(&window_sums_backward_op));
}

STABLE_TORCH_LIBRARY_IMPL(soap_kernels, CompositeExplicitAutograd, m) {
  m.impl("cuda_sizes", TORCH_BOX(&sizes_op));
  m.impl("cuda_launches", TORCH_BOX(&launches));
}
