// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "kvlean/attention/attention_output.hpp"
#include "kvlean/core/workspace.hpp"

KVLEAN_NAMESPACE_BEGIN

// What compression did to attention. `output` is attention over the compressed cache, `reference`
// over the full one, both of the same queries. Sums run in double. Memory must not overlap. All
// checks come before anything is written; NaN in the data shows in the results.

namespace detail {

[[nodiscard]] inline Status check_comparison(const ConstAttentionOutput& output,
                                             const ConstAttentionOutput& reference,
                                             const AttentionShape& shape,
                                             const float* result) noexcept {
  if (output.values == nullptr || reference.values == nullptr || result == nullptr) {
    return StatusCode::null_pointer;
  }
  return shape.rows() == 0 || shape.value_width == 0 ? StatusCode::invalid_shape : StatusCode::ok;
}

/// No projection given: the identity.
[[nodiscard]] inline bool is_empty(const Rows& rows) noexcept {
  return rows.data == nullptr && rows.load == nullptr;
}

/// Rows of an output projection may be wider than max_row_width: they never meet a stack buffer.
[[nodiscard]] inline Status check_projection(const Rows& projection, u32 query_heads,
                                             u32 value_width) noexcept {
  if (is_empty(projection)) return StatusCode::ok;
  if (projection.heads != query_heads || projection.tokens != value_width) {
    return StatusCode::shape_mismatch;
  }
  Rows narrow = projection;
  narrow.width = std::min(narrow.width, max_row_width);
  return check_rows(narrow, value_width);
}

/// |row - reference|_1, in double.
[[nodiscard]] inline double absolute_difference(const float* row, const float* reference,
                                                u32 width) noexcept {
  double sum = 0.0;
  for (u32 d = 0; d < width; ++d) {
    sum += std::abs(static_cast<double>(row[d]) - static_cast<double>(reference[d]));
  }
  return sum;
}

}  // namespace detail

/// errors [query_head][count] = |output - reference|_2 / |reference|_2. Where the reference is
/// zero: 0 if the output is zero too, else 1. The measure the benchmark ranks by. O(rows *
/// value_width). Errors: null_pointer (values or result), invalid_shape (an extent is zero).
[[nodiscard]] inline Status relative_error(const ConstAttentionOutput& output,
                                           const ConstAttentionOutput& reference,
                                           const AttentionShape& shape, float* errors) noexcept {
  KVLEAN_RETURN_IF_ERROR(detail::check_comparison(output, reference, shape, errors));
  for (u32 head = 0; head < shape.query_heads; ++head) {
    for (u32 query = 0; query < shape.count; ++query) {
      const float* row = output.row(shape, head, query);
      const float* wanted = reference.row(shape, head, query);
      double difference = 0.0;
      double norm = 0.0;
      for (u32 d = 0; d < shape.value_width; ++d) {
        const double expected = static_cast<double>(wanted[d]);
        const double gap = static_cast<double>(row[d]) - expected;
        difference += gap * gap;
        norm += expected * expected;
      }
      const double undefined = difference == 0.0 ? 0.0 : 1.0;
      *errors++ = static_cast<float>(norm == 0.0 ? undefined : std::sqrt(difference / norm));
    }
  }
  return StatusCode::ok;
}

/// losses [query_head][count] = |output - reference|_1, summed over the dimensions of a head.
/// O(rows * value_width). Errors: null_pointer (values or result), invalid_shape (an extent is
/// zero).
[[nodiscard]] inline Status absolute_loss(const ConstAttentionOutput& output,
                                          const ConstAttentionOutput& reference,
                                          const AttentionShape& shape, float* losses) noexcept {
  KVLEAN_RETURN_IF_ERROR(detail::check_comparison(output, reference, shape, losses));
  for (u32 head = 0; head < shape.query_heads; ++head) {
    for (u32 query = 0; query < shape.count; ++query) {
      *losses++ = static_cast<float>(detail::absolute_difference(
          output.row(shape, head, query), reference.row(shape, head, query), shape.value_width));
    }
  }
  return StatusCode::ok;
}

/// The layer's L1 loss of Ada-KV (arXiv 2407.11550), one per query: losses [count] =
/// |sum_h (output_h - reference_h) W_O,h|_1 with W_O of each query head as rows
/// [query_head][value_width][hidden], any hidden width. Empty rows stand for the identity on the
/// concatenated heads: the sum of absolute_loss over heads. Takes 12 bytes per hidden element from
/// the workspace and gives them back. O(rows * value_width * hidden).
///
/// Errors: null_pointer (values or result), invalid_shape (an extent is zero), shape_mismatch (W_O
/// does not fit), those of check_rows for W_O, workspace_too_small or out_of_memory.
[[nodiscard]] inline Status layer_loss(const ConstAttentionOutput& output,
                                       const ConstAttentionOutput& reference,
                                       const AttentionShape& shape, const Rows& output_projection,
                                       float* losses, Workspace& workspace) noexcept {
  KVLEAN_RETURN_IF_ERROR(detail::check_comparison(output, reference, shape, losses));
  KVLEAN_RETURN_IF_ERROR(
      detail::check_projection(output_projection, shape.query_heads, shape.value_width));
  const bool identity = detail::is_empty(output_projection);
  const u32 hidden = identity ? 0 : output_projection.width;
  const WorkspaceScope scope(workspace);
  double* sum = workspace.take<double>(hidden);
  float* weights = workspace.take<float>(hidden);
  if (sum == nullptr || weights == nullptr) return workspace.exhausted();
  for (u32 query = 0; query < shape.count; ++query) {
    double loss = 0.0;
    std::fill_n(sum, hidden, 0.0);
    for (u32 head = 0; head < shape.query_heads; ++head) {
      const float* row = output.row(shape, head, query);
      const float* wanted = reference.row(shape, head, query);
      if (identity) {
        loss += detail::absolute_difference(row, wanted, shape.value_width);
        continue;
      }
      for (u32 d = 0; d < shape.value_width; ++d) {
        const double gap = static_cast<double>(row[d]) - static_cast<double>(wanted[d]);
        load_row(output_projection, head, d, weights);
        for (u32 i = 0; i < hidden; ++i) sum[i] += gap * static_cast<double>(weights[i]);
      }
    }
    for (u32 i = 0; i < hidden; ++i) loss += std::abs(sum[i]);
    losses[query] = static_cast<float>(loss);
  }
  return StatusCode::ok;
}

/// lost [rows] = clamp(1 - exp(compressed_lse - full_lse), 0, 1), both [rows] in one order. For
/// plain eviction it is exactly the attention probability of the evicted tokens. Merged slots that
/// weigh more than the tokens they stand for show 0. Where the full cache shows nothing (-inf): 0.
/// A float LSE resolves about 1e-7 * |lse|. `lost` may be either input. O(rows). Errors:
/// null_pointer (any array), invalid_shape (no rows).
[[nodiscard]] inline Status lost_mass(const float* compressed_lse, const float* full_lse, u64 rows,
                                      float* lost) noexcept {
  if (compressed_lse == nullptr || full_lse == nullptr || lost == nullptr) {
    return StatusCode::null_pointer;
  }
  if (rows == 0) return StatusCode::invalid_shape;
  constexpr float nothing = -std::numeric_limits<float>::infinity();
  for (u64 i = 0; i < rows; ++i) {
    const double gap = static_cast<double>(compressed_lse[i]) - static_cast<double>(full_lse[i]);
    lost[i] =
        full_lse[i] == nothing ? 0.0f : static_cast<float>(std::clamp(-std::expm1(gap), 0.0, 1.0));
  }
  return StatusCode::ok;
}

/// Errors of many (layer, head, query) rows in a few numbers.
struct ErrorSummary {
  u64 count = 0;
  double mean = 0.0;
  float p95 = 0.0f;  ///< nearest rank: the smallest value that 95 % of the rows do not exceed
  float max = 0.0f;
};

/// Summarises `errors` [count], whatever their order; NaN counts as the largest and makes the mean
/// NaN. Takes 4 bytes a row from the workspace and gives them back. O(count) on average.
/// Errors: null_pointer, invalid_shape (count 0), workspace_too_small or out_of_memory.
[[nodiscard]] inline Status summarize(const float* errors, u64 count, Workspace& workspace,
                                      ErrorSummary& summary) noexcept {
  if (errors == nullptr) return StatusCode::null_pointer;
  if (count == 0) return StatusCode::invalid_shape;
  const WorkspaceScope scope(workspace);
  float* sorted = workspace.take<float>(count);
  if (sorted == nullptr) return workspace.exhausted();
  const auto less = [](float a, float b) noexcept {
    return std::isnan(a) ? false : std::isnan(b) || a < b;
  };
  double sum = 0.0;
  for (u64 i = 0; i < count; ++i) sum += static_cast<double>(errors[i]);
  std::copy_n(errors, count, sorted);
  float* rank = sorted + (count - 1 - count / 20);  // ceil(0.95 count) - 1 without rounding
  std::nth_element(sorted, rank, sorted + count, less);
  summary = {count, sum / static_cast<double>(count), *rank,
             *std::max_element(rank, sorted + count, less)};
  return StatusCode::ok;
}

KVLEAN_NAMESPACE_END
