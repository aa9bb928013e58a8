// precision="strict": the same stages with fp32 multiply-adds instead of tensor cores, for up to 8 frames.
//
// Tile 8 x 32, 128 threads. The folded convolution: a warp takes the 8 frames of one row group j, a lane 8 pixels.
#include "sweep.cuh"

namespace soap::cuda {
namespace {

constexpr int ROWS = 8, PITCH = 36, PLANE = (ROWS + 2) * PITCH, PIXELS = ROWS * TILE_WIDTH, THREADS = 128;

// The tile with its halo as fp32, [column of the folded weight][row][column].
__device__ __forceinline__ void load_tile(
    float* tile, const Frames& x, const Shape& s, const Options& o, int CP, int64_t b, int h0, int w0) {
  for (int i = threadIdx.x; i < CP * 8 * (ROWS + 2) * HALO_WIDTH; i += THREADS) {
    const int column = i % HALO_WIDTH, row = i / HALO_WIDTH % (ROWS + 2), k = i / HALO_WIDTH / (ROWS + 2), c = k / 8,
              t = k % 8;
    const int h = h0 + row - 1, w = w0 + column - 1;
    float v = 0.f;
    if (c < s.channels && t < s.frames && h >= 0 && h < s.height && w >= 0 && w < s.width) {
      v = load_any(x.data, x.dtype, b * x.clip + t * x.frame + c * x.channel + h * x.row + w * x.column);
      if (x.dtype == U8) v = fmaf(v, of_channel(o.scale, c), of_channel(o.shift, c));
    }
    tile[k * PLANE + row * PITCH + column] = v;
  }
}

// acc[frame][pixel] of row group j, for 8 pixels from (row, column) on.
__device__ __forceinline__ void convolve_exact(
    float (&acc)[8][8], const float* tile, const float* prepared, const Layout& l, int j, int row, int column) {
#pragma unroll
  for (int t = 0; t < 8; ++t)
#pragma unroll
    for (int e = 0; e < 8; ++e) acc[t][e] = prepared[l.bias + j * 8 + t];
  const float* weight = prepared + l.packed + j * 8;
#pragma unroll 1
  for (int k = 0; k < l.columns; ++k)
#pragma unroll 1
    for (int dr = 0; dr < 3; ++dr) {
      const float* line = tile + k * PLANE + (row + dr) * PITCH + column;
      float v[10];
#pragma unroll
      for (int e = 0; e < 10; ++e) v[e] = line[e];
#pragma unroll
      for (int dc = 0; dc < 3; ++dc) {
        const float4* u = reinterpret_cast<const float4*>(weight + ((k * 3 + dr) * 3 + dc) * l.rows);
        const float4 a = u[0], b = u[1];
        const float f[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
        for (int t = 0; t < 8; ++t)
#pragma unroll
          for (int e = 0; e < 8; ++e) acc[t][e] = fmaf(f[t], v[dc + e], acc[t][e]);
      }
    }
}

__global__ void __launch_bounds__(THREADS) fuse_exact_kernel(const __grid_constant__ FuseParams p) {
  SOAP_SHARED(float, shared);
  const Shape& s = p.shape;
  const Options& o = p.options;
  const int CP = p.layout.padded_channels, planes = s.frames * s.channels;
  float* tile = shared;
  float* common = tile + p.layout.columns * PLANE;  // 3DEM's prior, [frame][pixel]
  float* gates = common + 8 * PIXELS;
  const int64_t b = blockIdx.x / p.tiles;
  const int index = int(blockIdx.x % p.tiles), h0 = index / p.tiles_across * ROWS,
            w0 = index % p.tiles_across * TILE_WIDTH;
  const int lane = threadIdx.x & 31, j = threadIdx.x >> 5, row = lane / 4, column = lane % 4 * 8, h = h0 + row,
            w = w0 + column;
  if (j == 3) GatePrologue::whole(gates, gates + planes, p, b);
  load_tile(tile, p.x, s, o, CP, b, h0, w0);
  __syncthreads();
  float acc[8][8] = {};
  if (j <= CP && o.rows()) convolve_exact(acc, tile, p.prepared, p.layout, j, row, column);
  if (j == CP)
#pragma unroll
    for (int t = 0; t < 8; ++t)
#pragma unroll
      for (int e = 0; e < 8; ++e) common[t * PIXELS + lane * 8 + e] = o.stencil ? logistic2(acc[t][e]) : 0.f;
  __syncthreads();
  if (j >= s.channels || h >= s.height || w >= s.width) return;
#pragma unroll
  for (int t = 0; t < 8; ++t) {
    if (t >= s.frames) continue;
    float out[8];
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const float v = tile[(j * 8 + t) * PLANE + (row + 1) * PITCH + column + 1 + e];
      const float sum =
          gates[t * s.channels + j] + common[t * PIXELS + lane * 8 + e] + (o.conv() ? logistic2(acc[t][e]) : 0.f);
      out[e] = o.multiplicative ? v * sum : v + sum;
    }
    store_plane(p.y, b * p.y.clip + t * p.y.frame + j * p.y.channel + h * p.y.row + w * p.y.column, out,
        p.vector_y && p.y.column == 1, s.width - w);
  }
}

__global__ void __launch_bounds__(THREADS, 2) sweep_exact_kernel(const __grid_constant__ SweepParams p) {
  SOAP_SHARED(float, shared);
  const Shape& s = p.shape;
  const Options& o = p.options;
  const int CP = p.layout.padded_channels, planes = s.frames * s.channels, rows = p.layout.rows,
            columns = p.layout.columns;
  constexpr int LINE = PIXELS + 1;
  float* tile = shared;
  float* dz = tile + columns * PLANE;  // [row][pixel]
  float* common = dz + rows * LINE;    // [frame][pixel]: the stencil's prior, then the gradient summed over channels
  float* gates = common + 8 * PIXELS;
  const int64_t b = blockIdx.x / p.blocks;
  const int block = int(blockIdx.x % p.blocks), tiles = p.tiles_across * p.tiles_down;
  const int begin = int(int64_t(tiles) * block / p.blocks), end = int(int64_t(tiles) * (block + 1) / p.blocks);
  const int lane = threadIdx.x & 31, j = threadIdx.x >> 5, row = lane / 4, column = lane % 4 * 8;
  if (j == 3) GatePrologue::whole(gates, gates + planes, p, b);
  float dw[6][9] = {}, bias_sum = 0.f, gate_sum[8] = {};
#pragma unroll 1
  for (int index = begin; index < end; ++index) {
    const int h0 = index / p.tiles_across * ROWS, w0 = index % p.tiles_across * TILE_WIDTH, h = h0 + row,
              w = w0 + column;
    __syncthreads();
    load_tile(tile, p.x, s, o, CP, b, h0, w0);
    __syncthreads();
    float acc[8][8] = {};
    if (j <= CP && o.rows()) convolve_exact(acc, tile, p.prepared, p.layout, j, row, column);
    if (j == CP)
#pragma unroll
      for (int t = 0; t < 8; ++t)
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          acc[t][e] = logistic2(acc[t][e]);
          common[t * PIXELS + lane * 8 + e] = o.stencil ? acc[t][e] : 0.f;
        }
    __syncthreads();
    if (j < CP)
#pragma unroll
      for (int t = 0; t < 8; ++t)
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          const bool in = t < s.frames && j < s.channels && h < s.height && w + e < s.width;
          const int64_t pixel = (((b * s.frames + t) * s.channels + j) * s.height + h) * int64_t(s.width) + w + e;
          const float grad = in ? load_any(p.grad.data, p.grad.dtype,
                                      b * p.grad.clip + t * p.grad.frame + j * p.grad.channel + h * p.grad.row +
                                          (w + e) * p.grad.column)
                                : 0.f;
          const float z = logistic2(acc[t][e]);
          if (in && p.through)
            p.through[pixel] =
                grad * (gates[t * s.channels + j] + common[t * PIXELS + lane * 8 + e] + (o.conv() ? z : 0.f));
          const float u =
              o.multiplicative ? grad * tile[(j * 8 + t) * PLANE + (row + 1) * PITCH + column + 1 + e] : grad;
          gate_sum[t] += u;
          dz[(j * 8 + t) * LINE + lane * 8 + e] = u;  // not yet through the sigmoid: the stencil needs it so
          acc[t][e] = fmaf(-z, z, z);
        }
    __syncthreads();
    if (j == CP)
#pragma unroll
      for (int t = 0; t < 8; ++t)
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          float u = 0.f;
          for (int c = 0; c < CP; ++c) u += dz[(c * 8 + t) * LINE + lane * 8 + e];
          dz[(CP * 8 + t) * LINE + lane * 8 + e] = u * fmaf(-acc[t][e], acc[t][e], acc[t][e]);
        }
    __syncthreads();
    if (j < CP)
#pragma unroll
      for (int t = 0; t < 8; ++t)
#pragma unroll
        for (int e = 0; e < 8; ++e) dz[(j * 8 + t) * LINE + lane * 8 + e] *= acc[t][e];
    __syncthreads();
    if (p.dz)
      for (int i = threadIdx.x; i < (s.channels + 1) * s.frames * PIXELS; i += THREADS) {
        const int pixel = i % PIXELS, r = i / PIXELS, c = r / s.frames, t = r % s.frames, ph = h0 + pixel / TILE_WIDTH,
                  pw = w0 + pixel % TILE_WIDTH;
        const bool on = c == s.channels ? o.stencil : o.conv();
        if (ph < s.height && pw < s.width)
          p.dz[((b * (s.channels + 1) * s.frames + r) * s.height + ph) * int64_t(s.width) + pw] =
              on ? dz[((c == s.channels ? CP : c) * 8 + t) * LINE + pixel] : 0.f;
      }
    if (lane < rows) {  // a lane a row, a warp a quarter of the columns
      const int each = columns / 4;
      for (int i = j; i < PIXELS; i += 4) bias_sum += dz[lane * LINE + i];
#pragma unroll 1
      for (int i = 0; i < PIXELS; ++i) {
        const float d = dz[lane * LINE + i];
        const float* at = tile + j * each * PLANE + i / TILE_WIDTH * PITCH + i % TILE_WIDTH;
#pragma unroll
        for (int k = 0; k < 6; ++k)
          if (k < each)
#pragma unroll
            for (int tap = 0; tap < 9; ++tap)
              dw[k][tap] = fmaf(d, at[k * PLANE + tap / 3 * PITCH + tap % 3], dw[k][tap]);
      }
    }
  }
  float* out = p.partial + blockIdx.x * p.numel;
  const int each = columns / 4;
  if (lane < rows)
#pragma unroll
    for (int k = 0; k < 6; ++k)
      if (k < each)
#pragma unroll
        for (int tap = 0; tap < 9; ++tap) out[(tap * rows + lane) * columns + j * each + k] = dw[k][tap];
  __syncthreads();
  common[j * 32 + lane] = bias_sum;
#pragma unroll
  for (int t = 0; t < 8; ++t) {
    const float v = warp_sum(gate_sum[t]);
    if (lane == 0 && j < CP) p.gate_partial[(b * p.blocks + block) * CP * 8 + j * 8 + t] = v;
  }
  __syncthreads();
  if (threadIdx.x < unsigned(rows))
    out[9 * rows * columns + lane] = (common[lane] + common[32 + lane]) + (common[64 + lane] + common[96 + lane]);
}

}  // namespace

size_t exact_memory(const Layout& l, const Shape& s, bool sweep) {
  return sizeof(float) *
         (size_t(l.columns) * PLANE + 8 * PIXELS + (sweep ? l.rows * (PIXELS + 1) : 0) + 2 * s.frames * s.channels);
}

void fuse_exact(const FuseParams& p, void* stream) {
  const size_t shared = exact_memory(p.layout, p.shape, false);
  allow_shared(fuse_exact_kernel, shared);
  SOAP_LAUNCH(fuse_exact_kernel, unsigned(p.shape.clips * p.tiles), THREADS, shared, stream, p);
  launched("fuse, strict");
}

void sweep_exact(const SweepParams& p, void* stream) {
  const size_t shared = exact_memory(p.layout, p.shape, true);
  allow_shared(sweep_exact_kernel, shared);
  SOAP_LAUNCH(sweep_exact_kernel, unsigned(p.shape.clips * p.blocks), THREADS, shared, stream, p);
  launched("sweep, strict");
}

}  // namespace soap::cuda
