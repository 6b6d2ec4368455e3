// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#include "bench/quality/plot_svg.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <map>

#include "bench/quality/report_table.hpp"

namespace kvlean::bench {
namespace {

constexpr double width = 900.0;
constexpr double height = 540.0;
constexpr double left = 74.0;
constexpr double right = 222.0;  // room for the labels
constexpr double top = 66.0;
constexpr double bottom = 58.0;
constexpr double label_gap = 19.0;
constexpr std::size_t lines_per_plot = 12;

struct Colour {
  const char* light;
  const char* dark;
};
// At least 3:1 against the page in both modes, neighbours apart in hue.
constexpr Colour palette[] = {
    {"#6b7280", "#9aa3b0"}, {"#8a5a20", "#d3a169"}, {"#d9480f", "#ff8f52"}, {"#1c64d6", "#62a8ff"},
    {"#0a8aa3", "#3fcfe6"}, {"#c92a2a", "#ff7d7d"}, {"#7a3cc2", "#b996ff"}, {"#2b8a3e", "#63d17c"},
    {"#647f00", "#b4d43f"}, {"#1b1f26", "#f1f3f6"}, {"#c2257a", "#ff7cc0"}, {"#9a7200", "#efc443"},
};
constexpr u32 colours = static_cast<u32>(std::size(palette));
constexpr const char* dashes[] = {"", "7 4", "2 3.5", "9 3 2 3"};
constexpr u32 markers = 8;

/// How one policy is drawn: indices into the palette, the markers and the dashes.
struct Look {
  u32 colour = 0;
  u32 marker = 0;
  u32 dash = 0;
};

struct NamedLook {
  const char* policy;
  Look look;
};
// Families share a dash: baselines dotted, H2O and SnapKV solid, merging dashed, Ada-KV dash-dot.
constexpr NamedLook looks[] = {
    {"random", {0, 0, 2}},
    {"streaming_llm", {1, 1, 2}},
    {"h2o", {2, 2, 0}},
    {"snapkv", {3, 0, 0}},
    {"snapkv+adakv+evict", {4, 4, 3}},
    {"h2o+adakv+evict", {5, 3, 3}},
    {"cam", {6, 5, 1}},
    {"kvmerger", {7, 1, 1}},
    {"kvmerger_mass", {8, 6, 1}},
    {"h2o+adakv+kvmerger", {9, 7, 3}},
    {"massfold", {10, 4, 0}},
    {"knorm", {0, 1, 2}},
    {"tova", {1, 2, 0}},
    {"h2o+uniform+evict", {2, 6, 0}},
    {"pyramidkv", {3, 3, 0}},
    {"snapkv+adakv_layers+evict", {4, 7, 3}},
    {"cam_oneshot", {6, 0, 1}},
    {"d2o", {5, 5, 1}},
    {"kvmerger_paper", {7, 4, 1}},
    {"snapkv+adakv+massfold", {10, 2, 3}},
};

Look look_of(const std::string& policy) {
  for (const NamedLook& entry : looks) {
    if (policy == entry.policy) return entry.look;
  }
  u32 hash = 2166136261u;
  for (const char c : policy) hash = (hash ^ static_cast<unsigned char>(c)) * 16777619u;
  return {hash % colours, hash / colours % markers, hash / (colours * markers) % 4};
}

std::string css_colour(const Look& look) {
  return "var(--c" + std::to_string(look.colour % colours) + ")";
}

std::string number(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%.2f", value);
  std::string result = text;
  while (result.back() == '0') result.pop_back();
  if (result.back() == '.') result.pop_back();
  return result == "-0" ? "0" : result;
}

/// A marker of about 9 pixels around (x, y), with a tooltip.
std::string marker_svg(const Look& look, double x, double y, const std::string& tooltip) {
  struct Point {
    double x, y;
  };
  const auto polygon = [&](std::initializer_list<Point> points) {
    std::string text = "<polygon points=\"";
    for (const Point& point : points) text += number(x + point.x) + "," + number(y + point.y) + " ";
    text.back() = '"';
    return text;
  };
  std::string shape;
  bool open = false;
  switch (look.marker % markers) {
    case 0:
      shape = "<circle cx=\"" + number(x) + "\" cy=\"" + number(y) + "\" r=\"4\"";
      break;
    case 1:
      shape = polygon({{-3.7, -3.7}, {3.7, -3.7}, {3.7, 3.7}, {-3.7, 3.7}});
      break;
    case 2:
      shape = polygon({{0, -4.9}, {4.7, 3.6}, {-4.7, 3.6}});
      break;
    case 3:
      shape = polygon({{0, 4.9}, {4.7, -3.6}, {-4.7, -3.6}});
      break;
    case 4:
      shape = polygon({{0, -5.4}, {4.7, 0}, {0, 5.4}, {-4.7, 0}});
      break;
    case 5:
      open = true;
      shape = "<path d=\"M" + number(x - 4) + " " + number(y - 4) + "l8 8m0 -8l-8 8\"";
      break;
    case 6:
      open = true;
      shape = "<path d=\"M" + number(x - 5) + " " + number(y) + "h10M" + number(x) + " " +
              number(y - 5) + "v10\"";
      break;
    default:
      shape = polygon(
          {{-2, -4.8}, {2, -4.8}, {4.8, -2}, {4.8, 2}, {2, 4.8}, {-2, 4.8}, {-4.8, 2}, {-4.8, -2}});
      break;
  }
  const std::string colour = css_colour(look);
  // A rim in the page's colour keeps markers apart where lines meet.
  shape += open ? " fill=\"none\" stroke=\"" + colour + "\" stroke-width=\"2.2\""
                : " fill=\"" + colour + "\" stroke=\"var(--page)\" stroke-width=\"1\"";
  if (tooltip.empty()) return shape + "/>";
  return shape + "><title>" + escaped(tooltip) + "</title></" +
         (shape.starts_with("<c")    ? "circle"
          : shape.starts_with("<pa") ? "path"
                                     : "polygon") +
         ">";
}

std::string stroke_of(const Look& look, double stroke_width) {
  std::string text = " fill=\"none\" stroke=\"" + css_colour(look) + "\" stroke-width=\"" +
                     number(stroke_width) + "\"";
  const std::string dash = dashes[look.dash % 4];
  if (!dash.empty()) text += " stroke-dasharray=\"" + dash + "\"";
  return text;
}

std::string text_svg(double x, double y, const char* anchor, const std::string& classes,
                     const std::string& text, const std::string& extra = {}) {
  return "<text x=\"" + number(x) + "\" y=\"" + number(y) + "\" text-anchor=\"" + anchor +
         "\" class=\"" + classes + "\"" + extra + ">" + escaped(text) + "</text>\n";
}

/// A logarithmic axis with its ticks.
struct Axis {
  double low = 1.0;
  double high = 10.0;
  double from = 0.0;  ///< pixel of `low`
  double to = 1.0;
  std::vector<double> ticks;

  [[nodiscard]] double place(double value) const {
    return from + (to - from) * std::log(value / low) / std::log(high / low);
  }
};

/// Widens [low, high] a little and puts ticks at 1, 2, 5 of every decade, or finer if these are
/// few.
Axis make_axis(double low, double high, double from, double to) {
  Axis axis;
  const double margin = std::pow(high / low, 0.05) * 1.02;
  axis.low = low / margin;
  axis.high = high * margin;
  axis.from = from;
  axis.to = to;
  const std::vector<std::vector<double>> steps = {
      {1},
      {1, 3},
      {1, 2, 5},
      {1, 1.5, 2, 3, 5, 7},
      {1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 4, 5, 6, 7, 8, 9}};
  std::size_t best = 0;
  for (std::size_t s = 0; s < steps.size(); ++s) {
    std::vector<double> ticks;
    for (double decade = std::pow(10.0, std::floor(std::log10(axis.low))); decade <= axis.high;
         decade *= 10.0) {
      for (const double step : steps[s]) {
        const double tick = step * decade;
        if (tick >= axis.low && tick <= axis.high) ticks.push_back(tick);
      }
    }
    if (ticks.size() > 11 && best != 0) break;
    if (ticks.size() > best) {
      best = ticks.size();
      axis.ticks = ticks;
    }
  }
  return axis;
}

std::string tick_text(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%.3g", value);
  return text;
}

struct Line {
  std::string policy;
  Look look;
  std::vector<const Record*> points;  ///< by ratio, ascending
  double label = 0.0;                 ///< pixel of the label
};

/// Moves labels apart as little as possible, within [low, high]: neighbours that are too close form
/// a block, which is centred where its labels want to be.
void spread_labels(std::vector<Line>& lines, double low, double high) {
  std::sort(lines.begin(), lines.end(),
            [](const Line& a, const Line& b) { return a.label < b.label; });
  struct Block {
    double sum;  // of wanted places, each less its offset in the block
    std::size_t count;
    double start(double l, double h) const {
      const double span = label_gap * static_cast<double>(count - 1);
      return std::clamp(sum / static_cast<double>(count), l, std::max(l, h - span));
    }
  };
  std::vector<Block> blocks;
  for (const Line& line : lines) {
    blocks.push_back({line.label, 1});
    while (blocks.size() > 1) {
      Block& last = blocks[blocks.size() - 1];
      Block& before = blocks[blocks.size() - 2];
      const double end = before.start(low, high) + label_gap * static_cast<double>(before.count);
      if (last.start(low, high) >= end) break;
      const double offset = label_gap * static_cast<double>(before.count);
      before.sum += last.sum - offset * static_cast<double>(last.count);
      before.count += last.count;
      blocks.pop_back();
    }
  }
  std::size_t i = 0;
  for (const Block& block : blocks) {
    const double start = block.start(low, high);
    for (std::size_t j = 0; j < block.count; ++j) {
      lines[i++].label = start + label_gap * static_cast<double>(j);
    }
  }
}

std::vector<Line> lines_of(const Plot& plot, const std::vector<Record>& records,
                           const std::string& input) {
  std::vector<Line> lines;
  for (const std::string& policy : plot.policies) {
    Line line{policy, look_of(policy), {}, 0.0};
    for (const Record& record : records) {
      // An error of zero up to rounding has no place on a logarithmic axis.
      if (record.input == input && record.policy == policy && record.skipped.empty() &&
          std::isfinite(record.attention_error) && record.attention_error > 1e-5) {
        line.points.push_back(&record);
      }
    }
    std::stable_sort(line.points.begin(), line.points.end(), [](const Record* a, const Record* b) {
      return a->compression_ratio < b->compression_ratio;
    });
    if (!line.points.empty()) lines.push_back(std::move(line));
  }
  return lines;
}

std::string axes_svg(const Axis& x, const Axis& y) {
  std::string svg;
  const std::string x0 = number(x.from);
  const std::string x1 = number(x.to);
  for (const double tick : y.ticks) {
    const std::string at = number(y.place(tick));
    svg += "<path class=\"grid\" d=\"M" + x0 + " " + at + "H" + x1 + "\"/>\n";
    svg += text_svg(x.from - 9, y.place(tick) + 4, "end", "tick", tick_text(tick));
  }
  for (const double tick : x.ticks) {
    const std::string at = number(x.place(tick));
    svg += "<path class=\"grid\" d=\"M" + at + " " + number(y.from) + "V" + number(y.to) + "\"/>\n";
    svg += text_svg(x.place(tick), y.from + 20, "middle", "tick", tick_text(tick) + "×");
  }
  svg += "<path class=\"frame\" d=\"M" + x0 + " " + number(y.to) + "V" + number(y.from) + "H" + x1 +
         "\"/>\n";
  svg += text_svg((x.from + x.to) / 2, y.from + 44, "middle", "axis",
                  "compression ratio (bytes before / bytes after)");
  const double middle = (y.from + y.to) / 2;
  svg += text_svg(20, middle, "middle", "axis", "attention error (lower is better)",
                  " transform=\"rotate(-90 20 " + number(middle) + ")\"");
  return svg;
}

}  // namespace

std::string escaped(const std::string& text) {
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

std::string plot_style(const std::string& selector) {
  const auto variables = [&](bool dark) {
    std::string text = selector + "{";
    text += dark ? "--page:#14171c;--ink:#e6e9ee;--soft:#a3abb8;--grid:#2a3039;--frame:#535c6a;"
                 : "--page:#ffffff;--ink:#1b1f26;--soft:#5a6372;--grid:#e6e9ee;--frame:#9aa3b0;";
    for (u32 i = 0; i < colours; ++i) {
      text += "--c" + std::to_string(i) + ":" + (dark ? palette[i].dark : palette[i].light) + ";";
    }
    return text + "}\n";
  };
  return variables(false) + "@media (prefers-color-scheme:dark){" + variables(true) + "}\n" +
         ".plot text{font:13px system-ui,-apple-system,'Segoe UI',Roboto,'DejaVu Sans',sans-serif;"
         "fill:var(--ink)}\n"
         ".plot .title{font-size:17px;font-weight:600}\n"
         ".plot .subtitle,.plot .tick{fill:var(--soft);font-size:12.5px}\n"
         ".plot .axis{fill:var(--soft);font-size:13px}\n"
         ".plot .grid{stroke:var(--grid);stroke-width:1;fill:none}\n"
         ".plot .frame{stroke:var(--frame);stroke-width:1;fill:none}\n"
         ".plot .leader{stroke-width:1;fill:none;opacity:.55}\n";
}

std::string colour_of(const std::string& policy) { return css_colour(look_of(policy)); }

std::string swatch_svg(const std::string& policy) {
  const Look look = look_of(policy);
  return "<svg class=\"swatch\" width=\"34\" height=\"14\" viewBox=\"0 0 34 14\" "
         "aria-hidden=\"true\"><path d=\"M1 7H33\"" +
         stroke_of(look, 2.0) + "/>" + marker_svg(look, 17, 7, {}) + "</svg>";
}

std::string plot_svg(const Plot& plot, const std::vector<Record>& records, const std::string& input,
                     bool standalone) {
  std::vector<Line> lines = lines_of(plot, records, input);
  if (lines.empty()) return {};
  double low_x = 1e300, high_x = 0.0, low_y = 1e300, high_y = 0.0;
  for (const Line& line : lines) {
    for (const Record* record : line.points) {
      low_x = std::min(low_x, record->compression_ratio);
      high_x = std::max(high_x, record->compression_ratio);
      low_y = std::min(low_y, record->attention_error);
      high_y = std::max(high_y, record->attention_error);
    }
  }
  const Axis x = make_axis(low_x, std::max(high_x, low_x * 1.5), left, width - right);
  const Axis y = make_axis(low_y, std::max(high_y, low_y * 2.0), height - bottom, top);

  std::string svg = "<svg xmlns=\"http://www.w3.org/2000/svg\" class=\"plot\" viewBox=\"0 0 " +
                    number(width) + " " + number(height) + "\" role=\"img\"";
  if (standalone) svg += " width=\"" + number(width) + "\" height=\"" + number(height) + "\"";
  svg += ">\n<title>" + escaped(plot.title) + "</title>\n";
  if (standalone) {
    svg += "<style>\n" + plot_style("svg") + "</style>\n<rect width=\"100%\" height=\"100%\" " +
           "rx=\"8\" fill=\"var(--page)\"/>\n";
  }
  svg += text_svg(left, 28, "start", "title", plot.title);
  svg += text_svg(left, 48, "start", "subtitle", plot.subtitle);
  svg += axes_svg(x, y);
  for (const Line& line : lines) {
    std::string path;
    for (const Record* record : line.points) {
      path += path.empty() ? 'M' : 'L';
      path += number(x.place(record->compression_ratio));
      path += ' ';
      path += number(y.place(record->attention_error));
    }
    svg +=
        "<path d=\"" + path + "\"" + stroke_of(line.look, 1.9) + " stroke-linejoin=\"round\"/>\n";
  }
  for (Line& line : lines) {
    for (const Record* record : line.points) {
      svg += marker_svg(line.look, x.place(record->compression_ratio),
                        y.place(record->attention_error),
                        line.policy + "\nbudget " + tick_text(record->budget) + ", ratio " +
                            fixed_number(record->compression_ratio, 2) + ", error " +
                            short_number(record->attention_error)) +
             "\n";
    }
    line.label = y.place(line.points.back()->attention_error);
  }
  spread_labels(lines, top + 4, height - bottom - 4);
  const double text_x = x.to + 30;
  for (const Line& line : lines) {
    const double end_x = x.place(line.points.back()->compression_ratio);
    const double end_y = y.place(line.points.back()->attention_error);
    svg += "<path class=\"leader\" stroke=\"" + css_colour(line.look) + "\" d=\"M" +
           number(end_x + 8) + " " + number(end_y) + "L" + number(std::max(end_x + 8, x.to - 4)) +
           " " + number(end_y) + "L" + number(text_x - 16) + " " + number(line.label) + "\"/>\n";
    svg += marker_svg(line.look, text_x - 8, line.label, {}) + "\n";
    svg += text_svg(text_x + 2, line.label + 4.5, "start", "label", line.policy,
                    " style=\"fill:" + css_colour(line.look) + "\"");
  }
  return svg + "</svg>\n";
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
