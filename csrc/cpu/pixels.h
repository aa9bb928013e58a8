// A block's pixels: where they lie, and reading and writing them in any type and stride.
//
// A block is 4 segments, a segment 4 rows of L pixels (L: lanes of a vector, here 8), which are L / 4 tiles of 4 x 4:
//
//     +---------+---------+      its window: a pixel more         . . . . . . . . . .
//     |  tile   |  tile   |      on each side, 6 rows of          . +-------------+ .
//     |    0    |    1    |      L + 2 pixels, of which           . |   segment   | .
//     |         |         |      L + 4 are read                   . |             | .
//     +---------+---------+                                       . +-------------+ .
//      <---- L pixels ---->                                       . . . . . . . . . .
//
// So a block has L tiles, one in each lane: lane 4 q + s is tile q of segment s. Row k of the four segments, a vector
// each, becomes the tiles' four pixels of that row, a vector each, by one 4x4 transpose:
//
//     segment 0:  a0 a1 a2 a3 | a4 a5 a6 a7             pixel 0:  a0 b0 c0 d0 | a4 b4 c4 d4
//     segment 1:  b0 b1 b2 b3 | b4 b5 b6 b7     --->    pixel 1:  a1 b1 c1 d1 | a5 b5 c5 d5
//     segment 2:  c0 c1 c2 c3 | c4 c5 c6 c7             pixel 2:  a2 b2 c2 d2 | a6 b6 c6 d6
//     segment 3:  d0 d1 d2 d3 | d4 d5 d6 d7             pixel 3:  a3 b3 c3 d3 | a7 b7 c7 d7
//
// Segments are counted along the tile rows of a clip and blocks are 4 successive ones, so any width and height works
// and a small image wastes at most the last block's rest. A window is read in place where it lies inside the image as
// fp32 with unit stride; at an edge AVX-512 masks its loads; otherwise it is staged: copied, converted and zero-padded
// into a small buffer.
#pragma once

#include "simd.h"
#include "stages.h"

namespace soap::cpu::SOAP_ISA_NS {

constexpr int WINDOW = 6, TILE = 4;
constexpr int STAGE = 2 * L;  // a staged row: L + 2 pixels used, L + 4 read

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

struct Block {
  Segment segment[4];
  int height, width;  // of the image
};

SOAP_INLINE void locate(const Blocks& grid, int64_t block, int height, int width, Block& out) {
  out.height = height;
  out.width = width;
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

// Whether vectors of its pixels can be loaded from where they lie.
SOAP_INLINE bool loads_in_place(const Source& x) { return x.dtype == Dtype::f32 && x.col == 1 && !x.scale; }

// A segment's own 4 rows of L pixels, in place or in a buffer; lanes past the edge are zero.
struct Rows {
  const float* first;
  int64_t apart;
};

SOAP_INLINE Rows own_rows(
    const Source& x, bool in_place, int64_t clip, int plane, const Block& b, int s, float* buffer) {
  const Segment& g = b.segment[s];
  if (in_place && g.rows == TILE && g.cols == L) {
    const float* p = static_cast<const float*>(x.data) + clip * x.clip + x.plane[plane];
    return {p + g.row * x.row + g.col, x.row};
  }
  if (g.rows == 0) {
    for (int j = 0; j < TILE * STAGE; j += L) st(buffer + j, set1(0.f));
  } else {
    stage(x, clip, plane, g.row, TILE, g.col, L, b.height, b.width, buffer);
  }
  return {buffer, STAGE};
}

// The windows of a block's segments in one plane: 6 rows each, from row -1, column -1.
struct Windows {
  const float* first[4];
  int64_t apart[4];
};

// In place where that is safe, else staged into `buffer` (4 x 6 x STAGE).
SOAP_INLINE void windows_of(
    const Source& x, bool in_place, int64_t clip, int plane, const Block& b, float* buffer, Windows& w) {
  const float* base = static_cast<const float*>(x.data) + (in_place ? clip * x.clip + x.plane[plane] : 0);
  for (int s = 0; s < 4; ++s) {
    const Segment& g = b.segment[s];
    if (in_place && g.inner) {
      w.first[s] = base + (g.row - 1) * x.row + (g.col - 1);
      w.apart[s] = x.row;
    } else {
      float* to = buffer + s * WINDOW * STAGE;
      // A segment that does not exist takes rows below the image: all zero.
      stage(
          x, clip, plane, g.rows ? g.row - 1 : b.height, WINDOW, g.rows ? g.col - 1 : 0, L + 2, b.height, b.width, to);
      w.first[s] = to;
      w.apart[s] = STAGE;
    }
  }
}

// In place whatever lies outside of the image: for loads masked by `Inside`.
SOAP_INLINE void windows_to_mask(const Source& x, int64_t clip, int plane, const Block& b, Windows& w) {
  const float* base = static_cast<const float*>(x.data) + clip * x.clip + x.plane[plane];
  for (int s = 0; s < 4; ++s) {
    const Segment& g = b.segment[s];
    w.first[s] = base + (g.rows ? (g.row - 1) * x.row + g.col - 1 : 0);
    w.apart[s] = x.row;
  }
}

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

SOAP_INLINE Inside inside_of(const Block& b) {
  Inside in;
  for (int s = 0; s < 4; ++s) {
    const Segment& g = b.segment[s];
    in.left[s] = lanes_inside(g.col - 1, b.width);
    in.right[s] = lanes_inside(g.col + 3, b.width);
    in.rows[s] = 0;
    for (int k = 0; k < WINDOW && g.rows; ++k)
      if (g.row - 1 + k >= 0 && g.row - 1 + k < b.height) in.rows[s] |= static_cast<uint8_t>(1 << k);
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

}  // namespace soap::cpu::SOAP_ISA_NS
