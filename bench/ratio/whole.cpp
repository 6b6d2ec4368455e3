// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
// One layer from scoring to turned keys, at several lengths, and what it leaves in memory.
#include <algorithm>
#include <cmath>

#include "bench/ratio/allocations.hpp"
#include "bench/ratio/floors.hpp"
#include "bench/ratio/oracle.hpp"

namespace kvlean::ratio {

namespace {

constexpr double keep = 0.25;

/// Scores, selects, compacts and turns one layer in place.
struct Whole {
  Layer layer;
  Room room;
  Executor executor;
  simd::Target target;
  RopeSpec rope;
  std::vector<float> lse;

  Whole(const LayerShape& shape, const Setup& setup)
      : layer(shape, setup.copies(2 * shape.bytes()), true, true),
        room(shape.tokens, setup.threads),
        executor(setup.executor),
        target(scoring_target(shape.dtype)) {
    rope.theta = 500000.0;
    lse.resize(std::size_t{query_heads} * window);
    const AttentionOutput only_lse{nullptr, lse.data()};
    if (!attend(layer.asked(), layer.cache(0), only_lse, executor)) lse.clear();
  }
  Status make_plan(const AnyCache& cache, bool with_lse, CompressionPlan& plan) {
    Observation seen;
    seen.attention.target = target;
    seen.window = layer.asked();
    if (with_lse) seen.window.lse = lse.data();
    const auto policy = compose(SnapKVScorer{}, UniformAllocator{}, EvictReducer{});
    KVLEAN_RETURN_IF_ERROR(policy.plan(cache, seen, Budget::fraction(keep), room.workspace(), plan,
                                       options_with(executor)));
    const CacheView view = cache.view();
    return renumber({&plan, 1}, {&view, 1}, room.workspace());
  }
  Status compress(std::size_t copy, bool with_lse) {
    AnyCache cache = layer.cache(copy);
    cache.set_rope(&rope);
    const WorkspaceScope scope(room.workspace());
    CompressionPlan plan;
    KVLEAN_RETURN_IF_ERROR(make_plan(cache, with_lse, plan));
    return apply(plan, cache, in_place, executor);
  }
  Verdict check(bool with_lse) {
    Verdict verdict;
    verdict.bound = 5e-3;  // turned keys are rounded to bf16
    verdict.error = HUGE_VAL;
    const WorkspaceScope scope(room.workspace());
    CompressionPlan plan;
    AnyCache cache = layer.cache(0);
    cache.set_rope(&rope);
    const LayerShape& shape = layer.shape();
    AnyCache before(
        tensor(const_cast<void*>(layer.first_keys()), shape.dtype, kv_heads, shape.tokens),
        tensor(const_cast<void*>(layer.first_values()), shape.dtype, kv_heads, shape.tokens));
    const bool done =
        make_plan(cache, with_lse, plan).ok() && apply(plan, cache, in_place, executor).ok();
    if (done) {
      verdict.error = plan_error(plan, before.view(), cache.view(), &rope);
      verdict.digest = digest_of(plan.anchor, plan.num_slots() * sizeof(u32));
      for (u32 h = 0; h < kv_heads; ++h) {
        verdict.digest = digest_of(row_address(cache.view().keys, h, 0),
                                   plan.length[h] * dim * size_bytes(shape.dtype), verdict.digest);
      }
    }
    verdict.good = verdict.error <= verdict.bound;
    layer.restore(0);
    return verdict;
  }
};

LayerShape whole_shape(u32 tokens) {
  LayerShape shape;
  shape.tokens = tokens;
  shape.dtype = DType::bf16;
  return shape;
}

Label label_of(const Whole& whole) {
  return {isa_name(whole.target), name(whole.layer.shape().dtype),
          whole.layer.shape().text() + ", keep 25 %", "flat"};
}

void add_whole(Experiment& experiment, const std::shared_ptr<Whole>& work, const char* label,
               bool with_lse) {
  const LayerShape& shape = work->layer.shape();
  Variant variant{label,
                  [work, with_lse](std::size_t copy) { return work->compress(copy, with_lse); }};
  variant.restore = [work](std::size_t copy) { work->layer.restore(copy); };
  variant.copies = work->layer.copies();
  variant.bytes = 2.0 * static_cast<double>(shape.bytes());
  variant.flops = 2.0 * dim * double{query_heads} * window * shape.tokens;
  experiment.variants.push_back(std::move(variant));
  experiment.verify[label] = [work, with_lse] { return work->check(with_lse); };
  experiment.scratch_bytes[label] = [work] { return work->room.workspace().high_water_bytes(); };
}

Experiment build_layer(const Setup& setup, const std::vector<std::string>& wanted) {
  auto work = std::make_shared<Whole>(whole_shape(setup.tokens()), setup);
  const LayerShape& shape = work->layer.shape();
  Experiment experiment;
  experiment.data = work;
  experiment.label = label_of(*work);
  add_whole(experiment, work, "layer", false);
  if (wants(wanted, "layer, LSE given")) add_whole(experiment, work, "layer, LSE given", true);
  if (wants(wanted, "reading K and V")) {
    Variant read{"reading K and V", [work](std::size_t copy) {
                   for (const void* rows : {work->layer.keys(copy), work->layer.values(copy)}) {
                     read_bytes({static_cast<const std::byte*>(rows), work->layer.shape().bytes()},
                                work->executor);
                   }
                   return Status();
                 }};
    read.copies = work->layer.copies();
    read.bytes = 2.0 * static_cast<double>(shape.bytes());
    experiment.variants.push_back(std::move(read));
  }
  if (wants(wanted, "torch")) {
    const std::vector<std::size_t> extents = {kv_heads, shape.tokens, dim};
    setup.peers->load(
        "snapkv_layer",
        {{"keys", work->layer.first_keys(), shape.dtype, extents},
         {"values", work->layer.first_values(), shape.dtype, extents},
         {"queries", work->layer.queries(), shape.dtype, {query_heads, window, dim}}},
        {{"window", window}, {"kernel", 5}, {"keep", keep}, {"theta", work->rope.theta}});
    Peers* peers = setup.peers;
    Variant torch{"torch", {}};
    torch.elsewhere = [peers] { return peers->run(); };
    experiment.variants.push_back(std::move(torch));
  }
  return experiment;
}

struct Lengths {
  std::vector<std::shared_ptr<Whole>> layers;
};

Experiment build_growth(const Setup& setup, const std::vector<std::string>& wanted) {
  auto work = std::make_shared<Lengths>();
  Experiment experiment;
  experiment.data = work;
  for (const auto& [label, tokens] :
       {std::pair{"4k tokens", 4096u}, std::pair{"32k tokens", 32768u},
        std::pair{"128k tokens", 131072u}}) {
    if (!wants(wanted, label)) continue;
    work->layers.push_back(std::make_shared<Whole>(whole_shape(tokens), setup));
    add_whole(experiment, work->layers.back(), label, false);
    experiment.labels[label] = label_of(*work->layers.back());
    experiment.units[label] = tokens;
  }
  return experiment;
}

// ---- counted, not timed
// --------------------------------------------------------------------------

/// Bytes that a compressed layer lies in, by those of its rows, positions and offsets.
double memory_ratio(const Setup& setup, Whole& whole) {
  static_cast<void>(setup);
  const WorkspaceScope scope(whole.room.workspace());
  CompressionPlan plan;
  AnyCache cache = whole.layer.cache(0);
  cache.set_rope(&whole.rope);
  RaggedKVCache small;
  if (!whole.make_plan(cache, false, plan) || !small.allocate(ragged_shape(plan, cache)) ||
      !apply(plan, cache, small)) {
    return none;
  }
  const double row = 2.0 * dim * static_cast<double>(size_bytes(whole.layer.shape().dtype));
  const double slots = static_cast<double>(plan.num_slots());
  const double least = slots * (row + sizeof(i32)) + kv_heads * sizeof(u64);
  return static_cast<double>(small.storage().size()) / least;
}

/// What hot calls take from the heap, once warm: a layer's compression by every route, decode steps
/// with append, accumulation, merging.
double hot_allocations(const Setup& setup, Whole& whole) {
  const u32 tokens = whole.layer.shape().tokens;
  Buffer mass(std::size_t{kv_heads} * tokens * sizeof(float));
  Buffer output(std::size_t{query_heads} * dim * sizeof(float));
  RaggedKVCache growing;
  RaggedShape shape = RaggedShape::fixed(kv_heads, dim, whole.layer.shape().dtype, tokens + 64);
  if (!growing.allocate(shape)) return none;
  Queries newest = whole.layer.asked();
  newest.count = 1;
  newest.first_row = window - 1;
  const PlanOptions options = options_with(setup.executor);
  Workspace& workspace = whole.room.workspace();
  const auto all = [&]() -> Status {
    KVLEAN_RETURN_IF_ERROR(whole.compress(0, false));
    whole.layer.restore(0);
    {
      const WorkspaceScope scope(workspace);
      CompressionPlan plan;
      KVLEAN_RETURN_IF_ERROR(
          whole.make_plan(whole.layer.cache(0).set_rope(&whole.rope), false, plan));
      KVLEAN_RETURN_IF_ERROR(
          apply(plan, whole.layer.cache(0).set_rope(&whole.rope), growing, setup.executor));
    }
    const Rows rows = tensor(whole.layer.keys(0), shape.key_dtype, kv_heads, tokens).rows();
    for (u32 i = 0; i < 8; ++i) {
      KVLEAN_RETURN_IF_ERROR(growing.append(rows, rows, 1, growing.next_position()));
      KVLEAN_RETURN_IF_ERROR(
          attend(newest, growing, AttentionOutput{output.as<float>(), nullptr}, setup.executor));
    }
    KVLEAN_RETURN_IF_ERROR(accumulate_attention(
        whole.layer.cache(0).view(), whole.layer.asked(), AttentionSpec{}, GroupReduction::mean,
        workspace, setup.executor, Ragged<float>(mass.as<float>(), u64{tokens})));
    const Observation seen = observe_mass(Ragged<const float>(mass.as<float>(), u64{tokens}));
    const auto merge = [&](const auto& policy) -> Status {
      u32 lengths[kv_heads];
      std::fill_n(lengths, kv_heads, tokens);
      AnyCache cache = whole.layer.cache(0);
      cache.set_lengths(lengths);
      return policy.compress(cache, seen, Budget::fraction(0.5), workspace, options);
    };
    KVLEAN_RETURN_IF_ERROR(merge(compose(H2OScorer{}, AdaKVAllocator{}, KVMergerReducer{})));
    whole.layer.restore(0);
    KVLEAN_RETURN_IF_ERROR(merge(compose(H2OScorer{}, UniformAllocator{}, CaMReducer{})));
    whole.layer.restore(0);
    return StatusCode::ok;
  };
  if (!all()) return none;
  const u64 before = allocations_so_far();
  const bool done = all().ok();
  const u64 after = allocations_so_far();
  return done ? static_cast<double>(after - before) : none;
}

Experiment build_counted(const Setup& setup, const std::vector<std::string>&) {
  auto work = std::make_shared<Whole>(whole_shape(4096), setup);
  Experiment experiment;
  experiment.data = work;
  experiment.label = label_of(*work);
  experiment.exact["memory_after"] = memory_ratio(setup, *work);
  experiment.exact["allocations_hot"] = hot_allocations(setup, *work);
  return experiment;
}

}  // namespace

void add_layer_groups(std::vector<Group>& groups) {
  groups.push_back({{{"layer_read", "one layer whole, bf16, keep 25 %, against one read of K and V",
                      "layer", "reading K and V", Better::lower, 6.0, 2.0, needs_matrix},
                     {"layer_read_lse", "the same with the LSE given", "layer, LSE given",
                      "reading K and V", Better::lower, none, 2.0, needs_matrix}},
                    build_layer});
  groups.push_back({{{"layer_torch", "one layer whole, against the torch pipeline (kvpress)",
                      "layer", "torch", Better::higher, 15.0, 60.0, needs_torch}},
                    build_layer});
  groups.push_back({{{"growth_32k", "one layer whole, a token of 32k against one of 4k",
                      "32k tokens", "4k tokens", Better::lower, 1.25, 1.0, needs_full},
                     {"growth_128k", "one layer whole, a token of 128k against one of 4k",
                      "128k tokens", "4k tokens", Better::lower, 1.25, 1.0, needs_full}},
                    build_growth});
}

void add_memory_groups(std::vector<Group>& groups) {
  groups.push_back(
      {{{"memory_after", "bytes after compression, by those of rows, positions and offsets",
         "bytes held", "bytes kept", Better::lower, 1.01, none, is_exact},
        {"allocations_hot", "heap allocations in hot calls", "allocations", "none", Better::lower,
         0.0, none, is_exact}},
       build_counted});
}

}  // namespace kvlean::ratio
