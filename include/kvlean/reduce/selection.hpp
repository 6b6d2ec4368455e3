// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <limits>

#include "kvlean/core/concepts.hpp"
#include "kvlean/core/order.hpp"

KVLEAN_NAMESPACE_BEGIN

/// Marks in `keep` [length] (0 or 1) the protected tokens and, of the others, the best by the total
/// order of token_key until `slots` are kept; `slots` below the protected count keeps only the
/// protected. `scratch` holds `length` keys. Returns the number kept. O(length) on average.
inline u32 select_top(const float* scores, u32 length, u32 slots, const Protection& protection,
                      u32 frozen, u8* keep, u64* scratch) noexcept {
  u32 kept = 0;
  u32 candidates = 0;
  for (u32 token = 0; token < length; ++token) {
    const bool covered = protection.covers(token, length, frozen);
    keep[token] = covered ? u8{1} : u8{0};
    if (covered) {
      ++kept;
    } else {
      scratch[candidates++] = token_key(scores[token], token);
    }
  }
  const u32 wanted = slots > kept ? std::min(slots - kept, candidates) : 0;
  if (wanted == 0) return kept;
  if (wanted < candidates) {
    std::nth_element(scratch, scratch + (wanted - 1), scratch + candidates,
                     [](u64 a, u64 b) { return a > b; });
  }
  for (u32 i = 0; i < wanted; ++i) keep[token_of_key(scratch[i])] = 1;
  return kept + wanted;
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
  for (u32 token = 0; token < length; ++token) {
    double sum = 0.0;
    u32 usable = 0;
    for (u32 s = 0; s < cache.segments; ++s) {
      const float value = values(s, token);
      if (value == value) {
        sum += value;
        ++usable;
      }
    }
    mean[token] =
        usable != 0 ? static_cast<float>(sum / usable) : std::numeric_limits<float>::quiet_NaN();
  }
}

/// Keeps the best pages by mean score; a page with a protected token stays. Returns tokens kept.
inline Status select_pages(const float* scores, u32 length, u32 slots, u32 page_tokens,
                           const Protection& protection, u32 frozen, u8* keep, u64* scratch,
                           u32& kept) noexcept {
  std::fill_n(keep, length, u8{0});
  kept = 0;
  u32 candidates = 0;
  for (u32 begin = 0, page = 0; begin < length; begin += page_tokens, ++page) {
    const u32 end = std::min(length - begin, page_tokens) + begin;
    bool covered = false;
    double sum = 0.0;
    for (u32 token = begin; token < end; ++token) {
      covered = covered || protection.covers(token, length, frozen);
      sum += scores[token];
    }
    if (covered || end - begin < page_tokens) {  // the last, partly filled page must stay last
      std::fill(keep + begin, keep + end, u8{1});
      kept += end - begin;
    } else {
      scratch[candidates++] = token_key(static_cast<float>(sum / page_tokens), page);
    }
  }
  if (kept > slots) return StatusCode::budget_below_protected;
  const u32 pages = std::min((slots - kept) / page_tokens, candidates);
  if (pages < candidates && pages != 0) {
    std::nth_element(scratch, scratch + (pages - 1), scratch + candidates,
                     [](u64 a, u64 b) { return a > b; });
  }
  for (u32 i = 0; i < pages; ++i) {
    std::fill_n(keep + static_cast<std::size_t>(token_of_key(scratch[i])) * page_tokens,
                page_tokens, u8{1});
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
/// workspace_too_small. O(tokens) on average.
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
  u64* scratch = context.workspace.take<u64>(static_cast<std::size_t>(workers) * longest);
  float* mean = context.workspace.take<float>(shared ? longest : 0);
  if (scratch == nullptr || mean == nullptr) return context.workspace.exhausted();

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
      kept.count[s] = select_top(scores.rank.segment(s), cache.length(s), limit[s],
                                 protection_for(limit[s]), cache.frozen, kept.keep.segment(s),
                                 scratch + static_cast<std::size_t>(worker) * longest);
    });
    return StatusCode::ok;
  }
  KVLEAN_RETURN_IF_ERROR(detail::check_same_tokens(cache));
  const u32 slots = *std::min_element(limit, limit + cache.segments);
  detail::mean_over_heads(cache, scores.rank, longest, mean);
  u32 count = 0;
  if (options.sharing.kind == SharingKind::whole_pages) {
    KVLEAN_RETURN_IF_ERROR(detail::select_pages(mean, longest, slots, options.sharing.page_tokens,
                                                protection_for(slots), cache.frozen, keep, scratch,
                                                count));
  } else {
    count = select_top(mean, longest, slots, protection_for(slots), cache.frozen, keep, scratch);
  }
  for (u32 s = 0; s < cache.segments; ++s) {
    kept.count[s] = count;
    if (s != 0) std::copy_n(keep, longest, kept.keep.segment(s));
  }
  return StatusCode::ok;
}

KVLEAN_NAMESPACE_END
