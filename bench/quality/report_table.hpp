// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <vector>

#include "bench/quality/sweep.hpp"

namespace kvlean::bench {

/// Records of one input and budget, best first; skipped ones last.
[[nodiscard]] std::vector<Record> ranked(const std::vector<Record>& records,
                                         const std::string& input, double budget);

/// A number in few digits: 0.0312, 3.1e-07, 12.5.
[[nodiscard]] std::string short_number(double value);
[[nodiscard]] std::string fixed_number(double value, int decimals);

/// Aligned text tables, one for every input and budget.
[[nodiscard]] std::string to_tables(const std::vector<Record>& records,
                                    const std::vector<Input>& inputs,
                                    const std::vector<double>& budgets);

}  // namespace kvlean::bench
