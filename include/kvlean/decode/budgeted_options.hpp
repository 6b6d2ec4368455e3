// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>

#include "kvlean/apply/state.hpp"
#include "kvlean/core/budget.hpp"
#include "kvlean/core/ragged_kv_cache.hpp"
#include "kvlean/observe/observation.hpp"

KVLEAN_NAMESPACE_BEGIN

/// The model as a BudgetedCache sees it: layers of one shape.
struct BudgetedShape {
  std::size_t layers = 1;
  std::size_t kv_heads = 0;     ///< of a layer
  std::size_t query_heads = 0;  ///< of a layer, a multiple of kv_heads
  std::size_t key_dim = 0;      ///< elements
  std::size_t value_dim = 0;    ///< elements
  DType key_dtype = DType::f32;
  DType value_dtype = DType::f32;
};

/// What happens to positions when tokens leave.
enum class Positions : u8 {
  keep,        ///< tokens keep theirs; the next position is the number of tokens seen
  contiguous,  ///< gaps are closed and keys turned, so that a stream may outrun the model's context
};

/// States of its own that an engine may keep for each slot of a BudgetedCache.
inline constexpr u32 max_engine_states = 4;

/// How a BudgetedCache works. All counts are tokens.
struct BudgetedOptions {
  /// Slots per KV head, averaged over all heads of all layers, that a compression leaves.
  std::size_t budget_slots = 1024;
  /// Most tokens of one step: 1 for plain decoding, the chunk of a chunked prefill, the draft of
  /// speculative decoding.
  std::size_t step_tokens = 1;
  /// Committed tokens between compressions, once over the budget: heads hold at most
  /// budget_slots + compress_every - 1 on average after a commit.
  std::size_t compress_every = 1;
  /// Steps of at most this many tokens can be rolled back, in part too. Longer ones are observed as
  /// they are attended and can only be committed whole.
  std::size_t max_tentative = 0;
  /// Remembered queries of each head, the newest committed ones: what window scorers read. 0: none.
  std::size_t window = 32;
  DType query_dtype = DType::f32;  ///< of the remembered queries
  bool accumulate_mass = true;     ///< each slot carries the attention it received (H2O, CaM, ...)
  bool count_tokens = true;        ///< each slot carries the number of tokens it stands for
  bool log_mass = false;           ///< slots carry a logit bias: for reducers that write one
  GroupReduction group = GroupReduction::mean;     ///< of accumulated mass over a query group
  AttentionSpec attention = {};                    ///< of every layer
  const AttentionSpec* layer_attention = nullptr;  ///< [layers] instead, the caller's
  PlanOptions plan = {};                           ///< protection, sharing, executor, seed
  Positions positions = Positions::keep;
  const RopeSpec* rope = nullptr;  ///< the caller's; needed for contiguous positions
  /// Contiguous: close the gaps only when the next step would pass this position, 0: at every
  /// compression. Each turn of a key rounds it once, so f16 and bf16 caches should turn seldom.
  i32 context_tokens = 0;
  /// Room beyond what the budget and one step need, per KV head. It makes the rare move of whole
  /// heads rarer, when heads of different lengths grow.
  std::size_t spare_slots = 8;
  /// The engine's own states of each slot: how many, and how each moves when slots merge. The first
  /// one is what ExternalScorer reads.
  u32 engine_states = 0;
  MoveRule engine_rules[max_engine_states] = {};

  /// Slots beyond the budget that one KV head may need, on average.
  [[nodiscard]] constexpr std::size_t slack_slots() const noexcept {
    return compress_every - 1 + step_tokens + spare_slots;
  }
};

namespace detail {

/// Where a BudgetedCache keeps its states among those of its RaggedKVCache.
struct StatePlaces {
  u32 mass = 0;
  u32 observers = 0;
  u32 tokens = 0;
  u32 engine = 0;
  u32 count = 0;

  explicit StatePlaces(const BudgetedOptions& options) noexcept {
    if (options.accumulate_mass) {
      mass = count++;
      observers = count++;
    }
    if (options.count_tokens) tokens = count++;
    engine = count;
    count += options.engine_states;
  }
};

[[nodiscard]] inline Status check_budgeted(const BudgetedShape& shape,
                                           const BudgetedOptions& options) noexcept {
  constexpr std::size_t limit = std::numeric_limits<i32>::max() / 4;
  if (shape.layers == 0 || shape.kv_heads == 0 || shape.query_heads == 0) {
    return StatusCode::invalid_shape;
  }
  if (shape.layers > limit || shape.kv_heads > limit / shape.layers ||
      shape.query_heads > limit / shape.layers) {
    return StatusCode::invalid_shape;
  }
  if (shape.query_heads % shape.kv_heads != 0) return StatusCode::invalid_group;
  for (const std::size_t tokens : {options.budget_slots, options.step_tokens,
                                   options.compress_every, options.window, options.spare_slots}) {
    if (tokens > limit) return StatusCode::invalid_option;
  }
  const Protection& protection = options.plan.protection;
  if (options.step_tokens == 0 || options.compress_every == 0 ||
      options.max_tentative > options.step_tokens || options.engine_states > max_engine_states ||
      options.plan.sharing.kind == SharingKind::whole_pages || options.context_tokens < 0) {
    return StatusCode::invalid_option;
  }
  if (options.budget_slots < 1 ||
      options.budget_slots < std::size_t{protection.sinks} + protection.recent) {
    return StatusCode::budget_below_protected;
  }
  if (options.positions == Positions::contiguous) {
    if (options.rope == nullptr) return StatusCode::needs_rope;
    // Remembered queries must lie among tokens that all stay, so that all move alike.
    if (options.window > protection.recent) return StatusCode::invalid_option;
    const std::size_t most = options.budget_slots + options.slack_slots();
    if (options.context_tokens != 0 && static_cast<std::size_t>(options.context_tokens) < most) {
      return StatusCode::invalid_option;
    }
  }
  return options.rope != nullptr ? options.rope->check(static_cast<u32>(shape.key_dim)) : Status();
}

[[nodiscard]] inline RaggedShape ragged_shape_of(const BudgetedShape& shape,
                                                 const BudgetedOptions& options) noexcept {
  RaggedShape ragged;
  ragged.kv_heads = shape.layers * shape.kv_heads;
  ragged.key_dim = shape.key_dim;
  ragged.value_dim = shape.value_dim;
  ragged.key_dtype = shape.key_dtype;
  ragged.value_dtype = shape.value_dtype;
  ragged.total_slots = ragged.kv_heads * (options.budget_slots + options.slack_slots());
  ragged.log_mass = options.log_mass;
  ragged.layer_heads = static_cast<u32>(shape.kv_heads);
  ragged.state_arrays = StatePlaces(options).count;
  return ragged;
}

}  // namespace detail
KVLEAN_NAMESPACE_END
