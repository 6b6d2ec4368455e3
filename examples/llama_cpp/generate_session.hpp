// A llama.cpp context that generates text, as kvlean-generate uses it: opened with the cache type
// and attention that were asked for, fed token by token or in chunks, sampled from, and measured.
#pragma once

#include <ggml.h>
#include <llama.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "engine.hpp"
#include "generate_tap.hpp"

namespace kvlean::llama_cpp {

struct SamplerDeleter {
  void operator()(llama_sampler* sampler) const { llama_sampler_free(sampler); }
};
using Sampler = std::unique_ptr<llama_sampler, SamplerDeleter>;

/// Greedy at temperature 0, otherwise top-k and a seeded draw.
inline Sampler make_sampler(float temperature, int top_k, std::uint32_t seed) {
  Sampler chain(llama_sampler_chain_init(llama_sampler_chain_default_params()));
  if (temperature <= 0.0f) {
    llama_sampler_chain_add(chain.get(), llama_sampler_init_greedy());
  } else {
    if (top_k > 0) llama_sampler_chain_add(chain.get(), llama_sampler_init_top_k(top_k));
    llama_sampler_chain_add(chain.get(), llama_sampler_init_temp(temperature));
    llama_sampler_chain_add(chain.get(), llama_sampler_init_dist(seed));
  }
  return chain;
}

/// The bytes that a token stands for; nothing for control tokens.
inline std::string piece_of(const llama_vocab* vocab, llama_token token) {
  std::string piece(64, '\0');
  const auto render = [&]() {
    return llama_token_to_piece(vocab, token, piece.data(), static_cast<std::int32_t>(piece.size()),
                                0, false);
  };
  std::int32_t length = render();
  if (length < 0) {
    piece.resize(static_cast<std::size_t>(-length));
    length = render();
  }
  piece.resize(static_cast<std::size_t>(std::max(length, 0)));
  return piece;
}

/// Memory of this process that is in RAM, in bytes; 0 where the system does not say.
inline std::size_t resident_bytes() {
  const io::detail::FileHandle file(std::fopen("/proc/self/statm", "rbe"));
  unsigned long total = 0;
  unsigned long resident = 0;
  if (!file || std::fscanf(file.get(), "%lu %lu", &total, &resident) != 2) return 0;
  return resident * static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
}

inline double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

struct SessionOptions {
  int threads = 1;
  bool flash_attention = true;
  ggml_type cache_type = GGML_TYPE_F16;
};

/// A model, one context at a time, and the tap on it.
class Session {
 public:
  Session(llama_model* model, const SessionOptions& options)
      : model_(model),
        options_(options),
        tap_(static_cast<std::size_t>(std::max(0, llama_model_n_layer(model)))) {}

  /// Replaces the context, if there is one, by an empty one of at least `cells` cells. The old one
  /// is freed first. Batches hold `batch` tokens at most.
  Outcome open(std::size_t cells, std::size_t batch) {
    context_.reset();
    const auto window = static_cast<std::size_t>(std::max(0, llama_model_n_swa(model_)));
    if (window != 0) {
      // Window layers get cells for the window and a batch, rounded up to 256. The others must get
      // more, so that the two can be told apart.
      cells = std::max(cells, (window + batch + 255) / 256 * 256 + 1);
    }
    llama_context_params params = llama_context_default_params();
    params.n_ctx = static_cast<std::uint32_t>(cells);
    params.n_batch = static_cast<std::uint32_t>(batch);
    params.n_ubatch = static_cast<std::uint32_t>(batch);
    params.n_threads = options_.threads;
    params.n_threads_batch = options_.threads;
    params.flash_attn_type =
        options_.flash_attention ? LLAMA_FLASH_ATTN_TYPE_ENABLED : LLAMA_FLASH_ATTN_TYPE_DISABLED;
    params.type_k = options_.cache_type;
    params.type_v = options_.cache_type;
    params.swa_full = false;
    params.offload_kqv = false;
    params.op_offload = false;
    params.cb_eval = GenerateTap::on_node;
    params.cb_eval_user_data = &tap_;
    detail::first_complaint().clear();
    context_.reset(llama_init_from_model(model_, params));
    if (!context_)
      return engine_failure("cannot open a context of " + std::to_string(cells) + " tokens");
    for (AttentionLayer& layer : tap_.layers()) layer.bias.clear();
    fresh_ = true;
    return Outcome{};
  }
  void close() { context_.reset(); }

  /// Evaluates tokens at the positions from `position` on; at most a batch. Logits are kept of all
  /// of them, or of the last one.
  Outcome decode(std::span<const llama_token> tokens, std::int32_t position,
                 bool all_logits = false) {
    const auto count = static_cast<std::int32_t>(tokens.size());
    std::vector<llama_token> copy(tokens.begin(), tokens.end());
    std::vector<llama_pos> positions(tokens.size());
    std::vector<std::int32_t> sequences(tokens.size(), 1);
    llama_seq_id sequence = 0;
    std::vector<llama_seq_id*> sequence_of(tokens.size(), &sequence);
    std::vector<std::int8_t> logits(tokens.size(), all_logits ? 1 : 0);
    logits.back() = 1;
    for (std::int32_t i = 0; i < count; ++i) positions[static_cast<std::size_t>(i)] = position + i;
    const llama_batch batch = {
        count,        copy.data(), nullptr, positions.data(), sequences.data(), sequence_of.data(),
        logits.data()};
    if (fresh_) tap_.learn();
    detail::first_complaint().clear();
    const int code = llama_decode(context_.get(), batch);
    fresh_ = false;
    tap_.learnt();
    if (code != 0)
      return engine_failure("could not evaluate the text (code " + std::to_string(code) + ")");
    return Outcome{};
  }

  /// Logits of the token `index` of the last decode.
  std::span<const float> logits(std::int32_t index) const {
    const float* row = llama_get_logits_ith(context_.get(), index);
    const auto count = llama_vocab_n_tokens(llama_model_get_vocab(model_));
    return {row, row != nullptr ? static_cast<std::size_t>(count) : 0};
  }
  llama_token sample(llama_sampler* sampler) {
    return llama_sampler_sample(sampler, context_.get(), -1);
  }

  llama_context* context() { return context_.get(); }
  GenerateTap& tap() { return tap_; }
  /// Cells of the context, after the engine's own rounding.
  std::size_t cells() const { return llama_n_ctx(context_.get()); }
  /// Bytes of the engine's cache tensors, known after the first decode.
  std::size_t cache_bytes() const {
    std::size_t bytes = 0;
    for (const AttentionLayer& layer : tap_.layers()) {
      if (layer.has_keys) bytes += layer.key_bytes + layer.value_bytes;
    }
    return bytes;
  }

 private:
  static Outcome engine_failure(const std::string& what) {
    const std::string& why = detail::first_complaint();
    return Outcome{"llama.cpp " + what + (why.empty() ? why : ": " + why)};
  }

  llama_model* model_;
  SessionOptions options_;
  GenerateTap tap_;
  Context context_;
  bool fresh_ = false;
};

/// -log p of a token under the logits, in nats.
inline double surprise(std::span<const float> logits, llama_token token) {
  const float top = *std::max_element(logits.begin(), logits.end());
  double total = 0.0;
  for (const float logit : logits) total += std::exp(static_cast<double>(logit - top));
  return std::log(total) - static_cast<double>(logits[static_cast<std::size_t>(token)] - top);
}

/// The tokens of a prompt: begin-of-text if the model wants one, then the text. With `special`,
/// names of control tokens in the text are those tokens.
inline std::vector<llama_token> prompt_tokens(const llama_model* model, const std::string& text,
                                              bool special) {
  const llama_vocab* vocab = llama_model_get_vocab(model);
  std::vector<llama_token> tokens(text.size() / 2 + 16);
  const auto fill = [&]() {
    return llama_tokenize(vocab, text.data(), static_cast<std::int32_t>(text.size()), tokens.data(),
                          static_cast<std::int32_t>(tokens.size()), false, special);
  };
  std::int32_t count = fill();
  if (count < 0) {
    tokens.resize(static_cast<std::size_t>(-std::int64_t{count}));
    count = fill();
  }
  tokens.resize(static_cast<std::size_t>(std::max(count, 0)));
  // Not left to the tokenizer: not all of llama.cpp's add it, and some add an end of text as well.
  const llama_token begin = llama_vocab_bos(vocab);
  const bool begins = !tokens.empty() && tokens.front() == begin;
  if (llama_vocab_get_add_bos(vocab) && !begins) tokens.insert(tokens.begin(), begin);
  return tokens;
}

/// The text as a user's message in the model's own chat template. Fails if it has none.
inline Result<std::string> as_chat(const llama_model* model, const std::string& text) {
  using R = Result<std::string>;
  const char* form = llama_model_chat_template(model, nullptr);
  if (form == nullptr) return R::failure("--chat: the model has no chat template");
  const llama_chat_message message = {"user", text.c_str()};
  std::string chat(text.size() + 4096, '\0');
  const std::int32_t length = llama_chat_apply_template(form, &message, 1, true, chat.data(),
                                                        static_cast<std::int32_t>(chat.size()));
  if (length < 0 || static_cast<std::size_t>(length) > chat.size()) {
    return R::failure("--chat: llama.cpp does not know the model's chat template");
  }
  chat.resize(static_cast<std::size_t>(length));
  return R::success(std::move(chat));
}

}  // namespace kvlean::llama_cpp
