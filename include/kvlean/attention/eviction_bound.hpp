// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "kvlean/attention/error_measures.hpp"

KVLEAN_NAMESPACE_BEGIN

/// What eviction can cost one layer at most, in the units of the layer's output; see
/// eviction_loss_bound.
struct EvictionBound {
  double bound = 0.0;           ///< epsilon = 2 C sum_i (1 - F_i), the theorem
  double per_head_bound = 0.0;  ///< sum_i 2 C_i (1 - F_i), never above `bound`
  double constant = 0.0;        ///< C, the largest C_i
};

/// retained [query_heads] = F_i: the part of each query head's attention row that falls on kept
/// tokens. `attention` [query_head][token] is one query's softmax row a head, `keep`
/// [kv_head][token] is nonzero for kept tokens, `lengths` [kv_heads] counts tokens. Sums in double.
/// O(tokens). Errors: null_pointer, invalid_shape (no heads), invalid_group (group_size 0 or not a
/// divisor).
[[nodiscard]] inline Status retained_mass(Ragged<const float> attention, Ragged<const u8> keep,
                                          const u32* lengths, u32 query_heads, u32 group_size,
                                          float* retained) noexcept {
  if (!attention || !keep || lengths == nullptr || retained == nullptr) {
    return StatusCode::null_pointer;
  }
  if (query_heads == 0) return StatusCode::invalid_shape;
  if (group_size == 0 || query_heads % group_size != 0) return StatusCode::invalid_group;
  for (u32 head = 0; head < query_heads; ++head) {
    const u32 segment = head / group_size;
    const float* row = attention.segment(head);
    const u8* kept = keep.segment(segment);
    double sum = 0.0;
    for (u32 token = 0; token < lengths[segment]; ++token) {
      if (kept[token] != 0) sum += static_cast<double>(row[token]);
    }
    retained[head] = static_cast<float>(sum);
  }
  return StatusCode::ok;
}

namespace detail {

inline constexpr u32 bound_tile_tokens = 16;  // tokens that share a loaded row of W_O

/// max over tokens of |V[token] W_O|_1 for one query head. `weights` [hidden], `values`
/// [bound_tile_tokens][value width], `sums` [bound_tile_tokens][hidden].
[[nodiscard]] inline double head_constant(const CacheView& cache, u32 segment,
                                          const Rows& projection, u32 head, float* weights,
                                          float* values, double* sums) noexcept {
  const u32 width = cache.values.width;
  const u32 hidden = is_empty(projection) ? 0 : projection.width;
  const u32 length = cache.length(segment);
  double largest = 0.0;
  for (u32 first = 0; first < length; first += bound_tile_tokens) {
    const u32 tokens = std::min(bound_tile_tokens, length - first);
    for (u32 t = 0; t < tokens; ++t) {
      load_row(cache.values, segment, first + t, values + static_cast<u64>(t) * width);
    }
    std::fill_n(sums, static_cast<u64>(tokens) * hidden, 0.0);
    for (u32 d = 0; hidden != 0 && d < width; ++d) {
      load_row(projection, head, d, weights);
      for (u32 t = 0; t < tokens; ++t) {
        const double value = static_cast<double>(values[static_cast<u64>(t) * width + d]);
        double* sum = sums + static_cast<u64>(t) * hidden;
        for (u32 i = 0; i < hidden; ++i) sum[i] += value * static_cast<double>(weights[i]);
      }
    }
    for (u32 t = 0; t < tokens; ++t) {
      double norm = 0.0;
      for (u32 i = 0; i < hidden; ++i) norm += std::abs(sums[static_cast<u64>(t) * hidden + i]);
      for (u32 d = 0; hidden == 0 && d < width; ++d) {
        norm += std::abs(static_cast<double>(values[static_cast<u64>(t) * width + d]));
      }
      largest = norm <= largest ? largest : norm;  // NaN shows
    }
  }
  return largest;
}

}  // namespace detail

/// Ada-KV's theorem 3.1 (arXiv 2407.11550) as a number. For one query of a layer whose cache loses
/// tokens by plain eviction, so that softmax renormalises over what stays, the L1 loss of the
/// layer's output (layer_loss) obeys
///   loss <= sum_i 2 C_i (1 - F_i) <= 2 C sum_i (1 - F_i) <= 2 h C,
///   C_i = max_j |V_i[j] W_O,i|_1 over all tokens j before eviction,   C = max_i C_i,
/// over the h query heads, where head i reads KV head i / group_size and F_i = retained_mass[i] is
/// the attention it keeps (retained_mass(), or 1 - lost_mass()). The middle form is tighter and
/// costs nothing more. A bound, not the loss: on random data it is at least twice too large. It
/// says nothing about merging.
///
/// `cache` is the full cache (values only are read). `output_projection` holds W_O of each query
/// head as rows [query_head][value width][hidden], any hidden width; empty: the identity. F_i above
/// 1 by rounding counts as 1. `head_constant` [query_heads] receives C_i unless null. Sums in
/// double. From the workspace: 16 * (4 * value width + 8 * hidden) + 4 * hidden bytes, given back.
/// O(query_heads * tokens * value width * hidden): a diagnostic, not for hot paths.
///
/// Errors, before anything is written: those of check_cache, null_pointer (retained_mass),
/// invalid_group (group_size 0), invalid_shape (query heads do not fit u32), shape_mismatch (W_O
/// does not fit), those of check_rows for W_O, workspace_too_small or out_of_memory.
[[nodiscard]] inline Status eviction_loss_bound(const CacheView& cache,
                                                const Rows& output_projection, u32 group_size,
                                                const float* retained_mass, EvictionBound& out,
                                                float* head_constant,
                                                Workspace& workspace) noexcept {
  KVLEAN_RETURN_IF_ERROR(check_cache(cache));
  if (retained_mass == nullptr) return StatusCode::null_pointer;
  if (group_size == 0) return StatusCode::invalid_group;
  if (group_size > std::numeric_limits<u32>::max() / cache.segments) {
    return StatusCode::invalid_shape;
  }
  const u32 query_heads = cache.segments * group_size;
  const u32 width = cache.values.width;
  KVLEAN_RETURN_IF_ERROR(detail::check_projection(output_projection, query_heads, width));
  const std::size_t hidden = detail::is_empty(output_projection) ? 0 : output_projection.width;
  const WorkspaceScope scope(workspace);
  float* weights = workspace.take<float>(hidden);
  float* values = workspace.take<float>(std::size_t{detail::bound_tile_tokens} * width);
  double* sums = workspace.take<double>(detail::bound_tile_tokens * hidden);
  if (weights == nullptr || values == nullptr || sums == nullptr) {
    return workspace.exhausted();
  }
  EvictionBound result;
  double lost = 0.0;
  for (u32 head = 0; head < query_heads; ++head) {
    const double constant = detail::head_constant(cache, head / group_size, output_projection, head,
                                                  weights, values, sums);
    const double head_lost = std::max(0.0, 1.0 - static_cast<double>(retained_mass[head]));
    if (head_constant != nullptr) head_constant[head] = static_cast<float>(constant);
    result.per_head_bound += 2.0 * constant * head_lost;
    result.constant = constant <= result.constant ? result.constant : constant;
    lost += head_lost;
  }
  result.bound = 2.0 * result.constant * lost;
  out = result;
  return StatusCode::ok;
}

KVLEAN_NAMESPACE_END
