// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <vector>

#include "bench/quality/sweep.hpp"

namespace kvlean::bench {

/// Text safe inside HTML and SVG, attributes included.
[[nodiscard]] std::string escaped(const std::string& text);

/// Colours of a plot as CSS variables on `selector`, light by default and dark where the reader's
/// system says so.
[[nodiscard]] std::string plot_style(const std::string& selector);

/// Ratio against error, both logarithmic, one line a policy and its label at the right end.
struct Plot {
  std::string title;
  std::string subtitle;
  std::vector<std::string> policies;  ///< which of the records are drawn, in this order
};

/// The CSS colour of a policy, the same in every plot.
[[nodiscard]] std::string colour_of(const std::string& policy);

/// A small sample of a policy's line and marker, for tables.
[[nodiscard]] std::string swatch_svg(const std::string& policy);

/// Draws the records of `input` as an SVG element. A standalone one brings its own colours, light
/// and dark, and a background. Empty if there is nothing to draw.
[[nodiscard]] std::string plot_svg(const Plot& plot, const std::vector<Record>& records,
                                   const std::string& input, bool standalone);

/// The headline plot first, then the remaining policies in plots of at most a dozen lines.
[[nodiscard]] std::vector<Plot> plots_of(const std::vector<Record>& records, const Input& input);

}  // namespace kvlean::bench
