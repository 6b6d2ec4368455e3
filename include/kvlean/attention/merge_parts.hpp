// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "kvlean/attention/attention_output.hpp"

KVLEAN_NAMESPACE_BEGIN

/// Merges attention over one set of tokens (`part`) into attention of the same queries over
/// another, disjoint set (`into`), in place, row by row: the result is attention over both sets.
///   values = (e^lse_into * into + e^lse_part * part) / (e^lse_into + e^lse_part)
///   lse    = log(e^lse_into + e^lse_part)
/// Weights relative to the larger LSE, in double: no overflow. A side with LSE -inf saw nothing;
/// its values are not read and the other side is taken bit for bit; both -inf gives zeros and -inf.
/// Sink logits must be in one part only. Merging is how engines that keep their own kernel, or keep
/// regions of a cache apart, read a compressed cache. Both need values and LSE; strides may differ;
/// the memory must not overlap. O(rows * value_width), no scratch.
///
/// Errors, before anything is written: null_pointer (values or LSE of either side), invalid_shape
/// (an extent is zero).
[[nodiscard]] inline Status merge_parts(const AttentionOutput& into,
                                        const ConstAttentionOutput& part,
                                        const AttentionShape& shape) noexcept {
  if (into.values == nullptr || into.lse == nullptr) return StatusCode::null_pointer;
  if (part.values == nullptr || part.lse == nullptr) return StatusCode::null_pointer;
  if (shape.rows() == 0 || shape.value_width == 0) return StatusCode::invalid_shape;
  constexpr float nothing = -std::numeric_limits<float>::infinity();
  for (u32 head = 0; head < shape.query_heads; ++head) {
    for (u32 query = 0; query < shape.count; ++query) {
      float* row = into.row(shape, head, query);
      float& lse = into.log_sum_exp(shape, head, query);
      const float* other = part.row(shape, head, query);
      const float other_lse = part.log_sum_exp(shape, head, query);
      if (other_lse == nothing) {
        if (lse == nothing) std::fill_n(row, shape.value_width, 0.0f);
        continue;
      }
      if (lse == nothing) {
        std::copy_n(other, shape.value_width, row);
        lse = other_lse;
        continue;
      }
      const double shift = static_cast<double>(std::max(lse, other_lse));
      const double weight = std::exp(static_cast<double>(lse) - shift);
      const double other_weight = std::exp(static_cast<double>(other_lse) - shift);
      const double total = weight + other_weight;
      const double share = weight / total;
      const double other_share = other_weight / total;
      for (u32 d = 0; d < shape.value_width; ++d) {
        row[d] = static_cast<float>(share * static_cast<double>(row[d]) +
                                    other_share * static_cast<double>(other[d]));
      }
      lse = static_cast<float>(shift + std::log(total));
    }
  }
  return StatusCode::ok;
}

KVLEAN_NAMESPACE_END
