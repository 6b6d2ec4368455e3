// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/cuda/attention_mass.cuh"
#include "kvlean/cuda/order.cuh"
#include "kvlean/cuda/score_keys.cuh"
#include "kvlean/score/h2o.hpp"
#include "kvlean/score/observed_attention.hpp"
#include "kvlean/score/snapkv.hpp"
#include "kvlean/score/tova.hpp"

// Scorers that read attention. The options are the CPU scorers themselves.

KVLEAN_CUDA_NAMESPACE_BEGIN
namespace detail {

/// The score of which device_score_key() is the key; NaN for 0.
[[nodiscard]] KVLEAN_DEVICE float score_of_key(u32 key) noexcept {
  if (key == 0) return NAN;
  return __uint_as_float((key & 0x80000000u) != 0 ? key & 0x7fffffffu : ~key);
}
/// Raises *best to the largest key of the block's warps.
KVLEAN_DEVICE void raise_best(u32* best, u32 key) noexcept {
  key = __reduce_max_sync(full_warp, key);
  if (threadIdx.x % warp_threads == 0 && key != 0) atomicMax(best, key);
}

/// Whether this block is the last of `blocks` that come here; what the others wrote can be read
/// then. The counter begins at 0.
[[nodiscard]] KVLEAN_DEVICE bool is_last_block(u32* counter, u32 blocks) noexcept {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(counter, 1u) == blocks - 1;
  __syncthreads();
  __threadfence();
  return last;
}

/// Blocks (tokens, segment) of a kernel whose blocks meet at a counter: few enough of them.
[[nodiscard]] inline dim3 meeting_grid(const CacheView& cache) noexcept {
  return dim3(smaller(ceil_div(cache.max_tokens, 256u), 128u), cache.num_segments());
}

/// Queries that could see a token with this position.
[[nodiscard]] KVLEAN_DEVICE u32 observers_of(const SegmentQueries& own, i32 position) noexcept {
  const u32 first = own.causal ? own.queries_before(position) : 0;
  u32 last = own.count;
  if (own.window != 0) {
    const i64 past = static_cast<i64>(position) + own.window;
    if (past < unseen_position) last = own.queries_before(static_cast<i32>(past));
  }
  return last > first ? last - first : 0;
}
/// ready_made_observers() of score/observed_mass.hpp.
[[nodiscard]] KVLEAN_DEVICE u32 given_observers(const CacheView& cache, u32 s, u32 length, u32 t,
                                                u32 observers) noexcept {
  const Segment& segment = cache.segments[s];
  const bool positioned = segment.positions != nullptr && cache.next_positions != nullptr;
  const i64 newer = positioned ? static_cast<i64>(cache.next_positions[cache.sequence_of(s)]) -
                                     segment.positions[t]
                               : static_cast<i64>(length) - t;
  const i64 most = observers != 0 ? static_cast<i64>(observers) : newer;
  return static_cast<u32>(larger(smaller(newer, most), i64{1}));
}

/// rank = mass / observers. Blocks (tokens, segment).
template <int = 0>
__global__ void per_observer_kernel(const CacheView cache, const Queries queries,
                                    const Attention attention, DeviceRagged<const float> mass,
                                    u32 observers, DeviceRagged<float> rank) {
  const u32 s = blockIdx.y;
  const u32 length = cache.lengths[s];
  const u32 t = blockIdx.x * blockDim.x + threadIdx.x;
  if (t >= length) return;
  u32 count = 0;
  if (queries.count != 0) {
    const SegmentQueries own = SegmentQueries::of(cache, queries, attention, s, length);
    count = observers_of(own, cache.segments[s].position(t));
  } else {
    count = given_observers(cache, s, length, t, observers);
  }
  const float x = mass.segment(s)[t];
  rank.segment(s)[t] = count != 0 ? x / static_cast<float>(count) : x;
}

/// A window's sums of one segment, [heads][stride], to mass and rank. With `best`, two zeros for
/// each segment, the window's own tokens rank above all others of the layer: the last block sees to
/// it. Blocks (tokens, segment).
template <int = 0>
__global__ void finish_window_kernel(const CacheView cache, const Queries queries,
                                     const float* sums, const float* pooled_rows, u32 heads,
                                     u64 stride, const SnapKVScorer scorer, const Scores scores,
                                     u32* best) {
  wait_for_previous();
  allow_next();
  const u32 s = blockIdx.y;
  const u32 length = cache.lengths[s];
  const u32 count =
      queries.counts != nullptr ? queries.counts[cache.sequence_of(s)] : queries.count;
  const u32 read = queries.newest != 0 ? smaller(queries.newest, count) : count;
  const u32 prefix = length - smaller(read, length);
  const float scale = 1.0f / static_cast<float>(larger(read, 1u));
  u32 key = 0;
  for (u32 t = blockIdx.x * blockDim.x + threadIdx.x; t < length; t += gridDim.x * blockDim.x) {
    const float* sum = sums + static_cast<u64>(s) * heads * stride;
    const auto reduce = [&](auto&& of_head) noexcept {
      float all = of_head(0);
      for (u32 h = 1; h < heads; ++h) {
        const float x = of_head(h);
        if (scorer.group == GroupReduction::max) {
          all = x > all || x != x ? x : all;
        } else {
          all += x;
        }
      }
      return scorer.group == GroupReduction::mean ? all / static_cast<float>(heads) : all;
    };
    const float mass = reduce([&](u32 h) noexcept { return sum[h * stride + t] * scale; });
    const auto pooled = [&](auto&& at) noexcept {
      const float own = at(t);
      if (own != own) return own;
      const u32 half = scorer.kernel / 2;
      const u32 begin = t > half ? t - half : 0;
      const u32 end = smaller(prefix, t + half + 1);
      float total = 0.0f;
      float largest = own;
      for (u32 i = begin; i < end; ++i) {
        const float x = at(i);
        total += x == x ? x : 0.0f;
        largest = x > largest ? x : largest;
      }
      return scorer.pooling == Pooling::max ? largest : total / static_cast<float>(scorer.kernel);
    };
    float rank = mass;
    if (t < prefix) {
      if (pooled_rows != nullptr) {
        const float* rows = pooled_rows + static_cast<u64>(s) * heads * stride;
        rank = reduce([&](u32 h) noexcept { return rows[h * stride + t] * scale; });
      } else if (scorer.order == PoolOrder::query_mean_group_pool) {
        rank = pooled([&](u32 i) noexcept {
          return reduce([&](u32 h) noexcept { return sum[h * stride + i] * scale; });
        });
      } else {
        rank = reduce([&](u32 h) noexcept {
          return pooled([&](u32 i) noexcept { return sum[h * stride + i] * scale; });
        });
      }
      key = larger(key, device_score_key(rank));
    }
    if (scores.mass.data != nullptr) scores.mass.segment(s)[t] = mass;
    scores.rank.segment(s)[t] = rank;
  }
  if (best == nullptr) return;
  const u32 first = s / cache.kv_heads * cache.kv_heads;
  raise_best(best + 2 * first, key);
  if (!is_last_block(best + 2 * first + 1, gridDim.x * cache.kv_heads)) return;
  const float top = score_of_key(__ldcg(best + 2 * first));
  const float pinned = top > -INFINITY ? top + 1.0f : 1.0f;
  for (u32 i = threadIdx.x; i < cache.kv_heads * read; i += blockDim.x) {
    const u32 other = first + i / read;
    const u32 other_length = cache.lengths[other];
    const u32 back = i % read;
    if (back < other_length) scores.rank.segment(other)[other_length - 1 - back] = pinned;
  }
}

inline constexpr u32 pooled_tokens = 64;     // outputs of a block
inline constexpr u32 most_row_kernel = 257;  // pooling width of single rows

/// pooled[s][head][t] = sum over the head's queries of their pooled probabilities. Blocks (tokens /
/// 64, segment * group + head); shared: 64 rows of 64 + kernel - 1 probabilities.
template <DType D, bool Capped>
__global__ void __launch_bounds__(float_threads)
    pooled_rows_kernel(const CacheView cache, const Queries queries, const Attention attention,
                       const LogitSpec logits, const RowTotals totals, u32 kernel, float* pooled,
                       u64 stride) {
  extern __shared__ float probability[];
  __shared__ FloatTiles tiles;
  wait_for_previous();
  allow_next();
  const u32 s = blockIdx.y / cache.group_size;
  const u32 head = blockIdx.y % cache.group_size;
  const u32 length = cache.lengths[s];
  const Segment& segment = cache.segments[s];
  const SegmentQueries own = SegmentQueries::of(cache, queries, attention, s, length);
  const u32 prefix = length - smaller(own.count, length);
  const u32 first = blockIdx.x * pooled_tokens;
  if (first >= prefix) return;
  const u32 half = kernel / 2;
  const u32 begin = first > half ? first - half : 0;
  const u32 end = smaller(prefix, first + pooled_tokens + half);
  const u32 pitch = pooled_tokens + 2 * half + 1;
  float total = 0.0f;  // of token first + threadIdx.x % 64, rows threadIdx.x / 64 of each 4
  for (u32 query = 0; query < own.count; query += float_tile) {
    for (u32 token = begin; token < end; token += float_tile) {
      float product[4][4];
      multiply_floats<D>(
          tiles, cache.key_width,
          [&](u32 r) noexcept -> const char* {
            return query + r < own.count ? own.row(head, query + r) : nullptr;
          },
          [&](u32 c) noexcept -> const char* {
            return token + c < end ? segment.key_row(token + c) : nullptr;
          },
          product);
#pragma unroll
      for (u32 i = 0; i < 4; ++i) {
        const u32 r = threadIdx.x / 16 * 4 + i;
        const u32 q = query + r;
#pragma unroll
        for (u32 j = 0; j < 4; ++j) {
          const u32 t = token + threadIdx.x % 16 + 16 * j;
          if (t >= end) continue;
          float p = 0.0f;
          const i32 at = segment.position(t);
          if (q < own.count && at <= own.last_seen(q) && at >= own.first_seen(q)) {
            const float exponent =
                logits.template exponent<Capped>(product[i][j], segment.mass_bias(t) * log2_e);
            p = totals.probability(exponent, totals.shift(cache, s, own, q, head), cache, s, q,
                                   head);
          }
          probability[r * pitch + t - begin] = p;
        }
      }
    }
    __syncthreads();
    const u32 t = first + threadIdx.x % pooled_tokens;
    if (t < prefix) {
      const u32 from = (t > half ? t - half : 0) - begin;
      const u32 to = smaller(prefix, t + half + 1) - begin;
      for (u32 r = threadIdx.x / pooled_tokens; r < smaller(float_tile, own.count - query);
           r += 4) {
        const float* row = probability + r * pitch;
        float largest = row[t - begin];
        if (largest == largest) {
          for (u32 i = from; i < to; ++i) largest = row[i] > largest ? row[i] : largest;
        }
        total += largest;
      }
    }
    __syncthreads();
  }
  __shared__ float part[4][pooled_tokens];
  part[threadIdx.x / pooled_tokens][threadIdx.x % pooled_tokens] = total;
  __syncthreads();
  const u32 t = first + threadIdx.x;
  if (threadIdx.x < pooled_tokens && t < prefix) {
    pooled[static_cast<u64>(blockIdx.y) * stride + t] =
        part[0][threadIdx.x] + part[1][threadIdx.x] + part[2][threadIdx.x] + part[3][threadIdx.x];
  }
}

[[nodiscard]] inline const Queries& window_queries(const Observation& seen) noexcept {
  return seen.window.count != 0 ? seen.window : seen.reference;
}

[[nodiscard]] inline Status score_window(const Context& context, const CacheView& cache,
                                         const SnapKVScorer& scorer, const Observation& seen,
                                         const Scores& scores, bool measure) noexcept {
  const WorkspaceScope scope(context.workspace);
  Queries queries = window_queries(seen);
  if (scorer.window != 0) queries = queries.last(scorer.window);
  RowSumShape rows;
  const RowTotals totals = take_row_totals(cache, queries, context.workspace, rows);
  const bool pool_rows = scorer.order == PoolOrder::pool_query_mean_group &&
                         scorer.pooling == Pooling::max && scorer.kernel > 1;
  // Sums over the group commute with everything but maxima.
  const bool summed = scorer.group != GroupReduction::max && !pool_rows &&
                      (scorer.pooling == Pooling::average || scorer.kernel == 1 ||
                       scorer.order == PoolOrder::query_mean_group_pool);
  const u32 heads = summed ? 1 : cache.group_size;
  const u64 stride = ceil_div(u64{cache.max_tokens}, u64{32}) * 32;
  const std::size_t all = cache.num_segments() * heads * stride;
  ColumnSumShape columns;
  columns.totals = context.workspace.take<float>(all);
  columns.stride = stride;
  columns.per_head = !summed;
  if (summed && scorer.group == GroupReduction::mean) {
    columns.factor = 1.0f / static_cast<float>(cache.group_size);
  }
  float* pooled = pool_rows ? context.workspace.take<float>(all) : nullptr;
  u32* best = scorer.pin_window ? context.workspace.take<u32>(2 * cache.num_segments()) : nullptr;
  columns.clear = best;
  if (measure) return StatusCode::ok;
  KVLEAN_RETURN_IF_ERROR(context.workspace.status());
  KVLEAN_RETURN_IF_ERROR(sum_rows(context, cache, queries, seen.attention, totals, rows));
  KVLEAN_RETURN_IF_ERROR(sum_columns(context, cache, queries, seen.attention, totals, columns));
  if (pool_rows) {
    const LogitSpec logits = LogitSpec::of(seen.attention, cache.key_width);
    const std::size_t shared =
        sizeof(float) * float_tile * (pooled_tokens + scorer.kernel / 2 * 2 + 1);
    Status status = StatusCode::ok;
    with_dtype(cache.key_dtype, [&](auto dtype) noexcept {
      const auto run = [&](auto kernel) noexcept {
        status = raise_shared_bytes(kernel, shared);
        if (!status) return;
        status = launch(context,
                        {.grid = dim3(ceil_div(cache.max_tokens, pooled_tokens),
                                      cache.num_segments() * cache.group_size),
                         .block = float_threads,
                         .shared_bytes = shared,
                         .overlap = true},
                        kernel, cache, queries, seen.attention, logits, totals, scorer.kernel,
                        pooled, stride);
      };
      if (logits.cap != 0.0f) {
        run(pooled_rows_kernel<dtype(), true>);
      } else {
        run(pooled_rows_kernel<dtype(), false>);
      }
    });
    KVLEAN_RETURN_IF_ERROR(status);
  }
  SnapKVScorer finish = scorer;
  if (summed) {  // the group is summed already, and so is its pooling
    finish.group = GroupReduction::sum;
    finish.order = PoolOrder::query_mean_group_pool;
  }
  return launch(context, {.grid = meeting_grid(cache), .block = 256, .overlap = true},
                finish_window_kernel<>, cache, queries, static_cast<const float*>(columns.totals),
                static_cast<const float*>(pooled), heads, stride, finish, scores, best);
}

/// mass = mean of the layer's rows, matched by position. With `pin`, the last token ranks above all
/// others of its segment: the last block sees to it. `best`: two zeros for each segment. Blocks
/// (tokens, segment).
template <int = 0>
__global__ void mean_over_layer_kernel(const CacheView cache, const float* rows, u64 stride,
                                       float factor, const Scores scores, u32* best, bool pin) {
  wait_for_previous();
  allow_next();
  const u32 s = blockIdx.y;
  const u32 length = cache.lengths[s];
  u32 key = 0;
  for (u32 t = blockIdx.x * blockDim.x + threadIdx.x; t < length; t += gridDim.x * blockDim.x) {
    const u32 first = s / cache.kv_heads * cache.kv_heads;
    const Segment& segment = cache.segments[s];
    float sum = 0.0f;
    for (u32 other = first; other < first + cache.kv_heads; ++other) {
      const u32 other_length = cache.lengths[other];
      u32 match = t;
      if (segment.positions != nullptr && other != s) {
        match = tokens_before(cache.segments[other], other_length, segment.positions[t]);
        if (match < other_length && cache.segments[other].position(match) != segment.positions[t]) {
          match = other_length;
        }
      }
      if (match < other_length) sum += rows[other * stride + match];
    }
    sum *= factor;
    scores.rank.segment(s)[t] = sum;
    if (scores.mass.data != nullptr) scores.mass.segment(s)[t] = sum;
    if (t + 1 < length) key = larger(key, device_score_key(sum));
  }
  if (!pin) return;
  raise_best(best + 2 * s, key);
  if (!is_last_block(best + 2 * s + 1, gridDim.x) || threadIdx.x != 0) return;
  const float top = score_of_key(__ldcg(best + 2 * s));
  if (length > 1 && top > -INFINITY) scores.rank.segment(s)[length - 1] = top + 1.0f;
}

[[nodiscard]] inline Status score_last(const Context& context, const CacheView& cache,
                                       const TOVAScorer& scorer, const Observation& seen,
                                       const Scores& scores, bool measure) noexcept {
  const WorkspaceScope scope(context.workspace);
  const Queries queries = window_queries(seen).last(1);
  RowSumShape rows;
  const RowTotals totals = take_row_totals(cache, queries, context.workspace, rows);
  ColumnSumShape columns;
  columns.stride = ceil_div(u64{cache.max_tokens}, u64{32}) * 32;
  columns.totals = context.workspace.take<float>(cache.num_segments() * columns.stride);
  u32* best = context.workspace.take<u32>(2 * cache.num_segments());
  columns.clear = best;
  if (measure) return StatusCode::ok;
  KVLEAN_RETURN_IF_ERROR(context.workspace.status());
  KVLEAN_RETURN_IF_ERROR(sum_rows(context, cache, queries, seen.attention, totals, rows));
  KVLEAN_RETURN_IF_ERROR(sum_columns(context, cache, queries, seen.attention, totals, columns));
  const float factor = 1.0f / static_cast<float>(cache.kv_heads * cache.group_size);
  return launch(context, {.grid = meeting_grid(cache), .block = 256, .overlap = true},
                mean_over_layer_kernel<>, cache, static_cast<const float*>(columns.totals),
                columns.stride, factor, scores, best, scorer.pin_last);
}

[[nodiscard]] inline Status check_window(const CacheView& cache, const Queries& queries,
                                         const Scores& scores) noexcept {
  KVLEAN_RETURN_IF_ERROR(check_rank(cache, scores));
  return check_queries(queries);
}

/// Where the accumulated mass goes: scores.mass, or the ranks themselves where it is not wanted.
[[nodiscard]] inline Status observe_mass(const Context& context, const CacheView& cache,
                                         GroupReduction group, const Observation& seen,
                                         DeviceRagged<float> mass) noexcept {
  if (seen.mass) {
    return launch(context, {.grid = token_grid(cache), .block = 256}, copy_scores_kernel<>, cache,
                  seen.mass, mass, DeviceRagged<float>{});
  }
  return accumulate_attention(context, cache, seen.reference, seen.attention, group, mass);
}

}  // namespace detail

/// Bytes of device workspace that a scorer takes for these shapes.
[[nodiscard]] inline std::size_t score_bytes_required(const CacheView& cache,
                                                      const SnapKVScorer& scorer,
                                                      const Observation& seen) noexcept {
  Workspace counting = Workspace::counting();
  const Context context{nullptr, counting, nullptr};
  static_cast<void>(detail::score_window(context, cache, scorer, seen, {}, true));
  return counting.bytes_required();
}
[[nodiscard]] inline std::size_t score_bytes_required(const CacheView& cache,
                                                      const TOVAScorer& scorer,
                                                      const Observation& seen) noexcept {
  Workspace counting = Workspace::counting();
  const Context context{nullptr, counting, nullptr};
  static_cast<void>(detail::score_last(context, cache, scorer, seen, {}, true));
  return counting.bytes_required();
}
[[nodiscard]] inline std::size_t score_bytes_required(const CacheView& cache,
                                                      const H2OScorer& scorer,
                                                      const Observation& seen) noexcept {
  return seen.mass ? 0 : attention_mass_bytes_required(cache, seen.reference, scorer.group);
}
[[nodiscard]] inline std::size_t score_bytes_required(const CacheView& cache,
                                                      const ObservedAttentionScorer& scorer,
                                                      const Observation& seen) noexcept {
  return seen.mass ? 0 : attention_mass_bytes_required(cache, seen.reference, scorer.group);
}

/// The window's attention, pooled: kvlean::SnapKVScorer with all its options; scores.mass may be
/// absent. Four launches for all layers and sequences; two where queries.lse is given. Max pooling
/// of single queries (PoolOrder::pool_query_mean_group) runs in binary32 without tensor cores.
/// Errors: those of check_cache and check_queries, null_pointer, invalid_option (even kernel, or
/// one above 257 for max pooling of single queries), workspace_too_small, launch_failed.
[[nodiscard]] inline Status score(const Context& context, const CacheView& cache,
                                  const SnapKVScorer& scorer, const Observation& seen,
                                  const Scores& scores) noexcept {
  KVLEAN_RETURN_IF_ERROR(detail::check_window(cache, detail::window_queries(seen), scores));
  if (scorer.kernel % 2 == 0) return StatusCode::invalid_option;
  if (scorer.order == PoolOrder::pool_query_mean_group && scorer.pooling == Pooling::max &&
      scorer.kernel > detail::most_row_kernel) {
    return StatusCode::invalid_option;
  }
  return detail::score_window(context, cache, scorer, seen, scores, false);
}

/// The last query's attention: kvlean::TOVAScorer. Errors as for SnapKVScorer.
[[nodiscard]] inline Status score(const Context& context, const CacheView& cache,
                                  const TOVAScorer& scorer, const Observation& seen,
                                  const Scores& scores) noexcept {
  KVLEAN_RETURN_IF_ERROR(detail::check_window(cache, detail::window_queries(seen), scores));
  return detail::score_last(context, cache, scorer, seen, scores, false);
}

/// Accumulated attention: kvlean::H2OScorer. scores.mass may be the same array as scores.rank,
/// which saves a copy, or absent. Errors: those of accumulate_attention.
[[nodiscard]] inline Status score(const Context& context, const CacheView& cache,
                                  const H2OScorer& scorer, const Observation& seen,
                                  const Scores& scores) noexcept {
  KVLEAN_RETURN_IF_ERROR(detail::check_rank(cache, scores));
  KVLEAN_RETURN_IF_ERROR(detail::observe_mass(context, cache, scorer.group, seen, scores.rank));
  if (!scores.mass || scores.mass.data == scores.rank.data) return StatusCode::ok;
  const DeviceRagged<const float> from{scores.rank.data, scores.rank.stride, scores.rank.first};
  return launch(context, {.grid = detail::token_grid(cache), .block = 256},
                detail::copy_scores_kernel<>, cache, from, scores.mass, DeviceRagged<float>{});
}

/// Mean received attention: kvlean::ObservedAttentionScorer. Errors: those of accumulate_attention.
[[nodiscard]] inline Status score(const Context& context, const CacheView& cache,
                                  const ObservedAttentionScorer& scorer, const Observation& seen,
                                  const Scores& scores) noexcept {
  KVLEAN_RETURN_IF_ERROR(detail::check_rank(cache, scores));
  const DeviceRagged<float> mass =
      scores.mass && scores.mass.data != scores.rank.data ? scores.mass : scores.rank;
  KVLEAN_RETURN_IF_ERROR(detail::observe_mass(context, cache, scorer.group, seen, mass));
  return launch(context, {.grid = detail::token_grid(cache), .block = 256},
                detail::per_observer_kernel<>, cache, seen.mass ? Queries{} : seen.reference,
                seen.attention, DeviceRagged<const float>{mass.data, mass.stride, mass.first},
                seen.observers, scores.rank);
}

KVLEAN_CUDA_NAMESPACE_END
