// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
// Sums over windows of rows that neighbouring slots share, as CaM's: each in two parts, nothing is
// subtracted.

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

/// The term before which [begin, end) is cut, for terms that are numbered from `first` on.
[[nodiscard]] inline u64 window_cut(u64 begin, u64 end, u64 first) noexcept {
  const u64 zero = begin < first ? 0 : first;
  if (begin == zero) return begin;
  const u64 before = begin - zero - 1;
  const u64 last = end - zero - 1;
  return zero + (last & ~(std::bit_floor(before ^ last) - 1));
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
  const u64 cut = window_cut(begin, end, source.rows.first_term);
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
