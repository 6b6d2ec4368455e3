// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>

#include "kvlean/core/kv_cache.hpp"

KVLEAN_NAMESPACE_BEGIN

/// What a scorer fills, one value per (segment, token); higher is kept. The arrays are allocated by
/// the caller of the scorer, both with the same offsets.
struct Scores {
  u32 segments = 0;
  const u32* lengths = nullptr;  ///< [segments] scored tokens
  Ragged<float> rank;            ///< order only; may be pinned, pooled or negative
  Ragged<float> mass;            ///< attention received, >= 0; valid when has_mass
  bool has_mass = false;
  /// Queries that mass was summed over; a token was seen by those at or after it. 0: unknown, or
  /// all tokens were seen alike.
  u32 observers = 0;

  [[nodiscard]] u32 length(u32 segment) const noexcept { return lengths[segment]; }
  /// Mean attention per query that could see the token: sums alone favour tokens that many queries
  /// saw. Equals mass when observers is unknown.
  [[nodiscard]] float mass_per_observer(const CacheView& cache, u32 segment,
                                        u32 token) const noexcept {
    if (observers == 0) return mass(segment, token);
    const i64 newer = cache.positions
                          ? static_cast<i64>(cache.next_position) - cache.position(segment, token)
                          : static_cast<i64>(lengths[segment]) - static_cast<i64>(token);
    const i64 seen_by = std::clamp<i64>(newer, 1, static_cast<i64>(observers));
    return mass(segment, token) / static_cast<float>(seen_by);
  }
};

KVLEAN_NAMESPACE_END
