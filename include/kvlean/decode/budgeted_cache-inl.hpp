// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstring>
#include <limits>
#include <new>

#include "kvlean/apply/apply.hpp"
#include "kvlean/attention/merge_parts.hpp"
#include "kvlean/decode/budgeted_cache.hpp"
#include "kvlean/decode/carry_state.hpp"
#include "kvlean/policy/bytes_required.hpp"
#include "kvlean/score/observed_mass.hpp"

KVLEAN_NAMESPACE_BEGIN

// ---- memory
// --------------------------------------------------------------------------------------

inline detail::QueryRing::Shape BudgetedCacheBase::ring_shape(
    const BudgetedShape& shape, const BudgetedOptions& options) noexcept {
  detail::QueryRing::Shape ring;
  ring.layers = static_cast<u32>(shape.layers);
  ring.query_heads = static_cast<u32>(shape.query_heads);
  ring.width = static_cast<u32>(shape.key_dim);
  ring.window = static_cast<u32>(options.window);
  // Behind the window: a step that may be rolled back, or the newest queries of one that may not.
  const bool pends = options.window != 0 || options.accumulate_mass;
  const std::size_t newest = std::min(options.step_tokens, options.window);
  const std::size_t pending = pends ? std::max(options.max_tentative, newest) : 0;
  ring.cells = static_cast<u32>(options.window + pending);
  ring.dtype = options.query_dtype;
  return ring;
}

inline BudgetedCacheBase::Places BudgetedCacheBase::places_of(
    const BudgetedShape& shape, const BudgetedOptions& options) noexcept {
  std::size_t next = 0;
  const auto take = [&next](std::size_t size) noexcept {
    const std::size_t at = next;
    next = (next + size + alignment - 1) / alignment * alignment;
    return at;
  };
  const auto ring = ring_shape(shape, options);
  const std::size_t queries = options.accumulate_mass ? options.max_tentative : 0;
  Places places{};
  places.cache_bytes = RaggedKVCache::bytes_required(detail::ragged_shape_of(shape, options));
  take(places.cache_bytes);
  places.rows = take(ring.row_bytes());
  places.order = take(ring.cells * sizeof(u32));
  places.positions = take(ring.window * sizeof(i32));
  places.lse = take(shape.layers * shape.query_heads * queries * sizeof(float));
  places.threshold = take(2 * shape.layers * shape.kv_heads * sizeof(float));
  places.steps = take(shape.layers * sizeof(Step));
  places.bytes = next;
  return places;
}

inline Status BudgetedCacheBase::check(const BudgetedShape& shape,
                                       const BudgetedOptions& options) noexcept {
  KVLEAN_RETURN_IF_ERROR(detail::check_budgeted(shape, options));
  if (shape.key_dim > max_row_width || shape.value_dim > max_row_width) {
    return StatusCode::row_too_wide;
  }
  if (RaggedKVCache::bytes_required(detail::ragged_shape_of(shape, options)) == 0) {
    return StatusCode::invalid_shape;
  }
  const auto ring = ring_shape(shape, options);
  constexpr std::size_t limit = std::numeric_limits<std::size_t>::max() / 4;
  const std::size_t row = (std::size_t{ring.width} + 1) * sizeof(float) * ring.layers;
  return ring.cells == 0 || ring.query_heads <= limit / row / ring.cells
             ? StatusCode::ok
             : StatusCode::invalid_shape;
}

inline std::size_t BudgetedCacheBase::bytes_required(const BudgetedShape& shape,
                                                     const BudgetedOptions& options) noexcept {
  return check(shape, options) ? places_of(shape, options).bytes + alignment - 1 : 0;
}

inline std::size_t BudgetedCacheBase::workspace_bytes_required(const BudgetedShape& shape,
                                                               const BudgetedOptions& options,
                                                               std::size_t longest_head) noexcept {
  const std::size_t heads = shape.layers * shape.kv_heads;
  const std::size_t per_head = options.budget_slots + options.slack_slots();
  const std::size_t slots = heads * per_head;
  const std::size_t longest = longest_head != 0 ? longest_head : shape.kv_heads * per_head;
  PlanShape plan;
  plan.num_layers = shape.layers;
  plan.num_kv_heads = shape.kv_heads;
  plan.num_query_heads = shape.query_heads;
  plan.tokens = per_head;
  plan.key_dim = shape.key_dim;
  plan.workers = 1;
  PlanShape scratch = plan;  // without layers only what each worker needs is left
  scratch.num_layers = 0;
  scratch.tokens = longest;
  scratch.workers = std::max<std::size_t>(1, options.plan.executor.workers);
  // Views, observations and plans of the layers; new mass and observers, positions, shared terms.
  const std::size_t a_layer = sizeof(CacheView) + sizeof(Observation) + sizeof(CompressionPlan);
  const std::size_t queries = shape.query_heads * options.step_tokens;
  return plan_bytes_required(plan) + plan_bytes_required(scratch) + shape.layers * a_layer +
         slots * 4 * sizeof(float) + longest * sizeof(u32) + options.window * sizeof(i32) +
         queries * (shape.value_dim + 3) * sizeof(float) + 64 * Workspace::alignment;
}

inline void BudgetedCacheBase::lay_out(std::byte* storage, const BudgetedShape& shape,
                                       const BudgetedOptions& options) noexcept {
  const auto address = reinterpret_cast<std::uintptr_t>(storage);
  std::byte* base = storage + (alignment - address % alignment) % alignment;
  const Places places = places_of(shape, options);
  shape_ = shape;
  options_ = options;
  places_ = detail::StatePlaces(options);
  // Checked before, and the block is large enough. The cache's own alignment padding is part of
  // cache_bytes.
  static_cast<void>(
      cache_.bind({base, places.cache_bytes}, detail::ragged_shape_of(shape, options)));
  cache_.set_rope(options.rope);
  ring_ = detail::QueryRing(ring_shape(shape, options), base + places.rows,
                            reinterpret_cast<u32*>(base + places.order),
                            reinterpret_cast<i32*>(base + places.positions));
  lse_ = reinterpret_cast<float*>(base + places.lse);
  threshold_ = reinterpret_cast<float*>(base + places.threshold);
  steps_ = reinterpret_cast<Step*>(base + places.steps);
  for (std::size_t l = 0; l < shape.layers; ++l) new (steps_ + l) Step;
  clear();
}

inline Status BudgetedCacheBase::bind(std::span<std::byte> storage, const BudgetedShape& shape,
                                      const BudgetedOptions& options) noexcept {
  KVLEAN_RETURN_IF_ERROR(check(shape, options));
  if (storage.data() == nullptr) return StatusCode::null_pointer;
  if (storage.size() < bytes_required(shape, options)) return StatusCode::destination_too_small;
  lay_out(storage.data(), shape, options);
  owned_.reset();
  return StatusCode::ok;
}

inline Status BudgetedCacheBase::allocate(const BudgetedShape& shape,
                                          const BudgetedOptions& options) noexcept {
  KVLEAN_RETURN_IF_ERROR(check(shape, options));
  void* block =
      ::operator new (bytes_required(shape, options), std::align_val_t{alignment}, std::nothrow);
  if (block == nullptr) return StatusCode::out_of_memory;
  lay_out(static_cast<std::byte*>(block), shape, options);
  owned_.reset(static_cast<std::byte*>(block));
  return StatusCode::ok;
}

inline void BudgetedCacheBase::clear() noexcept {
  if (!is_bound()) return;
  cache_.clear();
  cache_.respace();
  ring_.go_to({});
  std::fill_n(threshold_, 2 * segments(), std::numeric_limits<float>::quiet_NaN());
  for (Step& step : steps()) step = {};
  next_ = first_position_ = 0;
  tokens_seen_ = 0;
  since_ = compressions_ = 0;
}

// ---- a step
// --------------------------------------------------------------------------------------

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
      kvlean::attend(mine, layer(layer_index), spec(layer_index), written, executor()));
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
  KVLEAN_RETURN_IF_ERROR(kvlean::attend(mine, prefix, without_sinks, part, executor()));
  KVLEAN_RETURN_IF_ERROR(kvlean::attend(mine, own, spec(layer_index), written, executor()));
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

// ---- commit
// --------------------------------------------------------------------------------------

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

// ---- compression
// ---------------------------------------------------------------------------------

inline Status BudgetedCacheBase::take_plans(Workspace& workspace, Planned& planned) const noexcept {
  CacheView* views = workspace.take<CacheView>(layers());
  Observation* seen_ = workspace.take<Observation>(layers());
  CompressionPlan* plans = workspace.take<CompressionPlan>(layers());
  if (views == nullptr || seen_ == nullptr || plans == nullptr) return workspace.exhausted();
  for (u32 l = 0; l < layers(); ++l) {
    new (views + l) CacheView(layer(l));
    // The schedule's place is in PlanOptions; draws count the layer once.
    views[l].origin.layer = cache_.origin().layer;
    new (seen_ + l) Observation(seen(l));
    new (plans + l) CompressionPlan();
  }
  planned.views = {views, layers()};
  planned.seen = {seen_, layers()};
  planned.plans = {plans, layers()};
  return StatusCode::ok;
}

/// Plans all layers and checks everything that carrying out needs, so that it cannot fail.
inline Status BudgetedCacheBase::plan_layers(i32 next, bool fresh, Workspace& workspace,
                                             Planned& planned) noexcept {
  PlanOptions options = options_.plan;
  if (!fresh) options.step += compressions_;
  // The policy updates a copy of the thresholds, which carry_out() takes over.
  float* threshold = threshold_ + segments();
  std::copy_n(threshold_, segments(), threshold);
  if (fresh) std::fill_n(threshold, segments(), std::numeric_limits<float>::quiet_NaN());
  KVLEAN_RETURN_IF_ERROR(plan(planned.views, planned.seen, Budget::slots(options_.budget_slots),
                              options, threshold, kv_heads(), workspace, planned.plans));
  u64 most_terms = 0;
  u64 slots = 0;
  u32 longest = 0;
  for (u32 l = 0; l < layers(); ++l) {
    const CompressionPlan& made = planned.plans[l];
    KVLEAN_RETURN_IF_ERROR(validate_plan(made, planned.views[l]));
    for (u32 s = 0; s < made.segments; ++s) longest = std::max(longest, made.length[s]);
    if (terms_are_shared(made)) most_terms = std::max(most_terms, made.num_terms);
    slots += made.num_slots();
  }
  if (slots > cache_.shape().total_slots) return StatusCode::destination_too_small;
  if (options_.positions == Positions::contiguous &&
      (options_.context_tokens == 0 || outruns_context(next))) {
    RenumberOptions renumbering;
    renumbering.sinks = options_.plan.protection.sinks;
    if (first_position_ != 0) {  // behind a prefix: all that is here moves, up to the prefix's end
      renumbering.sinks = 0;
      renumbering.next_position = first_position_ + static_cast<i32>(longest);
    }
    KVLEAN_RETURN_IF_ERROR(renumber(planned.plans, planned.views, workspace, renumbering));
  }
  planned.shares = workspace.take<u32>(most_terms);
  return planned.shares != nullptr ? StatusCode::ok : workspace.exhausted();
}

/// Takes the states of a layer through its plan.
inline void BudgetedCacheBase::carry_states(const Planned& planned, u32 layer_index,
                                            Ragged<float> mass_, Ragged<float> observers_,
                                            Ragged<float> tokens_) const noexcept {
  const CompressionPlan& made = planned.plans[layer_index];
  const auto carry = [&](Ragged<float> values, MoveRule rule) noexcept {
    // The plan is valid and the scratch is there: nothing is left that could fail.
    if (values) static_cast<void>(carry_state(made, values, rule, planned.shares));
  };
  carry(mass_, MoveRule::sum);
  carry(observers_, MoveRule::max);
  carry(tokens_, MoveRule::sum);
}

inline void BudgetedCacheBase::move_queries(i64 shift) noexcept {
  if (shift == 0) return;
  const u32 filled = ring_.place().filled;
  for (u32 l = 0; filled != 0 && l < layers(); ++l) {
    static_cast<void>(rotate_rows(ring_.rows(l), filled, *options_.rope, shift, executor()));
  }
  for (i32& position : ring_.positions()) position += static_cast<i32>(shift);
}

inline void BudgetedCacheBase::carry_out(const Planned& planned) noexcept {
  const i64 shift = query_shift(planned.plans[0], planned.views[0]);
  for (u32 l = 0; l < layers(); ++l) {
    carry_states(planned, l, mass(l), observers(l), tokens(l));
    for (u32 i = 0; i < options_.engine_states; ++i) {
      static_cast<void>(carry_state(planned.plans[l], engine_state(i, l), options_.engine_rules[i],
                                    planned.shares));
    }
    CacheView view = planned.views[l];
    static_cast<void>(apply(planned.plans[l], view, in_place, executor()));
  }
  move_queries(shift);
  next_ += static_cast<i32>(shift);
  cache_.set_next_position(next_);
  std::copy_n(threshold_ + segments(), segments(), threshold_);
  since_ = 0;
  ++compressions_;
}

inline Status BudgetedCacheBase::freeze(std::size_t slots) noexcept {
  if (!is_bound()) return StatusCode::invalid_shape;
  if (tentative() != 0) return StatusCode::invalid_option;
  for (u32 s = 0; s < segments(); ++s) {
    if (slots > cache_.length(s)) return StatusCode::invalid_frozen;
  }
  const Protection& protection = options_.plan.protection;
  if (std::max<std::size_t>(slots, protection.sinks) + protection.recent > options_.budget_slots) {
    return StatusCode::budget_below_protected;
  }
  cache_.set_frozen(slots);
  return StatusCode::ok;
}

inline Status BudgetedCacheBase::start_at(i32 position) noexcept {
  if (!is_bound()) return StatusCode::invalid_shape;
  if (position < 0 || tokens_seen_ != 0 || tentative() != 0) return StatusCode::invalid_option;
  next_ = first_position_ = position;
  cache_.set_next_position(position);
  return StatusCode::ok;
}

KVLEAN_NAMESPACE_END

#include "kvlean/decode/budgeted_adopt-inl.hpp"     // IWYU pragma: export
#include "kvlean/decode/budgeted_snapshot-inl.hpp"  // IWYU pragma: export
