// A tile of frames in shared memory, and the folded convolution over it on tensor cores. Shared by fuse and sweep.
//
// Pixel-major: a pixel holds CP chunks of 16 bytes, a chunk the 8 frames of an octet of one channel as 16-bit numbers,
// so that a chunk is one row of an 8x8 matrix of `ldmatrix`. Chunk (row, column) sits at row * STRIDE + column * CP +
// (column / 8) * 2: any 8 pixels that one `ldmatrix` reads lie in different banks, and so do the stores of 8 lanes.
// An n-tile of the MMA takes columns 8a + 2i + {0, 1}, a = 0..3: a thread then ends up with 8 consecutive pixels.
#pragma once
#include "device.cuh"

namespace soap::cuda {

constexpr int TILE_WIDTH = 32, HALO_WIDTH = TILE_WIDTH + 2;

template <int CP> struct Tile {
  static constexpr int STRIDE = HALO_WIDTH * CP + 9;  // odd
  static constexpr int MT = (CP + 1) / 2;             // 16-row MMA tiles of an octet's rows
  static constexpr int LANE_WORDS = CP == 3 ? 12 : 2;
  static constexpr int ROWS = (CP + 1) * 8, COLUMNS = CP * 8;
  static __device__ __forceinline__ int chunk(int r, int c) { return r * STRIDE + c * CP + (c >> 3) * 2; }
};

template <int MODE> struct Terms { static constexpr int N = MODE == BF16X3 ? 2 : 1; };

// Which instance of a kernel serves a call: the frames' type, how products are formed, channels rounded up.
template <class X_, int MODE_, int CP_> struct Instance {
  using X = X_;
  static constexpr int MODE = MODE_, CP = CP_;
};

template <class X, int MODE, class Work> void by_channels(const Layout& l, const Work& work) {
#ifndef SOAP_FEW  // the tests' quick build has the instances that most of them run
  if (l.padded_channels == 1) return work(Instance<X, MODE, 1>{});
#endif
  work(Instance<X, MODE, 3>{});
}

// work(instance) for frames of this dtype; F16_MODE: of fp16, U8_MODE: of uint8 unless they go `split` in two bf16
// terms.
template <int F16_MODE, int U8_MODE, class Work>
void dispatch(int dtype, bool split, const Layout& l, const Work& work) {
  switch (dtype) {
    case BF16: return by_channels<bf16, BF16X1>(l, work);
#ifdef SOAP_FEW
    default: return by_channels<float, BF16X3>(l, work);
#else
    case F32: return split ? by_channels<float, BF16X3>(l, work) : by_channels<float, BF16X1>(l, work);
    case F16: return by_channels<f16, F16_MODE>(l, work);
    default: return split ? by_channels<uint8_t, BF16X3>(l, work) : by_channels<uint8_t, U8_MODE>(l, work);
#endif
  }
}

// One clip's frames as the kernels see them.
template <class X> struct Clip {
  const X* x;
  int64_t frame, channel, row, column;
  int frames, channels, height, width;
  bool vector;  // rows of whole aligned vectors
};

__device__ __forceinline__ float of_channel(const float* three, int c) {
  return c == 0 ? three[0] : c == 1 ? three[1] : three[2];
}

template <class X> __device__ __forceinline__ float load_one(const X* p, float scale, float shift) {
  const float v = to_float(*p);
  return TypeOf<X>::dtype == U8 ? fmaf(v, scale, shift) : v;
}

template <class X> __device__ __forceinline__ Clip<X> clip_of(const Frames& x, const Shape& s, int64_t b, bool vector) {
  return {static_cast<const X*>(x.data) + b * x.clip, x.frame, x.channel, x.row, x.column, s.frames, s.channels,
      s.height, s.width, vector};
}

// `bytes` consecutive pixels as 32-bit words.
template <int WORDS> struct Words { uint32_t v[WORDS]; };
template <int WORDS, class X> __device__ __forceinline__ Words<WORDS> load_words(const X* p) {
  if constexpr (WORDS == 4) {
    const uint4 u = *reinterpret_cast<const uint4*>(p);
    return {{u.x, u.y, u.z, u.w}};
  } else {
    const uint2 u = *reinterpret_cast<const uint2*>(p);
    return {{u.x, u.y}};
  }
}

// Pixel e of a vector of them.
template <class X, int WORDS> __device__ __forceinline__ float unpack(const Words<WORDS>& w, int e) {
  if constexpr (TypeOf<X>::dtype == F32) return __uint_as_float(w.v[e]);
  else if constexpr (TypeOf<X>::dtype == BF16) return e & 1 ? high_bf16(w.v[e / 2]) : low_bf16(w.v[e / 2]);
  else if constexpr (TypeOf<X>::dtype == F16)
    return __half2float(__ushort_as_half(uint16_t(e & 1 ? w.v[e / 2] >> 16 : w.v[e / 2] & 0xffffu)));
  else  // 2^23 + byte, less 2^23: quicker than a conversion
    return __uint_as_float(__byte_perm(w.v[e / 4], 0x4b000000u, 0x7540 + e % 4)) - 8388608.f;
}

// A chunk of 8 values; of two terms the second, what rounding the first left behind, `terms_apart` chunks on.
template <int MODE> __device__ __forceinline__ void put(uint4* s, int terms_apart, const float* v) {
  const uint4 h = pack8<MODE == F16X1>(v);
  s[0] = h;
  if constexpr (Terms<MODE>::N == 2)
    s[terms_apart] = make_uint4(
        pack_rest(v[0], v[1], h.x), pack_rest(v[2], v[3], h.y), pack_rest(v[4], v[5], h.z), pack_rest(v[6], v[7], h.w));
}

// The sum of a vector of pixels.
template <class X> __device__ __forceinline__ float vector_sum(const X* p) {
  constexpr int V = TypeOf<X>::vector, WORDS = V * sizeof(X) / 4;
  const Words<WORDS> w = load_words<WORDS>(p);
  float sum = 0.f;
#pragma unroll
  for (int e = 0; e < V; ++e) sum += unpack<X>(w, e);
  return sum;
}

// Rows [first, first + rows) of the tile's halo, whose row 0 is image row h0 and column 0 image column w0 - 1, of one
// octet; row r goes to slot r & mask. Outside the image zeros. `terms_apart` chunks lie between hi and lo.
template <class X, int MODE, int CP, int THREADS>
__device__ __forceinline__ void stage(uint4* s, int terms_apart, const Clip<X>& x, const Options& o, int octet, int h0,
    int w0, int first, int rows, int mask) {
  constexpr int V = TypeOf<X>::vector, GROUPS = TILE_WIDTH / V, WORDS = V * sizeof(X) / 4;
  constexpr bool RAW = (MODE == BF16X1 && TypeOf<X>::dtype == BF16) || (MODE == F16X1 && TypeOf<X>::dtype == F16);
  const int frames = min(8, x.frames - octet * 8);
  // The columns left and right, a thread each: their loads are under way while the rows' are.
  const int side = threadIdx.x & 1, edge_c = threadIdx.x / 2 % CP, edge_r = first + int(threadIdx.x) / 2 / CP;
  const bool edge = int(threadIdx.x) < CP * 2 * rows;
  float edges[8];
  if (edge) {
    const int h = h0 + edge_r, w = side ? w0 + TILE_WIDTH : w0 - 1;
    const bool in = h >= 0 && h < x.height && w >= 0 && (w < x.width || planted<RIGHT_EDGE>) && edge_c < x.channels;
    const X* p = x.x + int64_t(octet) * 8 * x.frame + edge_c * x.channel + h * x.row + w * x.column;
#pragma unroll
    for (int t = 0; t < 8; ++t) {
      edges[t] = in && t < frames ? load_one(p, of_channel(o.scale, edge_c), of_channel(o.shift, edge_c)) : 0.f;
      p += x.frame;
    }
  }
  for (int i = threadIdx.x; i < CP * GROUPS * rows; i += THREADS) {
    const int group = i % GROUPS, c = i / GROUPS % CP, r = first + i / GROUPS / CP, h = h0 + r, w = w0 + group * V;
    const bool in = h >= 0 && h < x.height && c < x.channels && w < x.width;
    const X* p = x.x + int64_t(octet) * 8 * x.frame + c * x.channel + h * x.row + w * x.column;
    const float scale = of_channel(o.scale, c), shift = of_channel(o.shift, c);
    uint4* out = s + Tile<CP>::chunk(r & mask, 1 + group * V) + c;
    // The last column of the vector is a multiple of 8, where chunk() leaps.
    const int skip = V == 8 || group & 1 ? 2 : 0;
    if (in && x.vector) {
      Words<WORDS> v[8];
#pragma unroll
      for (int t = 0; t < 8; ++t) {
        if (t < frames) v[t] = load_words<WORDS>(p);
        else v[t] = {};
        p += x.frame;
      }
#pragma unroll
      for (int e = 0; e < V; ++e) {
        uint4* at = out + e * CP + (e == V - 1 ? skip : 0);
        if constexpr (RAW) {
          uint32_t h2[4];
#pragma unroll
          for (int k = 0; k < 4; ++k)
            h2[k] = __byte_perm(v[2 * k].v[e / 2], v[2 * k + 1].v[e / 2], e & 1 ? 0x7632 : 0x5410);
          *at = make_uint4(h2[0], h2[1], h2[2], h2[3]);
        } else {
          float u[8];
#pragma unroll
          for (int t = 0; t < 8; ++t) {
            u[t] = unpack<X>(v[t], e);
            if (TypeOf<X>::dtype == U8) u[t] = fmaf(u[t], scale, shift);
          }
          put<MODE>(at, terms_apart, u);
        }
      }
    } else {
#pragma unroll 1
      for (int e = 0; e < V; ++e) {
        float u[8];
#pragma unroll
        for (int t = 0; t < 8; ++t)
          u[t] = in && t < frames && w + e < x.width ? load_one(p + t * x.frame + e * x.column, scale, shift) : 0.f;
        put<MODE>(out + e * CP + (e == V - 1 ? skip : 0), terms_apart, u);
      }
    }
  }
  if (edge) put<MODE>(s + Tile<CP>::chunk(edge_r & mask, side ? HALO_WIDTH - 1 : 0) + edge_c, terms_apart, edges);
}

// acc[tile][n-tile][fragment] += folded convolution of one octet, for a row of 32 pixels. `row` is the halo row above
// it; rows wrap at MASK. `packed`: the octet pair's fragments. One loop over the taps, not unrolled: ptxas would keep
// many fragments in flight and spill.
template <int MODE, int CP, int MASK>
__device__ __forceinline__ void convolve(
    float (&acc)[Tile<CP>::MT][4][4], const uint4* s, int terms_apart, const uint32_t* packed, int words, int row) {
  constexpr int XT = Terms<MODE>::N, LW = Tile<CP>::LANE_WORDS, V = CP == 3 ? 4 : 2;
  constexpr bool HALF = MODE == F16X1;
  const int lane = threadIdx.x & 31, n = lane & 7, matrix = lane >> 3, column = 8 * (n >> 1) + (n & 1);
  // Which pixel this lane points ldmatrix at. A tap to the right crosses a multiple of 8, where chunk() leaps by 2,
  // only from the last n-tile (of CP = 3: the second of a pair): from this kernel column on.
  const int far4 = 2 * (CP == 3 ? matrix >> 1 : matrix), far2 = 2 * (matrix & 1);
  const int leap4_from = (CP == 3 ? 4 : 8) - (n & 1) - far4, leap2_from = 4 - (n & 1) - far2;
  const Address at4 = address_of(s + Tile<CP>::chunk(0, column + far4) + (CP == 3 ? matrix & 1 : 0));
  const Address at2 = address_of(s + Tile<CP>::chunk(0, column + far2) + 2);
  const int term_bytes = terms_apart * 16;
  packed += lane * V;
  int dc = 0, line = (row & MASK) * Tile<CP>::STRIDE * 16;
#pragma unroll 1
  for (int tap = 0; tap < 9; ++tap) {
    uint32_t a[XT][LW];
#pragma unroll
    for (int k = 0; k < XT; ++k) {
#pragma unroll
      for (int e = 0; e < LW / V; ++e) {
        const Words<V> w = load_words<V>(packed + k * words + e * V * 32);
#pragma unroll
        for (int i = 0; i < V; ++i) a[k][e * V + i] = w.v[i];
      }
    }
    if constexpr (CP == 3) {
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {  // n-tiles 2 * pair, 2 * pair + 1
        const int leap4 = pair && dc >= leap4_from ? 32 : 0, leap2 = pair && dc >= leap2_from ? 32 : 0;
#pragma unroll
        for (int xt = 0; xt < XT; ++xt) {
          Fragment b;
          uint32_t b0, b1;
          ldmatrix_x4(b, at4 + line + leap4 + xt * term_bytes + pair * 64 * CP);
          ldmatrix_x2(b0, b1, at2 + line + leap2 + xt * term_bytes + pair * 64 * CP);
#pragma unroll
          for (int k = 0; k < XT - xt; ++k)
#pragma unroll
            for (int m = 0; m < 2; ++m) {
              mma_k16<HALF>(acc[m][2 * pair], a[k] + 4 * m, b.v[0], b.v[1]);
              mma_k16<HALF>(acc[m][2 * pair + 1], a[k] + 4 * m, b.v[2], b.v[3]);
              mma_k8<HALF>(acc[m][2 * pair], a[k] + 8 + 2 * m, b0);
              mma_k8<HALF>(acc[m][2 * pair + 1], a[k] + 8 + 2 * m, b1);
            }
        }
      }
    } else {
      const int leap = dc >= leap4_from ? 32 : 0;
#pragma unroll
      for (int xt = 0; xt < XT; ++xt) {
        Fragment b;
        ldmatrix_x4(b, at4 + line + leap + xt * term_bytes);
#pragma unroll
        for (int k = 0; k < XT - xt; ++k)
#pragma unroll
          for (int i = 0; i < 4; ++i) mma_k8<HALF>(acc[0][i], a[k], b.v[i]);
      }
    }
    packed += LW * 32;
    line += (planted<TAP> ? 2 : 1) * CP * 16;
    if (++dc == 3) {
      dc = 0;
      line = (++row & MASK) * Tile<CP>::STRIDE * 16;
    }
  }
}

// The gates of a clip's planes, (T, C), plus the options' offset: the work of one warp, a lane a plane. What it needs
// from memory is asked for first (`begin`), so that it arrives while the block loads frames; `end` leaves the gates in
// shared memory.
struct GatePrologue {
  float mean, tap[3 * MAX_CHANNELS], bias;

  template <class Params> static __device__ __forceinline__ float mean_of(const Params& p, int64_t b, int plane) {
    const Shape& s = p.shape;
    const Options& o = p.options;
    const float* means = p.prepared + p.layout.means;
    const float4* partial = reinterpret_cast<const float4*>(means + (b * s.frames * s.channels + plane) * SEGMENTS);
    float sum = 0.f;
#pragma unroll
    for (int k = 0; k < SEGMENTS / 4; ++k) {
      const float4 v = partial[k];
      sum += (v.x + v.y) + (v.z + v.w);
    }
    const int c = plane % s.channels;
    return fmaf(
        sum * __fdividef(1.f, float(s.height) * float(s.width)), of_channel(o.scale, c), of_channel(o.shift, c));
  }
  template <class Params> __device__ __forceinline__ void begin(const Params& p, int64_t b) {
    const int lane = threadIdx.x & 31, C = p.shape.channels, c = lane % C;
    if (!p.options.cwem) return;
    const float* taps = p.prepared + p.layout.taps;
    mean = lane < p.shape.frames * C ? mean_of(p, b, lane) : 0.f;
    bias = taps[3 * C * C + c];
#pragma unroll
    for (int i = 0; i < 3 * MAX_CHANNELS; ++i) {
      const int dt = i / MAX_CHANNELS, from = i % MAX_CHANNELS;
      tap[i] = from < C ? taps[(c * 3 + dt) * C + from] : 0.f;
    }
  }
  template <class Params>
  __device__ __forceinline__ void end(float* gates, float* means, const Params& p, int64_t b) const {
    const Shape& s = p.shape;
    const Options& o = p.options;
    const float* taps = p.prepared + p.layout.taps;
    const int C = s.channels, planes = s.frames * C, lane = threadIdx.x & 31;
    if (!o.cwem) {
      for (int i = lane; i < planes; i += 32)
        gates[i] = o.offset + (o.given_gate ? load_any(p.gate, b * planes + i) : 0.f);
      return;
    }
    if (lane < planes) means[lane] = mean;
    for (int i = lane + 32; i < planes; i += 32) means[i] = mean_of(p, b, i);
    __syncwarp();
#pragma unroll 1
    for (int i = lane; i < planes; i += 32) {
      const int t = i / C, c = i % C;
      float z = i < 32 ? bias : taps[3 * C * C + c];
#pragma unroll
      for (int k = 0; k < 3 * MAX_CHANNELS; ++k) {
        const int dt = k / MAX_CHANNELS, from = k % MAX_CHANNELS;
        if (from < C && t + dt >= 1 && t + dt <= s.frames)
          z = fmaf(i < 32 ? tap[k] : taps[(c * 3 + dt) * C + from], means[(t + dt - 1) * C + from], z);
      }
      gates[i] = o.offset + logistic2(-LOG2E * z);
    }
  }
  template <class Params>
  static __device__ __forceinline__ void whole(float* gates, float* means, const Params& p, int64_t b) {
    GatePrologue prologue;
    prologue.begin(p, b);
    prologue.end(gates, means, p, b);
  }
};

inline bool vector_rows(const Frames& x, const Shape& s) {
  const int64_t v = x.dtype == F32 ? 4 : 8, bytes = x.dtype == U8 ? 8 : 16;
  return x.column == 1 && s.width % v == 0 && reinterpret_cast<uintptr_t>(x.data) % bytes == 0 && x.clip % v == 0 &&
         x.frame % v == 0 && x.channel % v == 0 && x.row % v == 0;
}

// Planes without gaps, at 16-byte boundaries: their pixels can be taken `v` at a time, as far as they go.
inline bool whole_planes(const Frames& x, int width, int v) {
  return x.column == 1 && x.row == width && reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.clip % v == 0 &&
         x.frame % v == 0 && x.channel % v == 0;
}

}  // namespace soap::cuda
