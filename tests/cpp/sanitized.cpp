// The CPU backend without PyTorch, for AddressSanitizer and UndefinedBehaviorSanitizer: every op forward and backward,
// every instruction set of this machine, both precisions, shapes and strides whose last pixel ends its memory exactly.
// Compares the instruction sets with one another, so that what runs is also right.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "cpu/backend.h"

namespace {

using namespace soap::cpu;

class ThreadPool final : public Pool {
 public:
  int threads() const override { return 3; }
  void spread(int threads, const std::function<void()>& body) override {
    std::vector<std::thread> all;
    for (int k = 0; k < threads; ++k) all.emplace_back(body);
    for (std::thread& t : all) t.join();
  }
};

std::mt19937 random_bits(1);

Numbers random_numbers(size_t n, double scale) {
  std::normal_distribution<double> normal(0, scale);
  Numbers v(n);
  for (double& x : v) x = normal(random_bits);
  return v;
}

// Frames in memory that ends with the last pixel; `col` > 1 leaves gaps.
struct Frames {
  Frames(const Shape& s, int col, Dtype dtype) : shape(s), dtype(dtype), col(col) {
    row = static_cast<int64_t>(s.width) * col;
    for (int p = 0; p < s.planes(); ++p) planes.push_back(p * s.height * row);
    clip = s.planes() * s.height * row;
    const size_t n = s.clips ? static_cast<size_t>(s.clips * clip - col + 1) : 0;
    const Numbers values = random_numbers(n, 1);
    const size_t size = dtype == Dtype::f32 ? 4 : dtype == Dtype::u8 ? 1 : 2;
    memory = std::malloc(n * size);
    for (size_t k = 0; k < n; ++k) {
      const float f = static_cast<float>(values[k]);
      uint32_t bits;
      std::memcpy(&bits, &f, 4);
      if (dtype == Dtype::f32) static_cast<float*>(memory)[k] = f;
      if (dtype == Dtype::bf16) static_cast<uint16_t*>(memory)[k] = static_cast<uint16_t>(bits >> 16);
      if (dtype == Dtype::f16) static_cast<uint16_t*>(memory)[k] = static_cast<uint16_t>(0x3800 + (bits & 0x3ff));
      if (dtype == Dtype::u8) static_cast<uint8_t*>(memory)[k] = static_cast<uint8_t>(bits);
    }
    scale.assign(planes.size(), 1.f / 64);
    shift.assign(planes.size(), -2.f);
  }
  ~Frames() { std::free(memory); }
  Frames(const Frames&) = delete;
  Frames& operator=(const Frames&) = delete;
  Source source() const {
    const bool u8 = dtype == Dtype::u8;
    return {memory, dtype, clip, row, col, planes.data(), u8 ? scale.data() : nullptr, u8 ? shift.data() : nullptr};
  }
  Sink sink() const { return {memory, dtype, clip, row, col, planes.data()}; }

  Shape shape;
  Dtype dtype;
  int col;
  int64_t row, clip;
  std::vector<int64_t> planes;
  std::vector<float> scale, shift;
  void* memory;
};

Weights random_weights(const Shape& s, int64_t parts, const std::vector<int>& sizes) {
  Weights w;
  w.frames = s.frames;
  w.channels = s.channels;
  w.hidden = 4;
  w.three_dem = parts & 1;
  w.cwem = parts & 2;
  if (parts & 4) w.tuple_sizes = sizes;
  const size_t C = s.channels, R = 4;
  const auto add = [&](size_t n) { w.tensor.push_back(random_numbers(n, 0.2)); };
  if (w.three_dem) add(27);
  if (w.cwem) add(R * C), add(R * R * 3), add(R), add(C * R);
  if (w.hmem()) {
    size_t maps = 0;
    for (const size_t o : sizes) add(o * C * o * C * 9), add(o * C), maps += s.frames - o;
    for (const size_t o : sizes) add(C * o * C), add(C);
    add(s.frames * maps), add(s.frames);
  }
  return w;
}

int64_t compared = 0;

void expect_close(double a, double b, const char* what) {
  ++compared;
  if (std::fabs(a - b) > 2e-3 * (1 + std::fabs(b))) {
    std::printf("%s: %g against %g\n", what, a, b);
    std::exit(1);
  }
}

void compare(const Frames& a, const Frames& b, const char* what) {
  if (a.dtype != Dtype::f32) return;
  for (int64_t k = 0; k < a.shape.clips * a.clip; k += a.col)
    expect_close(static_cast<float*>(a.memory)[k], static_cast<float*>(b.memory)[k], what);
}

void soap_case(const Shape& shape, int64_t parts, int col, Dtype dtype, bool strict) {
  ThreadPool pool;
  const Frames x(shape, col, dtype), grad(shape, col, dtype == Dtype::u8 ? Dtype::f32 : dtype);
  std::vector<int> sizes;
  for (int o = 1; o < shape.frames && o < 4; ++o) sizes.push_back(o);
  SoapCall call{shape, x.source(), random_weights(shape, parts, sizes), strict, -1.5};
  const Frames y0(shape, 1, Dtype::f32), dx0(shape, 1, Dtype::f32);
  std::vector<Numbers> first;
  for (const Stages* s : available_stages()) {
    choose_stages(s->name);
    const Frames y(shape, first.empty() ? 1 : col, Dtype::f32), dx(shape, 1, Dtype::f32);
    const Frames half(shape, 1, Dtype::bf16);
    std::vector<float> prepared(2 * shape.clips * shape.planes());
    soap_forward(call, half.sink(), prepared.data(), pool);
    soap_forward(call, first.empty() ? y0.sink() : y.sink(), prepared.data(), pool);
    const std::vector<Numbers> g =
        soap_backward(call, grad.source(), prepared.data(), first.empty() ? dx0.sink() : dx.sink(), true, pool);
    if (!first.empty()) {
      if (col == 1) compare(y, y0, "y");
      compare(dx, dx0, "dx");
      for (size_t k = 0; k < first.size(); ++k)
        for (size_t j = 0; j < first[k].size(); ++j) expect_close(g[k][j], first[k][j], "dweights");
    }
    if (first.empty()) first = g;
  }
}

void priors_case(const Shape& shape, bool multiplicative, bool interleaved, bool strict) {
  ThreadPool pool;
  const int P = shape.planes();
  const Frames x(shape, 1, Dtype::f32), grad(shape, 1, Dtype::f32);
  PriorsCall call;
  call.shape = shape;
  call.x = x.source();
  call.strict = strict;
  call.multiplicative = multiplicative;
  call.interleaved = interleaved;
  call.offset = 2;
  call.stencil = random_numbers(27, 0.2);
  const Numbers gate = random_numbers(shape.clips * P, 1), conv = random_numbers(static_cast<size_t>(P) * P * 9, 0.1);
  call.gate.assign(gate.begin(), gate.end());
  call.conv.assign(conv.begin(), conv.end());
  call.conv_bias = random_numbers(P, 0.2);
  const Frames y0(shape, 1, Dtype::f32), dx0(shape, 1, Dtype::f32);
  PriorGradients first;
  bool any = false;
  for (const Stages* s : available_stages()) {
    choose_stages(s->name);
    const Frames y(shape, 1, Dtype::f32), dx(shape, 1, Dtype::f32);
    fuse_priors_forward(call, any ? y.sink() : y0.sink(), pool);
    const PriorGradients g = fuse_priors_backward(call, grad.source(), any ? dx.sink() : dx0.sink(), pool);
    std::vector<float> sums(shape.clips * P * 9);
    Shape flat = shape;
    window_sums_forward(flat, x.source(), sums.data(), pool);
    const Frames spread(shape, 1, Dtype::f16);
    window_sums_backward(flat, sums.data(), spread.sink(), pool);
    if (any) {
      compare(y, y0, "fused");
      compare(dx, dx0, "dx of fused");
      for (size_t k = 0; k < g.conv.size(); ++k) expect_close(g.conv[k], first.conv[k], "dconv");
      for (size_t k = 0; k < g.gate.size(); ++k) expect_close(g.gate[k], first.gate[k], "dgate");
      for (size_t k = 0; k < 27; ++k) expect_close(g.stencil[k], first.stencil[k], "dstencil");
    } else {
      first = g;
      any = true;
    }
  }
}

}  // namespace

int main() {
  const auto shape = [](int clips, int frames, int channels, int height, int width) {
    Shape s;
    s.clips = clips;
    s.frames = frames;
    s.channels = channels;
    s.height = height;
    s.width = width;
    return s;
  };
  for (const bool strict : {false, true}) {
    for (int64_t parts = 1; parts < 8; ++parts) soap_case(shape(2, 3, 2, 9, 37), parts, 1, Dtype::f32, strict);
    for (const Dtype dtype : {Dtype::f32, Dtype::f16, Dtype::bf16, Dtype::u8})
      for (const int col : {1, 3}) soap_case(shape(1, 4, 3, 6, 19), 7, col, dtype, strict);
    for (const int size : {1, 2, 4, 15, 16, 17, 33}) {
      soap_case(shape(1, 2, 1, size, 3), 7, 1, Dtype::f32, strict);
      soap_case(shape(1, 2, 1, 3, size), 7, 1, Dtype::f32, strict);
    }
    soap_case(shape(1, 8, 3, 20, 70), 7, 1, Dtype::f32, strict);
    for (const bool multiplicative : {false, true})
      for (const bool interleaved : {false, true})
        priors_case(shape(2, 3, 2, 7, 21), multiplicative, interleaved, strict);
  }
  soap_case(shape(1, 8, 20, 5, 9), 7, 1, Dtype::f32, false);
  std::printf("checked %lld numbers\n", static_cast<long long>(compared));
}
