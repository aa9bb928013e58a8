// finish: from the gradient of the folded weights back through the folds to every weight. One launch of independent
// blocks, each the owner of what it writes; the adjoint of prepare.cu. A few thousand multiply-adds: bound by latency.
#include "flat.cuh"
#include "sweep.cuh"

namespace soap::cuda {
namespace {

constexpr int THREADS = 256;
constexpr int FINISH_MEMORY = 96 * 1024;
constexpr int CWEM_BLOCKS = 12;  // that share CWEM's weights: one would take twice as long as any other block

struct FinishParams {
  Shape shape;
  Options options;
  Layout layout;
  Weights w, d;
  FlatWeights flat;
  const float *prepared, *sums, *gates;
  float* dmeans;
  int64_t numel;
  int copied_sums, copied_gates;  // floats of each that fit shared memory, or 0
  int motion_blocks, project_blocks, frame_blocks, stencil_blocks, cwem_blocks, direct_blocks, mean_blocks;
};

// A block's view: the weights, and where they fit the sums and gates, in shared memory.
struct Finish {
  const FinishParams& all;
  const Shape& shape;
  const Options& options;
  const Layout& layout;
  const Weights &w, &d;
  const FlatWeights& flat;
  const int64_t numel;
  const float *s, *sums, *gates;

  // Gradient of the folded weight from plane (f, c) to row (t, j), and of the row's bias.
  __device__ __forceinline__ float weight(int t, int j, int f, int c, int tap) const {
    const int CP = layout.padded_channels, pair = t / 8 * layout.octets + f / 8;
    return sums[pair * numel + (tap * (CP + 1) * 8 + j * 8 + t % 8) * CP * 8 + c * 8 + f % 8];
  }
  __device__ __forceinline__ float bias(int t, int j) const {
    const int CP = layout.padded_channels;
    return sums[t / 8 * layout.octets * numel + numel - (CP + 1) * 8 + j * 8 + t % 8];
  }
  __device__ __forceinline__ float restore(int t, int map) const { return s[flat.restore + t * w.num_maps + map]; }
  __device__ __forceinline__ float project(int k, int c, int q) const {
    return s[flat.project[k] + c * w.tuple_sizes[k] * shape.channels + q];
  }
  __device__ __forceinline__ int first_map(int k) const {
    int first = 0;
#pragma unroll 1
    for (int i = 0; i < k; ++i) first += shape.frames - w.tuple_sizes[i];
    return first;
  }
  // Gradient of project * motion, channel c, tuple plane j, but for the sign: the sum over 8 lanes, all of which call
  // this and get it. The loops are latency, one step after another: so they are spread over lanes.
  __device__ __forceinline__ float moved(int k, int first, int c, int j, int tap) const {
    const int maps = shape.frames - w.tuple_sizes[k], jf = j / shape.channels, jc = j % shape.channels;
    float v = 0.f;
#pragma unroll 1
    for (int t = threadIdx.x & 7; t < shape.frames; t += 8)
#pragma unroll 1
      for (int i = 0; i < maps; ++i) v = fmaf(restore(t, first + i), weight(t, c, i + 1 + jf, jc, tap), v);
#pragma unroll
    for (int e = 1; e < 8; e *= 2) v += __shfl_xor_sync(0xffffffffu, v, e);
    return v;
  }
  // Gradient of what the maps of tuple size k add to the bias, channel c. The work of a warp.
  __device__ __forceinline__ float constant(int k, int first, int c) const {
    const int maps = shape.frames - w.tuple_sizes[k];
    float v = 0.f;
#pragma unroll 1
    for (int i = threadIdx.x & 31; i < shape.frames * maps; i += 32)
      v = fmaf(restore(i / maps, first + i % maps), bias(i / maps, c), v);
    return warp_sum(v);
  }
};

// Whole warps' worth of threads for `items` of 8 lanes each.
__device__ __forceinline__ int lanes_for(int items) { return (items * 8 + 31) / 32 * 32; }

// Motion weights from plane j of the tuple, for every output plane and tap; with j = 0 the biases too.
__device__ __forceinline__ void finish_motion(const Finish& p, int k, int j, float* shared) {
  const int C = p.shape.channels, planes = p.w.tuple_sizes[k] * C, first = p.first_map(k);
#pragma unroll 1
  for (int i = threadIdx.x; i < lanes_for(C * 9); i += THREADS) {
    const int item = min(i / 8, C * 9 - 1);
    const float v = p.moved(k, first, item / 9, j, item % 9);
    if (i % 8 == 0) shared[item] = v;
  }
  if (j == 0)
#pragma unroll 1
    for (int c = int(threadIdx.x >> 5); c < C; c += THREADS / 32) {
      const float v = p.constant(k, first, c);
      if (threadIdx.x % 32 == 0) shared[C * 9 + c] = v;
    }
  __syncthreads();
#pragma unroll 1
  for (int i = threadIdx.x; i < planes * 9; i += THREADS) {
    const int q = i / 9, tap = i % 9;
    float v = 0.f;
#pragma unroll 1
    for (int c = 0; c < C; ++c) v = fmaf(-p.project(k, c, q), shared[c * 9 + tap], v);
    store_any(p.d.motion[k], (int64_t(q) * planes + j) * 9 + tap, v);
  }
  if (j > 0) return;
#pragma unroll 1
  for (int q = threadIdx.x; q < planes; q += THREADS) {
    float v = 0.f;
#pragma unroll 1
    for (int c = 0; c < C; ++c) v = fmaf(-p.project(k, c, q), shared[C * 9 + c], v);
    store_any(p.d.motion_bias[k], q, v);
  }
#pragma unroll 1
  for (int c = threadIdx.x; c < C; c += THREADS) store_any(p.d.project_bias[k], c, shared[C * 9 + c]);
}

// Projection weights of channel c.
__device__ __forceinline__ void finish_project(const Finish& p, int k, int c, float* shared) {
  const int C = p.shape.channels, o = p.w.tuple_sizes[k], planes = o * C, first = p.first_map(k),
            maps = p.shape.frames - o;
#pragma unroll 1
  for (int i = threadIdx.x; i < lanes_for(planes * 9); i += THREADS) {
    const int item = min(i / 8, planes * 9 - 1);
    const float v = p.moved(k, first, c, item / 9, item % 9);
    if (i % 8 == 0) shared[item] = v;
  }
  if (threadIdx.x >= THREADS - 32) {
    const float v = p.constant(k, first, c);
    if (threadIdx.x == THREADS - 1) shared[planes * 9] = v;
  }
  __syncthreads();
  const int lane = threadIdx.x & 31;
#pragma unroll 1
  for (int q = threadIdx.x >> 5; q < planes; q += THREADS / 32) {
    float v = 0.f;
#pragma unroll 1
    for (int i = lane; i < planes * 9; i += 32) v = fmaf(-p.s[p.flat.motion[k] + q * planes * 9 + i], shared[i], v);
#pragma unroll 1
    for (int i = lane; i < p.shape.frames * maps; i += 32) {
      const int t = i / maps, m = i % maps;
      v = fmaf(p.restore(t, first + m), p.weight(t, c, m + q / C, q % C, 4), v);
    }
    v = warp_sum(v);
    if (lane == 0)
      store_any(p.d.project[k], c * planes + q, fmaf(-p.s[p.flat.motion_bias[k] + q], shared[planes * 9], v));
  }
}

// Row t of the map over the maps, those of tuple size k.
__device__ __forceinline__ void finish_restore(const Finish& p, int t, int k, float* shared) {
  const int C = p.shape.channels, lane = threadIdx.x & 31, o = p.w.tuple_sizes[k], planes = o * C,
            maps = p.shape.frames - o, first = p.first_map(k);
#pragma unroll 1
  for (int i = threadIdx.x; i < C * planes * 9; i += THREADS) {
    const int c = i / 9 / planes, at = i % (planes * 9);
    float v = 0.f;
#pragma unroll 1
    for (int q = 0; q < planes; ++q) v = fmaf(p.project(k, c, q), p.s[p.flat.motion[k] + q * planes * 9 + at], v);
    shared[i] = v;
  }
  __syncthreads();
#pragma unroll 1
  for (int m = threadIdx.x >> 5; m < maps; m += THREADS / 32) {
    float v = 0.f;
#pragma unroll 1
    for (int i = lane; i < C * planes * 9; i += 32) {
      const int c = i / 9 / planes, j = i / 9 % planes, tap = i % 9;
      v = fmaf(-shared[i], p.weight(t, c, m + 1 + j / C, j % C, tap), v);
    }
#pragma unroll 1
    for (int i = lane; i < C * planes; i += 32) {
      const int c = i / planes, q = i % planes;
      v = fmaf(p.project(k, c, q), p.weight(t, c, m + q / C, q % C, 4), v);
      v = fmaf(-p.project(k, c, q) * p.s[p.flat.motion_bias[k] + q], p.bias(t, c), v);
    }
#pragma unroll 1
    for (int c = lane; c < C; c += 32) v = fmaf(p.s[p.flat.project_bias[k] + c], p.bias(t, c), v);
    v = warp_sum(v);
    if (lane == 0) store_any(p.d.restore, t * p.w.num_maps + first + m, v);
  }
  if (k == 0 && threadIdx.x == THREADS - 1) {
    float v = 0.f;
#pragma unroll 1
    for (int c = 0; c < C; ++c) v += p.bias(t, c);
    store_any(p.d.restore_bias, t, v);
  }
}

__device__ __forceinline__ void finish_stencil(const Finish& p) {
  const int C = p.shape.channels, T = p.shape.frames, CP = p.layout.padded_channels, lane = threadIdx.x & 31;
#pragma unroll 1
  for (int e = threadIdx.x >> 5; e < 27; e += THREADS / 32) {
    const int dt = e / 9, tap = e % 9;
    float v = 0.f;
#pragma unroll 1
    for (int i = lane; i < T * C; i += 32) {  // plane i of slot t + dt - 1, over t
      const int slot = i / C, t = slot - dt + 1;
      if (t < 0 || t >= T) continue;
      const int plane = p.options.interleaved ? i % C * T + slot : i;
      v += p.weight(t, CP, plane / C, plane % C, tap);
    }
    v = warp_sum(v);
    if (lane == 0) store_any(p.d.stencil, e, v * __fdividef(1.f, float(C)));
  }
}

// CWEM's weights; each block their shares `block`, `block` + CWEM_BLOCKS, ...
__device__ __forceinline__ void finish_cwem(const Finish& p, int block, float* shared) {
  const int C = p.shape.channels, T = p.shape.frames, R = p.w.hidden, planes = T * C, lane = threadIdx.x & 31;
  const int64_t total = p.shape.clips * planes;
  const float *dz = p.gates, *means = p.gates + total;
  float* dbias = shared + 3 * C * C;  // of the folded map; shared[(c * 3 + dt) * C + from] of its taps
#pragma unroll 1
  for (int e = threadIdx.x >> 5; e < 3 * C * C + C; e += THREADS / 32) {
    const bool tap = e < 3 * C * C;
    const int c = tap ? e / (3 * C) : e - 3 * C * C, dt = tap ? e / C % 3 : 1, from = e % C;
    float v = 0.f;
#pragma unroll 1
    for (int i = lane; i < int(p.shape.clips) * T; i += 32) {
      const int t = i % T + dt - 1;
      if (t >= 0 && t < T) v = fmaf(dz[i * C + c], tap ? means[(i + dt - 1) * C + from] : 1.f, v);
    }
    v = warp_sum(v);
    if (lane == 0) shared[e] = v;
  }
  __syncthreads();
#pragma unroll 1
  for (int i = block * THREADS + threadIdx.x; i < R * R * 3; i += CWEM_BLOCKS * THREADS) {
    const int out = i / 3 / R, in = i / 3 % R, dt = i % 3;
    float v = 0.f;
#pragma unroll 1
    for (int c = 0; c < C; ++c)
#pragma unroll 1
      for (int from = 0; from < C; ++from)
        v += p.s[p.flat.squeeze + c * R + out] * shared[(c * 3 + dt) * C + from] * p.s[p.flat.expand + in * C + from];
    store_any(p.d.temporal, i, v);
  }
#pragma unroll 1
  for (int i = block * THREADS + threadIdx.x; i < R; i += CWEM_BLOCKS * THREADS) {
    float v = 0.f;
#pragma unroll 1
    for (int c = 0; c < C; ++c) v = fmaf(p.s[p.flat.squeeze + c * R + i], dbias[c], v);
    store_any(p.d.temporal_bias, i, v);
  }
  // A warp an element of squeeze (c, out) and of expand (in, from): sums over the other hidden index.
#pragma unroll 1
  for (int i = block * (THREADS / 32) + int(threadIdx.x >> 5); i < 2 * C * R; i += CWEM_BLOCKS * (THREADS / 32)) {
    const bool squeeze = i < C * R;
    const int e = squeeze ? i : i - C * R;
    float v = 0.f;
#pragma unroll 1
    for (int k = lane; k < 3 * R; k += 32) {
      const int dt = k / R, other = k % R;
#pragma unroll 1
      for (int m = 0; m < C; ++m) {
        if (squeeze)
          v += shared[(e / R * 3 + dt) * C + m] * p.s[p.flat.temporal + (e % R * R + other) * 3 + dt] *
               p.s[p.flat.expand + other * C + m];
        else
          v += shared[(m * 3 + dt) * C + e % C] * p.s[p.flat.temporal + (other * R + e / C) * 3 + dt] *
               p.s[p.flat.squeeze + m * R + other];
      }
    }
    v = warp_sum(v);
    if (lane > 0) continue;
    if (squeeze) store_any(p.d.squeeze, e, fmaf(dbias[e / R], p.s[p.flat.temporal_bias + e % R], v));
    else store_any(p.d.expand, e, v);
  }
}

__global__ void __launch_bounds__(THREADS, 2) finish_kernel(const __grid_constant__ FinishParams all) {
  SOAP_SHARED(float, whole);
  const int C = all.shape.channels, T = all.shape.frames;
  int block = blockIdx.x;
  // The blocks that need the sums come first, then those that need the gates.
  const int summed = all.motion_blocks + all.project_blocks + all.frame_blocks + all.stencil_blocks;
  const bool folds = block < summed, gated = !folds && block < summed + all.cwem_blocks;
  float* sums = whole + align4(all.flat.begin[all.flat.count]);
  float* gates = sums + all.copied_sums;
  float* shared = gates + all.copied_gates;
  if (folds) {
    const float4* from = reinterpret_cast<const float4*>(all.sums);
#pragma unroll 4
    for (int i = threadIdx.x; i < all.copied_sums / 4; i += THREADS) reinterpret_cast<float4*>(sums)[i] = from[i];
  } else if (gated) {
#pragma unroll 2
    for (int i = threadIdx.x; i < all.copied_gates; i += THREADS) gates[i] = all.gates[i];
  }
  if (folds || gated) {
    all.flat.load(whole);
    __syncthreads();
  }
  const Finish p{all, all.shape, all.options, all.layout, all.w, all.d, all.flat, all.numel, whole,
      folds && all.copied_sums ? sums : all.sums, gated && all.copied_gates ? gates : all.gates};
  if (block < all.motion_blocks) {
#pragma unroll 1
    for (int k = 0; k < p.w.num_sizes; ++k) {
      if (block < p.w.tuple_sizes[k] * C) return finish_motion(p, k, block, shared);
      block -= p.w.tuple_sizes[k] * C;
    }
  }
  block -= all.motion_blocks;
  if (block < all.project_blocks) return finish_project(p, block / C, block % C, shared);
  block -= all.project_blocks;
  if (block < all.frame_blocks) return finish_restore(p, block % T, block / T, shared);
  block -= all.frame_blocks;
  if (block < all.stencil_blocks) return finish_stencil(p);
  block -= all.stencil_blocks;
  if (block < all.cwem_blocks) return finish_cwem(p, block, shared);
  block -= all.cwem_blocks;
  if (block < all.direct_blocks) {  // a weight given as it is
    const int64_t i = int64_t(block) * THREADS + threadIdx.x, planes = T * C;
    if (i < planes * planes * 9) {
      const int row = int(i) / 9 / int(planes), column = int(i) / 9 % int(planes);
      if (p.d.conv.data) store_any(p.d.conv, i, p.weight(row / C, row % C, column / C, column % C, int(i) % 9));
    }
    if (i < planes && p.d.conv_bias.data) store_any(p.d.conv_bias, i, p.bias(int(i) / C, int(i) % C));
    return;
  }
  block -= all.direct_blocks;
  const int64_t i = int64_t(block) * THREADS + threadIdx.x;  // plane means (CWEM), or the gate itself
  if (i >= p.shape.clips * T * C) return;
  if (p.d.gate.data) store_any(p.d.gate, i, p.gates[i]);
  if (!all.dmeans) return;
  const float* taps = all.prepared + p.layout.taps;
  const int t = int(i) / C % T, from = int(i) % C;
  float v = 0.f;
#pragma unroll 1
  for (int dt = 0; dt < 3; ++dt)
    if (t - dt + 1 >= 0 && t - dt + 1 < T)
#pragma unroll 1
      for (int c = 0; c < C; ++c) v = fmaf(taps[(c * 3 + dt) * C + from], p.gates[(int(i) / C - dt + 1) * C + c], v);
  all.dmeans[i] = v;
}

}  // namespace

// The weights, and room to work; what is left of FINISH_MEMORY holds copies of the sums.
size_t finish_memory(const Call& call) {
  const int C = call.shape.channels;
  int largest = 32;
  for (int k = 0; call.options.hmem && k < call.weights.num_sizes; ++k)
    largest = max(largest, call.weights.tuple_sizes[k] * C * C * 9);
  const int64_t held = FlatWeights(call).total();
  return sizeof(float) * size_t(align4(held) + align4(largest + C * 9 + C + 3 * C * C + 1));
}

void finish(const Call& call, const float* prepared, const float* sums, const float* gates, const Weights& dweights,
    float* dmeans, void* stream) {
  const Shape& shape = call.shape;
  const Options& options = call.options;
  const Weights& weights = call.weights;
  const SweepPlan plan = plan_sweep(shape, options);
  FinishParams p{shape, options, layout(shape, options), weights, dweights, FlatWeights(call), prepared, sums, gates,
      dmeans, plan.numel};
  const int C = shape.channels;
  if (options.hmem && dweights.restore.data) {
    for (int k = 0; k < weights.num_sizes; ++k) p.motion_blocks += weights.tuple_sizes[k] * C;
    p.project_blocks = weights.num_sizes * C;
    p.frame_blocks = shape.frames * weights.num_sizes;
  }
  const int64_t planes = int64_t(shape.frames) * C;
  if (dweights.conv.data || dweights.conv_bias.data)
    p.direct_blocks = int((planes * planes * 9 + THREADS - 1) / THREADS);
  if (dmeans || dweights.gate.data) p.mean_blocks = int((shape.clips * planes + THREADS - 1) / THREADS);
  p.stencil_blocks = options.stencil && dweights.stencil.data ? 1 : 0;
  p.cwem_blocks = options.cwem && dweights.squeeze.data ? CWEM_BLOCKS : 0;
  const int blocks = p.motion_blocks + p.project_blocks + p.frame_blocks + p.stencil_blocks + p.cwem_blocks +
                     p.direct_blocks + p.mean_blocks;
  if (blocks == 0) return;
  const size_t needed = finish_memory(call);
  const int64_t room = (FINISH_MEMORY - int64_t(needed)) / int64_t(sizeof(float));
  if (options.rows() && plan.sums <= room) p.copied_sums = int(plan.sums);
  if (options.cwem && plan.gates % 4 == 0 && plan.gates <= room - p.copied_sums) p.copied_gates = int(plan.gates);
  const size_t shared = needed + sizeof(float) * size_t(p.copied_sums + p.copied_gates);
  allow_shared(finish_kernel, shared);
  SOAP_LAUNCH(finish_kernel, unsigned(blocks), THREADS, shared, stream, p);
  launched("finish");
}

}  // namespace soap::cuda
