// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/reduce/kvmerger_scan.hpp"
#include "kvlean/reduce/plan_slots.hpp"

KVLEAN_NAMESPACE_BEGIN
namespace detail {

/// The merging sets of a layer, as arrays in the workspace.
struct MergingSets {
  bool shared = false;      ///< one set of runs for all heads
  bool pages = false;       ///< whole pages stay, given by `kept`
  u32* slots = nullptr;     ///< [segments] slots each ends with
  u32* evicted = nullptr;   ///< [segments] slots dropped after all merges
  u64* first = nullptr;     ///< [segments + 1] where each segment's tokens begin
  u8* state = nullptr;      ///< by token: 0 free, 1 stays alone (or on its page), 2 evicted
  u8* linked = nullptr;     ///< by token: 1 when it merges with the next one
  float* weight = nullptr;  ///< by token, in sets of several; null: not computed yet
  float* mean = nullptr;    ///< shared: mean score of each token
  KeptTokens kept;

  [[nodiscard]] const float* score(const Scores& scores, u32 s) const noexcept {
    if (shared) return mean;
    return (scores.has_mass ? scores.mass : scores.rank).segment(s);
  }

  /// Takes the arrays; with whole_pages also selects the pages, with shared tokens the mean score.
  [[nodiscard]] Status take(const CacheView& cache, const Scores& scores, const u32* limit,
                            Context& context) noexcept {
    Workspace& workspace = context.workspace;
    shared = context.options.sharing.shares_tokens();
    pages = context.options.sharing.kind == SharingKind::whole_pages;
    slots = workspace.take<u32>(cache.segments);
    evicted = workspace.take_zeroed<u32>(cache.segments);
    first = workspace.take<u64>(cache.segments + std::size_t{1});
    if (slots == nullptr || evicted == nullptr || first == nullptr) return workspace.exhausted();
    first[0] = 0;
    for (u32 s = 0; s < cache.segments; ++s) first[s + 1] = first[s] + cache.length(s);
    const u32 longest = cache.max_length();
    state = workspace.take<u8>(first[cache.segments]);
    linked = workspace.take<u8>(first[cache.segments]);
    mean = workspace.take<float>(shared ? longest : 0);
    if (state == nullptr || linked == nullptr || mean == nullptr) return workspace.exhausted();
    if (pages) KVLEAN_RETURN_IF_ERROR(select_kept(cache, scores, limit, 0.0f, context, kept));
    if (!shared) return StatusCode::ok;
    KVLEAN_RETURN_IF_ERROR(check_same_tokens(cache));
    mean_over_heads(cache, scores.has_mass ? scores.mass : scores.rank, longest, mean);
    return StatusCode::ok;
  }

  void copy_first_to_all(const CacheView& cache) const noexcept {
    for (u32 s = 1; s < cache.segments; ++s) {
      slots[s] = slots[0];
      evicted[s] = evicted[0];
      std::copy_n(state, cache.length(s), state + first[s]);
      std::copy_n(linked, cache.length(s), linked + first[s]);
    }
  }

  /// Prefix sums of the terms of the segments' slots; with pages, what is neither kept nor merged
  /// counts as evicted.
  void count_terms(const CacheView& cache, u64* first_term) const noexcept {
    first_term[0] = 0;
    for (u32 s = 0; s < cache.segments; ++s) {
      const u64 terms = detail::count_terms(cache.length(s), state + first[s], linked + first[s],
                                            pages ? kept.keep.segment(s) : nullptr);
      first_term[s + 1] = first_term[s] + terms;
      if (pages) evicted[s] = cache.length(s) - slots[s] - static_cast<u32>(terms);
    }
  }

  /// Writes one slot a set (or, with pages, one a kept token) into the plan.
  void write_segment(const SetWriter& writer, const CacheView& cache, const float* scores, u32 s,
                     u64 next_term, CompressionPlan& plan) const noexcept {
    const u32 length = cache.length(s);
    u64 slot = plan.first[s];
    if (pages) {
      write_pages(writer, scores, s, length, slot, next_term, plan);
      return;
    }
    const RowAddresses key_at(cache.keys, s);
    const bool reads_keys = weight == nullptr && is_contiguous_row(cache.keys);
    RowsAhead ahead(key_at, nullptr, reads_keys ? length : 0);
    constexpr u32 most_fetched = 2 * SetBatch::most_tokens;
    const std::byte* fetched[most_fetched];
    SetBatch batch;
    for_each_group(length, linked + first[s], [&](u32 begin, u32 end) noexcept {
      const u8* states = state + first[s];
      if (end - begin > SetBatch::most_tokens) {
        for_each_set(begin, end, linked + first[s], [&](u32 from, u32 to) noexcept {
          if (states[from] == 2) return;
          writer.write(find_pivot(scores, from, to, nullptr), from, to, nullptr, slot++, next_term,
                       plan);
        });
        return;
      }
      batch.find(scores, states, linked + first[s], begin, end);
      if (weight != nullptr) {
        batch.set_weights(weight + first[s]);
      } else {
        batch.weigh(cache, writer.rotation(), s, key_at, writer.options(),
                    ahead.take(end + RowsAhead::lead, most_fetched, fetched));
      }
      writer.write(batch, slot, next_term, plan);
      slot += batch.slots;
      next_term += batch.terms;
    });
  }

 private:
  void write_pages(const SetWriter& writer, const float* scores, u32 s, u32 length, u64 slot,
                   u64 next_term, CompressionPlan& plan) const noexcept {
    const u8* keep = kept.keep.segment(s);
    for_each_set(0, length, linked + first[s], [&](u32 begin, u32 end) noexcept {
      if (state[first[s] + begin] == 2) return;
      const u32 pivot = find_pivot(scores, begin, end, keep);
      for (u32 t = begin; t < end; ++t) {
        if (keep[t] == 0) continue;
        const bool receives = t == pivot;
        writer.write(t, receives ? begin : t, receives ? end : t + 1, keep, slot++, next_term,
                     plan);
      }
    });
  }
};

}  // namespace detail
KVLEAN_NAMESPACE_END
