// fuse: y = x joined with its priors, one read of x (plus a halo), one write of y.
//
// A block takes a tile of 8 x 32 pixels of one clip, all planes; a warp one or two rows of it. Roofline: see
// docs/gpu-cuda.md.
#pragma once
#include "tile.cuh"

namespace soap::cuda {

struct FuseParams {
  Shape shape;
  Options options;
  Layout layout;
  Frames x, y;
  Array gate;
  const float* prepared;
  int tiles_across, tiles;  // of a clip
  bool vector_x, vector_y;  // whole aligned vectors of 8 pixels; of y: of 24 values in a row if channels lie innermost
};

// 8 values, as y's dtype.
__device__ __forceinline__ void store8(void* y, int dtype, int64_t i, const float* v) {
  if (dtype == F32) {
    float4* p = reinterpret_cast<float4*>(static_cast<float*>(y) + i);
    p[0] = make_float4(v[0], v[1], v[2], v[3]);
    p[1] = make_float4(v[4], v[5], v[6], v[7]);
  } else {
    uint4* p = reinterpret_cast<uint4*>(static_cast<uint16_t*>(y) + i);
    if (dtype == F16) *p = pack8<true>(v);
    else *p = pack8<false>(v);
  }
}

// 8 consecutive pixels of one plane; beyond `count` zeros.
template <class X>
__device__ __forceinline__ void load8(
    float* v, const X* p, int64_t step, int count, bool vector, float scale, float shift) {
  if (vector && count >= 8) {
    constexpr int V = TypeOf<X>::vector, WORDS = V * sizeof(X) / 4;
#pragma unroll
    for (int k = 0; k < 8 / V; ++k) {
      const Words<WORDS> w = load_words<WORDS>(p + k * V);
#pragma unroll
      for (int e = 0; e < V; ++e) {
        const float u = unpack<X>(w, e);
        v[k * V + e] = TypeOf<X>::dtype == U8 ? fmaf(u, scale, shift) : u;
      }
    }
  } else {
#pragma unroll
    for (int e = 0; e < 8; ++e) v[e] = e < count ? load_one(p + e * step, scale, shift) : 0.f;
  }
}

// 8 values of one plane, or the first `count` of them `step` apart.
__device__ __forceinline__ void store_plane(const Frames& y, int64_t i, const float* v, bool vector, int count) {
  if (vector) return store8(y.data, y.dtype, i, v);
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    if (e < count) store_any(y.data, y.dtype, i, v[e]);
    i += y.column;
  }
}

#ifndef SOAP_FUSE_BLOCKS
#define SOAP_FUSE_BLOCKS 4
#endif

template <class X, int MODE, int CP>
__global__ void __launch_bounds__(128, SOAP_FUSE_BLOCKS) fuse_kernel(const __grid_constant__ FuseParams p) {
  SOAP_SHARED(uint4, shared);
  constexpr int TILE_ROWS = 8, HALO_ROWS = TILE_ROWS + 2, MT = Tile<CP>::MT, XT = Terms<MODE>::N;
  constexpr int OCTET = HALO_ROWS * Tile<CP>::STRIDE;  // chunks of one octet, one term
  const Shape& s = p.shape;
  const Options& o = p.options;
  const int octets = p.layout.octets, terms_apart = octets * OCTET, planes = s.frames * s.channels;
  float* gates = reinterpret_cast<float*>(shared + XT * terms_apart);
  float* means = gates + planes;
  const int64_t b = blockIdx.x / p.tiles;
  const int tile = int(blockIdx.x % p.tiles), h0 = tile / p.tiles_across * TILE_ROWS,
            w0 = tile % p.tiles_across * TILE_WIDTH;
  const Clip<X> x = clip_of<X>(p.x, s, b, p.vector_x);
  GatePrologue prologue;
  if (threadIdx.x >= 96) prologue.begin(p, b);
  if (o.rows())
#pragma unroll 1
    for (int from = 0; from < octets; ++from)
      stage<X, MODE, CP, 128>(shared + from * OCTET, terms_apart, x, o, from, h0 - 1, w0, 0, HALO_ROWS, 31);
  if (threadIdx.x >= 96) prologue.end(gates, means, p, b);
  if (!planted<TILE_BARRIER>) __syncthreads();

  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, q = lane & 3, w = w0 + 8 * q;
  const uint32_t* packed = reinterpret_cast<const uint32_t*>(p.prepared + p.layout.packed) +
                           (MODE == F16X1 ? 2 * int64_t(p.layout.words) : 0);
  const float has_conv = o.conv() ? 1.f : 0.f, has_stencil = o.stencil ? 1.f : 0.f;
#pragma unroll 1
  for (int pass = warp; pass < octets * TILE_ROWS; pass += 4) {  // one row of 32 pixels, one octet of frames
    const int octet = pass / TILE_ROWS, row = pass % TILE_ROWS, h = h0 + row, t = octet * 8 + g;
    if (h >= s.height) continue;
    float bias[2 * MT], scale[2 * MT] = {}, acc[MT][4][4];
#pragma unroll
    for (int j = 0; j < 2 * MT; ++j) {
      bias[j] = p.prepared[p.layout.bias + (octet * 2 * MT + j) * 8 + g];
      if constexpr (MODE == F16X1) scale[j] = p.prepared[p.layout.scale + (octet * 2 * MT + j) * 8 + g];
    }
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) acc[m][i][e] = MODE == F16X1 ? 0.f : bias[2 * m + e / 2];
    if (o.rows())
#pragma unroll 1
      for (int from = 0; from < octets; ++from)
        convolve<MODE, CP, 31>(acc, shared + from * OCTET, terms_apart,
            packed + (octet * octets + from) * 9 * Tile<CP>::LANE_WORDS * 32, p.layout.words, row);

    // This thread owns frame t: all channels and the 3DEM row, 8 consecutive pixels.
    if (t >= s.frames || w >= s.width) continue;
    auto prior = [&](int j, int e) {
      const float z = acc[j / 2][e / 2][j % 2 * 2 + (e & 1)];
      return logistic2(MODE == F16X1 ? fmaf(z, scale[j], bias[j]) : z);
    };
    float out[CP][8], common[8];
#pragma unroll
    for (int e = 0; e < 8; ++e) common[e] = has_stencil * prior(CP, e);
    const X* from = x.x + t * x.frame + h * x.row + w * x.column;
    const int64_t at = b * p.y.clip + t * p.y.frame + h * p.y.row + w * p.y.column;
    const bool inner = CP == 3 && p.vector_y && p.y.column == 3;  // channels innermost: 24 values in a row
#pragma unroll
    for (int c = 0; c < CP; ++c) {
      if (c >= s.channels) continue;
      float v[8];
      load8(v, from + c * x.channel, x.column, s.width - w, x.vector, o.scale[c], o.shift[c]);
      const float gate = gates[t * s.channels + c];
      if (o.multiplicative) {
#pragma unroll
        for (int e = 0; e < 8; ++e) out[c][e] = v[e] * fmaf(has_conv, prior(c, e), gate + common[e]);
      } else {
#pragma unroll
        for (int e = 0; e < 8; ++e) out[c][e] = v[e] + fmaf(has_conv, prior(c, e), gate + common[e]);
      }
      if (!inner) store_plane(p.y, at + c * p.y.channel, out[c], p.vector_y, s.width - w);
    }
    if (inner) {
      float line[24];
#pragma unroll
      for (int i = 0; i < 24; ++i) line[i] = out[i % CP][i / CP % 8];
#pragma unroll
      for (int i = 0; i < 3; ++i) store8(p.y.data, p.y.dtype, at + 8 * i, line + 8 * i);
    }
  }
}

template <class X, int MODE, int CP> size_t fuse_shared(const Shape& s, const Layout& l) {
  return size_t(Terms<MODE>::N) * l.octets * 10 * Tile<CP>::STRIDE * 16 + sizeof(float) * 2 * s.frames * s.channels;
}

template <class X, int MODE, int CP> void launch_fuse(const FuseParams& p, void* stream) {
  const size_t shared = fuse_shared<X, MODE, CP>(p.shape, p.layout);
  allow_shared(fuse_kernel<X, MODE, CP>, shared);
  SOAP_LAUNCH((fuse_kernel<X, MODE, CP>), unsigned(p.shape.clips * p.tiles), 128, shared, stream, p);
  launched("fuse");
}

}  // namespace soap::cuda
