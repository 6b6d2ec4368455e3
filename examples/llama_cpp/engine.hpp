// The little of llama.cpp that the programs of this folder share: a quiet engine that explains a
// failure in one line, a model on the CPU, a context that is exact, and tokens of text files.
#pragma once

#include <ggml.h>
#include <llama.h>
#include <sys/stat.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <limits>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "bench/io/safetensors.hpp"

namespace kvlean::llama_cpp {

using io::Outcome;
using io::Result;

/// Processor time of this process: a clock that other programs do not disturb. Seconds.
inline double processor_seconds() {
  std::timespec now = {};
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

struct ModelDeleter {
  void operator()(llama_model* model) const { llama_model_free(model); }
};
struct ContextDeleter {
  void operator()(llama_context* context) const { llama_free(context); }
};
using Model = std::unique_ptr<llama_model, ModelDeleter>;
using Context = std::unique_ptr<llama_context, ContextDeleter>;

namespace detail {

/// The first complaint since the last reset: later ones only repeat that something failed.
inline std::string& first_complaint() {
  static std::string line;
  return line;
}

inline void on_log(ggml_log_level level, const char* text, void*) {
  std::string& line = first_complaint();
  if (level != GGML_LOG_LEVEL_ERROR || !line.empty()) return;
  std::string_view message = text;
  message = message.substr(0, message.find('\n'));
  // "function_name: message": the message alone is for the reader.
  if (const std::size_t colon = message.find(": "); colon != std::string_view::npos) {
    if (message.substr(0, colon).find(' ') == std::string_view::npos)
      message.remove_prefix(colon + 2);
  }
  line = message;
}

inline std::string& program_name() {
  static std::string name = "kvlean";
  return name;
}

/// llama.cpp ends the process when an assertion of its own fails; this makes it one line.
[[noreturn]] inline void on_abort(const char* message) {
  std::string_view text = message;
  text = text.substr(0, text.find('\n'));
  std::fprintf(stderr, "%s: llama.cpp gave up: %.*s\n", program_name().c_str(),
               static_cast<int>(text.size()), text.data());
  std::_Exit(1);
}

}  // namespace detail

/// Starts the engine: its log is silenced, its errors are kept for error lines, and an assertion
/// that fails inside it prints one line that begins with `program`. Fails if the header this
/// program was compiled with does not belong to the library it is linked with: the structs of
/// llama.cpp gain fields in the middle, and then every later field is misread.
inline Outcome start_engine(const char* program) {
  detail::program_name() = program;
  llama_log_set(detail::on_log, nullptr);
  ggml_set_abort_callback(detail::on_abort);
  const llama_context_params context = llama_context_default_params();
  const llama_model_params model = llama_model_default_params();
  const bool matches = context.n_batch == 2048 && context.n_ubatch == 512 &&
                       context.flash_attn_type == LLAMA_FLASH_ATTN_TYPE_AUTO &&
                       context.yarn_ext_factor == -1.0f && context.cb_eval == nullptr &&
                       context.type_k == GGML_TYPE_F16 && context.type_v == GGML_TYPE_F16 &&
                       context.offload_kqv && model.use_extra_bufts && !model.vocab_only &&
                       !model.check_tensors;
  if (!matches) {
    return Outcome{"the llama.cpp library and its headers are of different versions"};
  }
  llama_backend_init();
  return Outcome{};
}

/// Loads a GGUF file for the CPU; weights stay in the file's own layout. Fails, in one line that
/// begins with the path, if the file is missing, no GGUF, truncated, damaged in a way that shows,
/// or of an architecture that this llama.cpp does not know.
inline Result<Model> load_model(const std::string& path) {
  using R = Result<Model>;
  const auto fail = [&](const std::string& why) { return R::failure(path + ": " + why); };
  {
    const io::detail::FileHandle file(std::fopen(path.c_str(), "rbe"));
    if (!file) return fail("cannot open: " + io::detail::errno_text(errno));
    struct stat info = {};
    if (fstat(fileno(file.get()), &info) != 0 || !S_ISREG(info.st_mode)) {
      return fail("not a regular file");
    }
    std::array<char, 4> magic = {};
    if (std::fread(magic.data(), 1, magic.size(), file.get()) != magic.size() ||
        std::memcmp(magic.data(), "GGUF", magic.size()) != 0) {
      return fail("not a GGUF file");
    }
  }
  llama_model_params params = llama_model_default_params();
  params.n_gpu_layers = 0;
  params.use_extra_bufts = false;
  detail::first_complaint().clear();
  Model model(llama_model_load_from_file(path.c_str(), params));
  if (!model) {
    const std::string& why = detail::first_complaint();
    return fail("llama.cpp cannot load this model" + (why.empty() ? why : ": " + why));
  }
  return R::success(std::move(model));
}

/// What a context is opened with.
struct ContextOptions {
  std::size_t tokens = 0;  ///< room for so many
  std::size_t batch = 0;   ///< tokens evaluated at a time, at most
  int threads = 1;
  ggml_backend_sched_eval_callback on_node = nullptr;
  void* on_node_data = nullptr;
  std::size_t sequences = 1;  ///< that share one cache
  ggml_type cache_type = GGML_TYPE_F32;
  bool flash_attention = false;
};

/// Opens a context. With the default options its attention can be read and is exact: cache in F32,
/// no flash attention, sliding-window layers with a cache of full length, everything on the CPU.
inline Result<Context> open_context(llama_model* model, const ContextOptions& options) {
  llama_context_params params = llama_context_default_params();
  params.n_ctx = static_cast<std::uint32_t>(options.tokens);
  params.n_batch = static_cast<std::uint32_t>(options.batch);
  params.n_ubatch = static_cast<std::uint32_t>(options.batch);
  params.n_threads = options.threads;
  params.n_threads_batch = options.threads;
  params.flash_attn_type =
      options.flash_attention ? LLAMA_FLASH_ATTN_TYPE_ENABLED : LLAMA_FLASH_ATTN_TYPE_DISABLED;
  params.type_k = options.cache_type;
  params.type_v = options.cache_type;
  params.n_seq_max = static_cast<std::uint32_t>(options.sequences);
  params.kv_unified = options.sequences > 1;
  params.swa_full = true;
  params.offload_kqv = false;
  params.op_offload = false;
  params.cb_eval = options.on_node;
  params.cb_eval_user_data = options.on_node_data;
  detail::first_complaint().clear();
  Context context(llama_init_from_model(model, params));
  if (!context) {
    const std::string& why = detail::first_complaint();
    return Result<Context>::failure("llama.cpp cannot open a context of " +
                                    std::to_string(options.tokens) + " tokens" +
                                    (why.empty() ? why : ": " + why));
  }
  return Result<Context>::success(std::move(context));
}

/// An evaluation callback whose receiver can change while the context lives: open the context with
/// `on_node` and a pointer to the switch. Without a receiver the engine runs undisturbed, but for
/// what set_exact_gelu() says.
class NodeSwitch {
 public:
  /// `receiver` has the static function on_node(node, ask, receiver).
  template <class Receiver>
  void set(Receiver& receiver) {
    receive_ = Receiver::on_node;
    receiver_ = &receiver;
  }
  void clear() { receive_ = nullptr; }
  /// Whether gated GELU is computed anew, in float. llama.cpp looks it up in a table by the
  /// argument rounded to F16; one rounding that tips over is then larger than any other in the
  /// graph.
  void set_exact_gelu(bool exact) { exact_gelu_ = exact; }

  static bool on_node(ggml_tensor* node, bool ask, void* self) {
    const NodeSwitch& own = *static_cast<NodeSwitch*>(self);
    if (own.exact_gelu_ && is_gated_gelu(node)) {
      if (!ask) compute_gated_gelu(node);
      return true;
    }
    return own.receive_ != nullptr ? own.receive_(node, ask, own.receiver_) : !ask;
  }

 private:
  static bool is_gated_gelu(const ggml_tensor* node) {
    return node->op == GGML_OP_GLU && ggml_get_glu_op(node) == GGML_GLU_OP_GEGLU &&
           node->type == GGML_TYPE_F32 && node->src[1] != nullptr && ggml_is_contiguous(node) &&
           ggml_is_contiguous(node->src[0]) && ggml_is_contiguous(node->src[1]);
  }
  /// gelu(gate) * up, with the tanh form of GELU as in ggml.
  static void compute_gated_gelu(const ggml_tensor* node) {
    const auto* gate = static_cast<const float*>(node->src[0]->data);
    const auto* up = static_cast<const float*>(node->src[1]->data);
    auto* output = static_cast<float*>(node->data);
    for (std::int64_t i = 0; i < ggml_nelements(node); ++i) {
      const float x = gate[i];
      const float inner = 0.79788456080286535588f * x * (1.0f + 0.044715f * x * x);
      output[i] = 0.5f * x * (1.0f + std::tanh(inner)) * up[i];
    }
  }

  ggml_backend_sched_eval_callback receive_ = nullptr;
  void* receiver_ = nullptr;
  bool exact_gelu_ = false;
};

/// Tokens to be evaluated together, each with a place in a sequence.
class Batch {
 public:
  explicit Batch(std::size_t capacity)
      : batch_(llama_batch_init(static_cast<std::int32_t>(capacity), 0, 1)), capacity_(capacity) {}
  ~Batch() { llama_batch_free(batch_); }
  Batch(const Batch&) = delete;
  Batch& operator=(const Batch&) = delete;

  void clear() { batch_.n_tokens = 0; }
  [[nodiscard]] std::size_t size() const { return static_cast<std::size_t>(batch_.n_tokens); }
  [[nodiscard]] std::size_t capacity() const { return capacity_; }
  /// There must be room. `logits`: the prediction after this token is wanted.
  void add(llama_token token, llama_pos position, llama_seq_id sequence, bool logits) {
    const std::int32_t i = batch_.n_tokens++;
    batch_.token[i] = token;
    batch_.pos[i] = position;
    batch_.n_seq_id[i] = 1;
    batch_.seq_id[i][0] = sequence;
    batch_.logits[i] = logits ? 1 : 0;
  }
  [[nodiscard]] const llama_batch& view() const { return batch_; }

 private:
  llama_batch batch_;
  std::size_t capacity_;
};

/// Evaluates a batch. Fails if the engine does.
inline Outcome decode(llama_context* context, const Batch& batch) {
  detail::first_complaint().clear();
  const int code = llama_decode(context, batch.view());
  if (code == 0) return Outcome{};
  const std::string& why = detail::first_complaint();
  return Outcome{"llama.cpp could not evaluate the text (code " + std::to_string(code) + ")" +
                 (why.empty() ? why : ": " + why)};
}

/// A metadata value of the model, as text; empty if it has none of that key.
inline std::string model_metadata(const llama_model* model, const std::string& key) {
  const int length = llama_model_meta_val_str(model, key.c_str(), nullptr, 0);
  if (length < 0) return {};
  std::string value(static_cast<std::size_t>(length) + 1, '\0');
  llama_model_meta_val_str(model, key.c_str(), value.data(), value.size());
  value.resize(static_cast<std::size_t>(length));
  return value;
}

/// Reads a whole text file. Fails, in one line that begins with the path, if it cannot.
inline Result<std::string> read_text(const std::string& path) {
  using R = Result<std::string>;
  const auto fail = [&](const std::string& why) { return R::failure(path + ": " + why); };
  const io::detail::FileHandle file(std::fopen(path.c_str(), "rbe"));
  if (!file) return fail("cannot open: " + io::detail::errno_text(errno));
  std::string text;
  std::array<char, 65536> block = {};
  std::size_t count = 0;
  while ((count = std::fread(block.data(), 1, block.size(), file.get())) > 0) {
    text.append(block.data(), count);
  }
  if (std::ferror(file.get()) != 0) return fail("cannot read: " + io::detail::errno_text(errno));
  return R::success(std::move(text));
}

/// The tokens of a text as plain text: nothing added, no special token recognised.
inline std::vector<llama_token> tokenize(const llama_vocab* vocab, std::string_view text) {
  text = text.substr(0, static_cast<std::size_t>(std::numeric_limits<std::int32_t>::max()));
  const auto bytes = static_cast<std::int32_t>(text.size());
  std::vector<llama_token> tokens(text.size() / 2 + 16);
  std::int32_t count = llama_tokenize(vocab, text.data(), bytes, tokens.data(),
                                      static_cast<std::int32_t>(tokens.size()), false, false);
  if (count < 0) {
    tokens.resize(static_cast<std::size_t>(-std::int64_t{count}));
    count = llama_tokenize(vocab, text.data(), bytes, tokens.data(),
                           static_cast<std::int32_t>(tokens.size()), false, false);
  }
  tokens.resize(static_cast<std::size_t>(std::max(count, 0)));
  return tokens;
}

/// Exactly `needed` tokens of a text, from its token `skipped` on; the first one is the model's
/// begin-of-text token if its tokenizer adds one. Fails if the text is too short.
inline Result<std::vector<llama_token>> take_tokens(const llama_model* model, std::string_view text,
                                                    std::size_t skipped, std::size_t needed) {
  using R = Result<std::vector<llama_token>>;
  const llama_vocab* vocab = llama_model_get_vocab(model);
  const bool begins = llama_vocab_get_add_bos(vocab);
  const std::size_t taken = begins ? needed - 1 : needed;
  const std::size_t wanted = skipped + taken;
  // A long text is cut where it surely holds enough tokens, or else tried again twice as long.
  std::size_t bytes = 4096 + 8 * wanted;
  std::vector<llama_token> tokens = tokenize(vocab, text.substr(0, bytes));
  while (tokens.size() < wanted + 64 && bytes < text.size()) {
    bytes *= 2;
    tokens = tokenize(vocab, text.substr(0, bytes));
  }
  if (tokens.size() < wanted) {
    return R::failure("the text is too short: it has " + std::to_string(tokens.size()) +
                      " tokens and " + std::to_string(wanted) + " are needed");
  }
  std::vector<llama_token> result(needed);
  if (begins) result.front() = llama_vocab_bos(vocab);
  std::copy_n(tokens.begin() + static_cast<std::ptrdiff_t>(skipped), taken,
              result.end() - static_cast<std::ptrdiff_t>(taken));
  return R::success(std::move(result));
}

/// Evaluates the tokens from an empty cache, `batch` at a time. `before(first, count)` is called
/// ahead of each batch. Fails if the engine does.
template <class Before>
Outcome evaluate(llama_context* context, std::span<llama_token> tokens, std::size_t batch,
                 Before&& before) {
  llama_memory_clear(llama_get_memory(context), true);
  Batch tokens_of_batch(batch);
  for (std::size_t first = 0; first < tokens.size(); first += batch) {
    const std::span<llama_token> part =
        tokens.subspan(first, std::min(batch, tokens.size() - first));
    before(first, part.size());
    tokens_of_batch.clear();
    for (std::size_t i = 0; i < part.size(); ++i) {
      tokens_of_batch.add(part[i], static_cast<llama_pos>(first + i), 0, i + 1 == part.size());
    }
    if (Outcome done = decode(context, tokens_of_batch); !done) return done;
  }
  return Outcome{};
}

}  // namespace kvlean::llama_cpp
