#include "eval_run.hpp"

#include <algorithm>
#include <cmath>
#include <utility>

#include "bench/eval/metrics.hpp"
#include "bench/eval/random.hpp"
#include "kvlean/attention/error_measures.hpp"

namespace kvlean::llama_cpp {
namespace {

std::vector<llama_token> tokens_of(const llama_model* model, const std::string& text) {
  return tokenize(llama_model_get_vocab(model), text);
}

eval::AttentionError summary_of(const std::vector<float>& errors) {
  const std::vector<double> values(errors.begin(), errors.end());
  const eval::Distribution distribution = eval::summarise(values);
  return {distribution.mean, distribution.median, distribution.p95};
}

/// Rows [head][token] of one tensor as an attention output that is read.
ConstAttentionOutput output_of(const HeadRows& from, std::size_t first) {
  ConstAttentionOutput output;
  output.values = from.values.data() + first * from.dim;
  output.head_stride = static_cast<i64>(from.tokens * from.dim);
  output.query_stride = static_cast<i64>(from.dim);
  return output;
}

std::string number(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%g", value);
  return text;
}

std::string refusal(Status status, const Prefix& prefix, const Protection& protection,
                    double budget) {
  if (status.code() != StatusCode::budget_below_protected) return status.message();
  const u32 tokens = static_cast<u32>(prefix.tokens);
  return std::to_string(Budget::fraction(budget).slots_for(tokens)) +
         " slots a head are fewer than the " + std::to_string(protection.count(tokens, 0)) +
         " protected tokens";
}

}  // namespace

/// Queries of the full run, evenly spaced over what follows the prefix, and their outputs.
struct ItemRunner::OpenLoop {
  std::vector<i32> positions;
  std::vector<HeadRows> queries;    ///< [replaced layer]
  std::vector<HeadRows> reference;  ///< [replaced layer]

  OpenLoop(const FullRun& full, const Prefix& prefix, std::size_t count) {
    const std::size_t future = full.tokens - prefix.tokens;
    count = std::min(count, future);
    for (std::size_t i = 0; i < count; ++i) {
      positions.push_back(static_cast<i32>(prefix.tokens + (2 * i + 1) * future / (2 * count)));
    }
    const auto gather = [&](const HeadRows& from, std::size_t first) {
      HeadRows rows;
      rows.resize(from.heads, positions.size(), from.dim);
      for (std::size_t h = 0; h < from.heads; ++h) {
        for (std::size_t i = 0; i < positions.size(); ++i) {
          const float* row = from.row(h, static_cast<std::size_t>(positions[i]) - first);
          std::copy_n(row, from.dim, rows.row(h, i));
        }
      }
      return rows;
    };
    for (const std::size_t l : prefix.engine_layer) {
      if (count == 0) break;
      queries.push_back(gather(full.layers[l].q, 0));
      reference.push_back(gather(full.layers[l].output, full.output_from));
    }
  }
};

Result<EvalItem> tokenize_item(const llama_model* model, const eval::Item& item) {
  using R = Result<EvalItem>;
  const llama_vocab* vocab = llama_model_get_vocab(model);
  EvalItem result{item, {}};
  TokenizedItem& tokens = result.tokens;
  tokens.kind = item.kind;
  if (llama_vocab_get_add_bos(vocab)) tokens.prompt.push_back(llama_vocab_bos(vocab));
  const auto add = [](std::vector<llama_token>& to, const std::vector<llama_token>& more) {
    to.insert(to.end(), more.begin(), more.end());
  };
  add(tokens.prompt, tokens_of(model, item.context));
  tokens.context = tokens.prompt.size();
  add(tokens.prompt, tokens_of(model, item.question));
  if (tokens.prompt.size() < 2) return R::failure(item.id + ": the context is empty");
  switch (item.kind) {
    case eval::ItemKind::continuation:
      tokens.answer = tokens_of(model, item.answer);
      if (tokens.answer.empty()) return R::failure(item.id + ": there is nothing to predict");
      break;
    case eval::ItemKind::forced_choice:
      for (const std::string& candidate : item.candidates) {
        tokens.candidates.push_back(tokens_of(model, candidate));
        if (tokens.candidates.back().empty()) return R::failure(item.id + ": an empty candidate");
      }
      tokens.answer_index = item.answer_index;
      if (item.answer_index >= item.candidates.size()) {
        return R::failure(item.id + ": the answer is not among the candidates");
      }
      break;
    case eval::ItemKind::generation:
      tokens.max_new_tokens = item.max_new_tokens;
      tokens.one_line = item.exact_match;
      break;
  }
  return R::success(std::move(result));
}

Status load_plans(EvalEngine& engine, const Prefix& prefix, std::span<const CompressionPlan> plans,
                  DType cache_type, std::size_t room) {
  AttentionOverride& attention = engine.attention();
  attention.reset(engine.layers());
  for (std::size_t i = 0; i < plans.size(); ++i) {
    KVLEAN_RETURN_IF_ERROR(
        attention.replace(prefix.engine_layer[i])
            .load(plans[i], prefix.caches[i], cache_type, room, prefix.seen[i].attention));
  }
  return StatusCode::ok;
}

double largest_logit_error(const std::vector<float>& a, const std::vector<float>& b,
                           std::size_t vocabulary) {
  if (a.size() != b.size() || a.empty()) return INFINITY;
  double largest = 0.0;
  for (std::size_t row = 0; row < a.size(); row += vocabulary) {
    double difference = 0.0;
    double scale = 0.0;
    for (std::size_t i = row; i < row + vocabulary; ++i) {
      const double gap = std::abs(static_cast<double>(a[i]) - static_cast<double>(b[i]));
      difference = gap <= difference ? difference : gap;  // NaN shows
      scale = std::max(scale, std::abs(static_cast<double>(b[i])));
    }
    const double error = difference / std::max(scale, 1e-30);
    largest = error <= largest ? largest : error;
  }
  return largest;
}

eval::ItemRecord ItemRunner::record_of(const EvalItem& item, Mode mode, const std::string& policy,
                                       double budget) const {
  eval::ItemRecord record = settings_.base;
  eval::set_item(record, item.item);
  record.mode = mode_name(mode);
  record.policy = policy;
  record.budget = budget;
  record.context_tokens = item.tokens.prefix(mode);
  return record;
}

eval::ItemRecord ItemRunner::record_of(const EvalItem& item, Mode mode,
                                       const Yardstick& yardstick) const {
  eval::ItemRecord record = record_of(item, mode, yardstick.policy, 1.0);
  record.cache_type = yardstick.cache_type;
  return record;
}

std::vector<eval::ItemRecord> ItemRunner::settings_of(const EvalItem& item,
                                                      std::span<const Yardstick> yardsticks) const {
  std::vector<eval::ItemRecord> records;
  for (const Mode mode : modes_of(item)) {
    for (const EvalPolicy& policy : settings_.policies) {
      if (policy.is_full) records.push_back(record_of(item, mode, policy.name, 1.0));
    }
    for (const double budget : settings_.budgets) {
      for (const EvalPolicy& policy : settings_.policies) {
        if (!policy.is_full) records.push_back(record_of(item, mode, policy.name, budget));
      }
    }
  }
  const std::vector<Mode> modes = modes_of(item);
  for (const Yardstick& yardstick : yardsticks) {
    if (!modes.empty()) records.push_back(record_of(item, modes.front(), yardstick));
  }
  return records;
}

/// A question that is not there cannot be seen.
std::vector<Mode> ItemRunner::modes_of(const EvalItem& item) const {
  std::vector<Mode> modes;
  for (const Mode mode : settings_.modes) {
    if (mode == Mode::agnostic || item.tokens.has_question()) modes.push_back(mode);
  }
  return modes;
}

void ItemRunner::compare(const EvalItem& item, const Predictions& full, const Predictions& own,
                         eval::ItemRecord& record) const {
  const std::size_t vocabulary = engine_.vocabulary();
  const std::vector<llama_token>& expected = item.tokens.kind == eval::ItemKind::forced_choice
                                                 ? item.tokens.candidates[item.tokens.answer_index]
                                                 : item.tokens.answer;
  const std::size_t rows =
      std::min({expected.size(), full.logits.size() / vocabulary, own.logits.size() / vocabulary});
  for (std::size_t row = 0; row < rows; ++row) {
    const auto row_of = [&](const Predictions& from) {
      return std::span<const float>(from.logits).subspan(row * vocabulary, vocabulary);
    };
    record.add(
        eval::compare_logits(row_of(full), row_of(own), static_cast<std::size_t>(expected[row])));
  }
  if (item.tokens.kind == eval::ItemKind::forced_choice) {
    const eval::ChoiceScore mine = eval::score_choice(own.candidates, item.tokens.answer_index);
    const eval::ChoiceScore theirs = eval::score_choice(full.candidates, item.tokens.answer_index);
    record.score = mine.correct;
    record.score_full = theirs.correct;
    record.reciprocal_rank = mine.reciprocal_rank;
    record.reciprocal_rank_full = theirs.reciprocal_rank;
  } else if (item.tokens.kind == eval::ItemKind::generation) {
    record.score = eval::score_generation(item.item, own.output);
    record.score_full = eval::score_generation(item.item, full.output);
    record.output = own.output;
  }
}

Outcome ItemRunner::measure_open_loop(const FullRun& full, const Prefix& prefix,
                                      const OpenLoop& open_loop, eval::ItemRecord& record) {
  std::vector<float> errors;
  std::vector<float> values;
  const std::size_t future = full.tokens - prefix.tokens;
  for (std::size_t i = 0; i < open_loop.queries.size(); ++i) {
    const TappedLayer& layer = full.layers[prefix.engine_layer[i]];
    ReplacedLayer& replaced = engine_.attention().layer(prefix.engine_layer[i]);
    Status status = replaced.append(rows_of(layer.k, prefix.tokens, future),
                                    rows_of(layer.v, prefix.tokens, future), future, prefix.tokens);
    Queries queries = queries_of(open_loop.queries[i], 0, open_loop.positions.size(), 0);
    queries.positions = open_loop.positions.data();
    const AttentionShape shape = attention_shape(queries, replaced.view());
    values.resize(shape.rows() * shape.value_width);
    errors.resize(errors.size() + shape.rows());
    if (status) {
      status = attend(queries, replaced.view(), replaced.spec, AttentionOutput{values.data()});
    }
    if (status) {
      status = relative_error(AttentionOutput{values.data()}, output_of(open_loop.reference[i], 0),
                              shape, errors.data() + errors.size() - shape.rows());
    }
    if (status) status = replaced.rollback();
    if (!status) return Outcome{std::string("cannot measure: ") + status.message()};
  }
  if (!errors.empty()) record.attention_error_open = summary_of(errors);
  return Outcome{};
}

Outcome ItemRunner::run_setting(const EvalItem& item, const FullRun& full, const Prefix& prefix,
                                const OpenLoop& open_loop, std::span<const CompressionPlan> plans,
                                eval::ItemRecord& record) {
  u64 slots = 0;
  u64 tokens = 0;
  u64 before = 0;
  for (std::size_t i = 0; i < plans.size(); ++i) {
    slots += plans[i].num_slots();
    tokens += prefix.bytes[i].tokens;
    before += prefix.bytes[i].before();
    record.bytes += prefix.bytes[i].after(plans[i]);
  }
  if (record.policy == eval::policy_full) record.bytes = before;
  record.kept_fraction = static_cast<double>(slots) / static_cast<double>(tokens);
  record.compression_ratio = static_cast<double>(before) / static_cast<double>(record.bytes);

  const double apply_start = processor_seconds();
  const Status loaded = load_plans(engine_, prefix, plans, settings_.cache_type,
                                   item.tokens.positions() - prefix.tokens);
  if (!loaded) return Outcome{record.policy + ": " + loaded.message()};
  record.seconds_apply = processor_seconds() - apply_start;

  const double open_start = processor_seconds();
  if (Outcome measured = measure_open_loop(full, prefix, open_loop, record); !measured) {
    return measured;
  }
  totals_.open_loop += processor_seconds() - open_start;

  const double score_start = processor_seconds();
  std::vector<float> errors;
  Status compared = StatusCode::ok;
  engine_.after_block = [&](std::size_t first, std::size_t count) {
    if (first >= full.tokens) return;  // generated: the full run has no such token
    for (const std::size_t l : prefix.engine_layer) {
      const HeadRows& output = engine_.attention().output(l);
      const AttentionShape shape{static_cast<u32>(output.heads), static_cast<u32>(count),
                                 static_cast<u32>(output.dim)};
      errors.resize(errors.size() + shape.rows());
      const Status status = relative_error(
          output_of(output, 0), output_of(full.layers[l].output, first - full.output_from), shape,
          errors.data() + errors.size() - shape.rows());
      if (!status) compared = status;
    }
  };
  Predictions own;
  Outcome done = engine_.run_replaced(item.tokens, own);
  engine_.after_block = nullptr;
  if (!done) return done;
  if (!compared) return Outcome{std::string("cannot measure: ") + compared.message()};
  if (!errors.empty()) record.attention_error_closed = summary_of(errors);
  compare(item, full.predictions, own, record);
  record.seconds_score = processor_seconds() - score_start;
  totals_.apply += record.seconds_apply;
  totals_.score += record.seconds_score;
  ++totals_.settings;
  return Outcome{};
}

Outcome ItemRunner::run(const EvalItem& item, std::span<const Yardstick> yardsticks,
                        const IsWanted& is_wanted, const OnSetting& on_setting,
                        const TakeRecord& take, const OnRefusal& on_refusal) {
  FullRun full;
  if (Outcome done = engine_.run_full(item.tokens, full); !done) {
    return Outcome{item.item.id + ": " + done.error};
  }
  totals_.prefill += full.seconds;
  ++totals_.items;

  for (const Mode mode : modes_of(item)) {
    const std::size_t tokens = item.tokens.prefix(mode);
    engine_.begin_mode(tokens, false);
    const std::unique_ptr<Prefix> prefix =
        make_prefix(full, engine_.replaceable(), mode, tokens, pairing_);
    const OpenLoop open_loop(full, *prefix, settings_.open_loop_queries);
    PlanSettings own = settings_.plan;  // a policy that draws draws anew for every item
    own.seed = eval::Draws(own.seed, item.item.id).next();
    Planner planner(*prefix, own);
    const auto run_one = [&](const EvalPolicy& policy, double budget) -> Outcome {
      eval::ItemRecord record = record_of(item, mode, policy.name, budget);
      if (!is_wanted(record)) return Outcome{};
      on_setting(record);
      record.seconds_prefill = full.seconds;
      std::vector<CompressionPlan> plans;
      if (const Status status = planner.plan(policy, budget, plans); !status) {
        on_refusal(policy.name + " at budget " + number(budget) + ": " +
                   refusal(status, *prefix, settings_.plan.protection, budget));
        return Outcome{};
      }
      record.seconds_plan = planner.seconds();
      totals_.plan += planner.seconds_spent();
      if (Outcome done = run_setting(item, full, *prefix, open_loop, plans, record); !done) {
        return Outcome{item.item.id + ": " + done.error};
      }
      return take(record);
    };
    for (const EvalPolicy& policy : settings_.policies) {
      if (!policy.is_full) continue;
      if (Outcome done = run_one(policy, 1.0); !done) return done;
    }
    for (const double budget : settings_.budgets) {
      for (const EvalPolicy& policy : settings_.policies) {
        if (policy.is_full) continue;
        if (Outcome done = run_one(policy, budget); !done) return done;
      }
    }
  }

  const std::vector<Mode> modes = modes_of(item);
  for (const Yardstick& yardstick : yardsticks) {
    if (modes.empty()) break;
    // Yardsticks compress nothing, so all modes are the same.
    eval::ItemRecord record = record_of(item, modes.front(), yardstick);
    if (!is_wanted(record)) continue;
    on_setting(record);
    const double start = processor_seconds();
    Predictions own;
    if (Outcome done = yardstick.engine->run_plain(item.tokens, own); !done) {
      return Outcome{item.item.id + ": " + done.error};
    }
    compare(item, full.predictions, own, record);
    record.seconds_score = processor_seconds() - start;
    totals_.yardsticks += record.seconds_score;
    record.compression_ratio = yardstick.compression_ratio;
    u64 before = 0;
    for (const std::size_t l : engine_.replaceable()) {
      const TappedLayer& layer = full.layers[l];
      before += 2 * layer.k.heads * (layer.k.dim + layer.v.dim) * record.context_tokens;
    }
    record.bytes = static_cast<u64>(static_cast<double>(before) / yardstick.compression_ratio);
    if (Outcome taken = take(record); !taken) return taken;
  }
  return Outcome{};
}

Result<double> identity_error(EvalEngine& engine, const EvalItem& given, RopePairing pairing) {
  using R = Result<double>;
  // Some hundred tokens tell as much as thousands.
  const auto window = static_cast<std::size_t>(std::max(0, llama_model_n_swa(engine.model())));
  EvalItem item = given;
  item.tokens.prompt.resize(std::min(item.tokens.prompt.size(), window + 256));
  FullRun full;
  if (Outcome done = engine.run_full(item.tokens, full); !done) return R::failure(done.error);
  const std::size_t tokens = item.tokens.prefix(Mode::agnostic);
  engine.begin_mode(tokens, false);
  const auto prefix = make_prefix(full, engine.replaceable(), Mode::agnostic, tokens, pairing);
  EvalPolicy policy;
  if (!find_policy("full", policy)) return R::failure("there is no policy full");
  Planner planner(*prefix, {});
  std::vector<CompressionPlan> plans;
  Status status = planner.plan(policy, 1.0, plans);
  if (status) {
    status = load_plans(engine, *prefix, plans, DType::f32, item.tokens.positions() - tokens);
  }
  if (!status) return R::failure(status.message());
  Predictions own;
  if (Outcome done = engine.run_replaced(item.tokens, own); !done) return R::failure(done.error);
  if (item.tokens.kind == eval::ItemKind::generation) {
    return R::success(own.output == full.predictions.output ? 0.0 : 1.0);
  }
  return R::success(largest_logit_error(own.logits, full.predictions.logits, engine.vocabulary()));
}

Result<std::vector<CheckResult>> cross_check(EvalEngine& engine, const EvalItem& item,
                                             RopePairing pairing, double budget) {
  using R = Result<std::vector<CheckResult>>;
  if (item.tokens.kind == eval::ItemKind::generation) {
    return R::failure("generations cannot be cross-checked");
  }
  FullRun full;
  if (Outcome done = engine.run_full(item.tokens, full); !done) return R::failure(done.error);
  const std::size_t tokens = item.tokens.prefix(Mode::agnostic);
  engine.begin_mode(tokens, true);
  const auto prefix = make_prefix(full, engine.replaceable(), Mode::agnostic, tokens, pairing);
  Planner planner(*prefix, {});
  std::vector<CheckResult> results;
  struct Case {
    const char* policy;
    bool with_log_mass;  ///< invented: any log mass must mean the same on both sides
  };
  for (const Case& test : {Case{"full", false}, Case{"random", false}, Case{"snapkv", false},
                           Case{"snapkv+adakv+evict", false}, Case{"h2o+adakv_layers+evict", false},
                           Case{"random", true}, Case{"snapkv+adakv_layers+evict", true}}) {
    EvalPolicy policy;
    if (!find_policy(test.policy, policy)) return R::failure("unknown policy");
    std::vector<CompressionPlan> plans;
    Status status = planner.plan(policy, budget, plans);
    if (!status) {
      return R::failure(policy.name + ": " + refusal(status, *prefix, Protection{}, budget));
    }
    std::vector<std::vector<float>> masses(plans.size());
    engine.score_mask().reset(engine.layers());
    for (std::size_t i = 0; i < plans.size(); ++i) {
      CompressionPlan& plan = plans[i];
      if (test.with_log_mass) {
        masses[i].resize(static_cast<std::size_t>(plan.num_slots()));
        for (std::size_t slot = 0; slot < masses[i].size(); ++slot) {
          masses[i][slot] = 0.25f * static_cast<float>((slot * 7 + i) % 9);
        }
        plan.log_mass = masses[i].data();
        plan.needs |= needs_log_mass;
      }
      const std::size_t l = prefix->engine_layer[i];
      if (!engine.score_mask().mask(l, plan, tokens, full.layers[l].attention_scale)) {
        return R::failure(policy.name + " rewrites keys or values: no mask can say that");
      }
    }
    status = load_plans(engine, *prefix, plans, DType::f32, item.tokens.positions() - tokens);
    if (!status) return R::failure(status.message());
    Predictions replaced;
    Predictions masked;
    if (Outcome done = engine.run_replaced(item.tokens, replaced); !done) {
      return R::failure(done.error);
    }
    if (Outcome done = engine.run_masked(item.tokens, masked); !done) return R::failure(done.error);
    double error = largest_logit_error(replaced.logits, masked.logits, engine.vocabulary());
    for (std::size_t c = 0; c < masked.candidates.size(); ++c) {
      const double expected = masked.candidates[c].log_prob;
      error = std::max(error, std::abs(replaced.candidates[c].log_prob - expected) /
                                  std::max(1.0, std::abs(expected)));
    }
    results.push_back({policy.name + (test.with_log_mass ? " with log mass" : ""), error});
  }
  return R::success(std::move(results));
}

}  // namespace kvlean::llama_cpp
