#include "sweep.cuh"

#include <algorithm>

namespace soap::cuda {
size_t shared_memory(const Call& call, int grad_dtype) {
  const Shape& shape = call.shape;
  const Layout l = layout(shape, call.options);
  const size_t folds = std::max(prepare_memory(call), finish_memory(call));
  if (call.options.mode == EXACT) return std::max(exact_memory(l, shape, true), folds);
  size_t tiles = 0;
  dispatch<BF16X3, BF16X1>(call.x.dtype, call.options.split(call.x.dtype, grad_dtype), l, [&](auto i) {
    using I = decltype(i);
    tiles = SweepShared<typename I::X, I::MODE, I::CP>::bytes(l, shape.frames * shape.channels);
  });
  return std::max({tiles, fuse_memory(call), folds});
}

// As many blocks as run at a time, but a whole number of tiles to each.
SweepPlan plan_sweep(const Shape& shape, const Options& options) {
  const Layout l = layout(shape, options);
  const int rows = options.mode == EXACT ? 8 : SWEEP_ROWS;
  SweepPlan plan;
  plan.tiles_across = (shape.width + TILE_WIDTH - 1) / TILE_WIDTH;
  plan.tiles_down = (shape.height + rows - 1) / rows;
  const int64_t tiles = int64_t(plan.tiles_across) * plan.tiles_down;
  const int64_t blocks = 2 * multiprocessors(), wanted = (blocks + shape.clips - 1) / shape.clips;
  const int64_t each = wanted < tiles ? (tiles + wanted - 1) / wanted : 1;
  plan.blocks = int((tiles + each - 1) / each);
  const int octet_rows = l.rows / l.octets, octet_columns = l.columns / l.octets;
  plan.numel = 9 * int64_t(octet_rows) * octet_columns + octet_rows;
  plan.partial = int64_t(l.octets) * l.octets * shape.clips * plan.blocks * plan.numel;
  plan.gate_partial = l.octets * shape.clips * plan.blocks * octet_columns;
  plan.sums = int64_t(l.octets) * l.octets * plan.numel;
  plan.gates = 2 * shape.clips * shape.frames * shape.channels;
  return plan;
}

void sweep(const Call& call, const Frames& grad, const float* prepared, float* partial, float* gate_partial, float* dz,
    float* through, void* stream) {
  const Shape& shape = call.shape;
  const Options& options = call.options;
  const Frames& x = call.x;
  const SweepPlan plan = plan_sweep(shape, options);
  SweepParams p{shape, options, layout(shape, options), x, grad, call.weights.gate, prepared, partial, gate_partial, dz,
      through, plan.tiles_across, plan.tiles_down};
  p.blocks = plan.blocks;
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
