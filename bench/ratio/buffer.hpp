// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
// Memory that is measured: on huge pages where the system has them, touched before any clock runs.
#pragma once

#include <cstddef>
#include <cstring>
#include <kvlean/core/dtype.hpp>
#include <memory>
#include <vector>

namespace kvlean::ratio {

/// Bytes on 2 MiB boundaries, zeroed. Throws std::bad_alloc.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(std::size_t bytes);
  template <class T = std::byte>
  [[nodiscard]] T* as() const {
    return reinterpret_cast<T*>(data_.get());
  }
  [[nodiscard]] std::size_t bytes() const { return bytes_; }
  [[nodiscard]] explicit operator bool() const { return data_ != nullptr; }
  void copy_from(const Buffer& other) { std::memcpy(data_.get(), other.data_.get(), bytes_); }

 private:
  struct Free {
    void operator()(std::byte* data) const;
  };
  std::unique_ptr<std::byte, Free> data_;
  std::size_t bytes_ = 0;
};

/// SplitMix64: the same numbers with every compiler.
class Draws {
 public:
  explicit Draws(u64 seed) : state_(seed) {}
  u64 next() {
    u64 z = (state_ += 0x9e3779b97f4a7c15ull);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
  }
  /// In [-1, 1).
  float uniform() { return static_cast<float>(next() >> 40) * 0x1p-23f - 1.0f; }
  /// About normal, variance 1: the sum of three uniforms from one draw.
  float normal() {
    const u64 bits = next();
    const auto part = [bits](int shift) {
      return static_cast<float>((bits >> shift) & 0x1fffffu) * 0x1p-20f - 1.0f;
    };
    return part(0) + part(21) + part(42);
  }

 private:
  u64 state_;
};

/// FNV-1a over bytes, continued from `digest`.
[[nodiscard]] u64 digest_of(const void* data, std::size_t bytes,
                            u64 digest = 0xcbf29ce484222325ull);

/// Elements of any storage type as float.
[[nodiscard]] inline float element(const void* data, DType dtype, std::size_t index) {
  return load_element(static_cast<const std::byte*>(data) + index * size_bytes(dtype), dtype);
}
inline void set_element(void* data, DType dtype, std::size_t index, float value) {
  store_element(static_cast<std::byte*>(data) + index * size_bytes(dtype), dtype, value);
}

}  // namespace kvlean::ratio
