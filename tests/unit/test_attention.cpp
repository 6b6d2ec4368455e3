// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
// Attention over segments: the fast form against the double reference, masks, layouts, merging.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <random>
#include <vector>

#include "kvlean/attention/attend.hpp"
#include "kvlean/attention/attend_reference.hpp"
#include "kvlean/attention/merge_parts.hpp"
#include "kvlean/kvlean.hpp"
#include "tests/support/catch.hpp"

namespace {

using namespace kvlean;

constexpr float infinity = std::numeric_limits<float>::infinity();

std::vector<float> normal(std::size_t count, u32 seed, float deviation = 1.0f) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> draw_normal(0.0f, deviation);
  std::vector<float> values(count);
  for (float& value : values) value = draw_normal(generator);
  return values;
}

template <class T>
std::vector<T> stored_as(const std::vector<float>& values) {
  std::vector<T> stored;
  stored.reserve(values.size());
  for (const float value : values) stored.push_back(T(value));
  return stored;
}

/// Random keys, values and queries of one layer, contiguous.
struct Layer {
  u32 heads;
  u32 group;
  u32 tokens;
  u32 count;
  u32 key_width;
  u32 value_width;
  std::vector<float> k = normal(std::size_t{heads} * tokens * key_width, 1);
  std::vector<float> v = normal(std::size_t{heads} * tokens * value_width, 2);
  std::vector<float> q = normal(std::size_t{heads} * group * count * key_width, 3);

  [[nodiscard]] Extents key_extents() const { return {heads, tokens, key_width}; }
  [[nodiscard]] Extents value_extents() const { return {heads, tokens, value_width}; }
  [[nodiscard]] CacheView view() {
    return KVCache(strided(k.data(), key_extents()), strided(v.data(), value_extents())).view();
  }
  [[nodiscard]] Queries asked(Mask mask = Mask::causal) {
    return queries(strided(q.data(), Extents{std::size_t{heads} * group, count, key_width}), mask);
  }
};

struct Result {
  std::vector<float> values;
  std::vector<float> lse;
};

Result fast(const Queries& asked, const CacheView& cache, const AttentionSpec& spec = {},
            const Executor& executor = {}) {
  const AttentionShape shape = attention_shape(asked, cache);
  Result result{std::vector<float>(shape.rows() * shape.value_width, NAN),
                std::vector<float>(shape.rows(), NAN)};
  REQUIRE(attend(asked, cache, spec, AttentionOutput{result.values.data(), result.lse.data()},
                 executor));
  return result;
}

Result slow(const Queries& asked, const CacheView& cache, const AttentionSpec& spec = {}) {
  const AttentionShape shape = attention_shape(asked, cache);
  Result result{std::vector<float>(shape.rows() * shape.value_width, NAN),
                std::vector<float>(shape.rows(), NAN)};
  REQUIRE(attend_reference(asked, cache, spec,
                           AttentionOutput{result.values.data(), result.lse.data()}));
  return result;
}

/// Largest difference; infinite if one side has NaN or only one side an infinity.
double difference(const std::vector<float>& a, const std::vector<float>& b) {
  if (a.size() != b.size()) return static_cast<double>(infinity);
  double largest = 0.0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    if (a[i] == b[i]) continue;
    const double gap = std::abs(static_cast<double>(a[i]) - static_cast<double>(b[i]));
    largest = gap <= largest ? largest : (gap == gap ? gap : static_cast<double>(infinity));
  }
  return largest;
}

void require_agreement(const Queries& asked, const CacheView& cache, const AttentionSpec& spec = {},
                       double tolerance = 2e-5) {
  const Result a = fast(asked, cache, spec);
  const Result b = slow(asked, cache, spec);
  REQUIRE(difference(a.values, b.values) <= tolerance);
  REQUIRE(difference(a.lse, b.lse) <= tolerance);
}

}  // namespace

TEST_CASE("attention agrees with the double reference over odd shapes", "[attention]") {
  for (const u32 key_width : {1u, 3u, 7u, 64u, 80u, 128u, 576u}) {
    for (const u32 group : {1u, 3u, 4u, 7u}) {
      for (const u32 tokens : {1u, 2u, 33u, 67u}) {
        Layer layer{2, group, tokens, std::min(tokens, 5u), key_width, key_width};
        CAPTURE(key_width, group, tokens);
        require_agreement(layer.asked(), layer.view());
      }
    }
  }
}

TEST_CASE("attention takes keys and values of different widths", "[attention]") {
  const u32 widths[][2] = {{576, 512}, {192, 128}, {3, 80}, {64, 1}, {1, 2048}, {2048, 16}};
  for (const auto& width : widths) {
    Layer layer{2, 2, 41, 9, width[0], width[1]};
    CAPTURE(width[0], width[1]);
    require_agreement(layer.asked(), layer.view());
  }
}

TEST_CASE("attention over many queries and tiles", "[attention]") {
  Layer layer{2, 3, 150, 150, 20, 24};
  require_agreement(layer.asked(Mask::causal), layer.view());
  require_agreement(layer.asked(Mask::none), layer.view());
}

TEST_CASE("attention reads half precision storage", "[attention]") {
  Layer layer{2, 4, 50, 6, 80, 64};
  const auto check = [&](auto k, auto v) {
    const auto cache =
        KVCache(strided(k.data(), layer.key_extents()), strided(v.data(), layer.value_extents()));
    require_agreement(layer.asked(), cache.view());
  };
  check(stored_as<f16>(layer.k), stored_as<f16>(layer.v));
  check(stored_as<bf16>(layer.k), stored_as<bf16>(layer.v));
  check(stored_as<bf16>(layer.k), layer.v);
}

TEST_CASE("attention gives the same bits on every layout", "[attention]") {
  constexpr u32 heads = 3, tokens = 22, width = 12, page = 4, pages = 6;
  Layer layer{heads, 2, tokens, 5, width, width};
  const Result wanted = fast(layer.asked(), layer.view());
  const auto at = [](u32 h, u32 t, u32 d) { return (std::size_t{h} * tokens + t) * width + d; };
  const auto same = [&](const CacheView& cache) {
    const Result result = fast(layer.asked(), cache);
    REQUIRE(result.values == wanted.values);
    REQUIRE(result.lse == wanted.lse);
  };

  std::vector<float> k(heads * tokens * width);
  std::vector<float> v(heads * tokens * width);
  SECTION("tokens outermost, values transposed") {
    for (u32 h = 0; h < heads; ++h) {
      for (u32 t = 0; t < tokens; ++t) {
        for (u32 d = 0; d < width; ++d) {
          k[(t * heads + h) * width + d] = layer.k[at(h, t, d)];
          v[(h * width + d) * tokens + t] = layer.v[at(h, t, d)];
        }
      }
    }
    same(KVCache(strided(k.data(), layer.key_extents(), {width, heads * width, 1}),
                 strided(v.data(), layer.value_extents(), {width * tokens, 1, tokens}))
             .view());
  }
  SECTION("pages, and cells behind an index list") {
    const std::vector<i32> table = {4, 1, 5, 0, 2, 3};
    std::vector<float> pool(std::size_t{heads} * page * pages * width);
    std::vector<u32> order(tokens);
    for (u32 t = 0; t < tokens; ++t) order[t] = (t * 7 + 3) % tokens;
    for (u32 h = 0; h < heads; ++h) {
      for (u32 t = 0; t < tokens; ++t) {
        for (u32 d = 0; d < width; ++d) {
          const auto cell = static_cast<u32>(table[t / page]) * page + t % page;
          pool[(cell * heads + h) * width + d] = layer.k[at(h, t, d)];
          v[at(h, order[t], d)] = layer.v[at(h, t, d)];
        }
      }
    }
    auto cache = KVCache(paged(pool.data(), {heads, page * pages, width}, {width, heads * width, 1},
                               page * heads * width, page, table),
                         indexed(v.data(), layer.value_extents(), {}, order));
    cache.set_length(tokens);
    CacheView view = cache.view();
    view.keys.tokens = view.values.tokens = view.capacity = tokens;
    same(view);
  }
}

TEST_CASE("attention over ragged lengths, an empty segment and one token", "[attention]") {
  Layer layer{4, 2, 40, 3, 16, 16};
  u32 lengths[] = {40, 0, 1, 17};
  CacheView cache = layer.view();
  cache.lengths = lengths;
  require_agreement(layer.asked(), cache);
  const Result result = fast(layer.asked(), cache);
  for (u32 row = 2 * 3; row < 4 * 3; ++row) {
    REQUIRE(result.lse[row] == -infinity);
    for (u32 d = 0; d < 16; ++d) REQUIRE(result.values[row * 16 + d] == 0.0f);
  }
  // Two of the three newest queries come before the only token of segment 2; the last sees it
  // alone.
  REQUIRE(result.lse[4 * 3] == -infinity);
  REQUIRE(std::equal(layer.v.begin() + 2 * 40 * 16, layer.v.begin() + 2 * 40 * 16 + 16,
                     result.values.begin() + (4 * 3 + 2) * 16));
}

TEST_CASE("causal masks compare positions", "[attention]") {
  Layer layer{1, 1, 4, 3, 8, 4};
  CacheView cache = layer.view();
  i32 at[] = {0, 7, 8, 20};
  const i32 positions[] = {0, 19, 1000};
  cache.positions = Ragged<i32>(at, u64{4});
  cache.next_position = 21;
  Queries asked = layer.asked();
  const auto seen_from = [&](u32 query, u32 first, u32 count) {
    // The same query over just those tokens, without a mask.
    CacheView part = layer.view();
    part.keys.data = layer.k.data() + first * 8;
    part.values.data = layer.v.data() + first * 4;
    part.uniform_length = count;
    Queries alone = layer.asked(Mask::none);
    alone.first_row = query;
    alone.count = 1;
    const std::vector<float> wanted = slow(alone, part).values;
    const std::vector<float> all = fast(asked, cache).values;
    REQUIRE(difference({all.begin() + query * 4, all.begin() + query * 4 + 4}, wanted) < 1e-6);
  };
  SECTION("the newest queries by next_position") {  // 18, 19, 20
    seen_from(0, 0, 3);
    seen_from(1, 0, 3);
    seen_from(2, 0, 4);
  }
  SECTION("a first position") {  // 6, 7, 8
    asked.first_position = 6;
    seen_from(0, 0, 1);
    seen_from(1, 0, 2);
    seen_from(2, 0, 3);
  }
  SECTION("a position each") {
    asked.positions = positions;
    seen_from(0, 0, 1);
    seen_from(1, 0, 3);
    seen_from(2, 0, 4);
  }
  SECTION("without a mask") {
    asked.mask = Mask::none;
    for (u32 query = 0; query < 3; ++query) seen_from(query, 0, 4);
  }
  require_agreement(asked, cache);
}

TEST_CASE("default queries over a cache without positions are its newest tokens", "[attention]") {
  Layer layer{2, 1, 9, 4, 5, 5};
  CacheView cache = layer.view();
  u32 lengths[] = {9, 3};
  cache.lengths = lengths;
  cache.next_position = 500;  // the index is the position here, so this says nothing
  const Result result = fast(layer.asked(), cache);
  require_agreement(layer.asked(), cache);
  REQUIRE(result.lse[4] == -infinity);  // four queries over three tokens
  REQUIRE(std::equal(layer.v.begin() + 9 * 5, layer.v.begin() + 9 * 5 + 5,
                     result.values.begin() + 5 * 5));
}

TEST_CASE("a sliding window hides old tokens", "[attention]") {
  Layer layer{2, 2, 90, 70, 16, 8};
  for (const u32 window : {1u, 2u, 31u, 64u, 90u, 1000u}) {
    AttentionSpec spec;
    spec.sliding_window = window;
    CAPTURE(window);
    require_agreement(layer.asked(Mask::causal), layer.view(), spec);
    require_agreement(layer.asked(Mask::none), layer.view(), spec);
  }
  AttentionSpec own;
  own.sliding_window = 1;  // every query sees its own token only
  const Result result = fast(layer.asked(), layer.view(), own);
  REQUIRE(std::equal(layer.v.begin() + 20 * 8, layer.v.begin() + 90 * 8, result.values.begin()));
}

TEST_CASE("softcap, scale and sink logits", "[attention]") {
  Layer layer{2, 2, 60, 40, 24, 24};
  const float sinks[] = {0.5f, -3.0f, 8.0f, -infinity};
  AttentionSpec spec;
  spec.softcap = 1.5f;
  require_agreement(layer.asked(), layer.view(), spec);
  spec.scale = 2.0f;
  require_agreement(layer.asked(), layer.view(), spec);
  spec.sink_logits = sinks;
  require_agreement(layer.asked(), layer.view(), spec);
  spec.softcap = 0.0f;
  require_agreement(layer.asked(), layer.view(), spec);
}

TEST_CASE("a query that sees only its sink gets zeros and the sink's logit", "[attention]") {
  Layer layer{1, 2, 1, 1, 4, 3};
  const float sinks[] = {0.25f, -infinity};
  AttentionSpec spec;
  spec.sink_logits = sinks;
  CacheView cache = layer.view();
  cache.uniform_length = 0;
  const Result result = fast(layer.asked(), cache, spec);
  REQUIRE(result.values == std::vector<float>(6, 0.0f));
  REQUIRE(result.lse == std::vector<float>{0.25f, -infinity});
  require_agreement(layer.asked(), cache, spec);
}

TEST_CASE("log mass is added after softcap", "[attention]") {
  Layer layer{2, 3, 70, 4, 16, 16};
  std::vector<float> mass = normal(2 * 70, 9);
  mass[3] = mass[75] = -infinity;
  CacheView cache = layer.view();
  cache.log_mass = Ragged<float>(mass.data(), u64{70});
  AttentionSpec spec;
  require_agreement(layer.asked(), cache, spec);
  spec.softcap = 2.0f;
  require_agreement(layer.asked(), cache, spec);
  std::fill(mass.begin(), mass.end(), -infinity);  // nothing left to see
  require_agreement(layer.asked(), cache, spec);
  REQUIRE(fast(layer.asked(), cache, spec).lse == std::vector<float>(6 * 4, -infinity));
  REQUIRE(fast(layer.asked(), cache, spec).values == std::vector<float>(6 * 4 * 16, 0.0f));
}

TEST_CASE("three equal keys merged with log 3 are exact, other weights are not", "[attention]") {
  // The worked example of the derivation: q = (1, .5), keys 3 x (1, 0) and (0, 1).
  const float q[] = {1.0f, 0.5f};
  const float keys[] = {1, 0, 1, 0, 1, 0, 0, 1};
  const float values[] = {1, 0, 2, 0, 3, 0, 0, 4};
  const float merged_keys[] = {1, 0, 0, 1};
  float merged_values[] = {2, 0, 0, 4};
  float mass[] = {std::log(3.0f), 0.0f};
  const Queries asked = queries(strided(q, Extents{1, 1, 2}));
  const auto output = [&](CacheView cache) {
    const Result result = fast(asked, cache);
    return result.values;
  };
  const CacheView full =
      KVCache(strided(keys, Extents{1, 4, 2}), strided(values, Extents{1, 4, 2})).view();
  CacheView merged =
      KVCache(strided(merged_keys, Extents{1, 2, 2}), strided(merged_values, Extents{1, 2, 2}))
          .view();
  REQUIRE_THAT(output(full)[0], WithinAbs(1.620663, 1e-6));
  REQUIRE_THAT(output(full)[1], WithinAbs(0.758674, 1e-6));
  REQUIRE_THAT(output(merged)[0], WithinAbs(1.174958, 1e-6));
  REQUIRE_THAT(output(merged)[1], WithinAbs(1.650084, 1e-6));
  merged_values[0] = 6.0f;  // the paper's |S| factor
  REQUIRE_THAT(output(merged)[0], WithinAbs(3.524874, 1e-6));
  merged_values[0] = 2.0f;
  merged.log_mass = Ragged<float>(mass, u64{2});
  REQUIRE_THAT(output(merged)[0], WithinAbs(1.620663, 1e-6));
  REQUIRE_THAT(output(merged)[1], WithinAbs(0.758674, 1e-6));
}

TEST_CASE("large logits do not overflow", "[attention]") {
  for (const float size : {1e4f, -1e4f}) {
    Layer layer{1, 1, 80, 1, 4, 4};
    layer.q = {size, 0.0f, 0.0f, 0.0f};
    for (u32 t = 0; t < 80; ++t) layer.k[t * 4] = t == 50 ? 1.0f : -1.0f;
    AttentionSpec spec;
    spec.scale = 1.0f;
    const Result result = fast(layer.asked(), layer.view(), spec);
    REQUIRE(std::abs(result.lse[0] - (1e4f + (size < 0 ? std::log(79.0f) : 0.0f))) <= 1e-3f);
    require_agreement(layer.asked(), layer.view(), spec, 1e-3);
    if (size > 0) REQUIRE(std::equal(result.values.begin(), result.values.end(), &layer.v[200]));
  }
}

TEST_CASE("NaN in a visible key or value shows, in an invisible one does not", "[attention]") {
  Layer layer{1, 1, 5, 1, 4, 4};
  layer.k[1] = NAN;
  REQUIRE(std::isnan(fast(layer.asked(), layer.view()).values[0]));
  REQUIRE(std::isnan(fast(layer.asked(), layer.view()).lse[0]));
  AttentionSpec spec;
  spec.sliding_window = 4;
  require_agreement(layer.asked(), layer.view(), spec);
}

TEST_CASE("attention output can be strided, without LSE, or LSE alone", "[attention]") {
  Layer layer{2, 2, 30, 3, 8, 6};
  const Result wanted = fast(layer.asked(), layer.view());
  std::vector<float> values(3 * 4 * 6, NAN);  // [query][head][dim]
  REQUIRE(attend(layer.asked(), layer.view(), AttentionOutput{values.data(), nullptr, 6, 24}));
  for (u32 h = 0; h < 4; ++h) {
    for (u32 i = 0; i < 3; ++i) {
      REQUIRE(std::equal(&values[(i * 4 + h) * 6], &values[(i * 4 + h) * 6] + 6,
                         &wanted.values[(h * 3 + i) * 6]));
    }
  }
  std::vector<float> lse(12, NAN);
  REQUIRE(attend(layer.asked(), layer.view(), AttentionOutput{nullptr, lse.data()}));
  REQUIRE(lse == wanted.lse);
  std::vector<double> exact(12);
  REQUIRE(attend_reference(layer.asked(), layer.view(), AttentionSpec{},
                           BasicAttentionOutput<double>{nullptr, exact.data()}));
  for (u32 i = 0; i < 12; ++i) REQUIRE_THAT(static_cast<double>(lse[i]), WithinAbs(exact[i], 1e-5));
}

TEST_CASE("attention gives the same bits for any executor", "[attention]") {
  Layer layer{3, 4, 200, 50, 32, 32};
  u32 lengths[] = {200, 50, 117};
  CacheView cache = layer.view();
  cache.lengths = lengths;
  const Result wanted = fast(layer.asked(), cache);
  for (const u32 workers : {2u, 3u, 8u}) {
    Executor backwards;  // runs the tasks in reverse, spread over the workers
    u32 count = workers;
    backwards.self = &count;
    backwards.workers = workers;
    backwards.run = [](void* self, u32 tasks, void (*task)(void*, u32, u32) noexcept,
                       void* arg) noexcept {
      for (u32 i = tasks; i-- > 0;) task(arg, i % *static_cast<u32*>(self), i);
    };
    const Result result = fast(layer.asked(), cache, {}, backwards);
    REQUIRE(result.values == wanted.values);
    REQUIRE(result.lse == wanted.lse);
  }
}

TEST_CASE("attention refuses what does not fit and writes nothing", "[attention]") {
  Layer layer{2, 2, 10, 2, 8, 8};
  CacheView cache = layer.view();
  Queries asked = layer.asked();
  AttentionSpec spec;
  std::vector<float> values(4 * 2 * 8, 7.0f);
  AttentionOutput output{values.data()};
  const auto expect = [&](StatusCode code) {
    REQUIRE(attend(asked, cache, spec, output) == code);
    REQUIRE(attend_reference(asked, cache, spec, output) == code);
    REQUIRE(values == std::vector<float>(64, 7.0f));
  };
  SECTION("no output") {
    output.values = nullptr;
    expect(StatusCode::null_pointer);
  }
  SECTION("no keys") {
    cache.keys.data = nullptr;
    expect(StatusCode::null_pointer);
  }
  SECTION("no segments") {
    cache.segments = 0;
    expect(StatusCode::invalid_shape);
  }
  SECTION("heads disagree") {
    cache.values.heads = 3;
    expect(StatusCode::shape_mismatch);
  }
  SECTION("widths disagree") {
    asked.rows.width = 7;
    expect(StatusCode::shape_mismatch);
  }
  SECTION("too wide") {
    cache.values.width = max_row_width + 1;
    expect(StatusCode::row_too_wide);
  }
  SECTION("too long") {
    cache.uniform_length = 11;
    expect(StatusCode::invalid_length);
  }
  SECTION("a bad page") {
    const i32 table[] = {0, -1};
    cache.keys.page_table = table;
    cache.keys.page_tokens = 5;
    cache.keys.page_table_length = 2;
    expect(StatusCode::invalid_page_table);
  }
  SECTION("frozen past the end") {
    cache.frozen = 11;
    expect(StatusCode::invalid_frozen);
  }
  SECTION("heads are no multiple") {
    asked.rows.heads = 3;
    expect(StatusCode::invalid_group);
  }
  SECTION("no queries") {
    asked.count = 0;
    expect(StatusCode::missing_observation);
  }
  SECTION("options") {
    spec.softcap = -1.0f;
    expect(StatusCode::invalid_option);
    spec.softcap = NAN;
    expect(StatusCode::invalid_option);
    spec.softcap = 0.0f;
    spec.scale = infinity;
    expect(StatusCode::invalid_option);
  }
}

TEST_CASE("parts merge into attention over the whole at every split", "[attention]") {
  Layer layer{1, 3, 21, 2, 6, 5};
  const Queries asked = layer.asked(Mask::none);
  const AttentionShape shape = attention_shape(asked, layer.view());
  const Result wanted = fast(asked, layer.view());
  for (u32 split = 0; split <= 21; ++split) {
    CacheView front = layer.view();
    front.uniform_length = split;
    CacheView back = layer.view();
    back.keys.data = layer.k.data() + split * 6;
    back.values.data = layer.v.data() + split * 5;
    back.uniform_length = 21 - split;
    Result a = fast(asked, front);
    const Result b = fast(asked, back);
    REQUIRE(merge_parts({a.values.data(), a.lse.data()}, {b.values.data(), b.lse.data()}, shape));
    CAPTURE(split);
    REQUIRE(difference(a.values, wanted.values) < 2e-6);
    REQUIRE(difference(a.lse, wanted.lse) < 2e-6);
  }
}

TEST_CASE("parts that saw nothing merge without arithmetic", "[attention]") {
  const AttentionShape shape{1, 3, 2};
  float values[] = {1, 2, NAN, NAN, NAN, NAN};
  float lse[] = {0.3f, -infinity, -infinity};
  const float other[] = {NAN, NAN, 3, 4, NAN, NAN};
  const float other_lse[] = {-infinity, 1e4f, -infinity};
  REQUIRE(merge_parts({values, lse}, {other, other_lse}, shape));
  REQUIRE(std::vector<float>(values, values + 6) == std::vector<float>{1, 2, 3, 4, 0, 0});
  REQUIRE(std::vector<float>(lse, lse + 3) == std::vector<float>{0.3f, 1e4f, -infinity});
}

TEST_CASE("merging works across strides and far-apart LSEs", "[attention]") {
  const AttentionShape shape{2, 1, 1};
  float values[] = {1, 9, 9, 5};
  float lse[] = {1e4f, 0.0f};
  const float other[] = {3, 7};
  const float other_lse[] = {1e4f, -1e4f};
  REQUIRE(merge_parts({values, lse, 3, 1}, {other, other_lse}, shape));
  REQUIRE(values[0] == 2.0f);
  REQUIRE(values[3] == 5.0f);
  REQUIRE(lse[0] == static_cast<float>(1e4 + std::log(2.0)));
  REQUIRE(lse[1] == 0.0f);
}

TEST_CASE("merging refuses null pointers and empty shapes", "[attention]") {
  float values[2] = {};
  float lse[2] = {};
  const AttentionShape shape{1, 2, 1};
  const AttentionOutput into{values, lse};
  REQUIRE(merge_parts({nullptr, lse}, into, shape) == StatusCode::null_pointer);
  REQUIRE(merge_parts({values, nullptr}, into, shape) == StatusCode::null_pointer);
  REQUIRE(merge_parts(into, {nullptr, lse}, shape) == StatusCode::null_pointer);
  REQUIRE(merge_parts(into, {values, nullptr}, shape) == StatusCode::null_pointer);
  REQUIRE(merge_parts(into, into, {0, 2, 1}) == StatusCode::invalid_shape);
  REQUIRE(merge_parts(into, into, {1, 0, 1}) == StatusCode::invalid_shape);
  REQUIRE(merge_parts(into, into, {1, 2, 0}) == StatusCode::invalid_shape);
}
