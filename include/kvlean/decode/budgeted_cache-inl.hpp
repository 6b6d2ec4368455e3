// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <limits>
#include <new>

#include "kvlean/decode/budgeted_cache.hpp"
#include "kvlean/policy/bytes_required.hpp"

// The memory of BudgetedCache, and what a stream starts with.

KVLEAN_NAMESPACE_BEGIN

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
  // What attend() takes where it cuts long segments: 32 parts of each tile of few rows.
  const bool all_few = std::max(shape.key_dim, shape.value_dim) > 256;
  const std::size_t rows = all_few ? queries : shape.kv_heads * simd::few_rows;
  const std::size_t parts =
      scratch.workers == 1 ? 0
                           : rows * (128 * shape.value_dim + 512) + (queries + shape.kv_heads) * 64;
  return parts + plan_bytes_required(plan) + plan_bytes_required(scratch) + shape.layers * a_layer +
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
#include "kvlean/decode/budgeted_append-inl.hpp"    // IWYU pragma: export
#include "kvlean/decode/budgeted_commit-inl.hpp"    // IWYU pragma: export
#include "kvlean/decode/budgeted_compress-inl.hpp"  // IWYU pragma: export
#include "kvlean/decode/budgeted_snapshot-inl.hpp"  // IWYU pragma: export
