// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <vector>

#include "bench/chart/chart.hpp"
#include "bench/quality/sweep.hpp"

namespace kvlean::bench {

/// Ratio against error, both logarithmic, one line a policy and its label at the right end.
struct Plot {
  std::string title;
  std::string subtitle;
  std::vector<std::string> policies;  ///< which of the records are drawn, in this order
};

/// How a policy is drawn, the same in every plot.
[[nodiscard]] chart::Look look_of(const std::string& policy);

/// Draws the records of `input` as an SVG element. A standalone one brings its own colours, light
/// and dark, and a background. Empty if there is nothing to draw.
[[nodiscard]] std::string plot_svg(const Plot& plot, const std::vector<Record>& records,
                                   const std::string& input, bool standalone);

/// The headline plot first, then the remaining policies in plots of at most a dozen lines.
[[nodiscard]] std::vector<Plot> plots_of(const std::vector<Record>& records, const Input& input);

}  // namespace kvlean::bench
