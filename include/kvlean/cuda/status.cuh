// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/cuda/config.cuh"
#include "kvlean/status.hpp"

KVLEAN_CUDA_NAMESPACE_BEGIN

/// What kernels report when only the device can know that a call must fail (a budget below the
/// protected tokens of a length that lies on the device, a destination that is too small): a u32 in
/// device memory, 0 for ok, else the first StatusCode that was set. It is sticky: nothing but the
/// caller's own memset clears it, every later stage leaves the cache alone while it is set, and it
/// can be read back whenever the caller synchronises anyway.
using ErrorWord = u32*;

/// Sets the error word unless it is set. A null word drops the report.
KVLEAN_DEVICE void report(ErrorWord error, StatusCode code) noexcept {
  if (error != nullptr) atomicCAS(error, 0u, static_cast<u32>(code));
}

/// Whether an earlier stage has failed. Reads past L1, which may hold an older word.
[[nodiscard]] KVLEAN_DEVICE bool has_failed(const u32* error) noexcept {
  return error != nullptr && *reinterpret_cast<const volatile u32*>(error) != 0;
}

/// The Status of an error word that was copied to the host.
[[nodiscard]] inline Status status_of(u32 error_word) noexcept {
  return static_cast<StatusCode>(error_word);
}

/// The Status of a CUDA call.
[[nodiscard]] inline Status status_of(cudaError_t error) noexcept {
  return error == cudaSuccess ? StatusCode::ok : StatusCode::launch_failed;
}

KVLEAN_CUDA_NAMESPACE_END
