// prepare: fold the weights into one 3x3 convolution and one small affine map, and average the planes.
//
// One launch. A block per row of the folded convolution, a block per channel of CWEM, then a block per segment of a
// plane. Reads the weights and x once; bound by reading x (its roofline: bytes of x over the memory bandwidth).
#include "flat.cuh"
#include "sweep.cuh"

namespace soap::cuda {

std::atomic<int64_t> launch_counter{0};
int64_t launches() { return launch_counter; }

namespace {

constexpr int THREADS = 256;

struct Prepare {
  Shape shape;
  Options options;
  Layout layout;
  Frames x;
  Weights w;
  FlatWeights flat;
  float* out;
  float* dense;
  bool linear;  // planes are contiguous and 16-byte aligned, their segments whole vectors
};

// The slot of the stencil that plane (f, c) counts for.
__device__ __forceinline__ int slot(const Prepare& p, int f, int c) {
  return p.options.interleaved ? (f * p.shape.channels + c) % p.shape.frames : f;
}

// Row (t, j): project * motion for channel j, then every column and tap. moved[o][plane of the tuple][tap].
__device__ __forceinline__ void fold_row(const Prepare& p, int row, float* shared) {
  const Shape& s = p.shape;
  const int CP = p.layout.padded_channels, C = s.channels, T = s.frames, K = p.layout.columns;
  const int octet = row / ((CP + 1) * 8), j = row / 8 % (CP + 1), t = octet * 8 + row % 8;
  const bool is_conv = t < T && j < C && p.options.conv(), is_stencil = t < T && j == CP && p.options.stencil;
  const float* w = shared;
  float* weight = shared + align4(p.flat.begin[p.flat.count]);  // [K][9]
  float* moved = weight + K * 9;                                // per tuple size [o * C][9]
  float* scratch = moved;                                       // once moved is done with
  p.flat.load(shared);
  __syncthreads();
  float bias = 0.f;
  if (is_conv && p.options.hmem) {
    int first = 0, offset = 0;
#pragma unroll 1
    for (int k = 0; k < p.w.num_sizes; ++k) {
      const int o = p.w.tuple_sizes[k], planes = o * C;
#pragma unroll 1
      for (int i = threadIdx.x; i < planes * 9; i += THREADS) {
        float v = 0.f;
#pragma unroll 1
        for (int q = 0; q < planes; ++q)
          v += w[p.flat.project[k] + j * planes + q] * w[p.flat.motion[k] + q * planes * 9 + i];
        moved[offset + i] = v;
      }
      float constant = w[p.flat.project_bias[k] + j], reach = 0.f;
#pragma unroll 1
      for (int q = 0; q < planes; ++q) constant -= w[p.flat.project[k] + j * planes + q] * w[p.flat.motion_bias[k] + q];
#pragma unroll 1
      for (int i = 0; i < T - o; ++i) reach += w[p.flat.restore + t * p.w.num_maps + first + i];
      bias += reach * constant;
      first += T - o;
      offset += planes * 9;
    }
    bias += w[p.flat.restore_bias + t];
  } else if (is_conv && p.w.conv_bias.data) {
    bias = load_any(p.w.conv_bias, t * C + j);
  }
  __syncthreads();
  float largest = 0.f;
#pragma unroll 1
  for (int i = threadIdx.x; i < K * 9; i += THREADS) {
    const int column = i / 9, tap = i % 9, f = column / (CP * 8) * 8 + column % 8, c = column / 8 % CP;
    float v = 0.f;
    if (f < T && c < C) {
      if (is_conv && p.options.hmem) {
        int first = 0, offset = 0;
#pragma unroll 1
        for (int k = 0; k < p.w.num_sizes; ++k) {
          const int o = p.w.tuple_sizes[k], maps = T - o;
#pragma unroll 1
          for (int m = max(0, f - o); m <= min(maps - 1, f); ++m) {  // the difference that starts at frame m reads f
            const float z = w[p.flat.restore + t * p.w.num_maps + first + m];
            if (f - m < o && tap == 4) v += z * w[p.flat.project[k] + j * o * C + (f - m) * C + c];
            if (f - m >= 1) v -= z * moved[offset + ((f - m - 1) * C + c) * 9 + tap];
          }
          first += maps;
          offset += o * C * 9;
        }
      } else if (is_conv) {
        v = load_any(p.w.conv, (int64_t(t * C + j) * T * C + f * C + c) * 9 + tap);
      } else if (is_stencil) {
        const int dt = slot(p, f, c) - t + 1;
        if (dt >= 0 && dt < 3) v = w[p.flat.stencil + dt * 9 + tap] * __fdividef(1.f, float(C));
      }
      if (p.dense && t < T && (j < C || j == CP)) {
        const int r = (j == CP ? C : j) * T + t;
        p.dense[(int64_t(r) * T * C + f * C + c) * 9 + tap] = v;
      }
    }
    v *= -LOG2E;
    weight[i] = v;
    largest = fmaxf(largest, fabsf(v));
  }
  __syncthreads();
  float* out = p.out;
  float scale = 1.f, inverse = 1.f;
  if (p.options.mode == F16X1) {  // a power of two a row, so that no weight overflows in fp16 and few are subnormal
#pragma unroll 1
    for (int o = 16; o > 0; o >>= 1) largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, o));
    if ((threadIdx.x & 31) == 0) scratch[threadIdx.x >> 5] = largest;
    __syncthreads();
#pragma unroll 1
    for (int k = 0; k < THREADS / 32; ++k) largest = fmaxf(largest, scratch[k]);
    if (largest > 0.f && largest < 3e38f) {
      const float power = floorf(log2f(largest));
      scale = exp2f(power);
      inverse = exp2f(-power);
    }
  }
  if (threadIdx.x == 0) {
    out[p.layout.bias + row] = -LOG2E * bias;
    out[p.layout.scale + row] = scale;
  }
  if (p.options.mode == EXACT) {  // [column][tap][row]
#pragma unroll 1
    for (int i = threadIdx.x; i < K * 9; i += THREADS)
      out[p.layout.packed + int64_t(i) * p.layout.rows + row] = weight[i];
    return;
  }
  // MMA fragments of A: [term][octet out][octet in][tap][vector][lane][word of vector]. Of a lane's words, m16n8k16
  // takes (rows g, g + 8) x (columns 2q, 2q + 1 of chunk 0, of chunk 1), m16n8k8 the same of one chunk. CP = 3: for
  // each of two 16-row tiles 4 words of k16, then 2 of k8 each; CP = 1: 2 words of k8.
  const int lane_words = CP == 3 ? 12 : 2, vector = CP == 3 ? 4 : 2;
  const int local = row % ((CP + 1) * 8), tile = local / 16, half = local / 8 % 2, g = local % 8;
  uint32_t* packed = reinterpret_cast<uint32_t*>(out + p.layout.packed);
#pragma unroll 1
  for (int i = threadIdx.x; i < K / 2 * 9; i += THREADS) {
    const int pair = i / 9, tap = i % 9, chunk = pair / 4, q = pair % 4, from = chunk / CP, c = chunk % CP;
    const float a = weight[(pair * 2) * 9 + tap], b = weight[(pair * 2 + 1) * 9 + tap];
    const int within = planted<FRAGMENTS> ? 2 * half + c : 2 * c + half;
    const int word = CP == 1 ? half : c < 2 ? 4 * tile + within : 8 + 2 * tile + half;
    const int64_t at = ((int64_t(octet) * p.layout.octets + from) * 9 + tap) * lane_words * 32 +
                       (word / vector) * vector * 32 + (g * 4 + q) * vector + word % vector;
    const uint32_t high = pack<false>(a, b);
    packed[at] = high;
    if (p.options.mode != BF16X1) packed[at + p.layout.words] = pack_rest(a, b, high);
    if (p.options.mode == F16X1) packed[at + 2 * int64_t(p.layout.words)] = pack<true>(a * inverse, b * inverse);
  }
}

// CWEM folded: taps[c][dt][c'] = sum over r', r of squeeze[c, r'] temporal[r', r, dt] expand[r, c'], and its bias.
__device__ __forceinline__ void fold_cwem(const Prepare& p, int c, float* shared) {
  const int C = p.shape.channels, hidden = p.w.hidden;
  const float* w = shared;
  float* scratch = shared + align4(p.flat.begin[p.flat.count]);
  p.flat.load(shared);
  __syncthreads();
  float* out = p.out + p.layout.taps;
#pragma unroll 1
  for (int e = 0; e < 3 * C; ++e) {
    const int dt = e / C, from = e % C;
    float v = 0.f;
#pragma unroll 1
    for (int i = threadIdx.x; i < hidden * hidden; i += THREADS)
      v += w[p.flat.squeeze + c * hidden + i / hidden] * w[p.flat.temporal + i * 3 + dt] *
           w[p.flat.expand + (i % hidden) * C + from];
    v = block_sum(v, scratch);
    if (threadIdx.x == 0) out[(c * 3 + dt) * C + from] = v;
  }
  float v = 0.f;
#pragma unroll 1
  for (int i = threadIdx.x; i < hidden; i += THREADS)
    v += w[p.flat.squeeze + c * hidden + i] * w[p.flat.temporal_bias + i];
  v = block_sum(v, scratch);
  if (threadIdx.x == 0) out[3 * C * C + c] = v;
}

// One segment of one plane, summed.
template <class X> __device__ __forceinline__ void sum_segment(const Prepare& p, unsigned block, float* shared) {
  const Shape& s = p.shape;
  const unsigned segment = block % SEGMENTS, plane = block / SEGMENTS, frame = plane / s.channels;
  const int64_t area = int64_t(s.height) * s.width;
  const X* x = static_cast<const X*>(p.x.data) + int64_t(frame / s.frames) * p.x.clip +
               int64_t(frame % s.frames) * p.x.frame + int64_t(plane % s.channels) * p.x.channel;
  float total = 0.f;
  if (p.linear) {
    constexpr int V = TypeOf<X>::vector;
    const int64_t vectors = area / V, begin = vectors * segment / SEGMENTS, end = vectors * (segment + 1) / SEGMENTS;
#pragma unroll 4
    for (int64_t i = begin + threadIdx.x; i < end; i += THREADS) total += vector_sum(x + i * V);
  } else {
    const int begin = int(int64_t(s.height) * segment / SEGMENTS),
              end = int(int64_t(s.height) * (segment + 1) / SEGMENTS);
#pragma unroll 1
    for (int h = begin + int(threadIdx.x >> 5); h < end; h += THREADS / 32)
#pragma unroll 1
      for (int w = threadIdx.x & 31; w < s.width; w += 32) total += to_float(x[h * p.x.row + w * p.x.column]);
  }
  total = block_sum(total, shared);
  if (threadIdx.x == 0) p.out[p.layout.means + block] = total;
}

__global__ void __launch_bounds__(THREADS) prepare_kernel(const __grid_constant__ Prepare p) {
  SOAP_SHARED(float, shared);
  unsigned block = blockIdx.x;
  const unsigned rows = p.options.rows() ? p.layout.rows : 0;
  if (block < rows) return fold_row(p, int(block), shared);
  block -= rows;
  if (block < unsigned(p.shape.channels)) return fold_cwem(p, int(block), shared);
  block -= p.shape.channels;
  switch (p.x.dtype) {
    case F32: return sum_segment<float>(p, block, shared);
    case F16: return sum_segment<f16>(p, block, shared);
    case BF16: return sum_segment<bf16>(p, block, shared);
    default: return sum_segment<uint8_t>(p, block, shared);
  }
}

}  // namespace

size_t prepare_memory(const Call& call) {
  const Weights& w = call.weights;
  int64_t moved = 0;
  for (int k = 0; call.options.hmem && k < w.num_sizes; ++k) moved += w.tuple_sizes[k] * call.shape.channels * 9;
  const int64_t held = FlatWeights(call).total(), weight = layout(call.shape, call.options).columns * 9;
  return sizeof(float) * size_t(align4(held) + weight + (moved > 32 ? moved : 32));
}

void prepare(const Call& call, float* prepared, float* dense, void* stream) {
  const Shape& shape = call.shape;
  const Options& options = call.options;
  const Frames& x = call.x;
  Prepare p{shape, options, layout(shape, options), x, call.weights, FlatWeights(call), prepared, dense, false};
  const int64_t planes = shape.clips * shape.frames * shape.channels;
  const int64_t blocks = (options.rows() ? p.layout.rows : 0) + (options.cwem ? shape.channels + planes * SEGMENTS : 0);
  if (blocks == 0) return;
  const int vector = x.dtype == F32 ? 4 : 8;
  p.linear = whole_planes(x, shape.width, vector) && int64_t(shape.height) * shape.width % vector == 0;
  const size_t shared = prepare_memory(call);
  allow_shared(prepare_kernel, shared);
  SOAP_LAUNCH(prepare_kernel, unsigned(blocks), THREADS, shared, stream, p);
  launched("prepare");
}

}  // namespace soap::cuda
