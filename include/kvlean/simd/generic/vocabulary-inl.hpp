// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
// The words of one target: its vectors, and what can be said in them for all targets.
#if KVLEAN_SIMD_HERE == KVLEAN_SIMD_HERE_SCALAR
#include "kvlean/simd/scalar/vector-inl.hpp"
#elif KVLEAN_SIMD_HERE == KVLEAN_SIMD_HERE_AVX2
#include "kvlean/simd/avx2/vector-inl.hpp"
#elif KVLEAN_SIMD_HERE == KVLEAN_SIMD_HERE_AVX512
#include "kvlean/simd/avx512/vector-inl.hpp"
#elif KVLEAN_SIMD_HERE == KVLEAN_SIMD_HERE_NEON
#include "kvlean/simd/neon/vector-inl.hpp"
#endif
// (it is written in the vector's words)
#include "kvlean/simd/generic/exponential-inl.hpp"
