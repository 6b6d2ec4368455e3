// A rewritten cache against llama.cpp itself: an identity rewrite changes nothing, any selection of
// tokens equals the same tokens masked in the engine's own scores, and renumbered keys are those of
// the engine's own shift.
#include <ggml.h>
#include <llama.h>
#include <unistd.h>

#include <charconv>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <limits>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "examples/llama_cpp/generate_cache.hpp"
#include "examples/llama_cpp/generate_session.hpp"
#include "examples/llama_cpp/tests/random_model.hpp"
#include "tests/support/catch.hpp"

namespace {

using kvlean::AnyPolicy;
using kvlean::io::Outcome;
using kvlean::llama_cpp::LogMassUse;
using kvlean::llama_cpp::Model;
using kvlean::llama_cpp::Session;
using kvlean::llama_cpp::SlotCache;
using kvlean::llama_cpp::SlotCacheOptions;
using kvlean::test::RandomModel;

void require(const Outcome& outcome) {
  INFO(outcome.error);
  REQUIRE(outcome);
}

Model load(const RandomModel& shape) {
  static const bool started = static_cast<bool>(kvlean::llama_cpp::start_engine("test"));
  REQUIRE(started);
  const std::string path = (std::filesystem::temp_directory_path() /
                            ("kvlean-random-" + std::to_string(getpid()) + ".gguf"))
                               .string();
  REQUIRE(kvlean::test::write_random_model(shape, path));
  auto model = kvlean::llama_cpp::load_model(path);
  std::filesystem::remove(path);
  INFO(model.error);
  REQUIRE(model);
  return std::move(*model);
}

RandomModel shape_named(const std::string& name) {
  RandomModel shape;
  if (name == "factors") {
    shape.frequency_factors = true;
  } else {
    shape.architecture = name;
  }
  if (name == "gemma3") {
    shape.layers = 6;
    shape.kv_heads = 1;
  }
  return shape;
}

std::vector<llama_token> some_tokens(std::size_t count) {
  std::vector<llama_token> tokens(count);
  std::uint64_t state = 7;
  for (llama_token& token : tokens) {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    token = static_cast<llama_token>((state >> 33) % 96);
  }
  return tokens;
}

AnyPolicy policy_named(std::string_view name) {
  AnyPolicy policy;
  REQUIRE(kvlean::make_policy(name, policy));
  return policy;
}

SlotCacheOptions options_with(kvlean::Sharing sharing, bool contiguous, LogMassUse log_mass) {
  SlotCacheOptions options;
  options.plan.protection = {2, 4};
  options.plan.sharing = sharing;
  options.contiguous = contiguous;
  options.log_mass = log_mass;
  return options;
}

const kvlean::llama_cpp::SessionOptions exact = {1, false, GGML_TYPE_F32};

double distance(std::span<const float> a, std::span<const float> b) {
  REQUIRE(a.size() == b.size());
  double difference = 0.0;
  double norm = 0.0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    const double x = static_cast<double>(a[i]);
    difference += (x - static_cast<double>(b[i])) * (x - static_cast<double>(b[i]));
    norm += x * x;
  }
  return std::sqrt(difference / norm);
}

/// Evaluates tokens one at a time and returns the logits of each.
std::vector<std::vector<float>> step(Session& session, std::span<const llama_token> tokens,
                                     std::int32_t position) {
  std::vector<std::vector<float>> all;
  for (const llama_token& token : tokens) {
    require(session.decode({&token, 1}, position++));
    const auto logits = session.logits(0);
    all.emplace_back(logits.begin(), logits.end());
  }
  return all;
}

void read_text(Session& session, SlotCache& cache, std::span<const llama_token> text,
               std::size_t batch) {
  session.tap().record(256);
  for (std::size_t first = 0; first < text.size(); first += batch) {
    const auto part = text.subspan(first, std::min(batch, text.size() - first));
    require(session.decode(part, static_cast<std::int32_t>(first)));
    if (first == 0) require(cache.find_layers(session.cells()));
    require(cache.fetch(session.context()));
    require(cache.accumulate());
  }
}

/// Masks tokens in the engine's own scores. Token t is in cell t.
class Oracle {
 public:
  /// What a layer's head still sees of the tokens before `end`: their biases by position.
  struct Head {
    std::map<std::int32_t, float> kept;
  };
  std::map<std::size_t, std::vector<Head>> layers;
  std::int32_t end = 0;
  float scale = 0.0f;

  static bool on_node(ggml_tensor* node, bool ask, void* self) {
    return static_cast<Oracle*>(self)->handle(node, ask);
  }
  void copy(const SlotCache& cache, const Session& session) {
    end = cache.next_position();
    for (std::size_t l = 0; l < cache.num_layers(); ++l) {
      const auto& layer = session_layer(session, cache.layer_index(l));
      scale = layer.attention.scale;
      std::vector<Head>& heads = layers[cache.layer_index(l)];
      heads.assign(layer.kv_heads, {});
      for (std::size_t h = 0; h < heads.size(); ++h) {
        for (std::size_t j = 0; j < cache.length(l, h); ++j) {
          heads[h].kept[cache.position(l, h, j)] = cache.log_mass(l, h, j);
        }
      }
    }
  }

 private:
  static const kvlean::llama_cpp::AttentionLayer& session_layer(const Session& session,
                                                                std::size_t index) {
    return const_cast<Session&>(session).tap().layers()[index];  // NOLINT: read only
  }
  bool handle(ggml_tensor* node, bool ask) {
    const auto index = kvlean::llama_cpp::layer_of(node->name, "kq-");
    const bool mine = node->op == GGML_OP_MUL_MAT && index && layers.contains(*index);
    if (ask) return mine;
    if (!mine) return true;
    const std::vector<Head>& heads = layers[*index];
    const auto group = static_cast<std::size_t>(node->ne[2]) / heads.size();
    for (std::int64_t h = 0; h < node->ne[2]; ++h) {
      const Head& head = heads[static_cast<std::size_t>(h) / group];
      for (std::int64_t t = 0; t < node->ne[1]; ++t) {
        auto* scores = static_cast<float*>(node->data) + (h * node->ne[1] + t) * node->ne[0];
        for (std::int32_t cell = 0; cell < end; ++cell) {
          const auto kept = head.kept.find(cell);
          scores[cell] = kept != head.kept.end() ? scores[cell] + kept->second / scale
                                                 : -std::numeric_limits<float>::infinity();
        }
      }
    }
    return true;
  }
};

/// The whole text in a context of its own whose scores the oracle masks from then on.
kvlean::llama_cpp::Context masked_context(llama_model* model, Oracle& oracle,
                                          std::span<const llama_token> text) {
  llama_context_params params = llama_context_default_params();
  params.n_ctx = 512;
  params.n_batch = params.n_ubatch = 512;
  params.n_threads = params.n_threads_batch = 1;
  params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
  params.type_k = params.type_v = GGML_TYPE_F32;
  params.swa_full = false;
  params.cb_eval = Oracle::on_node;
  params.cb_eval_user_data = &oracle;
  kvlean::llama_cpp::Context context(llama_init_from_model(model, params));
  REQUIRE(context);
  const auto layers = std::exchange(oracle.layers, {});
  std::vector<llama_token> copy(text.begin(), text.end());
  REQUIRE(llama_decode(context.get(), llama_batch_get_one(copy.data(), static_cast<std::int32_t>(
                                                                           copy.size()))) == 0);
  oracle.layers = layers;
  return context;
}

std::vector<float> next_logits(llama_context* context, llama_token token, std::size_t count) {
  REQUIRE(llama_decode(context, llama_batch_get_one(&token, 1)) == 0);
  const float* logits = llama_get_logits_ith(context, -1);
  return {logits, logits + count};
}

}  // namespace

TEST_CASE("rewriting everything into another context changes nothing") {
  for (const std::string name : {"llama", "factors", "qwen2", "gemma3"}) {
    for (const bool flash : {false, true}) {
      for (const bool contiguous : {false, true}) {
        INFO(name << " flash " << flash << " contiguous " << contiguous);
        const Model model = load(shape_named(name));
        const std::vector<llama_token> tokens = some_tokens(170);
        const auto text = std::span(tokens).first(150);
        Session session(model.get(), {1, flash, flash ? GGML_TYPE_F16 : GGML_TYPE_F32});
        require(session.open(512, 512));
        const AnyPolicy policy = policy_named("snapkv");
        SlotCache cache(session.tap(), policy,
                        options_with(kvlean::Sharing::equal_count(), contiguous,
                                     flash ? LogMassUse::refuse : LogMassUse::add));
        read_text(session, cache, text, 150);
        session.tap().record(0);
        const auto stock = step(session, std::span(tokens).last(20), 150);
        const std::size_t bytes = session.cache_bytes();
        require(cache.compress(150));
        CHECK(cache.longest() == 150);
        CHECK(cache.shortest() == 150);
        require(session.open(256, 64));
        require(cache.store(session.context()));
        const auto rewritten = step(session, std::span(tokens).last(20), cache.next_position());
        CHECK(session.cache_bytes() < bytes);
        for (std::size_t i = 0; i < stock.size(); ++i) {
          CHECK(distance(stock[i], rewritten[i]) < (flash ? 1e-2 : 1e-4));
        }
      }
    }
  }
}

TEST_CASE("a rewritten cache attends as the same tokens masked in the engine's scores") {
  struct Case {
    const char* policy;
    kvlean::Sharing sharing;
    bool ragged;
  };
  const Case cases[] = {{"snapkv", kvlean::Sharing::equal_count(), false},
                        {"random", kvlean::Sharing::equal_count(), false},
                        {"h2o", kvlean::Sharing::equal_count(), false},
                        {"adakv", kvlean::Sharing::per_head(), true},
                        {"pyramidkv", kvlean::Sharing::equal_count(), true}};
  for (const std::string name : {"llama", "qwen2", "gemma3"}) {
    for (const Case& one : cases) {
      INFO(name << " " << one.policy);
      const Model model = load(shape_named(name));
      const std::vector<llama_token> tokens = some_tokens(200);
      Session session(model.get(), exact);
      require(session.open(512, 512));
      const AnyPolicy policy = policy_named(one.policy);
      SlotCache cache(session.tap(), policy, options_with(one.sharing, false, LogMassUse::add));
      read_text(session, cache, std::span(tokens).first(150), 64);
      require(cache.compress(50));
      const bool several = name != "gemma3";  // one layer of one head has nothing to differ from
      if (several) CHECK((cache.shortest() != cache.longest()) == one.ragged);

      Oracle oracle;
      oracle.copy(cache, session);
      bool heads_differ = false;
      for (auto& [index, heads] : oracle.layers) {
        for (const auto& head : heads) {
          heads_differ = heads_differ || head.kept != heads.front().kept ||
                         head.kept != oracle.layers.begin()->second.front().kept;
        }
      }
      if (several) CHECK(heads_differ);
      const auto masked = masked_context(model.get(), oracle, std::span(tokens).first(150));
      require(session.open(256, 64));
      require(cache.store(session.context()));
      session.tap().record(256);
      for (std::size_t i = 150; i < 175; ++i) {
        const auto expected = next_logits(masked.get(), tokens[i], 96);
        const auto got =
            step(session, std::span(tokens).subspan(i, 1), static_cast<std::int32_t>(i));
        REQUIRE(distance(expected, got[0]) < 1e-4);
      }

      // The smaller cache and what came after it, once more, in the same context.
      require(cache.fetch(session.context()));
      require(cache.compress(40));
      require(cache.store(session.context()));
      oracle.copy(cache, session);
      for (std::size_t i = 175; i < 200; ++i) {
        const auto expected = next_logits(masked.get(), tokens[i], 96);
        const auto got =
            step(session, std::span(tokens).subspan(i, 1), static_cast<std::int32_t>(i));
        REQUIRE(distance(expected, got[0]) < 1e-4);
      }
      // The mask matters: without it the logits are others.
      oracle.layers.clear();
      const auto open = next_logits(masked.get(), tokens[0], 96);
      const auto got = step(session, std::span(tokens).first(1), 200);
      CHECK(distance(open, got[0]) > 1e-3);
    }
  }
}

TEST_CASE("log mass is added to the scores") {
  const Model model = load(shape_named("llama"));
  const std::vector<llama_token> tokens = some_tokens(160);
  const auto run = [&](LogMassUse use) {
    Session session(model.get(), exact);
    require(session.open(512, 512));
    const AnyPolicy policy = policy_named("massfold");
    SlotCache cache(session.tap(), policy,
                    options_with(kvlean::Sharing::equal_count(), false, use));
    read_text(session, cache, std::span(tokens).first(150), 150);
    const Outcome done = cache.compress(50);
    if (use == LogMassUse::refuse) {
      CHECK(done.error.find("log mass") != std::string::npos);
      return std::vector<std::vector<float>>{};
    }
    require(done);
    double largest = 0.0;
    for (std::size_t h = 0; h < 2; ++h) {
      for (std::size_t j = 0; j < cache.length(0, h); ++j) {
        largest = std::max(largest, std::fabs(static_cast<double>(cache.log_mass(0, h, j))));
      }
    }
    CHECK((largest > 0.1) == (use == LogMassUse::add));
    require(session.open(256, 64));
    require(cache.store(session.context()));
    return step(session, std::span(tokens).last(10), cache.next_position());
  };
  const auto added = run(LogMassUse::add);
  const auto dropped = run(LogMassUse::drop);
  CHECK(distance(added[0], dropped[0]) > 1e-4);
  run(LogMassUse::refuse);
}

TEST_CASE("renumbered keys are those of the engine's own shift") {
  for (const std::string name : {"llama", "factors", "qwen2", "gemma3"}) {
    INFO(name);
    const Model model = load(shape_named(name));
    const std::vector<llama_token> tokens = some_tokens(220);
    const auto text = std::span(tokens).first(200);
    AnyPolicy policy = policy_named("streaming_llm");
    std::get<kvlean::StreamingLLMScorer>(policy.scorer).sinks = 0;
    SlotCacheOptions options = options_with(kvlean::Sharing::equal_count(), true, LogMassUse::add);
    options.plan.protection = {0, 4};
    Session session(model.get(), exact);
    require(session.open(512, 512));
    SlotCache cache(session.tap(), policy, options);
    read_text(session, cache, text, 200);
    require(cache.compress(80));
    REQUIRE(cache.next_position() == 80);

    // The engine drops the same tokens and moves the rest by the same 120 positions.
    const llama_memory_t memory = llama_get_memory(session.context());
    llama_memory_seq_rm(memory, 0, 0, 120);
    llama_memory_seq_add(memory, 0, 120, 200, -120);
    session.tap().record(0);
    const auto shifted = step(session, std::span(tokens).last(20), 80);

    Session other(model.get(), exact);
    require(other.open(256, 64));
    require(cache.store(other.context()));
    const auto renumbered = step(other, std::span(tokens).last(20), 80);
    for (std::size_t i = 0; i < shifted.size(); ++i) {
      CHECK(distance(shifted[i], renumbered[i]) < 1e-4);
    }
  }
}

TEST_CASE("accumulated attention does not depend on how the text was cut") {
  const Model model = load(shape_named("llama"));
  const std::vector<llama_token> tokens = some_tokens(150);
  std::vector<std::vector<std::int32_t>> kept;
  for (const std::size_t batch : {std::size_t{150}, std::size_t{64}, std::size_t{7}}) {
    Session session(model.get(), exact);
    require(session.open(512, 512));
    const AnyPolicy policy = policy_named("h2o");
    SlotCache cache(session.tap(), policy,
                    options_with(kvlean::Sharing::equal_count(), false, LogMassUse::add));
    read_text(session, cache, tokens, batch);
    require(cache.compress(50));
    std::vector<std::int32_t>& positions = kept.emplace_back();
    for (std::size_t l = 0; l < 2; ++l) {
      for (std::size_t h = 0; h < 2; ++h) {
        for (std::size_t j = 0; j < 50; ++j) positions.push_back(cache.position(l, h, j));
      }
    }
  }
  CHECK(kept[0] == kept[1]);
  CHECK(kept[0] == kept[2]);
}

TEST_CASE("a stream stays within its cells and its positions") {
  for (const std::string name : {"llama", "gemma3"}) {
    INFO(name);
    const Model model = load(shape_named(name));
    const std::vector<llama_token> tokens = some_tokens(64);
    const AnyPolicy policy = policy_named("h2o");
    Session session(model.get(), {1, true, GGML_TYPE_F16});
    require(session.open(128, 32));
    SlotCache cache(session.tap(), policy,
                    options_with(kvlean::Sharing::equal_count(), true, LogMassUse::refuse));
    session.tap().record(64);
    std::size_t used = 0;
    std::int32_t next = 0;
    for (int round = 0; round < 300; ++round) {
      if (used + 32 > 128) {
        require(cache.fetch(session.context()));
        require(cache.compress(64));
        require(cache.store(session.context()));
        REQUIRE(cache.longest() == 64);
        used = 64;
        next = cache.next_position();
        REQUIRE(next <= 128);
      } else if (round != 0) {
        require(cache.fetch(session.context()));
        require(cache.accumulate());
      }
      require(session.decode(std::span(tokens).first(32), next));
      if (round == 0) require(cache.find_layers(session.cells()));
      used += 32;
      next += 32;
    }
    for (const float logit : session.logits(31)) REQUIRE(std::isfinite(logit));
  }
}
