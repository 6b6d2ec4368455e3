// One item under every setting: what kvlean-eval repeats.
#pragma once

#include <cstddef>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "bench/eval/records.hpp"
#include "eval_plan.hpp"

namespace kvlean::llama_cpp {

struct RunSettings {
  std::vector<EvalPolicy> policies;
  std::vector<double> budgets;
  std::vector<Mode> modes;  ///< aware first: its prefix is the longer one
  PlanSettings plan;
  DType cache_type = DType::f32;       ///< of the compressed caches
  std::size_t open_loop_queries = 16;  ///< of each item, evenly spaced; 0: not measured
  eval::ItemRecord base;               ///< model, settings: the same in every record
};

/// An item and its tokens.
struct EvalItem {
  eval::Item item;
  TokenizedItem tokens;
};

/// Splits an item into tokens. Fails, in one line, if a part of it is empty.
[[nodiscard]] Result<EvalItem> tokenize_item(const llama_model* model, const eval::Item& item);

/// An engine that computes its own way, compared with the full run.
struct Yardstick {
  std::string policy;  ///< the name that records carry
  std::string cache_type;
  double compression_ratio = 1.0;  ///< to an F16 cache
  EvalEngine* engine = nullptr;
};

struct Totals {
  std::size_t items = 0;
  std::size_t settings = 0;
  double prefill = 0.0;
  double plan = 0.0;
  double apply = 0.0;
  double open_loop = 0.0;
  double score = 0.0;
  double yardsticks = 0.0;
};

/// Takes a finished record.
using TakeRecord = std::function<Outcome(const eval::ItemRecord&)>;
/// Whether a setting still has to be run.
using IsWanted = std::function<bool(const eval::ItemRecord&)>;
/// Told before every setting.
using OnSetting = std::function<void(const eval::ItemRecord&)>;
/// Told why the library refuses a setting, such as a budget below the protected tokens.
using OnRefusal = std::function<void(const std::string& why)>;

class ItemRunner {
 public:
  ItemRunner(EvalEngine& engine, const RunSettings& settings, RopePairing pairing)
      : engine_(engine), settings_(settings), pairing_(pairing) {}

  /// Every record that the item will give, results empty: what is_wanted() decides on.
  [[nodiscard]] std::vector<eval::ItemRecord> settings_of(
      const EvalItem& item, std::span<const Yardstick> yardsticks) const;

  /// Runs the settings that are wanted.
  [[nodiscard]] Outcome run(const EvalItem& item, std::span<const Yardstick> yardsticks,
                            const IsWanted& is_wanted, const OnSetting& on_setting,
                            const TakeRecord& take, const OnRefusal& on_refusal);

  [[nodiscard]] const Totals& totals() const { return totals_; }

 private:
  struct OpenLoop;

  [[nodiscard]] std::vector<Mode> modes_of(const EvalItem& item) const;
  [[nodiscard]] eval::ItemRecord record_of(const EvalItem& item, Mode mode,
                                           const std::string& policy, double budget) const;
  [[nodiscard]] eval::ItemRecord record_of(const EvalItem& item, Mode mode,
                                           const Yardstick& yardstick) const;
  Outcome run_setting(const EvalItem& item, const FullRun& full, const Prefix& prefix,
                      const OpenLoop& open_loop, std::span<const CompressionPlan> plans,
                      eval::ItemRecord& record);
  Outcome measure_open_loop(const FullRun& full, const Prefix& prefix, const OpenLoop& open_loop,
                            eval::ItemRecord& record);
  void compare(const EvalItem& item, const Predictions& full, const Predictions& own,
               eval::ItemRecord& record) const;

  EvalEngine& engine_;
  const RunSettings& settings_;
  RopePairing pairing_;
  Totals totals_;
};

/// Carries out the plans in engine.attention(). Returns what the library says.
[[nodiscard]] Status load_plans(EvalEngine& engine, const Prefix& prefix,
                                std::span<const CompressionPlan> plans, DType cache_type,
                                std::size_t room);

/// The largest |a - b| of a row relative to the largest |b|, over all rows.
[[nodiscard]] double largest_logit_error(const std::vector<float>& a, const std::vector<float>& b,
                                         std::size_t vocabulary);

struct CheckResult {
  std::string name;
  double error = 0.0;
};

/// Replaces attention by attention over a copy of the full cache and compares with the stock
/// engine: the largest relative error of a logit. A long prompt is cut short.
[[nodiscard]] Result<double> identity_error(EvalEngine& engine, const EvalItem& given,
                                            RopePairing pairing);

/// Evictions of several kinds, in our caches and as masks of the engine's own scores: the largest
/// relative error of a logit, one entry a plan.
[[nodiscard]] Result<std::vector<CheckResult>> cross_check(EvalEngine& engine, const EvalItem& item,
                                                           RopePairing pairing, double budget);

}  // namespace kvlean::llama_cpp
