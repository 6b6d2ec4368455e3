// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "kvlean/core/executor.hpp"
#include "kvlean/observe/attention_columns.hpp"

// Summing attention where there are few segments: each is cut into parts, by shape alone, so that
// threads share one segment and the bits do not depend on them.

KVLEAN_NAMESPACE_BEGIN
namespace detail {

/// How the work on every segment is cut. `totals`: arrays of sums a segment has.
struct MassCut {
  static constexpr u32 tasks = 8;          ///< to aim at
  static constexpr u32 least_keys = 4096;  ///< of a part, where keys are cut

  GroupCut groups;
  u32 parts = 1;
  bool by_keys = false;  ///< one group of rows: parts of the keys, else of the groups

  MassCut(const CacheView& cache, const Queries& queries, const AttentionSpec& spec,
          u32 totals) noexcept
      : groups(cache, spec, queries.rows.heads / cache.segments, queries.count) {
    const u32 wanted = (tasks + cache.segments - 1) / cache.segments;
    if (groups.rows == 0) return;
    by_keys = groups.groups == 1 && tiles_for(cache, spec) != nullptr;
    parts = by_keys ? std::min(wanted, cache.max_length() / least_keys)
                    : std::min(groups.groups, wanted / totals);
    parts = std::max(parts, 1u);
  }
  /// Arrays of sums that a segment's parts write.
  [[nodiscard]] u32 arrays() const noexcept { return by_keys ? 1 : parts; }
};

/// Part `part` of the tokens that the group sees.
[[nodiscard]] inline TokenRange key_part(const RowGroup& group, u32 part, u32 parts) noexcept {
  const TokenRange all = tile_range(group);
  const u32 runs = (all.end - all.begin + simd::tile_keys_limit - 1) / simd::tile_keys_limit;
  const u32 step = (runs + parts - 1) / parts * simd::tile_keys_limit;
  const auto bound = [&](u32 i) noexcept {
    return static_cast<u32>(std::min<u64>(all.end, all.begin + static_cast<u64>(i) * step));
  };
  return {bound(part), bound(part + 1)};
}

/// Joins the softmax states of `parts` copies of a group, each over its own keys, in the first.
inline void join_parts(RowGroup* group, u32 parts) noexcept {
  constexpr float inf = std::numeric_limits<float>::infinity();
  for (u32 r = 0; r < group[0].rows; ++r) {
    float least = inf;  // of the shifts' negatives
    for (u32 p = 0; p < parts; ++p) {
      if (group[p].minus_shift[r] != -inf) least = std::min(least, group[p].minus_shift[r]);
    }
    double sum = 0.0;
    for (u32 p = 0; p < parts; ++p) {
      const float own = group[p].minus_shift[r];
      sum += group[p].sum[r] *
             (own == -inf ? 1.0 : std::exp2(static_cast<double>(least) - static_cast<double>(own)));
    }
    group[0].minus_shift[r] = least == inf ? -inf : least;
    group[0].sum[r] = sum;
  }
}

/// Adds the attention of every segment's one group of rows to total(segment, head)[token], parts of
/// the keys side by side. `states` [segments * parts].
template <class Total>
void accumulate_by_keys(const CacheView& cache, const Queries& queries, const AttentionSpec& spec,
                        const MassCut& cut, const AttentionScratchPool& pool,
                        const Executor& executor, RowGroup* states, Total&& total) noexcept {
  const u32 heads = queries.rows.heads / cache.segments;
  const u32 tasks = cache.segments * cut.parts;
  parallel_for(executor, tasks, [&](u32 worker, u32 task) noexcept {
    RowGroup& group = states[task];
    const u32 segment = task / cut.parts;
    name_rows(cache, segment, queries, spec, segment * heads, heads, 0, queries.count, group);
    if (queries.lse != nullptr) return;
    TileGroup tiles(cache, queries, spec, group, pool.scratch(pool.of_task(worker, task)));
    tiles.add_sums(key_part(group, task % cut.parts, cut.parts));
  });
  for (u32 s = 0; s < cache.segments && queries.lse == nullptr; ++s) {
    RowGroup* own = states + static_cast<std::size_t>(s) * cut.parts;
    join_parts(own, cut.parts);
    own[0].unset = close_rows(spec, own[0]) ? 0 : 1;  // from here on: whether tiles cannot do it
  }
  parallel_for(executor, tasks, [&](u32 worker, u32 task) noexcept {
    const u32 segment = task / cut.parts;
    const u32 part = task % cut.parts;
    RowGroup group = states[segment * cut.parts];
    const AttentionScratch scratch = pool.scratch(pool.of_task(worker, task));
    const auto target = [&](u32 head) noexcept { return total(segment, head); };
    if (group.unset != 0) {
      if (part == 0) add_rows_of_group(cache, queries, spec, group, scratch, target);
      return;
    }
    TileGroup tiles(cache, queries, spec, group, scratch);
    tiles.add_columns(key_part(group, part, cut.parts), target);
  });
}

}  // namespace detail
KVLEAN_NAMESPACE_END
