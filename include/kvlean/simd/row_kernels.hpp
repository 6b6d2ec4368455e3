// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/simd/tables.hpp"

// Rows between storage types and float.

KVLEAN_NAMESPACE_BEGIN
namespace simd {

/// Called for a row or more, never for an element. No argument needs alignment; nothing beyond the
/// `count` elements is read or written. The bits are those of the conversions in core/dtype.hpp.
struct RowKernels {
  /// to[i] = from[i] widened to float.
  void (*load)(const void* from, DType dtype, float* to, u32 count) noexcept;
  /// to[i] = from[i] rounded to nearest even.
  void (*store)(const float* from, void* to, DType dtype, u32 count) noexcept;
};

}  // namespace simd
KVLEAN_NAMESPACE_END

#if KVLEAN_SIMD_DEFINE
#define KVLEAN_SIMD_FILE "kvlean/simd/generic/rows-inl.hpp"
#include "kvlean/simd/for_each_target-inl.hpp"
#endif

KVLEAN_NAMESPACE_BEGIN
namespace simd {
inline namespace KVLEAN_SIMD_BASELINE {

KVLEAN_SIMD_TABLES(RowTables, RowKernels, row_kernels_here)

[[nodiscard]] inline const RowKernels& row_kernels(Target target = Target::best) noexcept {
  return table_of<RowTables>(target);
}

}  // namespace KVLEAN_SIMD_BASELINE
}  // namespace simd
KVLEAN_NAMESPACE_END
