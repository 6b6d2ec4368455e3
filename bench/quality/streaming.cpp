// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#include "bench/quality/streaming.hpp"

#include <vector>

#include "kvlean/observe/attention_mass.hpp"
#include "kvlean/policy/papers.hpp"

namespace kvlean::bench {
namespace {

/// Row `token` of every head, as the source of an append.
Rows row_at(const Rows& rows, u32 token) {
  Rows one = rows;
  one.data = row_address(rows, 0, token);
  one.tokens = 1;
  return one;
}

}  // namespace

Status stream_cam(const PreparedLayer& layer, u32 slots, const PlanOptions& options,
                  Workspace& workspace, RaggedKVCache& cache, StreamTimes& times) {
  const CacheView& source = layer.prefix;
  RaggedShape shape;
  shape.kv_heads = source.segments;
  shape.key_dim = source.keys.width;
  shape.value_dim = source.values.width;
  shape.key_dtype = source.keys.dtype;
  shape.value_dtype = source.values.dtype;
  shape.layout = RaggedLayout::fixed;
  shape.capacity_per_head = std::size_t{slots} + 1;  // the new token comes before the old one goes
  KVLEAN_RETURN_IF_ERROR(cache.allocate(shape));
  cache.set_rope_pairing(source.rope_pairing);
  cache.set_origin(source.origin);

  std::vector<float> mass(std::size_t{source.segments} * shape.capacity_per_head, 0.0f);
  const Ragged<float> mass_of_slots(mass.data(), shape.capacity_per_head);
  const CaMPolicy policy;
  Observation seen;
  seen.attention = layer.spec;
  seen.mass = mass_of_slots;
  PlanOptions step_options = options;
  for (u32 token = 0; token < source.uniform_length; ++token) {
    KVLEAN_RETURN_IF_ERROR(cache.append(row_at(source.keys, token), row_at(source.values, token), 1,
                                        static_cast<i32>(token)));
    for (u32 s = 0; s < source.segments; ++s) mass_of_slots(s, cache.length(s) - 1) = 0.0f;

    const Stopwatch plan_watch;
    Queries own = layer.seen.reference;
    own.first_row = token;
    own.count = 1;
    own.first_position = static_cast<i32>(token);
    KVLEAN_RETURN_IF_ERROR(accumulate_step(cache.view(), own, layer.spec, GroupReduction::mean,
                                           workspace, Executor{}, mass_of_slots));
    seen.window = own;
    seen.observers = token + 1;
    if (cache.length(0) <= slots) {
      times.seconds_plan += plan_watch.seconds();
      continue;
    }
    const WorkspaceScope scope(workspace);
    CompressionPlan plan;
    step_options.step = token;
    KVLEAN_RETURN_IF_ERROR(
        policy.plan(cache, seen, Budget::slots(slots), workspace, plan, step_options));
    times.seconds_plan += plan_watch.seconds();

    const Stopwatch apply_watch;
    KVLEAN_RETURN_IF_ERROR(apply_state(plan, mass_of_slots, MoveRule::anchor));
    KVLEAN_RETURN_IF_ERROR(apply(plan, cache, in_place));
    times.seconds_apply += apply_watch.seconds();
  }
  return StatusCode::ok;
}

}  // namespace kvlean::bench
