// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <vector>

#include "bench/eval/summary.hpp"

namespace kvlean::eval {

/// One self-contained page: tables ranked within a budget, curves with intervals, heat maps of the
/// passkey. No script, no network, light and dark. `items` are for the heat maps and the list of
/// documents.
[[nodiscard]] std::string to_html(const RunMeta& meta, const std::vector<SummaryRecord>& records,
                                  const std::vector<ItemRecord>& items);

/// The plots of the page one by one as standalone SVG files: (file name, content).
[[nodiscard]] std::vector<std::pair<std::string, std::string>> to_plots(
    const std::vector<SummaryRecord>& records, const std::vector<ItemRecord>& items);

/// Writes a whole file: to a temporary one beside it first, then renamed.
[[nodiscard]] Outcome write_file(const std::string& path, const std::string& text);

}  // namespace kvlean::eval
