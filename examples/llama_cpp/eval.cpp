// kvlean-eval: what compressing the cache does to a model, end to end in llama.cpp. Attention of
// every layer is computed from our own ragged caches while the engine does all the rest. See
// README.md beside this file.
#include <sys/stat.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdio>
#include <ctime>
#include <exception>
#include <filesystem>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "bench/eval/items.hpp"
#include "bench/eval/progress.hpp"
#include "bench/eval/records.hpp"
#include "bench/eval/report.hpp"
#include "bench/eval/summary.hpp"
#include "bench/eval/texts.hpp"
#include "bench/io/capture.hpp"
#include "eval_model.hpp"
#include "eval_run.hpp"
#include "kvlean/version.hpp"

namespace kvlean::llama_cpp {
namespace {

constexpr const char* program = "kvlean-eval";
constexpr double most_logit_error = 1e-4;

/// A fault of the caller's, told in one line.
struct UsageError {
  std::string line;
};

struct Arguments {
  std::string model;
  std::vector<std::string> texts;
  std::string texts_folder;
  std::vector<std::string> tasks;
  std::vector<std::size_t> lengths;
  std::vector<std::string> policies;
  std::vector<std::string> budgets;
  std::vector<std::string> baselines = {"streaming_llm"};
  std::string mode = "agnostic";
  std::string split = "confirm";
  std::size_t samples = 10;
  std::size_t documents = 40;
  std::size_t answer_tokens = 64;
  std::size_t candidates = 20;
  std::uint64_t seed = 42;
  std::size_t open_loop_queries = 16;
  std::uint32_t sinks = 4;
  std::uint32_t recent = 32;
  std::string cache_type = "f32";
  std::string weights = "f32";
  std::string shard;
  int threads = 1;
  std::string records;
  std::vector<std::string> from_records;
  std::string json;
  std::string html;
  std::string plots;
  bool equal_bytes = false;
  bool yardsticks = false;
  bool cross_check = false;
  bool quick = false;
  bool smoke = false;
  bool list = false;
  bool quiet = false;
  bool all_tasks = false;  ///< what does not fit is left out
};

void declare(CLI::App& app, Arguments& arguments) {
  app.add_option("--model", arguments.model, "model file (GGUF)")->type_name("FILE");
  app.add_option("--text", arguments.texts, "text files that documents are cut from")
      ->type_name("FILE");
  app.add_option("--texts", arguments.texts_folder,
                 "folder of texts with a manifest (bench/eval/get_texts.sh); default: the cache "
                 "folder if it has one, else a short built-in text")
      ->type_name("FOLDER");
  app.add_option("--task", arguments.tasks, "tasks, or all (default: text)")->delimiter(',');
  app.add_option("--length", arguments.lengths, "tokens of the context (default: 2048)")
      ->delimiter(',')
      ->type_name("N");
  app.add_option("--policy", arguments.policies, "policies; --list prints all of them")
      ->delimiter(',');
  app.add_option("--budget", arguments.budgets,
                 "kept shares of the slots (default: 0.5,0.25,0.125)")
      ->delimiter(',');
  app.add_option("--baseline", arguments.baselines,
                 "policies that are run too, and that all others are compared to")
      ->delimiter(',')
      ->capture_default_str();
  app.add_option("--mode", arguments.mode,
                 "agnostic: the policy sees the context alone; aware: the question too; both")
      ->capture_default_str()
      ->check(CLI::IsMember({"agnostic", "aware", "both"}));
  app.add_flag("--equal-bytes", arguments.equal_bytes,
               "policies with log mass keep fewer slots, down to plain eviction's bytes");
  app.add_option("--documents", arguments.documents, "items of the task text")
      ->capture_default_str()
      ->check(CLI::Range(std::size_t{1}, std::size_t{100000}));
  app.add_option("--samples", arguments.samples, "items of every other task; of passkey: a depth")
      ->capture_default_str()
      ->check(CLI::Range(std::size_t{1}, std::size_t{100000}));
  app.add_option("--answer-tokens", arguments.answer_tokens,
                 "tokens of a continuation that are scored")
      ->capture_default_str()
      ->check(CLI::Range(std::size_t{1}, std::size_t{4096}));
  app.add_option("--candidates", arguments.candidates, "of a forced choice")
      ->capture_default_str()
      ->check(CLI::Range(std::size_t{2}, std::size_t{200}));
  app.add_option("--split", arguments.split,
                 "half of the texts: select to choose settings, confirm to publish")
      ->capture_default_str()
      ->check(CLI::IsMember({"select", "confirm"}));
  app.add_option("--seed", arguments.seed, "of items and of policies that draw")
      ->capture_default_str();
  app.add_option("--sinks", arguments.sinks, "protected tokens at the start")
      ->type_name("N")
      ->capture_default_str();
  app.add_option("--recent", arguments.recent, "protected tokens at the end")
      ->type_name("N")
      ->capture_default_str();
  app.add_option("--cache-type", arguments.cache_type, "how compressed caches are stored")
      ->capture_default_str()
      ->check(CLI::IsMember({"f32", "f16", "bf16"}));
  app.add_option("--weights", arguments.weights,
                 "f32: the file's weights written out, so that activations aren't rounded to 8 "
                 "bits; file: as they are")
      ->capture_default_str()
      ->check(CLI::IsMember({"f32", "file"}));
  app.add_option("--open-loop-queries", arguments.open_loop_queries,
                 "queries an item for the open-loop attention error; 0: none")
      ->type_name("N")
      ->capture_default_str()
      ->check(CLI::Range(std::size_t{0}, std::size_t{4096}));
  app.add_flag("--yardsticks", arguments.yardsticks,
               "also the engine's own f16, q8_0 and q4_0 caches, flash attention, and the file's "
               "own weights");
  app.add_flag(
      "--cross-check", arguments.cross_check,
      "only compare our caches with masks over the engine's own scores; exit 1 above 1e-4");
  app.add_flag("--quick", arguments.quick, "the whole protocol, small: minutes");
  app.add_flag("--smoke", arguments.smoke, "a few items of a tiny model: seconds");
  app.add_option("--shard", arguments.shard, "I/N: only every Nth item, from the Ith on")
      ->type_name("I/N");
  app.add_option("--threads", arguments.threads,
                 "of llama.cpp; more processes (--shard) are faster than more threads")
      ->capture_default_str()
      ->check(CLI::Range(1, 1024));
  app.add_option(
         "--records", arguments.records,
         "append a line of JSON an item and setting; what is there already is not run again")
      ->type_name("FILE");
  app.add_option("--from-records", arguments.from_records,
                 "run nothing: report on these records, of several shards for instance")
      ->type_name("FILE");
  app.add_option("--json", arguments.json, "write the summary as JSON")->type_name("FILE");
  app.add_option("--html", arguments.html, "write a self-contained report")->type_name("FILE");
  app.add_option("--plots", arguments.plots, "write the report's plots as SVG files")
      ->type_name("FOLDER");
  app.add_flag("--list", arguments.list, "print all policies, their parts and all tasks, and stop");
  app.add_flag("--quiet", arguments.quiet, "no progress and no tables");
}

template <class Table>
void print_names(const char* heading, const Table& table) {
  std::printf("%s\n", heading);
  for (const auto& entry : table) {
    std::printf("  %-26.*s %.*s\n", static_cast<int>(entry.name.size()), entry.name.data(),
                static_cast<int>(entry.description.size()), entry.description.data());
  }
}

void print_list() {
  print_names("Policies", policy_names);
  print_names("\nScorers, the first part of SCORER+ALLOCATOR+REDUCER", scorer_names);
  print_names("\nAllocators, the second part", allocator_names);
  print_names("\nReducers, the third part", reducer_names);
  print_names("\nTasks", eval::tasks());
}

bool exists(const std::string& path) {
  struct stat info = {};
  return stat(path.c_str(), &info) == 0;
}

/// Options that --quick and --smoke set unless they were given.
void apply_presets(const CLI::App& app, Arguments& arguments) {
  const auto preset = [&](const char* option, auto& value, auto&& wanted) {
    if (app.get_option(option)->count() == 0) value = wanted;
  };
  using Names = std::vector<std::string>;
  if (arguments.quick && arguments.smoke)
    throw UsageError{"--quick and --smoke exclude each other"};
  if (arguments.quick) {
    preset("--model", arguments.model, models_folder() + "/SmolLM2-135M-Instruct.Q4_1.gguf");
    preset("--task", arguments.tasks, Names{"text", "passkey"});
    preset("--length", arguments.lengths, std::vector<std::size_t>{1024});
    preset("--documents", arguments.documents, 8u);
    preset("--samples", arguments.samples, 1u);
    preset("--budget", arguments.budgets, Names{"0.5", "0.2"});
    preset("--policy", arguments.policies,
           Names{"full", "streaming_llm", "random", "h2o", "snapkv", "snapkv+adakv+evict",
                 "kvmerger_mass", "massfold"});
  }
  if (arguments.smoke) {
#ifdef KVLEAN_TINY_MODEL
    preset("--model", arguments.model, std::string(KVLEAN_TINY_MODEL));
#endif
    preset("--task", arguments.tasks, Names{"text", "passkey", "tiny_recall"});
    preset("--length", arguments.lengths, std::vector<std::size_t>{768});
    preset("--documents", arguments.documents, 2u);
    preset("--samples", arguments.samples, 1u);
    preset("--answer-tokens", arguments.answer_tokens, 32u);
    preset("--candidates", arguments.candidates, 5u);
    preset("--budget", arguments.budgets, Names{"0.5", "0.25"});
    preset("--policy", arguments.policies,
           Names{"full", "streaming_llm", "snapkv", "snapkv+adakv_layers+evict", "massfold"});
    preset("--mode", arguments.mode, std::string("both"));
  }
  if (arguments.tasks.empty()) arguments.tasks = {"text"};
  arguments.all_tasks = arguments.tasks == Names{"all"};
  if (arguments.all_tasks) arguments.tasks = eval::task_names();
  if (arguments.lengths.empty()) arguments.lengths = {2048};
  if (arguments.budgets.empty()) arguments.budgets = {"0.5", "0.25", "0.125"};
  if (arguments.policies.empty()) {
    arguments.policies = {"full",   "streaming_llm",      "random",        "h2o",
                          "snapkv", "snapkv+adakv+evict", "kvmerger_mass", "massfold"};
  }
}

double parse_budget(const std::string& text) {
  const auto value = io::detail::parse_number<double>(text);
  if (!value || !(*value > 0.0 && *value <= 1.0)) {
    throw UsageError{"budget '" + io::detail::printable(text) + "' is not a number in (0, 1]"};
  }
  return *value;
}

struct Shard {
  std::size_t index = 0;
  std::size_t count = 1;
};

Shard parse_shard(const std::string& text) {
  if (text.empty()) return {};
  const std::size_t slash = text.find('/');
  const auto number = [&](std::size_t from, std::size_t length) {
    return io::detail::parse_number<std::size_t>(text.substr(from, length)).value_or(0);
  };
  const std::size_t index = slash == std::string::npos ? 0 : number(0, slash);
  const std::size_t count = slash == std::string::npos ? 0 : number(slash + 1, text.size());
  if (index == 0 || index > count) {
    throw UsageError{"--shard: '" + io::detail::printable(text) + "' is not I/N with 1 <= I <= N"};
  }
  return {index - 1, count};
}

template <class T>
T value_or_throw(Result<T> result) {
  if (!result) throw UsageError{result.error};
  return std::move(*result);
}

void demand(const Outcome& outcome) {
  if (!outcome) throw UsageError{outcome.error};
}

eval::Texts load_texts(const Arguments& arguments) {
  if (!arguments.texts.empty() && !arguments.texts_folder.empty()) {
    throw UsageError{"--text and --texts exclude each other"};
  }
  eval::Texts texts;
  for (const std::string& path : arguments.texts) {
    eval::Text text;
    text.name = std::filesystem::path(path).stem().string();
    text.content = value_or_throw(read_text(path));
    for (const eval::Text& earlier : texts) {
      if (earlier.name == text.name) throw UsageError{path + ": two texts of this name"};
    }
    texts.push_back(std::move(text));
  }
  if (!texts.empty()) return texts;
  std::string folder = arguments.texts_folder;
  if (folder.empty() && !arguments.smoke &&
      exists(eval::default_texts_folder() + "/manifest.json")) {
    folder = eval::default_texts_folder();
  }
  if (folder.empty()) return eval::builtin_texts();
  return value_or_throw(eval::load_texts(folder));
}

RunSettings make_settings(const Arguments& arguments) {
  RunSettings settings;
  std::vector<std::string> names = arguments.policies;
  names.insert(names.end(), arguments.baselines.begin(), arguments.baselines.end());
  std::set<std::string> seen;
  for (const std::string& name : names) {
    EvalPolicy policy;
    if (!find_policy(name, policy)) {
      throw UsageError{"unknown policy '" + io::detail::printable(name) +
                       "'; --list prints all of them"};
    }
    if (seen.insert(policy.name).second) settings.policies.push_back(std::move(policy));
  }
  for (const std::string& text : arguments.budgets) {
    const double budget = parse_budget(text);
    if (std::find(settings.budgets.begin(), settings.budgets.end(), budget) ==
        settings.budgets.end()) {
      settings.budgets.push_back(budget);
    }
  }
  if (arguments.mode != "agnostic") settings.modes.push_back(Mode::aware);
  if (arguments.mode != "aware") settings.modes.push_back(Mode::agnostic);
  settings.plan.protection = {arguments.sinks, arguments.recent};
  settings.plan.seed = arguments.seed;
  settings.plan.equal_bytes = arguments.equal_bytes;
  settings.cache_type = arguments.cache_type == "f16"    ? DType::f16
                        : arguments.cache_type == "bf16" ? DType::bf16
                                                         : DType::f32;
  settings.open_loop_queries = arguments.open_loop_queries;
  settings.base.cache_type = arguments.cache_type;
  settings.base.settings =
      "sinks=" + std::to_string(arguments.sinks) + " recent=" + std::to_string(arguments.recent) +
      " seed=" + std::to_string(arguments.seed) + " split=" + arguments.split +
      " weights=" + arguments.weights + (arguments.equal_bytes ? " equal-bytes" : "");
  return settings;
}

/// The items of all tasks and lengths, in tokens; of this shard only.
std::vector<EvalItem> make_items(const Arguments& arguments, const llama_model* model,
                                 const eval::Texts& texts) {
  const llama_vocab* vocab = llama_model_get_vocab(model);
  const eval::CountTokens count = [&](std::string_view text) {
    return tokenize(vocab, text).size();
  };
  const auto trained = static_cast<std::size_t>(std::max(0, llama_model_n_ctx_train(model)));
  const Shard shard = parse_shard(arguments.shard);
  std::vector<EvalItem> items;
  std::size_t index = 0;
  for (const std::string& task : arguments.tasks) {
    for (const std::size_t length : arguments.lengths) {
      eval::TaskOptions options;
      options.context_tokens = length;
      options.samples = task == "text" ? arguments.documents : arguments.samples;
      options.seed = arguments.seed;
      options.answer_tokens = arguments.answer_tokens;
      options.candidates = arguments.candidates;
      options.split = arguments.split == "select" ? eval::Split::select : eval::Split::confirm;
      Result<std::vector<eval::Item>> made_items = eval::make_items(task, options, texts, count);
      if (!made_items && arguments.all_tasks) {
        if (!arguments.quiet) std::printf("left out: %s\n", made_items.error.c_str());
        continue;
      }
      for (const eval::Item& item : value_or_throw(std::move(made_items))) {
        if (index++ % shard.count != shard.index) continue;
        EvalItem made = value_or_throw(tokenize_item(model, item));
        if (trained > 0 &&
            made.tokens.prompt.size() + made.tokens.answer.size() + made.tokens.max_new_tokens >
                trained) {
          throw UsageError{item.id + ": longer than the " + std::to_string(trained) +
                           " tokens that the model was made for"};
        }
        items.push_back(std::move(made));
      }
    }
  }
  if (items.empty()) throw UsageError{"there is nothing to run: no item was made"};
  return items;
}

std::string utc_now() {
  const std::time_t now = std::time(nullptr);
  std::tm parts = {};
  gmtime_r(&now, &parts);
  char text[32];
  std::strftime(text, sizeof text, "%Y-%m-%dT%H:%M:%SZ", &parts);
  return text;
}

std::string compiler_text() {
#if defined(__clang__)
  return "clang " + std::to_string(__clang_major__) + "." + std::to_string(__clang_minor__);
#else
  return "g++ " + std::to_string(__GNUC__) + "." + std::to_string(__GNUC_MINOR__);
#endif
}

std::string command_of(int argc, char** argv) {
  std::string command = std::filesystem::path(argv[0]).filename().string();
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    const bool plain = !word.empty() && word.find_first_of(" '\"\\$*?;&|<>()") == std::string::npos;
    command += plain ? " " + word : " '" + word + "'";
  }
  return command;
}

std::string number(double value, const char* format) {
  char text[64];
  std::snprintf(text, sizeof text, format, value);
  return text;
}

/// Everything but the run: tables, and the files that were asked for.
void report(const Arguments& arguments, const eval::RunMeta& meta,
            const std::vector<eval::ItemRecord>& records) {
  eval::SummaryOptions options;
  options.baselines = arguments.baselines;
  options.bootstrap.seed = arguments.seed;
  const std::vector<eval::SummaryRecord> summary = eval::summarise_records(records, options);
  if (!arguments.quiet) std::fputs(eval::to_tables(summary).c_str(), stdout);
  if (!arguments.json.empty()) {
    demand(eval::write_file(arguments.json, eval::to_json(meta, summary)));
  }
  if (!arguments.html.empty()) {
    demand(eval::write_file(arguments.html, eval::to_html(meta, summary, records)));
  }
  if (!arguments.plots.empty()) {
    std::error_code error;
    std::filesystem::create_directories(arguments.plots, error);
    for (const auto& [name, content] : eval::to_plots(summary, records)) {
      demand(eval::write_file(arguments.plots + "/" + name, content));
    }
  }
}

/// Faults that would otherwise show only after minutes of work.
void check_files(const Arguments& arguments) {
  for (const std::string* path : {&arguments.json, &arguments.html}) {
    if (!path->empty()) demand(io::check_writable(*path));
  }
}

RopePairing pairing_of(const llama_model* model) {
  switch (llama_model_rope_type(model)) {
    case LLAMA_ROPE_TYPE_NORM:
      return RopePairing::norm;
    case LLAMA_ROPE_TYPE_NEOX:
    case LLAMA_ROPE_TYPE_MROPE:
    case LLAMA_ROPE_TYPE_IMROPE:
      return RopePairing::neox;
    default:
      return RopePairing::none;
  }
}

/// The first item of every task that is no generation, in our caches and by masks. True if all
/// agree.
bool run_cross_check(const Arguments& arguments, EvalEngine& engine,
                     const std::vector<EvalItem>& items, RopePairing pairing) {
  const double budget = parse_budget(arguments.budgets.front());
  std::set<std::string> seen;
  bool good = true;
  for (const EvalItem& item : items) {
    if (item.tokens.kind == eval::ItemKind::generation) continue;
    if (!seen.insert(item.item.task).second) continue;
    for (const CheckResult& result : value_or_throw(cross_check(engine, item, pairing, budget))) {
      const bool agrees = result.error <= most_logit_error;
      good = good && agrees;
      std::printf("%-4s %-44s %s  %s\n", agrees ? "ok" : "FAIL", result.name.c_str(),
                  number(result.error, "%.2e").c_str(), item.item.id.c_str());
    }
  }
  if (seen.empty()) throw UsageError{"--cross-check: generations cannot be compared"};
  return good;
}

/// The engine's own ways to compute the same, each with a context of its own.
struct Yardsticks {
  Model file_model;  ///< the file as it is
  std::vector<std::unique_ptr<EvalEngine>> engines;
  std::vector<Yardstick> list;

  void open(const std::string& path, llama_model* model, bool converted,
            EvalEngine::Options options) {
    struct Kind {
      std::string_view policy;
      ggml_type type;
      bool flash;
      double ratio;  ///< to an F16 cache
    };
    options.exact = false;
    const auto add = [&](llama_model* of, const Kind& kind) {
      options.cache_type = kind.type;
      options.flash_attention = kind.flash;
      engines.push_back(value_or_throw(EvalEngine::open(of, options)));
      list.push_back(
          {std::string(kind.policy), ggml_type_name(kind.type), kind.ratio, engines.back().get()});
    };
    add(model, {eval::policy_noise_floor, GGML_TYPE_F32, true, 1.0});
    add(model, {eval::policy_cache_f16, GGML_TYPE_F16, false, 1.0});
    add(model, {eval::policy_cache_q8_0, GGML_TYPE_Q8_0, true, 64.0 / 34.0});
    add(model, {eval::policy_cache_q4_0, GGML_TYPE_Q4_0, true, 64.0 / 18.0});
    if (!converted) return;
    file_model = value_or_throw(load_model(path));
    add(file_model.get(), {eval::policy_engine_weights, GGML_TYPE_F32, false, 1.0});
  }
};

int run(Arguments& arguments, const std::string& command) {
  check_files(arguments);
  eval::RunMeta meta;
  meta.command = command;
  meta.date = utc_now();
  meta.version = std::to_string(KVLEAN_VERSION_MAJOR) + "." + std::to_string(KVLEAN_VERSION_MINOR) +
                 "." + std::to_string(KVLEAN_VERSION_PATCH);
  meta.compiler = compiler_text();
  meta.seed = arguments.seed;

  if (!arguments.from_records.empty()) {
    std::vector<eval::ItemRecord> records;
    for (const std::string& path : arguments.from_records) {
      if (!exists(path)) throw UsageError{path + ": cannot open: No such file or directory"};
      const std::vector<eval::ItemRecord> more = value_or_throw(eval::read_records(path));
      records.insert(records.end(), more.begin(), more.end());
    }
    if (records.empty()) throw UsageError{"--from-records: there are no records"};
    report(arguments, meta, records);
    return 0;
  }

  const RunSettings prepared = make_settings(arguments);
  if (arguments.model.empty()) throw UsageError{"--model is required"};
  for (const std::string& task : arguments.tasks) {
    if (eval::find_task(task) == nullptr) {
      throw UsageError{"unknown task '" + io::detail::printable(task) +
                       "'; --list prints all of them"};
    }
  }
  const eval::Texts texts = load_texts(arguments);
  RunSettings settings = prepared;
  demand(start_engine(program));
  meta.engine = std::string("llama.cpp, ") + llama_print_system_info();
  Model model = value_or_throw(load_model(arguments.model));
  if (llama_model_has_encoder(model.get()) || !llama_model_has_decoder(model.get())) {
    throw UsageError{arguments.model + ": not a decoder-only model"};
  }
  settings.base.model_sha256 = value_or_throw(file_sha256(arguments.model));
  const std::string stated = model_metadata(model.get(), "general.name");
  settings.base.model =
      stated.empty() ? std::filesystem::path(arguments.model).stem().string() : stated;
  const std::vector<EvalItem> items = make_items(arguments, model.get(), texts);

  bool converted = false;
  if (arguments.weights == "f32") {
    const std::string copy =
        value_or_throw(float_copy(arguments.model, settings.base.model_sha256));
    converted = copy != arguments.model;
    if (converted) model = value_or_throw(load_model(copy));
  }
  EvalEngine::Options options;
  options.exact = arguments.weights == "f32";
  options.threads = arguments.threads;
  for (const EvalItem& item : items) {
    options.tokens = std::max(options.tokens, item.tokens.positions() + 1);
    options.branches =
        std::max(options.branches, std::min<std::size_t>(64, item.tokens.candidates.size()));
  }
  const std::unique_ptr<EvalEngine> engine = value_or_throw(EvalEngine::open(model.get(), options));
  demand(engine->find_layers());
  const RopePairing pairing = pairing_of(model.get());
  if (arguments.cross_check) {
    return run_cross_check(arguments, *engine, items, pairing) ? 0 : 1;
  }

  const double identity = value_or_throw(identity_error(*engine, items.front(), pairing));
  if (arguments.weights == "f32" && !(identity <= most_logit_error)) {
    throw UsageError{
        "attention over a copy of the full cache does not give the stock logits: "
        "relative error " +
        number(identity, "%.1e") + ", 1e-4 at most"};
  }
  meta.more["identity_error"] = number(identity, "%.2e");
  meta.more["layers"] = std::to_string(engine->replaceable().size()) + " of " +
                        std::to_string(engine->layers()) + " replaced";
  meta.more["weights"] = arguments.weights;
  meta.more["model_sha256"] = settings.base.model_sha256;
  std::string sources;
  for (const eval::Text& text : texts) {
    sources += (sources.empty() ? "" : ", ") + text.name +
               (text.package.empty() ? "" : " (" + text.package + " " + text.version + ")");
  }
  meta.more["texts"] = sources;

  Yardsticks yardsticks;
  if (arguments.yardsticks) yardsticks.open(arguments.model, model.get(), converted, options);

  eval::RecordFile file;
  if (!arguments.records.empty()) {
    file = value_or_throw(eval::RecordFile::open(arguments.records, true));
  }
  std::vector<eval::ItemRecord> fresh;
  ItemRunner runner(*engine, settings, pairing);
  std::size_t total = 0;
  std::size_t there = 0;
  for (const EvalItem& item : items) {
    for (const eval::ItemRecord& record : runner.settings_of(item, yardsticks.list)) {
      ++total;
      if (file.has(record)) ++there;
    }
  }
  if (total == 0) throw UsageError{"no item has a question to be aware of; use --mode agnostic"};
  eval::Progress progress(
      "kvlean-eval", total,
      arguments.quiet ? eval::Progress::Style::quiet : eval::Progress::Style::automatic);
  if (there != 0) progress.skip(there);
  if (!arguments.quiet) {
    progress.say(settings.base.model + ": " + meta.more["layers"] + ", identity error " +
                 meta.more["identity_error"]);
  }
  std::set<std::string> refusals;
  for (const EvalItem& item : items) {
    const std::vector<eval::ItemRecord> wanted = runner.settings_of(item, yardsticks.list);
    if (std::all_of(wanted.begin(), wanted.end(),
                    [&](const eval::ItemRecord& record) { return file.has(record); })) {
      continue;
    }
    demand(runner.run(
        item, yardsticks.list, [&](const eval::ItemRecord& record) { return !file.has(record); },
        [&](const eval::ItemRecord& record) {
          progress.note(item.item.id + " " + record.policy + " " + number(record.budget, "%g"));
        },
        [&](const eval::ItemRecord& record) -> Outcome {
          progress.advance();
          if (!arguments.records.empty()) return file.append(record);
          fresh.push_back(record);
          return Outcome{};
        },
        [&](const std::string& why) {
          progress.advance();
          if (refusals.insert(why).second) progress.say(why);
        }));
  }
  progress.finish();
  const std::vector<eval::ItemRecord>& records = arguments.records.empty() ? fresh : file.records();
  if (records.empty()) throw UsageError{"nothing could be run"};
  meta.seconds = progress.seconds();
  report(arguments, meta, records);

  const Totals& totals = runner.totals();
  if (!arguments.quiet && totals.items > 0) {
    const double n = static_cast<double>(std::max<std::size_t>(totals.settings, 1));
    std::printf(
        "\n%zu items, %zu settings in %s (processor seconds: prefill %.2f an item; a setting %.3f "
        "= "
        "plan %.3f + apply %.3f + open loop %.3f + score %.3f; attention %.1f GFLOP/s)\n",
        totals.items, totals.settings, eval::clock_text(meta.seconds).c_str(),
        totals.prefill / static_cast<double>(totals.items),
        (totals.plan + totals.apply + totals.open_loop + totals.score) / n, totals.plan / n,
        totals.apply / n, totals.open_loop / n, totals.score / n,
        1e-9 * engine->attention().operations() / std::max(engine->attention().seconds(), 1e-9));
  }
  return 0;
}

}  // namespace
}  // namespace kvlean::llama_cpp

int main(int argc, char** argv) {
  using namespace kvlean::llama_cpp;
  const auto fail = [](std::string line) {
    std::replace(line.begin(), line.end(), '\n', ' ');
    std::fprintf(stderr, "%s: %s\n", program, line.c_str());
    return 1;
  };
  try {
    CLI::App app("Measures what compressing the KV cache does to a model, end to end.", program);
    Arguments arguments;
    declare(app, arguments);
    try {
      app.parse(argc, argv);
    } catch (const CLI::ParseError& error) {
      if (error.get_exit_code() == 0) return app.exit(error);  // --help
      return fail(kvlean::io::detail::printable(error.what(), 400));
    }
    if (arguments.list) {
      print_list();
      return 0;
    }
    apply_presets(app, arguments);
    return run(arguments, command_of(argc, argv));
  } catch (const UsageError& error) {
    return fail(error.line);
  } catch (const std::exception& error) {
    return fail(error.what());
  } catch (...) {
    return fail("unknown failure");
  }
}
