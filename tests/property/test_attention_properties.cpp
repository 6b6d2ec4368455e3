// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
// What must hold of attention, merging and the eviction bound for any data.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <random>
#include <utility>
#include <vector>

#include "kvlean/attention/attend.hpp"
#include "kvlean/attention/attend_reference.hpp"
#include "kvlean/attention/eviction_bound.hpp"
#include "kvlean/attention/merge_parts.hpp"
#include "kvlean/kvlean.hpp"
#include "tests/support/catch.hpp"

namespace {

using namespace kvlean;

constexpr float infinity = std::numeric_limits<float>::infinity();

/// A source of random shapes and data, the same in every run.
class Source {
 public:
  explicit Source(u32 seed) : generator_(seed) {}
  u32 between(u32 low, u32 high) {
    return std::uniform_int_distribution<u32>(low, high)(generator_);
  }
  bool coin(double chance = 0.5) { return std::bernoulli_distribution(chance)(generator_); }
  std::vector<float> normal(std::size_t count, float deviation = 1.0f) {
    std::normal_distribution<float> distribution(0.0f, deviation);
    std::vector<float> values(count);
    for (float& value : values) value = distribution(generator_);
    return values;
  }

 private:
  std::mt19937 generator_;
};

/// One layer with ragged lengths, ascending positions with gaps, and log mass.
struct Layer {
  u32 heads, group, tokens, count, key_width, value_width;
  std::vector<float> k, v, q, mass;
  std::vector<i32> positions;
  std::vector<u32> lengths;

  explicit Layer(Source& source)
      : heads(source.between(1, 3)),
        group(source.between(1, 4)),
        tokens(source.between(1, 90)),
        count(source.between(1, 12)),
        key_width(source.between(1, 70)),
        value_width(source.between(1, 70)),
        k(source.normal(std::size_t{heads} * tokens * key_width)),
        v(source.normal(std::size_t{heads} * tokens * value_width)),
        q(source.normal(std::size_t{heads} * group * count * key_width, 2.0f)),
        mass(source.normal(std::size_t{heads} * tokens)) {
    for (u32 h = 0; h < heads; ++h) {
      lengths.push_back(source.between(0, tokens));
      i32 at = 0;
      for (u32 t = 0; t < tokens; ++t) {
        at += static_cast<i32>(source.between(1, 3));
        positions.push_back(at);
      }
    }
  }
  [[nodiscard]] CacheView view() {
    CacheView view = KVCache(strided(k.data(), Extents{heads, tokens, key_width}),
                             strided(v.data(), Extents{heads, tokens, value_width}))
                         .view();
    view.lengths = lengths.data();
    view.positions = Ragged<i32>(positions.data(), u64{tokens});
    view.next_position = 1 + *std::max_element(positions.begin(), positions.end());
    view.log_mass = Ragged<float>(mass.data(), u64{tokens});
    return view;
  }
  [[nodiscard]] Queries asked(Mask mask) {
    return queries(strided(q.data(), Extents{std::size_t{heads} * group, count, key_width}), mask);
  }
};

template <class T>
struct Result {
  std::vector<T> values;
  std::vector<T> lse;
};

Result<float> fast(const Queries& asked, const CacheView& cache, const AttentionSpec& spec = {}) {
  const AttentionShape shape = attention_shape(asked, cache);
  Result<float> result{std::vector<float>(shape.rows() * shape.value_width),
                       std::vector<float>(shape.rows())};
  REQUIRE(attend(asked, cache, spec, AttentionOutput{result.values.data(), result.lse.data()}));
  return result;
}

Result<double> exact(const Queries& asked, const CacheView& cache, const AttentionSpec& spec = {}) {
  const AttentionShape shape = attention_shape(asked, cache);
  Result<double> result{std::vector<double>(shape.rows() * shape.value_width),
                        std::vector<double>(shape.rows())};
  REQUIRE(attend_reference(asked, cache, spec,
                           BasicAttentionOutput<double>{result.values.data(), result.lse.data()}));
  return result;
}

template <class A, class B>
double difference(const std::vector<A>& a, const std::vector<B>& b) {
  double largest = 0.0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    const double x = static_cast<double>(a[i]);
    const double y = static_cast<double>(b[i]);
    if (x == y) continue;
    const double gap = std::abs(x - y);
    largest = gap <= largest ? largest : (gap == gap ? gap : static_cast<double>(infinity));
  }
  return largest;
}

}  // namespace

TEST_CASE("fast attention follows the reference for any shape, mask and options", "[attention]") {
  Source source(11);
  for (u32 trial = 0; trial < 300; ++trial) {
    Layer layer(source);
    std::vector<float> sinks = source.normal(std::size_t{layer.heads} * layer.group);
    CacheView cache = layer.view();
    if (source.coin()) cache.positions = {};
    if (source.coin()) cache.log_mass = {};
    AttentionSpec spec;
    if (source.coin()) spec.scale = 0.3f;
    if (source.coin(0.3)) spec.softcap = 3.0f;
    if (source.coin(0.3)) spec.sliding_window = source.between(1, 60);
    if (source.coin(0.3)) spec.sink_logits = sinks.data();
    Queries asked = layer.asked(source.coin(0.3) ? Mask::none : Mask::causal);
    if (source.coin(0.3)) asked.first_position = static_cast<i32>(source.between(0, 120));
    CAPTURE(trial);
    const Result<float> a = fast(asked, cache, spec);
    const Result<double> b = exact(asked, cache, spec);
    REQUIRE(difference(a.values, b.values) < 3e-5);
    REQUIRE(difference(a.lse, b.lse) < 3e-5);
  }
}

TEST_CASE("merging two parts is one pass, and merging is associative", "[attention]") {
  Source source(12);
  for (u32 trial = 0; trial < 100; ++trial) {
    Layer layer(source);
    const Queries asked = layer.asked(Mask::causal);
    const CacheView cache = layer.view();
    const AttentionShape shape = attention_shape(asked, cache);
    const Result<double> whole = exact(asked, cache);
    // Three parts by hiding the others' tokens.
    const std::vector<float> mass = layer.mass;
    Result<float> part[3];
    std::vector<u32> owner(mass.size());
    for (u32& o : owner) o = source.between(0, 2);
    for (u32 p = 0; p < 3; ++p) {
      for (std::size_t i = 0; i < mass.size(); ++i) {
        layer.mass[i] = owner[i] == p ? mass[i] : -infinity;
      }
      part[p] = fast(asked, cache);
    }
    const auto merge = [&](Result<float> into, const Result<float>& from) {
      REQUIRE(merge_parts({into.values.data(), into.lse.data()},
                          {from.values.data(), from.lse.data()}, shape));
      return into;
    };
    const Result<float> left = merge(merge(part[0], part[1]), part[2]);
    const Result<float> right = merge(part[0], merge(part[1], part[2]));
    CAPTURE(trial);
    REQUIRE(difference(left.values, whole.values) < 3e-5);
    REQUIRE(difference(left.lse, whole.lse) < 3e-5);
    REQUIRE(difference(left.values, right.values) < 1e-5);
    REQUIRE(difference(left.lse, right.lse) < 1e-5);
  }
}

TEST_CASE("equal keys as one slot with log count are full attention exactly", "[attention]") {
  Source source(13);
  double without_mass = 0.0;
  for (u32 trial = 0; trial < 100; ++trial) {
    const u32 sets = source.between(1, 20);
    const u32 width = source.between(1, 48);
    const std::vector<float> keys = source.normal(std::size_t{sets} * width, 2.0f);
    std::vector<float> full_keys, full_values, mass;
    std::vector<float> mean(std::size_t{sets} * width);
    u32 tokens = 0;
    for (u32 s = 0; s < sets; ++s) {
      const u32 size = source.between(1, 9);
      const std::vector<float> values = source.normal(std::size_t{size} * width);
      for (u32 i = 0; i < size; ++i) {
        const auto key = keys.begin() + static_cast<std::ptrdiff_t>(s * width);
        full_keys.insert(full_keys.end(), key, key + width);
      }
      full_values.insert(full_values.end(), values.begin(), values.end());
      for (u32 d = 0; d < width; ++d) {
        double sum = 0.0;
        for (u32 i = 0; i < size; ++i) sum += static_cast<double>(values[i * width + d]);
        mean[s * width + d] = static_cast<float>(sum / size);
      }
      mass.push_back(std::log(static_cast<float>(size)));
      tokens += size;
    }
    const std::vector<float> q = source.normal(std::size_t{3} * width, 2.0f);
    const Queries asked = queries(strided(q.data(), Extents{1, 3, width}), Mask::none);
    const Result<double> full =
        exact(asked, KVCache(strided(full_keys.data(), Extents{1, tokens, width}),
                             strided(full_values.data(), Extents{1, tokens, width}))
                         .view());
    CacheView merged = KVCache(strided(keys.data(), Extents{1, sets, width}),
                               strided(std::as_const(mean).data(), Extents{1, sets, width}))
                           .view();
    without_mass = std::max(without_mass, difference(exact(asked, merged).values, full.values));
    merged.log_mass = Ragged<float>(mass.data(), u64{sets});
    CAPTURE(trial);
    REQUIRE(difference(exact(asked, merged).values, full.values) < 1e-6);
    REQUIRE(difference(exact(asked, merged).lse, full.lse) < 1e-6);
    REQUIRE(difference(fast(asked, merged).values, full.values) < 1e-5);
    REQUIRE(difference(fast(asked, merged).lse, full.lse) < 1e-5);
  }
  REQUIRE(without_mass > 0.05);  // the mass is what makes it exact
}

TEST_CASE("a convex key never weighs less than its entropy says", "[attention]") {
  // The bias that a merged slot needs, LSE of the members' logits minus its own, is >= H(w).
  Source source(14);
  for (u32 trial = 0; trial < 300; ++trial) {
    const u32 size = source.between(2, 8);
    const u32 width = source.between(1, 16);
    const std::vector<float> keys = source.normal(std::size_t{size} * width);
    const std::vector<float> q = source.normal(width, 3.0f);
    std::vector<double> weight(size);
    double total = 0.0;
    for (double& w : weight) total += w = static_cast<double>(source.between(1, 100));
    double entropy = 0.0;
    std::vector<float> merged(width);
    for (double& w : weight) {
      w /= total;
      entropy -= w * std::log(w);
    }
    for (u32 d = 0; d < width; ++d) {
      double sum = 0.0;
      for (u32 i = 0; i < size; ++i) sum += weight[i] * static_cast<double>(keys[i * width + d]);
      merged[d] = static_cast<float>(sum);
    }
    const Queries asked = queries(strided(q.data(), Extents{1, 1, width}), Mask::none);
    const auto lse = [&](const float* rows, u32 tokens) {
      return exact(asked, KVCache(strided(rows, Extents{1, tokens, width}),
                                  strided(rows, Extents{1, tokens, width}))
                              .view())
          .lse[0];
    };
    CAPTURE(trial);
    REQUIRE(lse(keys.data(), size) - lse(merged.data(), 1) >= entropy - 1e-5);
  }
}

TEST_CASE("an evicted cache equals the full one with the evicted tokens masked", "[attention]") {
  Source source(15);
  for (u32 trial = 0; trial < 100; ++trial) {
    Layer layer(source);
    const Queries asked = layer.asked(Mask::causal);
    Layer small = layer;
    const CacheView full = layer.view();
    const Result<float> before = fast(asked, full);
    for (u32 h = 0; h < layer.heads; ++h) {
      u32 kept = 0;
      for (u32 t = 0; t < layer.lengths[h]; ++t) {
        const std::size_t from = std::size_t{h} * layer.tokens + t;
        if (source.coin(0.4)) {
          layer.mass[from] = -infinity;
          continue;
        }
        const std::size_t to = std::size_t{h} * layer.tokens + kept++;
        std::copy_n(&layer.k[from * layer.key_width], layer.key_width,
                    &small.k[to * layer.key_width]);
        std::copy_n(&layer.v[from * layer.value_width], layer.value_width,
                    &small.v[to * layer.value_width]);
        small.mass[to] = layer.mass[from];
        small.positions[to] = layer.positions[from];
      }
      small.lengths[h] = kept;
    }
    CacheView evicted = small.view();
    evicted.next_position = full.next_position;
    const Result<float> masked = fast(asked, full);
    const Result<float> compact = fast(asked, evicted);
    CAPTURE(trial);
    REQUIRE(difference(masked.values, compact.values) < 1e-5);
    REQUIRE(difference(masked.lse, compact.lse) < 1e-5);
    std::vector<float> lost(before.lse.size());
    REQUIRE(lost_mass(compact.lse.data(), before.lse.data(), lost.size(), lost.data()));
    for (const float mass : lost) REQUIRE((mass >= 0.0f && mass <= 1.0f));
  }
}

TEST_CASE("the L1 loss of eviction never exceeds Ada-KV's bounds", "[bound]") {
  Source source(16);
  Workspace workspace;
  double closest = 0.0;
  for (u32 trial = 0; trial < 400; ++trial) {
    const u32 kv_heads = source.between(1, 3);
    const u32 group = source.between(1, 3);
    const u32 heads = kv_heads * group;
    const u32 tokens = source.between(2, 40);
    const u32 dim = source.between(1, 12);
    const u32 hidden = source.between(1, 20);
    const bool identity = source.coin(0.25);
    const std::vector<float> values = source.normal(std::size_t{kv_heads} * tokens * dim);
    const std::vector<float> projection = source.normal(std::size_t{heads} * dim * hidden);
    const std::vector<float> logits =
        source.normal(std::size_t{heads} * tokens, source.coin() ? 1.0f : 4.0f);
    std::vector<u8> keep(std::size_t{kv_heads} * tokens);
    for (u8& kept : keep) kept = source.coin() ? 1 : 0;
    for (u32 s = 0; s < kv_heads; ++s) keep[s * tokens + source.between(0, tokens - 1)] = 1;

    // Attention rows whose kept part is a float, so that F is known exactly, then the loss in
    // double.
    std::vector<float> retained(heads);
    std::vector<double> change(identity ? heads * dim : hidden, 0.0);
    for (u32 h = 0; h < heads; ++h) {
      const u8* kept = &keep[h / group * tokens];
      std::vector<double> full(tokens), left(tokens, 0.0);
      double all = 0.0, some = 0.0;
      for (u32 t = 0; t < tokens; ++t) {
        full[t] = std::exp(static_cast<double>(logits[h * tokens + t]));
        all += full[t];
        if (kept[t] != 0) some += full[t];
      }
      retained[h] = static_cast<float>(some / all);
      for (u32 t = 0; t < tokens; ++t) {
        if (kept[t] != 0) left[t] = full[t] / some;
        full[t] /= all;
      }
      // Round F down, never up: the bound with it is then at least the true one.
      if (static_cast<double>(retained[h]) > some / all) {
        retained[h] = std::nextafter(retained[h], 0.0f);
      }
      for (u32 t = 0; t < tokens; ++t) {
        for (u32 d = 0; d < dim; ++d) {
          const double part =
              (full[t] - left[t]) * static_cast<double>(values[(h / group * tokens + t) * dim + d]);
          if (identity) {
            change[h * dim + d] += part;
            continue;
          }
          for (u32 i = 0; i < hidden; ++i) {
            change[i] += part * static_cast<double>(projection[(h * dim + d) * hidden + i]);
          }
        }
      }
    }
    double loss = 0.0;
    for (const double x : change) loss += std::abs(x);

    const CacheView cache = KVCache(strided(values.data(), Extents{kv_heads, tokens, dim}),
                                    strided(values.data(), Extents{kv_heads, tokens, dim}))
                                .view();
    const Rows rows =
        identity ? Rows{} : strided(projection.data(), Extents{heads, dim, hidden}).rows();
    EvictionBound bound;
    std::vector<float> constants(heads);
    REQUIRE(eviction_loss_bound(cache, rows, group, retained.data(), bound, constants.data(),
                                workspace));
    CAPTURE(trial, loss, bound.per_head_bound, bound.bound);
    REQUIRE(loss <= bound.per_head_bound * (1 + 1e-12));
    REQUIRE(bound.per_head_bound <= bound.bound * (1 + 1e-12));
    REQUIRE(bound.bound <= 2.0 * heads * bound.constant * (1 + 1e-12));
    REQUIRE(static_cast<float>(bound.constant) ==
            *std::max_element(constants.begin(), constants.end()));
    if (bound.bound > 0.0) closest = std::max(closest, loss / bound.bound);
  }
  REQUIRE(closest > 0.05);  // a bound of the right size, not just a large number
}
