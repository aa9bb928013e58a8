// Runs the CUDA C++ of csrc/cuda on the CPU: g++ -x c++ -include cuda_shim.h kernel.cu
//
// A thread of a block is a fiber with a stack of its own; one operating-system thread runs one block at a time. A fiber
// runs until it meets a barrier (of the block, or of its warp: every shuffle, ldmatrix and mma is one), then the next one
// runs. The order is CUDA_SHIM_ORDER = forward | reverse | random: code that lacks a barrier computes something else in
// at least one of them. Shared memory is a heap block of exactly the size asked for, filled with NaNs before each block:
// AddressSanitizer sees an access past it, and a read of what nobody wrote poisons the result. A barrier that not all
// threads reach, a warp-wide instruction that not all lanes reach, and a misaligned ldmatrix row are errors.
//
// CUDA_SHIM_PROCESSORS: multiprocessors, default 2.
//
// Of the tensor core instructions it models m16n8k16, m16n8k8 (bf16, fp16) and ldmatrix x2, x4, plain and transposed, by
// the lane layouts of the PTX manual. Kernels and shim share that reading; Triton's compiler is asked for the layouts of
// mma too (test_mma_layouts.py), and the same cases come out right on a GPU (test_gpu_cuda.py).
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __launch_bounds__
#undef __forceinline__
#undef __grid_constant__
#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __forceinline__ inline
#define __grid_constant__

namespace cuda_shim {

constexpr int LANES = 32, ALIGNMENT = 128;
// Limits of a launch: threads of a block, blocks along y and z, bytes of shared memory (on sm_90).
constexpr int MAX_THREADS = 1024;
constexpr unsigned MAX_GRID_YZ = 65535;
constexpr size_t MAX_SHARED = 227 * 1024;
constexpr int UNWRITTEN = 0xff;  // of each byte of fresh shared memory: every float is NaN

enum class State { ready, at_block, at_warp, done };

struct Block;
struct Fiber {
  uint3 tid;
  int index, lane, warp;
  State state;
  Block* block;
  int site;                  // line of the barrier it waits at
  unsigned generation;       // of the warp's barrier it waits at
  void* stack_pointer;
  char* stack;
  void* fake_stack = nullptr;  // AddressSanitizer's
};
struct Warp {
  unsigned generation = 0, arrived = 0;
  int site = 0;
  alignas(16) char deposits[2][LANES][16];
};
struct Block {
  uint3 bid;
  dim3 bdim, gdim;
  unsigned char* shared;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  const std::function<void()>* body;
  void* scheduler;
  const void* scheduler_stack = nullptr;
  size_t scheduler_size = 0;
};

inline thread_local Fiber* current = nullptr;
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t STACK = 512 * 1024;
#else
constexpr size_t STACK = 128 * 1024;
#endif

extern "C" void cuda_shim_switch(void** save, void* load);
__asm__(R"(
.weak cuda_shim_switch
.type cuda_shim_switch,@function
cuda_shim_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_shim_switch,.-cuda_shim_switch
)");

inline void to_scheduler() {
  Fiber* f = current;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(f->state == State::done ? nullptr : &f->fake_stack, f->block->scheduler_stack, f->block->scheduler_size);
#endif
  cuda_shim_switch(&f->stack_pointer, f->block->scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(f->fake_stack, &f->block->scheduler_stack, &f->block->scheduler_size);
#endif
}
inline void entry() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &current->block->scheduler_stack, &current->block->scheduler_size);
#endif
  (*current->block->body)();
  current->state = State::done;
  to_scheduler();
  std::abort();
}
inline void resume(Fiber* f) {
  current = f;
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, f->stack, STACK);
#endif
  cuda_shim_switch(&f->block->scheduler, f->stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}
inline void start(Fiber* f) {
  void** s = reinterpret_cast<void**>(f->stack + STACK - 64);
  *--s = nullptr;  // a return address, for alignment
  *--s = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--s = nullptr;
  f->stack_pointer = s;
  f->state = State::ready;
}

enum class Order { forward, reverse, random };
inline Order order() {
  const char* e = std::getenv("CUDA_SHIM_ORDER");
  return !e || !*e || !std::strcmp(e, "forward") ? Order::forward : !std::strcmp(e, "reverse") ? Order::reverse : Order::random;
}

[[noreturn]] inline void fail(const Block& b, const std::string& what) {
  throw std::runtime_error("cuda_shim: block (" + std::to_string(b.bid.x) + "," + std::to_string(b.bid.y) + "): " + what);
}

inline void run_block(Block& b, Order how) {
  const int threads = int(b.fibers.size()), warps = int(b.warps.size());
  static thread_local unsigned random = 12345;
  for (Fiber& f : b.fibers) start(&f);
  for (Warp& w : b.warps) w.generation = w.arrived = 0;
  for (;;) {
    const unsigned turn = how == Order::random ? (random = random * 1664525u + 1013904223u) >> 16 : 0;
    for (int i = 0; i < warps; ++i) {
      const int wi = how == Order::reverse ? warps - 1 - i : int((i + turn) % unsigned(warps)), low = wi * LANES, count = std::min(threads, low + LANES) - low;
      for (;;) {
        bool progress = false, waiting = false;
        const unsigned shift = how == Order::random ? (random = random * 1664525u + 1013904223u) >> 16 : 0;
        for (int k = 0; k < count; ++k) {
          Fiber& f = b.fibers[low + (how == Order::reverse ? count - 1 - k : int((k + shift) % unsigned(count)))];
          if (f.state == State::at_warp && b.warps[wi].generation != f.generation) f.state = State::ready;
          if (f.state == State::ready) {
            resume(&f);
            progress = true;
          }
          waiting = waiting || f.state == State::at_warp;
        }
        if (!waiting) break;
        if (!progress) fail(b, "a warp-wide instruction is not reached by all lanes (line " + std::to_string(b.warps[wi].site) + ")");
      }
    }
    int done = 0, site = -1;
    bool apart = false;
    for (Fiber& f : b.fibers) {
      if (f.state == State::done) { ++done; continue; }
      apart = apart || (site >= 0 && site != f.site);
      site = f.site;
    }
    if (done == threads) return;
    if (apart) fail(b, "threads wait at different __syncthreads");
    if (done) fail(b, "__syncthreads at line " + std::to_string(site) + " is not reached by " + std::to_string(done) + " threads");
    for (Fiber& f : b.fibers) f.state = State::ready;
  }
}

inline std::vector<char*>& stacks() {
  static thread_local std::vector<char*> all;
  return all;
}

// For counting.cpp: what was launched last, how many launches, and mma instructions of warps, there have been.
inline const char* kernel_name = "";
inline int64_t launches = 0, products = 0;

inline void launch(const char* name, dim3 grid, dim3 block, size_t bytes, const std::function<void()>& body) {
  kernel_name = name;
  ++launches;
  const int threads = int(block.x * block.y * block.z);
  if (threads > MAX_THREADS) throw std::runtime_error("cuda_shim: more than 1024 threads a block");
  if (bytes > MAX_SHARED) throw std::runtime_error("cuda_shim: more than 227 KiB of shared memory");
  if (grid.y > MAX_GRID_YZ || grid.z > MAX_GRID_YZ) throw std::runtime_error("cuda_shim: the grid is too large");
  while (int(stacks().size()) < threads)
    stacks().push_back(static_cast<char*>(mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)));
  const Order how = order();
  Block b;
  b.bdim = block;
  b.gdim = grid;
  b.body = &body;
  b.fibers.resize(threads);
  b.warps.resize((threads + LANES - 1) / LANES);
  for (int i = 0; i < threads; ++i) {
    Fiber& f = b.fibers[i];
    f.index = i;
    f.lane = i % LANES;
    f.warp = i / LANES;
    f.block = &b;
    f.stack = stacks()[i];
    f.tid = make_uint3(i % block.x, i / block.x % block.y, i / block.x / block.y);
  }
  struct Shared {
    void* p = nullptr;
    explicit Shared(size_t n) { if (posix_memalign(&p, ALIGNMENT, n)) throw std::bad_alloc(); }
    ~Shared() { std::free(p); }
  } shared(bytes ? bytes : 1);
  b.shared = static_cast<unsigned char*>(shared.p);
  const int64_t blocks = int64_t(grid.x) * grid.y * grid.z;
  for (int64_t k = 0; k < blocks; ++k) {
    const int64_t i = how == Order::reverse ? blocks - 1 - k : k;
    b.bid = make_uint3(unsigned(i % grid.x), unsigned(i / grid.x % grid.y), unsigned(i / grid.x / grid.y));
    std::memset(b.shared, UNWRITTEN, bytes);
    run_block(b, how);
  }
}

inline int processors() {
  const char* e = std::getenv("CUDA_SHIM_PROCESSORS");
  return e && *e ? std::atoi(e) : 2;
}

inline void sync_block(int line) {
  current->state = State::at_block;
  current->site = line;
  to_scheduler();
}
inline void sync_warp(int line) {
  Fiber* f = current;
  Warp& w = f->block->warps[f->warp];
  const int live = std::min(LANES, int(f->block->fibers.size()) - f->warp * LANES);
  w.arrived |= 1u << f->lane;
  w.site = line;
  if (w.arrived == (live == LANES ? 0xffffffffu : (1u << live) - 1)) {
    w.arrived = 0;
    ++w.generation;
    return;
  }
  f->generation = w.generation;
  f->state = State::at_warp;
  to_scheduler();
}
// Every lane deposits up to 16 bytes, then sees what all deposited.
inline const char (*exchange(const void* v, size_t n, int line))[16] {
  Fiber* f = current;
  Warp& w = f->block->warps[f->warp];
  const unsigned side = w.generation & 1;
  std::memcpy(w.deposits[side][f->lane], v, n);
  sync_warp(line);
  return w.deposits[side];
}
template <class T> inline T shuffle_xor(T v, int mask, int line) {
  T r;
  std::memcpy(&r, exchange(&v, sizeof(T), line)[current->lane ^ mask], sizeof(T));
  return r;
}

inline float half_of(uint32_t pair, int high, bool is_fp16) {
  const uint16_t h = uint16_t(high ? pair >> 16 : pair & 0xffff);
  if (is_fp16) return __half2float(__ushort_as_half(h));
  const uint32_t u = uint32_t(h) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

// m16n8k(8 * KR). A: register (row / 8) + 2 * (k / 8) of lane (row % 8) * 4 + k % 8 / 2; B: register k / 8 of lane
// n * 4 + k % 8 / 2; C: registers of lane (row % 8) * 4 + n / 2: 2 * (row / 8) + n % 2.
template <int KR> inline void mma(float* c, const uint32_t* a, const uint32_t* b, bool is_fp16, int line) {
  const int lane = current->lane, g = lane / 4, q = lane % 4;
  if (lane == 0) ++products;
  uint32_t all_a[32][2 * KR], all_b[32][KR];
  auto pa = exchange(a, 8 * KR, line);
  for (int i = 0; i < 32; ++i) std::memcpy(all_a[i], pa[i], 8 * KR);
  auto pb = exchange(b, 4 * KR, line);
  for (int i = 0; i < 32; ++i) std::memcpy(all_b[i], pb[i], 4 * KR);
  for (int i = 0; i < 4; ++i) {
    const int row = g + i / 2 * 8, n = 2 * q + (i & 1);
    float sum = 0.f;
    for (int k = 0; k < 8 * KR; ++k)
      sum += half_of(all_a[row % 8 * 4 + k % 8 / 2][row / 8 + 2 * (k / 8)], k & 1, is_fp16) * half_of(all_b[n * 4 + k % 8 / 2][k / 8], k & 1, is_fp16);
    c[i] += sum;
  }
}

inline const char* row_of(const char (*rows)[16], int lane) {
  const char* p;
  std::memcpy(&p, rows[lane], sizeof p);
  return p;
}
// Lane l addresses row l % 8 of matrix l / 8 and gets elements 2 * (l % 4), + 1 of row l / 4; transposed: of column l / 4.
template <int N, bool TRANS> inline void ldmatrix(uint32_t* out, const void* row, int line) {
  if (current->lane < 8 * N && reinterpret_cast<uintptr_t>(row) & 15) throw std::runtime_error("cuda_shim: an ldmatrix row is not 16-byte aligned");
  auto rows = exchange(&row, sizeof row, line);
  const int lane = current->lane;
  for (int m = 0; m < N; ++m) {
    uint16_t e[2];
    for (int i = 0; i < 2; ++i) {
      const int r = TRANS ? 2 * (lane % 4) + i : lane / 4, k = TRANS ? lane / 4 : 2 * (lane % 4) + i;
      std::memcpy(&e[i], row_of(rows, m * 8 + r) + 2 * k, 2);
    }
    out[m] = e[0] | uint32_t(e[1]) << 16;
  }
}

}  // namespace cuda_shim

#define threadIdx (cuda_shim::current->tid)
#define blockIdx (cuda_shim::current->block->bid)
#define blockDim (cuda_shim::current->block->bdim)
#define gridDim (cuda_shim::current->block->gdim)
#define __syncthreads() cuda_shim::sync_block(__LINE__)
#define __syncwarp() cuda_shim::sync_warp(__LINE__)
#define __shfl_xor_sync(mask, v, x) cuda_shim::shuffle_xor(v, x, __LINE__)
#define SOAP_LAUNCH(kernel, grid, block, smem, stream, ...) \
  cuda_shim::launch(#kernel, grid, block, smem, [&] { kernel(__VA_ARGS__); })
#define SOAP_SHARED(T, name) T* name = reinterpret_cast<T*>(cuda_shim::current->block->shared)

#define cudaGetLastError() cudaSuccess
#define cudaFuncSetAttribute(...) cudaSuccess
#define cudaGetDevice(p) (*(p) = 0, cudaSuccess)
#define cudaDeviceGetAttribute(p, attribute, device) (*(p) = cuda_shim::processors(), cudaSuccess)
#define cudaGetErrorString(e) "error"

using std::max;
using std::min;
inline uint32_t __float_as_uint(float f) { uint32_t u; std::memcpy(&u, &f, 4); return u; }
inline float __uint_as_float(uint32_t u) { float f; std::memcpy(&f, &u, 4); return f; }
inline float __fdividef(float a, float b) { return a / b; }
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = uint64_t(b) << 32 | a;
  uint32_t r = 0;
  for (int i = 0; i < 4; ++i) r |= uint32_t(bytes >> (8 * (selector >> (4 * i) & 7)) & 0xff) << (8 * i);
  return r;
}

namespace soap::cuda {
using Address = const char*;  // a 32-bit number on a GPU
inline Address address_of(const void* p) { return static_cast<Address>(p); }
struct Fragment { uint32_t v[4]; };
inline void ldmatrix_x4(Fragment& f, Address row) { cuda_shim::ldmatrix<4, false>(f.v, row, __LINE__); }
inline void ldmatrix_x4_trans(Fragment& f, Address row) { cuda_shim::ldmatrix<4, true>(f.v, row, __LINE__); }
inline void ldmatrix_x2(uint32_t& a, uint32_t& b, Address row) { uint32_t v[2]; cuda_shim::ldmatrix<2, false>(v, row, __LINE__); a = v[0]; b = v[1]; }
inline void ldmatrix_x2_trans(uint32_t& a, uint32_t& b, Address row) { uint32_t v[2]; cuda_shim::ldmatrix<2, true>(v, row, __LINE__); a = v[0]; b = v[1]; }
template <bool HALF> inline void mma_k16(float* c, const uint32_t* a, uint32_t b0, uint32_t b1) { const uint32_t b[2] = {b0, b1}; cuda_shim::mma<2>(c, a, b, HALF, __LINE__); }
template <bool HALF> inline void mma_k8(float* c, const uint32_t* a, uint32_t b0) { cuda_shim::mma<1>(c, a, &b0, HALF, __LINE__); }
}  // namespace soap::cuda
