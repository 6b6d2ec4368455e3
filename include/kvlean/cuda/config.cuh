// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include "kvlean/config.hpp"

// The optional CUDA backend. Nothing outside this folder includes it. Everything lives in
// kvlean::v0_1::cuda and there in an inline namespace named after the architectures of the
// translation unit (sm_900, sm_800_900), so that units compiled for different ones can be linked
// into one program: a kernel template has one body for each list.

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#error "KVLean's CUDA backend needs compute capability 8.0 or newer"
#endif

// sm_ followed by the list's entries, for up to eight architectures.
#define KVLEAN_CUDA_TAG_1(a) sm_##a
#define KVLEAN_CUDA_TAG_2(a, b) sm_##a##_##b
#define KVLEAN_CUDA_TAG_3(a, b, c) sm_##a##_##b##_##c
#define KVLEAN_CUDA_TAG_4(a, b, c, d) sm_##a##_##b##_##c##_##d
#define KVLEAN_CUDA_TAG_5(a, b, c, d, e) sm_##a##_##b##_##c##_##d##_##e
#define KVLEAN_CUDA_TAG_6(a, b, c, d, e, f) sm_##a##_##b##_##c##_##d##_##e##_##f
#define KVLEAN_CUDA_TAG_7(a, b, c, d, e, f, g) sm_##a##_##b##_##c##_##d##_##e##_##f##_##g
#define KVLEAN_CUDA_TAG_8(a, b, c, d, e, f, g, h) sm_##a##_##b##_##c##_##d##_##e##_##f##_##g##_##h
#define KVLEAN_CUDA_PICK(a, b, c, d, e, f, g, h, tag, ...) tag
#define KVLEAN_CUDA_TAG_OF(...)                                                                \
  KVLEAN_CUDA_PICK(__VA_ARGS__, KVLEAN_CUDA_TAG_8, KVLEAN_CUDA_TAG_7, KVLEAN_CUDA_TAG_6,       \
                   KVLEAN_CUDA_TAG_5, KVLEAN_CUDA_TAG_4, KVLEAN_CUDA_TAG_3, KVLEAN_CUDA_TAG_2, \
                   KVLEAN_CUDA_TAG_1, )                                                        \
  (__VA_ARGS__)

#if defined(KVLEAN_CUDA_TAG)
// The caller's own tag, for more architectures than eight.
#elif defined(__CUDA_ARCH_LIST__)
#define KVLEAN_CUDA_TAG KVLEAN_CUDA_TAG_OF(__CUDA_ARCH_LIST__)
#else
#define KVLEAN_CUDA_TAG sm_any
#endif

#define KVLEAN_CUDA_NAMESPACE_BEGIN \
  namespace kvlean {                \
  inline namespace v0_1 {           \
  namespace cuda {                  \
  inline namespace KVLEAN_CUDA_TAG {
#define KVLEAN_CUDA_NAMESPACE_END \
  }                               \
  }                               \
  }                               \
  }

#define KVLEAN_DEVICE __device__ __forceinline__
#define KVLEAN_HOST_DEVICE __host__ __device__ __forceinline__

KVLEAN_CUDA_NAMESPACE_BEGIN

inline constexpr u32 warp_threads = 32;
inline constexpr u32 full_warp = 0xffffffffu;

template <class T>
[[nodiscard]] KVLEAN_HOST_DEVICE constexpr T ceil_div(T count, T each) noexcept {
  return (count + each - 1) / each;
}
template <class T>
[[nodiscard]] KVLEAN_HOST_DEVICE constexpr T smaller(T a, T b) noexcept {
  return b < a ? b : a;
}
template <class T>
[[nodiscard]] KVLEAN_HOST_DEVICE constexpr T larger(T a, T b) noexcept {
  return a < b ? b : a;
}

KVLEAN_CUDA_NAMESPACE_END
