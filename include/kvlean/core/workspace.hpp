// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <memory>
#include <new>
#include <span>
#include <type_traits>

#include "kvlean/status.hpp"

KVLEAN_NAMESPACE_BEGIN

/// A bump arena for plans and scratch. Over caller memory it never allocates: when the memory is
/// used up, take() returns null and the stage returns workspace_too_small. A default-constructed
/// one grows by itself (nothrow new), for tools, tests and first steps. Plans point into it: they
/// live until reset() or the end of the workspace. Not thread-safe; parallel stages take before
/// they fork.
class Workspace {
 public:
  /// Grows on demand.
  Workspace() noexcept : grows_(true) {}
  /// Uses only `memory`, any alignment.
  explicit Workspace(std::span<std::byte> memory) noexcept
      : begin_(memory.data()), end_(memory.data() + memory.size()), next_(memory.data()) {}
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace() { release(nullptr); }

  static constexpr std::size_t alignment = 64;

  /// Bytes that one take<T>(count) can cost, padding included.
  template <class T>
  [[nodiscard]] static constexpr std::size_t bytes_for(std::size_t count) noexcept {
    return (count * sizeof(T) + alignment - 1) / alignment * alignment + alignment;
  }

  /// `count` uninitialised elements, 64-byte aligned, or null. Never null for count 0.
  template <class T>
  [[nodiscard]] T* take(std::size_t count) noexcept {
    static_assert(std::is_trivially_destructible_v<T>);
    if (count > static_cast<std::size_t>(-1) / sizeof(T) / 2) return nullptr;
    return static_cast<T*>(take_bytes(std::max<std::size_t>(count * sizeof(T), 1)));
  }
  /// The same, zeroed.
  template <class T>
  [[nodiscard]] T* take_zeroed(std::size_t count) noexcept {
    T* data = take<T>(count);
    if (data != nullptr) std::fill_n(data, count, T{});
    return data;
  }

  /// A point to return to: everything taken after it is given back by rewind().
  struct Mark {
    void* chunk = nullptr;
    std::byte* next = nullptr;
    std::size_t used = 0;
  };
  [[nodiscard]] Mark mark() const noexcept { return {chunk_, next_, used_}; }
  void rewind(const Mark& mark) noexcept {
    release(static_cast<Chunk*>(mark.chunk));
    if (chunk_ != nullptr) {
      begin_ = reinterpret_cast<std::byte*>(chunk_ + 1);
      end_ = begin_ + chunk_->bytes;
    } else if (grows_) {
      begin_ = end_ = nullptr;
    }
    next_ = mark.next;
    used_ = mark.used;
  }
  /// Forgets everything taken. Plans made before are dead. Keeps the largest chunk of a growing
  /// one.
  void reset() noexcept {
    if (grows_ && chunk_ != nullptr) {  // the newest chunk is the largest
      Chunk* newest = chunk_;
      chunk_ = newest->previous;
      release(nullptr);
      newest->previous = nullptr;
      chunk_ = newest;
      next_ = begin_;
      used_ = 0;
    } else {
      rewind({nullptr, begin_, 0});
    }
  }

  /// Most bytes ever in use, padding included: what a fixed workspace needs for the same calls in
  /// memory aligned to `alignment`, and up to alignment - 1 more elsewhere.
  [[nodiscard]] std::size_t high_water_bytes() const noexcept { return high_water_; }
  /// The Status a stage returns when take() gave null.
  [[nodiscard]] Status exhausted() const noexcept {
    return grows_ ? StatusCode::out_of_memory : StatusCode::workspace_too_small;
  }

 private:
  struct alignas(64) Chunk {
    Chunk* previous;
    std::size_t bytes;
  };

  void* take_bytes(std::size_t bytes) noexcept {
    for (int attempt = 0; attempt < 2; ++attempt) {
      void* place = next_;
      std::size_t space = static_cast<std::size_t>(end_ - next_);
      if (next_ != nullptr && std::align(alignment, bytes, place, space) != nullptr) {
        std::byte* after = static_cast<std::byte*>(place) + bytes;
        // Counted as in one aligned block, so that a change of chunk does not hide padding.
        used_ = (used_ + alignment - 1) / alignment * alignment + bytes;
        next_ = after;
        high_water_ = std::max(high_water_, used_);
        return place;
      }
      if (!grows_ || !grow(bytes)) return nullptr;
    }
    return nullptr;
  }
  bool grow(std::size_t bytes) noexcept {
    const std::size_t previous = chunk_ != nullptr ? chunk_->bytes : std::size_t{1} << 15;
    const std::size_t size = std::max(bytes + alignment, previous * 2);
    void* raw = ::operator new (sizeof(Chunk) + size, std::align_val_t{64}, std::nothrow);
    if (raw == nullptr) return false;
    chunk_ = new (raw) Chunk{chunk_, size};
    begin_ = next_ = reinterpret_cast<std::byte*>(chunk_ + 1);
    end_ = begin_ + size;
    return true;
  }
  void release(Chunk* keep) noexcept {
    while (chunk_ != nullptr && chunk_ != keep) {
      Chunk* previous = chunk_->previous;
      ::operator delete (chunk_, std::align_val_t{64});
      chunk_ = previous;
    }
  }

  std::byte* begin_ = nullptr;
  std::byte* end_ = nullptr;
  std::byte* next_ = nullptr;
  Chunk* chunk_ = nullptr;
  std::size_t used_ = 0;
  std::size_t high_water_ = 0;
  bool grows_ = false;
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
  Workspace::Mark mark_;
};

KVLEAN_NAMESPACE_END
