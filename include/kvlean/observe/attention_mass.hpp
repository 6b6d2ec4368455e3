// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>

#include "kvlean/observe/mass_parts.hpp"

// Attention mass: what every token received from every query, without the N x N matrix.

KVLEAN_NAMESPACE_BEGIN

namespace detail {

/// The larger of two scores; NaN if either is.
[[nodiscard]] inline float max_or_nan(float a, float b) noexcept { return b > a || b != b ? b : a; }

/// result[t] becomes the reduction of the `group` values heads(h)[t]. `result` may be heads(0).
template <class Heads>
void reduce_heads(Heads&& heads, u32 group, GroupReduction reduction, u32 length,
                  float* result) noexcept {
  if (result != heads(0)) std::copy_n(heads(0), length, result);
  for (u32 h = 1; h < group; ++h) {
    const float* head = heads(h);
    if (reduction == GroupReduction::max) {
      for (u32 t = 0; t < length; ++t) result[t] = max_or_nan(result[t], head[t]);
    } else {
      for (u32 t = 0; t < length; ++t) result[t] += head[t];
    }
  }
  if (reduction != GroupReduction::mean) return;
  for (u32 t = 0; t < length; ++t) result[t] /= static_cast<float>(group);
}

}  // namespace detail

/// Adds to `mass` [query_head][token] the attention that every query pays to every token of its KV
/// head's segment. Decode steps accumulate: the caller's array is zero where a token is new. `mass`
/// holds cache.length(h / group) values for head h and overlaps nothing that is read.
///
/// Errors: those of check_cache and check_queries, null_pointer (mass), workspace_too_small,
/// out_of_memory; nothing was written then. Same bits at any number of workers.
/// O(query heads * queries * length * width) time, O(length) scratch a running task.
[[nodiscard]] inline Status accumulate_attention_per_query_head(
    const CacheView& cache, const Queries& queries, const AttentionSpec& spec, Workspace& workspace,
    const Executor& executor, Ragged<float> mass) noexcept {
  KVLEAN_RETURN_IF_ERROR(check_cache(cache));
  KVLEAN_RETURN_IF_ERROR(check_queries(queries, cache));
  if (!mass) return StatusCode::null_pointer;
  const WorkspaceScope scope(workspace);
  AttentionScratchPool pool;
  KVLEAN_RETURN_IF_ERROR(pool.take(cache, executor, 0, workspace));
  parallel_for(executor, cache.segments, [&](u32 worker, u32 segment) noexcept {
    detail::accumulate_segment(cache, segment, queries, spec, 0, queries.count,
                               pool.scratch(pool.of_task(worker, segment)),
                               [&](u32 head) noexcept { return mass.segment(head); });
  });
  return StatusCode::ok;
}

/// Writes out[kv_head][token] from per_query_head[query_head][token], `group` query heads a KV
/// head; NaN where a head has NaN. `out` may not overlap the input. O(query heads * length).
/// Errors: those of check_cache, invalid_group (group is zero), null_pointer.
[[nodiscard]] inline Status reduce_group(const CacheView& cache, Ragged<const float> per_query_head,
                                         u32 group, GroupReduction reduction,
                                         Ragged<float> out) noexcept {
  KVLEAN_RETURN_IF_ERROR(check_cache(cache));
  if (group == 0) return StatusCode::invalid_group;
  if (!per_query_head || !out) return StatusCode::null_pointer;
  for (u32 s = 0; s < cache.segments; ++s) {
    detail::reduce_heads([&](u32 h) noexcept { return per_query_head.segment(s * group + h); },
                         group, reduction, cache.length(s), out.segment(s));
  }
  return StatusCode::ok;
}

/// Adds to `mass` [kv_head][token] the attention that the group's queries pay to every token: H2O's
/// accumulated score (arXiv 2306.14048), one call for a prefill or one a decode step. With `max`,
/// the largest head total of *this call* is added; for the maximum over several calls keep one
/// array a query head (accumulate_attention_per_query_head) and reduce_group() it.
///
/// `mass` holds cache.length(s) values for segment s, zero where a token is new, and overlaps
/// nothing that is read. Errors: those of check_cache and check_queries, null_pointer (mass),
/// workspace_too_small, out_of_memory; nothing was written then. Same bits at any number of
/// workers. O(query heads * queries * length * width) time, O(length) scratch a running task.
[[nodiscard]] inline Status accumulate_attention(const CacheView& cache, const Queries& queries,
                                                 const AttentionSpec& spec, GroupReduction group,
                                                 Workspace& workspace, const Executor& executor,
                                                 Ragged<float> mass) noexcept {
  KVLEAN_RETURN_IF_ERROR(check_cache(cache));
  KVLEAN_RETURN_IF_ERROR(check_queries(queries, cache));
  if (!mass) return StatusCode::null_pointer;
  const u32 heads = queries.rows.heads / cache.segments;
  const u32 totals = group == GroupReduction::max ? heads : 1;
  const u64 stride = cache.max_length();
  const detail::MassCut cut(cache, queries, spec, totals);
  const WorkspaceScope scope(workspace);
  AttentionScratchPool pool;
  const bool split = cut.parts != 1;
  KVLEAN_RETURN_IF_ERROR(
      pool.take(cache, executor, split ? 0 : totals * stride, workspace, cut.parts));
  // The sums of a segment are added up before they join `mass`, whatever the parts.
  const auto finish = [&](u32 segment, float* total) noexcept {
    const u32 length = cache.length(segment);
    if (totals != 1) {
      detail::reduce_heads([&](u32 h) noexcept { return total + h * stride; }, heads, group, length,
                           total);
    }
    const float factor = group == GroupReduction::mean ? 1.0f / static_cast<float>(heads) : 1.0f;
    float* out = mass.segment(segment);
    for (u32 t = 0; t < length; ++t) out[t] += total[t] * factor;
  };
  const auto of_head = [&](float* total, u32 segment, u32 head) noexcept {
    return totals == 1 ? total : total + (head - segment * heads) * stride;
  };
  if (!split) {
    parallel_for(executor, cache.segments, [&](u32 worker, u32 segment) noexcept {
      float* task = pool.of_task(worker, segment);
      float* total = pool.extra(task);
      std::fill_n(total, totals * stride, 0.0f);
      detail::accumulate_segment(cache, segment, queries, spec, 0, queries.count,
                                 pool.scratch(task),
                                 [&](u32 head) noexcept { return of_head(total, segment, head); });
      finish(segment, total);
    });
    return StatusCode::ok;
  }

  const u64 array = totals * stride;
  const u32 tasks = cache.segments * cut.parts;
  float* arrays = workspace.take_zeroed<float>(cache.segments * cut.arrays() * array);
  detail::RowGroup* states = workspace.take<detail::RowGroup>(cut.by_keys ? tasks : 0);
  if (arrays == nullptr || states == nullptr) return workspace.exhausted();
  if (cut.by_keys) {
    detail::accumulate_by_keys(cache, queries, spec, cut, pool, executor, states,
                               [&](u32 segment, u32 head) noexcept {
                                 return of_head(arrays + segment * array, segment, head);
                               });
  } else {
    parallel_for(executor, tasks, [&](u32 worker, u32 task) noexcept {
      const u32 segment = task / cut.parts;
      const AttentionScratch scratch = pool.scratch(pool.of_task(worker, task));
      for (u32 g = task % cut.parts; g < cut.groups.groups; g += cut.parts) {
        detail::accumulate_group(
            cache, segment, queries, spec, 0, queries.count, cut.groups, g, scratch,
            [&](u32 head) noexcept { return of_head(arrays + task * array, segment, head); });
      }
    });
  }
  for (u32 s = 0; s < cache.segments; ++s) {
    float* total = arrays + static_cast<u64>(s) * cut.arrays() * array;
    for (u32 p = 1; p < cut.arrays(); ++p) {
      for (u64 i = 0; i < array; ++i) total[i] += total[p * array + i];
    }
    finish(s, total);
  }
  return StatusCode::ok;
}

/// One decode step: the same as accumulate_attention with the queries of this step, after their
/// tokens were appended to the cache and their entries of `mass` were set to zero.
[[nodiscard]] inline Status accumulate_step(const CacheView& cache, const Queries& step,
                                            const AttentionSpec& spec, GroupReduction group,
                                            Workspace& workspace, const Executor& executor,
                                            Ragged<float> mass) noexcept {
  return accumulate_attention(cache, step, spec, group, workspace, executor, mass);
}

KVLEAN_NAMESPACE_END
