// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#include "bench/quality/plot_svg.hpp"

#include <algorithm>
#include <cmath>
#include <utility>

#include "bench/quality/report_table.hpp"

namespace kvlean::bench {
namespace {

using chart::Look;

constexpr std::size_t lines_per_plot = 12;

struct NamedLook {
  const char* policy;
  Look look;
};
// Families share a dash: baselines dotted, H2O and SnapKV solid, merging dashed, Ada-KV dash-dot.
constexpr NamedLook looks[] = {
    {"random", {7, 0, 2}},
    {"streaming_llm", {10, 1, 2}},
    {"h2o", {1, 2, 0}},
    {"snapkv", {0, 0, 0}},
    {"snapkv+adakv+evict", {5, 3, 3}},
    {"h2o+adakv+evict", {8, 4, 3}},
    {"cam", {3, 5, 1}},
    {"kvmerger", {2, 1, 1}},
    {"kvmerger_mass", {9, 6, 1}},
    {"h2o+adakv+kvmerger", {11, 7, 3}},
    {"massfold", {4, 3, 0}},
    {"knorm", {7, 1, 2}},
    {"tova", {10, 2, 0}},
    {"h2o+uniform+evict", {1, 6, 0}},
    {"pyramidkv", {0, 4, 0}},
    {"snapkv+adakv_layers+evict", {5, 7, 3}},
    {"cam_oneshot", {3, 0, 1}},
    {"d2o", {8, 5, 1}},
    {"kvmerger_paper", {2, 3, 1}},
    {"snapkv+adakv+massfold", {4, 2, 3}},
};

}  // namespace

Look look_of(const std::string& policy) {
  for (const NamedLook& entry : looks) {
    if (policy == entry.policy) return entry.look;
  }
  u32 hash = 2166136261u;
  for (const char c : policy) hash = (hash ^ static_cast<unsigned char>(c)) * 16777619u;
  return {hash % 12, hash / 12 % 8, hash / 96 % 4};
}

std::string plot_svg(const Plot& plot, const std::vector<Record>& records, const std::string& input,
                     bool standalone) {
  chart::Chart drawn;
  drawn.title = plot.title;
  drawn.subtitle = plot.subtitle;
  drawn.x_label = "compression ratio (bytes before / bytes after)";
  drawn.x_unit = "×";
  drawn.y_label = "attention error (lower is better)";
  drawn.log_x = drawn.log_y = true;
  for (const std::string& policy : plot.policies) {
    chart::ChartLine line{policy, look_of(policy), {}};
    for (const Record& record : records) {
      // An error of zero up to rounding has no place on a logarithmic axis.
      if (record.input == input && record.policy == policy && record.skipped.empty() &&
          std::isfinite(record.attention_error) && record.attention_error > 1e-5) {
        line.points.push_back({record.compression_ratio,
                               record.attention_error,
                               {},
                               {},
                               "budget " + short_number(record.budget) + ", ratio " +
                                   fixed_number(record.compression_ratio, 2) + ", error " +
                                   short_number(record.attention_error)});
      }
    }
    drawn.lines.push_back(std::move(line));
  }
  return chart::to_svg(drawn, standalone);
}

std::vector<Plot> plots_of(const std::vector<Record>& records, const Input& input) {
  std::vector<std::string> seen;
  for (const Record& record : records) {
    if (record.input == input.name &&
        std::find(seen.begin(), seen.end(), record.policy) == seen.end()) {
      seen.push_back(record.policy);
    }
  }
  const auto contains = [](const std::vector<std::string>& names, const std::string& name) {
    return std::find(names.begin(), names.end(), name) != names.end();
  };
  std::vector<std::string> headline;
  std::vector<std::string> others;
  for (const std::string& policy : seen) {
    if (policy == "full") continue;
    (contains(headline_policies(), policy) ? headline : others).push_back(policy);
  }
  if (headline.size() + others.size() <= lines_per_plot || headline.empty()) {
    headline.insert(headline.end(), others.begin(), others.end());
    others.clear();
  }
  const io::Capture& capture = input.capture;
  const std::string what = input.name + ": " + std::to_string(capture.context_tokens) +
                           " tokens compressed, " + std::to_string(capture.future_tokens()) +
                           " future queries, " + std::to_string(capture.layers.size()) +
                           (capture.layers.size() == 1 ? " layer" : " layers");
  std::vector<Plot> plots;
  const auto add = [&](const std::string& title, const std::vector<std::string>& names) {
    for (std::size_t i = 0; i < names.size(); i += lines_per_plot) {
      const std::size_t end = std::min(names.size(), i + lines_per_plot);
      plots.push_back({title,
                       what,
                       {names.begin() + static_cast<std::ptrdiff_t>(i),
                        names.begin() + static_cast<std::ptrdiff_t>(end)}});
    }
  };
  add("Attention error against compression", headline);
  add("Attention error against compression: further policies", others);
  return plots;
}

}  // namespace kvlean::bench
