// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/simd/vocabulary.hpp"

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

#define KVLEAN_SIMD_FILE "kvlean/simd/generic/rows-inl.hpp"
#include "kvlean/simd/for_each_target-inl.hpp"

KVLEAN_NAMESPACE_BEGIN
namespace simd {
inline namespace KVLEAN_SIMD_BASELINE {

struct RowTables {
  static constexpr RowKernels scalar{scalar::load_row, scalar::store_row};
#if KVLEAN_SIMD_X86
  static constexpr RowKernels avx2{avx2::load_row, avx2::store_row};
  static constexpr RowKernels avx512{avx512::load_row, avx512::store_row};
#elif KVLEAN_SIMD_NEON
  static constexpr RowKernels neon{neon::load_row, neon::store_row};
#endif
};

[[nodiscard]] inline const RowKernels& row_kernels(Target target = Target::best) noexcept {
  return table_of<RowTables>(target);
}

}  // namespace KVLEAN_SIMD_BASELINE
}  // namespace simd
KVLEAN_NAMESPACE_END
