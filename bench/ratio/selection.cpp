// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
// Ada-KV's selection: head budgets from one cut over the layer, then the kept tokens in order.
#include <algorithm>
#include <functional>

#include "bench/ratio/layer.hpp"

namespace kvlean::ratio {

namespace {

constexpr double keep = 0.25;

/// The same selection with std::nth_element on copies of the values.
class NthElement {
 public:
  NthElement(u32 tokens, const Protection& protection, float safeguard)
      : tokens_(tokens), protection_(protection) {
    const u32 covered = protection.count(tokens, 0);
    nominal_ = Budget::fraction(keep).slots_for(tokens);
    safe_ = std::max(covered, static_cast<u32>(static_cast<float>(nominal_) * safeguard)) - covered;
    values_ = Buffer(std::size_t{kv_heads} * tokens * sizeof(float));
    rest_ = Buffer(std::size_t{kv_heads} * tokens * sizeof(float));
    kept_ = Buffer(std::size_t{kv_heads} * tokens * sizeof(u32));
    lengths_.resize(kv_heads);
    cut_.resize(kv_heads);
  }

  void run(const float* scores, const Executor& executor) {
    const u32 covered = protection_.count(tokens_, 0);
    const u32 count = tokens_ - covered;
    const u32 others = count - safe_;
    parallel_for(executor, kv_heads, [&](u32, u32 h) noexcept {
      float* values = values_.as<float>() + std::size_t{h} * tokens_;
      const float* head = scores + std::size_t{h} * tokens_ + protection_.sinks;
      std::copy_n(head, count, values);
      cut_[h] = nth(values, safe_, count);
      std::copy_n(values + safe_, others, rest_.as<float>() + std::size_t{h} * others);
    });
    const u32 shared = kv_heads * (nominal_ - covered - safe_);
    const float cut = nth(rest_.as<float>(), shared, kv_heads * others);
    parallel_for(executor, kv_heads, [&](u32, u32 h) noexcept {
      const float* head = scores + std::size_t{h} * tokens_;
      u32* kept = kept_.as<u32>() + std::size_t{h} * tokens_;
      const float least = std::min(cut, cut_[h]);
      const u32 recent = tokens_ - protection_.recent;
      u32 length = 0;
      for (u32 t = 0; t < tokens_; ++t) {
        kept[length] = t;
        length += static_cast<u32>(t < protection_.sinks || t >= recent || head[t] >= least);
      }
      lengths_[h] = length;
    });
  }

  [[nodiscard]] bool same_as(const CompressionPlan& plan) const {
    for (u32 h = 0; h < kv_heads; ++h) {
      const u32* kept = kept_.as<u32>() + std::size_t{h} * tokens_;
      if (plan.length[h] != lengths_[h] ||
          !std::equal(kept, kept + lengths_[h], plan.anchor + plan.first[h])) {
        return false;
      }
    }
    return true;
  }

 private:
  /// Moves the best `wanted` to the front; the least of them, or more than any if none is wanted.
  static float nth(float* values, u32 wanted, u32 count) noexcept {
    if (wanted == 0) return std::numeric_limits<float>::infinity();
    std::nth_element(values, values + wanted - 1, values + count, std::greater<>());
    return values[wanted - 1];
  }

  u32 tokens_;
  Protection protection_;
  u32 nominal_ = 0;
  u32 safe_ = 0;
  Buffer values_;
  Buffer rest_;
  Buffer kept_;
  std::vector<u32> lengths_;
  std::vector<float> cut_;
};

struct Selection {
  Layer layer;  ///< one copy: the scores decide, no key is read
  ScoreArrays arrays;
  ScoreArrays scored;
  Room room;
  NthElement nth;
  Executor executor;
  simd::Target target;

  Selection(const LayerShape& shape, const Setup& setup, std::size_t copies)
      : layer(shape, copies, false),
        arrays(kv_heads, shape.tokens),
        scored(kv_heads, shape.tokens),
        room(shape.tokens, setup.threads),
        nth(shape.tokens, Protection{}, AdaKVAllocator{}.safeguard),
        executor(setup.executor),
        target(scoring_target(shape.dtype)) {
    fill_mass(arrays.rank(), kv_heads, shape.tokens, 5);
    std::copy_n(arrays.rank(), std::size_t{kv_heads} * shape.tokens, arrays.mass());
    arrays.scores().has_mass = true;
  }

  Status select(CompressionPlan& plan) {
    const CacheView cache = layer.cache(0).view();
    const PlanOptions options = options_with(executor);
    Context context{room.workspace(), options, 0, 1};
    u32 limit[kv_heads];
    u32 floor[kv_heads];
    std::fill_n(limit, kv_heads, Budget::fraction(keep).slots_for(layer.shape().tokens));
    std::fill_n(floor, kv_heads, options.protection.count(layer.shape().tokens, 0));
    LayerLimits limits{&arrays.scores(), &cache, limit, floor};
    KVLEAN_RETURN_IF_ERROR(AdaKVAllocator{}.allocate({&limits, 1}, context));
    return EvictReducer{}.reduce(cache, arrays.scores(), limit, context, plan);
  }
  Status select() {
    const WorkspaceScope scope(room.workspace());
    CompressionPlan plan;
    return select(plan);
  }
  Verdict check() {
    const WorkspaceScope scope(room.workspace());
    CompressionPlan plan;
    Verdict verdict;
    nth.run(arrays.rank(), executor);
    verdict.good = select(plan).ok() && nth.same_as(plan);
    if (verdict.good) verdict.digest = digest_of(plan.anchor, plan.num_slots() * sizeof(u32));
    return verdict;
  }
  Status score(std::size_t copy) {
    const CacheView cache = layer.cache(copy).view();
    const PlanOptions options = options_with(executor);
    Context context{room.workspace(), options, 0, 1};
    Observation seen;
    seen.attention.target = target;
    seen.window = layer.asked();
    const WorkspaceScope scope(room.workspace());
    return SnapKVScorer{}.score(cache, seen, context, scored.scores());
  }
};

Experiment build(const Setup& setup, const std::vector<std::string>& wanted) {
  LayerShape shape;
  shape.tokens = setup.tokens();
  shape.dtype = DType::bf16;
  const bool scores = wants(wanted, "scoring");
  auto work = std::make_shared<Selection>(shape, setup, scores ? setup.copies(shape.bytes()) : 1);
  Experiment experiment;
  experiment.data = work;
  experiment.label = {
      isa_name(vector_target()), "f32",
      std::to_string(kv_heads) + " x " + std::to_string(shape.tokens) + " scores, keep 25 %",
      "scores"};
  Variant kernel{"select", [work](std::size_t) { return work->select(); }};
  kernel.bytes = 2.0 * kv_heads * shape.tokens * sizeof(float);
  experiment.variants.push_back(std::move(kernel));
  experiment.verify["select"] = [work] { return work->check(); };
  experiment.scratch_bytes["select"] = [work] { return work->room.workspace().high_water_bytes(); };
  if (wants(wanted, "nth_element")) {
    Variant nth{"nth_element", [work](std::size_t) {
                  work->nth.run(work->arrays.rank(), work->executor);
                  return Status();
                }};
    nth.bytes = 2.0 * kv_heads * shape.tokens * sizeof(float);
    experiment.variants.push_back(std::move(nth));
  }
  if (scores) {
    Variant scoring{"scoring", [work](std::size_t copy) { return work->score(copy); }};
    scoring.copies = work->layer.copies();
    scoring.bytes = static_cast<double>(shape.bytes());
    experiment.variants.push_back(std::move(scoring));
  }
  if (wants(wanted, "torch")) {
    setup.peers->load("adakv_selection",
                      {{"scores", work->arrays.rank(), DType::f32, {kv_heads, shape.tokens}}},
                      {{"keep", keep}, {"floor", 0.2}});
    Peers* peers = setup.peers;
    Variant torch{"torch", {}};
    torch.elsewhere = [peers] { return peers->run(); };
    experiment.variants.push_back(std::move(torch));
  }
  return experiment;
}

}  // namespace

void add_selection_groups(std::vector<Group>& groups) {
  groups.push_back(
      {{{"adakv_select_nth", "Ada-KV selection, 8 x 32768, against std::nth_element", "select",
         "nth_element", Better::higher, 5.0, none, needs_vectors},
        {"adakv_select_scoring", "Ada-KV selection as a share of SnapKV scoring (LSE not given)",
         "select", "scoring", Better::lower, none, 0.03, 0}},
       build});
  groups.push_back(
      {{{"adakv_select_torch", "Ada-KV selection, 8 x 32768, against the authors' form in torch",
         "select", "torch", Better::higher, 50.0, none, needs_torch}},
       build});
}

}  // namespace kvlean::ratio
