// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/allocate/competition.hpp"

KVLEAN_NAMESPACE_BEGIN

namespace detail::allocation {

/// The global top-`slots` of runs of score keys that arrive one by one: a run, and its count, only
/// shrinks. Ties go to the lower run, not to the earlier one, so the order of arrival is forgotten.
/// Holds 4 bytes per key that is still in, and what its last arrivals need.
class RunningCut {
 public:
  /// Keys in runs[run] are keys[first .. first + kept), descending, so ties need no token.
  struct Run {
    u64 first;
    u32 kept;
    u32 arrived;  ///< unrelated to this run: which run was the place-in-the-array-th to arrive
  };

  RunningCut() noexcept = default;
  /// `runs` [count] zeroed; `keys` [capacity] for at most `slots` keys and the largest batch of
  /// runs between two calls of settle().
  RunningCut(Run* runs, u32 count, u32* keys, u64 capacity, u64 slots) noexcept
      : runs_(runs), count_(count), keys_(keys), capacity_(capacity), slots_(slots) {}

  [[nodiscard]] u32 kept(u32 run) const noexcept { return runs_[run].kept; }

  /// Makes sure that `keys` more fit. O(1), or one pass over the kept keys.
  void reserve(u64 keys) noexcept {
    if (capacity_ - end_ < keys) close_gaps();
    KVLEAN_ASSERT(capacity_ - end_ >= keys);
  }

  /// Adds the competing candidates of `entrant`, whose safe ones are known, as `run`.
  /// O(candidates), and O(m log m) for the m of them that reach the cut.
  void append(u32 run, const Entrant& entrant) noexcept {
    // Once all slots are taken, a key below the cut can never come in.
    const u32 least = kept_ >= slots_ ? cut_ : 0;
    u64 ties = entrant.safe_cut.ties;
    Run& mine = runs_[run];
    mine.first = end_;
    for (u32 i = 0; i < entrant.count; ++i) {
      const u32 key = entrant.key(i);
      if (key < least || key > entrant.safe_cut.key) continue;
      if (key == entrant.safe_cut.key && ties > 0) {
        --ties;
      } else {
        keys_[end_++] = key;
      }
    }
    std::sort(keys_ + mine.first, keys_ + end_, [](u32 a, u32 b) { return a > b; });
    mine.kept = static_cast<u32>(end_ - mine.first);
    runs_[arrivals_++].arrived = run;
    kept_ += mine.kept;
  }

  /// Drops what is beyond the slots: finds the key of the last slot bit by bit, then shortens every
  /// run to it. O(32 * runs * log(tokens)).
  void settle() noexcept {
    if (kept_ <= slots_) return;
    u32 cut = 0;
    for (u32 bit = 0x80000000u; bit != 0; bit >>= 1) {
      u64 reached = 0;
      for (u32 run = 0; run < count_; ++run) reached += reaching(run, cut | bit);
      if (reached >= slots_) cut |= bit;
    }
    u64 ties = slots_;
    for (u32 run = 0; run < count_; ++run) ties -= reaching(run, cut + 1);
    for (u32 run = 0; run < count_; ++run) {
      const u32 above = reaching(run, cut + 1);
      const u32 equal = reaching(run, cut) - above;
      const u32 tied = static_cast<u32>(std::min<u64>(equal, ties));
      runs_[run].kept = above + tied;
      ties -= tied;
    }
    kept_ = slots_;
    cut_ = cut;
  }

 private:
  // Keys of a run that are `key` or above.
  [[nodiscard]] u32 reaching(u32 run, u32 key) const noexcept {
    const u32* begin = keys_ + runs_[run].first;
    const u32* end = begin + runs_[run].kept;
    return static_cast<u32>(std::partition_point(begin, end, [key](u32 k) { return k >= key; }) -
                            begin);
  }

  // Runs lie in order of arrival, so none is moved over one that has not moved yet.
  void close_gaps() noexcept {
    end_ = 0;
    for (u32 i = 0; i < arrivals_; ++i) {
      Run& run = runs_[runs_[i].arrived];
      if (run.first != end_) {
        std::copy(keys_ + run.first, keys_ + run.first + run.kept, keys_ + end_);
      }
      run.first = end_;
      end_ += run.kept;
    }
  }

  Run* runs_ = nullptr;
  u32 count_ = 0;
  u32* keys_ = nullptr;
  u64 capacity_ = 0;
  u64 slots_ = 0;
  u64 end_ = 0;   // of the used part of keys_
  u64 kept_ = 0;  // keys that are in
  u32 cut_ = 0;   // lowest of them, once all slots are taken
  u32 arrivals_ = 0;
};

}  // namespace detail::allocation

KVLEAN_NAMESPACE_END
