// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cmath>

#include "kvlean/core/kv_cache.hpp"
#include "kvlean/core/plan.hpp"
#include "kvlean/core/row_addresses.hpp"
#include "kvlean/reduce/kvmerger_options.hpp"
#include "kvlean/simd/merge_kernels.hpp"

KVLEAN_NAMESPACE_BEGIN
namespace detail {

/// Logarithm of the mass a slot gets when tokens with weights w (summing to 1) and log masses m
/// merge:
///   none       log sum w exp(m): 0 for fresh tokens, the mean count for carried ones
///   log_count  log sum exp(m): counts add, also over repeated merging
///   entropy    sum w (m - log w): LSE(l + m) >= sum w (l + m) + H(w) by Jensen
///
/// Masses are finite; sums are taken relative to `largest`, so that no exponential overflows and
/// the largest term never underflows.
class MassSum {
 public:
  explicit MassSum(float largest) noexcept : largest_(largest) {}
  void add(float weight, float log_mass) noexcept {
    const double count = std::exp(static_cast<double>(log_mass) - largest_);
    counts_ += count;
    weighted_ += static_cast<double>(weight) * count;
    if (weight > 0.0f) {
      entropy_ += static_cast<double>(weight) *
                  (static_cast<double>(log_mass) - std::log(static_cast<double>(weight)));
    }
  }
  [[nodiscard]] float value(LogMass kind) const noexcept {
    switch (kind) {
      case LogMass::log_count:
        return static_cast<float>(largest_ + std::log(counts_));
      case LogMass::entropy:
        return static_cast<float>(entropy_);
      case LogMass::none:
        break;
    }
    // The largest member may have weight 0: then the others are too small to matter.
    return static_cast<float>(weighted_ > 0.0 ? largest_ + std::log(weighted_) : entropy_);
  }

 private:
  double largest_;
  double counts_ = 0.0;
  double weighted_ = 0.0;
  double entropy_ = 0.0;
};

/// What a plan needs for the keys of merged slots.
[[nodiscard]] constexpr u32 key_needs(MergedKeys keys) noexcept {
  if (keys == MergedKeys::pivot) return needs_nothing;
  return keys == MergedKeys::aligned ? u32{needs_moved_keys} | u32{needs_aligned_terms}
                                     : u32{needs_moved_keys};
}

/// Makes ready to turn keys of this cache. Errors: needs_rope, those of RopeSpec::check.
[[nodiscard]] inline Status prepare_alignment(const CacheView& cache,
                                              RopeRotation& rotation) noexcept {
  if (cache.rope == nullptr) return StatusCode::needs_rope;
  return rotation.prepare(*cache.rope, cache.keys.width);
}

/// 2 sigma^2 of a set of `size` members with these sums of distances to the pivot, and of squares.
[[nodiscard]] inline double kernel_width(Sigma sigma, double sum_distance, double sum_squares,
                                         double size, double fixed_sigma) noexcept {
  switch (sigma) {
    case Sigma::fixed:
      return 2.0 * fixed_sigma * fixed_sigma;
    case Sigma::mean_distance: {
      const double mean = sum_distance / size;
      return mean * mean;  // sigma = mean / sqrt(2)
    }
    case Sigma::rms:
      break;
  }
  return 2.0 * sum_squares / size;
}

/// distance[i] = |k_p - k_i|^2 of the pivot's key and member i's; see gaussian_weights.
inline void squared_key_distances(const CacheView& cache, const RopeRotation& rotation, u32 s,
                                  u32 pivot, const u32* member, u32 members,
                                  float* distance) noexcept {
  const simd::MergeKernels& kernels = simd::merge_kernels();
  const Rows& keys = cache.keys;
  const bool turns = rotation.pairs() != 0;
  if (!turns && is_contiguous_row(keys)) {
    constexpr u32 at_once = 32;
    const RowAddresses address(keys, s);
    const std::byte* pointers[at_once];
    for (u32 i = 0; i < members; i += at_once) {
      const simd::RowPointers rows =
          address.point(member + i, std::min(at_once, members - i), pointers);
      kernels.squared_distances(address(pivot), rows, keys.dtype, keys.width, distance + i);
    }
    return;
  }
  float pivot_key[max_row_width];
  float key[max_row_width];
  const std::byte* pointer = reinterpret_cast<const std::byte*>(key);
  load_row(keys, s, pivot, pivot_key);
  for (u32 i = 0; i < members; ++i) {
    load_row(keys, s, member[i], key);
    if (turns) {
      RopeTurn turn;
      rotation.turn_by(i64{cache.position(s, pivot)} - i64{cache.position(s, member[i])}, turn);
      rotation.rotate(turn, key);
    }
    kernels.squared_distances(pivot_key, {&pointer, 1}, DType::f32, keys.width, distance + i);
  }
}

/// The width of a set's kernel as the kernels take it, for sums that are finite.
[[nodiscard]] inline float kernel_width_of(Sigma sigma, double sum_distance, double sum_squares,
                                           u64 members, float fixed_sigma) noexcept {
  const double size = static_cast<double>(members) + 1.0;
  return static_cast<float>(
      kernel_width(sigma, sum_distance, sum_squares, size, static_cast<double>(fixed_sigma)));
}

/// Gaussian kernel weights of a merging set (arXiv 2407.08454, algorithm 2):
///   g_i = exp(-|k_p - k_i|^2 / (2 sigma^2)),  w_i = n_i g_i / sum n_j g_j
/// where n_i is the number of tokens that member i already stands for. The paper's sigma is defined
/// by the g it defines; Sigma's modes replace it. `member` are the tokens but the pivot, `weight`
/// receives theirs; the pivot's weight is returned. Keys are compared at the pivot's position where
/// `rotation` was prepared, as they lie otherwise. Equal keys have no width: g is 1. Where keys are
/// not finite there is no distance: g is 0, the pivot's key and value stand for the set, so that
/// bad data does not spread through the weights. O(|S| * d).
inline float gaussian_weights(const CacheView& cache, const RopeRotation& rotation, u32 s,
                              u32 pivot, const u32* member, u32 members, Sigma sigma,
                              float fixed_sigma, float* weight) noexcept {
  constexpr u32 at_once = 64;
  const simd::MergeKernels& kernels = simd::merge_kernels();
  squared_key_distances(cache, rotation, s, pivot, member, members, weight);
  float buffer[at_once];
  double sum_distance = 0.0;
  double sum_squares = 0.0;
  for (u32 first = 0; first < members; first += at_once) {
    const u32 here = std::min(at_once, members - first);
    kernels.roots(weight + first, here, buffer);
    for (u32 i = 0; i < here; ++i) {
      sum_distance += static_cast<double>(buffer[i]);
      sum_squares += static_cast<double>(weight[first + i]);
    }
  }
  if (std::isfinite(sum_squares)) {
    std::fill_n(buffer, at_once,
                kernel_width_of(sigma, sum_distance, sum_squares, members, fixed_sigma));
    for (u32 first = 0; first < members; first += at_once) {
      kernels.gaussians(weight + first, buffer, std::min(at_once, members - first), weight + first);
    }
  } else {
    std::fill_n(weight, members, 0.0f);
  }
  float largest = cache.finite_mass_bias(s, pivot);
  for (u32 i = 0; cache.log_mass && i < members; ++i) {
    largest = std::max(largest, cache.finite_mass_bias(s, member[i]));
  }
  const auto count = [&](u32 token) noexcept {
    if (!cache.log_mass) return 1.0;
    return std::exp(static_cast<double>(cache.finite_mass_bias(s, token)) -
                    static_cast<double>(largest));
  };
  const double pivot_count = count(pivot);
  double total = pivot_count;
  for (u32 i = 0; i < members; ++i) {
    const double share = static_cast<double>(weight[i]) * count(member[i]);
    weight[i] = static_cast<float>(share);
    total += share;
  }
  // The heavy members may be too far to count, and the pivot weigh nothing itself.
  const double scale = total > 0.0 ? 1.0 / total : 0.0;
  for (u32 i = 0; i < members; ++i) {
    weight[i] = static_cast<float>(static_cast<double>(weight[i]) * scale);
  }
  return total > 0.0 ? static_cast<float>(pivot_count * scale) : 1.0f;
}

}  // namespace detail
KVLEAN_NAMESPACE_END
