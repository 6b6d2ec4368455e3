// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "kvlean/core/ragged_kv_cache.hpp"
#include "tests/support/catch.hpp"

// AddressSanitizer aborts where an allocation of that size returns null.
#if defined(__SANITIZE_ADDRESS__)
#define KVLEAN_TEST_UNDER_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define KVLEAN_TEST_UNDER_ASAN 1
#endif
#endif
#ifndef KVLEAN_TEST_UNDER_ASAN
#define KVLEAN_TEST_UNDER_ASAN 0
#endif

using namespace kvlean;

namespace {

// Rows whose elements tell where they come from.
struct Source {
  std::vector<float> keys;
  std::vector<float> values;
  Rows key_rows;
  Rows value_rows;

  Source(std::size_t heads, std::size_t tokens, std::size_t key_dim, std::size_t value_dim)
      : keys(heads * tokens * key_dim), values(heads * tokens * value_dim) {
    for (std::size_t i = 0; i < keys.size(); ++i) keys[i] = static_cast<float>(i);
    for (std::size_t i = 0; i < values.size(); ++i) values[i] = -static_cast<float>(i);
    key_rows = strided(keys.data(), Extents{heads, tokens, key_dim}).rows();
    value_rows = strided(values.data(), Extents{heads, tokens, value_dim}).rows();
  }
};

RaggedShape mixed_shape() {
  RaggedShape shape;
  shape.kv_heads = 3;
  shape.key_dim = 5;
  shape.value_dim = 7;
  shape.key_dtype = DType::f16;
  shape.value_dtype = DType::f32;
  shape.total_slots = 12;
  shape.log_mass = true;
  return shape;
}

}  // namespace

TEST_CASE("a ragged cache lies in the caller's memory at any alignment", "[ragged]") {
  for (const RaggedLayout layout : {RaggedLayout::flat, RaggedLayout::fixed}) {
    RaggedShape shape = mixed_shape();
    shape.layout = layout;
    shape.capacity_per_head = 4;
    const std::size_t bytes = RaggedKVCache::bytes_required(shape);
    REQUIRE(bytes >= 12 * (5 * 2 + 7 * 4 + 8) + 3 * 4 + 4 * 8);
    for (std::size_t shift : {0u, 1u, 13u, 63u, 64u}) {
      std::vector<std::byte> memory(bytes + shift + 16, std::byte{0x77});
      RaggedKVCache cache;
      REQUIRE(cache.bind(std::span(memory).subspan(shift, bytes), shape));
      const u32 lengths[] = {4, 3, 2};
      REQUIRE(cache.set_lengths(lengths));
      const CacheView view = cache.view();
      REQUIRE(check_cache(view));
      float row[7] = {1, 2, 3, 4, 5, 6, 7};
      for (u32 h = 0; h < 3; ++h) {
        for (u32 t = 0; t < lengths[h]; ++t) {
          row[0] = static_cast<float>(10 * h + t);
          store_row(view.keys, h, t, row);
          store_row(view.values, h, t, row);
          view.positions(h, t) = static_cast<i32>(10 * h + t);
          view.log_mass(h, t) = static_cast<float>(10 * h + t);
        }
      }
      for (u32 h = 0; h < 3; ++h) {
        for (u32 t = 0; t < lengths[h]; ++t) {
          const float expected = static_cast<float>(10 * h + t);
          load_row(view.keys, h, t, row);
          CHECK(row[0] == expected);
          load_row(view.values, h, t, row);
          CHECK(row[0] == expected);
          CHECK(row[6] == 7.0f);
          CHECK(view.position(h, t) == static_cast<i32>(10 * h + t));
          CHECK(view.mass_bias(h, t) == expected);
        }
      }
      CHECK(std::count(memory.begin(), memory.begin() + static_cast<std::ptrdiff_t>(shift),
                       std::byte{0x77}) == static_cast<std::ptrdiff_t>(shift));
      CHECK(std::count(memory.end() - 16, memory.end(), std::byte{0x77}) == 16);
      CHECK(cache.total_length() == 9);
      CHECK(cache.bytes_used() == 9 * (5 * 2 + 7 * 4 + 4 + 4) + 3 * 8);
      CHECK(cache.is_packed() == (layout == RaggedLayout::flat));
    }
  }
}

TEST_CASE("shapes that cannot be are refused", "[ragged]") {
  RaggedKVCache cache;
  RaggedShape shape = RaggedShape::flat(2, 8, DType::f32, 10);
  REQUIRE(cache.allocate(shape));
  const auto refused = [&](const RaggedShape& bad, StatusCode code) {
    std::vector<std::byte> memory(100000);
    CHECK(cache.allocate(bad) == code);
    CHECK(cache.bind(memory, bad) == code);
    CHECK(RaggedKVCache::bytes_required(bad) == 0);
    CHECK(cache.shape().key_dim == 8);
  };
  SECTION("no heads") {
    shape.kv_heads = 0;
    refused(shape, StatusCode::invalid_shape);
  }
  SECTION("no width") {
    shape.value_dim = 0;
    refused(shape, StatusCode::invalid_shape);
  }
  SECTION("too wide") {
    shape.key_dim = max_row_width + 1;
    refused(shape, StatusCode::row_too_wide);
  }
  SECTION("size overflows") {
    shape.total_slots = static_cast<std::size_t>(-1) / 8;
    refused(shape, StatusCode::invalid_shape);
    shape = RaggedShape::fixed(1u << 31, 8, DType::f32, 0xffffffffu);
    shape.key_dim = max_row_width;
    refused(shape, StatusCode::invalid_shape);
  }
  SECTION("capacity past 32 bits") {
    shape = RaggedShape::fixed(1, 8, DType::f32, std::size_t{1} << 32);
    refused(shape, StatusCode::invalid_shape);
  }
  SECTION("more memory than there is") {
    shape.total_slots = std::size_t{1} << 50;
    CHECK(RaggedKVCache::bytes_required(shape) != 0);
#if !KVLEAN_TEST_UNDER_ASAN
    CHECK(cache.allocate(shape) == StatusCode::out_of_memory);
#endif
    CHECK(cache.shape().total_slots == 10);
  }
  SECTION("storage") {
    std::vector<std::byte> memory(RaggedKVCache::bytes_required(shape) - 1);
    CHECK(cache.bind(memory, shape) == StatusCode::destination_too_small);
    CHECK(cache.bind({}, shape) == StatusCode::null_pointer);
  }
}

TEST_CASE("an unbound ragged cache is an invalid input, not a crash", "[ragged]") {
  RaggedKVCache cache;
  CHECK(check_cache(cache.view()) == StatusCode::invalid_shape);
  CHECK(cache.bytes_used() == 0);
  CHECK(cache.offsets().empty());
  cache.clear();
  cache.pack();
  const Source source(1, 1, 1, 1);
  CHECK(cache.append(source.key_rows, source.value_rows, 1, 0) == StatusCode::invalid_shape);
}

TEST_CASE("moving a ragged cache keeps views alive", "[ragged]") {
  RaggedKVCache cache;
  REQUIRE(cache.allocate(RaggedShape::fixed(2, 4, DType::f32, 3)));
  const Source source(2, 3, 4, 4);
  REQUIRE(cache.append(source.key_rows, source.value_rows, 2, 0));
  const CacheView view = cache.view();
  RaggedKVCache moved(std::move(cache));
  RaggedKVCache assigned;
  assigned = std::move(moved);
  CHECK(assigned.length(1) == 2);
  CHECK(view.keys.data == assigned.view().keys.data);
  float row[4];
  load_row(view.keys, 1, 1, row);
  CHECK(row[0] == 16.0f);
}

TEST_CASE("tokens are appended in constant space per head", "[ragged]") {
  RaggedShape shape = RaggedShape::fixed(2, 4, DType::bf16, 5);
  shape.value_dim = 3;
  shape.log_mass = true;
  RaggedKVCache cache;
  REQUIRE(cache.allocate(shape));
  const u32 start[] = {1, 2};
  REQUIRE(cache.set_lengths(start));
  cache.set_next_position(40);
  const Source source(2, 3, 4, 3);
  REQUIRE(cache.append(source.key_rows, source.value_rows, 2, 41));
  CHECK(cache.length(0) == 3);
  CHECK(cache.length(1) == 4);
  const CacheView view = cache.view();
  CHECK(view.next_position == 43);
  CHECK(view.position(1, 3) == 42);
  CHECK(view.mass_bias(1, 3) == 0.0f);
  float row[4];
  load_row(view.keys, 1, 3, row);
  CHECK(row[0] == 16.0f);
  load_row(view.values, 1, 2, row);
  CHECK(row[0] == -9.0f);

  const std::vector<std::byte> before(cache.storage().begin(), cache.storage().end());
  const auto refused = [&](const Rows& keys, const Rows& values, u32 count, i32 position,
                           StatusCode code) {
    CHECK(cache.append(keys, values, count, position) == code);
    CHECK(std::memcmp(before.data(), cache.storage().data(), before.size()) == 0);
    CHECK(cache.view().next_position == 43);
  };
  const Source narrow(2, 3, 3, 3);
  const Source one_head(1, 3, 4, 3);
  refused(source.key_rows, source.value_rows, 2, 43, StatusCode::destination_too_small);
  refused(source.key_rows, source.value_rows, 1, 42, StatusCode::invalid_option);
  refused(source.key_rows, source.value_rows, 1, 0x7fffffff, StatusCode::invalid_option);
  refused(narrow.key_rows, source.value_rows, 1, 43, StatusCode::shape_mismatch);
  refused(source.key_rows, one_head.value_rows, 1, 43, StatusCode::shape_mismatch);
  refused(source.key_rows, source.value_rows, 4, 43, StatusCode::invalid_length);
  refused(view.keys, source.value_rows, 1, 43, StatusCode::destination_overlaps);
  REQUIRE(cache.append(source.key_rows, source.value_rows, 0, 43));
  REQUIRE(cache.append(source.key_rows, source.value_rows, 1, 43));
  CHECK(cache.length(1) == 5);
}

TEST_CASE("a flat cache has room only in its gaps, and packs them away", "[ragged]") {
  RaggedKVCache cache;
  REQUIRE(cache.allocate(RaggedShape::flat(3, 4, DType::f32, 9)));
  const Source source(3, 3, 4, 4);
  CHECK(cache.append(source.key_rows, source.value_rows, 1, 0) ==
        StatusCode::destination_too_small);
  const u32 lengths[] = {3, 2, 4};
  REQUIRE(cache.set_lengths(lengths));
  CacheView view = cache.view();
  for (u32 h = 0; h < 3; ++h) {
    for (u32 t = 0; t < lengths[h]; ++t) {
      const float x = static_cast<float>(10 * h + t);
      const float row[] = {x, x, x, x};
      store_row(view.keys, h, t, row);
      store_row(view.values, h, t, row);
      view.positions(h, t) = static_cast<i32>(t);
    }
  }
  CHECK(cache.is_packed());
  i32 sums[4];
  REQUIRE(cache.cu_lengths(sums));
  CHECK((sums[1] == 3 && sums[2] == 5 && sums[3] == 9));
  view.lengths[0] = 1;
  view.lengths[2] = 2;
  CHECK(cache.capacity(0) == 3);
  CHECK_FALSE(cache.is_packed());
  REQUIRE(cache.cu_lengths(sums));
  CHECK((sums[1] == 1 && sums[2] == 3 && sums[3] == 5));
  cache.pack();
  CHECK(cache.is_packed());
  view = cache.view();
  for (u32 h = 0; h < 3; ++h) {
    for (u32 t = 0; t < cache.length(h); ++t) {
      float row[4];
      load_row(view.values, h, t, row);
      CHECK(row[3] == static_cast<float>(10 * h + t));
      CHECK(view.position(h, t) == static_cast<i32>(t));
    }
  }
  i32 wrong_size[3];
  CHECK(cache.cu_lengths(wrong_size) == StatusCode::shape_mismatch);
  cache.clear();
  CHECK(cache.total_length() == 0);
  CHECK(check_cache(cache.view()));
  CHECK(cache.capacity(2) == 0);
}

TEST_CASE("lengths that do not fit are refused", "[ragged]") {
  RaggedKVCache flat;
  REQUIRE(flat.allocate(RaggedShape::flat(2, 4, DType::f32, 9)));
  const u32 many[] = {9, 1};
  const u32 three[] = {1, 1, 1};
  CHECK(flat.set_lengths(many) == StatusCode::destination_too_small);
  CHECK(flat.set_lengths(three) == StatusCode::shape_mismatch);
  RaggedKVCache fixed;
  REQUIRE(fixed.allocate(RaggedShape::fixed(2, 4, DType::f32, 8)));
  CHECK(fixed.set_lengths(many) == StatusCode::destination_too_small);
  CHECK(fixed.total_length() == 0);
}

#if !KVLEAN_TEST_UNDER_ASAN
TEST_CASE("prefix sums past int32 are refused", "[ragged]") {
  // Lengths are set without touching the rows, in memory that is reserved but never used.
  RaggedShape shape = RaggedShape::flat(2, 1, DType::bf16, std::size_t{1} << 31);
  shape.positions = false;
  RaggedKVCache cache;
  if (!cache.allocate(shape)) return;  // a machine without overcommit
  const u32 lengths[] = {0x7fffffffu, 1};
  REQUIRE(cache.set_lengths(lengths));
  i32 sums[3] = {-1, -1, -1};
  CHECK(cache.cu_lengths(sums) == StatusCode::invalid_shape);
  CHECK(sums[0] == -1);
}
#endif
