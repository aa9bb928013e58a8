// window_sums: per plane the nine sums that the taps of a zero-padded 3x3 convolution see, and the way back.
#include "tile.cuh"

namespace soap::cuda {
namespace {

constexpr int THREADS = 512;

struct WindowSums {
  Frames x;
  float* sums;
  int channels, height, width;
  bool linear;
};

template <class X> __device__ __forceinline__ void plane_sums(const WindowSums& p, float* scratch) {
  const int64_t plane = blockIdx.x, area = int64_t(p.height) * p.width;
  const X* x = static_cast<const X*>(p.x.data) + plane / p.channels * p.x.clip + plane % p.channels * p.x.channel;
  float total = 0.f, first_row = 0.f, last_row = 0.f, first_column = 0.f, last_column = 0.f;
  if (p.linear) {
    constexpr int V = TypeOf<X>::vector;
#pragma unroll 4
    for (int64_t i = threadIdx.x; i < area / V; i += THREADS) total += vector_sum(x + i * V);
  } else {
    for (int64_t i = threadIdx.x; i < area; i += THREADS)
      total += to_float(x[i / p.width * p.x.row + i % p.width * p.x.column]);
  }
  const X* bottom = x + (p.height - 1) * p.x.row;
  const X* right = x + (p.width - 1) * p.x.column;
  for (int w = threadIdx.x; w < p.width; w += THREADS) {
    first_row += to_float(x[w * p.x.column]);
    last_row += to_float(bottom[w * p.x.column]);
  }
  for (int h = threadIdx.x; h < p.height; h += THREADS) {
    first_column += to_float(x[h * p.x.row]);
    last_column += to_float(right[h * p.x.row]);
  }
  total = block_sum(total, scratch);
  first_row = block_sum(first_row, scratch);
  last_row = block_sum(last_row, scratch);
  first_column = block_sum(first_column, scratch);
  last_column = block_sum(last_column, scratch);
  if (threadIdx.x >= 9) return;
  const int i = threadIdx.x / 3, j = threadIdx.x % 3;  // tap (0, .) does not see the last row, (2, .) not the first
  const float row = i == 0 ? last_row : i == 2 ? first_row : 0.f;
  const float column = j == 0 ? last_column : j == 2 ? first_column : 0.f;
  float v = total - row - column;
  if (i != 1 && j != 1) v += to_float((i == 0 ? bottom : x)[j == 0 ? (p.width - 1) * p.x.column : 0]);
  p.sums[plane * 9 + threadIdx.x] = v;
}

__global__ void __launch_bounds__(THREADS, 2) window_sums_kernel(const __grid_constant__ WindowSums p) {
  SOAP_SHARED(float, scratch);
  if (p.x.dtype == F32) plane_sums<float>(p, scratch);
  else if (p.x.dtype == F16) plane_sums<f16>(p, scratch);
  else plane_sums<bf16>(p, scratch);
}

// A pixel gets the gradient of every tap that sees it.
__global__ void __launch_bounds__(THREADS) window_sums_backward_kernel(
    const float* __restrict__ grad, void* __restrict__ dx, int dtype, int height, int width) {
  const int64_t plane = blockIdx.x, area = int64_t(height) * width;
  float d[9];
#pragma unroll
  for (int k = 0; k < 9; ++k) d[k] = grad[plane * 9 + k];
  for (int64_t at = int64_t(blockIdx.y) * THREADS + threadIdx.x; at < area; at += int64_t(gridDim.y) * THREADS) {
    const int h = int(at / width), w = int(at % width);
    float v = 0.f;
#pragma unroll
    for (int k = 0; k < 9; ++k) {
      const bool seen = !(k / 3 == 0 && h == height - 1) && !(k / 3 == 2 && h == 0) &&
                        !(k % 3 == 0 && w == width - 1) && !(k % 3 == 2 && w == 0);
      v += seen ? d[k] : 0.f;
    }
    store_any(dx, dtype, plane * area + at, v);
  }
}

}  // namespace

void window_sums(int64_t images, int channels, int height, int width, const Frames& x, float* sums, void* stream) {
  const int v = x.dtype == F32 ? 4 : 8;
  const bool linear = whole_planes(x, width, v) && int64_t(height) * width % v == 0;
  const WindowSums p{x, sums, channels, height, width, linear};
  SOAP_LAUNCH(window_sums_kernel, unsigned(images * channels), THREADS, 32 * sizeof(float), stream, p);
  launched("window_sums");
}

void window_sums_backward(int64_t planes, int height, int width, const float* grad, void* dx, int dtype, void* stream) {
  const int64_t chunks = (int64_t(height) * width + THREADS * 8 - 1) / (THREADS * 8);
  SOAP_LAUNCH(window_sums_backward_kernel, dim3(unsigned(planes), unsigned(chunks < 64 ? chunks : 64)), THREADS, 0,
      stream, grad, dx, dtype, height, width);
  launched("window_sums_backward");
}

}  // namespace soap::cuda
