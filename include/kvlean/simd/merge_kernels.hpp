// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/simd/attention_kernels.hpp"
#include "kvlean/simd/move_kernels.hpp"

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

/// Slots of a head, each the weighted sum of an anchor and terms: as a plan has them.
struct MergedSlots {
  const u32* anchor = nullptr;      ///< by slot: a token
  const u64* term_begin = nullptr;  ///< by slot; null: no slot has terms
  const u64* term_end = nullptr;
  const u32* token = nullptr;  ///< by term
};

/// One of the tensors whose rows merge.
struct MergedRows {
  RowPlaces from;
  RowPlaces to;
  DType dtype = DType::f32;  ///< of both
  u32 width = 0;
  bool blends = true;             ///< otherwise anchors' rows move and terms do not count
  const float* self = nullptr;    ///< by slot; null: 1
  const float* weight = nullptr;  ///< by term
  RowPointers ahead;              ///< prefetched on the way, as long as these
};

/// Slots whose sums have terms in common: ranges of terms that mostly move ahead together.
struct WindowedRows {
  MergedSlots slots;
  u64 end = 0;         ///< of the slots that may be asked for
  u64 first_term = 0;  ///< terms are numbered from here; ranges that begin before it count from 0
  RowPlaces from;
  DType dtype = DType::f32;
  u32 width = 0;
  const float* self = nullptr;    ///< by slot; null: 1
  const float* weight = nullptr;  ///< by term
  /// Writes a row as float, for rows that don't lie at `from`; dtype is then f32.
  void (*load)(const void* source, u32 token, float* row) noexcept = nullptr;
  const void* source = nullptr;
};

/// What MergeKernels::add_windows keeps from one call to the next, for the same rows.
struct WindowSums {
  static constexpr u32 most_backs = 64;
  static constexpr u32 room = 12288;
  static constexpr u64 none = ~u64{0};
  static_assert(room / max_row_width > 2);

  u64 begin = none;  ///< the range that was asked for last, and its sum before the cut
  u64 end = none;
  const float* back = nullptr;
  u64 cut = none;
  u64 front_end = 0;  ///< there is a sum of the terms from the cut to here
  u32 num_backs = 0;
  u64 back_begin[most_backs];  ///< and sums of those from here to the cut; descending
  float floats[room];
};

/// Each is called for a row or more, never for an element. Every target gives the same bits, those
/// of row_math: sums over a row are in float, in 16 lanes that are added pairwise, and products are
/// rounded before they are added. A sum over `width` elements so differs from the exact one by at
/// most (width / 16 + 6) * 2^-24 times the sum of the absolute products. NaN and infinity go where
/// arithmetic takes them. No argument needs alignment, and nothing beyond the extents is read or
/// written. All rows of `ahead` (which may be empty) are
/// prefetched on the way.
struct MergeKernels {
  /// out[t] = |rows[t]|^2
  void (*squared_norms)(RowPointers rows, DType dtype, u32 width, float* out) noexcept;

  /// squared[t] = |rows[t]|^2 and product[t] = rows[t - 1] . rows[t], where `previous` is row -1.
  /// With a null `previous`, product[0] is rows[0] . rows[0].
  void (*neighbours)(const void* previous, RowPointers rows, DType dtype, u32 width,
                     RowPointers ahead, float* squared, float* product) noexcept;

  /// cosine[t] = product[t] / (|a| |b|) of rows whose squared norms are squared[t] and squared[t +
  /// 1]; 0 when a row is zero. `squared` has a number more than `count`.
  void (*cosines)(const float* squared, const float* product, u32 count, float* cosine) noexcept;

  /// out[i] = the square root of x[i], rounded to nearest.
  void (*roots)(const float* x, u32 count, float* out) noexcept;

  /// out[i] = e^(-distance[i] / width[i]) for numbers from 0 on: within 3 * 2^-24 (1 + x) of the
  /// exact value, relative, where x is the quotient. 1 where the width is 0, 0 where x is above 80.
  /// NaN stays NaN.
  void (*gaussians)(const float* distance, const float* width, u32 count, float* out) noexcept;

  /// out[t] = from . rows[t], `from` in float.
  void (*products)(const float* from, RowPointers rows, DType dtype, u32 width,
                   float* out) noexcept;

  /// out[t] = |from - rows[t]|^2, `from` of the rows' type.
  void (*squared_distances)(const void* from, RowPointers rows, DType dtype, u32 width,
                            float* out) noexcept;

  /// out[t] = |from[t] - rows[t]|^2 for from.count = rows.count. All rows of `ahead` are
  /// prefetched.
  void (*pair_distances)(RowPointers from, RowPointers rows, DType dtype, u32 width,
                         RowPointers ahead, float* out) noexcept;

  /// out = the weighted sum, the anchor first and terms in order, added element by element in
  /// float, rounded once to the rows' type or, with `as_float`, stored as float. `out` may be one
  /// of the rows. With `stream` the stores pass by the caches: for rows that are not read again
  /// soon. `out` must then be a multiple of 64, and stream_end() called before others read it.
  void (*weigh)(const WeighedRows& sum, DType dtype, u32 width, bool as_float, bool stream,
                void* out) noexcept;

  /// Row `to` + j - begin of each tensor = the weighted sum of slot j, for begin <= j < end. A slot
  /// without terms whose self is 1 is copied bit by bit; the others are as weigh() has them. The
  /// terms of a slot begin where those of the slot before end, they ascend, and all tokens of a
  /// slot lie after those of the slot before: within one tensor rows may so move towards row 0.
  /// With `stream`, as in weigh(), each row written is a multiple of 64 bytes.
  void (*merge)(const MergedRows* rows, u32 num_rows, const MergedSlots& slots, u64 begin, u64 end,
                u32 to, bool stream) noexcept;

  /// Row `to` + j - begin of `out` = self * anchor + the sum of the terms of slot j, one or more,
  /// for begin <= j < end; rounded once to the rows' type or, with `as_float`, stored as float.
  /// Slots ascend from call to call, and a row that is written is no term of a later slot.
  ///
  /// A range is cut before the term whose number can be divided by the highest power of two. What
  /// lies before is added from the cut back, what follows from the cut on, then the two. So the
  /// result depends on the range alone, not on what was asked before; but both parts are kept, and
  /// as ranges move ahead together their cut mostly stays: a term is read up to three times,
  /// whatever the length of the ranges. Only sums are added, nothing is taken off again, so the
  /// error is that of one addition a term, and a term that is not finite stays in the ranges that
  /// hold it.
  void (*add_windows)(const WindowedRows& rows, WindowSums& sums, u64 begin, u64 end,
                      const RowPlaces& out, u32 to, bool as_float) noexcept;

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
// Blocks whose sizes are constants where they are called.
#if defined(__GNUC__)
#define KVLEAN_SIMD_INLINE [[gnu::always_inline]] inline
#else
#define KVLEAN_SIMD_INLINE inline
#endif
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
