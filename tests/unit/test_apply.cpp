// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "kvlean/apply/apply.hpp"
#include "tests/support/catch.hpp"
#include "tests/support/layouts.hpp"
#include "tests/support/plan_builder.hpp"

using namespace kvlean;
using namespace kvlean_test;

namespace {

// Two heads of `tokens` tokens; element (h, t, d) of K is 100 h + t + d / 8, V is minus that.
struct Layer {
  std::size_t tokens;
  std::vector<float> keys;
  std::vector<float> values;
  std::vector<u32> lengths;
  std::vector<i32> positions;
  std::vector<float> log_mass;

  explicit Layer(std::size_t n = 8)
      : tokens(n),
        keys(2 * n * 4),
        values(2 * n * 2),
        lengths(2, static_cast<u32>(n)),
        positions(2 * n),
        log_mass(2 * n) {
    for (std::size_t h = 0; h < 2; ++h) {
      for (std::size_t t = 0; t < n; ++t) {
        for (std::size_t d = 0; d < 4; ++d) keys[(h * n + t) * 4 + d] = element(h, t, d);
        for (std::size_t d = 0; d < 2; ++d) values[(h * n + t) * 2 + d] = -element(h, t, d);
        positions[h * n + t] = static_cast<i32>(10 * t);
        log_mass[h * n + t] = static_cast<float>(t) / 4;
      }
    }
  }
  static float element(std::size_t h, std::size_t t, std::size_t d) {
    return static_cast<float>(100 * h + t) + static_cast<float>(d) / 8;
  }
  [[nodiscard]] KVCache<Strided<float>> cache() {
    return KVCache(strided(keys.data(), Extents{2, tokens, 4}),
                   strided(values.data(), Extents{2, tokens, 2}));
  }
  [[nodiscard]] CacheView full_view() {
    auto layer = cache();
    layer.set_lengths(lengths.data())
        .set_positions(Ragged<i32>(positions.data(), tokens), 1000)
        .set_log_mass(Ragged<float>(log_mass.data(), tokens));
    return layer.view();
  }
  [[nodiscard]] float key(std::size_t h, std::size_t t, std::size_t d = 0) const {
    return keys[(h * tokens + t) * 4 + d];
  }
  [[nodiscard]] float value(std::size_t h, std::size_t t, std::size_t d = 0) const {
    return values[(h * tokens + t) * 2 + d];
  }
  bool operator==(const Layer&) const = default;
};

}  // namespace

TEST_CASE("eviction in place keeps the anchors in order and the next position", "[apply]") {
  Layer layer;
  auto cache = layer.cache();
  cache.set_length(7).set_next_position(70);
  PlanBuilder builder{{0, 1, 4, 6}, {2, 3, 4, 5}};
  REQUIRE(apply(builder.plan(), cache, in_place));
  CHECK(cache.length() == 4);
  CHECK(cache.view().next_position == 70);
  const float kept[2][4] = {{0, 1, 4, 6}, {102, 103, 104, 105}};
  for (std::size_t h = 0; h < 2; ++h) {
    for (std::size_t j = 0; j < 4; ++j) {
      CHECK(layer.key(h, j, 1) == kept[h][j] + 0.125f);
      CHECK(layer.value(h, j, 1) == -kept[h][j] - 0.125f);
    }
  }
  CHECK(layer.key(0, 7) == 7.0f);  // past the valid length
}

TEST_CASE("positions, log mass and lengths move along in place", "[apply]") {
  Layer layer;
  CacheView view = layer.full_view();
  PlanBuilder builder{{0, 3, 7}, {1}};
  REQUIRE(apply(builder.plan(), view, in_place));
  CHECK((layer.lengths == std::vector<u32>{3, 1}));
  CHECK((view.position(0, 1) == 30 && view.position(0, 2) == 70 && view.position(1, 0) == 10));
  CHECK((view.mass_bias(0, 2) == 1.75f && view.mass_bias(1, 0) == 0.25f));
  CHECK(view.next_position == 1000);

  PlanBuilder again{{1, 2}, {0}};
  again.position = {5, 6, 7};
  again.log_mass = {0.5f, -0.5f, 0.75f};
  REQUIRE(apply(again.plan(), view, in_place));
  CHECK((view.position(0, 0) == 5 && view.position(0, 1) == 6 && view.position(1, 0) == 7));
  CHECK((view.mass_bias(0, 0) == 0.5f && view.mass_bias(1, 0) == 0.75f));
  CHECK((layer.key(0, 0) == 3.0f && layer.key(0, 1) == 7.0f && layer.key(1, 0) == 101.0f));
}

TEST_CASE("a fold reads terms on both sides of its anchor, before anything moves", "[apply]") {
  Layer layer;
  CacheView view = layer.full_view();
  // Slot 1 is anchored at 4; its row 1 still holds a term of slot 2 when slot 1 moves there.
  PlanBuilder builder{{0, 4, 6}, {0, 1, 2}};
  builder.moves_keys = true;
  builder.self_weight = {1, 0.5f, 0.25f, 1, 1, 1};
  builder.add_terms(1, {{7, 0.5f, 0.5f}});
  builder.add_terms(2, {{1, 0.5f, 0.5f}, {5, 0.25f, 0.25f}});
  REQUIRE(apply(builder.plan(), view, in_place));
  CHECK(layer.key(0, 1) == 0.5f * 4 + 0.5f * 7);
  CHECK(layer.key(0, 2) == 0.25f * 6 + 0.5f * 1 + 0.25f * 5);
  CHECK(layer.value(0, 2) == -(0.25f * 6 + 0.5f * 1 + 0.25f * 5));
  CHECK(layer.key(1, 2) == 102.0f);
}

TEST_CASE("without needs_moved_keys weights and terms are for values only", "[apply]") {
  Layer layer;
  CacheView view = layer.full_view();
  PlanBuilder builder{{0, 4}, {0, 1}};
  builder.add_terms(1, {{3, 9.0f, 0.5f}});
  builder.self_weight = {1, 0.25f, 1, 1};
  REQUIRE(apply(builder.plan(), view, in_place));
  CHECK(layer.key(0, 1) == 4.0f);
  CHECK(layer.value(0, 1) == -(0.25f * 4 + 0.5f * 3));
}

TEST_CASE("moved rows keep their bits, NaN payloads too", "[apply]") {
  std::vector<u16> bits(2 * 6 * 3);
  for (std::size_t i = 0; i < bits.size(); ++i) bits[i] = static_cast<u16>(0x7c01 + 37 * i);
  const auto before = bits;
  f16* data = reinterpret_cast<f16*>(bits.data());
  KVCache cache(strided(data, Extents{1, 6, 3}), strided(data + 18, Extents{1, 6, 3}));
  PlanBuilder builder{{1, 2, 5}};
  RaggedKVCache out;
  REQUIRE(out.allocate(ragged_shape(builder.plan(), cache)));
  REQUIRE(apply(builder.plan(), cache, out));
  REQUIRE(apply(builder.plan(), cache, in_place));
  for (std::size_t half : {0u, 18u}) {
    CHECK(std::equal(bits.begin() + static_cast<std::ptrdiff_t>(half),
                     bits.begin() + static_cast<std::ptrdiff_t>(half) + 6,
                     before.begin() + static_cast<std::ptrdiff_t>(half) + 3));
    CHECK(bits[half + 6] == before[half + 15]);
  }
  CHECK(std::memcmp(out.view().values.data, bits.data() + 18, 9 * sizeof(u16)) == 0);
}

TEST_CASE("an identity plan writes nothing", "[apply]") {
  Layer layer;
  const Layer before = layer;
  CacheView view = layer.full_view();
  PlanBuilder builder{{0, 1, 2, 3, 4, 5, 6, 7}, {0, 1, 2, 3, 4, 5, 6, 7}};
  REQUIRE(apply(builder.plan(), view, in_place));
  CHECK(layer == before);
}

TEST_CASE("values that are columns of the keys move once", "[apply]") {
  std::vector<float> latent(8 * 6);
  for (std::size_t i = 0; i < latent.size(); ++i) latent[i] = static_cast<float>(i);
  const auto before = latent;
  KVCache cache(strided(latent.data(), Extents{1, 8, 6}),
                strided(latent.data(), Extents{1, 8, 4}, {48, 6, 1}));
  PlanBuilder builder{{1, 2, 3, 6, 7}};
  REQUIRE(apply(builder.plan(), cache, in_place));
  const std::size_t kept[] = {1, 2, 3, 6, 7};
  for (std::size_t j = 0; j < 5; ++j) {
    for (std::size_t d = 0; d < 6; ++d) CHECK(latent[j * 6 + d] == before[kept[j] * 6 + d]);
  }
}

TEST_CASE("literal rows replace keys and values", "[apply]") {
  Layer layer;
  CacheView view = layer.full_view();
  std::vector<bf16> fitted(2 * 3 * 4);
  for (std::size_t i = 0; i < fitted.size(); ++i) fitted[i] = bf16(static_cast<float>(i) - 5.0f);
  PlanBuilder builder{{1, 3, 5}, {0, 2}};
  builder.literal_keys = strided(fitted.data(), Extents{2, 3, 4}).rows();
  builder.literal_values = strided(fitted.data(), Extents{2, 3, 2}, {12, 4, 1}).rows();
  REQUIRE(apply(builder.plan(), view, in_place));
  CHECK((layer.key(0, 2, 1) == 4.0f && layer.value(1, 1, 1) == 12.0f));
  CHECK(view.position(0, 2) == 50);

  SECTION("they may lie in the destination already, but not in the cache in place") {
    Layer source;
    RaggedKVCache out;
    REQUIRE(out.allocate(ragged_shape(builder.plan(), source.full_view())));
    REQUIRE(apply(builder.plan(), source.full_view(), out));
    builder.literal_keys = out.view().keys;
    builder.literal_values = out.view().values;
    REQUIRE(apply(builder.plan(), source.full_view(), out));
    float row[4];
    load_row(out.view().keys, 0, 2, row);
    CHECK(row[1] == 4.0f);

    CacheView inside = source.full_view();
    PlanBuilder alias{{0, 2}, {0, 2}};
    alias.literal_keys = inside.keys;
    CHECK(apply(alias.plan(), inside, in_place) == StatusCode::destination_overlaps);
    alias.literal_keys = {};
    alias.literal_values = inside.values;
    CHECK(apply(alias.plan(), inside, in_place) == StatusCode::destination_overlaps);
    CHECK(source == Layer());
  }
}

TEST_CASE("one array for all heads moves once, if the heads agree", "[apply]") {
  Layer layer;
  CacheView view = layer.full_view();
  std::vector<i32> shared{0, 1, 2, 3, 4, 5, 6, 7};
  std::vector<float> mass{0, 1, 2, 3, 4, 5, 6, 7};
  view.positions = Ragged<i32>(shared.data(), u64{0});
  PlanBuilder differ{{1, 4}, {2, 5}};
  CHECK(apply(differ.plan(), view, in_place) == StatusCode::needs_positions);
  view.positions = {};
  view.log_mass = Ragged<float>(mass.data(), u64{0});
  CHECK(apply(differ.plan(), view, in_place) == StatusCode::needs_log_mass);
  view.positions = Ragged<i32>(shared.data(), u64{0});
  PlanBuilder same{{1, 4, 7}, {1, 4, 7}};
  REQUIRE(apply(same.plan(), view, in_place));
  CHECK((shared[0] == 1 && shared[1] == 4 && shared[2] == 7));
  CHECK((mass[0] == 1 && mass[1] == 4 && mass[2] == 7));
}

TEST_CASE("in place: an error leaves the cache as it was", "[apply]") {
  Layer layer;
  const Layer before = layer;
  CacheView view = layer.full_view();
  PlanBuilder builder{{1, 4, 7}, {2, 5}};
  builder.log_mass.assign(5, 0.5f);
  builder.position = {1, 2, 3, 1, 2};
  builder.self_weight.assign(5, 0.5f);
  CompressionPlan plan = builder.plan();
  StatusCode expected = StatusCode::ok;
  SECTION("plan") {
    builder.anchor[1] = 8;
    expected = StatusCode::invalid_plan;
  }
  SECTION("frozen") {
    view.frozen = 1;
    expected = StatusCode::frozen_token_changed;
  }
  SECTION("read-only keys") {
    view.keys.writable = false;
    expected = StatusCode::read_only;
  }
  SECTION("read-only values") {
    view.values.writable = false;
    expected = StatusCode::read_only;
  }
  SECTION("lengths") {
    view.lengths = nullptr;
    expected = StatusCode::needs_ragged_lengths;
  }
  SECTION("log mass") {
    view.log_mass = {};
    expected = StatusCode::needs_log_mass;
  }
  SECTION("positions") {
    view.positions = {};
    expected = StatusCode::needs_positions;
  }
  SECTION("cache") {
    view.keys.data = nullptr;
    expected = StatusCode::null_pointer;
  }
  CHECK(apply(plan, view, in_place) == expected);
  if (expected != StatusCode::ok) {
    CHECK(layer == before);
    CHECK(view.uniform_length == 8);
  }
}

TEST_CASE("a const tensor is read-only", "[apply]") {
  const std::vector<float> data(32);
  KVCache cache(strided(data.data(), Extents{1, 8, 4}), strided(data.data(), Extents{1, 8, 4}));
  PlanBuilder builder{{0, 1}};
  CHECK(apply(builder.plan(), cache, in_place) == StatusCode::read_only);
  CHECK(cache.length() == 8);
}

TEST_CASE("out of place: an error leaves the destination as it was", "[apply]") {
  Layer layer;
  const Layer before = layer;
  CacheView view = layer.full_view();
  PlanBuilder builder{{1, 4, 7}, {2, 5}};
  RaggedShape shape = ragged_shape(builder.plan(), view);
  CHECK(shape.log_mass);
  RaggedKVCache out;
  const auto check = [&](StatusCode expected) {
    REQUIRE(out.allocate(shape));
    const u32 one[] = {1, 0};
    if (shape.kv_heads == 2) REQUIRE(out.set_lengths(one));
    const std::vector<std::byte> bytes(out.storage().begin(), out.storage().end());
    CHECK(apply(builder.plan(), view, out) == expected);
    CHECK(std::memcmp(bytes.data(), out.storage().data(), bytes.size()) == 0);
    CHECK(layer == before);
  };
  SECTION("flat, too small") {
    shape.total_slots = 4;
    check(StatusCode::destination_too_small);
  }
  SECTION("fixed, too small") {
    shape.layout = RaggedLayout::fixed;
    shape.capacity_per_head = 2;
    check(StatusCode::destination_too_small);
  }
  SECTION("heads") {
    shape.kv_heads = 3;
    check(StatusCode::shape_mismatch);
  }
  SECTION("key width") {
    shape.key_dim = 5;
    check(StatusCode::shape_mismatch);
  }
  SECTION("value width") {
    shape.value_dim = 4;
    check(StatusCode::shape_mismatch);
  }
  SECTION("the source has log mass") {
    shape.log_mass = false;
    check(StatusCode::needs_log_mass);
  }
  SECTION("the plan has log mass") {
    shape.log_mass = false;
    view.log_mass = {};
    builder.log_mass.assign(5, 0.0f);
    check(StatusCode::needs_log_mass);
  }
  SECTION("the source has positions") {
    shape.positions = false;
    check(StatusCode::needs_positions);
  }
  SECTION("the plan has positions") {
    shape.positions = false;
    view.positions = {};
    builder.position = {0, 1, 2, 0, 1};
    check(StatusCode::needs_positions);
  }
  SECTION("plan") {
    builder.anchor[0] = 4;
    check(StatusCode::invalid_plan);
  }
  SECTION("cache") {
    view.segments = 0;
    check(StatusCode::invalid_shape);
  }
  SECTION("an unbound destination") {
    RaggedKVCache nothing;
    CHECK(apply(builder.plan(), view, nothing) == StatusCode::shape_mismatch);
  }
}

TEST_CASE("a destination over its source is refused", "[apply]") {
  Layer layer;
  PlanBuilder builder{{1, 4, 7}, {2, 5}};
  RaggedKVCache cache;
  REQUIRE(cache.allocate(ragged_shape(builder.plan(), layer.full_view())));
  REQUIRE(apply(builder.plan(), layer.full_view(), cache));
  PlanBuilder again{{0, 1}, {1}};
  CHECK(apply(again.plan(), cache, cache) == StatusCode::destination_overlaps);

  // An engine's arena: the destination may lie between the rows of a strided source, not on them.
  RaggedShape shape = RaggedShape::flat(1, 4, DType::f32, 2);
  const std::size_t bytes = RaggedKVCache::bytes_required(shape);
  alignas(64) static std::array<std::byte, 4096> arena;
  float* data = reinterpret_cast<float*>(arena.data());
  const KVCache source(strided(data, Extents{1, 4, 4}),
                       strided(data + 16, Extents{1, 4, 4}, {0, -4, 1}));
  CHECK(source.view().values.data == data + 16);
  PlanBuilder keep{{0, 3}};
  RaggedKVCache out;
  REQUIRE(out.bind(std::span<std::byte>(arena).subspan(128, bytes), shape));
  CHECK(apply(keep.plan(), source, out) == Status());
  REQUIRE(out.bind(std::span<std::byte>(arena).subspan(60, bytes), shape));
  CHECK(apply(keep.plan(), source, out) == StatusCode::destination_overlaps);
  std::vector<i32> table{9, 1};
  const auto pool = paged(data, {1, 4, 4}, {0, 4, 1}, 8, 2, table);  // pages of 32 bytes at 288, 32
  REQUIRE(out.bind(std::span<std::byte>(arena).subspan(320, bytes), shape));
  CHECK(apply(keep.plan(), KVCache(pool, pool), out) == Status());
  REQUIRE(out.bind(std::span<std::byte>(arena).subspan(256, bytes), shape));
  CHECK(apply(keep.plan(), KVCache(pool, pool), out) == StatusCode::destination_overlaps);
  std::vector<u32> order{0, 1, 2, 20};
  const auto cells = indexed(data, {1, 4, 4}, {0, 4, 1}, order);
  REQUIRE(out.bind(std::span<std::byte>(arena).subspan(384, bytes), shape));
  CHECK(apply(keep.plan(), KVCache(cells, cells), out) == Status());
  REQUIRE(out.bind(std::span<std::byte>(arena).subspan(128, bytes), shape));
  CHECK(apply(keep.plan(), KVCache(cells, cells), out) == StatusCode::destination_overlaps);
}

TEST_CASE("byte ranges follow the sign of every stride", "[apply]") {
  std::vector<float> data(100);
  const auto touches = [&](Strides strides, std::size_t at) {
    const Rows rows = strided(data.data() + 50, Extents{1, 4, 3}, strides).rows();
    return detail::rows_touch(rows, 0, 4, detail::ByteRange::of(data.data() + at, 4));
  };
  CHECK((touches({0, -5, 1}, 35) && touches({0, -5, 1}, 52) && !touches({0, -5, 1}, 34)));
  CHECK_FALSE(touches({0, -5, 1}, 53));
  CHECK((touches({0, 5, -1}, 48) && touches({0, 5, -1}, 65) && !touches({0, 5, -1}, 47)));
  CHECK_FALSE(touches({0, 5, -1}, 66));
  CHECK((touches({0, 1, 10}, 73) && !touches({0, 1, 10}, 74) && !touches({0, 1, 10}, 49)));
}

TEST_CASE("a source without positions gives slots their index", "[apply]") {
  Layer layer;
  auto cache = layer.cache();
  cache.set_frozen(1);
  PlanBuilder builder{{0, 4, 7}, {0, 5, 6}};
  RaggedKVCache out;
  REQUIRE(out.allocate(ragged_shape(builder.plan(), cache)));
  REQUIRE(apply(builder.plan(), cache, out));
  CHECK((out.view().position(0, 1) == 4 && out.view().position(1, 2) == 6));
  CHECK(out.view().next_position == 8);
  CHECK(out.view().frozen == 0);
  CHECK_FALSE(static_cast<bool>(out.view().log_mass));
}

TEST_CASE("nothing kept is a valid result", "[apply]") {
  Layer layer;
  CacheView view = layer.full_view();
  PlanBuilder builder{{}, {}};
  RaggedKVCache out;
  REQUIRE(out.allocate(ragged_shape(builder.plan(), view)));
  REQUIRE(apply(builder.plan(), view, out));
  CHECK(out.total_length() == 0);
  REQUIRE(apply(builder.plan(), view, in_place));
  CHECK(view.total_length() == 0);
  PlanBuilder more{{}, {}};
  CHECK(apply(more.plan(), out, in_place) == Status());
}

namespace {

// One head, 6 of 8 tokens valid, pages of 2, table 5 1 3 0.
struct PagedLayer {
  std::vector<float> pool = std::vector<float>(6 * 2 * 4);
  std::vector<i32> table{5, 1, 3, 0};
  std::vector<float> before;

  PagedLayer() {
    for (std::size_t i = 0; i < pool.size(); ++i) pool[i] = static_cast<float>(i);
    before = pool;
  }
  [[nodiscard]] auto cache() {
    const auto keys = paged(pool.data(), {1, 8, 2}, {2, 4, 1}, 8, 2, table);
    const auto values = paged(pool.data() + 2, {1, 8, 2}, {2, 4, 1}, 8, 2, table);
    KVCache cache(keys, values);
    cache.set_length(6).set_next_position(60);
    return cache;
  }
};

}  // namespace

TEST_CASE("whole pages leave through the page table", "[apply][pages]") {
  PagedLayer layer;
  auto cache = layer.cache();
  PlanBuilder builder{{0, 1, 4, 5}};
  builder.page_tokens = 2;
  std::size_t kept = 0;
  SECTION("no row is written") {
    REQUIRE(apply_to_page_table(builder.plan(), cache, layer.table, kept));
    CHECK(layer.pool == layer.before);
  }
  SECTION("blends are") {
    builder.add_terms(2, {{2, 0.5f, 0.5f}});
    REQUIRE(apply_to_page_table(builder.plan(), cache, layer.table, kept));
    float row[2];
    load_row(cache.view().values, 0, 2, row);
    CHECK(row[0] == layer.before[26] + 0.5f * layer.before[10]);
  }
  CHECK(kept == 2);
  CHECK((layer.table == std::vector<i32>{5, 3, 1, 0}));  // 1 is free again; 0 was never in use
  CHECK(cache.length() == 4);
  CHECK(cache.view().next_position == 60);
  CHECK(pages_used(0, 4) == 0);
  CHECK(pages_used(4, 4) == 1);
  CHECK(pages_used(5, 4) == 2);
}

TEST_CASE("page tables: an error leaves table and cache as they were", "[apply][pages]") {
  PagedLayer layer;
  CacheView view = layer.cache().view();
  PlanBuilder builder{{0, 1, 4, 5}};
  builder.page_tokens = 2;
  std::size_t kept = 77;
  std::span<i32> table = layer.table;
  std::vector<i32> other = layer.table;
  StatusCode expected = StatusCode::ok;
  SECTION("plan") {
    builder.anchor[2] = 3;
    expected = StatusCode::invalid_plan;
  }
  SECTION("no pages in the plan") {
    builder.page_tokens = 0;
    expected = StatusCode::invalid_plan;
  }
  SECTION("another page size") {
    builder = PlanBuilder{{0, 1, 2, 3}};
    builder.page_tokens = 4;
    expected = StatusCode::invalid_plan;
  }
  SECTION("another table") {
    table = other;
    expected = StatusCode::invalid_page_table;
  }
  SECTION("another table for values") {
    view.values.page_table = other.data();
    expected = StatusCode::invalid_page_table;
  }
  SECTION("a short table") {
    table = table.first(2);
    expected = StatusCode::invalid_page_table;
  }
  SECTION("an index list") {
    static const u32 order[] = {0, 1, 2, 3, 4, 5, 6, 7};
    view.keys.order = order;
    expected = StatusCode::invalid_page_table;
  }
  SECTION("no table") {
    view.keys.page_table = view.values.page_table = nullptr;
    expected = StatusCode::invalid_page_table;
  }
  SECTION("read-only, with a blend") {
    view.values.writable = false;
    builder.add_terms(2, {{2, 0.5f, 0.5f}});
    expected = StatusCode::read_only;
  }
  SECTION("log mass") {
    builder.log_mass.assign(4, 0.5f);
    expected = StatusCode::needs_log_mass;
  }
  SECTION("read-only is fine without a blend") {
    view.keys.writable = view.values.writable = false;
  }
  CHECK(apply_to_page_table(builder.plan(), view, table, kept) == expected);
  if (expected != StatusCode::ok) {
    CHECK(layer.table == other);
    CHECK(layer.pool == layer.before);
    CHECK(view.uniform_length == 6);
    CHECK(kept == 77);
  }
}

TEST_CASE("heads that share a table must keep the same pages", "[apply][pages]") {
  std::vector<float> pool(8 * 2 * 2 * 2);
  std::vector<i32> table{0, 1, 2};
  u32 lengths[] = {3, 6};
  const auto tensor = paged(pool.data(), {2, 6, 2}, {4, 2, 1}, 8, 2, table);
  KVCache cache(tensor, tensor);
  cache.set_lengths(lengths);
  std::size_t kept = 0;
  const auto run = [&](std::vector<u32> first, std::vector<u32> second) {
    PlanBuilder builder{first, second};
    builder.page_tokens = 2;
    return apply_to_page_table(builder.plan(), cache, table, kept);
  };
  CHECK(run({0, 1}, {2, 3, 4, 5}) == StatusCode::invalid_plan);
  CHECK(run({0, 1}, {0, 1, 2, 3}) == StatusCode::invalid_plan);
  CHECK(run({0, 1, 2}, {0, 1, 4, 5}) == StatusCode::invalid_plan);
  CHECK(run({}, {0, 1, 4, 5}) == StatusCode::invalid_plan);
  CHECK(lengths[1] == 6);
  CHECK(run({2}, {2, 3, 4, 5}) == Status());
  CHECK((lengths[0] == 1 && lengths[1] == 4 && kept == 2));
  CHECK((table[0] == 1 && table[1] == 2 && table[2] == 0));
}

TEST_CASE("state follows a plan", "[apply][state]") {
  PlanBuilder builder{{1, 3}, {0}};
  builder.add_terms(0, {{0}, {2}});
  const float infinity = std::numeric_limits<float>::infinity();
  const std::vector<float> start{1, 2, 3, 4, -infinity, 6, 7, 8};
  const auto moved = [&](MoveRule rule) {
    std::vector<float> state = start;
    CHECK(apply_state(builder.plan(), Ragged<float>(state.data(), 4), rule));
    return state;
  };
  CHECK((moved(MoveRule::anchor)[0] == 2.0f && moved(MoveRule::anchor)[1] == 4.0f));
  CHECK(moved(MoveRule::sum)[0] == 6.0f);
  CHECK(moved(MoveRule::max)[0] == 3.0f);
  CHECK(moved(MoveRule::logaddexp)[0] ==
        Approx(std::log(std::exp(1.0) + std::exp(2.0) + std::exp(3.0))));
  CHECK(moved(MoveRule::logaddexp)[4] == -infinity);
  CHECK(detail::log_add_exp(-infinity, -infinity) == -infinity);
  CHECK(detail::log_add_exp(-infinity, 2.0f) == 2.0f);

  std::vector<float> state = start;
  CHECK(apply_state(builder.plan(), {}, MoveRule::sum) == StatusCode::null_pointer);
  CHECK(apply_state({}, Ragged<float>(state.data(), 4), MoveRule::sum) == StatusCode::invalid_plan);
  CHECK(apply_state(builder.plan(), Ragged<float>(state.data(), u64{0}), MoveRule::sum) ==
        StatusCode::invalid_option);
  CHECK(apply_state(builder.plan(), Ragged<float>(state.data(), 4), static_cast<MoveRule>(9)) ==
        StatusCode::invalid_option);
  CHECK(state == start);
}
