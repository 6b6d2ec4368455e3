// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <limits>

#include "kvlean/core/concepts.hpp"
#include "kvlean/core/score_cut.hpp"

KVLEAN_NAMESPACE_BEGIN

namespace detail {

/// keep[t] (0 or 1) becomes 1 for the best `wanted` of `count` scores by the total order of
/// token_key: score descending, token ascending; among NaN the newest first. `scratch` is for as
/// many scores. O(count).
inline void mark_best(const float* scores, u32 count, u32 wanted, u8* keep,
                      const CutScratch& scratch) noexcept {
  if (wanted == 0 || wanted >= count) {
    std::fill_n(keep, count, wanted != 0 ? u8{1} : u8{0});
    return;
  }
  const ScoreRun run{scores, count, 1.0f, 0};
  const KeyCut cut = CutSearch({&run, 1}, wanted, scratch).find();
  const bool all_numbers = cut.key == 0;
  simd::select_kernels().mark(scores, count, score_of_key(std::max<u32>(cut.key, 1)),
                              score_of_key(cut.key + 1), all_numbers ? 0 : cut.ties, keep);
  if (!all_numbers) return;
  u64 ties = cut.ties;
  for (u32 token = count; token-- > 0 && ties != 0;) {
    if (keep[token] == 0) {
      keep[token] = 1;
      --ties;
    }
  }
}

}  // namespace detail

/// Marks in `keep` [length] (0 or 1) the protected tokens and, of the others, the best by the total
/// order of token_key until `slots` are kept; `slots` below the protected count keeps only the
/// protected. `scratch` is for `length` scores of one run. Returns the number kept. O(length).
inline u32 select_top(const float* scores, u32 length, u32 slots, const Protection& protection,
                      u32 frozen, u8* keep, const detail::CutScratch& scratch) noexcept {
  const u32 covered = protection.count(length, frozen);
  const u32 candidates = length - covered;
  const u32 front =
      candidates != 0 ? std::max(protection.sinks, frozen) : length;  // the rest of covered: recent
  const u32 wanted = std::min(slots - std::min(slots, covered), candidates);
  std::fill_n(keep, front, u8{1});
  if (candidates != 0) {
    detail::mark_best(scores + front, candidates, wanted, keep + front, scratch);
    std::fill(keep + front + candidates, keep + length, u8{1});
  }
  return covered + wanted;
}

/// Which tokens of each segment stay, for reducers that first select and then fold.
struct KeptTokens {
  Ragged<u8> keep;       ///< [segment][token] 0 or 1
  u32* count = nullptr;  ///< [segments]
};

namespace detail {

/// Mean over the heads, NaN heads left out, so that one broken head does not decide for all.
inline void mean_over_heads(const CacheView& cache, const Ragged<float>& values, u32 length,
                            float* mean) noexcept {
  constexpr u32 block = 64;  // tokens at a time: a head's row is read as it lies
  for (u32 begin = 0; begin < length; begin += block) {
    const u32 here = std::min(length - begin, block);
    double sum[block] = {};
    u32 usable[block] = {};
    for (u32 s = 0; s < cache.segments; ++s) {
      const float* row = values.segment(s) + begin;
      for (u32 i = 0; i < here; ++i) {
        const bool number = row[i] == row[i];
        sum[i] += number ? static_cast<double>(row[i]) : 0.0;
        usable[i] += number ? 1u : 0u;
      }
    }
    for (u32 i = 0; i < here; ++i) {
      mean[begin + i] = usable[i] != 0 ? static_cast<float>(sum[i] / usable[i])
                                       : std::numeric_limits<float>::quiet_NaN();
    }
  }
}

/// Keeps the best pages by mean score; a page with a protected token stays. `page_score` [pages],
/// `page_keep` [pages]; `scratch` is for as many scores. Returns tokens kept.
inline Status select_pages(const float* scores, u32 length, u32 slots, u32 page_tokens,
                           const Protection& protection, u32 frozen, u8* keep, float* page_score,
                           u8* page_keep, const CutScratch& scratch, u32& kept) noexcept {
  // Pages without a protected token are one run; the last, partly filled page must stay last.
  const u32 covered = protection.count(length, frozen);
  const u32 front = std::min(std::max(protection.sinks, frozen), length);
  const u32 end = covered == length ? 0 : front + (length - covered);
  const u32 first = front / page_tokens + (front % page_tokens != 0 ? 1u : 0u);
  const u32 last = std::max(end / page_tokens, first);
  const u32 candidates = last - first;
  kept = length - candidates * page_tokens;
  std::fill_n(keep, length, u8{1});
  if (kept > slots) return StatusCode::budget_below_protected;
  const u32 pages = std::min((slots - kept) / page_tokens, candidates);
  for (u32 page = 0; page < candidates; ++page) {
    const float* from = scores + static_cast<std::size_t>(first + page) * page_tokens;
    double sum = 0.0;
    for (u32 i = 0; i < page_tokens; ++i) sum += from[i];
    page_score[page] = static_cast<float>(sum / page_tokens);
  }
  mark_best(page_score, candidates, pages, page_keep, scratch);
  for (u32 page = 0; page < candidates; ++page) {
    if (page_keep[page] == 0) {
      std::fill_n(keep + static_cast<std::size_t>(first + page) * page_tokens, page_tokens, u8{0});
    }
  }
  kept += pages * page_tokens;
  return kept != 0 || length == 0 ? StatusCode::ok : StatusCode::budget_below_protected;
}

/// Heads that share one set of tokens must hold the same ones: equal lengths and positions.
[[nodiscard]] inline Status check_same_tokens(const CacheView& cache) noexcept {
  const u32 length = cache.length(0);
  for (u32 s = 1; s < cache.segments; ++s) {
    if (cache.length(s) != length) return StatusCode::shape_mismatch;
    if (cache.positions &&
        !std::equal(cache.positions.segment(0), cache.positions.segment(0) + length,
                    cache.positions.segment(s))) {
      return StatusCode::shape_mismatch;
    }
  }
  return StatusCode::ok;
}

}  // namespace detail

/// Selects by scores.rank, at most limit[s] tokens of segment s, under the caller's Sharing:
///   per_head, equal_count  every head by its own scores (limits were equalised before)
///   same_tokens            one set by the mean score over the heads
///   whole_pages            one set of pages by the mean score over heads and tokens of the page
/// `recent_share` > 0 also protects the newest floor(recent_share * limit) tokens of each segment.
/// Results are taken from the workspace. Errors: shape_mismatch when heads that must share tokens
/// differ in length or positions, budget_below_protected when protected pages exceed the limit,
/// workspace_too_small. O(tokens).
[[nodiscard]] inline Status select_kept(const CacheView& cache, const Scores& scores,
                                        const u32* limit, float recent_share, Context& context,
                                        KeptTokens& kept) noexcept {
  const PlanOptions& options = context.options;
  u64* first = context.workspace.take<u64>(cache.segments + std::size_t{1});
  kept.count = context.workspace.take<u32>(cache.segments);
  if (first == nullptr || kept.count == nullptr) return context.workspace.exhausted();
  first[0] = 0;
  for (u32 s = 0; s < cache.segments; ++s) first[s + 1] = first[s] + cache.length(s);
  u8* keep = context.workspace.take<u8>(first[cache.segments]);
  if (keep == nullptr) return context.workspace.exhausted();
  kept.keep = Ragged<u8>(keep, first);

  const bool shared = options.sharing.shares_tokens();
  const u32 workers = shared ? 1 : std::max<u32>(options.executor.workers, 1);
  const u32 longest = cache.max_length();
  WorkspaceScope scope(context.workspace);
  const bool pages = options.sharing.kind == SharingKind::whole_pages;
  const u64 room = detail::CutScratch::floats_for(longest);
  detail::ScoreRun* runs = context.workspace.take<detail::ScoreRun>(2 * std::size_t{workers});
  float* floats = context.workspace.take<float>(workers * room);
  float* mean = context.workspace.take<float>(shared ? longest : 0);
  float* page_score = context.workspace.take<float>(pages ? longest : 0);
  u8* page_keep = context.workspace.take<u8>(pages ? longest : 0);
  if (runs == nullptr || floats == nullptr || mean == nullptr || page_score == nullptr ||
      page_keep == nullptr) {
    return context.workspace.exhausted();
  }
  const auto scratch_of = [&](u32 worker) noexcept {
    return detail::CutScratch{runs + 2 * std::size_t{worker}, floats + worker * room, room};
  };

  const auto protection_for = [&](u32 slots) noexcept {
    Protection protection = options.protection;
    const u32 front = std::max(options.protection.sinks, cache.frozen);
    const u32 share = static_cast<u32>(static_cast<double>(recent_share) * slots);
    protection.recent =
        std::max(protection.recent, std::min(share, slots - std::min(slots, front)));
    return protection;
  };
  if (!shared) {
    parallel_for(options.executor, cache.segments, [&](u32 worker, u32 s) noexcept {
      kept.count[s] =
          select_top(scores.rank.segment(s), cache.length(s), limit[s], protection_for(limit[s]),
                     cache.frozen, kept.keep.segment(s), scratch_of(worker));
    });
    return StatusCode::ok;
  }
  KVLEAN_RETURN_IF_ERROR(detail::check_same_tokens(cache));
  const u32 slots = *std::min_element(limit, limit + cache.segments);
  detail::mean_over_heads(cache, scores.rank, longest, mean);
  u32 count = 0;
  if (pages) {
    KVLEAN_RETURN_IF_ERROR(detail::select_pages(mean, longest, slots, options.sharing.page_tokens,
                                                protection_for(slots), cache.frozen, keep,
                                                page_score, page_keep, scratch_of(0), count));
  } else {
    count =
        select_top(mean, longest, slots, protection_for(slots), cache.frozen, keep, scratch_of(0));
  }
  for (u32 s = 0; s < cache.segments; ++s) {
    kept.count[s] = count;
    if (s != 0) std::copy_n(keep, longest, kept.keep.segment(s));
  }
  return StatusCode::ok;
}

KVLEAN_NAMESPACE_END
