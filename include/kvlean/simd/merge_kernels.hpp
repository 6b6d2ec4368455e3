// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/simd/attention_kernels.hpp"

// What merging is computed with: norms, products and distances of rows, and their weighted sums.

KVLEAN_NAMESPACE_BEGIN
namespace simd {

/// A weighted sum of rows: self * anchor + weight[0] * terms.row[0] + ..
struct WeighedRows {
  const void* anchor = nullptr;
  float self = 1.0f;
  RowPointers terms;
  const float* weight = nullptr;  ///< [terms.count]
};

/// Each is called for a row or more, never for an element. Every target gives the same bits, those
/// of row_math: sums over a row are in float, in 16 lanes that are added pairwise, and products are
/// rounded before they are added. A sum over `width` elements so differs from the exact one by at
/// most (width / 16 + 6) * 2^-24 times the sum of the absolute products. NaN and infinity go where
/// arithmetic takes them. No argument needs alignment, and nothing beyond the extents is read or
/// written. Row t of `ahead` (which may be empty) is prefetched while row t is read.
struct MergeKernels {
  /// out[t] = |rows[t]|^2
  void (*squared_norms)(RowPointers rows, DType dtype, u32 width, float* out) noexcept;

  /// squared[t] = |rows[t]|^2 and product[t] = rows[t - 1] . rows[t], where `previous` is row -1.
  /// With a null `previous`, product[0] is rows[0] . rows[0].
  void (*neighbours)(const void* previous, RowPointers rows, DType dtype, u32 width,
                     RowPointers ahead, float* squared, float* product) noexcept;

  /// out[t] = from . rows[t], `from` in float.
  void (*products)(const float* from, RowPointers rows, DType dtype, u32 width,
                   float* out) noexcept;

  /// out[t] = |from - rows[t]|^2, `from` of the rows' type.
  void (*squared_distances)(const void* from, RowPointers rows, DType dtype, u32 width,
                            float* out) noexcept;

  /// out[t] = |from[t] - rows[t]|^2 for from.count = rows.count.
  void (*pair_distances)(RowPointers from, RowPointers rows, DType dtype, u32 width,
                         float* out) noexcept;

  /// out = the weighted sum, the anchor first and terms in order, added element by element in
  /// float, rounded once to the rows' type or, with `as_float`, stored as float. `out` may be one
  /// of the rows. With `stream` the stores pass by the caches: for rows that are not read again
  /// soon. `out` must then be a multiple of 64, and stream_end() called before others read it.
  void (*weigh)(const WeighedRows& sum, DType dtype, u32 width, bool as_float, bool stream,
                void* out) noexcept;

  /// out[i] = sums[i] for i < count in order, in the rows' type. A sum without terms whose self is
  /// 1 is copied bit by bit. Rows of `ahead` are prefetched on the way.
  void (*weigh_all)(const WeighedRows* sums, u32 count, DType dtype, u32 width, RowPointers ahead,
                    bool stream, std::byte* const* out) noexcept;

  /// The same as weigh() with terms in float and weights 1: out = self * anchor + terms.row[0] + ..
  void (*add_parts)(const WeighedRows& sum, DType dtype, u32 width, bool as_float,
                    void* out) noexcept;

  /// sum[i] += weight[t] * rows[t][i] for all t in order.
  void (*add_weighed)(RowPointers rows, const float* weight, DType dtype, u32 width,
                      float* sum) noexcept;

  /// y[i] += factor * x[i]
  void (*add_scaled)(float* y, const float* x, float factor, u32 count) noexcept;

  /// Copies `bytes` bytes with stores that pass by the caches; `to` and `bytes` are multiples of 64
  /// and the ranges do not overlap, or are the same.
  void (*stream_row)(const std::byte* from, std::byte* to, u32 bytes) noexcept;
  /// Orders what was streamed before what follows.
  void (*stream_end)() noexcept;
};

}  // namespace simd
KVLEAN_NAMESPACE_END

#if KVLEAN_SIMD_DEFINE
#define KVLEAN_SIMD_FILE "kvlean/simd/generic/merge-inl.hpp"
#include "kvlean/simd/for_each_target-inl.hpp"
#endif

KVLEAN_NAMESPACE_BEGIN
namespace simd {
inline namespace KVLEAN_SIMD_BASELINE {

KVLEAN_SIMD_TABLES(MergeTables, MergeKernels, merge_kernels_here)

[[nodiscard]] inline const MergeKernels& merge_kernels(Target target = Target::best) noexcept {
  return table_of<MergeTables>(target);
}

}  // namespace KVLEAN_SIMD_BASELINE
}  // namespace simd
KVLEAN_NAMESPACE_END
