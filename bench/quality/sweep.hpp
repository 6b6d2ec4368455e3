// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "bench/io/capture.hpp"
#include "kvlean/policy/names.hpp"

// The quality sweep: every policy at every budget on one captured sequence, all layers planned
// together, and the error of attention that future queries see afterwards.

namespace kvlean::bench {

/// One row of the sweep: how a name on the command line is run.
struct BenchPolicy {
  std::string name;
  std::string description;
  AnyPolicy policy;
  bool is_full = false;     ///< the uncompressed cache: compression ratio 1
  bool streams = false;     ///< token by token over the context (CaM as its authors run it)
  bool draws = false;       ///< random: the mean over several seeds
  bool reads_mass = false;  ///< needs the attention mass of the whole context
};

/// Finds a policy by its name: the library's names and compositions, and `cam_oneshot`. False if
/// there is none.
[[nodiscard]] bool find_policy(const std::string& name, BenchPolicy& policy);

/// The policies of a sweep that names none, and the compact set that the first plot shows.
[[nodiscard]] const std::vector<std::string>& default_policies();
[[nodiscard]] const std::vector<std::string>& headline_policies();

/// Everything a result depends on besides the capture.
struct SweepOptions {
  std::vector<BenchPolicy> policies;
  std::vector<double> budgets;  ///< kept fractions, in (0, 1]
  Protection protection;
  u64 seed = 0;
  u32 threads = 1;           ///< results do not depend on it
  bool equal_bytes = false;  ///< log mass is paid for in slots
};

/// Seeds that a policy that draws is averaged over.
inline constexpr u32 random_seeds = 5;
/// Queries at the end of the context that window scorers see.
inline constexpr u32 window_queries = 32;

/// The outcome of one policy at one budget on one input, all layers together.
struct Record {
  std::string policy;
  double budget = 0.0;
  double kept_fraction = 0.0;      ///< slots / tokens
  double compression_ratio = 0.0;  ///< bytes before / bytes after
  double attention_error = 0.0;
  double attention_error_p95 = 0.0;
  double lost_mass = 0.0;
  double seconds_plan = 0.0;
  double seconds_apply = 0.0;
  std::string input;
  u64 tokens = 0;  ///< of the context, one KV head of one layer
  u64 layers = 0;
  u64 slots = 0;  ///< of all KV heads and layers
  u64 bytes_before = 0;
  u64 bytes_after = 0;
  u64 slots_evicted = 0;  ///< slots that a merging policy dropped for lack of mergeable neighbours
  std::string skipped;    ///< why there is no result; empty if there is one
};

/// A capture and what is said about it.
struct Input {
  std::string name;
  io::Capture capture;
};

/// Reports that `done` of `all` jobs are finished. Called from one thread at a time.
using Progress = std::function<void(std::size_t done, std::size_t all)>;

/// Runs all policies at all budgets on one input; records in the order budget, policy. `plans`, if
/// not null and still null inside, receives the first plans made (one a layer) as JSON.
[[nodiscard]] std::vector<Record> run_sweep(const Input& input, const SweepOptions& options,
                                            const Progress& progress,
                                            nlohmann::ordered_json* plans);

/// Calls body(index) for every index below `count` from up to `threads` threads.
void run_parallel(std::size_t count, u32 threads,
                  const std::function<void(std::size_t index)>& body);

}  // namespace kvlean::bench
