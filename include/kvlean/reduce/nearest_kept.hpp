// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cmath>

#include "kvlean/reduce/nearest_search.hpp"
#include "kvlean/reduce/plan_slots.hpp"

KVLEAN_NAMESPACE_BEGIN

/// For each dropped token of a segment, the kept slot whose key is most similar by cosine.
struct NearestKept {
  Ragged<u32> slot;      ///< [segment][token] slot index within the segment; unset for kept tokens
  Ragged<float> cosine;  ///< [segment][token] similarity; -2 when no slot may receive
};

/// Finds the nearest receiver of every dropped token. Receivers are the plan's slots, frozen ones
/// excluded, and with `spare_protected` the protected ones too (for folds that move keys). Ties go
/// to the lower slot. O(dropped * kept * d) time; scratch 4 * d bytes a kept slot of the longest
/// head, and 256 * d bytes.
[[nodiscard]] inline Status find_nearest_kept(const CacheView& cache, const KeptTokens& kept,
                                              const CompressionPlan& plan, bool spare_protected,
                                              Context& context, NearestKept& nearest) noexcept {
  Workspace& workspace = context.workspace;
  const u64 tokens = kept.keep.first[cache.segments - 1] + cache.length(cache.segments - 1);
  nearest.slot = Ragged<u32>(workspace.take<u32>(tokens), kept.keep.first);
  nearest.cosine = Ragged<float>(workspace.take<float>(tokens), kept.keep.first);
  if (!nearest.slot || !nearest.cosine) return workspace.exhausted();
  u32 most = 0;
  for (u32 s = 0; s < cache.segments; ++s) most = std::max(most, plan.length[s]);
  const u32 width = cache.keys.width;
  const u32 workers = std::max<u32>(context.options.executor.workers, 1);
  WorkspaceScope scope(workspace);
  const std::size_t rows = static_cast<std::size_t>(most) * width;
  float* units = workspace.take<float>(rows * workers);
  u32* receivers = workspace.take<u32>(static_cast<std::size_t>(most) * workers);
  const std::size_t search_floats = detail::NearestSearch::scratch_floats(width);
  float* searches = workspace.take<float>(search_floats * workers);
  if (units == nullptr || receivers == nullptr || searches == nullptr) {
    return workspace.exhausted();
  }

  parallel_for(context.options.executor, cache.segments, [&](u32 worker, u32 s) noexcept {
    float* unit = units + worker * rows;
    u32* receiver = receivers + static_cast<std::size_t>(worker) * most;
    const u32* anchor = plan.anchor + plan.first[s];
    const u32 length = cache.length(s);
    u32 count = 0;
    for (u32 slot = 0; slot < plan.length[s]; ++slot) {
      if (anchor[slot] < cache.frozen) continue;
      if (spare_protected &&
          context.options.protection.covers(anchor[slot], length, cache.frozen)) {
        continue;
      }
      detail::load_unit_key(cache.keys, s, anchor[slot], unit + std::size_t{count} * width);
      receiver[count++] = slot;
    }
    const detail::NearestSearch search(width, searches + worker * search_floats);
    constexpr u32 block = detail::NearestSearch::block_tokens;
    const u8* keep = kept.keep.segment(s);
    for (u32 next = 0; next < length;) {
      u32 token[block];
      u32 dropped = 0;
      for (; next < length && dropped < block; ++next) {
        if (keep[next] != 0) continue;
        detail::load_unit_key(cache.keys, s, next, search.row(dropped));
        token[dropped++] = next;
      }
      u32 best[block];
      float cosine[block];
      search.search(dropped, unit, count, best, cosine);
      for (u32 i = 0; i < dropped; ++i) {
        nearest.slot(s, token[i]) = count != 0 ? receiver[best[i]] : 0;
        // Rounding may leave [-1, 1], and -2 means none.
        nearest.cosine(s, token[i]) =
            cosine[i] > -2.0f ? std::clamp(cosine[i], -1.0f, 1.0f) : cosine[i];
      }
    }
  });
  return StatusCode::ok;
}

/// Sorts the dropped tokens that `accept(s, token)` takes into the plan's terms by receiving slot
/// (counting sort, tokens ascending within a slot) and sets term_begin and term_end. Weights are
/// left to the caller. The plan must have its anchors and the per-term arrays. O(tokens).
template <class Accept>
void group_terms_by_slot(const CacheView& cache, const KeptTokens& kept, const NearestKept& nearest,
                         CompressionPlan& plan, Accept&& accept) noexcept {
  plan.num_terms = 0;
  for (u32 s = 0; s < cache.segments; ++s) {
    const u64 first = plan.first[s];
    const u8* keep = kept.keep.segment(s);
    const u32 length = cache.length(s);
    for (u32 slot = 0; slot < plan.length[s]; ++slot) plan.term_end[first + slot] = 0;
    const auto taken = [&](u32 token) noexcept {
      return keep[token] == 0 && nearest.cosine(s, token) >= -1.5f && accept(s, token);
    };
    for (u32 token = 0; token < length; ++token) {
      if (taken(token)) ++plan.term_end[first + nearest.slot(s, token)];
    }
    for (u32 slot = 0; slot < plan.length[s]; ++slot) {
      const u64 count = plan.term_end[first + slot];
      plan.term_begin[first + slot] = plan.term_end[first + slot] = plan.num_terms;
      plan.num_terms += count;
    }
    for (u32 token = 0; token < length; ++token) {
      if (taken(token)) plan.term_token[plan.term_end[first + nearest.slot(s, token)]++] = token;
    }
  }
}

KVLEAN_NAMESPACE_END
