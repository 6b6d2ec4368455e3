#include "eval_plan.hpp"

#include <algorithm>

namespace kvlean::llama_cpp {
namespace {

/// A tensor that is nothing but a row description.
struct RowsView {
  Rows description;
  [[nodiscard]] Rows rows() const noexcept { return description; }
};

template <class T>
void store(const Ragged<T>& from, const Scores& scores, std::vector<T>& to) {
  to.clear();
  for (u32 s = 0; from && s < scores.segments; ++s) {
    to.insert(to.end(), from.segment(s), from.segment(s) + scores.length(s));
  }
}

template <class T>
void restore(const std::vector<T>& from, const Scores& scores, const Ragged<T>& to) noexcept {
  const T* next = from.data();
  for (u32 s = 0; !from.empty() && to && s < scores.segments; ++s) {
    std::copy_n(next, scores.length(s), to.segment(s));
    next += scores.length(s);
  }
}

}  // namespace

std::unique_ptr<Prefix> make_prefix(const FullRun& run, std::span<const std::size_t> layers,
                                    Mode mode, std::size_t tokens, RopePairing pairing) {
  auto prefix = std::make_unique<Prefix>();
  prefix->tokens = tokens;
  prefix->engine_layer.assign(layers.begin(), layers.end());
  prefix->ropes.reserve(layers.size());  // caches point at them
  for (const std::size_t l : layers) {
    const TappedLayer& layer = run.layers[l];
    RopeSpec& rope = prefix->ropes.emplace_back();
    rope.pairing = pairing;
    rope.theta = layer.rope_theta;
    rope.rotary_dims = static_cast<u32>(layer.rope_dims);
    KVCache cache(RowsView{rows_of(layer.k, 0, tokens)}, RowsView{rows_of(layer.v, 0, tokens)});
    const bool known = layer.rope_theta > 0.0 && !layer.rope_scaled;
    if (known && rope.check(static_cast<u32>(layer.k.dim))) {
      cache.set_rope(&rope);
    } else {
      cache.set_rope_pairing(pairing);
    }
    cache.set_origin({0, static_cast<u32>(l), 0});
    prefix->caches.push_back(cache.view());

    Observation seen;
    seen.attention.scale = static_cast<float>(layer.attention_scale);
    seen.attention.softcap = static_cast<float>(layer.logit_softcap);
    seen.reference = queries_of(layer.q, 0, tokens, 0);
    seen.window = seen.reference;
    seen.window.count = static_cast<u32>(std::min(window_queries, tokens));
    seen.window.first_row = static_cast<u32>(tokens) - seen.window.count;
    seen.window.first_position = static_cast<i32>(seen.window.first_row);
    const std::vector<float>& mass = run.mass[static_cast<std::size_t>(mode)][l];
    seen.mass = Ragged<const float>(mass.data(), tokens);
    seen.observers = static_cast<u32>(tokens);
    prefix->seen.push_back(seen);

    constexpr u64 f16_bytes = 2;
    prefix->bytes.push_back(
        {f16_bytes * (layer.k.dim + layer.v.dim), layer.k.heads, layer.k.heads * tokens});
  }
  return prefix;
}

bool find_policy(const std::string& name, EvalPolicy& policy) {
  // The benchmark streams `cam` token by token and calls the single merge `cam_oneshot`: here it is
  // always the latter, and records say so.
  const std::string known = name == "cam_oneshot" ? "cam" : name;
  EvalPolicy found;
  found.name = name == "cam" ? "cam_oneshot" : name;
  if (!make_policy(known, found.policy)) return false;
  std::string composition = known;
  for (const NamedPolicy& entry : policy_names) {
    if (entry.name == known) composition = entry.composition;
  }
  found.scorer = composition.substr(0, composition.find('+'));
  found.is_full = found.policy.keeps_everything;
  policy = std::move(found);
  return true;
}

Status Planner::remembered_score(const void* self, const CacheView& cache, const Observation& seen,
                                 kvlean::Context& context, Scores& scores) noexcept {
  Memory& memory = *static_cast<Memory*>(const_cast<void*>(self));  // NOLINT: ours, see plan()
  StoredScores& stored = memory.layers[context.layer - context.options.layer];
  if (stored.filled) {
    restore(stored.rank, scores, scores.rank);
    restore(stored.mass, scores, scores.mass);
    restore(stored.observers, scores, scores.observers);
    scores.has_mass = stored.has_mass;
    scores.mass_is_accumulated = stored.mass_is_accumulated;
    scores.has_observers = stored.has_observers;
    return StatusCode::ok;
  }
  const double start = processor_seconds();
  const PolicyStages stages = memory.policy.stages();
  KVLEAN_RETURN_IF_ERROR(stages.score(stages.scorer, cache, seen, context, scores));
  store(scores.rank, scores, stored.rank);
  store(scores.mass, scores, stored.mass);
  store(scores.observers, scores, stored.observers);
  stored.has_mass = scores.has_mass;
  stored.mass_is_accumulated = scores.mass_is_accumulated;
  stored.has_observers = scores.has_observers;
  stored.filled = true;
  memory.new_seconds += processor_seconds() - start;
  return StatusCode::ok;
}

Status Planner::plan_with(PolicyStages stages, double fraction,
                          std::vector<CompressionPlan>& plans) {
  PlanOptions options;
  options.protection = settings_.protection;
  options.seed = settings_.seed;
  options.num_layers = static_cast<u32>(prefix_.caches.size());
  const auto plan_once = [&](const Budget& budget) {
    workspace_.reset();
    plans.assign(prefix_.caches.size(), CompressionPlan{});
    return plan_layers(stages, std::span<const CacheView>(prefix_.caches),
                       std::span<const Observation>(prefix_.seen), budget, workspace_,
                       std::span<CompressionPlan>(plans), options);
  };
  const Budget budget = Budget::fraction(fraction);
  KVLEAN_RETURN_IF_ERROR(plan_once(budget));
  if (!settings_.equal_bytes) return StatusCode::ok;
  return bench::plan_equal_bytes(prefix_.bytes, budget.slots_for(static_cast<u32>(prefix_.tokens)),
                                 plans, [&](u32 slots) { return plan_once(Budget::slots(slots)); });
}

Status Planner::plan_directly(const EvalPolicy& policy, double fraction,
                              std::vector<CompressionPlan>& plans) {
  return plan_with(policy.policy.stages(), fraction, plans);
}

Status Planner::plan(const EvalPolicy& policy, double fraction,
                     std::vector<CompressionPlan>& plans) {
  const double start = processor_seconds();
  Memory& memory = memories_[policy.scorer];
  if (memory.layers.empty()) {
    memory.policy = policy.policy;
    memory.layers.resize(prefix_.caches.size());
  }
  const double remembered = memory.seconds;
  memory.new_seconds = 0.0;
  PolicyStages stages = policy.policy.stages();
  stages.scorer = &memory;
  stages.score = remembered_score;
  const Status status = plan_with(stages, fraction, plans);
  memory.seconds += memory.new_seconds;
  seconds_spent_ = processor_seconds() - start;
  seconds_ = seconds_spent_ + remembered;
  return status;
}

}  // namespace kvlean::llama_cpp
