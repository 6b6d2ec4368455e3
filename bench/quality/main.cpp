// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0

// kvlean-bench: the quality sweep. Compresses captured keys and values with every policy at every
// budget and measures what future queries lose.

#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <charconv>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <ctime>
#include <exception>
#include <filesystem>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "bench/io/capture.hpp"
#include "bench/quality/plot_svg.hpp"
#include "bench/quality/report_html.hpp"
#include "bench/quality/report_records.hpp"
#include "bench/quality/report_table.hpp"
#include "bench/quality/sweep.hpp"
#include "bench/quality/toy.hpp"
#include "kvlean/version.hpp"

namespace kvlean::bench {
namespace {

/// A fault of the caller's, told in one line.
struct UsageError {
  std::string line;
};

struct Arguments {
  std::vector<std::string> inputs;
  std::vector<std::string> policies;
  std::vector<std::string> budgets = {"0.7", "0.5", "0.35", "0.2", "0.1"};
  std::vector<std::string> layers;
  std::string json;
  std::string csv;
  std::string html;
  std::string svg;
  std::string plan_json;
  bool toy = false;
  bool equal_bytes = false;
  bool list = false;
  bool quiet = false;
  u64 seed = 0;
  u32 threads = 0;
  u32 sinks = 4;
  u32 recent = 32;
};

void declare(CLI::App& app, Arguments& arguments) {
  app.description(
      "Compresses captured keys and values with many policies and measures what future queries "
      "lose.");
  app.add_option("--input", arguments.inputs, "captures (safetensors)")->type_name("CAPTURE...");
  app.add_option("--policy", arguments.policies,
                 "names or SCORER+ALLOCATOR+REDUCER, separated by commas (see --list)")
      ->delimiter(',')
      ->type_name("P,...");
  app.add_option("--budget", arguments.budgets, "kept fractions in (0, 1]")
      ->delimiter(',')
      ->type_name("F,...")
      ->capture_default_str();
  app.add_option("--layers", arguments.layers, "only these of the captured layers")
      ->delimiter(',')
      ->type_name("L,...");
  app.add_flag("--toy", arguments.toy, "synthetic tensors; needs no file");
  app.add_option("--seed", arguments.seed, "of toy tensors and random policies")
      ->type_name("N")
      ->capture_default_str();
  app.add_flag("--equal-bytes", arguments.equal_bytes,
               "policies with log mass keep fewer slots, down to plain eviction's bytes");
  app.add_option("--sinks", arguments.sinks, "protected tokens at the start")
      ->type_name("N")
      ->capture_default_str();
  app.add_option("--recent", arguments.recent, "protected tokens at the end")
      ->type_name("N")
      ->capture_default_str();
  app.add_option("--json", arguments.json, "write the records as JSON")->type_name("FILE");
  app.add_option("--csv", arguments.csv, "write the records as CSV")->type_name("FILE");
  app.add_option("--html", arguments.html, "write a self-contained report")->type_name("FILE");
  app.add_option("--svg", arguments.svg, "write the first plot of the first input")
      ->type_name("FILE");
  app.add_option("--plan-json", arguments.plan_json, "write the first plan, slot by slot")
      ->type_name("FILE");
  app.add_option("--threads", arguments.threads, "default: one a core; results do not depend on it")
      ->type_name("N");
  app.add_flag("--list", arguments.list, "print all policies and their parts, and stop");
  app.add_flag("--quiet", arguments.quiet, "no progress and no tables");
}

template <class Table>
void print_names(const char* heading, const Table& table) {
  std::printf("%s\n", heading);
  for (const auto& entry : table) {
    std::printf("  %-20.*s %.*s\n", static_cast<int>(entry.name.size()), entry.name.data(),
                static_cast<int>(entry.description.size()), entry.description.data());
  }
}

void print_list() {
  std::printf("Policies\n");
  for (const NamedPolicy& entry : policy_names) {
    BenchPolicy policy;
    static_cast<void>(find_policy(std::string(entry.name), policy));
    std::printf("  %-20s %-33.*s %s\n", policy.name.c_str(),
                static_cast<int>(entry.composition.size()), entry.composition.data(),
                policy.description.c_str());
    if (policy.streams && find_policy("cam_oneshot", policy)) {
      std::printf("  %-20s %-33.*s %s\n", policy.name.c_str(),
                  static_cast<int>(entry.composition.size()), entry.composition.data(),
                  policy.description.c_str());
    }
  }
  print_names("\nScorers, the first part of SCORER+ALLOCATOR+REDUCER", scorer_names);
  print_names("\nAllocators, the second part", allocator_names);
  print_names("\nReducers, the third part", reducer_names);
}

double parse_budget(const std::string& text) {
  double value = 0.0;
  const auto [end, code] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (code != std::errc() || end != text.data() + text.size() || !(value > 0.0 && value <= 1.0)) {
    throw UsageError{"budget '" + io::detail::printable(text) + "' is not a number in (0, 1]"};
  }
  return value;
}

SweepOptions make_options(const Arguments& arguments) {
  SweepOptions options;
  options.protection = {arguments.sinks, arguments.recent};
  options.seed = arguments.seed;
  options.equal_bytes = arguments.equal_bytes;
  options.threads = arguments.threads != 0 ? arguments.threads
                                           : std::max(1u, std::thread::hardware_concurrency());
  for (const std::string& text : arguments.budgets) {
    const double budget = parse_budget(text);
    if (std::find(options.budgets.begin(), options.budgets.end(), budget) ==
        options.budgets.end()) {
      options.budgets.push_back(budget);
    }
  }
  std::set<std::string> seen;
  for (const std::string& name :
       arguments.policies.empty() ? default_policies() : arguments.policies) {
    BenchPolicy policy;
    if (!find_policy(name, policy)) {
      throw UsageError{"unknown policy '" + io::detail::printable(name) +
                       "'; --list prints all of them"};
    }
    if (seen.insert(name).second) options.policies.push_back(policy);
  }
  return options;
}

/// Keeps the layers asked for.
void select_layers(const std::vector<std::string>& wanted, Input& input) {
  if (wanted.empty()) return;
  std::vector<io::CaptureLayer>& layers = input.capture.layers;
  std::set<std::size_t> indices;
  for (const std::string& text : wanted) {
    const auto index = io::detail::parse_number<std::size_t>(text);
    if (!index) {
      throw UsageError{"'" + io::detail::printable(text) + "' is not a layer number"};
    }
    const bool known = std::any_of(layers.begin(), layers.end(),
                                   [&](const auto& layer) { return layer.index == *index; });
    if (!known) {
      throw UsageError{input.name + ": there is no layer " + std::to_string(*index)};
    }
    indices.insert(*index);
  }
  std::erase_if(layers, [&](const auto& layer) { return !indices.contains(layer.index); });
}

/// What records call the inputs: file names, or whole paths where names repeat.
std::vector<std::string> input_names(const std::vector<std::string>& paths) {
  std::vector<std::string> names;
  for (const std::string& path : paths) {
    names.push_back(std::filesystem::path(path).filename().string());
  }
  if (std::set<std::string>(names.begin(), names.end()).size() != names.size()) return paths;
  return names;
}

Input load_input(const std::string& path, const std::string& name) {
  io::Result<io::Capture> capture = io::load_capture(path);
  if (!capture) throw UsageError{capture.error};
  return {name, std::move(*capture)};
}

/// Faults that would otherwise show only after minutes of work.
void check_files(const Arguments& arguments) {
  if (arguments.inputs.empty() && !arguments.toy) {
    throw UsageError{"nothing to run on: give --input CAPTURE or --toy"};
  }
  for (const std::string& path : arguments.inputs) {
    if (const auto file = io::SafetensorsFile::open(path); !file) throw UsageError{file.error};
  }
  std::set<std::string> inputs(arguments.inputs.begin(), arguments.inputs.end());
  if (inputs.size() != arguments.inputs.size()) throw UsageError{"an input is given twice"};
  for (const std::string* path :
       {&arguments.json, &arguments.csv, &arguments.html, &arguments.svg, &arguments.plan_json}) {
    if (path->empty()) continue;
    if (const io::Outcome writable = io::check_writable(*path); !writable) {
      throw UsageError{writable.error};
    }
  }
}

/// A line that is overwritten on a terminal; elsewhere a line for every quarter.
Progress progress_for(const std::string& input, bool quiet) {
  if (quiet) return nullptr;
  const bool terminal = isatty(STDERR_FILENO) == 1;
  return [input, terminal](std::size_t done, std::size_t all) {
    if (terminal) {
      std::fprintf(stderr, "\r%s: %zu of %zu%s", input.c_str(), done, all, done == all ? "\n" : "");
    } else if (done * 4 / all != (done == 0 ? 4 : (done - 1) * 4 / all)) {
      std::fprintf(stderr, "%s: %zu of %zu\n", input.c_str(), done, all);
    }
    std::fflush(stderr);
  };
}

void write(const std::string& path, const std::string& text) {
  if (path.empty()) return;
  if (const std::string why = write_file(path, text); !why.empty()) throw UsageError{why};
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

std::string utc_now() {
  const std::time_t now = std::time(nullptr);
  std::tm parts = {};
  gmtime_r(&now, &parts);
  char text[32];
  std::strftime(text, sizeof text, "%Y-%m-%dT%H:%M:%SZ", &parts);
  return text;
}

std::string version_text() {
  return std::to_string(KVLEAN_VERSION_MAJOR) + "." + std::to_string(KVLEAN_VERSION_MINOR) + "." +
         std::to_string(KVLEAN_VERSION_PATCH);
}

std::string compiler_text() {
#if defined(__clang__)
  return "clang " + std::to_string(__clang_major__) + "." + std::to_string(__clang_minor__);
#else
  return "g++ " + std::to_string(__GNUC__) + "." + std::to_string(__GNUC_MINOR__);
#endif
}

int run(const Arguments& arguments, const std::string& command) {
  check_files(arguments);
  RunFacts facts;
  facts.command = command;
  facts.date = utc_now();
  facts.version = version_text();
  facts.compiler = compiler_text();
  facts.options = make_options(arguments);

  const auto start = std::chrono::steady_clock::now();
  std::vector<Record> records;
  nlohmann::ordered_json plans;
  const std::vector<std::string> names = input_names(arguments.inputs);
  for (std::size_t i = 0; i < names.size() + (arguments.toy ? 1 : 0); ++i) {
    Input input = i < names.size() ? load_input(arguments.inputs[i], names[i])
                                   : Input{"toy", make_toy_capture({}, arguments.seed)};
    select_layers(arguments.layers, input);
    const std::vector<Record> more =
        run_sweep(input, facts.options, progress_for(input.name, arguments.quiet),
                  arguments.plan_json.empty() ? nullptr : &plans);
    records.insert(records.end(), more.begin(), more.end());
    for (io::CaptureLayer& layer : input.capture.layers) {
      for (io::Tensor* tensor : {&layer.q, &layer.k, &layer.v}) tensor->bytes = {};
      layer.wo.reset();
    }
    facts.inputs.push_back(std::move(input));
  }
  facts.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();

  bool any = false;
  for (const Record& record : records) {
    any = any || record.skipped.empty();
    if (record.skipped.empty()) continue;
    std::fprintf(stderr, "kvlean-bench: skipped %s at budget %g on %s: %s\n", record.policy.c_str(),
                 record.budget, record.input.c_str(), record.skipped.c_str());
  }
  if (!arguments.quiet) {
    std::fputs(to_tables(records, facts.inputs, facts.options.budgets).c_str(), stdout);
    std::printf("\n%zu records in %.1f s\n", records.size(), facts.seconds);
  }
  if (!arguments.json.empty()) write(arguments.json, to_json(records));
  if (!arguments.csv.empty()) write(arguments.csv, to_csv(records));
  if (!arguments.html.empty()) write(arguments.html, to_html(facts, records));
  if (!arguments.svg.empty()) {
    const std::vector<Plot> plots = plots_of(records, facts.inputs.front());
    const std::string svg = plots.empty()
                                ? std::string()
                                : plot_svg(plots.front(), records, facts.inputs.front().name, true);
    if (svg.empty()) throw UsageError{"--svg: there is nothing to plot"};
    write(arguments.svg, svg);
  }
  if (!arguments.plan_json.empty()) {
    if (plans.is_null()) throw UsageError{"--plan-json: no policy of this run makes one plan"};
    write(arguments.plan_json, plans.dump(1) + "\n");
  }
  if (!any) throw UsageError{"nothing could be run"};
  return 0;
}

}  // namespace
}  // namespace kvlean::bench

int main(int argc, char** argv) {
  using namespace kvlean::bench;
  const auto fail = [](const std::string& line) {
    std::fprintf(stderr, "kvlean-bench: %s\n", line.c_str());
    return 1;
  };
  try {
    CLI::App app;
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
    return run(arguments, command_of(argc, argv));
  } catch (const UsageError& error) {
    return fail(error.line);
  } catch (const std::exception& error) {
    return fail(error.what());
  }
}
