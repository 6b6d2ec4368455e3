// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/core/plan.hpp"
#include "kvlean/cuda/workspace.cuh"

KVLEAN_CUDA_NAMESPACE_BEGIN

/// CompressionPlan (core/plan.hpp) for all segments of a step, in device memory. It means exactly
/// what that one means, slot by slot; only where things lie differs, because the host does not know
/// the counts: each segment has room for `slot_stride` slots and `term_stride` terms.
///   slot j of segment s  entry s * slot_stride + j of the per-slot arrays, j < length[s]
///   term i of segment s  entry s * term_stride + i of the per-term arrays
///   terms of a slot      [term_begin, term_end) counts from the segment's own first term
/// Optional arrays are null when absent, for all segments alike. `needs` is what the host knows:
/// a bit may be set without need, needs_ragged_lengths always when lengths may differ. Plain data,
/// passed to kernels by value.
struct PlanView {
  u32 segments = 0;
  u32 needs = needs_nothing;  ///< PlanNeeds bits
  u32 max_slots = 0;          ///< no length is above this; at most slot_stride
  u64 slot_stride = 0;
  u64 term_stride = 0;
  u32* length = nullptr;               ///< [segments]
  u32* anchor = nullptr;               ///< ascending within a segment
  float* log_mass = nullptr;           ///< or null: anchors keep theirs
  i32* position = nullptr;             ///< or null: anchors keep theirs
  float* self_weight = nullptr;        ///< or null: 1
  float* self_value_weight = nullptr;  ///< or null: self_weight
  u32* term_begin = nullptr;           ///< or null: no terms
  u32* term_end = nullptr;
  u32* term_token = nullptr;
  float* term_weight = nullptr;
  float* term_value_weight = nullptr;  ///< or null: term_weight
  u32* slots_evicted = nullptr;        ///< [segments] or null
  u32 page_tokens = 0;                 ///< > 0: anchors are whole pages of this many tokens
  i32 next_position = -1;  ///< every sequence's next position from then on; negative: as it is

  [[nodiscard]] KVLEAN_HOST_DEVICE u64 slot(u32 segment, u32 j) const noexcept {
    return static_cast<u64>(segment) * slot_stride + j;
  }
  [[nodiscard]] KVLEAN_HOST_DEVICE u64 term(u32 segment, u32 i) const noexcept {
    return static_cast<u64>(segment) * term_stride + i;
  }
  [[nodiscard]] KVLEAN_HOST_DEVICE bool has_terms() const noexcept { return term_begin != nullptr; }
  // By entry, as from slot() and term().
  [[nodiscard]] KVLEAN_DEVICE float key_self_weight(u64 entry) const noexcept {
    return self_weight != nullptr ? self_weight[entry] : 1.0f;
  }
  [[nodiscard]] KVLEAN_DEVICE float value_self_weight(u64 entry) const noexcept {
    return self_value_weight != nullptr ? self_value_weight[entry] : key_self_weight(entry);
  }
  [[nodiscard]] KVLEAN_DEVICE float value_term_weight(u64 entry) const noexcept {
    return term_value_weight != nullptr ? term_value_weight[entry] : term_weight[entry];
  }
};

/// Room that a plan is given. Slots of plain eviction cost 4 bytes.
struct PlanShape {
  u32 segments = 0;
  u32 max_slots = 0;  ///< slots of a segment at most
  u32 max_terms = 0;  ///< terms of a segment at most; 0: no terms
  bool log_mass = false;
  bool position = false;
  bool values_differ = false;  ///< term_value_weight and self_value_weight too
  bool slots_evicted = false;
};

/// Lays a plan out in the workspace: pointers only, the contents are for a reducer to write. Check
/// workspace.status() afterwards.
[[nodiscard]] inline PlanView take_plan(const PlanShape& shape, Workspace& workspace) noexcept {
  PlanView plan;
  plan.segments = shape.segments;
  plan.needs = needs_ragged_lengths;
  plan.max_slots = shape.max_slots;
  plan.slot_stride = ceil_div(u64{shape.max_slots}, u64{4}) * 4;  // 16-byte aligned segments
  plan.term_stride = ceil_div(u64{shape.max_terms}, u64{4}) * 4;
  const std::size_t slots = shape.segments * plan.slot_stride;
  const std::size_t terms = shape.segments * plan.term_stride;
  plan.length = workspace.take<u32>(shape.segments);
  plan.anchor = workspace.take<u32>(slots);
  if (shape.log_mass) {
    plan.log_mass = workspace.take<float>(slots);
    plan.needs |= needs_log_mass;
  }
  if (shape.position) {
    plan.position = workspace.take<i32>(slots);
    plan.needs |= needs_new_positions;
  }
  if (shape.max_terms != 0) {
    plan.self_weight = workspace.take<float>(slots);
    plan.term_begin = workspace.take<u32>(slots);
    plan.term_end = workspace.take<u32>(slots);
    plan.term_token = workspace.take<u32>(terms);
    plan.term_weight = workspace.take<float>(terms);
    plan.needs |= needs_changed_values;
    if (shape.values_differ) {
      plan.self_value_weight = workspace.take<float>(slots);
      plan.term_value_weight = workspace.take<float>(terms);
    }
  }
  if (shape.slots_evicted) plan.slots_evicted = workspace.take<u32>(shape.segments);
  return plan;
}
[[nodiscard]] inline std::size_t bytes_required(const PlanShape& shape) noexcept {
  Workspace counting = Workspace::counting();
  static_cast<void>(take_plan(shape, counting));
  return counting.bytes_required();
}

KVLEAN_CUDA_NAMESPACE_END
