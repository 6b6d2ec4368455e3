// The engine half of kvlean-eval: items go through stock llama.cpp once, and then again and again
// with attention replaced.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "attention_override.hpp"
#include "attention_tap.hpp"
#include "bench/eval/items.hpp"
#include "engine.hpp"
#include "score_mask.hpp"

namespace kvlean::llama_cpp {

/// What a policy may see: the context alone, or the question too.
enum class Mode { agnostic, aware };
[[nodiscard]] const char* mode_name(Mode mode);

/// An item in tokens.
struct TokenizedItem {
  eval::ItemKind kind = eval::ItemKind::continuation;
  std::vector<llama_token> prompt;  ///< begin-of-text if the model wants it, context, question
  std::size_t context = 0;          ///< tokens of the prompt that are not the question's
  std::vector<llama_token> answer;  ///< of a continuation
  std::vector<std::vector<llama_token>> candidates;  ///< of a forced choice
  std::size_t answer_index = 0;
  std::size_t max_new_tokens = 0;  ///< of a generation
  bool one_line = false;           ///< generation ends at the first line's end

  /// Tokens that are compressed. The last token before the answer never is: it is evaluated over
  /// the compressed cache, so that everything that is scored went through it.
  [[nodiscard]] std::size_t prefix(Mode mode) const {
    const std::size_t all = prompt.size() - 1;
    return mode == Mode::aware ? all : std::min(context, all);
  }
  /// Whether seeing the question makes a difference.
  [[nodiscard]] bool has_question() const { return prefix(Mode::aware) > prefix(Mode::agnostic); }
  /// Room that evaluation takes in the cache.
  [[nodiscard]] std::size_t positions() const;
};

/// What a model predicts after the prompt, as far as the item asks.
struct Predictions {
  /// [rows][vocabulary]: the rows that predict `answer`, or the right candidate.
  std::vector<float> logits;
  std::vector<eval::CandidateScore> candidates;
  std::string output;  ///< what was generated
};

/// What the stock engine computed of an item, in every layer that can be replaced.
struct FullRun {
  std::vector<TappedLayer> layers;  ///< of the model; q, k, v of all tokens that were evaluated
  std::size_t tokens = 0;
  std::size_t output_from = 0;  ///< first token whose attention output was kept
  /// [mode][layer] -> [kv head][prefix token] attention received within the prefix
  std::vector<std::vector<float>> mass[2];
  Predictions predictions;
  double seconds = 0.0;
};

class EvalEngine {
 public:
  struct Options {
    std::size_t tokens = 0;    ///< positions a context has room for
    std::size_t branches = 1;  ///< alternative continuations evaluated at a time
    int threads = 1;
    ggml_type cache_type = GGML_TYPE_F32;
    bool flash_attention = false;
    bool exact = true;  ///< see NodeSwitch::set_exact_gelu()
  };
  /// The model must outlive the engine.
  [[nodiscard]] static Result<std::unique_ptr<EvalEngine>> open(llama_model* model,
                                                                const Options& options);

  /// Finds out which layers attend to everything and so can be replaced. Needed before run_full().
  [[nodiscard]] Outcome find_layers();
  [[nodiscard]] const std::vector<std::size_t>& replaceable() const { return replaceable_; }
  [[nodiscard]] std::size_t layers() const { return layer_count_; }

  /// The item through the stock engine, attention recorded. The engine then holds all its tokens.
  [[nodiscard]] Outcome run_full(const TokenizedItem& item, FullRun& run);
  /// The same without recording anything: for engines whose attention cannot be read.
  [[nodiscard]] Outcome run_plain(const TokenizedItem& item, Predictions& predictions);

  /// Makes ready for runs in this mode, after run_full() and any run with a longer prefix. What no
  /// layer needs is dropped from the engine's cache, unless `keep_cells`.
  void begin_mode(std::size_t prefix, bool keep_cells);
  /// The rest of the item over the caches of attention(), which are left as they were.
  [[nodiscard]] Outcome run_replaced(const TokenizedItem& item, Predictions& predictions);
  /// The rest of the item over the engine's own cache under score_mask(). Needs the cells.
  [[nodiscard]] Outcome run_masked(const TokenizedItem& item, Predictions& predictions);
  /// Called after every block of run_replaced that continues the prompt: first token, count.
  std::function<void(std::size_t first, std::size_t count)> after_block;

  [[nodiscard]] AttentionOverride& attention() { return override_; }
  [[nodiscard]] ScoreMask& score_mask() { return mask_; }
  [[nodiscard]] llama_model* model() const { return model_; }
  [[nodiscard]] std::size_t vocabulary() const { return vocabulary_; }

 private:
  enum class Way { tapped, plain, replaced, masked };

  EvalEngine(llama_model* model, const Options& options);
  Outcome feed(std::span<const llama_token> tokens, std::size_t first, std::size_t logits_from,
               Way way, const std::function<void(std::size_t, const float*)>& on_logits);
  Outcome finish(const TokenizedItem& item, std::size_t prefix, Way way, Predictions& predictions);
  Outcome choose(const TokenizedItem& item, const std::vector<float>& first_row, Way way,
                 Predictions& predictions);
  Outcome generate(const TokenizedItem& item, std::vector<float> row, Way way,
                   Predictions& predictions);
  Outcome check(Way way) const;
  void roll_back();

  llama_model* model_ = nullptr;
  Options options_;
  NodeSwitch switch_;  // before the context, which holds a pointer to it
  Context context_;
  std::size_t layer_count_ = 0;
  std::size_t vocabulary_ = 0;
  std::size_t batch_tokens_ = 0;
  std::unique_ptr<Batch> batch_;
  std::vector<std::size_t> replaceable_;
  AttentionTap tap_;
  AttentionOverride override_;
  ScoreMask mask_;
  std::size_t prefix_ = 0;
  bool has_cells_ = true;
};

}  // namespace kvlean::llama_cpp
