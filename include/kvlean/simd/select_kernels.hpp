// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/simd/tables.hpp"

// What tokens are selected with: scores reduced over heads and pooled along tokens, counts,
// thresholds, lists.

KVLEAN_NAMESPACE_BEGIN
namespace simd {

/// How many scores reach two bounds.
struct Collected {
  u32 above;   ///< at least `bound`
  u32 inside;  ///< at least `least`, not `bound`
};

/// How many scores reach a bound, and the two nearest to it.
struct Divided {
  u32 reached;  ///< at least the bound
  float above;  ///< the smallest of those; inf if there is none
  float below;  ///< the largest of the others; -inf if there is none
};

/// The kernels of one target. Each is called for the scores of a segment, never for one. Nothing
/// here depends on a target but the sign of a pooled zero: comparisons are exact, x * weight is
/// rounded once, and sums are added in the order of tokens. A NaN reaches no bound, and no score
/// reaches a bound that is NaN. No argument needs alignment; nothing beyond the extents is read or
/// written.
struct SelectKernels {
  /// How many x[t] * weight are at least `least`.
  u32 (*count_at_least)(const float* x, u32 count, float weight, float least) noexcept;

  /// The same, and between which two x[t] * weight the bound lies.
  Divided (*divide)(const float* x, u32 count, float weight, float least) noexcept;

  /// out = the x[t] * weight that are at least `least` but not `bound`, in order. What is beyond
  /// out[room] is counted, not written; then all of out[room] may hold anything. `out` may be x or
  /// lie before it.
  Collected (*collect)(const float* x, u32 count, float weight, float least, float bound,
                       float* out, u32 room) noexcept;

  /// keep[t] = 1 where x[t] is at least `bound`, or is at least `least` and one of the first `ties`
  /// such between the two; else 0.
  void (*mark)(const float* x, u32 count, float least, float bound, u64 ties, u8* keep) noexcept;

  /// tokens = the `kept` places t where keep[t] is 1, not 0, ascending.
  void (*list)(const u8* keep, u32 count, u32* tokens, u32 kept) noexcept;

  /// out[t] = mean of the `width` (odd) values around x[t]; those past the ends count as zeros. NaN
  /// stays with its own token, and is a zero for the others. `out` does not overlap x. Sums are
  /// added from the first value on; above a width of 256 in two parts, which takes the same time at
  /// any width. O(min(width, 256) * count / lanes).
  void (*pool_average)(const float* x, u32 count, u32 width, float* out) noexcept;

  /// out[t] = largest of the `width` (odd) values around x[t]. NaN and overlap as above. Exact but
  /// for the sign of zero. O(log(width) * count / lanes).
  void (*pool_maximum)(const float* x, u32 count, u32 width, float* out) noexcept;

  /// out[t] = (rows[0][t] + rows[1][t] + ..) / divisor, rows added in their order. Rows are
  /// `stride` floats apart; `out` may be the first.
  void (*mean_rows)(const float* rows, u64 stride, u32 row_count, u32 count, float divisor,
                    float* out) noexcept;
  /// out[t] = the largest of rows[0][t], rows[1][t], ..; NaN if one is.
  void (*maximum_rows)(const float* rows, u64 stride, u32 row_count, u32 count,
                       float* out) noexcept;

  /// out[t] = x[t] / count[t], or x[t] where that is 0. `out` may be x.
  void (*divide_by_counts)(const float* x, const u32* counts, u32 count, float* out) noexcept;
};

}  // namespace simd
KVLEAN_NAMESPACE_END

#if KVLEAN_SIMD_DEFINE
#define KVLEAN_SIMD_FILE "kvlean/simd/generic/select-inl.hpp"
#include "kvlean/simd/for_each_target-inl.hpp"
#endif

KVLEAN_NAMESPACE_BEGIN
namespace simd {
inline namespace KVLEAN_SIMD_BASELINE {

KVLEAN_SIMD_TABLES(SelectTables, SelectKernels, select_kernels_here)

[[nodiscard]] inline const SelectKernels& select_kernels(Target target = Target::best) noexcept {
  return table_of<SelectTables>(target);
}

}  // namespace KVLEAN_SIMD_BASELINE
}  // namespace simd
KVLEAN_NAMESPACE_END
