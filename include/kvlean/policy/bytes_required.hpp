// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/core/workspace.hpp"
#include "kvlean/observe/attention_scratch.hpp"

KVLEAN_NAMESPACE_BEGIN

/// What the size of a plan depends on, all known before prefill.
struct PlanShape {
  std::size_t num_layers = 1;       ///< layers planned in one call
  std::size_t num_kv_heads = 0;     ///< segments of a layer
  std::size_t num_query_heads = 0;  ///< 0: as many as KV heads
  std::size_t tokens = 0;           ///< of the longest segment
  std::size_t key_dim = 0;          ///< elements of a key row
  std::size_t workers = 1;          ///< of the executor
  std::size_t total_tokens = 0;     ///< of all segments and layers; 0: all as long as the longest
};

/// Workspace bytes that planning with any shipped policy takes at most, plan and scratch together:
/// give a fixed Workspace this many and plan() never answers workspace_too_small. Linear in tokens.
/// The bound covers the hungriest stages (merging with terms for every token, scoring with a group
/// maximum, nearest-key search); Workspace::high_water_bytes() tells what one policy really used.
[[nodiscard]] constexpr std::size_t plan_bytes_required(const PlanShape& shape) noexcept {
  const std::size_t segments = shape.num_layers * shape.num_kv_heads;
  const std::size_t slots = shape.total_tokens != 0 ? shape.total_tokens : segments * shape.tokens;
  const std::size_t heads =
      shape.num_kv_heads == 0 ? 0 : shape.num_query_heads / shape.num_kv_heads;
  // Per token of every layer: scores (rank, mass, observers) 12; states 3; anchor 4, log mass 4,
  // term ranges 16, self weights 8, a term of 12; nearest slot and similarity 8.
  constexpr std::size_t bytes_a_token = 68;
  // Per layer and segment: limits, lengths, offsets, competition entries.
  constexpr std::size_t bytes_a_segment = 256;
  // Per worker: tiles of attention and their per-head rows, sort keys, cosines, unit-length keys.
  const std::size_t attention =
      attention_scratch_floats(static_cast<u32>(shape.tokens), static_cast<u32>(shape.key_dim)) +
      (2 * heads + 2) * (shape.tokens + 16);
  const std::size_t per_worker =
      sizeof(float) * (attention + shape.tokens * shape.key_dim) + 24 * shape.tokens;
  // Histograms, and the padding of every single take.
  const std::size_t fixed = 64 * 1024 + shape.num_layers * 64 * Workspace::alignment;
  return slots * bytes_a_token + segments * bytes_a_segment +
         (shape.workers == 0 ? 1 : shape.workers) * per_worker + fixed;
}

KVLEAN_NAMESPACE_END
