// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#include <cstring>
#include <random>
#include <vector>

#include "kvlean/decode/snapshot.hpp"
#include "tests/support/catch.hpp"

using namespace kvlean;

namespace {

using Bytes = std::vector<std::byte>;

RaggedShape small_shape(RaggedLayout layout = RaggedLayout::flat, DType dtype = DType::f16) {
  RaggedShape shape = RaggedShape::flat(4, 3, dtype, 40);
  shape.layout = layout;
  shape.capacity_per_head = 9;
  shape.value_dim = 2;
  shape.value_dtype = DType::f32;
  shape.layer_heads = 2;
  shape.state_arrays = 2;
  shape.log_mass = true;
  return shape;
}

// Fills heads of 3, 0, 9 and 5 tokens with numbers, gaps between the heads.
void fill(RaggedKVCache& cache, u32 seed = 1) {
  std::mt19937 random(seed);
  const u32 lengths[] = {3, 0, 9, 5};
  REQUIRE(cache.set_lengths(lengths));
  cache.respace();
  const CacheView view = cache.view();
  const auto number = [&] { return static_cast<float>(random() % 1000) / 8.0f; };
  for (u32 h = 0; h < 4; ++h) {
    for (u32 t = 0; t < lengths[h]; ++t) {
      const float row[] = {number(), -number(), number()};
      store_row(view.keys, h, t, row);
      store_row(view.values, h, t, row);
      if (view.positions) view.positions(h, t) = static_cast<i32>(3 * t + h);
      if (view.log_mass) view.log_mass(h, t) = number();
      for (u32 i = 0; i < cache.shape().state_arrays; ++i) cache.state(i)(h, t) = number();
    }
  }
  cache.set_next_position(77);
  cache.set_frozen(2);
  cache.set_origin({5, 6, 7});
  cache.set_rope_pairing(RopePairing::norm);
}

RaggedKVCache make(const RaggedShape& shape, u32 seed = 1) {
  RaggedKVCache cache;
  REQUIRE(cache.allocate(shape));
  fill(cache, seed);
  return cache;
}

void check_equal(const RaggedKVCache& a, const RaggedKVCache& b) {
  const CacheView x = a.view();
  const CacheView y = b.view();
  REQUIRE(x.segments == y.segments);
  REQUIRE(x.next_position == y.next_position);
  REQUIRE(x.frozen == y.frozen);
  REQUIRE(x.rope_pairing == y.rope_pairing);
  REQUIRE((x.origin.sequence == y.origin.sequence && x.origin.layer == y.origin.layer &&
           x.origin.head == y.origin.head));
  for (u32 h = 0; h < x.segments; ++h) {
    REQUIRE(x.length(h) == y.length(h));
    for (u32 t = 0; t < x.length(h); ++t) {
      REQUIRE(std::memcmp(row_address(x.keys, h, t), row_address(y.keys, h, t),
                          x.keys.width * size_bytes(x.keys.dtype)) == 0);
      REQUIRE(std::memcmp(row_address(x.values, h, t), row_address(y.values, h, t),
                          x.values.width * size_bytes(x.values.dtype)) == 0);
      REQUIRE(x.position(h, t) == y.position(h, t));
      REQUIRE(x.mass_bias(h, t) == y.mass_bias(h, t));
      for (u32 i = 0; i < a.shape().state_arrays; ++i) {
        REQUIRE(a.state(i)(h, t) == b.state(i)(h, t));
      }
    }
  }
}

Bytes saved(const RaggedKVCache& cache, std::span<const std::byte> blob = {}) {
  Bytes bytes(snapshot_bytes(cache, blob.size()));
  std::size_t written = 0;
  REQUIRE(save(cache, bytes, written, blob));
  REQUIRE(written == bytes.size());
  return bytes;
}

Bytes blob_of(std::size_t size) {
  Bytes blob(size);
  for (std::size_t i = 0; i < size; ++i) blob[i] = static_cast<std::byte>(i * 7 + 1);
  return blob;
}

Bytes contents(const RaggedKVCache& cache) {
  return {cache.storage().begin(), cache.storage().end()};
}

}  // namespace

TEST_CASE("a cache of any kind comes back from its bytes", "[snapshot]") {
  for (const RaggedLayout layout : {RaggedLayout::flat, RaggedLayout::fixed}) {
    for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
      for (u32 variant = 0; variant < 8; ++variant) {
        RaggedShape shape = small_shape(layout, dtype);
        shape.positions = (variant & 1) != 0;
        shape.log_mass = (variant & 2) != 0;
        if ((variant & 4) != 0) shape.state_arrays = 0;
        const RaggedKVCache cache = make(shape, variant);
        const Bytes blob = blob_of(variant * 5);
        const Bytes bytes = saved(cache, blob);
        // Only kept slots are in it.
        CHECK(bytes.size() < 400 + blob.size() + 17 * RaggedKVCache::slot_bytes(shape));

        RaggedKVCache back;
        std::span<const std::byte> found;
        REQUIRE(restore(bytes, back, found));
        check_equal(cache, back);
        CHECK(back.shape().total_slots == shape.total_slots);
        CHECK(back.shape().layout == layout);
        CHECK(back.num_layers() == 2);
        CHECK(Bytes(found.begin(), found.end()) == blob);
        // The gaps are not part of it: saved again, the bytes are the same.
        CHECK(saved(back, blob) == bytes);

        // Unaligned, and into memory of the caller's in the other layout.
        Bytes shifted(bytes.size() + 3);
        std::copy(bytes.begin(), bytes.end(), shifted.begin() + 3);
        RaggedShape other = shape;
        other.layout = layout == RaggedLayout::flat ? RaggedLayout::fixed : RaggedLayout::flat;
        other.total_slots = 17;
        Bytes memory(RaggedKVCache::bytes_required(other));
        RaggedKVCache bound;
        REQUIRE(bound.bind(memory, other));
        REQUIRE(restore(std::span(shifted).subspan(3), bound));
        check_equal(cache, bound);
      }
    }
  }
}

TEST_CASE("an empty cache and a lone blob are snapshots too", "[snapshot]") {
  RaggedKVCache cache;
  REQUIRE(cache.allocate(RaggedShape::flat(1, 1, DType::bf16, 0)));
  const Bytes blob = blob_of(100);
  const Bytes bytes = saved(cache, blob);
  RaggedKVCache back;
  REQUIRE(restore(bytes, back));
  CHECK(back.num_kv_heads() == 1);
  CHECK(back.total_length() == 0);
  std::span<const std::byte> found;
  REQUIRE(snapshot_blob(bytes, found));
  CHECK(Bytes(found.begin(), found.end()) == blob);
  RaggedShape shape;
  REQUIRE(snapshot_shape(bytes, shape));
  CHECK((shape.kv_heads == 1 && shape.key_dtype == DType::bf16 && shape.positions));
}

TEST_CASE("every flipped byte and every other length is refused", "[snapshot]") {
  const RaggedKVCache cache = make(small_shape());
  const Bytes blob = blob_of(11);
  const Bytes good = saved(cache, blob);
  RaggedKVCache target = make(small_shape(), 2);
  RaggedKVCache unbound;
  const Bytes before = contents(target);
  std::span<const std::byte> found = good;
  const auto refused = [&](std::span<const std::byte> bytes) {
    REQUIRE(restore(bytes, target, found) == StatusCode::bad_snapshot);
    REQUIRE(restore(bytes, unbound) == StatusCode::bad_snapshot);
    REQUIRE(unbound.num_kv_heads() == 0);
    REQUIRE(found.data() == good.data());
  };
  for (std::size_t i = 0; i < good.size(); ++i) {
    for (const int flip : {0x01, 0x80, 0xff}) {
      Bytes bad = good;
      bad[i] ^= static_cast<std::byte>(flip);
      refused(bad);
    }
  }
  for (std::size_t size = 0; size < good.size(); ++size) {
    const Bytes cut(good.begin(), good.begin() + static_cast<std::ptrdiff_t>(size));
    if (size != 0) refused(cut);
  }
  Bytes longer = good;
  longer.push_back(std::byte{0});
  refused(longer);
  CHECK(contents(target) == before);
  CHECK(restore({}, target) == StatusCode::null_pointer);
  REQUIRE(restore(good, target, found));
  check_equal(cache, target);
}

TEST_CASE("forged snapshots with a right checksum do no harm", "[snapshot]") {
  const RaggedKVCache cache = make(small_shape());
  const Bytes good = saved(cache, blob_of(3));
  std::mt19937 random(3);
  u32 taken = 0;
  for (int round = 0; round < 4000; ++round) {
    Bytes bad = good;
    // The header and the lengths are where a wrong number could lead outside.
    for (u32 i = 0; i <= random() % 3; ++i) {
      bad[8 + random() % 120] = static_cast<std::byte>(random() % 4 == 0 ? 0xff : random());
    }
    const u64 sum = detail::snapshot::checksum(std::span(bad).first(bad.size() - 8));
    detail::snapshot::Writer(bad.data() + bad.size() - 8).put(sum);
    RaggedShape shape;
    const Status status = snapshot_shape(bad, shape);
    CHECK((status || status == StatusCode::bad_snapshot));
    // A shape may be right and too large: that is out_of_memory, or an abort under a sanitizer.
    if (!status || RaggedKVCache::bytes_required(shape) < (1u << 24)) {
      RaggedKVCache back;
      REQUIRE(restore(bad, back) == status);
      CHECK(back.total_length() <= 17);
      if (status) ++taken;
    }
    RaggedKVCache target = make(small_shape(), 2);
    if (restore(bad, target)) CHECK(target.total_length() <= 17);
  }
  CHECK(taken > 0);  // numbers like the next position may be anything
}

TEST_CASE("saving checks its room first", "[snapshot]") {
  const RaggedKVCache cache = make(small_shape());
  Bytes bytes(snapshot_bytes(cache, 4), std::byte{0x33});
  const Bytes untouched = bytes;
  const Bytes blob = blob_of(5);
  std::size_t written = 9;
  CHECK(save(cache, bytes, written, blob) == StatusCode::destination_too_small);
  CHECK(written == 0);
  CHECK(bytes == untouched);
  CHECK(save(cache, {}, written) == StatusCode::null_pointer);
  CHECK(save(RaggedKVCache(), bytes, written) == StatusCode::invalid_shape);
  CHECK(snapshot_bytes(RaggedKVCache()) == 0);
  CHECK(save(cache, bytes, written, std::span<const std::byte>(bytes).last(4)) ==
        StatusCode::destination_overlaps);
  RaggedShape large = small_shape();
  large.total_slots = 400;
  Bytes memory(RaggedKVCache::bytes_required(large));
  RaggedKVCache bound;
  REQUIRE(bound.bind(memory, large));
  CHECK(save(bound, memory, written) == StatusCode::destination_overlaps);
  // More room than needed is fine; the rest stays.
  Bytes roomy(bytes.size() + 10, std::byte{0x33});
  REQUIRE(save(cache, roomy, written, std::span(blob).first(4)));
  CHECK(written == bytes.size());
  CHECK(std::count(roomy.end() - 10, roomy.end(), std::byte{0x33}) == 10);
}

TEST_CASE("a snapshot goes only where its slots fit", "[snapshot]") {
  const RaggedKVCache cache = make(small_shape());
  const Bytes bytes = saved(cache);
  const auto refused = [&](const RaggedShape& shape, StatusCode code) {
    RaggedKVCache target;
    REQUIRE(target.allocate(shape));
    target.set_next_position(3);
    const Bytes before = contents(target);
    CHECK(restore(bytes, target) == code);
    CHECK(contents(target) == before);
    CHECK(target.next_position() == 3);
  };
  RaggedShape shape = small_shape();
  shape.total_slots = 16;
  refused(shape, StatusCode::destination_too_small);
  shape = small_shape(RaggedLayout::fixed);
  shape.capacity_per_head = 8;
  refused(shape, StatusCode::destination_too_small);
  for (const auto& change : std::vector<void (*)(RaggedShape&)>{
           [](RaggedShape& s) { s.kv_heads = 6; }, [](RaggedShape& s) { s.layer_heads = 4; },
           [](RaggedShape& s) { s.key_dim = 4; }, [](RaggedShape& s) { s.value_dim = 3; },
           [](RaggedShape& s) { s.key_dtype = DType::bf16; },
           [](RaggedShape& s) { s.value_dtype = DType::f16; },
           [](RaggedShape& s) { s.log_mass = false; }, [](RaggedShape& s) { s.positions = false; },
           [](RaggedShape& s) { s.state_arrays = 1; }}) {
    shape = small_shape();
    change(shape);
    refused(shape, StatusCode::shape_mismatch);
  }
  // A snapshot inside the memory that it would be restored to.
  RaggedShape large = small_shape();
  large.total_slots = 400;
  Bytes memory(RaggedKVCache::bytes_required(large));
  RaggedKVCache target;
  REQUIRE(target.bind(memory, large));
  std::byte* place = memory.data() + memory.size() / 2;
  std::memcpy(place, bytes.data(), bytes.size());
  CHECK(restore({place, bytes.size()}, target) == StatusCode::destination_overlaps);
}

TEST_CASE("the rotation is saved by value", "[snapshot]") {
  RaggedShape shape = small_shape();
  shape.key_dim = 8;
  RaggedKVCache cache;
  REQUIRE(cache.allocate(shape));
  const std::vector<float> factors = {1.0f, 2.0f, 3.5f};
  RopeSpec spec;
  spec.pairing = RopePairing::norm;
  spec.scaling = RopeScaling::linear;
  spec.theta = 5e5;
  spec.factor = 8.0;
  spec.rotary_dims = 6;
  spec.first_dim = 1;
  spec.attention_factor = 1.25;
  spec.frequency_factors = factors.data();
  cache.set_rope(&spec);
  const Bytes bytes = saved(cache);

  RaggedKVCache back;
  REQUIRE(restore(bytes, back));
  CHECK(back.rope() == nullptr);
  CHECK(back.rope_pairing() == RopePairing::norm);
  RopeSpec found;
  CHECK(snapshot_rope(bytes, found) == StatusCode::destination_too_small);
  CHECK(found.rotary_dims == 0);
  float room[4] = {0, 0, 0, -1};
  REQUIRE(snapshot_rope(bytes, found, room));
  CHECK(found.frequency_factors == room);
  CHECK((room[0] == 1.0f && room[1] == 2.0f && room[2] == 3.5f && room[3] == -1.0f));
  CHECK((found.scaling == RopeScaling::linear && found.theta == 5e5 && found.factor == 8.0 &&
         found.rotary_dims == 6 && found.first_dim == 1 && found.attention_factor == 1.25));

  // The same rotation, said otherwise: 1 / 8 of the frequencies by their factors.
  const std::vector<float> stretched = {8.0f, 16.0f, 28.0f};
  RopeSpec same = spec;
  same.scaling = RopeScaling::none;
  same.frequency_factors = stretched.data();
  back.set_rope(&same);
  REQUIRE(restore(bytes, back));
  CHECK(back.rope() == &same);
  const Bytes before = contents(back);
  for (const auto& change : std::vector<void (*)(RopeSpec&)>{
           [](RopeSpec& s) { s.theta = 1e4; }, [](RopeSpec& s) { s.factor = 4.0; },
           [](RopeSpec& s) { s.pairing = RopePairing::neox; },
           [](RopeSpec& s) { s.pairing = RopePairing::none; }, [](RopeSpec& s) { s.first_dim = 0; },
           [](RopeSpec& s) { s.rotary_dims = 4; }, [](RopeSpec& s) { s.attention_factor = 1.0; },
           [](RopeSpec& s) { s.frequency_factors = nullptr; }}) {
    RopeSpec other = spec;
    change(other);
    back.set_rope(&other);
    CHECK(restore(bytes, back) == StatusCode::invalid_rope);
    CHECK(contents(back) == before);
    CHECK(back.rope() == &other);
    RaggedKVCache unbound;
    unbound.set_rope(&other);
    CHECK(restore(bytes, unbound) == StatusCode::invalid_rope);
  }
  RaggedKVCache unbound;
  unbound.set_rope(&spec);
  REQUIRE(restore(bytes, unbound));
  CHECK(unbound.rope() == &spec);

  // Without one the pairing alone is told.
  cache.set_rope(nullptr);
  const Bytes plain = saved(cache);
  CHECK(snapshot_rope(plain, found, room) == StatusCode::needs_rope);
  back.set_rope(&spec);
  REQUIRE(restore(plain, back));
  CHECK(back.rope() == &spec);
  cache.set_rope_pairing(RopePairing::neox);
  CHECK(restore(saved(cache), back) == StatusCode::invalid_rope);
  // A spec that cannot be is refused when saving.
  RopeSpec bad = spec;
  bad.rotary_dims = 7;
  cache.set_rope(&bad);
  Bytes out(10000);
  std::size_t written = 1;
  CHECK(save(cache, out, written) == StatusCode::invalid_rope);
  CHECK(written == 0);
  CHECK(snapshot_bytes(cache) == 0);
}

TEST_CASE("the format is the one written down", "[snapshot]") {
  RaggedShape shape = RaggedShape::fixed(1, 1, DType::f16, 4);
  RaggedKVCache cache;
  REQUIRE(cache.allocate(shape));
  const float numbers[] = {1.0f, 2.0f};
  const Rows keys = strided(numbers, Extents{1, 2, 1}).rows();
  REQUIRE(cache.append(keys, keys, 2, 258));
  const Bytes bytes = saved(cache, blob_of(1));
  const auto at = [&](std::size_t i) { return static_cast<int>(bytes[i]); };
  REQUIRE(bytes.size() == 24 + 8 + 28 + 16 + 24 + 8 + 4 + 8 + 4 + 4 + 1 + 8);
  CHECK(std::memcmp(bytes.data(), "KVLsnap\n", 8) == 0);
  CHECK((at(8) == 1 && at(12) == 1 && at(16) == 137 && at(24) == 1));
  CHECK((at(40) == 1 && at(44) == 1 && at(48) == 1));     // f16, f16, fixed
  CHECK((at(68) == 4 && at(76) == 4 && at(77) == 1));     // next position 260
  CHECK((at(100) == 1 && at(108) == 2));                  // blob bytes, length
  CHECK((at(112) == 2 && at(113) == 1 && at(116) == 3));  // positions 258, 259
  CHECK((at(120) == 0 && at(121) == 0x3c && at(122) == 0 && at(123) == 0x40));  // 1.0, 2.0
  CHECK(at(128) == 1);                                                          // the blob
}
