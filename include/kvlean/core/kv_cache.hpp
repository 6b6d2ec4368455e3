// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>

#include "kvlean/core/ragged.hpp"
#include "kvlean/core/rope.hpp"
#include "kvlean/core/tensor.hpp"

KVLEAN_NAMESPACE_BEGIN

/// Where a view's segments stand in the model: segment s is KV head `head + s` of `layer`.
struct SegmentId {
  u32 sequence = 0;
  u32 layer = 0;
  u32 head = 0;
};

/// What every stage reads: the segments of one layer of one sequence, whatever their layout.
/// A plain struct of pointers into caller memory; copying it copies no data.
struct CacheView {
  Rows keys;
  Rows values;
  u32 segments = 0;        ///< KV heads
  u32 capacity = 0;        ///< tokens each segment can hold at most
  u32 uniform_length = 0;  ///< valid tokens of every segment when `lengths` is null
  u32* lengths = nullptr;  ///< [segments] valid tokens each, or null
  u32 frozen = 0;          ///< leading tokens that are never written, moved or merged into
  Ragged<i32> positions;   ///< ascending within a segment; null: the index is the position
  Ragged<float> log_mass;  ///< logit bias of each slot; null: all zero
  i32 next_position = 0;   ///< position of the next token, not the length
  RopePairing rope_pairing = RopePairing::none;  ///< `rope`'s where that is given
  const RopeSpec* rope = nullptr;  ///< how keys are rotated; null: not known, none is ever turned
  SegmentId origin;

  [[nodiscard]] u32 length(u32 segment) const noexcept {
    return lengths != nullptr ? lengths[segment] : uniform_length;
  }
  [[nodiscard]] u32 max_length() const noexcept {
    if (lengths == nullptr) return uniform_length;
    u32 longest = 0;
    for (u32 s = 0; s < segments; ++s) longest = lengths[s] > longest ? lengths[s] : longest;
    return longest;
  }
  [[nodiscard]] u64 total_length() const noexcept {
    if (lengths == nullptr) return static_cast<u64>(segments) * uniform_length;
    u64 total = 0;
    for (u32 s = 0; s < segments; ++s) total += lengths[s];
    return total;
  }
  [[nodiscard]] i32 position(u32 segment, u32 token) const noexcept {
    return positions ? positions(segment, token) : static_cast<i32>(token);
  }
  [[nodiscard]] float mass_bias(u32 segment, u32 token) const noexcept {
    return log_mass ? log_mass(segment, token) : 0.0f;
  }
  /// The same, finite: minus infinity and NaN (a token that nobody sees) become -1e30, infinity
  /// 1e30.
  [[nodiscard]] float finite_mass_bias(u32 segment, u32 token) const noexcept {
    const float bias = mass_bias(segment, token);
    return bias > -1e30f ? (bias < 1e30f ? bias : 1e30f) : -1e30f;
  }
};

/// A non-owning view over one layer's K and V, [kv_head][token][dim]. Keys and values have their
/// own layout, type and width. Nothing is copied; the memory must outlive the view. The setters
/// name optional caller-owned arrays; `apply(plan, cache, in_place)` updates them and the length.
template <Tensor K, Tensor V = K>
class KVCache {
 public:
  /// All tokens of the tensors' capacity are valid until set_length() says otherwise.
  KVCache(const K& keys, const V& values) noexcept : keys_(keys), values_(values) {
    const Rows rows = rows_of(keys_);
    view_.segments = rows.heads;
    view_.capacity = rows.tokens;
    view_.uniform_length = rows.tokens;
    view_.next_position = static_cast<i32>(rows.tokens);
  }

  /// Valid tokens of every segment; also the next position unless set_next_position() follows.
  KVCache& set_length(std::size_t tokens) noexcept {
    view_.uniform_length = detail::saturate_u32(tokens);
    view_.next_position = static_cast<i32>(view_.uniform_length);
    return *this;
  }
  /// Valid tokens per segment, [kv_heads], written back by in-place work: lets heads differ.
  KVCache& set_lengths(u32* lengths) noexcept {
    view_.lengths = lengths;
    return *this;
  }
  /// Position of each token, ascending within a segment.
  KVCache& set_positions(Ragged<i32> positions, i32 next_position) noexcept {
    view_.positions = positions;
    view_.next_position = next_position;
    return *this;
  }
  /// Logit bias of each token, read by scorers and attention, written by in-place work.
  KVCache& set_log_mass(Ragged<float> log_mass) noexcept {
    view_.log_mass = log_mass;
    return *this;
  }
  KVCache& set_next_position(i32 next_position) noexcept {
    view_.next_position = next_position;
    return *this;
  }
  /// The first `tokens` of every segment belong to somebody else too: never written or moved.
  KVCache& set_frozen(std::size_t tokens) noexcept {
    view_.frozen = detail::saturate_u32(tokens);
    return *this;
  }
  KVCache& set_rope_pairing(RopePairing pairing) noexcept {
    view_.rope_pairing = pairing;
    return *this;
  }
  /// How the keys are rotated, so that apply() can move them to other positions; null: not known.
  /// The spec stays the caller's and must outlive the cache's use.
  KVCache& set_rope(const RopeSpec* rope) noexcept {
    view_.rope = rope;
    view_.rope_pairing = rope != nullptr ? rope->pairing : RopePairing::none;
    return *this;
  }
  KVCache& set_origin(SegmentId origin) noexcept {
    view_.origin = origin;
    return *this;
  }

  [[nodiscard]] const K& keys() const noexcept { return keys_; }
  [[nodiscard]] const V& values() const noexcept { return values_; }
  [[nodiscard]] std::size_t num_kv_heads() const noexcept { return view_.segments; }
  [[nodiscard]] std::size_t capacity() const noexcept { return view_.capacity; }
  [[nodiscard]] std::size_t length(u32 segment = 0) const noexcept { return view_.length(segment); }

  /// The plain struct that every stage takes. It points at this object's tensors.
  [[nodiscard]] CacheView view() const noexcept {
    CacheView view = view_;
    view.keys = rows_of(keys_);
    view.values = rows_of(values_);
    return view;
  }

 private:
  K keys_;
  V values_;
  CacheView view_;
};

/// Anything with segments: KVCache, RaggedKVCache, or a CacheView itself.
template <class C>
concept Cache = std::same_as<C, CacheView> || requires(const C& cache) {
  { cache.view() }
  noexcept->std::same_as<CacheView>;
};

template <Cache C>
[[nodiscard]] CacheView view_of(const C& cache) noexcept {
  if constexpr (std::same_as<C, CacheView>) {
    return cache;
  } else {
    return cache.view();
  }
}

/// Checks shapes, lengths, tables, the rotation and the frozen prefix; touches no row. Errors:
/// invalid_shape, shape_mismatch, invalid_length, invalid_frozen, those of check_rows and
/// RopeSpec::check, and invalid_rope when rope and rope_pairing disagree. O(segments + pages).
[[nodiscard]] inline Status check_cache(const CacheView& cache) noexcept {
  if (cache.segments == 0) return StatusCode::invalid_shape;
  if (cache.keys.heads != cache.segments || cache.values.heads != cache.segments) {
    return StatusCode::shape_mismatch;
  }
  if (cache.keys.tokens != cache.values.tokens) return StatusCode::shape_mismatch;
  u32 longest = 0;
  u32 shortest = std::numeric_limits<u32>::max();
  for (u32 s = 0; s < cache.segments; ++s) {
    const u32 length = cache.length(s);
    longest = length > longest ? length : longest;
    shortest = length < shortest ? length : shortest;
  }
  if (longest > cache.capacity) return StatusCode::invalid_length;
  KVLEAN_RETURN_IF_ERROR(check_rows(cache.keys, longest));
  KVLEAN_RETURN_IF_ERROR(check_rows(cache.values, longest));
  if (cache.frozen > shortest) return StatusCode::invalid_frozen;
  if (cache.rope != nullptr) {
    KVLEAN_RETURN_IF_ERROR(cache.rope->check(cache.keys.width));
    if (cache.rope_pairing != RopePairing::none && cache.rope_pairing != cache.rope->pairing) {
      return StatusCode::invalid_rope;
    }
  }
  return StatusCode::ok;
}

/// Looks for bad data: NaN or infinity in K, V or log mass, positions that do not ascend, positions
/// at or past next_position. Reads everything once, so it is never called for you. O(tokens * dim).
[[nodiscard]] inline Status check_data(const CacheView& cache) noexcept {
  KVLEAN_RETURN_IF_ERROR(check_cache(cache));
  float row[max_row_width];
  const auto finite = [&row](const Rows& rows, u32 head, u32 token) noexcept {
    load_row(rows, head, token, row);
    for (u32 i = 0; i < rows.width; ++i) {
      if (!std::isfinite(row[i])) return false;
    }
    return true;
  };
  for (u32 s = 0; s < cache.segments; ++s) {
    const u32 length = cache.length(s);
    for (u32 t = 0; t < length; ++t) {
      if (!finite(cache.keys, s, t) || !finite(cache.values, s, t)) return StatusCode::bad_data;
      if (!std::isfinite(cache.mass_bias(s, t))) return StatusCode::bad_data;
      if (cache.positions) {
        if (cache.position(s, t) >= cache.next_position) return StatusCode::bad_data;
        if (t > 0 && cache.position(s, t) <= cache.position(s, t - 1)) return StatusCode::bad_data;
      }
    }
  }
  return StatusCode::ok;
}

/// The data check of the public interface: `validate(cache)`; see check_data.
template <Cache C>
[[nodiscard]] Status validate(const C& cache) noexcept {
  return check_data(view_of(cache));
}

KVLEAN_NAMESPACE_END
