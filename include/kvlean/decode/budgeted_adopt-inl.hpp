// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/decode/budgeted_cache.hpp"
#include "kvlean/decode/carry_state.hpp"

KVLEAN_NAMESPACE_BEGIN

/// Copies of what the slots of one source layer carry, in a workspace.
struct BudgetedCacheBase::Carried {
  Ragged<float> mass;
  Ragged<float> observers;
  Ragged<float> tokens;
};

/// What the engine's cache must be before anything is planned.
inline Status BudgetedCacheBase::check_sources(std::span<const CacheView> sources,
                                               std::span<const Observation> seen_) const noexcept {
  if (!is_bound()) return StatusCode::invalid_shape;
  if (sources.size() != shape_.layers || seen_.size() != shape_.layers) {
    return StatusCode::shape_mismatch;
  }
  const auto storage = cache_.storage();
  const auto block = detail::ByteRange::of(storage.data(), storage.size());
  for (std::size_t l = 0; l < sources.size(); ++l) {
    const CacheView& source = sources[l];
    KVLEAN_RETURN_IF_ERROR(check_cache(source));
    if (source.segments != kv_heads() || source.keys.width != shape_.key_dim ||
        source.values.width != shape_.value_dim ||
        source.next_position != sources[0].next_position) {
      return StatusCode::shape_mismatch;
    }
    for (u32 s = 0; s < source.segments; ++s) {
      if (detail::rows_touch(source.keys, s, source.length(s), block) ||
          detail::rows_touch(source.values, s, source.length(s), block)) {
        return StatusCode::destination_overlaps;
      }
    }
    for (const Queries* queries : {&seen_[l].window, &seen_[l].reference}) {
      if (!*queries) continue;
      KVLEAN_RETURN_IF_ERROR(check_queries(*queries, source));
      if (queries->rows.heads != query_heads()) return StatusCode::shape_mismatch;
    }
  }
  return StatusCode::ok;
}

/// Mass, observers and counts of one source layer, as the engine knows them.
inline Status BudgetedCacheBase::take_carried(const CacheView& source, Observation& known,
                                              Workspace& workspace,
                                              Carried& carried) const noexcept {
  u64* first = workspace.take<u64>(source.segments + std::size_t{1});
  if (first == nullptr) return workspace.exhausted();
  first[0] = 0;
  for (u32 s = 0; s < source.segments; ++s) first[s + 1] = first[s] + source.length(s);
  const std::size_t slots = first[source.segments];
  if (options_.count_tokens) {
    carried.tokens = Ragged<float>(workspace.take<float>(slots), first);
    if (!carried.tokens) return workspace.exhausted();
    std::fill_n(carried.tokens.data, slots, 1.0f);
  }
  if (!options_.accumulate_mass) return StatusCode::ok;
  carried.mass = Ragged<float>(workspace.take_zeroed<float>(slots), first);
  carried.observers = Ragged<float>(workspace.take_zeroed<float>(slots), first);
  if (!carried.mass || !carried.observers) return workspace.exhausted();
  if (known.mass) {
    for (u32 s = 0; s < source.segments; ++s) {
      std::copy_n(known.mass.segment(s), source.length(s), carried.mass.segment(s));
      for (u32 t = 0; t < source.length(s); ++t) {
        carried.observers(s, t) =
            known.mass_observers
                ? known.mass_observers(s, t)
                : static_cast<float>(detail::ready_made_observers(source, s, t, known.observers));
      }
    }
  } else if (known.reference) {
    KVLEAN_RETURN_IF_ERROR(accumulate_attention(source, known.reference, known.attention,
                                                options_.group, workspace, executor(),
                                                carried.mass));
    KVLEAN_RETURN_IF_ERROR(
        add_observers(source, known.attention, known.reference, carried.observers, workspace));
    known.mass = carried.mass;  // the policy need not sum it again
    known.mass_observers = carried.observers;
  }
  return StatusCode::ok;
}

/// Copies the newest queries of every layer, as many as all of them have.
inline void BudgetedCacheBase::adopt_queries(std::span<const CacheView> sources,
                                             std::span<const Observation> seen_) noexcept {
  u32 count = static_cast<u32>(options_.window);
  for (const Observation& each : seen_) {
    count = std::min(count, detail::window_queries(each).count);
  }
  ring_.go_to({});
  if (count == 0) return;
  for (u32 l = 0; l < layers(); ++l) ring_.push(l, detail::window_queries(seen_[l]), count, 0);
  ring_.advance(count, 0);
  const Queries& queries = detail::window_queries(seen_[0]);
  for (u32 i = 0; i < count; ++i) {
    ring_.positions()[i] = queries.position(queries.count - count + i, sources[0].next_position);
  }
}

inline Status BudgetedCacheBase::adopt(std::span<const CacheView> sources,
                                       std::span<const Observation> seen_,
                                       Workspace& workspace) noexcept {
  KVLEAN_RETURN_IF_ERROR(check_sources(sources, seen_));
  const WorkspaceScope scope(workspace);
  Planned planned;
  KVLEAN_RETURN_IF_ERROR(take_plans(workspace, planned));
  Carried* carried = workspace.take<Carried>(layers());
  u32* lengths = workspace.take<u32>(segments());
  if (carried == nullptr || lengths == nullptr) return workspace.exhausted();
  for (u32 l = 0; l < layers(); ++l) {
    planned.views[l] = sources[l];
    if (sources[l].rope == nullptr && options_.rope != nullptr) {
      planned.views[l].rope = options_.rope;
      planned.views[l].rope_pairing = options_.rope->pairing;
    }
    planned.seen[l] = seen_[l];
    new (carried + l) Carried();
    KVLEAN_RETURN_IF_ERROR(take_carried(sources[l], planned.seen[l], workspace, carried[l]));
  }
  KVLEAN_RETURN_IF_ERROR(plan_layers(sources[0].next_position, /*fresh=*/true, workspace, planned));
  for (u32 l = 0; l < layers(); ++l) {
    const bool biased = planned.plans[l].log_mass != nullptr || sources[l].log_mass;
    if (biased && !options_.log_mass) return StatusCode::needs_log_mass;
    std::copy_n(planned.plans[l].length, kv_heads(), lengths + l * kv_heads());
  }

  const i64 shift = query_shift(planned.plans[0], planned.views[0]);
  const i32 start = first_position_;
  clear();
  static_cast<void>(cache_.set_lengths({lengths, segments()}));  // they fit, plan_layers has seen
  for (u32 l = 0; l < layers(); ++l) {
    const CompressionPlan& made = planned.plans[l];
    const CacheView to = cache_.layer(l);
    const detail::KeyRotation rotation(made, planned.views[l]);
    parallel_for(executor(), kv_heads(), [&](u32, u32 s) noexcept {
      detail::write_segment_to(made, planned.views[l], to, rotation, s);
    });
    carry_states(planned, l, carried[l].mass, carried[l].observers, carried[l].tokens);
    const auto keep = [&](Ragged<float> from, Ragged<float> state_) noexcept {
      for (u32 s = 0; from && s < kv_heads(); ++s) {
        std::copy_n(from.segment(s), made.length[s], state_.segment(s));
      }
    };
    keep(carried[l].mass, mass(l));
    keep(carried[l].observers, observers(l));
    keep(carried[l].tokens, tokens(l));
    for (u32 i = 0; i < options_.engine_states; ++i) {
      for (u32 s = 0; s < kv_heads(); ++s) {
        std::fill_n(engine_state(i, l).segment(s), made.length[s], 0.0f);
      }
    }
  }
  std::copy_n(threshold_ + segments(), segments(), threshold_);
  adopt_queries(sources, seen_);
  move_queries(shift);
  first_position_ = start;
  next_ = sources[0].next_position + static_cast<i32>(shift);
  cache_.set_next_position(next_);
  tokens_seen_ = static_cast<u64>(std::max<i64>(0, i64{sources[0].next_position} - start));
  compressions_ = 1;
  cache_.respace();
  return StatusCode::ok;
}

KVLEAN_NAMESPACE_END
