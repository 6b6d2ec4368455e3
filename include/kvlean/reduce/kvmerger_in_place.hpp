// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/apply/merge_rows.hpp"
#include "kvlean/core/byte_range.hpp"
#include "kvlean/core/concepts.hpp"
#include "kvlean/reduce/kvmerger_scan.hpp"

KVLEAN_NAMESPACE_BEGIN
namespace detail {

/// Whether sets can be merged into a cache's own rows as they are found, which is after the first
/// rows have been written: nothing may be left that could refuse the result, and a row's elements
/// must be neighbours. With `counts_are_known` heads may end with one length that is not an array.
[[nodiscard]] inline bool merges_in_place(const CacheView& cache, LogMass log_mass,
                                          bool counts_are_known) noexcept {
  const auto in_place = [](const Rows& rows) noexcept {
    return rows.writable && rows.store == nullptr && is_contiguous_row(rows);
  };
  const auto own = [&cache](const auto& values) noexcept {
    return !values || values.first != nullptr || values.stride != 0 || cache.segments == 1;
  };
  if (!in_place(cache.keys) || !in_place(cache.values)) return false;
  if (!own(cache.positions) || !own(cache.log_mass)) return false;
  if (log_mass != LogMass::none && !cache.log_mass) return false;
  if (!counts_are_known && cache.lengths == nullptr && cache.segments > 1) return false;
  for (u32 s = 0; s < cache.segments; ++s) {
    const u32 length = cache.length(s);
    if (hull(cache.keys, s, length).overlaps(hull(cache.values, s, length))) return false;
    for (u32 t = 0; t < cache.frozen; ++t) {
      if (cache.mass_bias(s, t) != cache.finite_mass_bias(s, t)) return false;
    }
  }
  return true;
}

/// Merges the sets of one segment in its own memory, in order: set by set into the next slot, whose
/// row no later set reads. The bits are those of a plan that is carried out: each set is a plan of
/// one slot.
class InPlaceMerger {
 public:
  /// Numbers of one task: as many as the segment has tokens.
  struct Scratch {
    u32* token = nullptr;
    float* weight = nullptr;
    float* value_weight = nullptr;
  };
  /// Keys of sets that were read just now need not be prefetched.
  InPlaceMerger(const CacheView& cache, const KeyRotation& rotation, u32 segment,
                const float* score, const SetWriter::Options& options, MergedKeys keys,
                ValueScale values, bool keys_are_near, const Scratch& scratch) noexcept
      : cache_(cache),
        s_(segment),
        length_(cache.length(segment)),
        score_(score),
        keys_are_near_(keys_are_near),
        scratch_(scratch),
        sets_(cache, rotation.rotation(), segment, options, nullptr),
        key_at_(cache.keys, segment),
        value_at_(cache.values, segment),
        ahead_(key_at_, &value_at_, length_),
        key_writer_(plan_, cache, rotation, segment),
        value_blender_(cache.values, segment) {
    plan_.segments = 1;
    plan_.needs = u32{needs_changed_values} | key_needs(keys);
    if (values == ValueScale::paper_set_size) {
      plan_.term_value_weight = scratch.value_weight;
    }
    const bool scaled = plan_.term_value_weight != nullptr;
    keys_ = merged_rows(cache.keys, segment, batch_.self, batch_.weight);
    keys_.blends = (plan_.needs & needs_moved_keys) != 0;
    values_ = merged_rows(cache.values, segment, scaled ? self_values_ : batch_.self,
                          scaled ? value_weights_ : batch_.weight);
    moves_keys_ = !keys_.blends || key_writer_.blends_rows();
    row_bytes_ = cache.keys.width * static_cast<u32>(size_bytes(cache.keys.dtype));
    lines_ = rows_are_lines(cache.keys, segment) && rows_are_lines(cache.values, segment);
  }
  InPlaceMerger(const InPlaceMerger&) = delete;
  InPlaceMerger& operator=(const InPlaceMerger&) = delete;

  [[nodiscard]] u32 slots() const noexcept { return slots_; }
  /// Rows that are to be prefetched: write() asks for those up to RowsAhead::lead.
  [[nodiscard]] RowsAhead& ahead() noexcept { return ahead_; }

  /// Writes the sets in [begin, end), whole sets; evicted ones, state 2, get no slot.
  void write(const u8* state, const u8* linked, u32 begin, u32 end) noexcept {
    if (end - begin > SetBatch::most_tokens) {
      for_each_set(begin, end, linked, [&](u32 from, u32 to) noexcept {
        if (state[from] != 2) write_set(from, to);
      });
      return;
    }
    batch_.find(score_, state, linked, begin, end);
    const u32 early = keys_are_near_ ? RowsAhead::lead * 5 / 8 : RowsAhead::lead * 3 / 8;
    batch_.weigh(cache_, sets_.rotation(), s_, key_at_, sets_.options(),
                 ahead_.take(end + early, most_fetched, fetched_));
    point_plan(batch_.pivot, batch_.self, batch_.term_begin, batch_.term_end, batch_.token,
               batch_.weight);
    if (plan_.term_value_weight != nullptr) batch_.scale(self_values_, value_weights_);
    merge_rows(end);
    if (cache_.positions || cache_.log_mass) {
      for (u32 i = 0; i < batch_.slots; ++i) write_arrays_of(i, slots_ + i);
    }
    slots_ += batch_.slots;
  }

  /// Once all sets are written: slot `from` becomes slot `to`, in ascending order.
  void move_slot(u32 from, u32 to) noexcept {
    if (from == to) return;
    copy_row(cache_.keys, s_, from, cache_.keys, s_, to);
    copy_row(cache_.values, s_, from, cache_.values, s_, to);
    if (cache_.positions) cache_.positions(s_, to) = cache_.positions(s_, from);
    if (cache_.log_mass) cache_.log_mass(s_, to) = cache_.log_mass(s_, from);
  }
  void finish() noexcept {
    if (streamed_) simd::merge_kernels().stream_end();
    streamed_ = false;
  }

 private:
  // Rows that are this far behind have left the first two caches.
  static constexpr std::size_t streamed_distance = std::size_t{2} << 20;
  static constexpr u32 most_tokens = SetBatch::most_tokens;
  static constexpr u32 most_fetched = 2 * most_tokens;

  void point_plan(u32* anchor, float* self, u64* term_begin, u64* term_end, u32* token,
                  float* weight) noexcept {
    plan_.anchor = anchor;
    plan_.self_weight = self;
    plan_.term_begin = term_begin;
    plan_.term_end = term_end;
    plan_.term_token = token;
    plan_.term_weight = weight;
  }

  /// One set by itself, however long.
  void write_set(u32 begin, u32 end) noexcept {
    point_plan(&anchor_, &self_, &term_begin_, &term_end_, scratch_.token, scratch_.weight);
    if (plan_.term_value_weight != nullptr) plan_.term_value_weight = scratch_.value_weight;
    u64 next_term = 0;
    plan_.log_mass = cache_.log_mass ? &log_mass_ : nullptr;
    plan_.self_value_weight = plan_.term_value_weight != nullptr ? &self_value_ : nullptr;
    sets_.write(find_pivot(score_, begin, end, nullptr), begin, end, nullptr, 0, next_term, plan_);
    write_key(0, slots_);
    if (value_changes(plan_, 0)) {
      value_blender_.write(value_weights(plan_, 0), cache_.values, slots_);
    } else {
      move(cache_.values, value_at_(anchor_), value_at_(slots_));
    }
    write_arrays(anchor_, slots_);
    ++slots_;
  }

  void write_key(u32 slot, u32 to) noexcept {
    if (key_writer_.changes(slot)) {
      key_writer_.write(slot, cache_.keys, to);
    } else {
      move(cache_.keys, key_at_(plan_.anchor[slot]), key_at_(to));
    }
  }
  static void move(const Rows& rows, const std::byte* from, std::byte* to) noexcept {
    if (from != to) std::memmove(to, from, rows.width * size_bytes(rows.dtype));
  }
  void write_arrays(u32 anchor, u32 to) noexcept {
    if (to < cache_.frozen) return;
    if (cache_.positions) cache_.positions(s_, to) = cache_.positions(s_, anchor);
    if (cache_.log_mass) cache_.log_mass(s_, to) = log_mass_;
  }

  void write_arrays_of(u32 i, u32 to) noexcept {
    if (cache_.log_mass) log_mass_ = sets_.mass_of(batch_, i);
    write_arrays(batch_.pivot[i], to);
  }

  /// The batch's rows of K and V, tokens before `end`.
  void merge_rows(u32 end) noexcept {
    if (batch_.slots == 0) return;
    simd::MergedRows rows[2];
    u32 num_rows = 0;
    const simd::RowPointers ahead = ahead_.take(end + RowsAhead::lead, most_fetched, fetched_);
    const u32 half = moves_keys_ ? ahead.count / 2 : 0;
    if (moves_keys_) {
      rows[num_rows] = keys_;
      rows[num_rows++].ahead = {ahead.row, half};
    } else {
      for (u32 i = 0; i < batch_.slots; ++i) write_key(i, slots_ + i);
    }
    rows[num_rows] = values_;
    rows[num_rows++].ahead = {ahead.row + half, ahead.count - half};
    const bool streams =
        lines_ && (batch_.pivot[0] - slots_) * std::size_t{row_bytes_} >= streamed_distance;
    streamed_ = streamed_ || streams;
    simd::merge_kernels().merge(rows, num_rows,
                                {batch_.pivot, batch_.term_begin, batch_.term_end, batch_.token}, 0,
                                batch_.slots, slots_, streams);
  }

  const CacheView& cache_;
  u32 s_;
  u32 length_;
  const float* score_;
  bool keys_are_near_;
  bool streamed_ = false;
  bool moves_keys_;  // as rows, with those of V
  bool lines_;       // all rows are whole lines of the caches
  u32 row_bytes_;    // of K
  u32 slots_ = 0;
  u32 anchor_ = 0;
  float self_ = 1.0f;
  float self_value_ = 1.0f;
  float log_mass_ = 0.0f;
  u64 term_begin_ = 0;
  u64 term_end_ = 0;
  Scratch scratch_;
  CompressionPlan plan_;  // of the set, or of the batch
  SetWriter sets_;
  RowAddresses key_at_;
  RowAddresses value_at_;
  RowsAhead ahead_;
  KeyWriter key_writer_;
  RowBlender value_blender_;
  SetBatch batch_;
  float self_values_[most_tokens];
  float value_weights_[most_tokens];
  const std::byte* fetched_[most_fetched];
  simd::MergedRows keys_;
  simd::MergedRows values_;
};

}  // namespace detail
KVLEAN_NAMESPACE_END
