// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#include "bench/quality/report_html.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>

#include "bench/quality/plot_svg.hpp"
#include "bench/quality/report_table.hpp"

namespace kvlean::bench {
namespace {

using chart::escape;

constexpr const char* own_style =
    ".bar{display:inline-block;width:110px;height:9px;margin-left:10px;border-radius:2px;"
    "background:var(--grid);vertical-align:0}\n"
    ".bar i{display:block;height:100%;border-radius:2px}\n"
    ".tables{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,720px),1fr));"
    "gap:0 36px}\n";

std::string percent(double fraction) {
  char text[32];
  std::snprintf(text, sizeof text, "%g %%", 100.0 * fraction);
  return text;
}

std::string term(const std::string& name, const std::string& value) {
  return "<dt>" + name + "</dt><dd>" + value + "</dd>\n";
}

std::string policy_cell(const std::string& policy) {
  return "<td>" + chart::swatch(look_of(policy)) + escape(policy) + "</td>";
}

/// Error of every policy at every budget, best of each column in bold.
std::string matrix(const RunFacts& facts, const std::vector<Record>& records,
                   const std::string& input) {
  const std::vector<double>& budgets = facts.options.budgets;
  const auto find = [&](const std::string& policy, double budget) -> const Record* {
    for (const Record& record : records) {
      if (record.input == input && record.policy == policy && record.budget == budget) {
        return record.skipped.empty() ? &record : nullptr;
      }
    }
    return nullptr;
  };
  // In the order of the middle budget, where policies differ and none has broken down yet.
  std::vector<std::string> order;
  for (const Record& record : ranked(records, input, budgets[budgets.size() / 2])) {
    order.push_back(record.policy);
  }
  std::vector<double> best(budgets.size(), INFINITY);
  for (std::size_t b = 0; b < budgets.size(); ++b) {
    for (const std::string& policy : order) {
      const Record* record = find(policy, budgets[b]);
      if (record != nullptr && policy != "full") {
        best[b] = std::min(best[b], record->attention_error);
      }
    }
  }
  std::string html = "<div class=\"scroll\"><table><thead><tr><th>policy</th>";
  for (const double budget : budgets) html += "<th>" + percent(budget) + "</th>";
  html += "</tr></thead><tbody>\n";
  for (const std::string& policy : order) {
    html += "<tr>" + policy_cell(policy);
    for (std::size_t b = 0; b < budgets.size(); ++b) {
      const Record* record = find(policy, budgets[b]);
      const bool is_best = record != nullptr && record->attention_error == best[b];
      html += is_best ? "<td class=\"best\">" : "<td>";
      html += (record != nullptr ? short_number(record->attention_error) : "–") + "</td>";
    }
    html += "</tr>\n";
  }
  return html + "</tbody></table></div>\n";
}

std::string budget_table(const std::vector<Record>& records, const std::string& input,
                         double budget) {
  const std::vector<Record> rows = ranked(records, input, budget);
  double largest = 0.0;
  for (const Record& record : rows) largest = std::max(largest, record.attention_error);
  std::string html =
      "<section><h3>Budget " + percent(budget) +
      "</h3><div class=\"scroll\"><table><thead><tr><th>policy</th>"
      "<th>error</th><th></th><th>95th pct.</th><th>lost mass</th><th>ratio</th><th>kept</th>"
      "<th>plan ms</th><th>apply ms</th></tr></thead><tbody>\n";
  for (const Record& record : rows) {
    html += "<tr>" + policy_cell(record.policy);
    if (!record.skipped.empty()) {
      html += "<td>–</td><td class=\"left soft\" colspan=\"7\">" + escape(record.skipped) +
              "</td></tr>\n";
      continue;
    }
    const double share = largest > 0.0 ? record.attention_error / largest : 0.0;
    html += "<td>" + short_number(record.attention_error) + "</td>";
    html += "<td><span class=\"bar\"><i style=\"width:" + fixed_number(100.0 * share, 1) +
            "%;background:" + chart::colour_of(look_of(record.policy)) + "\"></i></span></td>";
    for (const std::string& cell :
         {short_number(record.attention_error_p95), short_number(record.lost_mass),
          fixed_number(record.compression_ratio, 2) + "×",
          fixed_number(100.0 * record.kept_fraction, 1) + " %",
          fixed_number(1e3 * record.seconds_plan, 1),
          fixed_number(1e3 * record.seconds_apply, 1)}) {
      html += "<td>" + cell + "</td>";
    }
    html += "</tr>\n";
  }
  return html + "</tbody></table></div></section>\n";
}

std::string input_section(const RunFacts& facts, const std::vector<Record>& records,
                          const Input& input) {
  const io::Capture& capture = input.capture;
  const io::CaptureLayer& layer = capture.layers.front();
  std::string layers;
  for (const io::CaptureLayer& each : capture.layers) {
    layers += (layers.empty() ? "" : ", ") + std::to_string(each.index);
  }
  if (capture.num_layers) layers += " of " + std::to_string(*capture.num_layers);
  std::string html = "<h2>" + escape(input.name) + "</h2>\n<dl>\n";
  html += term("model", escape(capture.model));
  html += term("licence", escape(capture.licence));
  html += term("text", escape(capture.text));
  html += term("layers", layers);
  html += term("heads", std::to_string(layer.query_heads()) + " query, " +
                            std::to_string(layer.kv_heads()) + " KV, width " +
                            std::to_string(layer.key_dim()) + ", " +
                            std::string(io::dtype_name(layer.k.dtype)));
  html += term("tokens", std::to_string(capture.context_tokens) + " compressed, " +
                             std::to_string(capture.future_tokens()) + " future");
  html += "</dl>\n";
  for (const Plot& plot : plots_of(records, input)) {
    html += "<div class=\"scroll\">" + plot_svg(plot, records, input.name, false) + "</div>\n";
  }
  html += "<h3>Attention error by budget</h3>\n" + matrix(facts, records, input.name);
  html += "<div class=\"tables\">\n";
  for (const double budget : facts.options.budgets) {
    html += budget_table(records, input.name, budget);
  }
  return html + "</div>\n";
}

std::string explanations(const RunFacts& facts) {
  const SweepOptions& options = facts.options;
  std::string html = "<h2>How to read this</h2>\n";
  html +=
      "<p>Every policy compresses the keys and values of the context, all layers of an input "
      "planned together. The queries that follow the context are never shown to a policy. They "
      "attend to the compressed context and to the uncompressed tokens after it; the reference is "
      "full attention over the same tokens.</p>\n<dl>\n";
  html += term("budget", "share of the tokens' slots that is kept, protected ones included");
  html += term("error",
               "|ô − o| / |o|, averaged over future queries, query heads and layers; then the "
               "95th percentile of the same");
  html += term("lost mass",
               "share of the attention denominator that is gone, averaged likewise; 0 where "
               "merged slots weigh more than what they stand for");
  html += term("ratio",
               "bytes before / bytes after: keys and values in the capture's type, 4 bytes of "
               "position and, where used, 4 of log mass a slot, 8 a head and layer; "
               "<code>full</code> is the uncompressed cache");
  html += term("plan, apply",
               "milliseconds of processor time, all layers on one thread; planning of policies "
               "that score by "
               "accumulated attention includes summing it over the whole context, that of "
               "<code>cam</code> the attention of every new query");
  html +=
      term("protected", "the first " + std::to_string(options.protection.sinks) + " and the last " +
                            std::to_string(options.protection.recent) + " tokens");
  if (options.equal_bytes) {
    html += term("equal bytes",
                 "policies with log mass keep fewer slots, so that their bytes are at most those "
                 "of plain eviction");
  }
  html +=
      "</dl>\n<h3>Policies</h3>\n<div class=\"scroll\"><table><thead><tr><th>policy</th>"
      "<th class=\"left\">what it does</th></tr></thead><tbody>\n";
  for (const BenchPolicy& entry : options.policies) {
    html += "<tr>" + policy_cell(entry.name) + "<td class=\"left wrap\">" +
            escape(entry.description) + "</td></tr>\n";
  }
  return html + "</tbody></table></div>\n";
}

}  // namespace

std::string to_html(const RunFacts& facts, const std::vector<Record>& records) {
  std::string html =
      "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n"
      "<meta name=\"viewport\" content=\"width=device-width,initial-scale=1\">\n"
      "<meta name=\"color-scheme\" content=\"light dark\">\n"
      "<title>KVLean quality sweep</title>\n<style>\n" +
      chart::page_style() + own_style + "</style>\n</head>\n<body>\n<main>\n";
  html +=
      "<h1>KVLean quality sweep</h1>\n<p class=\"soft\">What compressing the KV cache does to "
      "attention: " +
      std::to_string(facts.options.policies.size()) + " policies at " +
      std::to_string(facts.options.budgets.size()) + " budgets on " +
      std::to_string(facts.inputs.size()) +
      (facts.inputs.size() == 1 ? " input.</p>\n" : " inputs.</p>\n");
  html += "<code class=\"command\">" + escape(facts.command) + "</code>\n<dl>\n";
  html += term("date", escape(facts.date));
  html += term("version", "KVLean " + escape(facts.version) + ", " + escape(facts.compiler));
  html += term("seed", std::to_string(facts.options.seed));
  html += term("time", fixed_number(facts.seconds, 1) + " s on " +
                           std::to_string(facts.options.threads) +
                           (facts.options.threads == 1 ? " thread" : " threads"));
  html += "</dl>\n";
  for (const Input& input : facts.inputs) html += input_section(facts, records, input);
  html += explanations(facts);
  return html + "</main>\n</body>\n</html>\n";
}

}  // namespace kvlean::bench
