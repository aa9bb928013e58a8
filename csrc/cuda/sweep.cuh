// sweep: backward's one pass over x and the incoming gradient, down to partial sums for every weight.
//
// A block walks tiles of 6 x 32 pixels of one clip downwards, keeping the last two rows of x in a ring of 8. Per tile:
// load x, recompute the pre-activations (a warp a row), turn the gradient into dz = gradient * s * (1 - s) in shared
// memory, multiply dz by the 9 shifted views of x. Warp w holds the gradient of kernel row w % 3 for m-tile w / 3 in
// registers over all tiles. Sums are in a fixed order: the same bits every time.
#pragma once
#include "fuse.cuh"

namespace soap::cuda {

// Vectors of 8 pixels; of 8 pixels x 3 channels; neither.
enum GradLayout : int { PLANAR = 0, INNERMOST = 1, SCALAR = 2 };

struct SweepParams {
  Shape shape;
  Options options;
  Layout layout;
  Frames x, grad;
  Array gate;
  const float* prepared;
  float *partial, *gate_partial, *dz, *through;
  int tiles_across, tiles_down, blocks, grad_layout;
  int64_t numel;
  bool vector_x;
};

void sweep_exact(const SweepParams& p, void* stream);
size_t fuse_memory(const Call&);
size_t exact_memory(const Layout&, const Shape&, bool sweep);
size_t prepare_memory(const Call&);
size_t finish_memory(const Call&);

// 8 consecutive values of any floating type, from a 16-byte boundary.
__device__ __forceinline__ void load8_float(float* v, const void* from, int dtype, int64_t i) {
  if (dtype == F32) {
    const float* p = static_cast<const float*>(from) + i;
    const Words<4> a = load_words<4>(p), b = load_words<4>(p + 4);
#pragma unroll
    for (int e = 0; e < 8; ++e) v[e] = unpack<float>(e < 4 ? a : b, e % 4);
  } else {
    const Words<4> w = load_words<4>(static_cast<const uint16_t*>(from) + i);
#pragma unroll
    for (int e = 0; e < 8; ++e) v[e] = dtype == F16 ? unpack<f16>(w, e) : unpack<bf16>(w, e);
  }
}

// The gradient of 8 pixels of each channel of a frame; outside the image zeros.
template <int CP>
__device__ __forceinline__ void load_gradient(float (&v)[CP][8], const SweepParams& p, int64_t b, int t, int h, int w) {
  const Shape& s = p.shape;
  const int64_t at = b * p.grad.clip + t * p.grad.frame + h * p.grad.row + w * p.grad.column;
  if (t >= s.frames || (h >= s.height && !planted<DZ_EDGE>) || w >= s.width) {
#pragma unroll
    for (int i = 0; i < CP * 8; ++i) v[i / 8][i % 8] = 0.f;
  } else if (CP == 3 && p.grad_layout == INNERMOST) {
    float line[24];
#pragma unroll
    for (int i = 0; i < 3; ++i) load8_float(line + 8 * i, p.grad.data, p.grad.dtype, at + 8 * i);
#pragma unroll
    for (int i = 0; i < 24; ++i) v[i % CP][i / CP % 8] = line[i];
  } else {
#pragma unroll
    for (int c = 0; c < CP; ++c) {
      if (c < s.channels && p.grad_layout == PLANAR)
        load8_float(v[c], p.grad.data, p.grad.dtype, at + c * p.grad.channel);
      else {
        int64_t i = at + c * p.grad.channel;
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          v[c][e] = c < s.channels && w + e < s.width ? load_any(p.grad.data, p.grad.dtype, i) : 0.f;
          i += p.grad.column;
        }
      }
    }
  }
}

constexpr int SWEEP_ROWS = 6, SWEEP_THREADS = 192;

template <class X, int MODE, int CP> struct SweepShared {
  static constexpr int OCTET = 8 * Tile<CP>::STRIDE, DZ = SWEEP_ROWS * 4 * Tile<CP>::ROWS;  // chunks
  static size_t bytes(const Layout& l, int planes) {
    return size_t(Terms<MODE>::N) * (l.octets * OCTET + DZ) * 16 + sizeof(float) * (2 * planes + 2 * 6 * 8 * 4);
  }
};

#ifndef SOAP_SWEEP_BLOCKS
#define SOAP_SWEEP_BLOCKS 2
#endif

template <class X, int MODE, int CP>
__global__ void __launch_bounds__(SWEEP_THREADS, SOAP_SWEEP_BLOCKS)
    sweep_kernel(const __grid_constant__ SweepParams p) {
  SOAP_SHARED(uint4, shared);
  using S = SweepShared<X, MODE, CP>;
  constexpr int MT = Tile<CP>::MT, XT = Terms<MODE>::N, ROWS = Tile<CP>::ROWS;
  const Shape& s = p.shape;
  const Options& o = p.options;
  const int octets = p.layout.octets, terms_apart = octets * S::OCTET, planes = s.frames * s.channels;
  const int to = blockIdx.y / octets, only = blockIdx.y % octets;  // octet of the rows, octet of the columns
  uint4* dz = shared + XT * terms_apart;
  float* gates = reinterpret_cast<float*>(dz + XT * S::DZ);
  float* means = gates + planes;
  float* sums = means + planes;
  const int64_t b = blockIdx.x / p.blocks;
  const int block = int(blockIdx.x % p.blocks), tiles = p.tiles_across * p.tiles_down;
  const int begin = int(int64_t(tiles) * block / p.blocks), end = int(int64_t(tiles) * (block + 1) / p.blocks);
  const Clip<X> x = clip_of<X>(p.x, s, b, p.vector_x);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, q = lane & 3, n = lane & 7,
            matrix = lane >> 3;
  if (p.through && warp == 5) GatePrologue::whole(gates, means, p, b);
  const uint32_t* packed = reinterpret_cast<const uint32_t*>(p.prepared + p.layout.packed) +
                           int64_t(to) * octets * 9 * Tile<CP>::LANE_WORDS * 32;
  const int kernel_row = warp % 3, share = warp / 3, t = to * 8 + g;
  float dw[3][CP][4], bias_sum[CP + 1], gate_sum[CP];
#pragma unroll
  for (int i = 0; i < 3 * CP * 4; ++i) dw[i / 4 / CP][i / 4 % CP][i % 4] = 0.f;
#pragma unroll
  for (int j = 0; j <= CP; ++j) bias_sum[j] = 0.f;
#pragma unroll
  for (int c = 0; c < CP; ++c) gate_sum[c] = 0.f;

#pragma unroll 1
  for (int tile = begin; tile < end; ++tile) {
    const int h0 = tile % p.tiles_down * SWEEP_ROWS, w0 = tile / p.tiles_down * TILE_WIDTH;
    const bool fresh = tile == begin || h0 == 0;
    if (o.rows())
#pragma unroll 1
      for (int from = 0; from < octets; ++from)
        stage<X, MODE, CP, SWEEP_THREADS>(
            shared + from * S::OCTET, terms_apart, x, o, from, 0, w0, fresh ? h0 - 1 : h0 + 1, fresh ? 8 : 6, 7);
    const int h = h0 + warp, w = w0 + 8 * q;
    if (p.grad_layout != SCALAR && t < s.frames && h < s.height && w < s.width) {  // read after the convolution
      const char* at = static_cast<const char*>(p.grad.data);
      const int64_t size = p.grad.dtype == F32 ? 4 : 2,
                    i = b * p.grad.clip + t * p.grad.frame + h * p.grad.row + w * p.grad.column;
#pragma unroll
      for (int c = 0; c < CP; ++c)
        if (c < s.channels) prefetch(at + (i + c * p.grad.channel) * size);
    }
    __syncthreads();
    float acc[MT][4][4];
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float bias = p.prepared[p.layout.bias + (to * 2 * MT + 2 * m + e / 2) * 8 + g];
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[m][i][e] = bias;
      }
    if (o.rows())
#pragma unroll 1
      for (int from = 0; from < octets; ++from)
        convolve<MODE, CP, 7>(acc, shared + from * S::OCTET, terms_apart, packed + from * 9 * Tile<CP>::LANE_WORDS * 32,
            p.layout.words, h - 1);
    {
      float v[CP][8], common[8] = {};
      load_gradient<CP>(v, p, b, t, h, w);
      const bool inside = t < s.frames && h < s.height && w < s.width;
      if (p.through && inside && only == 0) {  // what reaches x past the priors: gradient * (offset + sum)
        float* to_x = p.through + (((b * s.frames + t) * s.channels) * s.height + h) * s.width + w;
#pragma unroll
        for (int c = 0; c < CP; ++c) {
          if (c >= s.channels) continue;
#pragma unroll
          for (int e = 0; e < 8; ++e) {
            const float conv = logistic2(acc[c / 2][e / 2][c % 2 * 2 + (e & 1)]),
                        stencil = logistic2(acc[CP / 2][e / 2][CP % 2 * 2 + (e & 1)]);
            if (w + e < s.width)
              to_x[e] = v[c][e] * (gates[t * s.channels + c] + (o.conv() ? conv : 0.f) + (o.stencil ? stencil : 0.f));
          }
          to_x += int64_t(s.height) * s.width;
        }
      }
      if (o.multiplicative && inside) {
#pragma unroll
        for (int c = 0; c < CP; ++c) {
          if (c >= s.channels) continue;
          float u[8];
          load8(u, x.x + t * x.frame + c * x.channel + h * x.row + w * x.column, x.column, s.width - w, x.vector, 1.f,
              0.f);
#pragma unroll
          for (int e = 0; e < 8; ++e) v[c][e] *= u[e];
        }
      }
#pragma unroll
      for (int j = 0; j <= CP; ++j) {
        float d[8];
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          const float z = logistic2(acc[j / 2][e / 2][j % 2 * 2 + (e & 1)]);
          float u;
          if (j < CP) {
            u = v[j < CP ? j : 0][e];
            gate_sum[j < CP ? j : 0] += u;
            common[e] += u;
          } else {
            u = common[e];
          }
          d[e] = u * fmaf(-z, z, z);
          bias_sum[j] += d[e];
        }
        put<MODE>(dz + (warp * 4 + q) * ROWS + ((j * 8 + g) ^ (2 * q)), S::DZ, d);
        if (p.dz && inside && only == 0 && (j < s.channels || j == CP)) {
          const int row = (j == CP ? s.channels : j) * s.frames + t;
          const float on = (j == CP ? o.stencil : o.conv()) ? 1.f : 0.f;
          float* to_row = p.dz + ((b * (s.channels + 1) * s.frames + row) * s.height + h) * s.width + w;
#pragma unroll
          for (int e = 0; e < 8; ++e)
            if (w + e < s.width) to_row[e] = on * d[e];
        }
      }
    }
    if (!planted<DZ_BARRIER>) __syncthreads();
    if (o.rows()) {
      if (threadIdx.x < 8 * CP * SWEEP_ROWS &&
          (tile + 1) % p.tiles_down != 0) {  // the next tile's rows, read after this
        const int f = only * 8 + threadIdx.x % 8, c = threadIdx.x / 8 % CP,
                  next = h0 + SWEEP_ROWS + 1 + threadIdx.x / 8 / CP;
        if (f < s.frames && c < s.channels && next < s.height)
          prefetch(x.x + f * x.frame + c * x.channel + next * x.row + w0 * x.column);
      }
      // CP = 3: two m-tiles, each over all pixels; CP = 1: one, of which a warp takes the even or the odd rows.
      const int m = (CP == 3 ? share * 16 : 0) + (matrix & 1) * 8 + n, column = (matrix & 1) * 8 + n;
      const Address x_at = address_of(shared + only * S::OCTET + Tile<CP>::chunk(0, column));
      const int term_bytes = terms_apart * 16;
      Address dz_at[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {  // of the row: 16 pixels, one step of the MMA
        const int pixels = 2 * half + (matrix >> 1);
        dz_at[half] = address_of(dz + pixels * ROWS + (m ^ (2 * pixels)));
      }
#pragma unroll 1
      for (int row = CP == 1 ? share : 0; row < SWEEP_ROWS; row += CP == 1 ? 2 : 1) {
        const Address line = x_at + ((h0 + row + kernel_row - 1) & 7) * Tile<CP>::STRIDE * 16;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          Fragment a[XT];
#pragma unroll
          for (int k = 0; k < XT; ++k) ldmatrix_x4(a[k], dz_at[half] + (k * S::DZ + row * 4 * ROWS) * 16);
#pragma unroll
          for (int dc = 0; dc < 3; ++dc) {
            const Address at = line + half * (16 * CP + 4) * 16 + dc * CP * 16 + (n + dc >= 8 ? 32 : 0);
#pragma unroll
            for (int xt = 0; xt < XT; ++xt) {
              if constexpr (CP == 3) {
                Fragment f;
                uint32_t b0, b1;
                ldmatrix_x4_trans(f, at + xt * term_bytes + (matrix >> 1) * 16);
                ldmatrix_x2_trans(b0, b1, at + xt * term_bytes + 32);
#pragma unroll
                for (int k = 0; k < XT - xt; ++k) {
                  mma_k16<false>(dw[dc][0], a[k].v, f.v[0], f.v[1]);
                  mma_k16<false>(dw[dc][1], a[k].v, f.v[2], f.v[3]);
                  mma_k16<false>(dw[dc][2], a[k].v, b0, b1);
                }
              } else {
                uint32_t b0, b1;
                ldmatrix_x2_trans(b0, b1, at + xt * term_bytes);
#pragma unroll
                for (int k = 0; k < XT - xt; ++k) mma_k16<false>(dw[dc][0], a[k].v, b0, b1);
              }
            }
          }
        }
      }
    }
    __syncthreads();
  }

  float* out = p.partial + (int64_t(blockIdx.y) * gridDim.x + blockIdx.x) * p.numel;
  if (CP == 1) {  // the odd steps' share joins the even ones'
    float* other = reinterpret_cast<float*>(shared) + (kernel_row * 32 + lane) * 12;
    if (share == 1)
#pragma unroll
      for (int i = 0; i < 12; ++i) other[i] = dw[i / 4][0][i % 4];
    __syncthreads();
    if (share == 0)
#pragma unroll
      for (int i = 0; i < 12; ++i) dw[i / 4][0][i % 4] += other[i];
  }
  if (CP == 3 || share == 0)
#pragma unroll
    for (int dc = 0; dc < 3; ++dc)
#pragma unroll
      for (int c = 0; c < CP; ++c)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = (CP == 3 ? share * 16 : 0) + half * 8 + g;
          *reinterpret_cast<float2*>(out + ((kernel_row * 3 + dc) * ROWS + row) * Tile<CP>::COLUMNS + c * 8 + 2 * q) =
              make_float2(dw[dc][c][2 * half], dw[dc][c][2 * half + 1]);
        }
  // Sums over pixels: the 4 lanes of a frame, then the 6 rows.
#pragma unroll
  for (int j = 0; j < 2 * CP + 1; ++j) {
    float v = j <= CP ? bias_sum[j <= CP ? j : 0] : gate_sum[j <= CP ? 0 : j - CP - 1];
    v += __shfl_xor_sync(0xffffffffu, v, 1);
    v += __shfl_xor_sync(0xffffffffu, v, 2);
    if (q == 0) sums[(warp * (2 * CP + 1) + j) * 8 + g] = v;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < (2 * CP + 1) * 8; i += SWEEP_THREADS) {
    float v = 0.f;
    for (int k = 0; k < 6; ++k) v += sums[k * (2 * CP + 1) * 8 + i];
    const int j = i / 8;
    if (j <= CP) out[9 * ROWS * Tile<CP>::COLUMNS + i] = v;
    else if (only == 0)
      p.gate_partial[((int64_t(to) * s.clips + b) * p.blocks + block) * CP * 8 + i - (CP + 1) * 8] = v;
  }
}

template <class X, int MODE, int CP> void launch_sweep(const SweepParams& p, void* stream) {
  const size_t shared = SweepShared<X, MODE, CP>::bytes(p.layout, p.shape.frames * p.shape.channels);
  allow_shared(sweep_kernel<X, MODE, CP>, shared);
  SOAP_LAUNCH((sweep_kernel<X, MODE, CP>),
      dim3(unsigned(p.shape.clips * p.blocks), unsigned(p.layout.octets * p.layout.octets)), SWEEP_THREADS, shared,
      stream, p);
  launched("sweep");
}

}  // namespace soap::cuda
