// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/apply/fold.hpp"
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
        key_writer_(plan_, cache, rotation, segment),
        value_blender_(cache.values, segment) {
    plan_.segments = 1;
    plan_.needs = u32{needs_changed_values} | key_needs(keys);
    if (values == ValueScale::paper_set_size) {
      plan_.term_value_weight = scratch.value_weight;
    }
  }
  InPlaceMerger(const InPlaceMerger&) = delete;
  InPlaceMerger& operator=(const InPlaceMerger&) = delete;

  [[nodiscard]] u32 slots() const noexcept { return slots_; }

  /// Writes the sets in [begin, end), whole sets; evicted ones, state 2, get no slot.
  void write(const u8* state, const u8* linked, u32 begin, u32 end) noexcept {
    if (end - begin > SetBatch::most_tokens) {
      for_each_set(begin, end, linked, [&](u32 from, u32 to) noexcept {
        if (state[from] != 2) write_set(from, to);
      });
      return;
    }
    batch_.find(score_, state, linked, begin, end);
    const u32 next = keys_are_near_ ? end + (end - begin) / 2 : end;
    batch_.weigh(cache_, sets_.rotation(), s_, key_at_, sets_.options(), next,
                 std::min(2 * end - begin, length_));
    point_plan(batch_.pivot, batch_.self, batch_.term_begin, batch_.term_end, batch_.token,
               batch_.weight);
    if (plan_.term_value_weight != nullptr) scale_values();
    // Rows ahead are asked for bit by bit, so that memory is never idle: the cores can wait for
    // few.
    const u32 half = (end - begin) / 2;
    const u32 rest = end - begin - half;
    const bool scaled = plan_.term_value_weight != nullptr;
    if (key_writer_.blends_rows()) {
      merge_rows(cache_.keys, key_at_, batch_.self, batch_.weight, value_at_, end, half);
    } else {
      for (u32 i = 0; i < batch_.slots; ++i) write_key(i, slots_ + i);
    }
    merge_rows(cache_.values, value_at_, scaled ? self_values_ : batch_.self,
               scaled ? value_weights_ : batch_.weight, value_at_, end + half, rest);
    for (u32 i = 0; i < batch_.slots; ++i, ++slots_) {
      if (cache_.log_mass)
        log_mass_ =
            sets_.mass_of(batch_.pivot[i], batch_.self[i], batch_.token + batch_.term_begin[i],
                          batch_.weight + batch_.term_begin[i],
                          static_cast<u32>(batch_.term_end[i] - batch_.term_begin[i]));
      write_arrays(batch_.pivot[i]);
    }
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
    write_arrays(anchor_);
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
  void write_arrays(u32 anchor) noexcept {
    if (slots_ < cache_.frozen) return;
    if (cache_.positions) cache_.positions(s_, slots_) = cache_.positions(s_, anchor);
    if (cache_.log_mass) cache_.log_mass(s_, slots_) = log_mass_;
  }

  /// The batch's rows of K or of V, while `ahead` rows from token `next` on are prefetched: those
  /// of V, or of K where nothing reads it before.
  void merge_rows(const Rows& rows, const RowAddresses& at, const float* self, const float* weight,
                  const RowAddresses& fetch, u32 next, u32 ahead) noexcept {
    const std::byte* terms[most_tokens];
    const std::byte* fetched[most_tokens];
    for (u32 t = 0; t < batch_.terms; ++t) terms[t] = at(batch_.token[t]);
    std::uintptr_t places = 0;
    for (u32 i = 0; i < batch_.slots; ++i) {
      const u64 first = batch_.term_begin[i];
      out_[i] = at(slots_ + i);
      places |= reinterpret_cast<std::uintptr_t>(out_[i]);
      simd::WeighedRows& sum = sums_[i];
      sum.anchor = at(batch_.pivot[i]);
      sum.self = self[i];
      sum.terms = {terms + first, static_cast<u32>(batch_.term_end[i] - first)};
      sum.weight = weight + first;
    }
    ahead = next < length_ ? std::min(ahead, length_ - next) : 0;
    for (u32 i = 0; i < ahead; ++i) fetched[i] = fetch(next + i);
    // Rows go past the caches that were not read lately and are whole lines of them.
    const std::size_t bytes = rows.width * size_bytes(rows.dtype);
    const bool streams = batch_.slots != 0 && places % 64 == 0 && bytes % 64 == 0 &&
                         (batch_.pivot[0] - slots_) * bytes >= streamed_distance;
    streamed_ = streamed_ || streams;
    simd::merge_kernels().weigh_all(sums_, batch_.slots, rows.dtype, rows.width, {fetched, ahead},
                                    streams, out_);
  }
  /// Values of n members weigh n times as much.
  void scale_values() noexcept {
    for (u32 i = 0; i < batch_.slots; ++i) {
      const u64 end = batch_.term_end[i];
      const float size = static_cast<float>(end - batch_.term_begin[i] + 1);
      self_values_[i] = batch_.self[i] * size;
      for (u64 t = batch_.term_begin[i]; t < end; ++t) value_weights_[t] = batch_.weight[t] * size;
    }
  }

  const CacheView& cache_;
  u32 s_;
  u32 length_;
  const float* score_;
  bool keys_are_near_;
  bool streamed_ = false;
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
  KeyWriter key_writer_;
  RowBlender value_blender_;
  SetBatch batch_;
  float self_values_[most_tokens];
  float value_weights_[most_tokens];
  simd::WeighedRows sums_[most_tokens];
  std::byte* out_[most_tokens];
};

}  // namespace detail
KVLEAN_NAMESPACE_END
