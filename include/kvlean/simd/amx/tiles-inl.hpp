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

/// Up to four steps of 16 keys.
inline void load_keys(const std::byte* key, i64 stride, u32 steps) noexcept {
  load_tile<4>(key, stride);
  if (steps > 1) load_tile<5>(key + 64, stride);
  if (steps > 2) load_tile<6>(key + 128, stride);
  if (steps > 3) load_tile<7>(key + 192, stride);
}

/// Adds one of those steps to the products with 16 query rows. A sum at a time and one tile of
/// queries: where four sums take turns and keys are loaded between, the same work was seen to take
/// 150 or 370 ns, for seconds on end; this order took 140.
template <u32 sum>
inline void multiply_step(const std::byte* packed, u32 step) noexcept {
  load_tile<2>(packed, 64);
  if (step == 0) multiply_tiles<sum, 4, 2>();
  if (step == 1) multiply_tiles<sum, 5, 2>();
  if (step == 2) multiply_tiles<sum, 6, 2>();
  if (step == 3) multiply_tiles<sum, 7, 2>();
}

enum class Pass : u8 { maxima, sums, columns };

/// What vectors do to a block of products, a few tokens at a time.
struct Finish {
  float* x = nullptr;       // [16][32]
  u32 pair = 0;             // which rows
  u32 first = 0;            // token of the call
  u32 tokens = 0;           // of the block
  float* result = nullptr;  // largest or sums of all rows; columns: [16][16] sums over lanes
  const float* weights = nullptr;
  bool fresh = false;  // columns: the first rows of a span
  bool keep = false;   // columns: powers go back to x
};

// (a call would reload the polynomial for every two tokens)
template <Pass pass, bool general, u32 count>
[[gnu::always_inline]] inline void finish_tokens(const Finish& f, u32 from,
                                                 const LaneLogits& logits) noexcept {
  const u32 row = f.pair * lane_rows;
  const Vector shift0 = pass == Pass::maxima ? zero() : load(logits.minus_shift + row);
  const Vector shift1 = pass == Pass::maxima ? zero() : load(logits.minus_shift + row + lanes);
  float* x = f.x + from * lane_rows;
  Vector a[count];
  Vector b[count];
  KVLEAN_SIMD_UNROLL
  for (u32 t = 0; t < count; ++t) {
    const u32 token = f.first + from + t;
    a[t] = lane_exponent<general>(x + t * lane_rows, row, token, logits, shift0);
    b[t] = lane_exponent<general>(x + t * lane_rows + lanes, row + lanes, token, logits, shift1);
    if (pass == Pass::maxima) continue;
    a[t] = exponential2(a[t]);
    b[t] = exponential2(b[t]);
  }
  if (pass == Pass::columns) {
    if (f.keep) {
      KVLEAN_SIMD_UNROLL
      for (u32 t = 0; t < count; ++t) {
        store(a[t], x + t * lane_rows);
        store(b[t], x + t * lane_rows + lanes);
      }
      return;
    }
    const Vector weight0 = load(f.weights + row);
    const Vector weight1 = load(f.weights + row + lanes);
    float* sum = f.result + from * lanes;
    KVLEAN_SIMD_UNROLL
    for (u32 t = 0; t < count; ++t) {
      Vector both = fma(a[t], weight0, mul(b[t], weight1));
      if (!f.fresh) both = add(load(sum + t * lanes), both);
      store(both, sum + t * lanes);
    }
    return;
  }
  float* result = f.result + row;
  KVLEAN_SIMD_UNROLL
  for (u32 t = 1; t < count; ++t) {
    a[0] = pass == Pass::maxima ? max(a[t], a[0]) : add(a[0], a[t]);
    b[0] = pass == Pass::maxima ? max(b[t], b[0]) : add(b[0], b[t]);
  }
  const Vector before0 = load(result);
  const Vector before1 = load(result + lanes);
  store(pass == Pass::maxima ? max(a[0], before0) : add(before0, a[0]), result);
  store(pass == Pass::maxima ? max(b[0], before1) : add(before1, b[0]), result + lanes);
}

/// Both vectors' quarters, added in twos: those of a in the lower half, of b in the upper.
inline Vector add_quarters(Vector a, Vector b) noexcept {
  return {
      _mm512_add_ps(_mm512_shuffle_f32x4(a.v, b.v, 0x88), _mm512_shuffle_f32x4(a.v, b.v, 0xdd))};
}

/// out[t] += the sum of the lanes of sums[t], for up to 16 tokens.
inline void add_lanes(const float* sums, u32 tokens, float* out) noexcept {
  Vector quarter[4];  // quarter[i] holds what is left of tokens i, i + 4, i + 8, i + 12
  KVLEAN_SIMD_UNROLL
  for (u32 i = 0; i < 4; ++i) {
    const float* s = sums + i * lanes;
    quarter[i] = add_quarters(add_quarters(load(s), load(s + 4 * lanes)),
                              add_quarters(load(s + 8 * lanes), load(s + 12 * lanes)));
  }
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

  Finish before;
  const u32 steps = rows.steps;
  const u32 terms = rows.terms;
  const std::size_t step_bytes = std::size_t{2} * tile_bytes;
  const std::size_t term_bytes = steps * step_bytes;
  const auto close = [&]() noexcept {
    if (before.x == nullptr) return;
    if (before.tokens != block_tokens) {
      for (u32 t = 0; t < before.tokens; ++t) finish_tokens<pass, general, 1>(before, t, logits);
    }
    if (pass != Pass::columns) return;
    const PairSpans& mine = own[before.pair];
    if (!mine.whole) {
      add_mixed_spans(before, mine, spans);
    } else if (!continues(before.pair)) {
      add_lanes(sums, before.tokens, spans[mine.first].out + before.first);
    }
  };

  u32 turn = 0;
  for (u32 block = 0; block < blocks; ++block) {
    const std::byte* key = keys.tile[block];
    const i64 stride = keys.stride[block];
    if (steps <= key_steps) load_keys(key, stride, steps);
    for (u32 pair = 0; pair < pairs; ++pair, turn ^= 1) {
      if (block + 4 < blocks + keys.ahead) {
        const std::byte* next = keys.tile[block + 4];
        for (u32 t = block_tokens * pair / pairs; t < block_tokens * (pair + 1) / pairs; ++t) {
          const std::byte* row = next + keys.stride[block + 4] * t;
          for (u32 step = 0; step < steps; ++step) __builtin_prefetch(row + step * 64);
        }
      }
      clear_tile<0>();
      clear_tile<1>();
      const std::byte* packed = rows.packed + pair * terms * term_bytes;
      const bool finishes = before.tokens == block_tokens;
      for (u32 step = 0; step < steps; step += key_steps) {
        const u32 here = steps - step < key_steps ? steps - step : key_steps;
        if (steps > key_steps) load_keys(key + step * 64, stride, here);
        const std::byte* part = packed + step * step_bytes;
        for (u32 term = 0; term < terms; ++term, part += term_bytes) {
          if (finishes && here == key_steps && step == 0 && term == 0) {
            // Turn by turn, so that vectors work while tiles do.
            KVLEAN_SIMD_UNROLL
            for (u32 i = 0; i < key_steps; ++i) {
              multiply_step<0>(part + i * step_bytes, i);
              finish_tokens<pass, general, 2>(before, 2 * i, logits);
            }
            KVLEAN_SIMD_UNROLL
            for (u32 i = 0; i < key_steps; ++i) {
              multiply_step<1>(part + i * step_bytes + tile_bytes, i);
              finish_tokens<pass, general, 2>(before, 8 + 2 * i, logits);
            }
            continue;
          }
          for (u32 i = 0; i < here; ++i) multiply_step<0>(part + i * step_bytes, i);
          for (u32 i = 0; i < here; ++i) multiply_step<1>(part + i * step_bytes + tile_bytes, i);
          if (!finishes || step != 0 || term != 0) continue;
          for (u32 t = 0; t < block_tokens; t += 4) {
            finish_tokens<pass, general, 4>(before, t, logits);
          }
        }
      }
      float* x = products[turn];
      store_tile<0>(x);
      store_tile<1>(x + lanes);
      close();
      before.x = x;
      before.pair = pair;
      before.first = block * block_tokens;
      before.tokens = keys.tokens - before.first;
      if (before.tokens > block_tokens) before.tokens = block_tokens;
      before.result = pass == Pass::columns ? sums : result;
      before.weights = weights;
      if (pass != Pass::columns) continue;
      before.fresh = pair == 0 || !own[pair - 1].whole || own[pair - 1].first != own[pair].first;
      before.keep = !own[pair].whole;
    }
  }
  if (before.tokens == block_tokens) {
    for (u32 t = 0; t < block_tokens; t += 4) finish_tokens<pass, general, 4>(before, t, logits);
  }
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
