// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
// Scoring one Llama-3.1-8B layer (32 query heads, 8 KV heads, width 128) in bf16.
#include <kvlean/cuda/score_attention.cuh>

#include "tests/cuda/check.cuh"

namespace {

using namespace cuda_test;
namespace gpu = kvlean::cuda;

constexpr u32 kv_heads = 8;
constexpr u32 group = 4;
constexpr u32 width = 128;

__global__ void fill_kernel(uint4* to, std::size_t count, u32 seed) {
  for (std::size_t i = blockIdx.x * std::size_t{blockDim.x} + threadIdx.x; i < count;
       i += std::size_t{gridDim.x} * blockDim.x) {
    u32 x = static_cast<u32>(i) * 2654435761u + seed;
    const auto word = [&x] {
      x ^= x << 13;
      x ^= x >> 17;
      x ^= x << 5;
      // bf16 in +-[0.5, 2): random sign, last exponent bit and mantissa.
      return (x & 0x80ff80ffu) | 0x3f003f00u;
    };
    to[i] = make_uint4(word(), word(), word(), word());
  }
}

/// One layer's keys in several copies, so that none stays in L2, and its queries.
struct Layer {
  u32 tokens;
  int copies;
  DeviceArray<u8> keys, queries;
  DeviceArray<gpu::Segment> segments;
  DeviceArray<u32> lengths;
  DeviceArray<float> lse, rank, mass;

  Layer(u32 tokens_in, u32 query_count, int copies_in)
      : tokens(tokens_in),
        copies(copies_in),
        keys(std::size_t{kv_heads} * tokens_in * width * 2 * static_cast<std::size_t>(copies_in)),
        queries(std::size_t{kv_heads} * group * query_count * width * 2),
        lse(std::vector<float>(std::size_t{kv_heads} * group * query_count, 8.0f)),
        rank(std::size_t{kv_heads} * tokens_in),
        mass(std::size_t{kv_heads} * tokens_in) {
    fill_kernel<<<1024, 256>>>(reinterpret_cast<uint4*>(keys.data()), keys.bytes() / 16, 1);
    fill_kernel<<<256, 256>>>(reinterpret_cast<uint4*>(queries.data()), queries.bytes() / 16, 7);
    std::vector<gpu::Segment> all;
    for (int c = 0; c < copies; ++c) {
      gpu::CacheLayout layout;
      layout.keys = layout.values = gpu::TensorLayout::contiguous(
          keys.data() + static_cast<std::size_t>(c) * kv_heads * tokens * width * 2, 1, kv_heads,
          tokens, width * 2);
      layout.kv_heads = kv_heads;
      layout.capacity = tokens;
      std::vector<gpu::Segment> some(kv_heads);
      CHECK_OK(gpu::describe(layout, some));
      all.insert(all.end(), some.begin(), some.end());
    }
    segments.upload(all);
    lengths.upload(std::vector<u32>(kv_heads * static_cast<u32>(copies), tokens));
    CUDA_REQUIRE(cudaDeviceSynchronize());
  }
  gpu::CacheView view(int copy) const {
    gpu::CacheView cache;
    cache.segments = segments.data() + static_cast<u32>(copy % copies) * kv_heads;
    cache.lengths = lengths.data();
    cache.num_layers = cache.num_sequences = 1;
    cache.kv_heads = kv_heads;
    cache.group_size = group;
    cache.max_tokens = tokens;
    cache.key_width = cache.value_width = width;
    cache.key_dtype = cache.value_dtype = DType::bf16;
    return cache;
  }
};

template <class Scorer>
void row(Device& device, const Layer& layer, const std::string& name, const Scorer& scorer,
         u32 queries, bool window, bool lse, double reads_of_keys, double must) {
  gpu::Observation seen;
  gpu::Queries q = gpu::Queries::contiguous(layer.view(0), layer.queries.data(), queries);
  if (lse) q.lse = layer.lse.data();
  (window ? seen.window : seen.reference) = q;
  const gpu::Scores scores{{layer.rank.data(), layer.tokens}, {layer.mass.data(), layer.tokens}};
  const double ms = median_graph_ms(device.stream, layer.copies, [&](int copy) {
    CHECK_OK(gpu::score(device.context(), layer.view(copy), scorer, seen, scores));
  });
  const double bytes =
      reads_of_keys * kv_heads * layer.tokens * width * 2.0 + double(kv_heads) * layer.tokens * 4.0;
  bench_row(name.c_str(), ms, bytes, must);
}

}  // namespace

int main(int argc, char** argv) {
  const bool quick = parse_quick(argc, argv);
  bench_header("bench_score");
  Device device(std::size_t{512} << 20);
  for (const u32 tokens : quick ? std::vector<u32>{4096} : std::vector<u32>{4096, 32768, 131072}) {
    const int copies = tokens >= 131072 ? 2 : tokens >= 32768 ? 4 : 32;
    const Layer layer(tokens, 32, copies);
    const bool full = tokens == 131072;
    const auto name = [&](const char* what) {
      return std::string(what) + ", " + std::to_string(tokens) + " tokens";
    };
    row(device, layer, name("SnapKV scoring, w = 32, LSE given"), kvlean::SnapKVScorer{}, 32, true,
        true, 1.0, full ? 0.20 : 0.0);
    row(device, layer, name("SnapKV scoring, w = 32"), kvlean::SnapKVScorer{}, 32, true, false, 1.0,
        full ? 0.30 : 0.0);
    row(device, layer, name("SnapKV scoring, max pooling over 31"),
        kvlean::SnapKVScorer{.kernel = 31, .pooling = kvlean::Pooling::max}, 32, true, false, 1.0,
        0.0);
    row(device, layer, name("TOVA scoring"), kvlean::TOVAScorer{}, 32, true, false, 1.0, 0.0);
    row(device, layer, name("key norm scoring"), kvlean::KeyNormScorer{}, 32, true, false, 1.0,
        0.0);
    row(device, layer, name("KeyDiff scoring"), kvlean::KeyDiffScorer{}, 32, true, false, 2.0, 0.0);
  }
  for (const u32 tokens : quick ? std::vector<u32>{1024} : std::vector<u32>{4096, 32768}) {
    const Layer layer(tokens, tokens, 1);
    const bool full = tokens == 32768;
    const auto name = [&](const char* what) {
      return std::string(what) + ", prefill of " + std::to_string(tokens);
    };
    row(device, layer, name("H2O sums, LSE given"), kvlean::H2OScorer{}, tokens, false, true, 1.0,
        full ? 12.0 : 0.0);
    row(device, layer, name("H2O sums"), kvlean::H2OScorer{}, tokens, false, false, 1.0,
        full ? 20.0 : 0.0);
  }
  return finish("bench_score");
}
