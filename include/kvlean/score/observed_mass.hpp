// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cmath>

#include "kvlean/core/concepts.hpp"
#include "kvlean/observe/attention_mass.hpp"
#include "kvlean/observe/visibility.hpp"
#include "kvlean/score/preconditions.hpp"

KVLEAN_NAMESPACE_BEGIN
namespace detail {

/// Counts, for every token, the queries [first_query, last_query) that could see it. `seen_by`
/// [length + 1]. O(queries + length).
inline void count_observers(const CacheView& cache, u32 segment, const Queries& queries,
                            const AttentionSpec& attention, u32 first_query, u32 last_query,
                            u32* seen_by) noexcept {
  const u32 length = cache.length(segment);
  std::fill_n(seen_by, std::size_t{length}, 0u);
  // Differences first: wrapping arithmetic, the running sum is never negative.
  for (u32 i = first_query; i < last_query; ++i) {
    const TokenRange range = visible_tokens(cache, segment, queries, attention, i);
    if (range.begin < length) ++seen_by[range.begin];
    if (range.end < length) --seen_by[range.end];
  }
  for (u32 t = 1; t < length; ++t) seen_by[t] += seen_by[t - 1];
}

/// Sets scores.observers, where the caller of the scorer gave room for it, from the queries that
/// mass was summed over.
inline void set_observers(const CacheView& cache, const Queries& queries,
                          const AttentionSpec& attention, u32 first_query, u32 last_query,
                          Scores& scores) noexcept {
  scores.has_observers = static_cast<bool>(scores.observers);
  for (u32 s = 0; scores.has_observers && s < cache.segments; ++s) {
    count_observers(cache, s, queries, attention, first_query, last_query,
                    scores.observers.segment(s));
  }
}

/// Queries that saw a token whose mass is ready-made: those that came at or after it, at most
/// `observers` (0: any number). Known where positions are, or where nothing was dropped yet.
[[nodiscard]] inline u32 ready_made_observers(const CacheView& cache, u32 segment, u32 token,
                                              u32 observers) noexcept {
  const i64 newer = cache.positions
                        ? static_cast<i64>(cache.next_position) - cache.position(segment, token)
                        : static_cast<i64>(cache.length(segment)) - static_cast<i64>(token);
  const i64 most = observers != 0 ? static_cast<i64>(observers) : newer;
  return static_cast<u32>(std::max<i64>(std::min(newer, most), 1));
}

/// A count of queries that is kept as a float: rounded, at least 1; NaN is 1.
[[nodiscard]] inline u32 whole_observers(float count) noexcept {
  if (!(count >= 1.0f)) return 1;
  constexpr float most = 4294967040.0f;  // the largest float that a u32 can hold
  return static_cast<u32>(std::floor(static_cast<double>(std::min(count, most)) + 0.5));
}

/// scores.mass becomes the attention received: seen.mass where given, else the sum over the
/// reference queries.
[[nodiscard]] inline Status observe_mass_into(const CacheView& cache, const Observation& seen,
                                              GroupReduction group, Context& context,
                                              Scores& scores) noexcept {
  if (seen.mass) {
    for (u32 s = 0; s < cache.segments; ++s) {
      std::copy_n(seen.mass.segment(s), cache.length(s), scores.mass.segment(s));
    }
    scores.has_mass = scores.mass_is_accumulated = true;
    if (seen.mass_observers) {
      scores.has_observers = static_cast<bool>(scores.observers);
      for (u32 s = 0; scores.has_observers && s < cache.segments; ++s) {
        std::transform(seen.mass_observers.segment(s),
                       seen.mass_observers.segment(s) + cache.length(s),
                       scores.observers.segment(s), whole_observers);
      }
      return StatusCode::ok;
    }
    // Without positions a compressed cache does not tell how old a token is.
    const bool whole = cache.positions || static_cast<i64>(cache.next_position) ==
                                              static_cast<i64>(cache.max_length());
    scores.has_observers = scores.observers && seen.observers != 0 && whole;
    for (u32 s = 0; scores.has_observers && s < cache.segments; ++s) {
      for (u32 t = 0; t < cache.length(s); ++t) {
        scores.observers(s, t) = ready_made_observers(cache, s, t, seen.observers);
      }
    }
    return StatusCode::ok;
  }
  KVLEAN_RETURN_IF_ERROR(check_queries(seen.reference, cache));
  for (u32 s = 0; s < cache.segments; ++s) {
    std::fill_n(scores.mass.segment(s), cache.length(s), 0.0f);
  }
  KVLEAN_RETURN_IF_ERROR(accumulate_attention(cache, seen.reference, seen.attention, group,
                                              context.workspace, context.options.executor,
                                              scores.mass));
  scores.has_mass = scores.mass_is_accumulated = true;
  set_observers(cache, seen.reference, seen.attention, 0, seen.reference.count, scores);
  return StatusCode::ok;
}

}  // namespace detail
KVLEAN_NAMESPACE_END
