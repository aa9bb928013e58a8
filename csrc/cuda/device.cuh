// What every kernel here shares: launching, scalar types, and the warp-wide instructions.
// Compiled by nvcc; the tests compile the same sources with g++, where a shim stands in for what is under __CUDACC__.
#pragma once
#include "kernels.h"
#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define SOAP_LAUNCH(kernel, grid, block, smem, stream, ...) \
  kernel<<<grid, block, smem, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#define SOAP_SHARED(T, name)                                   \
  extern __shared__ __align__(16) unsigned char soap_shared[]; \
  T* name = reinterpret_cast<T*>(soap_shared)
#endif
#include <atomic>
#include <stdexcept>
#include <string>

namespace soap::cuda {

// Each compiles a mistake in where it is asked for: tests/gpu_proof sees that its cases notice. A library has none.
enum Plant { NO_PLANT, TILE_BARRIER, DZ_BARRIER, TAP, RIGHT_EDGE, DZ_EDGE, FRAGMENTS, PLANE_END, SUMS_BARRIER };
#ifndef SOAP_PLANT
#define SOAP_PLANT NO_PLANT
#endif
template <Plant PLANT> constexpr bool planted = PLANT == SOAP_PLANT;

extern std::atomic<int64_t> launch_counter;

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("soap_kernels, CUDA, ") + what + ": " + cudaGetErrorString(error));
}

template <class Kernel> inline void allow_shared(Kernel kernel, size_t bytes) {
  if (bytes > 48 * 1024)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)), "shared memory");
}

inline void launched(const char* what) {
  ++launch_counter;
  check(cudaGetLastError(), what);
}

inline int multiprocessors() {
  int device = 0, count = 0;
  check(cudaGetDevice(&device), "device");
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "multiprocessors");
  return count;
}

using bf16 = __nv_bfloat16;
using f16 = __half;

template <class T> struct TypeOf;
template <> struct TypeOf<float> { static constexpr int dtype = F32, vector = 4; };
template <> struct TypeOf<f16> { static constexpr int dtype = F16, vector = 8; };
template <> struct TypeOf<bf16> { static constexpr int dtype = BF16, vector = 8; };
template <> struct TypeOf<uint8_t> { static constexpr int dtype = U8, vector = 8; };

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(f16 v) { return __half2float(v); }
__device__ __forceinline__ float to_float(bf16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float to_float(uint8_t v) { return float(v); }

__device__ __forceinline__ float load_any(const void* p, int dtype, int64_t i) {
  switch (dtype) {
    case F32: return static_cast<const float*>(p)[i];
    case F16: return to_float(static_cast<const f16*>(p)[i]);
    case BF16: return to_float(static_cast<const bf16*>(p)[i]);
    default: return to_float(static_cast<const uint8_t*>(p)[i]);
  }
}
__device__ __forceinline__ float load_any(const Array& a, int64_t i) { return load_any(a.data, a.dtype, i); }

__device__ __forceinline__ void store_any(void* p, int dtype, int64_t i, float v) {
  switch (dtype) {
    case F32: static_cast<float*>(p)[i] = v; break;
    case F16: static_cast<f16*>(p)[i] = __float2half_rn(v); break;
    default: static_cast<bf16*>(p)[i] = __float2bfloat16_rn(v); break;
  }
}
__device__ __forceinline__ void store_any(const Array& a, int64_t i, float v) { store_any(a.data, a.dtype, i, v); }

__device__ __forceinline__ uint32_t bits(float v) { return __float_as_uint(v); }

// Two floats as a pair of 16-bit numbers, the first in the low half.
template <bool HALF> __device__ __forceinline__ uint32_t pack(float a, float b) {
  if constexpr (HALF) {
    __half2 h = __floats2half2_rn(a, b);
    return *reinterpret_cast<uint32_t*>(&h);
  } else {
    __nv_bfloat162 h = __floats2bfloat162_rn(a, b);
    return *reinterpret_cast<uint32_t*>(&h);
  }
}
template <bool HALF> __device__ __forceinline__ uint4 pack8(const float* v) {
  return make_uint4(pack<HALF>(v[0], v[1]), pack<HALF>(v[2], v[3]), pack<HALF>(v[4], v[5]), pack<HALF>(v[6], v[7]));
}
__device__ __forceinline__ float low_bf16(uint32_t p) { return __uint_as_float(p << 16); }
__device__ __forceinline__ float high_bf16(uint32_t p) { return __uint_as_float(p & 0xffff0000u); }
// What rounding to bf16 left behind, again as bf16.
__device__ __forceinline__ uint32_t pack_rest(float a, float b, uint32_t high) {
  return pack<false>(a - low_bf16(high), b - high_bf16(high));
}

// 1 / (1 + 2^z): the logistic function of -z * ln 2. The folded weights bear the factor -log2(e).
__device__ __forceinline__ float logistic2(float z) {
#ifdef __CUDACC__
  float e, r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(z));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(1.f + e));
  return r;
#else
  return 1.f / (1.f + exp2f(z));
#endif
}

// Asks for what will be read soon, into the L2 cache: no register waits for it.
__device__ __forceinline__ void prefetch(const void* p) {
#ifdef __CUDACC__
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
#else
  (void)p;
#endif
}

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int o = 16; o > 0; o >>= 1) v += __shfl_xor_sync(0xffffffffu, v, o);
  return v;
}

// Sum over the block, the same bits every time. `scratch`: a float a warp; every thread may reuse it after the call.
__device__ __forceinline__ float block_sum(float v, float* scratch) {
  v = warp_sum(v);
  if ((threadIdx.x & 31) == 0) scratch[threadIdx.x >> 5] = v;
  __syncthreads();
  float total = 0.f;
  for (int w = 0; w < int(blockDim.x) / 32; ++w) total += scratch[w];
  __syncthreads();
  return total;
}

#ifdef __CUDACC__
struct Fragment { uint32_t v[4]; };

// An address in shared memory, for arithmetic in bytes.
using Address = uint32_t;
__device__ __forceinline__ Address address_of(const void* p) { return Address(__cvta_generic_to_shared(p)); }
// As they lie in memory, or each 8x8 matrix transposed.
#define SOAP_LDMATRIX(SUFFIX, FORM)                                                                                \
  __device__ __forceinline__ void ldmatrix_x4##SUFFIX(Fragment& f, Address row) {                                  \
    asm volatile("ldmatrix.sync.aligned.m8n8.x4" FORM ".shared.b16 {%0,%1,%2,%3}, [%4];"                           \
        : "=r"(f.v[0]), "=r"(f.v[1]), "=r"(f.v[2]), "=r"(f.v[3])                                                   \
        : "r"(row));                                                                                               \
  }                                                                                                                \
  __device__ __forceinline__ void ldmatrix_x2##SUFFIX(uint32_t& a, uint32_t& b, Address row) {                     \
    asm volatile("ldmatrix.sync.aligned.m8n8.x2" FORM ".shared.b16 {%0,%1}, [%2];" : "=r"(a), "=r"(b) : "r"(row)); \
  }
SOAP_LDMATRIX(, "")
SOAP_LDMATRIX(_trans, ".trans")
// c (16x8, fp32) += a (16x16, row major) * b (16x8, column major)
template <bool HALF> __device__ __forceinline__ void mma_k16(float* c, const uint32_t* a, uint32_t b0, uint32_t b1) {
  if constexpr (HALF)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// c (16x8, fp32) += a (16x8) * b (8x8)
template <bool HALF> __device__ __forceinline__ void mma_k8(float* c, const uint32_t* a, uint32_t b0) {
  if constexpr (HALF)
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(b0));
  else
    asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(b0));
}
#endif

}  // namespace soap::cuda
