// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/core/concepts.hpp"

KVLEAN_NAMESPACE_BEGIN
namespace detail {

/// What every scorer checks first: a sound cache, and Scores that are allocated for it.
/// O(segments + pages).
[[nodiscard]] inline Status check_scores(const CacheView& cache, const Scores& scores,
                                         bool writes_mass) noexcept {
  KVLEAN_RETURN_IF_ERROR(check_cache(cache));
  if (scores.segments != cache.segments) return StatusCode::shape_mismatch;
  if (scores.lengths == nullptr || !scores.rank) return StatusCode::null_pointer;
  if (writes_mass && !scores.mass) return StatusCode::null_pointer;
  for (u32 s = 0; s < cache.segments; ++s) {
    if (scores.length(s) != cache.length(s)) return StatusCode::shape_mismatch;
  }
  return StatusCode::ok;
}

/// The queries of a window scorer: the window, or the reference queries where no window was given.
[[nodiscard]] inline const Queries& window_queries(const Observation& seen) noexcept {
  return seen.window ? seen.window : seen.reference;
}

}  // namespace detail
KVLEAN_NAMESPACE_END
