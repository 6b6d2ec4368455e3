// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/cuda/cache_view.cuh"
#include "kvlean/observe/observation.hpp"

KVLEAN_CUDA_NAMESPACE_BEGIN

/// kvlean::AttentionSpec on the device: logit = softcap(scale * q.k) + log_mass.
struct Attention {
  float scale = 0.0f;                  ///< 0: 1 / sqrt(key width)
  float softcap = 0.0f;                ///< 0: none
  u32 sliding_window = 0;              ///< a query sees positions > its own - window; 0: all
  const float* sink_logits = nullptr;  ///< device [num_layers][query_heads], or null

  [[nodiscard]] float scale_for(u32 key_width) const noexcept {
    return scale != 0.0f ? scale : 1.0f / std::sqrt(static_cast<float>(key_width));
  }
};

/// Query rows [layer][sequence][query_head][query][dim] in device memory, after RoPE, of the keys'
/// type, 16-byte aligned; strides in bytes. Query head h reads KV head h / group_size.
struct Queries {
  const void* data = nullptr;
  i64 layer_stride = 0;
  i64 sequence_stride = 0;
  i64 head_stride = 0;
  i64 row_stride = 0;
  u32 count = 0;                   ///< queries of a head, or the most where `counts` is given
  u32 newest = 0;                  ///< only the last so many of them are read; 0: all
  const u32* counts = nullptr;     ///< device [num_sequences], or null
  const i32* positions = nullptr;  ///< device [num_sequences][count], ascending; null: see below
  i32 first_position = -1;  ///< of query 0; negative: the queries are the newest of each sequence
  Mask mask = Mask::causal;
  const float* lse =
      nullptr;  ///< device [layer][sequence][query_head][count], natural log, or null

  /// Contiguous [layer][sequence][query_head][query][dim].
  [[nodiscard]] static Queries contiguous(const CacheView& cache, const void* data,
                                          u32 count) noexcept {
    Queries queries;
    queries.data = data;
    queries.count = count;
    queries.row_stride = cache.key_row_bytes();
    queries.head_stride = queries.row_stride * count;
    queries.sequence_stride = queries.head_stride * cache.kv_heads * cache.group_size;
    queries.layer_stride = queries.sequence_stride * cache.num_sequences;
    return queries;
  }
  /// The last queries of each head alone.
  [[nodiscard]] Queries last(u32 queries) const noexcept {
    Queries part = *this;
    part.newest = newest == 0 ? queries : smaller(newest, queries);
    return part;
  }
  /// Queries of a head that are read, at most.
  [[nodiscard]] KVLEAN_HOST_DEVICE u32 most() const noexcept {
    return newest == 0 ? count : smaller(newest, count);
  }
};

/// Errors: missing_observation (no queries), null_pointer, invalid_shape (not 16-byte aligned).
[[nodiscard]] inline Status check_queries(const Queries& queries) noexcept {
  if (queries.count == 0) return StatusCode::missing_observation;
  if (queries.data == nullptr) return StatusCode::null_pointer;
  const i64 all = static_cast<i64>(reinterpret_cast<std::uintptr_t>(queries.data)) |
                  queries.layer_stride | queries.sequence_stride | queries.head_stride |
                  queries.row_stride;
  return all % 16 == 0 ? StatusCode::ok : StatusCode::invalid_shape;
}

/// The queries of one segment's group, as a kernel sees them. Row r of a group is query r % count
/// of its head r / count.
struct SegmentQueries {
  const char* rows = nullptr;
  i64 head_stride = 0;
  i64 row_stride = 0;
  u32 count = 0;
  u32 skipped = 0;  ///< queries of each head before the first that is read
  const i32* positions = nullptr;
  i32 first = 0;
  bool causal = true;
  u32 window = 0;

  [[nodiscard]] static KVLEAN_DEVICE SegmentQueries of(const CacheView& cache,
                                                       const Queries& queries,
                                                       const Attention& attention, u32 segment,
                                                       u32 length) noexcept {
    SegmentQueries own;
    const u32 sequence = cache.sequence_of(segment);
    own.rows = static_cast<const char*>(queries.data) +
               cache.layer_of(segment) * queries.layer_stride + sequence * queries.sequence_stride +
               static_cast<i64>(cache.head_of(segment) * cache.group_size) * queries.head_stride;
    own.head_stride = queries.head_stride;
    own.row_stride = queries.row_stride;
    own.count = queries.counts != nullptr ? queries.counts[sequence] : queries.count;
    if (queries.newest != 0 && queries.newest < own.count) {
      own.skipped = own.count - queries.newest;
      own.count = queries.newest;
      own.rows += own.skipped * queries.row_stride;
    }
    own.causal = queries.mask == Mask::causal;
    own.window = attention.sliding_window;
    if (queries.positions != nullptr) {
      own.positions = queries.positions + static_cast<u64>(sequence) * queries.count + own.skipped;
    } else if (queries.first_position >= 0) {
      own.first = queries.first_position + static_cast<i32>(own.skipped);
    } else {
      const bool positioned =
          cache.segments[segment].positions != nullptr && cache.next_positions != nullptr;
      own.first = (positioned ? cache.next_positions[sequence] : static_cast<i32>(length)) -
                  static_cast<i32>(own.count);
    }
    return own;
  }
  [[nodiscard]] KVLEAN_DEVICE const char* row(u32 head_in_group, u32 i) const noexcept {
    return rows + head_in_group * head_stride + i * row_stride;
  }
  [[nodiscard]] KVLEAN_DEVICE i32 position(u32 i) const noexcept {
    return positions != nullptr ? positions[i] : first + static_cast<i32>(i);
  }
  // A key is visible to query i if first_seen(i) <= its position <= last_seen(i).
  [[nodiscard]] KVLEAN_DEVICE i32 last_seen(u32 i) const noexcept {
    return causal ? position(i) : 0x7ffffffe;
  }
  [[nodiscard]] KVLEAN_DEVICE i32 first_seen(u32 i) const noexcept {
    return window != 0 ? position(i) + 1 - static_cast<i32>(window) : -0x7fffffff;
  }
  /// Queries before the first one whose position is at least `limit`. O(log count).
  [[nodiscard]] KVLEAN_DEVICE u32 queries_before(i32 limit) const noexcept {
    if (positions == nullptr) {
      return limit <= first ? 0 : smaller(static_cast<u32>(limit) - static_cast<u32>(first), count);
    }
    u32 low = 0;
    u32 high = count;
    while (low < high) {
      const u32 middle = (low + high) / 2;
      if (position(middle) < limit) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  }
  /// The queries [seen_from, seen_until) see a key with this position.
  [[nodiscard]] KVLEAN_DEVICE u32 seen_from(i32 position_of_key) const noexcept {
    return causal ? queries_before(position_of_key) : 0;
  }
  [[nodiscard]] KVLEAN_DEVICE u32 seen_until(i32 position_of_key) const noexcept {
    const i64 past = static_cast<i64>(position_of_key) + window;
    return window != 0 && past < 0x7fffffff ? queries_before(static_cast<i32>(past)) : count;
  }
};

/// What was seen of the layers of a step. Give what the scorer needs; the rest stays empty.
struct Observation {
  Attention attention = {};
  Queries window = {};                      ///< the last queries (SnapKV, TOVA)
  Queries reference = {};                   ///< queries to accumulate over: all of a prefill (H2O)
  DeviceRagged<const float> mass = {};      ///< attention received so far, ready-made
  DeviceRagged<const float> external = {};  ///< scores computed elsewhere
  u32 observers = 0;                        ///< queries that `mass` was summed over; 0: unknown
};

/// Where a scorer writes: [segment][token], lengths as the cache has them.
struct Scores {
  DeviceRagged<float> rank;  ///< order only
  DeviceRagged<float> mass;  ///< attention received, for scorers of attention
};

/// Tokens of a segment whose position is below `limit`. O(log length).
[[nodiscard]] KVLEAN_DEVICE u32 tokens_before(const Segment& segment, u32 length,
                                              i32 limit) noexcept {
  if (segment.positions == nullptr) {
    return limit <= 0 ? 0 : smaller(static_cast<u32>(limit), length);
  }
  u32 low = 0;
  u32 high = length;
  while (low < high) {
    const u32 middle = (low + high) / 2;
    if (segment.positions[middle] < limit) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

KVLEAN_CUDA_NAMESPACE_END
