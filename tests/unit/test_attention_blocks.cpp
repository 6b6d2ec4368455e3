// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
// Long segments: blocks of tokens on their own, merged in a fixed order, shared by workers.
#include <algorithm>
#include <cmath>
#include <kvlean/attention/attend.hpp>
#include <kvlean/attention/attend_reference.hpp>
#include <kvlean/core/thread_pool.hpp>
#include <limits>
#include <random>
#include <vector>

#include "tests/support/catch.hpp"

namespace {

using namespace kvlean;

constexpr float infinity = std::numeric_limits<float>::infinity();

std::vector<float> normal(std::size_t count, u32 seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> draw;
  std::vector<float> values(count);
  for (float& value : values) value = draw(generator);
  return values;
}

template <class T>
std::vector<T> stored_as(const std::vector<float>& values) {
  std::vector<T> stored;
  stored.reserve(values.size());
  for (const float value : values) stored.push_back(T(value));
  return stored;
}

/// Keys grow towards the end of a segment, so that later blocks have larger maxima.
struct Layer {
  u32 group;
  u32 count;
  u32 width;
  std::vector<u32> lengths;
  u32 heads = static_cast<u32>(lengths.size());
  u32 tokens = *std::max_element(lengths.begin(), lengths.end());
  std::vector<float> k = normal(std::size_t{heads} * tokens * width, 1);
  std::vector<float> v = normal(std::size_t{heads} * tokens * width, 2);
  std::vector<float> q = normal(std::size_t{heads} * group * count * width, 3);

  [[nodiscard]] Extents extents() const { return {heads, tokens, width}; }
  template <class T>
  [[nodiscard]] CacheView over(std::vector<T>& keys, std::vector<T>& values) {
    CacheView cache =
        KVCache(strided(keys.data(), extents()), strided(values.data(), extents())).view();
    cache.lengths = lengths.data();
    return cache;
  }
  [[nodiscard]] CacheView view() { return over(k, v); }
  [[nodiscard]] Queries asked(Mask mask = Mask::causal) const {
    return queries(strided(q.data(), Extents{std::size_t{heads} * group, count, width}), mask);
  }
};

struct Result {
  std::vector<float> values;
  std::vector<float> lse;
  bool operator==(const Result&) const = default;
};

Result room(const Queries& asked, const CacheView& cache) {
  const AttentionShape shape = attention_shape(asked, cache);
  return {std::vector<float>(shape.rows() * shape.value_width, 7.0f),
          std::vector<float>(shape.rows(), 7.0f)};
}
AttentionOutput into(Result& result) { return {result.values.data(), result.lse.data()}; }

Result serial(const Queries& asked, const CacheView& cache, const AttentionSpec& spec = {}) {
  Result result = room(asked, cache);
  REQUIRE(attend(asked, cache, spec, into(result)));
  return result;
}

/// Largest difference; infinite where one side alone is NaN or infinite.
double difference(const std::vector<float>& a, const std::vector<float>& b) {
  double largest = 0.0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    if (a[i] == b[i] || (std::isnan(a[i]) && std::isnan(b[i]))) continue;
    const double gap = std::abs(static_cast<double>(a[i]) - static_cast<double>(b[i]));
    largest = gap <= largest ? largest : (gap == gap ? gap : static_cast<double>(infinity));
  }
  return largest;
}

/// Runs the tasks backwards, spread over `workers` that are one thread.
struct Backwards {
  u32 workers;
  u32 tasks = 0;  ///< of all calls so far
  [[nodiscard]] Executor executor() {
    return {this, workers,
            [](void* self, u32 count, void (*task)(void*, u32, u32) noexcept, void* arg) noexcept {
              Backwards& all = *static_cast<Backwards*>(self);
              all.tasks += count;
              for (u32 i = count; i-- > 0;) task(arg, i % all.workers, i);
            }};
  }
};

/// Against the reference, and the same bits for every executor, with a workspace and without.
void require_right(const Queries& asked, const CacheView& cache, const AttentionSpec& spec = {},
                   double tolerance = 3e-5) {
  const Result wanted = serial(asked, cache, spec);
  Result exact = room(asked, cache);
  REQUIRE(attend_reference(asked, cache, spec, into(exact)));
  REQUIRE(difference(wanted.values, exact.values) <= tolerance);
  REQUIRE(difference(wanted.lse, exact.lse) <= tolerance);
  if (difference(wanted.lse, wanted.lse) != 0.0) return;
  Workspace workspace;
  for (const u32 workers : {2u, 3u, 32u}) {
    Backwards backwards{workers};
    Result result = room(asked, cache);
    REQUIRE(attend(asked, cache, spec, into(result), backwards.executor()));
    CAPTURE(workers);
    REQUIRE(difference(result.values, wanted.values) == 0.0);
    REQUIRE(difference(result.lse, wanted.lse) == 0.0);
    result = room(asked, cache);
    REQUIRE(attend(asked, cache, spec, into(result), workspace, backwards.executor()));
    REQUIRE(difference(result.values, wanted.values) == 0.0);
    REQUIRE(difference(result.lse, wanted.lse) == 0.0);
  }
}

}  // namespace

TEST_CASE("blocks cover what is seen, and their parts fit", "[attention]") {
  for (const u32 floats : {1u, 128u, 512u, 1024u, 1025u, 2048u, 3000u, 4096u}) {
    for (const u32 tokens : {0u, 1u, 1023u, 1024u, 1025u, 5000u, 32768u, 32769u, 1000000u}) {
      const u32 begin = 17;
      const detail::TokenBlocks blocks({begin, begin + tokens}, floats);
      CAPTURE(floats, tokens);
      u32 depth = 1;
      while ((1u << (depth - 1)) < blocks.count) ++depth;
      REQUIRE((blocks.count >= 1 && depth <= detail::block_max_depth));
      REQUIRE((blocks.count == 1 || depth * floats <= detail::block_part_floats));
      REQUIRE(blocks.block_tokens % detail::block_max_tile_tokens == 0);
      u32 next = begin;
      for (u32 b = 0; b < blocks.count; ++b) {
        REQUIRE(blocks.range(b).begin == next);
        REQUIRE((blocks.range(b).end > next || tokens == 0));
        next = blocks.range(b).end;
      }
      REQUIRE(next == begin + tokens);
    }
  }
}

TEST_CASE("long ragged segments, one far longer than the others", "[attention]") {
  Layer layer{4, 1, 24, {1500, 0, 36000, 1024, 1, 2049}};
  require_right(layer.asked(), layer.view());
  std::vector<float> mass = normal(std::size_t{layer.heads} * layer.tokens, 5);
  CacheView cache = layer.view();
  cache.log_mass = Ragged<float>(mass.data(), u64{layer.tokens});
  require_right(layer.asked(), cache);
}

TEST_CASE("few query rows at every count of blocks", "[attention]") {
  for (u32 blocks = 1; blocks <= 9; ++blocks) {
    Layer layer{3, 2, 8, {blocks * 1024 - 5, 700}};
    CAPTURE(blocks);
    require_right(layer.asked(), layer.view());
  }
}

TEST_CASE("options across blocks", "[attention]") {
  Layer layer{2, 3, 16, {5000, 3100}};
  const float sinks[] = {0.5f, -infinity, 9.0f, -2.0f};
  AttentionSpec spec;
  spec.sink_logits = sinks;
  require_right(layer.asked(), layer.view(), spec);
  spec.softcap = 2.0f;
  require_right(layer.asked(), layer.view(), spec);
  spec.sink_logits = nullptr;
  for (const u32 window : {1u, 64u, 1500u, 4000u}) {
    spec.sliding_window = window;
    CAPTURE(window);
    require_right(layer.asked(), layer.view(), spec);
    require_right(layer.asked(Mask::none), layer.view(), spec);
  }
}

TEST_CASE("blocks where nothing weighs anything", "[attention]") {
  Layer layer{2, 1, 8, {5000, 4000}};
  std::vector<float> mass(2 * 5000, -infinity);
  CacheView cache = layer.view();
  cache.log_mass = Ragged<float>(mass.data(), u64{5000});
  require_right(layer.asked(), cache);
  mass[3000] = 1.0f;  // one token of the third block
  mass[5000] = 1.0f;  // and of a first one
  require_right(layer.asked(), cache);
  const Result result = serial(layer.asked(), cache);
  REQUIRE(std::equal(result.values.begin(), result.values.begin() + 8, &layer.v[3000 * 8]));
}

TEST_CASE("NaN and infinity show from any block", "[attention]") {
  for (const u32 at : {10u, 2000u, 4999u}) {
    for (const float bad : {static_cast<float>(NAN), infinity, -infinity}) {
      Layer layer{2, 1, 8, {5000}};
      layer.v[at * 8 + 3] = bad;
      CAPTURE(at, bad);
      require_right(layer.asked(), layer.view());
      layer.k[at * 8 + 3] = NAN;
      const Result result = serial(layer.asked(), layer.view());
      for (const float lse : result.lse) REQUIRE(std::isnan(lse));
    }
  }
  Layer unseen{1, 1, 8, {5000}};  // beyond what the query sees
  unseen.v[4000 * 8] = unseen.k[4500 * 8] = NAN;
  Queries asked = unseen.asked();
  asked.first_position = 3999;
  require_right(asked, unseen.view());
}

TEST_CASE("every type and layout has the bits of its contiguous floats", "[attention]") {
  Layer layer{4, 1, 40, {3000, 2500}};
  std::vector<f16> k = stored_as<f16>(layer.k);
  std::vector<f16> v = stored_as<f16>(layer.v);
  require_right(layer.asked(), layer.over(k, v));
  const Result halves = serial(layer.asked(), layer.over(k, v));
  for (std::size_t i = 0; i < k.size(); ++i) {  // rounded alike, so the type makes no difference
    layer.k[i] = static_cast<float>(k[i]);
    layer.v[i] = static_cast<float>(v[i]);
  }
  const Result wanted = serial(layer.asked(), layer.view());
  REQUIRE(halves == wanted);

  constexpr u32 page = 16;
  const u32 pages = (layer.tokens + page - 1) / page;
  std::vector<i32> table(pages);
  for (u32 p = 0; p < pages; ++p) table[p] = static_cast<i32>((p * 77 + 5) % pages);
  std::vector<f16> pool(std::size_t{pages} * page * 2 * 40, f16(NAN));
  std::vector<f16> transposed(v.size());
  std::vector<u32> order(layer.tokens);
  std::vector<f16> cells(v.size());
  for (u32 t = 0; t < layer.tokens; ++t) order[t] = (t * 7 + 3) % layer.tokens;
  for (u32 h = 0; h < 2; ++h) {
    for (u32 t = 0; t < layer.tokens; ++t) {
      for (u32 d = 0; d < 40; ++d) {
        const std::size_t at = (std::size_t{h} * layer.tokens + t) * 40 + d;
        const std::size_t cell = static_cast<u32>(table[t / page]) * page + t % page;
        pool[(cell * 2 + h) * 40 + d] = k[at];
        transposed[(std::size_t{h} * 40 + d) * layer.tokens + t] = v[at];
        cells[(std::size_t{h} * layer.tokens + order[t]) * 40 + d] = v[at];
      }
    }
  }
  const auto keys = paged(pool.data(), {2, std::size_t{pages} * page, 40}, {40, 2 * 40, 1},
                          page * 2 * 40, page, table);
  const auto check = [&](auto values) {
    CacheView cache = KVCache(strided(k.data(), layer.extents()), values).view();
    cache.keys = rows_of(keys);
    cache.keys.tokens = cache.values.tokens = cache.capacity = layer.tokens;
    cache.lengths = layer.lengths.data();
    REQUIRE(serial(layer.asked(), cache) == wanted);
    require_right(layer.asked(), cache);
  };
  check(strided(transposed.data(), layer.extents(),
                {40 * std::ptrdiff_t{layer.tokens}, 1, std::ptrdiff_t{layer.tokens}}));
  check(indexed(cells.data(), layer.extents(), {}, order));
}

TEST_CASE("wide rows, alone and in pairs", "[attention]") {
  for (const u32 width : {256u, 576u, 2048u}) {
    for (const u32 group : {1u, 8u}) {
      Layer layer{group, 1, width, {2100}};
      CAPTURE(width, group);
      require_right(layer.asked(), layer.view());
    }
  }
}

TEST_CASE("LSE alone, long", "[attention]") {
  Layer layer{4, 1, 16, {6000, 100}};
  const Result wanted = serial(layer.asked(), layer.view());
  Backwards backwards{4};
  std::vector<float> lse(8);
  REQUIRE(attend(layer.asked(), layer.view(), AttentionOutput{nullptr, lse.data()},
                 backwards.executor()));
  REQUIRE(lse == wanted.lse);
}

TEST_CASE("a long segment is work for many", "[attention]") {
  Layer layer{4, 1, 8, {30000, 1000}};
  Workspace workspace;
  Result result = room(layer.asked(), layer.view());
  Backwards backwards{16};
  REQUIRE(attend(layer.asked(), layer.view(), {}, into(result), workspace, backwards.executor()));
  REQUIRE(backwards.tasks >= 31);
  backwards.tasks = 0;
  REQUIRE(attend(layer.asked(), layer.view(), into(result), backwards.executor()));
  REQUIRE(backwards.tasks >= 16);
}

TEST_CASE("the workspace is given back, and one that is too small changes nothing", "[attention]") {
  Layer layer{4, 1, 8, {9000, 9000}};
  Backwards backwards{4};
  std::vector<std::byte> memory(1 << 16);
  Workspace enough{std::span<std::byte>(memory)};
  Result result = room(layer.asked(), layer.view());
  for (u32 i = 0; i < 10; ++i) {
    REQUIRE(attend(layer.asked(), layer.view(), {}, into(result), enough, backwards.executor()));
  }
  REQUIRE(result == serial(layer.asked(), layer.view()));
  // Query rows, segments and the padding of two blocks.
  REQUIRE(enough.high_water_bytes() <= 8 * 32 * (4 * 8 + 16) + 2 * 64 + 128);
  Workspace little{std::span<std::byte>(memory).first(256)};
  const Result before = result = room(layer.asked(), layer.view());
  REQUIRE(attend(layer.asked(), layer.view(), {}, into(result), little, backwards.executor()) ==
          StatusCode::workspace_too_small);
  REQUIRE(result == before);
  REQUIRE(attend(layer.asked(), layer.view(), {}, into(result), little));  // serial: none needed
  REQUIRE(result == serial(layer.asked(), layer.view()));
}

TEST_CASE("attention has the same bits on threads", "[attention][thread_pool]") {
  Layer layer{4, 1, 32, {9000, 300, 2000}};
  const Result wanted = serial(layer.asked(), layer.view());
  Workspace workspace;
  for (const u32 workers : {2u, 5u}) {
    ThreadPool pool({.workers = workers});
    for (u32 i = 0; i < 20; ++i) {
      Result result = room(layer.asked(), layer.view());
      REQUIRE(attend(layer.asked(), layer.view(), into(result), pool.executor()));
      REQUIRE(result == wanted);
      result = room(layer.asked(), layer.view());
      REQUIRE(attend(layer.asked(), layer.view(), {}, into(result), workspace, pool.executor()));
      REQUIRE(result == wanted);
    }
  }
}
