// The two forms of the 3x3 convolution: 4x4 outputs from a 6x6 window. All else is the same for both.
//
//     window 6 x 6  -- window_to_points -->  36 points  -- product with the weights -->  points of an output
//     points of an output  -- points_to_positions -->  16 positions of its tile, 4 x 4
//     and back, for gradients:  16 positions  -- positions_to_points -->  points
//
//   Winograd F(4x4,3x3) (Lavin & Gray 2015): a window's 36 points are each multiplied by one weight: 2.25 multiplies a
//     pixel where 9 are needed direct. For frames (T C = 24) 1,206 against 4,608 a pixel. The default.
//   direct ("strict"): the points are the window's pixels as they are, and each of an output's 16 positions sums 9
//     products. Four times the multiplies, and the error and the NaN of an ordinary convolution.
#pragma once

#include "pixels.h"

namespace soap::cpu::SOAP_ISA_NS {

constexpr int POINTS = 36, POSITIONS = 16;

// Products kept of an output.
SOAP_INLINE int points_of(bool strict) { return strict ? POSITIONS : POINTS; }

// Points whose row or column is the first or the last see nothing of a kernel that is all centre: G (0, g, 0) = (0, ..,
// 0) there. HMEM's first frame has such kernels (it is never the later tuple): 20 of its 36 products are left out.
SOAP_INLINE bool sees_centre(int point) {
  const int row = point / WINDOW, col = point % WINDOW;
  return row % (WINDOW - 1) && col % (WINDOW - 1);
}

// Of one row or column, by the polynomial's points 0, 1, -1, 2, -2, infinity.

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

// One plane of a block: its 4 windows to 36 vectors, `step` floats apart.
template <bool Strict, bool Masked>
SOAP_INLINE void window_to_points(const Windows& windows, const Inside& in, float* out, int64_t step) {
  v t[WINDOW][WINDOW];
  SOAP_UNROLL(6)
  for (int k = 0; k < WINDOW; ++k) {
    v w[4], x[4];
    SOAP_UNROLL(4)
    for (int s = 0; s < 4; ++s) {
      const float* from = windows.first[s] + k * windows.apart[s];
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
template <bool Strict> SOAP_INLINE void points_to_positions(const float* m, v (&z)[TILE][TILE]) {
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

// 16 positions to 36 points (or the positions as they are), `step` floats apart.
template <bool Strict> SOAP_INLINE void positions_to_points(const v (&d)[TILE][TILE], float* out, int64_t step) {
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

}  // namespace soap::cpu::SOAP_ISA_NS
