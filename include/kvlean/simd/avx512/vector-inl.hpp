// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
// The vocabulary of the avx512 target: 16 lanes, 32 registers. See scalar/vector-inl.hpp for what
// each word means.

inline constexpr u32 lanes = 16;
inline constexpr u32 score_rows = 4;
inline constexpr u32 blend_rows = 4;
inline constexpr u32 blend_width = 4;
inline constexpr u32 block_vectors = 2;
inline constexpr u32 block_keys = 8;

struct Vector {
  __m512 v;
};

inline __mmask16 first_lanes(u32 n) noexcept { return static_cast<__mmask16>((1u << n) - 1u); }
inline Vector from_bf16(__m256i bits) noexcept {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
}
inline __m256i to_bf16(Vector a) noexcept {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i upper = _mm512_srli_epi32(bits, 16);
  const __m512i odd = _mm512_and_si512(upper, _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_srli_epi32(
      _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd), 16);
  const __m512i quiet = _mm512_or_si512(upper, _mm512_set1_epi32(0x40));
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_blend_epi32(nan, rounded, quiet));
}
inline __m256i to_f16(Vector a) noexcept {
  return _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

inline Vector zero() noexcept { return {_mm512_setzero_ps()}; }
inline Vector set1(float x) noexcept { return {_mm512_set1_ps(x)}; }

inline Vector load(const float* p) noexcept { return {_mm512_loadu_ps(p)}; }
inline Vector load(const f16* p) noexcept {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline Vector load(const bf16* p) noexcept {
  return from_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline Vector load(const float* p, u32 n) noexcept {
  return {_mm512_maskz_loadu_ps(first_lanes(n), p)};
}
inline Vector load(const f16* p, u32 n) noexcept {
  return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(n), p))};
}
inline Vector load(const bf16* p, u32 n) noexcept {
  return from_bf16(_mm256_maskz_loadu_epi16(first_lanes(n), p));
}
inline void store(Vector a, float* p) noexcept { _mm512_storeu_ps(p, a.v); }
inline void store(Vector a, f16* p) noexcept {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_f16(a));
}
inline void store(Vector a, bf16* p) noexcept {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bf16(a));
}
inline void store(Vector a, float* p, u32 n) noexcept {
  _mm512_mask_storeu_ps(p, first_lanes(n), a.v);
}
inline void store(Vector a, f16* p, u32 n) noexcept {
  _mm256_mask_storeu_epi16(p, first_lanes(n), to_f16(a));
}
inline void store(Vector a, bf16* p, u32 n) noexcept {
  _mm256_mask_storeu_epi16(p, first_lanes(n), to_bf16(a));
}

inline Vector add(Vector a, Vector b) noexcept { return {_mm512_add_ps(a.v, b.v)}; }
inline Vector sub(Vector a, Vector b) noexcept { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vector mul(Vector a, Vector b) noexcept { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vector div(Vector a, Vector b) noexcept { return {_mm512_div_ps(a.v, b.v)}; }
inline Vector fma(Vector a, Vector b, Vector c) noexcept {
  return {_mm512_fmadd_ps(a.v, b.v, c.v)};
}
inline Vector max(Vector a, Vector b) noexcept { return {_mm512_max_ps(a.v, b.v)}; }
inline Vector min(Vector a, Vector b) noexcept { return {_mm512_min_ps(a.v, b.v)}; }
inline Vector abs(Vector a) noexcept { return {_mm512_abs_ps(a.v)}; }
inline Vector copysign(Vector a, Vector sign) noexcept {
  const __m512 bit = _mm512_set1_ps(-0.0f);
  return {_mm512_or_ps(_mm512_andnot_ps(bit, a.v), _mm512_and_ps(bit, sign.v))};
}
inline Vector round_product(Vector a, Vector b) noexcept {
  const Vector large = set1(0x1.8p23f);  // the sum keeps no fraction bits
  return sub(fma(a, b, large), large);
}
inline Vector select_less(Vector a, Vector b, Vector yes, Vector no) noexcept {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), no.v, yes.v)};
}
inline Vector add_number(Vector sum, Vector a) noexcept {
  return {_mm512_mask_add_ps(sum.v, _mm512_cmp_ps_mask(a.v, a.v, _CMP_ORD_Q), sum.v, a.v)};
}
inline Vector scale_pow2(Vector a, Vector n) noexcept { return {_mm512_scalef_ps(a.v, n.v)}; }

inline float reduce_add(Vector a) noexcept { return _mm512_reduce_add_ps(a.v); }
inline float reduce_max(Vector a) noexcept { return _mm512_reduce_max_ps(a.v); }
inline void sum4(Vector a, Vector b, Vector c, Vector d, float* out) noexcept {
  const __m512 ab =
      _mm512_add_ps(_mm512_shuffle_f32x4(a.v, b.v, 0x44), _mm512_shuffle_f32x4(a.v, b.v, 0xee));
  const __m512 cd =
      _mm512_add_ps(_mm512_shuffle_f32x4(c.v, d.v, 0x44), _mm512_shuffle_f32x4(c.v, d.v, 0xee));
  // A quarter of the register for each of a, b, c, d.
  const __m512 all =
      _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
  const __m512 pairs = _mm512_add_ps(all, _mm512_permute_ps(all, 0xb1));
  const __m512 sums = _mm512_add_ps(pairs, _mm512_permute_ps(pairs, 0x4e));
  const __m512i first = _mm512_setr_epi32(0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12);
  _mm_storeu_ps(out, _mm512_castps512_ps128(_mm512_permutexvar_ps(first, sums)));
}
inline void transpose(const float* in, u64 in_stride, float* out, u64 out_stride) noexcept {
  for (u32 column = 0; column < 16; column += 4) {
    __m512 row[4];  // row[i]: this quarter of rows i, i + 4, i + 8, i + 12
    for (u32 i = 0; i < 4; ++i) {
      const float* p = in + i * in_stride + column;
      row[i] = _mm512_castps128_ps512(_mm_loadu_ps(p));
      row[i] = _mm512_insertf32x4(row[i], _mm_loadu_ps(p + 4 * in_stride), 1);
      row[i] = _mm512_insertf32x4(row[i], _mm_loadu_ps(p + 8 * in_stride), 2);
      row[i] = _mm512_insertf32x4(row[i], _mm_loadu_ps(p + 12 * in_stride), 3);
    }
    const __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(row[0], row[1]));
    const __m512d b = _mm512_castps_pd(_mm512_unpacklo_ps(row[2], row[3]));
    const __m512d c = _mm512_castps_pd(_mm512_unpackhi_ps(row[0], row[1]));
    const __m512d d = _mm512_castps_pd(_mm512_unpackhi_ps(row[2], row[3]));
    float* to = out + column * out_stride;
    _mm512_storeu_ps(to, _mm512_castpd_ps(_mm512_unpacklo_pd(a, b)));
    _mm512_storeu_ps(to + out_stride, _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    _mm512_storeu_ps(to + 2 * out_stride, _mm512_castpd_ps(_mm512_unpacklo_pd(c, d)));
    _mm512_storeu_ps(to + 3 * out_stride, _mm512_castpd_ps(_mm512_unpackhi_pd(c, d)));
  }
}
