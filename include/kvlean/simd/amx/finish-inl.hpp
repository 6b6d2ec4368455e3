// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
// What vectors do to a block of products while tiles multiply the next.

enum class Pass : u8 { maxima, sums, columns };

// Powers of two in fewer multiply-adds than exponential2() takes: beside tiles a processor does
// only one of 512 bits a cycle, while additions and permutations go elsewhere.

/// 2^(j / 16), times the constant term of a minimax polynomial of degree 2 for 2^f, f in [0, 1/16)
/// (4.3e-7 relative). What remains of it is 1 + f * (linear + f * square).
alignas(64) inline constexpr float sixteenth_powers[16] = {
    0x1.000008p+0f, 0x1.0b558ep+0f, 0x1.172b8cp+0f, 0x1.2387aep+0f, 0x1.306feap+0f, 0x1.3dea6ep+0f,
    0x1.4bfdb6p+0f, 0x1.5ab088p+0f, 0x1.6a09f0p+0f, 0x1.7a1152p+0f, 0x1.8ace60p+0f, 0x1.9c4924p+0f,
    0x1.ae8a06p+0f, 0x1.c199cap+0f, 0x1.d5819ap+0f, 0x1.ea4b08p+0f};
inline constexpr float sixteenth_polynomial[2] = {0x1.62d408p-1f, 0x1.f6bde2p-3f};

/// y = n + j / 16 + f, with 0 <= j < 16 and 0 <= f < 1/16. The lowest four bits of what it returns
/// are j. NaN gives f = NaN; infinity and |y| > 2^18 some j and a finite f, which will do, as the
/// power is zero or infinity.
inline Vector split_sixteenths(Vector y, Vector& f) noexcept {
  constexpr int down = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;
  const __m512 large = _mm512_set1_ps(0x1.8p19f);  // the sum keeps four fraction bits
  const __m512 whole = _mm512_add_round_ps(y.v, large, down);
  f.v = _mm512_reduce_ps(y.v, 4 << 4 | down);
  return {whole};
}
inline Vector look_up(Vector table, Vector index) noexcept {
  return {_mm512_permutexvar_ps(_mm512_castps_si512(index.v), table.v)};
}

/// body(0) to body(count - 1), unrolled before a compiler decides which arrays become registers:
/// with loops, g++ kept a copy of some in memory.
template <u32 count, class Body>
[[gnu::always_inline]] inline void each(Body&& body) noexcept {
  static_assert(count == 1 || count == 2 || count == 4);
  body(0);
  if constexpr (count > 1) body(1);
  if constexpr (count > 2) {
    body(2);
    body(3);
  }
}
#define KVLEAN_TILES_INLINE __attribute__((always_inline))

/// What vectors do to a block of products.
struct Finish {
  float* x = nullptr;       // [16][32]
  u32 pair = 0;             // which rows
  u32 first = 0;            // token of the call
  u32 tokens = 0;           // of the block
  float* result = nullptr;  // largest or sums of all rows; columns: [16][16] sums over lanes
  const float* weights = nullptr;
  bool keep = false;  // columns: powers go back to x
};

/// Does it, some tokens at a time. What all tokens share, and the rows' results, stay in registers.
template <Pass pass, bool general>
class Finisher {
 public:
  [[gnu::always_inline]] Finisher(const Finish& f, const LaneLogits& logits) noexcept
      : f_(f), logits_(logits), row_(f.pair * lane_rows) {
    shift0_ = shift1_ = zero();
    result0_ = result1_ = zero();
    weight0_ = weight1_ = set1(1.0f);
    if (pass == Pass::maxima) {
      result0_ = load(f.result + row_);
      result1_ = load(f.result + row_ + lanes);
      return;
    }
    shift0_ = load(logits.minus_shift + row_);
    shift1_ = load(logits.minus_shift + row_ + lanes);
    if (pass == Pass::columns && !f.keep) {
      weight0_ = load(f.weights + row_);
      weight1_ = load(f.weights + row_ + lanes);
    }
    roots_ = load(sixteenth_powers);
    linear0_ = mul(weight0_, set1(sixteenth_polynomial[0]));
    linear1_ = mul(weight1_, set1(sixteenth_polynomial[0]));
    square0_ = mul(weight0_, set1(sixteenth_polynomial[1]));
    square1_ = mul(weight1_, set1(sixteenth_polynomial[1]));
  }
  /// `count` tokens from t on, in six steps that each take all of them: a processor looks only so
  /// far ahead for work that does not wait. Calls between(i) after step i.
  template <u32 count, class Between>
  [[gnu::always_inline]] void tokens(u32 t, Between&& between) noexcept {
    constexpr u32 n = 2 * count;
    float* x = f_.x + t * lane_rows;
    Vector y[n];
    each<n>([&](u32 i) KVLEAN_TILES_INLINE {
      y[i] = lane_exponent<general>(x + i * lanes, row_ + i % 2 * lanes, f_.first + t + i / 2,
                                    logits_, i % 2 == 0 ? shift0_ : shift1_);
    });
    stay<n>(y);
    between(0);
    if (pass == Pass::maxima) {
      each<n>([&](u32 i) KVLEAN_TILES_INLINE {
        if (i % 2 == 0) result0_ = max(y[i], result0_);
        if (i % 2 == 1) result1_ = max(y[i], result1_);
      });
      for (u32 i = 1; i < 6; ++i) between(i);
      return;
    }
    Vector f[n];
    Vector power[n];
    each<n>([&](u32 i) KVLEAN_TILES_INLINE { power[i] = split_sixteenths(y[i], f[i]); });
    stay<n>(power);
    stay<n>(f);
    between(1);
    each<n>([&](u32 i) KVLEAN_TILES_INLINE { power[i] = look_up(roots_, power[i]); });
    stay<n>(power);
    between(2);
    each<n>([&](u32 i) KVLEAN_TILES_INLINE { power[i] = scale_pow2(power[i], y[i]); });
    stay<n>(power);
    between(3);
    each<n>([&](u32 i) KVLEAN_TILES_INLINE {
      y[i] = i % 2 == 0 ? fma(f[i], square0_, linear0_) : fma(f[i], square1_, linear1_);
    });
    stay<n>(y);
    between(4);
    each<n>([&](u32 i)
                KVLEAN_TILES_INLINE { y[i] = fma(f[i], y[i], i % 2 == 0 ? weight0_ : weight1_); });
    stay<n>(y);
    between(5);
    if (pass == Pass::sums) {
      each<n>([&](u32 i) KVLEAN_TILES_INLINE {
        if (i % 2 == 0) result0_ = fma(power[i], y[i], result0_);
        if (i % 2 == 1) result1_ = fma(power[i], y[i], result1_);
      });
      stay(result0_, result1_);
    } else if (f_.keep) {
      each<n>([&](u32 i) KVLEAN_TILES_INLINE { store(mul(power[i], y[i]), x + i * lanes); });
    } else {
      float* sum = f_.result + t * lanes;
      each<count>([&](u32 i) KVLEAN_TILES_INLINE {
        const Vector even = fma(power[2 * i], y[2 * i], load(sum + i * lanes));
        store(fma(power[2 * i + 1], y[2 * i + 1], even), sum + i * lanes);
      });
    }
  }
  /// Tokens [from, to). Returns the next.
  u32 until(u32 to, u32 from) noexcept {
    for (; from + 2 <= to; from += 2) tokens<2>(from, [](u32) noexcept {});
    if (from < to) tokens<1>(from++, [](u32) noexcept {});
    return from;
  }
  /// Hands over the rows' results.
  [[gnu::always_inline]] void close() noexcept {
    if (pass == Pass::columns) return;
    float* result = f_.result + row_;
    if (pass == Pass::sums) {
      result0_ = add(load(result), result0_);
      result1_ = add(load(result + lanes), result1_);
    }
    store(result0_, result);
    store(result1_, result + lanes);
  }

 private:
  // Keeps what is computed before a tile instruction before it.
  [[gnu::always_inline]] static void stay(Vector& a, Vector& b) noexcept {
    __asm__ volatile("" : "+v"(a.v), "+v"(b.v));
  }
  template <u32 n>
  [[gnu::always_inline]] static void stay(Vector* a) noexcept {
    if (n == 2) stay(a[0], a[1]);
    if (n == 4) __asm__ volatile("" : "+v"(a[0].v), "+v"(a[1].v), "+v"(a[2].v), "+v"(a[3].v));
  }

  const Finish& f_;
  const LaneLogits& logits_;
  u32 row_;
  Vector shift0_;
  Vector shift1_;
  Vector result0_;
  Vector result1_;
  Vector roots_;
  Vector weight0_;  // the polynomial times the rows' weights
  Vector weight1_;
  Vector linear0_;
  Vector linear1_;
  Vector square0_;
  Vector square1_;
};

/// Both vectors' quarters, added in twos: those of a in the lower half, of b in the upper.
inline Vector add_quarters(Vector a, Vector b) noexcept {
  return {
      _mm512_add_ps(_mm512_shuffle_f32x4(a.v, b.v, 0x88), _mm512_shuffle_f32x4(a.v, b.v, 0xdd))};
}

/// out[t] += the sum of the lanes of sums[t], for up to 16 tokens. Clears the sums.
inline void add_lanes(float* sums, u32 tokens, float* out) noexcept {
  Vector quarter[4];  // quarter[i] holds what is left of tokens i, i + 4, i + 8, i + 12
  KVLEAN_SIMD_UNROLL
  for (u32 i = 0; i < 4; ++i) {
    const float* s = sums + i * lanes;
    quarter[i] = add_quarters(add_quarters(load(s), load(s + 4 * lanes)),
                              add_quarters(load(s + 8 * lanes), load(s + 12 * lanes)));
  }
  KVLEAN_SIMD_UNROLL
  for (u32 i = 0; i < 16; ++i) store(zero(), sums + i * lanes);
  const __m512 a = _mm512_add_ps(_mm512_unpacklo_ps(quarter[0].v, quarter[1].v),
                                 _mm512_unpackhi_ps(quarter[0].v, quarter[1].v));
  const __m512 b = _mm512_add_ps(_mm512_unpacklo_ps(quarter[2].v, quarter[3].v),
                                 _mm512_unpackhi_ps(quarter[2].v, quarter[3].v));
  const Vector total{_mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee))};
  if (tokens == lanes) {
    store(add(load(out), total), out);
  } else {
    store(add(load(out, tokens), total), out, tokens);
  }
}

/// The spans that meet rows [32 pair, 32 pair + 32).
struct PairSpans {
  u32 first = 0;
  u32 last = 0;
  bool whole = false;  // one span that holds all of them
};

/// Columns of a block whose rows belong to several spans, or to none: powers are in x.
inline void add_mixed_spans(const Finish& f, const PairSpans& own, const TileSpan* spans) noexcept {
  const u32 row = f.pair * lane_rows;
  for (u32 s = own.first; s < own.last; ++s) {
    alignas(64) float weights[lane_rows] = {};
    const u32 from = spans[s].first > row ? spans[s].first - row : 0;
    const u32 to = spans[s].last - row < lane_rows ? spans[s].last - row : lane_rows;
    for (u32 r = from; r < to; ++r) weights[r] = f.weights[row + r];
    lane_columns(f.x, f.tokens, lane_rows, weights, spans[s].out + f.first);
  }
}

#undef KVLEAN_TILES_INLINE
