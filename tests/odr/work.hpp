// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
// The same use of the library in every translation unit, under names of the unit's own.
#pragma once

#include <cstdint>
#include <kvlean/kvlean.hpp>
#include <kvlean/policy/papers.hpp>
#include <vector>

namespace {

// Plans and applies with one policy, and returns a number that depends on every choice and on every
// row that is left; 0 on an error. The keys have few distinct values, so that scores do not depend
// on rounding.
std::uint64_t use_the_library() {
  constexpr std::size_t heads = 2;
  constexpr std::size_t tokens = 96;
  constexpr std::size_t dim = 40;
  std::vector<float> keys(heads * tokens * dim);
  for (std::size_t i = 0; i < keys.size(); ++i) {
    keys[i] = static_cast<float>(i / dim * 37 % 101) + static_cast<float>(i % 3);
  }
  std::vector<float> values(keys.rbegin(), keys.rend());
  const kvlean::Extents extents{.kv_heads = heads, .tokens = tokens, .dim = dim};
  kvlean::KVCache cache(kvlean::strided(keys.data(), extents),
                        kvlean::strided(values.data(), extents));

  kvlean::Workspace workspace;
  kvlean::CompressionPlan plan;
  const kvlean::KeyNormPolicy policy;
  const kvlean::Budget budget = kvlean::Budget::fraction(0.5);
  if (!policy.plan(cache, kvlean::Observation{}, budget, workspace, plan)) return 0;
  std::uint64_t sum = 14695981039346656037u;
  const auto mix = [&sum](std::uint64_t x) { sum = (sum ^ x) * 1099511628211u; };
  for (kvlean::u64 slot = 0; slot < plan.num_slots(); ++slot) mix(plan.anchor[slot]);

  if (!kvlean::apply(plan, cache, kvlean::in_place) || cache.length() != tokens / 2) return 0;
  std::vector<float> row(dim);
  for (kvlean::u32 head = 0; head < heads; ++head) {
    for (kvlean::u32 token = 0; token < cache.length(); ++token) {
      kvlean::load_row(cache.view().keys, head, token, row.data());
      for (const float x : row) mix(static_cast<std::uint64_t>(x));
      kvlean::load_row(cache.view().values, head, token, row.data());
      for (const float x : row) mix(static_cast<std::uint64_t>(x));
    }
  }
  return sum;
}

}  // namespace
