// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>

#include "kvlean/apply/state.hpp"

KVLEAN_NAMESPACE_BEGIN

/// Whether a plan's slots stand for their terms from now on: what was a blend of several tokens
/// receives the attention that they would have received together. Where the slot's own value stays
/// whole and pieces of others are only added to it (CaM), keys and logits are as before and so is
/// the attention the slot receives: it stands for its anchor alone. O(1).
[[nodiscard]] inline bool slots_stand_for_terms(const CompressionPlan& plan) noexcept {
  const bool blends = plan.self_weight != nullptr || plan.self_value_weight != nullptr;
  return plan.has_terms() && (blends || (plan.needs & (needs_moved_keys | needs_log_mass)) != 0);
}

/// Whether some term is a part of several slots. O(slots).
[[nodiscard]] inline bool terms_are_shared(const CompressionPlan& plan) noexcept {
  u64 uses = 0;
  for (u64 slot = 0; plan.has_terms() && slot < plan.num_slots(); ++slot) {
    uses += plan.term_end[slot] - plan.term_begin[slot];
  }
  return uses > plan.num_terms;
}

/// apply_state() for what slots accumulated (attention mass, token counts): with MoveRule::sum the
/// total over slots and dropped tokens stays what it was. A term of several slots is shared among
/// them in equal parts, and slots that do not stand for their terms keep their anchor's state.
/// `shares` is scratch [plan.num_terms], read only where terms_are_shared(); null otherwise.
/// Errors: those of apply_state. O(slots + terms).
[[nodiscard]] inline Status carry_state(const CompressionPlan& plan, Ragged<float> state,
                                        MoveRule rule, u32* shares) noexcept {
  if (!slots_stand_for_terms(plan)) return apply_state(plan, state, MoveRule::anchor);
  if (rule != MoveRule::sum || !state || !terms_are_shared(plan)) {
    return apply_state(plan, state, rule);
  }
  if (shares == nullptr) return StatusCode::null_pointer;
  std::fill_n(shares, plan.num_terms, 0u);
  for (u32 s = 0; s < plan.segments; ++s) {
    for (u64 slot = plan.first[s]; slot < plan.first[s + 1]; ++slot) {
      for (u64 term = plan.term_begin[slot]; term < plan.term_end[slot]; ++term) ++shares[term];
    }
    for (u64 slot = plan.first[s]; slot < plan.first[s + 1]; ++slot) {
      for (u64 term = plan.term_begin[slot]; term < plan.term_end[slot]; ++term) {
        // Divided once; a term's own state is not read as such again.
        if (shares[term] > 1) state(s, plan.term_token[term]) /= static_cast<float>(shares[term]);
        shares[term] = 1;
      }
    }
  }
  return apply_state(plan, state, rule);
}

KVLEAN_NAMESPACE_END
