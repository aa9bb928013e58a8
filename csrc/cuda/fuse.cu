#include "fuse.cuh"

namespace soap {

void fuse_exact(const FuseParams& p, void* stream);

namespace {

template <class X, int MODE> void launch_channels(const FuseParams& p, void* stream) {
  if (p.layout.padded_channels == 1) launch_fuse<X, MODE, 1>(p, stream);
  else launch_fuse<X, MODE, 3>(p, stream);
}

}  // namespace

void fuse(const Shape& shape, const Options& options, const Frames& x, const Weights& weights, const float* prepared, const Frames& y, void* stream) {
  FuseParams p{shape, options, layout(shape, options), x, y, weights.gate, prepared, (shape.width + TILE_WIDTH - 1) / TILE_WIDTH, 0, vector_rows(x, shape), false};
  p.tiles = p.tiles_wide * ((shape.height + 7) / 8);
  const int64_t bytes = reinterpret_cast<uintptr_t>(y.data) % 16;
  const bool planar = y.column == 1 && y.row % 8 == 0 && y.channel % 8 == 0, inner = y.column == 3 && y.channel == 1 && shape.channels == 3 && y.row % 8 == 0;
  p.vector_y = bytes == 0 && shape.width % 8 == 0 && (planar || inner) && y.clip % 8 == 0 && y.frame % 8 == 0;
  if (shape.clips * p.tiles == 0) return;
  const int mode = options.mode;
  if (mode == EXACT) fuse_exact(p, stream);
  else if (x.dtype == F32) mode == BF16X3 ? launch_channels<float, BF16X3>(p, stream) : launch_channels<float, BF16X1>(p, stream);
  else if (x.dtype == BF16) launch_channels<bf16, BF16X1>(p, stream);
  else if (x.dtype == F16) launch_channels<f16, F16X1>(p, stream);
  else mode == BF16X3 ? launch_channels<uint8_t, BF16X3>(p, stream) : launch_channels<uint8_t, F16X1>(p, stream);
}

}  // namespace soap
