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

// Merging.
inline constexpr u32 neighbour_rows = 4;
inline constexpr u32 held_vectors = 8;  // of a row of this width, kept in registers; 0: none
inline constexpr u32 weigh_vectors = 8;

inline Vector rounded_product(Vector a, Vector b) noexcept {
  Vector product = mul(a, b);
  __asm__("" : "+v"(product.v));
  return product;
}
inline float sum_16(const Vector* v) noexcept {
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(v->v), _mm512_extractf32x8_ps(v->v, 1));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline void sum_16_of_4(const Vector (*v)[1], float* out) noexcept {
  const __m512 a = v[0]->v;
  const __m512 b = v[1]->v;
  const __m512 c = v[2]->v;
  const __m512 d = v[3]->v;
  const __m512 ab =
      _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
  const __m512 cd =
      _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x44), _mm512_shuffle_f32x4(c, d, 0xee));
  const __m512 four =
      _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
  const __m512 two = _mm512_add_ps(four, _mm512_permute_ps(four, 0x4e));
  const __m512 one = _mm512_add_ps(two, _mm512_permute_ps(two, 0xb1));
  const __m512i first = _mm512_setr_epi32(0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12);
  _mm_storeu_ps(out, _mm512_castps512_ps128(_mm512_permutexvar_ps(first, one)));
}
inline void stream(Vector a, float* p) noexcept { _mm512_stream_ps(p, a.v); }
inline void stream(Vector a, f16* p) noexcept {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), to_f16(a));
}
inline void stream(Vector a, bf16* p) noexcept {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), to_bf16(a));
}
inline void stream_line(const std::byte* from, std::byte* to) noexcept {
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to),
                      _mm512_loadu_si512(reinterpret_cast<const void*>(from)));
}
inline void stream_end() noexcept { _mm_sfence(); }

// Doubles, pairs and blocks of bytes, for the kernels that move and turn rows.

struct Doubles {
  __m512d low;
  __m512d high;
};

inline __m512d rounded_product(__m512d a, __m512d b) noexcept {
  __m512d product = _mm512_mul_pd(a, b);
  __asm__("" : "+v"(product));
  return product;
}
inline Doubles rounded_product(Doubles a, Doubles b) noexcept {
  return {rounded_product(a.low, b.low), rounded_product(a.high, b.high)};
}
inline Doubles set1_doubles(double x) noexcept { return {_mm512_set1_pd(x), _mm512_set1_pd(x)}; }
inline Doubles load(const double* p) noexcept {
  return {_mm512_loadu_pd(p), _mm512_loadu_pd(p + 8)};
}
inline void store(Doubles a, double* p) noexcept {
  _mm512_storeu_pd(p, a.low);
  _mm512_storeu_pd(p + 8, a.high);
}
inline Doubles add(Doubles a, Doubles b) noexcept {
  return {_mm512_add_pd(a.low, b.low), _mm512_add_pd(a.high, b.high)};
}
inline Doubles sub(Doubles a, Doubles b) noexcept {
  return {_mm512_sub_pd(a.low, b.low), _mm512_sub_pd(a.high, b.high)};
}
inline Doubles round_even(Doubles a) noexcept {
  return {_mm512_roundscale_pd(a.low, 0), _mm512_roundscale_pd(a.high, 0)};
}
inline Vector narrow(Doubles a) noexcept {
  return {_mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps(a.low)),
                             _mm512_cvtpd_ps(a.high), 1)};
}

inline void split_pairs(Vector a, Vector b, Vector& even, Vector& odd) noexcept {
  const __m512i index =
      _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  even.v = _mm512_permutex2var_ps(a.v, index, b.v);
  odd.v = _mm512_permutex2var_ps(a.v, _mm512_add_epi32(index, _mm512_set1_epi32(1)), b.v);
}
inline void join_pairs(Vector even, Vector odd, Vector& a, Vector& b) noexcept {
  const __m512i index = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  a.v = _mm512_permutex2var_ps(even.v, index, odd.v);
  b.v = _mm512_permutex2var_ps(even.v, _mm512_add_epi32(index, _mm512_set1_epi32(8)), odd.v);
}

struct Block {
  __m512i v;
};
inline Block load_block(const std::byte* p) noexcept { return {_mm512_loadu_si512(p)}; }
inline void store_block(const Block& block, std::byte* p) noexcept {
  _mm512_storeu_si512(p, block.v);
}
inline void gather_words(const std::byte* from, const u32* index, std::byte* to) noexcept {
  _mm512_storeu_si512(to, _mm512_i32gather_epi32(_mm512_loadu_si512(index), from, 4));
}

// Powers of two.
inline Vector split_power(Vector y, Vector& whole) noexcept {
  whole = y;  // scale_pow2 rounds down
  return {_mm512_reduce_ps(y.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)};
}

// Selection.
struct Counts {
  __m512i v;
};
inline Counts no_counts() noexcept { return {_mm512_setzero_si512()}; }
inline Counts count_at_least(Counts counts, Vector a, Vector b) noexcept {
  return {_mm512_mask_add_epi32(counts.v, _mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ), counts.v,
                                _mm512_set1_epi32(1))};
}
inline Counts add_counts(Counts a, Counts b) noexcept { return {_mm512_add_epi32(a.v, b.v)}; }
inline u32 sum_counts(Counts counts) noexcept {
  return static_cast<u32>(_mm512_reduce_add_epi32(counts.v));
}
inline u32 at_least(Vector a, Vector b) noexcept {
  return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ);
}
inline u32 bits_set(u32 bits) noexcept { return static_cast<u32>(__builtin_popcount(bits)); }
inline Vector compress(Vector a, u32 bits) noexcept {
  return {_mm512_maskz_compress_ps(static_cast<__mmask16>(bits), a.v)};
}
inline Vector where_number(Vector a, Vector yes, Vector no) noexcept {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, a.v, _CMP_ORD_Q), no.v, yes.v)};
}
inline Vector token_lanes(u32 first) noexcept {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return {_mm512_castsi512_ps(_mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(first)), lane))};
}
inline Vector next_tokens(Vector tokens) noexcept {
  return {
      _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(tokens.v), _mm512_set1_epi32(16)))};
}
inline Vector load_counts(const u32* p) noexcept {
  return {_mm512_cvtepu32_ps(_mm512_loadu_si512(p))};
}
inline u32 load_flags(const u8* p) noexcept {
  const __m128i flags = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm_test_epi8_mask(flags, flags);
}
inline void store_flags(u32 bits, u8* p) noexcept {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm_maskz_set1_epi8(static_cast<__mmask16>(bits), 1));
}

// Products of query rows.
inline void sum4x4(const Vector (*a)[4], float* out, u64 stride) noexcept {
  // Each step halves the number of registers: one of a pair's halves stays, the other moves.
  const __m512i quarter =
      _mm512_setr_epi32(4, 5, 6, 7, 16, 17, 18, 19, 12, 13, 14, 15, 24, 25, 26, 27);
  const __m512i neighbour =
      _mm512_setr_epi32(1, 16, 3, 18, 5, 20, 7, 22, 9, 24, 11, 26, 13, 28, 15, 30);
  __m512 half[2][4];
  KVLEAN_SIMD_UNROLL
  for (u32 j = 0; j < 4; ++j) {
    KVLEAN_SIMD_UNROLL
    for (u32 r = 0; r < 2; ++r) {
      const __m512 x = a[r][j].v;
      const __m512 y = a[r + 2][j].v;
      half[r][j] =
          _mm512_add_ps(_mm512_mask_blend_ps(0xff00, x, y), _mm512_shuffle_f32x4(x, y, 0x4e));
    }
  }
  __m512 four[4];  // a quarter of the register for each row
  KVLEAN_SIMD_UNROLL
  for (u32 j = 0; j < 4; ++j) {
    four[j] = _mm512_add_ps(_mm512_mask_blend_ps(0xf0f0, half[0][j], half[1][j]),
                            _mm512_permutex2var_ps(half[0][j], quarter, half[1][j]));
  }
  const __m512 ab = _mm512_add_ps(_mm512_mask_blend_ps(0xaaaa, four[0], four[1]),
                                  _mm512_permutex2var_ps(four[0], neighbour, four[1]));
  const __m512 cd = _mm512_add_ps(_mm512_mask_blend_ps(0xaaaa, four[2], four[3]),
                                  _mm512_permutex2var_ps(four[2], neighbour, four[3]));
  const __m512d moved = _mm512_shuffle_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd), 0x55);
  const __m512 sums = _mm512_add_ps(_mm512_mask_blend_ps(0xcccc, ab, cd), _mm512_castpd_ps(moved));
  _mm_storeu_ps(out, _mm512_castps512_ps128(sums));
  _mm_storeu_ps(out + stride, _mm512_extractf32x4_ps(sums, 1));
  _mm_storeu_ps(out + 2 * stride, _mm512_extractf32x4_ps(sums, 2));
  _mm_storeu_ps(out + 3 * stride, _mm512_extractf32x4_ps(sums, 3));
}

// Roots, rounded to nearest.
inline Vector square_root(Vector a) noexcept { return {_mm512_sqrt_ps(a.v)}; }
