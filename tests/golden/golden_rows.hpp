// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstring>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "tests/golden/golden_compare.hpp"

// Finding the input token that a stored row is a copy of.

namespace kvlean::golden {

[[nodiscard]] inline bool is_copy(std::span<const double> stored, const float* row) {
  for (std::size_t d = 0; d < stored.size(); ++d) {
    if (!same_bits(stored[d], row[d])) return false;
  }
  return true;
}

[[nodiscard]] inline bool is_any_copy(std::span<const double> stored, const float* rows,
                                      u32 count) {
  for (u32 token = 0; token < count; ++token) {
    if (is_copy(stored, rows + token * stored.size())) return true;
  }
  return false;
}

/// The largest difference to the most similar of the head's rows, to say how far off a row is.
[[nodiscard]] inline double distance_to_rows(std::span<const double> stored, const float* rows,
                                             u32 count) {
  double best = std::numeric_limits<double>::infinity();
  for (u32 token = 0; token < count; ++token, rows += stored.size()) {
    double worst = 0.0;
    for (std::size_t d = 0; d < stored.size() && worst < best; ++d) {
      worst = std::max(worst, distance(stored[d], static_cast<double>(rows[d])));
    }
    best = std::min(best, worst);
  }
  return std::max(best, std::numeric_limits<double>::min());
}

/// A head's key rows by their bits; every token is handed out once.
class KeyIndex {
 public:
  KeyIndex(const Layer& layer, u32 head, u32 tokens) : width_(layer.key_dim) {
    for (u32 token = tokens; token-- > 0;) {  // the lowest token of equal keys comes first
      index_[bytes(layer.key(head, token))].push_back(token);
    }
  }
  [[nodiscard]] std::optional<u32> take(std::span<const double> stored) {
    std::vector<float> row(stored.size());
    for (std::size_t d = 0; d < stored.size(); ++d) row[d] = static_cast<float>(stored[d]);
    const auto found = index_.find(bytes(row.data()));
    if (found == index_.end() || found->second.empty()) return std::nullopt;
    const u32 token = found->second.back();
    found->second.pop_back();
    return token;
  }

 private:
  [[nodiscard]] std::string bytes(const float* row) const {
    std::string text(width_ * sizeof(float), '\0');
    for (std::size_t d = 0; d < width_; ++d) {
      const float value = row[d] == 0.0f ? 0.0f : row[d];
      std::memcpy(text.data() + d * sizeof(float), &value, sizeof(float));
    }
    return text;
  }
  std::size_t width_;
  std::map<std::string, std::vector<u32>> index_;
};

/// Judges flat_keys and flat_values of the Ada-KV authors' layout: of each head its best tokens by
/// descending score, then the window in order. Equal scores come in any order, so a row is matched
/// to its token by key and the sorted scores are compared. `scores` is [kv_heads][tokens - window];
/// `in_order`: nothing was dropped, and rows are in position order.
inline void judge_score_ordered_rows(Case& c, const Layer& layer, const Array& head_lens,
                                     u32 window, const std::vector<float>& scores, bool in_order) {
  std::size_t rows = 0;
  bool plausible = true;
  for (const double length : head_lens.values) {
    plausible =
        plausible && length >= window && length <= layer.tokens && length == std::floor(length);
    if (plausible) rows += static_cast<std::size_t>(length);
  }
  if (!plausible) throw CaseFailed{"head_lens are not lengths from the window's to the layer's"};
  const Array& keys = c.output("flat_keys");
  const Array& values = c.output("flat_values");
  if (keys.shape != Shape{rows, layer.key_dim} || values.shape != Shape{rows, layer.value_dim}) {
    throw BrokenFile{c.name + ": flat_keys and flat_values have " + to_string(keys.shape) +
                     " and " + to_string(values.shape) + " entries, head_lens add up to " +
                     std::to_string(rows) + " rows"};
  }
  const u32 prefix = layer.tokens - window;
  Comparison key_rows;
  Comparison value_rows;
  std::size_t first = 0;
  for (u32 head = 0; head < layer.kv_heads; ++head) {
    const auto length = static_cast<u32>(head_lens.values[head]);
    const u32 best = length - window;
    const float* row_scores = scores.data() + std::size_t{head} * prefix;
    std::vector<float> ours(row_scores, row_scores + prefix);
    std::sort(ours.begin(), ours.end(), std::greater<>());
    const double tolerance =
        prefix == 0 ? 0.0 : score_tolerance * static_cast<double>(std::abs(ours.front()));
    KeyIndex index(layer, head, prefix);
    std::vector<float> matched;
    for (u32 j = 0; j < best; ++j) {
      const auto key = row_of(keys, first + j);
      const auto value = row_of(values, first + j);
      const std::optional<u32> token = index.take(key);
      if (!token) {
        key_rows.add(distance_to_rows(key, layer.key(head, 0), layer.tokens), 0.0,
                     place(head, j) + " is no key of the layer");
        if (!is_any_copy(value, layer.value(head, 0), layer.tokens)) {
          value_rows.add(distance_to_rows(value, layer.value(head, 0), layer.tokens), 0.0,
                         place(head, j) + " is no value of the layer");
        }
        continue;
      }
      add_copied_row(value_rows, value, layer.value(head, *token), place(head, j));
      if (in_order && *token != j) key_rows.fault(place(head, j) + " is out of order");
      matched.push_back(row_scores[*token]);
      if (in_order || matched.size() < 2) continue;
      const double rise =
          static_cast<double>(matched.back()) - static_cast<double>(matched[matched.size() - 2]);
      key_rows.add(std::max(rise, 0.0), tolerance, place(head, j) + " scores more than the last");
    }
    std::sort(matched.begin(), matched.end(), std::greater<>());
    for (std::size_t j = 0; j < matched.size() && matched.size() == best; ++j) {
      key_rows.add(distance(static_cast<double>(matched[j]), static_cast<double>(ours[j])),
                   tolerance, place(head, j) + ", sorted scores");
    }
    for (u32 j = best; j < length; ++j) {
      const u32 token = prefix + (j - best);
      add_copied_row(key_rows, row_of(keys, first + j), layer.key(head, token), place(head, j));
      add_copied_row(value_rows, row_of(values, first + j), layer.value(head, token),
                     place(head, j));
    }
    first += length;
  }
  c.judge("flat_keys", key_rows.verdict());
  c.judge("flat_values", value_rows.verdict());
}

}  // namespace kvlean::golden
