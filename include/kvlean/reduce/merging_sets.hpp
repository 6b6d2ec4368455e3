// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <new>

#include "kvlean/core/kv_cache.hpp"
#include "kvlean/core/order.hpp"
#include "kvlean/core/row_addresses.hpp"
#include "kvlean/reduce/cosine_scan.hpp"
#include "kvlean/reduce/kvmerger_options.hpp"
#include "kvlean/reduce/selection.hpp"

// KVMerger's merging sets: chained single linkage on the line of tokens (arXiv 2407.08454,
// algorithm 1). The paper's loop leaves "i := j" open; this follows all known ports: neighbours are
// linked or not, and a set is a maximal run of linked tokens, so the scan direction does not
// matter.

KVLEAN_NAMESPACE_BEGIN
namespace detail {

/// Cosine of each token's key with the next one's, [length - 1]; 0 when a key is zero. O(length *
/// d).
inline void adjacent_cosines(const Rows& keys, u32 head, u32 length, float* cosine) noexcept {
  CosineScan scan(keys, head, length);
  const RowAddresses key_at(keys, head);
  RowsAhead ahead(key_at, nullptr, is_contiguous_row(keys) ? length : 0);
  constexpr u32 most_fetched = 2 * CosineScan::tile;
  const std::byte* fetched[most_fetched];
  while (!scan.done()) {
    const CosineScan::Pairs pairs =
        scan.next(ahead.take(scan.position() + most_fetched, most_fetched, fetched));
    std::copy_n(pairs.cosine, pairs.end - pairs.begin, cosine + pairs.begin);
  }
}

/// Keys that ordering takes besides one a token.
inline constexpr u32 ordering_room = 16;

/// Memory for `length` + ordering_room keys as that of a search among as many scores of one run.
[[nodiscard]] inline CutScratch cut_scratch(u64* keys, u32 length) noexcept {
  constexpr u32 runs = 2;
  static_assert(runs * sizeof(ScoreRun) <= ordering_room * sizeof(u64));
  static_assert(alignof(ScoreRun) <= alignof(u64));
  CutScratch scratch;
  scratch.runs = reinterpret_cast<ScoreRun*>(keys);
  for (u32 i = 0; i < runs; ++i) ::new (static_cast<void*>(scratch.runs + i)) ScoreRun;
  scratch.room = CutScratch::floats_for(length);  // at most 4.5 bytes a score
  void* floats = keys + ordering_room;
  scratch.floats = static_cast<float*>(floats);
  return scratch;
}

/// Marks [length] the tokens that never merge: the caller's protection, the newest tokens, and the
/// `heavy` best scores among the others. The two soft parts shrink, heavy first, so that all marked
/// tokens fit into `limit`. `scratch`: length + ordering_room keys. Returns the number marked.
inline u32 mark_protected(KVMergerCounts soft, const Protection& protection, u32 frozen,
                          const float* score, u32 length, u32 limit, u8* marked,
                          u64* scratch) noexcept {
  Protection both = protection;
  if (soft.recent > protection.recent) {
    const u32 hard = protection.count(length, frozen);
    const u32 room = limit > hard ? limit - hard : 0;
    both.recent = protection.recent + std::min(soft.recent - protection.recent, room);
  }
  const u32 alone = both.count(length, frozen);
  const u32 heavy = std::min(soft.heavy, limit > alone ? limit - alone : 0);
  return select_top(score, length, alone + heavy, both, frozen, marked,
                    cut_scratch(scratch, length));
}

/// Threshold form: linked[t] = 1 when tokens t and t + 1 may merge and their cosine is above
/// epsilon. Returns the number of links.
inline u32 link_above(const float* cosine, const u8* marked, u32 length, float epsilon,
                      u8* linked) noexcept {
  u32 links = 0;
  for (u32 t = 0; t + 1 < length; ++t) {  // no branch: compilers vectorise it
    const unsigned alone = unsigned{marked[t]} | unsigned{marked[t + 1]};
    const unsigned link = unsigned{alone == 0} & unsigned{cosine[t] > epsilon};
    linked[t] = static_cast<u8>(link);
    links += link;
  }
  return links;
}

/// Slot form: accepts the `wanted` most similar links, each of which costs one slot; ties go to the
/// lower token. Returns the number accepted, fewer when no more exist. Cosines of tokens that may
/// not merge become NaN. `scratch`: length + ordering_room keys.
inline u32 link_best(float* cosine, const u8* marked, u32 length, u32 wanted, u8* linked,
                     u64* scratch) noexcept {
  if (length < 2) return 0;
  u32 candidates = 0;
  for (u32 t = 0; t + 1 < length; ++t) {
    const unsigned alone = unsigned{marked[t]} | unsigned{marked[t + 1]};
    cosine[t] = alone == 0 ? cosine[t] : std::numeric_limits<float>::quiet_NaN();
    // A NaN cosine is a broken key: it must not blend into others, whatever the need.
    candidates += cosine[t] == cosine[t] ? 1u : 0u;
  }
  wanted = std::min(wanted, candidates);
  mark_best(cosine, length - 1, wanted, linked, cut_scratch(scratch, length));
  return wanted;
}

/// Evicts up to `excess` unprotected tokens whose score is NaN, oldest first: they rank last, so
/// they go before anything is merged. Marks them 2 and returns their number.
inline u32 evict_unscored(const float* score, u32 length, u32 excess, u8* marked) noexcept {
  u32 evicted = 0;
  for (u32 t = 0; t < length && evicted < excess; ++t) {
    if (marked[t] == 0 && score[t] != score[t]) {
      marked[t] = 2;
      ++evicted;
    }
  }
  return evicted;
}

/// Evicts `excess` whole sets, least first (ties: the later set), and marks their tokens 2. A set
/// counts the sum of its scores when they are mass, else its best: ranks can be negative, and then
/// the sum would make the largest set the least. Protected sets never go. Returns the number.
inline u32 evict_least_sets(const float* score, bool is_mass, const u8* linked, u32 length,
                            u32 excess, u8* marked, u64* scratch) noexcept {
  u32 sets = 0;
  for (u32 begin = 0; begin < length;) {
    u32 end = begin + 1;
    double sum = score[begin];
    float best = score[begin];
    for (; end < length && linked[end - 1] != 0; ++end) {
      sum += score[end];
      if (score_key(score[end]) > score_key(best)) best = score[end];
    }
    if (marked[begin] == 0) {
      scratch[sets++] = token_key(is_mass ? static_cast<float>(sum) : best, begin);
    }
    begin = end;
  }
  excess = std::min(excess, sets);
  if (excess != 0 && excess < sets) {
    std::nth_element(scratch, scratch + (excess - 1), scratch + sets);
  }
  for (u32 i = 0; i < excess; ++i) {
    u32 token = token_of_key(scratch[i]);
    do {
      marked[token] = 2;
    } while (linked[token] != 0 && ++token < length);
  }
  return excess;
}

/// Terms of a segment's slots: the members of each surviving set but those that stay.
inline u64 count_terms(u32 length, const u8* state, const u8* linked, const u8* keep) noexcept {
  u64 terms = 0;
  if (keep == nullptr) {  // one stays: as many as links
    for (u32 t = 0; t < length; ++t) terms += linked[t] & static_cast<u8>(state[t] != 2 ? 1 : 0);
    return terms;
  }
  for (u32 begin = 0; begin < length;) {
    u32 end = begin + 1;
    while (end < length && linked[end - 1] != 0) ++end;
    u32 stay = 0;
    for (u32 t = begin; t < end; ++t) stay += keep[t];
    if (state[begin] != 2 && stay != 0) terms += end - begin - stay;
    begin = end;
  }
  return terms;
}

/// adjacent_cosines averaged over the heads, for sets that all heads share. `other`: length floats.
inline void mean_cosines(const CacheView& cache, u32 length, float* other, float* mean) noexcept {
  adjacent_cosines(cache.keys, 0, length, mean);
  for (u32 s = 1; s < cache.segments; ++s) {
    adjacent_cosines(cache.keys, s, length, other);
    for (u32 t = 0; t + 1 < length; ++t) mean[t] += other[t];
  }
  for (u32 t = 0; t + 1 < length; ++t) mean[t] /= static_cast<float>(cache.segments);
}

/// Links for whole-page sharing: every pair above epsilon with neither token protected.
inline void link_free(const float* cosine, u32 frozen, const Protection& protection, u32 length,
                      float epsilon, u8* state, u8* linked) noexcept {
  for (u32 t = 0; t < length; ++t) state[t] = protection.covers(t, length, frozen) ? u8{1} : u8{0};
  link_above(cosine, state, length, epsilon, linked);
  if (length != 0) linked[length - 1] = 0;
}

}  // namespace detail
KVLEAN_NAMESPACE_END
