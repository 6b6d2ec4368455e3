// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <limits>
#include <new>

#include "kvlean/apply/apply.hpp"
#include "kvlean/decode/budgeted_cache.hpp"
#include "kvlean/decode/carry_state.hpp"

// Compression of BudgetedCache: plans for all layers, and what carries them out.

KVLEAN_NAMESPACE_BEGIN

inline Status BudgetedCacheBase::take_plans(Workspace& workspace, Planned& planned) const noexcept {
  CacheView* views = workspace.take<CacheView>(layers());
  Observation* seen_ = workspace.take<Observation>(layers());
  CompressionPlan* plans = workspace.take<CompressionPlan>(layers());
  if (views == nullptr || seen_ == nullptr || plans == nullptr) return workspace.exhausted();
  for (u32 l = 0; l < layers(); ++l) {
    new (views + l) CacheView(layer(l));
    // The schedule's place is in PlanOptions; draws count the layer once.
    views[l].origin.layer = cache_.origin().layer;
    new (seen_ + l) Observation(seen(l));
    new (plans + l) CompressionPlan();
  }
  planned.views = {views, layers()};
  planned.seen = {seen_, layers()};
  planned.plans = {plans, layers()};
  return StatusCode::ok;
}

/// Plans all layers and checks everything that carrying out needs, so that it cannot fail.
inline Status BudgetedCacheBase::plan_layers(i32 next, bool fresh, Workspace& workspace,
                                             Planned& planned) noexcept {
  PlanOptions options = options_.plan;
  if (!fresh) options.step += compressions_;
  // The policy updates a copy of the thresholds, which carry_out() takes over.
  float* threshold = threshold_ + segments();
  std::copy_n(threshold_, segments(), threshold);
  if (fresh) std::fill_n(threshold, segments(), std::numeric_limits<float>::quiet_NaN());
  KVLEAN_RETURN_IF_ERROR(plan(planned.views, planned.seen, Budget::slots(options_.budget_slots),
                              options, threshold, kv_heads(), workspace, planned.plans));
  u64 most_terms = 0;
  u64 slots = 0;
  u32 longest = 0;
  for (u32 l = 0; l < layers(); ++l) {
    const CompressionPlan& made = planned.plans[l];
    KVLEAN_RETURN_IF_ERROR(validate_plan(made, planned.views[l]));
    for (u32 s = 0; s < made.segments; ++s) longest = std::max(longest, made.length[s]);
    if (terms_are_shared(made)) most_terms = std::max(most_terms, made.num_terms);
    slots += made.num_slots();
  }
  if (slots > cache_.shape().total_slots) return StatusCode::destination_too_small;
  if (options_.positions == Positions::contiguous &&
      (options_.context_tokens == 0 || outruns_context(next))) {
    RenumberOptions renumbering;
    renumbering.sinks = options_.plan.protection.sinks;
    if (first_position_ != 0) {  // behind a prefix: all that is here moves, up to the prefix's end
      renumbering.sinks = 0;
      renumbering.next_position = first_position_ + static_cast<i32>(longest);
    }
    KVLEAN_RETURN_IF_ERROR(renumber(planned.plans, planned.views, workspace, renumbering));
  }
  planned.shares = workspace.take<u32>(most_terms);
  return planned.shares != nullptr ? StatusCode::ok : workspace.exhausted();
}

/// Takes the states of a layer through its plan.
inline void BudgetedCacheBase::carry_states(const Planned& planned, u32 layer_index,
                                            Ragged<float> mass_, Ragged<float> observers_,
                                            Ragged<float> tokens_) const noexcept {
  const CompressionPlan& made = planned.plans[layer_index];
  const auto carry = [&](Ragged<float> values, MoveRule rule) noexcept {
    // The plan is valid and the scratch is there: nothing is left that could fail.
    if (values) static_cast<void>(carry_state(made, values, rule, planned.shares));
  };
  carry(mass_, MoveRule::sum);
  carry(observers_, MoveRule::max);
  carry(tokens_, MoveRule::sum);
}

inline void BudgetedCacheBase::move_queries(i64 shift) noexcept {
  if (shift == 0) return;
  const u32 filled = ring_.place().filled;
  for (u32 l = 0; filled != 0 && l < layers(); ++l) {
    static_cast<void>(rotate_rows(ring_.rows(l), filled, *options_.rope, shift, executor()));
  }
  for (i32& position : ring_.positions()) position += static_cast<i32>(shift);
}

inline void BudgetedCacheBase::carry_out(const Planned& planned) noexcept {
  const i64 shift = query_shift(planned.plans[0], planned.views[0]);
  for (u32 l = 0; l < layers(); ++l) {
    carry_states(planned, l, mass(l), observers(l), tokens(l));
    for (u32 i = 0; i < options_.engine_states; ++i) {
      static_cast<void>(carry_state(planned.plans[l], engine_state(i, l), options_.engine_rules[i],
                                    planned.shares));
    }
    CacheView view = planned.views[l];
    static_cast<void>(apply(planned.plans[l], view, in_place, executor()));
  }
  move_queries(shift);
  next_ += static_cast<i32>(shift);
  cache_.set_next_position(next_);
  std::copy_n(threshold_ + segments(), segments(), threshold_);
  since_ = 0;
  ++compressions_;
}

KVLEAN_NAMESPACE_END
