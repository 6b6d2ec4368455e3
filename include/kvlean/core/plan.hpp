// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/core/rows.hpp"

KVLEAN_NAMESPACE_BEGIN

/// What a plan asks of the place it is carried out in, as bits.
enum PlanNeeds : u32 {
  needs_nothing = 0,
  needs_ragged_lengths = 1u << 0,  ///< heads end with different lengths
  needs_log_mass = 1u << 1,        ///< slots carry a logit bias
  needs_moved_keys = 1u << 2,      ///< key rows are rewritten, not just selected
  needs_changed_values = 1u << 3,  ///< value rows are rewritten
  needs_new_positions = 1u << 4,   ///< slots get positions of their own
  needs_aligned_terms = 1u << 5,   ///< each term's key is turned to its slot's position first
};

/// What to do to one layer, as data. Pointers lead into the workspace it was planned in; the struct
/// owns nothing and can be copied, printed, checked (validate_plan) and carried out by any backend.
///
/// Slot j of segment s is entry first[s] + j of the per-slot arrays, j < length[s]. Its anchor is a
/// token of the segment, strictly ascending within it; by default the slot is that token unchanged:
/// key, value, position, log mass. Optional arrays (null: absent) change that:
///   term_begin/term_end  the slot's terms, a range of the per-term arrays; ranges may overlap
///   value = self_value_weight * V[anchor] + sum of value_weight(term) * V[term_token]
///   key   = with needs_moved_keys: self_weight * K[anchor] + sum of term_weight * K[term_token];
///           without it: K[anchor] unchanged
/// where a null self_weight means 1, a null self_value_weight means self_weight, and a null
/// term_value_weight means term_weight. A slot without terms has weight 1 on its anchor unless
/// self_weight says otherwise. A token is an anchor or a term, never both. Terms may lie anywhere
/// in the same segment. Literal rows (fitted keys or values), when present, replace the blend: row
/// j of head s of `literal_keys` / `literal_values` is slot j's key / value.
///
/// Positions and rotation. Without `position` a slot stands where its anchor does; with it, slot j
/// stands at the position given, ascending within a segment. When the cache knows its rotation
/// (CacheView::rope), keys follow, in float and before the one rounding of the store:
///   without needs_aligned_terms  the blend of keys as they lie is turned by
///                                slot position - anchor position, so merging and renumbering
///                                commute; without `position` nothing is turned
///   with needs_aligned_terms     each source is turned by slot position - its own position, then
///                                blended; without `position` the anchor is not turned
/// Literal keys are at the slot's position already. A slot that neither blends nor turns keeps its
/// anchor's bits.
/// Without a rotation, `position` renumbers the positions array only, and needs_aligned_terms is
/// refused. Values are never turned.
struct CompressionPlan {
  u32 segments = 0;
  u32 needs = needs_nothing;     ///< PlanNeeds bits
  u32* length = nullptr;         ///< [segments] slots of each segment
  u64* first = nullptr;          ///< [segments + 1] slot offsets; first[segments] = slots in all
  u32* anchor = nullptr;         ///< [slots]
  float* log_mass = nullptr;     ///< [slots] or null: anchors keep theirs
  i32* position = nullptr;       ///< [slots] or null: anchors keep theirs
  float* self_weight = nullptr;  ///< [slots] or null
  float* self_value_weight = nullptr;  ///< [slots] or null
  u64* term_begin = nullptr;           ///< [slots] or null: no terms
  u64* term_end = nullptr;             ///< [slots]
  u64 num_terms = 0;
  u32* term_token = nullptr;           ///< [num_terms] token within the slot's segment
  float* term_weight = nullptr;        ///< [num_terms]
  float* term_value_weight = nullptr;  ///< [num_terms] or null
  Rows literal_keys = {};              ///< heads = segments; data and load null: absent
  Rows literal_values = {};
  u32 page_tokens = 0;           ///< > 0: anchors are whole pages of this many tokens
  u32* slots_evicted = nullptr;  ///< [segments] or null: slots dropped after all merges were used
  i32 next_position = -1;        ///< the cache's next position from then on; negative: as it is

  [[nodiscard]] u64 num_slots() const noexcept { return segments == 0 ? 0 : first[segments]; }
  [[nodiscard]] bool has_terms() const noexcept { return term_begin != nullptr; }
  [[nodiscard]] bool has_literal_keys() const noexcept {
    return literal_keys.data != nullptr || literal_keys.load != nullptr;
  }
  [[nodiscard]] bool has_literal_values() const noexcept {
    return literal_values.data != nullptr || literal_values.load != nullptr;
  }
  [[nodiscard]] float key_self_weight(u64 slot) const noexcept {
    return self_weight != nullptr ? self_weight[slot] : 1.0f;
  }
  [[nodiscard]] float value_self_weight(u64 slot) const noexcept {
    return self_value_weight != nullptr ? self_value_weight[slot] : key_self_weight(slot);
  }
  [[nodiscard]] float value_term_weight(u64 term) const noexcept {
    return term_value_weight != nullptr ? term_value_weight[term] : term_weight[term];
  }
};

KVLEAN_NAMESPACE_END
