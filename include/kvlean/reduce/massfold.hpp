// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/reduce/nearest_kept.hpp"

KVLEAN_NAMESPACE_BEGIN

/// Mass-preserving fold: keys stay where they are; the value of every dropped token is blended into
/// the kept token with the most similar key, in proportion to the attention mass the two received,
/// and the slot's logit carries the mass of all it stands for:
///   w_e = mass_e / mass_kept,  v' = (v + sum w_e v_e) / (1 + sum w_e),  log_mass += log(1 + sum
///   w_e)
/// When keys are equal and masses true this is exact attention (kvmerger_h2o_cam derivation, and
/// the MassFold / KeepKV family of 2025-26). Without attention mass (key norm, random,
/// StreamingLLM) every token weighs the number of tokens it already stands for. Protected tokens
/// receive (their keys do not change); frozen ones do not. O(dropped * kept * d).
struct MassFoldReducer {
  float min_cosine = -1.0f;  ///< dropped tokens less similar than this are evicted without a fold
  bool log_mass = true;      ///< off: values are blended but no bias is stored, for any kernel
  /// Compare mean attention per query that could see the token, where the scorer knows their
  /// number: plain sums make recent tokens, seen by few, stand for far too much. Off: sums as they
  /// are.
  bool per_observer = true;
  float max_ratio = 1e6f;  ///< bound on w_e, for kept tokens that received (almost) no attention

  static constexpr bool wants_mass = true;

  [[nodiscard]] Status reduce(const CacheView& cache, const Scores& scores, const u32* limit,
                              Context& context, CompressionPlan& plan) const noexcept {
    if (!(min_cosine <= 1.0f) || !(max_ratio > 0.0f) || !std::isfinite(max_ratio)) {
      return StatusCode::invalid_option;
    }
    KeptTokens kept;
    KVLEAN_RETURN_IF_ERROR(select_kept(cache, scores, limit, 0.0f, context, kept));
    KVLEAN_RETURN_IF_ERROR(plan_kept(cache, kept, context, plan));
    const u64 dropped = cache.total_length() - plan.num_slots();
    if (dropped == 0) return StatusCode::ok;
    KVLEAN_RETURN_IF_ERROR(begin_terms(dropped, false, context.workspace, plan));
    if (log_mass) KVLEAN_RETURN_IF_ERROR(begin_log_mass(cache, context.workspace, plan));
    NearestKept nearest;
    KVLEAN_RETURN_IF_ERROR(find_nearest_kept(cache, kept, plan, false, context, nearest));
    group_terms_by_slot(cache, kept, nearest, plan, [&](u32 s, u32 token) noexcept {
      return nearest.cosine(s, token) >= min_cosine;
    });
    plan.needs |= needs_changed_values;
    for (u32 s = 0; s < cache.segments; ++s) {
      for (u64 slot = plan.first[s]; slot < plan.first[s + 1]; ++slot) {
        double total = 1.0;
        for (u64 term = plan.term_begin[slot]; term < plan.term_end[slot]; ++term) {
          const float ratio =
              mass_ratio(cache, scores, s, plan.term_token[term], plan.anchor[slot]);
          plan.term_weight[term] = ratio;
          total += ratio;
        }
        plan.self_weight[slot] = static_cast<float>(1.0 / total);
        for (u64 term = plan.term_begin[slot]; term < plan.term_end[slot]; ++term) {
          plan.term_weight[term] = static_cast<float>(plan.term_weight[term] / total);
        }
        if (log_mass) plan.log_mass[slot] += static_cast<float>(std::log(total));
      }
    }
    return StatusCode::ok;
  }

 private:
  float mass_ratio(const CacheView& cache, const Scores& scores, u32 s, u32 dropped,
                   u32 receiver) const noexcept {
    float ratio;
    if (scores.has_mass) {
      const auto mass = [&](u32 token) noexcept {
        return per_observer ? scores.mass_per_observer(s, token) : scores.mass(s, token);
      };
      const float own = mass(receiver);
      const float other = mass(dropped);
      ratio = other == 0.0f ? 0.0f : other / own;
    } else {
      ratio = std::exp(cache.finite_mass_bias(s, dropped) - cache.finite_mass_bias(s, receiver));
    }
    if (!(ratio > 0.0f)) return 0.0f;
    return std::min(ratio, max_ratio);
  }
};
static_assert(Reducer<MassFoldReducer>);

KVLEAN_NAMESPACE_END
