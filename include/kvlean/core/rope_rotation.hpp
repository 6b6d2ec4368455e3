// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <limits>

#include "kvlean/core/rope.hpp"
#include "kvlean/simd/move_kernels.hpp"

KVLEAN_NAMESPACE_BEGIN

/// Cosine and sine of each pair for one shift, prepared once and applied to many rows.
struct RopeTurn {
  float cosine[max_row_width / 2];
  float sine[max_row_width / 2];
};

/// Rotates rows of one width. Holds the frequencies in itself (8 KiB), allocates nothing; reading
/// it from several threads is fine. Default-constructed it turns nothing.
///
/// A turn is a function of the shift alone, and the same bits on every target: cosine and sine are
/// computed in double, of angles that are position times frequency in double, and rounded to float
/// once; rows are turned in float. Against exact numbers a cosine or sine so errs by 6e-8 / 2 for
/// the rounding, 1e-14, and 5e-16 of the angle in radians. Moved once, by any distance, a row
/// differs from one rotated from scratch by 2e-7 of its largest element, plus the rounding of its
/// type. Errors of repeated moves add up, most of all in 16 bits, where turns by less than half a
/// unit are lost (measured, 128 wide, share of the row's norm):
///
///   moves     f32      f16      bf16
///      10     2e-7     0.1%     0.8%
///     100     2e-6     0.8%     5%
///    1000     2e-5     6%       43%
///
/// So move rarely and far, when the context is nearly full, rather than a little at every step.
/// Engines that multiply angles in float are themselves off by about position * 1e-7 radians. Exact
/// is only what is never turned: sinks and frozen tokens, or a plan without new positions.
class RopeRotation {
 public:
  /// Takes over a spec for rows of `row_width` elements. Errors: those of RopeSpec::check; then
  /// nothing is changed. O(rotary_dims).
  [[nodiscard]] Status prepare(const RopeSpec& rope, u32 row_width) noexcept {
    KVLEAN_RETURN_IF_ERROR(rope.check(row_width));
    row_.adjacent = rope.pairing == RopePairing::norm;
    row_.first = rope.first_dim;
    row_.pairs = rope.dims(row_width) / 2;
    row_.width = row_width;
    magnitude_ = rope.magnitude();
    rope_frequencies(rope, row_width, frequency_);
    std::fill(frequency_ + row_.pairs, frequency_ + simd::padded_pairs(row_.pairs), 0.0);
    return StatusCode::ok;
  }

  [[nodiscard]] u32 pairs() const noexcept { return row_.pairs; }
  /// Radians a position.
  [[nodiscard]] double frequency(u32 pair) const noexcept { return frequency_[pair]; }
  /// The elements that are turned, for rows of float.
  [[nodiscard]] const simd::TurnedRow& turned_row() const noexcept { return row_; }

  /// The turn that moves a rotated row by `shift` positions, new minus old; the magnitude stays.
  /// O(rotary_dims); RopeTurns is faster for many shifts.
  void turn_by(i64 shift, RopeTurn& turn) const noexcept { fill(shift, 1.0, turn); }
  /// The turn that rotates an unrotated row to `position`, with the spec's magnitude.
  void turn_from_scratch(i64 position, RopeTurn& turn) const noexcept {
    fill(position, magnitude_, turn);
  }
  /// Turns `row` [row_width] in place; elements outside the rotated range keep their bits.
  void rotate(const RopeTurn& turn, float* row) const noexcept {
    simd::move_kernels().turn(row_, turn.cosine, turn.sine, row, row);
  }

 private:
  friend class RopeTurns;

  // A shift is a multiple of `step` and a rest of [0, step), whose angles are added: neighbours
  // share the former, and of the latter there are few. Every turn is made so, for the same bits.
  static constexpr i64 step = 32;
  [[nodiscard]] static constexpr i64 rest_of(i64 shift) noexcept { return shift & (step - 1); }

  void fill(i64 positions, double magnitude, RopeTurn& turn) const noexcept {
    constexpr u32 block = 64;
    static_assert(block % simd::pair_block == 0 && max_row_width / 2 % block == 0);
    const simd::MoveKernels& kernels = simd::move_kernels();
    const i64 rest = rest_of(positions);
    double cosine[2][block];
    double sine[2][block];
    for (u32 i = 0; i < row_.pairs; i += block) {
      const u32 n = std::min(block, row_.pairs - i);
      kernels.angles(frequency_ + i, static_cast<double>(positions - rest), n, cosine[0], sine[0]);
      kernels.angles(frequency_ + i, static_cast<double>(rest), n, cosine[1], sine[1]);
      for (u32 k = 0; magnitude != 1.0 && k < n; ++k) {
        cosine[0][k] *= magnitude;
        sine[0][k] *= magnitude;
      }
      kernels.add_angles(cosine[0], sine[0], cosine[1], sine[1], n, turn.cosine + i, turn.sine + i);
    }
  }

  simd::TurnedRow row_;
  double magnitude_ = 1.0;
  double frequency_[max_row_width / 2];
};

/// The turns of one rotation by many shifts, the fewer different ones the faster: the newest turn
/// and sines of some distances are kept. The bits of RopeRotation::turn_by. Takes 42 KiB and
/// allocates nothing; one a thread.
class RopeTurns {
 public:
  /// The rotation must outlive this. O(1).
  explicit RopeTurns(const RopeRotation& rotation) noexcept
      : rotation_(rotation), padded_(simd::padded_pairs(rotation.pairs())) {
    if (padded_ != 0) places_ = std::min(most_places, room / (2 * padded_) - 1);
    std::fill_n(kept_, most_places, none);
  }

  /// The turn by `shift`; it lasts until the next call. O(rotary_dims).
  [[nodiscard]] const RopeTurn& by(i64 shift) noexcept {
    if (shift == shift_ || padded_ == 0) return turn_;
    const i64 rest = RopeRotation::rest_of(shift);
    if (base_ != shift - rest) {
      base_ = shift - rest;
      sines_of(base_, sines_);
    }
    const u32 place = static_cast<u32>(rest) % places_;
    double* of_rest = sines_ + (place + 1) * 2 * padded_;
    if (kept_[place] != static_cast<u32>(rest)) {
      kept_[place] = static_cast<u32>(rest);
      sines_of(rest, of_rest);
    }
    simd::move_kernels().add_angles(sines_, sines_ + padded_, of_rest, of_rest + padded_,
                                    rotation_.pairs(), turn_.cosine, turn_.sine);
    shift_ = shift;
    return turn_;
  }

 private:
  static constexpr u32 most_places = static_cast<u32>(RopeRotation::step);
  static constexpr u32 none = most_places;
  static constexpr u32 room = (most_places + 1) * 128;  // all rests of rows with 64 pairs
  static_assert(room >= 2 * max_row_width);             // one rest of the widest
  static constexpr i64 never = std::numeric_limits<i64>::max();

  void sines_of(i64 position, double* to) const noexcept {
    simd::move_kernels().angles(rotation_.frequency_, static_cast<double>(position),
                                rotation_.pairs(), to, to + padded_);
  }

  const RopeRotation& rotation_;
  u32 padded_;
  u32 places_ = 1;
  i64 shift_ = never;
  i64 base_ = never;
  u32 kept_[most_places];
  double sines_[room];  // of the base, then of the rests
  RopeTurn turn_;
};

KVLEAN_NAMESPACE_END
