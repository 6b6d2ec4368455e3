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

namespace {

// What a cache of several layers should hold, head by head.
struct Slot {
  float key, value;
  i32 position;
  float log_mass;
  std::vector<float> states;
  bool operator==(const Slot&) const = default;
};
using Heads = std::vector<std::vector<Slot>>;

RaggedShape layered_shape(RaggedLayout layout, DType dtype) {
  RaggedShape shape = RaggedShape::flat(6, 3, dtype, 60);
  shape.layout = layout;
  shape.capacity_per_head = 10;
  shape.value_dim = 2;
  shape.layer_heads = 2;
  shape.state_arrays = 2;
  shape.log_mass = true;
  return shape;
}

void check_slots(const RaggedKVCache& cache, const Heads& expected) {
  const CacheView view = cache.view();
  Heads heads(view.segments);
  for (u32 h = 0; h < view.segments; ++h) {
    for (u32 t = 0; t < cache.length(h); ++t) {
      float key[3];
      float value[2];
      load_row(view.keys, h, t, key);
      load_row(view.values, h, t, value);
      REQUIRE((key[1] == key[0] && key[2] == key[0] && value[1] == value[0]));
      Slot slot{key[0], value[0], view.position(h, t), view.mass_bias(h, t), {}};
      for (u32 i = 0; i < cache.shape().state_arrays; ++i) {
        slot.states.push_back(cache.state(i)(h, t));
      }
      heads[h].push_back(slot);
    }
  }
  REQUIRE(heads == expected);
}

// Rows of `heads` heads whose elements are all head * 16 + token + start; values negative.
Source tokens_of(u32 first_head, u32 heads, u32 count, i32 start) {
  Source source(heads, count, 3, 2);
  for (u32 h = 0; h < heads; ++h) {
    for (u32 i = 0; i < count; ++i) {
      const float x = static_cast<float>((first_head + h) * 16) + static_cast<float>(start) +
                      static_cast<float>(i);
      std::fill_n(source.keys.data() + (h * count + i) * 3, 3, x);
      std::fill_n(source.values.data() + (h * count + i) * 2, 2, -x);
    }
  }
  return source;
}

void expect_tokens(Heads& heads, u32 first_head, u32 count_heads, u32 count, i32 start) {
  for (u32 h = first_head; h < first_head + count_heads; ++h) {
    for (u32 i = 0; i < count; ++i) {
      const i32 position = start + static_cast<i32>(i);
      const float x = static_cast<float>(h * 16) + static_cast<float>(position);
      heads[h].push_back({x, -x, position, 0.0f, {0.0f, 0.0f}});
    }
  }
}

}  // namespace

TEST_CASE("a slice of a ragged cache is a layer of the model", "[ragged]") {
  for (const RaggedLayout layout : {RaggedLayout::flat, RaggedLayout::fixed}) {
    RaggedKVCache cache;
    REQUIRE(cache.allocate(layered_shape(layout, DType::f32)));
    RopeSpec rope;
    rope.rotary_dims = 2;
    cache.set_origin({7, 10, 4});
    cache.set_rope(&rope);
    cache.respace();
    for (u32 h = 0; h < 6; ++h) {
      const Source source = tokens_of(h, 1, h + 1, 0);
      REQUIRE(cache.append(h, 1, source.key_rows, source.value_rows, h + 1, 0));
    }
    CHECK(cache.num_layers() == 3);
    const CacheView layer = cache.layer(2);
    REQUIRE(check_cache(layer));
    CHECK(layer.segments == 2);
    CHECK((layer.origin.sequence == 7 && layer.origin.layer == 12 && layer.origin.head == 4));
    CHECK(layer.rope == &rope);
    CHECK(layer.rope_pairing == RopePairing::neox);
    CHECK(layer.length(1) == 6);
    CHECK(layer.next_position == 6);
    CHECK(cache.view(3, 2).origin.layer == 11);
    CHECK(cache.view(3, 2).origin.head == 5);
    float row[3];
    load_row(layer.keys, 1, 4, row);
    CHECK(row[2] == 84.0f);
    load_row(layer.values, 0, 2, row);
    CHECK(row[1] == -66.0f);
    CHECK(layer.position(1, 5) == 5);
    layer.log_mass(1, 5) = 3.0f;
    CHECK(cache.view().mass_bias(5, 5) == 3.0f);
    cache.state(1, 4)(1, 5) = 9.0f;
    CHECK(cache.state(1)(5, 5) == 9.0f);
    layer.lengths[0] = 2;
    CHECK(cache.length(4) == 2);
    const CacheView whole = cache.view();
    CHECK((whole.segments == 6 && whole.origin.layer == 10 && whole.origin.head == 4));
    CHECK(cache.view(5, 2).segments == 0);
    CHECK(cache.view(6, 1).segments == 0);
    CHECK(cache.view(0, 0).segments == 0);
    CHECK(cache.view(1, 0xffffffffu).segments == 0);
    CHECK(cache.layer(3).segments == 0);
    CHECK_FALSE(cache.state(2));
    CHECK_FALSE(cache.state(0, 6));
  }
  RaggedShape odd = layered_shape(RaggedLayout::flat, DType::f32);
  odd.layer_heads = 4;
  RaggedKVCache cache;
  CHECK(cache.allocate(odd) == StatusCode::invalid_shape);
  CHECK(cache.num_layers() == 0);
}

TEST_CASE("layers of a step append one after the other", "[ragged]") {
  RaggedKVCache cache;
  REQUIRE(cache.allocate(layered_shape(RaggedLayout::fixed, DType::f32)));
  const Source four = tokens_of(0, 2, 4, 5);
  REQUIRE(cache.append(0, 2, four.key_rows, four.value_rows, 4, 5));
  CHECK(cache.next_position() == 9);
  REQUIRE(cache.append(2, 2, four.key_rows, four.value_rows, 4, 5));
  CHECK(cache.next_position() == 9);
  CHECK(cache.min_room(0, 4) == 6);
  CHECK(cache.min_room() == 6);
  CHECK(cache.room(5) == 10);
  CHECK(cache.min_room(4, 3) == 0);

  const std::vector<std::byte> before(cache.storage().begin(), cache.storage().end());
  const auto refused = [&](u32 first, u32 heads, u32 count, i32 position, StatusCode code) {
    CHECK(cache.append(first, heads, four.key_rows, four.value_rows, count, position) == code);
    CHECK(std::memcmp(before.data(), cache.storage().data(), before.size()) == 0);
    CHECK(cache.next_position() == 9);
  };
  refused(0, 2, 4, 8, StatusCode::invalid_option);  // the newest token stands at 8
  refused(4, 2, 4, -1, StatusCode::invalid_option);
  refused(0, 2, 1, 0x7fffffff, StatusCode::invalid_option);
  refused(5, 2, 1, 9, StatusCode::invalid_shape);
  refused(0, 3, 1, 9, StatusCode::shape_mismatch);
  refused(0, 2, 5, 9, StatusCode::invalid_length);
  CHECK(cache.append(0, 2, cache.view(4, 2).keys, four.value_rows, 1, 9) ==
        StatusCode::destination_overlaps);
  REQUIRE(cache.append(0, 2, four.key_rows, four.value_rows, 4, 9));
  CHECK(cache.append(0, 2, four.key_rows, four.value_rows, 3, 13) ==
        StatusCode::destination_too_small);
  CHECK(cache.next_position() == 13);
  // A layer that lags behind may catch up.
  REQUIRE(cache.append(4, 2, four.key_rows, four.value_rows, 4, 5));
  CHECK(cache.next_position() == 13);
}

TEST_CASE("tentative tokens are taken back", "[ragged]") {
  RaggedKVCache cache;
  REQUIRE(cache.allocate(layered_shape(RaggedLayout::fixed, DType::f32)));
  Heads expected(6);
  const Source six = tokens_of(0, 6, 6, 0);
  REQUIRE(cache.append(six.key_rows, six.value_rows, 6, 0));
  expect_tokens(expected, 0, 6, 4, 0);
  REQUIRE(cache.truncate(2));
  CHECK(cache.next_position() == 4);
  check_slots(cache, expected);
  REQUIRE(cache.truncate(2, 2, 1));
  expected[2].pop_back();
  expected[3].pop_back();
  CHECK(cache.next_position() == 4);
  check_slots(cache, expected);
  CHECK(cache.truncate(4) == StatusCode::invalid_length);
  CHECK(cache.truncate(5, 2, 1) == StatusCode::invalid_shape);
  cache.set_frozen(3);
  CHECK(cache.truncate(2, 2, 1) == StatusCode::frozen_token_changed);
  CHECK(cache.truncate(1) == StatusCode::frozen_token_changed);
  REQUIRE(cache.truncate(0));
  REQUIRE(cache.truncate(0, 2, 1));
  expected[0].pop_back();
  expected[1].pop_back();
  check_slots(cache, expected);
  CHECK(cache.next_position() == 4);
  RaggedKVCache unbound;
  CHECK(unbound.truncate(0) == StatusCode::invalid_shape);
}

TEST_CASE("respace shares the free slots and moves nothing twice", "[ragged]") {
  RaggedKVCache cache;
  REQUIRE(cache.allocate(layered_shape(RaggedLayout::flat, DType::f32)));
  const std::byte* memory = cache.storage().data();
  cache.respace();
  CHECK(cache.min_room() == 10);
  CHECK(cache.room(3) == 10);
  const u32 lengths[] = {0, 7, 1, 20, 3, 2};
  REQUIRE(cache.set_lengths(lengths));
  CHECK(cache.min_room() == 0);
  cache.respace();  // 27 slots are free
  for (u32 h = 0; h < 6; ++h) CHECK(cache.room(h) == 4);
  CHECK(cache.offsets()[6] == 33 + 24);
  CHECK(cache.storage().data() == memory);
  CHECK(cache.total_length() == 33);
  CHECK(check_cache(cache.view()));
  CHECK(cache.bytes_used() == 33 * (3 * 4 + 2 * 4 + 4 + 4 + 2 * 4) + 6 * 8);
  cache.clear();
  CHECK(cache.min_room() == 0);
  RaggedKVCache fixed;
  REQUIRE(fixed.allocate(layered_shape(RaggedLayout::fixed, DType::f32)));
  fixed.respace();
  CHECK(fixed.min_room() == 10);
  RaggedKVCache unbound;
  unbound.respace();
  CHECK(unbound.min_room() == 0);
}

TEST_CASE("a cache that lives keeps every slot: random steps against lists", "[ragged]") {
  u32 state = 1;
  const auto random = [&state](u32 bound) {
    state = state * 1664525u + 1013904223u;
    return (state >> 8) % bound;
  };
  u32 respaced = 0;
  for (u32 round = 0; round < 60; ++round) {
    const RaggedLayout layout = round % 2 == 0 ? RaggedLayout::flat : RaggedLayout::fixed;
    const RaggedShape shape = layered_shape(layout, round % 3 == 0 ? DType::f16 : DType::f32);
    std::vector<std::byte> memory(RaggedKVCache::bytes_required(shape) + 8, std::byte{0x5a});
    RaggedKVCache cache;
    REQUIRE(cache.bind(std::span(memory).first(memory.size() - 8), shape));
    cache.respace();
    Heads expected(6);
    i32 next = 0;
    for (u32 step = 0; step < 40; ++step) {
      switch (random(6)) {
        case 0:
        case 1: {  // append to all layers, one by one
          const u32 count = random(3);
          if (count > cache.min_room()) break;
          for (u32 layer = 0; layer < 3; ++layer) {
            const Source source = tokens_of(2 * layer, 2, count, next);
            REQUIRE(cache.append(2 * layer, 2, source.key_rows, source.value_rows, count, next));
          }
          expect_tokens(expected, 0, 6, count, next);
          next += static_cast<i32>(count);
          break;
        }
        case 2: {  // compress a layer in place, as apply() does: every third slot goes
          const u32 h = random(6);
          const CacheView view = cache.view(h, 1);
          u32 kept = 0;
          std::vector<Slot> rest;
          for (u32 t = 0; t < view.length(0); ++t) {
            if (t % 3 == 1) continue;
            copy_row(view.keys, 0, t, view.keys, 0, kept);
            copy_row(view.values, 0, t, view.values, 0, kept);
            view.positions(0, kept) = view.positions(0, t);
            view.log_mass(0, kept) = view.log_mass(0, t);
            for (u32 i = 0; i < 2; ++i) cache.state(i, h)(0, kept) = cache.state(i, h)(0, t);
            rest.push_back(expected[h][t]);
            ++kept;
          }
          view.lengths[0] = kept;
          expected[h] = rest;
          break;
        }
        case 3:
          if (layout == RaggedLayout::flat) ++respaced;
          cache.respace();
          break;
        case 4:
          if (random(2) == 0) cache.pack();
          for (u32 h = 0; h < 6; ++h) {
            for (u32 t = 0; t < cache.length(h); ++t) {
              const float x = static_cast<float>(random(100));
              cache.view().log_mass(h, t) = expected[h][t].log_mass = x;
              for (u32 i = 0; i < 2; ++i) {
                cache.state(i)(h, t) = expected[h][t].states[i] =
                    x + 100.0f * static_cast<float>(i);
              }
            }
          }
          break;
        case 5:  // roll back a token
          if (next == 0) break;
          if (std::any_of(expected.begin(), expected.end(), [&](const std::vector<Slot>& head) {
                return head.empty() || head.back().position != next - 1;
              })) {
            break;
          }
          REQUIRE(cache.truncate(1));
          for (auto& head : expected) head.pop_back();
          --next;
          break;
      }
      check_slots(cache, expected);
      REQUIRE(cache.next_position() == next);
    }
    REQUIRE(std::count(memory.end() - 8, memory.end(), std::byte{0x5a}) == 8);
  }
  CHECK(respaced > 20);
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
