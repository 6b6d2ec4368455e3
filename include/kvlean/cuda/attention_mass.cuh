// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/cuda/float_sums.cuh"
#include "kvlean/cuda/prefill_sums.cuh"

// Attention mass on the device: what every token received from every query, in two passes over the
// keys (one, if the engine hands over its log-sum-exp) and memory for the queries' sums only.

KVLEAN_CUDA_NAMESPACE_BEGIN
namespace detail {

/// Parts of the keys, so that few query rows still fill the device. Depends on shapes alone.
[[nodiscard]] inline u32 key_splits(const CacheView& cache, u64 row_tiles) noexcept {
  constexpr u64 resident_blocks = 264;  // two for each multiprocessor of an H200
  const u64 blocks = row_tiles * cache.num_segments();
  const u32 most = larger(1u, ceil_div(cache.max_tokens, 2 * tile_rows));
  // The first number that leaves clearly fewer places empty while the last blocks run.
  u32 best = 1;
  u64 best_use = 0;
  for (u32 splits = 1; splits <= most; ++splits) {
    const u64 all = blocks * splits;
    if (splits != 1 && all > 4 * resident_blocks) break;
    const u64 use = all * 1024 / (ceil_div(all, resident_blocks) * resident_blocks);
    if (use > best_use + 20) {
      best = splits;
      best_use = use;
    }
  }
  return best;
}

/// Rows of the queries of a group as StreamedRows counts them.
[[nodiscard]] inline u64 streamed_rows(const CacheView& cache, const Queries& queries,
                                       bool per_head) noexcept {
  const u64 count = queries.most();
  return (per_head ? ceil_div(count, u64{16}) * 16 : count) * cache.group_size;
}

/// Whether so many rows stay in shared memory while the keys pass, as column_sums_kernel wants
/// them.
[[nodiscard]] inline bool stays_resident(const CacheView& cache, u64 rows) noexcept {
  if (rows > resident_tiles * tile_rows) return false;
  const u64 staged = sum_warps * (cache.key_width <= 128 ? 32 : 16);
  const u64 all = ceil_div(rows, u64{tile_rows}) * tile_rows + staged;
  return all * (cache.key_row_bytes() + 16) + 4096 <= most_shared_bytes();
}

[[nodiscard]] inline RowTotals take_row_totals(const CacheView& cache, const Queries& queries,
                                               Workspace& workspace, RowSumShape& shape) noexcept {
  RowTotals totals;
  totals.row_stride = u64{queries.most()} * cache.group_size;
  totals.lse = queries.lse;
  totals.lse_stride = queries.count;
  const std::size_t all = cache.num_segments() * totals.row_stride;
  totals.minus_log2 = workspace.take<float>(all);
  if (queries.lse != nullptr) return totals;
  totals.share = workspace.take<float>(all);
  u32 tiles = 0;
  u32 parts = 1;
  const bool tensor =
      with_tensor_shape(cache.key_dtype, cache.key_width, [&](auto, auto, auto row_tiles) noexcept {
        const u32 warp_rows = 16 * row_tiles();
        shape.row_warps = totals.row_stride <= 2 * warp_rows   ? 2
                          : totals.row_stride <= 4 * warp_rows ? 4
                                                               : 8;
        parts = sum_warps / shape.row_warps;
        tiles = static_cast<u32>(ceil_div(totals.row_stride, u64{shape.row_warps * warp_rows}));
      });
  if (!tensor) tiles = static_cast<u32>(ceil_div(totals.row_stride, u64{float_tile}));
  shape.splits = key_splits(cache, tiles);
  shape.count = shape.splits * parts;
  if (shape.count > 1) shape.parts = workspace.take<RowSum>(all * shape.count);
  return totals;
}

/// Calls function(E{}, width) where warpgroup products serve these rows; false if they don't.
template <class Function>
[[nodiscard]] bool with_warpgroups(const CacheView& cache, const LogitSpec& logits,
                                   Function&& function) noexcept {
  if (logits.cap != 0.0f || cache.has_log_mass) return false;
  const auto with_width = [&](auto element, auto width) noexcept {
    if (!has_warpgroups(prefill_column_sums_kernel<decltype(element), width()>)) return false;
    function(element, width);
    return true;
  };
  const auto with_element = [&](auto element) noexcept {
    if (cache.key_width == 64) return with_width(element, std::integral_constant<u32, 64>{});
    if (cache.key_width == 128) return with_width(element, std::integral_constant<u32, 128>{});
    return false;
  };
  if (cache.key_dtype == DType::bf16) return with_element(__nv_bfloat16{});
  if (cache.key_dtype == DType::f16) return with_element(__half{});
  return false;
}

[[nodiscard]] inline Status sum_rows(const Context& context, const CacheView& cache,
                                     const Queries& queries, const Attention& attention,
                                     const RowTotals& totals, const RowSumShape& shape) noexcept {
  const u32 segments = cache.num_segments();
  const u32 rows = static_cast<u32>(totals.row_stride);
  if (totals.lse != nullptr) {
    if (stays_resident(cache, streamed_rows(cache, queries, true))) {
      return StatusCode::ok;  // read where they lie
    }
    return launch(context,
                  {.grid = dim3(ceil_div(rows, 256u), segments), .block = 256, .overlap = true},
                  given_row_sums_kernel<>, cache, queries, totals);
  }
  const LogitSpec logits = LogitSpec::of(attention, cache.key_width);
  Status status = StatusCode::ok;
  if (shape.count == 1 && with_warpgroups(cache, logits, [&](auto element, auto width) noexcept {
        const auto kernel = prefill_row_sums_kernel<decltype(element), width()>;
        status = raise_shared_bytes(kernel, prefill_shared_bytes<width()>);
        if (!status) return;
        status = launch(context,
                        {.grid = dim3(segments, ceil_div(rows, prefill_rows)),
                         .block = prefill_threads,
                         .shared_bytes = prefill_shared_bytes<width()>,
                         .overlap = true},
                        kernel, cache, queries, attention, logits, totals);
      })) {
    return status;
  }
  const bool tensor = with_tensor_shape(
      cache.key_dtype, cache.key_width, [&](auto element, auto width, auto tiles) noexcept {
        using E = decltype(element);
        using Tile = PaddedTile<width()>;
        const auto run = [&](auto kernel) noexcept {
          const u32 bytes = larger(Tile::stages * Tile::bytes,
                                   sum_warps * StationaryRows<width(), tiles()>::staged_bytes);
          status = raise_shared_bytes(kernel, bytes);
          if (!status) return;
          const u32 block_rows = shape.row_warps * tiles() * 16;
          status = launch(context,
                          {.grid = dim3(segments, ceil_div(rows, block_rows) * shape.splits),
                           .block = sum_threads,
                           .shared_bytes = bytes,
                           .overlap = true},
                          kernel, cache, queries, attention, logits, totals, shape);
        };
        if (logits.cap != 0.0f || cache.has_log_mass) {
          run(row_sums_kernel<E, width(), tiles(), false>);
        } else {
          run(row_sums_kernel<E, width(), tiles(), true>);
        }
      });
  if (!tensor) {
    with_dtype(cache.key_dtype, [&](auto dtype) noexcept {
      const auto run = [&](auto kernel) noexcept {
        status = launch(context,
                        {.grid = dim3(ceil_div(rows, float_tile) * shape.splits, segments),
                         .block = float_threads,
                         .overlap = true},
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
  return launch(context,
                {.grid = dim3(ceil_div(rows, 4u), segments), .block = 128, .overlap = true},
                join_row_sums_kernel<>, cache, queries, attention, totals,
                static_cast<const RowSum*>(shape.parts), shape.count);
}

[[nodiscard]] inline Status sum_columns(const Context& context, const CacheView& cache,
                                        const Queries& queries, const Attention& attention,
                                        const RowTotals& totals, ColumnSumShape shape) noexcept {
  const LogitSpec logits = LogitSpec::of(attention, cache.key_width);
  const u32 segments = cache.num_segments();
  const u64 rows = streamed_rows(cache, queries, shape.per_head);
  shape.resident = stays_resident(cache, rows);
  Status status = StatusCode::ok;
  if (!shape.resident && !shape.per_head &&
      with_warpgroups(cache, logits, [&](auto element, auto width) noexcept {
        const auto kernel = prefill_column_sums_kernel<decltype(element), width()>;
        status = raise_shared_bytes(kernel, prefill_shared_bytes<width()>);
        if (!status) return;
        status = launch(context,
                        {.grid = dim3(segments, ceil_div(cache.max_tokens, prefill_rows)),
                         .block = prefill_threads,
                         .shared_bytes = prefill_shared_bytes<width()>,
                         .overlap = true},
                        kernel, cache, queries, attention, logits, totals, shape);
      })) {
    return status;
  }
  const bool tensor = with_tensor_shape(
      cache.key_dtype, cache.key_width, [&](auto element, auto width, auto tiles) noexcept {
        using E = decltype(element);
        using Tile = PaddedTile<width()>;
        const auto run = [&](auto kernel) noexcept {
          constexpr u32 staged = sum_warps * StationaryRows<width(), tiles()>::staged_bytes;
          u32 blocks = ceil_div(cache.max_tokens, sum_warps * tiles() * 16);
          u32 bytes = larger(Tile::stages * Tile::bytes, staged);
          if (shape.resident) {
            shape.tiles = static_cast<u32>(ceil_div(rows, u64{tile_rows}));
            bytes = shape.tiles * Tile::bytes + staged;
            // Queries are loaded once for several blocks of keys; the device stays full.
            const u32 places = 2 * multiprocessors();
            const u32 each =
                places / segments >= 4 ? places / segments : ceil_div(4 * places, segments);
            blocks = smaller(blocks, each);
          }
          status = raise_shared_bytes(kernel, bytes);
          if (!status) return;
          status = launch(context,
                          {.grid = dim3(segments, blocks),
                           .block = sum_threads,
                           .shared_bytes = bytes,
                           .overlap = true},
                          kernel, cache, queries, attention, logits, totals, shape);
        };
        if (logits.cap != 0.0f || cache.has_log_mass) {
          run(column_sums_kernel<E, width(), tiles(), false>);
        } else {
          run(column_sums_kernel<E, width(), tiles(), true>);
        }
      });
  if (!tensor) {
    with_dtype(cache.key_dtype, [&](auto dtype) noexcept {
      const auto run = [&](auto kernel) noexcept {
        status = launch(context,
                        {.grid = dim3(ceil_div(cache.max_tokens, float_tile), segments),
                         .block = float_threads,
                         .overlap = true},
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
