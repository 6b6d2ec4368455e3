// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#include <cmath>

#include "kvlean/core/tensor.hpp"
#include "tests/golden/golden_case.hpp"

namespace kvlean::golden {

std::string to_string(const Shape& shape) {
  std::string text = "[";
  for (std::size_t i = 0; i < shape.size(); ++i) {
    text += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
  }
  return text + "]";
}

CacheView Layer::cache() const {
  const auto keys = strided(k.data(), {.kv_heads = kv_heads, .tokens = tokens, .dim = key_dim});
  const auto values = strided(v.data(), {.kv_heads = kv_heads, .tokens = tokens, .dim = value_dim});
  return KVCache(keys, values).view();
}

Queries Layer::queries(u32 last, bool first_of_group) const {
  const u32 count = last == 0 ? tokens : last;
  const u32 step = first_of_group ? group : 1;
  const auto row = static_cast<std::ptrdiff_t>(key_dim);
  const auto head = static_cast<std::ptrdiff_t>(tokens) * row;
  const Strided<const float> rows(
      q.data() + static_cast<std::ptrdiff_t>(tokens - count) * row,
      {.kv_heads = query_heads / step, .tokens = count, .dim = key_dim},
      {.head = head * static_cast<std::ptrdiff_t>(step), .token = row, .dim = 1});
  return kvlean::queries(rows);
}

const Array& Case::output(const std::string& output) const {
  const auto found = outputs.find(output);
  if (found == outputs.end()) throw BrokenFile{name + "." + output + " is missing"};
  return found->second;
}

const Array& Case::output(const std::string& output, const Shape& shape) const {
  const Array& array = this->output(output);
  if (array.shape != shape) {
    throw BrokenFile{name + "." + output + " has shape " + to_string(array.shape) + ", expected " +
                     to_string(shape)};
  }
  return array;
}

bool Case::has_param(const std::string& key) {
  read_.insert(key);
  return params.is_object() && params.contains(key);
}

const nlohmann::json& Case::param(const std::string& key) {
  if (!has_param(key)) throw CaseFailed{"the parameter '" + key + "' is missing"};
  return params.at(key);
}

u32 Case::count(const std::string& key) {
  const double value = real(key);
  if (!(value >= 0.0) || value != std::floor(value) || value > 2147483647.0) {
    throw CaseFailed{"the parameter '" + key + "' is not a count"};
  }
  return static_cast<u32>(value);
}

double Case::real(const std::string& key) {
  const nlohmann::json& value = param(key);
  if (!value.is_number()) throw CaseFailed{"the parameter '" + key + "' is not a number"};
  return value.get<double>();
}

std::string Case::text(const std::string& key) {
  const nlohmann::json& value = param(key);
  if (!value.is_string()) throw CaseFailed{"the parameter '" + key + "' is not a string"};
  return value.get<std::string>();
}

void Case::expect_text(const std::string& key, const std::set<std::string>& known) {
  if (!has_param(key)) return;
  if (const std::string value = text(key); known.count(value) == 0) {
    throw NotImplemented{"the parameter '" + key + "' is '" + value + "'"};
  }
}

std::string Case::unread_params() const {
  std::string names;
  for (const auto& [key, value] : params.items()) {
    if (read_.count(key) == 0 && key != "note") names += (names.empty() ? "" : ", ") + key;
  }
  return names;
}

const std::map<std::string, Method>& methods() {
  static const std::map<std::string, Method> table = {
      {"knorm", {{"score"}, {}, judge_knorm}},
      {"keydiff", {{"score"}, {}, judge_keydiff}},
      {"snapkv", {{"score"}, {}, judge_snapkv}},
      {"streaming_llm", {{"score"}, {}, judge_streaming_llm}},
      {"tova", {{"score"}, {}, judge_tova}},
      {"observed_attention", {{"score"}, {}, judge_observed_attention}},
      {"adakv", {{"keep", "budget"}, {}, judge_adakv}},
      {"adakv_official",
       {{"score", "flat_keys", "flat_values", "head_lens"}, {}, judge_adakv_official}},
      {"pyramidkv", {{"budget"}, {}, judge_pyramidkv}},
      {"h2o_official", {{"keys", "values", "hh_score"}, {}, judge_h2o_official}},
      {"cam_official", {{"prob", "values", "uniform"}, {}, judge_cam_official}},
      {"kvmerger", {{"slot_of_token"}, {}, judge_kvmerger}},
      {"massfold", {{"kept", "log_mass", "values"}, {}, judge_massfold}},
      // Not compared yet; listed so that a missing tensor of theirs is found.
      {"expected_attention", {{"score"}, {"in.q_prerope", "in.inv_freq"}, nullptr}},
      {"criticalkv", {{"score"}, {"in.wo"}, nullptr}},
      {"criticaladakv", {{"keep", "budget"}, {"in.wo"}, nullptr}},
      {"lagkv", {{"score"}, {}, nullptr}},
      {"non_causal_attention", {{"score"}, {}, nullptr}},
      {"chunkkv", {{"keys", "values"}, {}, nullptr}},
      {"key_rerotation", {{"keys", "values"}, {"in.inv_freq"}, nullptr}},
      {"merging", {{"keys", "values"}, {}, nullptr}},
  };
  return table;
}

}  // namespace kvlean::golden
