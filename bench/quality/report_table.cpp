// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#include "bench/quality/report_table.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>

namespace kvlean::bench {
namespace {

constexpr const char* headings[] = {"policy", "error", "p95",     "lost mass",
                                    "ratio",  "kept",  "plan ms", "apply ms"};
constexpr std::size_t columns = std::size(headings);

std::vector<std::string> cells_of(const Record& record) {
  if (!record.skipped.empty()) return {record.policy, "-", "-", "-", "-", "-", "-", "-"};
  return {record.policy,
          short_number(record.attention_error),
          short_number(record.attention_error_p95),
          short_number(record.lost_mass),
          fixed_number(record.compression_ratio, 2) + "x",
          fixed_number(100.0 * record.kept_fraction, 1) + "%",
          fixed_number(1e3 * record.seconds_plan, 1),
          fixed_number(1e3 * record.seconds_apply, 1)};
}

}  // namespace

std::vector<Record> ranked(const std::vector<Record>& records, const std::string& input,
                           double budget) {
  std::vector<Record> result;
  for (const Record& record : records) {
    if (record.input == input && record.budget == budget) result.push_back(record);
  }
  std::stable_sort(result.begin(), result.end(), [](const Record& a, const Record& b) {
    if (a.skipped.empty() != b.skipped.empty()) return a.skipped.empty();
    return a.attention_error < b.attention_error;
  });
  return result;
}

std::string fixed_number(double value, int decimals) {
  char text[64];
  std::snprintf(text, sizeof text, "%.*f", decimals, value);
  return text;
}

std::string short_number(double value) {
  char text[64];
  const bool tiny = value != 0.0 && std::abs(value) < 1e-3;
  std::snprintf(text, sizeof text, tiny ? "%.1e" : "%.4f", value);
  return text;
}

std::string to_tables(const std::vector<Record>& records, const std::vector<Input>& inputs,
                      const std::vector<double>& budgets) {
  std::string text;
  for (const Input& input : inputs) {
    for (const double budget : budgets) {
      std::vector<std::vector<std::string>> rows = {{std::begin(headings), std::end(headings)}};
      for (const Record& record : ranked(records, input.name, budget)) {
        rows.push_back(cells_of(record));
      }
      std::vector<std::size_t> widths(columns, 0);
      for (const auto& row : rows) {
        for (std::size_t c = 0; c < columns; ++c) widths[c] = std::max(widths[c], row[c].size());
      }
      char budget_text[32];
      std::snprintf(budget_text, sizeof budget_text, "%g", budget);
      text += "\n" + input.name + ", budget " + budget_text + "\n";
      for (std::size_t r = 0; r < rows.size(); ++r) {
        std::string line = "  ";
        for (std::size_t c = 0; c < columns; ++c) {
          const std::string padding(widths[c] - rows[r][c].size(), ' ');
          line += c == 0 ? rows[r][c] + padding : "  " + padding + rows[r][c];
        }
        text += line + "\n";
        if (r != 0) continue;
        text += "  ";
        for (std::size_t c = 0; c < columns; ++c) {
          text += std::string(widths[c] + (c == 0 ? 0 : 2), '-');
        }
        text += "\n";
      }
    }
  }
  return text;
}

}  // namespace kvlean::bench
