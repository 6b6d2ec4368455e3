// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/cuda/kvmerger_plan.cuh"

// gaussian_weights() and MassSum of reduce/merge_weights.hpp for all slots at once, from distances.

KVLEAN_CUDA_NAMESPACE_BEGIN
namespace detail {

/// MassSum of reduce/merge_weights.hpp. Parts can be added up.
struct DeviceMassSum {
  double largest = 0.0;
  double counts = 0.0;
  double weighted = 0.0;
  double entropy = 0.0;

  KVLEAN_DEVICE void add(float weight, float log_mass) noexcept {
    const double count = exp(static_cast<double>(log_mass) - largest);
    counts += count;
    weighted += static_cast<double>(weight) * count;
    if (weight > 0.0f) {
      entropy += static_cast<double>(weight) *
                 (static_cast<double>(log_mass) - log(static_cast<double>(weight)));
    }
  }
  [[nodiscard]] KVLEAN_DEVICE float value(LogMass kind) const noexcept {
    if (kind == LogMass::log_count) return static_cast<float>(largest + log(counts));
    if (kind == LogMass::entropy) return static_cast<float>(entropy);
    return static_cast<float>(weighted > 0.0 ? largest + log(weighted) : entropy);
  }
};

/// 2 sigma^2, kernel_width() of reduce/merge_weights.hpp.
[[nodiscard]] KVLEAN_DEVICE double kernel_width(const WeightWork& out, double sum_distance,
                                                double sum_squares, double size) noexcept {
  if (out.sigma == Sigma::fixed) {
    return 2.0 * static_cast<double>(out.fixed_sigma) * static_cast<double>(out.fixed_sigma);
  }
  if (out.sigma == Sigma::mean_distance) return sum_distance / size * (sum_distance / size);
  return 2.0 * sum_squares / size;
}

/// What a lane, or a warp together, adds up over a set's members.
struct MemberSums {
  u32 lane;
  u32 step;  ///< 1: one lane has all members
  template <class T>
  [[nodiscard]] KVLEAN_DEVICE T sum(T value) const noexcept {
    return step == 1 ? value : warp_sum(value);
  }
  [[nodiscard]] KVLEAN_DEVICE float most(float value) const noexcept {
    return step == 1 ? value : max_lanes<warp_threads>(value);
  }
};

/// gaussian_weights() and the log mass of one slot, from distances. Its lanes all call.
KVLEAN_DEVICE void weigh_slot(const WeightWork& out, const Segment& segment, u32 s, u32 slot,
                              const MemberSums& team) noexcept {
  const PlanView& plan = out.plan;
  const u64 entry = plan.slot(s, slot);
  const u32 pivot = plan.anchor[entry];
  const float own_bias = segment.finite_mass_bias(pivot);
  const u32 begin = plan.has_terms() ? plan.term_begin[entry] : 0;
  const u32 members = plan.has_terms() ? plan.term_end[entry] - begin : 0;
  if (members == 0) {
    if (team.lane != 0) return;
    if (plan.self_weight != nullptr) plan.self_weight[entry] = 1.0f;
    if (plan.self_value_weight != nullptr) plan.self_value_weight[entry] = 1.0f;
    if (plan.log_mass != nullptr) plan.log_mass[entry] = own_bias;
    return;
  }
  float* weight = plan.term_weight + plan.term(s, begin);
  const u32* token = plan.term_token + plan.term(s, begin);
  const bool biased = segment.log_mass != nullptr;
  double sum_distance = 0.0;
  double sum_squares = 0.0;
  float largest = own_bias;
  for (u32 i = team.lane; i < members; i += team.step) {
    const double square = static_cast<double>(weight[i]);
    sum_distance += sqrt(square);
    sum_squares += square;
    if (biased) largest = larger(largest, segment.finite_mass_bias(token[i]));
  }
  sum_distance = team.sum(sum_distance);
  sum_squares = team.sum(sum_squares);
  largest = team.most(largest);
  const double size = static_cast<double>(members) + 1.0;
  const double width = kernel_width(out, sum_distance, sum_squares, size);
  const bool usable = sum_squares <= 1.7976931348623157e308;  // not NaN, not infinite
  const auto count = [&](float bias) {
    return exp(static_cast<double>(bias) - static_cast<double>(largest));
  };
  const double own_count = biased ? count(own_bias) : 1.0;
  double total = 0.0;
  for (u32 i = team.lane; i < members; i += team.step) {
    double kernel = 0.0;
    if (usable) kernel = width > 0.0 ? exp(-static_cast<double>(weight[i]) / width) : 1.0;
    const double share = biased ? kernel * count(segment.finite_mass_bias(token[i])) : kernel;
    weight[i] = static_cast<float>(share);
    total += share;
  }
  total = team.sum(total) + own_count;
  const bool weighs = total > 0.0;  // else: the heavy members are too far to count
  const float self = weighs ? static_cast<float>(own_count / total) : 1.0f;
  const float scale = static_cast<float>(members + 1);
  DeviceMassSum mass{static_cast<double>(largest), 0.0, 0.0, 0.0};
  const bool sums = plan.log_mass != nullptr;
  for (u32 i = team.lane; i < members; i += team.step) {
    const float share = weighs ? static_cast<float>(static_cast<double>(weight[i]) / total) : 0.0f;
    weight[i] = share;
    if (plan.term_value_weight != nullptr) {
      plan.term_value_weight[plan.term(s, begin + i)] = share * scale;
    }
    if (sums) mass.add(share, segment.finite_mass_bias(token[i]));
  }
  if (sums) {
    mass.counts = team.sum(mass.counts);
    mass.weighted = team.sum(mass.weighted);
    mass.entropy = team.sum(mass.entropy);
  }
  if (team.lane != 0) return;
  plan.self_weight[entry] = self;
  if (plan.self_value_weight != nullptr) plan.self_value_weight[entry] = self * scale;
  if (sums) {
    mass.add(self, own_bias);
    plan.log_mass[entry] = mass.value(out.log_mass);
  }
}

inline constexpr u32 staged_terms = 256;  // of a warp's 32 slots

/// What a warp knows of its 32 slots and their terms, one behind the other.
struct StagedTerms {
  float square[staged_terms];  ///< squared distance, then share
  double root[staged_terms];
};

/// weigh_slot() for 32 slots at once where nothing has log mass and no slot has many terms: what
/// costs time is done a lane a term, sums a lane a slot, in the order of terms. The whole warp
/// calls; `members` is 0 for lanes without a slot, `total` their sum, `before` that of lanes
/// before.
KVLEAN_DEVICE void weigh_staged(const WeightWork& out, u32 s, u64 entry, bool fine, u32 begin,
                                u32 members, u32 before, u32 total, StagedTerms& terms) noexcept {
  const PlanView& plan = out.plan;
  const u32 lane = threadIdx.x % warp_threads;
  // The slot of term i: the last whose terms begin at or before it.
  const auto owner_of = [&](u32 i) noexcept {
    u32 owner = 0;
#pragma unroll
    for (u32 step = warp_threads / 2; step != 0; step /= 2) {
      if (__shfl_sync(full_warp, before, owner + step) <= i) owner += step;
    }
    return owner;
  };
  const bool roots = out.sigma == Sigma::mean_distance;
  for (u32 base = 0; base < total; base += warp_threads) {
    const u32 i = smaller(base + lane, total - 1);
    const u32 owner = owner_of(i);
    const u32 place =
        __shfl_sync(full_warp, begin, owner) + i - __shfl_sync(full_warp, before, owner);
    const float square = plan.term_weight[plan.term(s, place)];
    if (base + lane >= total) continue;
    terms.square[i] = square;
    if (roots) terms.root[i] = sqrt(static_cast<double>(square));
  }
  __syncwarp();
  double sum_distance = 0.0;
  double sum_squares = 0.0;
  for (u32 i = before; i < before + members; ++i) {
    if (roots) sum_distance += terms.root[i];
    sum_squares += static_cast<double>(terms.square[i]);
  }
  __syncwarp();
  const double size = static_cast<double>(members) + 1.0;
  const double width = kernel_width(out, sum_distance, sum_squares, size);
  const u32 usable = sum_squares <= 1.7976931348623157e308 ? 1 : 0;  // not NaN, not infinite
  for (u32 base = 0; base < total; base += warp_threads) {
    const u32 i = smaller(base + lane, total - 1);
    const u32 owner = owner_of(i);
    const double own_width = __shfl_sync(full_warp, width, owner);
    double share = 0.0;
    if (__shfl_sync(full_warp, usable, owner) != 0) {
      share = own_width > 0.0 ? exp(-static_cast<double>(terms.square[i]) / own_width) : 1.0;
    }
    if (base + lane < total) terms.root[i] = share;
  }
  __syncwarp();
  double sum = 0.0;
  for (u32 i = before; i < before + members; ++i) sum += terms.root[i];
  sum += 1.0;  // the pivot
  for (u32 base = 0; base < total; base += warp_threads) {
    const bool here = base + lane < total;
    const u32 i = smaller(base + lane, total - 1);
    const u32 owner = owner_of(i);
    const double own_sum = __shfl_sync(full_warp, sum, owner);
    const u32 count = __shfl_sync(full_warp, members, owner);
    const u32 place =
        __shfl_sync(full_warp, begin, owner) + i - __shfl_sync(full_warp, before, owner);
    if (!here) continue;
    const double share = static_cast<double>(static_cast<float>(terms.root[i]));
    const float weight = static_cast<float>(share / own_sum);
    plan.term_weight[plan.term(s, place)] = weight;
    if (plan.term_value_weight != nullptr) {
      plan.term_value_weight[plan.term(s, place)] = weight * static_cast<float>(count + 1);
    }
  }
  if (!fine) return;
  const float self = static_cast<float>(1.0 / sum);
  if (plan.self_weight != nullptr) plan.self_weight[entry] = self;
  if (plan.self_value_weight != nullptr) {
    plan.self_value_weight[entry] = self * static_cast<float>(members + 1);
  }
}

/// Weights and log mass of every slot: a warp for 32 slots, a thread a slot, or a warp a slot where
/// it has many members.
template <int = 0>
__global__ void __launch_bounds__(set_threads)
    weigh_slots(const CacheView cache, const WeightWork out, u32 blocks) {
  __shared__ StagedTerms staged[set_threads / warp_threads];
  wait_for_previous();
  allow_next();
  const u32 s = blockIdx.x / blocks;
  const u32 length = out.plan.length[s];
  const u32 first = blockIdx.x % blocks * set_threads;
  if (first >= length) return;
  const Segment segment = cache.segments[s];
  const u32 lane = threadIdx.x % warp_threads;
  const u32 slot = first + threadIdx.x;
  const bool fine = slot < length;
  const u64 entry = out.plan.slot(s, slot);
  u32 begin = 0;
  u32 members = 0;
  if (fine && out.plan.has_terms()) {
    begin = out.plan.term_begin[entry];
    members = out.plan.term_end[entry] - begin;
  }
  u32 pending = __ballot_sync(full_warp, members >= long_set);
  const u32 few = members < long_set ? members : 0;
  u32 before = few;
#pragma unroll
  for (u32 step = 1; step < warp_threads; step *= 2) {
    const u32 other = __shfl_up_sync(full_warp, before, step);
    if (lane >= step) before += other;
  }
  const u32 total = __shfl_sync(full_warp, before, warp_threads - 1);
  if (out.plan.log_mass == nullptr && segment.log_mass == nullptr && total <= staged_terms) {
    weigh_staged(out, s, entry, fine && members < long_set, begin, few, before - few, total,
                 staged[threadIdx.x / warp_threads]);
  } else if (fine && members < long_set) {
    weigh_slot(out, segment, s, slot, MemberSums{0, 1});
  }
  while (pending != 0) {
    const u32 owner = static_cast<u32>(__ffs(pending)) - 1;
    pending &= pending - 1;
    weigh_slot(out, segment, s, slot - lane + owner, MemberSums{lane, warp_threads});
  }
}

}  // namespace detail
KVLEAN_CUDA_NAMESPACE_END
