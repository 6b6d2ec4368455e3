// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
// KVMerger over a layer, CaM while decoding.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "bench/ratio/floors.hpp"
#include "bench/ratio/oracle.hpp"

namespace kvlean::ratio {

namespace {

struct Merging {
  Layer layer;
  Layer untouched;
  Buffer mass;
  Room room;
  Executor executor;
  u32 threshold_slots = 0;
  u32 slot_form_slots = 0;
  std::vector<Buffer> survivors;

  Merging(const LayerShape& shape, const Setup& setup)
      : layer(shape, setup.copies(2 * shape.bytes()), true, true),
        untouched(shape, 1, true),
        mass(std::size_t{shape.heads} * shape.tokens * sizeof(float)),
        room(shape.tokens, setup.threads),
        executor(setup.executor) {
    fill_mass(mass.as<float>(), shape.heads, shape.tokens, 6);
  }

  [[nodiscard]] Observation seen() const {
    return observe_mass(Ragged<const float>(mass.as<float>(), u64{layer.shape().tokens}));
  }
  /// The threshold form takes what the keys give; heavy hitters and recent tokens are those of the
  /// paper's preset for one half.
  [[nodiscard]] static auto threshold_policy() {
    return compose(H2OScorer{}, UniformAllocator{},
                   KVMergerReducer{.form = KVMergerForm::threshold, .enforce_limit = false});
  }
  [[nodiscard]] static auto slot_policy() {
    return compose(H2OScorer{}, UniformAllocator{}, KVMergerReducer{});
  }
  template <class P>
  Status compress(const P& policy, std::size_t copy, u32* lengths) {
    std::fill_n(lengths, kv_heads, layer.shape().tokens);
    AnyCache cache = layer.cache(copy);
    cache.set_lengths(lengths);
    return policy.compress(cache, seen(), Budget::fraction(0.5), room.workspace(),
                           options_with(executor));
  }
  template <class P>
  Status plan_and_apply(const P& policy, std::size_t copy, u32* lengths) {
    std::fill_n(lengths, kv_heads, layer.shape().tokens);
    AnyCache cache = layer.cache(copy);
    cache.set_lengths(lengths);
    const WorkspaceScope scope(room.workspace());
    CompressionPlan plan;
    KVLEAN_RETURN_IF_ERROR(policy.plan(cache, seen(), Budget::fraction(0.5), room.workspace(), plan,
                                       options_with(executor)));
    return apply(plan, cache, in_place, executor);
  }

  template <class P>
  u32 slots_of(const P& policy) {
    u32 lengths[kv_heads];
    const bool good = compress(policy, 0, lengths).ok();
    layer.restore(0);
    u32 slots = 0;
    for (const u32 length : lengths) slots += good ? length : 0;
    return slots;
  }
  /// Against the plan carried out in double on the layer as it was.
  template <class P>
  Verdict check(const P& policy, bool fused) {
    Verdict verdict;
    verdict.bound = 2e-3;  // the rounding of f16, and one more where sums cancel
    verdict.error = HUGE_VAL;
    u32 lengths[kv_heads];
    const Status status = fused ? compress(policy, 0, lengths) : plan_and_apply(policy, 0, lengths);
    const WorkspaceScope scope(room.workspace());
    CompressionPlan plan;
    const AnyCache before = untouched.cache(0);
    AnyCache after = layer.cache(0);
    after.set_lengths(lengths);
    if (status.ok() && policy
                           .plan(before, seen(), Budget::fraction(0.5), room.workspace(), plan,
                                 options_with(executor))
                           .ok()) {
      verdict.error = plan_error(plan, before.view(), after.view(), nullptr);
    }
    verdict.good = verdict.error <= verdict.bound;
    verdict.digest = digest_of(layer.keys(0), layer.shape().bytes(),
                               digest_of(layer.values(0), layer.shape().bytes()));
    layer.restore(0);
    return verdict;
  }
};

/// Reads K and V, writes as many bytes as survive.
Variant merging_floor(const std::shared_ptr<Merging>& work, const char* label, u32 slots) {
  const std::size_t bytes = work->layer.shape().bytes();
  const std::size_t kept = std::size_t{slots} * dim * 2 * size_bytes(work->layer.shape().dtype);
  Variant floor{label, [work, bytes, kept](std::size_t copy) {
                  for (const void* rows : {work->layer.keys(copy), work->layer.values(copy)}) {
                    read_bytes({static_cast<const std::byte*>(rows), bytes}, work->executor);
                  }
                  write_bytes({work->survivors[copy].as<>(), kept}, work->executor);
                  return Status();
                }};
  floor.copies = work->layer.copies();
  floor.bytes = 2.0 * static_cast<double>(bytes) + static_cast<double>(kept);
  return floor;
}

template <class P>
void add_merging(Experiment& experiment, const std::shared_ptr<Merging>& work, const char* label,
                 const P& policy, bool fused, double bytes) {
  Variant kernel{label, [work, policy, fused](std::size_t copy) {
                   u32 lengths[kv_heads];
                   return fused ? work->compress(policy, copy, lengths)
                                : work->plan_and_apply(policy, copy, lengths);
                 }};
  kernel.restore = [work](std::size_t copy) { work->layer.restore(copy); };
  kernel.copies = work->layer.copies();
  kernel.bytes = bytes;
  experiment.variants.push_back(std::move(kernel));
  experiment.verify[label] = [work, policy, fused] { return work->check(policy, fused); };
  experiment.scratch_bytes[label] = [work] { return work->room.workspace().high_water_bytes(); };
}

Experiment build_kvmerger(const Setup& setup, const std::vector<std::string>&) {
  LayerShape shape;
  shape.tokens = setup.tokens();
  shape.keys = KeyData::runs;
  auto work = std::make_shared<Merging>(shape, setup);
  work->threshold_slots = work->slots_of(Merging::threshold_policy());
  work->slot_form_slots = work->slots_of(Merging::slot_policy());
  const std::size_t most = std::max(work->threshold_slots, work->slot_form_slots);
  for (std::size_t copy = 0; copy < work->layer.copies(); ++copy) {
    work->survivors.emplace_back(most * dim * 2 * size_bytes(shape.dtype));
  }
  Experiment experiment;
  experiment.data = work;
  const auto percent = [&shape](u32 slots) {
    return std::to_string(100ull * slots / (std::size_t{kv_heads} * shape.tokens));
  };
  const std::string isa = isa_name(vector_target());
  const std::string type = name(shape.dtype);
  experiment.label = {isa, type,
                      shape.text() + ", " + percent(work->threshold_slots) + " % survive", "flat"};
  experiment.labels["slot form"] = {
      isa, type, shape.text() + ", " + percent(work->slot_form_slots) + " % survive", "flat"};
  experiment.variants.push_back(
      merging_floor(work, "reading K, V, writing the survivors", work->threshold_slots));
  experiment.variants.push_back(
      merging_floor(work, "the same for the slot form", work->slot_form_slots));
  const double threshold_bytes = experiment.variants[0].bytes;
  const double slot_bytes = experiment.variants[1].bytes;
  add_merging(experiment, work, "compress", Merging::threshold_policy(), true, threshold_bytes);
  add_merging(experiment, work, "plan, apply", Merging::threshold_policy(), false, threshold_bytes);
  add_merging(experiment, work, "slot form", Merging::slot_policy(), true, slot_bytes);
  return experiment;
}

/// A cache over its budget by some tokens, CaM over H2O's choice.
struct Cam {
  Layer layer;
  Layer untouched;
  u32 slots;
  Buffer mass;
  Room room;
  Executor executor;
  std::vector<u32> first_moved;  ///< of each head: rows from here on move
  u32 receivers = 0;             ///< of all heads
  std::vector<Buffer> moved;

  Cam(const LayerShape& shape, const Setup& setup, u32 kept)
      : layer(shape, setup.copies(2 * shape.bytes()), true, true),
        untouched(shape, 1, true),
        slots(kept),
        mass(std::size_t{shape.heads} * shape.tokens * sizeof(float)),
        room(shape.tokens, setup.threads),
        executor(setup.executor) {
    fill_mass(mass.as<float>(), shape.heads, shape.tokens, 7);
    for (std::size_t copy = 0; copy < layer.copies(); ++copy) {
      moved.emplace_back(2 * shape.bytes());
    }
  }
  [[nodiscard]] static auto policy() {
    return compose(H2OScorer{}, UniformAllocator{}, CaMReducer{});
  }
  Status plan(const AnyCache& cache, CompressionPlan& made) {
    return policy().plan(
        cache, observe_mass(Ragged<const float>(mass.as<float>(), u64{layer.shape().tokens})),
        Budget::slots(slots), room.workspace(), made, options_with(executor));
  }
  Status step(std::size_t copy) {
    AnyCache cache = layer.cache(copy);
    return policy().compress(
        cache, observe_mass(Ragged<const float>(mass.as<float>(), u64{layer.shape().tokens})),
        Budget::slots(slots), room.workspace(), options_with(executor));
  }
  /// Which rows move and which receive, for the floor.
  void look_at_plan() {
    const WorkspaceScope scope(room.workspace());
    CompressionPlan made;
    if (!plan(layer.cache(0), made)) return;
    for (u32 s = 0; s < made.segments; ++s) {
      u32 j = 0;
      while (j < made.length[s] && made.anchor[made.first[s] + j] == j) ++j;
      first_moved.push_back(j);
      for (u32 i = 0; i < made.length[s]; ++i) {
        const u64 slot = made.first[s] + i;
        receivers += made.has_terms() && made.term_begin[slot] < made.term_end[slot] ? 1u : 0u;
      }
    }
  }
  /// memcpy of the rows that move, and reading the values that merge.
  void floor(std::size_t copy) {
    const LayerShape& shape = layer.shape();
    const std::size_t row = dim * size_bytes(shape.dtype);
    parallel_for(executor, kv_heads, [&](u32, u32 h) noexcept {
      for (u32 part = 0; part < 2; ++part) {
        const void* rows = part == 0 ? layer.keys(copy) : layer.values(copy);
        const std::byte* head =
            static_cast<const std::byte*>(rows) + std::size_t{h} * shape.tokens * row;
        std::byte* to =
            moved[copy].as<>() + part * shape.bytes() + std::size_t{h} * shape.tokens * row;
        std::memcpy(to, head + first_moved[h] * row, (slots - first_moved[h]) * row);
        if (part == 0) continue;
        read_bytes({head + slots * row, (shape.tokens - slots) * row}, {});
      }
    });
  }
  Verdict check() {
    Verdict verdict;
    // An element sums up to some hundred products and is rounded once to f16.
    verdict.bound = 2e-3;
    verdict.error = HUGE_VAL;
    const WorkspaceScope scope(room.workspace());
    CompressionPlan made;
    const AnyCache before = untouched.cache(0);
    if (plan(before, made).ok() && step(0).ok()) {
      AnyCache after = layer.cache(0);
      after.set_length(slots);
      verdict.error = plan_error(made, before.view(), after.view(), nullptr);
    }
    verdict.good = verdict.error <= verdict.bound;
    verdict.digest = digest_of(layer.keys(0), layer.shape().bytes(),
                               digest_of(layer.values(0), layer.shape().bytes()));
    layer.restore(0);
    return verdict;
  }
};

Experiment build_cam(const Setup& setup, u32 tokens, u32 slots) {
  LayerShape shape;
  shape.tokens = tokens;
  auto work = std::make_shared<Cam>(shape, setup, slots);
  work->look_at_plan();
  Experiment experiment;
  experiment.data = work;
  experiment.label = {isa_name(vector_target()), name(shape.dtype),
                      shape.text() + " to " + std::to_string(slots), "flat"};
  const double row = dim * 2.0;
  double bytes = kv_heads * (tokens - slots) * row + 2.0 * work->receivers * row;
  for (const u32 first : work->first_moved) bytes += 4.0 * (slots - first) * row;
  Variant floor{"memory floor", [work](std::size_t copy) {
                  work->floor(copy);
                  return Status();
                }};
  Variant step{"step", [work](std::size_t copy) { return work->step(copy); }};
  step.restore = [work](std::size_t copy) { work->layer.restore(copy); };
  floor.copies = step.copies = work->layer.copies();
  floor.bytes = step.bytes = bytes;
  experiment.variants.push_back(std::move(floor));
  experiment.variants.push_back(std::move(step));
  experiment.verify["step"] = [work] { return work->check(); };
  experiment.scratch_bytes["step"] = [work] { return work->room.workspace().high_water_bytes(); };
  return experiment;
}

}  // namespace

void add_merging_groups(std::vector<Group>& groups) {
  groups.push_back(
      {{{"kvmerger_fused", "KVMerger, threshold form, compress(), against the memory floor",
         "compress", "reading K, V, writing the survivors", Better::lower, 1.3, 1.05,
         needs_vectors},
        {"kvmerger_plan_apply", "the same as plan, then apply", "plan, apply",
         "reading K, V, writing the survivors", Better::lower, 1.5, 1.38, needs_vectors},
        {"kvmerger_slots", "KVMerger, slot form, keep 50 %, against its memory floor", "slot form",
         "the same for the slot form", Better::lower, 1.5, 1.38, needs_vectors}},
       build_kvmerger});
  groups.push_back(
      {{{"cam_step", "CaM, one decode step over a budget of 2048, against memory floor", "step",
         "memory floor", Better::lower, 1.5, 1.1, needs_vectors}},
       [](const Setup& setup, const std::vector<std::string>&) {
         return build_cam(setup, 2049, 2048);
       }});
  groups.push_back({{{"cam_512_steps", "CaM, 512 tokens over a budget of 2048 at once, the same",
                      "step", "memory floor", Better::lower, 1.5, 1.1, needs_vectors}},
                    [](const Setup& setup, const std::vector<std::string>&) {
                      return build_cam(setup, 2560, 2048);
                    }});
}

}  // namespace kvlean::ratio
