// kvlean-generate: continues a text with stock llama.cpp on a compressed KV cache. See README.md
// beside this file for its use and for how the cache is rewritten.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <nlohmann/json.hpp>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "bench/io/capture.hpp"
#include "engine.hpp"
#include "generate_cache.hpp"
#include "generate_session.hpp"

namespace {

using kvlean::io::Outcome;
using kvlean::io::Result;
using kvlean::llama_cpp::LogMassUse;
using kvlean::llama_cpp::Sampler;
using kvlean::llama_cpp::Session;
using kvlean::llama_cpp::SlotCache;
using Clock = std::chrono::steady_clock;

constexpr const char* program = "kvlean-generate";

struct Options {
  std::string model;
  std::string prompt;
  std::string file;
  std::string policy = "snapkv";
  std::string budget = "0.35";
  std::size_t tokens = 128;
  std::size_t context = 0;  ///< tokens of the text that are used; 0: all
  bool stream = false;
  std::size_t chunk = 256;
  std::size_t compress_every = 0;  ///< 0: once, after the text
  std::string positions;           ///< empty: keep, or contiguous in a stream
  bool chat = false;
  bool compare = false;
  bool ignore_end = false;
  bool score = false;
  std::uint32_t seed = 0;
  float temperature = 0.0f;
  int top_k = 40;
  int threads = 1;
  std::string cache_type = "f16";
  std::string flash_attention = "on";
  std::string log_mass;  ///< empty: add where it can be, else refuse
  std::string sharing = "equal_count";
  kvlean::u32 sinks = kvlean::Protection{}.sinks;
  kvlean::u32 recent = kvlean::Protection{}.recent;
  std::size_t report_every = 1024;
  std::string json;
};

/// What a run has to tell.
struct Report {
  std::size_t text_tokens = 0;
  std::size_t new_tokens = 0;
  double prefill_seconds = 0.0;
  double compress_seconds = 0.0;
  std::size_t compressions = 0;
  std::size_t slots_shortest = 0;
  std::size_t slots = 0;
  std::size_t tokens_compressed = 0;  ///< tokens before the (last) compression
  std::size_t cells_before = 0;
  std::size_t cells_after = 0;
  std::size_t bytes_before = 0;
  std::size_t bytes_after = 0;
  double rate_before = 0.0;  ///< tokens a second; 0: not measured
  double rate_after = 0.0;
  std::string text;
  std::optional<std::string> full_text;
  std::size_t agreeing = 0;  ///< leading tokens that are those of the full cache
  std::size_t compared = 0;
  struct Sample {
    std::size_t tokens = 0;
    std::size_t cells = 0;
    std::size_t resident_bytes = 0;
    double nats_a_token = 0.0;
  };
  std::vector<Sample> samples;
  double nats = 0.0;
  std::size_t scored = 0;
};

double megabytes(std::size_t bytes) { return static_cast<double>(bytes) / 1e6; }
double rate(std::size_t tokens, double seconds) {
  return seconds > 0.0 ? static_cast<double>(tokens) / seconds : 0.0;
}

/// A number of slots, or a fraction of the tokens: "1024" or "0.35".
Result<kvlean::Budget> parse_budget(const std::string& text) {
  using R = Result<kvlean::Budget>;
  const auto slots = kvlean::io::detail::parse_number<std::size_t>(text);
  if (slots && *slots > 1) return R::success(kvlean::Budget::slots(*slots));
  const auto fraction = kvlean::io::detail::parse_number<double>(text);
  if (fraction && *fraction > 0.0 && *fraction <= 1.0) {
    return R::success(kvlean::Budget::fraction(*fraction));
  }
  return R::failure("--budget: '" + text + "' is neither a fraction of the tokens (0.35) nor a " +
                    "number of slots (1024)");
}

/// Everything that a run works with.
class Generator {
 public:
  Generator(llama_model* model, const Options& options, const kvlean::AnyPolicy& policy,
            kvlean::Budget budget)
      : vocab_(llama_model_get_vocab(model)),
        options_(options),
        budget_(budget),
        session_(model, {options.threads, options.flash_attention == "on",
                         options.cache_type == "f32" ? GGML_TYPE_F32 : GGML_TYPE_F16}),
        cache_(session_.tap(), policy, cache_options(options)),
        sampler_(
            kvlean::llama_cpp::make_sampler(options.temperature, options.top_k, options.seed)) {
    if (const auto* scorer = std::get_if<kvlean::SnapKVScorer>(&policy.scorer)) {
      window_ = std::max<std::size_t>(window_, scorer->window);
    }
  }

  /// The text is compressed once; generation adds to the smaller cache, or, with --compress-every,
  /// is compressed again and again.
  Outcome run_once(std::span<const llama_token> text, Report& report) {
    const std::size_t every = options_.compress_every;
    const std::size_t probes =
        std::min<std::size_t>(options_.tokens, options_.compare ? options_.tokens : 32);
    if (Outcome opened = session_.open(text.size() + probes, text_batch); !opened) return opened;
    const auto start = Clock::now();
    for (std::size_t first = 0; first < text.size(); first += text_batch) {
      const auto part = text.subspan(first, std::min(text_batch, text.size() - first));
      if (Outcome fed = feed(part, report); !fed) return fed;
      if (!cache_.wants_mass()) continue;
      if (Outcome read = cache_.fetch(session_.context()); !read) return read;
      if (Outcome added = cache_.accumulate(); !added) return added;
    }
    report.prefill_seconds = seconds_since(start);
    report.cells_before = session_.cells();
    report.bytes_before = session_.cache_bytes();
    sample_memory(report, text.size());
    if (Outcome read = cache_.fetch(session_.context()); !read) return read;
    std::vector<llama_token> full;
    const llama_token first = session_.sample(sampler_.get());
    {
      // What the full cache says next, and how fast.
      session_.tap().record(0);
      Sampler sampler =
          kvlean::llama_cpp::make_sampler(options_.temperature, options_.top_k, options_.seed);
      full.push_back(session_.sample(sampler.get()));
      const auto begin = Clock::now();
      std::int32_t position = cache_.next_position();
      while (full.size() < probes && !ends(full.back())) {
        if (Outcome done = session_.decode({&full.back(), 1}, position++); !done) return done;
        full.push_back(session_.sample(sampler.get()));
      }
      report.rate_before = rate(full.size() - 1, seconds_since(begin));
    }
    session_.close();
    if (Outcome small = compress(text.size(), report); !small) return small;
    const std::size_t room = every != 0 ? std::min(every, options_.tokens) : options_.tokens;
    const std::size_t largest =
        every != 0 ? budget_slots(text.size() + options_.tokens) : cache_.longest();
    if (Outcome opened = session_.open(std::max(largest, cache_.longest()) + room, step_batch);
        !opened) {
      return opened;
    }
    if (Outcome stored = cache_.store(session_.context()); !stored) return stored;
    if (every != 0) session_.tap().record(cache_.wants_mass() ? every : window_);

    std::vector<llama_token> made = {first};
    if (Outcome done = generate(made, text.size(), every, report); !done) return done;
    report.cells_after = session_.cells();
    report.bytes_after = session_.cache_bytes();
    sample_memory(report, text.size() + made.size());
    if (options_.compare) {
      report.full_text = text_of(full);
      report.compared = std::min(full.size(), made.size());
      report.agreeing = static_cast<std::size_t>(
          std::mismatch(full.begin(), full.begin() + static_cast<std::ptrdiff_t>(report.compared),
                        made.begin())
              .first -
          full.begin());
    }
    return Outcome{};
  }

  /// Text and generation of any length in one context of budget + chunk cells.
  Outcome run_stream(std::span<const llama_token> text, Report& report) {
    const std::size_t slots = static_cast<std::size_t>(budget_.value());
    const std::size_t limit = slots + options_.chunk;
    if (Outcome opened = session_.open(limit, std::min(options_.chunk, text_batch)); !opened) {
      return opened;
    }
    const auto start = Clock::now();
    while (report.text_tokens < text.size()) {
      if (used_ + std::min(options_.chunk, text.size() - report.text_tokens) > limit) {
        if (Outcome small = shrink(slots, report); !small) return small;
      }
      const std::size_t count =
          std::min({options_.chunk, text_batch, limit - used_, text.size() - report.text_tokens});
      if (Outcome fed = feed(text.subspan(report.text_tokens, count), report); !fed) return fed;
      if (Outcome seen = accumulate_if_due(); !seen) return seen;
      if (report.text_tokens / options_.report_every !=
          (report.text_tokens - count) / options_.report_every) {
        sample_memory(report, report.text_tokens);
      }
    }
    report.prefill_seconds = seconds_since(start);
    report.cells_before = report.cells_after = session_.cells();
    report.bytes_before = report.bytes_after = session_.cache_bytes();
    if (options_.tokens == 0) {
      const bool told = !report.samples.empty() && report.samples.back().tokens == text.size();
      if (!told) sample_memory(report, text.size());
      return Outcome{};
    }
    std::vector<llama_token> made = {session_.sample(sampler_.get())};
    return generate(made, text.size(), options_.chunk, report);
  }

  std::string text_of(std::span<const llama_token> tokens) const {
    std::string text;
    for (const llama_token token : tokens) text += kvlean::llama_cpp::piece_of(vocab_, token);
    return text;
  }
  std::size_t num_layers() const { return cache_.num_layers(); }
  std::size_t num_window_layers() const { return cache_.num_window_layers(); }

 private:
  static constexpr std::size_t text_batch = 512;
  static constexpr std::size_t step_batch = 32;

  static kvlean::llama_cpp::SlotCacheOptions cache_options(const Options& options) {
    kvlean::llama_cpp::SlotCacheOptions result;
    result.plan.protection = {options.sinks, options.recent};
    result.plan.sharing = options.sharing == "per_head" ? kvlean::Sharing::per_head()
                                                        : kvlean::Sharing::equal_count();
    result.plan.seed = options.seed;
    result.contiguous = options.positions == "contiguous";
    const bool can_add = options.flash_attention == "off";
    result.log_mass = options.log_mass == "drop" ? LogMassUse::drop
                      : can_add                  ? LogMassUse::add
                                                 : LogMassUse::refuse;
    return result;
  }

  static double seconds_since(Clock::time_point start) {
    return kvlean::llama_cpp::seconds_since(start);
  }
  bool ends(llama_token token) const {
    return !options_.ignore_end && llama_vocab_is_eog(vocab_, token);
  }
  std::size_t budget_slots(std::size_t tokens) const {
    return budget_.slots_for(static_cast<kvlean::u32>(tokens));
  }

  /// Evaluates a part of the text after what is there.
  Outcome feed(std::span<const llama_token> part, Report& report) {
    if (report.text_tokens == 0)
      session_.tap().record(cache_.wants_mass() ? mass_queries() : window_);
    if (Outcome done = session_.decode(part, next_, options_.score); !done) return done;
    if (report.text_tokens == 0) {
      if (Outcome found = cache_.find_layers(session_.cells()); !found) return found;
    }
    for (std::size_t i = 0; options_.score && i < part.size(); ++i) {
      if (i == 0 && !last_logits_.empty()) {
        add_surprise(kvlean::llama_cpp::surprise(last_logits_, part[0]), report);
      }
      const auto logits = session_.logits(static_cast<std::int32_t>(i));
      if (i + 1 < part.size()) {
        add_surprise(kvlean::llama_cpp::surprise(logits, part[i + 1]), report);
      } else {
        last_logits_.assign(logits.begin(), logits.end());
      }
    }
    report.text_tokens += part.size();
    next_ += static_cast<std::int32_t>(part.size());
    used_ += part.size();
    unseen_ += part.size();
    return Outcome{};
  }
  void add_surprise(double nats, Report& report) {
    report.nats += nats;
    ++report.scored;
    recent_nats_ += nats;
    ++recent_scored_;
  }

  /// How many queries the tap must hold so that none is lost before it is accumulated.
  std::size_t mass_queries() const { return options_.stream ? 2 * options_.chunk : text_batch; }
  Outcome accumulate_if_due() {
    if (!cache_.wants_mass() || unseen_ < options_.chunk) return Outcome{};
    unseen_ = 0;
    if (Outcome read = cache_.fetch(session_.context()); !read) return read;
    return cache_.accumulate();
  }

  /// Compresses what was fetched.
  Outcome compress(std::size_t tokens, Report& report) {
    const auto start = Clock::now();
    report.tokens_compressed = cache_.cells();
    const std::size_t slots = budget_.is_fraction()
                                  ? budget_slots(tokens)
                                  : std::min<std::size_t>(cache_.cells(), budget_slots(tokens));
    if (Outcome done = cache_.compress(slots); !done) return done;
    report.compress_seconds += seconds_since(start);
    ++report.compressions;
    report.slots_shortest = cache_.shortest();
    report.slots = cache_.longest();
    used_ = cache_.longest();
    next_ = cache_.next_position();
    unseen_ = 0;
    return Outcome{};
  }
  /// Compresses the running context's cache and goes on in the same context.
  Outcome shrink(std::size_t tokens, Report& report) {
    if (Outcome read = cache_.fetch(session_.context()); !read) return read;
    if (Outcome small = compress(tokens, report); !small) return small;
    return cache_.store(session_.context());
  }

  /// Goes on from the first new token, shrinking after every `every` tokens if that is not 0. The
  /// text goes to standard output as it comes.
  Outcome generate(std::vector<llama_token>& made, std::size_t text_tokens, std::size_t every,
                   Report& report) {
    const std::size_t limit = every == 0        ? 0
                              : options_.stream ? static_cast<std::size_t>(budget_.value()) + every
                                                : 0;
    std::size_t since = 0;
    const auto start = Clock::now();
    const auto print = [&](llama_token token) {
      const std::string piece = kvlean::llama_cpp::piece_of(vocab_, token);
      report.text += piece;
      std::fwrite(piece.data(), 1, piece.size(), stdout);
      std::fflush(stdout);
    };
    print(made.back());
    while (made.size() < options_.tokens && !ends(made.back())) {
      if (every != 0 && (limit != 0 ? used_ == limit : since == every)) {
        const std::size_t tokens = options_.stream ? limit - every : text_tokens + made.size() - 1;
        if (Outcome small = shrink(tokens, report); !small) return small;
        since = 0;
      }
      if (Outcome done = session_.decode({&made.back(), 1}, next_); !done) return done;
      ++next_;
      ++used_;
      ++since;
      ++unseen_;
      if (options_.stream) {
        if (Outcome seen = accumulate_if_due(); !seen) return seen;
        if ((text_tokens + made.size()) % options_.report_every == 0) {
          sample_memory(report, text_tokens + made.size());
        }
      }
      made.push_back(session_.sample(sampler_.get()));
      print(made.back());
    }
    std::printf("\n");
    report.rate_after = rate(made.size() - 1, seconds_since(start));
    report.new_tokens = made.size();
    return Outcome{};
  }

  void sample_memory(Report& report, std::size_t tokens) {
    Report::Sample sample{tokens, used_, kvlean::llama_cpp::resident_bytes(), 0.0};
    if (recent_scored_ != 0) {
      sample.nats_a_token = recent_nats_ / static_cast<double>(recent_scored_);
    }
    recent_nats_ = 0.0;
    recent_scored_ = 0;
    report.samples.push_back(sample);
    if (!options_.stream) return;
    std::fprintf(stderr, "%8zu tokens  %6zu cells  %8.1f MB resident", sample.tokens, sample.cells,
                 megabytes(sample.resident_bytes));
    if (sample.nats_a_token > 0.0) {
      std::fprintf(stderr, "  %.3f nats a token", sample.nats_a_token);
    }
    std::fprintf(stderr, "\n");
  }

  const llama_vocab* vocab_;
  const Options& options_;
  kvlean::Budget budget_;
  Session session_;
  SlotCache cache_;
  Sampler sampler_;
  std::size_t window_ = 64;  ///< queries that window scorers get
  std::size_t used_ = 0;     ///< cells of the context that hold something
  std::size_t unseen_ = 0;   ///< tokens since attention was last accumulated
  std::int32_t next_ = 0;    ///< position of the next token
  std::vector<float> last_logits_;
  double recent_nats_ = 0.0;
  std::size_t recent_scored_ = 0;
};

void print_report(const Options& options, const Report& report) {
  std::printf("\n");
  if (options.stream) {
    std::printf("text        %zu tokens, %.1f tokens/s\n", report.text_tokens,
                rate(report.text_tokens, report.prefill_seconds));
    if (report.new_tokens != 0) {
      std::printf("new         %zu tokens, %.1f tokens/s\n", report.new_tokens, report.rate_after);
    }
    std::printf("policy      %s, %s slots a head, compressed %zu times in %.2f s\n",
                options.policy.c_str(), options.budget.c_str(), report.compressions,
                report.compress_seconds);
    std::printf("KV cache    %zu cells, %.2f MB, whatever the length\n", report.cells_after,
                megabytes(report.bytes_after));
  } else {
    std::printf("text        %zu tokens, read at %.1f tokens/s\n", report.text_tokens,
                rate(report.text_tokens, report.prefill_seconds));
    std::printf("policy      %s: %zu of %zu tokens kept a head (%.1f %%), %.2f s\n",
                options.policy.c_str(), report.slots, report.tokens_compressed,
                100.0 * static_cast<double>(report.slots) /
                    static_cast<double>(std::max<std::size_t>(1, report.tokens_compressed)),
                report.compress_seconds);
    std::printf("            %8s  %10s  %8s\n", "cells", "KV MB", "tokens/s");
    std::printf("full        %8zu  %10.2f  %8.1f\n", report.cells_before,
                megabytes(report.bytes_before), report.rate_before);
    std::printf("compressed  %8zu  %10.2f  %8.1f\n", report.cells_after,
                megabytes(report.bytes_after), report.rate_after);
  }
  if (report.full_text) {
    std::printf("the first %zu of %zu tokens are those of the full cache\n", report.agreeing,
                report.compared);
    if (report.agreeing != report.compared) {
      std::printf("full cache:\n%s\n", report.full_text->c_str());
    }
  }
  if (report.scored != 0) {
    std::printf("score       %.4f nats a token over %zu tokens of the text\n",
                report.nats / static_cast<double>(report.scored), report.scored);
  }
}

Outcome save_json(const Options& options, const Report& report) {
  nlohmann::ordered_json record = {
      {"model", options.model},
      {"policy", options.policy},
      {"budget", options.budget},
      {"positions", options.positions},
      {"flash_attention", options.flash_attention == "on"},
      {"cache_type", options.cache_type},
      {"stream", options.stream},
      {"text_tokens", report.text_tokens},
      {"new_tokens", report.new_tokens},
      {"slots", report.slots},
      {"slots_shortest", report.slots_shortest},
      {"compressions", report.compressions},
      {"cells_full", report.cells_before},
      {"cells", report.cells_after},
      {"kv_bytes_full", report.bytes_before},
      {"kv_bytes", report.bytes_after},
      {"tokens_per_second_full", report.rate_before},
      {"tokens_per_second", report.rate_after},
      {"seconds_prefill", report.prefill_seconds},
      {"seconds_compress", report.compress_seconds},
      {"text", report.text},
  };
  if (report.full_text) {
    record["text_full"] = *report.full_text;
    record["agreeing_tokens"] = report.agreeing;
    record["compared_tokens"] = report.compared;
  }
  if (report.scored != 0) {
    record["nats_per_token"] = report.nats / static_cast<double>(report.scored);
  }
  nlohmann::ordered_json samples = nlohmann::ordered_json::array();
  for (const Report::Sample& sample : report.samples) {
    nlohmann::ordered_json entry = {
        {"tokens", sample.tokens}, {"cells", sample.cells}, {"rss_bytes", sample.resident_bytes}};
    if (sample.nats_a_token > 0.0) entry["nats_per_token"] = sample.nats_a_token;
    samples.push_back(std::move(entry));
  }
  record["rss"] = std::move(samples);
  const std::string text = nlohmann::ordered_json::array({record}).dump(
                               2, ' ', false, nlohmann::ordered_json::error_handler_t::replace) +
                           "\n";
  kvlean::io::detail::OutputFile file;
  std::string why = file.open(options.json);
  if (why.empty()) why = file.write(std::as_bytes(std::span(text)));
  if (why.empty()) why = file.commit();
  return Outcome{why.empty() ? why : options.json + ": " + why};
}

/// What does not go together, before anything slow.
Outcome check_options(Options& options, const kvlean::Budget& budget,
                      const kvlean::AnyPolicy& policy) {
  if (options.positions.empty()) options.positions = options.stream ? "contiguous" : "keep";
  if (options.prompt.empty() && options.file.empty()) {
    return Outcome{"there is no text: give --prompt or --file"};
  }
  if (options.tokens == 0 && !options.stream) {
    return Outcome{"--tokens 0 only reads a text, which takes --stream"};
  }
  if (options.stream && policy.keeps_everything) {
    return Outcome{"policy " + options.policy + " keeps everything, which no budget can hold"};
  }
  if (options.stream && budget.is_fraction()) {
    return Outcome{
        "--stream needs a --budget in slots, such as 1024: a fraction of an endless "
        "text grows without end"};
  }
  if (options.stream && options.compress_every != 0) {
    return Outcome{"--stream compresses after every --chunk tokens; leave --compress-every out"};
  }
  if (options.stream && options.compare) {
    return Outcome{"--compare needs the full cache, which --stream never has"};
  }
  if (options.flash_attention == "on" && options.log_mass == "add") {
    return Outcome{"--log-mass add needs --flash-attention off: flash attention hides its scores"};
  }
  if (options.flash_attention == "on" && options.sharing == "per_head") {
    return Outcome{
        "--sharing per_head needs --flash-attention off: cells that a head leaves empty "
        "are masked in its scores"};
  }
  if (std::holds_alternative<kvlean::ExternalScorer>(policy.scorer)) {
    return Outcome{"policy " + options.policy + " needs scores that are computed elsewhere"};
  }
  return Outcome{};
}

/// The text to go on from, as tokens.
Result<std::vector<llama_token>> gather_text(const Options& options, const llama_model* model) {
  using R = Result<std::vector<llama_token>>;
  std::string text;
  if (!options.file.empty()) {
    Result<std::string> read = kvlean::llama_cpp::read_text(options.file);
    if (!read) return R::failure(read.error);
    text = std::move(*read);
  }
  text += options.prompt;
  constexpr std::size_t most = std::size_t{1} << 30;
  if (text.size() > most) return R::failure("the text is longer than a gigabyte");
  if (options.chat) {
    Result<std::string> chat = kvlean::llama_cpp::as_chat(model, text);
    if (!chat) return R::failure(chat.error);
    text = std::move(*chat);
  }
  std::vector<llama_token> tokens = kvlean::llama_cpp::prompt_tokens(model, text, options.chat);
  if (options.context != 0 && tokens.size() > options.context) tokens.resize(options.context);
  if (tokens.empty()) return R::failure("the text has no tokens");
  return R::success(std::move(tokens));
}

/// Whether the model can be asked for so many positions.
Outcome check_length(const Options& options, const kvlean::Budget& budget, std::size_t text,
                     std::size_t trained) {
  if (trained == 0) return Outcome{};
  const std::string made_for = "the model was made for " + std::to_string(trained) + " tokens";
  if (options.stream) {
    const double most = budget.value() + static_cast<double>(options.chunk);
    if (options.positions == "contiguous" && most > static_cast<double>(trained)) {
      return Outcome{"--budget and --chunk make " + std::to_string(static_cast<std::size_t>(most)) +
                     " cells; " + made_for};
    }
    return Outcome{};
  }
  if (text > trained) {
    return Outcome{"the text has " + std::to_string(text) + " tokens; " + made_for +
                   "; use --stream, or --context to cut it"};
  }
  const bool renumbers = options.positions == "contiguous";
  const std::size_t base = renumbers ? budget.slots_for(static_cast<kvlean::u32>(text)) : text;
  const std::size_t added =
      renumbers && options.compress_every != 0 ? options.compress_every : options.tokens;
  if (base + added > trained) {
    return Outcome{"text and --tokens need " + std::to_string(base + added) + " positions; " +
                   made_for + "; use --stream"};
  }
  return Outcome{};
}

/// Everything after the command line; the error is what the user reads.
Outcome run(Options& options) {
  if (Outcome started = kvlean::llama_cpp::start_engine(program); !started) return started;
  const Result<kvlean::Budget> budget = parse_budget(options.budget);
  if (!budget) return Outcome{budget.error};
  kvlean::AnyPolicy policy;
  if (!kvlean::make_policy(options.policy, policy)) {
    return Outcome{"unknown policy '" + options.policy + "'; kvlean-bench --list names them"};
  }
  if (Outcome checked = check_options(options, *budget, policy); !checked) return checked;
  if (!options.json.empty()) {
    if (Outcome writable = kvlean::io::check_writable(options.json); !writable) return writable;
  }
  const auto model = kvlean::llama_cpp::load_model(options.model);
  if (!model) return Outcome{model.error};
  llama_model* const loaded = model->get();
  const auto refuse = [&](const char* why) { return Outcome{options.model + ": " + why}; };
  if (llama_model_has_encoder(loaded) || !llama_model_has_decoder(loaded)) {
    return refuse("not a decoder-only model");
  }
  if (llama_model_is_recurrent(loaded) || llama_model_is_hybrid(loaded)) {
    return refuse("a recurrent model has a state, not a KV cache of all tokens");
  }
  const llama_rope_type rope = llama_model_rope_type(loaded);
  if (rope == LLAMA_ROPE_TYPE_MROPE || rope == LLAMA_ROPE_TYPE_IMROPE ||
      rope == LLAMA_ROPE_TYPE_VISION) {
    return refuse("positions with several axes cannot be rewritten");
  }
  const Result<std::vector<llama_token>> text = gather_text(options, loaded);
  if (!text) return Outcome{text.error};
  const auto trained = static_cast<std::size_t>(std::max(0, llama_model_n_ctx_train(loaded)));
  if (Outcome fits = check_length(options, *budget, text->size(), trained); !fits) return fits;

  Generator generator(loaded, options, policy, *budget);
  Report report;
  const Outcome done =
      options.stream ? generator.run_stream(*text, report) : generator.run_once(*text, report);
  if (!done) return done;
  print_report(options, report);
  return options.json.empty() ? Outcome{} : save_json(options, report);
}

/// One line, whatever a message holds.
void complain(std::string message) {
  std::replace(message.begin(), message.end(), '\n', ' ');
  std::fprintf(stderr, "%s: %s\n", program, message.c_str());
}

void add_options(CLI::App& app, Options& options) {
  constexpr std::size_t most_tokens = std::size_t{1} << 30;
  const auto among = [](std::vector<std::string> names) { return CLI::IsMember(std::move(names)); };
  app.add_option("--model", options.model, "model file (GGUF)")->required();
  app.add_option("--prompt", options.prompt, "text to go on from; after the file's, if both");
  app.add_option("--file", options.file, "file with the text to go on from");
  app.add_option("--policy", options.policy,
                 "which tokens stay: a name or SCORER+ALLOCATOR+REDUCER")
      ->capture_default_str();
  app.add_option("--budget", options.budget, "kept a head: a fraction of the tokens, or slots")
      ->capture_default_str();
  app.add_option("--tokens", options.tokens, "tokens to generate")
      ->capture_default_str()
      ->check(CLI::Range(std::size_t{0}, most_tokens));
  app.add_option("--context", options.context, "use so many tokens of the text (default: all)")
      ->check(CLI::Range(std::size_t{1}, most_tokens));
  app.add_flag("--stream", options.stream, "text and generation of any length on a fixed budget");
  app.add_option("--chunk", options.chunk, "with --stream: tokens between two compressions")
      ->capture_default_str()
      ->check(CLI::Range(std::size_t{1}, std::size_t{1} << 20));
  app.add_option("--compress-every", options.compress_every,
                 "compress again after so many new tokens (default: once, after the text)")
      ->check(CLI::Range(std::size_t{1}, most_tokens));
  app.add_option("--positions", options.positions,
                 "keep: slots keep theirs; contiguous: renumbered (default: keep, but contiguous "
                 "with --stream)")
      ->check(among({"keep", "contiguous"}));
  app.add_flag("--chat", options.chat, "the text is a user's message in the model's chat template");
  app.add_flag("--compare", options.compare, "also generate with the full cache, and compare");
  app.add_flag("--ignore-end", options.ignore_end, "go on after an end-of-text token");
  app.add_flag("--score", options.score, "measure how well the text itself is predicted");
  app.add_option("--seed", options.seed, "of random draws")->capture_default_str();
  app.add_option("--temperature", options.temperature, "0: always the most likely token")
      ->capture_default_str()
      ->check(CLI::Range(0.0f, 100.0f));
  app.add_option("--top-k", options.top_k, "draw from so many tokens; 0: all")
      ->capture_default_str()
      ->check(CLI::Range(0, 1 << 30));
  app.add_option("--threads", options.threads, "threads of llama.cpp")
      ->capture_default_str()
      ->check(CLI::Range(1, 1024));
  app.add_option("--cache-type", options.cache_type, "type of the engine's cache")
      ->capture_default_str()
      ->check(among({"f16", "f32"}));
  app.add_option("--flash-attention", options.flash_attention, "the engine's flash attention")
      ->capture_default_str()
      ->check(among({"on", "off"}));
  app.add_option("--log-mass", options.log_mass,
                 "log mass of slots: add it to the scores (default without flash attention), or "
                 "drop it")
      ->check(among({"add", "drop"}));
  app.add_option("--sharing", options.sharing,
                 "equal_count: as many tokens for every head; per_head: cells up to the longest")
      ->capture_default_str()
      ->check(among({"equal_count", "per_head"}));
  app.add_option("--sinks", options.sinks, "first tokens that always stay")->capture_default_str();
  app.add_option("--recent", options.recent, "last tokens that always stay")->capture_default_str();
  app.add_option("--report-every", options.report_every, "with --stream: tokens between reports")
      ->capture_default_str()
      ->check(CLI::Range(std::size_t{1}, most_tokens));
  app.add_option("--json", options.json, "write the numbers and the text as JSON");
}

}  // namespace

int main(int argc, char** argv) {
  try {
    Options options;
    CLI::App app("Continues a text with stock llama.cpp on a compressed KV cache.", program);
    add_options(app, options);
    app.failure_message([](const CLI::App*, const CLI::Error& error) {
      return std::string(program) + ": " + error.what() + "\n";
    });
    CLI11_PARSE(app, argc, argv);
    if (const Outcome done = run(options); !done) {
      complain(done.error);
      return 1;
    }
    return 0;
  } catch (const std::exception& error) {
    complain(error.what());
  } catch (...) {
    complain("unknown failure");
  }
  return 1;
}
