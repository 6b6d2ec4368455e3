// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <bit>
#include <cstring>

#include "kvlean/reduce/kvmerger_slots.hpp"

KVLEAN_NAMESPACE_BEGIN
namespace detail {

/// Some neighbouring merging sets of a segment at once, with their pivots and weights: most loops
/// run over tokens, not over sets, which are too short for loops of their own. The same bits as
/// find_pivot() and gaussian_weights().
class SetBatch {
 public:
  static constexpr u32 most_tokens = 64;
  static constexpr u32 run = 8;

  u32 slots = 0;  ///< sets that get a slot
  u32 terms = 0;
  u32 sets = 0;  ///< of several tokens
  u32 pivot[most_tokens + run];
  float self[most_tokens];
  u64 term_begin[most_tokens + run];
  u64 term_end[most_tokens + run];
  u32 token[most_tokens + 1];  ///< of each term
  float weight[most_tokens];
  u8 slot_of_set[most_tokens];

  /// Finds the sets in [begin, end), which holds whole sets, at most most_tokens tokens. Evicted
  /// ones, state 2, get no slot. Slots that are one token have weight 1.
  void find(const float* score, const u8* state, const u8* linked, u32 begin, u32 end) noexcept {
    const u32 count = end - begin;
    const u64 all = count < 64 ? (u64{1} << count) - 1 : ~u64{0};
    const u64 links = flag_bits(linked + begin, count, 0) & (all >> 1);
    const u64 gone = flag_bits(state + begin, count, 1);
    slots = sets = terms = 0;
    u32 next = begin;
    for (u64 left = links & ~(links << 1) & ~gone; left != 0; left &= left - 1) {
      const u32 first = static_cast<u32>(std::countr_zero(left));
      const u32 last = first + static_cast<u32>(std::countr_one(links >> first));
      add_single(next, begin + first, gone >> (next - begin));
      add_set(score, begin + first, begin + last);
      next = begin + last + 1;
    }
    add_single(next, end, next < end ? gone >> (next - begin) : 0);
    std::fill_n(self, slots, 1.0f);
  }

  /// Takes the weights from `known`, which is by token.
  void set_weights(const float* known) noexcept {
    for (u32 i = 0; i < sets; ++i) self[slot_of_set[i]] = known[pivot[slot_of_set[i]]];
    for (u32 t = 0; t < terms; ++t) weight[t] = known[token[t]];
  }
  /// Weights of n members times n.
  void scale(float* scaled_self, float* scaled_weight) const noexcept {
    for (u32 i = 0; i < slots; ++i) {
      const u64 last = term_end[i];
      const float size = static_cast<float>(last - term_begin[i] + 1);
      scaled_self[i] = self[i] * size;
      for (u64 t = term_begin[i]; t < last; ++t) scaled_weight[t] = weight[t] * size;
    }
  }

  /// Computes the weights, and prefetches the rows `ahead` meanwhile. `key_at` are the rows of the
  /// segment's keys.
  void weigh(const CacheView& cache, const RopeRotation& rotation, u32 s,
             const RowAddresses& key_at, const SetWriter::Options& options,
             simd::RowPointers ahead) noexcept {
    measure(cache, rotation, s, key_at, ahead);
    if (terms == 0) return;
    const simd::MergeKernels& kernels = simd::merge_kernels();
    double squares[most_tokens];
    double distances[most_tokens];
    double total[most_tokens];
    float buffer[most_tokens];
    std::fill_n(squares, sets, 0.0);
    std::fill_n(distances, sets, 0.0);
    kernels.roots(weight, terms, buffer);
    for (u32 t = 0; t < terms; ++t) {
      squares[set_[t]] += static_cast<double>(weight[t]);
      distances[set_[t]] += static_cast<double>(buffer[t]);
    }
    float width[most_tokens];
    bool all_finite = true;
    for (u32 i = 0; i < sets; ++i) {
      const u32 slot = slot_of_set[i];
      width[i] = kernel_width_of(options.sigma, distances[i], squares[i],
                                 term_end[slot] - term_begin[slot], options.fixed_sigma);
      all_finite = all_finite && std::isfinite(squares[i]);
      total[i] = 1.0;
    }
    for (u32 t = 0; t < terms; ++t) buffer[t] = width[set_[t]];
    kernels.gaussians(weight, buffer, terms, weight);
    for (u32 t = 0; !all_finite && t < terms; ++t) {
      if (!std::isfinite(squares[set_[t]])) weight[t] = 0.0f;
    }
    if (cache.log_mass) {
      count_tokens(cache, s, total);
    } else {
      for (u32 t = 0; t < terms; ++t) total[set_[t]] += static_cast<double>(weight[t]);
    }
    // The heavy members may be too far to count, and the pivot weigh nothing itself.
    for (u32 i = 0; i < sets; ++i) total[i] = total[i] > 0.0 ? 1.0 / total[i] : 0.0;
    for (u32 i = 0; i < sets; ++i) {
      const double own = cache.log_mass ? own_[i] : 1.0;
      self[slot_of_set[i]] = total[i] > 0.0 ? static_cast<float>(own * total[i]) : 1.0f;
    }
    for (u32 t = 0; t < terms; ++t) {
      weight[t] = static_cast<float>(static_cast<double>(weight[t]) * total[set_[t]]);
    }
  }

 private:
  /// A bit for each byte, its bit `which`; bytes are below 4.
  static u64 flag_bits(const u8* flags, u32 count, u32 which) noexcept {
    u64 bits = 0;
    u32 i = 0;
    if constexpr (std::endian::native == std::endian::little) {
      for (; i + 8 <= count; i += 8) {
        u64 eight;
        std::memcpy(&eight, flags + i, sizeof eight);
        eight = eight >> which & 0x0101010101010101u;
        bits |= (eight * 0x0102040810204080u >> 56) << i;
      }
    }
    for (; i < count; ++i) bits |= u64{static_cast<u8>(flags[i] >> which & 1)} << i;
    return bits;
  }

  /// Slots of the tokens [begin, end), one each but where a bit of `gone` is set.
  void add_single(u32 begin, u32 end, u64 gone) noexcept {
    if (gone != 0) {
      for (u32 t = begin; t < end; ++t, gone >>= 1) {
        if ((gone & 1) == 0) add_run(t, 1);
      }
      return;
    }
    add_run(begin, end - begin);
  }
  /// Runs are short: a fixed number at a time has no branch to foresee.
  void add_run(u32 begin, u32 count) noexcept {
    for (u32 i = 0; i < count; i += run) {
      for (u32 k = 0; k < run; ++k) {
        pivot[slots + i + k] = begin + i + k;
        term_begin[slots + i + k] = term_end[slots + i + k] = terms;
      }
    }
    slots += count;
  }
  /// The set of the tokens [first, last].
  void add_set(const float* score, u32 first, u32 last) noexcept {
    u32 best = first;
    u32 best_key = score_key(score[first]);
    term_begin[slots] = terms;
    if (last == first + 1) {
      best += score_key(score[last]) > best_key ? 1u : 0u;
      token[terms] = first + last - best;
      pivot_[terms] = best;
      set_[terms++] = static_cast<u8>(sets);
    } else {
      for (u32 t = first + 1; t <= last; ++t) {
        const u32 key = score_key(score[t]);
        best = key > best_key ? t : best;
        best_key = std::max(key, best_key);
      }
      for (u32 t = first; t <= last; ++t) {
        token[terms] = t;
        pivot_[terms] = best;
        set_[terms] = static_cast<u8>(sets);
        terms += t != best ? 1u : 0u;
      }
    }
    pivot[slots] = best;
    term_end[slots] = terms;
    slot_of_set[sets++] = static_cast<u8>(slots++);
  }

  /// total[i] = the tokens that the set stands for, each by its kernel value; so do weights then.
  void count_tokens(const CacheView& cache, u32 s, double* total) noexcept {
    float largest[most_tokens];
    for (u32 i = 0; i < sets; ++i) {
      largest[i] = cache.finite_mass_bias(s, pivot[slot_of_set[i]]);
    }
    for (u32 t = 0; t < terms; ++t) {
      largest[set_[t]] = std::max(largest[set_[t]], cache.finite_mass_bias(s, token[t]));
    }
    const auto count = [&](u32 i, u32 t) noexcept {
      return std::exp(static_cast<double>(cache.finite_mass_bias(s, t)) -
                      static_cast<double>(largest[i]));
    };
    for (u32 i = 0; i < sets; ++i) {
      total[i] = own_[i] = count(i, pivot[slot_of_set[i]]);
    }
    for (u32 t = 0; t < terms; ++t) {
      const double share = static_cast<double>(weight[t]) * count(set_[t], token[t]);
      weight[t] = static_cast<float>(share);
      total[set_[t]] += share;
    }
  }

  void measure(const CacheView& cache, const RopeRotation& rotation, u32 s,
               const RowAddresses& key_at, simd::RowPointers ahead) noexcept {
    const std::byte* from[most_tokens];
    const std::byte* rows[most_tokens];
    if (rotation.pairs() != 0 || !is_contiguous_row(cache.keys)) {
      for (u32 t = 0; t < terms; ++t) {
        squared_key_distances(cache, rotation, s, pivot_[t], token + t, 1, weight + t);
      }
      return;
    }
    for (u32 t = 0; t < terms; ++t) {
      from[t] = key_at(pivot_[t]);
      rows[t] = key_at(token[t]);
    }
    simd::merge_kernels().pair_distances({from, terms}, {rows, terms}, cache.keys.dtype,
                                         cache.keys.width, ahead, weight);
  }

  u32 pivot_[most_tokens + 1];  // of each term's set
  u8 set_[most_tokens + 1];     // of each term, among those of several tokens
  double own_[most_tokens];     // tokens that each set's pivot stands for
};

}  // namespace detail
KVLEAN_NAMESPACE_END
