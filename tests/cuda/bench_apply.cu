// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
// Moving rows and decoding, one Llama-3.1-8B layer (32 query heads, 8 KV heads, width 128) in bf16.
#include <kvlean/cuda/apply.cuh>
#include <kvlean/cuda/attend.cuh>
#include <kvlean/cuda/ragged_store.cuh>

#include "tests/cuda/check.cuh"

namespace {

using namespace cuda_test;
namespace gpu = kvlean::cuda;

constexpr u32 kv_heads = 8;
constexpr u32 group = 4;
constexpr u32 width = 128;
constexpr std::size_t row_bytes = width * 2;

/// Copies of a layer, each of 8 segments with room for `capacity` tokens.
struct Layers {
  u32 capacity;
  int copies;
  DeviceArray<u8> keys, values;
  DeviceArray<gpu::Segment> segments;
  DeviceArray<u32> lengths;
  DeviceArray<float> log_mass;

  Layers(u32 capacity_in, int copies_in, const std::vector<u32>& lengths_in)
      : capacity(capacity_in),
        copies(copies_in),
        keys(kv_heads * row_bytes * capacity_in * static_cast<std::size_t>(copies_in)),
        values(kv_heads * row_bytes * capacity_in * static_cast<std::size_t>(copies_in)),
        log_mass(std::vector<float>(std::size_t{kv_heads} * capacity_in, 0.5f)) {
    keys.fill_bytes(0x3c);
    values.fill_bytes(0x3d);
    std::vector<gpu::Segment> all;
    std::vector<u32> all_lengths;
    for (int c = 0; c < copies; ++c) {
      const std::size_t offset = static_cast<std::size_t>(c) * kv_heads * capacity * row_bytes;
      gpu::CacheLayout layout;
      layout.keys =
          gpu::TensorLayout::contiguous(keys.data() + offset, 1, kv_heads, capacity, row_bytes);
      layout.values =
          gpu::TensorLayout::contiguous(values.data() + offset, 1, kv_heads, capacity, row_bytes);
      layout.kv_heads = kv_heads;
      layout.capacity = capacity;
      layout.log_mass = log_mass.data();
      layout.slot_stride = capacity;
      std::vector<gpu::Segment> some(kv_heads);
      CHECK_OK(gpu::describe(layout, some));
      all.insert(all.end(), some.begin(), some.end());
      all_lengths.insert(all_lengths.end(), lengths_in.begin(), lengths_in.end());
    }
    segments.upload(all);
    lengths.upload(all_lengths);
    CUDA_REQUIRE(cudaDeviceSynchronize());
  }
  gpu::CacheView view(int copy) const {
    gpu::CacheView cache;
    cache.segments = segments.data() + static_cast<u32>(copy % copies) * kv_heads;
    cache.lengths = lengths.data() + static_cast<u32>(copy % copies) * kv_heads;
    cache.num_layers = cache.num_sequences = 1;
    cache.kv_heads = kv_heads;
    cache.group_size = group;
    cache.max_tokens = capacity;
    cache.key_width = cache.value_width = width;
    cache.key_dtype = cache.value_dtype = DType::bf16;
    cache.has_log_mass = true;
    return cache;
  }
};

void move_rows(Device& device, u32 tokens, u32 percent) {
  const int copies = 2;
  Layers source(tokens, copies, std::vector<u32>(kv_heads, tokens));
  const u32 kept = static_cast<u32>(u64{tokens} * percent / 100);
  Layers target(kept, copies, std::vector<u32>(kv_heads, kept));
  gpu::PlanShape shape;
  shape.segments = kv_heads;
  shape.max_slots = kept;
  DevicePlan plan(shape);
  std::vector<u32> anchors(kv_heads * plan.view.slot_stride);
  Random random(1);
  for (u32 s = 0; s < kv_heads; ++s) {
    u32 left = kept;
    u32 j = 0;
    for (u32 t = 0; t < tokens; ++t) {
      if (random.below(tokens - t) < left) {
        anchors[s * plan.view.slot_stride + j++] = t;
        --left;
      }
    }
  }
  CUDA_REQUIRE(
      cudaMemcpy(plan.view.anchor, anchors.data(), anchors.size() * 4, cudaMemcpyHostToDevice));
  const std::vector<u32> lengths(kv_heads, kept);
  CUDA_REQUIRE(cudaMemcpy(plan.view.length, lengths.data(), kv_heads * 4, cudaMemcpyHostToDevice));
  const double bytes = 4.0 * kv_heads * kept * row_bytes;
  const std::string text =
      std::to_string(tokens) + " tokens, keep " + std::to_string(percent) + " %";
  double ms = median_graph_ms(device.stream, copies, [&](int copy) {
    CHECK_OK(gpu::apply(device.context(), plan.view, source.view(copy), target.view(copy)));
  });
  bench_row(("gather, " + text).c_str(), ms, bytes,
            percent == 35 ? bytes / (copy_rate() * 1e6) / 0.75 : 0.0);
  ms = median_graph_ms(device.stream, copies, [&](int copy) {
    CHECK_OK(gpu::apply_in_place(device.context(), plan.view, source.view(copy)));
  });
  bench_row(("in place, " + text).c_str(), ms, bytes, 0.0);
}

void decode(Device& device, u32 full, bool skewed, double must) {
  // 35 % of `full` tokens a head on average.
  const u32 mean = full * 35 / 100;
  std::vector<u32> lengths(kv_heads, mean);
  if (skewed) {
    const u32 small = static_cast<u32>(u64{mean} * kv_heads / (kv_heads + 7));
    lengths.assign(kv_heads, small);
    lengths[3] = mean * kv_heads - small * (kv_heads - 1);
  }
  const u32 capacity = *std::max_element(lengths.begin(), lengths.end());
  Layers layers(capacity, 4, lengths);
  DeviceArray<u8> queries(std::size_t{kv_heads} * group * row_bytes);
  queries.fill_bytes(0x3b);
  DeviceArray<float> values(std::size_t{kv_heads} * group * width), lse(kv_heads * group);
  const double ms = median_graph_ms(device.stream, layers.copies, [&](int copy) {
    const gpu::CacheView cache = layers.view(copy);
    CHECK_OK(gpu::attend(device.context(), cache,
                         gpu::Queries::contiguous(cache, queries.data(), 1), {}, values.data(),
                         lse.data()));
  });
  const double bytes = 2.0 * kv_heads * mean * row_bytes;
  bench_row(("decode, log mass, 35 % of " + std::to_string(full) + (skewed ? ", one head 8x" : ""))
                .c_str(),
            ms, bytes, must);
}

}  // namespace

int main(int argc, char** argv) {
  const bool quick = parse_quick(argc, argv);
  bench_header("bench_apply");
  Device device(std::size_t{256} << 20);
  const u32 tokens = quick ? 4096 : 131072;
  for (const u32 percent : {10u, 35u, 50u}) move_rows(device, tokens, percent);
  if (!quick) move_rows(device, 4096, 35);
  decode(device, tokens, false, quick ? 0.0 : 0.060);
  decode(device, tokens, true, quick ? 0.0 : 0.060 * 1.1);
  if (!quick) decode(device, 32768, false, 0.0);
  {
    Layers layers(tokens, 1, std::vector<u32>(kv_heads, 100));
    DeviceArray<u8> rows(kv_heads * row_bytes);
    rows.fill_bytes(0x3b);
    const double ms = median_ms(device.stream, [&](int) {
      CHECK_OK(gpu::append(device.context(), layers.view(0), rows.data(), rows.data(), row_bytes,
                           row_bytes, 1));
    });
    bench_row("append one token a head", ms, 4.0 * kv_heads * row_bytes, 0.0);
  }
  return finish("bench_apply");
}
