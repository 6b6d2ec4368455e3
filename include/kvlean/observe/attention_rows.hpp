// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <limits>

#include "kvlean/core/row_tile.hpp"
#include "kvlean/observe/attention_scratch.hpp"
#include "kvlean/observe/softmax_row.hpp"
#include "kvlean/observe/visibility.hpp"

// Attention probabilities, a tile of queries at a time: what every observing scorer is made of. The
// N x N matrix never exists.

KVLEAN_NAMESPACE_BEGIN

/// The attention of up to attention_query_tile queries over one segment. Points into the scratch it
/// was computed in.
struct AttentionTile {
  u32 rows = 0;
  TokenRange seen;  ///< tokens that some row sees; only these columns of row(r) are valid
  u32 query_head[attention_query_tile] = {};
  u32 query[attention_query_tile] = {};  ///< index i within the Queries
  TokenRange visible[attention_query_tile] =
      {};                                ///< what each row sees; zero in the rest of `seen`
  float lse[attention_query_tile] = {};  ///< log of the softmax denominator, sink included
  const float* probabilities = nullptr;
  u64 stride = 0;
  const simd::AttentionKernels* kernels = nullptr;  ///< what it was computed with

  /// Probabilities of row r, indexed by token.
  [[nodiscard]] const float* row(u32 r) const noexcept { return probabilities + r * stride; }
};

namespace detail {

/// Loads the queries that the tile names, as rows if they are few, else as columns for lanes.
inline void load_tile_queries(const Queries& queries, const AttentionTile& tile,
                              const AttentionScratch& scratch) noexcept {
  const u32 width = queries.rows.width;
  const bool few = tile.rows <= simd::few_rows;
  const u32 padded = padded_query_rows(tile.rows);
  if (!few) std::fill_n(scratch.queries, static_cast<u64>(padded) * width, 0.0f);
  for (u32 r = 0; r < tile.rows; ++r) {
    float* query = few ? scratch.queries + static_cast<u64>(r) * width : scratch.keys;
    load_query(queries, tile.query_head[r], tile.query[r], query);
    if (!few) put_query_column(query, width, r, scratch.queries, padded);
  }
}

/// Raw products of the tile's queries with keys [first, first + keys) of a segment.
inline void score_key_tile(const CacheView& cache, u32 segment, const AttentionTile& tile,
                           u32 first, u32 keys, const AttentionScratch& scratch) noexcept {
  const u32 width = cache.keys.width;
  const simd::FloatRows products{scratch.probabilities + first, scratch.stride};
  if (tile.rows > simd::few_rows) {
    load_rows(cache.keys, segment, first, keys, scratch.keys, width);
    tile.kernels->score_many({scratch.queries, padded_query_rows(tile.rows)}, tile.rows,
                             {scratch.keys, width}, keys, width, products);
    return;
  }
  const std::byte* pointers[attention_key_tile];
  const TileRows rows = tile_rows(cache.keys, segment, first, keys, pointers, scratch.keys, false);
  const std::byte* next[attention_key_tile];
  const u32 after = std::min(attention_key_tile, tile.seen.end - (first + keys));
  const simd::RowPointers ahead =
      is_contiguous_row(cache.keys) ? point_at_rows(cache.keys, segment, first + keys, after, next)
                                    : simd::RowPointers{};
  tile.kernels->score_few({scratch.queries, width}, tile.rows, rows.rows, rows.dtype, width, ahead,
                          products);
}

/// The tokens of `range` among [first, first + count).
[[nodiscard]] inline TokenRange part_of(TokenRange range, u32 first, u32 count) noexcept {
  return {std::clamp(range.begin, first, first + count),
          std::clamp(range.end, first, first + count)};
}

/// Multiplies the pieces of a row, each shifted by the largest logit of its time, to probabilities.
inline void normalise_row(const AttentionTile& tile, u32 r, const SoftmaxRow& softmax,
                          const float* sink, const AttentionScratch& scratch) noexcept {
  constexpr float inf = std::numeric_limits<float>::infinity();
  float* row = scratch.probabilities + r * scratch.stride;
  const float* shift = scratch.shifts + r * scratch.key_tiles;
  const TokenRange own = tile.visible[r];
  if (softmax.largest == inf || softmax.largest == -inf) {  // tiles before the first +inf become 0
    u32 infinite = sink != nullptr && *sink == inf ? 1 : 0;
    for (u32 t = own.begin; t < own.end; ++t) infinite += row[t] == inf ? 1 : 0;
    share_infinite(row + own.begin, own.end - own.begin,
                   infinite != 0 ? 1.0f / static_cast<float>(infinite) : 0.0f);
    return;
  }
  // The largest logit is found early as a rule: few, long runs share a shift.
  for (u32 first = tile.seen.begin; first < own.end;) {
    const float here = *shift;
    u32 last = first;
    for (; last < own.end && *shift == here; last += attention_key_tile) ++shift;
    const TokenRange part = part_of(own, first, last - first);
    if (here == -inf) {
      share_infinite(row + part.begin, part.end - part.begin, 0.0f);
    } else {
      tile.kernels->scale(row + part.begin, part.end - part.begin, softmax.factor(here));
    }
    first = last;
  }
}

/// Fills tile.lse and the probabilities of the rows that the tile names.
inline void compute_tile(const CacheView& cache, u32 segment, const Queries& queries,
                         const AttentionSpec& spec, const AttentionScratch& scratch,
                         AttentionTile& tile) noexcept {
  tile.kernels = &simd::attention_kernels(spec.target);
  tile.seen = {std::numeric_limits<u32>::max(), 0};
  for (u32 r = 0; r < tile.rows; ++r) {
    tile.visible[r] = visible_tokens(cache, segment, queries, spec, tile.query[r]);
    if (tile.visible[r].begin == tile.visible[r].end) continue;
    tile.seen.begin = std::min(tile.seen.begin, tile.visible[r].begin);
    tile.seen.end = std::max(tile.seen.end, tile.visible[r].end);
  }
  if (tile.seen.end == 0) tile.seen.begin = 0;
  for (u32 r = 0; r < tile.rows; ++r) {
    TokenRange& own = tile.visible[r];
    if (own.begin == own.end) own = {tile.seen.begin, tile.seen.begin};
    const u64 given = static_cast<u64>(tile.query_head[r]) * queries.count + tile.query[r];
    tile.lse[r] = queries.lse != nullptr ? queries.lse[given] : 0.0f;
  }

  // Logits are finished and exponentiated while their tile is in the first cache level.
  load_tile_queries(queries, tile, scratch);
  const float* log_mass = cache.log_mass ? cache.log_mass.segment(segment) : nullptr;
  const float scale = spec.scale_for(cache.keys.width);
  SoftmaxRow softmax[attention_query_tile];
  u32 piece = 0;
  for (u32 first = tile.seen.begin; first < tile.seen.end; first += attention_key_tile, ++piece) {
    const u32 keys = std::min(attention_key_tile, tile.seen.end - first);
    score_key_tile(cache, segment, tile, first, keys, scratch);
    for (u32 r = 0; r < tile.rows; ++r) {
      const TokenRange part = part_of(tile.visible[r], first, keys);
      const u32 count = part.end - part.begin;
      float* logits = scratch.probabilities + r * scratch.stride + part.begin;
      const float maximum =
          tile.kernels->logits(logits, count, scale, spec.softcap,
                               log_mass != nullptr ? log_mass + part.begin : nullptr);
      if (queries.lse != nullptr) {
        exponentiate(*tile.kernels, logits, count, tile.lse[r]);
      } else {
        scratch.shifts[r * scratch.key_tiles + piece] =
            softmax[r].add(*tile.kernels, logits, count, maximum);
      }
    }
  }

  for (u32 r = 0; r < tile.rows; ++r) {
    float* row = scratch.probabilities + r * scratch.stride;
    const TokenRange own = tile.visible[r];
    std::fill(row + tile.seen.begin, row + own.begin, 0.0f);
    std::fill(row + own.end, row + tile.seen.end, 0.0f);
    if (queries.lse != nullptr) continue;
    tile.lse[r] = softmax[r].close(
        spec.sink_logits != nullptr ? spec.sink_logits + tile.query_head[r] : nullptr);
    normalise_row(tile, r, softmax[r],
                  spec.sink_logits != nullptr ? spec.sink_logits + tile.query_head[r] : nullptr,
                  scratch);
  }
  tile.probabilities = scratch.probabilities;
  tile.stride = scratch.stride;
}

}  // namespace detail

/// Calls body(const AttentionTile&) for the queries [first_query, last_query) of every query head
/// of the segment's group: heads ascending, then queries ascending, whatever the tile size. Few
/// queries of many heads share a tile, so a decode step converts each key once for its whole group.
///
/// A logit is softcap(scale * q.k) + log_mass; masked tokens have probability zero. Softmax is in
/// float with a double sum; a sink logit, if any, joins the denominator. With queries.lse given,
/// p = exp(logit - lse). A query that sees nothing has only zeros, and lse -inf (its sink logit, if
/// there is one). A NaN logit gives its own token NaN and is left out of the sum, so one broken key
/// does not spoil a row; +inf logits share the whole mass.
///
/// Expects check_cache and check_queries to have passed, last_query <= queries.count, and scratch
/// for cache.length(segment) tokens. O(heads * queries * length * width).
template <class Body>
void for_each_attention_tile(const CacheView& cache, u32 segment, const Queries& queries,
                             const AttentionSpec& spec, u32 first_query, u32 last_query,
                             const AttentionScratch& scratch, Body&& body) noexcept {
  const u32 group = queries.rows.heads / cache.segments;
  const u32 per_head = last_query - first_query;
  if (per_head == 0) return;
  const u32 heads_per_tile = std::max(1u, attention_query_tile / per_head);
  AttentionTile tile;
  for (u32 head = 0; head < group; head += heads_per_tile) {
    const u32 heads = std::min(heads_per_tile, group - head);
    for (u32 first = 0; first < per_head; first += attention_query_tile) {
      const u32 count = std::min(attention_query_tile, per_head - first);
      tile.rows = 0;
      for (u32 h = 0; h < heads; ++h) {
        for (u32 i = 0; i < count; ++i, ++tile.rows) {
          tile.query_head[tile.rows] = segment * group + head + h;
          tile.query[tile.rows] = first_query + first + i;
        }
      }
      detail::compute_tile(cache, segment, queries, spec, scratch, tile);
      body(static_cast<const AttentionTile&>(tile));
    }
  }
}

KVLEAN_NAMESPACE_END
