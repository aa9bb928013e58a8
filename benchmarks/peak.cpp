// What this machine can do at most: fused multiply-adds a second on so many threads, for the widest vectors it has.
#include <chrono>
#include <thread>
#include <vector>

namespace {

constexpr int kChains = 24;

template <class V>
double run(double seconds) {
  V a[kChains];
  for (int i = 0; i < kChains; ++i) a[i] = V{} + 1e-3f * static_cast<float>(i);
  const V x = V{} + 0.999f, y = V{} + 0.001f;
  long rounds = 0;
  const auto start = std::chrono::steady_clock::now();
  double spent = 0;
  while (spent < seconds) {
    for (int n = 0; n < 20000; ++n) {
#pragma GCC unroll 24
      for (int i = 0; i < kChains; ++i) a[i] = a[i] * x + y;
    }
    rounds += 20000;
    spent = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }
  V sum = a[0];
  for (int i = 1; i < kChains; ++i) sum += a[i];
  volatile float keep = sum[0];
  (void)keep;
  return static_cast<double>(rounds) * kChains * (sizeof(V) / sizeof(float)) / spent;
}

#if defined(__AVX512F__)
using Widest = float __attribute__((vector_size(64)));
#elif defined(__AVX2__)
using Widest = float __attribute__((vector_size(32)));
#else
using Widest = float __attribute__((vector_size(16)));
#endif

}  // namespace

// Multiply-adds a second, all threads together.
extern "C" double fma_peak(int threads, double seconds) {
  std::vector<double> found(static_cast<size_t>(threads));
  std::vector<std::thread> pool;
  for (double& f : found) pool.emplace_back([&f, seconds] { f = run<Widest>(seconds); });
  double total = 0;
  for (std::thread& t : pool) t.join();
  for (const double f : found) total += f;
  return total;
}
