// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/core/ragged.hpp"

KVLEAN_NAMESPACE_BEGIN

/// What a scorer fills, one value per (segment, token); higher is kept. The arrays are allocated by
/// the caller of the scorer, both with the same offsets.
struct Scores {
  u32 segments = 0;
  const u32* lengths = nullptr;  ///< [segments] scored tokens
  Ragged<float> rank;            ///< order only; may be pinned, pooled or negative
  Ragged<float> mass;            ///< attention received, >= 0; valid when has_mass
  bool has_mass = false;
  bool mass_is_accumulated = false;  ///< over all queries seen, not over a window
  Ragged<u32> observers;             ///< queries that saw the token; valid when has_observers
  bool has_observers = false;        ///< off: unknown, or all tokens were seen alike

  [[nodiscard]] u32 length(u32 segment) const noexcept { return lengths[segment]; }
  /// Mean attention per query that could see the token: sums alone favour tokens that many queries
  /// saw. Equals mass without observers.
  [[nodiscard]] float mass_per_observer(u32 segment, u32 token) const noexcept {
    const u32 seen_by = has_observers ? observers(segment, token) : 1;
    return mass(segment, token) / static_cast<float>(seen_by != 0 ? seen_by : 1);
  }
};

KVLEAN_NAMESPACE_END
