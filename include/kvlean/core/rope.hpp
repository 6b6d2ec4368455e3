// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cmath>

#include "kvlean/core/dtype.hpp"
#include "kvlean/status.hpp"

KVLEAN_NAMESPACE_BEGIN

/// Which dimensions rotate together: `norm` pairs (2i, 2i+1), `neox` pairs (i, i + dim/2).
enum class RopePairing : u8 { none, norm, neox };

/// How a model stretches its rotation over a longer context. d is the number of rotated dimensions,
/// f(i) = theta^(-2i/d) the angular frequency of pair i without scaling.
enum class RopeScaling : u8 {
  none,
  linear,  ///< f / factor
  ntk,     ///< theta := theta * factor^(d / (d - 2)), as NTK-aware scaling with a fixed factor
  yarn,    ///< blends f and f / factor by a ramp over the pairs
  llama3,  ///< f for short wavelengths, f / factor for long ones, blended in between
};

/// How keys and queries were rotated before they were stored (rotary position embedding,
/// arXiv 2104.09864): everything that is needed to move a stored key to another position. The
/// caller's; a cache only points at it.
///
/// Frequencies must be the same at every length, because a row is moved by the difference of two
/// positions. Dynamic NTK, and scalings that choose between frequencies by the length, are covered
/// only while the engine's frequencies stay those of the spec. Rotations with several position
/// numbers a token (multimodal sections) are not covered.
struct RopeSpec {
  RopePairing pairing = RopePairing::neox;  ///< none: the model has no RoPE, nothing is turned
  RopeScaling scaling = RopeScaling::none;
  double theta = 10000.0;         ///< base of the frequencies
  u32 rotary_dims = 0;            ///< rotated elements of a row, even; 0: all from first_dim on
  u32 first_dim = 0;              ///< first rotated element of a row
  double factor = 1.0;            ///< context stretch, at least 1; every scaling but none
  u32 original_context = 0;       ///< tokens before the stretch; yarn and llama3
  double low_freq_factor = 1.0;   ///< llama3: wavelengths over original_context / this stretch
  double high_freq_factor = 4.0;  ///< llama3: wavelengths under original_context / this stay
  double beta_fast = 32.0;        ///< yarn: pairs that turn more often in the old context stay
  double beta_slow = 1.0;         ///< yarn: pairs that turn less often in the old context stretch
  double extrapolation = 1.0;     ///< yarn: 1 as published, 0 is linear (llama.cpp: ext_factor)
  bool whole_ramp_pairs = true;   ///< yarn: the ramp begins and ends at whole pair numbers
  double attention_factor = 0.0;  ///< magnitude of a rotated row; 0: 1, yarn 0.1 ln(factor) + 1
  const float* frequency_factors = nullptr;  ///< [rotary_dims / 2] f is divided by, or null

  /// Elements of a row that are rotated. O(1).
  [[nodiscard]] constexpr u32 dims(u32 row_width) const noexcept {
    if (pairing == RopePairing::none || first_dim >= row_width) return 0;
    return rotary_dims != 0 ? rotary_dims : row_width - first_dim;
  }

  /// Whether the spec can rotate rows of `row_width` elements. Errors: row_too_wide; invalid_rope
  /// (an odd count of rotated elements or one past the row's end, a number outside its range, a
  /// scaling without its original_context, llama3 with frequency_factors, which say the same twice,
  /// an unknown pairing or scaling). O(rotary_dims).
  [[nodiscard]] Status check(u32 row_width) const noexcept {
    const auto positive = [](double x) noexcept { return x > 0.0 && std::isfinite(x); };
    if (row_width > max_row_width) return StatusCode::row_too_wide;
    if (pairing > RopePairing::neox || scaling > RopeScaling::llama3) {
      return StatusCode::invalid_rope;
    }
    if (pairing == RopePairing::none) return StatusCode::ok;
    const u32 d = dims(row_width);
    bool good = first_dim < row_width && d % 2 == 0 && d <= row_width - first_dim;
    good = good && positive(theta) && std::isfinite(attention_factor) && attention_factor >= 0.0;
    if (scaling != RopeScaling::none) good = good && factor >= 1.0 && std::isfinite(factor);
    if (scaling == RopeScaling::ntk) good = good && d > 2;
    if (scaling == RopeScaling::yarn) {
      good = good && original_context != 0 && theta > 1.0 && positive(beta_slow) &&
             std::isfinite(beta_fast) && beta_fast >= beta_slow && extrapolation >= 0.0 &&
             extrapolation <= 1.0;
    }
    if (scaling == RopeScaling::llama3) {
      good = good && original_context != 0 && positive(low_freq_factor) &&
             std::isfinite(high_freq_factor) && high_freq_factor > low_freq_factor &&
             frequency_factors == nullptr;
    }
    for (u32 i = 0; good && frequency_factors != nullptr && i < d / 2; ++i) {
      good = positive(static_cast<double>(frequency_factors[i]));
    }
    return good ? StatusCode::ok : StatusCode::invalid_rope;
  }

  /// What rotating from scratch multiplies a row by; moving a rotated row leaves it alone.
  [[nodiscard]] double magnitude() const noexcept {
    if (attention_factor > 0.0) return attention_factor;
    return scaling == RopeScaling::yarn ? 0.1 * std::log(factor) + 1.0 : 1.0;
  }
};

namespace detail {

inline constexpr double two_pi = 6.283185307179586476925286766559;

/// YaRN's ramp over pair numbers: 1 keeps the frequency, 0 stretches it.
struct YarnRamp {
  double low = 0.0;
  double high = 0.0;

  YarnRamp() noexcept = default;
  YarnRamp(const RopeSpec& rope, double d) noexcept {
    // The pair that turns `turns` times within the original context.
    const auto pair_of = [&](double turns) noexcept {
      return d * std::log(rope.original_context / (turns * two_pi)) / (2.0 * std::log(rope.theta));
    };
    low = pair_of(rope.beta_fast);
    high = pair_of(rope.beta_slow);
    if (rope.whole_ramp_pairs) {
      low = std::floor(low);
      high = std::ceil(high);
    }
    low = std::max(low, 0.0);
    high = std::min(high, d - 1.0);
  }
  [[nodiscard]] double at(u32 pair) const noexcept {
    const double y = (static_cast<double>(pair) - low) / std::max(0.001, high - low);
    return 1.0 - std::clamp(y, 0.0, 1.0);
  }
};

[[nodiscard]] inline double llama3_frequency(const RopeSpec& rope, double f) noexcept {
  const double turns = rope.original_context * f / two_pi;
  if (turns > rope.high_freq_factor) return f;
  if (turns < rope.low_freq_factor) return f / rope.factor;
  const double smooth =
      (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor);
  return (1.0 - smooth) * f / rope.factor + smooth * f;
}

}  // namespace detail

/// Writes the angular frequency of each pair, radians a position, [rope.dims(row_width) / 2]. The
/// spec must pass check(row_width). Scalings: linear as position interpolation (arXiv 2306.15595),
/// yarn as arXiv 2309.00071 with the ramp over pair numbers that Hugging Face and
/// llama.cpp compute, llama3 as published with Llama 3.1. frequency_factors divide f before it is
/// scaled (llama.cpp's rope_freqs tensor; LongRoPE's factors). O(rotary_dims).
inline void rope_frequencies(const RopeSpec& rope, u32 row_width, double* frequency) noexcept {
  const u32 pairs = rope.dims(row_width) / 2;
  const double d = 2.0 * pairs;
  const double theta = rope.scaling == RopeScaling::ntk
                           ? rope.theta * std::pow(rope.factor, d / (d - 2.0))
                           : rope.theta;
  const bool yarn = rope.scaling == RopeScaling::yarn;
  const detail::YarnRamp ramp = yarn ? detail::YarnRamp(rope, d) : detail::YarnRamp();
  for (u32 i = 0; i < pairs; ++i) {
    double f = std::pow(theta, -2.0 * i / d);
    if (rope.frequency_factors != nullptr) f /= static_cast<double>(rope.frequency_factors[i]);
    if (rope.scaling == RopeScaling::linear) f /= rope.factor;
    if (yarn) {
      const double keep = ramp.at(i) * rope.extrapolation;
      f = f / rope.factor * (1.0 - keep) + f * keep;
    }
    if (rope.scaling == RopeScaling::llama3) f = detail::llama3_frequency(rope, f);
    frequency[i] = f;
  }
}

/// Cosine and sine of each pair for one shift, prepared once and applied to many rows.
struct RopeTurn {
  float cosine[max_row_width / 2];
  float sine[max_row_width / 2];
};

/// Rotates rows of one width. Holds the frequencies in itself (8 KiB), allocates nothing; reading
/// it from several threads is fine. Default-constructed it turns nothing.
///
/// Angles are position times frequency in double; cosine and sine are rounded to float, and rows
/// are turned in float. Moved once, by any distance, a row differs from one rotated from scratch by
/// 2e-7 of its largest element, plus the rounding of its type. Errors of repeated moves add up,
/// most of all in 16 bits, where turns by less than half a unit are lost (measured, 128 wide,
/// share of the row's norm):
///
///   moves     f32      f16      bf16
///      10     2e-7     0.1%     0.8%
///     100     2e-6     0.8%     5%
///    1000     2e-5     6%       43%
///
/// So move rarely and far, when the context is nearly full, rather than a little at every step.
/// Engines that multiply angles in float are themselves off by about position * 1e-7 radians.
class RopeRotation {
 public:
  /// Takes over a spec for rows of `row_width` elements. Errors: those of RopeSpec::check; then
  /// nothing is changed. O(rotary_dims).
  [[nodiscard]] Status prepare(const RopeSpec& rope, u32 row_width) noexcept {
    KVLEAN_RETURN_IF_ERROR(rope.check(row_width));
    pairing_ = rope.pairing;
    first_ = rope.first_dim;
    pairs_ = rope.dims(row_width) / 2;
    magnitude_ = rope.magnitude();
    rope_frequencies(rope, row_width, frequency_);
    return StatusCode::ok;
  }

  [[nodiscard]] u32 pairs() const noexcept { return pairs_; }
  /// Radians a position.
  [[nodiscard]] double frequency(u32 pair) const noexcept { return frequency_[pair]; }

  /// The turn that moves a rotated row by `shift` positions, new minus old; the magnitude stays.
  /// O(rotary_dims), most of it sines.
  void turn_by(i64 shift, RopeTurn& turn) const noexcept { fill(shift, 1.0, turn); }
  /// The turn that rotates an unrotated row to `position`, with the spec's magnitude.
  void turn_from_scratch(i64 position, RopeTurn& turn) const noexcept {
    fill(position, magnitude_, turn);
  }
  /// Turns `row` [row_width] in place; elements outside the rotated range keep their bits.
  void rotate(const RopeTurn& turn, float* row) const noexcept {
    float* x = row + first_;
    const u32 step = pairing_ == RopePairing::norm ? 2 : 1;
    float* y = x + (pairing_ == RopePairing::norm ? 1 : pairs_);
    if (step == 1) {
      for (u32 i = 0; i < pairs_; ++i) turn_pair(x[i], y[i], turn.cosine[i], turn.sine[i]);
    } else {
      for (u32 i = 0; i < pairs_; ++i) turn_pair(x[2 * i], y[2 * i], turn.cosine[i], turn.sine[i]);
    }
  }

 private:
  static void turn_pair(float& x, float& y, float cosine, float sine) noexcept {
    const float turned = x * cosine - y * sine;
    y = x * sine + y * cosine;
    x = turned;
  }
  void fill(i64 positions, double magnitude, RopeTurn& turn) const noexcept {
    for (u32 i = 0; i < pairs_; ++i) {
      const double angle = static_cast<double>(positions) * frequency_[i];
      turn.cosine[i] = static_cast<float>(std::cos(angle) * magnitude);
      turn.sine[i] = static_cast<float>(std::sin(angle) * magnitude);
    }
  }

  RopePairing pairing_ = RopePairing::none;
  u32 first_ = 0;
  u32 pairs_ = 0;
  double magnitude_ = 1.0;
  double frequency_[max_row_width / 2];
};

KVLEAN_NAMESPACE_END
