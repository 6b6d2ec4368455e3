// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/allocate/competition.hpp"

KVLEAN_NAMESPACE_BEGIN

namespace detail::allocation {

/// The global top-`slots` of runs of scores that arrive one by one: a run, and its count, only
/// shrinks. Ties go to the lower run, not to the earlier one, so the order of arrival is forgotten.
/// Holds 4 bytes per score that is still in, and what its last arrivals need.
class RunningCut {
 public:
  /// The best `kept` of the scores at first, in no order. Those that are out stay there until the
  /// next close_gaps(); they reach no later cut, or lose to the same ties again.
  struct Run {
    u64 first;
    u32 count;
    u32 kept;
    u32 equal;    ///< scores at the last cut, of which some are kept
    u32 arrived;  ///< unrelated to this run: which run was the place-in-the-array-th to arrive
  };

  RunningCut() noexcept = default;
  /// `runs` [count] zeroed; `entrants` [count]; `scores` [capacity] for at most `slots` scores and
  /// the largest batch of runs between two calls of settle(); `scratch` for as many scores.
  RunningCut(Run* runs, Entrant* entrants, u32 count, float* scores, u64 capacity, u64 slots,
             const CutScratch& scratch) noexcept
      : runs_(runs),
        entrants_(entrants),
        count_(count),
        scores_(scores),
        capacity_(capacity),
        slots_(slots),
        scratch_(scratch) {}

  [[nodiscard]] u32 kept(u32 run) const noexcept { return runs_[run].kept; }

  /// Makes sure that `scores` more fit. O(1), or one pass over the kept scores.
  void reserve(u64 scores) noexcept {
    if (capacity_ - end_ < scores) close_gaps();
    KVLEAN_ASSERT(capacity_ - end_ >= scores);
  }

  /// Adds the candidates of `entrant` but for its `safe` best as `run`. O(candidates).
  void append(u32 run, const Entrant& entrant, u32 safe) noexcept {
    const simd::SelectKernels& kernels = simd::select_kernels();
    const KeyCut safe_cut = CutSearch({&entrant, 1}, safe, scratch_).find();
    // Once all slots are taken, a score below the cut can never come in.
    const u32 least = kept_ >= slots_ ? cut_ : 0;
    Run& mine = runs_[run];
    mine.first = end_;
    if (safe_cut.key > std::max<u32>(least, 1)) {
      take(entrant.scores, entrant.count, entrant.weight, std::max<u32>(least, 1), safe_cut.key);
    }
    if (safe != 0 && safe_cut.key >= least) {
      repeat(safe_cut.key, entrant.count_at_least(kernels, safe_cut.key) - safe);
    }
    if (least == 0 && safe_cut.key > 0) {
      repeat(0, entrant.count - entrant.count_at_least(kernels, 1));
    }
    mine.count = mine.kept = static_cast<u32>(end_ - mine.first);
    runs_[arrivals_++].arrived = run;
    kept_ += mine.kept;
  }

  /// Drops what is beyond the slots. O(scores that are in, or were before the last gap was closed).
  void settle() noexcept {
    if (kept_ <= slots_) return;
    for (u32 i = 0; i < arrivals_; ++i) {
      const Run& run = runs_[run_of(i)];
      entrants_[i] = {scores_ + run.first, run.count, 1.0f, 0};
    }
    CutSearch search({entrants_, arrivals_}, slots_, scratch_);
    search.start_from(cut_);
    const KeyCut cut = search.find();
    cut_ = cut.key;
    kept_ = slots_;
    // Ties go by run, and entrants are in order of arrival.
    for (u32 i = 0; i < arrivals_; ++i) {
      Run& run = runs_[run_of(i)];
      run.kept = static_cast<u32>(search.above_cut(i));
      run.equal = static_cast<u32>(search.reaching_cut(i)) - run.kept;
    }
    u64 ties = cut.ties;
    for (u32 r = 0; r < count_; ++r) {
      const u32 tied = static_cast<u32>(std::min<u64>(runs_[r].equal, ties));
      runs_[r].kept += tied;
      ties -= tied;
    }
  }

 private:
  [[nodiscard]] u32 run_of(u32 arrival) const noexcept { return runs_[arrival].arrived; }
  /// Appends the scores times `weight` whose keys are in [least, bound).
  void take(const float* scores, u32 count, float weight, u32 least, u32 bound) noexcept {
    const u32 room = static_cast<u32>(std::min<u64>(capacity_ - end_, count));
    end_ += simd::select_kernels()
                .collect(scores, count, weight, score_of_key(least), score_of_key(bound),
                         scores_ + end_, room)
                .inside;
  }
  void repeat(u32 key, u32 count) noexcept {
    const float score = key != 0 ? score_of_key(key) : std::numeric_limits<float>::quiet_NaN();
    std::fill_n(scores_ + end_, count, score);
    end_ += count;
  }

  // Runs lie in order of arrival, so none is moved over one that has not moved yet.
  void close_gaps() noexcept {
    end_ = 0;
    for (u32 i = 0; i < arrivals_; ++i) {
      Run& run = runs_[run_of(i)];
      const float* scores = scores_ + run.first;
      run.first = end_;
      if (run.kept == run.count) {
        if (scores != scores_ + end_) std::copy(scores, scores + run.count, scores_ + end_);
        end_ += run.count;
        continue;
      }
      take(scores, run.count, 1.0f, cut_ + 1, 0xffffffffu);
      repeat(cut_, run.kept - static_cast<u32>(end_ - run.first));
      run.count = run.kept;
    }
  }

  Run* runs_ = nullptr;
  Entrant* entrants_ = nullptr;
  u32 count_ = 0;
  float* scores_ = nullptr;
  u64 capacity_ = 0;
  u64 slots_ = 0;
  CutScratch scratch_;
  u64 end_ = 0;   // of the used part of scores_
  u64 kept_ = 0;  // scores that are in
  u32 cut_ = 0;   // key of the lowest of them, once all slots are taken
  u32 arrivals_ = 0;
};

}  // namespace detail::allocation

KVLEAN_NAMESPACE_END
