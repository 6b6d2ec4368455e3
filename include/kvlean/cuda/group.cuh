// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/allocate/pyramid.hpp"
#include "kvlean/cuda/status.cuh"
#include "kvlean/cuda/team.cuh"

// allocate/shares.hpp and allocate/pyramid.hpp for a team of threads: the same integers.

KVLEAN_CUDA_NAMESPACE_BEGIN

namespace detail {

/// Per segment, all in one order: layer, sequence, KV head (of all ranks).
struct GroupArrays {
  u32* value = nullptr;      ///< in: nominal slots; out: the limit
  u32* low = nullptr;        ///< slots that must be granted
  u32* high = nullptr;       ///< length
  u32* nominal = nullptr;    ///< as given, also above the length
  u32* covered = nullptr;    ///< protected tokens
  u32* granted = nullptr;    ///< slots that need not be competed for
  u32* wanted = nullptr;     ///< PyramidKV's schedule
  u64* remainder = nullptr;  ///< scratch of largest remainders
};

/// Which segments belong to a group: `count` of them, `heads` in a row, rows `step` apart.
struct Scope {
  u32 base = 0;
  u32 heads = 0;
  u32 step = 0;
  u32 count = 0;
  [[nodiscard]] KVLEAN_DEVICE u32 at(u32 i) const noexcept {
    return i < heads ? base + i : base + i / heads * step + i % heads;
  }
};

/// scaled_slots() of allocate/shares.hpp.
[[nodiscard]] KVLEAN_DEVICE u32 device_scaled_slots(u32 slots, float factor) noexcept {
  const float all = __uint2float_rn(slots);
  const float scaled = __fmul_rn(all, factor);
  return scaled >= all ? slots : static_cast<u32>(scaled);
}

/// A group and the team that works on it. Every thread of the team makes every call.
template <class Team>
struct GroupWork {
  Team team;
  GroupArrays arrays;
  Scope scope;

  template <class Value>
  [[nodiscard]] KVLEAN_DEVICE u64 sum_of(Value&& value) const noexcept {
    u64 sum = 0;
    for (u32 i = team.rank(); i < scope.count; i += team.size()) sum += value(scope.at(i));
    return team.sum(sum);
  }
  template <class Body>
  KVLEAN_DEVICE void each(Body&& body) const noexcept {
    for (u32 i = team.rank(); i < scope.count; i += team.size()) body(scope.at(i));
    team.sync();
  }
  [[nodiscard]] KVLEAN_DEVICE u64 total() const noexcept {
    return sum_of([&](u32 s) { return u64{arrays.value[s]}; });
  }
  [[nodiscard]] KVLEAN_DEVICE u64 tokens() const noexcept {
    return sum_of([&](u32 s) { return u64{arrays.high[s]}; });
  }
  [[nodiscard]] KVLEAN_DEVICE u64 shared_total() const noexcept {
    return smaller(sum_of([&](u32 s) { return u64{arrays.nominal[s]}; }), tokens());
  }

  /// Adds 1 to the `units` entries with the largest arrays.remainder (ties: the first), or takes 1
  /// from them.
  KVLEAN_DEVICE void serve_remainders(u64 units, bool grow) const noexcept {
    if (units == 0) return;
    for (u32 i = team.rank(); i < scope.count; i += team.size()) {
      const u64 mine = arrays.remainder[scope.at(i)];
      u64 before = 0;
      for (u32 j = 0; j < scope.count && before < units; ++j) {
        const u64 other = arrays.remainder[scope.at(j)];
        before += other > mine || (other == mine && j < i) ? 1 : 0;
      }
      if (before < units) {
        u32& value = arrays.value[scope.at(i)];
        value = grow ? value + 1 : value - 1;
      }
    }
    team.sync();
  }

  /// fit_total() of allocate/shares.hpp.
  KVLEAN_DEVICE void fit_total(u64 total_slots) const noexcept {
    u64 sum = 0;
    for (u32 i = team.rank(); i < scope.count; i += team.size()) {
      const u32 s = scope.at(i);
      arrays.value[s] = larger(arrays.low[s], smaller(arrays.value[s], arrays.high[s]));
      sum += arrays.value[s];
    }
    sum = team.sum(sum);
    team.sync();
    if (sum == total_slots) return;
    const bool grow = sum < total_slots;
    const u64 amount = grow ? total_slots - sum : sum - total_slots;
    const auto room = [&](u32 s) {
      return u64{grow ? arrays.high[s] - arrays.value[s] : arrays.value[s] - arrays.low[s]};
    };
    const u64 space = sum_of(room);
    if (space == 0) return;
    u64 moved = 0;
    for (u32 i = team.rank(); i < scope.count; i += team.size()) {
      const u32 s = scope.at(i);
      const u64 product = amount * room(s);
      const u32 share = static_cast<u32>(product / space);
      arrays.remainder[s] = product % space;
      arrays.value[s] = grow ? arrays.value[s] + share : arrays.value[s] - share;
      moved += share;
    }
    moved = team.sum(moved);
    team.sync();
    serve_remainders(amount - moved, grow);
  }

  /// raise_to_floors() of allocate/shares.hpp; false when the floors exceed the total.
  [[nodiscard]] KVLEAN_DEVICE bool raise_to_floors(u64 total_slots) const noexcept {
    if (total_slots < sum_of([&](u32 s) { return u64{arrays.low[s]}; })) return false;
    fit_total(total_slots);
    return true;
  }

  /// What an allocator starts with: limits that were put in `value` become nominals.
  KVLEAN_DEVICE void take_nominals() const noexcept {
    each([&](u32 s) {
      arrays.nominal[s] = arrays.value[s];
      arrays.value[s] = smaller(arrays.value[s], arrays.high[s]);
    });
  }
  /// Every segment keeps all it has: where a call has failed.
  KVLEAN_DEVICE void keep_everything() const noexcept {
    each([&](u32 s) { arrays.value[s] = arrays.nominal[s] = arrays.granted[s] = arrays.high[s]; });
  }
};

/// pyramid_slots() of allocate/pyramid.hpp.
[[nodiscard]] KVLEAN_DEVICE u32 device_round_half_even(double value) noexcept {
  const double whole = floor(value);
  const u32 slots = static_cast<u32>(whole);
  const double rest = value - whole;
  return rest > 0.5 || (rest == 0.5 && slots % 2 == 1) ? slots + 1 : slots;
}
[[nodiscard]] KVLEAN_DEVICE u32 device_kvpress_pyramid_slots(double kept, u32 tokens, u32 window,
                                                             u32 beta, u32 layer,
                                                             u32 num_layers) noexcept {
  const double n = tokens;
  const double w = window;
  double mn = __ddiv_rn(kept, static_cast<double>(beta));
  double mx = __dsub_rn(__dmul_rn(2.0, kept), mn);
  if (mx >= n - w) {
    mx = n - w;
    mn = __dsub_rn(__dmul_rn(2.0, kept), mx);
  }
  const bool sloped = num_layers > 1 && n >= mx && mx >= mn && mn >= w;
  if (!sloped) return device_round_half_even(smaller(kept, n));
  const double step = __dmul_rn(static_cast<double>(layer), __dsub_rn(mx, mn));
  return device_round_half_even(__dsub_rn(mx, __ddiv_rn(step, num_layers - 1.0)));
}
[[nodiscard]] KVLEAN_DEVICE u32 device_pyramid_slots(PyramidForm form, u32 nominal, u32 tokens,
                                                     u32 window, u32 beta, u32 layer,
                                                     u32 num_layers) noexcept {
  if (nominal >= tokens) return tokens;
  if (num_layers <= 1 || layer >= num_layers) return nominal;
  if (form == PyramidForm::kvpress) {
    return device_kvpress_pyramid_slots(nominal, tokens, window, beta, layer, num_layers);
  }
  window = smaller(window, nominal);
  const u64 b = nominal - window;
  const u64 most = tokens - window;
  const u64 steps = num_layers - 1;
  if (form == PyramidForm::authors) {
    u64 mn = b / beta;
    u64 mx = 2 * b - mn;
    if (mx >= most) {
      mx = most;
      mn = 2 * b - mx;
    }
    return window + static_cast<u32>(mx - layer * ((mx - mn) / steps));
  }
  u64 mn = b;
  u64 mx = 2 * b * beta - b;
  if (mx >= most * beta) {
    mx = most * beta;
    mn = 2 * b * beta - mx;
  }
  const u64 unit = beta * steps;
  const auto quota = [&](u64 l) { return mx * steps - l * (mx - mn); };
  const u64 mine = quota(layer) % unit;
  u64 left = b * num_layers;
  u64 before = 0;
  for (u32 l = 0; l < num_layers; ++l) {
    const u64 each = quota(l);
    left -= each / unit;
    const u64 remainder = each % unit;
    before += remainder > mine || (remainder == mine && l < layer) ? 1 : 0;
  }
  return window + static_cast<u32>(quota(layer) / unit + (before < left ? 1 : 0));
}

}  // namespace detail

KVLEAN_CUDA_NAMESPACE_END
