// A block: 4 segments of L pixels x 4 rows, so L tiles of 4x4 pixels, one in each lane of a vector. Lane 4 q + s is
// tile q of segment s: four row vectors, one per segment, become the tiles' four pixel positions by one 4x4 transpose.
//
// Segments are counted along the tile rows of a clip and blocks are 4 successive ones, so any width and height works
// and a small image wastes at most the last block's rest. The window of a segment (6 rows, one pixel more on each side)
// is read in place where it lies inside the image as fp32 with unit stride; at an edge AVX-512 masks its loads;
// otherwise it is staged: copied, converted and zero-padded into a small buffer.
//
// Two forms of the 3x3 convolution share everything else (4x4 outputs from a 6x6 window):
//   Winograd F(4x4,3x3): 36 points, one product of weights and inputs each: 2.25 multiplies a pixel where 9 are needed
//     direct. For frames (T C = 24) 1,206 against 4,608 a pixel. The default.
//   direct ("strict"): the window's 36 pixels as they are; an output position sums 9 products. Four times the
//     multiplies, and the error and the NaN of an ordinary convolution.
#pragma once

#include "simd.h"
#include "stages.h"

namespace soap::cpu::SOAP_ISA_NS {

constexpr int WINDOW = 6, TILE = 4, POINTS = 36, POSITIONS = 16;
constexpr int STAGE = 2 * L;       // a staged row: L + 2 pixels used, L + 4 read
constexpr int GROUP_OUTPUTS = 96;  // wide layers: so many outputs share one read of the transformed inputs
// A vector's stride between points or outputs is odd, so that the sets of the caches are used evenly.

SOAP_INLINE int round_up(int n, int m) { return (n + m - 1) / m * m; }
SOAP_INLINE int points_of(bool strict) { return strict ? POSITIONS : POINTS; }
SOAP_INLINE int input_stride(int inputs) { return round_up(inputs, 12) + 1; }
SOAP_INLINE int group_outputs(int outputs) {
  const int padded = round_up(outputs, OUTPUTS);
  return padded < GROUP_OUTPUTS ? padded : GROUP_OUTPUTS;
}
// Blocks that go through a product together. Two share each broadcast weight; a wide layer's weights outgrow the cache
// and are worth reading once for more.
SOAP_INLINE int group_blocks(int inputs) { return inputs <= 128 ? 2 : 8; }

// Points whose row or column is the first or the last see nothing of a kernel that is all centre: G (0, g, 0) = (0, ..,
// 0) there. HMEM's first frame has such kernels (it is never the later tuple): 20 of its 36 products are left out.
SOAP_INLINE bool sees_centre(int point) {
  const int row = point / WINDOW, col = point % WINDOW;
  return row % (WINDOW - 1) && col % (WINDOW - 1);
}

SOAP_INLINE Blocks block_grid(int height, int width) {
  Blocks b;
  b.tile_rows = (height + TILE - 1) / TILE;
  b.segments_per_row = (width + L - 1) / L;
  b.segments = static_cast<int64_t>(b.tile_rows) * b.segments_per_row;
  b.blocks = (b.segments + 3) / 4;
  return b;
}

struct Segment {
  int row, col;    // of its first pixel
  int rows, cols;  // inside the image: at most 4 and L; 0 for a segment that does not exist
  bool inner;      // its window, and L + 4 pixels of each row, lie inside the image
};

struct Block { Segment segment[4]; };

SOAP_INLINE void locate(const Blocks& grid, int64_t block, int height, int width, Block& out) {
  for (int s = 0; s < 4; ++s) {
    const int64_t k = block * 4 + s;
    Segment& g = out.segment[s];
    g.row = static_cast<int>(k / grid.segments_per_row) * TILE;
    g.col = static_cast<int>(k % grid.segments_per_row) * L;
    const bool exists = k < grid.segments;
    g.rows = !exists ? 0 : height - g.row < TILE ? height - g.row : TILE;
    g.cols = !exists ? 0 : width - g.col < L ? width - g.col : L;
    g.inner = exists && g.row >= 1 && g.row + TILE < height && g.col >= 1 && g.col + L + 3 <= width;
  }
}

// ---- reading and writing pixels of any type and stride ----

template <class E> SOAP_INLINE void convert_row(const E* p, int64_t step, int n, float* out) {
  if (step == 1) {
    for (int j = 0; j < n; ++j) out[j] = to_float(p[j]);
  } else {
    for (int j = 0; j < n; ++j) out[j] = to_float(p[j * step]);
  }
}

#if SOAP_ISA == 2
SOAP_INLINE void convert_row(const float* p, int64_t step, int n, float* out) {
  if (step == 1) {
    for (int j = 0; j < n; j += L) st(out + j, ld_head(p + j, n - j < L ? n - j : L));
  } else {
    for (int j = 0; j < n; ++j) out[j] = p[j * step];
  }
}
#endif

// Rows [row, row + rows) and columns [col, col + cols) of a plane, zero outside of the image, into out (stride STAGE).
template <class E>
SOAP_INLINE void stage_as(const Source& x, int64_t offset, int plane, int row, int rows, int col, int cols, int height,
    int width, float* out) {
  const int begin = col < 0 ? -col : 0, end = col + cols > width ? width - col : cols;
  for (int k = 0; k < rows; ++k, out += STAGE) {
    const int r = row + k;
    if (r < 0 || r >= height || end <= begin) {
      for (int j = 0; j < STAGE; j += L) st(out + j, set1(0.f));
      continue;
    }
    const E* p = static_cast<const E*>(x.data) + offset + r * x.row + (col + begin) * x.col;
    alignas(64) float line[STAGE + 2 * L];
    float* dst = begin ? line : out;
    convert_row(p, x.col, end - begin, dst);
    if (x.scale) {
      const v a = set1(x.scale[plane]), b = set1(x.shift[plane]);
      for (int j = 0; j < end - begin; j += L) st(dst + j, fma(a, ld(dst + j), b));
    }
    if (begin) {
      for (int j = 0; j < begin; ++j) out[j] = 0.f;
      for (int j = begin; j < end; ++j) out[j] = line[j - begin];
    }
    for (int j = end; j < STAGE; ++j) out[j] = 0.f;
  }
}

[[maybe_unused]] static __attribute__((noinline)) void stage(
    const Source& x, int64_t clip, int plane, int row, int rows, int col, int cols, int height, int width, float* out) {
  const int64_t offset = clip * x.clip + x.plane[plane];
  by_dtype(x.dtype, [&](auto e) { stage_as<decltype(e)>(x, offset, plane, row, rows, col, cols, height, width, out); });
}

template <class E> SOAP_INLINE void write_as(const Sink& y, int64_t offset, const Segment& g, const float* in) {
  for (int k = 0; k < g.rows; ++k) {
    E* p = static_cast<E*>(y.data) + offset + (g.row + k) * y.row + g.col * y.col;
    if (y.col == 1)
      for (int j = 0; j < g.cols; ++j) from_float(in[k * L + j], p[j]);
    else
      for (int j = 0; j < g.cols; ++j) from_float(in[k * L + j], p[j * y.col]);
  }
}

// Four rows of L pixels (stride L) of one segment.
[[maybe_unused]] static __attribute__((noinline)) void write(
    const Sink& y, int64_t clip, int plane, const Segment& g, const float* in) {
  const int64_t offset = clip * y.clip + y.plane[plane];
  by_dtype(y.dtype, [&](auto e) { write_as<decltype(e)>(y, offset, g, in); });
}

SOAP_INLINE bool direct(const Source& x) { return x.dtype == Dtype::f32 && x.col == 1 && !x.scale; }

// Where a segment's pixels can be read four rows by L: in place or from a buffer. Lanes past the edge are zero.
struct Centre {
  const float* p;
  int64_t row;
};

SOAP_INLINE Centre centre(
    const Source& x, bool in_place, int64_t clip, int plane, const Segment& g, int height, int width, float* buffer) {
  if (in_place && g.rows == TILE && g.cols == L) {
    const float* p = static_cast<const float*>(x.data) + clip * x.clip + x.plane[plane];
    return {p + g.row * x.row + g.col, x.row};
  }
  if (g.rows == 0) {
    for (int j = 0; j < TILE * STAGE; j += L) st(buffer + j, set1(0.f));
  } else {
    stage(x, clip, plane, g.row, TILE, g.col, L, height, width, buffer);
  }
  return {buffer, STAGE};
}

// ---- the transforms of F(4x4,3x3), points 0, 1, -1, 2, -2, infinity (Lavin & Gray 2015) ----

SOAP_INLINE void input_transform(v d0, v d1, v d2, v d3, v d4, v d5, v* t) {  // B^T d
  const v four = set1(4.f), two = set1(2.f);
  const v e = fnma(four, d2, d4), f = fnma(four, d1, d3), g = d4 - d2, h = d3 - d1;
  t[0] = fma(four, d0 - d2, g);
  t[1] = e + f;
  t[2] = e - f;
  t[3] = fma(two, h, g);
  t[4] = fnma(two, h, g);
  t[5] = fnma(four, h, d5 - d3);
}

SOAP_INLINE void output_transform(v m0, v m1, v m2, v m3, v m4, v m5, v* y) {  // A^T m
  const v s1 = m1 + m2, d1 = m1 - m2, s2 = m3 + m4, d2 = m3 - m4;
  y[0] = m0 + s1 + s2;
  y[1] = fma(set1(2.f), d2, d1);
  y[2] = fma(set1(4.f), s2, s1);
  y[3] = fma(set1(8.f), d2, d1) + m5;
}

SOAP_INLINE void gradient_transform(v d0, v d1, v d2, v d3, v* z) {  // A d
  const v a = d0 + d2, b = d1 + d3, c = fma(set1(4.f), d2, d0), f = fma(set1(4.f), d3, d1);
  z[0] = d0;
  z[1] = a + b;
  z[2] = a - b;
  z[3] = fma(set1(2.f), f, c);
  z[4] = fnma(set1(2.f), f, c);
  z[5] = d3;
}

// The weights' transform; in double, since it is done once.
static constexpr double G[6][3] = {
    {1. / 4, 0, 0},
    {-1. / 6, -1. / 6, -1. / 6},
    {-1. / 6, 1. / 6, -1. / 6},
    {1. / 24, 1. / 12, 1. / 6},
    {1. / 24, -1. / 12, 1. / 6},
    {0, 0, 1},
};

// Which pixels of a block's windows lie in the image, for loads that zero the others without touching them: by segment,
// the lanes of the load at column -1 and of the one at column 3; bit k of `rows` for row k.
struct Inside {
  uint16_t left[4], right[4];
  uint8_t rows[4];
};

SOAP_INLINE uint16_t lanes_inside(int first, int width) {  // of L pixels from column `first` on
  const int begin = first < 0 ? -first : 0, end = width - first < L ? width - first : L;
  return end <= begin ? uint16_t{0} : static_cast<uint16_t>(((1u << end) - 1) & ~((1u << begin) - 1));
}

SOAP_INLINE Inside inside_of(const Block& b, int height, int width) {
  Inside in;
  for (int s = 0; s < 4; ++s) {
    const Segment& g = b.segment[s];
    in.left[s] = lanes_inside(g.col - 1, width);
    in.right[s] = lanes_inside(g.col + 3, width);
    in.rows[s] = 0;
    for (int k = 0; k < WINDOW && g.rows; ++k)
      if (g.row - 1 + k >= 0 && g.row - 1 + k < height) in.rows[s] |= static_cast<uint8_t>(1 << k);
  }
  return in;
}

#if SOAP_ISA == 2
constexpr bool MASKED_LOADS = true;
SOAP_INLINE v ld_inside(const float* p, const Inside& in, const uint16_t (&lanes)[4], int s, int k) {
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>(lanes[s] & -((in.rows[s] >> k) & 1)), p);
}
#else
constexpr bool MASKED_LOADS = false;
SOAP_INLINE v ld_inside(const float* p, const Inside&, const uint16_t (&)[4], int, int) { return ld(p); }
#endif

// One plane of a block: 4 windows (pointer to row -1, column -1; row stride) to 36 vectors, `step` floats apart.
template <bool Strict, bool Masked>
SOAP_INLINE void transform_window(
    const float* const (&p)[4], const int64_t (&row)[4], const Inside& in, float* out, int64_t step) {
  v t[WINDOW][WINDOW];
  SOAP_UNROLL(6)
  for (int k = 0; k < WINDOW; ++k) {
    v w[4], x[4];
    SOAP_UNROLL(4)
    for (int s = 0; s < 4; ++s) {
      const float* from = p[s] + k * row[s];
      w[s] = Masked ? ld_inside(from, in, in.left, s, k) : ld(from);
      x[s] = Masked ? ld_inside(from + 4, in, in.right, s, k) : ld(from + 4);
    }
    transpose4(w[0], w[1], w[2], w[3]);
    const v ef = lo32(x[0], x[1]), gh = lo32(x[2], x[3]);
    if (Strict) {
      t[k][0] = w[0], t[k][1] = w[1], t[k][2] = w[2], t[k][3] = w[3], t[k][4] = lo64(ef, gh), t[k][5] = hi64(ef, gh);
    } else {
      input_transform(w[0], w[1], w[2], w[3], lo64(ef, gh), hi64(ef, gh), t[k]);
    }
  }
  SOAP_UNROLL(6)
  for (int q = 0; q < WINDOW; ++q) {
    v o[WINDOW];
    if (Strict) {
      SOAP_UNROLL(6)
      for (int k = 0; k < WINDOW; ++k) o[k] = t[k][q];
    } else {
      input_transform(t[0][q], t[1][q], t[2][q], t[3][q], t[4][q], t[5][q], o);
    }
    SOAP_UNROLL(6)
    for (int k = 0; k < WINDOW; ++k) st(out + (k * WINDOW + q) * step, o[k]);
  }
}

// Products of one output (36 or 16 vectors) to its 16 positions.
template <bool Strict> SOAP_INLINE void positions(const float* m, v (&z)[TILE][TILE]) {
  if (Strict) {
    SOAP_UNROLL(16)
    for (int k = 0; k < POSITIONS; ++k) z[k / 4][k % 4] = ld(m + k * L);
    return;
  }
  v t[TILE][WINDOW];
  SOAP_UNROLL(6)
  for (int q = 0; q < WINDOW; ++q) {
    v o[TILE];
    output_transform(ld(m + q * L), ld(m + (6 + q) * L), ld(m + (12 + q) * L), ld(m + (18 + q) * L),
        ld(m + (24 + q) * L), ld(m + (30 + q) * L), o);
    SOAP_UNROLL(4)
    for (int k = 0; k < TILE; ++k) t[k][q] = o[k];
  }
  SOAP_UNROLL(4)
  for (int k = 0; k < TILE; ++k) output_transform(t[k][0], t[k][1], t[k][2], t[k][3], t[k][4], t[k][5], z[k]);
}

// 16 positions to 36 points (or the positions as they are), vectors `in` and `out` floats apart.
template <bool Strict> SOAP_INLINE void spread(const v (&d)[TILE][TILE], float* out, int64_t step) {
  if (Strict) {
    SOAP_UNROLL(16)
    for (int k = 0; k < POSITIONS; ++k) st(out + k * step, d[k / 4][k % 4]);
    return;
  }
  v w[WINDOW][TILE];
  SOAP_UNROLL(4)
  for (int q = 0; q < TILE; ++q) {
    v o[WINDOW];
    gradient_transform(d[0][q], d[1][q], d[2][q], d[3][q], o);
    SOAP_UNROLL(6)
    for (int k = 0; k < WINDOW; ++k) w[k][q] = o[k];
  }
  SOAP_UNROLL(6)
  for (int k = 0; k < WINDOW; ++k) {
    v o[WINDOW];
    gradient_transform(w[k][0], w[k][1], w[k][2], w[k][3], o);
    SOAP_UNROLL(6)
    for (int q = 0; q < WINDOW; ++q) st(out + (k * WINDOW + q) * step, o[q]);
  }
}

// ---- what fuse and sweep have in common: inputs to products ----

// The parts of the scratch of one thread. V: transformed inputs; mean: their means over channels; M: products.
struct Plan {
  int inputs, outputs, slots;  // planes read by conv, its outputs, slots of the stencil (0: none)
  bool strict;
  int points;         // products kept per output
  int group, blocks;  // outputs and blocks that go through a product together
  int64_t v_step, v_block, m_step, m_block, mean_step, mean_block;
};

SOAP_INLINE Plan plan_of(const Fuse& f) {
  Plan p;
  p.inputs = f.conv.outputs ? f.conv.inputs : 0;
  p.outputs = f.conv.outputs;
  p.slots = f.stencil.weight ? f.shape.frames : 0;
  p.strict = f.conv.strict;
  p.points = points_of(p.strict);
  p.group = p.outputs ? group_outputs(p.outputs) : 0;
  p.blocks = group_blocks(p.inputs);
  p.v_step = p.inputs ? static_cast<int64_t>(input_stride(p.inputs)) * L : 0;
  p.v_block = POINTS * p.v_step;
  p.m_step = static_cast<int64_t>(p.points + 1) * L;
  p.m_block = p.group * p.m_step;
  p.mean_step = static_cast<int64_t>(p.slots) * L;
  p.mean_block = POINTS * p.mean_step;
  return p;
}

SOAP_INLINE int stencil_plane(const Fuse& f, int slot, int c) {
  return f.stencil.interleaved ? c * f.shape.frames + slot : slot * f.shape.channels + c;
}

// Rows [above, above + rows) of the segments of one plane, into the first-level cache.
template <int Rows> SOAP_INLINE void fetch_near(const Source& x, int64_t clip, int plane, const Block& b, int above) {
  const float* base = static_cast<const float*>(x.data) + clip * x.clip + x.plane[plane];
  for (int s = 0; s < 4; ++s) {
    const Segment& g = b.segment[s];
    if (g.rows != TILE) continue;
    SOAP_UNROLL(6)
    for (int k = 0; k < Rows; ++k) prefetch_near(base + (g.row + above + k) * x.row + g.col);
  }
}

// The windows of plane `i` of a block, in place or staged into `buffer` (4 x 6 x STAGE).
SOAP_INLINE void windows(const Source& x, bool in_place, int64_t clip, int plane, const Block& b, int height, int width,
    float* buffer, const float* (&p)[4], int64_t (&row)[4]) {
  const float* base = static_cast<const float*>(x.data) + (in_place ? clip * x.clip + x.plane[plane] : 0);
  for (int s = 0; s < 4; ++s) {
    const Segment& g = b.segment[s];
    if (in_place && g.inner) {
      p[s] = base + (g.row - 1) * x.row + (g.col - 1);
      row[s] = x.row;
    } else {
      float* to = buffer + s * WINDOW * STAGE;
      // A segment that does not exist takes rows below the image: all zero.
      stage(x, clip, plane, g.rows ? g.row - 1 : height, WINDOW, g.rows ? g.col - 1 : 0, L + 2, height, width, to);
      p[s] = to;
      row[s] = STAGE;
    }
  }
}

// Both transforms are linear: the mean of transformed planes is the mean's transform. V: the slot's first plane.
SOAP_INLINE void slot_mean(const Plan& plan, const float* V, int channels, int channel, float* mean) {
  for (int point = 0; point < POINTS; ++point, V += plan.v_step, mean += plan.mean_step) {
    if (channels == 3) {
      st(mean, ld(V) + ld(V + channel) + ld(V + 2 * channel));
      continue;
    }
    v m = ld(V);
    for (int c = 1; c < channels; ++c) m = m + ld(V + c * channel);
    st(mean, m);
  }
}

// Inputs of one block: V for the conv, means for the stencil.
template <bool Strict>
static __attribute__((noinline)) void load_block(
    const Fuse& f, const Plan& plan, int64_t clip, const Block& b, float* V, float* mean) {
  alignas(64) float buffer[4 * WINDOW * STAGE];
  const bool in_place = direct(f.x);
  const int H = f.shape.height, W = f.shape.width, C = f.shape.channels;
  const float* p[4];
  int64_t row[4];
  bool inner = true;
  for (const Segment& g : b.segment) inner &= g.inner;
  const Inside in = inside_of(b, H, W);
  const bool masked = in_place && !inner && MASKED_LOADS;
  for (int i = 0; i < plan.inputs; ++i) {
    if (masked) {
      const float* base = static_cast<const float*>(f.x.data) + clip * f.x.clip + f.x.plane[i];
      for (int s = 0; s < 4; ++s) {
        const Segment& g = b.segment[s];
        p[s] = base + (g.rows ? (g.row - 1) * f.x.row + g.col - 1 : 0);
        row[s] = f.x.row;
      }
      transform_window<Strict, true>(p, row, in, V + i * L, plan.v_step);
    } else {
      if (in_place && inner && i + 1 < plan.inputs) fetch_near<WINDOW>(f.x, clip, i + 1, b, -1);
      windows(f.x, in_place, clip, i, b, H, W, buffer, p, row);
      transform_window<Strict, false>(p, row, in, V + i * L, plan.v_step);
    }
    // A slot's planes are summed while they are in the first-level cache.
    if (plan.slots && !f.stencil.interleaved && i % C == C - 1)
      slot_mean(plan, V + (i - C + 1) * L, C, L, mean + i / C * L);
  }
  if (!plan.slots) return;
  if (plan.inputs) {
    if (f.stencil.interleaved)
      for (int t = 0; t < plan.slots; ++t) slot_mean(plan, V + t * L, C, plan.slots * L, mean + t * L);
    return;
  }
  alignas(64) float total[4 * WINDOW * STAGE];
  for (int t = 0; t < plan.slots; ++t) {  // no conv: T planes to transform instead of T C
    for (int c = 0; c < C; ++c) {
      windows(f.x, in_place, clip, stencil_plane(f, t, c), b, H, W, buffer, p, row);
      for (int s = 0; s < 4; ++s)
        for (int k = 0; k < WINDOW; ++k)
          for (int j = 0; j < 2; ++j) {  // L + 4 pixels: two overlapping vectors
            float* to = total + (s * WINDOW + k) * STAGE;
            const v a = ld(p[s] + k * row[s] + 4 * j);
            // The second vector's first L - 4 lanes lie in the first one; only its last 4 are new.
            if (j == 0) {
              st(to, c ? ld(to) + a : a);
            } else {
              alignas(64) float tail[L];
              st(tail, a);
              for (int q = 0; q < 4; ++q) to[L + q] = c ? to[L + q] + tail[L - 4 + q] : tail[L - 4 + q];
            }
          }
    }
    const float* q[4];
    int64_t step[4];
    for (int s = 0; s < 4; ++s) q[s] = total + s * WINDOW * STAGE, step[s] = STAGE;
    transform_window<Strict, false>(q, step, in, mean + t * L, plan.mean_step);
  }
}

// The stencil's products of one slot: 36 points or 16 positions. The first slot has none before it, the last none
// after.
template <bool Strict, bool Before, bool After>
SOAP_INLINE void slot_products(const float* weight, const Plan& plan, const float* mean, int slot, float* m) {
  const auto add = [&](v z, int point, const float* w) {
    const float* a = mean + point * plan.mean_step + slot * L;
    if (Before) z = fma(ld(a - L), set1(w[0]), z);
    z = fma(ld(a), set1(w[1]), z);
    if (After) z = fma(ld(a + L), set1(w[2]), z);
    return z;
  };
  for (int k = 0; k < plan.points; ++k) {
    v z = set1(0.f);
    if (Strict) {
      for (int tap = 0; tap < 9; ++tap) z = add(z, (k / 4 + tap / 3) * WINDOW + k % 4 + tap % 3, weight + tap * 3);
    } else {
      z = add(z, k, weight + k * 3);
    }
    st(m + k * L, z);
  }
}

template <bool Strict>
SOAP_INLINE void stencil_products(const float* weight, const Plan& plan, const float* mean, int slot, float* m) {
  const bool before = slot > 0, after = slot + 1 < plan.slots;
  if (before && after) return slot_products<Strict, true, true>(weight, plan, mean, slot, m);
  if (before) return slot_products<Strict, true, false>(weight, plan, mean, slot, m);
  if (after) return slot_products<Strict, false, true>(weight, plan, mean, slot, m);
  slot_products<Strict, false, false>(weight, plan, mean, slot, m);
}

// s(stencil) of each slot of a block: 16 positions, computed once and used by all channels.
template <bool Strict>
static __attribute__((noinline)) void priors(
    const Fuse& f, const Plan& plan, const float* mean, float* products_of_slot, float* prior) {
  for (int t = 0; t < plan.slots; ++t) {
    v z[TILE][TILE];
    stencil_products<Strict>(f.stencil.weight, plan, mean, t, products_of_slot);
    positions<Strict>(products_of_slot, z);
    SOAP_UNROLL(16)
    for (int k = 0; k < POSITIONS; ++k) st(prior + (t * POSITIONS + k) * L, sigmoid2(z[k / 4][k % 4]));
  }
}

// Pixels to be asked for while a pair of blocks' products run: the next pair's windows, this pair's gradient.
struct Ahead {
  const char* base[2][4];  // by block of a pair and segment: first row of plane 0; null: nothing to ask for
  int64_t row;             // bytes
  const int64_t* plane;    // elements of 4 bytes
  int rows;
};

// Blocks next and next + 1, if before last: `rows` rows from row `above` of each segment on.
SOAP_INLINE Ahead look_ahead(const Source& x, int64_t clip, const Blocks& grid, int64_t next, int64_t last, int height,
    int width, int above, int rows) {
  Ahead a = {};
  if (x.dtype != Dtype::f32 || x.col != 1) return a;
  a.row = x.row * 4;
  a.plane = x.plane;
  a.rows = rows;
  for (int h = 0; h < 2 && next + h < last; ++h) {
    Block b;
    locate(grid, next + h, height, width, b);
    for (int s = 0; s < 4; ++s) {
      const Segment& g = b.segment[s];
      if (g.rows == TILE && g.row + above >= 0 && g.row + above + rows <= height)
        a.base[h][s] = reinterpret_cast<const char*>(
            static_cast<const float*>(x.data) + clip * x.clip + (g.row + above) * x.row + g.col);
    }
  }
  return a;
}

// The step-th segment row (of 4 * rows) of block h, plane 0; null: nothing to ask for.
SOAP_INLINE const char* to_ask(const Ahead& a, int h, int step) {
  if (step >= 4 * a.rows || !a.base[h][step % 4]) return nullptr;
  return a.base[h][step % 4] + step / 4 * a.row;
}

// OUTPUTS outputs x `Pair` blocks: sum over inputs [first, last) of V[i] * weight[i].
// While it runs, one line of each plane is asked for at up to two places: spread out like this, so that the few buffers
// for outstanding misses never fill and the arithmetic goes on.
template <int Pair, int Asks>
SOAP_INLINE void product(const float* V0, const float* V1, const float* weight, int first, int last, v (&a)[OUTPUTS],
    v (&b)[OUTPUTS], const char* ask0, const char* ask1, const int64_t* planes0, const int64_t* planes1) {
  SOAP_UNROLL(1)
  for (int i = first; i < last; ++i) {
    if (Asks >= 1) prefetch(ask0 + planes0[i] * 4);
    if (Asks >= 2) prefetch(ask1 + planes1[i] * 4);
    const v x = ld(V0 + i * L);
    const v y = Pair == 2 ? ld(V1 + i * L) : x;
    const float* w = weight + i * OUTPUTS;
    SOAP_UNROLL(12)
    for (int o = 0; o < OUTPUTS; ++o) {
      v u = set1(w[o]);
#if SOAP_ISA >= 1
      // Keeps the broadcast in a register, shared by both blocks, rather than folded twice into a memory operand.
      if (Pair == 2) __asm__("" : "+v"(u));
#endif
      a[o] = fma(x, u, a[o]);
      if (Pair == 2) b[o] = fma(y, u, b[o]);
    }
  }
}

// Products of outputs [group * plan.group, ...) for one or two blocks. M[o][point].
template <bool Strict, int Pair>
static __attribute__((noinline)) void products(const Conv& conv, const Plan& plan, int group, const float* V0,
    const float* V1, float* M0, float* M1, const Ahead& ahead, const Ahead& beside) {
  const int I = plan.inputs, first = group * plan.group;
  const int count =
      round_up(plan.outputs, OUTPUTS) - first < plan.group ? round_up(plan.outputs, OUTPUTS) - first : plan.group;
  constexpr int KINDS = Strict ? 9 : POINTS;  // weights per pair of planes
  const float* weight = conv.weight + static_cast<int64_t>(first) * I * KINDS;
  for (int k = 0; k < plan.points; ++k) {
    for (int o = 0; o < count; o += OUTPUTS) {
      v a[OUTPUTS], b[OUTPUTS];
      // F(4x4)'s point (1, 1) reaches all 16 positions with factor 1: there the bias comes in.
      const bool biased = conv.bias && (Strict || k == 7);
      SOAP_UNROLL(12)
      for (int j = 0; j < OUTPUTS; ++j) a[j] = b[j] = set1(0.f);
      for (int j = 0; biased && j < OUTPUTS; ++j)
        a[j] = b[j] = set1(first + o + j < plan.outputs ? conv.bias[first + o + j] : 0.f);
      const float* w = weight + static_cast<int64_t>(o) * I * KINDS;
      if (Strict) {
        for (int tap = 0; tap < 9; ++tap) {
          const int64_t at = ((k / 4 + tap / 3) * WINDOW + k % 4 + tap % 3) * plan.v_step;
          product<Pair, 0>(V0 + at, V1 + at, w + static_cast<int64_t>(tap) * I * OUTPUTS,
              tap == 4 ? 0 : conv.centre_inputs, I, a, b, nullptr, nullptr, nullptr, nullptr);
        }
      } else {
        const float *x = V0 + k * plan.v_step, *y = V1 + k * plan.v_step,
                    *u = w + static_cast<int64_t>(k) * I * OUTPUTS;
        const int from = sees_centre(k) ? 0 : conv.centre_inputs;
        // The first two groups of outputs ask for one block each.
        const int h = o / OUTPUTS;
        const char* next = h < 2 ? to_ask(ahead, h, k) : nullptr;
        const char* grad = h < 2 ? to_ask(beside, h, k) : nullptr;
        if (next && grad) product<Pair, 2>(x, y, u, from, I, a, b, next, grad, ahead.plane, beside.plane);
        else if (next) product<Pair, 1>(x, y, u, from, I, a, b, next, nullptr, ahead.plane, nullptr);
        else if (grad) product<Pair, 1>(x, y, u, from, I, a, b, grad, nullptr, beside.plane, nullptr);
        else product<Pair, 0>(x, y, u, from, I, a, b, nullptr, nullptr, nullptr, nullptr);
      }
      SOAP_UNROLL(12)
      for (int j = 0; j < OUTPUTS; ++j) {
        st(M0 + (o + j) * plan.m_step + k * L, a[j]);
        if (Pair == 2) st(M1 + (o + j) * plan.m_step + k * L, b[j]);
      }
    }
  }
}

// The stages, gathered into the table `stages` in prepare.cpp.
size_t fuse_scratch(const Fuse& f);
void fuse(const Fuse& f, int64_t clip, int64_t first, int64_t last, float* scratch);
int gradient_inputs(int inputs);
int gradient_outputs(int outputs);
int gradient_group(int outputs);
size_t sweep_scratch(const Sweep& w);
void sweep_open(const Sweep& w, float* scratch);
void sweep_begin(const Sweep& w, float* scratch);
void sweep(const Sweep& w, int64_t clip, int64_t first, int64_t last, float* scratch, double* gate);
void sweep_end(const Sweep& w, float* scratch, const ChunkGradients& out);

}  // namespace soap::cpu::SOAP_ISA_NS
