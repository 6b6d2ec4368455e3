// What the engine half of kvlean-eval promises, on a real model: KVLEAN_MODEL names it.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "bench/eval/metrics.hpp"
#include "bench/eval/texts.hpp"
#include "examples/llama_cpp/eval_model.hpp"
#include "examples/llama_cpp/eval_run.hpp"
#include "kvlean/observe/attention_mass.hpp"
#include "tests/support/catch.hpp"

using namespace kvlean;
using namespace kvlean::llama_cpp;

namespace {

constexpr std::size_t context_tokens = 300;
constexpr std::size_t answer_tokens = 12;

/// A loaded model and an engine with room for the items below.
struct Fixture {
  Model model;
  std::unique_ptr<EvalEngine> engine;
  RopePairing pairing = RopePairing::neox;
  std::vector<llama_token> tokens;  ///< of a text

  Fixture() {
    REQUIRE(start_engine("kvlean-tests-eval"));
    const char* path = std::getenv("KVLEAN_MODEL");
    REQUIRE(path != nullptr);
    const auto hash = file_sha256(path);
    REQUIRE(hash);
    const auto copy = float_copy(path, *hash);
    REQUIRE(copy);
    auto loaded = load_model(*copy);
    REQUIRE(loaded);
    model = std::move(*loaded);
    if (llama_model_rope_type(model.get()) == LLAMA_ROPE_TYPE_NORM) pairing = RopePairing::norm;
    EvalEngine::Options options;
    options.tokens = 512;
    options.branches = 3;
    auto opened = EvalEngine::open(model.get(), options);
    REQUIRE(opened);
    engine = std::move(*opened);
    REQUIRE(engine->find_layers());
    auto taken =
        take_tokens(model.get(), eval::builtin_texts().front().content, 0, context_tokens + 64);
    REQUIRE(taken);
    tokens = std::move(*taken);
  }

  [[nodiscard]] auto cut(std::size_t first, std::size_t count) const {
    const auto begin = tokens.begin() + static_cast<std::ptrdiff_t>(first);
    return std::vector<llama_token>(begin, begin + static_cast<std::ptrdiff_t>(count));
  }
  /// `question` tokens after the context, then the answer.
  [[nodiscard]] EvalItem continuation(std::size_t question) const {
    EvalItem item;
    item.item.id = "test";
    item.tokens.prompt = cut(0, context_tokens + question);
    item.tokens.context = context_tokens;
    item.tokens.answer = cut(context_tokens + question, answer_tokens);
    return item;
  }
};

Fixture& fixture() {
  static Fixture shared;
  return shared;
}

/// No model: nothing to test.
bool skipped() {
  if (std::getenv("KVLEAN_MODEL") != nullptr) return false;
  std::puts("skip  everything: KVLEAN_MODEL is not set");
  return true;
}

struct Planned {
  FullRun full;
  std::unique_ptr<Prefix> prefix;
};

std::unique_ptr<Planned> prepare(const EvalItem& item, Mode mode, bool keep_cells = false) {
  auto planned = std::make_unique<Planned>();
  REQUIRE(fixture().engine->run_full(item.tokens, planned->full));
  const std::size_t tokens = item.tokens.prefix(mode);
  fixture().engine->begin_mode(tokens, keep_cells);
  planned->prefix =
      make_prefix(planned->full, fixture().engine->replaceable(), mode, tokens, fixture().pairing);
  return planned;
}

Predictions run_policy(const EvalItem& item, const Planned& planned, const char* name,
                       double budget) {
  EvalPolicy policy;
  REQUIRE(find_policy(name, policy));
  Planner planner(*planned.prefix, {});
  std::vector<CompressionPlan> plans;
  REQUIRE(planner.plan(policy, budget, plans));
  REQUIRE(load_plans(*fixture().engine, *planned.prefix, plans, DType::f32,
                     item.tokens.positions() - planned.prefix->tokens));
  Predictions predictions;
  REQUIRE(fixture().engine->run_replaced(item.tokens, predictions));
  return predictions;
}

bool same_plan(const CompressionPlan& a, const CompressionPlan& b) {
  if (a.segments != b.segments || a.num_slots() != b.num_slots() || a.needs != b.needs ||
      a.num_terms != b.num_terms || (a.log_mass == nullptr) != (b.log_mass == nullptr)) {
    return false;
  }
  for (u64 slot = 0; slot < a.num_slots(); ++slot) {
    if (a.anchor[slot] != b.anchor[slot]) return false;
    if (a.log_mass != nullptr && a.log_mass[slot] != b.log_mass[slot]) return false;
  }
  for (u64 term = 0; term < a.num_terms; ++term) {
    if (a.term_token[term] != b.term_token[term] || a.term_weight[term] != b.term_weight[term]) {
      return false;
    }
  }
  return true;
}

}  // namespace

TEST_CASE("prefixes end before the last token of the prompt") {
  TokenizedItem item;
  item.prompt.assign(20, 1);
  item.context = 20;
  CHECK(item.prefix(Mode::agnostic) == 19);
  CHECK(item.prefix(Mode::aware) == 19);
  CHECK_FALSE(item.has_question());
  item.context = 12;
  CHECK(item.prefix(Mode::agnostic) == 12);
  CHECK(item.prefix(Mode::aware) == 19);
  CHECK(item.has_question());
}

TEST_CASE("a file's hash is SHA-256") {
  const std::string path = "kvlean-eval-hash-test.tmp";
  std::FILE* file = std::fopen(path.c_str(), "wb");
  REQUIRE(file != nullptr);
  std::fputs("abc", file);
  std::fclose(file);
  const auto hash = file_sha256(path);
  std::remove(path.c_str());
  REQUIRE(hash);
  CHECK(*hash == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  CHECK_FALSE(file_sha256("absent.tmp"));
}

TEST_CASE("a full copy gives the stock logits, again and again") {
  if (skipped()) return;
  for (const std::size_t question : {std::size_t{0}, std::size_t{9}}) {
    const EvalItem item = fixture().continuation(question);
    for (const Mode mode : {Mode::aware, Mode::agnostic}) {
      const auto planned = prepare(item, mode);
      const Predictions first = run_policy(item, *planned, "full", 1.0);
      const Predictions less = run_policy(item, *planned, "streaming_llm", 0.2);
      const Predictions again = run_policy(item, *planned, "full", 1.0);
      const std::size_t vocabulary = fixture().engine->vocabulary();
      CHECK(first.logits.size() == answer_tokens * vocabulary);
      const std::vector<float>& stock = planned->full.predictions.logits;
      CHECK(largest_logit_error(first.logits, stock, vocabulary) < 1e-4);
      CHECK(largest_logit_error(less.logits, stock, vocabulary) > 1e-3);
      CHECK(again.logits == first.logits);
    }
  }
}

TEST_CASE("remembered scores lead to the same plans") {
  if (skipped()) return;
  const auto planned = prepare(fixture().continuation(5), Mode::agnostic);
  for (const bool equal_bytes : {false, true}) {
    PlanSettings settings;
    settings.equal_bytes = equal_bytes;
    Planner remembering(*planned->prefix, settings);
    for (const double budget : {0.5, 0.2}) {
      for (const char* name :
           {"random", "h2o", "h2o+adakv+evict", "snapkv", "snapkv+adakv_layers+evict", "pyramidkv",
            "tova", "knorm", "observed_attention", "kvmerger_mass", "massfold", "d2o",
            "snapkv+adakv+massfold", "cam_oneshot"}) {
        EvalPolicy policy;
        REQUIRE(find_policy(name, policy));
        Planner fresh(*planned->prefix, settings);
        std::vector<CompressionPlan> expected;
        std::vector<CompressionPlan> plans;
        REQUIRE(fresh.plan_directly(policy, budget, expected));
        REQUIRE(remembering.plan(policy, budget, plans));
        bool same = plans.size() == expected.size();
        u64 bytes = 0;
        u64 allowed = 0;
        for (std::size_t i = 0; i < plans.size() && same; ++i) {
          same = same_plan(plans[i], expected[i]);
          const bench::LayerBytes& layer = planned->prefix->bytes[i];
          bytes += layer.after(plans[i]);
          const u32 slots =
              Budget::fraction(budget).slots_for(static_cast<u32>(planned->prefix->tokens));
          allowed += layer.after(slots * layer.segments, false);
        }
        INFO(name << " at " << budget);
        CHECK(same);
        if (equal_bytes) CHECK(bytes <= allowed);
      }
    }
  }
}

TEST_CASE("the engine's own weights are the attention mass") {
  if (skipped()) return;
  for (const Mode mode : {Mode::agnostic, Mode::aware}) {
    const auto planned = prepare(fixture().continuation(7), mode);
    const Prefix& prefix = *planned->prefix;
    for (std::size_t i = 0; i < prefix.caches.size(); i += 3) {
      const CacheView& cache = prefix.caches[i];
      const Observation& seen = prefix.seen[i];
      std::vector<float> mass(cache.total_length(), 0.0f);
      Workspace workspace;
      REQUIRE(accumulate_attention(cache, seen.reference, seen.attention, GroupReduction::mean,
                                   workspace, Executor{},
                                   Ragged<float>(mass.data(), prefix.tokens)));
      double difference = 0.0;
      double total = 0.0;
      for (u32 s = 0; s < cache.segments; ++s) {
        for (u32 t = 0; t < prefix.tokens; ++t) {
          const double own = static_cast<double>(mass[s * prefix.tokens + t]);
          difference = std::max(difference,
                                std::abs(own - static_cast<double>(seen.mass(s, t))) / (1 + own));
          total += own;
        }
      }
      CHECK(difference < 1e-4);
      // Every query pays 1 in all.
      const double paid = static_cast<double>(cache.segments) * static_cast<double>(prefix.tokens);
      CHECK_THAT(total, WithinRel(paid, 1e-3));
    }
  }
}

TEST_CASE("candidates in one batch get what each gets alone") {
  if (skipped()) return;
  EvalItem item = fixture().continuation(6);
  item.tokens.kind = eval::ItemKind::forced_choice;
  item.tokens.answer.clear();
  for (const std::size_t first : {310u, 321u, 330u, 335u, 340u}) {  // more than fit one batch
    item.tokens.candidates.push_back(fixture().cut(first, 1 + first % 4));
  }
  item.tokens.answer_index = 1;
  const auto planned = prepare(item, Mode::agnostic, true);
  for (const char* name : {"full", "snapkv+adakv+evict", "massfold"}) {
    const double budget = std::string(name) == "full" ? 1.0 : 0.4;
    const Predictions together = run_policy(item, *planned, name, budget);
    REQUIRE(together.candidates.size() == item.tokens.candidates.size());
    for (std::size_t c = 0; c < item.tokens.candidates.size(); ++c) {
      EvalItem alone = item;
      alone.tokens.kind = eval::ItemKind::continuation;
      alone.tokens.answer = item.tokens.candidates[c];
      alone.tokens.candidates.clear();
      const Predictions single = run_policy(alone, *planned, name, budget);
      const std::size_t vocabulary = fixture().engine->vocabulary();
      double log_prob = 0.0;
      for (std::size_t i = 0; i < alone.tokens.answer.size(); ++i) {
        log_prob -= eval::token_nll({single.logits.data() + i * vocabulary, vocabulary},
                                    static_cast<std::size_t>(alone.tokens.answer[i]));
      }
      INFO(name << ", candidate " << c);
      CHECK_THAT(together.candidates[c].log_prob, WithinAbs(log_prob, 1e-3));
      if (std::string(name) == "full") {
        CHECK_THAT(planned->full.predictions.candidates[c].log_prob, WithinAbs(log_prob, 1e-3));
      }
    }
  }
}

TEST_CASE("generation over a full copy is the stock engine's") {
  if (skipped()) return;
  EvalItem item = fixture().continuation(4);
  item.tokens.kind = eval::ItemKind::generation;
  item.tokens.answer.clear();
  item.tokens.max_new_tokens = 10;
  const auto planned = prepare(item, Mode::agnostic);
  const Predictions own = run_policy(item, *planned, "full", 1.0);
  CHECK_FALSE(own.output.empty());
  CHECK(own.output == planned->full.predictions.output);
}

TEST_CASE("masks over the engine's scores agree with our caches") {
  if (skipped()) return;
  const auto results =
      cross_check(*fixture().engine, fixture().continuation(8), fixture().pairing, 0.35);
  REQUIRE(results);
  CHECK(results->size() >= 6);
  for (const CheckResult& result : *results) {
    INFO(result.name);
    CHECK(result.error < 1e-4);
  }
}
