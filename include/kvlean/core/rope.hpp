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

KVLEAN_NAMESPACE_END

#include "kvlean/core/rope_rotation.hpp"  // IWYU pragma: export
