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
