// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
// Selection: limits and sorted anchors from scores. Beside it the same in CUB: a segmented radix
// sort of (score, token) pairs, which is most of a top-k in sorted order.
#include <cub/device/device_segmented_radix_sort.cuh>

#include "tests/cuda/select_cases.cuh"

using namespace cuda_test;
using kvlean::Budget;
using kvlean::cuda::SelectOptions;

namespace {

/// Scores, plans and lengths of several buffer sets, more than L2 holds together.
struct Sets {
  u32 layers, heads, tokens;
  std::vector<DeviceArray<float>> scores;
  std::vector<std::unique_ptr<DevicePlan>> plans;
  DeviceArray<u32> lengths;
  DeviceArray<kvlean::cuda::Segment> segments;

  Sets(u32 num_layers, u32 num_heads, u32 num_tokens, u32 slots, bool beyond_cache)
      : layers(num_layers), heads(num_heads), tokens(num_tokens) {
    const u32 count = layers * heads;
    const std::size_t values = std::size_t{count} * tokens;
    const std::size_t bytes = values * 4 + std::size_t{count} * slots * 4;
    const std::size_t sets = beyond_cache ? std::max<std::size_t>(3, (128u << 20) / bytes + 1) : 1;
    Random random(11);
    std::vector<float> host(values);
    for (std::size_t i = 0; i < values; ++i) {
      host[i] = draw(Pattern::skewed, random, 0, 0) * (1.0f + static_cast<float>(i / tokens % 7));
    }
    for (std::size_t i = 0; i < sets; ++i) {
      scores.emplace_back(host);
      plans.push_back(std::make_unique<DevicePlan>(
          kvlean::cuda::PlanShape{.segments = count, .max_slots = slots}));
    }
    lengths.upload(std::vector<u32>(count, tokens));
    segments.upload(std::vector<kvlean::cuda::Segment>(count));
    CUDA_REQUIRE(cudaDeviceSynchronize());
  }
  int size() const { return static_cast<int>(scores.size()); }
  kvlean::cuda::CacheView view() const {
    kvlean::cuda::CacheView view;
    view.segments = segments.data();
    view.lengths = lengths.data();
    view.num_layers = layers;
    view.num_sequences = 1;
    view.kv_heads = heads;
    view.max_tokens = tokens;
    return view;
  }
};

void bench(const char* label, Sets& sets, SelectOptions options, double must_ms) {
  const kvlean::cuda::CacheView view = sets.view();
  const std::size_t bytes = kvlean::cuda::select_bytes_required(view, options);
  Device device(bytes);
  const auto work = [&](int run) {
    const std::size_t set = static_cast<std::size_t>(run % sets.size());
    device.workspace->rewind(0);
    const kvlean::cuda::DeviceRagged<const float> scores{sets.scores[set].data(), sets.tokens,
                                                         nullptr};
    CHECK_OK(
        kvlean::cuda::select(view, scores, options, device.context(), {sets.plans[set]->view}));
  };
  const double values = static_cast<double>(sets.layers) * sets.heads * sets.tokens;
  const double moved = values * 4 + values * 4 * options.budget.value();
  char name[128];
  std::snprintf(name, sizeof name, "%s, stream", label);
  bench_row(name, median_ms(device.stream, work), moved, must_ms);
  std::snprintf(name, sizeof name, "%s, graph", label);
  bench_row(name, median_graph_ms(device.stream, sets.size(), work), moved, must_ms);
  CHECK_OK(device.take_error());
}

__global__ void fill_tokens(u32* token, u32 tokens, u32 count) {
  const u32 i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count) token[i] = i % tokens;
}

void bench_cub(u32 heads, u32 tokens) {
  const std::size_t count = std::size_t{heads} * tokens;
  Random random(5);
  std::vector<float> host(count);
  for (float& value : host) value = draw(Pattern::skewed, random, 0, 0);
  std::vector<u32> offsets;
  for (u32 h = 0; h <= heads; ++h) offsets.push_back(h * tokens);
  const int sets = 10;
  std::vector<DeviceArray<float>> keys;
  for (int i = 0; i < sets; ++i) keys.emplace_back(host);
  const DeviceArray<float> sorted(count);
  const DeviceArray<u32> token(count), sorted_token(count), offset(offsets);
  Device device(4096);
  fill_tokens<<<static_cast<u32>(count / 256 + 1), 256>>>(token.data(), tokens,
                                                          static_cast<u32>(count));
  CUDA_REQUIRE(cudaDeviceSynchronize());
  std::size_t bytes = 0;
  const auto sort = [&](void* scratch, int set) {
    CUDA_REQUIRE(cub::DeviceSegmentedRadixSort::SortPairsDescending(
        scratch, bytes, keys[static_cast<std::size_t>(set)].data(), sorted.data(), token.data(),
        sorted_token.data(), static_cast<int>(count), static_cast<int>(heads), offset.data(),
        offset.data() + 1, 0, 32, device.stream));
  };
  sort(nullptr, 0);
  const DeviceArray<u8> scratch(bytes);
  CUDA_REQUIRE(cudaDeviceSynchronize());
  char name[128];
  std::snprintf(name, sizeof name, "reference: CUB segmented radix sort, %u x %u", heads, tokens);
  bench_row(name, median_ms(device.stream, [&](int run) { sort(scratch.data(), run % sets); }),
            static_cast<double>(count) * 16, 0);
}

}  // namespace

int main(int argc, char** argv) {
  static_cast<void>(parse_quick(argc, argv));
  bench_header("bench_select");
  SelectOptions uniform;
  uniform.budget = Budget::fraction(0.35);
  SelectOptions adakv = uniform;
  adakv.allocator = AllocatorKind::adakv;
  SelectOptions layers = uniform;
  layers.allocator = AllocatorKind::adakv_layers;
  SelectOptions pyramid = uniform;
  pyramid.allocator = AllocatorKind::pyramid;
  SelectOptions mixed = adakv;
  mixed.mode = kvlean::SafeguardMode::exact_mix;
  {
    Sets sets(1, 8, 131072, 131072, true);
    bench("uniform, 8 x 131072", sets, uniform, 0.08);
    bench("Ada-KV, 8 x 131072", sets, adakv, 0.08);
    bench("Ada-KV exact mix, 8 x 131072", sets, mixed, 0);
  }
  {
    Sets sets(1, 8, 131072, 131072, false);
    bench("uniform, 8 x 131072, scores in L2", sets, uniform, 0);
    bench("Ada-KV, 8 x 131072, scores in L2", sets, adakv, 0);
  }
  {
    Sets sets(1, 8, 32768, 32768, true);
    bench("Ada-KV, 8 x 32768", sets, adakv, 0);
  }
  {
    Sets sets(1, 8, 4096, 4096, true);
    bench("uniform, 8 x 4096", sets, uniform, 0);
    bench("Ada-KV, 8 x 4096", sets, adakv, 0);
  }
  {
    Sets sets(32, 8, 32768, 32768, true);
    bench("uniform, 32 x 8 x 32768", sets, uniform, 0);
    bench("Ada-KV, 32 x 8 x 32768", sets, adakv, 0);
    bench("Ada-KV across layers, 32 x 8 x 32768", sets, layers, 0);
    bench("PyramidKV, 32 x 8 x 32768", sets, pyramid, 0);
  }
  bench_cub(8, 131072);
  bench_cub(8, 4096);
  return finish("bench_select");
}
