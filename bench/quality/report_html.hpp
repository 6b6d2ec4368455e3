// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <vector>

#include "bench/quality/sweep.hpp"

namespace kvlean::bench {

/// What the report says about the run itself.
struct RunFacts {
  std::string command;
  std::string date;     ///< ISO 8601, UTC
  std::string version;  ///< of the library
  std::string compiler;
  double seconds = 0.0;
  SweepOptions options;
  std::vector<Input> inputs;  ///< tensors are not needed any more and may be empty
};

/// One self-contained page: no script, no network, light and dark.
[[nodiscard]] std::string to_html(const RunFacts& facts, const std::vector<Record>& records);

}  // namespace kvlean::bench
