// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/core/random.hpp"
#include "kvlean/reduce/plan_slots.hpp"

KVLEAN_NAMESPACE_BEGIN

/// How the merge probability of CaM becomes a weight.
enum class CaMMode : u8 {
  expected,  ///< multiply by the probability: deterministic
  sampled,   ///< merge wholly or not at all, by draw(seed, layer, head, position, step)
};

/// CaM's merge probability: clamp(score of the evicted / mean score of the receivers, 0, 1); NaN
/// (0/0, bad data) gives 0. CaM (ICML 2024), equation 14, with accumulated attention as the score.
[[nodiscard]] inline float cam_merge_probability(float evicted_score,
                                                 float receiver_mean) noexcept {
  const float ratio = evicted_score / receiver_mean;
  if (!(ratio > 0.0f)) return 0.0f;
  return ratio < 1.0f ? ratio : 1.0f;
}

/// CaM: cache merging on top of any eviction. The value of each dropped token, times its merge
/// probability, is added in equal parts to the values of the next `receivers` kept tokens; keys are
/// never changed. Slots are planned by the scorer's rank; the probability reads accumulated
/// attention where the observation has it (ready-made or reference queries), else the scorer's
/// mass.
///
/// Called when one token is over the budget (a decode step) this is the paper's operator, and
/// merges cascade because values are rewritten in place. Called once over a whole prefill it is the
/// one-shot form, which the paper does not define and which piles many v/m terms on few receivers.
/// Protected tokens do receive; frozen ones do not. The paper's code divides by the constant m even
/// when fewer receivers exist; this divides by the actual number. Needs mass: missing_observation
/// otherwise. The sum of weights is not 1: values grow, as in the paper. O(evicted * receivers).
struct CaMReducer {
  u32 receivers = 32;
  CaMMode mode = CaMMode::expected;

  static constexpr bool wants_mass = true;
  static constexpr bool prefers_accumulated_mass = true;

  [[nodiscard]] Status reduce(const CacheView& cache, const Scores& scores, const u32* limit,
                              Context& context, CompressionPlan& plan) const noexcept {
    if (receivers == 0) return StatusCode::invalid_option;
    if (!scores.has_mass) return StatusCode::missing_observation;
    KeptTokens kept;
    KVLEAN_RETURN_IF_ERROR(select_kept(cache, scores, limit, 0.0f, context, kept));
    KVLEAN_RETURN_IF_ERROR(plan_kept(cache, kept, context, plan));
    const u64 evicted = cache.total_length() - plan.num_slots();
    if (evicted == 0) return StatusCode::ok;
    KVLEAN_RETURN_IF_ERROR(begin_terms(evicted, false, context.workspace, plan));
    plan.self_weight = nullptr;  // the receiver's own value keeps weight 1
    plan.needs |= needs_changed_values;
    const WorkspaceScope scope(context.workspace);
    u32 longest = 0;
    for (u32 s = 0; s < cache.segments; ++s) longest = std::max(longest, plan.length[s]);
    float* received = context.workspace.take<float>(longest);
    u32* receiver = context.workspace.take<u32>(evicted);
    if (received == nullptr || receiver == nullptr) return context.workspace.exhausted();
    for (u32 s = 0; s < cache.segments; ++s) {
      merge_segment(cache, scores, s, context, received, receiver, plan);
    }
    return StatusCode::ok;
  }

 private:
  // Keeps the draws apart from those of a random scorer with the same seed.
  static constexpr u64 salt = 0xca3ca3ca3ca3ca3dull;

  // Receivers of an evicted token are the slots [begin, begin + receivers) after it, and `begin`
  // never falls along the segment, so the terms of a slot are one range of the evicted tokens.
  // `received`: a number a slot; `receiver`: the first receiver of each term of the plan.
  void merge_segment(const CacheView& cache, const Scores& scores, u32 s, const Context& context,
                     float* received, u32* receiver, CompressionPlan& plan) const noexcept {
    const u32 slots = plan.length[s];
    const u32* anchor = plan.anchor + plan.first[s];
    const float* mass = scores.mass.segment(s);
    for (u32 slot = 0; slot < slots; ++slot) received[slot] = mass[anchor[slot]];
    ReceiverMeans means(received, slots, receivers);
    const u32 frozen = std::min(cache.frozen, slots);
    u64 oldest = plan.num_terms;  // first term whose receivers may still include the slot
    u32 token = 0;
    for (u32 slot = 0; slot < slots; ++slot) {
      const u32 begin = std::max(slot, frozen);
      const u32 count = std::min(receivers, slots - begin);
      const float mean = token < anchor[slot] ? means.of(begin) : 0.0f;
      for (; token < anchor[slot]; ++token) {
        const float probability = cam_merge_probability(mass[token], mean);
        float share = probability;
        if (mode == CaMMode::sampled) {
          const float uniform =
              draw(context.options.seed ^ salt, cache.origin.layer + context.layer,
                   cache.origin.head + s, cache.position(s, token), context.options.step);
          share = uniform < probability ? 1.0f : 0.0f;
        }
        if (count == 0 || share == 0.0f) continue;
        receiver[plan.num_terms] = begin;
        plan.term_token[plan.num_terms] = token;
        plan.term_weight[plan.num_terms] = share / static_cast<float>(count);
        ++plan.num_terms;
      }
      token = anchor[slot] + 1;
      while (oldest < plan.num_terms && u64{receiver[oldest]} + receivers <= slot) ++oldest;
      const u64 index = plan.first[s] + slot;
      plan.term_begin[index] = slot < cache.frozen ? plan.num_terms : oldest;
      plan.term_end[index] = plan.num_terms;
    }
  }

  /// Mean mass of the receivers from a slot on, some slots at a time: the sums don't wait for each
  /// other, and have the bits of one after the other.
  class ReceiverMeans {
   public:
    ReceiverMeans(const float* received, u32 slots, u32 receivers) noexcept
        : received_(received), slots_(slots), receivers_(receivers) {}
    [[nodiscard]] float of(u32 begin) noexcept {
      const u32 count = std::min(receivers_, slots_ - begin);
      if (begin - first_ < valid_) return mean(sum_[begin - first_], count);
      first_ = begin;
      if (u64{begin} + at_once + receivers_ <= slots_) {
        valid_ = at_once;
        std::fill_n(sum_, at_once, 0.0);
        for (u32 r = 0; r < receivers_; ++r) {
          const float* x = received_ + begin + r;
          for (u32 i = 0; i < at_once; ++i) sum_[i] += static_cast<double>(x[i]);
        }
      } else {
        valid_ = 1;
        sum_[0] = 0.0;
        for (u32 r = 0; r < count; ++r) sum_[0] += static_cast<double>(received_[begin + r]);
      }
      return mean(sum_[0], count);
    }

   private:
    static constexpr u32 at_once = 8;
    [[nodiscard]] static float mean(double sum, u32 count) noexcept {
      return static_cast<float>(sum / std::max<u32>(count, 1));
    }
    const float* received_;
    u32 slots_;
    u32 receivers_;
    u32 first_ = 0;
    u32 valid_ = 0;  // sums of slots from first_ on
    double sum_[at_once];
  };
};
static_assert(Reducer<CaMReducer>);

KVLEAN_NAMESPACE_END
