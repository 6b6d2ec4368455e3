// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/simd/tables.hpp"

// Rows from one place to another, and their rotation (RoPE) on the way.

KVLEAN_NAMESPACE_BEGIN
namespace simd {

/// Where the rows of one head lie, in bytes: Rows without what rows of bytes do not need.
struct RowPlaces {
  std::byte* data = nullptr;  ///< of row 0 without a page table
  i64 stride = 0;             ///< from a row to the next
  const u32* order = nullptr;
  const i32* page_table = nullptr;
  i64 page_stride = 0;
  u32 page_tokens = 1;
  u32 page_shift = 0;  ///< log2(page_tokens), or not_a_power

  static constexpr u32 not_a_power = 32;

  [[nodiscard]] std::byte* at(u32 token) const noexcept {
    if (order != nullptr) token = order[token];
    if (page_table == nullptr) return data + static_cast<i64>(token) * stride;
    const u32 page = page_shift != not_a_power ? token >> page_shift : token / page_tokens;
    return data + page_table[page] * page_stride +
           static_cast<i64>(token - page * page_tokens) * stride;
  }
};

/// One of the row sets that are moved together.
struct RowMoves {
  RowPlaces from;
  RowPlaces to;
  std::size_t bytes = 0;  ///< of a row
  bool packed = false;    ///< rows lie back to back on both sides: neighbours may move as one
};

/// Pairs of sines and cosines are computed in blocks of this many: arrays of them have room for
/// their count rounded up to a multiple.
inline constexpr u32 pair_block = 16;
[[nodiscard]] constexpr u32 padded_pairs(u32 pairs) noexcept {
  return (pairs + pair_block - 1) / pair_block * pair_block;
}

/// Which elements of a row are turned, and which of them together: pair i is (first + 2i, first +
/// 2i + 1) when `adjacent`, (first + i, first + pairs + i) otherwise.
struct TurnedRow {
  DType dtype = DType::f32;
  bool adjacent = false;
  u32 first = 0;
  u32 pairs = 0;
  u32 width = 0;  ///< elements
};

/// No argument needs alignment; nothing beyond the extents is read or written, but prefetched.
/// Every target gives the same bits: products and sums are rounded one by one.
struct MoveKernels {
  /// Moves row index[j] of every set to row j, for j = begin, .., end - 1: row j of set 0, then of
  /// set 1, .. `index` ascends, rows up to index[known - 1] are prefetched. Within one tensor rows
  /// may so move towards row 0. Runs of neighbours are one piece where all sets are packed. With
  /// `stream`, whole lines of 64 bytes go to memory past the caches; after the last of them a call
  /// with begin = end lets other threads see them.
  void (*gather)(const RowMoves* sets, u32 num_sets, const u32* index, u32 begin, u32 end,
                 u32 known, bool stream) noexcept;

  /// to[j] = from[index[j]] for j = begin, .., end - 1, values of 4 bytes; `index` ascends, and
  /// `from` may be `to`.
  void (*gather_values)(const void* from, const u32* index, u32 begin, u32 end, void* to) noexcept;

  /// cosine[i], sine[i] of the angle position * frequency[i], radians, which is rounded to double;
  /// for all i < padded_pairs(pairs). Errors: 4e-15 and 4e-16 of the angle. At position 0 exact.
  void (*angles)(const double* frequency, double position, u32 pairs, double* cosine,
                 double* sine) noexcept;

  /// cosine[i], sine[i] of the sum of two angles, rounded to float, for all i <
  /// padded_pairs(pairs).
  void (*add_angles)(const double* cosine_a, const double* sine_a, const double* cosine_b,
                     const double* sine_b, u32 pairs, float* cosine, float* sine) noexcept;

  /// to = from with each pair (x, y) turned to (x cosine - y sine, x sine + y cosine) in float,
  /// then rounded to the row's type; the other elements keep their bits. The rows are apart or the
  /// same.
  void (*turn)(const TurnedRow& row, const float* cosine, const float* sine, const void* from,
               void* to) noexcept;
};

}  // namespace simd
KVLEAN_NAMESPACE_END

#if KVLEAN_SIMD_DEFINE
#define KVLEAN_SIMD_FILE "kvlean/simd/generic/move-inl.hpp"
#include "kvlean/simd/for_each_target-inl.hpp"
#endif

KVLEAN_NAMESPACE_BEGIN
namespace simd {
inline namespace KVLEAN_SIMD_BASELINE {

KVLEAN_SIMD_TABLES(MoveTables, MoveKernels, move_kernels_here)

[[nodiscard]] inline const MoveKernels& move_kernels(Target target = Target::best) noexcept {
  return table_of<MoveTables>(target);
}

}  // namespace KVLEAN_SIMD_BASELINE
}  // namespace simd
KVLEAN_NAMESPACE_END
