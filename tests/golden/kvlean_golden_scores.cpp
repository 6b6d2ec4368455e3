// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0

// Attention itself, and the scorers.

#include "kvlean/attention/attend.hpp"
#include "kvlean/attention/attend_reference.hpp"
#include "kvlean/observe/attention_mass.hpp"
#include "kvlean/reduce/evict.hpp"
#include "kvlean/score/key_diff.hpp"
#include "kvlean/score/key_norm.hpp"
#include "kvlean/score/observed_attention.hpp"
#include "kvlean/score/streaming_llm.hpp"
#include "kvlean/score/tova.hpp"
#include "tests/golden/golden_compare.hpp"
#include "tests/golden/golden_run.hpp"
#include "tests/golden/golden_snapkv.hpp"

namespace kvlean::golden {

namespace {

/// The worse of two verdicts of one tensor.
Verdict worse(const Verdict& a, const Verdict& b) {
  if (a.outcome != b.outcome) return a.outcome == Outcome::fail ? a : b;
  return b.error > a.error ? b : a;
}

/// Judges `score`. The last `pinned` tokens are pinned above all others: pins are compared by
/// place, and what is above our best unpinned score by 0.5 is one.
template <Scorer S>
void judge_score(Case& c, const S& scorer, u32 pinned = 0) {
  const Layer& layer = c.layer();
  Array stored = c.output("score", {layer.kv_heads, layer.tokens});
  Run run(layer.cache());
  run.score(scorer, observe_layer(layer));
  std::vector<float> ours = run.ranks();
  if (pinned == 0) {
    c.judge("score", compare_scores(stored, ours));
    return;
  }
  double best = -std::numeric_limits<double>::infinity();
  for (u32 head = 0; head < layer.kv_heads; ++head) {
    for (u32 token = 0; token + pinned < layer.tokens; ++token) {
      best = std::max(best, static_cast<double>(run.rank(head, token)));
    }
  }
  Comparison places;
  for (std::size_t i = 0; i < ours.size(); ++i) {
    const bool stored_pin = stored.values[i] > best + 0.5;
    const bool our_pin = static_cast<double>(ours[i]) > best + 0.5;
    if (stored_pin != our_pin) {
      places.add(distance(stored.values[i], static_cast<double>(ours[i])), 0.0,
                 "entry " + std::to_string(i) + " is pinned on one side only");
    }
    if (stored_pin) stored.values[i] = 0.0;
    if (our_pin) ours[i] = 0.0f;
  }
  c.judge("score", places.failed() ? places.verdict() : compare_scores(stored, ours));
}

}  // namespace

void judge_reference(Case& c) {
  const Layer& layer = c.layer();
  const CacheView cache = layer.cache();
  const Queries queries = layer.queries();
  {
    const Array& stored = c.output("attn_out", {layer.query_heads, layer.tokens, layer.value_dim});
    std::vector<float> fast(stored.values.size());
    std::vector<double> plain(stored.values.size());
    check(attend(queries, cache, AttentionSpec{}, AttentionOutput{.values = fast.data()}),
          "attend");
    check(attend_reference(queries, cache, AttentionSpec{},
                           BasicAttentionOutput<double>{.values = plain.data()}),
          "attend_reference");
    c.judge("attn_out", worse(compare(stored, fast, absolute_tolerance),
                              compare(stored, plain, absolute_tolerance)));
  }
  const Array& stored = c.output("attn_colsum", {layer.kv_heads, layer.group, layer.tokens});
  std::vector<float> sums(stored.values.size(), 0.0f);
  Workspace workspace;
  check(accumulate_attention_per_query_head(cache, queries, AttentionSpec{}, workspace, Executor{},
                                            Ragged<float>(sums.data(), u64{layer.tokens})),
        "accumulate_attention_per_query_head");
  c.judge("attn_colsum", compare_scores(stored, sums));
}

void judge_knorm(Case& c) { judge_score(c, KeyNormScorer{}); }
void judge_keydiff(Case& c) { judge_score(c, KeyDiffScorer{}); }
void judge_tova(Case& c) { judge_score(c, TOVAScorer{}, 1); }
void judge_observed_attention(Case& c) { judge_score(c, ObservedAttentionScorer{}); }

void judge_snapkv(Case& c) {
  const SnapKVScorer scorer = read_snapkv(c, c.layer());
  judge_score(c, scorer, scorer.window);
}

void judge_streaming_llm(Case& c) {
  // Stored is 1 for kept and 0 for dropped: the sinks, then as many of the newest as the ratio
  // leaves room for.
  const Layer& layer = c.layer();
  const Array& stored = c.output("score", {layer.kv_heads, layer.tokens});
  const u32 sinks = c.count("sinks");
  const u32 slots = kept_slots(c, layer.tokens);
  Run run(layer.cache());
  run.score(StreamingLLMScorer{.sinks = sinks}, {});
  run.set_limits(std::max(slots, std::min(sinks, layer.tokens)));
  run.reduce(EvictReducer{});
  c.judge("score", compare_scores(stored, run.kept()));
}

}  // namespace kvlean::golden
