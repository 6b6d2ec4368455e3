// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <nlohmann/json.hpp>

#include "kvlean/core/plan.hpp"

// A compression plan as JSON, for people: what every slot is made of, in words where there are any.

namespace kvlean::io {

/// The PlanNeeds bits of a plan by name.
[[nodiscard]] inline nlohmann::ordered_json needs_to_json(u32 needs) {
  nlohmann::ordered_json words = nlohmann::ordered_json::array();
  if ((needs & needs_ragged_lengths) != 0) words.push_back("ragged_lengths");
  if ((needs & needs_log_mass) != 0) words.push_back("log_mass");
  if ((needs & needs_moved_keys) != 0) words.push_back("moved_keys");
  if ((needs & needs_changed_values) != 0) words.push_back("changed_values");
  if ((needs & needs_new_positions) != 0) words.push_back("new_positions");
  return words;
}

/// One slot. A part that has its default value (weight 1, no terms, the anchor's log mass and
/// position) is left out.
[[nodiscard]] inline nlohmann::ordered_json slot_to_json(const CompressionPlan& plan, u64 slot) {
  nlohmann::ordered_json json;
  json["anchor"] = plan.anchor[slot];
  if (plan.position != nullptr) json["position"] = plan.position[slot];
  const float key_weight = plan.key_self_weight(slot);
  const float value_weight = plan.value_self_weight(slot);
  if (key_weight != 1.0f || value_weight != 1.0f) {
    json["self_weight"] = key_weight;
    if (value_weight != key_weight) json["self_value_weight"] = value_weight;
  }
  if (plan.has_terms() && plan.term_begin[slot] < plan.term_end[slot]) {
    nlohmann::ordered_json& terms = json["terms"] = nlohmann::ordered_json::array();
    for (u64 term = plan.term_begin[slot]; term < plan.term_end[slot]; ++term) {
      nlohmann::ordered_json entry = {{"token", plan.term_token[term]},
                                      {"weight", plan.term_weight[term]}};
      if (plan.value_term_weight(term) != plan.term_weight[term]) {
        entry["value_weight"] = plan.value_term_weight(term);
      }
      terms.push_back(std::move(entry));
    }
  }
  if (plan.log_mass != nullptr && plan.log_mass[slot] != 0.0f) {
    json["log_mass"] = plan.log_mass[slot];
  }
  return json;
}

/// A whole plan of one layer: counts, what it needs, and per segment its slots in order. Numbers
/// that are not finite become null. O(slots + terms).
[[nodiscard]] inline nlohmann::ordered_json plan_to_json(const CompressionPlan& plan) {
  nlohmann::ordered_json json;
  json["segments"] = plan.segments;
  json["slots"] = plan.num_slots();
  json["terms"] = plan.num_terms;
  json["needs"] = needs_to_json(plan.needs);
  if (plan.page_tokens != 0) json["page_tokens"] = plan.page_tokens;
  if (plan.has_literal_keys()) json["literal_keys"] = true;
  if (plan.has_literal_values()) json["literal_values"] = true;
  nlohmann::ordered_json& segments = json["segment"] = nlohmann::ordered_json::array();
  for (u32 s = 0; s < plan.segments; ++s) {
    nlohmann::ordered_json segment;
    segment["head"] = s;
    segment["length"] = plan.length[s];
    if (plan.slots_evicted != nullptr) segment["slots_evicted"] = plan.slots_evicted[s];
    nlohmann::ordered_json& slots = segment["slots"] = nlohmann::ordered_json::array();
    for (u64 slot = plan.first[s]; slot < plan.first[s + 1]; ++slot) {
      slots.push_back(slot_to_json(plan, slot));
    }
    segments.push_back(std::move(segment));
  }
  return json;
}

}  // namespace kvlean::io
