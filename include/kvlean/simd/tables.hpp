// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/core/dtype.hpp"
#include "kvlean/simd/target.hpp"

// Groups of kernels: a struct of function pointers, and one table of them a target.
//
// As a rule every translation unit that includes a group compiles it for all targets, and the
// linker keeps one copy. A program of many units saves that time with KVLEAN_SEPARATE_KERNELS
// defined for all of them: then units only declare the tables, and one unit of the program, with
// KVLEAN_KERNELS_UNIT defined, includes kvlean/simd/kernels.hpp. The CMake target kvlean::kernels
// is both. Such a program has one copy of the kernels, so units for newer CPUs use it too.

#if !defined(KVLEAN_SEPARATE_KERNELS) || defined(KVLEAN_KERNELS_UNIT)
#define KVLEAN_SIMD_DEFINE 1
#include "kvlean/simd/vocabulary.hpp"
#else
#define KVLEAN_SIMD_DEFINE 0
#endif

// KVLEAN_SIMD_TABLES(Tables, Kernels, here): struct Tables with a Kernels a target, each made by
// the target's own constexpr function `here`.
#if KVLEAN_SIMD_X86
#define KVLEAN_SIMD_EACH_TARGET(each, Tables, Kernels, here)            \
  each(scalar, Tables, Kernels, here) each(avx2, Tables, Kernels, here) \
      each(avx512, Tables, Kernels, here)
#elif KVLEAN_SIMD_NEON
#define KVLEAN_SIMD_EACH_TARGET(each, Tables, Kernels, here) \
  each(scalar, Tables, Kernels, here) each(neon, Tables, Kernels, here)
#else
#define KVLEAN_SIMD_EACH_TARGET(each, Tables, Kernels, here) each(scalar, Tables, Kernels, here)
#endif
#define KVLEAN_SIMD_TABLE_INLINE(target, Tables, Kernels, here) \
  static constexpr Kernels target = target::here();
#define KVLEAN_SIMD_TABLE_DECLARED(target, Tables, Kernels, here) static const Kernels target;
#define KVLEAN_SIMD_TABLE_DEFINED(target, Tables, Kernels, here) \
  constinit const Kernels Tables::target = target::here();

#if !defined(KVLEAN_SEPARATE_KERNELS)
#define KVLEAN_SIMD_TABLES(Tables, Kernels, here)                            \
  struct Tables {                                                            \
    KVLEAN_SIMD_EACH_TARGET(KVLEAN_SIMD_TABLE_INLINE, Tables, Kernels, here) \
  };
#elif !defined(KVLEAN_KERNELS_UNIT)
#define KVLEAN_SIMD_TABLES(Tables, Kernels, here)                              \
  struct Tables {                                                              \
    KVLEAN_SIMD_EACH_TARGET(KVLEAN_SIMD_TABLE_DECLARED, Tables, Kernels, here) \
  };
#else
#define KVLEAN_SIMD_TABLES(Tables, Kernels, here)                              \
  struct Tables {                                                              \
    KVLEAN_SIMD_EACH_TARGET(KVLEAN_SIMD_TABLE_DECLARED, Tables, Kernels, here) \
  };                                                                           \
  KVLEAN_SIMD_EACH_TARGET(KVLEAN_SIMD_TABLE_DEFINED, Tables, Kernels, here)
#endif

KVLEAN_NAMESPACE_BEGIN
namespace simd {
inline namespace KVLEAN_SIMD_BASELINE {

/// The table of `target` among those of a group of kernels; the scalar one if this CPU cannot run
/// it. Of Target::amx, whose tiles only matrix_kernels.hpp has, it is that of avx512. O(1).
template <class Tables>
[[nodiscard]] auto& table_of(Target target) noexcept {
  if (target == Target::best) target = best();
#if KVLEAN_SIMD_X86
  const bool wide = target == Target::avx512 || target == Target::amx;
  if (wide && supported(target)) return Tables::avx512;
  if (target == Target::avx2 && supported(target)) return Tables::avx2;
#elif KVLEAN_SIMD_NEON
  if (target == Target::neon) return Tables::neon;
#endif
  return Tables::scalar;
}

}  // namespace KVLEAN_SIMD_BASELINE
}  // namespace simd
KVLEAN_NAMESPACE_END
