// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <memory>
#include <span>
#include <utility>
#include <variant>

#include "kvlean/attention/attend.hpp"
#include "kvlean/decode/budgeted_options.hpp"
#include "kvlean/decode/query_ring.hpp"
#include "kvlean/observe/attention_mass.hpp"
#include "kvlean/policy/policy.hpp"
#include "kvlean/reduce/d2o.hpp"

KVLEAN_NAMESPACE_BEGIN

/// What a BudgetedCache is, but for its policy: one sequence, all its layers, in one block of
/// memory whose size never changes. See BudgetedCache for the life of a step.
///
/// Every call that can fail checks first: on an error the cache is as it was. Calls that plan or
/// observe take scratch from the caller's workspace and leave it as they found it; one workspace
/// may serve many sequences, one at a time. Nothing here allocates but allocate(). The caller's
/// RoPE spec and attention specs must outlive the cache.
class BudgetedCacheBase {
 public:
  BudgetedCacheBase(const BudgetedCacheBase&) = delete;
  BudgetedCacheBase& operator=(const BudgetedCacheBase&) = delete;
  BudgetedCacheBase(BudgetedCacheBase&&) noexcept = default;
  BudgetedCacheBase& operator=(BudgetedCacheBase&& other) noexcept {
    swap(other);
    return *this;
  }
  virtual ~BudgetedCacheBase() = default;

  // ---- memory ----

  /// Bytes that bind() needs at any alignment: slots for the budget, one step and the tokens
  /// between compressions, remembered queries, states. 0 when shape or options are not valid.
  [[nodiscard]] static std::size_t bytes_required(const BudgetedShape& shape,
                                                  const BudgetedOptions& options) noexcept;
  /// Workspace bytes that any call but adopt() and save() takes at most with a shipped policy,
  /// while no head is longer than `longest_head` slots. 0: as long as one head that has all slots
  /// of its layer, the most that allocators within a layer give.
  [[nodiscard]] static std::size_t workspace_bytes_required(const BudgetedShape& shape,
                                                            const BudgetedOptions& options,
                                                            std::size_t longest_head = 0) noexcept;
  /// Lays the cache out in the caller's memory, empty. Errors: invalid_shape, invalid_group,
  /// row_too_wide, invalid_option (a zero step or interval, more tentative than step tokens, whole
  /// pages, a window above the protected recent tokens or a context below the slots when positions
  /// are contiguous), budget_below_protected, needs_rope, invalid_rope, null_pointer,
  /// destination_too_small.
  [[nodiscard]] Status bind(std::span<std::byte> storage, const BudgetedShape& shape,
                            const BudgetedOptions& options) noexcept;
  /// The same in memory of its own. Also out_of_memory.
  [[nodiscard]] Status allocate(const BudgetedShape& shape,
                                const BudgetedOptions& options) noexcept;
  /// Forgets everything but memory, shape and options: ready for the next sequence.
  void clear() noexcept;

  // ---- a step ----

  /// Appends `count` tokens to one layer: row i of head h of `keys` and `values` gets the next
  /// position + i. They are tentative until commit(). A layer may be appended to again before
  /// commit() (a draft, token by token) while the step stays within max_tentative. Errors:
  /// invalid_shape (unbound, no such layer), invalid_length (no token, or more than step_tokens in
  /// the step), invalid_option (a further append to a step that cannot be rolled back), those of
  /// RaggedKVCache::append; destination_too_small means that the policy does not keep to its
  /// budget.
  [[nodiscard]] Status append(u32 layer, const Rows& keys, const Rows& values, u32 count) noexcept;
  template <Tensor K, Tensor V>
  [[nodiscard]] Status append(u32 layer, const K& keys, const V& values, u32 count) noexcept {
    return append(layer, rows_of(keys), rows_of(values), count);
  }

  /// Attention of the layer's new queries over its slots, causal among the new tokens; see
  /// kvlean::attend. One query per appended token that was not attended yet; mask and positions of
  /// `queries` are not read. The attention is observed, as by observe(). Errors: as observe() and
  /// attend(); `output` may be written then.
  [[nodiscard]] Status attend(u32 layer, const Queries& queries, const AttentionOutput& output,
                              Workspace& workspace) noexcept;
  /// The same over a prefix that lies elsewhere, perhaps shared by several sequences, and this
  /// cache behind it: both parts are merged by their log-sum-exp, and mass is what the slots
  /// receive of the whole. Sink logits count once. See start_at(). Also null_pointer (no values),
  /// shape_mismatch (heads or widths of the prefix).
  [[nodiscard]] Status attend(u32 layer, const Queries& queries, const CacheView& prefix,
                              const AttentionOutput& output, Workspace& workspace) noexcept;

  /// For engines that attend with a kernel of their own: the layer's new queries, and in
  /// queries.lse the log-sum-exp if it is there. One query per appended token not observed yet.
  /// They are remembered, and what they pay is added to the slots: at commit(), or now if the step
  /// cannot be rolled back. Errors: invalid_shape, invalid_length (another number of queries),
  /// shape_mismatch (query heads or width), those of check_queries, workspace_too_small,
  /// out_of_memory. O(query heads * queries * slots * width) when mass is accumulated.
  [[nodiscard]] Status observe(u32 layer, const Queries& queries, Workspace& workspace) noexcept;
  /// For engines that have the attention mass itself: mass(head, slot) of the layer's slots, what
  /// they received from the new queries, reduced over the query group. Added now, so the step can
  /// only be committed whole. `queries` (optional) are remembered. Errors: as observe(),
  /// null_pointer, invalid_option (the cache keeps no mass; part of the step was observed before).
  [[nodiscard]] Status add_mass(u32 layer, Ragged<const float> mass, const Queries& queries,
                                Workspace& workspace) noexcept;

  /// Ends the step: keeps the first `accepted` of the tentative tokens, drops the rest as if they
  /// had never been, and compresses when it is due (see BudgetedOptions::compress_every). Layers
  /// must have appended alike, and either all or none have been observed. Without a workspace large
  /// enough, or with a policy that fails, nothing is committed. Errors: invalid_shape,
  /// invalid_length (more than were appended, or layers differ), invalid_option (part of a step
  /// that cannot be rolled back), those of the policy, renumber() and apply().
  [[nodiscard]] Status commit(u32 accepted, Workspace& workspace) noexcept;
  /// Keeps all tentative tokens.
  [[nodiscard]] Status commit(Workspace& workspace) noexcept {
    return commit(tentative(), workspace);
  }
  /// Drops all tentative tokens, whichever layers have them. Errors: invalid_option (a layer has
  /// added their attention already). O(heads).
  [[nodiscard]] Status rollback() noexcept;

  /// Compresses now, to budget_slots. Errors: as commit(); invalid_option (tentative tokens).
  [[nodiscard]] Status compress(Workspace& workspace) noexcept;

  // ---- other ways in and out ----

  /// Replaces the content by a compressed copy of what an engine holds, one view and one
  /// observation a layer, all planned together: policies for a whole prefill work on the whole
  /// prefill. Attention mass is taken over (seen.mass, or summed over seen.reference), and so are
  /// the last queries of seen.window. Layers must agree about their next position. Errors:
  /// shape_mismatch, destination_too_small, destination_overlaps, those of the policy, renumber()
  /// and apply().
  [[nodiscard]] Status adopt(std::span<const CacheView> layers, std::span<const Observation> seen,
                             Workspace& workspace) noexcept;

  /// The first `slots` slots of every head are never changed, dropped or merged into from now on.
  /// Errors: invalid_shape, invalid_option (tentative tokens), invalid_frozen (a head has fewer),
  /// budget_below_protected.
  [[nodiscard]] Status freeze(std::size_t slots) noexcept;
  /// The position of the first token, for a sequence behind a prefix that lies elsewhere. Errors:
  /// invalid_shape, invalid_option (not empty, or negative).
  [[nodiscard]] Status start_at(i32 position) noexcept;

  /// Bytes that save() writes at most. O(1).
  [[nodiscard]] std::size_t snapshot_bytes() const noexcept;
  /// Writes everything that the continuation depends on. Errors: invalid_shape, invalid_option
  /// (tentative tokens), those of kvlean::save, workspace_too_small, out_of_memory. O(bytes).
  [[nodiscard]] Status save(std::span<std::byte> out, std::size_t& written,
                            Workspace& workspace) noexcept;
  /// Takes over a saved sequence; shape and options must be those it was saved with, and the policy
  /// is the caller's to match. Then every later call has the same results, bit for bit. Errors:
  /// bad_snapshot, shape_mismatch, those of kvlean::restore. O(bytes).
  [[nodiscard]] Status restore(std::span<const std::byte> snapshot) noexcept;

  // ---- what there is ----

  [[nodiscard]] const BudgetedShape& shape() const noexcept { return shape_; }
  [[nodiscard]] const BudgetedOptions& options() const noexcept { return options_; }
  [[nodiscard]] u32 layers() const noexcept { return static_cast<u32>(shape_.layers); }
  /// One layer, tentative tokens included. Dead after the next commit(), compress() or restore().
  [[nodiscard]] CacheView layer(u32 index) const noexcept;
  /// What the policy is shown of a layer. Dead as layer() is.
  [[nodiscard]] Observation seen(u32 layer) const noexcept;
  [[nodiscard]] u32 length(u32 layer, u32 head) const noexcept {
    return cache_.length(layer * kv_heads() + head);
  }
  /// Slots of all heads of all layers.
  [[nodiscard]] std::size_t total_slots() const noexcept { return cache_.total_length(); }
  /// The largest total_slots() after a compression.
  [[nodiscard]] std::size_t total_budget() const noexcept {
    return cache_.num_kv_heads() * options_.budget_slots;
  }
  /// Position of the next token to append after the committed ones.
  [[nodiscard]] i32 next_position() const noexcept { return next_; }
  /// Tokens committed or adopted since the beginning.
  [[nodiscard]] u64 tokens_seen() const noexcept { return tokens_seen_; }
  /// Tokens of the current step; the most of any layer.
  [[nodiscard]] u32 tentative() const noexcept {
    u32 most = 0;
    for (const Step& step : steps()) most = std::max(most, step.appended);
    return most;
  }
  [[nodiscard]] u32 compressions() const noexcept { return compressions_; }
  /// Bytes of K, V, positions, log mass and states in use.
  [[nodiscard]] std::size_t bytes_used() const noexcept { return cache_.bytes_used(); }
  /// Attention that each slot of a layer received, (head, slot); null without accumulate_mass.
  [[nodiscard]] Ragged<float> mass(u32 layer) const noexcept {
    return options_.accumulate_mass ? state(places_.mass, layer) : Ragged<float>();
  }
  /// Queries that mass() was summed over. Of a merged slot: those that its longest-seen member has
  /// met, because that is how long the slot as a whole has been receiving.
  [[nodiscard]] Ragged<float> observers(u32 layer) const noexcept {
    return options_.accumulate_mass ? state(places_.observers, layer) : Ragged<float>();
  }
  /// Tokens that each slot stands for; null without count_tokens.
  [[nodiscard]] Ragged<float> tokens(u32 layer) const noexcept {
    return options_.count_tokens ? state(places_.tokens, layer) : Ragged<float>();
  }
  /// The engine's own state `index`, zero for new tokens, the engine's to write; null if not there.
  [[nodiscard]] Ragged<float> engine_state(u32 index, u32 layer) const noexcept {
    return index < options_.engine_states ? state(places_.engine + index, layer) : Ragged<float>();
  }

 protected:
  BudgetedCacheBase() noexcept = default;

 private:
  /// How far the current step is in one layer.
  struct Step {
    u32 appended = 0;
    u32 observed = 0;      ///< appended tokens whose queries were seen
    u32 remembered = 0;    ///< of these, in the ring
    bool settled = false;  ///< their attention was added: no way back
    bool has_lse = true;

    [[nodiscard]] bool is_as_far_as(const Step& other) const noexcept {
      return appended == other.appended && observed == other.observed &&
             remembered == other.remembered && settled == other.settled;
    }
  };
  struct FreeBlock {
    void operator()(std::byte* block) const noexcept {
      ::operator delete (block, std::align_val_t{alignment});
    }
  };
  /// Attention mass and observers of all slots with those of the step added, in a workspace.
  struct NewMass {
    Ragged<float> mass;
    Ragged<float> observers;
  };
  /// Plans of all layers, and the views they are for.
  struct Planned {
    std::span<CacheView> views;
    std::span<Observation> seen;
    std::span<CompressionPlan> plans;
    u32* shares = nullptr;  ///< scratch of carry_state
  };
  /// Byte offsets of everything in the block.
  struct Places {
    std::size_t cache_bytes, rows, order, positions, lse, threshold, steps, bytes;
  };
  /// What is saved beside the slots and the queries.
  struct Saved;
  /// What the slots of a source of adopt() carry.
  struct Carried;

  static constexpr std::size_t alignment = 64;

  virtual Status plan(std::span<const CacheView> layers, std::span<const Observation> seen,
                      const Budget& budget, const PlanOptions& options, float* threshold,
                      u32 threshold_stride, Workspace& workspace,
                      std::span<CompressionPlan> plans) const noexcept = 0;

  [[nodiscard]] static detail::QueryRing::Shape ring_shape(const BudgetedShape& shape,
                                                           const BudgetedOptions& options) noexcept;
  [[nodiscard]] static Places places_of(const BudgetedShape& shape,
                                        const BudgetedOptions& options) noexcept;
  [[nodiscard]] static Status check(const BudgetedShape& shape,
                                    const BudgetedOptions& options) noexcept;
  void lay_out(std::byte* storage, const BudgetedShape& shape,
               const BudgetedOptions& options) noexcept;

  [[nodiscard]] bool is_bound() const noexcept { return cache_.num_kv_heads() != 0; }
  [[nodiscard]] u32 kv_heads() const noexcept { return static_cast<u32>(shape_.kv_heads); }
  [[nodiscard]] u32 segments() const noexcept { return static_cast<u32>(cache_.num_kv_heads()); }
  [[nodiscard]] u32 query_heads() const noexcept { return static_cast<u32>(shape_.query_heads); }
  [[nodiscard]] std::span<Step> steps() const noexcept {
    return {steps_, is_bound() ? shape_.layers : 0};
  }
  [[nodiscard]] const Executor& executor() const noexcept { return options_.plan.executor; }
  [[nodiscard]] const AttentionSpec& spec(u32 layer) const noexcept {
    return options_.layer_attention != nullptr ? options_.layer_attention[layer]
                                               : options_.attention;
  }
  [[nodiscard]] Ragged<float> state(u32 place, u32 layer) const noexcept {
    return cache_.state(place, layer * kv_heads());
  }
  [[nodiscard]] float* pending_lse(u32 layer, u32 head) const noexcept {
    return lse_ + (std::size_t{layer} * query_heads() + head) * options_.max_tentative;
  }

  [[nodiscard]] Status take_new_queries(u32 layer, Queries& queries) const noexcept;
  [[nodiscard]] Status record(u32 layer, const Queries& queries, Ragged<const float> mass,
                              Workspace& workspace) noexcept;
  [[nodiscard]] static Status add_observers(const CacheView& cache, const AttentionSpec& attention,
                                            const Queries& queries, Ragged<float> observers,
                                            Workspace& workspace) noexcept;
  [[nodiscard]] Status add_pending(u32 accepted, Workspace& workspace,
                                   NewMass& made) const noexcept;
  [[nodiscard]] Status settle(u32 accepted, bool force, Workspace& workspace) noexcept;
  [[nodiscard]] bool is_due(bool force) const noexcept;
  [[nodiscard]] bool outruns_context(i32 next) const noexcept;
  [[nodiscard]] Status take_plans(Workspace& workspace, Planned& planned) const noexcept;
  [[nodiscard]] Status plan_layers(i32 next, bool fresh, Workspace& workspace,
                                   Planned& planned) noexcept;
  void carry_states(const Planned& planned, u32 layer, Ragged<float> mass, Ragged<float> observers,
                    Ragged<float> tokens) const noexcept;
  void carry_out(const Planned& planned) noexcept;
  void move_queries(i64 shift) noexcept;
  void keep_room() noexcept;
  [[nodiscard]] Status check_sources(std::span<const CacheView> sources,
                                     std::span<const Observation> seen) const noexcept;
  [[nodiscard]] Status take_carried(const CacheView& source, Observation& known,
                                    Workspace& workspace, Carried& carried) const noexcept;
  void adopt_queries(std::span<const CacheView> sources,
                     std::span<const Observation> seen) noexcept;
  [[nodiscard]] std::size_t blob_bytes(u32 filled) const noexcept;

  void swap(BudgetedCacheBase& other) noexcept {
    std::swap(shape_, other.shape_);
    std::swap(options_, other.options_);
    std::swap(places_, other.places_);
    std::swap(cache_, other.cache_);
    std::swap(ring_, other.ring_);
    std::swap(owned_, other.owned_);
    std::swap(steps_, other.steps_);
    std::swap(lse_, other.lse_);
    std::swap(threshold_, other.threshold_);
    std::swap(next_, other.next_);
    std::swap(first_position_, other.first_position_);
    std::swap(tokens_seen_, other.tokens_seen_);
    std::swap(since_, other.since_);
    std::swap(compressions_, other.compressions_);
  }

  BudgetedShape shape_;
  BudgetedOptions options_;
  detail::StatePlaces places_{BudgetedOptions{}};
  RaggedKVCache cache_;
  detail::QueryRing ring_;
  std::unique_ptr<std::byte, FreeBlock> owned_;
  Step* steps_ = nullptr;       // [layers]
  float* lse_ = nullptr;        // [layers][query_heads][max_tentative]
  float* threshold_ = nullptr;  // [2][layers][kv_heads]: D2O's, now and after the plan
  i32 next_ = 0;
  i32 first_position_ = 0;
  u64 tokens_seen_ = 0;
  u32 since_ = 0;  // committed tokens since the last compression
  u32 compressions_ = 0;
};

namespace detail {

/// Gives D2O's running threshold a home, where the policy has that stage and the caller gave none.
inline void hold_threshold(D2OReducer& reducer, float* threshold, u32 stride) noexcept {
  if (reducer.threshold != nullptr || reducer.next_threshold != nullptr) return;
  reducer.threshold = reducer.next_threshold = threshold;
  reducer.threshold_stride = stride;
}
template <class... Stages>
void hold_threshold(std::variant<Stages...>& reducer, float* threshold, u32 stride) noexcept {
  if constexpr ((std::is_same_v<Stages, D2OReducer> || ...)) {
    if (auto* d2o = std::get_if<D2OReducer>(&reducer)) hold_threshold(*d2o, threshold, stride);
  }
}
template <class Reducer>
void hold_threshold(Reducer&, float*, u32) noexcept {}

}  // namespace detail

/// A cache that stays within its budget while tokens stream in: one sequence, all its layers. Any
/// policy serves, AnyPolicy too; it is a const value, and what it needs to remember (attention
/// mass, thresholds, the newest queries) is the cache's.
///
///   for each layer: append(layer, k, v, n);  attend(layer, q, output, workspace);
///   commit(workspace);          // all n, or commit(accepted, workspace) after speculation
///
/// Three regions: frozen | body | exact tail. New tokens are exact and tentative; only committed
/// ones are observed and compressed, the newest of them (Protection::recent) never. A prefill is
/// the same in chunks of step_tokens: the full cache never exists. For a batch make one object a
/// sequence and share the workspace; see commit_batch(). docs/decoding.md has the whole story.
template <class P>
class BudgetedCache final : public BudgetedCacheBase {
 public:
  explicit BudgetedCache(const P& policy) noexcept : policy_(policy) {}

  [[nodiscard]] const P& policy() const noexcept { return policy_; }

 private:
  Status plan(std::span<const CacheView> layers, std::span<const Observation> seen,
              const Budget& budget, const PlanOptions& options, float* threshold,
              u32 threshold_stride, Workspace& workspace,
              std::span<CompressionPlan> plans) const noexcept override {
    P policy = policy_;
    if constexpr (requires { policy.reducer; }) {
      detail::hold_threshold(policy.reducer, threshold, threshold_stride);
    }
    return policy.plan(layers, seen, budget, workspace, plans, options);
  }

  P policy_;
};

KVLEAN_NAMESPACE_END

#include "kvlean/decode/budgeted_cache-inl.hpp"  // IWYU pragma: export
