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
