// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/cuda/launch.cuh"
#include "kvlean/cuda/tensor_core.cuh"

// Matrix products of a warpgroup (four warps), for compute capability 9.0 alone: compiled where the
// target is sm_90a. Everywhere else kernels that use them are empty and never launched.

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define KVLEAN_CUDA_WARPGROUP
#endif

KVLEAN_CUDA_NAMESPACE_BEGIN
namespace detail {

/// Rows of 16-bit elements in shared memory as a warpgroup's products read them: panels of 64
/// elements, in each 128 bytes a row, 16-byte parts permuted within eight rows. 1024-byte aligned.
template <u32 Width>
struct PermutedTile {
  static_assert(Width % 64 == 0);
  static constexpr u32 rows = 64;
  static constexpr u32 panel_bytes = rows * 128;
  static constexpr u32 bytes = panel_bytes * (Width / 64);
  static constexpr u32 stages = 8;

  /// Starts copying row threadIdx.x / 8 by its eight threads.
  static KVLEAN_DEVICE void copy_row(u32 tile, const char* row) noexcept {
    const u32 r = threadIdx.x / 8;
    const u32 part = threadIdx.x % 8;
    const u32 to = tile + r * 128 + (part ^ r % 8) * 16;
#pragma unroll
    for (u32 p = 0; p < Width / 64; ++p) {
      copy_async_16(to + p * panel_bytes, row + p * 128 + part * 16);
    }
  }
};

/// Whether the code of this kernel that runs here was compiled for warpgroups: it has shared memory
/// of its own then, and an empty one has none.
template <class... Parameters>
[[nodiscard]] bool has_warpgroups(void (*kernel)(Parameters...)) noexcept {
  cudaFuncAttributes attributes = {};
  if (cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)) != cudaSuccess) {
    static_cast<void>(cudaGetLastError());
    return false;
  }
  return attributes.sharedSizeBytes != 0;
}

#if defined(KVLEAN_CUDA_WARPGROUP)

/// c = a b or c += a b: a 64 x 16 in registers (16 rows a warp, laid out as multiply_add's), b 16 x
/// 64 by columns in shared memory. Under way until wait_for_products().
template <class E>
KVLEAN_DEVICE void start_multiply(float (&c)[32], const u32 (&a)[4], u64 b, u32 add) noexcept {
#define KVLEAN_CUDA_WGMMA(type)                                                                    \
  asm volatile(                                                                                    \
      "{\n.reg .pred add;\nsetp.ne.b32 add, %37, 0;\n"                                             \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type                                  \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, "                                  \
      "%13, %14, %15, %16, %17, %18, "                                                             \
      "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, "                               \
      "%31}, {%32, %33, %34, %35}, "                                                               \
      "%36, add, 1, 1, 0;\n}\n"                                                                    \
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]),        \
        "+f"(c[7]), "+f"(c[8]), "+f"(c[9]), "+f"(c[10]), "+f"(c[11]), "+f"(c[12]), "+f"(c[13]),    \
        "+f"(c[14]), "+f"(c[15]), "+f"(c[16]), "+f"(c[17]), "+f"(c[18]), "+f"(c[19]), "+f"(c[20]), \
        "+f"(c[21]), "+f"(c[22]), "+f"(c[23]), "+f"(c[24]), "+f"(c[25]), "+f"(c[26]), "+f"(c[27]), \
        "+f"(c[28]), "+f"(c[29]), "+f"(c[30]), "+f"(c[31])                                         \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add))
  if constexpr (__is_same(E, __nv_bfloat16)) {
    KVLEAN_CUDA_WGMMA("bf16");
  } else {
    KVLEAN_CUDA_WGMMA("f16");
  }
#undef KVLEAN_CUDA_WGMMA
}
/// Before the first product, and after its registers were touched.
KVLEAN_DEVICE void begin_products() noexcept {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
KVLEAN_DEVICE void commit_products() noexcept {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
KVLEAN_DEVICE void wait_for_products(float (&c)[32]) noexcept {
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
  for (u32 i = 0; i < 32; ++i) asm volatile("" : "+f"(c[i])::"memory");
}
/// A barrier in shared memory, 8 bytes: its phase ends when `count` arrivals have come.
KVLEAN_DEVICE void start_barrier(u64* barrier, u32 count) noexcept {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count)
               : "memory");
}
KVLEAN_DEVICE void arrive(u64* barrier) noexcept {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}
/// Waits for the end of phase `phase`, counted from 0.
KVLEAN_DEVICE void wait_for(u64* barrier, u32 phase) noexcept {
  asm volatile(
      "{\n.reg .pred done;\nretry:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra retry;\n}\n" ::"r"(shared_address(barrier)),
      "r"(phase % 2)
      : "memory");
}
/// Lets products read what this thread copied to shared memory.
KVLEAN_DEVICE void publish_copies() noexcept {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

/// c = rows of the warpgroup times the 64 rows of a tile.
template <class E, u32 Width>
KVLEAN_DEVICE void start_tile(float (&c)[32], const u32 (&a)[Width / 16][4], u32 tile) noexcept {
  // Permuted by 128 bytes, eight rows every 1024.
  const u64 base = u64{1} << 62 | u64{64} << 32 | u64{1} << 16 | (tile & 0x3ffff) >> 4;
#pragma unroll
  for (u32 i = 0; i < 32; ++i) asm volatile("" : "+f"(c[i])::"memory");
  begin_products();
#pragma unroll
  for (u32 k = 0; k < Width / 16; ++k) {
    start_multiply<E>(c, a[k], base + k / 4 * (PermutedTile<Width>::panel_bytes / 16) + k % 4 * 2,
                      k != 0);
  }
  commit_products();
}

#endif

}  // namespace detail
KVLEAN_CUDA_NAMESPACE_END
