// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
// Whole compressions of Llama-3.1-8B layers (32 query heads, 8 KV heads, width 128) in bf16, 35 %
// kept, each one call captured in a graph.
#include <kvlean/cuda/compress.cuh>
#include <kvlean/cuda/kvmerger.cuh>

#include "tests/cuda/check.cuh"

namespace {

using namespace cuda_test;
namespace gpu = kvlean::cuda;

constexpr u32 kv_heads = 8;
constexpr u32 group = 4;
constexpr u32 width = 128;
constexpr std::size_t row_bytes = width * 2;
constexpr u32 window = 32;
constexpr double kept = 0.35;

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
__global__ void fill_mass_kernel(float* to, std::size_t count) {
  for (std::size_t i = blockIdx.x * std::size_t{blockDim.x} + threadIdx.x; i < count;
       i += std::size_t{gridDim.x} * blockDim.x) {
    u32 x = static_cast<u32>(i) * 2654435761u + 12345u;
    x ^= x >> 16;
    x *= 0x7feb352du;
    x ^= x >> 15;
    const float u = static_cast<float>(x >> 8) * 0x1p-24f;
    to[i] = __expf(6.0f * u * u);
  }
}

/// `copies` caches of `layers` layers each, room for what stays of them, and what was seen.
struct Layers {
  u32 layers, tokens;
  int copies;
  DeviceArray<u8> keys, values, kept_keys, kept_values, queries;
  DeviceArray<float> lse, mass;
  DeviceArray<gpu::Segment> segments, kept_segments;
  DeviceArray<u32> lengths, full_lengths, kept_lengths;
  u64 slots;

  Layers(u32 layers_in, u32 tokens_in, int copies_in)
      : layers(layers_in),
        tokens(tokens_in),
        copies(copies_in),
        keys(rows() * row_bytes * static_cast<std::size_t>(copies_in)),
        values(rows() * row_bytes * static_cast<std::size_t>(copies_in)),
        queries(std::size_t{layers} * kv_heads * group * window * row_bytes),
        lse(std::vector<float>(std::size_t{layers} * kv_heads * group * window, 8.0f)),
        mass(rows()),
        slots(static_cast<u64>(0.36 * static_cast<double>(rows()))) {
    kept_keys.allocate(slots * row_bytes * static_cast<std::size_t>(copies));
    kept_values.allocate(slots * row_bytes * static_cast<std::size_t>(copies));
    fill_kernel<<<2048, 256>>>(reinterpret_cast<uint4*>(keys.data()), keys.bytes() / 16, 1);
    fill_kernel<<<2048, 256>>>(reinterpret_cast<uint4*>(values.data()), values.bytes() / 16, 5);
    fill_kernel<<<256, 256>>>(reinterpret_cast<uint4*>(queries.data()), queries.bytes() / 16, 7);
    fill_mass_kernel<<<512, 256>>>(mass.data(), rows());
    std::vector<gpu::Segment> all;
    for (int c = 0; c < copies; ++c) {
      const std::size_t first = static_cast<std::size_t>(c) * rows() * row_bytes;
      gpu::CacheLayout layout;
      layout.keys =
          gpu::TensorLayout::contiguous(keys.data() + first, 1, kv_heads, tokens, row_bytes);
      layout.values =
          gpu::TensorLayout::contiguous(values.data() + first, 1, kv_heads, tokens, row_bytes);
      layout.num_layers = layers;
      layout.kv_heads = kv_heads;
      layout.capacity = tokens;
      std::vector<gpu::Segment> some(std::size_t{layers} * kv_heads);
      CHECK_OK(gpu::describe(layout, some));
      all.insert(all.end(), some.begin(), some.end());
    }
    segments.upload(all);
    kept_segments.allocate(all.size());
    kept_lengths.allocate(all.size());
    full_lengths.upload(std::vector<u32>(all.size(), tokens));
    lengths.upload(std::vector<u32>(all.size(), tokens));
    CUDA_REQUIRE(cudaDeviceSynchronize());
  }
  std::size_t rows() const { return std::size_t{layers} * kv_heads * tokens; }
  u32 first_of(int copy) const { return static_cast<u32>(copy % copies) * layers * kv_heads; }
  gpu::CacheView view(int copy) const {
    gpu::CacheView cache;
    cache.segments = segments.data() + first_of(copy);
    cache.lengths = lengths.data() + first_of(copy);
    cache.num_layers = layers;
    cache.num_sequences = 1;
    cache.kv_heads = kv_heads;
    cache.group_size = group;
    cache.max_tokens = tokens;
    cache.key_width = cache.value_width = width;
    cache.key_dtype = cache.value_dtype = DType::bf16;
    return cache;
  }
  gpu::PackedDestination packed(int copy) const {
    gpu::PackedDestination to;
    to.view = view(copy);
    to.view.segments = kept_segments.data() + first_of(copy);
    to.view.lengths = kept_lengths.data() + first_of(copy);
    const std::size_t first = static_cast<std::size_t>(copy % copies) * slots * row_bytes;
    to.pool.keys = kept_keys.data() + first;
    to.pool.values = kept_values.data() + first;
    to.pool.slots = slots;
    return to;
  }
  gpu::Observation seen(bool with_lse) const {
    gpu::Observation seen;
    seen.window = gpu::Queries::contiguous(view(0), queries.data(), window);
    if (with_lse) seen.window.lse = lse.data();
    seen.mass = {mass.data(), tokens, nullptr};
    return seen;
  }
  /// Keys read `times` times, kept rows read and written, in bytes.
  double bytes(double times) const {
    return static_cast<double>(rows()) * row_bytes * (times + 4.0 * kept);
  }
};

/// Kernels and other nodes of a call, as a graph has them.
template <class Capture>
std::size_t count_nodes(cudaStream_t stream, Capture&& capture) {
  cudaGraph_t graph = nullptr;
  std::size_t nodes = 0;
  CUDA_REQUIRE(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  capture();
  CUDA_REQUIRE(cudaStreamEndCapture(stream, &graph));
  CUDA_REQUIRE(cudaGraphGetNodes(graph, nullptr, &nodes));
  CUDA_REQUIRE(cudaGraphDestroy(graph));
  return nodes;
}

template <class S, class R>
void row(Device& device, const Layers& layers, const char* what, const gpu::Policy<S, R>& policy,
         bool with_lse, double reads_of_keys, double must) {
  const gpu::Observation seen = layers.seen(with_lse);
  const kvlean::Budget budget = kvlean::Budget::fraction(kept);
  const std::size_t needed = gpu::compress_bytes_required(layers.view(0), policy, budget, seen);
  CHECK_THAT(needed <= device.memory.size(), "%s needs %zu bytes", what, needed);
  if (needed > device.memory.size()) return;
  const auto packed = [&](int copy) {
    CHECK_OK(gpu::compress(device.context(), layers.view(copy), policy, budget, seen,
                           layers.packed(copy)));
  };
  char name[128];
  std::snprintf(name, sizeof name, "%s, %u x %u [%zu nodes]", what, layers.layers, layers.tokens,
                count_nodes(device.stream, [&] { packed(0); }));
  bench_row(name, median_graph_ms(device.stream, layers.copies, packed),
            layers.bytes(reads_of_keys), must);
  CHECK_OK(device.take_error());
}

/// In place; the graph also restores the lengths.
template <class S, class R>
void row_in_place(Device& device, const Layers& layers, const char* what,
                  const gpu::Policy<S, R>& policy, bool with_lse, double reads_of_keys) {
  const gpu::Observation seen = layers.seen(with_lse);
  const auto in_place = [&](int copy) {
    const gpu::CacheView view = layers.view(copy);
    CUDA_REQUIRE(cudaMemcpyAsync(view.lengths, layers.full_lengths.data(),
                                 view.num_segments() * sizeof(u32), cudaMemcpyDeviceToDevice,
                                 device.stream));
    CHECK_OK(gpu::compress(device.context(), view, policy, kvlean::Budget::fraction(kept), seen,
                           kvlean::in_place));
  };
  char name[128];
  std::snprintf(name, sizeof name, "%s in place, %u x %u [%zu nodes]", what, layers.layers,
                layers.tokens, count_nodes(device.stream, [&] { in_place(0); }));
  bench_row(name, median_graph_ms(device.stream, layers.copies, in_place),
            layers.bytes(reads_of_keys), 0.0);
  CHECK_OK(device.take_error());
  CUDA_REQUIRE(cudaMemcpy(layers.lengths.data(), layers.full_lengths.data(), layers.lengths.bytes(),
                          cudaMemcpyDeviceToDevice));
}

void one_layer(Device& device, u32 tokens, int copies, bool full, bool small) {
  const Layers layers(1, tokens, copies);
  const auto adakv = gpu::on_device(kvlean::AdaKVPolicy{});
  const auto key_norm = gpu::on_device(kvlean::KeyNormPolicy{});
  row(device, layers, "Ada-KV whole, LSE given", adakv, true, 1.0,
      full    ? 0.50
      : small ? 0.04
              : 0.0);
  row(device, layers, "Ada-KV whole", adakv, false, 1.0, 0.0);
  row_in_place(device, layers, "Ada-KV whole, LSE given", adakv, true, 1.0);
  row(device, layers, "SnapKV whole, LSE given", gpu::on_device(kvlean::SnapKVPolicy{}), true, 1.0,
      0.0);
  row(device, layers, "key norm compress", key_norm, true, 1.0, full ? 0.35 : small ? 0.04 : 0.0);
  row_in_place(device, layers, "key norm compress", key_norm, true, 1.0);
  row(device, layers, "KeyDiff compress", gpu::on_device(kvlean::KeyDiffPolicy{}), true, 2.0,
      full ? 0.45 : 0.0);
  row(device, layers, "H2O whole from attention mass", gpu::on_device(kvlean::H2OPolicy{}), true,
      0.0, small ? 0.04 : 0.0);
  gpu::Policy<kvlean::H2OScorer, kvlean::KVMergerReducer> merger;
  row(device, layers, "KVMerger whole from attention mass", merger, true, 1.0, full ? 0.50 : 0.0);
}

}  // namespace

int main(int argc, char** argv) {
  const bool quick = parse_quick(argc, argv);
  bench_header("bench_layer");
  Device device(std::size_t{1} << 30);
  one_layer(device, 4096, quick ? 2 : 16, false, true);
  if (!quick) {
    one_layer(device, 32768, 4, false, false);
    one_layer(device, 131072, 2, true, false);
    const Layers layers(32, 32768, 1);
    row(device, layers, "Ada-KV whole, LSE given", gpu::on_device(kvlean::AdaKVPolicy{}), true, 1.0,
        4.0);
    row_in_place(device, layers, "Ada-KV whole, LSE given", gpu::on_device(kvlean::AdaKVPolicy{}),
                 true, 1.0);
  }
  return finish("bench_layer");
}
