// Counts what kernels access of memory that is watched, by launch. GCC's -fsanitize=thread puts a call before each access
// of the kernels; these functions stand where the sanitizer's own would be.
#include <map>

namespace {

constexpr int SLOTS = 3;

struct Count {
  const char* kernel;
  int64_t products = 0;                                       // mma instructions of warps
  int64_t read[SLOTS] = {}, written[SLOTS] = {}, stored[SLOTS] = {};  // bytes: each once a block, and of all stores
};

struct Watched {
  const char* first = nullptr;
  size_t bytes = 0;
  std::vector<int64_t> readers, writers;  // of each byte the last block that did
};

Watched watched[SLOTS];
std::vector<Count> counts;
int64_t launches_seen = 0, products_seen = 0;

Count& current_count() {
  if (cuda_shim::launches != launches_seen) {
    launches_seen = cuda_shim::launches;
    if (!counts.empty()) counts.back().products = cuda_shim::products - products_seen;
    products_seen = cuda_shim::products;
    counts.push_back(Count{cuda_shim::kernel_name});
  }
  return counts.back();
}

void touch(const void* p, size_t bytes, bool write) {
  const char* at = static_cast<const char*>(p);
  for (int k = 0; k < SLOTS; ++k) {
    Watched& w = watched[k];
    if (at < w.first || at >= w.first + w.bytes) continue;
    const cuda_shim::Block& b = *cuda_shim::current->block;
    const int64_t block = (cuda_shim::launches << 32) + b.bid.x + int64_t(b.gdim.x) * (b.bid.y + int64_t(b.gdim.y) * b.bid.z);
    Count& count = current_count();
    if (write) count.stored[k] += int64_t(bytes);
    for (size_t i = at - w.first; i < at - w.first + bytes; ++i) {
      int64_t& last = (write ? w.writers : w.readers).at(i);
      (write ? count.written : count.read)[k] += last != block;
      last = block;
    }
  }
}

}  // namespace

extern "C" {
// The bytes at `p` are slot `k` from now on; what was counted is forgotten.
void count_watch(int k, const void* p, size_t bytes) {
  watched[k] = Watched{static_cast<const char*>(p), bytes, std::vector<int64_t>(bytes), std::vector<int64_t>(bytes)};
  counts.clear();
  launches_seen = cuda_shim::launches;
  products_seen = cuda_shim::products;
}
// The i-th launch that touched what is watched: its name, or null; `numbers`: products, then read, written and stored.
const char* count_of(int i, int64_t* numbers) {
  if (i >= int(counts.size())) return nullptr;
  Count& c = counts[i];
  if (i + 1 == int(counts.size())) c.products = cuda_shim::products - products_seen;
  *numbers++ = c.products;
  for (const auto* list : {c.read, c.written, c.stored}) numbers = std::copy(list, list + SLOTS, numbers);
  return c.kernel;
}

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_read_range(void* p, size_t n) { touch(p, n, false); }
void __tsan_write_range(void* p, size_t n) { touch(p, n, true); }
#define COUNTED(N)                                                  \
  void __tsan_read##N(void* p) { touch(p, N, false); }              \
  void __tsan_write##N(void* p) { touch(p, N, true); }              \
  void __tsan_unaligned_read##N(void* p) { touch(p, N, false); }    \
  void __tsan_unaligned_write##N(void* p) { touch(p, N, true); }
COUNTED(1)
COUNTED(2)
COUNTED(4)
COUNTED(8)
COUNTED(16)
int64_t __tsan_atomic64_fetch_add(volatile int64_t* p, int64_t v, int) { return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST); }
int64_t __tsan_atomic64_load(const volatile int64_t* p, int) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
}
