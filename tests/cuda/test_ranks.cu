// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
// Ada-KV over heads that are sharded among ranks: every rank must decide what one rank with all
// heads decides. Ranks are host threads of this process: always over a communicator of the test's
// own, on one GPU or more; and over NCCL where there are two GPUs and this was built with
// KVLEAN_TEST_NCCL.
#include <atomic>
#include <barrier>
#include <mutex>
#include <thread>

#include "tests/cuda/select_cases.cuh"
#ifdef KVLEAN_TEST_NCCL
#include "kvlean/cuda/nccl_communicator.cuh"
#endif

using namespace cuda_test;
using kvlean::Budget;
using kvlean::cuda::HeadShard;
using kvlean::cuda::SelectOptions;

namespace {

/// Host memory in which threads add up arrays.
class Meeting {
 public:
  explicit Meeting(u32 ranks) : barrier_(ranks) {}
  template <class T>
  void sum(std::vector<T>& values) {
    {
      const std::scoped_lock lock(mutex_);
      if (sum_.size() < values.size()) sum_.resize(values.size(), 0);
      for (std::size_t i = 0; i < values.size(); ++i) sum_[i] += values[i];
    }
    barrier_.arrive_and_wait();
    for (std::size_t i = 0; i < values.size(); ++i) values[i] = static_cast<T>(sum_[i]);
    barrier_.arrive_and_wait();
    {
      const std::scoped_lock lock(mutex_);
      sum_.clear();
    }
    barrier_.arrive_and_wait();
  }

 private:
  std::barrier<> barrier_;
  std::mutex mutex_;
  std::vector<u64> sum_;
};

/// Copies to the host, adds there, copies back. Waits, so it can't be captured: for tests.
struct ThreadsCommunicator {
  Meeting* meeting;
  std::atomic<u64>* exchanged_bytes;

  template <class T>
  Status reduce(T* data, std::size_t count, cudaStream_t stream) const noexcept {
    std::vector<T> values(count);
    if (cudaStreamSynchronize(stream) != cudaSuccess ||
        cudaMemcpy(values.data(), data, count * sizeof(T), cudaMemcpyDeviceToHost) != cudaSuccess) {
      return StatusCode::exchange_failed;
    }
    meeting->sum(values);
    *exchanged_bytes += count * sizeof(T);
    // On the stream: a plain copy from pageable memory may return before the device has the bytes.
    return cudaMemcpyAsync(data, values.data(), count * sizeof(T), cudaMemcpyHostToDevice,
                           stream) == cudaSuccess &&
                   cudaStreamSynchronize(stream) == cudaSuccess
               ? StatusCode::ok
               : StatusCode::exchange_failed;
  }
  Status all_reduce_sum(u32* data, std::size_t count, cudaStream_t stream) const noexcept {
    return reduce(data, count, stream);
  }
  Status all_reduce_sum(u64* data, std::size_t count, cudaStream_t stream) const noexcept {
    return reduce(data, count, stream);
  }
};
static_assert(kvlean::cuda::Communicator<ThreadsCommunicator>);

/// One rank's plan.
struct RankResult {
  std::vector<u32> length;
  std::vector<u32> anchor;
  u64 slot_stride = 0;
  Status status;
  Status error;
};

/// Selects with the heads [first_head, + heads) of `whole` on device `gpu`.
template <class Communicator>
void run_rank(int gpu, const CacheSpec& whole, const TestScores& scores,
              const SelectOptions& options, u32 first_head, u32 heads,
              const Communicator& communicator, RankResult& result) {
  CUDA_REQUIRE(cudaSetDevice(gpu));
  CacheSpec spec = whole;
  spec.kv_heads = heads;
  if (whole.lengths.size() == std::size_t{whole.layers} * whole.sequences * whole.kv_heads) {
    spec.lengths.clear();
    for (std::size_t i = 0; i < whole.lengths.size(); ++i) {
      if (i % whole.kv_heads - first_head < heads) spec.lengths.push_back(whole.lengths[i]);
    }
  }
  TestCache cache(spec);
  std::vector<float> mine;
  for (u32 s = 0; s < whole.layers * whole.sequences * whole.kv_heads; ++s) {
    if (s % whole.kv_heads - first_head >= heads) continue;
    const float* from = scores.host.data() + s * scores.stride;
    mine.insert(mine.end(), from, from + scores.stride);
  }
  const DeviceArray<float> device_scores(mine);
  Device device(std::size_t{64} << 20);
  DevicePlan plan({.segments = cache.num_segments(), .max_slots = whole.tokens});
  CUDA_REQUIRE(cudaDeviceSynchronize());
  result.status = kvlean::cuda::select(cache.view(), {device_scores.data(), scores.stride, nullptr},
                                       options, device.context(), {plan.view}, communicator,
                                       HeadShard{first_head, whole.kv_heads});
  result.error = device.take_error();
  const HostPlan host(plan.view);
  result.length = host.length;
  result.anchor = host.anchor;
  result.slot_stride = host.view.slot_stride;
}

template <class MakeCommunicator>
void compare_ranks(const char* label, const CacheSpec& spec, Pattern pattern,
                   const SelectOptions& options, const std::vector<u32>& heads_of_rank,
                   MakeCommunicator&& make) {
  int gpus = 1;
  CUDA_REQUIRE(cudaGetDeviceCount(&gpus));
  CUDA_REQUIRE(cudaSetDevice(0));
  TestCache cache(spec);
  const TestScores scores(cache, pattern, 41);
  test_case("%s: %zu ranks, %s, %s, mode %d", label, heads_of_rank.size(), name_of(pattern),
            name_of(options.allocator), static_cast<int>(options.mode));
  Device device(std::size_t{64} << 20);
  check_selection(cache, scores, device, options);  // one rank against the CPU library
  DevicePlan plan({.segments = cache.num_segments(), .max_slots = spec.tokens});
  CHECK_OK(
      kvlean::cuda::select(cache.view(), scores.view(), options, device.context(), {plan.view}));
  const Status error = device.take_error();
  const HostPlan one(plan.view);

  const std::size_t ranks = heads_of_rank.size();
  std::vector<RankResult> results(ranks);
  std::vector<std::thread> threads;
  u32 first = 0;
  for (std::size_t r = 0; r < ranks; ++r) {
    threads.emplace_back([&, r, first] {
      const auto communicator = make(static_cast<u32>(r));
      run_rank(static_cast<int>(r) % gpus, spec, scores, options, first, heads_of_rank[r],
               communicator, results[r]);
    });
    first += heads_of_rank[r];
  }
  for (std::thread& thread : threads) thread.join();
  first = 0;
  for (std::size_t r = 0; r < ranks; ++r) {
    CHECK_OK(results[r].status);
    CHECK_STATUS(results[r].error, error);
    for (u32 s = 0; error.ok() && s < results[r].length.size(); ++s) {
      const u32 all = s / heads_of_rank[r] * spec.kv_heads + first + s % heads_of_rank[r];
      CHECK_THAT(results[r].length[s] == one.length[all],
                 "rank %zu segment %u: %u slots, expected %u", r, s, results[r].length[s],
                 one.length[all]);
      for (u32 j = 0; j < std::min(results[r].length[s], one.length[all]); ++j) {
        const u32 got = results[r].anchor[s * results[r].slot_stride + j];
        const u32 want = one.anchor[one.view.slot(all, j)];
        if (got == want) continue;
        CHECK_THAT(false, "rank %zu segment %u slot %u: %u, expected %u", r, s, j, got, want);
        break;
      }
    }
    first += heads_of_rank[r];
  }
}

template <class MakeMeeting>
void all_cases(const char* label, u32 most_ranks, bool quick, MakeMeeting&& make) {
  std::vector<std::vector<u32>> shards = {{4, 4}, {1, 7}};
  if (most_ranks > 2) shards.insert(shards.end(), {{2, 2, 2, 2}, {3, 1, 4}});
  for (const std::vector<u32>& shard : shards) {
    for (const Pattern pattern : {Pattern::few, Pattern::skewed, Pattern::some_nan}) {
      if (quick && pattern != Pattern::few) continue;
      for (const AllocatorKind allocator : {AllocatorKind::adakv, AllocatorKind::adakv_layers,
                                            AllocatorKind::pyramid_adakv, AllocatorKind::uniform}) {
        for (const kvlean::SafeguardMode mode :
             {kvlean::SafeguardMode::hard_floor, kvlean::SafeguardMode::exact_mix,
              kvlean::SafeguardMode::authors_mix}) {
          if (mode != kvlean::SafeguardMode::hard_floor && allocator != AllocatorKind::adakv) {
            continue;
          }
          SelectOptions options;
          options.allocator = allocator;
          options.mode = mode;
          options.budget = Budget::fraction(0.3);
          CacheSpec spec;
          spec.layers = 3;
          spec.sequences = 2;
          spec.kv_heads = 8;
          spec.tokens = quick ? 150 : 5000;
          spec.lengths = {quick ? 150u : 5000u, quick ? 77u : 1234u};
          spec.key_width = 8;
          spec.with_dtype(DType::f16);
          compare_ranks(label, spec, pattern, options, shard, make(static_cast<u32>(shard.size())));
          options.budget = Budget::slots(60);
          spec.lengths.clear();
          Random random(6);
          for (u32 s = 0; s < 3 * 2 * 8; ++s) spec.lengths.push_back(random.below(spec.tokens + 1));
          compare_ranks(label, spec, pattern, options, shard, make(static_cast<u32>(shard.size())));
        }
      }
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  const bool quick = parse_quick(argc, argv);
  std::vector<std::unique_ptr<Meeting>> meetings;
  std::atomic<u64> bytes = 0;
  all_cases("threads", 4, quick, [&](u32 ranks) {
    meetings.push_back(std::make_unique<Meeting>(ranks));
    Meeting* meeting = meetings.back().get();
    return [meeting, &bytes](u32) { return ThreadsCommunicator{meeting, &bytes}; };
  });
  std::printf("exchanged %.1f MB in all\n", static_cast<double>(bytes.load()) / 1e6);
  int gpus = 0;
  CUDA_REQUIRE(cudaGetDeviceCount(&gpus));
#ifdef KVLEAN_TEST_NCCL
  if (gpus >= 2) {
    ncclUniqueId id;
    if (ncclGetUniqueId(&id) != ncclSuccess) return 1;
    std::vector<ncclComm_t> communicators(2);
    if (ncclCommInitAll(communicators.data(), 2, nullptr) != ncclSuccess) {
      test_case("NCCL");
      CHECK_THAT(false, "ncclCommInitAll failed");
      return finish("test_ranks");
    }
    all_cases("NCCL", 2, quick, [&](u32) {
      return [&](u32 rank) { return kvlean::cuda::NcclCommunicator(communicators[rank]); };
    });
    for (ncclComm_t communicator : communicators) ncclCommDestroy(communicator);
    std::printf("NCCL on 2 GPUs: done\n");
  } else {
    std::printf("NCCL: left out, there is one GPU\n");
  }
#else
  std::printf("NCCL: left out of this build; %d GPUs\n", gpus);
#endif
  return finish("test_ranks");
}
