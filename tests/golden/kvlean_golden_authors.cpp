// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0

// The authors' codes of H2O and CaM, which know no grouped queries: they are run on the first query
// head of each group.

#include "kvlean/observe/attention_mass.hpp"
#include "kvlean/reduce/cam.hpp"
#include "kvlean/reduce/evict.hpp"
#include "kvlean/score/h2o.hpp"
#include "tests/golden/golden_compare.hpp"
#include "tests/golden/golden_rows.hpp"
#include "tests/golden/golden_run.hpp"

namespace kvlean::golden {

namespace {

/// The stored kept rows of one head as tokens. A row that is not what we kept is looked up; where
/// it is no key at all, our token stands in and the row fails later.
std::vector<u32> stored_tokens(const Layer& layer, u32 head, const Array& keys, u32 slots,
                               const std::vector<u32>& ours) {
  KeyIndex index(layer, head, layer.tokens);
  std::vector<u32> tokens(slots);
  for (u32 j = 0; j < slots; ++j) {
    const auto row = row_of(keys, std::size_t{head} * slots + j);
    tokens[j] =
        is_copy(row, layer.key(head, ours[j])) ? ours[j] : index.take(row).value_or(ours[j]);
  }
  return tokens;
}

}  // namespace

void judge_h2o_official(Case& c) {
  const Layer& layer = c.layer();
  c.expect_text("query_head", {"first of each group"});
  const u32 recent = c.count("recent");
  const u32 slots = static_cast<u32>(std::min<u64>(u64{c.count("heavy")} + recent, layer.tokens));
  const u32 heads = layer.kv_heads;
  const Array& keys = c.output("keys", {heads, slots, layer.key_dim});
  const Array& values = c.output("values", {heads, slots, layer.value_dim});
  const Array& sums = c.output("hh_score", {heads, slots});

  Run run(layer.cache(), Protection{0, recent});
  Observation seen;
  seen.reference = layer.queries(0, true);
  run.score(H2OScorer{}, seen);
  run.set_limits(slots);
  run.reduce(EvictReducer{});
  const RaggedKVCache ours = run.apply_plan();
  const CacheView result = ours.view();

  Comparison key_rows;
  Comparison value_rows;
  std::vector<float> our_sums(sums.values.size());
  for (u32 head = 0; head < heads; ++head) {
    const u32* anchor = run.plan.anchor + run.plan.first[head];
    const std::vector<u32> kept(anchor, anchor + slots);
    const std::vector<u32> tokens = stored_tokens(layer, head, keys, slots, kept);
    Cut cut;
    for (u32 token = 0; token + recent < layer.tokens; ++token) {
      cut.add(static_cast<double>(run.mass(head, token)),
              std::binary_search(kept.begin(), kept.end(), token));
    }
    for (u32 j = 0; j < slots; ++j) {
      const u32 token = tokens[j];
      const bool swapped = !std::binary_search(kept.begin(), kept.end(), token);
      const std::size_t row = std::size_t{head} * slots + j;
      if (swapped && !cut.may_cross(static_cast<double>(run.mass(head, token)), false)) {
        key_rows.fault(place(head, j) + " is token " + std::to_string(token) + ", which we drop");
      }
      if (j > 0 && token <= tokens[j - 1]) key_rows.fault(place(head, j) + " is out of order");
      // What the library wrote, unless the stored result keeps another token of the same score.
      std::vector<float> row_data(std::max(layer.key_dim, layer.value_dim));
      const bool as_ours = token == kept[j];
      if (as_ours) load_row(result.keys, head, j, row_data.data());
      add_copied_row(key_rows, row_of(keys, row),
                     as_ours ? row_data.data() : layer.key(head, token), place(head, j));
      if (as_ours) load_row(result.values, head, j, row_data.data());
      add_copied_row(value_rows, row_of(values, row),
                     as_ours ? row_data.data() : layer.value(head, token), place(head, j));
      our_sums[row] = run.mass(head, token);
    }
  }
  c.judge("keys", key_rows.verdict());
  c.judge("values", value_rows.verdict());
  c.judge("hh_score", compare_scores(sums, our_sums));
}

void judge_cam_official(Case& c) {
  const Layer& layer = c.layer();
  c.expect_text("query_head", {"first of each group"});
  c.expect_text("uniform", {"input", "input, all zero"});
  const bool all_zero = c.has_param("uniform") && c.text("uniform") == "input, all zero";
  const u32 recent = c.count("recent");
  const u32 receivers = c.count("receivers");
  const u32 heads = layer.kv_heads;
  const u32 tokens = layer.tokens;
  const Array& prob = c.output("prob", {heads});
  const Array& uniform = c.output("uniform", {heads});
  const Array& values = c.output("values", {heads, tokens, layer.value_dim});
  if (recent < 2 || recent > tokens + 1) {
    throw NotImplemented{"with this window the authors' evictee lies outside the sequence"};
  }
  if (receivers == 0) throw CaseFailed{"the parameter 'receivers' is zero"};

  std::vector<float> row(std::size_t{heads} * tokens, 0.0f);
  Workspace workspace;
  check(accumulate_attention(layer.cache(), layer.queries(1, true), AttentionSpec{},
                             GroupReduction::mean, workspace, Executor{},
                             Ragged<float>(row.data(), u64{tokens})),
        "accumulate_attention");

  // Their step: the token after the one that leaves the window next is merged into its successors,
  // divided by a constant even where fewer exist.
  const u32 evictee = tokens + 1 - recent;
  Comparison drawn;
  Comparison merged;
  std::vector<float> probability(heads);
  std::vector<float> receiver(layer.value_dim);
  for (u32 head = 0; head < heads; ++head) {
    const float* attention = row.data() + std::size_t{head} * tokens;
    double sum = 0.0;
    for (u32 token = evictee + 1; token < tokens; ++token) {
      sum += static_cast<double>(attention[token]);
    }
    const auto mean = static_cast<float>(sum / (tokens - 1.0 - evictee));
    probability[head] = cam_merge_probability(attention[evictee], mean);
    const double draw = uniform.values[head];
    drawn.add(draw >= 0.0 && draw < 1.0 && (!all_zero || draw == 0.0) ? 0.0 : distance(draw, 0.0),
              0.0, place(head, 0) + " is no draw of the kind that the parameters name");
    const auto ours = static_cast<double>(probability[head]);
    bool merges = draw < ours;
    const u32 last = static_cast<u32>(std::min<u64>(u64{evictee} + receivers, tokens - 1));
    if (near(draw, ours) && evictee < last) {
      // Rounding decides: follow the stored result.
      merges = !is_copy(row_of(values, std::size_t{head} * tokens + evictee + 1),
                        layer.value(head, evictee + 1));
    }
    for (u32 token = 0; token < tokens; ++token) {
      const auto stored = row_of(values, std::size_t{head} * tokens + token);
      const float* value = layer.value(head, token);
      if (!merges || token <= evictee || token > last) {
        add_copied_row(merged, stored, value, place(head, token));
        continue;
      }
      std::copy_n(value, layer.value_dim, receiver.begin());
      row_math::add_scaled(receiver.data(), layer.value(head, evictee),
                           1.0f / static_cast<float>(receivers), layer.value_dim);
      add_merged_row(merged, stored, receiver.data(), place(head, token));
    }
  }
  c.judge("prob", compare(prob, probability, absolute_tolerance));
  c.judge("uniform", drawn.verdict());
  c.judge("values", merged.verdict());
}

}  // namespace kvlean::golden
