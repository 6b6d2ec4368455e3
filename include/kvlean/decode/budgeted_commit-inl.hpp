// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>

#include "kvlean/apply/apply.hpp"
#include "kvlean/decode/budgeted_cache.hpp"
#include "kvlean/score/observed_mass.hpp"

// The end of a step of BudgetedCache: what is kept of it, and whether compression is due.

KVLEAN_NAMESPACE_BEGIN

inline Status BudgetedCacheBase::rollback() noexcept {
  for (const Step& step : steps()) {
    if (step.settled) return StatusCode::invalid_option;
  }
  for (u32 l = 0; l < steps().size(); ++l) {
    // Tentative tokens are the newest of their heads and never frozen.
    static_cast<void>(cache_.truncate(l * kv_heads(), kv_heads(), steps_[l].appended));
    steps_[l] = {};
  }
  cache_.set_next_position(next_);
  return StatusCode::ok;
}

inline Status BudgetedCacheBase::commit(u32 accepted, Workspace& workspace) noexcept {
  if (!is_bound()) return StatusCode::invalid_shape;
  const Step first = steps_[0];
  for (const Step& step : steps()) {
    if (!step.is_as_far_as(first)) return StatusCode::invalid_length;
  }
  if (first.observed != 0 && first.observed != first.appended) return StatusCode::invalid_length;
  if (accepted > first.appended) return StatusCode::invalid_length;
  if (first.settled && accepted != first.appended) return StatusCode::invalid_option;
  if (accepted == 0) return rollback();
  return settle(accepted, false, workspace);
}

inline Status BudgetedCacheBase::compress(Workspace& workspace) noexcept {
  if (!is_bound()) return StatusCode::invalid_shape;
  if (tentative() != 0) return StatusCode::invalid_option;
  return settle(0, true, workspace);
}

/// Mass and observers of all slots with what the accepted queries add.
inline Status BudgetedCacheBase::add_pending(u32 accepted, Workspace& workspace,
                                             NewMass& made) const noexcept {
  const u64* first = cache_.offsets().data();
  const std::size_t slots = first[segments()];
  made.mass = Ragged<float>(workspace.take<float>(slots), first);
  made.observers = Ragged<float>(workspace.take<float>(slots), first);
  float* lse = workspace.take<float>(std::size_t{query_heads()} * accepted);
  if (!made.mass || !made.observers || lse == nullptr) return workspace.exhausted();
  for (u32 l = 0; l < layers(); ++l) {
    const CacheView cache = layer(l);
    Ragged<float> new_mass(made.mass.data, first + l * kv_heads());
    Ragged<float> new_observers(made.observers.data, first + l * kv_heads());
    for (u32 h = 0; h < kv_heads(); ++h) {
      std::copy_n(mass(l).segment(h), cache.length(h), new_mass.segment(h));
      std::copy_n(observers(l).segment(h), cache.length(h), new_observers.segment(h));
    }
    Queries queries = ring_.pending(l, accepted, next_);
    if (steps_[l].has_lse) {
      for (u32 head = 0; head < query_heads(); ++head) {
        std::copy_n(pending_lse(l, head), accepted, lse + std::size_t{head} * accepted);
      }
      queries.lse = lse;
    }
    KVLEAN_RETURN_IF_ERROR(accumulate_attention(cache, queries, spec(l), options_.group, workspace,
                                                executor(), new_mass));
    KVLEAN_RETURN_IF_ERROR(add_observers(cache, spec(l), queries, new_observers, workspace));
  }
  return StatusCode::ok;
}

inline bool BudgetedCacheBase::outruns_context(i32 next) const noexcept {
  return options_.positions == Positions::contiguous && options_.context_tokens != 0 &&
         i64{next} + static_cast<i64>(options_.step_tokens) > i64{options_.context_tokens};
}

inline bool BudgetedCacheBase::is_due(bool force) const noexcept {
  const bool over = total_slots() > total_budget();
  return force || (over && since_ >= options_.compress_every) || outruns_context(next_);
}

inline Status BudgetedCacheBase::settle(u32 accepted, bool force, Workspace& workspace) noexcept {
  const Step step = steps_[0];
  const u32 dropped = step.appended - accepted;
  const WorkspaceScope scope(workspace);
  NewMass made;
  if (options_.accumulate_mass && accepted != 0 && step.observed != 0 && !step.settled) {
    KVLEAN_RETURN_IF_ERROR(add_pending(accepted, workspace, made));
  }
  const std::span<const i32> remembered = ring_.positions();
  i32* old_positions = workspace.take<i32>(remembered.size());
  if (old_positions == nullptr) return workspace.exhausted();
  std::copy(remembered.begin(), remembered.end(), old_positions);

  // From here on the cache is as after the step; what fails goes back.
  const auto place = ring_.place();
  const i32 before = next_;
  const u32 since = since_;
  u32* lengths = cache_.view().lengths;
  for (u32 s = 0; s < segments(); ++s) lengths[s] -= dropped;
  if (step.remembered != 0 && options_.window != 0) {
    const u32 count = step.settled ? step.remembered : accepted;
    ring_.advance(count, before + static_cast<i32>(accepted - count));
  }
  next_ = before + static_cast<i32>(accepted);
  since_ += accepted;
  for (Step& each : steps()) each = {};
  cache_.set_next_position(next_);

  Planned planned;
  const bool due = is_due(force);
  if (due) {
    Status status = take_plans(workspace, planned);
    for (u32 l = 0; status.ok() && made.mass && l < layers(); ++l) {
      const u64* first = cache_.offsets().data() + l * kv_heads();
      planned.seen[l].mass = Ragged<float>(made.mass.data, first);
      planned.seen[l].mass_observers = Ragged<float>(made.observers.data, first);
    }
    if (status) status = plan_layers(next_, /*fresh=*/false, workspace, planned);
    for (u32 l = 0; status.ok() && l < layers(); ++l) {
      status = detail::check_cache_can_hold(planned.plans[l], planned.views[l]);
    }
    if (!status) {
      for (u32 s = 0; s < segments(); ++s) lengths[s] += dropped;
      for (Step& each : steps()) each = step;
      ring_.go_to(place);
      std::copy_n(old_positions, place.filled, ring_.positions().data());
      since_ = since;
      next_ = before;
      cache_.set_next_position(next_ + static_cast<i32>(step.appended));
      return status;
    }
  }
  for (u32 s = 0; made.mass && s < segments(); ++s) {
    std::copy_n(made.mass.segment(s), lengths[s], cache_.state(places_.mass, s).segment(0));
    std::copy_n(made.observers.segment(s), lengths[s],
                cache_.state(places_.observers, s).segment(0));
  }
  tokens_seen_ += accepted;
  if (due) carry_out(planned);
  keep_room();
  return StatusCode::ok;
}

/// Heads of different lengths use up their room at different times: it is shared out anew when the
/// next step might not fit.
inline void BudgetedCacheBase::keep_room() noexcept {
  if (cache_.min_room() < options_.step_tokens) cache_.respace();
}

KVLEAN_NAMESPACE_END
