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

// Merging.
inline constexpr u32 neighbour_rows = 2;
inline constexpr u32 held_vectors = 0;  // of a row of this width, kept in registers; 0: none
inline constexpr u32 weigh_vectors = 8;

inline Vector rounded_product(Vector a, Vector b) noexcept {
  Vector product = mul(a, b);
  __asm__("" : "+x"(product.v));
  return product;
}
inline float sum_16(const Vector* v) noexcept {
  const __m256 eight = _mm256_add_ps(v[0].v, v[1].v);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline void sum_16_of_4(const Vector (*v)[16 / lanes], float* out) noexcept {
  for (u32 r = 0; r < 4; ++r) out[r] = sum_16(v[r]);
}
inline void stream(Vector a, float* p) noexcept { _mm256_stream_ps(p, a.v); }
inline void stream(Vector a, f16* p) noexcept {
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), to_f16(a));
}
inline void stream(Vector a, bf16* p) noexcept {
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), to_bf16(a));
}
inline void stream_line(const std::byte* from, std::byte* to) noexcept {
  const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + 32));
  _mm256_stream_si256(reinterpret_cast<__m256i*>(to), low);
  _mm256_stream_si256(reinterpret_cast<__m256i*>(to + 32), high);
}
inline void stream_end() noexcept { _mm_sfence(); }

// Doubles, pairs and blocks of bytes, for the kernels that move and turn rows.

struct Doubles {
  __m256d low;
  __m256d high;
};

inline __m256d rounded_product(__m256d a, __m256d b) noexcept {
  __m256d product = _mm256_mul_pd(a, b);
  __asm__("" : "+x"(product));
  return product;
}
inline Doubles rounded_product(Doubles a, Doubles b) noexcept {
  return {rounded_product(a.low, b.low), rounded_product(a.high, b.high)};
}
inline Doubles set1_doubles(double x) noexcept { return {_mm256_set1_pd(x), _mm256_set1_pd(x)}; }
inline Doubles load(const double* p) noexcept {
  return {_mm256_loadu_pd(p), _mm256_loadu_pd(p + 4)};
}
inline void store(Doubles a, double* p) noexcept {
  _mm256_storeu_pd(p, a.low);
  _mm256_storeu_pd(p + 4, a.high);
}
inline Doubles add(Doubles a, Doubles b) noexcept {
  return {_mm256_add_pd(a.low, b.low), _mm256_add_pd(a.high, b.high)};
}
inline Doubles sub(Doubles a, Doubles b) noexcept {
  return {_mm256_sub_pd(a.low, b.low), _mm256_sub_pd(a.high, b.high)};
}
inline Doubles round_even(Doubles a) noexcept {
  constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_pd(a.low, nearest), _mm256_round_pd(a.high, nearest)};
}
inline Vector narrow(Doubles a) noexcept {
  return {_mm256_insertf128_ps(_mm256_castps128_ps256(_mm256_cvtpd_ps(a.low)),
                               _mm256_cvtpd_ps(a.high), 1)};
}

inline void split_pairs(Vector a, Vector b, Vector& even, Vector& odd) noexcept {
  const __m256 low = _mm256_permute2f128_ps(a.v, b.v, 0x20);
  const __m256 high = _mm256_permute2f128_ps(a.v, b.v, 0x31);
  even.v = _mm256_shuffle_ps(low, high, 0x88);
  odd.v = _mm256_shuffle_ps(low, high, 0xdd);
}
inline void join_pairs(Vector even, Vector odd, Vector& a, Vector& b) noexcept {
  const __m256 low = _mm256_unpacklo_ps(even.v, odd.v);
  const __m256 high = _mm256_unpackhi_ps(even.v, odd.v);
  a.v = _mm256_permute2f128_ps(low, high, 0x20);
  b.v = _mm256_permute2f128_ps(low, high, 0x31);
}

struct Block {
  __m256i low;
  __m256i high;
};
inline Block load_block(const std::byte* p) noexcept {
  const __m256i* from = reinterpret_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(from), _mm256_loadu_si256(from + 1)};
}
inline void store_block(const Block& block, std::byte* p) noexcept {
  __m256i* to = reinterpret_cast<__m256i*>(p);
  _mm256_storeu_si256(to, block.low);
  _mm256_storeu_si256(to + 1, block.high);
}
inline void gather_words(const std::byte* from, const u32* index, std::byte* to) noexcept {
  const __m256i at = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(index));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                      _mm256_i32gather_epi32(reinterpret_cast<const int*>(from), at, 4));
}

// Powers of two.
inline Vector split_power(Vector y, Vector& whole) noexcept {
  y = min(set1(254.0f), max(set1(-252.0f), y));
  whole.v = _mm256_floor_ps(y.v);
  return sub(y, whole);
}

// Selection.
struct Counts {
  __m256i v;
};
inline Counts no_counts() noexcept { return {_mm256_setzero_si256()}; }
inline Counts count_at_least(Counts counts, Vector a, Vector b) noexcept {
  const __m256i reached = _mm256_castps_si256(_mm256_cmp_ps(a.v, b.v, _CMP_GE_OQ));
  return {_mm256_sub_epi32(counts.v, reached)};
}
inline Counts add_counts(Counts a, Counts b) noexcept { return {_mm256_add_epi32(a.v, b.v)}; }
inline u32 sum_counts(Counts counts) noexcept {
  __m128i x =
      _mm_add_epi32(_mm256_castsi256_si128(counts.v), _mm256_extracti128_si256(counts.v, 1));
  x = _mm_add_epi32(x, _mm_shuffle_epi32(x, 0x4e));
  return static_cast<u32>(_mm_cvtsi128_si32(_mm_add_epi32(x, _mm_shuffle_epi32(x, 0xb1))));
}
inline u32 at_least(Vector a, Vector b) noexcept {
  return static_cast<u32>(_mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_GE_OQ)));
}
inline u32 bits_set(u32 bits) noexcept { return static_cast<u32>(__builtin_popcount(bits)); }

/// For every set of lanes, the places of its members in a byte each.
struct LanePlaces {
  u64 of[256];
  constexpr LanePlaces() noexcept : of{} {
    for (u32 bits = 0; bits < 256; ++bits) {
      u32 found = 0;
      for (u32 lane = 0; lane < 8; ++lane) {
        if ((bits >> lane & 1u) != 0) of[bits] |= static_cast<u64>(lane) << (8 * found++);
      }
    }
  }
};
inline constexpr LanePlaces lane_places;

inline Vector compress(Vector a, u32 bits) noexcept {
  const __m128i places = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(&lane_places.of[bits]));
  return {_mm256_permutevar8x32_ps(a.v, _mm256_cvtepu8_epi32(places))};
}
inline Vector where_number(Vector a, Vector yes, Vector no) noexcept {
  return {_mm256_blendv_ps(no.v, yes.v, _mm256_cmp_ps(a.v, a.v, _CMP_ORD_Q))};
}
inline Vector token_lanes(u32 first) noexcept {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return {_mm256_castsi256_ps(_mm256_add_epi32(_mm256_set1_epi32(static_cast<int>(first)), lane))};
}
inline Vector next_tokens(Vector tokens) noexcept {
  return {
      _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(tokens.v), _mm256_set1_epi32(8)))};
}
inline Vector load_counts(const u32* p) noexcept {
  const __m256i whole = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  const __m256 upper = _mm256_cvtepi32_ps(_mm256_srli_epi32(whole, 16));  // both parts are exact
  const __m256 lower = _mm256_cvtepi32_ps(_mm256_and_si256(whole, _mm256_set1_epi32(0xffff)));
  return {_mm256_add_ps(_mm256_mul_ps(upper, _mm256_set1_ps(65536.0f)), lower)};
}
inline u32 load_flags(const u8* p) noexcept {
  const __m128i flags = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return static_cast<u32>(_mm_movemask_epi8(_mm_slli_epi16(flags, 7))) & 0xffu;
}
inline void store_flags(u32 bits, u8* p) noexcept {
  const u64 own = (bits * 0x0101010101010101u) & 0x8040201008040201u;  // bit i in byte i
  const u64 flags = ((own + 0x7f7f7f7f7f7f7f7fu) >> 7) & 0x0101010101010101u;
  std::memcpy(p, &flags, sizeof flags);
}

// Products of query rows.
inline void sum4x4(const Vector (*a)[4], float* out, u64 stride) noexcept {
  for (u32 r = 0; r < 4; ++r) sum4(a[r][0], a[r][1], a[r][2], a[r][3], out + r * stride);
}

// Roots, rounded to nearest.
inline Vector square_root(Vector a) noexcept { return {_mm256_sqrt_ps(a.v)}; }
