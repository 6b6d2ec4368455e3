// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>

#include "kvlean/attention/attend_context.hpp"

// How the tokens of one segment are cut for few query rows, so that a long segment is work for
// several threads: blocks by shape alone, whose results are merged in the order of a fixed binary
// tree. Any power of two of neighbouring blocks is a subtree, so a task may take as many as it
// likes and the bits are the same.

KVLEAN_NAMESPACE_BEGIN
namespace detail {

inline constexpr u32 block_min_tokens = 1024;
inline constexpr u32 block_max_tile_tokens = 128;
inline constexpr u32 block_max_depth = 6;  // parts that wait for their sibling, and the one in work
inline constexpr u32 block_max_count = 1u << (block_max_depth - 1);
inline constexpr u32 block_part_floats = 6144;  // sums of all those parts

/// Tokens that are scored, weighed and blended at a time: keys and values fit the second cache
/// level while the next ones are fetched into it. Divides block_min_tokens.
[[nodiscard]] constexpr u32 block_tile_tokens(u32 width) noexcept {
  u32 tokens = block_max_tile_tokens;
  while (tokens > 16 && tokens * width > 16384) tokens /= 2;
  return tokens;
}

/// The result of some blocks: unnormalised sums and the softmax they belong to.
struct BlockPart {
  SoftmaxSum* softmax = nullptr;  ///< [rows]
  float* sums = nullptr;          ///< [rows][value_width]
};

/// The blocks of what a tile of query rows sees. Depends on shapes and lengths only.
struct TokenBlocks {
  TokenBlocks() noexcept = default;
  /// `floats`: of a part's sums, query rows times value width.
  TokenBlocks(TokenRange visible, u32 floats) noexcept : all(visible) {
    u32 most = 1;  // blocks whose parts fit
    for (u32 depth = 2; depth <= block_max_depth && depth * floats <= block_part_floats; ++depth) {
      most *= 2;
    }
    const u32 tokens = all.end - all.begin;
    const u32 each = (tokens + most - 1) / most;
    block_tokens = std::max(block_min_tokens, (each + block_max_tile_tokens - 1) /
                                                  block_max_tile_tokens * block_max_tile_tokens);
    count = std::max(1u, (tokens + block_tokens - 1) / block_tokens);
  }

  [[nodiscard]] TokenRange range(u32 block) const noexcept {
    const u64 begin = all.begin + u64{block} * block_tokens;
    return {static_cast<u32>(std::min<u64>(begin, all.end)),
            static_cast<u32>(std::min<u64>(begin + block_tokens, all.end))};
  }

  TokenRange all;
  u32 block_tokens = block_min_tokens;
  u32 count = 1;
};

}  // namespace detail
KVLEAN_NAMESPACE_END
