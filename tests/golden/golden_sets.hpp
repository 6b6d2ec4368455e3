// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cmath>
#include <span>
#include <vector>

#include "kvlean/reduce/kvmerger.hpp"

// KVMerger's merging sets, read from plans and files, and a plan that follows given sets.

namespace kvlean::golden {

/// Tokens [begin, end) of one head that become one slot.
struct MergingSet {
  u32 begin = 0;
  u32 end = 0;
  u32 pivot = 0;
};

/// [kv_heads] the sets of a plan that merges neighbours, ascending.
[[nodiscard]] inline std::vector<std::vector<MergingSet>> sets_of_plan(
    const CompressionPlan& plan) {
  std::vector<std::vector<MergingSet>> sets(plan.segments);
  for (u32 head = 0; head < plan.segments; ++head) {
    for (u64 slot = plan.first[head]; slot < plan.first[head + 1]; ++slot) {
      MergingSet set{plan.anchor[slot], plan.anchor[slot] + 1, plan.anchor[slot]};
      if (plan.has_terms()) {
        for (u64 term = plan.term_begin[slot]; term < plan.term_end[slot]; ++term) {
          set.begin = std::min(set.begin, plan.term_token[term]);
          set.end = std::max(set.end, plan.term_token[term] + 1);
        }
      }
      sets[head].push_back(set);
    }
  }
  return sets;
}

/// The sets that a row of slot numbers 0, 0, 1, 2, 2, ... means; false if it is not such a row.
[[nodiscard]] inline bool runs_of_slots(std::span<const double> slots,
                                        std::vector<MergingSet>& sets) {
  sets.clear();
  for (u32 t = 0; t < slots.size(); ++t) {
    const auto next = static_cast<double>(sets.size());
    if (slots[t] == next) {
      sets.push_back({t, t + 1, t});
    } else if (t > 0 && slots[t] == next - 1.0) {
      sets.back().end = t + 1;
    } else {
      return false;
    }
  }
  return true;
}

/// [tokens] 1 where a token and the next are in one set.
[[nodiscard]] inline std::vector<u8> links_of(const std::vector<MergingSet>& sets, u32 tokens) {
  std::vector<u8> linked(tokens, u8{0});
  for (const MergingSet& set : sets) {
    for (u32 t = set.begin; t + 1 < set.end; ++t) linked[t] = 1;
  }
  return linked;
}

/// The plan that KVMergerReducer would have made of these sets: its weights, its log mass. For
/// stored results that rounding led to other sets or pivots than ours.
[[nodiscard]] inline Status plan_of_sets(const CacheView& cache,
                                         const std::vector<std::vector<MergingSet>>& sets,
                                         const KVMergerReducer& reducer, Workspace& workspace,
                                         CompressionPlan& plan) {
  std::vector<u32> count;
  for (const auto& of_head : sets) count.push_back(static_cast<u32>(of_head.size()));
  KVLEAN_RETURN_IF_ERROR(begin_plan(cache, count.data(), workspace, plan));
  KVLEAN_RETURN_IF_ERROR(
      begin_terms(cache.total_length() - plan.num_slots(), false, workspace, plan));
  if (reducer.log_mass != LogMass::none) {
    KVLEAN_RETURN_IF_ERROR(begin_log_mass(cache, workspace, plan));
  }
  if (plan.num_slots() != cache.total_length())
    plan.needs |= needs_moved_keys | needs_changed_values;
  u64 slot = 0;
  for (u32 head = 0; head < sets.size(); ++head) {
    for (const MergingSet& set : sets[head]) {
      plan.anchor[slot] = set.pivot;
      plan.term_begin[slot] = plan.num_terms;
      for (u32 t = set.begin; t < set.end; ++t) {
        if (t != set.pivot) plan.term_token[plan.num_terms++] = t;
      }
      plan.term_end[slot] = plan.num_terms;
      const u64 first = plan.term_begin[slot];
      const u32 members = static_cast<u32>(plan.num_terms - first);
      plan.self_weight[slot] = 1.0f;
      if (members != 0) {
        plan.self_weight[slot] = detail::gaussian_weights(
            cache, RopeRotation{}, head, set.pivot, plan.term_token + first, members, reducer.sigma,
            reducer.fixed_sigma, plan.term_weight + first);
        if (plan.log_mass != nullptr) {
          detail::MassSum mass(0.0f);  // fresh tokens: no mass to shift by
          mass.add(plan.self_weight[slot], 0.0f);
          for (u32 i = 0; i < members; ++i) mass.add(plan.term_weight[first + i], 0.0f);
          plan.log_mass[slot] = mass.value(reducer.log_mass);
        }
      }
      ++slot;
    }
  }
  return StatusCode::ok;
}

}  // namespace kvlean::golden
