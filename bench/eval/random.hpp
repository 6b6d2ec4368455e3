// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <utility>
#include <vector>

namespace kvlean::eval {

/// A stream of pseudo-random draws (SplitMix64). The same seed gives the same draws with every
/// compiler and standard library, which the standard distributions don't promise.
class Draws {
 public:
  explicit Draws(std::uint64_t seed) : state_(seed) {}

  /// A stream of its own for a part of the work, such as a task and a sample.
  Draws(std::uint64_t seed, std::string_view name, std::uint64_t index = 0) : state_(seed) {
    std::uint64_t hash = 0xcbf29ce484222325ull;  // FNV-1a
    for (const char c : name) {
      hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001b3ull;
    }
    state_ = next() ^ hash;
    state_ = next() ^ index;
    state_ = next();
  }

  std::uint64_t next() {
    std::uint64_t z = (state_ += 0x9e3779b97f4a7c15ull);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
  }

  /// Uniform over 0 .. count - 1; `count` must not be 0. Exact: draws that would favour some
  /// numbers are rejected (Lemire, 2019, for counts below 2^32).
  std::size_t below(std::size_t count) {
    if (count <= 0xffffffffull) {
      const std::uint64_t n = count;
      std::uint64_t product = (next() >> 32) * n;
      if ((product & 0xffffffffull) < n) {
        const std::uint64_t uneven = (0x100000000ull - n) % n;
        while ((product & 0xffffffffull) < uneven) product = (next() >> 32) * n;
      }
      return static_cast<std::size_t>(product >> 32);
    }
    const std::uint64_t n = count;
    const std::uint64_t uneven = (0 - n) % n;  // 2^64 mod n
    std::uint64_t value = next();
    while (value < uneven) value = next();
    return static_cast<std::size_t>(value % n);
  }

  /// Uniform over low .. high, both included.
  std::size_t between(std::size_t low, std::size_t high) { return low + below(high - low + 1); }

  /// Uniform over [0, 1), in steps of 2^-53.
  double unit() { return static_cast<double>(next() >> 11) * 0x1p-53; }

  template <class T>
  void shuffle(std::vector<T>& values) {
    for (std::size_t i = values.size(); i > 1; --i) std::swap(values[i - 1], values[below(i)]);
  }

  /// `count` different numbers below `all` (at most `all` of them), in drawn order.
  std::vector<std::size_t> sample(std::size_t all, std::size_t count) {
    std::vector<std::size_t> numbers(all);
    for (std::size_t i = 0; i < all; ++i) numbers[i] = i;
    if (count > all) count = all;
    for (std::size_t i = 0; i < count; ++i) std::swap(numbers[i], numbers[i + below(all - i)]);
    numbers.resize(count);
    return numbers;
  }

 private:
  std::uint64_t state_;
};

}  // namespace kvlean::eval
