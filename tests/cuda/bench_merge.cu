// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
// Planning of the merging reducers, from scores to a plan with weights.
#include "kvlean/cuda/cam.cuh"
#include "kvlean/cuda/d2o.cuh"
#include "kvlean/cuda/kvmerger.cuh"
#include "kvlean/cuda/massfold.cuh"
#include "tests/cuda/select_cases.cuh"

using namespace cuda_test;
using kvlean::KVMergerForm;
using kvlean::KVMergerReducer;
using kvlean::cuda::SelectOptions;

namespace {

__global__ void fill_keys(uint4* rows, u32 row_16, u64 count) {
  // bf16 keys that drift: a part each token shares with its 8 neighbours, and a part of its own.
  for (u64 i = blockIdx.x * u64{blockDim.x} + threadIdx.x; i < count; i += gridDim.x * blockDim.x) {
    const u32 token = static_cast<u32>(i / row_16);
    const u32 place = static_cast<u32>(i % row_16);
    u32 words[4];
    for (u32 w = 0; w < 4; ++w) {
      const auto hash = [](u32 x) {
        x = (x ^ x >> 16) * 0x7feb352du;
        x = (x ^ x >> 15) * 0x846ca68bu;
        return x ^ x >> 16;
      };
      const u32 common = hash(token / 8 * 977 + place * 4 + w);
      const u32 own = hash(token * 7919 + place * 4 + w + 1);
      u32 word = 0;
      for (u32 h = 0; h < 2; ++h) {
        const float x = static_cast<float>(common >> (16 * h) & 255u) / 128.0f - 1.0f +
                        0.6f * (static_cast<float>(own >> (16 * h) & 255u) / 128.0f - 1.0f);
        word |= (__float_as_uint(x) >> 16) << (16 * h);
      }
      words[w] = word;
    }
    rows[i] = uint4{words[0], words[1], words[2], words[3]};
  }
}

/// Caches of several buffer sets.
struct Sets {
  u32 layers, heads, tokens, width;
  std::vector<DeviceArray<u8>> keys;
  std::vector<DeviceArray<float>> scores;
  std::vector<DeviceArray<kvlean::cuda::Segment>> segments;
  DeviceArray<u32> lengths, limit;

  Sets(u32 num_layers, u32 num_heads, u32 num_tokens, u32 key_width, double kept)
      : layers(num_layers), heads(num_heads), tokens(num_tokens), width(key_width) {
    const u32 count = layers * heads;
    const std::size_t row_bytes = std::size_t{width} * 2;
    const std::size_t bytes = std::size_t{count} * tokens * row_bytes;
    const std::size_t sets =
        bytes > (std::size_t{2} << 30) ? 1 : (std::size_t{192} << 20) / bytes + 2;
    Random random(11);
    std::vector<float> host(std::size_t{count} * tokens);
    for (float& value : host) value = draw(Pattern::skewed, random, 0, 0);
    for (std::size_t i = 0; i < sets; ++i) {
      keys.emplace_back(bytes);
      CUDA_REQUIRE(cudaDeviceSynchronize());
      fill_keys<<<1024, 256>>>(reinterpret_cast<uint4*>(keys.back().data()),
                               static_cast<u32>(row_bytes / 16), bytes / 16);
      scores.emplace_back(host);
      kvlean::cuda::CacheLayout layout;
      layout.keys = layout.values = kvlean::cuda::TensorLayout::contiguous(
          keys.back().data(), 1, heads, tokens, static_cast<u32>(row_bytes));
      layout.num_layers = layers;
      layout.kv_heads = heads;
      layout.capacity = tokens;
      std::vector<kvlean::cuda::Segment> described(count);
      CHECK_OK(kvlean::cuda::describe(layout, described));
      segments.emplace_back(described);
    }
    lengths.upload(std::vector<u32>(count, tokens));
    limit.upload(std::vector<u32>(count, static_cast<u32>(kept * tokens)));
    CUDA_REQUIRE(cudaDeviceSynchronize());
  }
  int size() const { return static_cast<int>(keys.size()); }
  kvlean::cuda::CacheView view(std::size_t set) const {
    kvlean::cuda::CacheView view;
    view.segments = segments[set].data();
    view.lengths = lengths.data();
    view.num_layers = layers;
    view.num_sequences = 1;
    view.kv_heads = heads;
    view.max_tokens = tokens;
    view.key_width = view.value_width = width;
    view.key_dtype = view.value_dtype = DType::bf16;
    return view;
  }
};

template <class Reducer>
void bench(const char* label, Sets& sets, const Reducer& reducer, double must_ms) {
  const SelectOptions options;
  const kvlean::cuda::CacheView first = sets.view(0);
  Device device(kvlean::cuda::bytes_required(first, reducer, options));
  std::vector<std::unique_ptr<DevicePlan>> plans;
  for (int i = 0; i < sets.size(); ++i) {
    plans.push_back(
        std::make_unique<DevicePlan>(kvlean::cuda::plan_shape(first, reducer, sets.tokens)));
  }
  CUDA_REQUIRE(cudaDeviceSynchronize());
  const auto work = [&](int run) {
    const std::size_t set = static_cast<std::size_t>(run % sets.size());
    device.workspace->rewind(0);
    kvlean::cuda::MergeScores scores;
    scores.rank = scores.mass = {sets.scores[set].data(), sets.tokens, nullptr};
    CHECK_OK(kvlean::cuda::reduce(device.context(), sets.view(set), reducer, scores,
                                  sets.limit.data(), options, plans[set]->view));
  };
  // Fewest bytes: keys and scores once, terms (token, weight) of all tokens.
  const double moved =
      static_cast<double>(sets.layers) * sets.heads * sets.tokens * (sets.width * 2.0 + 4.0 + 8.0);
  char name[128];
  std::snprintf(name, sizeof name, "%s, stream", label);
  bench_row(name, median_ms(device.stream, work), moved, must_ms);
  std::snprintf(name, sizeof name, "%s, graph", label);
  bench_row(name, median_graph_ms(device.stream, sets.size(), work), moved, must_ms);
  CHECK_OK(device.take_error());
  const HostPlan host(plans[0]->view);
  u64 slots = 0;
  for (const u32 length : host.length) slots += length;
  std::printf("  %.1f%% of the tokens stay as slots, %u slots of segment 0 were evicted\n",
              100.0 * static_cast<double>(slots) /
                  (static_cast<double>(sets.layers) * sets.heads * sets.tokens),
              host.slots_evicted.empty() ? 0u : host.slots_evicted[0]);
}

}  // namespace

int main(int argc, char** argv) {
  static_cast<void>(parse_quick(argc, argv));
  bench_header("bench_merge");
  KVMergerReducer slots;
  KVMergerReducer threshold;
  threshold.form = KVMergerForm::threshold;
  KVMergerReducer bare;
  bare.recent_tokens = bare.heavy_tokens = 0;
  {
    Sets sets(1, 8, 131072, 128, 0.35);
    bench("KVMerger slots, 8 x 131072, d 128", sets, slots, 0.25);
    bench("KVMerger threshold 0.75, 8 x 131072, d 128", sets, threshold, 0.25);
    bench("KVMerger slots, nothing soft protected, 8 x 131072", sets, bare, 0);
    bench("CaM, 32 receivers, 8 x 131072", sets, kvlean::CaMReducer{}, 0);
    bench("MassFold, 8 x 131072, d 128", sets, kvlean::MassFoldReducer{}, 0);
  }
  {
    Sets sets(1, 8, 4096, 128, 0.35);
    bench("KVMerger slots, 8 x 4096, d 128", sets, slots, 0);
    bench("CaM, 32 receivers, 8 x 4096", sets, kvlean::CaMReducer{}, 0);
    bench("MassFold, 8 x 4096, d 128", sets, kvlean::MassFoldReducer{}, 0);
  }
  {
    Sets sets(1, 8, 16384, 128, 0.35);
    bench("MassFold, 8 x 16384, d 128", sets, kvlean::MassFoldReducer{}, 0);
    bench("D2O, 8 x 16384, d 128", sets, kvlean::D2OReducer{}, 0);
  }
  {
    Sets sets(1, 8, 16384, 136, 0.35);
    bench("MassFold by plain arithmetic, 8 x 16384, d 136", sets, kvlean::MassFoldReducer{}, 0);
  }
  {
    Sets sets(32, 8, 32768, 128, 0.35);
    bench("KVMerger slots, 32 x 8 x 32768, d 128", sets, slots, 0);
  }
  return finish("bench_merge");
}
