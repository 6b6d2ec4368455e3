// Policies on the prefix of an item: what they see, what they decide.
#pragma once

#include <cstddef>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "bench/quality/bytes.hpp"
#include "eval_engine.hpp"
#include "kvlean/policy/names.hpp"

namespace kvlean::llama_cpp {

/// The compressible part of an item in one mode, as policies see it: one entry a replaced layer.
/// Points into the full run.
struct Prefix {
  std::size_t tokens = 0;
  std::vector<std::size_t> engine_layer;  ///< index in the model
  std::vector<CacheView> caches;
  std::vector<Observation> seen;
  std::vector<RopeSpec> ropes;
  std::vector<bench::LayerBytes> bytes;  ///< as an F16 cache holds it
};

/// Queries at the end of the prefix that window scorers see.
inline constexpr std::size_t window_queries = 32;

[[nodiscard]] std::unique_ptr<Prefix> make_prefix(const FullRun& run,
                                                  std::span<const std::size_t> layers, Mode mode,
                                                  std::size_t tokens, RopePairing pairing);

struct EvalPolicy {
  std::string name;
  std::string scorer;  ///< the part of its composition that scores
  AnyPolicy policy;
  bool is_full = false;
};

/// Finds a policy by its name: the library's names and compositions. False if there is none.
[[nodiscard]] bool find_policy(const std::string& name, EvalPolicy& policy);

struct PlanSettings {
  Protection protection;
  u64 seed = 0;
  bool equal_bytes = false;
};

/// Plans on one prefix, setting after setting. Scores don't depend on the budget, so what a scorer
/// says is remembered: the second policy with the same scorer costs allocation and reduction only.
class Planner {
 public:
  Planner(const Prefix& prefix, const PlanSettings& settings)
      : prefix_(prefix), settings_(settings) {}

  /// Plans all layers together. `plans` live until the next call.
  [[nodiscard]] Status plan(const EvalPolicy& policy, double fraction,
                            std::vector<CompressionPlan>& plans);
  /// The same without remembering scores.
  [[nodiscard]] Status plan_directly(const EvalPolicy& policy, double fraction,
                                     std::vector<CompressionPlan>& plans);
  /// Seconds of the last plan(), with those that scoring took when it was remembered.
  [[nodiscard]] double seconds() const { return seconds_; }
  /// Seconds that the last plan() really took.
  [[nodiscard]] double seconds_spent() const { return seconds_spent_; }

 private:
  struct StoredScores {
    std::vector<float> rank;
    std::vector<float> mass;
    std::vector<u32> observers;
    bool has_mass = false;
    bool mass_is_accumulated = false;
    bool has_observers = false;
    bool filled = false;
  };
  struct Memory {
    AnyPolicy policy;  ///< whose scorer is asked
    std::vector<StoredScores> layers;
    double seconds = 0.0;
    double new_seconds = 0.0;
  };

  Status plan_with(PolicyStages stages, double fraction, std::vector<CompressionPlan>& plans);
  static Status remembered_score(const void* self, const CacheView& cache, const Observation& seen,
                                 kvlean::Context& context, Scores& scores) noexcept;

  const Prefix& prefix_;
  PlanSettings settings_;
  kvlean::Workspace workspace_;
  std::map<std::string, Memory> memories_;
  double seconds_ = 0.0;
  double seconds_spent_ = 0.0;
};

}  // namespace kvlean::llama_cpp
