// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>

#include "kvlean/core/concepts.hpp"
#include "kvlean/observe/attention_mass.hpp"
#include "kvlean/score/preconditions.hpp"

KVLEAN_NAMESPACE_BEGIN
namespace detail {

/// scores.mass becomes the attention received: seen.mass where given, else the sum over the
/// reference queries.
[[nodiscard]] inline Status observe_mass_into(const CacheView& cache, const Observation& seen,
                                              GroupReduction group, Context& context,
                                              Scores& scores) noexcept {
  if (seen.mass) {
    for (u32 s = 0; s < cache.segments; ++s) {
      std::copy_n(seen.mass.segment(s), cache.length(s), scores.mass.segment(s));
    }
    scores.has_mass = true;
    scores.observers = seen.observers;
    return StatusCode::ok;
  }
  KVLEAN_RETURN_IF_ERROR(check_queries(seen.reference, cache));
  for (u32 s = 0; s < cache.segments; ++s) {
    std::fill_n(scores.mass.segment(s), cache.length(s), 0.0f);
  }
  KVLEAN_RETURN_IF_ERROR(accumulate_attention(cache, seen.reference, seen.attention, group,
                                              context.workspace, context.options.executor,
                                              scores.mass));
  scores.has_mass = true;
  scores.observers = seen.reference.mask == Mask::causal ? seen.reference.count : 0;
  return StatusCode::ok;
}

}  // namespace detail
KVLEAN_NAMESPACE_END
