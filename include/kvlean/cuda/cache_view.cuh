// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <span>

#include "kvlean/core/kv_cache.hpp"
#include "kvlean/cuda/config.cuh"

KVLEAN_CUDA_NAMESPACE_BEGIN

/// One segment (a KV head of a layer of a sequence) as kernels read it: an entry of a device array.
/// All pointers lead into device memory. Rows are contiguous; row t of the keys lies at
///   flat   keys + t * key_stride
///   paged  keys + page_table[t / page_tokens] * key_page_stride + (t % page_tokens) * key_stride
/// in bytes, values likewise. Rows are 16-byte aligned: pointers and strides are multiples of 16.
struct alignas(16) Segment {
  void* keys = nullptr;  ///< flat: row 0; paged: this head's place in page 0 of the pool
  void* values = nullptr;
  i64 key_stride = 0;  ///< bytes from a token to the next (of the same page)
  i64 value_stride = 0;
  const i32* page_table = nullptr;  ///< null: flat
  i64 key_page_stride = 0;          ///< bytes from page to page of the pool
  i64 value_page_stride = 0;
  i32* positions = nullptr;   ///< ascending; null: the index is the position
  float* log_mass = nullptr;  ///< logit bias of each slot; null: all zero
  u32 page_tokens = 0;
  i32 page_shift = -1;  ///< log2(page_tokens) where that is a power of two, else -1
  u32 capacity = 0;     ///< tokens that can be held
  u32 frozen = 0;       ///< leading tokens that are never written, moved or merged into
  u32 layer = 0;        ///< place in the model
  u32 sequence = 0;
  u32 kv_head = 0;

  /// Page and place in the page of a token. Only for paged segments.
  KVLEAN_DEVICE void find_page(u32 token, i64& page, u32& place) const noexcept {
    u32 entry = 0;
    if (page_shift >= 0) {
      entry = token >> page_shift;
      place = token & (page_tokens - 1);
    } else {
      entry = token / page_tokens;
      place = token - entry * page_tokens;
    }
    page = __ldg(page_table + entry);
  }
  /// Address of a token's key row.
  [[nodiscard]] KVLEAN_DEVICE char* key_row(u32 token) const noexcept {
    char* base = static_cast<char*>(keys);
    if (page_table == nullptr) return base + static_cast<i64>(token) * key_stride;
    i64 page = 0;
    u32 place = 0;
    find_page(token, page, place);
    return base + page * key_page_stride + static_cast<i64>(place) * key_stride;
  }
  /// Address of a token's value row.
  [[nodiscard]] KVLEAN_DEVICE char* value_row(u32 token) const noexcept {
    char* base = static_cast<char*>(values);
    if (page_table == nullptr) return base + static_cast<i64>(token) * value_stride;
    i64 page = 0;
    u32 place = 0;
    find_page(token, page, place);
    return base + page * value_page_stride + static_cast<i64>(place) * value_stride;
  }
  [[nodiscard]] KVLEAN_DEVICE i32 position(u32 token) const noexcept {
    return positions != nullptr ? positions[token] : static_cast<i32>(token);
  }
  [[nodiscard]] KVLEAN_DEVICE float mass_bias(u32 token) const noexcept {
    return log_mass != nullptr ? log_mass[token] : 0.0f;
  }
  /// As kvlean::CacheView::finite_mass_bias().
  [[nodiscard]] KVLEAN_DEVICE float finite_mass_bias(u32 token) const noexcept {
    const float bias = mass_bias(token);
    return bias > -1e30f ? (bias < 1e30f ? bias : 1e30f) : -1e30f;
  }
};

/// What every stage on the device reads: the segments of all layers and sequences of a step. Plain
/// data, passed to kernels by value. Segments are ordered by layer, then sequence, then KV head:
/// segment (layer * num_sequences + sequence) * kv_heads + head. So the heads that compete in one
/// layer of one sequence are neighbours, and a range of layers is a range of segments.
///
/// Descriptors stay the same while a cache lives at its place; lengths lie in an array of their
/// own, which in-place work and appending rewrite. The host knows only the bound `max_tokens`.
struct CacheView {
  Segment* segments = nullptr;    ///< device [num_segments()]
  u32* lengths = nullptr;         ///< device [num_segments()] valid tokens, at most max_tokens
  i32* next_positions = nullptr;  ///< device [num_sequences] position of the next token, or null
  u32 num_layers = 0;
  u32 num_sequences = 0;
  u32 kv_heads = 0;    ///< of one layer
  u32 group_size = 1;  ///< query heads a KV head
  u32 max_tokens = 0;  ///< no length is, or will be while this view is used, above this
  u32 key_width = 0;   ///< elements of a row; a row is a multiple of 16 bytes
  u32 value_width = 0;
  DType key_dtype = DType::f32;
  DType value_dtype = DType::f32;
  bool has_positions = false;      ///< some segment stores positions
  bool has_log_mass = false;       ///< some segment stores log mass
  bool is_paged = false;           ///< some segment has a page table
  u32 frozen = 0;                  ///< the most frozen tokens of any segment
  const RopeSpec* rope = nullptr;  ///< HOST memory: how keys are rotated; null: not known

  [[nodiscard]] KVLEAN_HOST_DEVICE u32 num_segments() const noexcept {
    return num_layers * num_sequences * kv_heads;
  }
  [[nodiscard]] KVLEAN_HOST_DEVICE u32 segment_of(u32 layer, u32 sequence,
                                                  u32 head) const noexcept {
    return (layer * num_sequences + sequence) * kv_heads + head;
  }
  [[nodiscard]] KVLEAN_HOST_DEVICE u32 layer_of(u32 segment) const noexcept {
    return segment / (num_sequences * kv_heads);
  }
  [[nodiscard]] KVLEAN_HOST_DEVICE u32 sequence_of(u32 segment) const noexcept {
    return segment / kv_heads % num_sequences;
  }
  [[nodiscard]] KVLEAN_HOST_DEVICE u32 head_of(u32 segment) const noexcept {
    return segment % kv_heads;
  }
  /// The layers [first, first + count) alone.
  [[nodiscard]] CacheView layers(u32 first, u32 count) const noexcept {
    CacheView part = *this;
    part.segments += segment_of(first, 0, 0);
    part.lengths += segment_of(first, 0, 0);
    part.num_layers = count;
    return part;
  }
  [[nodiscard]] u32 key_row_bytes() const noexcept {
    return key_width * static_cast<u32>(size_bytes(key_dtype));
  }
  [[nodiscard]] u32 value_row_bytes() const noexcept {
    return value_width * static_cast<u32>(size_bytes(value_dtype));
  }
};

/// Checks what the host can see. Errors: null_pointer, invalid_shape (a zero extent, or rows that
/// are no multiple of 16 bytes), row_too_wide, invalid_group.
[[nodiscard]] inline Status check_cache(const CacheView& cache) noexcept {
  if (cache.segments == nullptr || cache.lengths == nullptr) return StatusCode::null_pointer;
  const u64 segments = u64{cache.num_layers} * cache.num_sequences * cache.kv_heads;
  if (segments == 0 || segments > 0x7fffffffu) return StatusCode::invalid_shape;
  if (cache.key_width == 0 || cache.value_width == 0) return StatusCode::invalid_shape;
  if (cache.key_width > max_row_width || cache.value_width > max_row_width) {
    return StatusCode::row_too_wide;
  }
  if (cache.key_row_bytes() % 16 != 0 || cache.value_row_bytes() % 16 != 0) {
    return StatusCode::invalid_shape;
  }
  return cache.group_size != 0 ? StatusCode::ok : StatusCode::invalid_group;
}

/// Rows [layer][sequence][kv_head][token] of a plain tensor, or of a page pool, in device memory.
/// Strides in bytes; a page pool mostly has no sequence stride.
struct TensorLayout {
  void* data = nullptr;
  i64 layer_stride = 0;
  i64 sequence_stride = 0;
  i64 head_stride = 0;
  i64 token_stride = 0;
  i64 page_stride = 0;

  /// Contiguous [layer][sequence][kv_head][token][dim].
  [[nodiscard]] static TensorLayout contiguous(void* data, u32 sequences, u32 kv_heads, u32 tokens,
                                               u32 row_bytes) noexcept {
    TensorLayout layout;
    layout.data = data;
    layout.token_stride = row_bytes;
    layout.head_stride = layout.token_stride * tokens;
    layout.sequence_stride = layout.head_stride * kv_heads;
    layout.layer_stride = layout.sequence_stride * sequences;
    return layout;
  }
};

/// A cache as most engines hold it, from which describe() makes the descriptors.
struct CacheLayout {
  TensorLayout keys;
  TensorLayout values;
  u32 num_layers = 1;
  u32 num_sequences = 1;
  u32 kv_heads = 0;
  u32 capacity = 0;  ///< tokens that each segment can hold; paged: table length * page_tokens
  const i32* page_table = nullptr;  ///< device [sequence][page]; null: flat
  u32 page_tokens = 0;
  u64 page_table_stride = 0;  ///< entries from a sequence to the next
  i32* positions = nullptr;   ///< device [segment][token], or null
  float* log_mass = nullptr;  ///< device [segment][token], or null
  u64 slot_stride = 0;        ///< entries of positions and log_mass from a segment to the next
  u32 frozen = 0;
  u32 first_layer = 0;  ///< place in the model of layer 0
  u32 first_head = 0;   ///< and of KV head 0, where heads are sharded
};

/// Fills `out` [num_layers * num_sequences * kv_heads] in HOST memory; the caller copies it to the
/// device. Errors: shape_mismatch (size of `out`), null_pointer, invalid_shape (rows that are not
/// 16-byte aligned, a page size of zero).
[[nodiscard]] inline Status describe(const CacheLayout& cache, std::span<Segment> out) noexcept {
  if (out.size() != std::size_t{cache.num_layers} * cache.num_sequences * cache.kv_heads) {
    return StatusCode::shape_mismatch;
  }
  if (cache.keys.data == nullptr || cache.values.data == nullptr) return StatusCode::null_pointer;
  const bool paged = cache.page_table != nullptr;
  if (paged && cache.page_tokens == 0) return StatusCode::invalid_shape;
  for (const TensorLayout* tensor : {&cache.keys, &cache.values}) {
    const i64 all = static_cast<i64>(reinterpret_cast<std::uintptr_t>(tensor->data)) |
                    tensor->layer_stride | tensor->sequence_stride | tensor->head_stride |
                    tensor->token_stride | (paged ? tensor->page_stride : 0);
    if (all % 16 != 0) return StatusCode::invalid_shape;
  }
  const auto place = [](const TensorLayout& tensor, u32 l, u32 q, u32 h) noexcept {
    return static_cast<char*>(tensor.data) + l * tensor.layer_stride + q * tensor.sequence_stride +
           h * tensor.head_stride;
  };
  i32 shift = -1;
  if (paged && (cache.page_tokens & (cache.page_tokens - 1)) == 0) {
    for (shift = 0; (1u << shift) < cache.page_tokens; ++shift) {
    }
  }
  std::size_t s = 0;
  for (u32 l = 0; l < cache.num_layers; ++l) {
    for (u32 q = 0; q < cache.num_sequences; ++q) {
      for (u32 h = 0; h < cache.kv_heads; ++h, ++s) {
        Segment& segment = out[s];
        segment = Segment{};
        segment.keys = place(cache.keys, l, q, h);
        segment.values = place(cache.values, l, q, h);
        segment.key_stride = cache.keys.token_stride;
        segment.value_stride = cache.values.token_stride;
        if (paged) {
          segment.page_table = cache.page_table + q * cache.page_table_stride;
          segment.key_page_stride = cache.keys.page_stride;
          segment.value_page_stride = cache.values.page_stride;
          segment.page_tokens = cache.page_tokens;
          segment.page_shift = shift;
        }
        if (cache.positions != nullptr) segment.positions = cache.positions + s * cache.slot_stride;
        if (cache.log_mass != nullptr) segment.log_mass = cache.log_mass + s * cache.slot_stride;
        segment.capacity = cache.capacity;
        segment.frozen = cache.frozen;
        segment.layer = cache.first_layer + l;
        segment.sequence = q;
        segment.kv_head = cache.first_head + h;
      }
    }
  }
  return StatusCode::ok;
}

/// A value per (segment, token) in device memory: scores, mass. Segment s starts at first[s], or at
/// s * stride without that table.
template <class T>
struct DeviceRagged {
  T* data = nullptr;
  u64 stride = 0;
  const u64* first = nullptr;  ///< device, or null

  [[nodiscard]] KVLEAN_DEVICE T* segment(u32 s) const noexcept {
    return data + (first != nullptr ? first[s] : static_cast<u64>(s) * stride);
  }
  [[nodiscard]] explicit operator bool() const noexcept { return data != nullptr; }
};

KVLEAN_CUDA_NAMESPACE_END
