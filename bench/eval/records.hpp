// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_set>
#include <vector>

#include "bench/eval/items.hpp"
#include "bench/eval/metrics.hpp"

// The outcome of one item under one setting, and the file such records are appended to.

namespace kvlean::eval {

/// Mean, median and 95th percentile of the relative error of the attention output over layers,
/// heads and scored tokens.
struct AttentionError {
  double mean = 0.0;
  double median = 0.0;
  double p95 = 0.0;
};

/// Names of settings that are no policies: yardsticks that a policy is compared to.
inline constexpr std::string_view policy_full = "full";
inline constexpr std::string_view policy_noise_floor = "noise_floor";  ///< full, computed otherwise
inline constexpr std::string_view policy_engine_weights = "engine_weights";  ///< not in floats
inline constexpr std::string_view policy_cache_f16 = "cache_f16";    ///< the engine's own f16
inline constexpr std::string_view policy_cache_q8_0 = "cache_q8_0";  ///< the engine's own q8_0
inline constexpr std::string_view policy_cache_q4_0 = "cache_q4_0";
[[nodiscard]] bool is_yardstick(std::string_view policy);

/// One item under one setting. Numbers that were not measured are empty (null in the file).
struct ItemRecord {
  // The setting.
  std::string model;         ///< name
  std::string model_sha256;  ///< of the file
  std::string mode;          ///< "agnostic" or "aware" of the question
  std::string policy;        ///< a policy's name, or a yardstick's
  double budget = 1.0;       ///< share of slots asked for; 1 for yardsticks
  std::string cache_type;    ///< the engine's type of K and V: "f32", "f16", ...
  std::string settings;      ///< anything else that results depend on: "sinks=4 recent=32 ..."
  // The item.
  std::string item;  ///< Item::id
  std::string task;
  std::string source;
  std::string document;  ///< Item::document
  std::string kind;      ///< kind_name()
  std::size_t length = 0;
  double depth = -1.0;
  double chance = 0.0;  ///< forced choice: 1 / candidates
  // What the cache became.
  double kept_fraction = 1.0;
  double compression_ratio = 1.0;  ///< bytes before / bytes after
  std::uint64_t bytes = 0;         ///< after
  std::size_t context_tokens = 0;
  // Continuations and, where measured, the right answer of a forced choice.
  std::size_t tokens = 0;          ///< scored
  std::optional<double> nll_full;  ///< sums over the scored tokens, in nats
  std::optional<double> nll;
  std::vector<double> kl;                        ///< a token each
  std::optional<std::size_t> top1_agree;         ///< tokens
  std::optional<std::size_t> top5_common;        ///< sum over tokens, 0 to 5 each
  std::optional<std::size_t> top1_correct;       ///< tokens where the top token is the true one
  std::optional<std::size_t> top1_correct_full;  ///< the same with the full cache
  std::optional<AttentionError> attention_error_open;
  std::optional<AttentionError> attention_error_closed;
  // Forced choices and generations.
  std::optional<double> score;  ///< 0 to 1
  std::optional<double> score_full;
  std::optional<double> reciprocal_rank;
  std::optional<double> reciprocal_rank_full;
  std::string output;  ///< what was generated, for the curious
  // Time.
  double seconds_prefill = 0.0;
  double seconds_plan = 0.0;
  double seconds_apply = 0.0;
  double seconds_score = 0.0;

  /// Adds one scored token.
  void add(const TokenComparison& token);
};

/// Copies what a record says about its item.
void set_item(ItemRecord& record, const Item& item);

/// What makes a record the same piece of work: model, settings, mode, policy, budget, cache type,
/// item. Results are not part of it.
[[nodiscard]] std::string key_of(const ItemRecord& record);

/// One line of JSON without the line's end; not-a-number becomes null. The `kl` array is rounded to
/// six significant digits.
[[nodiscard]] std::string to_json_line(const ItemRecord& record);
[[nodiscard]] Result<ItemRecord> from_json_line(std::string_view line);

/// Reads a records file. A last line without its end, or that is no JSON, is dropped; any other bad
/// line is an error that names it. A missing file gives an empty list.
[[nodiscard]] Result<std::vector<ItemRecord>> read_records(const std::string& path);

/// Appends records to a file, one line each, flushed line by line, so that an interrupted run can
/// go on where it was.
class RecordFile {
 public:
  RecordFile() = default;
  ~RecordFile();
  RecordFile(const RecordFile&) = delete;
  RecordFile& operator=(const RecordFile&) = delete;
  RecordFile(RecordFile&& other) noexcept;
  RecordFile& operator=(RecordFile&& other) noexcept;

  /// Opens for appending. `resume` reads what is there (a torn last line is cut off the file); else
  /// the file starts empty.
  [[nodiscard]] static Result<RecordFile> open(const std::string& path, bool resume);

  /// True if a record with this key is in the file.
  [[nodiscard]] bool has(const std::string& key) const { return keys_.contains(key); }
  [[nodiscard]] bool has(const ItemRecord& record) const { return has(key_of(record)); }

  /// Writes one record and flushes.
  [[nodiscard]] Outcome append(const ItemRecord& record);

  /// All records, those read at the start first.
  [[nodiscard]] const std::vector<ItemRecord>& records() const { return records_; }

 private:
  std::string path_;
  std::FILE* file_ = nullptr;
  std::unordered_set<std::string> keys_;
  std::vector<ItemRecord> records_;
};

}  // namespace kvlean::eval
