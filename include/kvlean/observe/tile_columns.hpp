// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "kvlean/core/row_tile.hpp"
#include "kvlean/observe/attention_scratch.hpp"
#include "kvlean/observe/row_group.hpp"

// Column sums of attention with AMX tiles: up to 128 query rows at a time, in one pass over the
// keys where the log-sum-exp is given, else in two. No row of probabilities exists.

KVLEAN_NAMESPACE_BEGIN
namespace detail {

/// The kernels of tiles where they serve these keys, else null.
[[nodiscard]] inline const simd::TileKernels* tiles_for(const CacheView& cache,
                                                        const AttentionSpec& spec) noexcept {
  const bool bf16_keys = cache.keys.load == nullptr && cache.keys.dtype == DType::bf16;
  if (!bf16_keys && !spec.round_to_bf16) return nullptr;
  if (cache.keys.width > simd::tile_width_limit) return nullptr;
  return simd::tile_kernels(spec.target);
}

/// One group of rows against keys, in bf16.
class TileGroup {
 public:
  /// Packs the group's rows. Expects tiles_for() to be not null. The scratch must not be used
  /// otherwise meanwhile.
  TileGroup(const CacheView& cache, const Queries& queries, const AttentionSpec& spec,
            RowGroup& group, const AttentionScratch& scratch) noexcept
      : kernels_(*tiles_for(cache, spec)), cache_(cache), spec_(spec), group_(group) {
    const u32 width = cache.keys.width;
    const bool bf16_queries = queries.rows.load == nullptr && queries.rows.dtype == DType::bf16;
    rows_.rows = group.rows;
    rows_.steps = (width + 31) / 32;
    rows_.terms = bf16_queries || spec.round_to_bf16 ? 1 : 2;
    const std::size_t padded = std::size_t{rows_.steps} * 32;
    std::byte* at = reinterpret_cast<std::byte*>(scratch.tiles);
    at += -reinterpret_cast<std::uintptr_t>(at) % 64;
    rows_.packed = at;
    const std::size_t pair_bytes = simd::tile_rows_bytes(simd::lane_rows, rows_.steps, rows_.terms);
    key_bytes_ = at + simd::tile_rows_bytes(simd::tile_rows_limit, rows_.steps, 2);
    floats_ = reinterpret_cast<float*>(key_bytes_ + simd::tile_keys_limit * padded * 2);
    for (u32 first = 0; first < group.rows; first += simd::lane_rows, at += pair_bytes) {
      const u32 count = std::min(simd::lane_rows, group.rows - first);
      for (u32 r = 0; r < count; ++r) {
        load_query(queries, group.query_head[first + r], group.query[first + r],
                   floats_ + r * padded);
      }
      kernels_.pack({floats_, padded}, count, width, rows_.terms, at);
    }
  }

  /// Adds the powers of tokens in `range` to the rows' sums, and sets the shifts that are missing.
  void add_sums(TokenRange range) noexcept {
    for_each_run(range, [&](u32 first) noexcept {
      alignas(64) float some[simd::tile_rows_limit];
      if (group_.unset != 0) {
        constexpr u32 few = 16;
        const u32 count = keys_.tokens;
        set_missing(first, std::min(few, count), some);
        if (group_.unset != 0 && count > few) set_missing(first, count, some);
      }
      std::fill_n(some, simd::tile_rows_limit, 0.0f);
      kernels_.sums(rows_, keys_, logits(first), some);
      for (u32 r = 0; r < group_.rows; ++r) group_.sum[r] += static_cast<double>(some[r]);
    });
  }

  /// Adds the rows' weighted powers of tokens in `range` to target(head)[token].
  template <class Target>
  void add_columns(TokenRange range, Target&& target) noexcept {
    simd::TileSpan spans[simd::tile_rows_limit];
    u32 count = 0;
    for_each_span(group_, target, [&](u32 first, u32 last, float* out) noexcept {
      spans[count++] = {first, last, out};
    });
    for_each_run(range, [&](u32 first) noexcept {
      simd::TileSpan here[simd::tile_rows_limit];
      for (u32 s = 0; s < count; ++s)
        here[s] = {spans[s].first, spans[s].last, spans[s].out + first};
      kernels_.columns(rows_, keys_, logits(first), group_.weight, here, count);
    });
  }

 private:
  static constexpr u32 tile_tokens = 16;
  static constexpr u32 tiles_ahead = 16;

  [[nodiscard]] simd::LaneLogits logits(u32 first) noexcept {
    return lane_logits(cache_, spec_, group_, first, keys_.tokens, bounds_);
  }
  void set_missing(u32 first, u32 count, float* largest) noexcept {
    std::fill_n(largest, simd::tile_rows_limit, -std::numeric_limits<float>::infinity());
    const u32 tokens = keys_.tokens;
    keys_.tokens = count;
    kernels_.maxima(rows_, keys_, logits(first), largest);
    keys_.tokens = tokens;
    set_shifts(largest, group_);
  }

  /// Whether rows can be tiles where they lie, as far as all have that in common.
  [[nodiscard]] bool in_place() const noexcept {
    const Rows& keys = cache_.keys;
    return is_contiguous_row(keys) && keys.dtype == DType::bf16 && keys.width % 32 == 0 &&
           keys.token_stride % 32 == 0;
  }
  /// Points tile_[tile] and on at tiles from `token` on that can be read where they lie: up to
  /// `most`, no further than `tokens` reach. Returns how many.
  u32 point_at_tiles(u32 token, u32 tokens, u32 most, u32 tile) noexcept {
    if (!in_place()) return 0;
    const i64 stride = cache_.keys.token_stride * 2;
    u32 count = 0;
    while (count < most && tokens >= tile_tokens) {
      const u32 whole = std::min(tokens / tile_tokens, most - count) * tile_tokens;
      const u32 run = straight_tokens(cache_.keys, token, whole) / tile_tokens;
      const std::byte* at = row_address(cache_.keys, group_.segment, token);
      if (run == 0 || reinterpret_cast<std::uintptr_t>(at) % 64 != 0) break;
      for (u32 i = 0; i < run; ++i, ++count, at += stride * tile_tokens) {
        tile_[tile + count] = at;
        stride_[tile + count] = stride;
      }
      token += run * tile_tokens;
      tokens -= run * tile_tokens;
    }
    return count;
  }
  void pack_tile(u32 token, u32 count, std::byte* to) noexcept {
    const Rows& keys = cache_.keys;
    const std::size_t bytes = std::size_t{rows_.steps} * 64;
    const std::size_t used = std::size_t{keys.width} * 2;
    for (u32 t = 0; t < tile_tokens; ++t, to += bytes) {
      if (t >= count) {
        std::memset(to, 0, bytes);
        continue;
      }
      if (is_contiguous_row(keys) && keys.dtype == DType::bf16) {
        std::memcpy(to, row_address(keys, group_.segment, token + t), used);
      } else {
        load_row(keys, group_.segment, token + t, floats_);
        simd::row_kernels().store(floats_, to, DType::bf16, keys.width);
      }
      std::memset(to + used, 0, bytes - used);
    }
  }
  /// Calls body(first token) with keys_ set to runs of tokens that cover `range`.
  template <class Body>
  void for_each_run(TokenRange range, Body&& body) noexcept {
    const i64 packed_stride = i64{rows_.steps} * 64;
    u32 known = 0;  // tiles of this run that the run before has pointed at
    for (u32 first = range.begin; first < range.end; first += simd::tile_keys_limit) {
      const u32 left = range.end - first;
      keys_.tile = tile_;
      keys_.stride = stride_;
      keys_.tokens = std::min(simd::tile_keys_limit, left);
      const u32 tiles = (keys_.tokens + tile_tokens - 1) / tile_tokens;
      for (u32 tile = known; tile < tiles; ++tile) {
        const u32 t = tile * tile_tokens;
        const u32 more = point_at_tiles(first + t, keys_.tokens - t, tiles - tile, tile);
        if (more != 0) {
          tile += more - 1;
          continue;
        }
        std::byte* to = key_bytes_ + static_cast<i64>(t) * packed_stride;
        pack_tile(first + t, std::min(tile_tokens, keys_.tokens - t), to);
        tile_[tile] = to;
        stride_[tile] = packed_stride;
      }
      keys_.ahead = point_at_tiles(first + keys_.tokens, left - keys_.tokens, tiles_ahead, tiles);
      body(first);
      known = keys_.ahead;
      std::copy_n(tile_ + tiles, known, tile_);
      std::copy_n(stride_ + tiles, known, stride_);
    }
  }

  const simd::TileKernels& kernels_;
  const CacheView& cache_;
  const AttentionSpec& spec_;
  RowGroup& group_;
  simd::TileRows rows_;
  simd::TileKeys keys_;
  std::byte* key_bytes_ = nullptr;  // [tile_keys_limit][steps * 32] bf16
  float* floats_ = nullptr;         // [32][steps * 32]
  float bounds_[2 * simd::tile_rows_limit];
  const std::byte* tile_[simd::tile_keys_limit / tile_tokens + tiles_ahead];
  i64 stride_[simd::tile_keys_limit / tile_tokens + tiles_ahead];
};

/// The tokens of a group whose tiles begin at multiples of 16, as pages do.
[[nodiscard]] inline TokenRange tile_range(const RowGroup& group) noexcept {
  return {group.seen.begin / 16 * 16, group.seen.end};
}

/// Adds the attention of the group's rows to target(head)[token]. False, and nothing is added,
/// where close_rows says so.
template <class Target>
[[nodiscard]] bool add_tile_columns(const CacheView& cache, const Queries& queries,
                                    const AttentionSpec& spec, RowGroup& group,
                                    const AttentionScratch& scratch, Target&& target) noexcept {
  TileGroup tiles(cache, queries, spec, group, scratch);
  if (queries.lse == nullptr) {
    tiles.add_sums(tile_range(group));
    if (!close_rows(spec, group)) return false;
  }
  tiles.add_columns(tile_range(group), target);
  return true;
}

}  // namespace detail
KVLEAN_NAMESPACE_END
