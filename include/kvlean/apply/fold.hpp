// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/apply/shared_terms.hpp"
#include "kvlean/core/validate_plan.hpp"
#include "kvlean/simd/merge_kernels.hpp"

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

/// Weighted sums of one segment's rows: self * row(anchor) + weight * row(token) + .., in that
/// order, in float, with the same bits whatever the layout.
class RowBlender {
 public:
  RowBlender(const Rows& from, u32 segment) noexcept
      : from_(from), segment_(segment), address_(from, segment) {}

  /// Whether kernels can write sums to rows of `to`, without a row of floats between.
  [[nodiscard]] bool writes_rows_of(const Rows& to) const noexcept {
    return is_contiguous_row(from_) && to.store == nullptr && to.dim_stride == 1 &&
           (to.dtype == from_.dtype || to.dtype == DType::f32);
  }

  /// sum [width], in float.
  void blend(const SlotWeights& weights, float* sum) const noexcept {
    const simd::MergeKernels& kernels = simd::merge_kernels();
    const u32 width = from_.width;
    const u32* token = weights.token + weights.begin;
    const float* weight = weights.weight + weights.begin;
    u64 left = weights.end - weights.begin;
    if (is_contiguous_row(from_)) {
      const std::byte* pointers[terms_at_once];
      u32 n = at_once(left);
      kernels.weigh(
          {address_(weights.anchor), weights.self, address_.point(token, n, pointers), weight},
          from_.dtype, width, true, false, sum);
      for (left -= n; left != 0; left -= n) {
        token += n;
        weight += n;
        n = at_once(left);
        kernels.add_weighed(address_.point(token, n, pointers), weight, from_.dtype, width, sum);
      }
      return;
    }
    float row[max_row_width];
    load_row(from_, segment_, weights.anchor, row);
    kernels.weigh({row, weights.self, {}, nullptr}, DType::f32, width, true, false, sum);
    for (u64 term = 0; term < left; ++term) {
      load_row(from_, segment_, token[term], row);
      kernels.add_scaled(sum, row, weight[term], width);
    }
  }

  /// The same, rounded into row `to_token` of `to`, which may be one of the rows read. `stream` as
  /// simd::MergeKernels::weigh has it, for rows that streams() allows.
  void write(const SlotWeights& weights, const Rows& to, u32 to_token,
             bool stream = false) const noexcept {
    const u64 terms = weights.end - weights.begin;
    if (!writes_rows_of(to) || terms > terms_at_once) {
      float sum[max_row_width];
      blend(weights, sum);
      store_row(to, segment_, to_token, sum);
      return;
    }
    const std::byte* pointers[terms_at_once];
    const simd::RowPointers rows =
        address_.point(weights.token + weights.begin, static_cast<u32>(terms), pointers);
    simd::merge_kernels().weigh(
        {address_(weights.anchor), weights.self, rows, weights.weight + weights.begin}, from_.dtype,
        from_.width, to.dtype == DType::f32, stream, row_address(to, segment_, to_token));
  }

 private:
  static constexpr u32 terms_at_once = 32;
  [[nodiscard]] static u32 at_once(u64 terms) noexcept {
    return terms < terms_at_once ? static_cast<u32>(terms) : terms_at_once;
  }

  const Rows& from_;
  u32 segment_;
  RowAddresses address_;
};

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
      : plan_(plan),
        cache_(cache),
        rotation_(rotation),
        segment_(segment),
        blender_(cache.keys, segment) {}

  [[nodiscard]] bool changes(u64 slot) const noexcept {
    return key_changes(plan_, cache_, segment_, slot);
  }
  /// Whether changed slots' keys are the weighted sums of rows as they lie, and nothing else.
  [[nodiscard]] bool blends_rows() const noexcept {
    return (plan_.needs & needs_moved_keys) != 0 && !plan_.has_literal_keys() &&
           !rotation_.aligns() && !keys_turn(plan_, cache_);
  }
  /// Writes a changed slot's key into row `to_token` of `to`.
  void write(u64 slot, const Rows& to, u32 to_token, bool stream = false) noexcept {
    if (plan_.has_literal_keys()) {
      const u32 row = static_cast<u32>(slot - plan_.first[segment_]);
      copy_row(plan_.literal_keys, segment_, row, to, segment_, to_token);
      return;
    }
    const SlotWeights weights = key_weights(plan_, slot);
    const bool blends = (plan_.needs & needs_moved_keys) != 0;
    if (blends_rows()) {
      blender_.write(weights, to, to_token, stream);
      return;
    }
    float sum[max_row_width];
    if (!blends) {  // turned only
      load_row(cache_.keys, segment_, weights.anchor, sum);
      turn(anchor_turn_, slot, weights.anchor, sum);
    } else if (rotation_.aligns()) {
      blend_aligned(slot, weights, sum);
    } else {
      blender_.blend(weights, sum);
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
    const simd::MergeKernels& kernels = simd::merge_kernels();
    const u32 width = cache_.keys.width;
    float row[max_row_width];
    load_row(cache_.keys, segment_, weights.anchor, sum);
    turn(anchor_turn_, slot, weights.anchor, sum);
    kernels.weigh({sum, weights.self, {}, nullptr}, DType::f32, width, true, false, sum);
    for (u64 term = weights.begin; term < weights.end; ++term) {
      load_row(cache_.keys, segment_, weights.token[term], row);
      turn(term_turn_, slot, weights.token[term], row);
      kernels.add_scaled(sum, row, weights.weight[term], width);
    }
  }

  const CompressionPlan& plan_;
  const CacheView& cache_;
  const KeyRotation& rotation_;
  u32 segment_;
  RowBlender blender_;
  LastTurn anchor_turn_;
  LastTurn term_turn_;
};

/// Writes the values of a segment's changed slots. One a task; slots in ascending order.
class ValueWriter {
 public:
  ValueWriter(const CompressionPlan& plan, const Rows& values, u32 segment) noexcept
      : plan_(plan), segment_(segment), blender_(values, segment), shared_(plan, values, segment) {}
  ValueWriter(const ValueWriter&) = delete;
  ValueWriter& operator=(const ValueWriter&) = delete;

  [[nodiscard]] bool changes(u64 slot) const noexcept { return value_changes(plan_, slot); }
  /// Writes a changed slot's value into row `to_token` of `to`.
  void write(u64 slot, const Rows& to, u32 to_token, bool stream = false) noexcept {
    if (plan_.has_literal_values()) {
      const u32 row = static_cast<u32>(slot - plan_.first[segment_]);
      copy_row(plan_.literal_values, segment_, row, to, segment_, to_token);
      return;
    }
    if (!shares_terms(plan_, segment_, slot)) {
      blender_.write(value_weights(plan_, slot), to, to_token, stream);
    } else if (blender_.writes_rows_of(to)) {
      shared_.write(slot, slot + 1, to, to_token);
    } else {
      float sum[max_row_width];
      shared_.add(slot, sum);
      store_row(to, segment_, to_token, sum);
    }
  }
  /// Slots from `slot` to `end`, at most, that have terms in common one with the next, for ranges
  /// that move ahead; 1 where there is none.
  [[nodiscard]] u32 run_of(u64 slot, u64 end) const noexcept {
    u64 last = slot;
    while (last + 1 < end && plan_.term_begin[last + 1] < plan_.term_end[last]) ++last;
    return static_cast<u32>(last + 1 - slot);
  }
  /// Writes the values of such slots, two or more, into rows of `to` from `to_token` on; rows are
  /// bytes on both sides.
  void write_run(u64 slot, u32 count, const Rows& to, u32 to_token) noexcept {
    shared_.write(slot, slot + count, to, to_token);
  }

 private:
  const CompressionPlan& plan_;
  u32 segment_;
  RowBlender blender_;
  SharedTerms shared_;
};

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
  ValueWriter values(plan, cache.values, segment);
  for (u64 slot = plan.first[segment]; slot < plan.first[segment + 1]; ++slot) {
    const u32 anchor = plan.anchor[slot];
    if (keys.changes(slot)) keys.write(slot, cache.keys, anchor);
    if (values.changes(slot)) values.write(slot, cache.values, anchor);
  }
}

}  // namespace detail
KVLEAN_NAMESPACE_END
