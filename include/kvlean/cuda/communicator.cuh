// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concepts>
#include <cstddef>

#include "kvlean/cuda/status.cuh"

KVLEAN_CUDA_NAMESPACE_BEGIN

/// How ranks that hold different KV heads exchange data: element-wise sums over all ranks, in
/// place, of integer arrays in device memory, in the order of the stream. Integer sums are the same
/// in any order, so every rank gets the same bits, and the same as one rank with all heads. Every
/// rank must make the same calls. Errors: exchange_failed. See nccl_communicator.cuh.
template <class C>
concept Communicator = requires(const C& communicator, u32* words, u64* sums, std::size_t count,
                                cudaStream_t stream) {
  { communicator.all_reduce_sum(words, count, stream) }
  noexcept->std::same_as<Status>;
  { communicator.all_reduce_sum(sums, count, stream) }
  noexcept->std::same_as<Status>;
};

/// The only rank there is: nothing to exchange.
struct OneRank {
  [[nodiscard]] Status all_reduce_sum(u32* /*words*/, std::size_t /*count*/,
                                      cudaStream_t /*stream*/) const noexcept {
    return StatusCode::ok;
  }
  [[nodiscard]] Status all_reduce_sum(u64* /*sums*/, std::size_t /*count*/,
                                      cudaStream_t /*stream*/) const noexcept {
    return StatusCode::ok;
  }
};
static_assert(Communicator<OneRank>);

/// Which KV heads of every layer this rank holds: [first_head, first_head + the cache's kv_heads)
/// of all_heads. By default all of them.
struct HeadShard {
  u32 first_head = 0;
  u32 all_heads = 0;  ///< 0: the cache's kv_heads
};

KVLEAN_CUDA_NAMESPACE_END
