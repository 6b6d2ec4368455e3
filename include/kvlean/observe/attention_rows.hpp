// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <limits>

#include "kvlean/observe/attention_scratch.hpp"
#include "kvlean/observe/softmax_row.hpp"
#include "kvlean/observe/visibility.hpp"
#include "kvlean/simd/row_math.hpp"

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

  /// Probabilities of row r, indexed by token.
  [[nodiscard]] const float* row(u32 r) const noexcept { return probabilities + r * stride; }
};

namespace detail {

/// Raw logits q.k of `rows` padded query rows with one padded key, written `out_stride` apart. Two
/// rows share each key load; the bits are those of row_math::dot.
inline void dot_query_rows(const float* queries, u32 rows, const float* key, u32 padded_width,
                           float* out, u64 out_stride) noexcept {
  constexpr u32 lanes = row_math::lanes;
  u32 r = 0;
  for (; r + 2 <= rows; r += 2) {
    const float* a = queries + static_cast<u64>(r) * padded_width;
    const float* b = a + padded_width;
    float lane_a[lanes] = {};
    float lane_b[lanes] = {};
    for (u32 i = 0; i < padded_width; i += lanes) {
      for (u32 j = 0; j < lanes; ++j) lane_a[j] += a[i + j] * key[i + j];
      for (u32 j = 0; j < lanes; ++j) lane_b[j] += b[i + j] * key[i + j];
    }
    out[r * out_stride] = row_math::sum_lanes(lane_a);
    out[(r + 1) * out_stride] = row_math::sum_lanes(lane_b);
  }
  if (r < rows) {
    out[r * out_stride] =
        row_math::dot(queries + static_cast<u64>(r) * padded_width, key, padded_width);
  }
}

inline void load_padded(const Rows& rows, u32 head, u32 token, float* row, u32 padded) noexcept {
  load_row(rows, head, token, row);
  std::fill(row + rows.width, row + padded, 0.0f);
}

/// Fills tile.lse and the probabilities of the rows that the tile names.
inline void compute_tile(const CacheView& cache, u32 segment, const Queries& queries,
                         const AttentionSpec& spec, const AttentionScratch& scratch,
                         AttentionTile& tile) noexcept {
  const u32 padded = scratch.padded_width;
  tile.seen = {std::numeric_limits<u32>::max(), 0};
  for (u32 r = 0; r < tile.rows; ++r) {
    tile.visible[r] = visible_tokens(cache, segment, queries, spec, tile.query[r]);
    load_padded(queries.rows, tile.query_head[r], queries.first_row + tile.query[r],
                scratch.queries + static_cast<u64>(r) * padded, padded);
    if (tile.visible[r].begin == tile.visible[r].end) continue;
    tile.seen.begin = std::min(tile.seen.begin, tile.visible[r].begin);
    tile.seen.end = std::max(tile.seen.end, tile.visible[r].end);
  }
  if (tile.seen.end == 0) tile.seen.begin = 0;
  for (u32 r = 0; r < tile.rows; ++r) {
    TokenRange& own = tile.visible[r];
    if (own.begin == own.end) own = {tile.seen.begin, tile.seen.begin};
  }

  for (u32 first = tile.seen.begin; first < tile.seen.end; first += attention_key_tile) {
    const u32 keys = std::min(attention_key_tile, tile.seen.end - first);
    for (u32 t = 0; t < keys; ++t) {
      load_padded(cache.keys, segment, first + t, scratch.keys + static_cast<u64>(t) * padded,
                  padded);
    }
    // Few queries at a time: they stay in the first cache level while the keys pass by.
    for (u32 r = 0; r < tile.rows; r += 4) {
      const u32 rows = std::min(4u, tile.rows - r);
      u32 begin = first + keys;
      u32 end = first;
      for (u32 i = r; i < r + rows; ++i) {
        begin = std::min(begin, std::max(first, tile.visible[i].begin));
        end = std::max(end, std::min(first + keys, tile.visible[i].end));
      }
      for (u32 t = begin; t < end; ++t) {
        dot_query_rows(scratch.queries + static_cast<u64>(r) * padded, rows,
                       scratch.keys + static_cast<u64>(t - first) * padded, padded,
                       scratch.probabilities + r * scratch.stride + t, scratch.stride);
      }
    }
  }

  const float* log_mass = cache.log_mass ? cache.log_mass.segment(segment) : nullptr;
  const LogitTransform transform{spec.scale_for(cache.keys.width), spec.softcap};
  for (u32 r = 0; r < tile.rows; ++r) {
    float* row = scratch.probabilities + r * scratch.stride;
    const TokenRange own = tile.visible[r];
    const u32 head = tile.query_head[r];
    std::fill(row + tile.seen.begin, row + own.begin, 0.0f);
    std::fill(row + own.end, row + tile.seen.end, 0.0f);
    float* logits = row + own.begin;
    const u32 n = own.end - own.begin;
    transform.apply(logits, log_mass != nullptr ? log_mass + own.begin : nullptr, n);
    if (queries.lse != nullptr) {
      tile.lse[r] = queries.lse[static_cast<u64>(head) * queries.count + tile.query[r]];
      exponentiate(logits, n, tile.lse[r]);
    } else {
      tile.lse[r] =
          softmax(logits, n, spec.sink_logits != nullptr ? spec.sink_logits + head : nullptr);
    }
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
