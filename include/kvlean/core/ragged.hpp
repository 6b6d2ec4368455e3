// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <type_traits>

#include "kvlean/config.hpp"

KVLEAN_NAMESPACE_BEGIN

/// A value per (segment, token) in somebody's memory: positions, log mass, scores, attention mass.
/// Segment s starts at first[s], or at s * stride when there is no offset table.
template <class T>
struct Ragged {
  T* data = nullptr;
  const u64* first = nullptr;
  u64 stride = 0;

  constexpr Ragged() noexcept = default;
  constexpr Ragged(T* values, u64 segment_stride) noexcept : data(values), stride(segment_stride) {}
  constexpr Ragged(T* values, const u64* segment_first) noexcept
      : data(values), first(segment_first) {}

  [[nodiscard]] constexpr explicit operator bool() const noexcept { return data != nullptr; }
  [[nodiscard]] constexpr T* segment(u32 s) const noexcept {
    return data + (first != nullptr ? first[s] : static_cast<u64>(s) * stride);
  }
  [[nodiscard]] constexpr T& operator()(u32 s, u32 token) const noexcept {
    return segment(s)[token];
  }
  [[nodiscard]] constexpr operator Ragged<const T>() const noexcept requires(!std::is_const_v<T>) {
    Ragged<const T> view;
    view.data = data;
    view.first = first;
    view.stride = stride;
    return view;
  }
};

KVLEAN_NAMESPACE_END
