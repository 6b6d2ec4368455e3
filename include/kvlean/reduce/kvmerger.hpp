// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>

#include "kvlean/reduce/fused_reducer.hpp"
#include "kvlean/reduce/kvmerger_in_place.hpp"
#include "kvlean/reduce/kvmerger_sets.hpp"

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
/// time; scratch 6 bytes a token, and up to 24 a worker and token of the longest segment.
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
    detail::MergingSets sets;
    KVLEAN_RETURN_IF_ERROR(sets.take(cache, scores, limit, context));
    if (form == KVMergerForm::threshold && context.options.sharing.kind == SharingKind::per_head) {
      KVLEAN_RETURN_IF_ERROR(form_and_weigh(cache, scores, limit, rotation, context, sets));
    } else {
      KVLEAN_RETURN_IF_ERROR(form_all(cache, scores, limit, context, sets));
    }
    return write_plan(cache, scores, rotation, sets, context, plan);
  }

  /// reduce() and apply() in place at once, with the same bits and without a plan: the threshold
  /// form reads K and V once and writes the survivors, the slot form reads K once more. `done` says
  /// whether it was done; it isn't, and nothing is changed, where that is not possible: rows whose
  /// elements are not neighbours (accessors, a transposed V), K and V in one buffer, positions or
  /// log mass that heads share, whole_pages, and what apply() would refuse. The threshold form
  /// takes two readings of K without a `lengths` array, and with a sharing other than per_head.
  [[nodiscard]] Status reduce_in_place(CacheView& cache, const Scores& scores, const u32* limit,
                                       Context& context, bool& done) const noexcept {
    done = false;
    KVLEAN_RETURN_IF_ERROR(check());
    const SharingKind sharing = context.options.sharing.kind;
    if (sharing == SharingKind::whole_pages) return StatusCode::ok;
    if (!detail::merges_in_place(cache, log_mass, true)) return StatusCode::ok;
    if (keys == MergedKeys::aligned) {
      RopeRotation rotation;
      KVLEAN_RETURN_IF_ERROR(detail::prepare_alignment(cache, rotation));
    }
    detail::MergingSets sets;
    KVLEAN_RETURN_IF_ERROR(sets.take(cache, scores, limit, context));
    const bool at_once = form == KVMergerForm::threshold && sharing == SharingKind::per_head &&
                         detail::merges_in_place(cache, log_mass, false);
    if (!at_once) {
      KVLEAN_RETURN_IF_ERROR(form_all(cache, scores, limit, context, sets));
      if (cache.lengths == nullptr &&
          !std::all_of(sets.slots, sets.slots + cache.segments,
                       [&](u32 slots) { return slots == sets.slots[0]; })) {
        return StatusCode::needs_ragged_lengths;
      }
    }
    KVLEAN_RETURN_IF_ERROR(merge_in_place(cache, scores, limit, at_once, context, sets));
    if (cache.lengths != nullptr) {
      std::copy_n(sets.slots, cache.segments, cache.lengths);
    } else {
      cache.uniform_length = sets.slots[0];
    }
    done = true;
    return StatusCode::ok;
  }

 private:
  [[nodiscard]] detail::SetWriter::Options weights() const noexcept {
    return {sigma, fixed_sigma, log_mass};
  }

  // Keys of a worker to order a segment with.
  static std::size_t order_size(u32 longest) noexcept {
    return std::size_t{longest} + detail::ordering_room;
  }

  // Protects shares of `budget`, lets link(wanted) link what may, evicts down to the limit. Returns
  // the slots left.
  template <class Link>
  u32 form_sets(KVMergerForm kind, const Context& context, const float* score, bool is_mass,
                u32 length, u32 budget, u32 limit, u32 frozen, u8* state, const u8* linked,
                u64* order, u32& evicted, Link&& link) const noexcept {
    evicted = 0;
    if (length == 0) return 0;
    detail::mark_protected(soft_protection(length, budget), context.options.protection, frozen,
                           score, length, limit, state, order);
    const bool limited = kind == KVMergerForm::slots || enforce_limit;
    const u32 excess = limited ? length - std::min(limit, length) : 0;
    evicted = detail::evict_unscored(score, length, excess, state);
    const u32 sets = length - evicted - link(excess - evicted);
    if (!limited || sets <= limit) return sets;
    const u32 gone =
        detail::evict_least_sets(score, is_mass, linked, length, sets - limit, state, order);
    evicted += gone;
    return sets - gone;
  }

  // Sets of all segments from cosines that are known before.
  Status form_all(const CacheView& cache, const Scores& scores, const u32* limit, Context& context,
                  detail::MergingSets& sets) const noexcept {
    Workspace& workspace = context.workspace;
    WorkspaceScope scope(workspace);
    const Executor& executor = context.options.executor;
    const u32 longest = cache.max_length();
    const u32 tasks = sets.shared ? 1 : cache.segments;
    const u32 workers = std::max<u32>(executor.workers, 1);
    float* cosines = workspace.take<float>(static_cast<std::size_t>(workers) * longest);
    float* other = workspace.take<float>(sets.shared ? longest : 0);
    u64* orders = workspace.take<u64>(workers * order_size(longest));
    if (cosines == nullptr || other == nullptr || orders == nullptr) return workspace.exhausted();
    const auto form_segment = [&](KVMergerForm kind, u32 worker, u32 s, u32 most) noexcept {
      const u32 length = cache.length(s);
      float* cosine = cosines + static_cast<std::size_t>(worker) * longest;
      u64* order = orders + worker * order_size(longest);
      if (sets.shared) {
        detail::mean_cosines(cache, length, other, cosine);
      } else {
        detail::adjacent_cosines(cache.keys, s, length, cosine);
      }
      u8* state = sets.state + sets.first[s];
      u8* linked = sets.linked + sets.first[s];
      if (sets.pages) {
        sets.slots[s] = sets.kept.count[s];
        detail::link_free(cosine, cache.frozen, context.options.protection, length, epsilon, state,
                          linked);
        return;
      }
      sets.slots[s] =
          form_sets(kind, context, sets.score(scores, s), scores.has_mass, length, limit[s], most,
                    cache.frozen, state, linked, order, sets.evicted[s], [&](u32 wanted) noexcept {
                      linked[length - 1] = 0;
                      return kind == KVMergerForm::slots
                                 ? detail::link_best(cosine, state, length, wanted, linked, order)
                                 : detail::link_above(cosine, state, length, epsilon, linked);
                    });
    };
    parallel_for(executor, tasks,
                 [&](u32 worker, u32 s) noexcept { form_segment(form, worker, s, limit[s]); });
    if (context.options.sharing.kind == SharingKind::equal_count) {
      // Emergent counts differ: heads below the largest give back their weakest links, as far as
      // the shortest head goes.
      u32 most = *std::max_element(sets.slots, sets.slots + cache.segments);
      for (u32 s = 0; s < cache.segments; ++s) most = std::min(most, cache.length(s));
      parallel_for(executor, tasks, [&](u32 worker, u32 s) noexcept {
        if (sets.slots[s] != most) form_segment(KVMergerForm::slots, worker, s, most);
      });
    }
    if (sets.shared) sets.copy_first_to_all(cache);
    return StatusCode::ok;
  }

  // The threshold form: sets and their weights from one reading of the keys.
  Status form_and_weigh(const CacheView& cache, const Scores& scores, const u32* limit,
                        const RopeRotation& rotation, Context& context,
                        detail::MergingSets& sets) const noexcept {
    Workspace& workspace = context.workspace;
    sets.weight = workspace.take<float>(sets.first[cache.segments]);
    WorkspaceScope scope(workspace);
    const u32 longest = cache.max_length();
    const u32 workers = std::max<u32>(context.options.executor.workers, 1);
    u64* orders = workspace.take<u64>(workers * order_size(longest));
    u32* members = workspace.take<u32>(static_cast<std::size_t>(workers) * longest);
    if (sets.weight == nullptr || orders == nullptr || members == nullptr) {
      return workspace.exhausted();
    }
    parallel_for(context.options.executor, cache.segments, [&](u32 worker, u32 s) noexcept {
      const std::size_t at = static_cast<std::size_t>(worker) * longest;
      const u32 length = cache.length(s);
      const float* score = sets.score(scores, s);
      u8* state = sets.state + sets.first[s];
      u8* linked = sets.linked + sets.first[s];
      const detail::RowAddresses key_at(cache.keys, s);
      detail::RowsAhead ahead(key_at, nullptr, detail::is_contiguous_row(cache.keys) ? length : 0);
      sets.slots[s] = form_sets(
          form, context, score, scores.has_mass, length, limit[s], limit[s], cache.frozen, state,
          linked, orders + worker * order_size(longest), sets.evicted[s], [&](u32) noexcept {
            return detail::scan_sets(
                cache.keys, s, length, epsilon, state, linked, ahead, detail::RowsAhead::lead,
                [&](u32 begin, u32 end) noexcept {
                  detail::weigh_sets(cache, rotation, s, key_at, score, state, linked, begin, end,
                                     weights(), members + at, sets.weight + sets.first[s]);
                });
          });
    });
    return StatusCode::ok;
  }

  // Merges the sets formed before or, with `at_once`, those of the threshold form as they are
  // found.
  Status merge_in_place(CacheView& cache, const Scores& scores, const u32* limit, bool at_once,
                        Context& context, detail::MergingSets& sets) const noexcept {
    Workspace& workspace = context.workspace;
    const u32 longest = cache.max_length();
    const u32 workers = std::max<u32>(context.options.executor.workers, 1);
    const std::size_t all = static_cast<std::size_t>(workers) * longest;
    u64* orders = workspace.take<u64>(at_once ? workers * order_size(longest) : 0);
    const detail::InPlaceMerger::Scratch scratch{
        workspace.take<u32>(all), workspace.take<float>(all), workspace.take<float>(all)};
    if (orders == nullptr || scratch.token == nullptr || scratch.weight == nullptr ||
        scratch.value_weight == nullptr) {
      return workspace.exhausted();
    }
    CompressionPlan needs;
    needs.needs = detail::key_needs(keys);
    const detail::KeyRotation rotation(needs, cache);
    parallel_for(context.options.executor, cache.segments, [&](u32 worker, u32 s) noexcept {
      const std::size_t at = static_cast<std::size_t>(worker) * longest;
      const u32 length = cache.length(s);
      const float* score = sets.score(scores, s);
      u8* state = sets.state + sets.first[s];
      u8* linked = sets.linked + sets.first[s];
      detail::InPlaceMerger merger(
          cache, rotation, s, score, weights(), keys, values, at_once,
          {scratch.token + at, scratch.weight + at, scratch.value_weight + at});
      const auto write = [&](u32 begin, u32 end) noexcept {
        merger.write(state, linked, begin, end);
      };
      if (at_once) {
        sets.slots[s] = form_sets(
            form, context, score, scores.has_mass, length, limit[s], limit[s], cache.frozen, state,
            linked, orders + worker * order_size(longest), sets.evicted[s], [&](u32) noexcept {
              return detail::scan_sets(cache.keys, s, length, epsilon, state, linked,
                                       merger.ahead(), detail::RowsAhead::lead * 3 / 8, write);
            });
      } else {
        detail::for_each_group(length, linked, write);
      }
      merger.finish();
      if (merger.slots() == sets.slots[s]) return;
      // Sets above the limit were found when all were written. Tokens without a score have no slot:
      // they went before.
      u32 slot = 0;
      u32 stay = 0;
      detail::for_each_set(0, length, linked, [&](u32 begin, u32) noexcept {
        if (state[begin] == 2 && score[begin] != score[begin]) return;
        if (state[begin] != 2) merger.move_slot(slot, stay++);
        ++slot;
      });
    });
    return StatusCode::ok;
  }

  Status write_plan(const CacheView& cache, const Scores& scores, const RopeRotation& rotation,
                    const detail::MergingSets& sets, Context& context,
                    CompressionPlan& plan) const noexcept {
    Workspace& workspace = context.workspace;
    KVLEAN_RETURN_IF_ERROR(begin_plan(cache, sets.slots, workspace, plan));
    plan.slots_evicted = sets.evicted;
    if (sets.pages) plan.page_tokens = context.options.sharing.page_tokens;
    u64* first_term = workspace.take<u64>(cache.segments + std::size_t{1});
    if (first_term == nullptr) return workspace.exhausted();
    sets.count_terms(cache, first_term);
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
      const detail::SetWriter writer(
          cache, rotation, s, weights(),
          sets.weight != nullptr ? sets.weight + sets.first[s] : nullptr);
      sets.write_segment(writer, cache, sets.score(scores, s), s, first_term[s], plan);
    });
    return StatusCode::ok;
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
};
static_assert(FusedReducer<KVMergerReducer>);

KVLEAN_NAMESPACE_END
