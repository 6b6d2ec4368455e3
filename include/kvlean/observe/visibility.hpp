// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>

#include "kvlean/observe/observation.hpp"

KVLEAN_NAMESPACE_BEGIN

/// Tokens [begin, end) of a segment.
struct TokenRange {
  u32 begin = 0;
  u32 end = 0;
};

/// The number of tokens of a segment whose position is below `limit`. Positions ascend. O(log n).
[[nodiscard]] inline u32 tokens_before(const CacheView& cache, u32 segment, i64 limit) noexcept {
  const u32 length = cache.length(segment);
  if (!cache.positions) return static_cast<u32>(std::clamp<i64>(limit, 0, length));
  const i32* first = cache.positions.segment(segment);
  return static_cast<u32>(std::lower_bound(first, first + length, limit) - first);
}

/// The tokens of `segment` that query i sees: at or before its position when causal, and within the
/// sliding window if there is one. In a cache without positions, queries without positions are its
/// newest `count` tokens (query i is token length - count + i) and given positions are compared
/// with the token's index. O(log n).
[[nodiscard]] inline TokenRange visible_tokens(const CacheView& cache, u32 segment,
                                               const Queries& queries, const AttentionSpec& spec,
                                               u32 i) noexcept {
  const u32 length = cache.length(segment);
  const bool newest =
      !cache.positions && queries.positions == nullptr && queries.first_position < 0;
  const i64 own = newest ? static_cast<i64>(length) - queries.count + i
                         : static_cast<i64>(queries.position(i, cache.next_position));
  TokenRange range{0, length};
  if (queries.mask == Mask::causal) range.end = tokens_before(cache, segment, own + 1);
  if (spec.sliding_window != 0) {
    range.begin = tokens_before(cache, segment, own + 1 - static_cast<i64>(spec.sliding_window));
  }
  range.begin = std::min(range.begin, range.end);
  return range;
}

KVLEAN_NAMESPACE_END
