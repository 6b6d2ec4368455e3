// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <atomic>

#include "kvlean/config.hpp"

#if defined(__x86_64__) || defined(__i386__)
#define KVLEAN_SIMD_X86 1
#include <cpuid.h>
#else
#define KVLEAN_SIMD_X86 0
#endif
#if defined(__x86_64__) && defined(__linux__)
#define KVLEAN_SIMD_AMX 1
#else
#define KVLEAN_SIMD_AMX 0
#endif
#if defined(__aarch64__)
#define KVLEAN_SIMD_NEON 1
#else
#define KVLEAN_SIMD_NEON 0
#endif

// Kernels, tables and what leads to them carry the baseline of their translation unit in their
// names: the linker would otherwise keep one copy of a kernel, perhaps that of the unit with the
// highest -march, for a program that starts on an older CPU.
#if defined(__FAST_MATH__)
#define KVLEAN_SIMD_BASELINE_MATH(name) name##_fast_math
#else
#define KVLEAN_SIMD_BASELINE_MATH(name) name
#endif
#if defined(KVLEAN_SEPARATE_KERNELS)
#define KVLEAN_SIMD_BASELINE separate  // one copy in the program, by the program's own word
#elif defined(__AVX512FP16__)
#define KVLEAN_SIMD_BASELINE KVLEAN_SIMD_BASELINE_MATH(baseline_avx512fp16)
#elif defined(__AVX512F__)
#define KVLEAN_SIMD_BASELINE KVLEAN_SIMD_BASELINE_MATH(baseline_avx512f)
#elif defined(__AVX2__)
#define KVLEAN_SIMD_BASELINE KVLEAN_SIMD_BASELINE_MATH(baseline_avx2)
#elif defined(__AVX__)
#define KVLEAN_SIMD_BASELINE KVLEAN_SIMD_BASELINE_MATH(baseline_avx)
#elif defined(__SSE4_1__)
#define KVLEAN_SIMD_BASELINE KVLEAN_SIMD_BASELINE_MATH(baseline_sse4)
#elif defined(__ARM_FEATURE_SVE)
#define KVLEAN_SIMD_BASELINE KVLEAN_SIMD_BASELINE_MATH(baseline_sve)
#else
#define KVLEAN_SIMD_BASELINE KVLEAN_SIMD_BASELINE_MATH(baseline)
#endif

// Which vector instructions the kernels may use. Detected once, at first use; no compiler flag is
// asked of anyone.

KVLEAN_NAMESPACE_BEGIN
namespace simd {

/// A set of instructions that every kernel exists for.
enum class Target : u8 {
  best,    ///< the widest that this CPU has
  scalar,  ///< plain C++, on every CPU
  avx2,    ///< AVX2, FMA, F16C
  avx512,  ///< AVX-512 F, BW, DQ, VL
  neon,    ///< 64-bit ARM
  amx,     ///< avx512, and AMX-BF16 tiles where a bf16 matrix meets another
};

[[nodiscard]] constexpr const char* name(Target target) noexcept {
  switch (target) {
    case Target::best:
      return "best";
    case Target::scalar:
      return "scalar";
    case Target::avx2:
      return "avx2";
    case Target::avx512:
      return "avx512";
    case Target::neon:
      return "neon";
    case Target::amx:
      return "amx";
  }
  return "unknown";
}

inline namespace KVLEAN_SIMD_BASELINE {
namespace detail {

/// Asks the CPU, and the operating system whether it saves the wide registers.
[[nodiscard]] inline Target detect() noexcept {
#if KVLEAN_SIMD_X86
  unsigned a = 0;
  unsigned b = 0;
  unsigned c = 0;
  unsigned d = 0;
  if (__get_cpuid(1, &a, &b, &c, &d) == 0) return Target::scalar;
  constexpr unsigned fma = 1u << 12;
  constexpr unsigned osxsave = 1u << 27;
  constexpr unsigned avx = 1u << 28;
  constexpr unsigned f16c = 1u << 29;
  constexpr unsigned first = fma | osxsave | avx | f16c;
  if ((c & first) != first) return Target::scalar;
  unsigned saved = 0;
  unsigned upper = 0;
  __asm__ volatile("xgetbv" : "=a"(saved), "=d"(upper) : "c"(0));
  constexpr unsigned ymm_state = 0x06;
  constexpr unsigned zmm_state = 0xe6;
  if ((saved & ymm_state) != ymm_state) return Target::scalar;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return Target::scalar;
  constexpr unsigned avx2 = 1u << 5;
  if ((b & avx2) == 0) return Target::scalar;
  constexpr unsigned f_dq_bw_vl = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;
  const bool wide = (b & f_dq_bw_vl) == f_dq_bw_vl && (saved & zmm_state) == zmm_state;
  return wide ? Target::avx512 : Target::avx2;
#elif KVLEAN_SIMD_NEON
  return Target::neon;
#else
  return Target::scalar;
#endif
}

inline constinit std::atomic<Target> detected{Target::best};  // `best`: not asked yet

/// Asks the CPU for AMX-BF16, and Linux (5.16 or later) for leave to use it in this process. Leave
/// is refused where a thread's alternate signal stack is too small for the state of the tiles.
[[nodiscard]] inline bool detect_tiles() noexcept {
#if KVLEAN_SIMD_AMX
  if (detect() != Target::avx512) return false;
  unsigned a = 0;
  unsigned b = 0;
  unsigned c = 0;
  unsigned d = 0;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return false;
  constexpr unsigned bf16_and_tile = 1u << 22 | 1u << 24;
  if ((d & bf16_and_tile) != bf16_and_tile) return false;
  // Palette 1: at least 8 tiles of 16 rows of 64 bytes.
  if (__get_cpuid_count(0x1d, 1, &a, &b, &c, &d) == 0) return false;
  if ((b & 0xffffu) < 64 || b >> 16 < 8 || (c & 0xffffu) < 16) return false;
  unsigned saved = 0;
  unsigned upper = 0;
  __asm__ volatile("xgetbv" : "=a"(saved), "=d"(upper) : "c"(0));
  constexpr unsigned tile_state = 1u << 17 | 1u << 18;
  if ((saved & tile_state) != tile_state) return false;
  long result = 158;            // the system call arch_prctl
  const long request = 0x1023;  // ARCH_REQ_XCOMP_PERM
  const long tile_data = 18;    // XFEATURE_XTILEDATA
  __asm__ volatile("syscall"
                   : "+a"(result)
                   : "D"(request), "S"(tile_data)
                   : "rcx", "r11", "memory");
  return result == 0;
#else
  return false;
#endif
}

inline constinit std::atomic<u8> tiles{2};  // 2: not asked yet

/// Whether AMX tiles may be used. The first call asks the operating system. O(1).
[[nodiscard]] inline bool has_tiles() noexcept {
  u8 answer = tiles.load(std::memory_order_relaxed);
  if (answer == 2) {
    answer = detect_tiles() ? 1 : 0;
    tiles.store(answer, std::memory_order_relaxed);
  }
  return answer == 1;
}

}  // namespace detail

/// The widest target of this CPU's vectors; never Target::best, nor Target::amx: whether tiles
/// serve, is asked where there are matrices. Same answer in every call. O(1).
[[nodiscard]] inline Target best() noexcept {
  Target target = detail::detected.load(std::memory_order_relaxed);
  if (target == Target::best) {
    target = detail::detect();
    detail::detected.store(target, std::memory_order_relaxed);
  }
  return target;
}

/// Whether this CPU can run `target`. Asked about Target::amx for the first time, it asks the
/// operating system to let the process use the tiles. O(1).
[[nodiscard]] inline bool supported(Target target) noexcept {
  if (target == Target::amx) return detail::has_tiles();
  const Target widest = best();
  return target == Target::best || target == Target::scalar || target == widest ||
         (target == Target::avx2 && widest == Target::avx512);
}

}  // namespace KVLEAN_SIMD_BASELINE
}  // namespace simd
KVLEAN_NAMESPACE_END
