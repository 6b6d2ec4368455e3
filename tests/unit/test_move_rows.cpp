// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
// Rows that are moved and turned at once have the bits of rows that are read, turned and written
// one by one, in every layout.
#include <algorithm>
#include <cstring>
#include <kvlean/apply/apply.hpp>
#include <limits>
#include <vector>

#include "tests/support/catch.hpp"
#include "tests/support/plan_builder.hpp"
#include "tests/support/random_cache.hpp"

namespace {

using namespace kvlean;
using kvlean_test::all_dtypes;
using kvlean_test::Layout;
using kvlean_test::PlanBuilder;
using kvlean_test::Random;
using kvlean_test::RandomTensor;

constexpr Layout layouts[] = {Layout::contiguous,    Layout::token_major,   Layout::padded,
                              Layout::transposed,    Layout::backwards,     Layout::strided_dims,
                              Layout::paged,         Layout::paged_heads,   Layout::indexed,
                              Layout::indexed_heads, Layout::indexed_pages, Layout::accessor};

std::vector<float> row_of(const Rows& rows, u32 head, u32 token) {
  std::vector<float> row(rows.width);
  load_row(rows, head, token, row.data());
  return row;
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

/// The row as a tensor of its type would give it back.
std::vector<float> rounded(std::vector<float> row, DType dtype) {
  for (float& x : row) {
    float bits = 0.0f;
    store_element(&bits, dtype, x);
    x = load_element(&bits, dtype);
  }
  return row;
}

/// Keeps about every third token and a run, other ones in each head, and numbers them anew: the
/// first `still` slots stay where they are.
PlanBuilder renumbered(u32 heads, u32 tokens, u32 still, Random& random) {
  PlanBuilder builder;
  for (u32 h = 0; h < heads; ++h) {
    std::vector<u32> kept;
    for (u32 t = 0; t < tokens; ++t) {
      if (t < still || (t > 20 && t < 45) || random.between(0, 2) == 0) kept.push_back(t);
    }
    builder.add_segment(kept);
    const auto shift = static_cast<i32>(random.between(0, 400));
    for (u32 j = 0; j < kept.size(); ++j) {
      builder.position.push_back(static_cast<i32>(j) + (j < still ? 0 : shift));
    }
  }
  return builder;
}

}  // namespace

TEST_CASE("keys that are turned while they move have the bits of one by one", "[apply][move]") {
  for (const Layout key_layout : layouts) {
    for (const Layout value_layout : {Layout::contiguous, Layout::transposed, Layout::paged,
                                      Layout::accessor, Layout::token_major}) {
      for (const DType dtype : all_dtypes) {
        for (const RopePairing pairing : {RopePairing::norm, RopePairing::neox}) {
          Random random(static_cast<u32>(key_layout) * 64 + static_cast<u32>(value_layout));
          constexpr u32 heads = 2;
          constexpr u32 tokens = 90;
          const u32 dim = pairing == RopePairing::norm ? 40 : 34;
          CAPTURE(static_cast<int>(key_layout), static_cast<int>(value_layout), name(dtype), dim);
          RopeSpec rope;
          rope.pairing = pairing;
          rope.rotary_dims = dim - 4;
          rope.first_dim = 3;
          RandomTensor keys =
              kvlean_test::random_tensor(random, heads, tokens, dim, dtype, key_layout);
          RandomTensor values =
              kvlean_test::random_tensor(random, heads, tokens, 24, dtype, value_layout);
          PlanBuilder builder = renumbered(heads, tokens, 4, random);
          const CompressionPlan plan = builder.plan();

          RopeRotation rotation;
          REQUIRE(rotation.prepare(rope, dim));
          std::vector<std::vector<float>> expected_keys;
          std::vector<std::vector<float>> expected_values;
          for (u32 h = 0; h < heads; ++h) {
            for (u64 slot = plan.first[h]; slot < plan.first[h + 1]; ++slot) {
              std::vector<float> key = row_of(keys.rows(), h, plan.anchor[slot]);
              const i64 shift = i64{plan.position[slot]} - i64{plan.anchor[slot]};
              RopeTurn turn;
              rotation.turn_by(shift, turn);
              if (shift != 0) rotation.rotate(turn, key.data());
              expected_keys.push_back(rounded(key, keys.rows().dtype));
              expected_values.push_back(row_of(values.rows(), h, plan.anchor[slot]));
            }
          }

          std::vector<u32> lengths(heads, tokens);
          std::vector<i32> positions(heads * tokens);
          for (u32 i = 0; i < positions.size(); ++i) positions[i] = static_cast<i32>(i % tokens);
          CacheView cache;
          cache.segments = heads;
          cache.keys = keys.rows();
          cache.values = values.rows();
          cache.capacity = tokens;
          cache.lengths = lengths.data();
          cache.positions = Ragged<i32>(positions.data(), u64{tokens});
          cache.next_position = 1000;
          cache.rope = &rope;
          cache.rope_pairing = pairing;
          RaggedKVCache packed;
          REQUIRE(packed.allocate(ragged_shape(plan, cache)));
          REQUIRE(apply(plan, cache, packed));
          REQUIRE(apply(plan, cache, in_place));
          const CacheView copy = packed.view();
          for (u32 h = 0; h < heads; ++h) {
            for (u32 j = 0; j < plan.length[h]; ++j) {
              const u64 slot = plan.first[h] + j;
              CAPTURE(h, j);
              REQUIRE(same_bits(row_of(cache.keys, h, j), expected_keys[slot]));
              REQUIRE(same_bits(row_of(cache.values, h, j), expected_values[slot]));
              REQUIRE(same_bits(row_of(copy.keys, h, j), expected_keys[slot]));
              REQUIRE(same_bits(row_of(copy.values, h, j), expected_values[slot]));
              REQUIRE(cache.position(h, j) == plan.position[slot]);
              REQUIRE(copy.position(h, j) == plan.position[slot]);
            }
          }
        }
      }
    }
  }
}

TEST_CASE("values that are columns of turned keys move along with them", "[apply][move]") {
  // As in latent attention: V is the first 24 elements of K, only the last 16 of K turn.
  constexpr u32 tokens = 200;
  constexpr u32 dim = 40;
  Random random(3);
  RandomTensor keys = kvlean_test::random_tensor(random, 1, tokens, dim, DType::f16);
  PlanBuilder builder = renumbered(1, tokens, 0, random);
  const CompressionPlan plan = builder.plan();
  RopeSpec rope;
  rope.first_dim = 24;
  rope.rotary_dims = 16;
  std::vector<std::vector<float>> before;
  for (u32 t = 0; t < tokens; ++t) before.push_back(row_of(keys.rows(), 0, t));
  u32 length = tokens;
  std::vector<i32> positions(tokens);
  for (u32 t = 0; t < tokens; ++t) positions[t] = static_cast<i32>(t);
  CacheView cache;
  cache.segments = 1;
  cache.keys = cache.values = keys.rows();
  cache.values.width = 24;
  cache.capacity = tokens;
  cache.lengths = &length;
  cache.positions = Ragged<i32>(positions.data(), u64{tokens});
  cache.next_position = 1000;
  cache.rope = &rope;
  cache.rope_pairing = rope.pairing;
  REQUIRE(apply(plan, cache, in_place));
  RopeRotation rotation;
  REQUIRE(rotation.prepare(rope, dim));
  for (u32 j = 0; j < plan.length[0]; ++j) {
    CAPTURE(j);
    std::vector<float> key = before[plan.anchor[j]];
    RopeTurn turn;
    rotation.turn_by(i64{plan.position[j]} - i64{plan.anchor[j]}, turn);
    rotation.rotate(turn, key.data());
    key = rounded(key, DType::f16);
    REQUIRE(same_bits(row_of(cache.keys, 0, j), key));
    key.resize(24);
    REQUIRE(same_bits(row_of(cache.values, 0, j), key));
  }
}

TEST_CASE("what is too large for the caches is copied past them", "[apply][move]") {
  constexpr u32 tokens = 12000;  // 9.6 MB of kept rows
  constexpr u32 dim = 64;
  Random random(8);
  std::vector<float> keys(2 * tokens * dim);
  std::vector<float> values(2 * tokens * dim);
  for (std::size_t i = 0; i < keys.size(); ++i) {
    keys[i] = static_cast<float>(i);
    values[i] = -static_cast<float>(i);
  }
  KVCache cache(strided(keys.data(), Extents{2, tokens, dim}),
                strided(values.data(), Extents{2, tokens, dim}));
  cache.set_next_position(static_cast<i32>(tokens));
  PlanBuilder builder;
  for (u32 h = 0; h < 2; ++h) {
    std::vector<u32> kept;
    for (u32 t = h; t < tokens; ++t) {
      if (random.between(0, 4) != 0) kept.push_back(t);
    }
    builder.add_segment(kept);
  }
  const CompressionPlan plan = builder.plan();
  RaggedKVCache packed;
  REQUIRE(packed.allocate(ragged_shape(plan, cache)));
  REQUIRE(apply(plan, cache, packed));
  const CacheView copy = packed.view();
  std::size_t wrong = 0;
  for (u32 h = 0; h < 2; ++h) {
    for (u32 j = 0; j < plan.length[h]; ++j) {
      const std::size_t from = (std::size_t{h} * tokens + plan.anchor[plan.first[h] + j]) * dim;
      wrong += std::memcmp(row_address(copy.keys, h, j), keys.data() + from, dim * 4) != 0;
      wrong += std::memcmp(row_address(copy.values, h, j), values.data() + from, dim * 4) != 0;
    }
  }
  CHECK(wrong == 0);
}

TEST_CASE("kept sines give the turns of turn_by", "[rope][move]") {
  Random random(2);
  for (const u32 width : {2u, 6u, 64u, 128u, 192u, 576u, max_row_width}) {
    RopeSpec rope;
    RopeRotation rotation;
    REQUIRE(rotation.prepare(rope, width));
    RopeTurns turns(rotation);
    for (u32 round = 0; round < 200; ++round) {
      const i64 shift =
          round < 100 ? i64{100} - 7 * i64{round} : i64{random.between(0, 200000)} - 100000;
      CAPTURE(width, shift);
      RopeTurn expected;
      rotation.turn_by(shift, expected);
      const RopeTurn& turn = turns.by(shift);
      REQUIRE(std::memcmp(turn.cosine, expected.cosine, width / 2 * sizeof(float)) == 0);
      REQUIRE(std::memcmp(turn.sine, expected.sine, width / 2 * sizeof(float)) == 0);
    }
  }
  RopeRotation none;
  RopeTurns nothing(none);
  static_cast<void>(nothing.by(5));  // no pair to turn
}
