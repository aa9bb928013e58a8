#include "sweep.cuh"

namespace soap {
namespace {

template <class X, int MODE> void launch_channels(const SweepParams& p, void* stream) {
  if (p.layout.padded_channels == 1) launch_sweep<X, MODE, 1>(p, stream);
  else launch_sweep<X, MODE, 3>(p, stream);
}

}  // namespace

// As many blocks as run at a time, but a whole number of tiles to each.
SweepPlan plan_sweep(const Shape& shape, const Options& options) {
  const Layout l = layout(shape, options);
  const int rows = options.mode == EXACT ? 8 : SWEEP_ROWS;
  const int64_t tiles = int64_t((shape.width + TILE_WIDTH - 1) / TILE_WIDTH) * ((shape.height + rows - 1) / rows);
  const int64_t blocks = 2 * multiprocessors(), wanted = (blocks + shape.clips - 1) / (shape.clips > 0 ? shape.clips : 1);
  const int64_t each = wanted < tiles ? (tiles + wanted - 1) / wanted : 1;
  SweepPlan plan;
  plan.parts = tiles > 0 ? int((tiles + each - 1) / each) : 0;
  const int octet_rows = l.rows / l.octets, octet_columns = l.columns / l.octets;
  plan.numel = 9 * int64_t(octet_rows) * octet_columns + octet_rows;
  plan.partial = int64_t(l.octets) * l.octets * shape.clips * plan.parts * plan.numel;
  plan.gate_partial = l.octets * shape.clips * plan.parts * octet_columns;
  plan.sums = int64_t(l.octets) * l.octets * plan.numel;
  plan.gates = 2 * shape.clips * shape.frames * shape.channels;
  return plan;
}

void sweep(const Shape& shape, const Options& options, const Frames& x, const Frames& grad, const Weights& weights, const float* prepared,
           float* partial, float* gate_partial, float* dz, float* through, void* stream) {
  const SweepPlan plan = plan_sweep(shape, options);
  const int rows = options.mode == EXACT ? 8 : SWEEP_ROWS;
  SweepParams p{shape, options, layout(shape, options), x, grad, weights.gate, prepared, partial, gate_partial, dz, through,
                (shape.width + TILE_WIDTH - 1) / TILE_WIDTH, (shape.height + rows - 1) / rows, plan.parts, SCALAR, plan.numel, vector_rows(x, shape)};
  const bool aligned = reinterpret_cast<uintptr_t>(grad.data) % 16 == 0 && shape.width % 8 == 0 && grad.clip % 8 == 0 && grad.frame % 8 == 0 && grad.row % 8 == 0;
  if (aligned && grad.column == 1 && grad.channel % 8 == 0) p.grad_layout = PLANAR;
  if (aligned && grad.column == 3 && grad.channel == 1 && shape.channels == 3) p.grad_layout = INNERMOST;
  if (shape.clips * plan.parts == 0) return;
  // fp16 frames and fp32 gradients go as two bf16 terms: the range of a gradient is not fp16's.
  const bool split = options.mode == BF16X3 || x.dtype == F16 || (x.dtype == U8 && grad.dtype == F32);
  if (options.mode == EXACT) sweep_exact(p, stream);
  else if (x.dtype == F32) split ? launch_channels<float, BF16X3>(p, stream) : launch_channels<float, BF16X1>(p, stream);
  else if (x.dtype == BF16) launch_channels<bf16, BF16X1>(p, stream);
  else if (x.dtype == F16) launch_channels<f16, BF16X3>(p, stream);
  else split ? launch_channels<uint8_t, BF16X3>(p, stream) : launch_channels<uint8_t, BF16X1>(p, stream);
}

}  // namespace soap
