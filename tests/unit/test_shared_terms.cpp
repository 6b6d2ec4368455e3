// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
// Slots that share terms, as CaM's do: against double, whatever was asked before, and with values
// that are not finite.

#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "kvlean/kvlean.hpp"
#include "tests/support/catch.hpp"
#include "tests/support/random_cache.hpp"

using namespace kvlean;
using namespace kvlean_test;

namespace {

/// A plan of one segment whose slots have windows of terms that move ahead.
struct WindowPlan {
  std::vector<u32> length, anchor, token;
  std::vector<u64> first, begin, end;
  std::vector<float> weight;
  CompressionPlan plan;

  WindowPlan(Random& random, u32 tokens, u32 percent, u32 receivers) {
    std::vector<u32> after;  // slots before each term
    for (u32 t = 0; t < tokens; ++t) {
      if (t + 1 == tokens || random.chance(percent)) {
        anchor.push_back(t);
      } else {
        token.push_back(t);
        weight.push_back(random.real(0.0f, 0.1f));
        after.push_back(static_cast<u32>(anchor.size()));
      }
    }
    for (u32 slot = 0; slot < anchor.size(); ++slot) {
      u64 low = 0;
      while (low < token.size() && after[low] + receivers <= slot) ++low;
      u64 high = low;
      while (high < token.size() && after[high] <= slot) ++high;
      begin.push_back(low);
      end.push_back(high);
    }
    length = {static_cast<u32>(anchor.size())};
    first = {0, anchor.size()};
    plan.segments = 1;
    plan.needs = needs_changed_values;
    plan.length = length.data();
    plan.first = first.data();
    plan.anchor = anchor.data();
    plan.term_begin = begin.data();
    plan.term_end = end.data();
    plan.num_terms = token.size();
    plan.term_token = token.data();
    plan.term_weight = weight.data();
  }
};

std::vector<float> row_of(const Rows& rows, u32 token) {
  std::vector<float> row(rows.width);
  load_row(rows, 0, token, row.data());
  return row;
}

}  // namespace

TEST_CASE("Sums of shared terms are right, and do not depend on what was summed before") {
  Random random(41);
  u32 shared = 0;
  for (u32 round = 0; round < 60; ++round) {
    CacheSpec spec;
    spec.seed = round + 1;
    spec.kv_heads = 1;
    spec.queries = 1;
    spec.tokens = random.between(2, 260);
    spec.dim = 4;
    spec.value_dim = round % 12 == 0 ? random.between(600, 900) : random.between(1, 140);
    spec.dtype = all_dtypes[round % 3];
    spec.value_layout = static_cast<Layout>(random.between(0, static_cast<u32>(Layout::count) - 1));
    const RandomCache tensors = random_cache(spec);
    const Rows& values = tensors.values.rows();
    const WindowPlan window(random, spec.tokens, random.between(5, 95), random.between(1, 70));
    const CompressionPlan& plan = window.plan;
    REQUIRE(validate_plan(plan, tensors.cache().view()));
    CAPTURE(round, spec.tokens, spec.value_dim, name(spec.dtype));
    std::vector<float> in_order(std::size_t{plan.length[0]} * values.width);
    std::vector<float> alone = in_order;
    const auto rows_of_floats = [&](std::vector<float>& data) {
      Rows rows;
      rows.data = data.data();
      rows.writable = true;
      rows.width = values.width;
      rows.heads = 1;
      rows.tokens = plan.length[0];
      rows.token_stride = values.width;
      return rows;
    };
    const Rows to = rows_of_floats(in_order);
    const Rows apart = rows_of_floats(alone);
    detail::ValueWriter writer(plan, values, 0);
    for (u32 slot = 0; slot < plan.length[0]; ++slot) {
      writer.write(slot, to, slot);
      detail::ValueWriter(plan, values, 0).write(slot, apart, slot);
      if (detail::shares_terms(plan, 0, slot)) ++shared;
      std::vector<double> sum(values.width);
      std::vector<double> size(values.width);
      const auto add = [&](u32 token, float weight) {
        const std::vector<float> row = row_of(values, token);
        for (u32 d = 0; d < values.width; ++d) {
          const double x = static_cast<double>(row[d]) * static_cast<double>(weight);
          sum[d] += x;
          size[d] += std::fabs(x);
        }
      };
      add(plan.anchor[slot], 1.0f);
      for (u64 t = plan.term_begin[slot]; t < plan.term_end[slot]; ++t) {
        add(plan.term_token[t], plan.term_weight[t]);
      }
      const double terms = static_cast<double>(plan.term_end[slot] - plan.term_begin[slot]);
      for (u32 d = 0; d < values.width; ++d) {
        const double seen = static_cast<double>(in_order[std::size_t{slot} * values.width + d]);
        REQUIRE(std::fabs(seen - sum[d]) <= (terms + 2.0) * 0x1p-24 * size[d]);
      }
    }
    REQUIRE(std::memcmp(in_order.data(), alone.data(), alone.size() * sizeof(float)) == 0);
  }
  CHECK(shared > 1000);
}

TEST_CASE("A value that is not finite stays with its receivers, in place and out of place") {
  for (const DType dtype : all_dtypes) {
    CacheSpec spec;
    spec.kv_heads = 1;
    spec.queries = 1;
    spec.tokens = 300;
    spec.dim = 24;
    spec.dtype = dtype;
    Random random(8);
    const WindowPlan window(random, spec.tokens, 50, 32);
    RandomCache tensors = random_cache(spec);
    const u32 bad = window.token[window.token.size() / 2];
    tensors.values.set_row(0, bad, std::vector<float>(spec.dim, NAN));
    auto cache = tensors.cache();
    RaggedKVCache copy;
    REQUIRE(copy.allocate(ragged_shape(window.plan, cache)));
    REQUIRE(apply(window.plan, cache, copy));
    REQUIRE(apply(window.plan, cache, in_place));
    const CacheView view = cache.view();
    for (u32 slot = 0; slot < window.plan.length[0]; ++slot) {
      bool receives = false;
      for (u64 t = window.begin[slot]; t < window.end[slot]; ++t) {
        receives = receives || window.token[t] == bad;
      }
      const std::vector<float> a = row_of(view.values, slot);
      const std::vector<float> b = row_of(copy.view().values, slot);
      for (u32 d = 0; d < spec.dim; ++d) REQUIRE(std::isnan(a[d]) == receives);
      REQUIRE(std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
    }
  }
}
