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

template <class E, class T>
inline void add_parts_of(const WeighedRows& rows, u32 width, T* out) noexcept {
  const E* anchor = static_cast<const E*>(rows.anchor);
  const Vector self = set1(rows.self);
  u32 column = 0;
  for (; column + 4 * lanes <= width; column += 4 * lanes) {
    Vector sum[4];
    KVLEAN_SIMD_UNROLL
    for (u32 c = 0; c < 4; ++c) {
      sum[c] = rounded_product(self, load(anchor + column + c * lanes));
    }
    for (u32 t = 0; t < rows.terms.count; ++t) {
      const float* row = reinterpret_cast<const float*>(rows.terms.row[t]) + column;
      KVLEAN_SIMD_UNROLL
      for (u32 c = 0; c < 4; ++c) sum[c] = add(sum[c], load(row + c * lanes));
    }
    KVLEAN_SIMD_UNROLL
    for (u32 c = 0; c < 4; ++c) store(sum[c], out + column + c * lanes);
  }
  for (; column < width; column += lanes) {
    const u32 rest = width - column;
    Vector sum = rounded_product(self, load_part(anchor + column, 0, rest));
    for (u32 t = 0; t < rows.terms.count; ++t) {
      const float* row = reinterpret_cast<const float*>(rows.terms.row[t]) + column;
      sum = add(sum, load_part(row, 0, rest));
    }
    if (rest >= lanes) {
      store(sum, out + column);
    } else {
      store(sum, out + column, rest);
    }
  }
}

inline void add_parts(const WeighedRows& rows, DType dtype, u32 width, bool as_float,
                      void* out) noexcept {
  if (dtype == DType::f32) {
    add_parts_of<float>(rows, width, static_cast<float*>(out));
  } else if (dtype == DType::f16) {
    if (as_float) {
      add_parts_of<f16>(rows, width, static_cast<float*>(out));
    } else {
      add_parts_of<f16>(rows, width, static_cast<f16*>(out));
    }
  } else if (as_float) {
    add_parts_of<bf16>(rows, width, static_cast<float*>(out));
  } else {
    add_parts_of<bf16>(rows, width, static_cast<bf16*>(out));
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

[[nodiscard]] inline u64 count_terms(const MergedSlots& slots, u64 slot) noexcept {
  return slots.term_begin != nullptr ? slots.term_end[slot] - slots.term_begin[slot] : 0;
}

/// Some slots by the number of their terms, so that branches on it are foreseen.
struct SlotGroups {
  static constexpr u32 most_slots = 64;
  static constexpr u32 most_terms = 192;
  static constexpr u32 groups = 4;  ///< copies; no, one, more terms
  u32 count[groups] = {};
  u8 slot[groups][most_slots + 1];

  SlotGroups(const MergedRows& rows, const MergedSlots& slots, u64 begin, u32 number) noexcept {
    for (u32 i = 0; i < number; ++i) {
      const u64 terms = rows.blends ? count_terms(slots, begin + i) : 0;
      const bool scaled = rows.blends && rows.self != nullptr && rows.self[begin + i] != 1.0f;
      const u32 group = static_cast<u32>(terms < 2 ? terms : 2) + (scaled || terms != 0 ? 1u : 0u);
      slot[group][count[group]++] = static_cast<u8>(i);
    }
  }
};

/// Slots of a tensor that are all read before any of their rows is written, up to most_slots of
/// them with up to most_terms terms.
template <class E>
inline void merge_apart(const MergedRows& rows, const MergedSlots& slots, u64 begin, u32 number,
                        u32 to, bool streams) noexcept {
  const std::size_t width = rows.width;
  const std::size_t bytes = width * sizeof(E);
  const SlotGroups groups(rows, slots, begin, number);
  u32 fetched = 0;
  const u32 step = (rows.ahead.count + number - 1) / number;
  const auto fetch = [&]() noexcept {
    for (u32 i = 0; i < step && fetched < rows.ahead.count; ++i) {
      fetch_row(rows.ahead.row[fetched++], static_cast<u32>(bytes));
    }
  };
  for (u32 i = 0; i < groups.count[0]; ++i) {
    fetch();
    const u32 slot = groups.slot[0][i];
    const std::byte* source = rows.from.at(slots.anchor[begin + slot]);
    std::byte* target = rows.to.at(to + slot);
    if (source != target) move_bytes(source, target, bytes, streams);
  }
  if (groups.count[0] == number) return;
  const u64 first = slots.term_begin != nullptr ? slots.term_begin[begin] : 0;
  const std::byte* row[SlotGroups::most_terms];
  if (slots.term_begin != nullptr) {
    const u32 terms = static_cast<u32>(slots.term_end[begin + number - 1] - first);
    for (u32 t = 0; t < terms; ++t) row[t] = rows.from.at(slots.token[first + t]);
  }
  for (u32 group = 1; group < SlotGroups::groups; ++group) {
    for (u32 i = 0; i < groups.count[group]; ++i) {
      fetch();
      const u64 slot = begin + groups.slot[group][i];
      const void* anchor = rows.from.at(slots.anchor[slot]);
      const float self = rows.self != nullptr ? rows.self[slot] : 1.0f;
      E* out = reinterpret_cast<E*>(rows.to.at(to + groups.slot[group][i]));
      const u64 term = slots.term_begin != nullptr ? slots.term_begin[slot] : 0;
      if (group == 2) {
        weigh_row<E, 1>(anchor, self, row + (term - first), rows.weight + term, 1, width, streams,
                        out);
      } else {
        weigh_row<E, any_terms>(anchor, self, row + (term - first), rows.weight + term,
                                static_cast<u32>(count_terms(slots, slot)), width, streams, out);
      }
    }
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

template <class E>
inline void merge_some(const MergedRows& rows, const MergedSlots& slots, u64 begin, u32 number,
                       bool apart, u32 to, bool streams) noexcept {
  if (apart) {
    merge_apart<E>(rows, slots, begin, number, to, streams);
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
    for (u32 r = 0; r < num_rows; ++r) {
      MergedRows some = rows[r];
      // What is fetched is spread over all slots.
      if (number != end - begin && some.ahead.count != 0) {
        const auto place = [&](u64 slot) noexcept {
          return static_cast<u32>(rows[r].ahead.count * (slot - begin) / (end - begin));
        };
        some.ahead.row += place(done);
        some.ahead.count = place(done + number) - place(done);
      }
      if (some.dtype == DType::f32) {
        merge_some<float>(some, slots, done, number, apart, row, streams);
      } else if (some.dtype == DType::f16) {
        merge_some<f16>(some, slots, done, number, apart, row, streams);
      } else {
        merge_some<bf16>(some, slots, done, number, apart, row, streams);
      }
    }
    done += number;
  }
}

inline void stream_done() noexcept { stream_end(); }
