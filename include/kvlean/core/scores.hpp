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

  [[nodiscard]] u32 length(u32 segment) const noexcept { return lengths[segment]; }
};

KVLEAN_NAMESPACE_END
