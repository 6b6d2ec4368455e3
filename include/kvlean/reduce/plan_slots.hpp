// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/reduce/selection.hpp"

KVLEAN_NAMESPACE_BEGIN

/// Starts a plan with `count[s]` slots for segment s: takes length, first and anchor from the
/// workspace, sets needs_ragged_lengths when the counts differ. Anchors are left to the caller.
[[nodiscard]] inline Status begin_plan(const CacheView& cache, const u32* count,
                                       Workspace& workspace, CompressionPlan& plan) noexcept {
  plan = CompressionPlan{};
  plan.segments = cache.segments;
  plan.length = workspace.take<u32>(cache.segments);
  plan.first = workspace.take<u64>(cache.segments + std::size_t{1});
  if (plan.length == nullptr || plan.first == nullptr) return workspace.exhausted();
  plan.first[0] = 0;
  for (u32 s = 0; s < cache.segments; ++s) {
    plan.length[s] = count[s];
    plan.first[s + 1] = plan.first[s] + count[s];
    if (count[s] != count[0]) plan.needs |= needs_ragged_lengths;
  }
  plan.anchor = workspace.take<u32>(plan.first[cache.segments]);
  return plan.anchor != nullptr ? Status{} : workspace.exhausted();
}

/// Turns kept tokens into a plan's anchors, ascending.
[[nodiscard]] inline Status plan_kept(const CacheView& cache, const KeptTokens& kept,
                                      Context& context, CompressionPlan& plan) noexcept {
  KVLEAN_RETURN_IF_ERROR(begin_plan(cache, kept.count, context.workspace, plan));
  if (context.options.sharing.kind == SharingKind::whole_pages) {
    plan.page_tokens = context.options.sharing.page_tokens;
  }
  parallel_for(context.options.executor, cache.segments, [&](u32, u32 s) noexcept {
    simd::select_kernels().list(kept.keep.segment(s), cache.length(s), plan.anchor + plan.first[s],
                                kept.count[s]);
  });
  return StatusCode::ok;
}

/// Takes the per-slot term ranges and the per-term arrays for at most `max_terms` terms. The caller
/// fills them and sets plan.num_terms. `values_differ` also takes term_value_weight.
[[nodiscard]] inline Status begin_terms(u64 max_terms, bool values_differ, Workspace& workspace,
                                        CompressionPlan& plan) noexcept {
  const u64 slots = plan.num_slots();
  plan.self_weight = workspace.take<float>(slots);
  plan.term_begin = workspace.take<u64>(slots);
  plan.term_end = workspace.take<u64>(slots);
  plan.term_token = workspace.take<u32>(max_terms);
  plan.term_weight = workspace.take<float>(max_terms);
  plan.self_value_weight = values_differ ? workspace.take<float>(slots) : nullptr;
  plan.term_value_weight = values_differ ? workspace.take<float>(max_terms) : nullptr;
  const bool complete =
      plan.self_weight != nullptr && plan.term_begin != nullptr && plan.term_end != nullptr &&
      plan.term_token != nullptr && plan.term_weight != nullptr &&
      (!values_differ || (plan.self_value_weight != nullptr && plan.term_value_weight != nullptr));
  return complete ? Status{} : workspace.exhausted();
}

/// Takes plan.log_mass and fills it with what the anchors carry now.
[[nodiscard]] inline Status begin_log_mass(const CacheView& cache, Workspace& workspace,
                                           CompressionPlan& plan) noexcept {
  plan.log_mass = workspace.take<float>(plan.num_slots());
  if (plan.log_mass == nullptr) return workspace.exhausted();
  plan.needs |= needs_log_mass;
  for (u32 s = 0; s < plan.segments; ++s) {
    for (u64 slot = plan.first[s]; slot < plan.first[s + 1]; ++slot) {
      plan.log_mass[slot] = cache.finite_mass_bias(s, plan.anchor[slot]);
    }
  }
  return StatusCode::ok;
}

KVLEAN_NAMESPACE_END
