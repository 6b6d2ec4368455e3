// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>

#include "kvlean/cuda/status.cuh"

KVLEAN_CUDA_NAMESPACE_BEGIN

/// A bump arena over the caller's device memory. It only does arithmetic on addresses: nothing is
/// allocated, read or written. Stages on one stream may take, rewind and take the same bytes again,
/// as kernels run in stream order. A counting one hands out no memory and adds up what a stage
/// takes, so that `bytes_required` and the stage itself share their code.
class Workspace {
 public:
  static constexpr std::size_t alignment = 256;

  /// Uses `bytes` bytes of device memory from `memory` on, any alignment.
  Workspace(void* memory, std::size_t bytes) noexcept
      : begin_(static_cast<std::byte*>(memory)), bytes_(bytes) {
    const std::size_t past = reinterpret_cast<std::size_t>(memory) % alignment;
    used_ = past == 0 ? 0 : alignment - past;
  }
  /// One that counts: take() returns null and never fails.
  [[nodiscard]] static Workspace counting() noexcept { return Workspace(); }

  /// Reserves `count` uninitialised elements, 256-byte aligned. Check ok() after the last take.
  template <class T>
  [[nodiscard]] T* take(std::size_t count) noexcept {
    if (count > (static_cast<std::size_t>(-1) / 4 - used_) / sizeof(T)) {
      ok_ = false;
      return nullptr;
    }
    const std::size_t after = used_ + ceil_div(count * sizeof(T), alignment) * alignment;
    T* place = nullptr;
    if (begin_ != nullptr && after <= bytes_) {
      place = reinterpret_cast<T*>(begin_ + used_);
    } else if (!counts_) {
      ok_ = false;
      return nullptr;
    }
    used_ = after;
    if (used_ > most_) most_ = used_;
    return place;
  }

  /// No take() has failed.
  [[nodiscard]] bool ok() const noexcept { return ok_; }
  [[nodiscard]] Status status() const noexcept {
    return ok_ ? StatusCode::ok : StatusCode::workspace_too_small;
  }
  /// A point to return to; rewind() gives back what was taken after it.
  [[nodiscard]] std::size_t mark() const noexcept { return used_; }
  void rewind(std::size_t mark) noexcept {
    used_ = mark;
    ok_ = true;
  }
  /// Most bytes ever in use, with what an unaligned beginning costs: what bytes_required returns.
  [[nodiscard]] std::size_t bytes_required() const noexcept { return most_ + alignment; }

 private:
  Workspace() noexcept : counts_(true) {}

  std::byte* begin_ = nullptr;
  std::size_t bytes_ = 0;
  std::size_t used_ = 0;
  std::size_t most_ = 0;
  bool counts_ = false;
  bool ok_ = true;
};

/// Gives back, at scope end, what was taken inside the scope.
class WorkspaceScope {
 public:
  explicit WorkspaceScope(Workspace& workspace) noexcept
      : workspace_(workspace), mark_(workspace.mark()) {}
  ~WorkspaceScope() { workspace_.rewind(mark_); }
  WorkspaceScope(const WorkspaceScope&) = delete;
  WorkspaceScope& operator=(const WorkspaceScope&) = delete;

 private:
  Workspace& workspace_;
  std::size_t mark_;
};

KVLEAN_CUDA_NAMESPACE_END
