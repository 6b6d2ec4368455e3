// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <limits>

#include "kvlean/observe/attention_mass.hpp"
#include "kvlean/score/preconditions.hpp"

KVLEAN_NAMESPACE_BEGIN

/// Token omission via attention (TOVA, arXiv 2401.06104): the attention of the last query, averaged
/// over all query heads of the layer, so that every KV head gets the same row.
struct TOVAScorer {
  bool pin_last = true;  ///< as kvpress: the last token gets the best score of the others + 1

  /// mass = the averaged row; rank = mass, with the last token pinned. Reads the last query of
  /// seen.window, or of seen.reference where no window was given. Where KV heads hold different
  /// tokens, a row is matched by position and a head that lacks the position adds zero to its mean.
  /// Errors: those of check_cache, shape_mismatch, null_pointer, missing_observation,
  /// invalid_group, workspace_too_small, out_of_memory.
  /// O(query heads * tokens * width + KV heads squared * tokens).
  [[nodiscard]] Status score(const CacheView& cache, const Observation& seen, Context& context,
                             Scores& scores) const noexcept {
    KVLEAN_RETURN_IF_ERROR(detail::check_scores(cache, scores, true));
    const Queries& queries = detail::window_queries(seen);
    KVLEAN_RETURN_IF_ERROR(check_queries(queries, cache));
    const Executor& executor = context.options.executor;
    const WorkspaceScope scope(context.workspace);
    AttentionScratchPool pool;
    KVLEAN_RETURN_IF_ERROR(pool.take(cache, executor, 0, context.workspace));
    parallel_for(executor, cache.segments, [&](u32 worker, u32 s) noexcept {
      // A head's own sum waits in `rank` until every head has one.
      std::fill_n(scores.rank.segment(s), cache.length(s), 0.0f);
      detail::accumulate_segment(cache, s, queries, seen.attention, queries.count - 1,
                                 queries.count, pool.scratch(pool.of_task(worker, s)),
                                 [&](u32) noexcept { return scores.rank.segment(s); });
    });
    const float factor = 1.0f / static_cast<float>(queries.rows.heads);
    const simd::AttentionKernels& kernels = simd::attention_kernels();
    for (u32 s = 0; s < cache.segments; ++s) {
      float* mass = scores.mass.segment(s);
      if (s != 0 && !cache.positions && cache.length(s) == cache.length(s - 1)) {
        std::copy_n(scores.mass.segment(s - 1), cache.length(s), mass);  // the same sum
        continue;
      }
      std::fill_n(mass, cache.length(s), 0.0f);
      for (u32 other = 0; other < cache.segments; ++other) {
        add_matching(cache, s, other, scores.rank.segment(other), mass);
      }
      kernels.scale(mass, cache.length(s), factor);
    }
    for (u32 s = 0; s < cache.segments; ++s) pin(cache.length(s), scores, s);
    scores.has_mass = true;
    scores.has_observers = false;
    return StatusCode::ok;
  }

 private:
  static void add_matching(const CacheView& cache, u32 to, u32 from, const float* row,
                           float* mass) noexcept {
    const u32 length = cache.length(to);
    const u32 from_length = cache.length(from);
    if (!cache.positions || to == from) {
      simd::attention_kernels().add_rows({row, 0}, 1, std::min(length, from_length), mass);
      return;
    }
    for (u32 t = 0, u = 0; t < length; ++t) {
      while (u < from_length && cache.position(from, u) < cache.position(to, t)) ++u;
      if (u == from_length) return;
      if (cache.position(from, u) == cache.position(to, t)) mass[t] += row[u];
    }
  }
  void pin(u32 length, Scores& scores, u32 s) const noexcept {
    if (length == 0) return;
    const float* mass = scores.mass.segment(s);
    float* rank = scores.rank.segment(s);
    std::copy_n(mass, length, rank);
    if (!pin_last || length == 1) return;
    const float best = simd::attention_kernels().maximum(mass, length - 1);
    if (best != -std::numeric_limits<float>::infinity()) rank[length - 1] = best + 1.0f;
  }
};
static_assert(Scorer<TOVAScorer>);

KVLEAN_NAMESPACE_END
