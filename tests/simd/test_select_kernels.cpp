// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
// Counts, thresholds, lists and pooling of every target against plain loops, at the edge of memory.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <kvlean/simd/select_kernels.hpp>
#include <limits>
#include <random>
#include <vector>

#include "tests/simd/targets.hpp"
#include "tests/support/catch.hpp"

namespace {

using namespace kvlean;
using kvlean_test::GuardedBytes;
using kvlean_test::targets;

constexpr float infinity = std::numeric_limits<float>::infinity();
constexpr float not_a_number = std::numeric_limits<float>::quiet_NaN();
constexpr u32 counts[] = {0,  1,  2,  3,  4,  7,  8,  9,   15,  16,
                          17, 31, 32, 33, 63, 64, 65, 100, 131, 700};

/// Scores with ties, zeros of both signs, infinities and NaN, that end at a guard page.
class Scores {
 public:
  Scores(u32 count, u32 seed, bool wild = true)
      : memory_(std::max<std::size_t>(count, 1) * sizeof(float)) {
    std::mt19937 random(seed);
    for (u32 t = 0; t < count; ++t) {
      const u32 dice = static_cast<u32>(random() % 16);
      float x = static_cast<float>(random() % 9) - 4.0f;
      if (wild && dice == 0) x = not_a_number;
      if (wild && dice == 1) x = infinity;
      if (wild && dice == 2) x = -infinity;
      if (dice == 3) x = -0.0f;
      if (dice > 8) x = static_cast<float>(random()) * 0x1p-32f;
      values.push_back(x);
    }
    data = reinterpret_cast<float*>(memory_.last()) + (count == 0 ? 1 : 0);
    if (count != 0) std::memcpy(data, values.data(), count * sizeof(float));
  }
  std::vector<float> values;
  float* data;

 private:
  GuardedBytes memory_;
};

bool same_bits(float a, float b) {
  return std::isnan(a) ? std::isnan(b) : std::memcmp(&a, &b, sizeof a) == 0;
}

constexpr float bounds[] = {-infinity, -2.0f, -0.0f, 0.0f, 0.3f, 2.0f, infinity, not_a_number};

}  // namespace

TEST_CASE("scores that reach a bound are counted, copied and marked", "[simd]") {
  for (const simd::Target target : targets()) {
    const simd::SelectKernels& kernels = simd::select_kernels(target);
    for (const u32 count : counts) {
      const Scores x(count, 5 + count);
      for (const float weight : {1.0f, 0.3f, 0.0f}) {
        for (const float least : bounds) {
          u32 reached = 0;
          for (const float value : x.values) reached += value * weight >= least ? 1u : 0u;
          REQUIRE(kernels.count_at_least(x.data, count, weight, least) == reached);
          if (!std::isnan(least)) {
            const simd::Divided divided = kernels.divide(x.data, count, weight, least);
            float next = infinity;
            float previous = -infinity;
            for (const float value : x.values) {
              const float a = value * weight;
              if (a >= least) next = std::min(next, a);
              if (a < least) previous = std::max(previous, a);
            }
            REQUIRE(divided.reached == reached);
            REQUIRE(divided.above == next);
            REQUIRE(divided.below == previous);
          }
          for (const float bound : bounds) {
            if (bound < least) continue;
            CAPTURE(simd::name(target), count, weight, least, bound);
            std::vector<float> inside;
            u32 above = 0;
            for (const float value : x.values) {
              const float a = value * weight;
              if (a >= bound) {
                ++above;
              } else if (a >= least) {
                inside.push_back(a);
              }
            }
            const u32 all = static_cast<u32>(inside.size());
            for (const u32 room : {all, all + 40, all / 2}) {
              const GuardedBytes memory(std::max<std::size_t>(room, 1) * sizeof(float));
              float* out = reinterpret_cast<float*>(memory.last()) + (room == 0 ? 1 : 0);
              const simd::Collected found =
                  kernels.collect(x.data, count, weight, least, bound, out, room);
              REQUIRE(found.above == above);
              REQUIRE(found.inside == all);
              for (u32 i = 0; i < all && room >= all; ++i) REQUIRE(same_bits(out[i], inside[i]));
            }
          }
        }
      }
    }
  }
}

TEST_CASE("scores are collected in place", "[simd]") {
  for (const simd::Target target : targets()) {
    for (const u32 count : counts) {
      for (const u32 down : {0u, 1u, 5u, 40u}) {
        Scores x(count + down, 50 + count);
        std::vector<float> inside;
        for (u32 t = down; t < count + down; ++t) {
          if (x.values[t] >= 0.0f && !(x.values[t] >= 2.0f)) inside.push_back(x.values[t]);
        }
        const simd::Collected found = simd::select_kernels(target).collect(
            x.data + down, count, 1.0f, 0.0f, 2.0f, x.data, count);
        REQUIRE(found.inside == inside.size());
        for (u32 i = 0; i < found.inside; ++i) REQUIRE(same_bits(x.data[i], inside[i]));
      }
    }
  }
}

TEST_CASE("kept tokens are marked and listed", "[simd]") {
  for (const simd::Target target : targets()) {
    const simd::SelectKernels& kernels = simd::select_kernels(target);
    for (const u32 count : counts) {
      const Scores x(count, 90 + count);
      for (const float least : bounds) {
        for (const float bound : bounds) {
          if (bound < least) continue;
          for (const u64 ties : {u64{0}, u64{1}, u64{5}, u64{1000}}) {
            CAPTURE(simd::name(target), count, least, bound, ties);
            u64 left = ties;
            std::vector<u8> keep(count);
            std::vector<u32> tokens;
            for (u32 t = 0; t < count; ++t) {
              const float value = x.values[t];
              if (value >= bound) {
                keep[t] = 1;
              } else if (value >= least && left > 0) {
                keep[t] = 1;
                --left;
              }
              if (keep[t] != 0) tokens.push_back(t);
            }
            const GuardedBytes flags(std::max<std::size_t>(count, 1));
            u8* marked = reinterpret_cast<u8*>(flags.last()) + (count == 0 ? 1 : 0);
            std::fill_n(marked, count, u8{7});
            kernels.mark(x.data, count, least, bound, ties, marked);
            REQUIRE(std::equal(keep.begin(), keep.end(), marked));
            const u32 kept = static_cast<u32>(tokens.size());
            const GuardedBytes list(std::max<std::size_t>(kept, 1) * sizeof(u32));
            u32* out = reinterpret_cast<u32*>(list.last()) + (kept == 0 ? 1 : 0);
            kernels.list(marked, count, out, kept);
            REQUIRE(std::equal(tokens.begin(), tokens.end(), out));
          }
        }
      }
    }
  }
}

TEST_CASE("pooling of every width", "[simd]") {
  for (const simd::Target target : targets()) {
    const simd::SelectKernels& kernels = simd::select_kernels(target);
    for (const bool wild : {false, true}) {
      for (const u32 count : {1u, 2u, 7u, 16u, 33u, 64u, 131u, 300u, 700u}) {
        const Scores x(count, 7 + count, wild);
        for (const u32 width : {1u, 3u, 5u, 7u, 15u, 31u, 33u, 63u, 65u, 129u, 255u, 257u, 301u,
                                599u, 699u, 701u, 1399u, 5001u, 0xffffffffu}) {
          CAPTURE(simd::name(target), wild, count, width);
          const GuardedBytes memory(count * sizeof(float));
          float* mean = reinterpret_cast<float*>(memory.last());
          kernels.pool_average(x.data, count, width, mean);
          std::vector<float> largest(count);
          kernels.pool_maximum(x.data, count, width, largest.data());
          for (u32 t = 0; t < count; ++t) {
            const u64 half = width / 2;
            double sum = 0.0;
            double size = 0.0;
            float in_order = 0.0f;
            float best = x.values[t];
            for (u64 i = t > half ? t - half : 0; i <= t + half && i < count; ++i) {
              if (std::isnan(x.values[i])) continue;
              sum += static_cast<double>(x.values[i]);
              size += std::fabs(static_cast<double>(x.values[i]));
              in_order += x.values[i];
              best = std::max(best, x.values[i]);
            }
            if (std::isnan(x.values[t])) {
              REQUIRE(std::isnan(mean[t]));
              REQUIRE(std::isnan(largest[t]));
              continue;
            }
            REQUIRE(largest[t] == best);
            if (width <= 256) {
              REQUIRE(same_bits(mean[t], in_order / static_cast<float>(width)));
            } else if (std::isnan(sum)) {
              REQUIRE(std::isnan(mean[t]));
            } else if (std::isinf(sum)) {
              REQUIRE(mean[t] == static_cast<float>(sum));
            } else {
              const double exact = sum / static_cast<double>(width);
              const double bound = size / static_cast<double>(width) * (count + 2.0) * 0x1p-24;
              REQUIRE(std::fabs(static_cast<double>(mean[t]) - exact) <= bound + 1e-30);
            }
          }
        }
      }
    }
  }
}

TEST_CASE("reductions over heads and divisions by counts", "[simd]") {
  for (const simd::Target target : targets()) {
    const simd::SelectKernels& kernels = simd::select_kernels(target);
    for (const u32 count : counts) {
      for (const u32 rows : {1u, 2u, 3u, 8u}) {
        const u32 stride = count + 3;
        const u32 used = count == 0 ? 0 : (rows - 1) * stride + count;
        const Scores x(used, 30 + count);
        const GuardedBytes memory(std::max<std::size_t>(count, 1) * sizeof(float));
        float* mean = reinterpret_cast<float*>(memory.last()) + (count == 0 ? 1 : 0);
        kernels.mean_rows(x.data, stride, rows, count, static_cast<float>(rows), mean);
        std::vector<float> largest(count);
        kernels.maximum_rows(x.data, stride, rows, count, largest.data());
        for (u32 t = 0; t < count; ++t) {
          CAPTURE(simd::name(target), count, rows, t);
          float sum = x.values[t];
          float best = x.values[t];
          for (u32 r = 1; r < rows; ++r) {
            const float value = x.values[r * stride + t];
            sum += value;
            if (std::isnan(value) || value > best) best = value;
          }
          REQUIRE(same_bits(mean[t], sum / static_cast<float>(rows)));
          REQUIRE((std::isnan(best) ? std::isnan(largest[t]) : largest[t] == best));
        }
        if (count == 0) continue;
        kernels.mean_rows(x.data, stride, rows, count, 1.0f, x.data);  // in place
        float sum = x.values[0];
        for (u32 r = 1; r < rows; ++r) sum += x.values[r * stride];
        REQUIRE(same_bits(x.data[0], sum));
      }
      const Scores x(count, 60 + count);
      std::mt19937 random(count);
      std::vector<u32> observers(count);
      for (u32& n : observers)
        n = static_cast<u32>(random() >> random() % 32) * (random() % 5 != 0);
      std::vector<float> share(count);
      kernels.divide_by_counts(x.data, observers.data(), count, share.data());
      for (u32 t = 0; t < count; ++t) {
        const float divisor = observers[t] != 0 ? static_cast<float>(observers[t]) : 1.0f;
        REQUIRE(same_bits(share[t], x.values[t] / divisor));
      }
    }
  }
}
