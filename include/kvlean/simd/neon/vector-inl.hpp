// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
// The vocabulary of the neon target: 4 lanes, 32 registers, 64-bit ARM without extensions. See
// scalar/vector-inl.hpp for what each word means.

inline constexpr u32 lanes = 4;
inline constexpr u32 score_rows = 4;
inline constexpr u32 blend_rows = 4;
inline constexpr u32 blend_width = 4;
inline constexpr u32 block_vectors = 4;
inline constexpr u32 block_keys = 4;

struct Vector {
  float32x4_t v;
};

inline uint16x4_t load_halves(const void* p, u32 n) noexcept {
  u16 halves[4] = {};
  std::memcpy(halves, p, n * sizeof(u16));
  return vld1_u16(halves);
}
inline void store_halves(uint16x4_t x, void* p, u32 n) noexcept {
  u16 halves[4];
  vst1_u16(halves, x);
  std::memcpy(p, halves, n * sizeof(u16));
}
inline Vector from_f16(uint16x4_t bits) noexcept {
  return {vcvt_f32_f16(vreinterpret_f16_u16(bits))};
}
inline Vector from_bf16(uint16x4_t bits) noexcept {
  return {vreinterpretq_f32_u32(vshll_n_u16(bits, 16))};
}
inline uint16x4_t to_f16(Vector a) noexcept { return vreinterpret_u16_f16(vcvt_f16_f32(a.v)); }
inline uint16x4_t to_bf16(Vector a) noexcept {
  const uint32x4_t bits = vreinterpretq_u32_f32(a.v);
  const uint32x4_t upper = vshrq_n_u32(bits, 16);
  const uint32x4_t odd = vandq_u32(upper, vdupq_n_u32(1));
  const uint32x4_t rounded = vshrq_n_u32(vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), odd), 16);
  const uint32x4_t quiet = vorrq_u32(upper, vdupq_n_u32(0x40));
  return vmovn_u32(vbslq_u32(vceqq_f32(a.v, a.v), rounded, quiet));
}

inline Vector zero() noexcept { return {vdupq_n_f32(0.0f)}; }
inline Vector set1(float x) noexcept { return {vdupq_n_f32(x)}; }

inline Vector load(const float* p) noexcept {
  return {vreinterpretq_f32_u8(vld1q_u8(reinterpret_cast<const u8*>(p)))};
}
inline Vector load(const f16* p) noexcept {
  return from_f16(vreinterpret_u16_u8(vld1_u8(reinterpret_cast<const u8*>(p))));
}
inline Vector load(const bf16* p) noexcept {
  return from_bf16(vreinterpret_u16_u8(vld1_u8(reinterpret_cast<const u8*>(p))));
}
inline Vector load(const float* p, u32 n) noexcept {
  float values[4] = {};
  std::memcpy(values, p, n * sizeof(float));
  return {vld1q_f32(values)};
}
inline Vector load(const f16* p, u32 n) noexcept { return from_f16(load_halves(p, n)); }
inline Vector load(const bf16* p, u32 n) noexcept { return from_bf16(load_halves(p, n)); }
inline void store(Vector a, float* p) noexcept {
  vst1q_u8(reinterpret_cast<u8*>(p), vreinterpretq_u8_f32(a.v));
}
inline void store(Vector a, f16* p) noexcept {
  vst1_u8(reinterpret_cast<u8*>(p), vreinterpret_u8_u16(to_f16(a)));
}
inline void store(Vector a, bf16* p) noexcept {
  vst1_u8(reinterpret_cast<u8*>(p), vreinterpret_u8_u16(to_bf16(a)));
}
inline void store(Vector a, float* p, u32 n) noexcept {
  float values[4];
  vst1q_f32(values, a.v);
  std::memcpy(p, values, n * sizeof(float));
}
inline void store(Vector a, f16* p, u32 n) noexcept { store_halves(to_f16(a), p, n); }
inline void store(Vector a, bf16* p, u32 n) noexcept { store_halves(to_bf16(a), p, n); }

inline Vector add(Vector a, Vector b) noexcept { return {vaddq_f32(a.v, b.v)}; }
inline Vector sub(Vector a, Vector b) noexcept { return {vsubq_f32(a.v, b.v)}; }
inline Vector mul(Vector a, Vector b) noexcept { return {vmulq_f32(a.v, b.v)}; }
inline Vector div(Vector a, Vector b) noexcept { return {vdivq_f32(a.v, b.v)}; }
inline Vector fma(Vector a, Vector b, Vector c) noexcept { return {vfmaq_f32(c.v, a.v, b.v)}; }
inline Vector max(Vector a, Vector b) noexcept {
  return {vbslq_f32(vcgtq_f32(a.v, b.v), a.v, b.v)};
}
inline Vector min(Vector a, Vector b) noexcept {
  return {vbslq_f32(vcltq_f32(a.v, b.v), a.v, b.v)};
}
inline Vector abs(Vector a) noexcept { return {vabsq_f32(a.v)}; }
inline Vector copysign(Vector a, Vector sign) noexcept {
  return {vbslq_f32(vdupq_n_u32(0x80000000u), sign.v, a.v)};
}
inline Vector round_product(Vector a, Vector b) noexcept {
  return {vrndnq_f32(vmulq_f32(a.v, b.v))};
}
inline Vector select_less(Vector a, Vector b, Vector yes, Vector no) noexcept {
  return {vbslq_f32(vcltq_f32(a.v, b.v), yes.v, no.v)};
}
inline Vector add_number(Vector sum, Vector a) noexcept {
  const uint32x4_t number = vandq_u32(vreinterpretq_u32_f32(a.v), vceqq_f32(a.v, a.v));
  return {vaddq_f32(sum.v, vreinterpretq_f32_u32(number))};
}
inline Vector scale_pow2(Vector a, Vector n) noexcept {
  const int32x4_t whole = vcvtq_s32_f32(n.v);
  const int32x4_t half = vshrq_n_s32(whole, 1);
  const int32x4_t bias = vdupq_n_s32(127);
  const int32x4_t first = vshlq_n_s32(vaddq_s32(half, bias), 23);
  const int32x4_t second = vshlq_n_s32(vaddq_s32(vsubq_s32(whole, half), bias), 23);
  return {vmulq_f32(vmulq_f32(a.v, vreinterpretq_f32_s32(first)), vreinterpretq_f32_s32(second))};
}

inline float reduce_add(Vector a) noexcept { return vaddvq_f32(a.v); }
inline float reduce_max(Vector a) noexcept { return vmaxvq_f32(a.v); }
inline void sum4(Vector a, Vector b, Vector c, Vector d, float* out) noexcept {
  store(Vector{vpaddq_f32(vpaddq_f32(a.v, b.v), vpaddq_f32(c.v, d.v))}, out);
}
inline void transpose(const float* in, u64 in_stride, float* out, u64 out_stride) noexcept {
  const float32x4_t row0 = vld1q_f32(in);
  const float32x4_t row1 = vld1q_f32(in + in_stride);
  const float32x4_t row2 = vld1q_f32(in + 2 * in_stride);
  const float32x4_t row3 = vld1q_f32(in + 3 * in_stride);
  const float64x2_t a = vreinterpretq_f64_f32(vzip1q_f32(row0, row1));
  const float64x2_t b = vreinterpretq_f64_f32(vzip1q_f32(row2, row3));
  const float64x2_t c = vreinterpretq_f64_f32(vzip2q_f32(row0, row1));
  const float64x2_t d = vreinterpretq_f64_f32(vzip2q_f32(row2, row3));
  vst1q_f32(out, vreinterpretq_f32_f64(vzip1q_f64(a, b)));
  vst1q_f32(out + out_stride, vreinterpretq_f32_f64(vzip2q_f64(a, b)));
  vst1q_f32(out + 2 * out_stride, vreinterpretq_f32_f64(vzip1q_f64(c, d)));
  vst1q_f32(out + 3 * out_stride, vreinterpretq_f32_f64(vzip2q_f64(c, d)));
}
