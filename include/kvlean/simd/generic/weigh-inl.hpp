// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
// Weighted sums of rows, element by element.

inline void stream_row(const std::byte* from, std::byte* to, u32 bytes) noexcept {
  for (u32 at = 0; at < bytes; at += 64) stream_line(from + at, to + at);
}
/// `vectors` vectors of a weighted sum, `offset` bytes into the rows, which are of E; `out` is
/// there already. A constant number of terms, or `any_terms`: `terms` of them.
inline constexpr u32 any_terms = ~0u;
template <class E, u32 vectors, u32 fixed_terms, class T>
KVLEAN_SIMD_INLINE void weigh_block(const void* anchor, Vector self, const std::byte* const* row,
                                    const float* weight, u32 terms, std::size_t offset,
                                    bool streams, T* out) noexcept {
  const E* first = reinterpret_cast<const E*>(static_cast<const std::byte*>(anchor) + offset);
  Vector sum[vectors];
  KVLEAN_SIMD_UNROLL
  for (u32 c = 0; c < vectors; ++c) sum[c] = rounded_product(self, load(first + c * lanes));
  const u32 count = fixed_terms == any_terms ? terms : fixed_terms;
  for (u32 t = 0; t < count; ++t) {
    const E* x = reinterpret_cast<const E*>(row[t] + offset);
    const Vector w = set1(weight[t]);
    KVLEAN_SIMD_UNROLL
    for (u32 c = 0; c < vectors; ++c) {
      sum[c] = add(sum[c], rounded_product(w, load(x + c * lanes)));
    }
  }
  if (streams) {
    KVLEAN_SIMD_UNROLL
    for (u32 c = 0; c < vectors; ++c) stream(sum[c], out + c * lanes);
  } else {
    KVLEAN_SIMD_UNROLL
    for (u32 c = 0; c < vectors; ++c) store(sum[c], out + c * lanes);
  }
}

template <class E, u32 fixed_terms, class T>
KVLEAN_SIMD_INLINE void weigh_row(const void* anchor, float self_weight,
                                  const std::byte* const* row, const float* weight, u32 terms,
                                  std::size_t width, bool streams, T* out) noexcept {
  const Vector self = set1(self_weight);
  std::size_t column = 0;
  for (; column + weigh_vectors * lanes <= width; column += weigh_vectors * lanes) {
    weigh_block<E, weigh_vectors, fixed_terms>(anchor, self, row, weight, terms, column * sizeof(E),
                                               streams, out + column);
  }
  for (; column + lanes <= width; column += lanes) {
    weigh_block<E, 1, fixed_terms>(anchor, self, row, weight, terms, column * sizeof(E), streams,
                                   out + column);
  }
  if (column == width) return;
  const u32 rest = static_cast<u32>(width - column);
  Vector sum = rounded_product(self, load(static_cast<const E*>(anchor) + column, rest));
  for (u32 t = 0; t < terms; ++t) {
    const E* x = reinterpret_cast<const E*>(row[t]) + column;
    sum = add(sum, rounded_product(set1(weight[t]), load(x, rest)));
  }
  store(sum, out + column, rest);
}

template <class E, class T>
inline void weigh_of(const WeighedRows& rows, u32 width, bool streams, T* out) noexcept {
  weigh_row<E, any_terms>(rows.anchor, rows.self, rows.terms.row, rows.weight, rows.terms.count,
                          width, streams, out);
}

inline void weigh(const WeighedRows& rows, DType dtype, u32 width, bool as_float, bool streams,
                  void* out) noexcept {
  if (dtype == DType::f32) {
    weigh_of<float>(rows, width, streams, static_cast<float*>(out));
  } else if (dtype == DType::f16) {
    if (as_float) {
      weigh_of<f16>(rows, width, streams, static_cast<float*>(out));
    } else {
      weigh_of<f16>(rows, width, streams, static_cast<f16*>(out));
    }
  } else if (as_float) {
    weigh_of<bf16>(rows, width, streams, static_cast<float*>(out));
  } else {
    weigh_of<bf16>(rows, width, streams, static_cast<bf16*>(out));
  }
}

template <class E>
inline void add_weighed_of(RowPointers rows, const float* weight, u32 width, float* out) noexcept {
  u32 column = 0;
  for (; column + 4 * lanes <= width; column += 4 * lanes) {
    Vector sum[4];
    KVLEAN_SIMD_UNROLL
    for (u32 c = 0; c < 4; ++c) sum[c] = load(out + column + c * lanes);
    for (u32 t = 0; t < rows.count; ++t) {
      const E* row = reinterpret_cast<const E*>(rows.row[t]) + column;
      const Vector w = set1(weight[t]);
      KVLEAN_SIMD_UNROLL
      for (u32 c = 0; c < 4; ++c) {
        sum[c] = add(sum[c], rounded_product(w, load(row + c * lanes)));
      }
    }
    KVLEAN_SIMD_UNROLL
    for (u32 c = 0; c < 4; ++c) store(sum[c], out + column + c * lanes);
  }
  for (; column < width; column += lanes) {
    const u32 rest = width - column;
    Vector sum = load_part(out + column, 0, rest);
    for (u32 t = 0; t < rows.count; ++t) {
      const E* row = reinterpret_cast<const E*>(rows.row[t]) + column;
      sum = add(sum, rounded_product(set1(weight[t]), load_part(row, 0, rest)));
    }
    if (rest >= lanes) {
      store(sum, out + column);
    } else {
      store(sum, out + column, rest);
    }
  }
}

inline void add_weighed(RowPointers rows, const float* weight, DType dtype, u32 width,
                        float* sum) noexcept {
  if (dtype == DType::f32) {
    add_weighed_of<float>(rows, weight, width, sum);
  } else if (dtype == DType::f16) {
    add_weighed_of<f16>(rows, weight, width, sum);
  } else {
    add_weighed_of<bf16>(rows, weight, width, sum);
  }
}

inline void add_scaled(float* y, const float* x, float factor, u32 count) noexcept {
  const Vector f = set1(factor);
  u32 i = 0;
  for (; i + lanes <= count; i += lanes) {
    store(add(load(y + i), rounded_product(f, load(x + i))), y + i);
  }
  if (i == count) return;
  const u32 rest = count - i;
  store(add(load(y + i, rest), rounded_product(f, load(x + i, rest))), y + i, rest);
}

/// Stores `count` elements, at most a vector's.
template <class T>
inline void store_part(Vector a, T* p, u32 count) noexcept {
  if (count >= lanes) {
    store(a, p);
  } else {
    store(a, p, count);
  }
}
/// out = sum + weight * x, where `out` may be `sum`; null: zeros.
template <class E>
inline void add_row(const float* sum, const E* x, float weight, u32 width, float* out) noexcept {
  const Vector w = set1(weight);
  u32 i = 0;
  for (; i + 4 * lanes <= width; i += 4 * lanes) {
    Vector y[4];
    KVLEAN_SIMD_UNROLL
    for (u32 c = 0; c < 4; ++c) y[c] = sum != nullptr ? load(sum + i + c * lanes) : zero();
    KVLEAN_SIMD_UNROLL
    for (u32 c = 0; c < 4; ++c) y[c] = add(y[c], rounded_product(w, load(x + i + c * lanes)));
    KVLEAN_SIMD_UNROLL
    for (u32 c = 0; c < 4; ++c) store(y[c], out + i + c * lanes);
  }
  for (; i < width; i += lanes) {
    const u32 rest = width - i;
    const Vector y = sum != nullptr ? load_part(sum + i, 0, rest) : zero();
    store_part(add(y, rounded_product(w, load_part(x + i, 0, rest))), out + i, rest);
  }
}
/// out = self * anchor + (back + front), where `out` may be the anchor.
template <class E, class T>
inline void add_to_anchor(const E* anchor, float self, const float* back, const float* front,
                          u32 width, T* out) noexcept {
  const Vector s = set1(self);
  u32 i = 0;
  for (; i + 4 * lanes <= width; i += 4 * lanes) {
    Vector y[4];
    KVLEAN_SIMD_UNROLL
    for (u32 c = 0; c < 4; ++c) {
      const u32 at = i + c * lanes;
      y[c] = add(rounded_product(s, load(anchor + at)), add(load(back + at), load(front + at)));
    }
    KVLEAN_SIMD_UNROLL
    for (u32 c = 0; c < 4; ++c) store(y[c], out + i + c * lanes);
  }
  for (; i < width; i += lanes) {
    const u32 rest = width - i;
    const Vector sum = add(load_part(back + i, 0, rest), load_part(front + i, 0, rest));
    store_part(add(rounded_product(s, load_part(anchor + i, 0, rest)), sum), out + i, rest);
  }
}

/// The rows of E that windows are over.
template <class E>
struct WindowSource {
  const WindowedRows& rows;
  float* loaded;  ///< room for a row

  [[nodiscard]] const E* at(u32 token) const noexcept {
    if constexpr (std::is_same_v<E, float>) {
      if (rows.load != nullptr) {
        rows.load(rows.source, token, loaded);
        return loaded;
      }
    }
    return reinterpret_cast<const E*>(rows.from.at(token));
  }
  void add_term(u64 term, const float* sum, float* out) const noexcept {
    add_row(sum, at(rows.slots.token[term]), rows.weight[term], rows.width, out);
  }
};

/// The term before which [begin, end) is cut.
[[nodiscard]] inline u64 window_cut(u64 begin, u64 end) noexcept {
  return begin != 0 ? (end - 1) & ~(std::bit_floor((begin - 1) ^ (end - 1)) - 1) : 0;
}

/// The sum of a slot's terms before the cut; those of the slots that follow are found on the way.
template <class E>
inline const float* back_sum(const WindowSource<E>& source, WindowSums& sums, u64 slot) noexcept {
  const WindowedRows& rows = source.rows;
  const u64* term_begin = rows.slots.term_begin;
  const u32 width = rows.width;
  const auto row = [&](u32 i) noexcept { return sums.floats + std::size_t{width} * (i + 2); };
  const u64 begin = term_begin[slot];
  u32& count = sums.num_backs;
  while (count != 0 && sums.back_begin[count - 1] < begin) --count;
  if (count != 0 && sums.back_begin[count - 1] == begin) return row(count - 1);
  const u32 room = WindowSums::room / width - 2;
  const u32 most = room < WindowSums::most_backs ? room : WindowSums::most_backs;
  u64 wanted[WindowSums::most_backs] = {begin};
  u32 last = 0;
  for (u64 next = slot + 1; last + 1 < most && next < rows.end; ++next) {
    const u64 at = term_begin[next];
    if (at < wanted[last] || at >= sums.cut) break;
    if (at != wanted[last]) wanted[++last] = at;
  }
  u64 term = sums.cut;
  const float* sum = nullptr;
  for (count = 0; count <= last; ++count) {
    for (const u64 to = wanted[last - count]; term != to; sum = row(count)) {
      source.add_term(--term, sum, row(count));
    }
    sums.back_begin[count] = term;
  }
  return sum;
}

/// Makes the two parts of a slot's sum.
template <class E>
inline void move_window(const WindowSource<E>& source, WindowSums& sums, u64 slot) noexcept {
  const u64 begin = source.rows.slots.term_begin[slot];
  const u64 end = source.rows.slots.term_end[slot];
  if (begin == sums.begin && end == sums.end) return;
  float* zeros = sums.floats + source.rows.width;
  if (sums.cut == WindowSums::none) std::fill_n(zeros, source.rows.width, 0.0f);
  sums.begin = begin;
  sums.end = end;
  const u64 cut = window_cut(begin, end);
  float* front = sums.floats;
  if (cut != sums.cut) sums.num_backs = 0;
  if (cut != sums.cut || end < sums.front_end) {
    source.add_term(cut, nullptr, front);
    sums.front_end = cut + 1;
  }
  sums.cut = cut;
  while (sums.front_end != end) source.add_term(sums.front_end++, front, front);
  sums.back = begin != cut ? back_sum(source, sums, slot) : zeros;
}

/// Prefetches the anchors of 16 slots and the terms that are new in them.
template <class E>
inline void fetch_windows(const WindowSource<E>& source, u64 begin) noexcept {
  const WindowedRows& rows = source.rows;
  if (rows.load != nullptr || begin >= rows.end) return;
  const u32 bytes = rows.width * static_cast<u32>(sizeof(E));
  const u64 end = rows.end - begin < 16 ? rows.end : begin + 16;
  for (u64 slot = begin; slot < end; ++slot) {
    fetch_row(rows.from.at(rows.slots.anchor[slot]), bytes);
  }
  for (u64 term = rows.slots.term_end[begin - 1]; term < rows.slots.term_end[end - 1]; ++term) {
    fetch_row(rows.from.at(rows.slots.token[term]), bytes);
  }
}

template <class E, class T>
inline void add_windows_of(const WindowedRows& rows, WindowSums& sums, u64 begin, u64 end,
                           const RowPlaces& out, u32 to) noexcept {
  constexpr u64 ahead = 16;
  float loaded[std::is_same_v<E, float> ? max_row_width : 1];
  const WindowSource<E> source{rows, loaded};
  for (u64 slot = begin; slot < end; ++slot) {
    if ((slot - begin) % ahead == 0 && slot + 1 != end) fetch_windows(source, slot + ahead);
    const u32 anchor = rows.slots.anchor[slot];
    move_window(source, sums, slot);
    add_to_anchor(source.at(anchor), rows.self != nullptr ? rows.self[slot] : 1.0f, sums.back,
                  sums.floats, rows.width,
                  reinterpret_cast<T*>(out.at(to + static_cast<u32>(slot - begin))));
  }
}

inline void add_windows(const WindowedRows& rows, WindowSums& sums, u64 begin, u64 end,
                        const RowPlaces& out, u32 to, bool as_float) noexcept {
  if (rows.dtype == DType::f32) {
    add_windows_of<float, float>(rows, sums, begin, end, out, to);
  } else if (rows.dtype == DType::f16) {
    if (as_float) {
      add_windows_of<f16, float>(rows, sums, begin, end, out, to);
    } else {
      add_windows_of<f16, f16>(rows, sums, begin, end, out, to);
    }
  } else if (as_float) {
    add_windows_of<bf16, float>(rows, sums, begin, end, out, to);
  } else {
    add_windows_of<bf16, bf16>(rows, sums, begin, end, out, to);
  }
}

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

inline void stream_done() noexcept { stream_end(); }
