// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <span>
#include <string>

#include "tests/golden/golden_case.hpp"

// The comparing rules of the format; see README.md beside this file.

namespace kvlean::golden {

inline constexpr double score_tolerance = 2e-5;     ///< times the row's largest magnitude
inline constexpr double absolute_tolerance = 1e-4;  ///< weights, outputs, merged rows
inline constexpr double cut_tolerance = 1e-5;       ///< relative; closer scores may swap at a cut

/// |a - b|, infinite when either is NaN so that it fails every tolerance.
[[nodiscard]] inline double distance(double a, double b) {
  const double difference = std::abs(a - b);
  if (a == b) return 0.0;
  return std::isnan(difference) ? std::numeric_limits<double>::infinity() : difference;
}

/// Whether rounding may order the two either way.
[[nodiscard]] inline bool near(double a, double b) {
  return distance(a, b) <= cut_tolerance * std::max(std::abs(a), std::abs(b));
}

[[nodiscard]] inline bool same_bits(double stored, float ours) {
  return std::bit_cast<u32>(static_cast<float>(stored)) == std::bit_cast<u32>(ours) ||
         (stored == 0.0 && ours == 0.0f);
}

/// Collects errors against one tolerance or several; remembers the worst in proportion.
class Comparison {
 public:
  void add(double error, double tolerance, const std::string& where = {}) {
    const bool fails = !(error <= tolerance);
    const double share = tolerance > 0.0 ? error / tolerance : (error > 0.0 ? infinity : 0.0);
    if (first_ || (fails && !failed_) || (fails == failed_ && share > share_)) {
      error_ = error;
      tolerance_ = tolerance;
      share_ = share;
      where_ = where;
    }
    first_ = false;
    failed_ = failed_ || fails;
  }
  /// A fault that no number describes.
  void fault(const std::string& why) { add(infinity, 0.0, why); }
  [[nodiscard]] bool failed() const { return failed_; }
  [[nodiscard]] Verdict verdict() const {
    return {failed_ ? Outcome::fail : Outcome::pass, error_, tolerance_,
            failed_ ? where_ : std::string()};
  }

 private:
  static constexpr double infinity = std::numeric_limits<double>::infinity();
  double error_ = 0.0;
  double tolerance_ = 0.0;
  double share_ = 0.0;
  bool first_ = true;
  bool failed_ = false;
  std::string where_;
};

/// All entries within one absolute tolerance; 0 means exact. `ours` has as many entries.
template <class Ours>
[[nodiscard]] Verdict compare(const Array& stored, const Ours& ours, double tolerance) {
  Comparison comparison;
  comparison.add(0.0, tolerance);
  for (std::size_t i = 0; i < stored.values.size(); ++i) {
    comparison.add(distance(stored.values[i], static_cast<double>(ours[i])), tolerance,
                   "entry " + std::to_string(i));
  }
  return comparison.verdict();
}

/// Scores: each row within its share of the row's largest stored magnitude.
template <class Ours>
[[nodiscard]] Verdict compare_scores(const Array& stored, const Ours& ours) {
  Comparison comparison;
  const std::size_t width = stored.width();
  for (std::size_t first = 0; first < stored.values.size(); first += width) {
    double largest = 0.0;
    for (std::size_t i = first; i < first + width; ++i) {
      largest = std::max(largest, std::abs(stored.values[i]));
    }
    if (!std::isfinite(largest)) largest = 0.0;  // an infinite tolerance would let all pass
    for (std::size_t i = first; i < first + width; ++i) {
      comparison.add(distance(stored.values[i], static_cast<double>(ours[i])),
                     score_tolerance * largest, "entry " + std::to_string(i));
    }
  }
  return comparison.verdict();
}

/// Adds one stored row that must be a bit-equal copy.
inline void add_copied_row(Comparison& comparison, std::span<const double> stored,
                           const float* ours, const std::string& where) {
  double error = 0.0;
  for (std::size_t d = 0; d < stored.size(); ++d) {
    if (!same_bits(stored[d], ours[d])) {
      error = std::max(error, distance(stored[d], static_cast<double>(ours[d])));
      error = std::max(error, std::numeric_limits<double>::min());  // NaN payloads differ too
    }
  }
  comparison.add(error, 0.0, where + ", a copied row");
}

/// Adds one stored row that is a blend.
inline void add_merged_row(Comparison& comparison, std::span<const double> stored,
                           const float* ours, const std::string& where) {
  double error = 0.0;
  for (std::size_t d = 0; d < stored.size(); ++d) {
    error = std::max(error, distance(stored[d], static_cast<double>(ours[d])));
  }
  comparison.add(error, absolute_tolerance, where);
}

[[nodiscard]] inline std::span<const double> row_of(const Array& array, std::size_t row) {
  return std::span<const double>(array.values).subspan(row * array.width(), array.width());
}

[[nodiscard]] inline std::string place(u32 head, std::size_t row) {
  return "head " + std::to_string(head) + ", entry " + std::to_string(row);
}

/// The cut between the tokens of one head that we keep and those that we drop. A token may be on
/// the other side in the stored result only if its score is within rounding of the best on that
/// side.
struct Cut {
  double worst_kept = std::numeric_limits<double>::infinity();
  double best_dropped = -std::numeric_limits<double>::infinity();

  void add(double score, bool kept) {
    if (kept) {
      worst_kept = std::min(worst_kept, score);
    } else {
      best_dropped = std::max(best_dropped, score);
    }
  }
  [[nodiscard]] bool may_cross(double score, bool kept) const {
    return near(score, kept ? best_dropped : worst_kept);
  }
};

}  // namespace kvlean::golden
