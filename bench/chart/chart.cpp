// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#include "bench/chart/chart.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <iterator>
#include <limits>

namespace kvlean::chart {
namespace {

constexpr double plot_width = 590.0;
constexpr double height = 500.0;
constexpr double left = 78.0;
constexpr double top = 66.0;
constexpr double bottom = 58.0;
constexpr double label_gap = 18.0;

struct Colour {
  const char* light;
  const char* dark;
};
// At least 3:1 against the page in both modes, neighbours apart in hue.
constexpr Colour palette[] = {
    {"#1c64d6", "#62a8ff"}, {"#d9480f", "#ff8f52"}, {"#2b8a3e", "#63d17c"}, {"#7a3cc2", "#b996ff"},
    {"#c2257a", "#ff7cc0"}, {"#0a8aa3", "#3fcfe6"}, {"#9a7200", "#efc443"}, {"#6b7280", "#9aa3b0"},
    {"#c92a2a", "#ff7d7d"}, {"#647f00", "#b4d43f"}, {"#8a5a20", "#d3a169"}, {"#1b1f26", "#f1f3f6"},
};
constexpr const char* dashes[] = {"", "7 4", "2 3.5", "9 3 2 3"};

std::string number(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%.2f", value);
  std::string result = text;
  while (result.back() == '0') result.pop_back();
  if (result.back() == '.') result.pop_back();
  return result == "-0" ? "0" : result;
}

std::string tick_text(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%.3g", std::fabs(value) < 1e-12 ? 0.0 : value);
  return text;
}

std::string text_svg(double x, double y, const char* anchor, const std::string& classes,
                     const std::string& text, const std::string& extra = {}) {
  return "<text x=\"" + number(x) + "\" y=\"" + number(y) + "\" text-anchor=\"" + anchor +
         "\" class=\"" + classes + "\"" + extra + ">" + escape(text) + "</text>\n";
}

std::string stroke(Look look, double thickness) {
  std::string text = " fill=\"none\" stroke=\"" + colour_of(look) + "\" stroke-width=\"" +
                     number(thickness) + "\"";
  const std::string dash = dashes[look.dash % std::size(dashes)];
  if (!dash.empty()) text += " stroke-dasharray=\"" + dash + "\"";
  return text;
}

/// A marker of about 9 pixels around (x, y), with a tooltip if there is one.
std::string marker(Look look, double x, double y, const std::string& tooltip = {}) {
  struct Shape {
    const char* element;
    const char* path;  ///< from the centre; empty: a circle
    bool is_open;
  };
  static constexpr Shape shapes[] = {
      {"circle", "", false},
      {"path", "m-3.7 -3.7h7.4v7.4h-7.4z", false},                        // square
      {"path", "m0 -4.9l4.7 8.5h-9.4z", false},                           // triangle
      {"path", "m0 -5.4l4.7 5.4l-4.7 5.4l-4.7 -5.4z", false},             // diamond
      {"path", "m0 4.9l4.7 -8.5h-9.4z", false},                           // upside down
      {"path", "m-4 -4l8 8m0 -8l-8 8", true},                             // x
      {"path", "m-5 0h10m-5 -5v10", true},                                // plus
      {"path", "m-2 -4.8h4l2.8 2.8v4l-2.8 2.8h-4l-2.8 -2.8v-4z", false},  // octagon
  };
  const Shape& shape = shapes[look.marker % std::size(shapes)];
  std::string svg;
  if (*shape.path == 0) {
    svg = "<circle cx=\"" + number(x) + "\" cy=\"" + number(y) + "\" r=\"4\"";
  } else {
    svg = "<path d=\"M" + number(x) + " " + number(y) + shape.path + "\"";
  }
  // A rim in the page's colour keeps markers apart where lines meet.
  svg += shape.is_open
             ? " fill=\"none\" stroke=\"" + colour_of(look) + "\" stroke-width=\"2.2\""
             : " fill=\"" + colour_of(look) + "\" stroke=\"var(--page)\" stroke-width=\"1\"";
  if (tooltip.empty()) return svg + "/>";
  return svg + "><title>" + escape(tooltip) + "</title></" + shape.element + ">";
}

struct Axis {
  bool logarithmic = false;
  double low = 0.0;
  double high = 1.0;
  double from = 0.0;  ///< pixel of `low`
  double to = 1.0;
  std::vector<double> ticks;

  [[nodiscard]] double place(double value) const {
    const double share =
        logarithmic ? std::log(value / low) / std::log(high / low) : (value - low) / (high - low);
    return from + (to - from) * share;
  }
};

Axis log_axis(double low, double high, double from, double to) {
  Axis axis{true, low, high, from, to, {}};
  if (high < low * 1.5) {
    axis.low = low / 1.25;
    axis.high = high * 1.25;
  }
  const double margin = std::pow(axis.high / axis.low, 0.05) * 1.02;
  axis.low /= margin;
  axis.high *= margin;
  const std::vector<std::vector<double>> steps = {
      {1}, {1, 3}, {1, 2, 5}, {1, 1.5, 2, 3, 5, 7}, {1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 4, 5, 6, 8}};
  for (const std::vector<double>& step : steps) {  // the finest with at most ten ticks
    std::vector<double> ticks;
    for (double decade = std::pow(10.0, std::floor(std::log10(axis.low))); decade <= axis.high;
         decade *= 10.0) {
      for (const double s : step) {
        if (s * decade >= axis.low && s * decade <= axis.high) ticks.push_back(s * decade);
      }
    }
    if (axis.ticks.empty() || (ticks.size() <= 10 && ticks.size() > axis.ticks.size())) {
      axis.ticks = ticks;
    }
  }
  return axis;
}

Axis linear_axis(double low, double high, double from, double to) {
  Axis axis{false, low, high, from, to, {}};
  if (high - low < 1e-9) {
    axis.low = low - 0.5;
    axis.high = high + 0.5;
  }
  const double margin = 0.05 * (axis.high - axis.low);
  axis.low -= margin;
  axis.high += margin;
  const double rough = (axis.high - axis.low) / 7.0;
  const double decade = std::pow(10.0, std::floor(std::log10(rough)));
  double step = 10.0 * decade;
  for (const double s : {5.0, 2.0, 1.0}) {
    if (s * decade >= rough) step = s * decade;
  }
  for (double tick = std::ceil(axis.low / step) * step; tick <= axis.high; tick += step) {
    axis.ticks.push_back(tick);
  }
  return axis;
}

/// A label at the right end, and where it wants to be and is.
struct Label {
  std::string text;
  std::optional<Look> look;
  double end_x = 0.0;
  double end_y = 0.0;
  double y = 0.0;
};

/// Moves labels apart as little as possible, within [low, high]: neighbours that are too close form
/// a block, which is centred where its labels want to be.
void spread(std::vector<Label>& labels, double low, double high) {
  std::stable_sort(labels.begin(), labels.end(),
                   [](const Label& a, const Label& b) { return a.y < b.y; });
  struct Block {
    double sum;  // of wanted places, each less its offset in the block
    std::size_t count;
    double start(double l, double h) const {
      const double span = label_gap * static_cast<double>(count - 1);
      return std::clamp(sum / static_cast<double>(count), l, std::max(l, h - span));
    }
  };
  std::vector<Block> blocks;
  for (const Label& label : labels) {
    blocks.push_back({label.y, 1});
    while (blocks.size() > 1) {
      Block& last = blocks[blocks.size() - 1];
      Block& before = blocks[blocks.size() - 2];
      const double offset = label_gap * static_cast<double>(before.count);
      if (last.start(low, high) >= before.start(low, high) + offset) break;
      before.sum += last.sum - offset * static_cast<double>(last.count);
      before.count += last.count;
      blocks.pop_back();
    }
  }
  std::size_t i = 0;
  for (const Block& block : blocks) {
    const double start = block.start(low, high);
    for (std::size_t j = 0; j < block.count; ++j) {
      labels[i++].y = start + label_gap * static_cast<double>(j);
    }
  }
}

std::string open_svg(double w, double h, const std::string& title, bool standalone) {
  std::string svg = "<svg xmlns=\"http://www.w3.org/2000/svg\" class=\"chart\" viewBox=\"0 0 " +
                    number(w) + " " + number(h) + "\" role=\"img\"";
  if (standalone) svg += " width=\"" + number(w) + "\" height=\"" + number(h) + "\"";
  svg += ">\n<title>" + escape(title) + "</title>\n";
  if (standalone) {
    svg += "<style>\n" + chart_style("svg") + "</style>\n<rect width=\"100%\" height=\"100%\" " +
           "rx=\"8\" fill=\"var(--page)\"/>\n";
  }
  return svg;
}

}  // namespace

Look Look::nth(std::size_t index) {
  return {index % std::size(palette), index, index / std::size(palette)};
}

std::string colour_of(Look look) {
  return "var(--c" + std::to_string(look.colour % std::size(palette)) + ")";
}

std::string escape(const std::string& text) {
  std::string result;
  for (const char c : text) {
    switch (c) {
      case '&':
        result += "&amp;";
        break;
      case '<':
        result += "&lt;";
        break;
      case '>':
        result += "&gt;";
        break;
      case '"':
        result += "&quot;";
        break;
      default:
        result += static_cast<unsigned char>(c) < 0x20 ? ' ' : c;
    }
  }
  return result;
}

std::string chart_style(const std::string& selector) {
  const auto variables = [&](bool dark) {
    std::string text = selector + "{";
    text += dark ? "--page:#14171c;--ink:#e6e9ee;--soft:#a3abb8;--grid:#2a3039;--frame:#535c6a;"
                   "--bad:#5b2330;--good:#2c7a4b;--none:#23282f;"
                 : "--page:#ffffff;--ink:#1b1f26;--soft:#5a6372;--grid:#e6e9ee;--frame:#9aa3b0;"
                   "--bad:#f6c6c4;--good:#8fd6a4;--none:#f1f3f6;";
    for (std::size_t i = 0; i < std::size(palette); ++i) {
      text += "--c" + std::to_string(i) + ":" + (dark ? palette[i].dark : palette[i].light) + ";";
    }
    return text + "}\n";
  };
  return variables(false) + "@media (prefers-color-scheme:dark){" + variables(true) + "}\n" +
         ".chart text{font:13px system-ui,-apple-system,'Segoe UI',Roboto,'DejaVu Sans',sans-serif;"
         "fill:var(--ink)}\n"
         ".chart .title{font-size:17px;font-weight:600}\n"
         ".chart .subtitle,.chart .tick{fill:var(--soft);font-size:12.5px}\n"
         ".chart .axis{fill:var(--soft)}\n"
         ".chart .cell{font-size:11px}\n"
         ".chart .grid{stroke:var(--grid);fill:none}\n"
         ".chart .frame{stroke:var(--frame);fill:none}\n"
         ".chart .level{stroke:var(--soft);fill:none;stroke-dasharray:6 4}\n"
         ".chart .leader{fill:none;opacity:.5}\n";
}

std::string page_style() {
  return chart_style(":root") + R"css(*{box-sizing:border-box}
html{color-scheme:light dark}
body{margin:0;background:var(--page);color:var(--ink);
  font:15px/1.5 system-ui,-apple-system,'Segoe UI',Roboto,'DejaVu Sans',sans-serif}
main{max-width:1180px;margin:0 auto;padding:28px 20px 60px}
h1{font-size:26px;line-height:1.25;margin:0 0 4px}
h2{font-size:20px;margin:44px 0 10px;padding-top:14px;border-top:1px solid var(--grid)}
h3{font-size:16px;margin:28px 0 6px}
h4{font-size:14px;margin:18px 0 4px;color:var(--soft)}
p{margin:8px 0;max-width:84ch}
.soft{color:var(--soft)}
code{font:13px/1.5 ui-monospace,'SF Mono',Menlo,Consolas,'DejaVu Sans Mono',monospace}
.command{display:block;padding:10px 12px;margin:10px 0;border:1px solid var(--grid);
  border-radius:8px;overflow-x:auto;white-space:pre-wrap;overflow-wrap:anywhere}
dl{display:grid;grid-template-columns:max-content 1fr;gap:3px 18px;margin:12px 0}
dt{color:var(--soft)}
dd{margin:0;overflow-wrap:anywhere}
.chart{display:block;width:100%;min-width:640px;max-width:1060px;height:auto;margin:16px 0}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;margin:0 0 10px}
th,td{padding:3px 14px 3px 0;text-align:right;white-space:nowrap}
th{color:var(--soft);font-weight:500;border-bottom:1px solid var(--frame);vertical-align:bottom}
td{border-bottom:1px solid var(--grid)}
th:first-child,td:first-child,td.left,th.left{text-align:left}
td small{color:var(--soft)}
td.best{font-weight:700}
td.wrap{white-space:normal}
.swatch{vertical-align:-2px;margin-right:8px}
footer{margin-top:44px;color:var(--soft);font-size:13.5px}
)css";
}

std::string swatch(Look look) {
  return "<svg class=\"swatch\" width=\"34\" height=\"14\" viewBox=\"0 0 34 14\" "
         "aria-hidden=\"true\"><path d=\"M1 7H33\"" +
         stroke(look, 2.0) + "/>" + marker(look, 17, 7) + "</svg>";
}

std::string to_svg(const Chart& chart, bool standalone) {
  const auto has_place = [&](double x, double y) {
    return std::isfinite(x) && std::isfinite(y) && (!chart.log_x || x > 0.0) &&
           (!chart.log_y || y > 0.0);
  };
  constexpr double infinity = std::numeric_limits<double>::infinity();
  double low_x = infinity, high_x = -infinity, low_y = infinity, high_y = -infinity;
  std::vector<ChartLine> lines;
  for (const ChartLine& line : chart.lines) {
    ChartLine kept{line.name, line.look, {}};
    for (const ChartPoint& point : line.points) {
      if (!has_place(point.x, point.y)) continue;
      kept.points.push_back(point);
      low_x = std::min(low_x, point.x);
      high_x = std::max(high_x, point.x);
      low_y = std::min(low_y, point.y);
      high_y = std::max(high_y, point.y);
    }
    std::stable_sort(kept.points.begin(), kept.points.end(),
                     [](const ChartPoint& a, const ChartPoint& b) { return a.x < b.x; });
    if (!kept.points.empty()) lines.push_back(std::move(kept));
  }
  if (lines.empty()) return {};
  for (const ChartLevel& level : chart.levels) {
    if (!has_place(1.0, level.y)) continue;
    low_y = std::min(low_y, level.y);
    high_y = std::max(high_y, level.y);
  }
  const Axis x = chart.log_x ? log_axis(low_x, high_x, left, left + plot_width)
                             : linear_axis(low_x, high_x, left, left + plot_width);
  const Axis y = chart.log_y ? log_axis(low_y, high_y, height - bottom, top)
                             : linear_axis(low_y, high_y, height - bottom, top);

  std::size_t longest = 22;  // characters of a label, of about 7.3 pixels
  for (const ChartLine& line : lines) longest = std::max(longest, line.name.size());
  for (const ChartLevel& level : chart.levels) longest = std::max(longest, level.name.size());
  const double width = x.to + 44.0 + 7.3 * static_cast<double>(longest);

  std::string svg = open_svg(width, height, chart.title, standalone);
  svg += text_svg(left, 28, "start", "title", chart.title);
  svg += text_svg(left, 48, "start", "subtitle", chart.subtitle);
  const std::string x0 = number(x.from);
  const std::string x1 = number(x.to);
  for (const double tick : y.ticks) {
    const double at = y.place(tick);
    svg += "<path class=\"grid\" d=\"M" + x0 + " " + number(at) + "H" + x1 + "\"/>\n";
    svg += text_svg(x.from - 9, at + 4, "end", "tick", tick_text(tick));
  }
  for (const double tick : x.ticks) {
    const double at = x.place(tick);
    svg += "<path class=\"grid\" d=\"M" + number(at) + " " + number(y.from) + "V" + number(y.to) +
           "\"/>\n";
    svg += text_svg(at, y.from + 20, "middle", "tick", tick_text(tick) + chart.x_unit);
  }
  svg += "<path class=\"frame\" d=\"M" + x0 + " " + number(y.to) + "V" + number(y.from) + "H" + x1 +
         "\"/>\n";
  svg += text_svg((x.from + x.to) / 2, y.from + 44, "middle", "axis", chart.x_label);
  const double middle = (y.from + y.to) / 2;
  svg += text_svg(20, middle, "middle", "axis", chart.y_label,
                  " transform=\"rotate(-90 20 " + number(middle) + ")\"");

  std::vector<Label> labels;
  for (const ChartLevel& level : chart.levels) {
    if (!has_place(1.0, level.y)) continue;
    const double at = y.place(level.y);
    svg += "<path class=\"level\" d=\"M" + x0 + " " + number(at) + "H" + x1 + "\"/>\n";
    if (level.x && has_place(*level.x, level.y) && *level.x >= x.low && *level.x <= x.high) {
      svg += "<circle cx=\"" + number(x.place(*level.x)) + "\" cy=\"" + number(at) +
             "\" r=\"4\" fill=\"var(--page)\" stroke=\"var(--soft)\" stroke-width=\"2\"><title>" +
             escape(level.name) + "</title></circle>\n";
    }
    labels.push_back({level.name, std::nullopt, x.to, at, at});
  }
  for (const ChartLine& line : lines) {
    std::string path;
    for (const ChartPoint& point : line.points) {
      const double at_x = x.place(point.x);
      path += (path.empty() ? "M" : "L") + number(at_x) + " " + number(y.place(point.y));
      if (!point.low || !point.high) continue;
      // An interval that leaves the axis ends at its border.
      const double low = std::max(*point.low, y.low);
      const double high = std::min(*point.high, y.high);
      if (!(low < high)) continue;
      svg += "<path d=\"M" + number(at_x) + " " + number(y.place(low)) + "V" +
             number(y.place(high)) + "\" stroke=\"" + colour_of(line.look) +
             "\" stroke-width=\"1.3\" opacity=\".55\"/>\n";
    }
    svg += "<path d=\"" + path + "\"" + stroke(line.look, 1.9) + " stroke-linejoin=\"round\"/>\n";
  }
  for (const ChartLine& line : lines) {
    for (const ChartPoint& point : line.points) {
      svg += marker(line.look, x.place(point.x), y.place(point.y),
                    line.name + (point.tooltip.empty() ? "" : "\n" + point.tooltip)) +
             "\n";
    }
    const ChartPoint& last = line.points.back();
    labels.push_back({line.name, line.look, x.place(last.x), y.place(last.y), y.place(last.y)});
  }
  spread(labels, top + 4, height - bottom - 4);
  const double text_x = x.to + 30;
  for (const Label& label : labels) {
    const double start = label.look ? label.end_x + 8 : label.end_x + 2;
    svg += "<path class=\"leader\" stroke=\"" +
           (label.look ? colour_of(*label.look) : std::string("var(--soft)")) + "\" d=\"M" +
           number(start) + " " + number(label.end_y) + "L" + number(std::max(start, x.to + 4)) +
           " " + number(label.end_y) + "L" + number(text_x - 15) + " " + number(label.y) + "\"/>\n";
    if (label.look) svg += marker(*label.look, text_x - 7, label.y) + "\n";
    svg += text_svg(text_x + 2, label.y + 4.5, "start", label.look ? "label" : "tick", label.text,
                    label.look ? " style=\"fill:" + colour_of(*label.look) + "\"" : std::string());
  }
  return svg + "</svg>\n";
}

std::string to_svg(const std::string& title, const std::string& subtitle,
                   const std::string& x_label, const std::string& y_label,
                   const std::vector<HeatMap>& maps, bool standalone) {
  if (maps.empty()) return {};
  constexpr double cell = 38.0;
  constexpr double cell_height = 26.0;
  constexpr double row_names = 74.0;  // each map has its own, as maps wrap into several rows
  constexpr double gap = 26.0;
  std::size_t columns = 1;
  std::size_t rows = 1;
  for (const HeatMap& map : maps) {
    columns = std::max(columns, map.columns.size());
    rows = std::max(rows, map.rows.size());
  }
  const double one_width = std::max(row_names + cell * static_cast<double>(columns), 190.0) + gap;
  const double one_height = 26.0 + cell_height * static_cast<double>(rows) + 46.0;
  const std::size_t across =
      std::clamp<std::size_t>(static_cast<std::size_t>(1040.0 / one_width), 1, maps.size());
  const std::size_t down = (maps.size() + across - 1) / across;
  const double full_width = std::max(20.0 + one_width * static_cast<double>(across), 420.0);
  const double full_height = 66.0 + one_height * static_cast<double>(down);
  std::string svg = open_svg(full_width, full_height, title, standalone);
  svg += text_svg(16, 28, "start", "title", title);
  svg += text_svg(16, 48, "start", "subtitle", subtitle);
  for (std::size_t m = 0; m < maps.size(); ++m) {
    const HeatMap& map = maps[m];
    const double x0 = 16.0 + one_width * static_cast<double>(m % across);
    const double y0 = 66.0 + one_height * static_cast<double>(m / across);
    svg += text_svg(x0, y0 + 14, "start", "label", map.title);
    for (std::size_t r = 0; r < map.rows.size(); ++r) {
      const double y = y0 + 24.0 + cell_height * static_cast<double>(r);
      svg += text_svg(x0 + row_names - 8, y + 17, "end", "tick", map.rows[r]);
      for (std::size_t c = 0; c < map.columns.size(); ++c) {
        const double x = x0 + row_names + cell * static_cast<double>(c);
        const std::optional<double>& value = map.cells[r * map.columns.size() + c];
        const std::string place = "x=\"" + number(x) + "\" y=\"" + number(y) + "\" width=\"" +
                                  number(cell - 2) + "\" height=\"" + number(cell_height - 2) +
                                  "\"";
        svg += "<rect " + place + " fill=\"var(--" + (value ? "bad" : "none") + ")\"/>";
        if (value) {
          const double share = std::clamp(*value, 0.0, 1.0);
          svg += "<rect " + place + " fill=\"var(--good)\" opacity=\"" + number(share) + "\"/>" +
                 text_svg(x + cell / 2 - 1, y + 16.5, "middle", "cell",
                          number(std::round(100.0 * share)));
        }
        svg += "\n";
      }
    }
    const double under = y0 + 24.0 + cell_height * static_cast<double>(map.rows.size());
    for (std::size_t c = 0; c < map.columns.size(); ++c) {
      svg += text_svg(x0 + row_names + cell * (static_cast<double>(c) + 0.5) - 1, under + 14,
                      "middle", "tick", map.columns[c]);
    }
    svg += text_svg(x0 + row_names + cell * static_cast<double>(map.columns.size()) / 2, under + 31,
                    "middle", "tick", x_label);
    if (m % across == 0) {
      const double middle = y0 + 24.0 + cell_height * static_cast<double>(map.rows.size()) / 2;
      svg += text_svg(x0 + 2, middle, "middle", "tick", y_label,
                      " transform=\"rotate(-90 " + number(x0 + 2) + " " + number(middle) + ")\"");
    }
  }
  return svg + "</svg>\n";
}

}  // namespace kvlean::chart
