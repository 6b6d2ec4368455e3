// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
// Ada-KV over heads that are sharded among ranks, here threads: every rank must get what one rank
// with all heads gets.
#include <condition_variable>
#include <cstdint>
#include <limits>
#include <mutex>
#include <thread>

#include "kvlean/allocate/adakv.hpp"
#include "kvlean/allocate/adakv_layers.hpp"
#include "kvlean/allocate/sharded.hpp"
#include "tests/support/allocation.hpp"
#include "tests/support/catch.hpp"

namespace {

using kvlean::Status;
using kvlean::StatusCode;
using kvlean::u32;
using kvlean::u64;
using kvlean_test::Layer;
using kvlean_test::Model;

/// Where threads add up arrays.
class Meeting {
 public:
  explicit Meeting(u32 ranks) : ranks_(ranks) {}
  void sum(std::span<u64> values) {
    std::unique_lock lock(mutex_);
    if (arrived_ == 0) sum_.assign(values.size(), 0);
    for (std::size_t i = 0; i < values.size(); ++i) sum_[i] += values[i];
    const u64 round = round_;
    bytes += values.size_bytes();
    if (++arrived_ == ranks_) {
      arrived_ = 0;
      ++round_;
      result_ = sum_;
      changed_.notify_all();
    } else {
      changed_.wait(lock, [&] { return round_ != round; });
    }
    std::copy(result_.begin(), result_.end(), values.begin());
  }
  u64 bytes = 0;

 private:
  u32 ranks_;
  u32 arrived_ = 0;
  u64 round_ = 0;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<u64> sum_;
  std::vector<u64> result_;
};

struct ThreadsCommunicator {
  Meeting* meeting = nullptr;
  Status all_reduce_sum(std::span<u64> sums) const noexcept {
    meeting->sum(sums);
    return StatusCode::ok;
  }
};
static_assert(kvlean::RankCommunicator<ThreadsCommunicator>);
static_assert(kvlean::Allocator<kvlean::ShardedAdaKVAllocator<ThreadsCommunicator>>);

class Random {
 public:
  explicit Random(u64 seed) : state_(seed * 0x9e3779b97f4a7c15u + 1) {}
  u32 below(u32 bound) {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<u32>((state_ >> 33) % bound);
  }

 private:
  u64 state_;
};

float draw(Random& random, int pattern) {
  const float u = static_cast<float>(random.below(1u << 20)) * 0x1p-20f;
  switch (pattern) {
    case 0:
      return u;
    case 1:
      return static_cast<float>(random.below(3));  // ties everywhere
    case 2:
      return u < 0.4f ? std::numeric_limits<float>::quiet_NaN() : u - 0.7f;
    case 3:
      return std::exp(-12.0f * u);
    default:
      return random.below(4) == 0 ? std::numeric_limits<float>::infinity()
                                  : (random.below(2) == 0 ? 0.0f : -0.0f);
  }
}

std::vector<Layer> random_layers(u32 seed, int pattern, bool ragged) {
  Random random(seed);
  std::vector<Layer> layers;
  for (u32 l = 0; l < 3; ++l) {
    std::vector<std::vector<float>> scores;
    for (u32 h = 0; h < 8; ++h) {
      const u32 length = ragged ? random.below(90) : 120;
      std::vector<float> row(length);
      for (float& score : row) score = draw(random, pattern);
      scores.push_back(row);
    }
    layers.push_back(kvlean_test::make_layer(std::move(scores), ragged ? 40 : 36, l == 1 ? 3 : 0));
  }
  return layers;
}

}  // namespace

TEST_CASE("sharded heads get the limits of one rank with all heads", "[allocate][ranks]") {
  const kvlean::Protection protection{2, 5};
  const std::vector<std::vector<u32>> shards = {{8}, {4, 4}, {1, 7}, {2, 3, 1, 2}};
  for (int pattern = 0; pattern < 5; ++pattern) {
    for (const bool ragged : {false, true}) {
      for (const bool across : {false, true}) {
        for (const float safeguard : {0.0f, 0.2f, 1.0f}) {
          const std::vector<Layer> layers =
              random_layers(static_cast<u32>(pattern) + 7, pattern, ragged);
          Model one(layers, protection);
          one.num_layers = 3;
          const Status expected = across ? one.run(kvlean::AdaKVLayersAllocator{safeguard})
                                         : one.run(kvlean::AdaKVAllocator{safeguard});
          for (const std::vector<u32>& shard : shards) {
            Meeting meeting(static_cast<u32>(shard.size()));
            const ThreadsCommunicator communicator{&meeting};
            std::vector<std::unique_ptr<Model>> ranks;
            std::vector<Status> status(shard.size());
            std::vector<std::thread> threads;
            u32 first = 0;
            for (std::size_t r = 0; r < shard.size(); ++r) {
              std::vector<Layer> mine = layers;
              for (Layer& layer : mine) {
                layer.scores = {layer.scores.begin() + first,
                                layer.scores.begin() + first + shard[r]};
                layer.nominal.resize(shard[r]);
              }
              ranks.push_back(std::make_unique<Model>(mine, protection));
              Model* const model = ranks.back().get();  // the vector may move while threads run
              model->num_layers = 3;
              threads.emplace_back([&, model, r, first] {
                kvlean::ShardedAdaKVAllocator<ThreadsCommunicator> allocator;
                allocator.communicator = &communicator;
                allocator.first_head = first;
                allocator.all_heads = 8;
                allocator.across_layers = across;
                allocator.safeguard = safeguard;
                status[r] = model->run(allocator);
              });
              first += shard[r];
            }
            for (std::thread& thread : threads) thread.join();
            CAPTURE(pattern, ragged, across, safeguard, shard.size());
            first = 0;
            for (std::size_t r = 0; r < shard.size(); ++r) {
              CHECK(status[r] == expected);
              for (std::size_t l = 0; l < layers.size(); ++l) {
                const std::vector<u32> want(one.limits[l].begin() + first,
                                            one.limits[l].begin() + first + shard[r]);
                CHECK(ranks[r]->limits[l] == want);
              }
              first += shard[r];
            }
            // Histograms travel, not scores.
            CHECK(meeting.bytes <= shard.size() * (3 * 3 * 16384 + 24 * 5 * 8 + 8));
          }
        }
      }
    }
  }
}

TEST_CASE("a rank's bad scores fail on every rank", "[allocate][ranks]") {
  Meeting meeting(2);
  const ThreadsCommunicator communicator{&meeting};
  std::vector<Layer> layers = random_layers(3, 0, false);
  for (Layer& layer : layers) {
    layer.scores.resize(4);
    layer.nominal.resize(4);
  }
  Model good(layers), bad(layers);
  kvlean::ShardedAdaKVAllocator<ThreadsCommunicator> allocator;
  allocator.communicator = &communicator;
  allocator.all_heads = 8;
  Status good_status, bad_status;
  std::thread other([&good, &good_status, allocator] { good_status = good.run(allocator); });
  {
    auto views = bad.views();
    views[1].scores = nullptr;
    kvlean::Workspace workspace;
    kvlean::Context context{workspace, bad.options, 0, 3};
    allocator.first_head = 4;
    bad_status = allocator.allocate(views, context);
  }
  other.join();
  CHECK(bad_status == StatusCode::null_pointer);
  CHECK(good_status == StatusCode::invalid_option);
  CHECK(good.limits[0][0] == 36);
}
