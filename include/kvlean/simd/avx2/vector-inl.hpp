// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
// The vocabulary of the avx2 target (with FMA and F16C): 8 lanes, 16 registers. See
// scalar/vector-inl.hpp for what each word means.

inline constexpr u32 lanes = 8;
inline constexpr u32 score_rows = 2;
inline constexpr u32 blend_rows = 4;
inline constexpr u32 blend_width = 2;
inline constexpr u32 block_vectors = 2;
inline constexpr u32 block_keys = 4;

struct Vector {
  __m256 v;
};

inline __m256i first_lanes(u32 n) noexcept {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)),
                            _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
/// The first n < 8 half-words, the others zero: AVX2 has no masked load of them.
inline __m128i load_halves(const void* p, u32 n) noexcept {
  alignas(16) u16 halves[8] = {};
  std::memcpy(halves, p, n * sizeof(u16));
  return _mm_load_si128(reinterpret_cast<const __m128i*>(halves));
}
inline void store_halves(__m128i x, void* p, u32 n) noexcept {
  alignas(16) u16 halves[8];
  _mm_store_si128(reinterpret_cast<__m128i*>(halves), x);
  std::memcpy(p, halves, n * sizeof(u16));
}
inline Vector from_bf16(__m128i bits) noexcept {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))};
}
inline __m128i to_bf16(Vector a) noexcept {
  const __m256i bits = _mm256_castps_si256(a.v);
  const __m256i upper = _mm256_srli_epi32(bits, 16);
  const __m256i odd = _mm256_and_si256(upper, _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_srli_epi32(
      _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd), 16);
  const __m256i quiet = _mm256_or_si256(upper, _mm256_set1_epi32(0x40));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  const __m256i words = _mm256_blendv_epi8(rounded, quiet, nan);
  return _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}
inline __m128i to_f16(Vector a) noexcept {
  return _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

inline Vector zero() noexcept { return {_mm256_setzero_ps()}; }
inline Vector set1(float x) noexcept { return {_mm256_set1_ps(x)}; }

inline Vector load(const float* p) noexcept { return {_mm256_loadu_ps(p)}; }
inline Vector load(const f16* p) noexcept {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
inline Vector load(const bf16* p) noexcept {
  return from_bf16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline Vector load(const float* p, u32 n) noexcept {
  return {_mm256_maskload_ps(p, first_lanes(n))};
}
inline Vector load(const f16* p, u32 n) noexcept { return {_mm256_cvtph_ps(load_halves(p, n))}; }
inline Vector load(const bf16* p, u32 n) noexcept { return from_bf16(load_halves(p, n)); }
inline void store(Vector a, float* p) noexcept { _mm256_storeu_ps(p, a.v); }
inline void store(Vector a, f16* p) noexcept {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to_f16(a));
}
inline void store(Vector a, bf16* p) noexcept {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to_bf16(a));
}
inline void store(Vector a, float* p, u32 n) noexcept {
  _mm256_maskstore_ps(p, first_lanes(n), a.v);
}
inline void store(Vector a, f16* p, u32 n) noexcept { store_halves(to_f16(a), p, n); }
inline void store(Vector a, bf16* p, u32 n) noexcept { store_halves(to_bf16(a), p, n); }

inline Vector add(Vector a, Vector b) noexcept { return {_mm256_add_ps(a.v, b.v)}; }
inline Vector sub(Vector a, Vector b) noexcept { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vector mul(Vector a, Vector b) noexcept { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vector div(Vector a, Vector b) noexcept { return {_mm256_div_ps(a.v, b.v)}; }
inline Vector fma(Vector a, Vector b, Vector c) noexcept {
  return {_mm256_fmadd_ps(a.v, b.v, c.v)};
}
inline Vector max(Vector a, Vector b) noexcept { return {_mm256_max_ps(a.v, b.v)}; }
inline Vector min(Vector a, Vector b) noexcept { return {_mm256_min_ps(a.v, b.v)}; }
inline Vector abs(Vector a) noexcept { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
inline Vector copysign(Vector a, Vector sign) noexcept {
  const __m256 bit = _mm256_set1_ps(-0.0f);
  return {_mm256_or_ps(_mm256_andnot_ps(bit, a.v), _mm256_and_ps(bit, sign.v))};
}
inline Vector round_product(Vector a, Vector b) noexcept {
  const Vector large = set1(0x1.8p23f);  // the sum keeps no fraction bits
  return sub(fma(a, b, large), large);
}
inline Vector select_less(Vector a, Vector b, Vector yes, Vector no) noexcept {
  return {_mm256_blendv_ps(no.v, yes.v, _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ))};
}
inline Vector add_number(Vector sum, Vector a) noexcept {
  return add(sum, {_mm256_and_ps(a.v, _mm256_cmp_ps(a.v, a.v, _CMP_ORD_Q))});
}
inline Vector scale_pow2(Vector a, Vector n) noexcept {
  const __m256i whole = _mm256_cvtps_epi32(n.v);
  const __m256i half = _mm256_srai_epi32(whole, 1);
  const __m256i bias = _mm256_set1_epi32(127);
  const __m256i first = _mm256_slli_epi32(_mm256_add_epi32(half, bias), 23);
  const __m256i second =
      _mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(whole, half), bias), 23);
  return {
      _mm256_mul_ps(_mm256_mul_ps(a.v, _mm256_castsi256_ps(first)), _mm256_castsi256_ps(second))};
}

inline float reduce_add(Vector a) noexcept {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
inline float reduce_max(Vector a) noexcept {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}
inline void sum4(Vector a, Vector b, Vector c, Vector d, float* out) noexcept {
  const __m256 sums =
      _mm256_hadd_ps(_mm256_hadd_ps(a.v, b.v), _mm256_hadd_ps(c.v, d.v));  // of each half
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1)));
}
inline void transpose(const float* in, u64 in_stride, float* out, u64 out_stride) noexcept {
  for (u32 column = 0; column < 8; column += 4) {
    __m256 row[4];  // row[i]: this half of rows i, i + 4
    for (u32 i = 0; i < 4; ++i) {
      const float* p = in + i * in_stride + column;
      row[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)),
                                    _mm_loadu_ps(p + 4 * in_stride), 1);
    }
    const __m256d a = _mm256_castps_pd(_mm256_unpacklo_ps(row[0], row[1]));
    const __m256d b = _mm256_castps_pd(_mm256_unpacklo_ps(row[2], row[3]));
    const __m256d c = _mm256_castps_pd(_mm256_unpackhi_ps(row[0], row[1]));
    const __m256d d = _mm256_castps_pd(_mm256_unpackhi_ps(row[2], row[3]));
    float* to = out + column * out_stride;
    _mm256_storeu_ps(to, _mm256_castpd_ps(_mm256_unpacklo_pd(a, b)));
    _mm256_storeu_ps(to + out_stride, _mm256_castpd_ps(_mm256_unpackhi_pd(a, b)));
    _mm256_storeu_ps(to + 2 * out_stride, _mm256_castpd_ps(_mm256_unpacklo_pd(c, d)));
    _mm256_storeu_ps(to + 3 * out_stride, _mm256_castpd_ps(_mm256_unpackhi_pd(c, d)));
  }
}
