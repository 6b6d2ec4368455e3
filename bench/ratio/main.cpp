// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0

// kvlean-ratio: what every claim about speed is made from. Floor, kernel and reference take turns,
// round by round; reported is the median of the rounds' ratios.

#include <CLI/CLI.hpp>
#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <fstream>
#include <kvlean/core/thread_pool.hpp>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "bench/ratio/layer.hpp"
#include "bench/ratio/report.hpp"

namespace kvlean::ratio {
namespace {

/// A fault of the caller's, told in one line.
struct UsageError {
  std::string line;
};

struct Arguments {
  std::vector<std::string> threads;
  std::vector<std::string> rows;
  std::string json;
  std::string python = "python3";
  std::string script;
  double seconds = 0.0;
  bool list = false;
  bool quick = false;
  std::vector<std::string> known_misses;
  bool check = false;
  bool peers = false;
};

std::string printable(const std::string& text) {
  std::string result;
  for (const char c : text.substr(0, 60)) result += c >= ' ' && c < 127 ? c : '?';
  return result;
}

void declare(CLI::App& app, Arguments& arguments) {
  app.description(
      "Times floor, kernel and reference in turns and reports the median of their ratios.");
  app.add_option("--threads", arguments.threads, "thread counts, separated by commas; default 1,2")
      ->delimiter(',')
      ->type_name("N,...");
  app.add_option("--row", arguments.rows, "only these rows (see --list)")
      ->delimiter(',')
      ->type_name("NAME...");
  app.add_option("--json", arguments.json, "write a record a row")->type_name("FILE");
  app.add_option("--seconds", arguments.seconds, "enough time for a row; default 10, quick 0.5")
      ->type_name("S");
  app.add_flag("--peers", arguments.peers, "time the torch forms of bench/peers too");
  app.add_option("--python", arguments.python, "the interpreter that has torch")
      ->type_name("FILE")
      ->capture_default_str();
  app.add_option("--peer-script", arguments.script, "default: bench/peers/peers.py of the sources")
      ->type_name("FILE");
  app.add_flag("--quick", arguments.quick, "4096 tokens, under a minute, bounds loose by 2");
  app.add_flag("--check", arguments.check, "exit with 1 when a row misses what it must hold");
  app.add_option("--known-miss", arguments.known_misses,
                 "rows that are known to miss: reported, but no failure for --check")
      ->delimiter(',')
      ->type_name("NAME...");
  app.add_flag("--list", arguments.list, "print all rows, and stop");
}

std::vector<Group> all_groups() {
  std::vector<Group> groups;
  add_scoring_groups(groups);
  add_selection_groups(groups);
  add_merging_groups(groups);
  add_compaction_groups(groups);
  add_decoding_groups(groups);
  add_layer_groups(groups);
  add_memory_groups(groups);
  return groups;
}

void print_list(const std::vector<Group>& groups) {
  for (const Group& group : groups) {
    for (const TargetRow& row : group.rows) {
      const char* sign = row.better == Better::lower ? "<=" : ">=";
      std::string bounds;
      if (std::isfinite(row.must)) {
        char text[48];
        std::snprintf(text, sizeof text, "must %s %g", sign, row.must);
        bounds = text;
      }
      if (std::isfinite(row.aim)) {
        char text[48];
        std::snprintf(text, sizeof text, "%saim %s %g", bounds.empty() ? "" : ", ", sign, row.aim);
        bounds += text;
      }
      std::printf("%-22s %-28s %s\n", row.name, bounds.c_str(), row.claim);
    }
  }
}

std::vector<u32> parse_threads(const std::vector<std::string>& texts, std::size_t cpus) {
  std::vector<u32> threads;
  for (const std::string& text : texts) {
    u32 value = 0;
    const auto [end, code] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (code != std::errc() || end != text.data() + text.size() || value == 0 || value > 256) {
      throw UsageError{"--threads: '" + printable(text) + "' is not a count from 1 to 256"};
    }
    if (std::find(threads.begin(), threads.end(), value) == threads.end()) threads.push_back(value);
  }
  if (!threads.empty()) return threads;
  return cpus > 1 ? std::vector<u32>{1, 2} : std::vector<u32>{1};
}

#if defined(__OPTIMIZE__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
constexpr bool is_optimised = true;
#else
constexpr bool is_optimised = false;
#endif

/// Why a row can't be measured here, or nothing.
std::string missing(const TargetRow& row, const Setup& setup) {
  if (!is_optimised && (row.needs & is_exact) == 0) return "not an optimised build";
  if ((row.needs & needs_full) != 0 && setup.quick) return "not in the quick form";
  if ((row.needs & needs_vectors) != 0 && vector_target() == simd::Target::scalar) {
    return "no SIMD instructions that the library knows";
  }
  if ((row.needs & needs_matrix) != 0 && !matrix_target()) return "no AMX target";
  if ((row.needs & needs_blas) != 0 && !setup.blas->present()) return "OpenBLAS is not installed";
  if ((row.needs & needs_torch) != 0 && setup.peers == nullptr) return "torch: give --peers";
  return "";
}

double judged_bound(const TargetRow& row, bool quick) {
  if (!quick || (row.needs & is_exact) != 0) return row.must;
  return row.better == Better::lower ? 2.0 * row.must : 0.5 * row.must;
}

void judge(Record& record) {
  if (!std::isfinite(record.must)) return;
  const double ratio = record.ratio.median;
  const bool good =
      record.row->better == Better::lower ? ratio <= record.must : ratio >= record.must;
  record.holds = good && record.reason.empty();
}

const Variant* find_variant(const Experiment& experiment, const char* label) {
  for (const Variant& variant : experiment.variants) {
    if (variant.name == label) return &variant;
  }
  return nullptr;
}

/// Builds a group's experiment, checks its kernels, times it, and fills a record a row.
void run_group(const Group& group, const std::vector<const TargetRow*>& rows, const Setup& setup,
               const Limits& limits, std::vector<Record>& records) {
  std::vector<std::string> wanted;
  std::vector<Record> made;
  for (const TargetRow* row : rows) {
    Record record;
    record.row = row;
    record.threads = setup.threads;
    record.must = judged_bound(*row, setup.quick);
    record.ratio = {none, none, none, none};
    record.reason = missing(*row, setup);
    if (record.reason.empty()) {
      wanted.insert(wanted.end(), {row->kernel, row->reference});
    }
    made.push_back(record);
  }
  if (!wanted.empty()) {
    Experiment experiment = group.build(setup, wanted);
    std::vector<Variant>& variants = experiment.variants;
    variants.erase(std::remove_if(variants.begin(), variants.end(),
                                  [&](const Variant& v) { return !wants(wanted, v.name.c_str()); }),
                   variants.end());
    std::map<std::string, Verdict> verdicts;
    for (const Variant& variant : variants) {
      const auto found = experiment.verify.find(variant.name);
      if (found != experiment.verify.end()) verdicts[variant.name] = found->second();
    }
    Samples samples;
    if (!variants.empty()) samples = measure(variants, limits);
    for (Record& record : made) {
      if (!record.reason.empty()) continue;
      const TargetRow& row = *record.row;
      record.label = experiment.label;
      const auto exact = experiment.exact.find(row.name);
      if (exact != experiment.exact.end()) {
        record.ratio = {exact->second, exact->second, exact->second, exact->second};
        if (!std::isfinite(exact->second)) record.reason = "a call failed";
        judge(record);
        continue;
      }
      const Variant* kernel = find_variant(experiment, row.kernel);
      const Variant* reference = find_variant(experiment, row.reference);
      if (kernel == nullptr || reference == nullptr) {
        throw std::runtime_error(std::string(row.name) + ": a variant is missing");
      }
      const auto index = [&](const Variant* v) {
        return static_cast<std::size_t>(v - variants.data());
      };
      const auto per_unit = [&](const Variant* v) {
        std::vector<double> seconds = samples.seconds[index(v)];
        const auto unit = experiment.units.find(v->name);
        for (double& s : seconds) s /= unit == experiment.units.end() ? 1.0 : unit->second;
        return seconds;
      };
      const std::vector<double> a = per_unit(kernel);
      const std::vector<double> b = per_unit(reference);
      record.ratio = row.better == Better::lower ? ratio_quartiles(a, b) : ratio_quartiles(b, a);
      record.kernel = quartiles(samples.seconds[index(kernel)]);
      record.reference = quartiles(samples.seconds[index(reference)]);
      const auto label = experiment.labels.find(kernel->name);
      if (label != experiment.labels.end()) record.label = label->second;
      record.rounds = static_cast<u32>(a.size());
      record.dropped = samples.dropped;
      record.noisy = samples.noisy;
      record.probe_spread = samples.probe_spread;
      record.bytes = kernel->bytes;
      record.flops = kernel->flops;
      record.allocations = samples.allocations[index(kernel)];
      const auto scratch = experiment.scratch_bytes.find(kernel->name);
      if (scratch != experiment.scratch_bytes.end()) record.scratch_bytes = scratch->second();
      const auto verdict = verdicts.find(kernel->name);
      if (verdict != verdicts.end()) {
        record.error = verdict->second.error;
        record.error_bound = verdict->second.bound;
        record.digest = verdict->second.digest;
        if (!verdict->second.good) record.reason = "the result is wrong";
      }
      for (const Record& earlier : records) {
        if (earlier.row == record.row && earlier.digest != record.digest &&
            earlier.reason.empty() && earlier.rounds != 0) {
          record.reason = "the bits depend on the number of threads";
        }
      }
      judge(record);
    }
    if (setup.peers != nullptr && wants(wanted, "torch")) setup.peers->unload();
  }
  for (const Record& record : made) {
    print_record(record);
    records.push_back(record);
  }
}

/// The quick form is a smoke test on machines that do other things too: a row that misses is
/// measured once more, and that counts.
void run_again(const Group& group, const Setup& setup, const Limits& limits,
               std::vector<Record>& records) {
  std::vector<const TargetRow*> missed;
  for (const TargetRow& row : group.rows) {
    for (const Record& record : records) {
      const bool miss = record.row == &row && record.threads == setup.threads && record.holds &&
                        !*record.holds && record.rounds != 0 && record.reason.empty();
      if (miss) missed.push_back(&row);
    }
  }
  if (missed.empty()) return;
  std::printf("again:\n");
  records.erase(std::remove_if(records.begin(), records.end(),
                               [&](const Record& record) {
                                 return record.threads == setup.threads &&
                                        std::find(missed.begin(), missed.end(), record.row) !=
                                            missed.end();
                               }),
                records.end());
  run_group(group, missed, setup, limits, records);
}

std::vector<std::vector<const TargetRow*>> choose_rows(const std::vector<Group>& groups,
                                                       const std::vector<std::string>& names) {
  std::vector<std::vector<const TargetRow*>> chosen(groups.size());
  std::vector<bool> found(names.size(), false);
  for (std::size_t g = 0; g < groups.size(); ++g) {
    for (const TargetRow& row : groups[g].rows) {
      const auto place = std::find(names.begin(), names.end(), row.name);
      if (!names.empty() && place == names.end()) continue;
      if (place != names.end()) found[static_cast<std::size_t>(place - names.begin())] = true;
      chosen[g].push_back(&row);
    }
  }
  for (std::size_t i = 0; i < names.size(); ++i) {
    if (!found[i]) throw UsageError{"there is no row '" + printable(names[i]) + "', see --list"};
  }
  return chosen;
}

int run(const Arguments& arguments) {
  const std::vector<Group> groups = all_groups();
  if (arguments.list) {
    print_list(groups);
    return 0;
  }
  if (!std::isfinite(arguments.seconds) || arguments.seconds < 0.0) {
    throw UsageError{"--seconds: not a time"};
  }
  const auto chosen = choose_rows(groups, arguments.rows);
  const std::vector<int> cpus = allowed_cpus();
  const std::vector<u32> thread_counts = parse_threads(arguments.threads, cpus.size());
  if (!arguments.json.empty()) {  // before minutes of work
    std::ofstream file(arguments.json);
    file << "[]\n";
    file.close();
    if (!file) throw UsageError{arguments.json + ": cannot write"};
  }
  std::string script = arguments.script;
  if (script.empty()) script = KVLEAN_PEER_SCRIPT;
  if (arguments.peers && !std::filesystem::is_regular_file(script)) {
    throw UsageError{script + ": not a file"};
  }

  const Blas blas(cpus);
  MachineText machine;
  machine.cpu = cpu_name();
  machine.blas = blas.version();
  machine.quick = arguments.quick;
  Limits limits;
  limits.seconds = arguments.seconds > 0.0 ? arguments.seconds : arguments.quick ? 0.5 : 10.0;
  limits.rounds = arguments.quick ? 15 : 30;
  std::printf("%s, %zu processors; widest target %s; OpenBLAS: %s\n", machine.cpu.c_str(),
              cpus.size(), simd::name(simd::best()),
              blas.present() ? machine.blas.c_str() : "absent");

  std::vector<Record> records;
  for (const u32 threads : thread_counts) {
    std::vector<int> mine(
        cpus.begin(),
        cpus.begin() + static_cast<std::ptrdiff_t>(std::min<std::size_t>(threads, cpus.size())));
    std::unique_ptr<Peers> peers;
    if (arguments.peers) {
      peers = std::make_unique<Peers>(arguments.python, script, mine, threads);
      machine.torch = peers->version();
      std::printf("torch %s, %u thread%s\n", machine.torch.c_str(), threads,
                  threads == 1 ? "" : "s");
    }
    limits.thread_time = threads == 1;
    limits.child = peers != nullptr ? peers->process() : 0;
    // The pool binds its threads to what this one may use and does not run on.
    bind_thread(0, {mine.begin(), mine.begin() + (mine.empty() ? 0 : 1)});
    bind_thread(0, mine);
    ThreadPool pool(ThreadPoolOptions{.workers = threads, .pin = true});
    bind_thread(0, {mine.begin(), mine.begin() + (mine.empty() ? 0 : 1)});
    Setup setup;
    setup.quick = arguments.quick;
    setup.threads = threads;
    setup.executor = pool.executor();
    setup.blas = &blas;
    setup.peers = peers.get();
    setup.cache_bytes = last_level_bytes();
    print_heading();
    for (std::size_t g = 0; g < groups.size(); ++g) {
      if (chosen[g].empty()) continue;
      run_group(groups[g], chosen[g], setup, limits, records);
      if (arguments.quick && arguments.check) run_again(groups[g], setup, limits, records);
    }
  }
  print_whole_model(records);
  if (!arguments.json.empty()) write_json(arguments.json, records, machine);
  u32 misses = 0;
  u32 known = 0;
  for (const Record& record : records) {
    if (!record.holds || *record.holds) continue;
    ++misses;
    known += std::find(arguments.known_misses.begin(), arguments.known_misses.end(),
                       record.row->name) != arguments.known_misses.end()
                 ? 1u
                 : 0u;
  }
  std::printf("%u of %zu records miss what they must hold, %u of them known\n", misses,
              records.size(), known);
  return arguments.check && misses != known ? 1 : 0;
}

}  // namespace
}  // namespace kvlean::ratio

int main(int argc, char** argv) {
  CLI::App app;
  kvlean::ratio::Arguments arguments;
  kvlean::ratio::declare(app, arguments);
  try {
    app.parse(argc, argv);
  } catch (const CLI::Success& help) {
    return app.exit(help);
  } catch (const CLI::ParseError& error) {
    std::string line = error.what();
    std::replace(line.begin(), line.end(), '\n', ' ');
    std::fprintf(stderr, "kvlean-ratio: %s\n", line.c_str());
    return 2;
  }
  try {
    return kvlean::ratio::run(arguments);
  } catch (const kvlean::ratio::UsageError& error) {
    std::fprintf(stderr, "kvlean-ratio: %s\n", error.line.c_str());
    return 2;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "kvlean-ratio: %s\n", error.what());
    return 2;
  }
}
