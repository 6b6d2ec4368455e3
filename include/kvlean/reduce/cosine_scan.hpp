// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>

#include "kvlean/core/row_tile.hpp"
#include "kvlean/simd/merge_kernels.hpp"

KVLEAN_NAMESPACE_BEGIN
namespace detail {

/// Reads a segment's keys once, a tile at a time, and gives the cosine of each key with the next
/// one; 0 when a key is zero. Rows before the last one of a tile are not read again, so they may be
/// overwritten meanwhile. O(length * width).
class CosineScan {
 public:
  static constexpr u32 tile = 32;

  CosineScan(const Rows& keys, u32 head, u32 length) noexcept
      : keys_(keys), head_(head), length_(length) {}

  /// Neighbours [begin, end): cosine[t - begin] is that of tokens t and t + 1.
  struct Pairs {
    u32 begin = 0;
    u32 end = 0;
    const float* cosine = nullptr;
  };
  [[nodiscard]] bool done() const noexcept { return next_ == length_; }
  /// Keys that have been read.
  [[nodiscard]] u32 position() const noexcept { return next_; }
  /// Rows of `ahead` are prefetched on the way.
  [[nodiscard]] Pairs next(simd::RowPointers ahead) noexcept {
    const u32 first = next_;
    const u32 count = read_tile(ahead);
    simd::merge_kernels().cosines(squared_, product_, count, cosine_);
    squared_[0] = squared_[count];
    next_ += count;
    const u32 skip = first == 0 ? 1 : 0;  // the first token has none before it
    return {first + skip - 1, next_ - 1, cosine_ + skip};
  }

 private:
  u32 read_tile(simd::RowPointers ahead) noexcept {
    const simd::MergeKernels& kernels = simd::merge_kernels();
    if (is_contiguous_row(keys_)) {
      const std::byte* pointers[tile];
      const u32 count = std::min(tile, length_ - next_);
      static_cast<void>(point_at_rows(keys_, head_, next_, count, pointers));
      kernels.neighbours(previous_, {pointers, count}, keys_.dtype, keys_.width, ahead,
                         squared_ + 1, product_);
      previous_ = pointers[count - 1];
      return count;
    }
    float* row = loaded_[next_ & 1];
    load_row(keys_, head_, next_, row);
    const std::byte* pointer = reinterpret_cast<const std::byte*>(row);
    kernels.neighbours(previous_, {&pointer, 1}, DType::f32, keys_.width, {}, squared_ + 1,
                       product_);
    previous_ = pointer;
    return 1;
  }

  const Rows& keys_;
  u32 head_;
  u32 length_;
  u32 next_ = 0;
  const void* previous_ = nullptr;
  float squared_[tile + 1] = {};  // of the row before the tile, and of its rows
  float product_[tile];
  float cosine_[tile];
  float loaded_[2][max_row_width];  // of rows that kernels can't read where they lie
};

}  // namespace detail
KVLEAN_NAMESPACE_END
