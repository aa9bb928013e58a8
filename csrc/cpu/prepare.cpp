// Stage `prepare`: sums over planes, and the weights laid out for the products.
#include "block.h"

namespace soap::cpu::SOAP_ISA_NS {
namespace {

struct Margins {  // sums of the first and last row, the first and last column
  double top, bottom, left, right;
};

// The sum of a row of n pixels. Eight chains of additions cover the latency; a row is short enough for fp32.
template <class E> double row_sum(const E* p, int64_t step, int n) {
  alignas(64) float line[8 * L];
  double total = 0;
  for (int j = 0; j < n; j += 8 * L) {
    const int count = n - j < 8 * L ? n - j : 8 * L;
    convert_row(p + j * step, step, count, line);
    for (int k = count; k < 8 * L; ++k) line[k] = 0.f;
    v s = ld(line);
    for (int k = 1; k < 8; ++k) s = s + ld(line + k * L);
    total += sum(s);
  }
  return total;
}

// Runs of n fp32 numbers, N of them side by side: more streams from memory at once, and a quarter of the time less.
constexpr int STREAMS = 4;

template <int N> SOAP_INLINE void run_sums(const float* const* p, int64_t n, double* total) {
  constexpr int CHAINS = STREAMS / N < 2 ? 4 : 8;        // of additions, to cover their latency
  constexpr int64_t STEP = CHAINS * L, RUN = 64 * STEP;  // so many before the fp32 chains go to double
  constexpr int64_t AHEAD = 256;
  for (int r = 0; r < N; ++r) total[r] = 0;
  int64_t j = 0;
  while (n - j >= STEP) {
    v s[N][CHAINS];
    SOAP_UNROLL(4)
    for (int r = 0; r < N; ++r) {
      SOAP_UNROLL(8)
      for (int k = 0; k < CHAINS; ++k) s[r][k] = set1(0.f);
    }
    for (const int64_t end = n - j < RUN ? n : j + RUN; j + STEP <= end; j += STEP) {
      SOAP_UNROLL(4)
      for (int r = 0; r < N; ++r) {
        SOAP_UNROLL(8)
        for (int k = 0; k < CHAINS; ++k) {
          if (k * L % 16 == 0) prefetch_near(p[r] + j + AHEAD + k * L);
          s[r][k] = s[r][k] + ld(p[r] + j + k * L);
        }
      }
    }
    for (int r = 0; r < N; ++r) {
      v all = (s[r][0] + s[r][1]) + (s[r][2] + s[r][3]);
      if (CHAINS == 8) all = all + ((s[r][CHAINS - 4] + s[r][CHAINS - 3]) + (s[r][CHAINS - 2] + s[r][CHAINS - 1]));
      total[r] += sum(all);
    }
  }
  for (int r = 0; r < N; ++r)
    for (int64_t k = j; k < n; ++k) total[r] += p[r][k];
}

double run_sum(const float* p, int64_t n) {
  double total;
  run_sums<1>(&p, n, &total);
  return total;
}

template <class E> double rows_sum(const E* p, const Source& x, int height, int width) {
  double total = 0;
  for (int r = 0; r < height; ++r) total += row_sum(p + r * x.row, x.col, width);
  return total;
}

double rows_sum(const float* p, const Source& x, int height, int width) {
  if (x.col != 1) return rows_sum<float>(p, x, height, width);
  if (x.row == width) return run_sum(p, static_cast<int64_t>(height) * width);
  double total = 0;
  for (int r = 0; r < height; ++r) total += run_sum(p + r * x.row, width);
  return total;
}

template <class E> double sum_as(const Source& x, int64_t offset, int height, int width, Margins* margins) {
  const E* p = static_cast<const E*>(x.data) + offset;
  if (margins) {
    margins->top = row_sum(p, x.col, width);
    margins->bottom = row_sum(p + (height - 1) * x.row, x.col, width);
    margins->left = row_sum(p, x.row, height);
    margins->right = row_sum(p + (width - 1) * x.col, x.row, height);
  }
  return rows_sum(p, x, height, width);
}

double plane_total(const Source& x, int64_t clip, int plane, int height, int width, Margins* margins) {
  const int64_t offset = clip * x.clip + x.plane[plane];
  double total = 0;
  by_dtype(x.dtype, [&](auto e) { total = sum_as<decltype(e)>(x, offset, height, width, margins); });
  return total;
}

void plane_sums(const Source& x, int64_t clip, int first, int count, int height, int width, double* out) {
  const int64_t pixels = static_cast<int64_t>(height) * width;
  int k = 0;
  if (loads_in_place(x) && x.row == width) {  // a plane is one run of memory: rows need not be told apart
    for (; k + STREAMS <= count; k += STREAMS) {
      const float* p[STREAMS];
      for (int r = 0; r < STREAMS; ++r)
        p[r] = static_cast<const float*>(x.data) + clip * x.clip + x.plane[first + k + r];
      run_sums<STREAMS>(p, pixels, out + k);
    }
  }
  for (; k < count; ++k) {
    const double total = plane_total(x, clip, first + k, height, width, nullptr);
    out[k] = x.scale ? x.scale[first + k] * total + static_cast<double>(x.shift[first + k]) * pixels : total;
  }
}

double corner(const Source& x, int64_t clip, int plane, int row, int col, int height, int width) {
  alignas(64) float pixel[STAGE];
  stage(x, clip, plane, row, 1, col, 1, height, width, pixel);
  return pixel[0];
}

// What tap (i, j) of a zero-padded 3x3 conv sees: the total, less the row and the column it never reaches, plus the
// corner that was taken away twice.
void window_sums(const Source& x, int64_t clip, int plane, int height, int width, float* out) {
  Margins m;
  const double total = plane_total(x, clip, plane, height, width, &m);
  const double rows[3] = {m.bottom, 0, m.top}, cols[3] = {m.right, 0, m.left};
  const int row_of[3] = {height - 1, 0, 0}, col_of[3] = {width - 1, 0, 0};
  for (int i = 0; i < 3; ++i) {
    for (int j = 0; j < 3; ++j) {
      const double twice = i != 1 && j != 1 ? corner(x, clip, plane, row_of[i], col_of[j], height, width) : 0;
      out[i * 3 + j] = static_cast<float>(total - rows[i] - cols[j] + twice);
    }
  }
}

template <class E> void spread_sums(const Sink& dx, int64_t offset, int height, int width, const float* grad) {
  for (int r = 0; r < height; ++r) {
    float taps[3];  // by column of the taps, of those rows of taps that see row r
    for (int j = 0; j < 3; ++j) taps[j] = (r < height - 1 ? grad[j] : 0.f) + grad[3 + j] + (r > 0 ? grad[6 + j] : 0.f);
    E* p = static_cast<E*>(dx.data) + offset + r * dx.row;
    const float inside = taps[0] + taps[1] + taps[2];
    for (int c = 1; c + 1 < width; ++c) from_float(inside, p[c * dx.col]);
    from_float(taps[1] + (width > 1 ? taps[0] : 0.f), p[0]);
    if (width > 1) from_float(taps[1] + taps[2], p[(width - 1) * dx.col]);
  }
}

void window_sums_backward(const Sink& dx, int64_t clip, int plane, int height, int width, const float* grad) {
  const int64_t offset = clip * dx.clip + dx.plane[plane];
  by_dtype(dx.dtype, [&](auto e) { spread_sums<decltype(e)>(dx, offset, height, width, grad); });
}

int conv_groups(int outputs) { return round_up(outputs, OUTPUTS) / OUTPUTS; }

size_t conv_group_size(int inputs, bool strict) {
  return static_cast<size_t>(inputs) * OUTPUTS * (strict ? 9 : POINTS);
}

// [point or tap][input][output of the group]; outputs past the last are zero.
void layout_conv(const float* weight, int inputs, int outputs, bool strict, double factor, int group, float* out) {
  const int first = group * OUTPUTS;
  for (int i = 0; i < inputs; ++i) {
    double g[9][OUTPUTS];
    for (int o = 0; o < OUTPUTS; ++o) {
      const float* w = weight + (static_cast<int64_t>(first + o) * inputs + i) * 9;
      for (int k = 0; k < 9; ++k) g[k][o] = first + o < outputs ? factor * w[k] : 0.;
    }
    float* to = out + static_cast<int64_t>(i) * OUTPUTS;
    const int64_t step = static_cast<int64_t>(inputs) * OUTPUTS;
    if (strict) {
      for (int k = 0; k < 9; ++k)
        for (int o = 0; o < OUTPUTS; ++o) to[k * step + o] = static_cast<float>(g[k][o]);
      continue;
    }
    double half[WINDOW][3][OUTPUTS];  // G g
    for (int a = 0; a < WINDOW; ++a)
      for (int j = 0; j < 3; ++j)
        for (int o = 0; o < OUTPUTS; ++o)
          half[a][j][o] = G[a][0] * g[j][o] + G[a][1] * g[3 + j][o] + G[a][2] * g[6 + j][o];
    for (int a = 0; a < WINDOW; ++a)
      for (int b = 0; b < WINDOW; ++b)
        for (int o = 0; o < OUTPUTS; ++o)
          to[(a * WINDOW + b) * step + o] =
              static_cast<float>(G[b][0] * half[a][0][o] + G[b][1] * half[a][1][o] + G[b][2] * half[a][2][o]);
  }
}

// The stencil on sums over channels: the mean's 1 / C comes in here. [point or tap][tap in time].
void layout_stencil(const double* weight, int channels, bool strict, double factor, float* out) {
  for (int d = 0; d < 3; ++d) {
    const double* g = weight + d * 9;
    if (strict) {
      for (int k = 0; k < 9; ++k) out[k * 3 + d] = static_cast<float>(factor * g[k] / channels);
      continue;
    }
    for (int a = 0; a < WINDOW; ++a) {
      for (int b = 0; b < WINDOW; ++b) {
        double s = 0;
        for (int i = 0; i < 3; ++i)
          for (int j = 0; j < 3; ++j) s += G[a][i] * G[b][j] * g[i * 3 + j];
        out[(a * WINDOW + b) * 3 + d] = static_cast<float>(factor * s / channels);
      }
    }
  }
}

}  // namespace

extern const Stages stages;
const Stages stages = {
    SOAP_STRING_OF(SOAP_ISA_NS),
    L,
    block_grid,
    window_sums,
    plane_sums,
    window_sums_backward,
    conv_groups,
    conv_group_size,
    layout_conv,
    layout_stencil,
    fuse_scratch,
    fuse,
    gradient_inputs,
    gradient_outputs,
    gradient_group,
    sweep_scratch,
    sweep_open,
    sweep_begin,
    sweep,
    sweep_end,
};

}  // namespace soap::cpu::SOAP_ISA_NS
