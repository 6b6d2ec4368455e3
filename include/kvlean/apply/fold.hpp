// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/core/validate_plan.hpp"
#include "kvlean/simd/row_math.hpp"

// The blend of a slot's anchor and terms, turned to the slot's position. In place and out of place
// call the same functions, which is why their results are the same bits.

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

/// The rotation that a plan asks for, prepared once an apply; the plan must be valid.
class KeyRotation {
 public:
  KeyRotation(const CompressionPlan& plan, const CacheView& cache) noexcept
      : aligns_((plan.needs & needs_aligned_terms) != 0) {
    if (!aligns_ && !keys_turn(plan, cache)) return;
    // validate_plan has checked the spec, and that there is one.
    static_cast<void>(rotation_.prepare(*cache.rope, cache.keys.width).ok());
  }
  /// Whether terms are turned to their slot before the blend.
  [[nodiscard]] bool aligns() const noexcept { return aligns_; }
  /// Turns nothing unless the plan asks for it.
  [[nodiscard]] const RopeRotation& rotation() const noexcept { return rotation_; }

 private:
  bool aligns_;
  RopeRotation rotation_;
};

/// A turn that is prepared again only when the shift changes: neighbours mostly share one.
class LastTurn {
 public:
  void rotate(const RopeRotation& rotation, i64 shift, float* row) noexcept {
    if (shift == 0) return;  // bits stay
    if (shift != shift_) rotation.turn_by(shift, turn_);
    shift_ = shift;
    rotation.rotate(turn_, row);
  }

 private:
  i64 shift_ = 0;
  RopeTurn turn_;
};

/// Writes the keys of a segment's changed slots. One a task; `keys` as they lie before anything
/// moves, positions too.
class KeyWriter {
 public:
  KeyWriter(const CompressionPlan& plan, const CacheView& cache, const KeyRotation& rotation,
            u32 segment) noexcept
      : plan_(plan), cache_(cache), rotation_(rotation), segment_(segment) {}

  [[nodiscard]] bool changes(u64 slot) const noexcept {
    return key_changes(plan_, cache_, segment_, slot);
  }
  /// Writes a changed slot's key into row `to_token` of `to`.
  void write(u64 slot, const Rows& to, u32 to_token) noexcept {
    if (plan_.has_literal_keys()) {
      const u32 row = static_cast<u32>(slot - plan_.first[segment_]);
      copy_row(plan_.literal_keys, segment_, row, to, segment_, to_token);
      return;
    }
    float sum[max_row_width];
    const SlotWeights weights = key_weights(plan_, slot);
    if ((plan_.needs & needs_moved_keys) == 0) {  // turned only
      load_row(cache_.keys, segment_, weights.anchor, sum);
      turn(anchor_turn_, slot, weights.anchor, sum);
    } else if (rotation_.aligns()) {
      blend_aligned(slot, weights, sum);
    } else {
      blend(cache_.keys, segment_, weights, sum);
      turn(anchor_turn_, slot, weights.anchor, sum);
    }
    store_row(to, segment_, to_token, sum);
  }

 private:
  /// Moves a row from `token`'s position to the slot's.
  void turn(LastTurn& last, u64 slot, u32 token, float* row) noexcept {
    const i64 shift =
        i64{slot_position(plan_, cache_, segment_, slot)} - i64{cache_.position(segment_, token)};
    last.rotate(rotation_.rotation(), shift, row);
  }
  void blend_aligned(u64 slot, const SlotWeights& weights, float* sum) noexcept {
    const u32 width = cache_.keys.width;
    float row[max_row_width];
    load_row(cache_.keys, segment_, weights.anchor, sum);
    turn(anchor_turn_, slot, weights.anchor, sum);
    row_math::scale(sum, weights.self, width);
    for (u64 term = weights.begin; term < weights.end; ++term) {
      load_row(cache_.keys, segment_, weights.token[term], row);
      turn(term_turn_, slot, weights.token[term], row);
      row_math::add_scaled(sum, row, weights.weight[term], width);
    }
  }

  const CompressionPlan& plan_;
  const CacheView& cache_;
  const KeyRotation& rotation_;
  u32 segment_;
  LastTurn anchor_turn_;
  LastTurn term_turn_;
};

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

/// Whether carrying out a plan may write rows before any moves.
[[nodiscard]] inline bool rewrites_rows(const CompressionPlan& plan,
                                        const CacheView& cache) noexcept {
  constexpr u32 rewrites = needs_moved_keys | needs_changed_values;
  return (plan.needs & rewrites) != 0 || keys_turn(plan, cache);
}

/// Writes the changed slots of a segment at their anchors' rows. No blend reads a row that another
/// one writes, because a token is an anchor or a term, never both.
inline void fold_segment(const CompressionPlan& plan, const CacheView& cache,
                         const KeyRotation& rotation, u32 segment) noexcept {
  if (!rewrites_rows(plan, cache)) return;
  KeyWriter keys(plan, cache, rotation, segment);
  for (u64 slot = plan.first[segment]; slot < plan.first[segment + 1]; ++slot) {
    const u32 anchor = plan.anchor[slot];
    if (keys.changes(slot)) keys.write(slot, cache.keys, anchor);
    if (value_changes(plan, slot)) {
      write_value(plan, cache.values, segment, slot, cache.values, anchor);
    }
  }
}

}  // namespace detail
KVLEAN_NAMESPACE_END
