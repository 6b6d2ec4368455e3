// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/cuda/kvmerger_runs.cuh"
#include "kvlean/cuda/plan.cuh"
#include "kvlean/cuda/rotation.cuh"

// reduce/merge_weights.hpp for all sets at once, in three steps: who merges into whom, key
// distances, and from those the weights. Distances are float, all that follows is double.

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

/// What the kernels from sets to a plan take besides SetWork, by value.
struct WeightWork {
  PlanView plan;
  u32* term_pivot = nullptr;  ///< [segments][stride]: the token each term merges into, or no_token
  Sigma sigma = Sigma::mean_distance;
  float fixed_sigma = 0.0f;
  bool scaled = false;  ///< values times the set's size
  LogMass log_mass = LogMass::none;
  // Whole pages: kept tokens are given.
  const u8* keep = nullptr;
  const u32* slot_of = nullptr;
};
inline constexpr u32 no_token = 0xffffffffu;

/// One slot a set, without its weights.
KVLEAN_DEVICE void write_slot(const SetWork& work, const WeightWork& out, u32 u, u32 slot,
                              u32 pivot, u32 first_term, u32 terms) noexcept {
  const PlanView& plan = out.plan;
  for (u32 h = 0; h < work.heads_per_unit; ++h) {
    const u64 entry = plan.slot(work.segment_of(u) + h, slot);
    plan.anchor[entry] = pivot;
    if (plan.has_terms()) {
      plan.term_begin[entry] = first_term;
      plan.term_end[entry] = first_term + terms;
    }
  }
}
/// Term `i` of a unit's segments.
KVLEAN_DEVICE void write_term(const SetWork& work, const WeightWork& out, u32 u, u32 i, u32 token,
                              u32 pivot) noexcept {
  for (u32 h = 0; h < work.heads_per_unit; ++h) {
    const u32 s = work.segment_of(u) + h;
    out.plan.term_token[out.plan.term(s, i)] = token;
    out.term_pivot[s * work.stride + i] = pivot;
  }
}

/// Slots and terms of the sets that stay. Blocks take tiles of sets; those of evicted sets leave
/// their room for terms empty.
template <int = 0>
__global__ void __launch_bounds__(cut_threads)
    write_sets(const CutWork cut_work, const SetWork work, const WeightWork out) {
  __shared__ CutScratch scratch;
  __shared__ u64 before[TileFlags::runs];
  wait_for_previous();
  allow_next();
  const u32 u = blockIdx.x / work.tiles;
  const u32 tile = blockIdx.x % work.tiles;
  const SetUnit unit = work.unit[u];
  // There are fewer sets than tokens: they are spread over all blocks.
  const u32 rounds = larger(1u, ceil_div(unit.sets, work.tiles * cut_threads));
  const u32 first_set = tile * rounds * cut_threads;
  if (tile != 0 && first_set >= unit.sets) return;
  const u32 kept_sets = unit.sets - unit.gone;
  const bool fits = kept_sets <= out.plan.max_slots;
  if (tile == 0) {
    if (threadIdx.x == 0 && !fits) report(work.error, StatusCode::destination_too_small);
    for (u32 h = threadIdx.x; h < work.heads_per_unit; h += cut_threads) {
      const u32 s = work.segment_of(u) + h;
      out.plan.length[s] = fits ? kept_sets : 0;
      if (out.plan.slots_evicted != nullptr) out.plan.slots_evicted[s] = unit.evicted + unit.gone;
    }
  }
  FinalCut cut;
  TileCount earlier;
  TileFlags flags;
  if (unit.gone != 0) {
    cut = finish_cut(cut_work, u, scratch);
    const float* score = work.set_score + work.at(u, 0);
#pragma unroll
    for (u32 j = 0; j < cut_each; ++j) {
      const u32 set = j < rounds ? first_set + j * cut_threads + threadIdx.x : unit.sets;
      const u32 free_before = set < unit.sets ? work.set_free[work.at(u, set)] : protected_set;
      const u32 key = free_before < protected_set ? device_score_key(score[free_before]) : 0;
      const bool is_free = free_before < protected_set;
      flags.set(j, 0, set < unit.sets && (!is_free || key > cut.key));
      flags.set(j, 1, is_free && key == cut.key);
      flags.set(j, 2, false);
      flags.set(j, 3, false);
    }
    const u64 mine = flags.count(before, scratch.scan);
    u64* announced = work.announced_sets + static_cast<u64>(u) * work.tiles;
    if (threadIdx.x == 0) {
      announce(announced + tile, TileFlags::part(mine, 0), TileFlags::part(mine, 1));
    }
    if (tile != 0) earlier = sum_announced(announced, tile, scratch.scan);
  }
  const u32 lane = threadIdx.x % warp_threads;
#pragma unroll 1
  for (u32 j = 0; j < rounds; ++j) {
    const u32 set = first_set + j * cut_threads + threadIdx.x;
    if (first_set + j * cut_threads >= unit.sets) break;
    const bool fine = set < unit.sets;
    u32 slot = set;
    bool stays = fine && fits;
    if (unit.gone != 0) {
      // The registers of a flag are indexed by j: this loop is not unrolled, so ask shared memory
      // and the scores again instead.
      const u32 free_before = fine ? work.set_free[work.at(u, set)] : protected_set;
      const bool is_free = free_before < protected_set;
      const u32 key = is_free ? device_score_key(work.set_score[work.at(u, free_before)]) : 0;
      const bool taken = fine && (!is_free || key > cut.key);
      const bool equal = is_free && key == cut.key;
      const u32 lanes_before = (1u << lane) - 1;
      const u64 packed = before[TileFlags::run(j)];
      const u32 equal_rank = earlier.equal + TileFlags::part(packed, 1) +
                             __popc(__ballot_sync(full_warp, equal) & lanes_before);
      const u32 taken_rank = earlier.taken + TileFlags::part(packed, 0) +
                             __popc(__ballot_sync(full_warp, taken) & lanes_before);
      slot = taken_rank + ties_before(cut, equal_rank);
      stays = stays && (taken || (equal && takes_tie(cut, equal_rank)));
    }
    const u64 place = work.at(u, fine ? set : first_set);
    const u32 begin = work.set_begin[place];
    const u32 first_term = work.set_links[place];
    const u32 terms = fine ? work.set_links[place + 1] - first_term : 0;
    const u32 pivot = work.pivot[place];
    if (stays) write_slot(work, out, u, slot, pivot, first_term, terms);
    if (!out.plan.has_terms()) continue;
    if (terms < long_set) {
      for (u32 i = 0; i < terms; ++i) {
        const u32 token = begin + i + (begin + i >= pivot ? 1 : 0);
        write_term(work, out, u, first_term + i, token, stays ? pivot : no_token);
      }
    }
    u32 pending = __ballot_sync(full_warp, terms >= long_set);
    while (pending != 0) {
      const u32 owner = static_cast<u32>(__ffs(pending)) - 1;
      pending &= pending - 1;
      const u32 from = __shfl_sync(full_warp, begin, owner);
      const u32 term = __shfl_sync(full_warp, first_term, owner);
      const u32 count = __shfl_sync(full_warp, terms, owner);
      const u32 anchor = __shfl_sync(full_warp, pivot, owner);
      const bool merges = __shfl_sync(full_warp, stays ? 1u : 0u, owner) != 0;
      for (u32 i = lane; i < count; i += warp_threads) {
        const u32 token = from + i + (from + i >= anchor ? 1 : 0);
        write_term(work, out, u, term + i, token, merges ? anchor : no_token);
      }
    }
  }
}

/// The same where whole pages were selected: every kept token is a slot, the best kept one of a set
/// receives the set's dropped tokens. A thread takes a set; sets are rarely long.
template <int = 0>
__global__ void __launch_bounds__(set_threads)
    write_page_sets(const SetWork work, const WeightWork out, u32 blocks) {
  wait_for_previous();
  allow_next();
  const u32 u = blockIdx.x / blocks;
  const SetUnit unit = work.unit[u];
  const u32 set = blockIdx.x % blocks * set_threads + threadIdx.x;
  if (set >= unit.sets) return;
  const u64 row = work.segment_of(u) * work.stride;  // all heads of the unit keep the same tokens
  const u8* keep = out.keep + row;
  const u32* slot_of = out.slot_of + row;
  const float* score = work.score.segment(u);
  const u64 place = work.at(u, set);
  const u32 begin = work.set_begin[place];
  const u32 first_term = work.set_links[place];
  const u32 room = work.set_links[place + 1] - first_term;
  const u32 end = begin + 1 + room;
  u32 pivot = no_token;
  u32 best = 0;
  u32 dropped = 0;
  for (u32 t = begin; t < end; ++t) {
    if (keep[t] == 0) {
      ++dropped;
      continue;
    }
    const u32 key = device_score_key(score[t]);
    if (pivot == no_token || key > best) {
      pivot = t;
      best = key;
    }
  }
  const u32 terms = pivot != no_token && out.plan.has_terms() ? dropped : 0;
  const bool fits = out.plan.length[work.segment_of(u)] != 0;
  for (u32 t = begin; t < end; ++t) {
    if (keep[t] != 0 && fits) {
      write_slot(work, out, u, slot_of[t], t, first_term, t == pivot ? terms : 0);
    }
  }
  if (out.plan.has_terms()) {
    u32 i = 0;
    for (u32 t = begin; t < end && pivot != no_token; ++t) {
      if (keep[t] == 0) write_term(work, out, u, first_term + i++, t, fits ? pivot : no_token);
    }
    for (; i < room; ++i) write_term(work, out, u, first_term + i, 0, no_token);
  }
  if (out.plan.slots_evicted == nullptr || pivot != no_token) return;
  for (u32 h = 0; h < work.heads_per_unit; ++h) {
    atomicAdd(out.plan.slots_evicted + work.segment_of(u) + h, dropped);
  }
}

inline constexpr u32 distance_threads = 256;
inline constexpr u32 distance_lanes = 8;
inline constexpr u32 distance_each = 4;  ///< terms of a team
inline constexpr u32 distance_terms = distance_threads / distance_lanes * distance_each;

/// Squared distance of each term's key to its pivot's, into term_weight. Neighbouring terms share
/// their pivot mostly, so of two reads one is in the cache. Aligned: keys are compared at the
/// pivot's position.
template <DType D, bool Aligned>
__global__ void __launch_bounds__(distance_threads)
    measure_distances(const SetWork work, const WeightWork out, const Rotation rotation,
                      u32 blocks) {
  constexpr u32 each = elements_16<D>;
  wait_for_previous();
  allow_next();
  const u32 s = blockIdx.x / blocks;
  const u32 terms = work.unit[s / work.heads_per_unit].links;
  const u32 first_of_block = blockIdx.x % blocks * distance_terms;
  if (first_of_block >= terms) return;
  const Segment segment = work.cache.segments[s];
  const u32 row_bytes = work.cache.key_width * element_bytes<D>;
  const u32 lane = threadIdx.x % distance_lanes;
  const u32 first = first_of_block + threadIdx.x / distance_lanes * distance_each;
  const char* row[distance_each];
  const char* pivot_row[distance_each];
  float distance[distance_each];
  i32 shift[distance_each];
  bool merges[distance_each];
#pragma unroll
  for (u32 i = 0; i < distance_each; ++i) {
    distance[i] = 0.0f;
    shift[i] = 0;
    const u32 pivot = first + i < terms ? out.term_pivot[s * work.stride + first + i] : no_token;
    merges[i] = pivot != no_token;
    const u32 token = merges[i] ? out.plan.term_token[out.plan.term(s, first + i)] : 0;
    row[i] = segment.key_row(token);  // without a branch, so that all loads are under way at once
    pivot_row[i] = segment.key_row(merges[i] ? pivot : 0);
    if constexpr (Aligned)
      if (merges[i]) shift[i] = segment.position(pivot) - segment.position(token);
  }
  for (u32 offset = lane * 16; offset < row_bytes; offset += distance_lanes * 16) {
    uint4 bits[distance_each];
    uint4 pivot_bits[distance_each];
#pragma unroll
    for (u32 i = 0; i < distance_each; ++i) {
      bits[i] = load_16_constant(row[i] + offset);
      pivot_bits[i] = load_16_constant(pivot_row[i] + offset);
    }
#pragma unroll
    for (u32 i = 0; i < distance_each; ++i) {
      float x[each];
      float p[each];
      unpack<D>(bits[i], x);
      unpack<D>(pivot_bits[i], p);
      if constexpr (Aligned) {
        if (merges[i]) {
#pragma unroll
          for (u32 k = 0; k < each; ++k) {
            const u32 element = offset / element_bytes<D> + k;
            const float partner = load_float<D>(row[i], rotation.partner(element));
            x[k] = rotation.turned(element, x[k], partner, shift[i]);
          }
        }
      }
#pragma unroll
      for (u32 k = 0; k < each; ++k) {
        const float difference = p[k] - x[k];
        distance[i] = fmaf(difference, difference, distance[i]);
      }
    }
  }
#pragma unroll
  for (u32 i = 0; i < distance_each; ++i) {
    distance[i] = sum_lanes<distance_lanes>(distance[i]);
    if (lane == i && merges[i]) {
      out.plan.term_weight[out.plan.term(s, first + i)] = distance[i];
    }
  }
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
  double width = 0.0;  // 2 sigma^2
  if (out.sigma == Sigma::fixed) {
    width = 2.0 * static_cast<double>(out.fixed_sigma) * static_cast<double>(out.fixed_sigma);
  } else if (out.sigma == Sigma::mean_distance) {
    width = sum_distance / size * (sum_distance / size);
  } else {
    width = 2.0 * sum_squares / size;
  }
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

/// Weights and log mass of every slot: a thread a slot, a warp where it has many members.
template <int = 0>
__global__ void __launch_bounds__(set_threads)
    weigh_slots(const CacheView cache, const WeightWork out, u32 blocks) {
  wait_for_previous();
  allow_next();
  const u32 s = blockIdx.x / blocks;
  const u32 length = out.plan.length[s];
  const u32 first = blockIdx.x % blocks * set_threads;
  if (first >= length) return;
  const Segment segment = cache.segments[s];
  const u32 lane = threadIdx.x % warp_threads;
  const u32 slot = first + threadIdx.x;
  u32 members = 0;
  if (slot < length && out.plan.has_terms()) {
    const u64 entry = out.plan.slot(s, slot);
    members = out.plan.term_end[entry] - out.plan.term_begin[entry];
  }
  if (slot < length && members < long_set) weigh_slot(out, segment, s, slot, MemberSums{0, 1});
  u32 pending = __ballot_sync(full_warp, members >= long_set);
  while (pending != 0) {
    const u32 owner = static_cast<u32>(__ffs(pending)) - 1;
    pending &= pending - 1;
    weigh_slot(out, segment, s, slot - lane + owner, MemberSums{lane, warp_threads});
  }
}

}  // namespace detail
KVLEAN_CUDA_NAMESPACE_END
