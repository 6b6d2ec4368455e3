// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
// The kernels of attention, and their table.
#include "kvlean/simd/generic/sums-inl.hpp"
// (independent)
#include "kvlean/simd/generic/score-inl.hpp"
// (prefetch_row)
#include "kvlean/simd/generic/blend-inl.hpp"
#include "kvlean/simd/generic/softmax-inl.hpp"

[[nodiscard]] constexpr AttentionKernels attention_kernels_here() noexcept {
  return {score_few, score_many, blend,   row_logits, row_maximum, row_exponentials<false>,
          weigh_few, scale_row,  add_rows};
}
