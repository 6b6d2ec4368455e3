// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
// Compiles the kernels of AMX tiles, in the namespace of avx512, whose vectors they use, and in a
// region that has the instructions of both. See for_each_target-inl.hpp.

KVLEAN_NAMESPACE_BEGIN
namespace simd {
inline namespace KVLEAN_SIMD_BASELINE {
#if defined(__clang__)
#pragma clang attribute push(                                                                      \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,amx-tile,amx-bf16"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wconversion"
#pragma GCC diagnostic ignored "-Wsign-conversion"
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,amx-tile,amx-bf16")
#endif
namespace avx512 {
namespace tiles {
#include "kvlean/simd/amx/tiles-inl.hpp"
}  // namespace tiles
}  // namespace avx512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC diagnostic pop
#pragma GCC pop_options
#endif
}  // namespace KVLEAN_SIMD_BASELINE
}  // namespace simd
KVLEAN_NAMESPACE_END
