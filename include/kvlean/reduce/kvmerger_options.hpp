// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/core/budget.hpp"

KVLEAN_NAMESPACE_BEGIN

/// How merging sets come about.
enum class KVMergerForm : u8 {
  slots,      ///< link the most similar neighbours until exactly the limit remains
  threshold,  ///< link neighbours whose cosine is strictly above epsilon; the count is a result
};

/// Width of the Gaussian kernel. d_i is the key distance of member i to the pivot, S the set.
enum class Sigma : u8 {
  fixed,          ///< `fixed_sigma`; the paper's sweep found 5.0 best at Llama-2's key scale
  mean_distance,  ///< mean of d_i over all |S| members (the pivot's 0 included) / sqrt(2)
  rms,            ///< sqrt of the mean of d_i^2 over all |S| members
};

/// Scale of merged values.
enum class ValueScale : u8 {
  convex,          ///< weights sum to 1
  paper_set_size,  ///< the paper's: |S| times the convex blend; over-weights the set, never with
                   ///< log mass
};

/// Logit bias of a merged slot.
enum class LogMass : u8 {
  none,       ///< no bias for fresh tokens; counts carried by a compressed cache are averaged
  log_count,  ///< log of the number of tokens the slot stands for; exact when their keys are equal
  entropy,    ///< entropy of the weights: by Jensen never more than the set's true mass
};

/// What becomes of the keys that merge. Stored keys are rotated to their positions, so keys of
/// different positions differ even where the tokens are alike.
enum class MergedKeys : u8 {
  blended,  ///< blended as they lie: as published
  aligned,  ///< turned to the slot's position first, then blended; the cache must know its RoPE
  pivot,    ///< the slot keeps its anchor's key; only values merge
};

/// Fractions of a segment that KVMerger protects besides sinks and recent tokens.
struct KVMergerProtection {
  double recent = 0.0;
  double heavy = 0.0;
};

/// The paper's fractions: 0.17 recent and 0.12 heavy at a budget of 50 %, 0.08 and 0.02 at 35 %
/// (arXiv 2407.08454, as quoted by its reviews). Linear in between, constant above, scaled with the
/// budget below.
[[nodiscard]] constexpr KVMergerProtection kvmerger_preset(double kept_fraction) noexcept {
  if (kept_fraction >= 0.5) return {0.17, 0.12};
  if (kept_fraction >= 0.35) {
    const double place = (kept_fraction - 0.35) / 0.15;
    return {0.08 + place * 0.09, 0.02 + place * 0.10};
  }
  const double share = kept_fraction > 0.0 ? kept_fraction / 0.35 : 0.0;
  return {0.08 * share, 0.02 * share};
}

/// Tokens to protect softly, resolved for one segment.
struct KVMergerCounts {
  u32 recent = 0;
  u32 heavy = 0;
};

KVLEAN_NAMESPACE_END
