// Multiplies matrices by the shim's mma with fragments laid out as the tables say that come in, for m16n8k16 and m16n8k8 in
// bf16 and fp16. Input: per K the tables of A, B, C: for each lane, for each element its row and column. Output: the
// number of elements of C that differ from the product.
#include <cstdio>
#include <iostream>

namespace {

struct Table {
  int elements;
  std::vector<int> at;  // (lane, element, 2)
  int row(int lane, int e) const { return at[(lane * elements + e) * 2]; }
  int column(int lane, int e) const { return at[(lane * elements + e) * 2 + 1]; }
};

Table read_table(int elements) {
  Table t{elements, std::vector<int>(size_t(32) * elements * 2)};
  for (int& v : t.at) std::cin >> v;
  return t;
}

template <int K, bool HALF> int wrong(const Table& ta, const Table& tb, const Table& tc) {
  float a[16][K], b[K][8], c[16][8] = {};
  for (int i = 0; i < 16 * K; ++i) a[i / K][i % K] = float((i * 7 + i / K) % 13 - 6);  // exact in either type, and all sums
  for (int i = 0; i < K * 8; ++i) b[i / 8][i % 8] = float((i * 5 + i / 8) % 11 - 5);
  const auto pack = [](float low, float high) -> uint32_t {
    if (HALF) return __half_as_ushort(__float2half(low)) | uint32_t(__half_as_ushort(__float2half(high))) << 16;
    return __float_as_uint(low) >> 16 | (__float_as_uint(high) & 0xffff0000u);
  };
  cuda_shim::launch(dim3(1), dim3(32), 16, [&] {
    const int lane = threadIdx.x;
    uint32_t ra[K / 4], rb[K / 8];
    float rc[4] = {};
    for (int r = 0; r < K / 4; ++r) ra[r] = pack(a[ta.row(lane, 2 * r)][ta.column(lane, 2 * r)], a[ta.row(lane, 2 * r + 1)][ta.column(lane, 2 * r + 1)]);
    for (int r = 0; r < K / 8; ++r) rb[r] = pack(b[tb.row(lane, 2 * r)][tb.column(lane, 2 * r)], b[tb.row(lane, 2 * r + 1)][tb.column(lane, 2 * r + 1)]);
    if constexpr (K == 16) soap::mma_k16<HALF>(rc, ra, rb[0], rb[1]);
    else soap::mma_k8<HALF>(rc, ra, rb[0]);
    for (int e = 0; e < 4; ++e) c[tc.row(lane, e)][tc.column(lane, e)] += rc[e];
  });
  int count = 0;
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 8; ++j) {
      float sum = 0.f;
      for (int k = 0; k < K; ++k) sum += a[i][k] * b[k][j];
      count += sum != c[i][j];
    }
  return count;
}

template <int K> int all_wrong() {
  const Table a = read_table(K / 2), b = read_table(K / 4), c = read_table(4);
  return wrong<K, false>(a, b, c) + wrong<K, true>(a, b, c);
}

}  // namespace

int main() {
  const int first = all_wrong<16>(), second = all_wrong<8>();
  std::printf("%d %d\n", first, second);
}
