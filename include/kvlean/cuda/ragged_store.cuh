// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/cuda/move_rows.cuh"

// Stores of segments with different lengths: packed one behind the other, read by varlen attention
// kernels; appending to any store; page lists.

KVLEAN_CUDA_NAMESPACE_BEGIN

/// Device memory for `slots` rows, cut into segments by pack_segments().
struct FlatPool {
  void* keys = nullptr;  ///< [slots][key_width], 16-byte aligned
  void* values = nullptr;
  i32* positions = nullptr;   ///< [slots], or null
  float* log_mass = nullptr;  ///< [slots], or null
  u64 slots = 0;
  i32* cu_lengths = nullptr;  ///< [segments + 1] first slot of each segment, or null; what varlen
                              ///< flash attention takes as cu_seqlens_k with a sequence a head
};

namespace detail {

/// The segment that has the pool's slots [first, first + capacity); otherwise as `from`.
[[nodiscard]] KVLEAN_DEVICE Segment packed_segment(const FlatPool& pool, const CacheView& view,
                                                   const Segment& from, u64 first,
                                                   u32 capacity) noexcept {
  Segment to;
  to.key_stride = static_cast<i64>(view.key_width) * (view.key_dtype == DType::f32 ? 4 : 2);
  to.value_stride = static_cast<i64>(view.value_width) * (view.value_dtype == DType::f32 ? 4 : 2);
  to.keys = static_cast<char*>(pool.keys) + static_cast<i64>(first) * to.key_stride;
  to.values = static_cast<char*>(pool.values) + static_cast<i64>(first) * to.value_stride;
  to.positions = pool.positions != nullptr ? pool.positions + first : nullptr;
  to.log_mass = pool.log_mass != nullptr ? pool.log_mass + first : nullptr;
  to.capacity = capacity;
  to.frozen = from.frozen;
  to.layer = from.layer;
  to.sequence = from.sequence;
  to.kv_head = from.kv_head;
  return to;
}

/// Whether a pool has what its store needs.
[[nodiscard]] inline Status check_pool(const FlatPool& pool,
                                       const CacheView& destination) noexcept {
  if (pool.keys == nullptr || pool.values == nullptr) return StatusCode::null_pointer;
  if (destination.has_positions && pool.positions == nullptr) return StatusCode::needs_positions;
  if (destination.has_log_mass && pool.log_mass == nullptr) return StatusCode::needs_log_mass;
  return StatusCode::ok;
}

/// One block. Each thread sums a run of neighbouring segments.
template <int = 0>
__global__ void __launch_bounds__(1024)
    pack_segments_kernel(const u32* lengths, u32 segments, u32 slack, const FlatPool pool,
                         const CacheView cache, const CacheView destination, ErrorWord error) {
  __shared__ u64 partial[1024];
  wait_for_previous();
  allow_next();
  const u32 each = ceil_div(segments, 1024u);
  const u32 begin = smaller(threadIdx.x * each, segments);
  const u32 end = smaller(begin + each, segments);
  u64 sum = 0;
  for (u32 s = begin; s < end; ++s) sum += u64{lengths[s]} + slack;
  partial[threadIdx.x] = sum;
  __syncthreads();
  for (u32 step = 1; step < 1024; step *= 2) {
    const u64 add = threadIdx.x >= step ? partial[threadIdx.x - step] : 0;
    __syncthreads();
    partial[threadIdx.x] += add;
    __syncthreads();
  }
  const bool fits = partial[1023] <= pool.slots;
  if (!fits && threadIdx.x == 0) report(error, StatusCode::destination_too_small);
  if (!fits || has_failed(error)) return;
  u64 first = partial[threadIdx.x] - sum;
  for (u32 s = begin; s < end; ++s) {
    const u32 room = lengths[s] + slack;
    destination.segments[s] = packed_segment(pool, destination, cache.segments[s], first, room);
    if (pool.cu_lengths != nullptr) pool.cu_lengths[s] = static_cast<i32>(first);
    first += u64{lengths[s]} + slack;
  }
  if (threadIdx.x == 0 && pool.cu_lengths != nullptr) {
    pool.cu_lengths[segments] = static_cast<i32>(partial[1023]);
  }
}

template <int = 0>
__global__ void check_append_kernel(const CacheView cache, const u32* counts, u32 count,
                                    ErrorWord error) {
  const u32 s = blockIdx.x * blockDim.x + threadIdx.x;
  if (s >= cache.num_segments()) return;
  const u32 own = counts != nullptr ? counts[cache.sequence_of(s)] : count;
  if (own > cache.segments[s].capacity - smaller(cache.lengths[s], cache.segments[s].capacity)) {
    report(error, StatusCode::destination_too_small);
  }
}

/// Blocks (1, segment): copies the new rows behind the old ones.
template <int = 0>
__global__ void __launch_bounds__(move_threads)
    append_kernel(const CacheView cache, const char* keys, const char* values, i64 key_stride,
                  i64 value_stride, u32 count, const u32* counts, u32 key_bytes, u32 value_bytes,
                  const u32* error) {
  if (has_failed(error)) return;
  const u32 s = blockIdx.y;
  const Segment segment = cache.segments[s];
  const u32 length = cache.lengths[s];
  const u32 sequence = cache.sequence_of(s);
  const u32 own = counts != nullptr ? counts[sequence] : count;
  const u32 key_chunks = key_bytes / 16;
  const u32 row_chunks = key_chunks + value_bytes / 16;
  for (u32 i = blockIdx.x * move_threads + threadIdx.x; i < own * row_chunks;
       i += gridDim.x * move_threads) {
    const u32 n = i / row_chunks;
    const u32 c = i % row_chunks;
    const i64 row = static_cast<i64>(s) * count + n;
    if (c < key_chunks) {
      store_16(segment.key_row(length + n) + c * 16, load_16(keys + row * key_stride + c * 16));
    } else {
      const u32 v = c - key_chunks;
      store_16(segment.value_row(length + n) + v * 16,
               load_16(values + row * value_stride + v * 16));
    }
  }
  for (u32 n = blockIdx.x * move_threads + threadIdx.x; n < own; n += gridDim.x * move_threads) {
    if (segment.positions != nullptr) {
      const i32 next = cache.next_positions != nullptr ? cache.next_positions[sequence]
                       : length != 0                   ? segment.positions[length - 1] + 1
                                                       : 0;
      segment.positions[length + n] = next + static_cast<i32>(n);
    }
    if (segment.log_mass != nullptr) segment.log_mass[length + n] = 0.0f;
  }
}
template <int = 0>
__global__ void finish_append_kernel(const CacheView cache, const u32* counts, u32 count,
                                     const u32* error) {
  if (has_failed(error)) return;
  const u32 s = blockIdx.x * blockDim.x + threadIdx.x;
  if (s < cache.num_segments()) {
    cache.lengths[s] += counts != nullptr ? counts[cache.sequence_of(s)] : count;
  }
  if (s < cache.num_sequences && cache.next_positions != nullptr) {
    cache.next_positions[s] += static_cast<i32>(counts != nullptr ? counts[s] : count);
  }
}

/// One block: pages of each segment, as running sums and lists.
template <int = 0>
__global__ void __launch_bounds__(1024)
    page_lists_kernel(const CacheView cache, i32* indptr, i32* indices, i32* last_page_tokens) {
  __shared__ u64 partial[1024];
  const u32 segments = cache.num_segments();
  const u32 each = ceil_div(segments, 1024u);
  const u32 begin = smaller(threadIdx.x * each, segments);
  const u32 end = smaller(begin + each, segments);
  u64 sum = 0;
  for (u32 s = begin; s < end; ++s) {
    sum += ceil_div(cache.lengths[s], larger(cache.segments[s].page_tokens, 1u));
  }
  partial[threadIdx.x] = sum;
  __syncthreads();
  for (u32 step = 1; step < 1024; step *= 2) {
    const u64 add = threadIdx.x >= step ? partial[threadIdx.x - step] : 0;
    __syncthreads();
    partial[threadIdx.x] += add;
    __syncthreads();
  }
  u64 first = partial[threadIdx.x] - sum;
  for (u32 s = begin; s < end; ++s) {
    const Segment& segment = cache.segments[s];
    const u32 tokens = larger(segment.page_tokens, 1u);
    const u32 pages = ceil_div(cache.lengths[s], tokens);
    indptr[s] = static_cast<i32>(first);
    last_page_tokens[s] =
        static_cast<i32>(pages != 0 ? cache.lengths[s] - (pages - 1) * tokens : 0);
    for (u32 p = 0; p < pages; ++p) indices[first + p] = segment.page_table[p];
    first += pages;
  }
  if (threadIdx.x == 0) indptr[segments] = static_cast<i32>(partial[1023]);
}

}  // namespace detail

/// Writes the descriptors of `destination` (device memory for as many segments as the cache has) so
/// that segment s has room for lengths[s] + slack slots, packed in order into the pool, and the
/// pool's cu_lengths. `lengths` is mostly a plan's. Then apply() fills them. One launch.
/// The destination's shape (types, widths, has_positions, ..) is the caller's to fill.
/// Errors: those of check_cache, null_pointer, shape_mismatch, needs_positions and needs_log_mass
/// (the view says so and the pool has no array), launch_failed. On the device:
/// destination_too_small; nothing is written then.
[[nodiscard]] inline Status pack_segments(const Context& context, const u32* lengths, u32 slack,
                                          const FlatPool& pool, const CacheView& cache,
                                          const CacheView& destination) noexcept {
  KVLEAN_RETURN_IF_ERROR(check_cache(cache));
  KVLEAN_RETURN_IF_ERROR(check_cache(destination));
  if (lengths == nullptr) return StatusCode::null_pointer;
  if (destination.num_segments() != cache.num_segments()) return StatusCode::shape_mismatch;
  KVLEAN_RETURN_IF_ERROR(detail::check_pool(pool, destination));
  return launch(context, {.grid = 1, .block = 1024, .overlap = true},
                detail::pack_segments_kernel<>, lengths, cache.num_segments(), slack, pool, cache,
                destination, context.error);
}

/// Appends up to `count` tokens to every segment of a sequence, behind what is there: nothing is
/// moved. `keys` and `values` are [segment][count] rows, key_stride and value_stride bytes apart
/// (multiples of 16); `counts` (device [num_sequences], or null: all) says how many are valid.
/// Their positions go on from next_positions, their log mass is 0. Three launches, O(1) in the
/// length. Errors: those of check_cache, null_pointer, invalid_shape, launch_failed. On the device:
/// destination_too_small, and then no segment is changed.
[[nodiscard]] inline Status append(const Context& context, const CacheView& cache, const void* keys,
                                   const void* values, i64 key_stride, i64 value_stride, u32 count,
                                   const u32* counts = nullptr) noexcept {
  KVLEAN_RETURN_IF_ERROR(check_cache(cache));
  if (keys == nullptr || values == nullptr) return StatusCode::null_pointer;
  const i64 all = static_cast<i64>(reinterpret_cast<std::uintptr_t>(keys) |
                                   reinterpret_cast<std::uintptr_t>(values)) |
                  key_stride | value_stride;
  if (all % 16 != 0) return StatusCode::invalid_shape;
  if (count == 0) return StatusCode::ok;
  const u32 segments = cache.num_segments();
  const dim3 all_segments(ceil_div(segments, 128u));
  KVLEAN_RETURN_IF_ERROR(launch(context, {.grid = all_segments, .block = 128},
                                detail::check_append_kernel<>, cache, counts, count,
                                context.error));
  const u32 chunks = count * (cache.key_row_bytes() + cache.value_row_bytes()) / 16;
  const u32 blocks = smaller(ceil_div(chunks, detail::move_threads), 64u);
  KVLEAN_RETURN_IF_ERROR(launch(
      context, {.grid = dim3(blocks, segments), .block = detail::move_threads},
      detail::append_kernel<>, cache, static_cast<const char*>(keys),
      static_cast<const char*>(values), key_stride, value_stride, count, counts,
      cache.key_row_bytes(), cache.value_row_bytes(), static_cast<const u32*>(context.error)));
  return launch(
      context, {.grid = dim3(ceil_div(larger(segments, cache.num_sequences), 128u)), .block = 128},
      detail::finish_append_kernel<>, cache, counts, count, static_cast<const u32*>(context.error));
}

/// The page lists of a paged cache, each segment as a sequence of its own, as FlashInfer's paged
/// wrappers read them: indptr [segments + 1], indices [all pages], last_page_tokens [segments].
/// Errors: those of check_cache, null_pointer, invalid_page_table (the cache has no pages).
[[nodiscard]] inline Status page_lists(const Context& context, const CacheView& cache, i32* indptr,
                                       i32* indices, i32* last_page_tokens) noexcept {
  KVLEAN_RETURN_IF_ERROR(check_cache(cache));
  if (indptr == nullptr || indices == nullptr || last_page_tokens == nullptr) {
    return StatusCode::null_pointer;
  }
  if (!cache.is_paged) return StatusCode::invalid_page_table;
  return launch(context, {.grid = 1, .block = 1024}, detail::page_lists_kernel<>, cache, indptr,
                indices, last_page_tokens);
}

KVLEAN_CUDA_NAMESPACE_END
