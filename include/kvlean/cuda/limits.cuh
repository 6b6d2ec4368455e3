// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/cuda/cache_view.cuh"
#include "kvlean/cuda/group.cuh"
#include "kvlean/cuda/launch.cuh"
#include "kvlean/cuda/order.cuh"
#include "kvlean/cuda/select_options.cuh"

// Nominal slots, floors and layer schedules, and what each segment enters a competition or a
// selection with.

KVLEAN_CUDA_NAMESPACE_BEGIN

namespace detail {

inline constexpr u32 limit_threads = 512;

/// What a segment still looks for among its candidates.
enum CutMode : u32 {
  cut_none = 0,   ///< nothing
  cut_own = 1,    ///< its best `remaining`
  cut_joint = 2,  ///< its best `remaining` are safe; the rest competes for the group's slots
};
inline constexpr u32 no_digit = 0xffffffffu;

/// State of one segment's cut between two passes over the scores: all candidates above `prefix`'s
/// range are taken, `above` of them; what lies within it is undecided.
struct alignas(16) CutState {
  u32 mode = cut_none;
  u32 prefix = 0;        ///< decided bits of the cut's key
  u32 remaining = 0;     ///< own: to take within the prefix; joint: of these, safe
  u32 digit = no_digit;  ///< next digit of the safe, or own, cut; no_digit: nothing is safe
  u32 above = 0;         ///< taken already
  u32 unused = 0;
  u64 group_remaining = 0;  ///< joint: to take within the prefix, over all segments of the group
};

/// One thing to select for: a segment, or the heads of a layer that share their tokens. It selects
/// items: tokens, or pages.
struct alignas(16) SelectRange {
  u32 first = 0;   ///< first item that is not protected
  u32 count = 0;   ///< items that are not protected, in a row
  u32 length = 0;  ///< tokens
  u32 unused = 0;
};

/// Everything the limit kernels take, by value.
struct LimitWork {
  SelectOptions options;
  double budget_value = 0.0;  ///< the options' budget: its members are host functions
  bool budget_is_fraction = false;
  GroupArrays arrays;
  u32 num_layers = 0;
  u32 num_sequences = 0;
  u32 all_heads = 0;                      ///< KV heads of a layer over all ranks
  u32 first_head = 0;                     ///< this rank's first
  u32 kv_heads = 0;                       ///< this rank's
  const Segment* segments = nullptr;      ///< this rank's
  const u32* lengths = nullptr;           ///< this rank's
  const u32* gathered_lengths = nullptr;  ///< of all ranks, or null: this rank is the only one
  const u32* gathered_frozen = nullptr;
  u32* limit = nullptr;         ///< [this rank's segments] out
  float* weight = nullptr;      ///< [this rank's segments] or null: all 1
  CutState* compete = nullptr;  ///< [this rank's segments] entry states of a competition, or null
  SelectRange* compete_range = nullptr;
  CutState* select = nullptr;  ///< [units] entry states of the selection
  SelectRange* select_range = nullptr;
  bool fused = false;  ///< the competition's cut is the selection's
  ErrorWord error = nullptr;
  uint4* zero = nullptr;  ///< scratch that later kernels want zeroed
  u64 zero_16 = 0;        ///< in units of 16 bytes
  u32 group_blocks = 0;   ///< blocks that work on groups; the others only zero

  [[nodiscard]] KVLEAN_DEVICE u32 places() const noexcept {
    return larger(options.num_layers, options.layer + num_layers);
  }
  /// Index in GroupArrays.
  [[nodiscard]] KVLEAN_DEVICE u32 entry(u32 layer, u32 sequence, u32 head) const noexcept {
    return (layer * num_sequences + sequence) * all_heads + head;
  }
  [[nodiscard]] KVLEAN_DEVICE bool is_mine(u32 head) const noexcept {
    return head - first_head < kv_heads;
  }
  /// Of this rank: index of the segment of an entry whose head is_mine().
  [[nodiscard]] KVLEAN_DEVICE u32 mine(u32 entry) const noexcept {
    return entry / all_heads * kv_heads + entry % all_heads - first_head;
  }
  [[nodiscard]] KVLEAN_DEVICE Scope heads_of(u32 layer, u32 sequence) const noexcept {
    return {entry(layer, sequence, 0), all_heads, 0, all_heads};
  }
  [[nodiscard]] KVLEAN_DEVICE Scope layers_of(u32 sequence) const noexcept {
    return {entry(0, sequence, 0), all_heads, num_sequences * all_heads, num_layers * all_heads};
  }
  [[nodiscard]] KVLEAN_DEVICE u32 frozen(u32 entry) const noexcept {
    return gathered_frozen != nullptr ? gathered_frozen[entry] : segments[entry].frozen;
  }
  [[nodiscard]] KVLEAN_DEVICE u32 length(u32 entry) const noexcept {
    return gathered_lengths != nullptr ? gathered_lengths[entry] : lengths[entry];
  }
};

[[nodiscard]] KVLEAN_DEVICE u32 nominal_slots(double value, bool is_fraction, u32 length) noexcept {
  if (!is_fraction) return value >= 4294967295.0 ? 0xffffffffu : static_cast<u32>(value);
  const double wanted = floor(__dadd_rn(__dmul_rn(value, static_cast<double>(length)), 1e-9));
  return wanted >= static_cast<double>(length) ? length : static_cast<u32>(wanted);
}

/// Lengths, nominals and floors of one group, as start_layer() of policy/pipeline.hpp and gather()
/// have them.
template <class Team>
KVLEAN_DEVICE void gather_group(const LimitWork& work, const GroupWork<Team>& group) noexcept {
  const GroupArrays& a = work.arrays;
  group.each([&](u32 s) {
    const u32 length = work.length(s);
    const u32 covered =
        ProtectedRange::of(work.options.protection, length, work.frozen(s)).count(length);
    const u32 slots = nominal_slots(work.budget_value, work.budget_is_fraction, length);
    a.high[s] = length;
    a.covered[s] = covered;
    a.low[s] = smaller(length, larger(1u, covered));
    a.nominal[s] = slots;
    a.value[s] = smaller(slots, length);
    a.granted[s] = 0;
    const u32 head = s % work.all_heads;
    if (work.weight != nullptr && work.is_mine(head)) {
      const u64 layer = work.options.layer + s / (work.all_heads * work.num_sequences);
      const float weight =
          work.options.head_weight == nullptr
              ? 1.0f
              : work.options.head_weight[layer * work.options.head_weight_stride + head];
      const bool fine = weight >= 0.0f && weight <= 3.402823466e38f;
      if (!fine) report(work.error, StatusCode::invalid_option);
      work.weight[work.mine(s)] = fine ? weight : 1.0f;
    }
  });
}

/// Enters the segments of a competition: `safe` of each do not compete, `slots` are given to the
/// others.
template <class Team>
KVLEAN_DEVICE void enter_competition(const LimitWork& work, const GroupWork<Team>& group,
                                     u64 slots) noexcept {
  const GroupArrays& a = work.arrays;
  group.each([&](u32 s) {
    if (!work.is_mine(s % work.all_heads)) return;
    const u32 mine = work.mine(s);
    const u32 candidates = a.high[s] - a.covered[s];
    CutState state;
    state.remaining = a.granted[s] > a.covered[s] ? a.granted[s] - a.covered[s] : 0;
    state.group_remaining = slots;
    state.mode = slots != 0 ? cut_joint : state.remaining != 0 ? cut_own : cut_none;
    if (candidates == 0 && slots == 0) state.mode = cut_none;
    work.compete[mine] = state;
    const ProtectedRange range =
        ProtectedRange::of(work.options.protection, a.high[s], work.frozen(s));
    work.compete_range[mine] = {range.front, candidates, a.high[s], 0};
  });
}

/// Ada-KV up to its competition: floors, safe slots, what is to be shared. arrays.value holds
/// nominals. With `hard_floor` granted is set; otherwise nothing is safe.
template <class Team>
KVLEAN_DEVICE bool prepare_adakv(const LimitWork& work, const GroupWork<Team>& group) noexcept {
  const GroupArrays& a = work.arrays;
  group.take_nominals();
  if (!group.raise_to_floors(group.shared_total())) return false;
  const bool hard = work.options.allocator == AllocatorKind::adakv_layers ||
                    work.options.mode == SafeguardMode::hard_floor;
  if (hard) {
    group.each([&](u32 s) {
      const bool paid = a.value[s] < smaller(a.nominal[s], a.high[s]);
      const u32 share =
          device_scaled_slots(paid ? a.value[s] : a.nominal[s], work.options.safeguard);
      a.granted[s] = larger(a.low[s], smaller(share, a.value[s]));
    });
  } else {
    group.each([&](u32 s) { a.granted[s] = a.covered[s]; });
  }
  return true;
}
template <class Team>
[[nodiscard]] KVLEAN_DEVICE u64 slots_to_share(const LimitWork& work,
                                               const GroupWork<Team>& group) noexcept {
  const GroupArrays& a = work.arrays;
  return group.sum_of([&](u32 s) { return u64{a.value[s] - a.granted[s]}; });
}

/// Turns the limits of one layer of one sequence into what its selection starts with: clamped to
/// the lengths, made equal where heads share counts or tokens.
template <class Team>
KVLEAN_DEVICE void finish_layer(const LimitWork& work, u32 layer, u32 sequence,
                                const GroupWork<Team>& group) noexcept {
  const GroupArrays& a = work.arrays;
  const SelectOptions& options = work.options;
  group.each([&](u32 s) { a.value[s] = smaller(a.value[s], a.high[s]); });
  if (options.sharing.kind != SharingKind::per_head) {
    const u64 total = group.total();
    u32 least = 0xffffffffu;
    u32 floor_inverse = 0xffffffffu;
    u32 longest_inverse = 0xffffffffu;
    for (u32 i = group.team.rank(); i < group.scope.count; i += group.team.size()) {
      const u32 s = group.scope.at(i);
      least = smaller(least, a.high[s]);
      floor_inverse = smaller(floor_inverse, ~a.low[s]);
      longest_inverse = smaller(longest_inverse, ~a.high[s]);
    }
    least = group.team.min(least);
    const u32 floor_slots = ~group.team.min(floor_inverse);
    const u32 longest = ~group.team.min(longest_inverse);
    u32 each = smaller(static_cast<u32>(total / group.scope.count), least);
    if (each < floor_slots) {
      if (group.team.rank() == 0) report(work.error, StatusCode::budget_below_protected);
      each = least;
    }
    if (options.shares_tokens() && least != longest) {
      if (group.team.rank() == 0) report(work.error, StatusCode::shape_mismatch);
    }
    group.each([&](u32 s) { a.value[s] = each; });
  }
  const bool shares_tokens = options.shares_tokens();
  group.each([&](u32 s) {
    const u32 head = s % work.all_heads;
    if (!work.is_mine(head)) return;
    const u32 mine = work.mine(s);
    const u32 slots = a.value[s];
    if (work.limit != nullptr) work.limit[mine] = slots;
    if (work.select == nullptr || (shares_tokens && head != work.first_head)) return;
    const u32 unit = shares_tokens ? layer * work.num_sequences + sequence : mine;
    const u32 length = a.high[s];
    Protection protection = options.protection;
    const u32 front = larger(protection.sinks, work.frozen(s));
    const u32 share = static_cast<u32>(
        __dmul_rn(static_cast<double>(options.recent_share), static_cast<double>(slots)));
    protection.recent = larger(protection.recent, smaller(share, slots - smaller(slots, front)));
    const ProtectedRange range = ProtectedRange::of(protection, length, work.frozen(s));
    SelectRange items{range.front, range.candidates(), length, 0};
    CutState state;
    if (options.sharing.kind == SharingKind::whole_pages) {
      const u32 page = options.sharing.page_tokens;
      items.first = ceil_div(range.front, page);
      items.count = larger(items.first, range.back / page) - items.first;
      const u32 kept = length - items.count * page;
      if (kept > slots) report(work.error, StatusCode::budget_below_protected);
      const u32 wanted = kept > slots ? 0 : smaller((slots - kept) / page, items.count);
      if (kept + wanted == 0 && length != 0) {
        report(work.error, StatusCode::budget_below_protected);
      }
      state.remaining = wanted;
    } else {
      const u32 kept = length - items.count;
      state.remaining = slots > kept ? smaller(slots - kept, items.count) : 0;
    }
    state.mode = state.remaining != 0 ? cut_own : cut_none;
    work.select[unit] = state;
    work.select_range[unit] = items;
  });
}

/// PyramidKV's schedule over the layers of a sequence, by one block; a warp works on a layer.
/// Leaves in arrays.value what its `heads` allocator takes as nominals. False on an error.
KVLEAN_DEVICE bool schedule_layers(const LimitWork& work, u32 sequence, u64* scratch) noexcept {
  const GroupArrays& a = work.arrays;
  const SelectOptions& options = work.options;
  const BlockTeam block{scratch};
  const GroupWork<BlockTeam> all{block, a, work.layers_of(sequence)};
  const u32 warp = threadIdx.x / warp_threads;
  const u32 warps = blockDim.x / warp_threads;
  const bool shares_slots = options.allocator == AllocatorKind::pyramid_adakv;
  // tokens_of_one_schedule()
  const u32 first = all.scope.at(0);
  u64 differ = 0;
  u64 ragged = 0;
  u32 longest_inverse = 0xffffffffu;
  for (u32 i = block.rank(); i < all.scope.count; i += block.size()) {
    const u32 s = all.scope.at(i);
    differ += a.nominal[s] != a.nominal[first] ? 1 : 0;
    ragged += a.high[s] != a.high[first] ? 1 : 0;
    longest_inverse = smaller(longest_inverse, ~a.high[s]);
  }
  differ = block.sum(differ);
  ragged = block.sum(ragged);
  u32 longest = ~block.min(longest_inverse);
  if (differ != 0 || ragged == 0) longest = 0;
  u64 failed = 0;
  for (u32 l = warp; l < work.num_layers; l += warps) {
    const GroupWork<WarpTeam> mine{WarpTeam{}, a, work.heads_of(l, sequence)};
    if (!mine.raise_to_floors(shares_slots ? mine.shared_total() : mine.total())) {
      failed = 1;
      continue;
    }
    mine.each([&](u32 s) {
      u32 nominal = a.value[s];
      u32 kept = a.low[s];
      u32 tokens = a.high[s];
      if (longest != 0) {
        nominal = a.nominal[s];
        tokens = longest;
        kept = larger(kept,
                      ProtectedRange::of(options.protection, tokens, work.frozen(s)).count(tokens));
      }
      if (options.form == PyramidForm::kvpress) kept = options.window;
      a.wanted[s] = larger(device_pyramid_slots(options.form, nominal, tokens, kept, options.beta,
                                                options.layer + l, work.places()),
                           a.low[s]);
    });
    mine.each([&](u32 s) { a.value[s] = smaller(a.wanted[s], a.high[s]); });
    if (shares_slots) {
      const u64 wanted = mine.sum_of([&](u32 s) { return u64{a.wanted[s]}; });
      mine.fit_total(smaller(wanted, mine.tokens()));
    }
  }
  if (block.sum(failed) != 0) return false;
  if (options.form == PyramidForm::exact && work.num_layers == work.places()) {
    all.fit_total(all.shared_total());
  }
  if (shares_slots) {
    for (u32 l = warp; l < work.num_layers; l += warps) {
      const GroupWork<WarpTeam> mine{WarpTeam{}, a, work.heads_of(l, sequence)};
      const u64 wanted = mine.sum_of([&](u32 s) { return u64{a.wanted[s]}; });
      if (mine.total() == wanted) mine.each([&](u32 s) { a.value[s] = a.wanted[s]; });
    }
  }
  __syncthreads();
  return true;
}

/// Allocation over the heads of one layer of one sequence, whose nominals are in arrays.value.
KVLEAN_DEVICE void allocate_heads(const LimitWork& work, u32 layer, u32 sequence) noexcept {
  const GroupWork<WarpTeam> group{WarpTeam{}, work.arrays, work.heads_of(layer, sequence)};
  bool fine = false;
  if (work.options.is_adakv()) {
    fine = prepare_adakv(work, group);
  } else {
    group.take_nominals();
    fine = group.raise_to_floors(group.total());
  }
  if (!fine) {
    if (group.team.rank() == 0) report(work.error, StatusCode::budget_below_protected);
    group.keep_everything();
  }
  if (work.compete != nullptr) {
    enter_competition(work, group, slots_to_share(work, group));
  } else {
    finish_layer(work, layer, sequence, group);
  }
}

/// First kernel of a selection: nominals, floors, schedules; limits too where they need no scores.
/// The last blocks zero the scratch of what follows.
template <int = 0>
__global__ void __launch_bounds__(limit_threads) start_limits(const LimitWork work) {
  wait_for_previous();
  allow_next();
  __shared__ u64 scratch[warp_threads + 1];
  if (blockIdx.x >= work.group_blocks) {
    const u64 step = u64{gridDim.x - work.group_blocks} * limit_threads;
    for (u64 i = u64{blockIdx.x - work.group_blocks} * limit_threads + threadIdx.x;
         i < work.zero_16; i += step) {
      work.zero[i] = uint4{0, 0, 0, 0};
    }
    return;
  }
  const u32 warps = limit_threads / warp_threads;
  const u32 warp = threadIdx.x / warp_threads;
  if (work.options.allocator == AllocatorKind::uniform ||
      work.options.allocator == AllocatorKind::adakv) {
    const u32 group = blockIdx.x * warps + warp;  // layer * num_sequences + sequence
    if (group >= work.num_layers * work.num_sequences) return;
    const u32 layer = group / work.num_sequences;
    const u32 sequence = group % work.num_sequences;
    gather_group(work,
                 GroupWork<WarpTeam>{WarpTeam{}, work.arrays, work.heads_of(layer, sequence)});
    // What allocate_heads() reads as nominals may be above the length.
    const GroupWork<WarpTeam> heads{WarpTeam{}, work.arrays, work.heads_of(layer, sequence)};
    heads.each([&](u32 s) { work.arrays.value[s] = work.arrays.nominal[s]; });
    allocate_heads(work, layer, sequence);
    return;
  }
  const u32 sequence = blockIdx.x;
  const GroupWork<BlockTeam> all{BlockTeam{scratch}, work.arrays, work.layers_of(sequence)};
  gather_group(work, all);
  if (work.options.is_pyramid()) {
    const bool fine = schedule_layers(work, sequence, scratch);
    if (!fine) {
      if (threadIdx.x == 0) report(work.error, StatusCode::budget_below_protected);
      all.keep_everything();
    }
    for (u32 l = warp; l < work.num_layers; l += warps) allocate_heads(work, l, sequence);
    return;
  }
  all.each([&](u32 s) { work.arrays.value[s] = work.arrays.nominal[s]; });
  if (!prepare_adakv(work, all)) {
    if (threadIdx.x == 0) report(work.error, StatusCode::budget_below_protected);
    all.keep_everything();
  }
  enter_competition(work, all, slots_to_share(work, all));
}

}  // namespace detail

KVLEAN_CUDA_NAMESPACE_END
