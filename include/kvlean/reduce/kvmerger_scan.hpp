// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/reduce/kvmerger_batch.hpp"
#include "kvlean/reduce/merging_sets.hpp"

KVLEAN_NAMESPACE_BEGIN
namespace detail {

/// The threshold form's links and sets in one reading of the keys: calls closed(begin, end) for
/// whole sets, in order, when the keys of [begin, end) and of the token after it have been read. By
/// then nothing before `end` is read again. Writes linked[t]; returns the number of links. Rows of
/// up to `fetched_tokens` tokens after a tile are prefetched while it is read.
template <class Closed>
u32 scan_sets(const Rows& keys, u32 head, u32 length, float epsilon, const u8* state, u8* linked,
              RowsAhead& ahead, u32 fetched_tokens, Closed&& closed) noexcept {
  if (length == 0) return 0;
  CosineScan scan(keys, head, length);
  const std::byte* fetched[2 * CosineScan::tile];
  u32 links = 0;
  u32 begin = 0;
  while (!scan.done()) {
    const CosineScan::Pairs pairs = scan.next(ahead.take(
        scan.position() + CosineScan::tile + fetched_tokens, 2 * CosineScan::tile, fetched));
    links += link_above(pairs.cosine, state + pairs.begin, pairs.end - pairs.begin + 1, epsilon,
                        linked + pairs.begin);
    u32 end = pairs.end;
    while (end > begin && linked[end - 1] != 0) --end;
    if (end > begin) closed(begin, end);
    begin = end;
  }
  linked[length - 1] = 0;
  closed(begin, length);
  return links;
}

/// The same calls for links that are known.
template <class Closed>
void for_each_group(u32 length, const u8* linked, Closed&& closed) noexcept {
  constexpr u32 tokens = 32;
  for (u32 begin = 0; begin < length;) {
    u32 end = std::min(length - begin, tokens) + begin;
    while (end < length && linked[end - 1] != 0) ++end;
    closed(begin, end);
    begin = end;
  }
}

/// Calls visit(begin, end) for every maximal run of linked tokens in [begin, end). O(end - begin).
template <class Visit>
void for_each_set(u32 begin, u32 end, const u8* linked, Visit&& visit) noexcept {
  while (begin < end) {
    u32 next = begin + 1;
    while (next < end && linked[next - 1] != 0) ++next;
    visit(begin, next);
    begin = next;
  }
}

/// Weights of all members of the sets in [begin, end), whole sets, by token. `member`: as many
/// numbers as the longest set has tokens.
inline void weigh_sets(const CacheView& cache, const RopeRotation& rotation, u32 s,
                       const RowAddresses& key_at, const float* score, const u8* state,
                       const u8* linked, u32 begin, u32 end, const SetWriter::Options& options,
                       u32* member, float* weight) noexcept {
  if (end - begin <= SetBatch::most_tokens) {
    SetBatch batch;
    batch.find(score, state, linked, begin, end);
    batch.weigh(cache, rotation, s, key_at, options, {});
    for (u32 i = 0; i < batch.sets; ++i) {
      const u32 slot = batch.slot_of_set[i];
      weight[batch.pivot[slot]] = batch.self[slot];
    }
    for (u32 i = 0; i < batch.terms; ++i) weight[batch.token[i]] = batch.weight[i];
    return;
  }
  for_each_set(begin, end, linked, [&](u32 from, u32 to) noexcept {
    if (to - from == 1) return;
    const u32 pivot = find_pivot(score, from, to, nullptr);
    u32 members = 0;
    for (u32 t = from; t < to; ++t) {
      if (t != pivot) member[members++] = t;
    }
    // Members before the pivot are in their places, those after it one too low.
    const float self = gaussian_weights(cache, rotation, s, pivot, member, members, options.sigma,
                                        options.fixed_sigma, weight + from);
    std::copy_backward(weight + pivot, weight + to - 1, weight + to);
    weight[pivot] = self;
  });
}

}  // namespace detail
KVLEAN_NAMESPACE_END
