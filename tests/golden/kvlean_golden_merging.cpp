// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0

// KVMerger and the mass-preserving fold, against double precision from the published equations.

#include "kvlean/attention/attend.hpp"
#include "kvlean/attention/attend_reference.hpp"
#include "kvlean/reduce/kvmerger.hpp"
#include "kvlean/reduce/massfold.hpp"
#include "kvlean/score/h2o.hpp"
#include "tests/golden/golden_compare.hpp"
#include "tests/golden/golden_run.hpp"
#include "tests/golden/golden_sets.hpp"

namespace kvlean::golden {

namespace {

/// The stored column sums, averaged over each group: what these cases call scores.
std::vector<float> mean_column_sums(const Layer& layer) {
  if (layer.column_sums.empty()) throw BrokenFile{"ref.attn_colsum of the layer is missing"};
  std::vector<float> mean(std::size_t{layer.kv_heads} * layer.tokens);
  check(reduce_group(layer.cache(),
                     Ragged<const float>(layer.column_sums.data(), u64{layer.tokens}), layer.group,
                     GroupReduction::mean, Ragged<float>(mean.data(), u64{layer.tokens})),
        "reduce_group");
  return mean;
}

void score_by(const std::vector<float>& mass, const Layer& layer, Run& run) {
  run.score(H2OScorer{}, observe_mass(Ragged<const float>(mass.data(), u64{layer.tokens})));
}

/// What the last query of every query head reads from the compressed cache.
void judge_last_query(Case& c, const Layer& layer, const RaggedKVCache& cache,
                      const std::string& output) {
  const Array& stored = c.output(output, {layer.query_heads, layer.value_dim});
  std::vector<float> fast(stored.values.size());
  std::vector<double> plain(stored.values.size());
  const Queries last = layer.queries(1);
  check(attend(last, cache, AttentionSpec{}, AttentionOutput{.values = fast.data()}), "attend");
  check(attend_reference(last, cache, AttentionSpec{},
                         BasicAttentionOutput<double>{.values = plain.data()}),
        "attend_reference");
  const Verdict a = compare(stored, fast, absolute_tolerance);
  const Verdict b = compare(stored, plain, absolute_tolerance);
  const bool first = a.outcome == b.outcome ? a.error >= b.error : a.outcome == Outcome::fail;
  c.judge(output, first ? a : b);
}

/// One kvmerger case: the sets, and per sigma mode what becomes of them.
class KVMergerJudge {
 public:
  explicit KVMergerJudge(Case& c)
      : c_(c), layer_(c.layer()), run_(layer_.cache()), mass_(mean_column_sums(layer_)) {}

  void judge() {
    read_params();
    score_by(mass_, layer_, run_);
    judge_sets();
    std::set<std::string> modes;
    for (const std::string& output : c_.method_outputs) {
      if (const auto dot = output.find('.'); dot != std::string::npos) {
        modes.insert(output.substr(0, dot));
      }
    }
    if (modes.empty()) throw BrokenFile{c_.name + " has no tensor of any sigma mode"};
    for (const std::string& mode : modes) judge_mode(mode);
  }

 private:
  void read_params() {
    reducer_.recent_tokens = c_.count("recent");
    reducer_.heavy_tokens = c_.count("heavy");
    reducer_.enforce_limit = false;
    if (c_.has_param("slots") == c_.has_param("epsilon")) {
      throw NotImplemented{"neither epsilon nor slots alone is given"};
    }
    if (c_.has_param("epsilon")) {
      reducer_.form = KVMergerForm::threshold;
      reducer_.epsilon = static_cast<float>(c_.real("epsilon"));
      return;
    }
    const u32 wanted = c_.count("slots");
    reducer_.form = KVMergerForm::threshold;  // with all links accepted: the fewest slots there are
    reducer_.epsilon = -2.0f;
    score_by(mass_, layer_, run_);
    run_.reduce(reducer_);
    for (u32 head = 0; head < layer_.kv_heads; ++head) {
      run_.limits()[head] = std::min(layer_.tokens, std::max(wanted, run_.plan.length[head]));
    }
    reducer_.form = KVMergerForm::slots;
  }

  void judge_sets() {
    const Array& stored = c_.output("slot_of_token", {layer_.kv_heads, layer_.tokens});
    run_.reduce(reducer_);
    sets_ = sets_of_plan(run_.plan);
    Comparison comparison;
    comparison.add(0.0, 0.0);
    for (u32 head = 0; head < layer_.kv_heads; ++head) {
      const auto row = row_of(stored, head);
      double error = 0.0;
      for (u32 slot = 0; slot < sets_[head].size(); ++slot) {
        for (u32 t = sets_[head][slot].begin; t < sets_[head][slot].end; ++t) {
          error = std::max(error, distance(row[t], slot));
        }
      }
      if (error == 0.0) continue;
      std::vector<MergingSet> theirs;
      if (runs_of_slots(row, theirs) && links_may_differ(head, theirs)) {
        sets_[head] = choose_pivots(theirs, head);
        follows_stored_ = true;
      } else {
        comparison.add(error, 0.0, "slots of head " + std::to_string(head));
      }
    }
    c_.judge("slot_of_token", comparison.verdict());
  }

  /// Whether the stored sets differ from ours only by links next to a cut: cosines next to epsilon
  /// or to the last accepted one, or tokens whose score is next to that of the last heavy one.
  bool links_may_differ(u32 head, const std::vector<MergingSet>& theirs) {
    const u32 tokens = layer_.tokens;
    const std::vector<u8> ours = links_of(sets_[head], tokens);
    const std::vector<u8> stored = links_of(theirs, tokens);
    std::vector<float> cosine(tokens);
    detail::adjacent_cosines(run_.view().keys, head, tokens, cosine.data());
    std::vector<u8> marked(tokens);
    std::vector<u64> keys(tokens + detail::ordering_room);
    const KVMergerCounts soft{static_cast<u32>(reducer_.recent_tokens),
                              static_cast<u32>(reducer_.heavy_tokens)};
    const float* score = &run_.mass(head, 0);
    detail::mark_protected(soft, Protection{0, 0}, 0, score, tokens, tokens, marked.data(),
                           keys.data());
    Cut heavy;
    Cut similar;
    for (u32 t = 0; t < tokens; ++t) {
      if (t + soft.recent < tokens) heavy.add(static_cast<double>(score[t]), marked[t] != 0);
      if (t + 1 < tokens && marked[t] == 0 && marked[t + 1] == 0) {
        similar.add(static_cast<double>(cosine[t]), ours[t] != 0);
      }
    }
    const auto unsure = [&](u32 t) {
      return t + soft.recent < tokens &&
             heavy.may_cross(static_cast<double>(score[t]), marked[t] != 0);
    };
    for (u32 t = 0; t + 1 < tokens; ++t) {
      if (ours[t] == stored[t] || unsure(t) || unsure(t + 1)) continue;
      const auto value = static_cast<double>(cosine[t]);
      const bool close = reducer_.form == KVMergerForm::slots
                             ? similar.may_cross(value, ours[t] != 0)
                             : near(value, static_cast<double>(reducer_.epsilon));
      if (!close || marked[t] != 0 || marked[t + 1] != 0) return false;
    }
    return reducer_.form != KVMergerForm::slots || theirs.size() == sets_[head].size();
  }

  std::vector<MergingSet> choose_pivots(std::vector<MergingSet> sets, u32 head) {
    for (MergingSet& set : sets) {
      set.pivot = set.begin;
      for (u32 t = set.begin; t < set.end; ++t) {
        if (run_.mass(head, t) > run_.mass(head, set.pivot)) set.pivot = t;
      }
    }
    return sets;
  }

  void judge_mode(const std::string& mode) {
    const std::string at = mode + ".";
    reducer_.sigma = Sigma::fixed;
    if (mode == "mean_distance") {
      reducer_.sigma = Sigma::mean_distance;
    } else if (mode == "rms") {
      reducer_.sigma = Sigma::rms;
    } else if (mode != "fixed") {
      for (const auto& [output, array] : c_.outputs) {
        if (output.rfind(at, 0) == 0) {
          c_.judge(output, {Outcome::not_implemented, 0.0, 0.0, "unknown sigma mode"});
        }
      }
      return;
    }
    judge_shape_of_slots(at);
    std::vector<std::vector<MergingSet>> sets = sets_;
    const bool follows = judge_pivots(at, sets) || follows_stored_;
    make_plan(LogMass::none, follows, sets);
    judge_weights(at);
    RaggedKVCache merged = run_.apply_plan();
    judge_last_query(c_, layer_, merged, at + "last_query_out");
    if (stores_rows()) judge_rows(at, merged);
    make_plan(LogMass::log_count, follows, sets);
    merged = run_.apply_plan();
    judge_last_query(c_, layer_, merged, at + "last_query_out_log_count");
  }

  /// Not every case stores the merged rows; one that does, does so for every mode.
  bool stores_rows() const {
    for (const auto& [output, array] : c_.outputs) {
      if (output.find(".flat_") != std::string::npos) return true;
    }
    return false;
  }

  void make_plan(LogMass log_mass, bool follows, const std::vector<std::vector<MergingSet>>& sets) {
    reducer_.log_mass = log_mass;
    if (follows) {
      check(plan_of_sets(run_.view(), sets, reducer_, run_.workspace(), run_.plan), "plan of sets");
    } else {
      run_.reduce(reducer_);
    }
  }

  void judge_shape_of_slots(const std::string& at) {
    std::vector<double> lengths;
    std::vector<double> counts;
    for (const std::vector<MergingSet>& sets : sets_) {
      lengths.push_back(static_cast<double>(sets.size()));
      for (const MergingSet& set : sets) counts.push_back(set.end - set.begin);
    }
    c_.judge(at + "head_lens",
             compare(c_.output(at + "head_lens", {layer_.kv_heads}), lengths, 0.0));
    const Array& count = c_.output(at + "count");
    if (count.shape != Shape{counts.size()}) {
      throw CaseFailed{at + "count has shape " + to_string(count.shape) + ", there are " +
                       std::to_string(counts.size()) + " slots"};
    }
    c_.judge(at + "count", compare(count, counts, 0.0));
  }

  /// Puts stored pivots of nearly the same score into `sets`; true if there are any.
  bool judge_pivots(const std::string& at, std::vector<std::vector<MergingSet>>& sets) {
    const Array& stored = c_.output(at + "pivot", c_.output(at + "count").shape);
    Comparison comparison;
    comparison.add(0.0, 0.0);
    bool changed = false;
    std::size_t slot = 0;
    for (u32 head = 0; head < sets.size(); ++head) {
      for (MergingSet& set : sets[head]) {
        const double pivot = stored.values[slot++];
        if (pivot == set.pivot) continue;
        const bool inside = pivot >= set.begin && pivot < set.end && pivot == std::floor(pivot);
        if (inside && near(static_cast<double>(run_.mass(head, static_cast<u32>(pivot))),
                           static_cast<double>(run_.mass(head, set.pivot)))) {
          set.pivot = static_cast<u32>(pivot);
          changed = true;
        } else {
          comparison.add(distance(pivot, set.pivot), 0.0, place(head, set.begin));
        }
      }
    }
    c_.judge(at + "pivot", comparison.verdict());
    return changed;
  }

  void judge_weights(const std::string& at) {
    const Array& stored = c_.output(at + "weight", {layer_.kv_heads, layer_.tokens});
    std::vector<float> weight(stored.values.size(), 0.0f);
    const CompressionPlan& plan = run_.plan;
    for (u32 head = 0; head < plan.segments; ++head) {
      float* row = weight.data() + std::size_t{head} * layer_.tokens;
      for (u64 slot = plan.first[head]; slot < plan.first[head + 1]; ++slot) {
        row[plan.anchor[slot]] = plan.key_self_weight(slot);
        if (!plan.has_terms()) continue;
        for (u64 term = plan.term_begin[slot]; term < plan.term_end[slot]; ++term) {
          row[plan.term_token[term]] = plan.term_weight[term];
        }
      }
    }
    c_.judge(at + "weight", compare(stored, weight, absolute_tolerance));
  }

  void judge_rows(const std::string& at, const RaggedKVCache& merged) {
    const auto slots = static_cast<std::size_t>(run_.plan.num_slots());
    const CacheView view = merged.view();
    const auto judge_array = [&](const std::string& output, const Rows& rows) {
      const Array& stored = c_.output(output, {slots, rows.width});
      Comparison comparison;
      std::vector<float> row(rows.width);
      for (u32 head = 0; head < view.segments; ++head) {
        for (u32 j = 0; j < view.length(head); ++j) {
          const u64 slot = run_.plan.first[head] + j;
          const bool merges =
              run_.plan.has_terms() && run_.plan.term_begin[slot] != run_.plan.term_end[slot];
          load_row(rows, head, j, row.data());
          const auto add = merges ? add_merged_row : add_copied_row;
          add(comparison, row_of(stored, slot), row.data(), place(head, j));
        }
      }
      c_.judge(output, comparison.verdict());
    };
    judge_array(at + "flat_keys", view.keys);
    judge_array(at + "flat_values", view.values);
  }

  Case& c_;
  const Layer& layer_;
  Run run_;
  std::vector<float> mass_;
  KVMergerReducer reducer_;
  std::vector<std::vector<MergingSet>> sets_;
  bool follows_stored_ = false;
};

}  // namespace

void judge_kvmerger(Case& c) { KVMergerJudge(c).judge(); }

void judge_massfold(Case& c) {
  const Layer& layer = c.layer();
  const u32 heads = layer.kv_heads;
  const u32 slots = std::min(c.count("keep"), layer.tokens);
  const Array& kept = c.output("kept", {heads, slots});
  const Array& log_mass = c.output("log_mass", {heads, slots});
  const Array& values = c.output("values", {heads, slots, layer.value_dim});
  const std::vector<float> mass = mean_column_sums(layer);
  Run run(layer.cache());
  score_by(mass, layer, run);
  run.set_limits(slots);
  run.reduce(MassFoldReducer{.per_observer = false});

  // Where the stored result keeps another token of nearly the same score, fold onto its tokens.
  const std::vector<u8> ours = run.kept();
  Comparison comparison;
  comparison.add(0.0, 0.0);
  bool follows = false;
  for (u32 head = 0; head < heads; ++head) {
    const auto row = row_of(kept, head);
    Cut cut;
    for (u32 token = 0; token < layer.tokens; ++token) {
      cut.add(static_cast<double>(run.mass(head, token)),
              ours[std::size_t{head} * layer.tokens + token] != 0);
    }
    bool differs = false;
    bool fails = false;
    for (u32 j = 0; j < slots; ++j) {
      const u32 anchor = run.plan.anchor[run.plan.first[head] + j];
      const bool token = row[j] >= 0.0 && row[j] < layer.tokens && row[j] == std::floor(row[j]) &&
                         (j == 0 || row[j] > row[j - 1]);
      if (token && row[j] == anchor) continue;
      differs = true;
      const auto stored = static_cast<u32>(token ? row[j] : 0.0);
      if (!token || (ours[std::size_t{head} * layer.tokens + stored] == 0 &&
                     !cut.may_cross(static_cast<double>(run.mass(head, stored)), false))) {
        fails = true;
        comparison.add(std::max(distance(row[j], anchor), 1.0), 0.0, place(head, j));
      }
    }
    if (!differs || fails) continue;
    follows = true;
    for (u32 token = 0; token < layer.tokens; ++token) run.rank(head, token) = 0.0f;
    for (const double token : row) run.rank(head, static_cast<u32>(token)) = 1.0f;
  }
  c.judge("kept", comparison.verdict());
  if (follows) run.reduce(MassFoldReducer{.per_observer = false});

  const RaggedKVCache folded = run.apply_plan();
  const CacheView view = folded.view();
  std::vector<float> our_mass(log_mass.values.size());
  Comparison rows;
  std::vector<float> value(layer.value_dim);
  for (u32 head = 0; head < heads; ++head) {
    for (u32 j = 0; j < slots; ++j) {
      const u64 slot = run.plan.first[head] + j;
      our_mass[std::size_t{head} * slots + j] = view.mass_bias(head, j);
      const bool merges =
          run.plan.has_terms() && run.plan.term_begin[slot] != run.plan.term_end[slot];
      load_row(view.values, head, j, value.data());
      const auto add = merges ? add_merged_row : add_copied_row;
      add(rows, row_of(values, std::size_t{head} * slots + j), value.data(), place(head, j));
    }
  }
  Verdict masses = compare(log_mass, our_mass, absolute_tolerance);
  Verdict blends = rows.verdict();
  if (layer.key_dim == 1 && (masses.outcome == Outcome::fail || blends.outcome == Outcome::fail)) {
    // All cosines are 1 or -1, so rounding alone decides which kept key is the most similar.
    masses = blends = {Outcome::not_implemented, 0.0, 0.0,
                       "keys of one dimension do not determine the receiver"};
  }
  c.judge("log_mass", masses);
  c.judge("values", blends);
}

}  // namespace kvlean::golden
