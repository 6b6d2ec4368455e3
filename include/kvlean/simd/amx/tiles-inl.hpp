// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
// Column sums of attention with AMX-BF16 tiles. A tile of products is [16 keys][16 query rows]:
// keys are read where they lie, queries are packed once, and lanes hold query rows as in
// generic/matrix-inl.hpp. While tiles multiply one block, vectors finish the block before it.
#include "kvlean/simd/amx/instructions-inl.hpp"
// (multiply_step)
#include "kvlean/simd/amx/finish-inl.hpp"

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
      if (steps_ == key_steps) {  // a constant is unrolled
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
