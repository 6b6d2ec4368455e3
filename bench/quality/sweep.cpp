// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#include "bench/quality/sweep.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <mutex>
#include <numeric>
#include <thread>

#include "bench/io/plan_json.hpp"
#include "bench/quality/bytes.hpp"
#include "bench/quality/prepared.hpp"
#include "bench/quality/streaming.hpp"
#include "kvlean/attention/error_measures.hpp"
#include "kvlean/attention/merge_parts.hpp"

namespace kvlean::bench {
namespace {

/// What a thread reuses from job to job, so that no job pays for fresh memory.
struct Worker {
  Workspace workspace;
  std::vector<std::byte> storage;  ///< of the compressed cache
  std::vector<float> values;       ///< attention output of the future queries
  std::vector<float> lse;
  std::vector<float> part_values;  ///< the compressed prefix alone
  std::vector<float> part_lse;

  Worker() {
    // One large chunk from the start: a growing workspace would allocate again in every step.
    static_cast<void>(workspace.take<std::byte>(std::size_t{64} << 20));
    workspace.reset();
  }
};

/// Sums over the layers of one run.
struct Tally {
  std::vector<float> errors;  ///< of every layer, query head and future query
  double lost_mass = 0.0;     ///< sum over the same
  u64 slots = 0;
  u64 bytes_after = 0;
  u64 slots_evicted = 0;
  double seconds_plan = 0.0;
  double seconds_apply = 0.0;
};

LayerBytes bytes_of(const PreparedLayer& layer) {
  return {layer.row_bytes(), layer.prefix.segments, layer.prefix.total_length()};
}

/// The error of the future queries once the context is `compressed`: they attend to all of it and,
/// causally, to the uncompressed tail.
Status measure(const PreparedLayer& layer, const CacheView& compressed, Worker& worker,
               Tally& tally) {
  const AttentionShape& shape = layer.shape;
  worker.values = layer.tail_values;
  worker.lse = layer.tail_lse;
  worker.part_values.resize(worker.values.size());
  worker.part_lse.resize(worker.lse.size());
  const AttentionOutput whole{worker.values.data(), worker.lse.data()};
  const AttentionOutput part{worker.part_values.data(), worker.part_lse.data()};
  Queries future = layer.future;
  future.mask = Mask::none;
  KVLEAN_RETURN_IF_ERROR(attend(future, compressed, layer.spec, part));
  KVLEAN_RETURN_IF_ERROR(merge_parts(whole, part, shape));

  const ConstAttentionOutput reference{layer.reference_values.data(), layer.reference_lse.data()};
  const std::size_t first = tally.errors.size();
  tally.errors.resize(first + shape.rows());
  KVLEAN_RETURN_IF_ERROR(relative_error(whole, reference, shape, tally.errors.data() + first));
  KVLEAN_RETURN_IF_ERROR(lost_mass(whole.lse, reference.lse, shape.rows(), worker.part_lse.data()));
  for (const float lost : worker.part_lse) tally.lost_mass += static_cast<double>(lost);
  return StatusCode::ok;
}

/// Plans all layers together.
Status plan_all(const std::vector<PreparedLayer>& layers, const BenchPolicy& entry,
                const Budget& budget, const PlanOptions& options, Workspace& workspace,
                std::vector<CompressionPlan>& plans) {
  std::vector<CacheView> views;
  std::vector<Observation> seen;
  for (const PreparedLayer& layer : layers) {
    views.push_back(layer.prefix);
    seen.push_back(layer.seen);
    if (entry.reads_mass) {
      seen.back().mass = Ragged<const float>(layer.mass.data(), layer.prefix.uniform_length);
      seen.back().observers = layer.seen.reference.count;
    }
  }
  plans.assign(layers.size(), CompressionPlan{});
  return entry.policy.plan(std::span<const CacheView>(views), std::span<const Observation>(seen),
                           budget, workspace, std::span<CompressionPlan>(plans), options);
}

/// One policy once: plan, apply, measure.
Status run_planned(const std::vector<PreparedLayer>& layers, const BenchPolicy& entry,
                   const Budget& budget, const PlanOptions& options, bool equal_bytes,
                   Worker& worker, Tally& tally) {
  worker.workspace.reset();
  std::vector<CompressionPlan> plans;
  const Stopwatch plan_watch;
  KVLEAN_RETURN_IF_ERROR(plan_all(layers, entry, budget, options, worker.workspace, plans));
  tally.seconds_plan += plan_watch.seconds();
  if (equal_bytes) {
    std::vector<LayerBytes> bytes;
    for (const PreparedLayer& layer : layers) bytes.push_back(bytes_of(layer));
    KVLEAN_RETURN_IF_ERROR(plan_equal_bytes(
        bytes, budget.slots_for(layers.front().prefix.uniform_length), plans, [&](u32 slots) {
          worker.workspace.reset();
          return plan_all(layers, entry, Budget::slots(slots), options, worker.workspace, plans);
        }));
  }
  for (std::size_t l = 0; l < layers.size(); ++l) {
    const PreparedLayer& layer = layers[l];
    const CompressionPlan& plan = plans[l];
    const RaggedShape shape = ragged_shape(plan, layer.prefix);
    worker.storage.resize(std::max(worker.storage.size(), RaggedKVCache::bytes_required(shape)));
    RaggedKVCache compressed;
    KVLEAN_RETURN_IF_ERROR(compressed.bind(worker.storage, shape));
    const Stopwatch apply_watch;
    KVLEAN_RETURN_IF_ERROR(apply(plan, layer.prefix, compressed));
    tally.seconds_apply += apply_watch.seconds();
    KVLEAN_RETURN_IF_ERROR(measure(layer, compressed.view(), worker, tally));
    tally.slots += plan.num_slots();
    tally.bytes_after += bytes_of(layer).after(plan);
    for (u32 s = 0; plan.slots_evicted != nullptr && s < plan.segments; ++s) {
      tally.slots_evicted += plan.slots_evicted[s];
    }
    if (entry.reads_mass) tally.seconds_plan += layer.seconds_mass;
  }
  return StatusCode::ok;
}

Status run_streamed(const std::vector<PreparedLayer>& layers, const Budget& budget,
                    const PlanOptions& options, Worker& worker, Tally& tally) {
  worker.workspace.reset();
  for (const PreparedLayer& layer : layers) {
    const u32 slots = budget.slots_for(layer.prefix.uniform_length);
    RaggedKVCache compressed;
    StreamTimes times;
    KVLEAN_RETURN_IF_ERROR(stream_cam(layer, slots, options, worker.workspace, compressed, times));
    KVLEAN_RETURN_IF_ERROR(measure(layer, compressed.view(), worker, tally));
    tally.slots += compressed.total_length();
    tally.bytes_after += bytes_of(layer).after(compressed.total_length(), false);
    tally.seconds_plan += times.seconds_plan;
    tally.seconds_apply += times.seconds_apply;
  }
  return StatusCode::ok;
}

std::string reason(Status status, const std::vector<PreparedLayer>& layers, const Budget& budget,
                   const Protection& protection) {
  if (status.code() != StatusCode::budget_below_protected) return status.message();
  const u32 tokens = layers.front().prefix.uniform_length;
  return std::to_string(budget.slots_for(tokens)) + " slots a head are fewer than the " +
         std::to_string(protection.count(tokens, 0)) + " protected tokens";
}

Record run_job(const Input& input, const std::vector<PreparedLayer>& layers,
               const BenchPolicy& entry, double fraction, const SweepOptions& options,
               Worker& worker) {
  Record record;
  record.policy = entry.name;
  record.budget = fraction;
  record.input = input.name;
  record.tokens = layers.front().prefix.uniform_length;
  record.layers = layers.size();
  u64 tokens = 0;
  for (const PreparedLayer& layer : layers) {
    tokens += layer.prefix.total_length();
    record.bytes_before += bytes_of(layer).before();
  }
  const Budget budget = Budget::fraction(fraction);
  PlanOptions plan_options;
  plan_options.protection = options.protection;
  plan_options.num_layers = static_cast<u32>(layers.size());

  const u32 runs = entry.draws ? random_seeds : 1;
  for (u32 run = 0; run < runs; ++run) {
    plan_options.seed = options.seed + run;
    Tally tally;
    const Status status = entry.streams ? run_streamed(layers, budget, plan_options, worker, tally)
                                        : run_planned(layers, entry, budget, plan_options,
                                                      options.equal_bytes, worker, tally);
    ErrorSummary errors;
    if (status) {
      worker.workspace.reset();
      static_cast<void>(
          summarize(tally.errors.data(), tally.errors.size(), worker.workspace, errors));
    } else {
      record.skipped = reason(status, layers, budget, options.protection);
      return record;
    }
    const double share = 1.0 / runs;
    record.attention_error += share * errors.mean;
    record.attention_error_p95 += share * static_cast<double>(errors.p95);
    record.lost_mass += share * tally.lost_mass / static_cast<double>(tally.errors.size());
    record.seconds_plan += share * tally.seconds_plan;
    record.seconds_apply += share * tally.seconds_apply;
    record.slots = tally.slots;
    record.bytes_after = tally.bytes_after;
    record.slots_evicted = tally.slots_evicted;
  }
  if (entry.is_full) record.bytes_after = record.bytes_before;
  record.kept_fraction = static_cast<double>(record.slots) / static_cast<double>(tokens);
  record.compression_ratio =
      static_cast<double>(record.bytes_before) / static_cast<double>(record.bytes_after);
  return record;
}

void write_plans(const std::vector<PreparedLayer>& layers, const Input& input,
                 const SweepOptions& options, nlohmann::ordered_json& json) {
  for (const double fraction : options.budgets) {
    for (const BenchPolicy& entry : options.policies) {
      if (entry.streams) continue;  // many small plans, not one
      PlanOptions plan_options;
      plan_options.protection = options.protection;
      plan_options.num_layers = static_cast<u32>(layers.size());
      plan_options.seed = options.seed;
      Workspace workspace;
      std::vector<CompressionPlan> plans;
      if (!plan_all(layers, entry, Budget::fraction(fraction), plan_options, workspace, plans)) {
        continue;
      }
      json["input"] = input.name;
      json["policy"] = entry.name;
      json["budget"] = fraction;
      for (std::size_t l = 0; l < layers.size(); ++l) {
        nlohmann::ordered_json plan = io::plan_to_json(plans[l]);
        plan["layer"] = input.capture.layers[l].index;
        json["plans"].push_back(std::move(plan));
      }
      return;
    }
  }
}

struct NamedText {
  const char* name;
  const char* text;
};
// What a row of the sweep means, where that says more than the library's own description.
constexpr NamedText row_descriptions[] = {
    {"random", "random tokens beside the protected; mean of 5 seeds"},
    {"h2o",
     "attention summed over all context queries, in one shot; half of the slots to the newest"},
    {"snapkv",
     "attention of the last 32 queries, average-pooled over 5 tokens, mean over the group"},
    {"tova", "attention of the last query, mean over all query heads"},
    {"cam",
     "CaM token by token: sinks and the newest stay, values merge into the next 32, expected"},
    {"cam_oneshot", "CaM's merge once over the whole context"},
    {"kvmerger", "KVMerger, exact slots, kernel width mean_distance, convex, no log mass"},
    {"kvmerger_mass", "the same with log(count) as log mass"},
};

template <class Table>
std::string describe_stage(const Table& table, std::string_view name) {
  for (const auto& entry : table) {
    if (entry.name == name) return std::string(entry.description);
  }
  return std::string(name);
}

std::string describe(std::string_view name) {
  for (const NamedText& row : row_descriptions) {
    if (row.name == name) return row.text;
  }
  for (const NamedPolicy& entry : policy_names) {
    if (entry.name == name) return std::string(entry.description);
  }
  const std::size_t first = name.find('+');
  const std::size_t second = name.find('+', first + 1);
  return describe_stage(scorer_names, name.substr(0, first)) + " | " +
         describe_stage(allocator_names, name.substr(first + 1, second - first - 1)) + " | " +
         describe_stage(reducer_names, name.substr(second + 1));
}

}  // namespace

bool find_policy(const std::string& name, BenchPolicy& policy) {
  BenchPolicy found;
  found.name = name;
  const bool oneshot = name == "cam_oneshot";
  if (!make_policy(oneshot ? "cam" : std::string_view(name), found.policy)) return false;
  found.description = describe(name);
  found.is_full = name == "full";
  found.streams = name == "cam";
  const AnyScorer& scorer = found.policy.scorer;
  found.draws = std::holds_alternative<RandomScorer>(scorer);
  const bool sums_attention = std::holds_alternative<H2OScorer>(scorer) ||
                              std::holds_alternative<ObservedAttentionScorer>(scorer);
  const bool brings_mass =
      std::holds_alternative<SnapKVScorer>(scorer) || std::holds_alternative<TOVAScorer>(scorer);
  const bool wants_mass = found.policy.stages().wants_mass;
  found.reads_mass = sums_attention || (wants_mass && !brings_mass);
  policy = found;
  return true;
}

const std::vector<std::string>& headline_policies() {
  static const std::vector<std::string> names = {"random",
                                                 "streaming_llm",
                                                 "h2o",
                                                 "snapkv",
                                                 "cam",
                                                 "snapkv+adakv+evict",
                                                 "kvmerger",
                                                 "kvmerger_mass",
                                                 "h2o+adakv+evict",
                                                 "massfold",
                                                 "h2o+adakv+kvmerger"};
  return names;
}

const std::vector<std::string>& default_policies() {
  static const std::vector<std::string> names = {"full",
                                                 "random",
                                                 "streaming_llm",
                                                 "knorm",
                                                 "tova",
                                                 "h2o",
                                                 "h2o+uniform+evict",
                                                 "snapkv",
                                                 "pyramidkv",
                                                 "snapkv+adakv+evict",
                                                 "snapkv+adakv_layers+evict",
                                                 "h2o+adakv+evict",
                                                 "cam",
                                                 "cam_oneshot",
                                                 "d2o",
                                                 "kvmerger",
                                                 "kvmerger_mass",
                                                 "kvmerger_paper",
                                                 "h2o+adakv+kvmerger",
                                                 "massfold",
                                                 "snapkv+adakv+massfold"};
  return names;
}

void run_parallel(std::size_t count, u32 threads,
                  const std::function<void(std::size_t index)>& body) {
  std::atomic<std::size_t> next{0};
  const auto work = [&] {
    for (std::size_t i = next.fetch_add(1); i < count; i = next.fetch_add(1)) body(i);
  };
  const std::size_t helpers = std::min<std::size_t>(threads, count);
  std::vector<std::thread> pool;
  for (std::size_t i = 1; i < helpers; ++i) pool.emplace_back(work);
  work();
  for (std::thread& thread : pool) thread.join();
}

std::vector<Record> run_sweep(const Input& input, const SweepOptions& options,
                              const Progress& progress, nlohmann::ordered_json* plans) {
  const std::size_t policies = options.policies.size();
  const bool with_mass = std::any_of(options.policies.begin(), options.policies.end(),
                                     [](const BenchPolicy& entry) { return entry.reads_mass; });
  std::vector<PreparedLayer> layers(input.capture.layers.size());
  std::vector<Status> prepared(layers.size());
  run_parallel(layers.size(), options.threads, [&](std::size_t l) {
    prepared[l] = prepare_layer(input.capture, l, with_mass, layers[l]);
  });

  std::vector<Record> records(options.budgets.size() * policies);
  for (const Status status : prepared) {
    if (status) continue;
    for (std::size_t i = 0; i < records.size(); ++i) {
      records[i].policy = options.policies[i % policies].name;
      records[i].budget = options.budgets[i / policies];
      records[i].input = input.name;
      records[i].skipped = status.message();
    }
    return records;
  }
  if (plans != nullptr && plans->is_null()) write_plans(layers, input, options, *plans);

  // The longest jobs first, so that no thread is left with one at the end.
  std::vector<std::size_t> order(records.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  const auto cost = [&](std::size_t i) {
    const BenchPolicy& entry = options.policies[i % policies];
    return entry.streams ? 2 : entry.draws ? 1 : 0;
  };
  std::stable_sort(order.begin(), order.end(),
                   [&](std::size_t a, std::size_t b) { return cost(a) > cost(b); });

  std::mutex mutex;
  std::vector<std::unique_ptr<Worker>> idle;
  std::size_t done = 0;
  if (progress) progress(0, records.size());
  run_parallel(records.size(), options.threads, [&](std::size_t i) {
    std::unique_ptr<Worker> worker;
    {
      const std::lock_guard lock(mutex);
      if (!idle.empty()) {
        worker = std::move(idle.back());
        idle.pop_back();
      }
    }
    if (worker == nullptr) worker = std::make_unique<Worker>();
    const std::size_t job = order[i];
    records[job] = run_job(input, layers, options.policies[job % policies],
                           options.budgets[job / policies], options, *worker);
    const std::lock_guard lock(mutex);
    idle.push_back(std::move(worker));
    if (progress) progress(++done, records.size());
  });
  return records;
}

}  // namespace kvlean::bench
