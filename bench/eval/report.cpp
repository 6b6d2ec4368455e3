// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#include "bench/eval/report.hpp"

#include <algorithm>
#include <cctype>
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <map>
#include <set>
#include <tuple>

#include "bench/chart/chart.hpp"

namespace kvlean::eval {
namespace {

using chart::Chart;
using chart::ChartLine;
using chart::escape;
using chart::HeatMap;
using chart::Look;
using chart::swatch;
using chart::to_svg;

constexpr std::size_t most_lines = 12;  // of a chart

constexpr const char* own_style = "tr.yardstick td{color:var(--soft);font-style:italic}\n";

std::string fixed(double value, int decimals) {
  if (!std::isfinite(value)) return "–";
  char text[64];
  std::snprintf(text, sizeof text, "%.*f", decimals, value);
  return text;
}

std::string percent(double share) {
  char text[32];
  std::snprintf(text, sizeof text, "%.4g %%", 100.0 * share);
  return text;
}

std::string term(const std::string& name, const std::string& value) {
  return value.empty() ? "" : "<dt>" + escape(name) + "</dt><dd>" + value + "</dd>\n";
}

std::string yardstick_name(const std::string& policy) {
  if (policy == policy_noise_floor) return "noise floor";
  if (policy == policy_engine_weights) return "quantised arithmetic";
  if (policy == policy_cache_f16) return "f16 cache";
  if (policy == policy_cache_q8_0) return "q8_0 cache";
  if (policy == policy_cache_q4_0) return "q4_0 cache";
  if (policy == policy_full) return "full cache";
  return policy;
}

bool is_scored(const SummaryRecord& record) {
  return record.kind != kind_name(ItemKind::continuation);
}

/// What is compared on one page section: one model under one way of running it.
struct Section {
  std::string model;
  std::string settings;
  std::string mode;
  std::string cache_type;
  std::vector<const SummaryRecord*> records;               ///< of policies
  std::vector<double> budgets;                             ///< largest first
  std::vector<std::pair<std::string, std::size_t>> tasks;  ///< with their lengths
};

struct Page {
  std::vector<Section> sections;
  std::vector<const SummaryRecord*> yardsticks;
  std::map<std::string, std::size_t> looks;

  [[nodiscard]] std::vector<const SummaryRecord*> yardsticks_of(const Section& section,
                                                                const std::string& task,
                                                                std::size_t length) const {
    std::vector<const SummaryRecord*> found;
    std::set<std::string> seen;
    // Those of the same mode first: a yardstick need be run in one mode only.
    for (const bool same_mode : {true, false}) {
      for (const SummaryRecord* record : yardsticks) {
        if (record->model == section.model && record->task == task && record->length == length &&
            (record->mode == section.mode) == same_mode && seen.insert(record->policy).second) {
          found.push_back(record);
        }
      }
    }
    return found;
  }
};

Page make_page(const std::vector<SummaryRecord>& records) {
  Page page;
  for (const SummaryRecord& record : records) {
    if (is_yardstick(record.policy)) {
      page.yardsticks.push_back(&record);
      continue;
    }
    page.looks.emplace(record.policy, page.looks.size());
    const auto same = [&](const Section& section) {
      return section.model == record.model && section.settings == record.settings &&
             section.mode == record.mode && section.cache_type == record.cache_type;
    };
    auto section = std::find_if(page.sections.begin(), page.sections.end(), same);
    if (section == page.sections.end()) {
      page.sections.push_back(
          {record.model, record.settings, record.mode, record.cache_type, {}, {}, {}});
      section = page.sections.end() - 1;
    }
    section->records.push_back(&record);
    const auto add = [](auto& list, const auto& value) {
      if (std::find(list.begin(), list.end(), value) == list.end()) list.push_back(value);
    };
    add(section->budgets, record.budget);
    add(section->tasks, std::pair(record.task, record.length));
  }
  for (Section& section : page.sections) {
    std::sort(section.budgets.rbegin(), section.budgets.rend());
    const auto rank = [](const std::pair<std::string, std::size_t>& task) {
      const TaskInfo* info = find_task(task.first);
      const std::size_t place =
          info == nullptr ? tasks().size() : static_cast<std::size_t>(info - tasks().data());
      return std::pair(place, task.second);
    };
    std::stable_sort(section.tasks.begin(), section.tasks.end(),
                     [&](const auto& a, const auto& b) { return rank(a) < rank(b); });
  }
  return page;
}

std::vector<const SummaryRecord*> rows_of(const Section& section, const std::string& task,
                                          std::size_t length) {
  std::vector<const SummaryRecord*> rows;
  for (const SummaryRecord* record : section.records) {
    if (record->task == task && record->length == length) rows.push_back(record);
  }
  return rows;
}

std::string mode_text(const std::string& mode) {
  if (mode == "agnostic") return "the question is not seen";
  if (mode == "aware") return "the question is seen";
  return mode;
}

// ---- curves -------------------------------------------------------------------------------------

using Value = std::optional<Interval> SummaryRecord::*;

struct CurveForm {
  std::string file;  ///< beginning of the file's name
  std::string title;
  std::string y_label;
  Value value;
  bool log_y;
};

Chart make_chart(const Page& page, const Section& section, const std::string& task,
                 std::size_t length, const CurveForm& form) {
  Chart chart;
  chart.title = form.title + ": " + task + ", " + std::to_string(length) + " tokens";
  chart.x_label = "compression ratio (bytes before / bytes after)";
  chart.x_unit = "×";
  chart.y_label = form.y_label;
  chart.log_x = true;
  chart.log_y = form.log_y;
  std::vector<std::string> policies;
  std::map<std::string, double> sums;
  std::size_t documents = 0;
  const std::vector<const SummaryRecord*> rows = rows_of(section, task, length);
  for (const SummaryRecord* row : rows) {
    if (!(row->*form.value)) continue;
    const Interval& interval = *(row->*form.value);
    if (!sums.contains(row->policy)) policies.push_back(row->policy);
    sums[row->policy] += form.log_y ? std::log(std::max(interval.mean, 1e-9)) : -interval.mean;
    documents =
        std::max(documents, form.value == &SummaryRecord::retention ? row->retention_documents
                                                                    : row->documents);
  }
  const std::size_t all = policies.size();
  if (all > most_lines) {
    std::stable_sort(policies.begin(), policies.end(),
                     [&](const auto& a, const auto& b) { return sums[a] < sums[b]; });
    policies.resize(most_lines);
  }
  for (const std::string& policy : policies) {
    ChartLine line{policy, Look::nth(page.looks.at(policy)), {}};
    for (const SummaryRecord* row : rows) {
      if (row->policy != policy || !(row->*form.value)) continue;
      const Interval& interval = *(row->*form.value);
      line.points.push_back({row->compression_ratio, interval.mean, interval.low, interval.high,
                             "budget " + percent(row->budget) + ", ratio " +
                                 fixed(row->compression_ratio, 2) + ": " +
                                 short_number(interval.mean) + " (" + short_number(interval.low) +
                                 " to " + short_number(interval.high) + ")"});
    }
    chart.lines.push_back(std::move(line));
  }
  for (const SummaryRecord* yardstick : page.yardsticks_of(section, task, length)) {
    if (!(yardstick->*form.value) || yardstick->policy == policy_full) continue;
    chart.levels.push_back({yardstick_name(yardstick->policy), (yardstick->*form.value)->mean,
                            yardstick->compression_ratio > 1.01
                                ? std::optional<double>(yardstick->compression_ratio)
                                : std::nullopt});
  }
  chart.subtitle = section.model + ", " + section.mode + " (" + mode_text(section.mode) + "), " +
                   std::to_string(documents) + " documents, bars: 95 % intervals";
  if (all > most_lines) {
    chart.subtitle += "; the best " + std::to_string(most_lines) + " of " + std::to_string(all);
  }
  return chart;
}

const std::vector<CurveForm>& curve_forms() {
  static const std::vector<CurveForm> forms = {
      {"kl", "KL to the full cache", "mean KL, nats (lower is better)", &SummaryRecord::kl_interval,
       true},
      {"retention", "Context benefit retained", "share of the benefit (1: as the full cache)",
       &SummaryRecord::retention, false},
  };
  return forms;
}

// ---- heat maps ----------------------------------------------------------------------------------

struct HeatPlot {
  std::string file;
  std::string svg;
};

/// Depth by length of the pass key, a map a policy, a figure a budget.
std::vector<HeatPlot> heat_plots(const Page& page, const Section& section,
                                 const std::vector<ItemRecord>& items, bool standalone) {
  struct Cell {
    double sum = 0.0;
    double count = 0.0;
  };
  // By budget and policy, then by depth and length.
  std::map<std::pair<double, std::string>, std::map<std::pair<double, std::size_t>, Cell>> cells;
  const std::pair<double, std::string> full_key{1.0, policy_full};
  std::set<std::string> full_items;
  std::set<std::size_t> lengths;
  std::set<double> depths;
  for (const ItemRecord& item : items) {
    if (item.task != "passkey" || !item.score || item.depth < 0.0 || is_yardstick(item.policy) ||
        item.model != section.model || item.settings != section.settings ||
        item.mode != section.mode || item.cache_type != section.cache_type) {
      continue;
    }
    const auto add = [&](const std::pair<double, std::string>& key, double score) {
      Cell& cell = cells[key][{item.depth, item.length}];
      cell.sum += score;
      cell.count += 1.0;
    };
    add({item.budget, item.policy}, *item.score);
    if (item.score_full && full_items.insert(item.item).second) add(full_key, *item.score_full);
    lengths.insert(item.length);
    depths.insert(item.depth);
  }
  const auto map_of = [&](double budget, const std::string& policy) -> std::optional<HeatMap> {
    const auto found = cells.find({budget, policy});
    if (found == cells.end()) return std::nullopt;
    HeatMap map;
    map.title = policy;
    for (const std::size_t length : lengths) map.columns.push_back(std::to_string(length));
    for (const double depth : depths) {
      map.rows.push_back(fixed(100.0 * depth, 0) + " %");
      for (const std::size_t length : lengths) {
        const auto cell = found->second.find({depth, length});
        map.cells.push_back(cell == found->second.end()
                                ? std::nullopt
                                : std::optional<double>(cell->second.sum / cell->second.count));
      }
    }
    return map;
  };
  std::vector<HeatPlot> plots;
  for (const double budget : section.budgets) {
    std::vector<HeatMap> maps;
    for (const auto& [key, values] : cells) {
      if (key.first != budget || key.second == policy_full) continue;
      if (std::optional<HeatMap> map = map_of(budget, key.second)) maps.push_back(*map);
    }
    if (maps.empty()) continue;
    std::stable_sort(maps.begin(), maps.end(), [&](const HeatMap& a, const HeatMap& b) {
      return page.looks.at(a.title) < page.looks.at(b.title);
    });
    if (std::optional<HeatMap> map = map_of(full_key.first, full_key.second)) {
      map->title = "full cache";
      maps.insert(maps.begin(), *map);
    }
    plots.push_back({"passkey-" + fixed(100.0 * budget, 0) + "-" + section.mode,
                     to_svg("Pass key found, % of items: budget " + percent(budget),
                            section.model + ", " + section.mode + " (" + mode_text(section.mode) +
                                "); place of the key by context length",
                            "context, tokens", "depth", maps, standalone)});
  }
  return plots;
}

// ---- tables -------------------------------------------------------------------------------------

std::string with_interval(const std::optional<Interval>& interval, double scale = 1.0) {
  if (!interval) return "–";
  return short_number(scale * interval->mean) + " <small>" + short_number(scale * interval->low) +
         " to " + short_number(scale * interval->high) + "</small>";
}

/// A paired difference; stressed where its interval leaves zero out.
std::string difference_cell(const std::optional<Interval>& interval) {
  if (!interval) return "<td>–</td>";
  const bool clear = interval->low > 0.0 || interval->high < 0.0;
  return std::string(clear ? "<td class=\"best\">" : "<td>") + with_interval(interval) + "</td>";
}

std::string policy_cell(const Page& page, const SummaryRecord& record) {
  if (is_yardstick(record.policy)) return "<td>" + yardstick_name(record.policy) + "</td>";
  return "<td>" + swatch(Look::nth(page.looks.at(record.policy))) + escape(record.policy) + "</td>";
}

/// The bytes of the smallest of the rows, which the others are compared to.
double least_bytes(const std::vector<const SummaryRecord*>& rows) {
  double least = INFINITY;
  for (const SummaryRecord* row : rows) {
    if (row->bytes > 0.0) least = std::min(least, row->bytes);
  }
  return least;
}

std::string ratio_cell(const SummaryRecord& row, double least) {
  std::string text = fixed(row.compression_ratio, 2) + "×";
  if (std::isfinite(least) && row.bytes > 1.01 * least && !is_yardstick(row.policy)) {
    text += " <small>+" + fixed(100.0 * (row.bytes / least - 1.0), 0) + " % bytes</small>";
  }
  return "<td>" + text + "</td>";
}

std::vector<std::string> baselines_of(const std::vector<const SummaryRecord*>& rows) {
  std::set<std::string> names;
  for (const SummaryRecord* row : rows) {
    for (const auto& [name, difference] : row->versus) names.insert(name);
  }
  return {names.begin(), names.end()};
}

std::string error_cell(const std::optional<AttentionError>& error) {
  if (!error) return "<td>–</td>";
  return "<td>" + short_number(error->mean) + " <small>p95 " + short_number(error->p95) +
         "</small></td>";
}

std::string continuation_table(const Page& page, std::vector<const SummaryRecord*> rows,
                               const std::vector<const SummaryRecord*>& yardsticks) {
  std::stable_sort(rows.begin(), rows.end(), [](const SummaryRecord* a, const SummaryRecord* b) {
    return ranks_before(*a, *b);
  });
  const std::vector<std::string> baselines = baselines_of(rows);
  bool copied = false;
  for (const SummaryRecord* row : rows) copied = copied || row->task.starts_with("copy");
  const double least = least_bytes(rows);
  std::string html =
      "<div class=\"scroll\"><table><thead><tr><th>policy</th><th>KL mean</th><th>median</th>"
      "<th>p95</th><th>p99</th><th>top-1 %</th><th>top-5 %</th><th>ΔNLL</th>";
  if (copied) html += "<th>copied %</th>";
  html += "<th>retention</th><th>error, open</th><th>error, closed</th><th>ratio</th>";
  for (const std::string& baseline : baselines) {
    html += "<th>KL vs " + escape(baseline) + "</th>";
  }
  html += "</tr></thead><tbody>\n";
  rows.insert(rows.end(), yardsticks.begin(), yardsticks.end());
  for (const SummaryRecord* row : rows) {
    if (row->policy == policy_full) continue;
    html += is_yardstick(row->policy) ? "<tr class=\"yardstick\">" : "<tr>";
    html += policy_cell(page, *row);
    html += "<td>" + with_interval(row->kl_interval) + "</td><td>" + short_number(row->kl.median) +
            "</td><td>" + short_number(row->kl.p95) + "</td><td>" + short_number(row->kl.p99) +
            "</td><td>" + with_interval(row->top1, 100.0) + "</td><td>" +
            (row->top5 ? short_number(100.0 * row->top5->mean) : "–") + "</td><td>" +
            with_interval(row->delta_nll) + "</td>";
    if (copied) {
      html += "<td>" + with_interval(row->copy_accuracy, 100.0) +
              (row->copy_accuracy_full
                   ? " <small>of " + short_number(100.0 * *row->copy_accuracy_full) + "</small>"
                   : std::string()) +
              "</td>";
    }
    html += "<td>" + with_interval(row->retention);
    if (row->retention)
      html += " <small>n=" + std::to_string(row->retention_documents) + "</small>";
    html += "</td>" + error_cell(row->attention_error_open) +
            error_cell(row->attention_error_closed) + ratio_cell(*row, least);
    for (const std::string& baseline : baselines) {
      const auto found = row->versus.find(baseline);
      html += difference_cell(found == row->versus.end() ? std::nullopt : found->second.kl);
    }
    html += "</tr>\n";
  }
  return html + "</tbody></table></div>\n";
}

/// Policies by tasks, the scores of the tasks that the full cache passes.
std::string score_matrix(const Page& page, const Section& section, double budget) {
  using Column = std::pair<std::string, std::size_t>;
  std::vector<Column> columns;
  std::map<Column, double> full;
  for (const Column& task : section.tasks) {
    for (const SummaryRecord* record : section.records) {
      if (Column{record->task, record->length} != task || !is_scored(*record) || !record->score ||
          !record->gate.value_or(false)) {
        continue;
      }
      if (columns.empty() || columns.back() != task) columns.push_back(task);
      if (record->score_full) full[task] = *record->score_full;
    }
  }
  if (columns.empty()) return {};
  struct Row {
    const SummaryRecord* first = nullptr;
    std::map<Column, const SummaryRecord*> cells;
    double sum = 0.0;
    double sum_relative = 0.0;
    double ratio = 0.0;
  };
  std::map<std::string, Row> by_policy;
  for (const SummaryRecord* record : section.records) {
    const Column column{record->task, record->length};
    if (record->budget != budget || !record->score || !is_scored(*record) ||
        std::find(columns.begin(), columns.end(), column) == columns.end()) {
      continue;
    }
    Row& row = by_policy[record->policy];
    if (row.first == nullptr) row.first = record;
    row.cells[column] = record;
    row.sum += record->score->mean;
    row.sum_relative += record->score_relative.value_or(0.0);
    row.ratio += record->compression_ratio;
  }
  std::vector<const Row*> rows;
  for (const auto& [policy, row] : by_policy) rows.push_back(&row);
  const auto mean = [](const Row& row, double sum) {
    return sum / static_cast<double>(row.cells.size());
  };
  std::stable_sort(rows.begin(), rows.end(), [&](const Row* a, const Row* b) {
    // A setting that was not run on all tasks has no place among those that were.
    if (a->cells.size() != b->cells.size()) return a->cells.size() > b->cells.size();
    return mean(*a, a->sum_relative) > mean(*b, b->sum_relative);
  });
  if (rows.empty()) return {};
  std::string html = "<h4>Budget " + percent(budget) +
                     "</h4>\n<div class=\"scroll\"><table><thead><tr><th>policy</th>"
                     "<th>relative %</th><th>ratio</th>";
  for (const Column& column : columns) {
    html += "<th>" + escape(column.first) + "<br>" + std::to_string(column.second) + "</th>";
  }
  html += "</tr></thead><tbody>\n";
  for (const Row* row : rows) {
    html += "<tr>" + policy_cell(page, *row->first) + "<td>" +
            fixed(100.0 * mean(*row, row->sum_relative), 1) + "</td><td>" +
            fixed(mean(*row, row->ratio), 2) + "×</td>";
    for (const Column& column : columns) {
      const auto cell = row->cells.find(column);
      html += "<td>" +
              (cell == row->cells.end() ? std::string("–")
                                        : with_interval(cell->second->score, 100.0)) +
              "</td>";
    }
    html += "</tr>\n";
  }
  html += "<tr class=\"yardstick\"><td>full cache</td><td>100</td><td>1×</td>";
  for (const Column& column : columns) {
    html += "<td>" + (full.contains(column) ? fixed(100.0 * full[column], 1) : std::string("–")) +
            "</td>";
  }
  return html + "</tr>\n</tbody></table></div>\n";
}

/// One line on the tasks that the full cache does not pass.
std::string gate_line(const Section& section) {
  std::vector<std::string> failed;
  for (const auto& [task, length] : section.tasks) {
    for (const SummaryRecord* record : section.records) {
      if (record->task != task || record->length != length || record->gate.value_or(true)) continue;
      std::string text = escape(task) + " at " + std::to_string(length);
      if (record->score_full) text += " (" + fixed(100.0 * *record->score_full, 0) + " %)";
      failed.push_back(text);
      break;
    }
  }
  if (failed.empty()) return {};
  std::string html =
      "<p class=\"soft\">Left out, because the full cache does not pass the gate (score of the "
      "full "
      "cache): ";
  for (std::size_t i = 0; i < failed.size(); ++i) html += (i > 0 ? ", " : "") + failed[i];
  return html + ".</p>\n";
}

std::string section_html(const Page& page, const Section& section,
                         const std::vector<ItemRecord>& items) {
  std::string html = "<h2>" + escape(section.model) + ": query-" + escape(section.mode) + ", " +
                     escape(section.cache_type) + " cache</h2>\n";
  html += "<p>In these runs " + escape(mode_text(section.mode)) +
          " by a policy when it compresses.</p>\n";
  if (!section.settings.empty()) {
    html += "<p class=\"soft\"><code>" + escape(section.settings) + "</code></p>\n";
  }
  for (const auto& [task, length] : section.tasks) {
    const std::vector<const SummaryRecord*> rows = rows_of(section, task, length);
    if (rows.empty() || is_scored(*rows.front())) continue;
    html += "<h3>" + escape(task) + ", " + std::to_string(length) + " tokens</h3>\n<p>" +
            std::to_string(rows.front()->documents) + " documents from " +
            std::to_string(rows.front()->sources) +
            (rows.front()->sources == 1 ? " text, " : " texts, ") +
            std::to_string(rows.front()->tokens) + " scored tokens.</p>\n";
    for (const CurveForm& form : curve_forms()) {
      const std::string svg = to_svg(make_chart(page, section, task, length, form), false);
      if (!svg.empty()) html += "<div class=\"scroll\">" + svg + "</div>\n";
    }
    for (const double budget : section.budgets) {
      std::vector<const SummaryRecord*> ranked;
      for (const SummaryRecord* row : rows) {
        if (row->budget == budget) ranked.push_back(row);
      }
      if (ranked.empty()) continue;
      html += "<h4>Budget " + percent(budget) + "</h4>\n" +
              continuation_table(page, ranked, page.yardsticks_of(section, task, length));
    }
  }
  std::string matrices;
  for (const double budget : section.budgets) matrices += score_matrix(page, section, budget);
  const std::string gate = gate_line(section);
  if (!matrices.empty() || !gate.empty()) {
    html +=
        "<h3>Tasks with a right answer</h3>\n<p>Scores in %, with 95 % intervals. Ranked by "
        "the mean of score / score of the full cache.</p>\n" +
        matrices + gate;
  }
  for (const HeatPlot& plot : heat_plots(page, section, items, false)) {
    html += "<div class=\"scroll\">" + plot.svg + "</div>\n";
  }
  return html;
}

std::string explanations() {
  std::string html =
      "<h2>How to read this</h2>\n<p>A policy compresses the cache of a context; what follows is "
      "then computed with the compressed cache and compared, token by token, with the full cache "
      "of the same model file. Intervals are percentile bootstrap intervals (95 %) over "
      "documents.</p>\n<dl>\n";
  html += term("KL",
               "KL(full || compressed) of the next token's distribution over the whole "
               "vocabulary, nats; then median, 95th and 99th percentile over tokens");
  html += term("top-1, top-5",
               "how often the most likely token is the same; the share of the "
               "five most likely tokens in common");
  html += term("ΔNLL",
               "paired difference of the negative log-likelihood of the true next token, "
               "nats a token; its exponential is the ratio of perplexities");
  html += term("retention",
               "(NLL of a window of the same size − NLL) / (NLL of the window − NLL of the full "
               "cache), over the n documents where that window costs at least 0.05 nats a token; "
               "1: all of the distant context's value is kept, 0: none, below: worse than the "
               "window");
  html += term("error, open and closed",
               "relative error of the attention output, mean over layers and heads; open: with the "
               "full cache's hidden states, closed: with errors adding up over layers");
  html += term("ratio",
               "bytes of the full cache / bytes of the compressed one, with indices and "
               "masses; a row that takes over 1 % more bytes than the smallest of its "
               "table says so");
  html += term("vs",
               "paired difference to a baseline at the same budget on the same documents; "
               "bold where the interval leaves zero out; below zero is better");
  html += term("noise floor", "the full cache computed in another way that should give the same");
  html += term("q8_0, q4_0 cache", "the engine's own quantised caches, which drop no token");
  html += term("gate",
               "a task counts only if the full cache scores at least 80 % (generation) or "
               "beats guessing with p &lt; 0.001 (choices)");
  return html + "</dl>\n";
}

}  // namespace

std::string to_html(const RunMeta& meta, const std::vector<SummaryRecord>& records,
                    const std::vector<ItemRecord>& items) {
  const Page page = make_page(records);
  std::string html =
      "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n"
      "<meta name=\"viewport\" content=\"width=device-width,initial-scale=1\">\n"
      "<meta name=\"color-scheme\" content=\"light dark\">\n"
      "<title>KVLean end-to-end evaluation</title>\n<style>\n" +
      chart::page_style() + own_style + "</style>\n</head>\n<body>\n<main>\n";
  html +=
      "<h1>KVLean end-to-end evaluation</h1>\n<p class=\"soft\">What compressing the KV cache does "
      "to what a model says: " +
      std::to_string(page.looks.size()) + " policies, " + std::to_string(items.size()) +
      " measurements.</p>\n";
  if (!meta.command.empty()) {
    html += "<code class=\"command\">" + escape(meta.command) + "</code>\n";
  }
  html += "<dl>\n" + term("date", escape(meta.date)) +
          term("version", escape(meta.version.empty() ? "" : "KVLean " + meta.version)) +
          term("engine", escape(meta.engine)) + term("compiler", escape(meta.compiler)) +
          term("seed", std::to_string(meta.seed)) +
          term("time", meta.seconds > 0.0 ? fixed(meta.seconds, 0) + " s" : "");
  for (const auto& [name, value] : meta.more) html += term(name, escape(value));
  html += "</dl>\n";
  for (const Section& section : page.sections) html += section_html(page, section, items);
  if (page.sections.empty()) html += "<p>No results.</p>\n";
  return html + explanations() + "</main>\n</body>\n</html>\n";
}

std::vector<std::pair<std::string, std::string>> to_plots(const std::vector<SummaryRecord>& records,
                                                          const std::vector<ItemRecord>& items) {
  const Page page = make_page(records);
  std::vector<std::pair<std::string, std::string>> plots;
  std::set<std::string> names;
  const auto add = [&](std::string name, std::string svg) {
    if (svg.empty()) return;
    for (char& c : name) {
      if (std::isalnum(static_cast<unsigned char>(c)) == 0) c = '-';
    }
    std::string unique = name;
    for (int n = 2; !names.insert(unique).second; ++n) unique = name + "-" + std::to_string(n);
    plots.emplace_back(unique + ".svg", std::move(svg));
  };
  for (const Section& section : page.sections) {
    for (const auto& [task, length] : section.tasks) {
      const std::vector<const SummaryRecord*> rows = rows_of(section, task, length);
      if (rows.empty() || is_scored(*rows.front())) continue;
      for (const CurveForm& form : curve_forms()) {
        add(form.file + "-" + task + "-" + std::to_string(length) + "-" + section.mode,
            to_svg(make_chart(page, section, task, length, form), true));
      }
    }
    for (HeatPlot& plot : heat_plots(page, section, items, true)) {
      add(plot.file, std::move(plot.svg));
    }
  }
  return plots;
}

Outcome write_file(const std::string& path, const std::string& text) {
  const std::string temporary = path + ".new";
  const auto failure = [&](const std::string& file) {
    return Outcome{file + ": cannot write: " + std::strerror(errno)};
  };
  std::FILE* file = std::fopen(temporary.c_str(), "wb");
  if (file == nullptr) return failure(path);
  const bool written = std::fwrite(text.data(), 1, text.size(), file) == text.size();
  if (std::fclose(file) != 0 || !written) {
    const Outcome outcome = failure(path);
    std::remove(temporary.c_str());
    return outcome;
  }
  if (std::rename(temporary.c_str(), path.c_str()) != 0) {
    const Outcome outcome = failure(path);
    std::remove(temporary.c_str());
    return outcome;
  }
  return {};
}

}  // namespace kvlean::eval
