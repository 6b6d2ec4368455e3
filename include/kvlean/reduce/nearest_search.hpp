// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cmath>

#include "kvlean/core/row_tile.hpp"
#include "kvlean/core/workspace.hpp"
#include "kvlean/simd/merge_kernels.hpp"

KVLEAN_NAMESPACE_BEGIN
namespace detail {

// Unit-length copy of a key as float; a zero or unusable key becomes the zero row (cosine 0).
inline void load_unit_key(const Rows& keys, u32 head, u32 token, float* row) noexcept {
  load_row(keys, head, token, row);
  const std::byte* pointer = reinterpret_cast<const std::byte*>(row);
  float squared = 0.0f;
  simd::merge_kernels().squared_norms({&pointer, 1}, DType::f32, keys.width, &squared);
  const float norm = std::sqrt(squared);
  if (norm > 0.0f && std::isfinite(norm)) {
    simd::attention_kernels().scale(row, keys.width, 1.0f / norm);
  } else {
    std::fill_n(row, keys.width, 0.0f);
  }
}

/// Finds, for rows of unit length, the most similar one of a list of such rows. The products are
/// those of simd::MergeKernels, ties go to the first row: the same on every target. Most products
/// are only estimated, a block of tokens with a tile of rows at a time, and computed where the
/// estimate could be the largest.
class NearestSearch {
 public:
  /// Tokens whose rows are searched for together.
  static constexpr u32 block_tokens = 32;
  [[nodiscard]] static constexpr std::size_t scratch_floats(u32 width) noexcept {
    return std::size_t{block_tokens} * (2 * width + tile_stride);
  }
  NearestSearch(u32 width, float* scratch) noexcept
      : width_(width),
        margin_(static_cast<float>(2 * width + 16) * 0x1p-24f),
        rows_(scratch),
        columns_(rows_ + std::size_t{block_tokens} * width),
        products_(columns_ + std::size_t{block_tokens} * width) {}

  /// Row of token i of the block, to be filled before search().
  [[nodiscard]] float* row(u32 i) const noexcept { return rows_ + std::size_t{i} * width_; }

  /// best[i] and cosine[i] of the block's first `tokens` rows among `count` rows of `units`; cosine
  /// -2 when there are none. O(tokens * count * width).
  void search(u32 tokens, const float* units, u32 count, u32* best, float* cosine) const noexcept {
    const simd::AttentionKernels& kernels = simd::attention_kernels();
    const u32 padded = padded_query_rows(tokens);
    if (tokens != padded) std::fill_n(columns_, std::size_t{padded} * width_, 0.0f);
    for (u32 i = 0; i < tokens; ++i) {
      best[i] = 0;
      cosine[i] = -2.0f;
      put_query_column(row(i), width_, i, columns_, padded);
    }
    for (u32 first = 0; first < count; first += tile_rows_at_once) {
      const u32 here = std::min(tile_rows_at_once, count - first);
      const float* tile = units + std::size_t{first} * width_;
      kernels.score_many({columns_, padded}, tokens, {tile, width_}, here, width_,
                         {products_, tile_stride});
      for (u32 i = 0; i < tokens; ++i) {
        const float* estimate = products_ + std::size_t{i} * tile_stride;
        const float largest = kernels.maximum(estimate, here);
        if (largest + margin_ <= cosine[i]) continue;
        compare(i, tile, first, here, estimate, std::max(largest - margin_, cosine[i]) - margin_,
                best, cosine);
      }
    }
  }

 private:
  static constexpr u32 tile_rows_at_once = 128;
  static constexpr u32 tile_stride = tile_rows_at_once + 16;

  void compare(u32 i, const float* tile, u32 first, u32 here, const float* estimate, float least,
               u32* best, float* cosine) const noexcept {
    for (u32 r = 0; r < here; ++r) {
      if (!(estimate[r] >= least)) continue;
      const std::byte* pointer = reinterpret_cast<const std::byte*>(tile + std::size_t{r} * width_);
      float product = 0.0f;
      simd::merge_kernels().products(row(i), {&pointer, 1}, DType::f32, width_, &product);
      if (product > cosine[i]) {
        cosine[i] = product;
        best[i] = first + r;
      }
    }
  }

  u32 width_;
  float margin_;     // what an estimate and a product of unit rows differ by, at most
  float* rows_;      // [block_tokens][width]
  float* columns_;   // [width][padded]: the rows as score_many takes them
  float* products_;  // [block_tokens][tile_stride]
};

}  // namespace detail
KVLEAN_NAMESPACE_END
