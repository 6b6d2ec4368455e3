// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <limits>

#include "kvlean/core/dtype.hpp"
#include "kvlean/simd/target.hpp"

#if KVLEAN_SIMD_X86
#include <immintrin.h>
#elif KVLEAN_SIMD_NEON
#include <arm_neon.h>
#endif

// The vector of each target, in simd::scalar, simd::avx2, .. Kernels are written once against it,
// in simd/generic/, and compiled for every target.

// Loops over registers are unrolled at every -O level, or the registers would be memory.
#if defined(__clang__)
#define KVLEAN_SIMD_UNROLL _Pragma("clang loop unroll(full)")
#else
#define KVLEAN_SIMD_UNROLL _Pragma("GCC unroll 16")
#endif

#define KVLEAN_SIMD_FILE "kvlean/simd/generic/vocabulary-inl.hpp"
#include "kvlean/simd/for_each_target-inl.hpp"

KVLEAN_NAMESPACE_BEGIN
namespace simd {
inline namespace KVLEAN_SIMD_BASELINE {

/// The table of `target` among those of a group of kernels; the scalar one if this CPU cannot run
/// it. O(1).
template <class Tables>
[[nodiscard]] auto& table_of(Target target) noexcept {
  if (target == Target::best) target = best();
#if KVLEAN_SIMD_X86
  if (target == Target::avx512 && supported(target)) return Tables::avx512;
  if (target == Target::avx2 && supported(target)) return Tables::avx2;
#elif KVLEAN_SIMD_NEON
  if (target == Target::neon) return Tables::neon;
#endif
  return Tables::scalar;
}

}  // namespace KVLEAN_SIMD_BASELINE
}  // namespace simd
KVLEAN_NAMESPACE_END
