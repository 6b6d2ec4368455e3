// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
// Keys, shapes and CPU plans that the tests of the merging reducers share.
#pragma once

#include <limits>

#include "kvlean/cuda/cam.cuh"
#include "tests/cuda/select_cases.cuh"

namespace cuda_test {

using kvlean::Sharing;
using kvlean::cuda::SelectOptions;

inline u64 skipped = 0;  // segments left out
inline u64 compared = 0;

enum class Keys {
  whole,    ///< small whole numbers: cosines are exact, ties abound
  walk,     ///< each key like the one before
  equal,    ///< all the same
  broken,   ///< whole, some rows zero, some with NaN or infinity
  twins,    ///< a few directions, each key next to one of them: ties and near ties
            ///< abound
  extreme,  ///< as walk, some rows so small or large that products leave the
            ///< normal numbers
};
inline const char* name_of(Keys keys) {
  constexpr const char* names[] = {"whole", "walk", "equal", "broken", "twins", "extreme"};
  return names[static_cast<int>(keys)];
}

inline void fill_keys(TestCache& cache, Keys kind, u64 seed) {
  Random random(seed + 1000);
  const CacheSpec& spec = cache.spec();
  std::vector<float> row(spec.key_width);
  for (u32 l = 0; l < spec.layers; ++l) {
    for (u32 q = 0; q < spec.sequences; ++q) {
      const kvlean::CacheView view = cache.layer(l, q);
      for (u32 h = 0; h < spec.kv_heads; ++h) {
        for (float& x : row) x = 1.0f;
        for (u32 t = 0; t < cache.capacity(); ++t) {
          if (kind == Keys::twins) {
            Random base(seed + random.below(3));
            for (float& x : row) x = base.between(-1.0f, 1.0f);
            if (random.below(2) == 0) row[random.below(spec.key_width)] *= 1.0f + 0x1p-9f;
            if (random.below(4) == 0) {
              for (float& x : row) x *= 4.0f;
            }
          } else if (kind == Keys::walk || kind == Keys::extreme) {
            for (float& x : row) {
              x = t == 0 ? random.between(-1.0f, 1.0f)
                         : 0.85f * x + 0.5f * random.between(-1.0f, 1.0f);
            }
          } else if (kind != Keys::equal) {
            const u32 changes = random.below(4) == 0 ? spec.key_width : random.below(6);
            for (u32 i = 0; i < changes; ++i) {
              row[random.below(spec.key_width)] = static_cast<float>(random.below(5)) - 2.0f;
            }
          }
          std::vector<float> stored = row;
          if (kind == Keys::extreme && spec.key_dtype != DType::f16) {
            constexpr float factors[] = {1.0f, 0x1p-60f, 0x1p-90f, 0x1p62f, 0x1p100f};
            for (float& x : stored) x *= factors[t % 5];
          }
          if (kind == Keys::broken) {
            const u32 fate = random.below(24);
            const float odd[] = {std::numeric_limits<float>::quiet_NaN(),
                                 std::numeric_limits<float>::infinity(),
                                 -std::numeric_limits<float>::infinity()};
            if (fate < 3) stored[random.below(spec.key_width)] = odd[fate];
            if (fate == 3) std::fill(stored.begin(), stored.end(), 0.0f);
          }
          kvlean::store_row(view.keys, h, t, stored.data());
        }
      }
    }
  }
  cache.upload();
}

struct MergeTest {
  TestCache& cache;
  const TestScores& rank;
  const TestScores* mass = nullptr;
  std::vector<u32> limit = {};
  const std::vector<u32>* observers = nullptr;  ///< [segment][tokens]
  SelectOptions options = {};
  kvlean::cuda::MergeDraws draws = {};
  Keys keys = Keys::whole;
  double relative = 1e-4;
  double absolute = 1e-6;

  template <class Reducer>
  Status plan_on_host(const Reducer& reducer, u32 l, u32 q, kvlean::Workspace& workspace,
                      kvlean::CompressionPlan& plan) const {
    const kvlean::CacheView view = cache.layer(l, q);
    const u32 first = cache.segment_of(l, q);
    kvlean::Scores scores;
    scores.segments = view.segments;
    scores.lengths = view.lengths;
    scores.rank = kvlean::Ragged<float>(const_cast<float*>(rank.host.data()) + first * rank.stride,
                                        rank.stride);
    if (mass != nullptr) {
      scores.mass = kvlean::Ragged<float>(
          const_cast<float*>(mass->host.data()) + first * mass->stride, mass->stride);
      scores.has_mass = true;
    }
    if (observers != nullptr) {
      scores.observers = kvlean::Ragged<u32>(
          const_cast<u32*>(observers->data()) + std::size_t{first} * cache.spec().tokens,
          u64{cache.spec().tokens});
      scores.has_observers = true;
    }
    kvlean::PlanOptions plan_options;
    plan_options.protection = options.protection;
    plan_options.sharing = options.sharing;
    plan_options.seed = draws.seed;
    plan_options.step = draws.step;
    kvlean::Context context{workspace, plan_options, 0, cache.spec().layers};
    return reducer.reduce(view, scores, limit.data() + first, context, plan);
  }
};

struct Shape {
  const char* label;
  CacheSpec spec;
};

inline CacheSpec spec_of(u32 layers, u32 sequences, u32 heads, u32 tokens, u32 width, DType dtype,
                         std::vector<u32> lengths = {}) {
  CacheSpec spec;
  spec.layers = layers;
  spec.sequences = sequences;
  spec.kv_heads = heads;
  spec.tokens = tokens;
  spec.key_width = width;
  spec.value_width = 8;
  spec.lengths = std::move(lengths);
  spec.with_dtype(dtype);
  return spec;
}

inline std::vector<u32> limits_of(const TestCache& cache, double fraction, bool alike) {
  std::vector<u32> limit(cache.num_segments());
  for (u32 s = 0; s < limit.size(); ++s) {
    const u32 head = s % cache.spec().kv_heads;
    const double own = alike ? fraction : fraction * (0.5 + 0.5 * static_cast<double>(head));
    limit[s] = std::min(cache.lengths[s], static_cast<u32>(own * cache.lengths[s]));
  }
  return limit;
}

/// `--only TEXT`: just the parts whose name contains it.
inline bool wants(int argc, char** argv, const char* part) {
  for (int i = 1; i + 1 < argc; ++i) {
    if (std::strcmp(argv[i], "--only") == 0 && std::strstr(part, argv[i + 1]) == nullptr) {
      return false;
    }
  }
  std::printf("part %s\n", part);
  std::fflush(stdout);
  return true;
}

}  // namespace cuda_test
