// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/cuda/attend_any.cuh"
#include "kvlean/cuda/attend_join.cuh"
#include "kvlean/cuda/attend_kernels.cuh"

KVLEAN_CUDA_NAMESPACE_BEGIN
namespace detail {

/// Blocks as many as the device runs at once, `blocks_each` a multiprocessor.
[[nodiscard]] inline AttendPieces take_pieces(const CacheView& cache, const Queries& queries,
                                              u32 blocks_each, Workspace& workspace) noexcept {
  AttendPieces pieces;
  const u32 rows = queries.most() * cache.group_size;
  pieces.row_tiles = ceil_div(rows, attend_rows);
  pieces.rows = smaller(rows, attend_rows);
  pieces.blocks = smaller(multiprocessors() * blocks_each, most_attend_blocks);
  const std::size_t units = std::size_t{cache.num_segments()} * pieces.row_tiles;
  const std::size_t all = (pieces.blocks + units) * pieces.rows;
  pieces.values = workspace.take<float>(all * cache.value_width);
  pieces.sums = workspace.take<RowSum>(all);
  return pieces;
}

/// Whether tensor cores do it, and how many blocks a multiprocessor runs at once. A device with
/// little shared memory (less than 133 KiB a block) does width 256 without them.
[[nodiscard]] inline bool attends_by_tensor_cores(const CacheView& cache,
                                                  u32& blocks_each) noexcept {
  blocks_each = attend_any_blocks;
  if (cache.key_width != cache.value_width || cache.key_dtype != cache.value_dtype) return false;
  bool fits = false;
  const auto look = [&](auto, auto width, auto) noexcept {
    using Stage = AttendStage<width()>;
    fits = Stage::block_bytes + 1024 <= most_shared_bytes();
    if (fits) blocks_each = Stage::blocks;
  };
  return with_tensor_shape(cache.key_dtype, cache.key_width, look) && fits;
}

}  // namespace detail

/// Bytes of device workspace that attend takes on the current device.
[[nodiscard]] inline std::size_t attend_bytes_required(const CacheView& cache,
                                                       const Queries& queries) noexcept {
  Workspace counting = Workspace::counting();
  u32 blocks_each = 0;
  static_cast<void>(detail::attends_by_tensor_cores(cache, blocks_each));
  static_cast<void>(detail::take_pieces(cache, queries, blocks_each, counting));
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
  u32 blocks_each = 0;
  const bool by_tensor_cores = detail::attends_by_tensor_cores(cache, blocks_each);
  const detail::AttendPieces pieces =
      detail::take_pieces(cache, queries, blocks_each, context.workspace);
  KVLEAN_RETURN_IF_ERROR(context.workspace.status());
  const detail::LogitSpec logits = detail::LogitSpec::of(attention, cache.key_width);
  Status status = StatusCode::ok;
  const auto run = [&](auto kernel, std::size_t shared) noexcept {
    status = raise_shared_bytes(kernel, shared);
    if (!status) return;
    status = launch(
        context, {.grid = pieces.blocks, .block = detail::attend_threads, .shared_bytes = shared},
        kernel, cache, queries, attention, logits, pieces);
  };
  if (by_tensor_cores) {
    static_cast<void>(detail::with_tensor_shape(
        cache.key_dtype, cache.key_width, [&](auto element, auto width, auto) noexcept {
          using E = decltype(element);
          constexpr std::size_t bytes = detail::AttendStage<width()>::block_bytes;
          if (pieces.rows <= 8) {
            run(logits.cap != 0.0f ? detail::attend_kernel<E, width(), true, true>
                                   : detail::attend_kernel<E, width(), false, true>,
                bytes);
          } else {
            run(logits.cap != 0.0f ? detail::attend_kernel<E, width(), true, false>
                                   : detail::attend_kernel<E, width(), false, false>,
                bytes);
          }
        }));
  } else {
    with_dtype(cache.key_dtype, [&](auto key) noexcept {
      with_dtype(cache.value_dtype, [&](auto value) noexcept {
        run(logits.cap != 0.0f ? detail::attend_any_kernel<key(), value(), true>
                               : detail::attend_any_kernel<key(), value(), false>,
            std::size_t{detail::attend_rows} * (cache.key_width + cache.value_width) *
                sizeof(float));
      });
    });
  }
  KVLEAN_RETURN_IF_ERROR(status);
  return launch(context,
                {.grid = dim3(queries.most() * cache.group_size, cache.num_segments()),
                 .block = detail::attend_threads,
                 .overlap = true},
                detail::join_pieces_kernel<>, cache, queries, attention, pieces, values, lse);
}

KVLEAN_CUDA_NAMESPACE_END
