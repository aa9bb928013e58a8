#include "fuse.cuh"

namespace soap::cuda {

void fuse_exact(const FuseParams& p, void* stream);

size_t fuse_memory(const Call& call) {
  const Layout l = layout(call.shape, call.options);
  size_t bytes = 0;
  dispatch<F16X1, F16X1>(call.x.dtype, call.options.mode == BF16X3, l,
      [&](auto i) { bytes = fuse_shared<typename decltype(i)::X, decltype(i)::MODE, decltype(i)::CP>(call.shape, l); });
  return bytes;
}

void fuse(const Call& call, const float* prepared, const Frames& y, void* stream) {
  const Shape& shape = call.shape;
  FuseParams p{shape, call.options, layout(shape, call.options), call.x, y, call.weights.gate, prepared};
  p.tiles_across = (shape.width + TILE_WIDTH - 1) / TILE_WIDTH;
  p.vector_x = vector_rows(call.x, shape);
  p.tiles = p.tiles_across * ((shape.height + 7) / 8);
  const int64_t bytes = reinterpret_cast<uintptr_t>(y.data) % 16;
  const bool planar = y.column == 1 && y.row % 8 == 0 && y.channel % 8 == 0,
             inner = y.column == 3 && y.channel == 1 && shape.channels == 3 && y.row % 8 == 0;
  p.vector_y = bytes == 0 && shape.width % 8 == 0 && (planar || inner) && y.clip % 8 == 0 && y.frame % 8 == 0;
  if (call.options.mode == EXACT) return fuse_exact(p, stream);
  dispatch<F16X1, F16X1>(call.x.dtype, call.options.mode == BF16X3, p.layout,
      [&](auto i) { launch_fuse<typename decltype(i)::X, decltype(i)::MODE, decltype(i)::CP>(p, stream); });
}

}  // namespace soap::cuda
