// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime.h>

#include <utility>

#include "kvlean/cuda/workspace.cuh"

KVLEAN_CUDA_NAMESPACE_BEGIN

/// What every call takes: the caller's stream, scratch memory and error word. A call only puts
/// kernels and memsets on the stream: it allocates nothing, waits for nothing and reads nothing
/// back, so it can be captured into a graph.
struct Context {
  cudaStream_t stream = nullptr;
  Workspace& workspace;
  ErrorWord error = nullptr;  ///< device memory, zeroed by the caller once; see status.cuh
};

/// How a kernel is launched beyond its grid.
struct LaunchShape {
  dim3 grid = {1, 1, 1};
  dim3 block = {1, 1, 1};
  std::size_t shared_bytes = 0;  ///< dynamic; above 48 KiB raise_shared_bytes() comes first
  u32 cluster = 0;               ///< blocks of a cluster (compute capability 9.0); 0: none
  /// Lets the kernel start while the one before it drains. It must call wait_for_previous() before
  /// it touches anything that an earlier kernel writes or reads. Without effect before 9.0.
  bool overlap = false;
};

/// Puts a kernel on the context's stream. An empty grid is no work: ok. Errors: launch_failed.
template <class... Parameters, class... Arguments>
[[nodiscard]] Status launch(const Context& context, const LaunchShape& shape,
                            void (*kernel)(Parameters...), Arguments&&... arguments) noexcept {
  if (shape.grid.x == 0 || shape.grid.y == 0 || shape.grid.z == 0) return StatusCode::ok;
  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = context.stream;
  config.attrs = attributes;
  if (shape.cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs].val.clusterDim.x = shape.cluster;
    attributes[config.numAttrs].val.clusterDim.y = 1;
    attributes[config.numAttrs].val.clusterDim.z = 1;
    ++config.numAttrs;
  }
  if (shape.overlap) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs].val.programmaticStreamSerializationAllowed = 1;
    ++config.numAttrs;
  }
  const cudaError_t error =
      cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
  if (error != cudaSuccess) static_cast<void>(cudaGetLastError());  // not the next call's error
  return status_of(error);
}

/// Allows a kernel `bytes` of dynamic shared memory beside its static. Cheap; may be called before
/// every launch.
template <class... Parameters>
[[nodiscard]] Status raise_shared_bytes(void (*kernel)(Parameters...), std::size_t bytes) noexcept {
  if (bytes <= 32 * 1024) return StatusCode::ok;
  const cudaError_t error =
      cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                           cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (error != cudaSuccess) static_cast<void>(cudaGetLastError());
  return status_of(error);
}

/// In a kernel launched with `overlap`: waits until every earlier kernel has finished and its
/// writes can be seen. Harmless in any other kernel.
KVLEAN_DEVICE void wait_for_previous() noexcept {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
/// Lets the next kernel, if it was launched with `overlap`, begin its prologue.
KVLEAN_DEVICE void allow_next() noexcept {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

/// Compute capability of the current device, 10 * major + minor. Two cheap calls into the runtime.
/// 0 when there is no device.
[[nodiscard]] inline int compute_capability() noexcept {
  int device = 0;
  int major = 0;
  int minor = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess) {
    static_cast<void>(cudaGetLastError());
    return 0;
  }
  return 10 * major + minor;
}
/// Most bytes of dynamic shared memory that a block of the current device can have.
[[nodiscard]] inline std::size_t most_shared_bytes() noexcept {
  int device = 0;
  int bytes = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) !=
          cudaSuccess) {
    static_cast<void>(cudaGetLastError());
    return 48 * 1024;
  }
  return static_cast<std::size_t>(bytes);
}
/// Multiprocessors of the current device, for grids that size themselves. 1 when unknown.
[[nodiscard]] inline u32 multiprocessors() noexcept {
  int device = 0;
  int count = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) {
    static_cast<void>(cudaGetLastError());
    return 1;
  }
  return static_cast<u32>(count);
}

KVLEAN_CUDA_NAMESPACE_END
