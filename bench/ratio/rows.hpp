// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
// Target rows, and the experiments that fill them.
#pragma once

#include <functional>
#include <kvlean/core/executor.hpp>
#include <limits>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "bench/ratio/blas.hpp"
#include "bench/ratio/machine.hpp"
#include "bench/ratio/measure.hpp"
#include "bench/ratio/peers.hpp"

namespace kvlean::ratio {

enum class Better { lower, higher };

/// What a row can't do without.
enum Needs : u32 {
  needs_vectors = 1u << 0,  ///< a SIMD target beside the scalar one
  needs_matrix = 1u << 1,   ///< AMX
  needs_blas = 1u << 2,
  needs_torch = 1u << 3,
  needs_full = 1u << 4,  ///< makes no sense at the sizes of the quick form
  is_exact = 1u << 5,    ///< counted, not timed: the quick form doesn't loosen it
};

inline constexpr double none = std::numeric_limits<double>::quiet_NaN();

/// A claim: kernel by reference (better: lower) or reference by kernel (better: higher).
struct TargetRow {
  const char* name;
  const char* claim;      ///< in words
  const char* kernel;     ///< a variant of the experiment
  const char* reference;  ///< another
  Better better;
  double must;  ///< none: told, not judged
  double aim;   ///< none: there is none
  u32 needs;
};

/// Settings of a run that an experiment reads.
struct Setup {
  bool quick = false;
  u32 threads = 1;
  Executor executor;
  const Blas* blas = nullptr;
  Peers* peers = nullptr;       ///< null: not asked for
  std::size_t cache_bytes = 0;  ///< of the largest cache

  /// Tokens of a layer: 32768, in the quick form 4096.
  [[nodiscard]] u32 tokens() const { return quick ? 4096 : 32768; }
  /// Copies of data of this size that no cache holds together.
  [[nodiscard]] std::size_t copies(std::size_t bytes) const {
    return 1 + (cache_bytes + cache_bytes / 2) / (bytes == 0 ? 1 : bytes);
  }
};

/// The outcome of checking a kernel against an oracle, before it is timed.
struct Verdict {
  double error = none;  ///< none: exact, checked bit by bit
  double bound = none;
  bool good = true;
  u64 digest = 0;  ///< of the output: the same for any number of threads
};

/// How a variant is labelled in its records.
struct Label {
  std::string isa;
  std::string dtype;
  std::string shape;
  std::string layout;
};

struct Experiment {
  Label label;  ///< of rows whose kernel has none in `labels`
  std::map<std::string, Label> labels;
  std::vector<Variant> variants;
  std::map<std::string, std::function<Verdict()>> verify;  ///< by kernel variant
  std::map<std::string, double> exact;  ///< values of rows that are counted, by row
  std::map<std::string, std::function<std::size_t()>> scratch_bytes;  ///< by kernel variant
  /// Rows compare seconds of a run divided by this, where given: seconds a token, by variant.
  std::map<std::string, double> units;
  std::shared_ptr<void> data;  ///< what the functions above work on
};

/// Rows that are measured together.
struct Group {
  std::vector<TargetRow> rows;
  /// Makes the variants named in `wanted`; others may be left out.
  std::function<Experiment(const Setup&, const std::vector<std::string>& wanted)> build;
};

[[nodiscard]] inline bool wants(const std::vector<std::string>& wanted, const char* variant) {
  for (const std::string& name : wanted) {
    if (name == variant) return true;
  }
  return false;
}

void add_scoring_groups(std::vector<Group>& groups);
void add_selection_groups(std::vector<Group>& groups);
void add_merging_groups(std::vector<Group>& groups);
void add_compaction_groups(std::vector<Group>& groups);
void add_decoding_groups(std::vector<Group>& groups);
void add_layer_groups(std::vector<Group>& groups);
void add_memory_groups(std::vector<Group>& groups);

}  // namespace kvlean::ratio
