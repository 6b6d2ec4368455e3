// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/reduce/merge_weights.hpp"
#include "kvlean/reduce/nearest_kept.hpp"

KVLEAN_NAMESPACE_BEGIN

/// How D2O blends.
enum class D2OWeights : u8 {
  paper,  ///< softmax over the similarities, the kept token's own being 1: e^u / (e + sum e^u)
  code,   ///< the authors' code: (x + sum u x_e) / (1 + number of terms)
};

/// D2O-style merging (arXiv 2406.13035): each dropped token may merge, key and value alike, into
/// the kept token with the most similar key, when that similarity reaches a running threshold. The
/// threshold of a segment starts as the mean of its dropped tokens' similarities m and then follows
/// tau = momentum * tau + (1 - momentum) * m. It is state, so the caller holds it between steps:
/// `threshold` [segments], NaN or unset before the first call, updated by reduce(); null starts
/// anew each time. Keys of protected tokens do not move, so they do not receive. Similarities are
/// those of the keys as they lie; `keys` says how they blend (aligned: needs_rope where the cache
/// has no RopeSpec). O(dropped * kept * d).
struct D2OReducer {
  D2OWeights weights = D2OWeights::paper;
  float momentum = 0.5f;  ///< in [0, 1]
  MergedKeys keys = MergedKeys::blended;
  const float* threshold = nullptr;  ///< [layer planned][segment]; or null
  float* next_threshold = nullptr;   ///< the same shape; or null; may equal `threshold`
  u32 threshold_stride = 0;          ///< from layer to layer

  [[nodiscard]] Status reduce(const CacheView& cache, const Scores& scores, const u32* limit,
                              Context& context, CompressionPlan& plan) const noexcept {
    if (!(momentum >= 0.0f && momentum <= 1.0f)) return StatusCode::invalid_option;
    if (keys == MergedKeys::aligned && cache.rope == nullptr) return StatusCode::needs_rope;
    KeptTokens kept;
    KVLEAN_RETURN_IF_ERROR(select_kept(cache, scores, limit, 0.0f, context, kept));
    KVLEAN_RETURN_IF_ERROR(plan_kept(cache, kept, context, plan));
    const u64 dropped = cache.total_length() - plan.num_slots();
    if (dropped == 0) return StatusCode::ok;
    KVLEAN_RETURN_IF_ERROR(begin_terms(dropped, false, context.workspace, plan));
    if (cache.log_mass) KVLEAN_RETURN_IF_ERROR(begin_log_mass(cache, context.workspace, plan));
    NearestKept nearest;
    KVLEAN_RETURN_IF_ERROR(find_nearest_kept(cache, kept, plan, true, context, nearest));
    float* bar = context.workspace.take<float>(cache.segments);
    if (bar == nullptr) return context.workspace.exhausted();
    const std::size_t row = std::size_t{context.layer - context.options.layer} * threshold_stride;
    for (u32 s = 0; s < cache.segments; ++s) {
      const float before =
          threshold != nullptr ? threshold[row + s] : std::numeric_limits<float>::quiet_NaN();
      bar[s] = follow_threshold(cache, kept, nearest, s, before);
    }
    group_terms_by_slot(cache, kept, nearest, plan, [&](u32 s, u32 token) noexcept {
      return nearest.cosine(s, token) >= bar[s];
    });
    if (next_threshold != nullptr) std::copy_n(bar, cache.segments, next_threshold + row);
    plan.needs |= needs_changed_values | detail::key_needs(keys);
    for (u32 s = 0; s < cache.segments; ++s) blend_segment(cache, nearest, s, plan);
    return StatusCode::ok;
  }

 private:
  float follow_threshold(const CacheView& cache, const KeptTokens& kept, const NearestKept& nearest,
                         u32 s, float before) const noexcept {
    const u8* keep = kept.keep.segment(s);
    double sum = 0.0;
    u32 count = 0;
    for (u32 token = 0; token < cache.length(s); ++token) {
      if (keep[token] != 0 || nearest.cosine(s, token) < -1.5f) continue;
      sum += nearest.cosine(s, token);
      ++count;
    }
    if (count == 0) return before;
    const float mean = static_cast<float>(sum / count);
    return before == before ? momentum * before + (1.0f - momentum) * mean : mean;
  }

  void blend_segment(const CacheView& cache, const NearestKept& nearest, u32 s,
                     CompressionPlan& plan) const noexcept {
    for (u64 slot = plan.first[s]; slot < plan.first[s + 1]; ++slot) {
      const u64 begin = plan.term_begin[slot];
      const u64 end = plan.term_end[slot];
      const bool soft = weights == D2OWeights::paper;
      const double own = soft ? std::exp(1.0) : 1.0;
      double total = soft ? own : 1.0 + static_cast<double>(end - begin);
      for (u64 term = begin; term < end; ++term) {
        const float cosine = nearest.cosine(s, plan.term_token[term]);
        plan.term_weight[term] = soft ? std::exp(cosine) : cosine;
        if (soft) total += plan.term_weight[term];
      }
      plan.self_weight[slot] = end == begin ? 1.0f : static_cast<float>(own / total);
      float largest = cache.finite_mass_bias(s, plan.anchor[slot]);
      for (u64 term = begin; term < end; ++term) {
        largest = std::max(largest, cache.finite_mass_bias(s, plan.term_token[term]));
      }
      detail::MassSum mass(largest);
      mass.add(plan.self_weight[slot], cache.finite_mass_bias(s, plan.anchor[slot]));
      for (u64 term = begin; term < end; ++term) {
        plan.term_weight[term] = static_cast<float>(plan.term_weight[term] / total);
        mass.add(plan.term_weight[term], cache.finite_mass_bias(s, plan.term_token[term]));
      }
      if (plan.log_mass != nullptr && end != begin) plan.log_mass[slot] = mass.value(LogMass::none);
    }
  }
};
static_assert(Reducer<D2OReducer>);

KVLEAN_NAMESPACE_END
