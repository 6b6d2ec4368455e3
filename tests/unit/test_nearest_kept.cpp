// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
// The search for the most similar kept key, against a plain loop over the same products.

#include <cmath>
#include <limits>
#include <vector>

#include "kvlean/reduce/nearest_kept.hpp"
#include "kvlean/simd/row_math.hpp"
#include "tests/support/catch.hpp"
#include "tests/support/random_cache.hpp"

using namespace kvlean;
using namespace kvlean_test;

namespace {

std::vector<float> unit_key(const Rows& keys, u32 head, u32 token) {
  std::vector<float> row(keys.width);
  load_row(keys, head, token, row.data());
  const float norm = std::sqrt(row_math::squared_norm(row.data(), keys.width));
  const float factor = norm > 0.0f && std::isfinite(norm) ? 1.0f / norm : 0.0f;
  for (float& x : row) x = factor != 0.0f ? x * factor : 0.0f;
  return row;
}

}  // namespace

TEST_CASE("The nearest kept key is the one that a plain search finds, ties to the lower slot") {
  Random random(31);
  u32 ties = 0;
  for (u32 round = 0; round < 80; ++round) {
    CacheSpec spec;
    spec.seed = round + 1;
    spec.kv_heads = 2;
    spec.queries = 1;
    spec.tokens = random.between(3, 420);
    spec.dim = random.between(1, 70);
    spec.dtype = all_dtypes[round % 3];
    spec.key_layout = static_cast<Layout>(random.between(0, static_cast<u32>(Layout::count) - 1));
    RandomCache tensors = random_cache(spec);
    for (u32 h = 0; h < 2; ++h) {
      for (u32 t = 1; t < spec.tokens; ++t) {  // copies, near copies, and rows without a direction
        std::vector<float> row(spec.dim);
        load_row(tensors.keys.rows(), h, random.between(0, t - 1), row.data());
        if (random.chance(25)) tensors.keys.set_row(h, t, row);
        if (random.chance(10)) {
          row[0] *= 1.001f;
          tensors.keys.set_row(h, t, row);
        }
        if (random.chance(3)) tensors.keys.set_row(h, t, std::vector<float>(spec.dim, 0.0f));
        if (random.chance(3)) tensors.keys.set_row(h, t, std::vector<float>(spec.dim, NAN));
      }
    }
    CacheView cache = tensors.cache().view();
    cache.frozen = random.between(0, 2);
    const bool spare = random.chance(50);
    PlanOptions options;
    options.protection = {.sinks = random.between(0, 2), .recent = random.between(0, 5)};
    Workspace workspace;
    Context context{workspace, options};
    std::vector<u8> keep(std::size_t{2} * spec.tokens);
    const u64 first[] = {0, spec.tokens, 2 * u64{spec.tokens}};
    u32 count[2] = {0, 0};
    const u32 percent = random.between(0, 90);
    for (u32 h = 0; h < 2; ++h) {
      for (u32 t = 0; t < spec.tokens; ++t) {
        const bool stays =
            options.protection.covers(t, spec.tokens, cache.frozen) || random.chance(percent);
        keep[first[h] + t] = stays ? u8{1} : u8{0};
        count[h] += stays ? 1 : 0;
      }
    }
    KeptTokens kept;
    kept.keep = Ragged<u8>(keep.data(), first);
    kept.count = count;
    CompressionPlan plan;
    REQUIRE(plan_kept(cache, kept, context, plan));
    NearestKept nearest;
    REQUIRE(find_nearest_kept(cache, kept, plan, spare, context, nearest));
    CAPTURE(round, spec.tokens, spec.dim, name(spec.dtype));
    for (u32 h = 0; h < 2; ++h) {
      for (u32 t = 0; t < spec.tokens; ++t) {
        if (keep[first[h] + t] != 0) continue;
        const std::vector<float> row = unit_key(cache.keys, h, t);
        float best = -2.0f;
        u32 slot = 0;
        for (u32 j = 0; j < plan.length[h]; ++j) {
          const u32 anchor = plan.anchor[plan.first[h] + j];
          if (anchor < cache.frozen) continue;
          if (spare && options.protection.covers(anchor, spec.tokens, cache.frozen)) continue;
          const float cosine =
              row_math::dot(row.data(), unit_key(cache.keys, h, anchor).data(), spec.dim);
          if (cosine == best) ++ties;
          if (cosine > best) {
            best = cosine;
            slot = j;
          }
        }
        REQUIRE(nearest.slot(h, t) == slot);
        REQUIRE(nearest.cosine(h, t) == (best > -2.0f ? std::clamp(best, -1.0f, 1.0f) : best));
      }
    }
  }
  CHECK(ties > 100);
}
