// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string_view>
#include <variant>

#include "kvlean/policy/papers.hpp"
#include "kvlean/reduce/d2o.hpp"
#include "kvlean/reduce/massfold.hpp"
#include "kvlean/score/external.hpp"
#include "kvlean/score/observed_attention.hpp"

KVLEAN_NAMESPACE_BEGIN

/// Every stage the library ships, for choosing at run time.
using AnyScorer =
    std::variant<H2OScorer, SnapKVScorer, StreamingLLMScorer, TOVAScorer, KeyNormScorer,
                 KeyDiffScorer, RandomScorer, ObservedAttentionScorer, RKVScorer, ExternalScorer>;
using AnyAllocator = std::variant<UniformAllocator, AdaKVAllocator, AdaKVLayersAllocator,
                                  PyramidAllocator<>, PyramidAllocator<AdaKVAllocator>>;
using AnyReducer =
    std::variant<EvictReducer, KVMergerReducer, CaMReducer, D2OReducer, MassFoldReducer>;

/// A policy whose stages are chosen at run time, usually by make_policy(). Its stages are plain
/// values and can be edited: `std::get_if<SnapKVScorer>(&policy.scorer)`.
class AnyPolicy : public PolicyInterface<AnyPolicy> {
 public:
  AnyScorer scorer;
  AnyAllocator allocator;
  AnyReducer reducer;
  bool keeps_everything = false;

  /// Points into this object, which must stay where it is while the result is used.
  [[nodiscard]] PolicyStages stages() const noexcept {
    PolicyStages stages;
    stages.scorer = &scorer;
    stages.allocator = &allocator;
    stages.reducer = &reducer;
    stages.keeps_everything = keeps_everything;
    stages.score = [](const void* self, const CacheView& cache, const Observation& seen,
                      Context& context, Scores& scores) noexcept {
      return std::visit(
          [&](const auto& stage) noexcept { return stage.score(cache, seen, context, scores); },
          *static_cast<const AnyScorer*>(self));
    };
    stages.allocate = [](const void* self, std::span<LayerLimits> layers,
                         Context& context) noexcept {
      return std::visit([&](const auto& stage) noexcept { return stage.allocate(layers, context); },
                        *static_cast<const AnyAllocator*>(self));
    };
    stages.everything_fits = [](const void* self, std::span<const LayerLimits> layers,
                                const Context& context) noexcept {
      return std::visit(
          [&](const auto& stage) noexcept {
            return kvlean::everything_fits(stage, layers, context);
          },
          *static_cast<const AnyAllocator*>(self));
    };
    stages.reduce = [](const void* self, const CacheView& cache, const Scores& scores,
                       const u32* limit, Context& context, CompressionPlan& plan) noexcept {
      return std::visit(
          [&](const auto& stage) noexcept {
            return stage.reduce(cache, scores, limit, context, plan);
          },
          *static_cast<const AnyReducer*>(self));
    };
    stages.reduce_in_place = [](const void* self, CacheView& cache, const Scores& scores,
                                const u32* limit, Context& context, bool& done) noexcept {
      return std::visit(
          [&](const auto& stage) noexcept -> Status {
            if constexpr (FusedReducer<std::remove_cvref_t<decltype(stage)>>) {
              return stage.reduce_in_place(cache, scores, limit, context, done);
            }
            return StatusCode::ok;
          },
          *static_cast<const AnyReducer*>(self));
    };
    std::visit([&](const auto& stage) noexcept { read_reducer_traits(stage, stages); }, reducer);
    return stages;
  }
};

/// A row of the tables of names.
template <class Stage>
struct NamedStage {
  std::string_view name;
  std::string_view description;
  Stage stage;
};

/// Scorers by name, for the first part of SCORER+ALLOCATOR+REDUCER.
inline constexpr NamedStage<AnyScorer> scorer_names[] = {
    {"h2o", "attention accumulated over all queries seen", H2OScorer{}},
    {"snapkv", "attention of the last 32 queries, average-pooled over 5 tokens", SnapKVScorer{}},
    {"snapkv_wide", "the same, max-pooled over 31 tokens: keeps whole passages",
     SnapKVScorer{.kernel = 31, .pooling = Pooling::max}},
    {"streaming_llm", "sinks, then the newest", StreamingLLMScorer{}},
    {"tova", "attention of the last query, mean over all heads", TOVAScorer{}},
    {"knorm", "small key norm", KeyNormScorer{}},
    {"keydiff", "keys unlike the mean direction of all keys", KeyDiffScorer{}},
    {"random", "seeded random", RandomScorer{}},
    {"observed_attention", "mean attention per query that could see the token",
     ObservedAttentionScorer{}},
    {"rkv", "attention of the last 8 queries, less the similarity to other keys", RKVScorer{}},
    {"external", "scores that the caller supplies", ExternalScorer{}},
};

/// Allocators by name, for the second part.
inline constexpr NamedStage<AnyAllocator> allocator_names[] = {
    {"uniform", "the same for every head", UniformAllocator{}},
    {"adakv", "Ada-KV: one global cut over the heads of a layer, a fifth guaranteed",
     AdaKVAllocator{}},
    {"adakv_safe", "the same with three fifths guaranteed: for attention that moves on",
     AdaKVAllocator{.safeguard = 0.6f}},
    {"adakv_layers", "Ada-KV over the heads of all layers", AdaKVLayersAllocator{}},
    {"pyramid", "PyramidKV's layer schedule, totals exact", PyramidAllocator<>{}},
    {"pyramid_adakv", "PyramidKV's schedule over layers, Ada-KV within",
     PyramidAllocator<AdaKVAllocator>{}},
};

/// Reducers by name, for the third part.
inline constexpr NamedStage<AnyReducer> reducer_names[] = {
    {"evict", "drop the rest", EvictReducer{}},
    {"evict_half_recent", "drop the rest; half of the slots go to the newest",
     EvictReducer{.recent_share = 0.5f}},
    {"kvmerger", "KVMerger, exact slots, convex, no log mass", KVMergerReducer{}},
    {"kvmerger_mass", "the same with log(count) as log mass",
     KVMergerReducer{.log_mass = LogMass::log_count}},
    {"kvmerger_aligned", "kvmerger_mass with keys turned to the slot's position before they blend",
     KVMergerReducer{.log_mass = LogMass::log_count, .keys = MergedKeys::aligned}},
    {"kvmerger_pivot", "kvmerger_mass with keys left alone: the pivot's key stands for its set",
     KVMergerReducer{.log_mass = LogMass::log_count, .keys = MergedKeys::pivot}},
    {"kvmerger_threshold", "KVMerger, neighbours above cosine 0.75, at most the budget",
     KVMergerReducer{.form = KVMergerForm::threshold}},
    {"kvmerger_paper", "the same as printed: sigma 5, values times the set size",
     KVMergerReducer{.form = KVMergerForm::threshold,
                     .sigma = Sigma::fixed,
                     .values = ValueScale::paper_set_size}},
    {"cam", "CaM: values of dropped tokens into the next 32 kept ones, expected", CaMReducer{}},
    {"d2o", "D2O-style: key and value into the most similar kept token above a threshold",
     D2OReducer{}},
    {"massfold", "values into the most similar kept key by attention mass, with log mass",
     MassFoldReducer{}},
    {"massfold_sums", "the same with plain attention sums, whatever the number of observers",
     MassFoldReducer{.per_observer = false}},
};

/// A paper's policy by one name: the three stages it is composed of.
struct NamedPolicy {
  std::string_view name;
  std::string_view description;
  std::string_view composition;
};

/// Policies by one name.
inline constexpr NamedPolicy policy_names[] = {
    {"full", "every token: the reference", "streaming_llm+uniform+evict"},
    {"random", "random tokens beside the protected", "random+uniform+evict"},
    {"streaming_llm", "StreamingLLM: sinks and the newest", "streaming_llm+uniform+evict"},
    {"h2o", "H2O: heavy hitters and, for half of the budget, the newest",
     "h2o+uniform+evict_half_recent"},
    {"snapkv", "SnapKV: pooled attention of the last queries", "snapkv+uniform+evict"},
    {"tova", "TOVA: attention of the last query", "tova+uniform+evict"},
    {"knorm", "key norm", "knorm+uniform+evict"},
    {"keydiff", "KeyDiff: keys unlike the others", "keydiff+uniform+evict"},
    {"observed_attention", "mean attention per observer", "observed_attention+uniform+evict"},
    {"rkv", "R-KV: important and not redundant, for long reasoning", "rkv+uniform+evict"},
    {"pyramidkv", "PyramidKV: SnapKV with falling layer budgets", "snapkv+pyramid+evict"},
    {"adakv", "Ada-SnapKV: SnapKV with budgets per head", "snapkv+adakv+evict"},
    {"cam", "CaM over StreamingLLM", "streaming_llm+uniform+cam"},
    {"kvmerger", "KVMerger, exact slots", "h2o+uniform+kvmerger"},
    {"kvmerger_mass", "KVMerger with log(count) as log mass", "h2o+uniform+kvmerger_mass"},
    {"kvmerger_aligned", "KVMerger with log(count) and keys aligned before they blend",
     "h2o+uniform+kvmerger_aligned"},
    {"kvmerger_pivot", "KVMerger with log(count) and the pivots' keys",
     "h2o+uniform+kvmerger_pivot"},
    {"kvmerger_threshold", "KVMerger, threshold form", "h2o+uniform+kvmerger_threshold"},
    {"kvmerger_paper", "KVMerger as printed", "h2o+uniform+kvmerger_paper"},
    {"d2o", "D2O-style merging over H2O scores", "h2o+uniform+d2o"},
    {"massfold", "mass-preserving fold over SnapKV scores", "snapkv+uniform+massfold"},
};

namespace detail {

template <class Stage, std::size_t count>
[[nodiscard]] bool find_stage(const NamedStage<Stage> (&names)[count], std::string_view name,
                              Stage& stage) noexcept {
  for (const NamedStage<Stage>& entry : names) {
    if (entry.name == name) {
      stage = entry.stage;
      return true;
    }
  }
  return false;
}

}  // namespace detail

/// Makes the policy that `name` says: a paper's name, or SCORER+ALLOCATOR+REDUCER. unknown_policy
/// leaves `policy` unchanged.
[[nodiscard]] inline Status make_policy(std::string_view name, AnyPolicy& policy) noexcept {
  std::string_view composition = name;
  for (const NamedPolicy& entry : policy_names) {
    if (entry.name == name) composition = entry.composition;
  }
  const std::size_t first = composition.find('+');
  if (first == std::string_view::npos) return StatusCode::unknown_policy;
  const std::size_t second = composition.find('+', first + 1);
  if (second == std::string_view::npos) return StatusCode::unknown_policy;
  AnyPolicy made;
  if (!detail::find_stage(scorer_names, composition.substr(0, first), made.scorer) ||
      !detail::find_stage(allocator_names, composition.substr(first + 1, second - first - 1),
                          made.allocator) ||
      !detail::find_stage(reducer_names, composition.substr(second + 1), made.reducer)) {
    return StatusCode::unknown_policy;
  }
  made.keeps_everything = name == "full";
  policy = made;
  return StatusCode::ok;
}

KVLEAN_NAMESPACE_END
