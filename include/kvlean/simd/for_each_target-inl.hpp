// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
// Compiles the file KVLEAN_SIMD_FILE once for every target of this architecture, each time in the
// target's namespace and in a region that has its instructions, whatever flags the translation unit
// has. Everything of the standard library must have been included before: in a region it would be
// compiled for the target, for the whole program. No guard: every group of kernels includes this.

#define KVLEAN_SIMD_HERE_SCALAR 1
#define KVLEAN_SIMD_HERE_AVX2 2
#define KVLEAN_SIMD_HERE_AVX512 3
#define KVLEAN_SIMD_HERE_NEON 4

KVLEAN_NAMESPACE_BEGIN
namespace simd {
inline namespace KVLEAN_SIMD_BASELINE {

#define KVLEAN_SIMD_HERE KVLEAN_SIMD_HERE_SCALAR
namespace scalar {
#include KVLEAN_SIMD_FILE
}  // namespace scalar
#undef KVLEAN_SIMD_HERE

#if KVLEAN_SIMD_X86

#define KVLEAN_SIMD_HERE KVLEAN_SIMD_HERE_AVX2
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
namespace avx2 {
#include KVLEAN_SIMD_FILE
}  // namespace avx2
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef KVLEAN_SIMD_HERE

#define KVLEAN_SIMD_HERE KVLEAN_SIMD_HERE_AVX512
#if defined(__clang__)
#pragma clang attribute push(                                                    \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC push_options
// g++ 12's own intrinsics use undefined values on purpose, and signed masks where they are macros.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wconversion"
#pragma GCC diagnostic ignored "-Wsign-conversion"
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif
namespace avx512 {
#include KVLEAN_SIMD_FILE
}  // namespace avx512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC diagnostic pop
#pragma GCC pop_options
#endif
#undef KVLEAN_SIMD_HERE

#elif KVLEAN_SIMD_NEON

#define KVLEAN_SIMD_HERE KVLEAN_SIMD_HERE_NEON
namespace neon {
#include KVLEAN_SIMD_FILE
}  // namespace neon
#undef KVLEAN_SIMD_HERE

#endif

}  // namespace KVLEAN_SIMD_BASELINE
}  // namespace simd
KVLEAN_NAMESPACE_END

#undef KVLEAN_SIMD_FILE
#undef KVLEAN_SIMD_HERE_SCALAR
#undef KVLEAN_SIMD_HERE_AVX2
#undef KVLEAN_SIMD_HERE_AVX512
#undef KVLEAN_SIMD_HERE_NEON
