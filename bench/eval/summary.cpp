// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#include "bench/eval/summary.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <functional>
#include <limits>
#include <set>
#include <tuple>

namespace kvlean::eval {
namespace {

using Json = nlohmann::ordered_json;

std::string budget_text(double budget) {
  char text[32];
  std::snprintf(text, sizeof text, "%.9g", budget);
  return text;
}

/// What paired records have in common, apart from policy and budget.
using Place =
    std::tuple<std::string, std::string, std::string, std::string, std::string, std::size_t>;
Place place_of(const ItemRecord& record) {
  return {record.model,      record.settings, record.mode,
          record.cache_type, record.task,     record.length};
}
using GroupKey = std::tuple<Place, std::string, std::string>;  // and policy, budget

/// The records of one setting; the last one of an item counts.
struct Group {
  std::vector<const ItemRecord*> records;
  std::map<std::string, const ItemRecord*> by_item;
};

/// A sum and its weight, if the record has what is asked for.
using Measure = std::function<std::optional<Cluster>(const ItemRecord&)>;

double count_of(std::size_t n) { return static_cast<double>(n); }

std::optional<Cluster> kl_measure(const ItemRecord& record) {
  if (record.kl.empty()) return std::nullopt;
  double sum = 0.0;
  for (const double kl : record.kl) sum += kl;
  return Cluster{sum, count_of(record.kl.size())};
}

std::optional<Cluster> nll_measure(const ItemRecord& record) {
  if (!record.nll || !record.nll_full || record.tokens == 0) return std::nullopt;
  return Cluster{*record.nll - *record.nll_full, count_of(record.tokens)};
}

std::optional<Cluster> score_measure(const ItemRecord& record) {
  if (!record.score) return std::nullopt;
  return Cluster{*record.score, 1.0};
}

Measure share_measure(std::optional<std::size_t> ItemRecord::*field, double each) {
  return [field, each](const ItemRecord& record) -> std::optional<Cluster> {
    if (!(record.*field) || record.tokens == 0) return std::nullopt;
    return Cluster{count_of(*(record.*field)), each * count_of(record.tokens)};
  };
}

using ByDocument = std::map<std::string, Cluster>;

void add(ByDocument& documents, const ItemRecord& record, const Cluster& cluster) {
  const std::string& name = record.document.empty() ? record.item : record.document;
  const auto [entry, is_new] = documents.emplace(name, cluster);
  if (!is_new) {
    entry->second.sum += cluster.sum;
    entry->second.weight += cluster.weight;
  }
}

std::vector<Cluster> clusters_of(const ByDocument& documents) {
  std::vector<Cluster> clusters;
  for (const auto& [name, cluster] : documents) clusters.push_back(cluster);
  return clusters;
}

std::optional<Interval> mean_over(const Group& group, const Measure& measure,
                                  const BootstrapOptions& options) {
  ByDocument documents;
  for (const ItemRecord* record : group.records) {
    if (const std::optional<Cluster> cluster = measure(*record)) add(documents, *record, *cluster);
  }
  if (documents.empty()) return std::nullopt;
  return bootstrap_mean(clusters_of(documents), options);
}

/// Over the items that both groups have.
std::optional<Interval> difference_over(const Group& group, const Group& baseline,
                                        const Measure& measure, const BootstrapOptions& options,
                                        std::size_t& documents) {
  ByDocument a;
  ByDocument b;
  for (const ItemRecord* record : group.records) {
    const auto other = baseline.by_item.find(record->item);
    if (other == baseline.by_item.end()) continue;
    const std::optional<Cluster> mine = measure(*record);
    const std::optional<Cluster> theirs = measure(*other->second);
    if (!mine || !theirs) continue;
    add(a, *record, *mine);
    add(b, *record, *theirs);
  }
  if (a.empty()) return std::nullopt;
  documents = std::max(documents, a.size());
  return bootstrap_difference(clusters_of(a), clusters_of(b), options);
}

void summarise_retention(SummaryRecord& summary, const Group& group, const Group& window,
                         const SummaryOptions& options) {
  struct Nll {
    double recent = 0.0;
    double other = 0.0;
    double full = 0.0;
    double tokens = 0.0;
  };
  std::map<std::string, Nll> documents;
  for (const ItemRecord* record : group.records) {
    const auto found = window.by_item.find(record->item);
    if (found == window.by_item.end() || record->tokens == 0) continue;
    const ItemRecord& recent = *found->second;
    if (!record->nll || !record->nll_full || !recent.nll || recent.tokens != record->tokens) {
      continue;
    }
    Nll& nll = documents[record->document.empty() ? record->item : record->document];
    nll.recent += *recent.nll;
    nll.other += *record->nll;
    nll.full += *record->nll_full;
    nll.tokens += count_of(record->tokens);
  }
  std::vector<Cluster> clusters;
  std::vector<double> ratios;
  for (const auto& [name, nll] : documents) {
    const std::optional<double> retention =
        context_benefit_retention(nll.recent / nll.tokens, nll.other / nll.tokens,
                                  nll.full / nll.tokens, options.least_benefit);
    if (!retention) continue;
    ratios.push_back(*retention);
    clusters.push_back(
        {(nll.recent - nll.other) / nll.tokens, (nll.recent - nll.full) / nll.tokens});
  }
  summary.retention_documents = clusters.size();
  if (clusters.empty()) return;
  summary.retention = bootstrap_mean(clusters, options.bootstrap);
  summary.retention_median = summarise(ratios).median;
}

std::optional<AttentionError> mean_error(const Group& group,
                                         std::optional<AttentionError> ItemRecord::*field) {
  AttentionError sum;
  double count = 0.0;
  for (const ItemRecord* record : group.records) {
    if (!(record->*field)) continue;
    sum.mean += (record->*field)->mean;
    sum.median += (record->*field)->median;
    sum.p95 += (record->*field)->p95;
    count += 1.0;
  }
  if (count == 0.0) return std::nullopt;
  return AttentionError{sum.mean / count, sum.median / count, sum.p95 / count};
}

std::optional<double> mean_field(const Group& group, std::optional<double> ItemRecord::*field) {
  double sum = 0.0;
  double count = 0.0;
  for (const ItemRecord* record : group.records) {
    if (!(record->*field)) continue;
    sum += *(record->*field);
    count += 1.0;
  }
  if (count == 0.0) return std::nullopt;
  return sum / count;
}

/// What the full cache scores on a task, over all records that know it, one vote an item.
struct FullScores {
  std::map<std::string, double> by_item;
  double chance_sum = 0.0;
};
using TaskKey = std::tuple<std::string, std::string, std::string, std::size_t>;
TaskKey task_of(const ItemRecord& record) {
  return {record.model, record.settings, record.task, record.length};
}

std::map<TaskKey, FullScores> full_scores(const std::vector<ItemRecord>& records) {
  std::map<TaskKey, FullScores> all;
  for (const ItemRecord& record : records) {
    const std::optional<double> score =
        record.score_full ? record.score_full
                          : (record.policy == policy_full ? record.score : std::nullopt);
    if (!score) continue;
    FullScores& scores = all[task_of(record)];
    if (scores.by_item.emplace(record.item, *score).second) scores.chance_sum += record.chance;
  }
  return all;
}

void set_gate(SummaryRecord& summary, const FullScores& scores) {
  const std::size_t items = scores.by_item.size();
  double sum = 0.0;
  std::size_t correct = 0;
  for (const auto& [item, score] : scores.by_item) {
    sum += score;
    if (score >= 1.0) ++correct;
  }
  if (summary.kind == kind_name(ItemKind::generation)) {
    summary.gate = passes_generation_gate(sum / count_of(items));
  } else if (summary.kind == kind_name(ItemKind::forced_choice)) {
    const double chance = scores.chance_sum / count_of(items);
    summary.gate_p = binomial_tail(correct, items, chance);
    summary.gate = passes_choice_gate(correct, items, chance);
  }
}

SummaryRecord summarise_group(const Group& group, const SummaryOptions& options) {
  const ItemRecord& first = *group.records.front();
  SummaryRecord summary;
  summary.model = first.model;
  summary.task = first.task;
  summary.kind = first.kind;
  summary.length = first.length;
  summary.mode = first.mode;
  summary.cache_type = first.cache_type;
  summary.settings = first.settings;
  summary.policy = first.policy;
  summary.budget = first.budget;
  summary.items = group.records.size();
  std::set<std::string> documents;
  std::set<std::string> sources;
  std::vector<double> kl;
  double bytes = 0.0;
  double bytes_before = 0.0;
  double ratios = 0.0;
  summary.kept_fraction = 0.0;
  double nll_full = 0.0;
  double nll_tokens = 0.0;
  double correct_full = 0.0;
  double correct_tokens = 0.0;
  for (const ItemRecord* record : group.records) {
    documents.insert(record->document.empty() ? record->item : record->document);
    sources.insert(record->source);
    kl.insert(kl.end(), record->kl.begin(), record->kl.end());
    summary.tokens += record->tokens;
    bytes += static_cast<double>(record->bytes);
    bytes_before += static_cast<double>(record->bytes) * record->compression_ratio;
    ratios += record->compression_ratio;
    summary.kept_fraction += record->kept_fraction;
    summary.seconds_prefill += record->seconds_prefill;
    summary.seconds_plan += record->seconds_plan;
    summary.seconds_apply += record->seconds_apply;
    summary.seconds_score += record->seconds_score;
    if (record->nll_full && record->tokens > 0) {
      nll_full += *record->nll_full;
      nll_tokens += count_of(record->tokens);
    }
    if (record->top1_correct_full && record->tokens > 0) {
      correct_full += count_of(*record->top1_correct_full);
      correct_tokens += count_of(record->tokens);
    }
  }
  const double items = count_of(summary.items);
  summary.documents = documents.size();
  summary.sources = sources.size();
  summary.kept_fraction /= items;
  summary.bytes = bytes / items;
  summary.compression_ratio = bytes > 0.0 ? bytes_before / bytes : ratios / items;
  summary.seconds_prefill /= items;
  summary.seconds_plan /= items;
  summary.seconds_apply /= items;
  summary.seconds_score /= items;
  if (nll_tokens > 0.0) summary.nll_full = nll_full / nll_tokens;
  if (correct_tokens > 0.0) summary.copy_accuracy_full = correct_full / correct_tokens;
  summary.kl = summarise(kl);
  const BootstrapOptions& bootstrap = options.bootstrap;
  summary.kl_interval = mean_over(group, kl_measure, bootstrap);
  summary.top1 = mean_over(group, share_measure(&ItemRecord::top1_agree, 1.0), bootstrap);
  summary.top5 = mean_over(group, share_measure(&ItemRecord::top5_common, 5.0), bootstrap);
  summary.delta_nll = mean_over(group, nll_measure, bootstrap);
  summary.copy_accuracy =
      mean_over(group, share_measure(&ItemRecord::top1_correct, 1.0), bootstrap);
  summary.attention_error_open = mean_error(group, &ItemRecord::attention_error_open);
  summary.attention_error_closed = mean_error(group, &ItemRecord::attention_error_closed);
  summary.score = mean_over(group, score_measure, bootstrap);
  summary.score_full = mean_field(group, &ItemRecord::score_full);
  if (!summary.score_full && summary.policy == policy_full && summary.score) {
    summary.score_full = summary.score->mean;
  }
  if (summary.score && summary.score_full && *summary.score_full > 0.0) {
    summary.score_relative = summary.score->mean / *summary.score_full;
  }
  summary.reciprocal_rank = mean_field(group, &ItemRecord::reciprocal_rank);
  summary.reciprocal_rank_full = mean_field(group, &ItemRecord::reciprocal_rank_full);
  return summary;
}

Json number(double value) { return std::isfinite(value) ? Json(value) : Json(nullptr); }

void put(Json& json, const std::string& name, const std::optional<double>& value) {
  json[name] = value ? number(*value) : Json(nullptr);
}

void put(Json& json, const std::string& name, const std::optional<Interval>& interval) {
  json[name] = interval ? number(interval->mean) : Json(nullptr);
  json[name + "_low"] = interval ? number(interval->low) : Json(nullptr);
  json[name + "_high"] = interval ? number(interval->high) : Json(nullptr);
}

void put(Json& json, const std::string& name, const std::optional<AttentionError>& error) {
  json[name] = error ? number(error->mean) : Json(nullptr);
  json[name + "_median"] = error ? number(error->median) : Json(nullptr);
  json[name + "_p95"] = error ? number(error->p95) : Json(nullptr);
}

}  // namespace

std::vector<SummaryRecord> summarise_records(const std::vector<ItemRecord>& records,
                                             const SummaryOptions& options) {
  std::map<GroupKey, Group> groups;
  std::vector<GroupKey> order;
  for (const ItemRecord& record : records) {
    GroupKey key{place_of(record), record.policy, budget_text(record.budget)};
    const auto [entry, is_new] = groups.try_emplace(key);
    if (is_new) order.push_back(std::move(key));
    entry->second.by_item[record.item] = &record;
  }
  for (auto& [key, group] : groups) {
    for (const auto& [item, record] : group.by_item) group.records.push_back(record);
  }
  const std::map<TaskKey, FullScores> full = full_scores(records);

  std::vector<SummaryRecord> summaries;
  for (const GroupKey& key : order) {
    const Group& group = groups.at(key);
    const auto& [place, policy, budget] = key;
    SummaryRecord summary = summarise_group(group, options);
    if (const auto scores = full.find(task_of(*group.records.front())); scores != full.end()) {
      set_gate(summary, scores->second);
    }
    if (const auto window = groups.find({place, options.window_policy, budget});
        window != groups.end()) {
      summarise_retention(summary, group, window->second, options);
    }
    for (const std::string& baseline : options.baselines) {
      const auto other = groups.find({place, baseline, budget});
      if (baseline == policy || other == groups.end()) continue;
      Difference difference;
      difference.kl = difference_over(group, other->second, kl_measure, options.bootstrap,
                                      difference.documents);
      difference.nll = difference_over(group, other->second, nll_measure, options.bootstrap,
                                       difference.documents);
      difference.score = difference_over(group, other->second, score_measure, options.bootstrap,
                                         difference.documents);
      if (difference.documents > 0) summary.versus[baseline] = difference;
    }
    summaries.push_back(std::move(summary));
  }
  return summaries;
}

Json to_json(const SummaryRecord& record) {
  Json json;
  json["model"] = record.model;
  json["task"] = record.task;
  json["kind"] = record.kind;
  json["length"] = record.length;
  json["mode"] = record.mode;
  json["cache_type"] = record.cache_type;
  json["settings"] = record.settings;
  json["policy"] = record.policy;
  json["budget"] = number(record.budget);
  json["kept_fraction"] = number(record.kept_fraction);
  json["compression_ratio"] = number(record.compression_ratio);
  json["bytes"] = number(record.bytes);
  json["items"] = record.items;
  json["documents"] = record.documents;
  json["sources"] = record.sources;
  json["tokens"] = record.tokens;
  put(json, "kl_mean", record.kl_interval);
  json["kl_median"] = number(record.kl.median);
  json["kl_p95"] = number(record.kl.p95);
  json["kl_p99"] = number(record.kl.p99);
  put(json, "top1", record.top1);
  put(json, "top5", record.top5);
  put(json, "delta_nll", record.delta_nll);
  put(json, "nll_full", record.nll_full);
  put(json, "perplexity_ratio",
      record.delta_nll ? std::optional<double>(std::exp(record.delta_nll->mean)) : std::nullopt);
  put(json, "accuracy", record.copy_accuracy);
  put(json, "accuracy_full", record.copy_accuracy_full);
  put(json, "retention", record.retention);
  put(json, "retention_median", record.retention_median);
  json["retention_documents"] = record.retention_documents;
  put(json, "attention_error_open", record.attention_error_open);
  put(json, "attention_error_closed", record.attention_error_closed);
  put(json, "score", record.score);
  put(json, "score_full", record.score_full);
  put(json, "score_relative", record.score_relative);
  put(json, "reciprocal_rank", record.reciprocal_rank);
  put(json, "reciprocal_rank_full", record.reciprocal_rank_full);
  json["gate"] = record.gate ? Json(*record.gate) : Json(nullptr);
  put(json, "gate_p", record.gate_p);
  json["seconds_prefill"] = number(record.seconds_prefill);
  json["seconds_plan"] = number(record.seconds_plan);
  json["seconds_apply"] = number(record.seconds_apply);
  json["seconds_score"] = number(record.seconds_score);
  for (const auto& [baseline, difference] : record.versus) {
    json["documents_vs_" + baseline] = difference.documents;
    put(json, "kl_vs_" + baseline, difference.kl);
    put(json, "nll_vs_" + baseline, difference.nll);
    put(json, "score_vs_" + baseline, difference.score);
  }
  return json;
}

std::string to_json(const RunMeta& meta, const std::vector<SummaryRecord>& records) {
  Json json;
  Json& facts = json["meta"];
  facts["command"] = meta.command;
  facts["date"] = meta.date;
  facts["version"] = meta.version;
  facts["compiler"] = meta.compiler;
  facts["engine"] = meta.engine;
  facts["seed"] = meta.seed;
  facts["seconds"] = number(meta.seconds);
  for (const auto& [name, value] : meta.more) facts[name] = value;
  Json& list = json["records"] = Json::array();
  for (const SummaryRecord& record : records) list.push_back(to_json(record));
  return json.dump(1, ' ', false, Json::error_handler_t::replace) + "\n";
}

bool ranks_before(const SummaryRecord& a, const SummaryRecord& b) {
  if (a.kl_interval && b.kl_interval && a.kind == kind_name(ItemKind::continuation)) {
    return a.kl_interval->mean < b.kl_interval->mean;
  }
  if (a.score && b.score && a.score->mean != b.score->mean) return a.score->mean > b.score->mean;
  if (a.reciprocal_rank && b.reciprocal_rank && *a.reciprocal_rank != *b.reciprocal_rank) {
    return *a.reciprocal_rank > *b.reciprocal_rank;
  }
  if (a.kl_interval && b.kl_interval) return a.kl_interval->mean < b.kl_interval->mean;
  return false;
}

std::string short_number(double value) {
  if (!std::isfinite(value)) return "-";
  char text[32];
  const double size = std::fabs(value);
  const char* format = size == 0.0 ? "%.0f" : size < 1e-3 ? "%.1e" : size < 10 ? "%.3g" : "%.1f";
  std::snprintf(text, sizeof text, format, value);
  return text;
}

std::string to_tables(const std::vector<SummaryRecord>& records) {
  using Key = std::tuple<std::string, std::string, std::size_t, std::string, std::string, double>;
  std::vector<Key> order;
  std::map<Key, std::vector<const SummaryRecord*>> tables;
  for (const SummaryRecord& record : records) {
    const Key key{record.model, record.task,     record.length,
                  record.mode,  record.settings, is_yardstick(record.policy) ? 1.0 : record.budget};
    if (!tables.contains(key)) order.push_back(key);
    tables[key].push_back(&record);
  }
  std::string out;
  for (const Key& key : order) {
    std::vector<const SummaryRecord*>& rows = tables[key];
    std::stable_sort(rows.begin(), rows.end(), [](const SummaryRecord* a, const SummaryRecord* b) {
      return ranks_before(*a, *b);
    });
    const SummaryRecord& first = *rows.front();
    out += first.task + ", " + std::to_string(first.length) + " tokens, " + first.mode +
           ", budget " + short_number(100.0 * std::get<5>(key)) + " %, " + first.model + ", " +
           std::to_string(first.documents) + " documents" +
           (first.gate && !*first.gate ? " (the full cache fails the gate)" : "") + "\n";
    std::size_t width = 6;
    for (const SummaryRecord* row : rows) width = std::max(width, row->policy.size());
    char line[512];
    std::snprintf(line, sizeof line, "  %-*s %8s %19s %9s %9s %7s %9s %7s %7s\n",
                  static_cast<int>(width), "policy", "KL", "95 % interval", "p99", "top-1 %",
                  "ratio", "dNLL", "retain", "score");
    out += line;
    const auto value = [](const std::optional<Interval>& interval, double scale = 1.0) {
      return interval ? short_number(scale * interval->mean) : std::string("-");
    };
    for (const SummaryRecord* row : rows) {
      const std::string interval = row->kl_interval ? short_number(row->kl_interval->low) + " .. " +
                                                          short_number(row->kl_interval->high)
                                                    : "-";
      std::snprintf(line, sizeof line, "  %-*s %8s %19s %9s %9s %7s %9s %7s %7s\n",
                    static_cast<int>(width), row->policy.c_str(), value(row->kl_interval).c_str(),
                    interval.c_str(), row->kl_interval ? short_number(row->kl.p99).c_str() : "-",
                    value(row->top1, 100.0).c_str(), short_number(row->compression_ratio).c_str(),
                    value(row->delta_nll).c_str(), value(row->retention).c_str(),
                    value(row->score).c_str());
      out += line;
    }
    out += "\n";
  }
  return out;
}

}  // namespace kvlean::eval
