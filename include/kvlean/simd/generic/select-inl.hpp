// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
// The kernels of selection, and their table.
#include "kvlean/simd/generic/pool-inl.hpp"

template <bool weighted>
inline Vector load_scores(const float* x, Vector weight) noexcept {
  return weighted ? mul(load(x), weight) : load(x);
}

template <bool weighted>
inline u32 count_scores_of(const float* x, u32 count, float weight, float least) noexcept {
  const Vector w = set1(weight);
  const Vector bound = set1(least);
  Counts first = no_counts();
  Counts second = first;
  u32 t = 0;
  for (; t + 2 * lanes <= count; t += 2 * lanes) {
    first = count_at_least(first, load_scores<weighted>(x + t, w), bound);
    second = count_at_least(second, load_scores<weighted>(x + t + lanes, w), bound);
  }
  if (t + lanes <= count) {
    first = count_at_least(first, load_scores<weighted>(x + t, w), bound);
    t += lanes;
  }
  u32 rest = 0;
  if (t < count) {
    const Vector a = mul(load(x + t, count - t), w);
    rest = bits_set(at_least(a, bound) & ((1u << (count - t)) - 1u));
  }
  return sum_counts(add_counts(first, second)) + rest;
}

inline u32 count_scores(const float* x, u32 count, float weight, float least) noexcept {
  return weight == 1.0f ? count_scores_of<false>(x, count, weight, least)
                        : count_scores_of<true>(x, count, weight, least);
}

inline Divided divide_scores(const float* x, u32 count, float weight, float least) noexcept {
  constexpr float infinity = std::numeric_limits<float>::infinity();
  const Vector w = set1(weight);
  const Vector bound = set1(least);
  const Vector highest = set1(infinity);
  const Vector lowest = set1(-infinity);
  Counts counts = no_counts();
  Vector above = highest;
  Vector below = lowest;
  u32 t = 0;
  for (; t + lanes <= count; t += lanes) {
    const Vector a = mul(load(x + t), w);
    counts = count_at_least(counts, a, bound);
    above = min(select_less(a, bound, highest, a), above);
    below = max(select_less(a, bound, a, lowest), below);
  }
  Divided result{sum_counts(counts), -reduce_max(sub(zero(), above)), reduce_max(below)};
  for (; t < count; ++t) {
    const float a = x[t] * weight;
    if (a >= least) {
      ++result.reached;
      result.above = a < result.above ? a : result.above;
    } else if (a > result.below) {
      result.below = a;
    }
  }
  return result;
}

inline Collected collect_scores(const float* x, u32 count, float weight, float least, float bound,
                                float* out, u32 room) noexcept {
  const Vector w = set1(weight);
  const Vector lower = set1(least);
  const Vector upper = set1(bound);
  Counts above = no_counts();
  u32 inside = 0;
  u32 t = 0;
  for (; t + lanes <= count; t += lanes) {
    const Vector a = mul(load(x + t), w);
    const u32 chosen = at_least(a, lower) & ~at_least(a, upper);
    above = count_at_least(above, a, upper);
    const u32 next = inside + bits_set(chosen);
    if (inside + lanes <= room) {  // what this writes past `next` is overwritten, or never read
      store(compress(a, chosen), out + inside);
    } else if (next <= room && next != inside) {
      store(compress(a, chosen), out + inside, next - inside);
    }
    inside = next;
  }
  u32 more = 0;
  for (; t < count; ++t) {
    const float a = x[t] * weight;
    if (a >= bound) {
      ++more;
    } else if (a >= least) {
      if (inside < room) out[inside] = a;
      ++inside;
    }
  }
  return {sum_counts(above) + more, inside};
}

inline void mark_scores(const float* x, u32 count, float least, float bound, u64 ties,
                        u8* keep) noexcept {
  const Vector lower = set1(least);
  const Vector upper = set1(bound);
  u32 t = 0;
  for (; t + lanes <= count; t += lanes) {
    const Vector a = load(x + t);
    const u32 above = at_least(a, upper);
    u32 equal = at_least(a, lower) & ~above;
    if (equal != 0) {
      while (bits_set(equal) > ties) equal &= ~(1u << (31 - __builtin_clz(equal)));
      ties -= bits_set(equal);
    }
    store_flags(above | equal, keep + t);
  }
  for (; t < count; ++t) {
    const bool above = x[t] >= bound;
    const bool tied = !above && x[t] >= least && ties != 0;
    if (tied) --ties;
    keep[t] = above || tied ? u8{1} : u8{0};
  }
}

inline void list_kept(const u8* keep, u32 count, u32* tokens, u32 kept) noexcept {
  float* out = reinterpret_cast<float*>(tokens);  // only its address: words are stored as bytes
  Vector here = token_lanes(0);
  u32 listed = 0;
  u32 t = 0;
  for (; t + lanes <= count && listed + lanes <= kept; t += lanes) {
    const u32 bits = load_flags(keep + t);
    store(compress(here, bits), out + listed);
    here = next_tokens(here);
    listed += bits_set(bits);
  }
  for (; t + lanes <= count; t += lanes) {  // no room for lanes that are not kept
    const u32 bits = load_flags(keep + t);
    if (bits == 0) continue;
    const u32 found = bits_set(bits);
    if (found == lanes) {
      store(token_lanes(t), out + listed);
    } else {
      store(compress(token_lanes(t), bits), out + listed, found);
    }
    listed += found;
  }
  for (; t < count; ++t) {
    if (keep[t] != 0) tokens[listed++] = t;
  }
}

[[nodiscard]] constexpr SelectKernels select_kernels_here() noexcept {
  return {count_scores, divide_scores, collect_scores, mark_scores,  list_kept,
          pool_average, pool_maximum,  mean_rows,      maximum_rows, divide_by_counts};
}
