// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
// Rows from one place to another, and their rotation on the way.

inline void prefetch_row(const std::byte* row, std::size_t bytes) noexcept {
  for (std::size_t i = 0; i < bytes; i += 64) __builtin_prefetch(row + i);
}

/// `bytes` >= 64, and `to` apart from `from` or below it. The last block may overlap the one
/// before: it is read before anything is written.
inline void move_blocks(const std::byte* from, std::byte* to, std::size_t bytes) noexcept {
  const std::size_t last = bytes - 64;
  const Block tail = load_block(from + last);
  for (std::size_t i = 0; i < last; i += 64) store_block(load_block(from + i), to + i);
  store_block(tail, to + last);
}

inline void move_bytes(const std::byte* from, std::byte* to, std::size_t bytes,
                       bool stream) noexcept {
  if (stream && bytes % 64 == 0 && reinterpret_cast<std::uintptr_t>(to) % 64 == 0) {
    for (std::size_t i = 0; i < bytes; i += 64) stream_line(from + i, to + i);
  } else if (bytes >= 64) {
    move_blocks(from, to, bytes);
  } else {
    std::memmove(to, from, bytes);
  }
}

inline void gather_rows(const RowMoves* sets, u32 num_sets, const u32* index, u32 begin, u32 end,
                        u32 known, bool stream) noexcept {
  constexpr u32 run = 16;                    // tokens of a piece
  constexpr std::size_t ahead_bytes = 8192;  // hides the latency, takes little of the first cache
  std::size_t bytes = 1;
  bool packed = true;
  for (u32 i = 0; i < num_sets; ++i) {
    bytes += sets[i].bytes;
    packed = packed && sets[i].packed;
  }
  const u32 ahead = static_cast<u32>(std::min<std::size_t>(ahead_bytes / bytes + 4, 64));
  for (u32 j = begin; j < end;) {
    // Indices ascend, so the ends tell of all in between.
    const bool together = packed && end - j >= run && index[j + run - 1] - index[j] == run - 1;
    const u32 n = together ? run : 1;
    const u32 soon = known - j > ahead ? std::min(n, known - j - ahead) : 0;
    for (u32 i = 0; i < num_sets; ++i) {
      const RowMoves& rows = sets[i];
      for (u32 t = j + ahead; t < j + ahead + soon; ++t) {
        prefetch_row(rows.from.at(index[t]), rows.bytes);
        // A store that waits for its line holds up all that follow.
        if (!stream) prefetch_row(rows.to.at(t), rows.bytes);
      }
      move_bytes(rows.from.at(index[j]), rows.to.at(j), n * rows.bytes, stream);
    }
    j += n;
  }
  if (stream && begin == end) stream_end();
}

inline void gather_values(const void* from, const u32* index, u32 begin, u32 end,
                          void* to) noexcept {
  const std::byte* source = static_cast<const std::byte*>(from);
  std::byte* target = static_cast<std::byte*>(to);
  u32 j = begin;
  const bool near = begin < end && index[end - 1] < 1u << 31;
  for (; near && end - j >= lanes; j += lanes) gather_words(source, index + j, target + j * 4ull);
  for (; j < end; ++j) std::memmove(target + j * 4ull, source + index[j] * 4ull, 4);
}

/// coefficient[0] x^(n - 1) + coefficient[1] x^(n - 2) + ..
template <u32 n>
inline Doubles polynomial(const double (&coefficient)[n], Doubles x) noexcept {
  Doubles sum = set1_doubles(coefficient[0]);
  KVLEAN_SIMD_UNROLL
  for (u32 i = 1; i < n; ++i) {
    sum = add(rounded_product(sum, x), set1_doubles(coefficient[i]));
  }
  return sum;
}

inline void angles(const double* frequency, double position, u32 pairs, double* cosine,
                   double* sine) noexcept {
  // Chebyshev fits in z = r^2, for |r| <= 1/2 turn: sin(2 pi r) / r within 1.9e-15, and
  // (cos(2 pi r) - 1) / z within 5.4e-16.
  constexpr double sines[10] = {-0x1.5e6f7afc5b2abp-7, 0x1.a81126109cea9p-4,  -0x1.6f9318a17397ap-1,
                                0x1.e8f3078472575p+1,  -0x1.e307479ca2abep+3, 0x1.507834649f587p+5,
                                -0x1.32d2cce57e46cp+6, 0x1.466bc677574b1p+6,  -0x1.4abbce625bd81p+5,
                                0x1.921fb54442d16p+2};
  constexpr double cosines[10] = {
      0x1.bd24e60729be4p-9, -0x1.28682d77b866cp-5, 0x1.20b6dade08729p-2, -0x1.b6e1a1e254732p+0,
      0x1.f9d3857691927p+2, -0x1.a6d1f28db07a0p+4, 0x1.e1f50688b7ba4p+5, -0x1.55d3c7e3cb060p+6,
      0x1.03c1f081b5aa5p+6, -0x1.3bd3cc9be45dep+4};
  constexpr double turns_per_radian = 0x1.45f306dc9c883p-3;
  for (u32 i = 0; i < padded_pairs(pairs); i += lanes) {
    const Doubles angle = rounded_product(load(frequency + i), set1_doubles(position));
    const Doubles turns = rounded_product(angle, set1_doubles(turns_per_radian));
    const Doubles rest = sub(turns, round_even(turns));
    const Doubles square = rounded_product(rest, rest);
    store(rounded_product(polynomial(sines, square), rest), sine + i);
    store(add(rounded_product(polynomial(cosines, square), square), set1_doubles(1.0)), cosine + i);
  }
}

inline void add_angles(const double* cosine_a, const double* sine_a, const double* cosine_b,
                       const double* sine_b, u32 pairs, float* cosine, float* sine) noexcept {
  for (u32 i = 0; i < padded_pairs(pairs); i += lanes) {
    const Doubles ca = load(cosine_a + i);
    const Doubles sa = load(sine_a + i);
    const Doubles cb = load(cosine_b + i);
    const Doubles sb = load(sine_b + i);
    store(narrow(sub(rounded_product(ca, cb), rounded_product(sa, sb))), cosine + i);
    store(narrow(add(rounded_product(sa, cb), rounded_product(ca, sb))), sine + i);
  }
}

inline void turn_pairs(Vector& x, Vector& y, Vector cosine, Vector sine) noexcept {
  const Vector turned = sub(rounded_product(x, cosine), rounded_product(y, sine));
  y = add(rounded_product(x, sine), rounded_product(y, cosine));
  x = turned;
}

template <class E>
inline void turn_halves(const E* from, E* to, u32 pairs, const float* cosine,
                        const float* sine) noexcept {
  u32 i = 0;
  for (; i + lanes <= pairs; i += lanes) {
    Vector x = load(from + i);
    Vector y = load(from + pairs + i);
    turn_pairs(x, y, load(cosine + i), load(sine + i));
    store(x, to + i);
    store(y, to + pairs + i);
  }
  if (i == pairs) return;
  const u32 rest = pairs - i;
  Vector x = load(from + i, rest);
  Vector y = load(from + pairs + i, rest);
  turn_pairs(x, y, load(cosine + i), load(sine + i));
  store(x, to + i, rest);
  store(y, to + pairs + i, rest);
}

template <class E>
inline void turn_neighbours(const E* from, E* to, u32 pairs, const float* cosine,
                            const float* sine) noexcept {
  const auto turn = [&](Vector& a, Vector& b, u32 i) noexcept {
    Vector x;
    Vector y;
    split_pairs(a, b, x, y);
    turn_pairs(x, y, load(cosine + i), load(sine + i));
    join_pairs(x, y, a, b);
  };
  u32 i = 0;
  for (; i + lanes <= pairs; i += lanes) {
    Vector a = load(from + 2 * i);
    Vector b = load(from + 2 * i + lanes);
    turn(a, b, i);
    store(a, to + 2 * i);
    store(b, to + 2 * i + lanes);
  }
  if (i == pairs) return;
  E rest[2 * lanes] = {};
  std::memcpy(static_cast<void*>(rest), from + 2 * i, 2 * (pairs - i) * sizeof(E));
  Vector a = load(rest);
  Vector b = load(rest + lanes);
  turn(a, b, i);
  store(a, rest);
  store(b, rest + lanes);
  std::memcpy(static_cast<void*>(to + 2 * i), rest, 2 * (pairs - i) * sizeof(E));
}

template <class E>
inline void turn_elements(const TurnedRow& row, const float* cosine, const float* sine,
                          const E* from, E* to) noexcept {
  const u32 end = row.first + 2 * row.pairs;
  if (from != to) {
    std::memcpy(static_cast<void*>(to), from, row.first * sizeof(E));
    std::memcpy(static_cast<void*>(to + end), from + end, (row.width - end) * sizeof(E));
  }
  if (row.adjacent) {
    turn_neighbours(from + row.first, to + row.first, row.pairs, cosine, sine);
  } else {
    turn_halves(from + row.first, to + row.first, row.pairs, cosine, sine);
  }
}

inline void turn_row(const TurnedRow& row, const float* cosine, const float* sine, const void* from,
                     void* to) noexcept {
  if (row.dtype == DType::f32) {
    turn_elements(row, cosine, sine, static_cast<const float*>(from), static_cast<float*>(to));
  } else if (row.dtype == DType::f16) {
    turn_elements(row, cosine, sine, static_cast<const f16*>(from), static_cast<f16*>(to));
  } else {
    turn_elements(row, cosine, sine, static_cast<const bf16*>(from), static_cast<bf16*>(to));
  }
}

[[nodiscard]] constexpr MoveKernels move_kernels_here() noexcept {
  return {gather_rows, gather_values, angles, add_angles, turn_row};
}
