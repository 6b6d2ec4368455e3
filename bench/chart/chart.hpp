// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <optional>
#include <string>
#include <vector>

// Charts as SVG elements that take their colours from CSS variables, and what the HTML reports
// share.

namespace kvlean::chart {

/// How a line is drawn: indices of the colours, markers and dashes, modulo how many there are.
struct Look {
  std::size_t colour = 0;
  std::size_t marker = 0;
  std::size_t dash = 0;

  /// The looks of a list: all colours solid, then all of them dashed, ...
  [[nodiscard]] static Look nth(std::size_t index);
};

struct ChartPoint {
  double x = 0.0;
  double y = 0.0;
  std::optional<double> low;  ///< of an interval around y
  std::optional<double> high;
  std::string tooltip;
};

struct ChartLine {
  std::string name;
  Look look;
  std::vector<ChartPoint> points;
};

/// A yardstick: a horizontal line with its name, and a mark where it has an x of its own.
struct ChartLevel {
  std::string name;
  double y = 0.0;
  std::optional<double> x;
};

struct Chart {
  std::string title;
  std::string subtitle;
  std::string x_label;
  std::string y_label;
  std::string x_unit;  ///< behind the numbers of the axis
  bool log_x = false;
  bool log_y = false;
  std::vector<ChartLine> lines;
  std::vector<ChartLevel> levels;
};

/// A grid of cells, 0 (bad) to 1 (good); empty cells stay blank.
struct HeatMap {
  std::string title;
  std::vector<std::string> columns;
  std::vector<std::string> rows;
  std::vector<std::optional<double>> cells;  ///< row by row
};

/// Text safe inside HTML and SVG, attributes included.
[[nodiscard]] std::string escape(const std::string& text);

/// The colours as CSS variables on `selector`, light by default and dark where the reader's system
/// says so, and the classes of the charts.
[[nodiscard]] std::string chart_style(const std::string& selector);

/// chart_style for a whole page, and how its text and tables look.
[[nodiscard]] std::string page_style();

/// The CSS colour of a look.
[[nodiscard]] std::string colour_of(Look look);

/// A standalone chart brings its style and a background. Empty if there is nothing to draw. Points
/// that have no place on a logarithmic axis are left out.
[[nodiscard]] std::string to_svg(const Chart& chart, bool standalone);

/// Several heat maps side by side under one title.
[[nodiscard]] std::string to_svg(const std::string& title, const std::string& subtitle,
                                 const std::string& x_label, const std::string& y_label,
                                 const std::vector<HeatMap>& maps, bool standalone);

/// A small sample of a line, for tables.
[[nodiscard]] std::string swatch(Look look);

}  // namespace kvlean::chart
