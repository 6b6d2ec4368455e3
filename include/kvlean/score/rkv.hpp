// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cmath>

#include "kvlean/core/row_tile.hpp"
#include "kvlean/observe/attention_mass.hpp"
#include "kvlean/score/pooling.hpp"
#include "kvlean/score/preconditions.hpp"
#include "kvlean/simd/merge_kernels.hpp"

KVLEAN_NAMESPACE_BEGIN

/// R-KV (arXiv 2505.24133): importance less redundancy, for long reasoning traces that repeat
/// themselves,
///   Z = lambda * importance - (1 - lambda) * redundancy.
///   importance  the largest logit of the group's query heads, softmax over the tokens before the
///               window, mean over the window's queries, max-pooled along tokens
///   redundancy  softmax over tokens of the mean cosine of a token's key with all keys of its
///               segment; each token leaves out the newest `retained` of those more similar to it
///               than `threshold`, so that of several copies the newest counts as the original
///
/// lambda is the paper's; the authors' code says 0.07. Otherwise the code is followed where the two
/// differ: negative and small cosines count in the mean (the threshold only finds copies), and
/// redundancy is a softmax, the scale of importance. Two accidents of the code are not followed: a
/// token without copies leaves out token 0 there, and the softmax reads no log mass. A key that is
/// zero or not finite is similar to nothing.
struct RKVScorer {
  u32 window = 8;       ///< newest queries to read; 0: all that were seen; fewer if fewer were seen
  u32 kernel = 7;       ///< max-pooling width, odd; 1: none
  float lambda = 0.1f;  ///< share of importance, in [0, 1]
  float threshold = 0.5f;  ///< cosine above which two tokens are copies
  u32 retained = 1;        ///< copies that are left out of a token's mean, newest first

  /// rank = Z; the last w tokens (w queries read) rank above all others. No mass. Reads
  /// seen.window, or seen.reference where no window was given; a log-sum-exp is not read, since the
  /// softmax is over other tokens.
  ///
  /// Errors: those of check_cache, shape_mismatch, null_pointer, missing_observation,
  /// invalid_group, invalid_option (even kernel, lambda outside [0, 1], NaN threshold),
  /// workspace_too_small, out_of_memory. O(tokens^2 * width) time a segment, one task a segment;
  /// scratch 4 * width + 72 bytes a token and worker.
  [[nodiscard]] Status score(const CacheView& cache, const Observation& seen, Context& context,
                             Scores& scores) const noexcept {
    KVLEAN_RETURN_IF_ERROR(detail::check_scores(cache, scores, false));
    if (kernel % 2 == 0 || !(lambda >= 0.0f && lambda <= 1.0f) || threshold != threshold) {
      return StatusCode::invalid_option;
    }
    const Queries& queries = detail::window_queries(seen);
    KVLEAN_RETURN_IF_ERROR(check_queries(queries, cache));
    const u32 read = window == 0 ? queries.count : std::min(window, queries.count);
    const Executor& executor = context.options.executor;
    const u32 workers = executor.run == nullptr ? 1 : std::max<u32>(executor.workers, 1);
    const Scratch shape(cache);
    const WorkspaceScope scope(context.workspace);
    float* floats = context.workspace.take<float>(shape.floats * workers);
    if (floats == nullptr) return context.workspace.exhausted();
    parallel_for(executor, cache.segments, [&](u32 worker, u32 s) noexcept {
      Scratch scratch(cache);
      scratch.place(floats + worker * shape.floats);
      score_segment(cache, s, queries, read, seen.attention, scratch, scores.rank.segment(s));
    });
    scores.has_mass = false;
    scores.has_observers = false;
    return StatusCode::ok;
  }

 private:
  static constexpr u32 rows_at_once = 16;
  static constexpr u32 queries_at_once = rows_at_once / 2;
  static_assert(rows_at_once % simd::query_block == 0 && rows_at_once <= attention_query_tile);

  /// Floats of one task.
  struct Scratch {
    u64 stride;
    u32 width;
    std::size_t floats;
    float* keys = nullptr;        // [length][width], later of length 1
    float* rows = nullptr;        // [rows_at_once][stride] logits, later cosines
    float* importance = nullptr;  // [stride]
    float* redundancy = nullptr;  // [stride]
    float* columns = nullptr;     // [width][rows_at_once] queries, later keys
    float* query = nullptr;       // [width]

    explicit Scratch(const CacheView& cache) noexcept
        : stride(attention_row_stride(cache.max_length())), width(cache.keys.width) {
      floats = (std::size_t{cache.max_length()} + rows_at_once + 1) * width +
               (rows_at_once + 2) * stride;
    }
    void place(float* data) noexcept {
      rows = data;
      importance = rows + rows_at_once * stride;
      redundancy = importance + stride;
      columns = redundancy + stride;
      query = columns + std::size_t{rows_at_once} * width;
      keys = query + width;
    }
    [[nodiscard]] float* row(u32 r) const noexcept { return rows + r * stride; }
    [[nodiscard]] float* key(u32 t) const noexcept { return keys + std::size_t{t} * width; }

    void clear_columns() const noexcept {
      std::fill_n(columns, std::size_t{rows_at_once} * width, 0.0f);
    }
    /// row(r + first)[t] = column r . key t
    void score(const simd::AttentionKernels& kernels, u32 count, u32 first,
               u32 tokens) const noexcept {
      kernels.score_many({columns, rows_at_once}, count, {keys, width}, tokens, width,
                         {row(first), stride});
    }
  };

  void score_segment(const CacheView& cache, u32 s, const Queries& seen, u32 read,
                     const AttentionSpec& spec, const Scratch& scratch,
                     float* rank) const noexcept {
    const u32 length = cache.length(s);
    const u32 prefix = length - std::min(read, length);
    const simd::AttentionKernels& kernels = simd::attention_kernels(spec.target);
    detail::load_rows(cache.keys, s, 0, length, scratch.keys, scratch.width);
    weigh_importance(cache, s, seen, read, spec, prefix, kernels, scratch);
    weigh_redundancy(length, kernels, scratch);
    for (u32 t = 0; t < prefix; ++t) {
      const float importance = pooled_score(scratch.importance, prefix, t, kernel, Pooling::max);
      rank[t] = lambda * importance - (1.0f - lambda) * scratch.redundancy[t];
    }
    // Z is at most lambda, so 2 is above every token before the window.
    std::fill(rank + prefix, rank + length, 2.0f);
  }

  /// Mean over queries of the softmax of the group's largest logits, over the tokens before the
  /// window.
  static void weigh_importance(const CacheView& cache, u32 s, const Queries& seen, u32 read,
                               const AttentionSpec& spec, u32 prefix,
                               const simd::AttentionKernels& kernels,
                               const Scratch& scratch) noexcept {
    const u32 group = seen.rows.heads / cache.segments;
    const float scale = spec.scale_for(scratch.width);
    const float* log_mass = cache.log_mass ? cache.log_mass.segment(s) : nullptr;
    const float sink = largest_sink(spec, s * group, group);
    std::fill_n(scratch.importance, prefix, 0.0f);
    for (u32 first = seen.count - read; first < seen.count; first += queries_at_once) {
      const u32 rows = std::min(queries_at_once, seen.count - first);
      scratch.clear_columns();
      for (u32 head = 0; head < group; ++head) {
        for (u32 r = 0; r < rows; ++r) {
          load_query(seen, s * group + head, first + r, scratch.query);
          detail::put_query_column(scratch.query, scratch.width, r, scratch.columns, rows_at_once);
        }
        // Logits of a further head go next to the largest ones so far.
        const u32 place = head == 0 ? 0 : queries_at_once;
        scratch.score(kernels, rows, place, prefix);
        for (u32 r = 0; r < rows; ++r) {
          float* largest = scratch.row(r);
          float* logits = scratch.row(place + r);
          static_cast<void>(kernels.logits(logits, prefix, scale, spec.softcap, log_mass));
          for (u32 t = 0; head != 0 && t < prefix; ++t) {
            largest[t] = detail::max_or_nan(largest[t], logits[t]);
          }
        }
      }
      for (u32 r = 0; r < rows; ++r) {
        const TokenRange visible = visible_tokens(cache, s, seen, spec, first + r);
        const u32 end = std::min(visible.end, prefix);
        const u32 begin = std::min(visible.begin, end);
        float* row = scratch.row(r) + begin;
        detail::softmax(kernels, row, end - begin, spec.sink_logits != nullptr ? &sink : nullptr);
        simd::merge_kernels().add_scaled(scratch.importance + begin, row,
                                         1.0f / static_cast<float>(read), end - begin);
      }
    }
  }
  [[nodiscard]] static float largest_sink(const AttentionSpec& spec, u32 first_head,
                                          u32 group) noexcept {
    return spec.sink_logits != nullptr ? detail::max_logit(spec.sink_logits + first_head, group)
                                       : 0.0f;
  }

  /// Leaves the keys in scratch at length 1, or zero.
  void weigh_redundancy(u32 length, const simd::AttentionKernels& kernels,
                        const Scratch& scratch) const noexcept {
    const u32 width = scratch.width;
    for (u32 t = 0; t < length; ++t) {
      float* key = scratch.key(t);
      const std::byte* pointer = reinterpret_cast<const std::byte*>(key);
      float squared = 0.0f;
      simd::merge_kernels().squared_norms({&pointer, 1}, DType::f32, width, &squared);
      const float norm = std::sqrt(squared);
      if (norm > 0.0f && std::isfinite(norm)) {
        kernels.scale(key, width, 1.0f / norm);
      } else {
        std::fill_n(key, width, 0.0f);
      }
    }
    float* sum = scratch.redundancy;
    std::fill_n(sum, length, 0.0f);
    for (u32 first = 0; first < length; first += rows_at_once) {
      const u32 rows = std::min(rows_at_once, length - first);
      scratch.clear_columns();
      for (u32 r = 0; r < rows; ++r) {
        detail::put_query_column(scratch.key(first + r), width, r, scratch.columns, rows_at_once);
      }
      scratch.score(kernels, rows, 0, length);
      for (u32 r = 0; r < rows; ++r) {
        float* cosine = scratch.row(r);
        cosine[first + r] = 0.0f;  // a token is no copy of itself
        leave_out_newest(cosine, length);
        simd::merge_kernels().add_scaled(sum, cosine, 1.0f / static_cast<float>(length), length);
      }
    }
    detail::softmax(kernels, sum, length, nullptr);
  }
  void leave_out_newest(float* cosine, u32 length) const noexcept {
    u32 left = retained;
    for (u32 t = length; t > 0 && left > 0; --t) {
      if (!(cosine[t - 1] > threshold)) continue;
      cosine[t - 1] = 0.0f;
      --left;
    }
  }
};
static_assert(Scorer<RKVScorer>);

KVLEAN_NAMESPACE_END
