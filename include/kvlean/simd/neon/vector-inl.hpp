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

// Merging.
inline constexpr u32 neighbour_rows = 2;
inline constexpr u32 held_vectors = 0;  // of a row of this width, kept in registers; 0: none
inline constexpr u32 weigh_vectors = 8;

inline Vector rounded_product(Vector a, Vector b) noexcept {
  Vector product = mul(a, b);
  __asm__("" : "+w"(product.v));
  return product;
}
inline float sum_16(const Vector* v) noexcept {
  const float32x4_t four = vaddq_f32(vaddq_f32(v[0].v, v[2].v), vaddq_f32(v[1].v, v[3].v));
  const float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
  return vget_lane_f32(vpadd_f32(two, two), 0);
}
inline void sum_16_of_4(const Vector (*v)[16 / lanes], float* out) noexcept {
  for (u32 r = 0; r < 4; ++r) out[r] = sum_16(v[r]);
}
template <class E>
inline void stream(Vector a, E* p) noexcept {
  store(a, p);
}
inline void stream_line(const std::byte* from, std::byte* to) noexcept {
  std::memcpy(to, from, 64);
}
inline void stream_end() noexcept {}

// Doubles, pairs and blocks of bytes, for the kernels that move and turn rows.

struct Doubles {
  float64x2_t low;
  float64x2_t high;
};

inline float64x2_t rounded_product(float64x2_t a, float64x2_t b) noexcept {
  float64x2_t product = vmulq_f64(a, b);
  __asm__("" : "+w"(product));
  return product;
}
inline Doubles rounded_product(Doubles a, Doubles b) noexcept {
  return {rounded_product(a.low, b.low), rounded_product(a.high, b.high)};
}
inline Doubles set1_doubles(double x) noexcept { return {vdupq_n_f64(x), vdupq_n_f64(x)}; }
inline Doubles load(const double* p) noexcept { return {vld1q_f64(p), vld1q_f64(p + 2)}; }
inline void store(Doubles a, double* p) noexcept {
  vst1q_f64(p, a.low);
  vst1q_f64(p + 2, a.high);
}
inline Doubles add(Doubles a, Doubles b) noexcept {
  return {vaddq_f64(a.low, b.low), vaddq_f64(a.high, b.high)};
}
inline Doubles sub(Doubles a, Doubles b) noexcept {
  return {vsubq_f64(a.low, b.low), vsubq_f64(a.high, b.high)};
}
inline Doubles round_even(Doubles a) noexcept { return {vrndnq_f64(a.low), vrndnq_f64(a.high)}; }
inline Vector narrow(Doubles a) noexcept {
  return {vcombine_f32(vcvt_f32_f64(a.low), vcvt_f32_f64(a.high))};
}

inline void split_pairs(Vector a, Vector b, Vector& even, Vector& odd) noexcept {
  even.v = vuzp1q_f32(a.v, b.v);
  odd.v = vuzp2q_f32(a.v, b.v);
}
inline void join_pairs(Vector even, Vector odd, Vector& a, Vector& b) noexcept {
  a.v = vzip1q_f32(even.v, odd.v);
  b.v = vzip2q_f32(even.v, odd.v);
}

struct Block {
  uint8x16x4_t v;
};
inline Block load_block(const std::byte* p) noexcept {
  const u8* from = reinterpret_cast<const u8*>(p);
  return {{{vld1q_u8(from), vld1q_u8(from + 16), vld1q_u8(from + 32), vld1q_u8(from + 48)}}};
}
inline void store_block(const Block& block, std::byte* p) noexcept {
  u8* to = reinterpret_cast<u8*>(p);
  for (u32 i = 0; i < 4; ++i) vst1q_u8(to + 16 * i, block.v.val[i]);
}
inline void gather_words(const std::byte* from, const u32* index, std::byte* to) noexcept {
  std::byte words[16];
  for (u32 i = 0; i < 4; ++i) std::memcpy(words + 4 * i, from + std::size_t{index[i]} * 4, 4);
  std::memcpy(to, words, 16);
}

// Powers of two.
inline Vector split_power(Vector y, Vector& whole) noexcept {
  y = min(set1(254.0f), max(set1(-252.0f), y));
  whole.v = vrndmq_f32(y.v);
  return sub(y, whole);
}

// Selection.
struct Counts {
  uint32x4_t v;
};
inline Counts no_counts() noexcept { return {vdupq_n_u32(0)}; }
inline Counts count_at_least(Counts counts, Vector a, Vector b) noexcept {
  return {vsubq_u32(counts.v, vcgeq_f32(a.v, b.v))};
}
inline Counts add_counts(Counts a, Counts b) noexcept { return {vaddq_u32(a.v, b.v)}; }
inline u32 sum_counts(Counts counts) noexcept { return vaddvq_u32(counts.v); }
inline u32 at_least(Vector a, Vector b) noexcept {
  static constexpr u32 bit[4] = {1, 2, 4, 8};
  return vaddvq_u32(vandq_u32(vcgeq_f32(a.v, b.v), vld1q_u32(bit)));
}
inline u32 bits_set(u32 bits) noexcept {
  return static_cast<u32>(0x4332322132212110u >> (4 * bits)) & 7u;
}

/// For every set of lanes, the bytes of its members, first ones first.
struct LaneBytes {
  u8 of[16][16];
  constexpr LaneBytes() noexcept : of{} {
    for (u32 bits = 0; bits < 16; ++bits) {
      u32 found = 0;
      for (u32 lane = 0; lane < 4; ++lane) {
        if ((bits >> lane & 1u) == 0) continue;
        for (u32 i = 0; i < 4; ++i) of[bits][4 * found + i] = static_cast<u8>(4 * lane + i);
        ++found;
      }
    }
  }
};
inline constexpr LaneBytes lane_bytes;

inline Vector compress(Vector a, u32 bits) noexcept {
  const uint8x16_t bytes = vld1q_u8(lane_bytes.of[bits]);
  return {vreinterpretq_f32_u8(vqtbl1q_u8(vreinterpretq_u8_f32(a.v), bytes))};
}
inline Vector where_number(Vector a, Vector yes, Vector no) noexcept {
  return {vbslq_f32(vceqq_f32(a.v, a.v), yes.v, no.v)};
}
inline Vector token_lanes(u32 first) noexcept {
  static constexpr u32 lane[4] = {0, 1, 2, 3};
  return {vreinterpretq_f32_u32(vaddq_u32(vdupq_n_u32(first), vld1q_u32(lane)))};
}
inline Vector next_tokens(Vector tokens) noexcept {
  return {vreinterpretq_f32_u32(vaddq_u32(vreinterpretq_u32_f32(tokens.v), vdupq_n_u32(4)))};
}
inline Vector load_counts(const u32* p) noexcept {
  return {vcvtq_f32_u32(vreinterpretq_u32_u8(vld1q_u8(reinterpret_cast<const u8*>(p))))};
}
inline u32 load_flags(const u8* p) noexcept {
  u32 flags;
  std::memcpy(&flags, p, sizeof flags);
  return (flags * 0x01020408u) >> 24 & 0xfu;  // byte i moves to bit 24 + i
}
inline void store_flags(u32 bits, u8* p) noexcept {
  const u32 own = (bits * 0x01010101u) & 0x08040201u;  // bit i in byte i
  const u32 flags = ((own + 0x7f7f7f7fu) >> 7) & 0x01010101u;
  std::memcpy(p, &flags, sizeof flags);
}

// Products of query rows.
inline void sum4x4(const Vector (*a)[4], float* out, u64 stride) noexcept {
  for (u32 r = 0; r < 4; ++r) sum4(a[r][0], a[r][1], a[r][2], a[r][3], out + r * stride);
}

// Roots, rounded to nearest.
inline Vector square_root(Vector a) noexcept { return {vsqrtq_f32(a.v)}; }
