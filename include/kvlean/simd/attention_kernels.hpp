// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/simd/row_kernels.hpp"

// What attention is computed with: products, softmax, weighted sums.

KVLEAN_NAMESPACE_BEGIN
namespace simd {

/// Rows of `width` contiguous elements that may lie anywhere: flat, strided, paged, listed.
struct RowPointers {
  const std::byte* const* row = nullptr;  ///< [count]
  u32 count = 0;
};

/// Rows that later kernels read, to be fetched into the cache meanwhile, one for each row read now.
/// An eighth of them is begun with each in turn, and two are fetched line by line: as a rule these
/// lie in different pages, and memory serves eight streams faster than one.
struct RowsAhead {
  RowsAhead() noexcept = default;
  RowsAhead(RowPointers pointers, u32 bytes_each = 0, u32 begin_at = 0) noexcept
      : rows(pointers), bytes(bytes_each), begin(begin_at) {}

  RowPointers rows;
  u32 bytes = 0;  ///< of each row; 0: as many as those of the rows that are read now
  u32 begin = 0;  ///< rows fetched before, a multiple of 2
};

/// Rows of floats `stride` floats apart.
struct FloatRows {
  float* data = nullptr;
  u64 stride = 0;
};
struct ConstFloatRows {
  const float* data = nullptr;
  u64 stride = 0;
};

/// Query rows are taken in blocks of this many where lanes hold rows: see score_many.
inline constexpr u32 query_block = 16;
/// Up to this many query rows, score_few is the faster way.
inline constexpr u32 few_rows = 8;

/// The kernels of one target. Each is called for a row or a block of rows, never for an element.
/// Sums are in float, or better where said; the order of additions depends on shapes alone, so a
/// target gives the same bits for any layout and any number of threads. Targets differ by rounding.
/// No argument needs alignment, and nothing beyond the extents is read or written.
struct AttentionKernels {
  /// out[r][t] = queries[r] . keys[t]. A group's few query rows: keys are widened as they are read,
  /// lanes run along the row. Meanwhile as many rows of `ahead` (which may be empty) are fetched.
  void (*score_few)(ConstFloatRows queries, u32 rows, RowPointers keys, DType dtype, u32 width,
                    RowsAhead ahead, FloatRows out) noexcept;

  /// The same for many query rows: lanes run along the rows. `queries` is [width][padded rows]:
  /// the stride is `rows` rounded up to a multiple of query_block, at most 32, pads zero.
  void (*score_many)(ConstFloatRows queries, u32 rows, ConstFloatRows keys, u32 tokens, u32 width,
                     FloatRows out) noexcept;

  /// sum[r] += weight[r][0] values[0] + weight[r][1] values[1] + ..; fetches as score_few does.
  void (*blend)(ConstFloatRows weight, u32 rows, RowPointers values, DType dtype, u32 width,
                RowsAhead ahead, FloatRows sum) noexcept;

  /// x[t] = softcap(scale * x[t]) + log_mass[t]; softcap 0 and null log mass: none. Returns the
  /// largest that is not NaN, -inf if there is none.
  float (*logits)(float* x, u32 count, float scale, float softcap, const float* log_mass) noexcept;

  /// The largest value that is not NaN, -inf if there is none.
  float (*maximum)(const float* x, u32 count) noexcept;

  /// x[t] = exp(x[t] - shift), returns the sum of those that are not NaN, in double over blocks.
  double (*exponentials)(float* x, u32 count, float shift) noexcept;
  /// One step of an online softmax over up to few_rows rows. x[r][t] becomes a logit, as above with
  /// scale 1, then exp(x[r][t] - maximum[r]); maximum[r] is the largest logit so far, and a step
  /// that has seen none but -inf takes 0 in its place. sum[r] becomes the sum of the row, in double
  /// over blocks, NaN if one is. Returns the bits of the rows whose maximum grew.
  u32 (*weigh_few)(FloatRows x, u32 rows, u32 count, float softcap, const float* log_mass,
                   float* maximum, double* sum) noexcept;

  /// x[t] *= factor
  void (*scale)(float* x, u32 count, float factor) noexcept;

  /// total[t] += rows[0][t] + rows[1][t] + .. (the rows are summed first).
  void (*add_rows)(ConstFloatRows rows, u32 row_count, u32 count, float* total) noexcept;
};

}  // namespace simd
KVLEAN_NAMESPACE_END

#if KVLEAN_SIMD_DEFINE
#define KVLEAN_SIMD_FILE "kvlean/simd/generic/attention-inl.hpp"
#include "kvlean/simd/for_each_target-inl.hpp"
#endif

KVLEAN_NAMESPACE_BEGIN
namespace simd {
inline namespace KVLEAN_SIMD_BASELINE {

KVLEAN_SIMD_TABLES(AttentionTables, AttentionKernels, attention_kernels_here)

[[nodiscard]] inline const AttentionKernels& attention_kernels(
    Target target = Target::best) noexcept {
  return table_of<AttentionTables>(target);
}

}  // namespace KVLEAN_SIMD_BASELINE
}  // namespace simd
KVLEAN_NAMESPACE_END
