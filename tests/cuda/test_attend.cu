// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
// Attention over ragged segments against the reference in double.
#include <kvlean/cuda/attend.cuh>

#include "tests/cuda/check.cuh"

namespace {

using namespace cuda_test;
namespace gpu = kvlean::cuda;

const char* name_of(DType dtype) {
  return dtype == DType::f32 ? "f32" : dtype == DType::f16 ? "f16" : "bf16";
}

/// attend() over a cache against the reference in double.
void run_attention(const CacheSpec& spec, u32 count, kvlean::AttentionSpec attention, bool sinks) {
  test_case("attend %s width %u group %u queries %u window %u cap %g", name_of(spec.key_dtype),
            spec.key_width, spec.group_size, count, attention.sliding_window,
            static_cast<double>(attention.softcap));
  TestCache cache(spec);
  const u32 heads = spec.kv_heads * spec.group_size;
  const u32 value_width = cache.spec().value_width;
  const std::size_t elements =
      std::size_t{spec.layers} * spec.sequences * heads * count * spec.key_width;
  std::vector<u8> bytes(elements * kvlean::size_bytes(spec.key_dtype));
  Random random(17);
  for (std::size_t i = 0; i < elements; ++i) {
    kvlean::store_element(bytes.data() + i * kvlean::size_bytes(spec.key_dtype), spec.key_dtype,
                          random.between(-2.0f, 2.0f));
  }
  DeviceArray<u8> queries(bytes);
  std::vector<float> sink_values(std::size_t{spec.layers} * heads);
  for (float& x : sink_values) x = random.between(-1.0f, 3.0f);
  DeviceArray<float> device_sinks(sink_values);
  const std::size_t outputs = std::size_t{spec.layers} * spec.sequences * heads * count;
  DeviceArray<float> values(outputs * value_width), lse(outputs);
  gpu::Attention on_device;
  on_device.scale = attention.scale;
  on_device.softcap = attention.softcap;
  on_device.sliding_window = attention.sliding_window;
  if (sinks) on_device.sink_logits = device_sinks.data();
  const gpu::Queries device_queries = gpu::Queries::contiguous(cache.view(), queries.data(), count);
  Device device(gpu::attend_bytes_required(cache.view(), device_queries));
  std::vector<float> got, got_lse;
  for (u32 run = 0; run < 2; ++run) {
    device.reset();
    CHECK_OK(gpu::attend(device.context(), cache.view(), device_queries, on_device, values.data(),
                         lse.data()));
    CHECK_OK(device.take_error());
    CHECK_TRUE(values.intact() && lse.intact());
    const std::vector<float> again = values.download();
    const std::vector<float> again_lse = lse.download();
    if (run != 0) {
      compare_exact(again, got, "output of another run");
      compare_exact(again_lse, got_lse, "lse of another run");
    }
    got = again;
    got_lse = again_lse;
  }
  for (u32 l = 0; l < spec.layers; ++l) {
    for (u32 b = 0; b < spec.sequences; ++b) {
      const kvlean::CacheView view = cache.layer(l, b);
      const std::size_t base = (std::size_t{l} * spec.sequences + b) * heads * count;
      kvlean::Queries q;
      q.rows.data = bytes.data() + base * spec.key_width * kvlean::size_bytes(spec.key_dtype);
      q.rows.dtype = spec.key_dtype;
      q.rows.width = spec.key_width;
      q.rows.heads = heads;
      q.rows.tokens = count;
      q.rows.token_stride = spec.key_width;
      q.rows.head_stride = static_cast<i64>(spec.key_width) * count;
      q.count = count;
      kvlean::AttentionSpec own = attention;
      if (sinks) own.sink_logits = sink_values.data() + std::size_t{l} * heads;
      std::vector<float> want(std::size_t{heads} * count * value_width), want_lse(heads * count);
      kvlean::AttentionOutput output;
      output.values = want.data();
      output.lse = want_lse.data();
      CHECK_OK(kvlean::attend_reference(q, view, own, output));
      compare_close(got.data() + base * value_width, want.data(), want.size(), 1e-4, 1e-4,
                    "output");
      compare_close(got_lse.data() + base, want_lse.data(), want_lse.size(), 1e-5, 1e-4, "lse");
    }
  }
}

CacheSpec spec_of(DType dtype, u32 width, u32 group, u32 tokens) {
  CacheSpec spec;
  spec.seed = width + group;
  spec.kv_heads = 2;
  spec.group_size = group;
  spec.tokens = tokens;
  spec.key_width = width;
  spec.with_dtype(dtype);
  return spec;
}

}  // namespace

int main(int argc, char** argv) {
  const bool quick = parse_quick(argc, argv);
  for (const DType dtype : {DType::bf16, DType::f16, DType::f32}) {
    for (const u32 width :
         quick ? std::vector<u32>{64, 128} : std::vector<u32>{64, 96, 128, 256, 80}) {
      for (const u32 group : {1u, 4u, 16u}) {
        CacheSpec spec = spec_of(dtype, width, group, group == 4 ? 700 : 130);
        spec.layers = 2;
        spec.sequences = 2;
        spec.lengths = {spec.tokens, 33, 1, 129, 64, 65, spec.tokens, 16};
        spec.page_tokens = group == 16 ? 16 : 0;
        spec.positions = group == 4;
        spec.log_mass = group != 1;
        run_attention(spec, 1, {}, false);
        kvlean::AttentionSpec all;
        all.softcap = 5.0f;
        all.sliding_window = 40;
        run_attention(spec, 3, all, true);
        kvlean::AttentionSpec window;
        window.sliding_window = 17;
        run_attention(spec, 1, window, false);
      }
    }
    // One head far longer than the others, and one that holds nothing.
    CacheSpec spec = spec_of(dtype, 128, 4, quick ? 3000 : 50000);
    spec.kv_heads = 4;
    spec.lengths = {300, spec.tokens, 0, 17};
    spec.log_mass = true;
    run_attention(spec, 1, {}, false);
    run_attention(spec, 1, {}, true);
    // More segments than a block has threads; pages of a size that is no power
    // of two.
    spec = spec_of(dtype, 64, 2, 200);
    spec.layers = 3;
    spec.sequences = 6;
    spec.kv_heads = 8;
    spec.page_tokens = 24;
    spec.lengths.clear();
    for (u32 i = 0; i < 3 * 6 * 8; ++i) spec.lengths.push_back(i * 37 % 201);
    run_attention(spec, 1, {}, false);
  }
  return finish("test_attend");
}
