// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/core/order.hpp"
#include "kvlean/reduce/merge_weights.hpp"

KVLEAN_NAMESPACE_BEGIN
namespace detail {

/// The member of [begin, end) with the best score, ties to the lower token; with `keep`, among the
/// kept ones, `end` when there is none.
[[nodiscard]] inline u32 find_pivot(const float* score, u32 begin, u32 end,
                                    const u8* keep) noexcept {
  u32 pivot = end;
  for (u32 t = begin; t < end; ++t) {
    if (keep != nullptr && keep[t] == 0) continue;
    if (pivot == end || score_key(score[t]) > score_key(score[pivot])) pivot = t;
  }
  return pivot;
}

/// Writes merging sets of one segment into a plan, one slot each.
class SetWriter {
 public:
  struct Options {
    Sigma sigma = Sigma::mean_distance;
    float fixed_sigma = 5.0f;
    LogMass log_mass = LogMass::none;
  };
  /// `weight` [length]: each token's weight in its set, or null: computed here.
  SetWriter(const CacheView& cache, const RopeRotation& rotation, u32 segment,
            const Options& options, const float* weight) noexcept
      : cache_(cache), rotation_(rotation), s_(segment), options_(options), weight_(weight) {}

  /// The members of [begin, end) but the pivot (and, with `keep`, the kept ones) become the terms
  /// of `slot`, from next_term on, which moves past them.
  void write(u32 pivot, u32 begin, u32 end, const u8* keep, u64 slot, u64& next_term,
             CompressionPlan& plan) const noexcept {
    plan.anchor[slot] = pivot;
    float self = 1.0f;
    u32 members = 0;
    const u32* token = nullptr;
    const float* weight = nullptr;
    if (plan.has_terms()) {
      u32* term = plan.term_token + next_term;
      for (u32 t = begin; t < end; ++t) {
        if (t != pivot && (keep == nullptr || keep[t] == 0)) term[members++] = t;
      }
      float* term_weight = plan.term_weight + next_term;
      if (members != 0) self = weigh(pivot, term, members, term_weight);
      token = term;
      weight = term_weight;
      plan.self_weight[slot] = self;
      plan.term_begin[slot] = next_term;
      plan.term_end[slot] = next_term + members;
      if (plan.term_value_weight != nullptr) {
        const float size = static_cast<float>(members + 1);
        plan.self_value_weight[slot] = self * size;
        for (u32 i = 0; i < members; ++i) plan.term_value_weight[next_term + i] = weight[i] * size;
      }
      next_term += members;
    }
    if (plan.log_mass != nullptr) {
      plan.log_mass[slot] = mass_of(pivot, self, token, weight, members);
    }
  }

  /// Writes the slots of a batch (a SetBatch) from `slot` on, their terms from `first_term` on.
  template <class Batch>
  void write(const Batch& batch, u64 slot, u64 first_term, CompressionPlan& plan) const noexcept {
    std::copy_n(batch.pivot, batch.slots, plan.anchor + slot);
    if (plan.has_terms()) {
      std::copy_n(batch.self, batch.slots, plan.self_weight + slot);
      for (u32 i = 0; i < batch.slots; ++i) {
        plan.term_begin[slot + i] = first_term + batch.term_begin[i];
        plan.term_end[slot + i] = first_term + batch.term_end[i];
      }
      std::copy_n(batch.token, batch.terms, plan.term_token + first_term);
      std::copy_n(batch.weight, batch.terms, plan.term_weight + first_term);
      if (plan.term_value_weight != nullptr) {
        batch.scale(plan.self_value_weight + slot, plan.term_value_weight + first_term);
      }
    }
    for (u32 i = 0; plan.log_mass != nullptr && i < batch.slots; ++i) {
      plan.log_mass[slot + i] = mass_of(batch, i);
    }
  }
  /// Log mass of a batch's slot i.
  template <class Batch>
  [[nodiscard]] float mass_of(const Batch& batch, u32 i) const noexcept {
    const u64 first = batch.term_begin[i];
    return mass_of(batch.pivot[i], batch.self[i], batch.token + first, batch.weight + first,
                   static_cast<u32>(batch.term_end[i] - first));
  }

  [[nodiscard]] const RopeRotation& rotation() const noexcept { return rotation_; }
  [[nodiscard]] const Options& options() const noexcept { return options_; }

  /// Log mass of a slot.
  [[nodiscard]] float mass_of(u32 pivot, float self, const u32* token, const float* weight,
                              u32 members) const noexcept {
    float largest = cache_.finite_mass_bias(s_, pivot);
    if (members == 0) return largest;
    for (u32 i = 0; i < members; ++i) {
      largest = std::max(largest, cache_.finite_mass_bias(s_, token[i]));
    }
    MassSum mass(largest);
    mass.add(self, cache_.finite_mass_bias(s_, pivot));
    for (u32 i = 0; i < members; ++i) mass.add(weight[i], cache_.finite_mass_bias(s_, token[i]));
    return mass.value(options_.log_mass);
  }

 private:
  float weigh(u32 pivot, const u32* member, u32 members, float* weight) const noexcept {
    if (weight_ == nullptr) {
      return gaussian_weights(cache_, rotation_, s_, pivot, member, members, options_.sigma,
                              options_.fixed_sigma, weight);
    }
    for (u32 i = 0; i < members; ++i) weight[i] = weight_[member[i]];
    return weight_[pivot];
  }
  const CacheView& cache_;
  const RopeRotation& rotation_;
  u32 s_;
  Options options_;
  const float* weight_;
};

}  // namespace detail
KVLEAN_NAMESPACE_END
