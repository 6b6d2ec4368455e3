// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/cuda/attend_kernels.cuh"

KVLEAN_CUDA_NAMESPACE_BEGIN
namespace detail {

/// Tokens of a chunk: enough blocks for the device, few enough partial outputs. Shapes alone.
[[nodiscard]] inline ChunkOutputs take_chunks(const CacheView& cache, const Queries& queries,
                                              Workspace& workspace) noexcept {
  ChunkOutputs outputs;
  outputs.row_tiles = ceil_div(queries.most() * cache.group_size, attend_rows);
  const u64 tokens = u64{cache.max_tokens} * cache.num_segments() * outputs.row_tiles;
  u32 chunk = 64;
  while (chunk < 1024 && tokens / chunk > 1024) chunk *= 2;
  outputs.chunk_tokens = chunk;
  outputs.chunks = ceil_div(cache.max_tokens, chunk);
  const std::size_t parts =
      std::size_t{cache.num_segments()} * outputs.row_tiles * outputs.chunks * attend_rows;
  outputs.values = workspace.take<float>(parts * cache.value_width);
  outputs.sums = workspace.take<RowSum>(parts);
  return outputs;
}

}  // namespace detail

/// Bytes of device workspace that attend takes.
[[nodiscard]] inline std::size_t attend_bytes_required(const CacheView& cache,
                                                       const Queries& queries) noexcept {
  Workspace counting = Workspace::counting();
  static_cast<void>(detail::take_chunks(cache, queries, counting));
  return counting.bytes_required();
}

/// Attention of few queries (decoding, verification of drafts) over ragged segments with log mass,
/// sinks, sliding windows and softcaps: kvlean::attend on the device. `values` becomes
/// [layer][sequence][query_head][count][value_width] in float, `lse` (or null) the natural
/// log-sum-exp [layer][sequence][query_head][count]; merge_parts joins such pairs. A query that
/// sees nothing gets zeros and an lse of -inf. queries.lse is not read.
///
/// 16-bit caches of width 64, 96, 128 and 256 (keys and values alike) use tensor cores: weights are
/// kept to 16 bits of mantissa (bf16) or 22 (f16), sums in float; within 1e-4 of the largest output
/// element. Others are computed in binary32. The same bits on every run. Two launches; work is
/// spread by tokens, so skewed heads cost what even ones do. Meant for up to a few dozen query rows
/// a KV head: the cache is read once for every 16.
///
/// Errors: those of check_cache and check_queries, null_pointer, workspace_too_small,
/// launch_failed.
[[nodiscard]] inline Status attend(const Context& context, const CacheView& cache,
                                   const Queries& queries, const Attention& attention,
                                   float* values, float* lse = nullptr) noexcept {
  KVLEAN_RETURN_IF_ERROR(check_cache(cache));
  KVLEAN_RETURN_IF_ERROR(check_queries(queries));
  if (values == nullptr) return StatusCode::null_pointer;
  const WorkspaceScope scope(context.workspace);
  const detail::ChunkOutputs outputs = detail::take_chunks(cache, queries, context.workspace);
  KVLEAN_RETURN_IF_ERROR(context.workspace.status());
  const detail::LogitSpec logits = detail::LogitSpec::of(attention, cache.key_width);
  const dim3 grid(outputs.chunks, cache.num_segments(), outputs.row_tiles);
  Status status = StatusCode::ok;
  const bool tensor =
      cache.key_width == cache.value_width && cache.key_dtype == cache.value_dtype &&
      detail::with_tensor_shape(
          cache.key_dtype, cache.key_width, [&](auto element, auto width, auto) noexcept {
            using E = decltype(element);
            const LaunchShape shape{.grid = grid, .block = detail::attend_threads};
            status = launch(context, shape,
                            logits.cap != 0.0f ? detail::attend_kernel<E, width(), true>
                                               : detail::attend_kernel<E, width(), false>,
                            cache, queries, attention, logits, outputs);
          });
  if (!tensor) {
    with_dtype(cache.key_dtype, [&](auto key) noexcept {
      with_dtype(cache.value_dtype, [&](auto value) noexcept {
        const auto kernel = logits.cap != 0.0f ? detail::attend_any_kernel<key(), value(), true>
                                               : detail::attend_any_kernel<key(), value(), false>;
        const std::size_t shared = std::size_t{detail::attend_rows} *
                                   (cache.key_width + cache.value_width) * sizeof(float);
        status = raise_shared_bytes(kernel, shared);
        if (!status) return;
        status =
            launch(context, {.grid = grid, .block = detail::attend_threads, .shared_bytes = shared},
                   kernel, cache, queries, attention, logits, outputs);
      });
    });
  }
  KVLEAN_RETURN_IF_ERROR(status);
  return launch(context,
                {.grid = dim3(queries.most() * cache.group_size, cache.num_segments()),
                 .block = detail::attend_threads},
                detail::join_chunks_kernel<>, cache, queries, attention, outputs, values, lse);
}

KVLEAN_CUDA_NAMESPACE_END
