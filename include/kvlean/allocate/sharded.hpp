// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>
#include <concepts>

#include "kvlean/allocate/shares.hpp"
#include "kvlean/core/order.hpp"

KVLEAN_NAMESPACE_BEGIN

/// How ranks that hold different KV heads exchange data (tensor parallelism): element-wise sums
/// over all ranks, in place. Every rank must make the same calls with the same sizes. Integer sums
/// are the same in any order, so every rank gets the same bits.
template <class C>
concept RankCommunicator = requires(const C& communicator, std::span<u64> sums) {
  { communicator.all_reduce_sum(sums) }
  noexcept->std::same_as<Status>;
};

namespace detail::allocation {

/// A radix search for the cut of competing segments of which only some are on this rank, three
/// passes of 11, 11 and 10 bits. A segment needs one range of keys refined a pass: where its safe
/// cut lies below the group's cut, none of its candidates competes there; where it lies above, the
/// safe cut itself no longer matters.
struct ShardedCut {
  static constexpr u32 levels = 3;
  static constexpr u32 bins = 2048;
  static constexpr u32 no_digit = 0xffffffffu;

  [[nodiscard]] static constexpr u32 shift(u32 level) noexcept {
    return level == 0 ? 21 : level == 1 ? 10 : 0;
  }
  [[nodiscard]] static constexpr u32 used_bins(u32 level) noexcept {
    return level == 2 ? 1024 : bins;
  }

  /// One segment of this rank.
  struct Head {
    const float* scores = nullptr;  ///< [count] the candidates
    u32 count = 0;
    u32 group = 0;
    u64 remaining = 0;  ///< safe ones within the prefix; while own, what is left to take
    bool competes = false;
    u32 prefix = 0;
    u32 digit = no_digit;
    u64 above = 0;
    u32* histogram = nullptr;  ///< [bins]; after count_digits() suffix sums

    [[nodiscard]] u64 reaching(u32 bin) const noexcept { return bin < bins ? histogram[bin] : 0; }
    [[nodiscard]] u64 in_bin(u32 bin) const noexcept { return reaching(bin) - reaching(bin + 1); }
    /// Candidates of a bin that compete.
    [[nodiscard]] u64 competing(u32 bin) const noexcept {
      if (!competes || (digit != no_digit && bin > digit)) return 0;
      return bin == digit ? reaching(bin) - remaining : in_bin(bin);
    }
    void count_digits(u32 level) noexcept {
      std::fill_n(histogram, bins, 0u);
      digit = no_digit;
      if (!competes && remaining == 0) return;
      const u32 known = level == 0 ? 0 : ~0u << shift(level - 1);
      for (u32 i = 0; i < count; ++i) {
        const u32 key = score_key(scores[i]);
        if ((key & known) == prefix) ++histogram[key >> shift(level) & (used_bins(level) - 1)];
      }
      for (u32 bin = bins - 1; bin > 0; --bin) histogram[bin - 1] += histogram[bin];
      for (u32 bin = bins; remaining != 0 && digit == no_digit && bin > 0; --bin) {
        if (histogram[bin - 1] >= remaining) digit = bin - 1;
      }
    }
    /// `group_digit`: of the group's cut.
    void advance(u32 level, u32 group_digit) noexcept {
      if (!competes && remaining == 0) return;
      u32 bin = digit;
      if (competes) {
        if (digit != no_digit && digit < group_digit) {
          competes = false;
        } else {
          bin = group_digit;
        }
      }
      remaining = bin == digit ? remaining - reaching(bin + 1) : 0;
      above += reaching(bin + 1);
      prefix |= bin << shift(level);
    }
  };
};

}  // namespace detail::allocation

/// Ada-KV with the hard floor (AdaKVAllocator, or AdaKVLayersAllocator with across_layers) where
/// the KV heads of every layer are sharded over ranks and the budget is global: each rank passes
/// its own heads and gets their limits, the same as one rank with all heads, bit for bit, ties and
/// NaN included. Instead of scores the ranks exchange lengths and nominals (32 bytes a segment),
/// three histograms of 16 KiB a competing group, and 8 bytes a segment for ties. Head h of a rank
/// is head first_head + h of the model's layer; the shards of the ranks cover all_heads once.
///
/// Errors, on every rank alike: budget_below_protected, shape_mismatch or null_pointer where a
/// rank's scores don't fit (invalid_option on the others), what the communicator returns;
/// workspace_too_small and out_of_memory only when every rank has the same workspace. On an error
/// the limits are unchanged. O(tokens); scratch 16 KiB a group, 8 KiB a segment of this rank.
template <RankCommunicator C>
struct ShardedAdaKVAllocator {
  const C* communicator = nullptr;
  u32 first_head = 0;
  u32 all_heads = 0;
  bool across_layers = false;
  float safeguard = 0.2f;  ///< share of the nominal that every head keeps, in [0, 1]

  static constexpr bool shares_slots = true;
  /// Needs the other ranks, so it is not known before.
  [[nodiscard]] bool everything_fits(std::span<const LayerLimits> /*layers*/,
                                     const Context& /*context*/) const noexcept {
    return false;
  }

  Status allocate(std::span<LayerLimits> layers, Context& context) const noexcept {
    namespace allocation = detail::allocation;
    if (communicator == nullptr) return StatusCode::null_pointer;
    if (!(safeguard >= 0.0f && safeguard <= 1.0f)) return StatusCode::invalid_option;
    Workspace& workspace = context.workspace;
    WorkspaceScope scope(workspace);
    const u32 num_layers = static_cast<u32>(layers.size());
    const u32 entries = num_layers * all_heads;
    const u32 groups = across_layers ? std::min(num_layers, 1u) : num_layers;
    Work work;
    KVLEAN_RETURN_IF_ERROR(work.take(entries, groups, local_segments(layers), workspace));
    const Status local = publish(layers, context, work.shapes);
    work.shapes[4 * u64{entries}] = local.ok() ? 0 : 1;
    KVLEAN_RETURN_IF_ERROR(exchange({work.shapes, 4 * std::size_t{entries} + 1}));
    KVLEAN_RETURN_IF_ERROR(local);
    if (work.shapes[4 * u64{entries}] != 0) return StatusCode::invalid_option;
    for (u32 i = 0; i < entries; ++i) {
      work.group.high[i] = static_cast<u32>(work.shapes[4 * u64{i}]);
      work.group.nominal[i] = static_cast<u32>(work.shapes[4 * u64{i} + 1]);
      work.group.low[i] = static_cast<u32>(work.shapes[4 * u64{i} + 2]);
      work.group.value[i] = std::min(work.group.nominal[i], work.group.high[i]);
    }
    const u32 members = across_layers ? entries : all_heads;
    for (u32 g = 0; g < groups; ++g) {
      const allocation::Group part = work.group.slice(g * members, members);
      KVLEAN_RETURN_IF_ERROR(allocation::raise_to_floors(part, part.shared_total(), workspace));
      work.slots[g] = part.total();
      for (u32 i = 0; i < members; ++i) {
        const bool paid = part.value[i] < std::min(part.nominal[i], part.high[i]);
        const u32 share =
            allocation::scaled_slots(paid ? part.value[i] : part.nominal[i], safeguard);
        work.granted[g * members + i] = std::max(part.low[i], std::min(share, part.value[i]));
        work.slots[g] -= work.granted[g * members + i];
      }
    }
    KVLEAN_RETURN_IF_ERROR(compete(layers, context, work, groups));
    u32 head = 0;
    for (const LayerLimits& layer : layers) {
      for (u32 s = 0; s < layer.cache->segments; ++s, ++head) {
        const Cut::Head& mine = work.heads[head];
        layer.limit[s] = layer.cache->length(s) - mine.count + static_cast<u32>(mine.above);
      }
    }
    return StatusCode::ok;
  }

 private:
  using Cut = detail::allocation::ShardedCut;

  struct Work {
    u64* shapes = nullptr;  // [entries][length, nominal, floor, protected], then errors
    detail::allocation::Group group;
    u32* granted = nullptr;  // [entries]
    u64* slots = nullptr;    // [groups]
    u64* sums = nullptr;     // [groups][bins]
    u32* digit = nullptr;    // [groups]
    u64* ties = nullptr;     // [entries]
    Cut::Head* heads = nullptr;
    u32* histograms = nullptr;
    u32 count = 0;

    Status take(u32 entries, u32 groups, u32 local, Workspace& workspace) noexcept {
      count = local;
      shapes = workspace.take_zeroed<u64>(4 * std::size_t{entries} + 1);
      group.count = entries;
      group.value = workspace.take<u32>(entries);
      group.low = workspace.take<u32>(entries);
      group.high = workspace.take<u32>(entries);
      group.nominal = workspace.take<u32>(entries);
      granted = workspace.take<u32>(entries);
      slots = workspace.take<u64>(groups);
      sums = workspace.take<u64>(std::size_t{groups} * Cut::bins);
      digit = workspace.take<u32>(groups);
      ties = workspace.take_zeroed<u64>(entries);
      heads = workspace.take<Cut::Head>(local);
      histograms = workspace.take<u32>(std::size_t{local} * Cut::bins);
      const bool all = shapes != nullptr && group.value != nullptr && group.low != nullptr &&
                       group.high != nullptr && group.nominal != nullptr && granted != nullptr &&
                       slots != nullptr && sums != nullptr && digit != nullptr && ties != nullptr &&
                       heads != nullptr && histograms != nullptr;
      return all ? Status{} : workspace.exhausted();
    }
  };

  [[nodiscard]] static u32 local_segments(std::span<const LayerLimits> layers) noexcept {
    u32 count = 0;
    for (const LayerLimits& layer : layers) {
      count += layer.cache != nullptr ? layer.cache->segments : 0;
    }
    return count;
  }
  [[nodiscard]] Status exchange(std::span<u64> sums) const noexcept {
    return communicator->all_reduce_sum(sums);
  }

  /// This rank's shapes, in their places; the others' stay zero.
  [[nodiscard]] Status publish(std::span<const LayerLimits> layers, const Context& context,
                               u64* shapes) const noexcept {
    u32 l = 0;
    for (const LayerLimits& layer : layers) {
      if (layer.cache == nullptr || layer.limit == nullptr || layer.floor == nullptr ||
          layer.scores == nullptr || layer.scores->lengths == nullptr) {
        return StatusCode::null_pointer;
      }
      const CacheView& cache = *layer.cache;
      if (u64{first_head} + cache.segments > all_heads) return StatusCode::shape_mismatch;
      if (layer.scores->segments != cache.segments) return StatusCode::shape_mismatch;
      for (u32 s = 0; s < cache.segments; ++s) {
        const u32 length = cache.length(s);
        if (layer.scores->length(s) != length) return StatusCode::shape_mismatch;
        if (length != 0 && !layer.scores->rank) return StatusCode::null_pointer;
        const u32 covered = context.options.protection.count(length, cache.frozen);
        u64* shape = shapes + 4 * (u64{l} * all_heads + first_head + s);
        shape[0] = length;
        shape[1] = layer.limit[s];
        shape[2] = std::min(std::max(layer.floor[s], covered), length);
        shape[3] = covered;
      }
      ++l;
    }
    return StatusCode::ok;
  }

  /// The digit of a group's cut; `wanted` becomes what is left to take within it.
  [[nodiscard]] static u32 find_digit(const u64* sums, u64& wanted) noexcept {
    u32 bin = Cut::bins - 1;
    while (bin > 0 && sums[bin] < wanted) wanted -= sums[bin--];
    return bin;
  }

  [[nodiscard]] Status compete(std::span<const LayerLimits> layers, const Context& context,
                               Work& work, u32 groups) const noexcept {
    u32 at = 0;
    for (u32 l = 0; l < layers.size(); ++l) {
      const LayerLimits& layer = layers[l];
      const u32 front = std::max(context.options.protection.sinks, layer.cache->frozen);
      for (u32 s = 0; s < layer.cache->segments; ++s, ++at) {
        const u64 entry = u64{l} * all_heads + first_head + s;
        const u32 covered = static_cast<u32>(work.shapes[4 * entry + 3]);
        Cut::Head& head = work.heads[at];
        head = {};
        head.count = layer.cache->length(s) - covered;
        if (head.count != 0) head.scores = layer.scores->rank.segment(s) + front;
        head.group = across_layers ? 0 : l;
        head.remaining = work.granted[entry] - covered;
        head.competes = work.slots[head.group] != 0;
        head.histogram = work.histograms + std::size_t{at} * Cut::bins;
      }
    }
    const std::span<u64> sums(work.sums, std::size_t{groups} * Cut::bins);
    for (u32 level = 0; level < Cut::levels; ++level) {
      std::fill(sums.begin(), sums.end(), u64{0});
      for (u32 i = 0; i < work.count; ++i) {
        Cut::Head& head = work.heads[i];
        head.count_digits(level);
        u64* mine = work.sums + std::size_t{head.group} * Cut::bins;
        for (u32 bin = 0; head.competes && bin < Cut::used_bins(level); ++bin) {
          mine[bin] += head.competing(bin);
        }
      }
      KVLEAN_RETURN_IF_ERROR(exchange(sums));
      for (u32 g = 0; g < groups; ++g) {
        if (work.slots[g] == 0) continue;
        work.digit[g] = find_digit(work.sums + std::size_t{g} * Cut::bins, work.slots[g]);
      }
      if (level + 1 == Cut::levels) break;
      for (u32 i = 0; i < work.count; ++i) {
        work.heads[i].advance(level, work.digit[work.heads[i].group]);
      }
    }
    // Ties at the group's cut go to its segments in order, so every rank must know all counts.
    const auto entry_of = [&](u32 layer, u32 s) noexcept {
      return u64{layer} * all_heads + first_head + s;
    };
    at = 0;
    for (u32 l = 0; l < layers.size(); ++l) {
      for (u32 s = 0; s < layers[l].cache->segments; ++s, ++at) {
        const Cut::Head& head = work.heads[at];
        if (head.competes) work.ties[entry_of(l, s)] = head.competing(work.digit[head.group]);
      }
    }
    KVLEAN_RETURN_IF_ERROR(exchange({work.ties, work.group.count}));
    at = 0;
    for (u32 l = 0; l < layers.size(); ++l) {
      for (u32 s = 0; s < layers[l].cache->segments; ++s, ++at) {
        Cut::Head& head = work.heads[at];
        head.advance(Cut::levels - 1, head.competes ? work.digit[head.group] : 0);
        head.above += head.remaining;  // safe, or its own last ties
        if (!head.competes) continue;
        u64 before = 0;
        const u64 first = across_layers ? 0 : u64{l} * all_heads;
        for (u64 i = first; i < entry_of(l, s); ++i) before += work.ties[i];
        const u64 slots = work.slots[head.group];
        head.above += std::min(work.ties[entry_of(l, s)], slots - std::min(slots, before));
      }
    }
    return StatusCode::ok;
  }
};

KVLEAN_NAMESPACE_END
