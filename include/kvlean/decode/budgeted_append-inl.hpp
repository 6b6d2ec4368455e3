// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <limits>

#include "kvlean/attention/merge_parts.hpp"
#include "kvlean/decode/budgeted_cache.hpp"
#include "kvlean/score/observed_mass.hpp"

// A step of BudgetedCache: tokens that are appended, attended and observed.

KVLEAN_NAMESPACE_BEGIN

inline CacheView BudgetedCacheBase::layer(u32 index) const noexcept {
  CacheView view = cache_.layer(index);
  // Layers of one step are appended to one after the other; all count from the committed tokens.
  if (is_bound() && index < layers()) {
    view.next_position = next_ + static_cast<i32>(steps_[index].appended);
  }
  return view;
}

inline Observation BudgetedCacheBase::seen(u32 layer_index) const noexcept {
  Observation seen;
  if (!is_bound() || layer_index >= layers()) return seen;
  seen.attention = spec(layer_index);
  if (ring_.place().filled != 0) seen.window = ring_.window(layer_index);
  seen.mass = mass(layer_index);
  seen.mass_observers = observers(layer_index);
  seen.external = engine_state(0, layer_index);
  return seen;
}

inline Status BudgetedCacheBase::append(u32 layer_index, const Rows& keys, const Rows& values,
                                        u32 count) noexcept {
  if (!is_bound() || layer_index >= layers()) return StatusCode::invalid_shape;
  Step& step = steps_[layer_index];
  if (count == 0 || count > options_.step_tokens - step.appended) {
    return StatusCode::invalid_length;
  }
  if (step.appended != 0 && (step.settled || step.appended + count > options_.max_tentative)) {
    return StatusCode::invalid_option;
  }
  const u32 first_head = layer_index * kv_heads();
  if (i64{next_} + step.appended + count > i64{std::numeric_limits<i32>::max()}) {
    return StatusCode::invalid_option;
  }
  KVLEAN_RETURN_IF_ERROR(cache_.append(first_head, kv_heads(), keys, values, count,
                                       next_ + static_cast<i32>(step.appended)));
  step.appended += count;
  if (!options_.count_tokens) return StatusCode::ok;
  for (u32 h = 0; h < kv_heads(); ++h) {
    const u32 length = cache_.length(first_head + h);
    std::fill_n(tokens(layer_index).segment(h) + (length - count), count, 1.0f);
  }
  return StatusCode::ok;
}

/// Checks a layer's new queries and gives them the positions of their tokens.
inline Status BudgetedCacheBase::take_new_queries(u32 layer_index,
                                                  Queries& queries) const noexcept {
  if (!is_bound() || layer_index >= layers()) return StatusCode::invalid_shape;
  const Step& step = steps_[layer_index];
  if (queries.count == 0 || queries.count != step.appended - step.observed) {
    return StatusCode::invalid_length;
  }
  if (queries.rows.heads != query_heads()) return StatusCode::shape_mismatch;
  KVLEAN_RETURN_IF_ERROR(check_queries(queries, layer(layer_index)));
  queries.positions = nullptr;
  queries.first_position = next_ + static_cast<i32>(step.observed);
  queries.mask = Mask::causal;
  return StatusCode::ok;
}

inline Status BudgetedCacheBase::attend(u32 layer_index, const Queries& queries,
                                        const AttentionOutput& output,
                                        Workspace& workspace) noexcept {
  Queries mine = queries;
  KVLEAN_RETURN_IF_ERROR(take_new_queries(layer_index, mine));
  mine.lse = nullptr;
  const WorkspaceScope scope(workspace);
  AttentionOutput written = output;
  if (written.lse == nullptr) {
    written.lse = workspace.take<float>(std::size_t{query_heads()} * mine.count);
    if (written.lse == nullptr) return workspace.exhausted();
  }
  KVLEAN_RETURN_IF_ERROR(
      kvlean::attend(mine, layer(layer_index), spec(layer_index), written, workspace, executor()));
  mine.lse = written.lse;
  return record(layer_index, mine, {}, workspace);
}

inline Status BudgetedCacheBase::attend(u32 layer_index, const Queries& queries,
                                        const CacheView& prefix, const AttentionOutput& output,
                                        Workspace& workspace) noexcept {
  Queries mine = queries;
  KVLEAN_RETURN_IF_ERROR(take_new_queries(layer_index, mine));
  mine.lse = nullptr;
  if (output.values == nullptr) return StatusCode::null_pointer;
  if (prefix.segments != kv_heads() || prefix.keys.width != shape_.key_dim ||
      prefix.values.width != shape_.value_dim) {
    return StatusCode::shape_mismatch;
  }
  const CacheView own = layer(layer_index);
  const AttentionShape shape = attention_shape(mine, own);
  const WorkspaceScope scope(workspace);
  AttentionOutput written = output;
  AttentionOutput part;
  if (written.lse == nullptr) written.lse = workspace.take<float>(shape.rows());
  part.lse = workspace.take<float>(shape.rows());
  part.values = workspace.take<float>(shape.rows() * shape.value_width);
  if (written.lse == nullptr || part.lse == nullptr || part.values == nullptr) {
    return workspace.exhausted();
  }
  AttentionSpec without_sinks = spec(layer_index);
  without_sinks.sink_logits = nullptr;
  KVLEAN_RETURN_IF_ERROR(kvlean::attend(mine, prefix, without_sinks, part, workspace, executor()));
  KVLEAN_RETURN_IF_ERROR(
      kvlean::attend(mine, own, spec(layer_index), written, workspace, executor()));
  KVLEAN_RETURN_IF_ERROR(merge_parts(written, part, shape));
  mine.lse = written.lse;
  return record(layer_index, mine, {}, workspace);
}

inline Status BudgetedCacheBase::observe(u32 layer_index, const Queries& queries,
                                         Workspace& workspace) noexcept {
  Queries mine = queries;
  KVLEAN_RETURN_IF_ERROR(take_new_queries(layer_index, mine));
  return record(layer_index, mine, {}, workspace);
}

inline Status BudgetedCacheBase::add_mass(u32 layer_index, Ragged<const float> mass_received,
                                          const Queries& queries, Workspace& workspace) noexcept {
  if (!is_bound() || layer_index >= layers()) return StatusCode::invalid_shape;
  if (!mass_received) return StatusCode::null_pointer;
  const Step& step = steps_[layer_index];
  if (!options_.accumulate_mass || step.observed != 0) return StatusCode::invalid_option;
  if (step.appended == 0) return StatusCode::invalid_length;
  Queries mine = queries;
  if (mine) {
    KVLEAN_RETURN_IF_ERROR(take_new_queries(layer_index, mine));
  } else {
    mine.first_position = next_;
    mine.count = step.appended;  // without rows: only counted, not remembered
  }
  return record(layer_index, mine, mass_received, workspace);
}

/// Adds to `observers` the number of queries that see each slot.
inline Status BudgetedCacheBase::add_observers(const CacheView& cache,
                                               const AttentionSpec& attention,
                                               const Queries& queries, Ragged<float> observers_,
                                               Workspace& workspace) noexcept {
  const WorkspaceScope scope(workspace);
  u32* seen_by = workspace.take<u32>(cache.max_length());
  if (seen_by == nullptr) return workspace.exhausted();
  for (u32 s = 0; s < cache.segments; ++s) {
    detail::count_observers(cache, s, queries, attention, 0, queries.count, seen_by);
    float* to = observers_.segment(s);
    for (u32 t = 0; t < cache.length(s); ++t) to[t] += static_cast<float>(seen_by[t]);
  }
  return StatusCode::ok;
}

/// Remembers a layer's new queries. What they pay is added now when there is no way back from the
/// step, at commit() otherwise.
inline Status BudgetedCacheBase::record(u32 layer_index, const Queries& queries,
                                        Ragged<const float> mass_received,
                                        Workspace& workspace) noexcept {
  Step& step = steps_[layer_index];
  const bool revocable = !mass_received && step.appended <= options_.max_tentative;
  if (options_.accumulate_mass && !revocable) {
    const CacheView cache = layer(layer_index);
    const WorkspaceScope scope(workspace);
    // What could fail after the mass was added is tried before.
    if (workspace.take<u32>(cache.max_length()) == nullptr) return workspace.exhausted();
    if (mass_received) {
      for (u32 s = 0; s < cache.segments; ++s) {
        row_math::add_scaled(mass(layer_index).segment(s), mass_received.segment(s), 1.0f,
                             cache.length(s));
      }
    } else {
      KVLEAN_RETURN_IF_ERROR(accumulate_attention(cache, queries, spec(layer_index), options_.group,
                                                  workspace, executor(), mass(layer_index)));
    }
  }
  if (options_.accumulate_mass && !revocable) {
    KVLEAN_RETURN_IF_ERROR(add_observers(layer(layer_index), spec(layer_index), queries,
                                         observers(layer_index), workspace));
  }
  const u32 fit = options_.window == 0 ? 0 : std::min(queries.count, ring_.pending_cells());
  const u32 kept = queries.rows.heads == 0 ? 0 : revocable ? queries.count : fit;
  const bool remembers = ring_.shape().cells != 0 && kept != 0;
  if (remembers) {
    ring_.push(layer_index, queries, kept, step.observed);
    step.remembered += kept;
  }
  if (revocable && options_.accumulate_mass && queries.lse != nullptr) {
    for (u32 head = 0; head < query_heads(); ++head) {
      std::copy_n(queries.lse + std::size_t{head} * queries.count, queries.count,
                  pending_lse(layer_index, head) + step.observed);
    }
  }
  step.has_lse = step.has_lse && queries.lse != nullptr;
  step.observed += queries.count;
  step.settled = !revocable;
  return StatusCode::ok;
}

KVLEAN_NAMESPACE_END
