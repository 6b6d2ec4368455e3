// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <span>

#include "kvlean/core/order.hpp"
#include "kvlean/core/workspace.hpp"
#include "kvlean/simd/select_kernels.hpp"

// Where the best so-and-so many of some runs of scores end.

KVLEAN_NAMESPACE_BEGIN
namespace detail {

/// The best so-and-so many of a set of score keys: all above `key`, and `ties` of those equal to
/// it. By default none (no score has this key).
struct KeyCut {
  u32 key = 0xffffffffu;
  u64 ties = 0;
};

/// The score that a key above 0 stands for; -inf and NaN for those below and above all scores. A
/// score's key is at least `key` exactly when the score is at least this.
[[nodiscard]] inline float score_of_key(u32 key) noexcept {
  constexpr u32 lowest = 0x007fffffu;  // -inf
  if (key < lowest) return -std::numeric_limits<float>::infinity();
  return std::bit_cast<float>((key & 0x80000000u) != 0 ? key & 0x7fffffffu : ~key);
}
inline constexpr u32 highest_key = 0xff800000u;  // +inf

/// Scores of one segment that are selected from, each times `weight`.
struct ScoreRun {
  const float* scores = nullptr;  ///< [count]
  u32 count = 0;
  float weight = 1.0f;
  i64 safe = 0;  ///< this many of the best do not compete; below 0: as many more that do

  [[nodiscard]] u32 key(u32 i) const noexcept { return score_key(scores[i] * weight); }
  /// Scores whose key is at least `key`, safe ones included.
  [[nodiscard]] u32 count_at_least(const simd::SelectKernels& kernels, u32 key) const noexcept {
    return key == 0 ? count : kernels.count_at_least(scores, count, weight, score_of_key(key));
  }
  /// Competing scores of the best `reached`.
  [[nodiscard]] u64 competing(u64 reached) const noexcept {
    return static_cast<u64>(std::max<i64>(static_cast<i64>(reached) - safe, 0));
  }
};

/// Memory of a search: none of it holds anything between two searches.
struct CutScratch {
  ScoreRun* runs = nullptr;  ///< [2 * runs]
  float* floats = nullptr;   ///< [room]
  u64 room = 0;

  /// Floats for a search among this many scores of all runs together: 4 KiB and half a byte each.
  [[nodiscard]] static constexpr u64 floats_for(u64 scores) noexcept {
    return std::min<u64>(scores, 1024) + scores / 8;
  }
  /// Takes what a search among `run_count` runs of `scores` scores in all needs.
  [[nodiscard]] Status take(std::size_t run_count, u64 scores, Workspace& workspace) noexcept {
    room = floats_for(scores);
    runs = workspace.take<ScoreRun>(2 * run_count);
    floats = workspace.take<float>(room);
    return runs != nullptr && floats != nullptr ? Status{} : workspace.exhausted();
  }
};

/// Finds the cut of the `wanted` best competing scores of some runs: the largest key that `wanted`
/// of them reach. Which scores of a run are safe need not be known, as they are the best: of c
/// scores at or above a key, c - safe compete. Thus counting is enough, and the result does not
/// depend on how the key is found.
///
/// A sample tells between which two scores the cut should lie. One pass counts what is above and
/// copies what is between; the cut is then searched in the copy. Data that the sample misleads, or
/// that has too much between, halves the range with more passes. O(scores); 64 passes at most.
class CutSearch {
 public:
  CutSearch(std::span<const ScoreRun> runs, u64 wanted, const CutScratch& scratch) noexcept
      : runs_(runs), current_(runs), searched_(runs), wanted_(wanted), scratch_(scratch) {
    for (const ScoreRun& run : runs) scores_ += run.count;
  }
  /// Keys below `key` are known not to be the cut.
  void start_from(u32 key) noexcept { low_ = key; }

  /// `wanted` is at most what competes.
  [[nodiscard]] KeyCut find() noexcept {
    if (wanted_ == 0) {
      low_ = high_ = highest_key + 1;  // which no score reaches
      return {};
    }
    constexpr u64 few = 512;  // scores that are read again and again at once
    if (scores_ > few && low_ < high_) narrow();
    halve(32);
    return {low_, wanted_ - reaching(low_ + 1)};
  }
  /// After find(): competing scores of a run above the cut, and at or above it.
  [[nodiscard]] u64 above_cut(std::size_t run) const noexcept { return competing(run, low_ + 1); }
  [[nodiscard]] u64 reaching_cut(std::size_t run) const noexcept {
    return low_ == 0 ? runs_[run].competing(runs_[run].count) : competing(run, low_);
  }

 private:
  [[nodiscard]] u64 competing(std::size_t run, u32 key) const noexcept {
    return current_[run].competing(current_[run].count_at_least(kernels_, key));
  }
  [[nodiscard]] u64 reaching(u32 key) const noexcept {
    u64 sum = 0;
    for (const ScoreRun& part : searched_) {
      sum += part.competing(part.count_at_least(kernels_, key));
    }
    return sum;
  }
  void halve(u32 steps) noexcept {
    for (; steps > 0 && low_ < high_; --steps) {
      const u32 middle = low_ + (high_ - low_) / 2 + 1;
      if (reaching(middle) >= wanted_) {
        low_ = middle;
      } else {
        high_ = middle - 1;
      }
    }
  }

  void narrow() noexcept {
    for (const double deviations : {3.0, 12.0}) {
      if (bracket(deviations)) return;
      if (crowded_) break;
    }
    while (low_ < high_) {
      for (u32 step = 0; step < 4 && low_ < high_; ++step) divide();
      if (low_ < high_ && split(low_, high_)) return;
    }
  }

  /// Halves the range of keys down to scores that exist: of few values that many share, one pass
  /// each is enough.
  void divide() noexcept {
    const u32 middle = low_ + (high_ - low_) / 2 + 1;
    const float bound = score_of_key(middle);
    u64 sum = 0;
    u32 above = highest_key;
    u32 below = low_;
    for (const ScoreRun& run : runs_) {
      const simd::Divided part = kernels_.divide(run.scores, run.count, run.weight, bound);
      sum += run.competing(part.reached);
      above = std::min(above, score_key(part.above));
      if (part.reached != run.count) below = std::max(below, score_key(part.below));
    }
    if (sum >= wanted_) {
      low_ = std::max(above, middle);
    } else {
      high_ = std::min(below, middle - 1);
    }
  }

  /// Splits at the keys that the sample takes for the cut's neighbours.
  [[nodiscard]] bool bracket(double deviations) noexcept {
    // n^(2/3) scores: searching the sample then takes as long as searching what it leaves.
    const double edge = std::cbrt(static_cast<double>(scores_));
    const u64 step = static_cast<u64>(edge) | 1;  // odd: scores often repeat in powers of two
    std::size_t parts = 0;
    float* next = scratch_.floats;
    const float* const end = scratch_.floats + scratch_.room;
    double safe = 0.0;
    for (const ScoreRun& run : runs_) {
      const float* first = next;
      for (u64 i = step / 2; i < run.count && next != end; i += step) {
        *next++ = run.scores[i] * run.weight;
      }
      safe += static_cast<double>(run.safe);
      join({first, static_cast<u32>(next - first), 1.0f, run.safe}, scratch_.runs, parts);
    }
    const auto expected = [&](u32 key) noexcept {
      u64 sum = 0;
      for (std::size_t i = 0; i < parts; ++i) {
        const ScoreRun& part = scratch_.runs[i];
        sum += part.competing(step * part.count_at_least(kernels_, key));
      }
      return sum;
    };
    // The largest key that `from` scores should reach, or one that no more than `to` should.
    const auto key_between = [&](u64 from, u64 to, u32 low) noexcept {
      u32 high = high_;
      while (low < high) {
        const u32 middle = low + (high - low) / 2 + 1;
        const u64 sum = expected(middle);
        if (sum < from) {
          high = middle - 1;
        } else {
          low = middle;
          if (sum <= to) break;
        }
      }
      return low;
    };
    const double best = static_cast<double>(wanted_) + safe;
    const double rest = std::max(static_cast<double>(scores_) - best, 0.0);
    const double every = static_cast<double>(step);
    const double deviation = std::sqrt(every * best * rest / static_cast<double>(scores_));
    const u64 margin = static_cast<u64>(deviations * (deviation + every));
    const u64 slack = margin / 4;
    const u32 low = key_between(wanted_ + margin, wanted_ + margin + slack, std::max<u32>(low_, 1));
    const u32 high = wanted_ <= margin + slack
                         ? high_
                         : key_between(wanted_ - margin - slack, wanted_ - margin, low);
    return split(low, high);
  }

  /// Adds a part to a list, to its last one if the two can be counted as one.
  static void join(const ScoreRun& part, ScoreRun* parts, std::size_t& count) noexcept {
    if (count != 0) {
      ScoreRun& last = parts[count - 1];
      if (last.safe <= 0 && part.safe <= 0 && last.scores + last.count == part.scores &&
          static_cast<u64>(last.count) + part.count <= 0xffffffffu) {
        last.count += part.count;
        last.safe += part.safe;
        return;
      }
    }
    parts[count++] = part;
  }

  /// Sets [low_, high_] to the part below, within or above [low, high], and copies the scores
  /// within. Whether only those, or no more, are left to search.
  [[nodiscard]] bool split(u32 low, u32 high) noexcept {
    low = std::max<u32>(low, 1);  // NaN is not copied: key 0 is the cut if nothing else is
    const float least = score_of_key(low);
    const float bound = score_of_key(high + 1);
    u64 above = 0;
    u64 reach = 0;
    u64 used = 0;
    bool fits = true;
    ScoreRun* copies = scratch_.runs + runs_.size();
    for (std::size_t r = 0; r < runs_.size(); ++r) {
      const ScoreRun& run = runs_[r];
      float* copy = scratch_.floats + used;
      const u64 room = fits ? std::min<u64>(scratch_.room - used, run.count) : 0;
      const simd::Collected found = kernels_.collect(run.scores, run.count, run.weight, least,
                                                     bound, copy, static_cast<u32>(room));
      above += run.competing(found.above);
      reach += run.competing(static_cast<u64>(found.above) + found.inside);
      fits = fits && found.inside <= room;
      used += found.inside;
      copies[r] = {copy, found.inside, 1.0f, run.safe - static_cast<i64>(found.above)};
    }
    if (above >= wanted_) {
      low_ = high + 1;
    } else if (reach < wanted_) {
      high_ = low - 1;
    } else {
      low_ = low;
      high_ = high;
      crowded_ = !fits;
      if (fits) {
        std::size_t parts = 0;
        for (std::size_t r = 0; r < runs_.size(); ++r) join(copies[r], scratch_.runs, parts);
        searched_ = {scratch_.runs, parts};
        current_ = {copies, runs_.size()};
      }
      return fits || low_ == high_;
    }
    return low_ == high_;
  }

  const simd::SelectKernels& kernels_ = simd::select_kernels();
  std::span<const ScoreRun> runs_;
  std::span<const ScoreRun> current_;   // runs_, or copies of what is left of them
  std::span<const ScoreRun> searched_;  // the same, some joined
  u64 wanted_;
  u64 scores_ = 0;
  CutScratch scratch_;
  u32 low_ = 0;  // the cut is in [low_, high_]
  u32 high_ = highest_key;
  bool crowded_ = false;  // what is in that range did not fit into the scratch
};

}  // namespace detail
KVLEAN_NAMESPACE_END
