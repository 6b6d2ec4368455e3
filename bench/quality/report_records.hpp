// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <vector>

#include "bench/quality/sweep.hpp"

namespace kvlean::bench {

/// A plain list of flat records. A record that was skipped has null instead of results and a
/// `skipped` line.
[[nodiscard]] std::string to_json(const std::vector<Record>& records);

/// The same as CSV with a header line; a skipped record has empty cells.
[[nodiscard]] std::string to_csv(const std::vector<Record>& records);

/// Writes a whole file. Returns one line that says what went wrong, or nothing.
[[nodiscard]] std::string write_file(const std::string& path, const std::string& text);

}  // namespace kvlean::bench
