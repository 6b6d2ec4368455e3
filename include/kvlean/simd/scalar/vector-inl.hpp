// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
// The vocabulary of the scalar target: one lane. What every other target is tested against.

inline constexpr u32 lanes = 1;
inline constexpr u32 score_rows = 4;  // query rows a pass of score_few
inline constexpr u32 blend_rows = 4;  // query rows and vectors a pass of blend
inline constexpr u32 blend_width = 4;
inline constexpr u32 block_vectors = 4;  // vectors of query rows, and keys, a pass of score_many
inline constexpr u32 block_keys = 4;

struct Vector {
  float v;
};

inline Vector zero() noexcept { return {0.0f}; }
inline Vector set1(float x) noexcept { return {x}; }

inline Vector load(const float* p) noexcept {
  Vector x;
  std::memcpy(&x.v, p, sizeof(float));
  return x;
}
inline Vector load(const f16* p) noexcept {
  u16 bits;
  std::memcpy(&bits, p, sizeof bits);
  return {kvlean::detail::f16_bits_to_f32(bits)};
}
inline Vector load(const bf16* p) noexcept {
  u16 bits;
  std::memcpy(&bits, p, sizeof bits);
  return {kvlean::detail::bf16_bits_to_f32(bits)};
}
inline void store(Vector a, float* p) noexcept { std::memcpy(p, &a.v, sizeof(float)); }
inline void store(Vector a, f16* p) noexcept {
  const u16 bits = kvlean::detail::f32_to_f16_bits(a.v);
  std::memcpy(static_cast<void*>(p), &bits, sizeof bits);
}
inline void store(Vector a, bf16* p) noexcept {
  const u16 bits = kvlean::detail::f32_to_bf16_bits(a.v);
  std::memcpy(static_cast<void*>(p), &bits, sizeof bits);
}
// The first n < lanes elements, the other lanes zero: never asked of one lane.
template <class E>
inline Vector load(const E*, u32) noexcept {
  return zero();
}
template <class E>
inline void store(Vector, E*, u32) noexcept {}

inline Vector add(Vector a, Vector b) noexcept { return {a.v + b.v}; }
inline Vector sub(Vector a, Vector b) noexcept { return {a.v - b.v}; }
inline Vector mul(Vector a, Vector b) noexcept { return {a.v * b.v}; }
inline Vector div(Vector a, Vector b) noexcept { return {a.v / b.v}; }
/// a b + c. Where the compiler may fuse the two, it always does: bits must not depend on inlining.
inline Vector fma(Vector a, Vector b, Vector c) noexcept {
#if defined(__FP_FAST_FMAF)
  return {__builtin_fmaf(a.v, b.v, c.v)};
#else
  return {a.v * b.v + c.v};
#endif
}
inline Vector max(Vector a, Vector b) noexcept { return {a.v > b.v ? a.v : b.v}; }  // b if NaN
inline Vector min(Vector a, Vector b) noexcept { return {a.v < b.v ? a.v : b.v}; }
inline Vector abs(Vector a) noexcept { return {std::fabs(a.v)}; }
inline Vector copysign(Vector a, Vector sign) noexcept { return {std::copysign(a.v, sign.v)}; }
/// The integer nearest to a b, for |a b| < 2^22.
inline Vector round_product(Vector a, Vector b) noexcept { return {std::nearbyint(a.v * b.v)}; }
inline Vector select_less(Vector a, Vector b, Vector yes, Vector no) noexcept {
  return a.v < b.v ? yes : no;
}
/// sum + a, or sum where a is NaN.
inline Vector add_number(Vector sum, Vector a) noexcept {
  return {sum.v + (a.v == a.v ? a.v : 0.0f)};
}

/// a * 2^n for integral n in [-252, 254]. Two steps, so that subnormal results are rounded once.
inline Vector scale_pow2(Vector a, Vector n) noexcept {
  if (n.v != n.v) return a;
  const i32 whole = static_cast<i32>(n.v);
  const i32 half = whole >> 1;
  const float first = std::bit_cast<float>(static_cast<u32>(half + 127) << 23);
  const float second = std::bit_cast<float>(static_cast<u32>(whole - half + 127) << 23);
  return {a.v * first * second};
}

inline float reduce_add(Vector a) noexcept { return a.v; }
inline float reduce_max(Vector a) noexcept { return a.v; }
/// out = the sums of the lanes of a, b, c, d.
inline void sum4(Vector a, Vector b, Vector c, Vector d, float* out) noexcept {
  out[0] = a.v;
  out[1] = b.v;
  out[2] = c.v;
  out[3] = d.v;
}
/// out[j][i] = in[i][j] for i, j < lanes.
inline void transpose(const float* in, u64, float* out, u64) noexcept { *out = *in; }

// Merging: sums whose bits are the same on every target. They have 16 lanes, 16 / lanes vectors,
// and products are rounded before they are added.
inline constexpr u32 neighbour_rows = 1;  // rows a pass of neighbours
inline constexpr u32 held_vectors = 0;    // of a row of this width, kept in registers; 0: none
inline constexpr u32 weigh_vectors = 4;   // vectors a pass of weigh

/// a b, which the compiler must not fuse with an addition.
inline Vector rounded_product(Vector a, Vector b) noexcept {
#if defined(__FP_FAST_FMAF)
  volatile float product = a.v * b.v;
  return {product};
#else
  return {a.v * b.v};
#endif
}
/// The sum of 16 lanes, in the order of row_math::sum_lanes.
inline float sum_16(const Vector* v) noexcept {
  float folded[8];
  for (u32 i = 0; i < 8; ++i) folded[i] = v[i].v + v[i + 8].v;
  for (u32 i = 0; i < 4; ++i) folded[i] += folded[i + 4];
  return (folded[0] + folded[2]) + (folded[1] + folded[3]);
}
/// Four such sums.
inline void sum_16_of_4(const Vector (*v)[16 / lanes], float* out) noexcept {
  for (u32 r = 0; r < 4; ++r) out[r] = sum_16(v[r]);
}
/// Stores that need not stay in the caches; p is aligned to the vector. stream_line moves 64 bytes
/// to a multiple of 64. stream_end comes after the last of them.
template <class E>
inline void stream(Vector a, E* p) noexcept {
  store(a, p);
}
inline void stream_line(const std::byte* from, std::byte* to) noexcept {
  std::memcpy(to, from, 64);
}
inline void stream_end() noexcept {}

// Doubles, pairs and blocks of bytes, for the kernels that move and turn rows.

/// As many doubles as a Vector has floats.
struct Doubles {
  double v;
};

inline Doubles rounded_product(Doubles a, Doubles b) noexcept {
  double product = a.v * b.v;
#if defined(__SSE2__)
  __asm__("" : "+x"(product));
#elif KVLEAN_SIMD_NEON
  __asm__("" : "+w"(product));
#else
  __asm__("" : "+m"(product));
#endif
  return {product};
}
inline Doubles set1_doubles(double x) noexcept { return {x}; }
inline Doubles load(const double* p) noexcept { return {*p}; }
inline void store(Doubles a, double* p) noexcept { *p = a.v; }
inline Doubles add(Doubles a, Doubles b) noexcept { return {a.v + b.v}; }
inline Doubles sub(Doubles a, Doubles b) noexcept { return {a.v - b.v}; }
/// The nearest integer, the even one of two.
inline Doubles round_even(Doubles a) noexcept { return {std::nearbyint(a.v)}; }
inline Vector narrow(Doubles a) noexcept { return {static_cast<float>(a.v)}; }

/// even, odd = the elements of a and then b with an even index, and those with an odd one.
inline void split_pairs(Vector a, Vector b, Vector& even, Vector& odd) noexcept {
  even = a;
  odd = b;
}
/// The way back from split_pairs.
inline void join_pairs(Vector even, Vector odd, Vector& a, Vector& b) noexcept {
  a = even;
  b = odd;
}

/// 64 bytes.
struct Block {
  std::byte v[64];
};
inline Block load_block(const std::byte* p) noexcept {
  Block block;
  std::memcpy(block.v, p, 64);
  return block;
}
inline void store_block(const Block& block, std::byte* p) noexcept { std::memcpy(p, block.v, 64); }
/// to = from[index[0]], .., `lanes` words of 4 bytes; all are read before one is written. Indices
/// are below 2^31.
inline void gather_words(const std::byte* from, const u32* index, std::byte* to) noexcept {
  std::memmove(to, from + std::size_t{*index} * 4, 4);
}

// Powers of two.
/// Splits y = fraction + whole with 0 <= fraction < 1, returns the fraction; `whole` is for
/// scale_pow2, which then gives zero for y < -252 and infinity for y > 254. NaN stays NaN.
inline Vector split_power(Vector y, Vector& whole) noexcept {
  y = min(set1(254.0f), max(set1(-252.0f), y));
  whole.v = std::floor(y.v);
  return sub(y, whole);
}

// Selection.
struct Counts {
  u32 v;
};
inline Counts no_counts() noexcept { return {0}; }
/// Each lane counts one more where a >= b; never where either is NaN.
inline Counts count_at_least(Counts counts, Vector a, Vector b) noexcept {
  return {counts.v + (a.v >= b.v ? 1u : 0u)};
}
inline Counts add_counts(Counts a, Counts b) noexcept { return {a.v + b.v}; }
inline u32 sum_counts(Counts counts) noexcept { return counts.v; }
/// Bit i is set where lane i of a is >= that of b.
inline u32 at_least(Vector a, Vector b) noexcept { return a.v >= b.v ? 1 : 0; }
inline u32 bits_set(u32 bits) noexcept { return bits; }
/// The lanes whose bit is set come first, in order; the others hold anything.
inline Vector compress(Vector a, u32) noexcept { return a; }
inline Vector where_number(Vector a, Vector yes, Vector no) noexcept {
  return a.v == a.v ? yes : no;
}
/// Lane i holds the bits of first + i.
inline Vector token_lanes(u32 first) noexcept { return {std::bit_cast<float>(first)}; }
/// The tokens `lanes` further on.
inline Vector next_tokens(Vector tokens) noexcept {
  return {std::bit_cast<float>(std::bit_cast<u32>(tokens.v) + lanes)};
}
/// `lanes` whole numbers, rounded to nearest even.
inline Vector load_counts(const u32* p) noexcept { return {static_cast<float>(*p)}; }
/// A bit for each of `lanes` bytes that are 0 or 1.
inline u32 load_flags(const u8* p) noexcept { return *p; }
inline void store_flags(u32 bits, u8* p) noexcept { *p = static_cast<u8>(bits); }

// Products of query rows.
/// out[r * stride + j] = the sum of the lanes of a[r][j], added as sum4 adds them.
inline void sum4x4(const Vector (*a)[4], float* out, u64 stride) noexcept {
  for (u32 r = 0; r < 4; ++r) sum4(a[r][0], a[r][1], a[r][2], a[r][3], out + r * stride);
}

// Roots, rounded to nearest.
inline Vector square_root(Vector a) noexcept { return {std::sqrt(a.v)}; }
