// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kvlean/cuda/config.cuh"

// 16-bit matrix products of a warp, m16n8k16 with float sums, and the copies that feed them. These
// instructions exist since compute capability 8.0.

KVLEAN_CUDA_NAMESPACE_BEGIN

[[nodiscard]] KVLEAN_DEVICE u32 shared_address(const void* pointer) noexcept {
  return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

/// Starts a copy of 16 bytes to shared memory; with `valid` false it writes zeros and reads
/// nothing. Both addresses are multiples of 16.
KVLEAN_DEVICE void copy_async_16(u32 shared, const void* global, bool valid) noexcept {
  const u32 bytes = valid ? 16u : 0u;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global),
               "r"(bytes)
               : "memory");
}
/// The same, with a copy always.
KVLEAN_DEVICE void copy_async_16(u32 shared, const void* global) noexcept {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
}
/// Starts a copy of 4 bytes; with `valid` false it writes zeros.
KVLEAN_DEVICE void copy_async_4(u32 shared, const void* global, bool valid) noexcept {
  const u32 bytes = valid ? 4u : 0u;
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared), "l"(global), "r"(bytes)
               : "memory");
}
KVLEAN_DEVICE void commit_copies() noexcept { asm volatile("cp.async.commit_group;" ::: "memory"); }
/// Waits until at most `pending` of the groups committed last are under way.
template <int pending>
KVLEAN_DEVICE void wait_for_copies() noexcept {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

/// Four 8 x 8 matrices of 16-bit elements; lane l names row l % 8 of matrix l / 8. Not moved across
/// barriers and waits.
KVLEAN_DEVICE void load_matrices(u32 (&to)[4], u32 shared_row) noexcept {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_row));
}

/// c += a b: a 16 x 16 by rows, b 16 x 8 by columns, E = __half or __nv_bfloat16. Lane l holds
/// c[0], c[1] of row l / 4, columns 2 (l % 4) and one more, and c[2], c[3] of row l / 4 + 8.
template <class E>
KVLEAN_DEVICE void multiply_add(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) noexcept {
  if constexpr (sizeof(E) == 2 && __is_same(E, __nv_bfloat16)) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
        "{%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, "
        "{%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

/// 2^x. Infinities and NaN as exp2f has them; relative error below 2^-22.
[[nodiscard]] KVLEAN_DEVICE float exp2_approximate(float x) noexcept {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

KVLEAN_CUDA_NAMESPACE_END
