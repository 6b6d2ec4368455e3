// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>

#include "kvlean/core/budget.hpp"
#include "kvlean/core/order.hpp"

KVLEAN_NAMESPACE_BEGIN

/// Marks in `keep` [length] (0 or 1) the protected tokens and, of the others, the best `slots` minus
/// their number by the total order of token_key. `slots` below the protected count keeps only the
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

KVLEAN_NAMESPACE_END
