// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <nccl.h>

#include "kvlean/cuda/communicator.cuh"

KVLEAN_CUDA_NAMESPACE_BEGIN

/// A Communicator over NCCL. The ncclComm_t is the caller's and must outlive it. NCCL's calls can
/// be captured into a graph as the kernels around them.
class NcclCommunicator {
 public:
  explicit NcclCommunicator(ncclComm_t communicator) noexcept : communicator_(communicator) {}

  [[nodiscard]] Status all_reduce_sum(u32* words, std::size_t count,
                                      cudaStream_t stream) const noexcept {
    return reduce(words, count, ncclUint32, stream);
  }
  [[nodiscard]] Status all_reduce_sum(u64* sums, std::size_t count,
                                      cudaStream_t stream) const noexcept {
    return reduce(sums, count, ncclUint64, stream);
  }

 private:
  [[nodiscard]] Status reduce(void* data, std::size_t count, ncclDataType_t type,
                              cudaStream_t stream) const noexcept {
    const ncclResult_t result =
        ncclAllReduce(data, data, count, type, ncclSum, communicator_, stream);
    return result == ncclSuccess ? StatusCode::ok : StatusCode::exchange_failed;
  }

  ncclComm_t communicator_ = nullptr;
};
static_assert(Communicator<NcclCommunicator>);

KVLEAN_CUDA_NAMESPACE_END
