// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>

#include "kvlean/core/executor.hpp"
#include "kvlean/core/kv_cache.hpp"
#include "kvlean/core/workspace.hpp"
#include "kvlean/simd/matrix_kernels.hpp"
#include "kvlean/simd/row_math.hpp"

// The memory that attention tiles are computed in.

KVLEAN_NAMESPACE_BEGIN

/// Query rows of a tile at most, and keys that are converted to float at a time.
inline constexpr u32 attention_query_tile = 32;
inline constexpr u32 attention_key_tile = 64;

/// Floats between two rows of probabilities: an odd number of cache lines. A power of two would put
/// a token's column of all rows into one set of every cache.
[[nodiscard]] constexpr std::size_t attention_row_stride(u32 length) noexcept {
  constexpr std::size_t line = 16;
  return ((static_cast<std::size_t>(length) + line - 1) / line | 1) * line;
}

/// Pieces that a row of `length` tokens is computed in, at most.
[[nodiscard]] constexpr std::size_t attention_key_tiles(u32 length) noexcept {
  return (static_cast<std::size_t>(length) + attention_key_tile - 1) / attention_key_tile;
}

/// Floats that a group of query rows and a run of keys take as bf16 tiles: the rows twice, for the
/// second half of numbers that bf16 does not hold, 32 of them as floats, and one cache line.
[[nodiscard]] constexpr std::size_t attention_tile_floats(u32 width) noexcept {
  if (!KVLEAN_SIMD_AMX || width > simd::tile_width_limit) return 0;
  const std::size_t padded = (static_cast<std::size_t>(width) + 31) / 32 * 32;
  return (simd::tile_rows_limit + simd::tile_keys_limit / 2 + 32) * padded + 16;
}

/// Floats of scratch that tiles over segments of up to `length` tokens and rows of `width` need.
/// Proportional to length + width, never to length squared.
[[nodiscard]] constexpr std::size_t attention_scratch_floats(u32 length, u32 width) noexcept {
  constexpr std::size_t lanes = row_math::lanes;
  const std::size_t stride = attention_row_stride(length);
  const std::size_t padded = (static_cast<std::size_t>(width) + lanes - 1) / lanes * lanes;
  return attention_query_tile * (stride + attention_key_tiles(length)) +
         (attention_query_tile + attention_key_tile) * padded + attention_tile_floats(width);
}

/// Caller-owned scratch of one running task: attention_scratch_floats(length, width) floats.
struct AttentionScratch {
  float* probabilities = nullptr;  ///< [attention_query_tile][stride]
  float* queries = nullptr;        ///< [attention_query_tile][padded_width]
  float* keys = nullptr;           ///< [attention_key_tile][padded_width]
  float* shifts = nullptr;         ///< [attention_query_tile][key_tiles]
  float* tiles = nullptr;          ///< [attention_tile_floats(width)]
  u64 stride = 0;
  u64 key_tiles = 0;
  u32 padded_width = 0;

  AttentionScratch() noexcept = default;
  AttentionScratch(float* floats, u32 length, u32 width) noexcept {
    constexpr u32 lanes = row_math::lanes;
    stride = attention_row_stride(length);
    padded_width = (width + lanes - 1) / lanes * lanes;
    probabilities = floats;
    queries = probabilities + attention_query_tile * stride;
    keys = queries + static_cast<u64>(attention_query_tile) * padded_width;
    key_tiles = attention_key_tiles(length);
    shifts = keys + static_cast<u64>(attention_key_tile) * padded_width;
    tiles = shifts + attention_query_tile * key_tiles;
  }
};

/// Scratch of the tasks that can run at once over a cache, taken before the fork. A task uses the
/// piece of its index if there is one for each, else that of its worker.
struct AttentionScratchPool {
  float* floats = nullptr;
  std::size_t piece = 0;  ///< floats of one task: those of the tile, then `extra`
  std::size_t tile_floats = 0;
  u32 pieces = 0;
  u32 tasks = 0;
  u32 length = 0;
  u32 width = 0;

  /// Takes min(workers, tasks) pieces with `extra` more floats each, for `parts` tasks a segment.
  /// Fails when out of memory.
  [[nodiscard]] Status take(const CacheView& cache, const Executor& executor, std::size_t extra,
                            Workspace& workspace, u32 parts = 1) noexcept {
    tasks = cache.segments * parts;
    length = cache.max_length();
    width = cache.keys.width;
    pieces = std::min(executor.run == nullptr ? 1u : std::max(1u, executor.workers), tasks);
    tile_floats = attention_scratch_floats(length, width);
    piece = (tile_floats + extra + 15) / 16 * 16;
    floats = workspace.take<float>(piece * pieces);
    return floats != nullptr ? Status() : workspace.exhausted();
  }
  [[nodiscard]] float* of_task(u32 worker, u32 index) const noexcept {
    return floats + piece * (pieces >= tasks ? index : std::min(worker, pieces - 1));
  }
  [[nodiscard]] AttentionScratch scratch(float* task) const noexcept {
    return AttentionScratch(task, length, width);
  }
  [[nodiscard]] float* extra(float* task) const noexcept { return task + tile_floats; }
};

KVLEAN_NAMESPACE_END
