// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/reduce/kvmerger_slots.hpp"

KVLEAN_NAMESPACE_BEGIN
namespace detail {

/// Some neighbouring merging sets of a segment at once, with their pivots and weights: the loops
/// run over tokens, not over sets, which are too short for loops of their own. The same bits as
/// find_pivot() and gaussian_weights().
class SetBatch {
 public:
  static constexpr u32 most_tokens = 96;

  u32 slots = 0;  ///< sets that get a slot
  u32 terms = 0;
  u32 pivot[most_tokens];
  float self[most_tokens];
  u64 term_begin[most_tokens];
  u64 term_end[most_tokens];
  u32 token[most_tokens];  ///< of each term
  float weight[most_tokens];

  /// Finds the sets in [begin, end), which holds whole sets, at most most_tokens tokens. Evicted
  /// tokens, state 2, stand alone and get no slot.
  void find(const float* score, const u8* state, const u8* linked, u32 begin, u32 end) noexcept {
    u32 set_of[most_tokens];
    u32 set = 0;
    u32 best = 0;
    u32 best_key = 0;
    bool starts = true;
    for (u32 t = begin; t < end; ++t) {
      const u32 key = score_key(score[t]);
      const bool better = starts || key > best_key;
      best = better ? t : best;
      best_key = better ? key : best_key;
      set_of[t - begin] = set;
      pivot[set] = best;
      starts = linked[t] == 0;
      set += starts && state[t] != 2 ? 1 : 0;
    }
    slots = set;
    terms = 0;
    for (u32 t = begin; t < end; ++t) {
      const u32 of = set_of[t - begin];
      token[terms] = t;
      slot_[terms] = of;
      terms += state[t] != 2 && t != pivot[of] ? 1 : 0;
      term_end[of] = terms;
    }
    u64 first = 0;
    for (u32 i = 0; i < slots; ++i) {
      term_begin[i] = first;
      first = term_end[i];
    }
  }

  /// Computes the weights, and prefetches the keys [fetch, fetch_end) meanwhile. `key_at` are the
  /// rows of the segment's keys.
  void weigh(const CacheView& cache, const RopeRotation& rotation, u32 s,
             const RowAddresses& key_at, const SetWriter::Options& options, u32 fetch = 0,
             u32 fetch_end = 0) noexcept {
    const std::size_t row_bytes = cache.keys.width * size_bytes(cache.keys.dtype);
    const auto fetch_row = [&]() noexcept {
      const std::byte* row = key_at(fetch++);
      for (std::size_t at = 0; at < row_bytes; at += 64) __builtin_prefetch(row + at);
    };
    measure(cache, rotation, s, key_at);
    double squares[most_tokens];
    double width[most_tokens];  // first the sum of distances, then 2 sigma^2
    double largest[most_tokens];
    for (u32 i = 0; i < slots; ++i) {
      squares[i] = 0.0;
      width[i] = 0.0;
      largest[i] = static_cast<double>(cache.finite_mass_bias(s, pivot[i]));
    }
    for (u32 i = 0; i < terms; ++i) squares[slot_[i]] += static_cast<double>(weight[i]);
    if (options.sigma == Sigma::mean_distance) {
      for (u32 i = 0; i < terms; ++i) {
        width[slot_[i]] += std::sqrt(static_cast<double>(weight[i]));
      }
    }
    if (cache.log_mass) {
      for (u32 i = 0; i < terms; ++i) {
        const double mass = static_cast<double>(cache.finite_mass_bias(s, token[i]));
        largest[slot_[i]] = std::max(largest[slot_[i]], mass);
      }
    }
    const double fixed = static_cast<double>(options.fixed_sigma);
    double total[most_tokens];
    double own[most_tokens];
    const auto count = [&](u32 i, u32 t) noexcept {
      if (!cache.log_mass) return 1.0;
      return std::exp(static_cast<double>(cache.finite_mass_bias(s, t)) - largest[i]);
    };
    for (u32 i = 0; i < slots; ++i) {
      const double size = static_cast<double>(term_end[i] - term_begin[i]) + 1.0;
      width[i] = kernel_width(options.sigma, width[i], squares[i], size, fixed);
      total[i] = own[i] = count(i, pivot[i]);
    }
    for (u32 t = 0; t < terms; ++t) {
      if (fetch < fetch_end) fetch_row();
      const u32 i = slot_[t];
      const double share = kernel_value(squares[i], width[i], weight[t]) * count(i, token[t]);
      weight[t] = static_cast<float>(share);
      total[i] += share;
    }
    while (fetch < fetch_end) fetch_row();
    for (u32 i = 0; i < slots; ++i) {
      self[i] = total[i] > 0.0 ? static_cast<float>(own[i] / total[i]) : 1.0f;
    }
    for (u32 t = 0; t < terms; ++t) {
      const double sum = total[slot_[t]];
      weight[t] = sum > 0.0 ? static_cast<float>(static_cast<double>(weight[t]) / sum) : 0.0f;
    }
  }

 private:
  void measure(const CacheView& cache, const RopeRotation& rotation, u32 s,
               const RowAddresses& key_at) noexcept {
    if (rotation.pairs() != 0 || !is_contiguous_row(cache.keys)) {
      for (u32 t = 0; t < terms; ++t) {
        squared_key_distances(cache, rotation, s, pivot[slot_[t]], token + t, 1, weight + t);
      }
      return;
    }
    const std::byte* from[most_tokens];
    const std::byte* rows[most_tokens];
    for (u32 t = 0; t < terms; ++t) {
      from[t] = key_at(pivot[slot_[t]]);
      rows[t] = key_at(token[t]);
    }
    simd::merge_kernels().pair_distances({from, terms}, {rows, terms}, cache.keys.dtype,
                                         cache.keys.width, weight);
  }

  u32 slot_[most_tokens];  // of each term
};

}  // namespace detail
KVLEAN_NAMESPACE_END
