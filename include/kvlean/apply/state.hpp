// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cmath>

#include "kvlean/core/plan.hpp"
#include "kvlean/core/ragged.hpp"
#include "kvlean/simd/move_kernels.hpp"

KVLEAN_NAMESPACE_BEGIN

/// How a slot's state follows from those of its anchor and terms.
enum class MoveRule : u8 {
  anchor,     ///< the anchor's, terms are forgotten
  sum,        ///< score sums, counts
  max,        ///< newest use, peak score
  logaddexp,  ///< logarithms of sums
};

namespace detail {

/// log(exp(a) + exp(b)) without overflow; -infinity is the neutral element.
[[nodiscard]] inline float log_add_exp(float a, float b) noexcept {
  const float high = std::max(a, b);
  const float low = std::min(a, b);
  if (std::isinf(high)) return high;
  return high + std::log1p(std::exp(low - high));
}

[[nodiscard]] inline float combine(MoveRule rule, float a, float b) noexcept {
  switch (rule) {
    case MoveRule::anchor:
      return a;
    case MoveRule::sum:
      return a + b;
    case MoveRule::max:
      return std::max(a, b);
    case MoveRule::logaddexp:
      return log_add_exp(a, b);
  }
  return a;
}

}  // namespace detail

/// Moves the caller's state of each token, one float a (segment, token), along with a plan, in
/// place: state(s, j) becomes that of slot j. Call it once for every state array, before or after
/// apply(); the plan must be one that apply() accepts. A term of several slots counts in each.
/// Errors: null_pointer, invalid_plan (arrays missing), invalid_option (all segments share one
/// array, or an unknown rule). O(slots + terms).
[[nodiscard]] inline Status apply_state(const CompressionPlan& plan, Ragged<float> state,
                                        MoveRule rule) noexcept {
  if (!state) return StatusCode::null_pointer;
  if (plan.segments == 0 || plan.length == nullptr || plan.first == nullptr ||
      (plan.anchor == nullptr && plan.num_slots() != 0)) {
    return StatusCode::invalid_plan;
  }
  if (state.first == nullptr && state.stride == 0 && plan.segments > 1) {
    return StatusCode::invalid_option;
  }
  if (rule > MoveRule::logaddexp) return StatusCode::invalid_option;
  for (u32 s = 0; s < plan.segments; ++s) {
    float* values = state.segment(s);
    if (plan.has_terms() && rule != MoveRule::anchor) {
      for (u64 slot = plan.first[s]; slot < plan.first[s + 1]; ++slot) {
        float& value = values[plan.anchor[slot]];
        for (u64 term = plan.term_begin[slot]; term < plan.term_end[slot]; ++term) {
          value = detail::combine(rule, value, values[plan.term_token[term]]);
        }
      }
    }
    const u32* anchor = plan.anchor + plan.first[s];
    simd::move_kernels().gather_values(values, anchor, 0, plan.length[s], values);
  }
  return StatusCode::ok;
}

KVLEAN_NAMESPACE_END
