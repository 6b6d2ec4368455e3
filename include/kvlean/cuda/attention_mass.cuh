// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/cuda/float_sums.cuh"

// Attention mass on the device: what every token received from every query, in two passes over the
// keys (one, if the engine hands over its log-sum-exp) and memory for the queries' sums only.

KVLEAN_CUDA_NAMESPACE_BEGIN
namespace detail {

/// Parts of the keys, so that few query rows still fill the device. Depends on shapes alone.
[[nodiscard]] inline u32 key_splits(const CacheView& cache, u32 row_tiles) noexcept {
  constexpr u32 wanted_blocks = 1056;  // eight for each multiprocessor of an H200
  const u32 blocks = row_tiles * cache.num_segments();
  const u32 most = ceil_div(cache.max_tokens, 4 * tile_rows);
  return larger(1u, smaller(wanted_blocks / larger(blocks, 1u), most));
}

[[nodiscard]] inline RowTotals take_row_totals(const CacheView& cache, const Queries& queries,
                                               Workspace& workspace, RowSumShape& shape) noexcept {
  RowTotals totals;
  totals.row_stride = u64{queries.most()} * cache.group_size;
  const std::size_t all = cache.num_segments() * totals.row_stride;
  totals.log2_sum = workspace.take<float>(all);
  totals.share = workspace.take<float>(all);
  shape.splits = 1;
  if (queries.lse == nullptr) {
    const u64 tiles = ceil_div(totals.row_stride, u64{float_tile});
    shape.splits = key_splits(cache, static_cast<u32>(tiles));
    if (shape.splits > 1) shape.parts = workspace.take<RowSum>(all * shape.splits);
  }
  return totals;
}

[[nodiscard]] inline Status sum_rows(const Context& context, const CacheView& cache,
                                     const Queries& queries, const Attention& attention,
                                     const RowTotals& totals, const RowSumShape& shape) noexcept {
  const u32 segments = cache.num_segments();
  const u32 rows = static_cast<u32>(totals.row_stride);
  const dim3 row_grid(ceil_div(rows, 128u), segments);
  if (queries.lse != nullptr) {
    return launch(context, {.grid = row_grid, .block = 128}, given_row_sums_kernel<>, cache,
                  queries, totals);
  }
  const LogitSpec logits = LogitSpec::of(attention, cache.key_width);
  Status status = StatusCode::ok;
  const bool tensor = with_tensor_shape(
      cache.key_dtype, cache.key_width, [&](auto element, auto width, auto tiles) noexcept {
        using E = decltype(element);
        constexpr u32 bytes = 2 * SharedTile<width()>::bytes;
        const auto run = [&](auto kernel) noexcept {
          status = raise_shared_bytes(kernel, bytes);
          if (!status) return;
          const u32 block_rows = mass_warps * tiles() * 16;
          status = launch(context,
                          {.grid = dim3(ceil_div(rows, block_rows) * shape.splits, segments),
                           .block = mass_threads,
                           .shared_bytes = bytes},
                          kernel, cache, queries, attention, logits, totals, shape);
        };
        if (logits.cap != 0.0f) {
          run(row_sums_kernel<E, width(), tiles(), true>);
        } else {
          run(row_sums_kernel<E, width(), tiles(), false>);
        }
      });
  if (!tensor) {
    with_dtype(cache.key_dtype, [&](auto dtype) noexcept {
      const auto run = [&](auto kernel) noexcept {
        status = launch(context,
                        {.grid = dim3(ceil_div(rows, float_tile) * shape.splits, segments),
                         .block = float_threads},
                        kernel, cache, queries, attention, logits, totals, shape);
      };
      if (logits.cap != 0.0f) {
        run(float_row_sums_kernel<dtype(), true>);
      } else {
        run(float_row_sums_kernel<dtype(), false>);
      }
    });
  }
  if (!status || shape.parts == nullptr) return status;
  return launch(context, {.grid = row_grid, .block = 128}, join_row_sums_kernel<>, cache, queries,
                attention, totals, shape);
}

[[nodiscard]] inline Status sum_columns(const Context& context, const CacheView& cache,
                                        const Queries& queries, const Attention& attention,
                                        const RowTotals& totals, ColumnSumShape shape) noexcept {
  const LogitSpec logits = LogitSpec::of(attention, cache.key_width);
  const u32 segments = cache.num_segments();
  const u64 rows = u64{ceil_div(queries.most(), 8u)} * 8 * cache.group_size;
  const bool resident = rows <= 4 * tile_rows;
  shape.stages = rows <= 2 * tile_rows || !resident ? 2 : 4;
  Status status = StatusCode::ok;
  const bool tensor = with_tensor_shape(
      cache.key_dtype, cache.key_width, [&](auto element, auto width, auto tiles) noexcept {
        using E = decltype(element);
        const u32 bytes = shape.stages * SharedTile<width()>::bytes;
        const auto run = [&](auto kernel) noexcept {
          status = raise_shared_bytes(kernel, bytes);
          if (!status) return;
          u32 blocks = ceil_div(cache.max_tokens, mass_warps * tiles() * 16);
          // Queries that stay in shared memory are loaded once for several tiles of keys.
          if (resident) blocks = smaller(blocks, larger(1u, 8 * multiprocessors() / segments));
          status =
              launch(context,
                     {.grid = dim3(blocks, segments), .block = mass_threads, .shared_bytes = bytes},
                     kernel, cache, queries, attention, logits, totals, shape);
        };
        if (logits.cap != 0.0f) {
          run(column_sums_kernel<E, width(), tiles(), true>);
        } else {
          run(column_sums_kernel<E, width(), tiles(), false>);
        }
      });
  if (!tensor) {
    with_dtype(cache.key_dtype, [&](auto dtype) noexcept {
      const auto run = [&](auto kernel) noexcept {
        status = launch(context,
                        {.grid = dim3(ceil_div(cache.max_tokens, float_tile), segments),
                         .block = float_threads},
                        kernel, cache, queries, attention, logits, totals, shape);
      };
      if (logits.cap != 0.0f) {
        run(float_column_sums_kernel<dtype(), true>);
      } else {
        run(float_column_sums_kernel<dtype(), false>);
      }
    });
  }
  return status;
}

/// out[s][t] (+)= the largest of the group's totals, NaN if any is. Blocks (tokens, segment).
template <int = 0>
__global__ void max_over_group_kernel(const CacheView cache, const float* per_head, u64 stride,
                                      DeviceRagged<float> out, bool add) {
  const u32 s = blockIdx.y;
  const u32 t = blockIdx.x * blockDim.x + threadIdx.x;
  if (t >= cache.lengths[s]) return;
  float largest = per_head[static_cast<u64>(s) * cache.group_size * stride + t];
  for (u32 h = 1; h < cache.group_size; ++h) {
    const float x = per_head[(static_cast<u64>(s) * cache.group_size + h) * stride + t];
    largest = x > largest || x != x ? x : largest;
  }
  float* to = out.segment(s) + t;
  *to = add ? *to + largest : largest;
}

/// Everything of accumulate_attention but the checks.
[[nodiscard]] inline Status accumulate(const Context& context, const CacheView& cache,
                                       const Queries& queries, const Attention& attention,
                                       GroupReduction group, DeviceRagged<float> mass, bool add,
                                       bool measure) noexcept {
  const WorkspaceScope scope(context.workspace);
  RowSumShape rows;
  const RowTotals totals = take_row_totals(cache, queries, context.workspace, rows);
  ColumnSumShape columns;
  // The kernels address totals by segment; other arrangements and maxima pass through scratch.
  const bool direct = group != GroupReduction::max && mass.first == nullptr;
  columns.per_head = group == GroupReduction::max;
  columns.add = direct && add;
  columns.stride = direct ? mass.stride : u64{cache.max_tokens};
  columns.totals = mass.data;
  if (!direct) {
    const u32 heads = columns.per_head ? cache.group_size : 1;
    columns.totals = context.workspace.take<float>(cache.num_segments() * heads * columns.stride);
  }
  if (group == GroupReduction::mean) columns.factor = 1.0f / static_cast<float>(cache.group_size);
  if (measure) return StatusCode::ok;
  KVLEAN_RETURN_IF_ERROR(context.workspace.status());
  KVLEAN_RETURN_IF_ERROR(sum_rows(context, cache, queries, attention, totals, rows));
  KVLEAN_RETURN_IF_ERROR(sum_columns(context, cache, queries, attention, totals, columns));
  if (direct) return StatusCode::ok;
  CacheView one = cache;
  if (!columns.per_head) one.group_size = 1;
  return launch(
      context, {.grid = dim3(ceil_div(cache.max_tokens, 256u), cache.num_segments()), .block = 256},
      max_over_group_kernel<>, one, columns.totals, columns.stride, mass, add);
}

}  // namespace detail

/// Bytes of device workspace that accumulate_attention takes. Only the shapes of the arguments are
/// read.
[[nodiscard]] inline std::size_t attention_mass_bytes_required(
    const CacheView& cache, const Queries& queries, GroupReduction group,
    DeviceRagged<float> mass = {}) noexcept {
  Workspace counting = Workspace::counting();
  const Context context{nullptr, counting, nullptr};
  static_cast<void>(detail::accumulate(context, cache, queries, {}, group, mass, false, true));
  return counting.bytes_required();
}

/// mass[segment][token] becomes (or, with `add`, grows by) the attention that the group's queries
/// pay to every token of all layers and sequences: kvlean::accumulate_attention on the device,
/// whose rules for NaN, infinities, sinks and masks it follows. `mass` overlaps nothing that is
/// read.
///
/// 16-bit caches of width 64, 96, 128 and 256 are multiplied by tensor cores with float sums, all
/// others in binary32. Within 1e-4 of the largest value of a segment (f16, bf16) or 1e-5 (f32) of
/// the CPU's; the same bits on every run. Two kernels and one small one, with queries.lse one and a
/// small one.
///
/// Errors: those of check_cache and check_queries, null_pointer (mass), workspace_too_small,
/// launch_failed. O(query heads * queries * tokens * width) work, halved by the causal mask.
[[nodiscard]] inline Status accumulate_attention(const Context& context, const CacheView& cache,
                                                 const Queries& queries, const Attention& attention,
                                                 GroupReduction group, DeviceRagged<float> mass,
                                                 bool add = false) noexcept {
  KVLEAN_RETURN_IF_ERROR(check_cache(cache));
  KVLEAN_RETURN_IF_ERROR(check_queries(queries));
  if (!mass) return StatusCode::null_pointer;
  return detail::accumulate(context, cache, queries, attention, group, mass, add, false);
}

KVLEAN_CUDA_NAMESPACE_END
