// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <limits>

#include "kvlean/observe/attention_mass.hpp"
#include "kvlean/score/observed_mass.hpp"
#include "kvlean/score/pooling.hpp"
#include "kvlean/score/preconditions.hpp"

KVLEAN_NAMESPACE_BEGIN

/// In which order a window's attention is pooled along tokens and reduced over queries and heads.
/// With average pooling and a mean or sum over the group all three agree up to rounding.
enum class PoolOrder : u8 {
  query_mean_pool_group,  ///< mean over queries, pool, reduce the group (NVIDIA/kvpress)
  query_mean_group_pool,  ///< mean over queries, reduce the group, pool (the Ada-KV authors' code)
  pool_query_mean_group,  ///< pool every query's row, mean over queries, reduce (the papers' text)
};

/// Observation window (SnapKV, arXiv 2404.14469): the attention that the last queries pay to the
/// tokens before them, pooled along tokens so that neighbours of important tokens stay too.
struct SnapKVScorer {
  u32 window = 32;  ///< newest queries to read; 0: all that were seen; fewer if fewer were seen
  u32 kernel = 5;   ///< pooling width, odd; 1: none
  Pooling pooling = Pooling::average;
  PoolOrder order = PoolOrder::query_mean_pool_group;
  GroupReduction group = GroupReduction::mean;
  bool pin_window = true;  ///< the window's own tokens rank above all others

  /// Softmax runs over all tokens; the window's columns (the last w tokens, w queries read) are
  /// then left out of the pooling and get the best rank of all heads + 1, or their own unpooled
  /// mean when not pinned. mass = unpooled mean attention of every token, window columns too,
  /// reduced over the group. Reads seen.window, or seen.reference where no window was given.
  ///
  /// Errors: those of check_cache, shape_mismatch, null_pointer, missing_observation,
  /// invalid_group, invalid_option (even kernel), workspace_too_small, out_of_memory. O(query heads
  /// * tokens * (w * width + pooling)), with max pooling of single queries O(query heads * tokens *
  /// w * (width + pooling)); pooling: see pool_scores().
  [[nodiscard]] Status score(const CacheView& cache, const Observation& seen, Context& context,
                             Scores& scores) const noexcept {
    KVLEAN_RETURN_IF_ERROR(detail::check_scores(cache, scores, true));
    if (kernel % 2 == 0) return StatusCode::invalid_option;
    const Queries& queries = detail::window_queries(seen);
    KVLEAN_RETURN_IF_ERROR(check_queries(queries, cache));
    const u32 read = window == 0 ? queries.count : std::min(window, queries.count);
    const u32 heads = queries.rows.heads / cache.segments;
    const u64 stride = cache.max_length();
    const Executor& executor = context.options.executor;
    const WorkspaceScope scope(context.workspace);
    AttentionScratchPool pool;
    KVLEAN_RETURN_IF_ERROR(pool.take(cache, executor, (2 * heads + 2) * stride, context.workspace));
    parallel_for(executor, cache.segments, [&](u32 worker, u32 s) noexcept {
      float* task = pool.of_task(worker, s);
      score_segment(cache, s, queries, read, seen.attention, pool.scratch(task),
                    Sums{pool.extra(task), heads, stride}, scores);
    });
    if (pin_window) pin(cache, read, scores);
    scores.has_mass = true;
    detail::set_observers(cache, queries, seen.attention, queries.count - read, queries.count,
                          scores);
    return StatusCode::ok;
  }

 private:
  /// Scratch of one segment: sums [heads], pooled [heads] and two rows, each `stride` long.
  struct Sums {
    float* floats;
    u32 heads;
    u64 stride;
    float* sum(u32 head) const noexcept { return floats + head * stride; }
    float* pooled(u32 head) const noexcept { return floats + (heads + head) * stride; }
    float* row() const noexcept { return floats + 2 * heads * stride; }
    float* pooled_row() const noexcept { return row() + stride; }

    /// result[t] becomes the reduction of the heads' rows, of which `rows` is the first.
    void reduce(const float* rows, GroupReduction reduction, u32 length,
                float* result) const noexcept {
      const simd::SelectKernels& kernels = simd::select_kernels();
      if (reduction == GroupReduction::max) {
        kernels.maximum_rows(rows, stride, heads, length, result);
      } else {
        const float divisor = reduction == GroupReduction::mean ? static_cast<float>(heads) : 1.0f;
        kernels.mean_rows(rows, stride, heads, length, divisor, result);
      }
    }
  };

  void score_segment(const CacheView& cache, u32 s, const Queries& queries, u32 read,
                     const AttentionSpec& spec, const AttentionScratch& scratch, const Sums& sums,
                     Scores& scores) const noexcept {
    const u32 length = cache.length(s);
    const u32 prefix = length - std::min(read, length);
    const bool pool_rows =
        order == PoolOrder::pool_query_mean_group && pooling == Pooling::max && kernel > 1;
    const u32 first_head = s * sums.heads;
    if (is_linear()) {
      score_sum(cache, s, queries, read, spec, scratch, sums, scores);
      return;
    }
    const float scale = 1.0f / static_cast<float>(read);
    std::fill_n(sums.floats, 2 * sums.heads * sums.stride, 0.0f);
    const auto sum_of = [&](u32 head) noexcept { return sums.sum(head - first_head); };
    if (pool_rows) {
      for_each_attention_tile(cache, s, queries, spec, queries.count - read, queries.count, scratch,
                              [&](const AttentionTile& tile) noexcept {
                                detail::add_tile_heads(tile, sum_of);
                                add_pooled_rows(tile, prefix, first_head, sums);
                              });
    } else {
      detail::accumulate_segment(cache, s, queries, spec, queries.count - read, queries.count,
                                 scratch, sum_of);
    }
    const simd::AttentionKernels& kernels = simd::attention_kernels();
    for (u32 h = 0; h < sums.heads; ++h) {
      kernels.scale(sums.sum(h), length, scale);
      if (pool_rows) {
        kernels.scale(sums.pooled(h), prefix, scale);
      } else if (order != PoolOrder::query_mean_group_pool) {
        pool_scores(sums.sum(h), prefix, kernel, pooling, sums.pooled(h));
      }
    }
    float* mass = scores.mass.segment(s);
    float* rank = scores.rank.segment(s);
    sums.reduce(sums.sum(0), group, length, mass);
    if (order == PoolOrder::query_mean_group_pool) {
      pool_scores(mass, prefix, kernel, pooling, rank);
    } else {
      sums.reduce(sums.pooled(0), group, prefix, rank);
    }
    std::copy(mass + prefix, mass + length, rank + prefix);
  }

  /// Whether the sum of all rows of a group is enough to score it.
  [[nodiscard]] bool is_linear() const noexcept {
    const bool pools_sum =
        pooling == Pooling::average || kernel == 1 || order == PoolOrder::query_mean_group_pool;
    return pools_sum && group != GroupReduction::max;
  }
  /// The same then: heads are added up first, and pooled once.
  void score_sum(const CacheView& cache, u32 s, const Queries& queries, u32 read,
                 const AttentionSpec& spec, const AttentionScratch& scratch, const Sums& sums,
                 Scores& scores) const noexcept {
    const u32 length = cache.length(s);
    const u32 prefix = length - std::min(read, length);
    const u32 rows = read * (group == GroupReduction::mean ? sums.heads : 1);
    float* mass = scores.mass.segment(s);
    float* rank = scores.rank.segment(s);
    std::fill_n(mass, length, 0.0f);
    detail::accumulate_segment(cache, s, queries, spec, queries.count - read, queries.count,
                               scratch, [&](u32) noexcept { return mass; });
    simd::attention_kernels().scale(mass, length, 1.0f / static_cast<float>(rows));
    pool_scores(mass, prefix, kernel, pooling, rank);
    std::copy(mass + prefix, mass + length, rank + prefix);
  }

  void add_pooled_rows(const AttentionTile& tile, u32 prefix, u32 first_head,
                       const Sums& sums) const noexcept {
    for (u32 r = 0; r < tile.rows; ++r) {
      // Columns outside `seen` are not written by the tile.
      float* row = sums.row();
      std::fill_n(row, prefix, 0.0f);
      const u32 end = std::min(tile.seen.end, prefix);
      const u32 begin = std::min(tile.seen.begin, end);
      std::copy(tile.row(r) + begin, tile.row(r) + end, row + begin);
      pool_scores(row, prefix, kernel, pooling, sums.pooled_row());
      tile.kernels->add_rows({sums.pooled_row(), sums.stride}, 1, prefix,
                             sums.pooled(tile.query_head[r] - first_head));
    }
  }

  static void pin(const CacheView& cache, u32 read, Scores& scores) noexcept {
    constexpr float nothing = -std::numeric_limits<float>::infinity();
    float best = nothing;
    for (u32 s = 0; s < cache.segments; ++s) {
      const u32 prefix = cache.length(s) - std::min(read, cache.length(s));
      best = std::max(best, simd::attention_kernels().maximum(scores.rank.segment(s), prefix));
    }
    const float pinned = best == nothing ? 1.0f : best + 1.0f;
    for (u32 s = 0; s < cache.segments; ++s) {
      const u32 length = cache.length(s);
      std::fill_n(scores.rank.segment(s) + (length - std::min(read, length)),
                  std::min(read, length), pinned);
    }
  }
};
static_assert(Scorer<SnapKVScorer>);

KVLEAN_NAMESPACE_END
