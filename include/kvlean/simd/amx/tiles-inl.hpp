// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
// Column sums of attention with AMX-BF16 tiles. A tile of products is [16 keys][16 query rows]:
// keys are read where they lie, queries are packed once, and lanes hold query rows as in
// generic/matrix-inl.hpp. While tiles multiply one block, vectors finish the block before it.

inline constexpr u32 block_tokens = 16;  // of a block of products, [16 tokens][32 rows]
inline constexpr u32 key_steps = 4;      // steps that stay in tiles
inline constexpr u32 tile_bytes = 1024;

/// Eight tiles of 16 rows of 64 bytes, for as long as it lives.
class Tiles {
 public:
  Tiles() noexcept {
    struct alignas(64) Configuration {
      u8 palette = 1;
      u8 start_row = 0;
      u8 reserved[14] = {};
      u16 row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      u8 rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    };
    static_assert(sizeof(Configuration) == 64);
    const Configuration configuration;
    __asm__ volatile("ldtilecfg %0" : : "m"(configuration));
  }
  ~Tiles() { __asm__ volatile("tilerelease" : : : "memory"); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

// Tile numbers are part of the instruction. Tiles 0 and 1 are sums, 2 queries, 4 to 7 keys.
// What load_tile reads was written before the call that sets up the tiles.
template <u32 tile>
inline void load_tile(const std::byte* from, i64 stride) noexcept {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(tile));
}
template <u32 tile>
inline void store_tile(float* to) noexcept {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)"
                   :
                   : "r"(to), "r"(i64{lane_rows * sizeof(float)}), "i"(tile)
                   : "memory");
}
template <u32 tile>
inline void clear_tile() noexcept {
  __asm__ volatile("tilezero %%tmm%c0" : : "i"(tile));
}
template <u32 sum, u32 keys, u32 queries>
inline void multiply_tiles() noexcept {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sum), "i"(keys), "i"(queries));
}

/// What has to lie between two tile instructions where no vectors do: eight others or more. Where
/// tiles follow each other at once, the same products were seen to take 250 ns, not 155, for most
/// of the time on a shared host (and 60 in both forms now and then).
inline void part_tiles() noexcept {
  __asm__ volatile("nop\n\tnop\n\tnop\n\tnop\n\tnop\n\tnop\n\tnop\n\tnop");
}

/// Up to four steps of 16 keys.
inline void load_keys(const std::byte* key, i64 stride, u32 steps) noexcept {
  load_tile<4>(key, stride);
  part_tiles();
  if (steps > 1) load_tile<5>(key + 64, stride);
  part_tiles();
  if (steps > 2) load_tile<6>(key + 128, stride);
  part_tiles();
  if (steps > 3) load_tile<7>(key + 192, stride);
}

/// Adds one of those steps, times the queries in tile 2, to a sum.
template <u32 sum>
inline void multiply_step(u32 step) noexcept {
  if (step == 0) multiply_tiles<sum, 4, 2>();
  if (step == 1) multiply_tiles<sum, 5, 2>();
  if (step == 2) multiply_tiles<sum, 6, 2>();
  if (step == 3) multiply_tiles<sum, 7, 2>();
}
template <u32 sum>
inline void multiply_steps(const std::byte* packed, u32 steps) noexcept {
  for (u32 i = 0; i < steps; ++i, packed += 2 * tile_bytes) {
    load_tile<2>(packed, 64);
    part_tiles();
    multiply_step<sum>(i);
    part_tiles();
  }
}

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

/// Fetches the keys ahead into the second cache level, some rows a turn. An eighth of the rows is
/// begun with each in turn, as memory serves eight streams faster than one.
class KeysAhead {
 public:
  KeysAhead(const TileKeys& keys, u32 blocks, u32 steps, u32 turns) noexcept
      : tile_(keys.tile + blocks),
        stride_(keys.stride + blocks),
        steps_(steps),
        rows_(keys.ahead * block_tokens),
        share_(turns == 0 ? 0 : (rows_ + turns - 1) / turns) {}
  /// (Always inlined: a call that only prefetches is dropped.)
  [[gnu::always_inline]] void turn() noexcept {
    const u32 last = rows_ - next_ < share_ ? rows_ : next_ + share_;
    for (; next_ < last; ++next_) {
      const u32 row = next_ % 8 * (rows_ / 8) + next_ / 8;
      const u32 tile = row / block_tokens;
      const std::byte* at = tile_[tile] + stride_[tile] * (row % block_tokens);
      if (steps_ == key_steps) {
        for (u32 step = 0; step < key_steps; ++step) __builtin_prefetch(at + step * 64, 0, 2);
      } else {
        for (u32 step = 0; step < steps_; ++step) __builtin_prefetch(at + step * 64, 0, 2);
      }
    }
  }

 private:
  const std::byte* const* tile_;
  const i64* stride_;
  u32 steps_;
  u32 rows_;
  u32 share_;
  u32 next_ = 0;
};

template <Pass pass, bool general>
inline void run_tiles(const TileRows& rows, const TileKeys& keys, const LaneLogits& logits,
                      const float* weights, const TileSpan* spans, u32 span_count,
                      float* result) noexcept {
  const Tiles tiles;
  alignas(64) float products[2][block_tokens * lane_rows];
  alignas(64) float sums[block_tokens * lanes] = {};
  const u32 pairs = (rows.rows + lane_rows - 1) / lane_rows;
  const u32 blocks = (keys.tokens + block_tokens - 1) / block_tokens;
  PairSpans own[tile_rows_limit / lane_rows + 1];
  for (u32 pair = 0, s = 0; pass == Pass::columns && pair < pairs; ++pair) {
    const u32 row = pair * lane_rows;
    while (s < span_count && spans[s].last <= row) ++s;
    own[pair].first = own[pair].last = s;
    while (own[pair].last < span_count && spans[own[pair].last].first < row + lane_rows) {
      ++own[pair].last;
    }
    own[pair].whole = s < span_count && spans[s].first <= row && spans[s].last >= row + lane_rows;
  }
  // The last pair of a span, or of those that are whole, hands the sums over.
  const auto continues = [&](u32 pair) noexcept {
    return pair + 1 < pairs && own[pair + 1].whole && own[pair + 1].first == own[pair].first;
  };

  Finish before;  // no tokens yet
  before.x = products[1];
  before.result = pass == Pass::columns ? sums : result;
  before.weights = weights;
  const u32 steps = rows.steps;
  const u32 terms = rows.terms;
  const std::size_t step_bytes = std::size_t{2} * tile_bytes;
  const std::size_t term_bytes = steps * step_bytes;
  const auto close = [&]() noexcept {
    if (before.tokens == 0 || pass != Pass::columns) return;
    const PairSpans& mine = own[before.pair];
    if (!mine.whole) {
      add_mixed_spans(before, mine, spans);
    } else if (!continues(before.pair)) {
      add_lanes(sums, before.tokens, spans[mine.first].out + before.first);
    }
  };

  KeysAhead ahead(keys, blocks, steps, 4 * blocks * pairs);
  const bool regular = steps == key_steps && terms == 1;
  u32 turn = 0;
  for (u32 block = 0; block < blocks; ++block) {
    const std::byte* key = keys.tile[block];
    const i64 stride = keys.stride[block];
    if (regular) {
      load_keys(key, stride, key_steps);
    } else if (steps <= key_steps) {
      load_keys(key, stride, steps);
    }
    for (u32 pair = 0; pair < pairs; ++pair, turn ^= 1) {
      clear_tile<0>();
      clear_tile<1>();
      const std::byte* packed = rows.packed + pair * terms * term_bytes;
      float* x = products[turn];
      if (regular && before.tokens == block_tokens) {
        // Turn by turn: vectors work while tiles do.
        Finisher<pass, general> finish(before, logits);
        KVLEAN_SIMD_UNROLL
        for (u32 i = 0; i < key_steps; ++i) {
          finish.template tokens<2>(2 * i, [&](u32 at) noexcept {
            if (at == 0) load_tile<2>(packed + i * step_bytes, 64);
            if (at == 5) multiply_step<0>(i);
          });
          if (i % 2 == 1) ahead.turn();
        }
        KVLEAN_SIMD_UNROLL
        for (u32 i = 0; i < key_steps; ++i) {
          finish.template tokens<2>(8 + 2 * i, [&](u32 at) noexcept {
            if (at == 0) load_tile<2>(packed + i * step_bytes + tile_bytes, 64);
            if (at == 2 && i == 0) store_tile<0>(x);
            if (at == 5) multiply_step<1>(i);
          });
          if (i % 2 == 1) ahead.turn();
        }
        store_tile<1>(x + lanes);
        finish.close();
      } else {
        for (u32 i = 0; i < 4; ++i) ahead.turn();
        Finisher<pass, general> finish(before, logits);
        u32 token = 0;
        for (u32 step = 0; step < steps; step += key_steps) {
          const u32 here = steps - step < key_steps ? steps - step : key_steps;
          if (steps > key_steps) load_keys(key + step * 64, stride, here);
          const std::byte* part = packed + step * step_bytes;
          for (u32 term = 0; term < terms; ++term, part += term_bytes) {
            multiply_steps<0>(part, here);
            token = finish.until(before.tokens / 2, token);
            multiply_steps<1>(part + tile_bytes, here);
            token = finish.until(before.tokens, token);
          }
        }
        store_tile<0>(x);
        store_tile<1>(x + lanes);
        finish.close();
      }
      close();
      before.x = x;
      before.pair = pair;
      before.first = block * block_tokens;
      before.tokens = keys.tokens - before.first;
      if (before.tokens > block_tokens) before.tokens = block_tokens;
      if (pass == Pass::columns) before.keep = !own[pair].whole;
    }
  }
  Finisher<pass, general> finish(before, logits);
  finish.until(before.tokens, 0);
  finish.close();
  close();
}

template <Pass pass>
inline void run_pass(const TileRows& rows, const TileKeys& keys, const LaneLogits& logits,
                     const float* weights, const TileSpan* spans, u32 span_count,
                     float* result) noexcept {
  if (logits.plain()) {
    run_tiles<pass, false>(rows, keys, logits, weights, spans, span_count, result);
  } else {
    run_tiles<pass, true>(rows, keys, logits, weights, spans, span_count, result);
  }
}

inline void tile_maxima(const TileRows& rows, const TileKeys& keys, const LaneLogits& logits,
                        float* largest) noexcept {
  run_pass<Pass::maxima>(rows, keys, logits, nullptr, nullptr, 0, largest);
}
inline void tile_sums(const TileRows& rows, const TileKeys& keys, const LaneLogits& logits,
                      float* sums) noexcept {
  run_pass<Pass::sums>(rows, keys, logits, nullptr, nullptr, 0, sums);
}
inline void tile_columns(const TileRows& rows, const TileKeys& keys, const LaneLogits& logits,
                         const float* weights, const TileSpan* spans, u32 span_count) noexcept {
  run_pass<Pass::columns>(rows, keys, logits, weights, spans, span_count, nullptr);
}

/// Sixteen rows from `first` on, elements [32 step, 32 step + 32), as pairs: out is
/// [16 pairs][16 rows][2].
inline void pack_tile(ConstFloatRows rows, u32 first, u32 count, u32 step, u32 width, bool rest,
                      std::byte* out) noexcept {
  alignas(64) float pairs[16 * 16] = {};  // each holds two bf16 numbers
  for (u32 r = 0; r < 16 && first + r < count; ++r) {
    for (u32 half = 0; half < 2; ++half) {
      const u32 at = step * 32 + half * 16;
      if (at >= width) break;
      const float* from = rows.data + (first + r) * rows.stride + at;
      Vector x = width - at >= lanes ? load(from) : load(from, width - at);
      bf16* to = reinterpret_cast<bf16*>(pairs + r * 16) + half * 16;
      if (rest) {
        store(x, to);
        x = sub(x, load(to));
      }
      store(x, to);
    }
  }
  transpose(pairs, 16, reinterpret_cast<float*>(out), 16);
}

inline void tile_pack(ConstFloatRows rows, u32 count, u32 width, u32 terms,
                      std::byte* packed) noexcept {
  const u32 steps = (width + 31) / 32;
  for (u32 term = 0; term < terms; ++term) {
    for (u32 step = 0; step < steps; ++step) {
      for (u32 first = 0; first < 32; first += 16, packed += tile_bytes) {
        pack_tile(rows, first, count, step, width, term == 1, packed);
      }
    }
  }
}

[[nodiscard]] constexpr TileKernels tile_kernels_here() noexcept {
  return {tile_pack, tile_maxima, tile_sums, tile_columns};
}

#undef KVLEAN_TILES_INLINE
