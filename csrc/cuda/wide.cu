// wide: planes too many for one tile (feature maps). The folded convolution is a library's; here is what surrounds it,
// one pass each: forward from its output z to y, backward from the incoming gradient to the gradient of z.
//
// z: (B, R, H, W), contiguous, without the bias. Its rows are the planes' if HMEM is on, frame-major, then the frames'
// if 3DEM is on. A block takes one frame and 32 * V pixels: a lane V pixels, a warp every 8th channel, so that 3DEM's
// prior is computed once a pixel and sums over channels and pixels need no second pass. Bound by memory: forward reads
// x and z and writes y.
#include "sweep.cuh"

namespace soap::cuda {
namespace {

constexpr int THREADS = 256, WARPS = THREADS / 32;

struct WideParams {
  Wide wide;
  Shape shape;
  Frames x, grad, y;
  int64_t area;     // pixels of a plane, fewer than 2^31
  unsigned chunks;  // of a plane, 32 * V pixels each
};

// V pixels of a plane from `i`: 8 as one or two vectors, or a single one.
template <int V> __device__ __forceinline__ void load_pixels(float (&v)[V], const void* p, int dtype, int64_t i) {
  if constexpr (V == 8) load8_float(v, p, dtype, i);
  else v[0] = load_any(p, dtype, i);
}
template <int V> __device__ __forceinline__ void store_pixels(void* p, int dtype, int64_t i, const float (&v)[V]) {
  if constexpr (V == 8) store8(p, dtype, i, v);
  else store_any(p, dtype, i, v[0]);
}

template <int V> struct Place {
  int64_t frame, clip;  // (b * T + t), b
  int t, h, w;
  int64_t i;  // first pixel
  bool seen;

  __device__ __forceinline__ explicit Place(const WideParams& p) {
    const unsigned f = blockIdx.x / p.chunks, b = f / unsigned(p.shape.frames),
                   pixel = (blockIdx.x % p.chunks * 32 + (threadIdx.x & 31)) * V;
    frame = f;
    clip = b;
    t = int(f - b * p.shape.frames);
    i = pixel;
    seen = i < p.area || planted<PLANE_END>;
    h = int(pixel / p.shape.width);
    w = int(pixel % p.shape.width);
  }
  // Where these pixels of channel 0 lie.
  __device__ __forceinline__ int64_t in(const Frames& f) const {
    return clip * f.clip + t * f.frame + h * f.row + w * f.column;
  }
  __device__ __forceinline__ int64_t row(const WideParams& p, int r) const {
    return (clip * p.wide.rows(p.shape) + r) * p.area + i;
  }
};

// The logistic function of z + bias.
template <int V>
__device__ __forceinline__ void prior(float (&s)[V], const WideParams& p, int64_t at, bool seen, float bias) {
  float z[V] = {};
  if (seen) load_pixels<V>(z, p.wide.z.data, p.wide.z.dtype, at);
#pragma unroll
  for (int e = 0; e < V; ++e) s[e] = logistic2(-LOG2E * (z[e] + bias));
}

template <int V>
__global__ void __launch_bounds__(THREADS, V == 8 ? 3 : 4) join_kernel(const __grid_constant__ WideParams p) {
  const Place<V> at(p);
  const Wide& o = p.wide;
  const int C = p.shape.channels;
  float shared[V] = {};
  if (o.stencil) prior<V>(shared, p, at.row(p, (o.planes ? p.shape.frames * C : 0) + at.t), at.seen, 0.f);
  const int64_t from = at.in(p.x), to = at.in(p.y);
#pragma unroll 2
  for (int c = int(threadIdx.x >> 5); c < C; c += WARPS) {
    const int plane = at.t * C + c;
    const float gate = (o.gate ? o.gate[at.frame * C + c] : 0.f) + o.offset;
    float v[V] = {}, s[V] = {};
    if (at.seen) load_pixels<V>(v, p.x.data, p.x.dtype, from + c * p.x.channel);
    if (o.planes) prior<V>(s, p, at.row(p, plane), at.seen, o.bias ? o.bias[plane] : 0.f);
#pragma unroll
    for (int e = 0; e < V; ++e) {
      const float total = s[e] + shared[e] + gate;
      v[e] = o.multiplicative ? v[e] * total : v[e] + total;
    }
    if (at.seen) store_pixels<V>(p.y.data, p.y.dtype, to + c * p.y.channel, v);
  }
}

template <int V>
__global__ void __launch_bounds__(THREADS, V == 8 ? 3 : 4) join_backward_kernel(const __grid_constant__ WideParams p) {
  SOAP_SHARED(float, gathered);  // (WARPS, 32 * V): each warp's sum over its channels of what reaches the frame's prior
  const Place<V> at(p);
  const Wide& o = p.wide;
  const int C = p.shape.channels, lane = threadIdx.x & 31, warp = int(threadIdx.x >> 5),
            stencil_row = (o.planes ? p.shape.frames * C : 0) + at.t;
  const int64_t shares = p.shape.clips * p.shape.frames * C * int64_t(p.chunks);
  float shared[V] = {}, sum[V] = {};
  if (o.stencil) prior<V>(shared, p, at.row(p, stencil_row), at.seen, 0.f);
  const int64_t from = at.in(p.x), incoming = at.in(p.grad);
#pragma unroll 1
  for (int c = warp; c < C; c += WARPS) {
    const int plane = at.t * C + c;
    float up[V] = {}, s[V] = {};
    if (at.seen) load_pixels<V>(up, p.grad.data, p.grad.dtype, incoming + c * p.grad.channel);
    if (o.planes) prior<V>(s, p, at.row(p, plane), at.seen, o.bias ? o.bias[plane] : 0.f);
    if (o.multiplicative) {
      const float gate = o.offset + (o.gate ? o.gate[at.frame * C + c] : 0.f);
      float v[V] = {};
      if (at.seen) load_pixels<V>(v, p.x.data, p.x.dtype, from + c * p.x.channel);
      if (o.direct && at.seen) {
        float near[V];
#pragma unroll
        for (int e = 0; e < V; ++e) near[e] = up[e] * (gate + s[e] + shared[e]);
        store_pixels<V>(o.direct, F32, (at.frame * C + c) * p.area + at.i, near);
      }
#pragma unroll
      for (int e = 0; e < V; ++e) up[e] *= v[e];
    }
    float dz[V], gate_share = 0.f, bias_share = 0.f;
#pragma unroll
    for (int e = 0; e < V; ++e) {
      dz[e] = up[e] * fmaf(-s[e], s[e], s[e]);
      sum[e] += up[e];
      gate_share += up[e];
      bias_share += dz[e];
    }
    if (o.planes && at.seen) store_pixels<V>(o.dz, o.z.dtype, at.row(p, plane), dz);
    gate_share = warp_sum(gate_share);
    bias_share = warp_sum(bias_share);
    if (lane == 0) {
      const int64_t share = (at.frame * C + c) * p.chunks + blockIdx.x % p.chunks;
      o.shares[share] = gate_share;
      o.shares[shares + share] = bias_share;
    }
  }
  if (!o.stencil) return;
#pragma unroll
  for (int e = 0; e < V; ++e) gathered[(warp * V + e) * 32 + lane] = sum[e];
  if (!planted<SUMS_BARRIER>) __syncthreads();
  if (warp != 0 || !at.seen) return;
  float dz[V];
#pragma unroll
  for (int e = 0; e < V; ++e) {
    float total = 0.f;
    for (int k = 0; k < WARPS; ++k) total += gathered[(k * V + e) * 32 + lane];
    dz[e] = total * fmaf(-shared[e], shared[e], shared[e]);
  }
  store_pixels<V>(o.dz, o.z.dtype, at.row(p, stencil_row), dz);
}

// As few lanes as possible idle: short planes go pixel by pixel.
int pixels_a_lane(const Shape& s, const Frames& x, const Frames& other) {
  const int64_t area = int64_t(s.height) * s.width;
  const bool whole = whole_planes(x, s.width, 8) && whole_planes(other, s.width, 8);
  return whole && area % 8 == 0 && area >= 128 ? 8 : 1;
}

}  // namespace

int wide_chunks(const Shape& shape, const Frames& x, const Frames& other) {
  const int64_t each = 32 * pixels_a_lane(shape, x, other);
  return int((int64_t(shape.height) * shape.width + each - 1) / each);
}

void join(const Wide& wide, const Shape& shape, const Frames& x, const Frames& y, void* stream) {
  WideParams p{wide, shape, x, Frames{}, y, int64_t(shape.height) * shape.width, unsigned(wide_chunks(shape, x, y))};
  const int64_t blocks = shape.clips * shape.frames * p.chunks;
  if (pixels_a_lane(shape, x, y) == 8) SOAP_LAUNCH((join_kernel<8>), unsigned(blocks), THREADS, 0, stream, p);
  else SOAP_LAUNCH((join_kernel<1>), unsigned(blocks), THREADS, 0, stream, p);
  launched("join");
}

void join_backward(const Wide& wide, const Shape& shape, const Frames& x, const Frames& grad, void* stream) {
  WideParams p{
      wide, shape, x, grad, Frames{}, int64_t(shape.height) * shape.width, unsigned(wide_chunks(shape, x, grad))};
  const int64_t blocks = shape.clips * shape.frames * p.chunks;
  const int pixels = pixels_a_lane(shape, x, grad);
  const size_t shared = sizeof(float) * THREADS * pixels;
  if (pixels == 8) SOAP_LAUNCH((join_backward_kernel<8>), unsigned(blocks), THREADS, shared, stream, p);
  else SOAP_LAUNCH((join_backward_kernel<1>), unsigned(blocks), THREADS, shared, stream, p);
  launched("join_backward");
}

}  // namespace soap::cuda
