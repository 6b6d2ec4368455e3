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
/// otherwise. The sum of weights is not 1: values grow, as in the paper. O(tokens).
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
    u32* merged = context.workspace.take<u32>(evicted);
    double* sums = context.workspace.take<double>(2 * std::size_t{std::min(receivers, longest)});
    if (merged == nullptr || sums == nullptr) return context.workspace.exhausted();
    for (u32 s = 0; s < cache.segments; ++s) {
      merge_segment(cache, scores, kept.keep.segment(s), s, context, merged, sums, plan);
    }
    return StatusCode::ok;
  }

 private:
  // Keeps the draws apart from those of a random scorer with the same seed.
  static constexpr u64 salt = 0xca3ca3ca3ca3ca3dull;

  // Receivers of an evicted token are the slots [begin, begin + receivers) after it, and `begin`
  // never falls along the segment, so the terms of a slot are one range of the evicted tokens. No
  // CPU foresees which tokens are evicted, so loops over slots don't branch on it. Turns `keep`
  // around; `merged` and `sums` are scratch, a number an evicted token and two a receiver.
  void merge_segment(const CacheView& cache, const Scores& scores, u8* keep, u32 s,
                     const Context& context, u32* merged, double* sums,
                     CompressionPlan& plan) const noexcept {
    const u32 slots = plan.length[s];
    if (slots == 0) return;
    const u32* anchor = plan.anchor + plan.first[s];
    const float* mass = scores.mass.segment(s);
    const u64 first_term = plan.num_terms;
    u32* term_token = plan.term_token + first_term;
    // What follows the last anchor has no receivers.
    const u32 length = anchor[slots - 1];
    const u32 evicted = length - (slots - 1);
    for (u32 token = 0; token < length; ++token) keep[token] ^= 1;
    simd::select_kernels().list(keep, length, term_token, evicted);
    const u32 frozen = std::min(cache.frozen, slots);
    ReceiverMeans means(mass, anchor, slots, receivers, sums);
    u32 terms = 0;
    for (u32 i = 0; i < evicted; ++i) {
      const u32 token = term_token[i];
      const u32 begin = std::max(token - i, frozen);  // as many are kept before it
      const u32 count = std::min(receivers, slots - begin);
      float share = begin < slots ? cam_merge_probability(mass[token], means.of(begin)) : 0.0f;
      if (mode == CaMMode::sampled) {
        const float uniform =
            draw(context.options.seed ^ salt, cache.origin.layer + context.layer,
                 cache.origin.head + s, cache.position(s, token), context.options.step);
        share = uniform < share ? 1.0f : 0.0f;
      }
      term_token[terms] = token;
      plan.term_weight[first_term + terms] = share / static_cast<float>(std::max<u32>(count, 1));
      terms += share != 0.0f ? 1u : 0u;
      merged[i] = terms;
    }
    plan.num_terms += terms;
    u64* term_begin = plan.term_begin + plan.first[s];
    u64* term_end = plan.term_end + plan.first[s];
    if (terms == evicted) {
      for (u32 j = 0; j < slots; ++j) term_end[j] = first_term + (anchor[j] - j);
    } else {
      for (u32 j = 0; j < slots; ++j) {
        term_end[j] = first_term + (anchor[j] != j ? merged[anchor[j] - j - 1] : 0);
      }
    }
    const u32 opening = std::min(receivers, slots - frozen);
    std::copy_n(term_end, frozen, term_begin);
    std::fill_n(term_begin + frozen, opening, first_term);
    std::copy_n(term_end + frozen, slots - frozen - opening, term_begin + frozen + opening);
  }

  /// Mean mass of the receivers from a slot on, for slots that ascend: slots are cut in blocks of
  /// `receivers`, and a sum has a part up to the end of its block and a part beyond. Three
  /// additions a slot, whatever the number of receivers.
  class ReceiverMeans {
   public:
    ReceiverMeans(const float* mass, const u32* anchor, u32 slots, u32 receivers,
                  double* sums) noexcept
        : mass_(mass),
          anchor_(anchor),
          slots_(slots),
          receivers_(std::min(receivers, slots)),
          to_end_(sums),
          beyond_(sums + receivers_) {}
    [[nodiscard]] float of(u32 begin) noexcept {
      if (begin >= block_end_) fill_block(begin / receivers_ * receivers_);
      const double sum = to_end_[begin - block_] + beyond_[begin - block_];
      return static_cast<float>(sum / std::min(receivers_, slots_ - begin));
    }

   private:
    void fill_block(u32 begin) noexcept {
      block_ = begin;
      block_end_ = begin + std::min(receivers_, slots_ - begin);
      const u32 count = block_end_ - begin;
      double to_end = 0.0;
      double beyond = 0.0;
      for (u32 i = 0; i < count; ++i) {  // two chains of additions, side by side
        to_end_[count - 1 - i] = to_end += mass_of(block_end_ - 1 - i);
        beyond_[i] = beyond;
        beyond += block_end_ + i < slots_ ? mass_of(block_end_ + i) : 0.0;
      }
    }
    [[nodiscard]] double mass_of(u32 slot) const noexcept {
      return static_cast<double>(mass_[anchor_[slot]]);
    }

    const float* mass_;
    const u32* anchor_;
    u32 slots_;
    u32 receivers_;
    double* to_end_;  // by slot of the block: the sum from there to the block's end
    double* beyond_;  // and that of its receivers after the block
    u32 block_ = 0;
    u32 block_end_ = 0;
  };
};
static_assert(Reducer<CaMReducer>);

KVLEAN_NAMESPACE_END
