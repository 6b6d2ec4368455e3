// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/allocate/competition.hpp"

KVLEAN_NAMESPACE_BEGIN

/// How AdaKVAllocator keeps a head from being starved. Below: a = safeguard; per head i, f_i is its
/// count in the layer's global top-B (Algorithm 1 of arXiv 2407.11550) and b_i its nominal slots,
/// both without protected tokens.
enum class SafeguardMode : u8 {
  /// The best int(nominal * a) slots of a head are safe, protected ones first; one global cut over
  /// the rest. Exact, and optimal under that floor. kvpress and the authors' later code.
  hard_floor,
  /// round_half_even(float(f_i * (1 - a)) + int(b_i * a)), the authors' released code (FFY0/AdaKV),
  /// for comparisons with it. The total DRIFTS, by more than -1.5 and at most +0.5 slots a head. A
  /// nominal equal to the length keeps everything; their code does so only above it.
  authors_mix,
  /// (1 - a) f_i + a b_i, rounded by largest remainder: what the released code aims at, exact.
  exact_mix,
  /// a f_i + (1 - a) b_i, rounded by largest remainder: the formula as printed in the paper, which
  /// has the direction of `a` reversed; the first author confirmed the code's meaning. Exact.
  paper_literal,
};

/// Ada-KV (arXiv 2407.11550): the heads of one layer compete for the layer's slots, so heads whose
/// attention is spread out get more than heads that look at few tokens. Each layer of the span is a
/// group of its own. Protected tokens do not compete; they are part of a head's nominal slots, and
/// of its floor. Total order: score descending, KV head, token ascending; NaN last.
///
/// safeguard 1 equals UniformAllocator, 0 with hard_floor is the plain global top-B. A ragged layer
/// is fine: its slots are the sum of its nominals, as far as there are tokens, so what a segment
/// shorter than its nominal can't use goes to the others, and a layer that is compressed again and
/// again keeps its total. (Safeguard 1 then hands on what UniformAllocator leaves unused.) Nominals
/// below their floor are lifted as in UniformAllocator first. The safe share is one of the nominal,
/// at most the length; in the mixes b_i is the nominal with what was handed on.
///
/// Errors: budget_below_protected when a layer's nominals sum to less than its floors;
/// invalid_option for a safeguard outside [0, 1], NaN or a bad weight; null_pointer,
/// shape_mismatch; workspace_too_small, out_of_memory. On an error the limits are unchanged.
/// O(tokens) a layer; scratch 5 KiB, half a byte a token and 92 bytes a segment.
struct AdaKVAllocator {
  float safeguard = 0.2f;  ///< share of the nominal that every head keeps, in [0, 1]
  SafeguardMode mode = SafeguardMode::hard_floor;
  /// Scale a head's scores by the share of its sum that its top-b_i holds (the authors' option, off
  /// by default there). A head whose sum is not positive and finite is left as it is.
  bool normalize = false;
  const float* head_weight = nullptr;  ///< see HeadWeights; null: all 1
  u32 head_weight_stride = 0;          ///< of one layer to the next; 0: one row for all layers

  static constexpr bool shares_slots = true;
  [[nodiscard]] bool everything_fits(std::span<const LayerLimits> layers,
                                     const Context& /*context*/) const noexcept {
    return std::all_of(layers.begin(), layers.end(), [](const LayerLimits& layer) noexcept {
      return detail::allocation::all_fit({&layer, 1});
    });
  }

  Status allocate(std::span<LayerLimits> layers, Context& context) const noexcept {
    namespace allocation = detail::allocation;
    if (!(safeguard >= 0.0f && safeguard <= 1.0f)) return StatusCode::invalid_option;
    Workspace& workspace = context.workspace;
    WorkspaceScope scope(workspace);
    allocation::Group group;
    allocation::Entrant* entrants = nullptr;
    KVLEAN_RETURN_IF_ERROR(allocation::enter_layers(
        layers, context, HeadWeights{head_weight, head_weight_stride}, group, entrants));
    u32 first = 0;
    for (const LayerLimits& layer : layers) {
      const u32 segments = layer.cache->segments;
      KVLEAN_RETURN_IF_ERROR(
          share_layer(group.slice(first, segments), entrants + first, workspace));
      first += segments;
    }
    allocation::scatter(group, layers);
    return StatusCode::ok;
  }

 private:
  using Group = detail::allocation::Group;
  using Entrant = detail::allocation::Entrant;

  Status share_layer(const Group& heads, Entrant* entrants, Workspace& workspace) const noexcept {
    KVLEAN_RETURN_IF_ERROR(
        detail::allocation::raise_to_floors(heads, heads.shared_total(), workspace));
    if (normalize) KVLEAN_RETURN_IF_ERROR(normalize_scores(heads, entrants, workspace));
    if (mode == SafeguardMode::hard_floor) {
      return detail::allocation::hard_floor(heads, entrants, safeguard, workspace);
    }
    WorkspaceScope scope(workspace);
    u32* won = workspace.take<u32>(heads.count);
    if (won == nullptr) return workspace.exhausted();
    u64 slots = 0;
    u64 candidates = 0;
    for (u32 i = 0; i < heads.count; ++i) {
      slots += competing_slots(heads, entrants, i);
      candidates += entrants[i].count;
    }
    if (slots == candidates) return StatusCode::ok;  // everything is kept
    KVLEAN_RETURN_IF_ERROR(
        detail::allocation::compete({entrants, heads.count}, slots, won, workspace));
    if (mode == SafeguardMode::authors_mix) {
      authors_mix(heads, entrants, won);
      return StatusCode::ok;
    }
    return exact_mix(heads, entrants, won, slots, workspace);
  }

  static u32 competing_slots(const Group& heads, const Entrant* entrants, u32 i) noexcept {
    return heads.value[i] - (heads.high[i] - entrants[i].count);
  }

  void authors_mix(const Group& heads, const Entrant* entrants, const u32* won) const noexcept {
    for (u32 i = 0; i < heads.count; ++i) {
      const u32 nominal = competing_slots(heads, entrants, i);
      const float adaptive = static_cast<float>(won[i]) * (1.0f - safeguard);
      const float mix =
          adaptive + static_cast<float>(detail::allocation::scaled_slots(nominal, safeguard));
      const float whole = std::floor(mix);
      u32 slots = static_cast<u32>(whole);
      const float rest = mix - whole;
      if (rest > 0.5f || (rest == 0.5f && slots % 2 == 1)) ++slots;
      slots += heads.high[i] - entrants[i].count;
      heads.value[i] = std::clamp(slots, heads.low[i], heads.high[i]);
    }
  }

  // In units of 2^-30 slots, so that remainders, and with them the result, are exact integers.
  Status exact_mix(const Group& heads, const Entrant* entrants, const u32* won, u64 slots,
                   Workspace& workspace) const noexcept {
    constexpr u64 one = u64{1} << 30;
    WorkspaceScope scope(workspace);
    auto* remainder = workspace.take<detail::allocation::Remainder>(heads.count);
    if (remainder == nullptr) return workspace.exhausted();
    const u64 part = static_cast<u64>(static_cast<double>(safeguard) * static_cast<double>(one));
    const u64 uniform = mode == SafeguardMode::exact_mix ? part : one - part;
    const u64 total = heads.total();
    u64 left = slots;
    for (u32 i = 0; i < heads.count; ++i) {
      const u64 quota = (one - uniform) * won[i] + uniform * competing_slots(heads, entrants, i);
      remainder[i] = {quota % one, i};
      heads.value[i] = heads.high[i] - entrants[i].count + static_cast<u32>(quota / one);
      left -= quota / one;
    }
    detail::allocation::rank_remainders(remainder, heads.count, left);
    for (u64 i = 0; i < left; ++i) ++heads.value[remainder[i].index];
    return detail::allocation::fit_total(heads.value, heads.low, heads.high, heads.count, total,
                                         workspace);
  }

  Status normalize_scores(const Group& heads, Entrant* entrants,
                          Workspace& workspace) const noexcept {
    WorkspaceScope scope(workspace);
    detail::CutScratch scratch;
    KVLEAN_RETURN_IF_ERROR(
        scratch.take(1, *std::max_element(heads.high, heads.high + heads.count), workspace));
    for (u32 i = 0; i < heads.count; ++i) {
      Entrant& head = entrants[i];
      auto cut = detail::CutSearch({&head, 1}, competing_slots(heads, entrants, i), scratch).find();
      double best = 0.0;
      double sum = 0.0;
      for (u32 j = 0; j < head.count; ++j) {
        const float score = head.scores[j];
        if (std::isnan(score)) continue;
        sum += static_cast<double>(score);
        const u32 key = head.key(j);
        const bool tied = key == cut.key && cut.ties > 0;
        if (tied) --cut.ties;
        if (tied || key > cut.key) best += static_cast<double>(score);
      }
      if (sum > 0.0 && std::isfinite(sum) && best >= 0.0) {
        head.weight *= static_cast<float>(best / sum);
      }
    }
    return StatusCode::ok;
  }
};

static_assert(Allocator<AdaKVAllocator>);

KVLEAN_NAMESPACE_END
