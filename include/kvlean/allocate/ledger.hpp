// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/allocate/running_cut.hpp"

KVLEAN_NAMESPACE_BEGIN

/// What a LayerLedger must know before prefill: every layer has `segments` segments of `tokens`.
struct LedgerShape {
  u32 tokens = 0;
  u32 segments = 0;  ///< KV heads of a layer
  u32 num_layers = 0;
  u32 nominal = 0;  ///< slots per segment, protected ones included (Budget::slots_for)
  u32 frozen = 0;   ///< leading tokens that stay as they are, as in CacheView
  Protection protection = {};
  float safeguard = 0.2f;  ///< as in AdaKVLayersAllocator
  const float* head_weight = nullptr;
  u32 head_weight_stride = 0;
};

namespace detail::allocation {

/// What follows from a ledger's shape alone.
struct LedgerTerms {
  u32 nominal = 0;     ///< at most the tokens
  u32 floor = 0;       ///< protected, at least one
  u32 granted = 0;     ///< slots of every segment that need not compete
  u32 candidates = 0;  ///< unprotected tokens of a segment
  u32 safe = 0;        ///< of these, granted
  u64 slots = 0;       ///< of all layers together, to compete for
  u64 capacity = 0;    ///< scores to hold at most

  LedgerTerms() noexcept = default;
  explicit LedgerTerms(const LedgerShape& shape) noexcept {
    const u32 covered = shape.protection.count(shape.tokens, shape.frozen);
    nominal = std::min(shape.nominal, shape.tokens);
    floor = shape.tokens == 0 ? 0 : std::max<u32>(covered, 1);
    granted = std::max(floor, scaled_slots(nominal, shape.safeguard));
    if (nominal == shape.tokens) granted = nominal;  // keep all: nothing to remember
    candidates = shape.tokens - covered;
    safe = granted - covered;
    if (nominal <= granted) return;
    const u64 layer = static_cast<u64>(shape.segments) * (candidates - safe);
    slots = static_cast<u64>(shape.num_layers) * shape.segments * (nominal - granted);
    capacity = std::min(slots, layer * (shape.num_layers - 1)) + layer;
  }
};

}  // namespace detail::allocation

/// AdaKVLayersAllocator for layers that arrive one by one, so that each layer can be compressed as
/// soon as it is prefilled. The limits after any number of layers are those of the best candidates
/// seen so far: a layer's limits only ever shrink, and once every layer was added, in any order,
/// they equal AdaKVLayersAllocator's on all layers at once, exactly, ties and NaN included.
///
/// State is 4.5 bytes per candidate that is still in, as much for one more layer's, 96 bytes a
/// segment and 5 KiB; bytes_for() is the sum. It is taken by start() and must outlive the ledger's
/// use: give it a workspace, or a part of one, that is not rewound in between. With n tokens, H
/// segments a layer, add_layer() costs O(H n) to look at the layer, O(candidates that are still in)
/// to move the cut, and now and then one pass over the kept scores to close gaps.
class LayerLedger {
 public:
  /// Workspace bytes that start() takes at most.
  [[nodiscard]] static std::size_t bytes_for(const LedgerShape& shape) noexcept {
    return Workspace::bytes_for<Run>(segments_of(shape)) +
           Workspace::bytes_for<u8>(shape.num_layers) +
           Workspace::bytes_for<Entrant>(shape.segments) +
           Workspace::bytes_for<Entrant>(segments_of(shape)) +
           Workspace::bytes_for<Entrant>(2 * segments_of(shape)) +
           Workspace::bytes_for<float>(Terms(shape).capacity) +
           Workspace::bytes_for<float>(Scratch::floats_for(searched(shape)));
  }

  /// Takes the state and forgets every layer. Errors: invalid_shape for no layer or no segment, or
  /// 2^32 segments; invalid_option for a safeguard outside [0, 1]; budget_below_protected;
  /// workspace_too_small, out_of_memory.
  Status start(const LedgerShape& shape, Workspace& workspace) noexcept {
    const u64 all = segments_of(shape);
    if (all == 0 || all > 0xffffffffu) return StatusCode::invalid_shape;
    if (!(shape.safeguard >= 0.0f && shape.safeguard <= 1.0f)) return StatusCode::invalid_option;
    const Terms terms(shape);
    if (terms.nominal < terms.floor) return StatusCode::budget_below_protected;
    Run* runs = workspace.take_zeroed<Run>(all);
    u8* seen = workspace.take_zeroed<u8>(shape.num_layers);
    Entrant* entrants = workspace.take<Entrant>(shape.segments);
    Entrant* arrived = workspace.take<Entrant>(all);
    float* scores = workspace.take<float>(terms.capacity);
    if (runs == nullptr || seen == nullptr || entrants == nullptr || arrived == nullptr ||
        scores == nullptr) {
      return workspace.exhausted();
    }
    Scratch scratch;
    KVLEAN_RETURN_IF_ERROR(scratch.take(all, searched(shape), workspace));
    shape_ = shape;
    terms_ = terms;
    seen_ = seen;
    entrants_ = entrants;
    layers_seen_ = 0;
    cut_ = {runs, arrived, static_cast<u32>(all), scores, terms.capacity, terms.slots, scratch};
    return StatusCode::ok;
  }

  /// Adds one layer, in any order, once each. `cache` gives its shape; no row is read. Errors:
  /// null_pointer before start() or without scores; invalid_option for a layer that is out of range
  /// or was added before, or a bad weight; shape_mismatch when segments, lengths or the frozen
  /// prefix are not the ledger's. On an error nothing changes.
  Status add_layer(u32 layer, const Scores& scores, const CacheView& cache) noexcept {
    if (seen_ == nullptr) return StatusCode::null_pointer;
    if (layer >= shape_.num_layers || seen_[layer] != 0) return StatusCode::invalid_option;
    if (cache.segments != shape_.segments || cache.frozen != shape_.frozen) {
      return StatusCode::shape_mismatch;
    }
    for (u32 s = 0; s < cache.segments; ++s) {
      if (cache.length(s) != shape_.tokens) return StatusCode::shape_mismatch;
    }
    KVLEAN_RETURN_IF_ERROR(detail::allocation::enter(
        &scores, cache, shape_.protection,
        HeadWeights{shape_.head_weight, shape_.head_weight_stride}, layer, entrants_));
    seen_[layer] = 1;
    ++layers_seen_;
    if (terms_.slots == 0) return StatusCode::ok;
    cut_.reserve(static_cast<u64>(shape_.segments) * (terms_.candidates - terms_.safe));
    for (u32 s = 0; s < shape_.segments; ++s) {
      cut_.append(layer * shape_.segments + s, entrants_[s], terms_.safe);
    }
    cut_.settle();
    return StatusCode::ok;
  }

  /// Slots of a segment as things stand; 0 for a layer that was not added yet. Never grows.
  [[nodiscard]] u32 limit(u32 layer, u32 head) const noexcept {
    if (layer >= shape_.num_layers || head >= shape_.segments || seen_[layer] == 0) return 0;
    return terms_.granted + cut_.kept(layer * shape_.segments + head);
  }
  [[nodiscard]] u32 layers_seen() const noexcept { return layers_seen_; }
  /// Every layer was added: the limits are final.
  [[nodiscard]] bool complete() const noexcept {
    return seen_ != nullptr && layers_seen_ == shape_.num_layers;
  }

 private:
  using Terms = detail::allocation::LedgerTerms;
  using Run = detail::allocation::RunningCut::Run;
  using Entrant = detail::allocation::Entrant;
  using Scratch = detail::CutScratch;

  [[nodiscard]] static u64 segments_of(const LedgerShape& shape) noexcept {
    return static_cast<u64>(shape.num_layers) * shape.segments;
  }

  // Scores of the largest search: one segment's, or all that are held.
  [[nodiscard]] static u64 searched(const LedgerShape& shape) noexcept {
    return std::max<u64>(Terms(shape).capacity, shape.tokens);
  }

  LedgerShape shape_;
  Terms terms_;
  u8* seen_ = nullptr;           // [layers]
  Entrant* entrants_ = nullptr;  // [segments]
  u32 layers_seen_ = 0;
  detail::allocation::RunningCut cut_;
};

KVLEAN_NAMESPACE_END
