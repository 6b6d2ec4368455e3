// Layers of scores without a cache behind them, for tests of allocators.
#pragma once

#include <algorithm>
#include <cstddef>
#include <memory>
#include <span>
#include <vector>

#include "kvlean/core/concepts.hpp"
#include "kvlean/core/order.hpp"

namespace kvlean_test {

using kvlean::u32;
using kvlean::u64;

/// One layer: scores[segment][token], nominal slots per segment.
struct Layer {
  std::vector<std::vector<float>> scores;
  std::vector<u32> nominal;
  u32 frozen = 0;
};

/// Equal nominals.
inline Layer make_layer(std::vector<std::vector<float>> scores, u32 nominal, u32 frozen = 0) {
  Layer layer{std::move(scores), {}, frozen};
  layer.nominal.assign(layer.scores.size(), nominal);
  return layer;
}

/// Owns what LayerLimits point at. limits[layer][segment] are the nominals until run() succeeds.
class Model {
 public:
  explicit Model(std::vector<Layer> layers, kvlean::Protection protection = {0, 0})
      : layers_(std::move(layers)) {
    options.protection = protection;
    for (const Layer& layer : layers_) {
      auto part = std::make_unique<Part>();
      part->first.push_back(0);
      for (const std::vector<float>& row : layer.scores) {
        const u32 length = static_cast<u32>(row.size());
        part->rank.insert(part->rank.end(), row.begin(), row.end());
        part->first.push_back(part->rank.size());
        part->lengths.push_back(length);
        const u32 covered = protection.count(length, layer.frozen);
        part->floor.push_back(length == 0 ? 0 : std::max<u32>(covered, 1));
      }
      part->rank.push_back(0.0f);  // never null
      part->scores.segments = part->cache.segments = static_cast<u32>(layer.scores.size());
      part->scores.lengths = part->cache.lengths = part->lengths.data();
      part->scores.rank = {part->rank.data(), part->first.data()};
      part->cache.frozen = layer.frozen;
      limits.push_back(layer.nominal);
      parts_.push_back(std::move(part));
    }
  }

  template <class A>
  kvlean::Status run(const A& allocator, kvlean::Workspace& workspace) {
    std::vector<kvlean::LayerLimits> spans = views();
    kvlean::Context context{workspace, options, place, num_layers};
    return allocator.allocate(spans, context);
  }
  template <class A>
  kvlean::Status run(const A& allocator) {
    kvlean::Workspace workspace;
    return run(allocator, workspace);
  }

  std::vector<kvlean::LayerLimits> views() {
    std::vector<kvlean::LayerLimits> result;
    for (std::size_t l = 0; l < parts_.size(); ++l) {
      result.push_back(
          {&parts_[l]->scores, &parts_[l]->cache, limits[l].data(), parts_[l]->floor.data()});
    }
    return result;
  }
  const kvlean::Scores& scores(std::size_t layer) const { return parts_[layer]->scores; }
  const kvlean::CacheView& cache(std::size_t layer) const { return parts_[layer]->cache; }
  u32 floor(std::size_t layer, std::size_t s) const { return parts_[layer]->floor[s]; }

  u64 total() const {
    u64 sum = 0;
    for (const auto& layer : limits) {
      for (u32 limit : layer) sum += limit;
    }
    return sum;
  }
  /// Sum of the scores kept under the limits: protected tokens and the best others.
  double retained() const {
    double sum = 0.0;
    for (std::size_t l = 0; l < layers_.size(); ++l) {
      for (std::size_t s = 0; s < layers_[l].scores.size(); ++s) {
        for (u32 token : kept(l, s)) sum += static_cast<double>(layers_[l].scores[s][token]);
      }
    }
    return sum;
  }
  /// Tokens kept under the limit, by the total order.
  std::vector<u32> kept(std::size_t l, std::size_t s) const {
    const std::vector<float>& row = layers_[l].scores[s];
    const u32 length = static_cast<u32>(row.size());
    std::vector<u32> result;
    std::vector<u64> rest;
    for (u32 t = 0; t < length; ++t) {
      if (options.protection.covers(t, length, layers_[l].frozen)) {
        result.push_back(t);
      } else {
        rest.push_back(kvlean::token_key(row[t], t));
      }
    }
    std::sort(rest.rbegin(), rest.rend());
    for (std::size_t i = 0; result.size() < limits[l][s]; ++i) {
      result.push_back(kvlean::token_of_key(rest[i]));
    }
    std::sort(result.begin(), result.end());
    return result;
  }

  kvlean::PlanOptions options;
  u32 place = 0;
  u32 num_layers = 1;
  std::vector<std::vector<u32>> limits;

 private:
  struct Part {
    std::vector<float> rank;
    std::vector<u64> first;
    std::vector<u32> lengths;
    std::vector<u32> floor;
    kvlean::Scores scores;
    kvlean::CacheView cache;
  };
  std::vector<Layer> layers_;
  std::vector<std::unique_ptr<Part>> parts_;
};

}  // namespace kvlean_test
