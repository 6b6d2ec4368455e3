// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "bench/eval/records.hpp"
#include "bench/eval/statistics.hpp"

// What the records of a run add up to.

namespace kvlean::eval {

struct SummaryOptions {
  BootstrapOptions bootstrap;
  /// Policies that every other one is compared to, at the same budget and on the same items.
  std::vector<std::string> baselines = {"streaming_llm", "random", "h2o", "snapkv"};
  /// The baseline that keeps only sinks and recent tokens: what retention is measured against.
  std::string window_policy = "streaming_llm";
  double least_benefit = least_context_benefit;
};

/// Paired differences to one baseline, setting minus baseline; empty if not measured on both.
struct Difference {
  std::size_t documents = 0;
  std::optional<Interval> kl;
  std::optional<Interval> nll;
  std::optional<Interval> score;
};

/// One (model, task, length, mode, cache type, settings, policy, budget).
struct SummaryRecord {
  std::string model;
  std::string task;
  std::string kind;
  std::size_t length = 0;
  std::string mode;
  std::string cache_type;
  std::string settings;
  std::string policy;
  double budget = 1.0;
  std::size_t items = 0;
  std::size_t documents = 0;
  std::size_t sources = 0;
  std::size_t tokens = 0;
  double kept_fraction = 1.0;             ///< mean over items
  double compression_ratio = 1.0;         ///< mean bytes before / mean bytes after
  double bytes = 0.0;                     ///< mean
  Distribution kl;                        ///< over tokens
  std::optional<Interval> kl_interval;    ///< of the mean, over documents; likewise below
  std::optional<Interval> top1;           ///< share of tokens
  std::optional<Interval> top5;           ///< share of the five most likely tokens in common
  std::optional<Interval> delta_nll;      ///< nats a token
  std::optional<Interval> copy_accuracy;  ///< share of tokens whose top token is the true one
  std::optional<double> copy_accuracy_full;
  std::optional<double> nll_full;          ///< nats a token
  std::optional<Interval> retention;       ///< gain over the window / full cache's gain over it,
                                           ///< qualifying documents together
  std::optional<double> retention_median;  ///< of the documents' own ratios
  std::size_t retention_documents = 0;     ///< that qualified
  std::optional<AttentionError> attention_error_open;  ///< means over items
  std::optional<AttentionError> attention_error_closed;
  std::optional<Interval> score;
  std::optional<double> score_full;
  std::optional<double> score_relative;  ///< score / score_full
  std::optional<double> reciprocal_rank;
  std::optional<double> reciprocal_rank_full;
  std::optional<bool> gate;      ///< whether the full cache is good enough; empty: no gate
  std::optional<double> gate_p;  ///< forced choice: p-value of the full cache against guessing
  double seconds_prefill = 0.0;  ///< means over items
  double seconds_plan = 0.0;
  double seconds_apply = 0.0;
  double seconds_score = 0.0;
  std::map<std::string, Difference> versus;  ///< by baseline
};

/// One record per group, in the order of first appearance.
[[nodiscard]] std::vector<SummaryRecord> summarise_records(const std::vector<ItemRecord>& records,
                                                           const SummaryOptions& options = {});

/// What is said about the run itself.
struct RunMeta {
  std::string command;
  std::string date;  ///< ISO 8601, UTC
  std::string version;
  std::string compiler;
  std::string engine;  ///< "llama.cpp ..."
  std::uint64_t seed = 0;
  double seconds = 0.0;
  std::map<std::string, std::string> more;  ///< anything else worth saying
};

/// A flat JSON object: intervals become name, name_low and name_high, differences
/// name_vs_baseline and so on. Unknown numbers are null.
[[nodiscard]] nlohmann::ordered_json to_json(const SummaryRecord& record);

/// {"meta": {...}, "records": [...]}.
[[nodiscard]] std::string to_json(const RunMeta& meta, const std::vector<SummaryRecord>& records);

/// The better of two settings at one budget: by KL for continuations, else by score, reciprocal
/// rank and KL.
[[nodiscard]] bool ranks_before(const SummaryRecord& a, const SummaryRecord& b);

/// A number in few digits: 0.0312, 3.1e-07, 12.5; "-" if it is not finite.
[[nodiscard]] std::string short_number(double value);

/// Aligned text for a terminal: a table a task, length, mode and budget, best first.
[[nodiscard]] std::string to_tables(const std::vector<SummaryRecord>& records);

}  // namespace kvlean::eval
