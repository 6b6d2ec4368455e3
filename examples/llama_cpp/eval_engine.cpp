#include "eval_engine.hpp"

#include <algorithm>
#include <cmath>
#include <set>
#include <utility>

#include "bench/eval/metrics.hpp"

namespace kvlean::llama_cpp {
namespace {

std::string piece_of(const llama_vocab* vocab, llama_token token) {
  std::string piece(32, '\0');
  std::int32_t length = llama_token_to_piece(vocab, token, piece.data(),
                                             static_cast<std::int32_t>(piece.size()), 0, false);
  if (length < 0) {
    piece.resize(static_cast<std::size_t>(-length));
    length = llama_token_to_piece(vocab, token, piece.data(),
                                  static_cast<std::int32_t>(piece.size()), 0, false);
  }
  piece.resize(static_cast<std::size_t>(std::max(length, 0)));
  return piece;
}

bool is_blank(std::string_view text) {
  return text.find_first_not_of(" \t\r\n") == std::string_view::npos;
}

}  // namespace

const char* mode_name(Mode mode) { return mode == Mode::agnostic ? "agnostic" : "aware"; }

std::size_t TokenizedItem::positions() const {
  std::size_t after = answer.size() + max_new_tokens;
  for (const std::vector<llama_token>& candidate : candidates) after += candidate.size();
  return prompt.size() + after;
}

EvalEngine::EvalEngine(llama_model* model, const Options& options)
    : model_(model), options_(options) {}

Result<std::unique_ptr<EvalEngine>> EvalEngine::open(llama_model* model, const Options& options) {
  using R = Result<std::unique_ptr<EvalEngine>>;
  std::unique_ptr<EvalEngine> engine(new EvalEngine(model, options));
  engine->layer_count_ = static_cast<std::size_t>(std::max(0, llama_model_n_layer(model)));
  engine->vocabulary_ =
      static_cast<std::size_t>(llama_vocab_n_tokens(llama_model_get_vocab(model)));
  // A window must be seen to be exceeded; see find_layers(). Scores of a batch are in memory.
  const auto window = static_cast<std::size_t>(std::max(0, llama_model_n_swa(model)));
  const std::size_t tokens = std::max(options.tokens, window + 64);
  engine->batch_tokens_ = tokens <= 5000 ? 512 : 256;
  engine->switch_.set_exact_gelu(options.exact);
  ContextOptions wanted;
  wanted.tokens = tokens;
  wanted.batch = engine->batch_tokens_;
  wanted.threads = options.threads;
  wanted.on_node = NodeSwitch::on_node;
  wanted.on_node_data = &engine->switch_;
  wanted.sequences = options.branches + 1;
  wanted.cache_type = options.cache_type;
  wanted.flash_attention = options.flash_attention;
  Result<Context> context = open_context(model, wanted);
  if (!context) return R::failure(context.error);
  engine->context_ = std::move(*context);
  engine->batch_ = std::make_unique<Batch>(engine->batch_tokens_);
  return R::success(std::move(engine));
}

Outcome EvalEngine::find_layers() {
  const auto window = static_cast<std::size_t>(std::max(0, llama_model_n_swa(model_)));
  std::vector<llama_token> tokens(window + 2);
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    tokens[i] = static_cast<llama_token>((17 + 31 * i) % std::min<std::size_t>(vocabulary_, 8192));
  }
  std::set<std::size_t> all;
  for (std::size_t l = 0; l < layer_count_; ++l) all.insert(l);
  AttentionTap::Options wanted;
  wanted.layers = layer_count_;
  wanted.tokens = tokens.size();
  wanted.selected = all;
  tap_.reset(wanted);
  llama_memory_clear(llama_get_memory(context_.get()), true);
  if (Outcome fed = feed(tokens, 0, tokens.size(), Way::tapped, {}); !fed) return fed;
  replaceable_.clear();
  std::string trouble = "has no attention that this program can read";
  for (std::size_t l = 0; l < layer_count_; ++l) {
    const TappedLayer& layer = tap_.layers()[l];
    if (layer.problem.empty() && layer.has_scores && layer.has_softmax && layer.has_output) {
      replaceable_.push_back(l);
    } else if (!layer.problem.empty()) {
      trouble = layer.problem;
    }
  }
  if (replaceable_.empty()) return Outcome{"no layer's attention can be replaced: it " + trouble};
  return Outcome{};
}

/// Evaluates tokens that follow each other, batch by batch.
Outcome EvalEngine::feed(std::span<const llama_token> tokens, std::size_t first,
                         std::size_t logits_from, Way way,
                         const std::function<void(std::size_t, const float*)>& on_logits) {
  for (std::size_t begin = 0; begin < tokens.size(); begin += batch_tokens_) {
    const std::size_t count = std::min(batch_tokens_, tokens.size() - begin);
    batch_->clear();
    for (std::size_t i = begin; i < begin + count; ++i) {
      batch_->add(tokens[i], static_cast<llama_pos>(first + i), 0, i >= logits_from);
    }
    switch (way) {
      case Way::tapped:
        switch_.set(tap_);
        tap_.begin_batch(first + begin, count);
        break;
      case Way::replaced:
        switch_.set(override_);
        override_.begin_block(first + begin, count);
        break;
      case Way::masked:
        switch_.set(mask_);
        break;
      case Way::plain:
        switch_.clear();
        break;
    }
    if (Outcome done = decode(context_.get(), *batch_); !done) return done;
    if (Outcome good = check(way); !good) return good;
    if (way == Way::replaced && after_block) after_block(first + begin, count);
    for (std::size_t i = std::max(begin, logits_from); i < begin + count; ++i) {
      const float* row = llama_get_logits_ith(context_.get(), static_cast<std::int32_t>(i - begin));
      if (row == nullptr) return Outcome{"llama.cpp gave no prediction"};
      on_logits(i, row);
    }
  }
  return Outcome{};
}

Outcome EvalEngine::check(Way way) const {
  const std::string problem = way == Way::replaced ? override_.problem()
                              : way == Way::masked ? mask_.problem()
                                                   : std::string();
  return Outcome{problem};
}

Outcome EvalEngine::run_full(const TokenizedItem& item, FullRun& run) {
  const double start = processor_seconds();
  const std::size_t answer = item.answer.empty() ? 0 : item.answer.size() - 1;
  const std::size_t agnostic = item.prefix(Mode::agnostic);
  const std::size_t aware = item.prefix(Mode::aware);
  run.tokens = item.prompt.size() + answer;
  run.output_from = agnostic;
  AttentionTap::Options wanted;
  wanted.layers = layer_count_;
  wanted.tokens = run.tokens;
  wanted.selected.insert(replaceable_.begin(), replaceable_.end());
  wanted.keep_output = true;
  wanted.output_from = agnostic;
  wanted.keep_mass = true;
  tap_.reset(std::move(wanted));
  llama_memory_clear(llama_get_memory(context_.get()), true);

  const auto take_mass = [&](Mode mode, std::size_t prefix) {
    std::vector<std::vector<float>>& mass = run.mass[static_cast<std::size_t>(mode)];
    mass.assign(layer_count_, {});
    for (const std::size_t l : replaceable_) {
      const TappedLayer& layer = tap_.layers()[l];
      mass[l].resize(layer.k.heads * prefix);
      for (std::size_t h = 0; h < layer.k.heads; ++h) {
        for (std::size_t t = 0; t < prefix; ++t) {
          mass[l][h * prefix + t] = static_cast<float>(layer.mass[h * run.tokens + t]);
        }
      }
    }
  };
  const std::span<const llama_token> prompt(item.prompt);
  const auto feed_part = [&](std::size_t from, std::size_t to) {
    return feed(prompt.subspan(from, to - from), from, to - from, Way::tapped, {});
  };
  if (Outcome fed = feed_part(0, agnostic); !fed) return fed;
  take_mass(Mode::agnostic, agnostic);
  if (aware > agnostic) {
    if (Outcome fed = feed_part(agnostic, aware); !fed) return fed;
  }
  take_mass(Mode::aware, aware);
  tap_.keep_mass(false);
  if (Outcome done = finish(item, aware, Way::tapped, run.predictions); !done) return done;
  for (const std::size_t l : replaceable_) {
    if (const std::string& problem = tap_.layers()[l].problem; !problem.empty()) {
      return Outcome{"layer " + std::to_string(l) + " " + problem};
    }
  }
  run.layers = std::move(tap_.layers());
  for (TappedLayer& layer : run.layers) layer.mass = {};
  prefix_ = aware;
  has_cells_ = true;
  run.seconds = processor_seconds() - start;
  return Outcome{};
}

Outcome EvalEngine::run_plain(const TokenizedItem& item, Predictions& predictions) {
  llama_memory_clear(llama_get_memory(context_.get()), true);
  const std::size_t prefix = item.prefix(Mode::aware);
  const std::span<const llama_token> prompt(item.prompt);
  if (Outcome fed = feed(prompt.first(prefix), 0, prefix, Way::plain, {}); !fed) return fed;
  return finish(item, prefix, Way::plain, predictions);
}

void EvalEngine::begin_mode(std::size_t prefix, bool keep_cells) {
  prefix_ = prefix;
  has_cells_ = has_cells_ && (keep_cells || replaceable_.size() < layer_count_);
  roll_back();
}

void EvalEngine::roll_back() {
  llama_memory_t memory = llama_get_memory(context_.get());
  if (has_cells_) {
    llama_memory_seq_rm(memory, 0, static_cast<llama_pos>(prefix_), -1);
  } else {
    llama_memory_clear(memory, false);
  }
}

Outcome EvalEngine::run_replaced(const TokenizedItem& item, Predictions& predictions) {
  Outcome done = finish(item, prefix_, Way::replaced, predictions);
  roll_back();
  if (const Status status = override_.rollback(); !status && done) {
    return Outcome{std::string("cannot roll back: ") + status.message()};
  }
  return done;
}

Outcome EvalEngine::run_masked(const TokenizedItem& item, Predictions& predictions) {
  Outcome done = finish(item, prefix_, Way::masked, predictions);
  roll_back();
  return done;
}

/// From the end of the prefix on: what is left of the prompt, and what the item asks for.
Outcome EvalEngine::finish(const TokenizedItem& item, std::size_t prefix, Way way,
                           Predictions& predictions) {
  predictions = Predictions{};
  const auto begin = item.prompt.begin() + static_cast<std::ptrdiff_t>(prefix);
  std::vector<llama_token> rest(begin, item.prompt.end());
  const std::size_t last = rest.size() - 1;  // predicts the first token of the answer
  if (!item.answer.empty()) rest.insert(rest.end(), item.answer.begin(), item.answer.end() - 1);
  Outcome fed = feed(rest, prefix, last, way, [&](std::size_t, const float* row) {
    predictions.logits.insert(predictions.logits.end(), row, row + vocabulary_);
  });
  if (!fed) return fed;
  if (item.kind == eval::ItemKind::forced_choice) {
    const std::vector<float> row = std::move(predictions.logits);
    return choose(item, row, way, predictions);
  }
  if (item.kind == eval::ItemKind::generation) {
    return generate(item, std::move(predictions.logits), way, predictions);
  }
  return Outcome{};
}

/// All candidates as branches of one batch, or of a few if there are many.
Outcome EvalEngine::choose(const TokenizedItem& item, const std::vector<float>& first_row, Way way,
                           Predictions& predictions) {
  llama_memory_t memory = llama_get_memory(context_.get());
  const std::size_t position = item.prompt.size();
  const double normaliser = eval::log_sum_exp(first_row);
  predictions.logits = first_row;
  predictions.candidates.assign(item.candidates.size(), {});
  for (std::size_t c = 0; c < item.candidates.size(); ++c) {
    const auto token = static_cast<std::size_t>(item.candidates[c].front());
    predictions.candidates[c].tokens = item.candidates[c].size();
    predictions.candidates[c].log_prob = static_cast<double>(first_row[token]) - normaliser;
  }
  std::vector<std::size_t> members;
  std::vector<std::size_t> counts;
  const auto flush = [&]() -> Outcome {
    if (members.empty()) return Outcome{};
    switch (way) {
      case Way::replaced:
        switch_.set(override_);
        override_.begin_branches(position, counts);
        break;
      case Way::masked:
        switch_.set(mask_);
        break;
      default:
        switch_.clear();
    }
    Outcome done = decode(context_.get(), *batch_);
    if (done) done = check(way);
    std::int32_t row_index = 0;
    for (std::size_t m = 0; m < members.size() && done; ++m) {
      const std::vector<llama_token>& candidate = item.candidates[members[m]];
      for (std::size_t i = 1; i < candidate.size(); ++i, ++row_index) {
        const float* row = llama_get_logits_ith(context_.get(), row_index);
        if (row == nullptr) return Outcome{"llama.cpp gave no prediction"};
        predictions.candidates[members[m]].log_prob -=
            eval::token_nll({row, vocabulary_}, static_cast<std::size_t>(candidate[i]));
        if (members[m] == item.answer_index) {
          predictions.logits.insert(predictions.logits.end(), row, row + vocabulary_);
        }
      }
      llama_memory_seq_rm(memory, static_cast<llama_seq_id>(m + 1), -1, -1);
    }
    members.clear();
    counts.clear();
    batch_->clear();
    return done;
  };
  batch_->clear();
  for (std::size_t c = 0; c < item.candidates.size(); ++c) {
    const std::vector<llama_token>& candidate = item.candidates[c];
    const std::size_t count = candidate.size() - 1;
    if (count == 0) continue;
    if (count > batch_tokens_) return Outcome{"a candidate is too long"};
    if (members.size() == options_.branches || batch_->size() + count > batch_tokens_) {
      if (Outcome done = flush(); !done) return done;
    }
    members.push_back(c);
    counts.push_back(count);
    const auto sequence = static_cast<llama_seq_id>(members.size());
    llama_memory_seq_cp(memory, 0, sequence, -1, -1);
    for (std::size_t i = 0; i < count; ++i) {
      batch_->add(candidate[i], static_cast<llama_pos>(position + i), sequence, true);
    }
  }
  return flush();
}

/// Greedy, until the model ends its text, a blank line, or enough tokens.
Outcome EvalEngine::generate(const TokenizedItem& item, std::vector<float> row, Way way,
                             Predictions& predictions) {
  const llama_vocab* vocab = llama_model_get_vocab(model_);
  const Way step_way = way == Way::tapped ? Way::plain : way;
  predictions.logits.clear();
  for (std::size_t i = 0; i < item.max_new_tokens; ++i) {
    const auto token = static_cast<llama_token>(eval::argmax(row));
    if (llama_vocab_is_eog(vocab, token)) break;
    predictions.output += piece_of(vocab, token);
    const std::string_view text = predictions.output;
    const std::size_t content = text.find_first_not_of(" \t\r\n");
    if (content != std::string_view::npos &&
        text.find(item.one_line ? "\n" : "\n\n", content) != std::string_view::npos) {
      break;
    }
    if (i + 1 == item.max_new_tokens) break;
    Outcome fed =
        feed({&token, 1}, item.prompt.size() + i, 0, step_way,
             [&](std::size_t, const float* next) { row.assign(next, next + vocabulary_); });
    if (!fed) return fed;
  }
  if (is_blank(predictions.output)) predictions.output.clear();
  return Outcome{};
}

}  // namespace kvlean::llama_cpp
