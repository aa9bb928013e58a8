#include "fuse.cuh"

namespace soap::cuda {

void fuse_exact(const FuseParams& p, void* stream);

size_t fuse_memory(const Shape& shape, const Options& options, int dtype) {
  const Layout l = layout(shape, options);
  size_t bytes = 0;
  dispatch<F16X1, F16X1>(dtype, options.mode == BF16X3, l,
      [&](auto i) { bytes = fuse_shared<typename decltype(i)::X, decltype(i)::MODE, decltype(i)::CP>(shape, l); });
  return bytes;
}

void fuse(const Shape& shape, const Options& options, const Frames& x, const Weights& weights, const float* prepared,
    const Frames& y, void* stream) {
  FuseParams p{shape, options, layout(shape, options), x, y, weights.gate, prepared};
  p.tiles_wide = (shape.width + TILE_WIDTH - 1) / TILE_WIDTH;
  p.vector_x = vector_rows(x, shape);
  p.tiles = p.tiles_wide * ((shape.height + 7) / 8);
  const int64_t bytes = reinterpret_cast<uintptr_t>(y.data) % 16;
  const bool planar = y.column == 1 && y.row % 8 == 0 && y.channel % 8 == 0,
             inner = y.column == 3 && y.channel == 1 && shape.channels == 3 && y.row % 8 == 0;
  p.vector_y = bytes == 0 && shape.width % 8 == 0 && (planar || inner) && y.clip % 8 == 0 && y.frame % 8 == 0;
  if (options.mode == EXACT) return fuse_exact(p, stream);
  dispatch<F16X1, F16X1>(x.dtype, options.mode == BF16X3, p.layout,
      [&](auto i) { launch_fuse<typename decltype(i)::X, decltype(i)::MODE, decltype(i)::CP>(p, stream); });
}

}  // namespace soap::cuda
