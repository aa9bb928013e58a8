// reduce: the sweep's partial sums, added up in a fixed order; and for CWEM from the gate's gradient through its
// sigmoid.
#include "tile.cuh"

namespace soap::cuda {
namespace {

constexpr int THREADS = 256, COLUMNS = 16, SLICES = THREADS / COLUMNS;

struct Reduce {
  Shape shape;
  Options options;
  Layout layout;
  const float *prepared, *partial, *gate_partial;
  float *sums, *gates;
  int64_t numel, rows, column_blocks;  // rows of partial sums; blocks over the columns of one octet pair
  int blocks, pairs;
};

// gates[0]: gradient of the gate (given) or of its pre-activation (CWEM), (B, T, C); gates[1]: the plane means.
__device__ __forceinline__ void reduce_gate(const Reduce& p, int64_t i) {
  const Shape& s = p.shape;
  const int C = s.channels, CP = p.layout.padded_channels, planes = s.frames * C;
  if (i >= s.clips * planes) return;
  const int64_t b = i / planes;
  const int t = int(i % planes) / C, c = int(i % planes) % C;
  const float* from = p.gate_partial + ((t / 8 * s.clips + b) * p.blocks * CP + c) * 8 + t % 8;
  float v = 0.f;
  for (int block = 0; block < p.blocks; ++block) v += from[int64_t(block) * CP * 8];
  if (p.options.cwem) {
    const float area = __fdividef(1.f, float(s.height) * float(s.width));
    const float* taps = p.prepared + p.layout.taps;
    float z = taps[3 * C * C + c], mean = 0.f;
    for (int dt = 0; dt < 3; ++dt) {
      if (t + dt < 1 || t + dt > s.frames) continue;
      for (int k = 0; k < C; ++k) {
        float sum = 0.f;
        for (int e = 0; e < SEGMENTS; ++e)
          sum += p.prepared[p.layout.means + (b * planes + (t + dt - 1) * C + k) * SEGMENTS + e];
        const float m = fmaf(sum * area, of_channel(p.options.scale, k), of_channel(p.options.shift, k));
        z = fmaf(taps[(c * 3 + dt) * C + k], m, z);
        if (dt == 1 && k == c) mean = m;
      }
    }
    const float gate = logistic2(-LOG2E * z);
    v *= gate * (1.f - gate);
    p.gates[s.clips * planes + i] = mean;
  }
  p.gates[i] = v;
}

__global__ void __launch_bounds__(THREADS) reduce_kernel(const __grid_constant__ Reduce p) {
  SOAP_SHARED(float4, shared);
  const int64_t block = blockIdx.x;
  if (block >= p.pairs * p.column_blocks)
    return reduce_gate(p, (block - p.pairs * p.column_blocks) * THREADS + threadIdx.x);
  const int64_t pair = block / p.column_blocks, column = block % p.column_blocks * COLUMNS + threadIdx.x % COLUMNS,
                columns = p.numel / 4;
  const int slice = threadIdx.x / COLUMNS;
  const float4* from = reinterpret_cast<const float4*>(p.partial + pair * p.rows * p.numel) + column;
  float4 v = make_float4(0.f, 0.f, 0.f, 0.f);
  if (column < columns)
#pragma unroll 4
    for (int64_t r = slice; r < p.rows; r += SLICES) {
      const float4 u = from[r * columns];
      v = make_float4(v.x + u.x, v.y + u.y, v.z + u.z, v.w + u.w);
    }
  shared[threadIdx.x] = v;
  __syncthreads();
  if (slice > 0 || column >= columns) return;
  for (int k = 1; k < SLICES; ++k) {
    const float4 u = shared[k * COLUMNS + threadIdx.x];
    v = make_float4(v.x + u.x, v.y + u.y, v.z + u.z, v.w + u.w);
  }
  reinterpret_cast<float4*>(p.sums + pair * p.numel)[column] = v;
}

}  // namespace

void reduce(const Call& call, const float* prepared, const float* partial, const float* gate_partial, float* sums,
    float* gates, void* stream) {
  const Shape& shape = call.shape;
  const Options& options = call.options;
  const SweepPlan plan = plan_sweep(shape, options);
  Reduce p{shape, options, layout(shape, options), prepared, partial, gate_partial, sums, gates, plan.numel};
  p.rows = shape.clips * plan.blocks;
  p.blocks = plan.blocks;
  p.pairs = options.rows() ? p.layout.octets * p.layout.octets : 0;
  p.column_blocks = (plan.numel / 4 + COLUMNS - 1) / COLUMNS;
  const int64_t gate_blocks =
      options.gate() ? (shape.clips * shape.frames * shape.channels + THREADS - 1) / THREADS : 0;
  const int64_t blocks = p.pairs * p.column_blocks + gate_blocks;
  if (blocks == 0) return;
  SOAP_LAUNCH(reduce_kernel, unsigned(blocks), THREADS, THREADS * sizeof(float4), stream, p);
  launched("reduce");
}

}  // namespace soap::cuda
