// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/core/validate_plan.hpp"
#include "kvlean/simd/row_math.hpp"

// The blend of a slot's anchor and terms. In place and out of place call the same functions, which
// is why their results are the same bits.

KVLEAN_NAMESPACE_BEGIN
namespace detail {

/// A slot's weights for one of K and V.
struct SlotWeights {
  u32 anchor = 0;
  float self = 1.0f;
  u64 begin = 0;  ///< term range
  u64 end = 0;
  const u32* token = nullptr;
  const float* weight = nullptr;
};

[[nodiscard]] inline SlotWeights key_weights(const CompressionPlan& plan, u64 slot) noexcept {
  SlotWeights weights{plan.anchor[slot], plan.key_self_weight(slot), 0, 0, plan.term_token,
                      plan.term_weight};
  if (plan.has_terms()) {
    weights.begin = plan.term_begin[slot];
    weights.end = plan.term_end[slot];
  }
  return weights;
}
[[nodiscard]] inline SlotWeights value_weights(const CompressionPlan& plan, u64 slot) noexcept {
  SlotWeights weights = key_weights(plan, slot);
  weights.self = plan.value_self_weight(slot);
  if (plan.term_value_weight != nullptr) weights.weight = plan.term_value_weight;
  return weights;
}

/// sum [width] = self * row(anchor) + sum of weight * row(token), in that order, in float.
inline void blend(const Rows& rows, u32 segment, const SlotWeights& weights, float* sum) noexcept {
  float row[max_row_width];
  load_row(rows, segment, weights.anchor, sum);
  row_math::scale(sum, weights.self, rows.width);
  for (u64 term = weights.begin; term < weights.end; ++term) {
    load_row(rows, segment, weights.token[term], row);
    row_math::add_scaled(sum, row, weights.weight[term], rows.width);
  }
}

/// Writes a changed slot's key into row `to_token` of `to`.
inline void write_key(const CompressionPlan& plan, const Rows& keys, u32 segment, u64 slot,
                      const Rows& to, u32 to_token) noexcept {
  if (plan.has_literal_keys()) {
    const u32 row = static_cast<u32>(slot - plan.first[segment]);
    copy_row(plan.literal_keys, segment, row, to, segment, to_token);
    return;
  }
  float sum[max_row_width];
  blend(keys, segment, key_weights(plan, slot), sum);
  store_row(to, segment, to_token, sum);
}
/// Writes a changed slot's value into row `to_token` of `to`.
inline void write_value(const CompressionPlan& plan, const Rows& values, u32 segment, u64 slot,
                        const Rows& to, u32 to_token) noexcept {
  if (plan.has_literal_values()) {
    const u32 row = static_cast<u32>(slot - plan.first[segment]);
    copy_row(plan.literal_values, segment, row, to, segment, to_token);
    return;
  }
  float sum[max_row_width];
  blend(values, segment, value_weights(plan, slot), sum);
  store_row(to, segment, to_token, sum);
}

/// Writes the changed slots of a segment at their anchors' rows. No blend reads a row that another
/// one writes, because a token is an anchor or a term, never both.
inline void fold_segment(const CompressionPlan& plan, const CacheView& cache,
                         u32 segment) noexcept {
  constexpr u32 rewrites = needs_moved_keys | needs_changed_values;
  if ((plan.needs & rewrites) == 0) return;
  for (u64 slot = plan.first[segment]; slot < plan.first[segment + 1]; ++slot) {
    const u32 anchor = plan.anchor[slot];
    if (key_changes(plan, slot)) write_key(plan, cache.keys, segment, slot, cache.keys, anchor);
    if (value_changes(plan, slot)) {
      write_value(plan, cache.values, segment, slot, cache.values, anchor);
    }
  }
}

}  // namespace detail
KVLEAN_NAMESPACE_END
