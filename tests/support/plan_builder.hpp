// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
// Hand-made plans. The arrays are public, so that a test can also break them.
#pragma once

#include <initializer_list>
#include <kvlean/kvlean.hpp>
#include <vector>

#include "kvlean/core/validate_plan.hpp"

namespace kvlean_test {

struct Term {
  kvlean::u32 token = 0;
  float weight = 1.0f;
  float value_weight = 1.0f;
};

/// Arrays of a CompressionPlan; an empty optional one is absent. plan() fills in the needs bits.
struct PlanBuilder {
  std::vector<kvlean::u32> length;
  std::vector<kvlean::u64> first{0};
  std::vector<kvlean::u32> anchor;
  std::vector<float> log_mass;
  std::vector<kvlean::i32> position;
  std::vector<float> self_weight;
  std::vector<float> self_value_weight;
  std::vector<kvlean::u64> term_begin;
  std::vector<kvlean::u64> term_end;
  std::vector<kvlean::u32> term_token;
  std::vector<float> term_weight;
  std::vector<float> term_value_weight;
  kvlean::Rows literal_keys;
  kvlean::Rows literal_values;
  kvlean::u32 page_tokens = 0;
  bool moves_keys = false;

  PlanBuilder() = default;
  /// Keeps these tokens of each segment, unchanged.
  PlanBuilder(std::initializer_list<std::vector<kvlean::u32>> kept) {
    for (const auto& anchors : kept) add_segment(anchors);
  }
  void add_segment(const std::vector<kvlean::u32>& anchors) {
    anchor.insert(anchor.end(), anchors.begin(), anchors.end());
    length.push_back(static_cast<kvlean::u32>(anchors.size()));
    first.push_back(anchor.size());
  }
  /// Terms of a slot; the others get none. Call in any order, once a slot.
  void add_terms(std::size_t slot, std::initializer_list<Term> terms) {
    term_begin.resize(anchor.size(), 0);
    term_end.resize(anchor.size(), 0);
    term_begin[slot] = term_token.size();
    for (const Term& term : terms) {
      term_token.push_back(term.token);
      term_weight.push_back(term.weight);
      term_value_weight.push_back(term.value_weight);
    }
    term_end[slot] = term_token.size();
  }

  [[nodiscard]] kvlean::CompressionPlan plan() {
    const auto data = [](auto& values) { return values.empty() ? nullptr : values.data(); };
    kvlean::CompressionPlan plan;
    plan.segments = static_cast<kvlean::u32>(length.size());
    plan.length = length.data();
    plan.first = first.data();
    plan.anchor = data(anchor);
    plan.log_mass = data(log_mass);
    plan.position = data(position);
    plan.self_weight = data(self_weight);
    plan.self_value_weight = data(self_value_weight);
    plan.term_begin = data(term_begin);
    plan.term_end = data(term_end);
    plan.num_terms = term_token.size();
    plan.term_token = data(term_token);
    plan.term_weight = data(term_weight);
    plan.term_value_weight = data(term_value_weight);
    plan.literal_keys = literal_keys;
    plan.literal_values = literal_values;
    plan.page_tokens = page_tokens;
    for (const kvlean::u32 n : length) {
      if (n != length[0]) plan.needs |= kvlean::needs_ragged_lengths;
    }
    if (plan.log_mass != nullptr) plan.needs |= kvlean::needs_log_mass;
    if (plan.position != nullptr) plan.needs |= kvlean::needs_new_positions;
    if (moves_keys || plan.has_literal_keys()) plan.needs |= kvlean::needs_moved_keys;
    for (std::size_t slot = 0; slot < anchor.size(); ++slot) {
      if (kvlean::detail::value_changes(plan, slot)) plan.needs |= kvlean::needs_changed_values;
    }
    return plan;
  }
};

}  // namespace kvlean_test
