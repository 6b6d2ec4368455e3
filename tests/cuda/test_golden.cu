// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
// The golden cases of tests/golden with the device in the place of the CPU's scorers, Ada-KV and
// eviction: the same tool over another Run. Reads tests/golden, or the folder it is given.
#include <cstdio>

#if __has_include(<nlohmann/json.hpp>)
#include <filesystem>
#include <kvlean/cuda/compress.cuh>

#include "tests/cuda/check.cuh"

#define Run CpuRun
#include "tests/golden/golden_run.hpp"
#undef Run

namespace kvlean::golden {

using cuda_test::Device;
using cuda_test::DeviceArray;

inline u64 device_calls = 0;

/// Run whose stages are the device's, where it has them.
class Run : public CpuRun {
 public:
  explicit Run(const CacheView& view, Protection protection = {0, 0})
      : CpuRun(view, protection),
        protection_(protection),
        keys_(rows_of(view.keys, view.segments, view.capacity)),
        lengths_(lengths_of(view)),
        rank_(std::size_t{view.segments} * view.capacity),
        mass_(rank_.size()) {
    cuda::CacheLayout layout;
    layout.keys = layout.values = cuda::TensorLayout::contiguous(
        keys_.data(), 1, view.segments, view.capacity, view.keys.width * 4);
    layout.kv_heads = view.segments;
    layout.capacity = view.capacity;
    std::vector<cuda::Segment> segments(view.segments);
    check(cuda::describe(layout, segments), "describe");
    segments_.upload(segments);
    cache_.segments = segments_.data();
    cache_.lengths = lengths_.data();
    cache_.num_layers = cache_.num_sequences = 1;
    cache_.kv_heads = view.segments;
    cache_.max_tokens = view.capacity;
    cache_.key_width = cache_.value_width = view.keys.width;
  }

  template <Scorer S>
  void score(const S& scorer, const Observation& seen) {
    CpuRun::score(scorer, seen);
    cuda::Observation observed;
    observed.attention.scale = seen.attention.scale;
    const Queries& queries = seen.window.count != 0 ? seen.window : seen.reference;
    DeviceArray<float> rows, given;
    if (queries.count != 0) {
      std::vector<float> host(std::size_t{queries.rows.heads} * queries.count * queries.rows.width);
      for (u32 h = 0; h < queries.rows.heads; ++h) {
        for (u32 i = 0; i < queries.count; ++i) {
          load_query(queries, h, i,
                     host.data() + (std::size_t{h} * queries.count + i) * queries.rows.width);
        }
      }
      rows.upload(host);
      cache_.group_size = queries.rows.heads / cache_.kv_heads;
      observed.window = observed.reference =
          cuda::Queries::contiguous(cache_, rows.data(), queries.count);
      observed.window.mask = observed.reference.mask = queries.mask;
      observed.window.first_position = observed.reference.first_position = queries.first_position;
    }
    if (seen.mass) {
      std::vector<float> host(rank_.size());
      for (u32 h = 0; h < cache_.kv_heads; ++h) {
        std::copy_n(seen.mass.segment(h), view().length(h), host.data() + first(h));
      }
      given.upload(host);
      observed.mass = {given.data(), cache_.max_tokens, nullptr};
      observed.observers = seen.observers;
    }
    device_.reset();
    const cuda::Scores scores{{rank_.data(), cache_.max_tokens}, {mass_.data(), cache_.max_tokens}};
    check(cuda::score(device_.context(), cache_, scorer, observed, scores), "scorer");
    check(device_.take_error(), "scorer");
    copy_back(rank_, [&](u32 h, u32 t) -> float& { return rank(h, t); });
    if constexpr (!std::same_as<S, KeyNormScorer> && !std::same_as<S, KeyDiffScorer> &&
                  !std::same_as<S, StreamingLLMScorer>) {
      copy_back(mass_, [&](u32 h, u32 t) -> float& { return mass(h, t); });
    }
    ++device_calls;
  }
  /// The device keeps a slot in every head, and what is protected. The authors' rounding is
  /// compared without either.
  template <Allocator A>
  void allocate(const A& allocator, u32 nominal) {
    if constexpr (requires { allocator.mode; }) {
      if (allocator.mode != SafeguardMode::hard_floor) return CpuRun::allocate(allocator, nominal);
    }
    cuda::SelectOptions options;
    cuda::detail::set_allocator(allocator, options);
    options.budget = Budget::slots(nominal);
    options.protection = {0, 0};
    send_ranks();
    device_.reset();
    DeviceArray<u32> limit(cache_.kv_heads);
    check(cuda::allocate(cache_, given_ranks(), options, device_.context(), limit.data()),
          "allocator");
    check(device_.take_error(), "allocator");
    limits() = limit.download();
    ++device_calls;
  }
  template <Reducer R>
  void reduce(const R& reducer) {
    if constexpr (!std::same_as<R, EvictReducer>) {
      CpuRun::reduce(reducer);
    } else {
      cuda::SelectOptions options;
      options.protection = protection_;
      options.recent_share = reducer.recent_share;
      send_ranks();
      device_.reset();
      DeviceArray<u32> limit(limits());
      const cuda_test::DevicePlan made(
          {.segments = cache_.kv_heads, .max_slots = cache_.max_tokens});
      cuda::Selection selection;
      selection.plan = made.view;
      check(cuda::select_kept(cache_, given_ranks(), limit.data(), options, device_.context(),
                              selection),
            "reducer");
      check(device_.take_error(), "reducer");
      const cuda_test::HostPlan got(made.view);
      length_ = got.length;
      first_.assign(1, 0);
      anchor_.clear();
      for (u32 s = 0; s < cache_.kv_heads; ++s) {
        for (u32 j = 0; j < length_[s]; ++j) anchor_.push_back(got.anchor[got.view.slot(s, j)]);
        first_.push_back(anchor_.size());
      }
      plan = CompressionPlan{};
      plan.segments = cache_.kv_heads;
      for (const u32 length : length_) {
        if (length != length_[0]) plan.needs = needs_ragged_lengths;
      }
      plan.length = length_.data();
      plan.first = first_.data();
      plan.anchor = anchor_.data();
      ++device_calls;
    }
  }

 private:
  [[nodiscard]] static std::vector<float> rows_of(const Rows& rows, u32 heads, u32 tokens) {
    std::vector<float> host(std::size_t{heads} * tokens * rows.width);
    for (u32 h = 0; h < heads; ++h) {
      for (u32 t = 0; t < tokens; ++t) {
        load_row(rows, h, t, host.data() + (std::size_t{h} * tokens + t) * rows.width);
      }
    }
    return host;
  }
  [[nodiscard]] static std::vector<u32> lengths_of(const CacheView& view) {
    std::vector<u32> lengths;
    for (u32 s = 0; s < view.segments; ++s) lengths.push_back(view.length(s));
    return lengths;
  }
  [[nodiscard]] std::size_t first(u32 head) const { return std::size_t{head} * cache_.max_tokens; }
  [[nodiscard]] cuda::DeviceRagged<const float> given_ranks() const {
    return {rank_.data(), cache_.max_tokens, nullptr};
  }
  template <class At>
  void copy_back(const DeviceArray<float>& from, At&& at) {
    const std::vector<float> host = from.download();
    for (u32 h = 0; h < cache_.kv_heads; ++h) {
      for (u32 t = 0; t < view().length(h); ++t) at(h, t) = host[first(h) + t];
    }
  }
  /// The ranks as the case has edited them.
  void send_ranks() {
    std::vector<float> host(rank_.size());
    for (u32 h = 0; h < cache_.kv_heads; ++h) {
      for (u32 t = 0; t < view().length(h); ++t) host[first(h) + t] = rank(h, t);
    }
    rank_.upload(host);
  }

  Protection protection_;
  Device device_{std::size_t{16} << 20};
  cuda::CacheView cache_;
  DeviceArray<float> keys_;
  DeviceArray<u32> lengths_;
  DeviceArray<float> rank_, mass_;
  DeviceArray<cuda::Segment> segments_;
  std::vector<u32> length_, anchor_;
  std::vector<u64> first_;
};

}  // namespace kvlean::golden

#define main golden_main
#include "tests/golden/kvlean_golden.cpp"
#undef main
#include "tests/golden/kvlean_golden_authors.cpp"
#include "tests/golden/kvlean_golden_budgets.cpp"
#include "tests/golden/kvlean_golden_case.cpp"
#include "tests/golden/kvlean_golden_merging.cpp"
#include "tests/golden/kvlean_golden_scores.cpp"

int main(int argc, char** argv) {
  if (cuda_test::parse_quick(argc, argv)) {
    std::printf("SKIP the golden cases have one size\n");
    return 77;
  }
  std::string folder = argc > 1 ? argv[1] : "tests/golden";
  if (!std::filesystem::exists(folder)) {
    std::printf("SKIP there is no folder %s\n", folder.c_str());
    return 77;
  }
  std::string name = "kvlean-golden";
  char* arguments[] = {name.data(), folder.data(), nullptr};
  const int code = golden_main(2, arguments);
  std::printf("%s test_golden: %llu calls on the device\n", code == 0 ? "PASS" : "FAIL",
              static_cast<unsigned long long>(kvlean::golden::device_calls));
  return code;
}
#else
int main() {
  std::printf("SKIP built without nlohmann/json\n");
  return 77;
}
#endif
