// One vector type per instruction set, so that every stage is written once.
//
// A stage's file is compiled three times with SOAP_ISA = 0 (plain: GCC/Clang vector extensions of 4 floats, which any
// machine has), 1 (AVX2 + FMA + F16C) and 2 (AVX-512 F/BW/DQ/VL). All that such a file defines has internal linkage or
// lives in the namespace SOAP_ISA_NS: a function with vague linkage compiled for AVX-512 could otherwise be the one the
// linker keeps for all three, and an older machine would die of it (tests/soap_kernels/test_cpp_build.py looks).
#pragma once

#include <stdint.h>
#include <string.h>

#include "stages.h"

#ifndef SOAP_ISA
#error "SOAP_ISA must be 0 (plain), 1 (AVX2) or 2 (AVX-512)"
#endif

#if SOAP_ISA == 2
#define SOAP_ISA_NS avx512
#elif SOAP_ISA == 1
#define SOAP_ISA_NS avx2
#else
#define SOAP_ISA_NS plain
#endif

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define SOAP_INLINE static inline __attribute__((always_inline))
#define SOAP_UNROLL(n) _Pragma(SOAP_STRING(GCC unroll n))
#define SOAP_STRING(x) #x
#define SOAP_STRING_OF(x) SOAP_STRING(x)

namespace soap::cpu::SOAP_ISA_NS {

SOAP_INLINE double ld64(const float* p) {  // two floats, as they are
  double a;
  memcpy(&a, p, sizeof a);
  return a;
}

#if SOAP_ISA == 2
using v = __m512;
using vi = int32_t __attribute__((vector_size(64)));
constexpr int L = 16;
// Register tiles, measured. 24 accumulators of the 32 registers.
constexpr int OUTPUTS = 12;  // forward product: outputs x 2 blocks of tiles, one broadcast weight for both
constexpr int INPUTS = 8;    // weight gradient: inputs x VECTORS vectors of outputs
#define SOAP_MM(name) _mm512_##name
#elif SOAP_ISA == 1
using v = __m256;
using vi = int32_t __attribute__((vector_size(32)));
constexpr int L = 8;
constexpr int OUTPUTS = 6;
constexpr int INPUTS = 4;
#define SOAP_MM(name) _mm256_##name
#else
using v = float __attribute__((vector_size(16)));
using vi = int32_t __attribute__((vector_size(16)));
constexpr int L = 4;
constexpr int OUTPUTS = 6;
constexpr int INPUTS = 4;
#endif
constexpr int VECTORS = 3;

#if SOAP_ISA >= 1
SOAP_INLINE v ld(const float* p) { return SOAP_MM(loadu_ps)(p); }
SOAP_INLINE void st(float* p, v a) { SOAP_MM(storeu_ps)(p, a); }
SOAP_INLINE void stream(float* p, v a) { SOAP_MM(stream_ps)(p, a); }
SOAP_INLINE v set1(float a) { return SOAP_MM(set1_ps)(a); }
SOAP_INLINE v set_pair(const float* p) { return SOAP_MM(castpd_ps)(SOAP_MM(set1_pd)(ld64(p))); }
SOAP_INLINE v fma(v a, v b, v c) { return SOAP_MM(fmadd_ps)(a, b, c); }
SOAP_INLINE v fnma(v a, v b, v c) { return SOAP_MM(fnmadd_ps)(a, b, c); }
SOAP_INLINE v lo32(v a, v b) { return SOAP_MM(unpacklo_ps)(a, b); }
SOAP_INLINE v hi32(v a, v b) { return SOAP_MM(unpackhi_ps)(a, b); }
SOAP_INLINE v lo64(v a, v b) {
  return SOAP_MM(castpd_ps)(SOAP_MM(unpacklo_pd)(SOAP_MM(castps_pd)(a), SOAP_MM(castps_pd)(b)));
}
SOAP_INLINE v hi64(v a, v b) {
  return SOAP_MM(castpd_ps)(SOAP_MM(unpackhi_pd)(SOAP_MM(castps_pd)(a), SOAP_MM(castps_pd)(b)));
}
// A maximum/minimum whose second operand passes when it is NaN.
SOAP_INLINE v max_keep(v a, v b) { return SOAP_MM(max_ps)(a, b); }
SOAP_INLINE v min_keep(v a, v b) { return SOAP_MM(min_ps)(a, b); }
#endif

#if SOAP_ISA == 2
SOAP_INLINE v round(v a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
SOAP_INLINE v scale2(v a, v n) { return _mm512_scalef_ps(a, n); }  // a * 2^n
SOAP_INLINE v reciprocal(v d) {  // an estimate of 14 bits and one Newton step: a third of a division's cycles
  const v y = _mm512_rcp14_ps(d);
  return y * fnma(d, y, set1(2.f));
}
SOAP_INLINE v ld_head(const float* p, int n) {  // the first n lanes, zeros after them; reads nothing else
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p);
}
SOAP_INLINE void st_head(float* p, v a, int n) { _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), a); }
#elif SOAP_ISA == 1
SOAP_INLINE v round(v a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
SOAP_INLINE v scale2(v a, v n) {
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a), _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23)));
}
SOAP_INLINE v reciprocal(v d) {
  const v y = _mm256_rcp_ps(d);
  return y * fnma(d, y, set1(2.f));
}
SOAP_INLINE __m256i head(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
SOAP_INLINE v ld_head(const float* p, int n) { return _mm256_maskload_ps(p, head(n)); }
SOAP_INLINE void st_head(float* p, v a, int n) { _mm256_maskstore_ps(p, head(n), a); }
#else
SOAP_INLINE v ld(const float* p) {
  v a;
  memcpy(&a, p, sizeof a);
  return a;
}
SOAP_INLINE void st(float* p, v a) { memcpy(p, &a, sizeof a); }
SOAP_INLINE void stream(float* p, v a) { st(p, a); }
SOAP_INLINE v set1(float a) { return v{a, a, a, a}; }
SOAP_INLINE v set_pair(const float* p) { return v{p[0], p[1], p[0], p[1]}; }
SOAP_INLINE v fma(v a, v b, v c) { return a * b + c; }
SOAP_INLINE v fnma(v a, v b, v c) { return c - a * b; }
SOAP_INLINE v lo32(v a, v b) { return v{a[0], b[0], a[1], b[1]}; }
SOAP_INLINE v hi32(v a, v b) { return v{a[2], b[2], a[3], b[3]}; }
SOAP_INLINE v lo64(v a, v b) { return v{a[0], a[1], b[0], b[1]}; }
SOAP_INLINE v hi64(v a, v b) { return v{a[2], a[3], b[2], b[3]}; }
SOAP_INLINE v max_keep(v a, v b) { return a > b ? a : b; }
SOAP_INLINE v min_keep(v a, v b) { return a < b ? a : b; }
SOAP_INLINE v round(v a) {  // |a| < 2^22
  const v magic = set1(12582912.f);
  return (a + magic) - magic;
}
SOAP_INLINE v scale2(v a, v n) {
  // Through a comparison, since the conversion of a NaN is undefined: a NaN in n is one in a as well.
  const v whole = n == n ? n : set1(0.f);
  const vi shift = __builtin_convertvector(whole, vi) * (1 << 23);
  const v scaled = reinterpret_cast<v>(reinterpret_cast<vi>(a) + shift);
  return n == n ? scaled : n;
}
SOAP_INLINE v reciprocal(v d) { return set1(1.f) / d; }
SOAP_INLINE v ld_head(const float* p, int n) {
  v a = set1(0.f);
  for (int j = 0; j < n; ++j) a[j] = p[j];
  return a;
}
SOAP_INLINE void st_head(float* p, v a, int n) {
  for (int j = 0; j < n; ++j) p[j] = a[j];
}
#endif

// Within each 128-bit lane: rows a, b, c, d become columns.
SOAP_INLINE void transpose4(v& a, v& b, v& c, v& d) {
  const v t0 = lo32(a, b), t1 = hi32(a, b), t2 = lo32(c, d), t3 = hi32(c, d);
  a = lo64(t0, t2);
  b = hi64(t0, t2);
  c = lo64(t1, t3);
  d = hi64(t1, t3);
}

#if SOAP_ISA == 2
// 128-bit lane k of a, b, c and d becomes row k.
SOAP_INLINE void transpose_lanes(v a, v b, v c, v d, float* dst, int64_t ds) {
  const v p = _mm512_shuffle_f32x4(a, b, 0x44), q = _mm512_shuffle_f32x4(a, b, 0xee);
  const v s = _mm512_shuffle_f32x4(c, d, 0x44), u = _mm512_shuffle_f32x4(c, d, 0xee);
  st(dst, _mm512_shuffle_f32x4(p, s, 0x88));
  st(dst + ds, _mm512_shuffle_f32x4(p, s, 0xdd));
  st(dst + 2 * ds, _mm512_shuffle_f32x4(q, u, 0x88));
  st(dst + 3 * ds, _mm512_shuffle_f32x4(q, u, 0xdd));
}
#endif

// L x L floats: row i of src (stride ss) becomes column i of dst (stride ds).
SOAP_INLINE void transpose(const float* src, int64_t ss, float* dst, int64_t ds) {
  v r[L];
  SOAP_UNROLL(16)
  for (int i = 0; i < L; ++i) r[i] = ld(src + i * ss);
  SOAP_UNROLL(4)
  for (int i = 0; i < L; i += 4) transpose4(r[i], r[i + 1], r[i + 2], r[i + 3]);
  // r[4 i + j] now holds, in its lane k, rows 4 i .. 4 i + 3 of column 4 k + j.
#if SOAP_ISA == 2
  SOAP_UNROLL(4)
  for (int j = 0; j < 4; ++j) transpose_lanes(r[j], r[4 + j], r[8 + j], r[12 + j], dst + j * ds, 4 * ds);
#elif SOAP_ISA == 1
  SOAP_UNROLL(4)
  for (int j = 0; j < 4; ++j) {
    st(dst + j * ds, _mm256_permute2f128_ps(r[j], r[4 + j], 0x20));
    st(dst + (4 + j) * ds, _mm256_permute2f128_ps(r[j], r[4 + j], 0x31));
  }
#else
  for (int j = 0; j < 4; ++j) st(dst + j * ds, r[j]);
#endif
}

// L / 2 rows of L / 2 pairs of floats: row i of src (stride ss) becomes column i of dst (stride ds).
SOAP_INLINE void transpose_pairs(const float* src, int64_t ss, float* dst, int64_t ds) {
  v r[L / 2], t[L / 2];
  SOAP_UNROLL(8)
  for (int i = 0; i < L / 2; ++i) r[i] = ld(src + i * ss);
  SOAP_UNROLL(4)
  for (int i = 0; i < L / 2; i += 2) t[i] = lo64(r[i], r[i + 1]), t[i + 1] = hi64(r[i], r[i + 1]);
  // t[2 i + j] now holds, in its 128-bit lane k, rows 2 i and 2 i + 1 of column 2 k + j.
#if SOAP_ISA == 2
  SOAP_UNROLL(2)
  for (int j = 0; j < 2; ++j) transpose_lanes(t[j], t[2 + j], t[4 + j], t[6 + j], dst + j * ds, 2 * ds);
#elif SOAP_ISA == 1
  SOAP_UNROLL(2)
  for (int j = 0; j < 2; ++j) {
    st(dst + j * ds, _mm256_permute2f128_ps(t[j], t[2 + j], 0x20));
    st(dst + (2 + j) * ds, _mm256_permute2f128_ps(t[j], t[2 + j], 0x31));
  }
#else
  for (int j = 0; j < 2; ++j) st(dst + j * ds, t[j]);
#endif
}

// The sums of neighbours 0 and 1, 2 and 3, .. of a, then of b.
SOAP_INLINE v add_pairs(v a, v b) {
#if SOAP_ISA == 2
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  return _mm512_permutex2var_ps(a, even, b) +
         _mm512_permutex2var_ps(a, _mm512_add_epi32(even, _mm512_set1_epi32(1)), b);
#elif SOAP_ISA == 1
  return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(_mm256_hadd_ps(a, b)), 0xd8));
#else
  return v{a[0] + a[1], a[2] + a[3], b[0] + b[1], b[2] + b[3]};
#endif
}

// 1 + 2^t. The power in three factors: 2^(t's integer part), a table for the next bits, a polynomial for the rest,
// whose relative error is 4e-7 (AVX-512), 2e-8 (AVX2), 2e-7. Adding `magic` rounds t to the table's step, and leaves
// the table's index in the low bits. At 2^60 and above the plain and AVX-512 forms stop growing.
#if SOAP_ISA == 2
SOAP_INLINE v one_plus_exp2(v t) {
  const v table =
      _mm512_setr_ps(1.f, 1.04427378f, 1.09050773f, 1.13878863f, 1.18920712f, 1.24185781f, 1.29683955f, 1.35425555f,
          1.41421356f, 1.47682615f, 1.54221083f, 1.61049033f, 1.68179283f, 1.75625216f, 1.83400809f, 1.91520656f);
  const v magic = set1(786432.f);  // 1.5 * 2^19: steps of 1/16
  const v m = t + magic, n = m - magic, r = t - n;
  const v p = fma(fma(set1(0.240226507f), r, set1(0.693187833f)), r, set1(1.f));
  const v step = _mm512_permutexvar_ps(_mm512_castps_si512(m), table);
  return fma(p, _mm512_scalef_ps(step, min_keep(set1(60.f), n)), set1(1.f));  // scalef takes the floor of n
}
#elif SOAP_ISA == 1
SOAP_INLINE v one_plus_exp2(v t) {  // |t| < 126
  // 2^(i/8) less i << 20, so that adding the shifted m gives the table's value times 2^floor.
  const __m256i table =
      _mm256_setr_epi32(0x3f800000, 0x3f7b95c2, 0x3f7837f0, 0x3f75fed7, 0x3f7504f3, 0x3f75672a, 0x3f7744fd, 0x3f7ac0c7);
  const v magic = set1(1572864.f);  // 1.5 * 2^20: steps of 1/8
  const v m = t + magic, r = t - (m - magic);
  v p = fma(set1(0.0555041087f), r, set1(0.240264078f));
  p = fma(fma(p, r, set1(0.693147181f)), r, set1(1.f));
  const __m256i bits = _mm256_castps_si256(m), step = _mm256_permutevar8x32_epi32(table, bits);
  return fma(p, _mm256_castsi256_ps(_mm256_add_epi32(step, _mm256_slli_epi32(bits, 20))), set1(1.f));
}
#else
SOAP_INLINE v one_plus_exp2(v t) {   // |t| < 126
  const v magic = set1(12582912.f);  // 1.5 * 2^23: whole numbers
  const v n = (t + magic) - magic, r = t - n;
  v p = fma(set1(0.00132765f), r, set1(0.00967554f));
  p = fma(p, r, set1(0.05550713f));
  p = fma(p, r, set1(0.2402212f));
  p = fma(p, r, set1(0.69314697f));
  p = fma(p, r, set1(1.f));
  return scale2(p, n) + set1(1.f);
}
#endif

// 1 / (1 + 2^t): the logistic sigmoid of -t / log2(e), so the factor rides in the weights. Error 2e-7; NaN stays NaN.
SOAP_INLINE v sigmoid2(v t) { return reciprocal(one_plus_exp2(max_keep(set1(-125.f), min_keep(set1(125.f), t)))); }

// The same, and NaN for an infinity: HMEM's maps cancel infinities to NaN one by one, where the folded sum keeps one.
SOAP_INLINE v sigmoid2_of_finite(v t) {
#if SOAP_ISA == 2
  return reciprocal(one_plus_exp2(t));  // infinity less infinity is NaN in there, and needs no limits
#else
  return sigmoid2(fma(t, set1(0.f), t));
#endif
}

SOAP_INLINE float sum(v a) {  // in pairs: the same tree for a given width
  float b[L];
  st(b, a);
  for (int n = L / 2; n > 0; n /= 2)
    for (int j = 0; j < n; ++j) b[j] += b[j + n];
  return b[0];
}

// Memory is asked for ahead of its use: into the second-level cache while products run, from there into the first one
// plane ahead.
SOAP_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }
SOAP_INLINE void prefetch_near(const void* p) { __builtin_prefetch(p, 0, 3); }

SOAP_INLINE float to_float(float a) { return a; }
SOAP_INLINE float to_float(uint8_t a) { return a; }

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

SOAP_INLINE uint32_t bits_of(float a) {
  uint32_t b;
  memcpy(&b, &a, sizeof b);
  return b;
}
SOAP_INLINE float of_bits(uint32_t b) {
  float a;
  memcpy(&a, &b, sizeof a);
  return a;
}

SOAP_INLINE float to_float(bf16 a) { return of_bits(static_cast<uint32_t>(a.bits) << 16); }

SOAP_INLINE float to_float(f16 a) {
#if SOAP_ISA >= 1
  return _cvtsh_ss(a.bits);
#else
  const uint32_t sign = static_cast<uint32_t>(a.bits & 0x8000u) << 16, rest = a.bits & 0x7fffu;
  if (rest >= 0x7c00u) return of_bits(sign | 0x7f800000u | ((rest & 0x3ffu) << 13));  // infinity, NaN
  if (rest >= 0x400u) return of_bits(sign | ((rest << 13) + 0x38000000u));
  const float f =
      static_cast<float>(rest) * 5.9604644775390625e-8f;  // zero, subnormal: exact as an integer times 2^-24
  return sign ? -f : f;
#endif
}

SOAP_INLINE void from_float(float a, float& out) { out = a; }
SOAP_INLINE void from_float(float a, uint8_t& out) { out = static_cast<uint8_t>(a); }

SOAP_INLINE void from_float(float a, bf16& out) {
  const uint32_t b = bits_of(a);
  out.bits = a == a ? static_cast<uint16_t>((b + 0x7fffu + ((b >> 16) & 1u)) >> 16) : uint16_t{0x7fc0};
}

SOAP_INLINE void from_float(float a, f16& out) {
#if SOAP_ISA >= 1
  out.bits = _cvtss_sh(a, _MM_FROUND_TO_NEAREST_INT);
#else
  const uint32_t b = bits_of(a), sign = (b >> 16) & 0x8000u, rest = b & 0x7fffffffu;
  if (rest > 0x7f800000u) {
    out.bits = 0x7e00;
  } else if (rest >= 0x477ff000u) {  // rounds to more than 65504
    out.bits = static_cast<uint16_t>(sign | 0x7c00u);
  } else if (rest >= 0x38800000u) {
    const uint32_t r = rest - 0x38000000u;
    out.bits = static_cast<uint16_t>(sign | ((r + 0xfffu + ((r >> 13) & 1u)) >> 13));
  } else {  // subnormal: adding 0.5 leaves the rounded value in the low bits
    out.bits = static_cast<uint16_t>(sign | (bits_of(of_bits(rest) + 0.5f) - 0x3f000000u));
  }
#endif
}

// work(element) with an element of the type that `dtype` names.
template <class Work> SOAP_INLINE void by_dtype(Dtype dtype, const Work& work) {
  switch (dtype) {
    case Dtype::f32: return work(float{});
    case Dtype::bf16: return work(bf16{});
    case Dtype::f16: return work(f16{});
    case Dtype::u8: return work(uint8_t{});
  }
}

}  // namespace soap::cpu::SOAP_ISA_NS
