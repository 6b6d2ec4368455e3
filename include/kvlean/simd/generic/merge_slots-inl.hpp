// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
// Slots whose terms are their own, as KVMerger's: blended, or copied, to their places at once.

[[nodiscard]] inline u64 count_terms(const MergedSlots& slots, u64 slot) noexcept {
  return slots.term_begin != nullptr ? slots.term_end[slot] - slots.term_begin[slot] : 0;
}

/// Some slots by the number of their terms, so that branches on it are foreseen.
struct SlotGroups {
  static constexpr u32 most_slots = 64;
  static constexpr u32 most_terms = 192;
  u32 copies = 0;
  u32 pairs = 0;  ///< of one term
  u32 others = 0;
  u8 copy[most_slots + 1];
  u8 pair[most_slots + 1];
  u8 other[most_slots + 1];

  void find(const MergedRows& rows, const MergedSlots& slots, u64 begin, u32 number) noexcept {
    const bool terms = rows.blends && slots.term_begin != nullptr;
    const float* self = rows.blends ? rows.self : nullptr;
    u32 count[3] = {};
    for (u32 i = 0; i < number; ++i) {
      const u64 mine = terms ? slots.term_end[begin + i] - slots.term_begin[begin + i] : 0;
      const bool scaled = self != nullptr && std::bit_cast<u32>(self[begin + i]) != one_bits;
      const u32 is_copy = u32{mine == 0} & u32{!scaled};
      const u32 is_pair = u32{mine == 1};
      copy[count[0]] = pair[count[1]] = other[count[2]] = static_cast<u8>(i);
      count[0] += is_copy;
      count[1] += is_pair;
      count[2] += 1 - is_copy - is_pair;
    }
    copies = count[0];
    pairs = count[1];
    others = count[2];
  }

 private:
  static constexpr u32 one_bits = 0x3f800000;
};

/// Rows by token. Holds what it needs itself, so that stores to rows can't change it.
class RowsAt {
 public:
  explicit RowsAt(const RowPlaces& places) noexcept
      : data_(places.data),
        stride_(places.stride),
        places_(places.order != nullptr || places.page_table != nullptr ? &places : nullptr) {}
  [[nodiscard]] std::byte* operator()(u32 token) const noexcept {
    return places_ == nullptr ? data_ + static_cast<i64>(token) * stride_ : places_->at(token);
  }

 private:
  std::byte* data_;
  i64 stride_;
  const RowPlaces* places_;
};

inline void copy_row(const std::byte* from, std::byte* to, std::size_t bytes,
                     bool streams) noexcept {
  if (streams || bytes % 256 != 0) {
    move_bytes(from, to, bytes, streams);
    return;
  }
  for (std::size_t at = 0; at < bytes; at += 256) {
    Block block[4];
    KVLEAN_SIMD_UNROLL
    for (u32 i = 0; i < 4; ++i) block[i] = load_block(from + at + i * 64);
    KVLEAN_SIMD_UNROLL
    for (u32 i = 0; i < 4; ++i) store_block(block[i], to + at + i * 64);
  }
}

/// Slots of a tensor that are all read before any of their rows is written, up to most_slots of
/// them with up to most_terms terms.
template <class E>
inline void merge_apart(const MergedRows& rows, const MergedSlots& slots, const SlotGroups& groups,
                        u64 begin, u32 number, u32 to, bool streams) noexcept {
  const std::size_t width = rows.width;
  const std::size_t bytes = width * sizeof(E);
  const RowsAt from(rows.from);
  const RowsAt target(rows.to);
  const u32* anchor = slots.anchor + begin;
  const RowPointers ahead = rows.ahead;
  const u32 step = (ahead.count + number - 1) / number;
  u32 fetched = 0;
  const auto fetch = [&]() noexcept {
    const u32 end = fetched + step < ahead.count ? fetched + step : ahead.count;
    for (; fetched < end; ++fetched) fetch_row(ahead.row[fetched], static_cast<u32>(bytes));
  };
  for (u32 i = 0; i < groups.copies; ++i) {
    fetch();
    const u32 slot = groups.copy[i];
    const std::byte* source = from(anchor[slot]);
    std::byte* out = target(to + slot);
    if (source != out) copy_row(source, out, bytes, streams);
  }
  const float* self = rows.self != nullptr ? rows.self + begin : nullptr;
  const u64* first_term = slots.term_begin != nullptr ? slots.term_begin + begin : nullptr;
  for (u32 i = 0; i < groups.pairs; ++i) {
    fetch();
    const u32 slot = groups.pair[i];
    const u64 term = first_term[slot];
    const std::byte* row = from(slots.token[term]);
    weigh_row<E, 1>(from(anchor[slot]), self != nullptr ? self[slot] : 1.0f, &row,
                    rows.weight + term, 1, width, streams, reinterpret_cast<E*>(target(to + slot)));
  }
  for (u32 i = 0; i < groups.others; ++i) {
    fetch();
    const u32 slot = groups.other[i];
    const u64 term = first_term != nullptr ? first_term[slot] : 0;
    const u32 terms = static_cast<u32>(count_terms(slots, begin + slot));
    const std::byte* row[SlotGroups::most_terms];
    for (u32 t = 0; t < terms; ++t) row[t] = from(slots.token[term + t]);
    weigh_row<E, any_terms>(from(anchor[slot]), self != nullptr ? self[slot] : 1.0f, row,
                            rows.weight + term, terms, width, streams,
                            reinterpret_cast<E*>(target(to + slot)));
  }
}

/// One slot of a tensor, whatever it reads and however long it is.
template <class E>
inline void merge_slot(const MergedRows& rows, const MergedSlots& slots, u64 slot, u32 to,
                       bool streams) noexcept {
  const std::size_t bytes = rows.width * sizeof(E);
  const std::byte* anchor = rows.from.at(slots.anchor[slot]);
  std::byte* target = rows.to.at(to);
  for (u32 i = 0; i < rows.ahead.count; ++i) {
    fetch_row(rows.ahead.row[i], static_cast<u32>(bytes));
  }
  const float self = rows.blends && rows.self != nullptr ? rows.self[slot] : 1.0f;
  u64 terms = rows.blends ? count_terms(slots, slot) : 0;
  if (terms == 0 && self == 1.0f) {
    if (anchor != target) move_bytes(anchor, target, bytes, streams);
    return;
  }
  const u64 first = terms != 0 ? slots.term_begin[slot] : 0;
  const u32* token = slots.token + first;
  const float* weight = rows.weight + first;
  const std::byte* row[SlotGroups::most_terms];
  const auto point = [&](u32 count) noexcept {
    for (u32 t = 0; t < count; ++t) row[t] = rows.from.at(token[t]);
  };
  if (terms <= SlotGroups::most_terms) {
    point(static_cast<u32>(terms));
    weigh_row<E, any_terms>(anchor, self, row, weight, static_cast<u32>(terms), rows.width, streams,
                            reinterpret_cast<E*>(target));
    return;
  }
  float sum[max_row_width];
  weigh_row<E, any_terms>(anchor, self, row, weight, 0, rows.width, false, sum);
  while (terms != 0) {
    const u32 count =
        terms < SlotGroups::most_terms ? static_cast<u32>(terms) : SlotGroups::most_terms;
    point(count);
    add_weighed_of<E>({row, count}, weight, rows.width, sum);
    token += count;
    weight += count;
    terms -= count;
  }
  weigh_row<float, any_terms>(sum, 1.0f, row, weight, 0, rows.width, false,
                              reinterpret_cast<E*>(target));
}

/// Slots of a tensor, by `groups` where they are apart, otherwise one.
template <class E>
inline void merge_some(const MergedRows& rows, const MergedSlots& slots, const SlotGroups* groups,
                       u64 begin, u32 number, u32 to, bool streams) noexcept {
  if (groups != nullptr) {
    merge_apart<E>(rows, slots, *groups, begin, number, to, streams);
  } else {
    merge_slot<E>(rows, slots, begin, to, streams);
  }
}

inline void merge_slots(const MergedRows* rows, u32 num_rows, const MergedSlots& slots, u64 begin,
                        u64 end, u32 to, bool streams) noexcept {
  u64 done = begin;
  while (done < end) {
    const u32 row = to + static_cast<u32>(done - begin);
    u32 number =
        end - done < SlotGroups::most_slots ? static_cast<u32>(end - done) : SlotGroups::most_slots;
    u32 lowest = slots.anchor[done];
    bool apart = true;
    if (slots.term_begin != nullptr) {
      const u64 first = slots.term_begin[done];
      while (number > 1 && slots.term_end[done + number - 1] - first > SlotGroups::most_terms) {
        number /= 2;
      }
      apart = slots.term_end[done + number - 1] - first <= SlotGroups::most_terms;
      if (count_terms(slots, done) != 0 && slots.token[first] < lowest) lowest = slots.token[first];
    }
    apart = apart && lowest >= row + number;
    if (!apart) number = 1;
    SlotGroups groups;
    for (u32 r = 0; r < num_rows; ++r) {
      MergedRows some = rows[r];
      // Tensors mostly have the same groups.
      if (apart && (r == 0 || some.blends != rows[r - 1].blends || some.self != rows[r - 1].self)) {
        groups.find(some, slots, done, number);
      }
      // What is fetched is spread over all slots.
      if (number != end - begin && some.ahead.count != 0) {
        const auto place = [&](u64 slot) noexcept {
          return static_cast<u32>(rows[r].ahead.count * (slot - begin) / (end - begin));
        };
        some.ahead.row += place(done);
        some.ahead.count = place(done + number) - place(done);
      }
      const SlotGroups* known = apart ? &groups : nullptr;
      if (some.dtype == DType::f32) {
        merge_some<float>(some, slots, known, done, number, row, streams);
      } else if (some.dtype == DType::f16) {
        merge_some<f16>(some, slots, known, done, number, row, streams);
      } else {
        merge_some<bf16>(some, slots, known, done, number, row, streams);
      }
    }
    done += number;
  }
}
