// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/score/snapkv.hpp"
#include "tests/golden/golden_case.hpp"

namespace kvlean::golden {

/// int(tokens * (1 - ratio)), in double as Python does.
[[nodiscard]] inline u32 kept_slots(Case& c, u32 tokens) {
  const double ratio = c.real("ratio");
  if (!(ratio >= 0.0 && ratio <= 1.0)) {
    throw CaseFailed{"the parameter 'ratio' is outside [0, 1]"};
  }
  return static_cast<u32>(tokens * (1.0 - ratio));
}

/// A SnapKV scorer from the parameters window, kernel, pooling and, if given, group.
[[nodiscard]] inline SnapKVScorer read_snapkv(Case& c, const Layer& layer) {
  SnapKVScorer scorer;
  scorer.window = c.count("window");
  scorer.kernel = c.count("kernel");
  c.expect_text("pooling", {"avg", "average", "max"});
  c.expect_text("group", {"mean", "max", "sum"});
  if (c.has_param("pooling")) {
    scorer.pooling = c.text("pooling") == "max" ? Pooling::max : Pooling::average;
  }
  if (c.has_param("group")) {
    const std::string group = c.text("group");
    scorer.group = group == "max"   ? GroupReduction::max
                   : group == "sum" ? GroupReduction::sum
                                    : GroupReduction::mean;
  }
  if (scorer.kernel % 2 == 0) {
    throw NotImplemented{"an even kernel makes a row of another length"};
  }
  if (scorer.window == 0) throw NotImplemented{"a window of no queries has no score"};
  if (scorer.window >= layer.tokens) {
    throw NotImplemented{"the reference refuses a window that is not shorter than the sequence"};
  }
  return scorer;
}

}  // namespace kvlean::golden
