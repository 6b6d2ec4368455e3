// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>

#include "kvlean/reduce/merge_weights.hpp"
#include "kvlean/reduce/merging_sets.hpp"
#include "kvlean/reduce/plan_slots.hpp"

KVLEAN_NAMESPACE_BEGIN

/// KVMerger (arXiv 2407.08454): runs of neighbouring tokens with similar keys become one slot each,
/// at the place of the member with the most attention, with Gaussian kernel weights; K and V blend
/// alike. Sinks, recent tokens and heavy hitters stay alone and break runs. Reads attention mass
/// where the scorer has it, its rank otherwise. No official code exists; see docs/policies.md for
/// the readings chosen.
///
/// Slot form: exactly limit[s] slots where links suffice; when all links are used and slots still
/// exceed the limit, the unprotected slots with the least summed score are evicted and
/// plan.slots_evicted[s] says how many. Threshold form: the count is a result, evicted down to the
/// limit unless enforce_limit is off. Sharing: with same_tokens the cosine is averaged over the
/// heads and one set of runs serves all; with whole_pages whole pages are selected first and the
/// dropped tokens of a run (cosine above epsilon) merge into its best kept member. O(tokens * d)
/// time; scratch 13 bytes a token.
struct KVMergerReducer {
  KVMergerForm form = KVMergerForm::slots;
  float epsilon = 0.75f;  ///< threshold form and page sharing: cosine above which tokens link
  Sigma sigma = Sigma::mean_distance;
  float fixed_sigma = 5.0f;  ///< Sigma::fixed only; > 0
  ValueScale values = ValueScale::convex;
  LogMass log_mass = LogMass::none;
  MergedKeys keys = MergedKeys::blended;
  double recent_fraction = -1.0;  ///< of the length; negative: the paper's preset for the budget
  double heavy_fraction = -1.0;   ///< of the length; negative: the paper's preset for the budget
  i64 recent_tokens = -1;         ///< a count instead of recent_fraction
  i64 heavy_tokens = -1;          ///< a count instead of heavy_fraction
  bool enforce_limit =
      true;  ///< threshold form: evict the least sets when more than the limit remain

  static constexpr bool wants_mass = true;

  /// invalid_option: a fraction above 1, a NaN, a fixed sigma that is not positive, or
  /// paper_set_size together with log mass (each corrects for the set's size: never both).
  /// reduce() also returns needs_rope: aligned keys of a cache that has no RopeSpec.
  [[nodiscard]] Status check() const noexcept {
    const bool fractions = recent_fraction <= 1.0 && heavy_fraction <= 1.0;
    const bool width = sigma != Sigma::fixed || (std::isfinite(fixed_sigma) && fixed_sigma > 0.0f);
    const bool mass = values == ValueScale::convex || log_mass == LogMass::none;
    return fractions && epsilon == epsilon && width && mass ? StatusCode::ok
                                                            : StatusCode::invalid_option;
  }
  /// The threshold form merges even when everything would fit.
  [[nodiscard]] constexpr bool identity_at_full_budget() const noexcept {
    return form == KVMergerForm::slots;
  }

  [[nodiscard]] Status reduce(const CacheView& cache, const Scores& scores, const u32* limit,
                              Context& context, CompressionPlan& plan) const noexcept {
    KVLEAN_RETURN_IF_ERROR(check());
    RopeRotation rotation;
    if (keys == MergedKeys::aligned) {
      KVLEAN_RETURN_IF_ERROR(detail::prepare_alignment(cache, rotation));
    }
    Workspace& workspace = context.workspace;
    const Ragged<float> score = scores.has_mass ? scores.mass : scores.rank;
    const bool shared = context.options.sharing.shares_tokens();
    const bool pages = context.options.sharing.kind == SharingKind::whole_pages;

    // State of each token: 0 free, 1 stays alone (or on its page), 2 evicted; and its link to the
    // next.
    u32* slots = workspace.take<u32>(cache.segments);
    u32* evicted = workspace.take_zeroed<u32>(cache.segments);
    u64* first = workspace.take<u64>(cache.segments + std::size_t{1});
    if (slots == nullptr || evicted == nullptr || first == nullptr) return workspace.exhausted();
    first[0] = 0;
    for (u32 s = 0; s < cache.segments; ++s) first[s + 1] = first[s] + cache.length(s);
    u8* state = workspace.take<u8>(first[cache.segments]);
    u8* linked = workspace.take<u8>(first[cache.segments]);
    const u32 longest = cache.max_length();
    float* mean = workspace.take<float>(shared ? longest : 0);
    if (state == nullptr || linked == nullptr || mean == nullptr) return workspace.exhausted();

    KeptTokens kept;
    if (pages) KVLEAN_RETURN_IF_ERROR(select_kept(cache, scores, limit, 0.0f, context, kept));
    if (shared) {
      KVLEAN_RETURN_IF_ERROR(detail::check_same_tokens(cache));
      detail::mean_over_heads(cache, score, longest, mean);
    }
    {
      WorkspaceScope scope(workspace);
      const u32 tasks = shared ? 1 : cache.segments;
      const u32 workers = std::max<u32>(context.options.executor.workers, 1);
      float* cosine = workspace.take<float>(static_cast<std::size_t>(workers) * longest);
      float* other = workspace.take<float>(shared ? longest : 0);
      u64* order = workspace.take<u64>(static_cast<std::size_t>(workers) * longest);
      if (cosine == nullptr || other == nullptr || order == nullptr) return workspace.exhausted();
      parallel_for(context.options.executor, tasks, [&](u32 worker, u32 s) noexcept {
        const std::size_t at = static_cast<std::size_t>(worker) * longest;
        const u32 length = cache.length(s);
        if (shared) {
          detail::mean_cosines(cache, length, other, cosine + at);
        } else {
          detail::adjacent_cosines(cache.keys, s, length, cosine + at);
        }
        const float* row = shared ? mean : score.segment(s);
        if (pages) {
          slots[s] = kept.count[s];
          detail::link_free(cosine + at, cache.frozen, context.options.protection, length, epsilon,
                            state, linked);
        } else {
          slots[s] =
              form_sets(form, soft_protection(length, limit[s]), cosine + at, row, scores.has_mass,
                        length, limit[s], cache.frozen, context.options.protection,
                        state + first[s], linked + first[s], order + at, evicted[s]);
        }
      });
      if (context.options.sharing.kind == SharingKind::equal_count) {
        // Emergent counts differ: heads below the largest give back their weakest links, as far as
        // the shortest head goes.
        u32 most = *std::max_element(slots, slots + cache.segments);
        for (u32 s = 0; s < cache.segments; ++s) most = std::min(most, cache.length(s));
        parallel_for(context.options.executor, tasks, [&](u32 worker, u32 s) noexcept {
          if (slots[s] == most) return;
          const std::size_t at = static_cast<std::size_t>(worker) * longest;
          detail::adjacent_cosines(cache.keys, s, cache.length(s), cosine + at);
          slots[s] = form_sets(KVMergerForm::slots, soft_protection(cache.length(s), limit[s]),
                               cosine + at, score.segment(s), scores.has_mass, cache.length(s),
                               most, cache.frozen, context.options.protection, state + first[s],
                               linked + first[s], order + at, evicted[s]);
        });
      }
    }
    for (u32 s = 1; shared && s < cache.segments; ++s) {
      slots[s] = slots[0];
      evicted[s] = evicted[0];
      std::copy_n(state, longest, state + first[s]);
      std::copy_n(linked, longest, linked + first[s]);
    }

    KVLEAN_RETURN_IF_ERROR(begin_plan(cache, slots, workspace, plan));
    plan.slots_evicted = evicted;
    if (pages) plan.page_tokens = context.options.sharing.page_tokens;
    u64* first_term = workspace.take<u64>(cache.segments + std::size_t{1});
    if (first_term == nullptr) return workspace.exhausted();
    first_term[0] = 0;
    for (u32 s = 0; s < cache.segments; ++s) {
      first_term[s + 1] =
          first_term[s] + detail::count_terms(cache.length(s), state + first[s], linked + first[s],
                                              pages ? kept.keep.segment(s) : nullptr);
    }
    for (u32 s = 0; pages && s < cache.segments; ++s) {
      const u64 merged = first_term[s + 1] - first_term[s];
      evicted[s] = cache.length(s) - slots[s] - static_cast<u32>(merged);
    }
    plan.num_terms = first_term[cache.segments];
    const bool merges = plan.num_terms != 0;
    if (merges) {
      const bool scaled = values == ValueScale::paper_set_size;
      KVLEAN_RETURN_IF_ERROR(begin_terms(plan.num_terms, scaled, workspace, plan));
      plan.needs |= needs_changed_values | detail::key_needs(keys);
    }
    const bool with_mass = cache.log_mass || (merges && log_mass != LogMass::none);
    if (with_mass) {
      plan.log_mass = workspace.take<float>(plan.num_slots());
      if (plan.log_mass == nullptr) return workspace.exhausted();
      plan.needs |= needs_log_mass;
    }
    parallel_for(context.options.executor, cache.segments, [&](u32, u32 s) noexcept {
      merge_segment(cache, rotation, s, shared ? mean : score.segment(s), state + first[s],
                    linked + first[s], pages ? kept.keep.segment(s) : nullptr, first_term[s], plan);
    });
    return StatusCode::ok;
  }

 private:
  u32 form_sets(KVMergerForm kind, KVMergerCounts soft, const float* cosine, const float* score,
                bool is_mass, u32 length, u32 limit, u32 frozen, const Protection& protection,
                u8* state, u8* linked, u64* order, u32& evicted) const noexcept {
    evicted = 0;
    if (length == 0) return 0;
    detail::mark_protected(soft, protection, frozen, score, length, limit, state, order);
    const bool limited = kind == KVMergerForm::slots || enforce_limit;
    const u32 excess = limited ? length - std::min(limit, length) : 0;
    evicted = detail::evict_unscored(score, length, excess, state);
    linked[length - 1] = 0;
    const u32 links =
        kind == KVMergerForm::slots
            ? detail::link_best(cosine, state, length, excess - evicted, linked, order)
            : detail::link_above(cosine, state, length, epsilon, linked);
    const u32 sets = length - evicted - links;
    if (limited && sets > limit) {
      const u32 least = sets - limit;
      const u32 gone =
          detail::evict_least_sets(score, is_mass, linked, length, least, state, order);
      evicted += gone;
      return sets - gone;
    }
    return sets;
  }

  KVMergerCounts soft_protection(u32 length, u32 limit) const noexcept {
    const KVMergerProtection preset = kvmerger_preset(static_cast<double>(limit) / length);
    const auto count = [length](i64 tokens, double fraction, double fallback) noexcept {
      const double wanted =
          tokens >= 0 ? static_cast<double>(tokens)
                      : std::floor((fraction >= 0.0 ? fraction : fallback) * length + 1e-9);
      return static_cast<u32>(std::min(wanted, static_cast<double>(length)));
    };
    return {count(recent_tokens, recent_fraction, preset.recent),
            count(heavy_tokens, heavy_fraction, preset.heavy)};
  }

  // Walks the runs of linked tokens and writes one slot a run (or, with `keep`, one a kept token).
  void merge_segment(const CacheView& cache, const RopeRotation& rotation, u32 s,
                     const float* score, const u8* state, const u8* linked, const u8* keep,
                     u64 next_term, CompressionPlan& plan) const noexcept {
    const u32 length = cache.length(s);
    u64 slot = plan.first[s];
    for (u32 begin = 0; begin < length;) {
      u32 end = begin + 1;
      while (end < length && linked[end - 1] != 0) ++end;
      if (state[begin] != 2) {
        u32 pivot = end;
        for (u32 t = begin; t < end; ++t) {
          if (keep != nullptr && keep[t] == 0) continue;
          if (pivot == end || score_key(score[t]) > score_key(score[pivot])) pivot = t;
        }
        if (keep == nullptr) {
          write_slot(cache, rotation, s, pivot, begin, end, nullptr, slot++, next_term, plan);
        } else {
          for (u32 t = begin; t < end; ++t) {
            if (keep[t] == 0) continue;
            const bool receives = t == pivot;
            write_slot(cache, rotation, s, t, receives ? begin : t, receives ? end : t + 1, keep,
                       slot++, next_term, plan);
          }
        }
      }
      begin = end;
    }
  }

  // The members of [begin, end) but the pivot (and, with `keep`, the kept ones) become its terms.
  void write_slot(const CacheView& cache, const RopeRotation& rotation, u32 s, u32 pivot, u32 begin,
                  u32 end, const u8* keep, u64 slot, u64& next_term,
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
      if (members != 0) {
        self = detail::gaussian_weights(cache, rotation, s, pivot, term, members, sigma,
                                        fixed_sigma, term_weight);
      }
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
      float largest = cache.finite_mass_bias(s, pivot);
      for (u32 i = 0; i < members; ++i) {
        largest = std::max(largest, cache.finite_mass_bias(s, token[i]));
      }
      detail::MassSum mass(largest);
      mass.add(self, cache.finite_mass_bias(s, pivot));
      for (u32 i = 0; i < members; ++i) mass.add(weight[i], cache.finite_mass_bias(s, token[i]));
      plan.log_mass[slot] = members != 0 ? mass.value(log_mass) : cache.finite_mass_bias(s, pivot);
    }
  }
};
static_assert(Reducer<KVMergerReducer>);

KVLEAN_NAMESPACE_END
