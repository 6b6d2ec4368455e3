// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <limits>

#include "kvlean/attention/attend_tile.hpp"
#include "kvlean/core/executor.hpp"

KVLEAN_NAMESPACE_BEGIN
namespace detail {

[[nodiscard]] inline Status attend_view(const Queries& queries, const CacheView& cache,
                                        const AttentionSpec& spec, const AttentionOutput& output,
                                        const Executor& executor) noexcept {
  KVLEAN_RETURN_IF_ERROR(check_attention(queries, cache, spec, output));
  const u64 rows = static_cast<u64>(queries.rows.heads / cache.segments) * queries.count;
  const u32 step = AttendTile::query_rows(cache);
  const u64 tiles = (rows + step - 1) / step;
  if (tiles * cache.segments > std::numeric_limits<u32>::max()) return StatusCode::invalid_shape;
  parallel_for(executor, static_cast<u32>(tiles * cache.segments), [&](u32, u32 index) noexcept {
    const u64 first_row = index % tiles * step;
    AttendTile tile(queries, cache, spec, output);
    tile.run(static_cast<u32>(index / tiles), first_row,
             static_cast<u32>(std::min<u64>(step, rows - first_row)));
  });
  return StatusCode::ok;
}

}  // namespace detail

/// Softmax attention of every query over its segment, as `spec` says, ragged lengths and log mass
/// included: query head h reads KV head h / group_size, where group_size is query heads / KV heads.
///   logit(t)  = softcap(scale * q.k_t) + log_mass_t
///   Z         = sum_t exp(logit(t)) [+ exp(sink)]
///   output    = sum_t exp(logit(t)) v_t / Z,   lse = log Z
/// over the tokens t that the query's mask and the sliding window leave. Positions must ascend, for
/// tokens (see CacheView) and queries; in a cache without positions the index is the position, and
/// queries without any are the newest `count` tokens of each segment. A query that sees nothing
/// gets zeros and -inf, or its sink's logit; NaN and infinity in the data show in the results.
/// `output.values` may be null when only the LSE is wanted: then no value row is read.
///
/// float arithmetic, Z summed in double over tiles; any layout and storage type. The output must
/// not overlap the cache or the queries. No allocation: about 62 KiB of stack a worker. A loaded
/// K/V row serves up to 32 query rows of its group; work is split by shape, so the bits do not
/// depend on the executor. O(query_heads * count * visible tokens * (key width + value width)).
///
/// Errors, all found before anything is written: those of check_cache and check_queries (no
/// queries: missing_observation), null_pointer (no output at all), invalid_option (scale or softcap
/// not finite, softcap negative), invalid_shape (more than 2^32 tiles).
template <Cache C>
[[nodiscard]] Status attend(const Queries& queries, const C& cache, const AttentionSpec& spec,
                            const AttentionOutput& output, const Executor& executor = {}) noexcept {
  return detail::attend_view(queries, view_of(cache), spec, output, executor);
}

/// The same with the default AttentionSpec: scale 1 / sqrt(key width), nothing else.
template <Cache C>
[[nodiscard]] Status attend(const Queries& queries, const C& cache, const AttentionOutput& output,
                            const Executor& executor = {}) noexcept {
  return detail::attend_view(queries, view_of(cache), AttentionSpec{}, output, executor);
}

KVLEAN_NAMESPACE_END
