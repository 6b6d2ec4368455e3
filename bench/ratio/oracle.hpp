// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
// What kernels must compute, written out in double precision and straight from the formulas.
#pragma once

#include <span>
#include <vector>

#include "bench/ratio/layer.hpp"

namespace kvlean::ratio {

/// Attention that KV head `head` receives: the mean over its query heads of the sum over queries of
/// the causal softmax. [tokens]
[[nodiscard]] std::vector<double> attention_mass(const Layer& layer, u32 head);

/// Softmax attention of one query over rows in any place. `bias` may be null.
[[nodiscard]] std::vector<double> attention_output(const CacheView& cache, u32 segment,
                                                   std::span<const float> query, const float* bias);

/// The largest |got - want| by want, where numbers below a hundredth of the mean count as that.
[[nodiscard]] double relative_error(std::span<const float> got, std::span<const double> want);

/// The largest |got - want| by the largest |want|.
[[nodiscard]] double scaled_error(std::span<const float> got, std::span<const double> want);

/// The largest error of a compressed cache's rows against a blend in double with the plan's
/// weights, by the largest element of the row. `before` as it was when the plan was made.
[[nodiscard]] double plan_error(const CompressionPlan& plan, const CacheView& before,
                                const CacheView& after, const RopeSpec* rope);

}  // namespace kvlean::ratio
