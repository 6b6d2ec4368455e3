// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0

// Budgets of heads and layers: Ada-KV in kvpress's form and in the authors', PyramidKV.

#include "kvlean/allocate/adakv.hpp"
#include "kvlean/allocate/pyramid.hpp"
#include "kvlean/reduce/evict.hpp"
#include "kvlean/score/key_norm.hpp"
#include "tests/golden/golden_compare.hpp"
#include "tests/golden/golden_rows.hpp"
#include "tests/golden/golden_run.hpp"
#include "tests/golden/golden_snapkv.hpp"

namespace kvlean::golden {

namespace {

/// The reference multiplies slots by the share in double and the library in float; where the two
/// round to different counts, the next float that gives the reference's count.
float share_as_float(double share, u32 slots) {
  const double wanted = std::floor(slots * share);
  float result = static_cast<float>(share);
  for (int step = 0; step < 64; ++step) {
    const double got = detail::allocation::scaled_slots(slots, result);
    if (got == wanted) break;
    result = std::nextafter(result, got < wanted ? 1.0f : 0.0f);
  }
  return result;
}

double read_share(Case& c, const std::string& key) {
  const double share = c.real(key);
  if (!(share >= 0.0 && share <= 1.0)) {
    throw CaseFailed{"the parameter '" + key + "' is outside [0, 1]"};
  }
  return share;
}

/// [heads] the lengths that the authors' code gives, window included: the library's authors_mix but
/// for two things that a float safeguard cannot say. Their 1 - alpha is rounded from double, which
/// shows where the mix is next to a half; and with as many slots as tokens before the window they
/// still mix, and may round a token away.
std::vector<u32> authors_lengths(Run& run, double alpha, u32 window, u32 nominal) {
  const u32 prefix = run.view().capacity - window;
  run.allocate(AdaKVAllocator{.safeguard = 0.0f, .mode = SafeguardMode::authors_mix},
               nominal + window);
  const std::vector<u32> won = run.limits();  // with safeguard 0 the mix is the global top itself
  run.allocate(AdaKVAllocator{.safeguard = share_as_float(alpha, nominal),
                              .mode = SafeguardMode::authors_mix},
               nominal + window);
  std::vector<u32> lengths = run.limits();
  for (std::size_t head = 0; head < lengths.size() && nominal <= prefix; ++head) {
    const float mix = static_cast<float>(won[head] - window) * static_cast<float>(1.0 - alpha) +
                      static_cast<float>(std::floor(nominal * alpha));
    const auto rounded = static_cast<u32>(std::nearbyint(mix));  // half to even, as torch.round
    const bool at_half = near(static_cast<double>(mix - std::floor(mix)), 0.5);
    if (at_half || nominal == prefix) lengths[head] = window + std::min(rounded, prefix);
  }
  return lengths;
}

/// [heads] how many slots a head could win or lose if scores next to the global cut changed places.
/// `scores` is [heads][prefix], of which `nominal` a head win. Scores that tie within one head (max
/// pooling makes many) move nothing.
std::vector<double> slack_at_global_cut(const std::vector<float>& scores, u32 heads, u32 nominal) {
  std::vector<double> slack(heads, 0.0);
  const std::size_t winners = std::size_t{heads} * nominal;
  if (winners == 0 || winners >= scores.size()) return slack;
  std::vector<float> sorted = scores;
  std::sort(sorted.begin(), sorted.end(), std::greater<>());
  const auto last_in = static_cast<double>(sorted[winners - 1]);
  const auto first_out = static_cast<double>(sorted[winners]);
  if (!near(last_in, first_out)) return slack;
  std::vector<double> close(heads, 0.0);
  double all_close = 0.0;
  auto contested = static_cast<double>(winners);  // slots that close scores share
  for (std::size_t i = 0; i < scores.size(); ++i) {
    const auto score = static_cast<double>(scores[i]);
    if (near(score, last_in) || near(score, first_out)) {
      close[i / (scores.size() / heads)] += 1.0;
      all_close += 1.0;
    } else if (score > last_in) {
      contested -= 1.0;
    }
  }
  for (u32 head = 0; head < heads; ++head) {
    const double least = std::max(0.0, contested - (all_close - close[head]));
    slack[head] = std::min(close[head], contested) - least;
  }
  return slack;
}

}  // namespace

void judge_adakv(Case& c) {
  const Layer& layer = c.layer();
  const u32 heads = layer.kv_heads;
  const u32 tokens = layer.tokens;
  const u32 slots = kept_slots(c, tokens);
  const double safeguard = read_share(c, "safeguard");
  Run run(layer.cache());
  c.expect_text("base", {"knorm", "snapkv"});
  if (c.text("base") == "snapkv") {
    run.score(read_snapkv(c, layer), observe_layer(layer));
  } else {
    run.score(KeyNormScorer{}, {});
  }
  run.allocate(AdaKVAllocator{.safeguard = share_as_float(safeguard, slots)}, slots);
  run.reduce(EvictReducer{});
  const std::vector<u8> kept = run.kept();
  const Array& keep = c.output("keep", {heads, tokens});
  const Array& budget = c.output("budget", {heads});

  // Safe tokens are the best of their head and stay whatever the global cut is.
  const u32 safe = static_cast<u32>(std::floor(slots * safeguard));
  Cut everywhere;
  std::vector<Cut> of_head(heads);
  for (u32 head = 0; head < heads; ++head) {
    std::vector<double> kept_scores;
    for (u32 token = 0; token < tokens; ++token) {
      const double score = static_cast<double>(run.rank(head, token));
      const bool is_kept = kept[std::size_t{head} * tokens + token] != 0;
      of_head[head].add(score, is_kept);
      if (is_kept) {
        kept_scores.push_back(score);
      } else {
        everywhere.add(score, false);
      }
    }
    std::sort(kept_scores.begin(), kept_scores.end(), std::greater<>());
    for (std::size_t i = safe; i < kept_scores.size(); ++i) everywhere.add(kept_scores[i], true);
  }
  Comparison comparison;
  comparison.add(0.0, 0.0);
  double total = 0.0;
  std::vector<double> stored_budget(heads, 0.0);
  for (u32 head = 0; head < heads; ++head) {
    for (u32 token = 0; token < tokens; ++token) {
      const std::size_t at = std::size_t{head} * tokens + token;
      const double score = static_cast<double>(run.rank(head, token));
      const double stored = keep.values[at];
      stored_budget[head] += stored;
      total += stored;
      const bool is_kept = kept[at] != 0;
      if (stored == (is_kept ? 1.0 : 0.0)) continue;
      const bool excused =
          (stored == 0.0 || stored == 1.0) &&
          (of_head[head].may_cross(score, is_kept) || everywhere.may_cross(score, is_kept));
      if (!excused) comparison.add(distance(stored, is_kept ? 1.0 : 0.0), 0.0, place(head, token));
    }
  }
  comparison.add(distance(total, static_cast<double>(slots) * heads), 0.0, "tokens kept in all");
  c.judge("keep", comparison.verdict());

  // A budget follows from the tokens kept, so it may differ from ours as far as those may.
  std::vector<double> expected(heads);
  for (u32 head = 0; head < heads; ++head) {
    expected[head] = comparison.failed() ? run.limits()[head] : stored_budget[head];
  }
  c.judge("budget", compare(budget, expected, 0.0));
}

void judge_adakv_official(Case& c) {
  const Layer& layer = c.layer();
  const u32 heads = layer.kv_heads;
  SnapKVScorer scorer = read_snapkv(c, layer);
  scorer.order = PoolOrder::query_mean_group_pool;
  scorer.pin_window = false;
  const u32 window = scorer.window;
  const u32 prefix = layer.tokens - window;
  const u32 capacity = c.count("base_capacity");
  const double alpha = read_share(c, "floor_alpha");
  if (capacity < window) throw NotImplemented{"the capacity is smaller than the window"};
  const u32 nominal = capacity - window;

  Run run(layer.cache(), Protection{0, window});
  run.score(scorer, observe_layer(layer));
  const std::vector<u32> lengths = authors_lengths(run, alpha, window, nominal);

  std::vector<float> scores(std::size_t{heads} * prefix);
  for (u32 head = 0; head < heads; ++head) {
    std::copy_n(&run.rank(head, 0), prefix, scores.data() + std::size_t{head} * prefix);
  }
  const Array& stored_scores = c.output("score", {heads, prefix});
  c.judge("score", compare_scores(stored_scores, scores));

  const Array& head_lens = c.output("head_lens", {heads});
  const std::vector<double> slack = slack_at_global_cut(scores, heads, nominal);
  Comparison comparison;
  for (u32 head = 0; head < heads; ++head) {
    const double difference = distance(head_lens.values[head], lengths[head]);
    comparison.add(difference <= slack[head] ? 0.0 : difference, 0.0, place(head, 0));
  }
  c.judge("head_lens", comparison.verdict());
  judge_score_ordered_rows(c, layer, head_lens, window, scores, capacity > layer.tokens);
}

void judge_pyramidkv(Case& c) {
  const u32 layers = c.count("num_layers");
  const u32 tokens = c.count("tokens");
  const u32 window = c.count("window");
  const double beta = c.real("beta");
  const double ratio = c.real("ratio");
  if (!(ratio >= 0.0 && ratio <= 1.0)) {
    throw CaseFailed{"the parameter 'ratio' is outside [0, 1]"};
  }
  if (!(beta >= 1.0) || beta != std::floor(beta) || beta > 65536.0) {
    throw NotImplemented{"beta is not a whole number from 1 to 65536"};
  }
  const Array& budget = c.output("budget", {layers});
  const double kept = tokens * (1.0 - ratio);
  std::vector<double> slots(layers);
  for (u32 layer = 0; layer < layers; ++layer) {
    const auto slots_at = [&](double factor) {
      return kvpress_pyramid_slots(kept * factor, tokens, window, static_cast<u32>(beta), layer,
                                   layers);
    };
    slots[layer] = slots_at(1.0);
    // The order of operations decides where an exact half goes: either neighbour will do.
    for (const double factor : {1.0 - 1e-12, 1.0 + 1e-12}) {
      if (slots_at(factor) == budget.values[layer]) slots[layer] = budget.values[layer];
    }
  }
  c.judge("budget", compare(budget, slots, 0.0));
}

}  // namespace kvlean::golden
