#include "sweep.cuh"

#include <algorithm>

namespace soap::cuda {
size_t shared_memory(const Shape& shape, const Options& options, const Weights& weights, int x_dtype, int grad_dtype) {
  const Layout l = layout(shape, options);
  size_t tiles = 0;
  if (options.mode == EXACT) tiles = exact_memory(l, shape, true);
  else
    dispatch<BF16X3, BF16X1>(x_dtype, options.split(x_dtype, grad_dtype), l, [&](auto i) {
      using I = decltype(i);
      tiles = SweepShared<typename I::X, I::MODE, I::CP>::bytes(l, shape.frames * shape.channels);
    });
  const size_t fused = options.mode == EXACT ? 0 : fuse_memory(shape, options, x_dtype);
  const size_t folds = std::max(prepare_memory(shape, options, weights), finish_memory(shape, options, weights));
  return std::max({tiles, fused, folds});
}

// As many blocks as run at a time, but a whole number of tiles to each.
SweepPlan plan_sweep(const Shape& shape, const Options& options) {
  const Layout l = layout(shape, options);
  const int rows = options.mode == EXACT ? 8 : SWEEP_ROWS;
  const int64_t tiles = int64_t((shape.width + TILE_WIDTH - 1) / TILE_WIDTH) * ((shape.height + rows - 1) / rows);
  const int64_t blocks = 2 * multiprocessors(), wanted = (blocks + shape.clips - 1) / shape.clips;
  const int64_t each = wanted < tiles ? (tiles + wanted - 1) / wanted : 1;
  SweepPlan plan;
  plan.parts = int((tiles + each - 1) / each);
  const int octet_rows = l.rows / l.octets, octet_columns = l.columns / l.octets;
  plan.numel = 9 * int64_t(octet_rows) * octet_columns + octet_rows;
  plan.partial = int64_t(l.octets) * l.octets * shape.clips * plan.parts * plan.numel;
  plan.gate_partial = l.octets * shape.clips * plan.parts * octet_columns;
  plan.sums = int64_t(l.octets) * l.octets * plan.numel;
  plan.gates = 2 * shape.clips * shape.frames * shape.channels;
  return plan;
}

void sweep(const Shape& shape, const Options& options, const Frames& x, const Frames& grad, const Weights& weights,
    const float* prepared, float* partial, float* gate_partial, float* dz, float* through, void* stream) {
  const SweepPlan plan = plan_sweep(shape, options);
  const int rows = options.mode == EXACT ? 8 : SWEEP_ROWS;
  SweepParams p{shape, options, layout(shape, options), x, grad, weights.gate, prepared, partial, gate_partial};
  p.dz = dz;
  p.through = through;
  p.tiles_wide = (shape.width + TILE_WIDTH - 1) / TILE_WIDTH;
  p.tiles_high = (shape.height + rows - 1) / rows;
  p.parts = plan.parts;
  p.numel = plan.numel;
  p.vector_x = vector_rows(x, shape);
  p.grad_layout = SCALAR;
  const bool aligned = reinterpret_cast<uintptr_t>(grad.data) % 16 == 0 && shape.width % 8 == 0 && grad.clip % 8 == 0 &&
                       grad.frame % 8 == 0 && grad.row % 8 == 0;
  if (aligned && grad.column == 1 && grad.channel % 8 == 0) p.grad_layout = PLANAR;
  if (aligned && grad.column == 3 && grad.channel == 1 && shape.channels == 3) p.grad_layout = INNERMOST;
  if (options.mode == EXACT) return sweep_exact(p, stream);
  dispatch<BF16X3, BF16X1>(x.dtype, options.split(x.dtype, grad.dtype), p.layout,
      [&](auto i) { launch_sweep<typename decltype(i)::X, decltype(i)::MODE, decltype(i)::CP>(p, stream); });
}

}  // namespace soap::cuda
