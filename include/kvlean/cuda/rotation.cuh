// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/core/rope.hpp"
#include "kvlean/cuda/config.cuh"

KVLEAN_CUDA_NAMESPACE_BEGIN

/// A RopeSpec as kernels take it, by value: frequencies of up to 256 pairs.
struct Rotation {
  static constexpr u32 most_pairs = 256;
  u32 pairs = 0;  ///< 0: nothing is turned
  u32 first = 0;
  bool adjacent = false;
  double frequency[most_pairs];

  /// Errors: those of RopeSpec::check, row_too_wide (more than 256 pairs).
  [[nodiscard]] static Status of(const RopeSpec* rope, u32 row_width, Rotation& rotation) noexcept {
    rotation.pairs = 0;
    if (rope == nullptr || rope->pairing == RopePairing::none) return StatusCode::ok;
    KVLEAN_RETURN_IF_ERROR(rope->check(row_width));
    const u32 pairs = rope->dims(row_width) / 2;
    if (pairs > most_pairs) return StatusCode::row_too_wide;
    rope_frequencies(*rope, row_width, rotation.frequency);
    rotation.pairs = pairs;
    rotation.first = rope->first_dim;
    rotation.adjacent = rope->pairing == RopePairing::norm;
    return StatusCode::ok;
  }

  /// The element that turns with `element`; itself, if none does.
  [[nodiscard]] KVLEAN_DEVICE u32 partner(u32 element) const noexcept {
    const u32 i = element - first;
    if (element < first || i >= 2 * pairs) return element;
    if (adjacent) return first + (i ^ 1u);
    return first + (i < pairs ? i + pairs : i - pairs);
  }
  /// `x`, an element of a row, turned by `shift` positions together with its partner's value. The
  /// angle is reduced in double, so that sine and cosine are right to float at any distance.
  [[nodiscard]] KVLEAN_DEVICE float turned(u32 element, float x, float partner_value,
                                           i32 shift) const noexcept {
    const u32 i = element - first;
    if (element < first || i >= 2 * pairs) return x;
    const u32 pair = adjacent ? i / 2 : i < pairs ? i : i - pairs;
    const bool second = adjacent ? (i & 1u) != 0 : i >= pairs;
    constexpr double turn = 6.283185307179586476925286766559;
    const double angle = frequency[pair] * shift;
    const float rest = static_cast<float>(angle - turn * rint(angle * (1.0 / turn)));
    float sine;
    float cosine;
    sincosf(rest, &sine, &cosine);
    return second ? fmaf(x, cosine, partner_value * sine) : fmaf(x, cosine, -partner_value * sine);
  }
};

KVLEAN_CUDA_NAMESPACE_END
