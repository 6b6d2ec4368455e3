// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>

#include "kvlean/observe/attention_rows.hpp"
#include "kvlean/observe/lane_columns.hpp"
#include "kvlean/observe/tile_columns.hpp"

// What every token receives from the queries of a segment, without rows of probabilities.

KVLEAN_NAMESPACE_BEGIN
namespace detail {

/// total[t] += what rows [first, last) of the tile paid to token t, summed over the rows first:
/// long prefills are then added in two levels, which keeps float sums accurate.
inline void add_tile_rows(const AttentionTile& tile, u32 first, u32 last, float* total) noexcept {
  const u32 begin = tile.seen.begin;
  tile.kernels->add_rows({tile.row(first) + begin, tile.stride}, last - first,
                         tile.seen.end - begin, total + begin);
}

/// Adds the tile's rows of each query head to target(head) [token].
template <class Target>
void add_tile_heads(const AttentionTile& tile, Target&& target) noexcept {
  for (u32 first = 0; first < tile.rows;) {
    const u32 head = tile.query_head[first];
    u32 last = first + 1;
    while (last < tile.rows && tile.query_head[last] == head) ++last;
    add_tile_rows(tile, first, last, target(head));
    first = last;
  }
}

/// The rows of a group through tiles of probabilities, which take NaN and infinity.
template <class Target>
void add_rows_of_group(const CacheView& cache, const Queries& queries, const AttentionSpec& spec,
                       const RowGroup& group, const AttentionScratch& scratch,
                       Target&& target) noexcept {
  AttentionTile tile;
  for (u32 first = 0; first < group.rows; first += attention_query_tile) {
    tile.rows = std::min(attention_query_tile, group.rows - first);
    std::copy_n(group.query_head + first, tile.rows, tile.query_head);
    std::copy_n(group.query + first, tile.rows, tile.query);
    compute_tile(cache, group.segment, queries, spec, scratch, tile);
    add_tile_heads(tile, target);
  }
}

/// How the queries of a segment are cut into groups: several heads together where each has few
/// queries. By shape alone.
struct GroupCut {
  u32 rows = 0;   ///< of a group at most; 0: too few queries, rows go through attention tiles
  u32 heads = 1;  ///< of a group at most
  u32 groups = 0;
  u32 head_groups = 0;
  u32 query_groups = 0;

  GroupCut(const CacheView& cache, const AttentionSpec& spec, u32 group, u32 count) noexcept {
    if (count == 0 || static_cast<u64>(group) * count <= simd::few_rows) return;
    rows = tiles_for(cache, spec) != nullptr ? simd::tile_rows_limit : simd::lane_rows;
    heads = std::clamp(rows / count, 1u, group);
    head_groups = (group + heads - 1) / heads;
    query_groups = (count + rows - 1) / rows;
    groups = head_groups * query_groups;
  }
};

/// Adds the attention of group `index` of the cut to target(head)[token].
template <class Target>
void accumulate_group(const CacheView& cache, u32 segment, const Queries& queries,
                      const AttentionSpec& spec, u32 first_query, u32 last_query,
                      const GroupCut& cut, u32 index, const AttentionScratch& scratch,
                      Target&& target) noexcept {
  const u32 group_heads = queries.rows.heads / cache.segments;
  const u32 head = index / cut.query_groups * cut.heads;
  const u32 first = first_query + index % cut.query_groups * cut.rows;
  RowGroup group;
  name_rows(cache, segment, queries, spec, segment * group_heads + head,
            std::min(cut.heads, group_heads - head), first, std::min(cut.rows, last_query - first),
            group);
  const bool done = tiles_for(cache, spec) != nullptr
                        ? add_tile_columns(cache, queries, spec, group, scratch, target)
                        : add_lane_columns(cache, queries, spec, group, scratch, target);
  if (!done) add_rows_of_group(cache, queries, spec, group, scratch, target);
}

/// Adds what the queries [first_query, last_query) of query head h paid to target(h) [token], for
/// every head of the segment's group, heads ascending.
template <class Target>
void accumulate_segment(const CacheView& cache, u32 segment, const Queries& queries,
                        const AttentionSpec& spec, u32 first_query, u32 last_query,
                        const AttentionScratch& scratch, Target&& target) noexcept {
  const u32 heads = queries.rows.heads / cache.segments;
  const GroupCut cut(cache, spec, heads, last_query - first_query);
  if (cut.rows == 0) {
    for_each_attention_tile(
        cache, segment, queries, spec, first_query, last_query, scratch,
        [&target](const AttentionTile& tile) noexcept { add_tile_heads(tile, target); });
    return;
  }
  for (u32 g = 0; g < cut.groups; ++g) {
    accumulate_group(cache, segment, queries, spec, first_query, last_query, cut, g, scratch,
                     target);
  }
}

}  // namespace detail
KVLEAN_NAMESPACE_END
