// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
// CaM, MassFold and D2O on the device against the CPU library's: slots and
// terms exactly, weights within stated bounds.
#include "kvlean/cuda/cam.cuh"
#include "kvlean/cuda/d2o.cuh"
#include "kvlean/cuda/massfold.cuh"
#include "tests/cuda/merge_cases.cuh"

using namespace cuda_test;
using kvlean::MergedKeys;

namespace {

void check_cam(MergeTest& test, const kvlean::CaMReducer& reducer, Device& device) {
  TestCache& cache = test.cache;
  const kvlean::cuda::CacheView view = cache.view();
  device.reset();
  DevicePlan plan(kvlean::cuda::plan_shape(view, reducer, cache.spec().tokens));
  const DeviceArray<u32> limit(test.limit);
  const kvlean::cuda::MergeScores scores{test.rank.view(), test.mass->view(), {}};
  const std::size_t bytes = kvlean::cuda::bytes_required(view, reducer, test.options);
  CHECK_THAT(bytes <= device.memory.size(), "the test's workspace is too small: %zu of %zu", bytes,
             device.memory.size());
  kvlean::cuda::Workspace workspace(device.memory.data(), bytes);
  const kvlean::cuda::Context context{device.stream, workspace, device.error_word.data()};
  CUDA_REQUIRE(cudaDeviceSynchronize());
  CHECK_OK(kvlean::cuda::reduce(context, view, reducer, scores, limit.data(), test.options,
                                plan.view, test.draws));
  const Status got = device.take_error();
  CHECK_TRUE(plan.memory.intact());
  const HostPlan host(plan.view);
  Status want;
  for (u32 l = 0; l < cache.spec().layers; ++l) {
    for (u32 q = 0; q < cache.spec().sequences; ++q) {
      kvlean::Workspace host_workspace;
      kvlean::CompressionPlan expected;
      const Status status = test.plan_on_host(reducer, l, q, host_workspace, expected);
      if (want.ok()) want = status;
      if (!status.ok() || !got.ok()) continue;
      compared += cache.spec().kv_heads;
      compare_plans(expected, cache.layer(l, q), host, cache.segment_of(l, q), 0.0, 0.0);
    }
  }
  // Where two things are wrong, either may be told.
  CHECK_THAT(got.ok() == want.ok(), "the error word says '%s', the CPU '%s'", got.message(),
             want.message());
}

void test_cam(Device& device, const Shape& shape, bool quick) {
  TestCache cache(shape.spec);
  const bool same_lengths = shape.spec.lengths.size() <= shape.spec.sequences;
  for (const Pattern pattern :
       {Pattern::skewed, Pattern::few, Pattern::some_nan, Pattern::infinite, Pattern::zeros}) {
    const TestScores rank(cache, pattern, 3);
    if (quick && pattern != Pattern::some_nan) continue;
    const TestScores mass(cache, pattern, 8);
    for (const u32 receivers : {1u, 32u, 1000u}) {
      if (quick && receivers == 1000) continue;
      for (const kvlean::CaMMode mode : {kvlean::CaMMode::expected, kvlean::CaMMode::sampled}) {
        for (const double fraction : {0.02, 0.3, 0.999, 1.0}) {
          if (quick && fraction != 0.3) continue;
          for (const Sharing sharing :
               {Sharing::per_head(), Sharing::same_tokens(), Sharing::whole_pages(8)}) {
            if (sharing.kind != kvlean::SharingKind::per_head &&
                (!same_lengths || receivers != 32)) {
              continue;
            }
            test_case("CaM %s, %s, %u receivers, mode %d, keep %g, sharing %d", shape.label,
                      name_of(pattern), receivers, static_cast<int>(mode), fraction,
                      static_cast<int>(sharing.kind));
            MergeTest test{cache, rank, &mass};
            test.options.protection = {1, 2};
            test.options.sharing = sharing;
            test.draws = {77, 3};
            test.limit = limits_of(cache, fraction, sharing.kind != kvlean::SharingKind::per_head);
            check_cam(test, {receivers, mode}, device);
          }
        }
      }
    }
  }
}

void check_fold(MergeTest& test, const kvlean::MassFoldReducer& reducer, Device& device) {
  TestCache& cache = test.cache;
  const kvlean::cuda::CacheView view = cache.view();
  device.reset();
  DevicePlan plan(kvlean::cuda::plan_shape(view, reducer, cache.spec().tokens));
  const DeviceArray<u32> limit(test.limit);
  DeviceArray<u32> observers;
  kvlean::cuda::MergeScores scores;
  scores.rank = test.rank.view();
  if (test.mass != nullptr) scores.mass = test.mass->view();
  if (test.observers != nullptr) {
    observers.upload(*test.observers);
    scores.observers = {observers.data(), cache.spec().tokens, nullptr};
  }
  const std::size_t bytes = kvlean::cuda::bytes_required(view, reducer, test.options);
  CHECK_THAT(bytes <= device.memory.size(), "the test's workspace is too small: %zu of %zu", bytes,
             device.memory.size());
  kvlean::cuda::Workspace workspace(device.memory.data(), bytes);
  const kvlean::cuda::Context context{device.stream, workspace, device.error_word.data()};
  CUDA_REQUIRE(cudaDeviceSynchronize());
  CHECK_OK(
      kvlean::cuda::reduce(context, view, reducer, scores, limit.data(), test.options, plan.view));
  CHECK_OK(device.take_error());
  CHECK_TRUE(plan.memory.intact());
  const HostPlan host(plan.view);
  for (u32 l = 0; l < cache.spec().layers; ++l) {
    for (u32 q = 0; q < cache.spec().sequences; ++q) {
      kvlean::Workspace host_workspace;
      kvlean::CompressionPlan expected;
      CHECK_OK(test.plan_on_host(reducer, l, q, host_workspace, expected));
      const kvlean::CacheView own = cache.layer(l, q);
      compared += own.segments;
      compare_plans(expected, own, host, cache.segment_of(l, q), 1e-5, 1e-6);
    }
  }
}

void check_d2o(MergeTest& test, kvlean::D2OReducer reducer, bool carries, Device& device) {
  TestCache& cache = test.cache;
  const kvlean::cuda::CacheView view = cache.view();
  const u32 segments = cache.num_segments();
  device.reset();
  DevicePlan plan(kvlean::cuda::plan_shape(view, reducer, cache.spec().tokens));
  const DeviceArray<u32> limit(test.limit);
  kvlean::cuda::MergeScores scores;
  scores.rank = test.rank.view();
  std::vector<float> before(segments);
  for (u32 s = 0; s < segments; ++s) {
    before[s] = s % 3 == 0 ? std::numeric_limits<float>::quiet_NaN() : 0.1f * static_cast<float>(s);
  }
  std::vector<float> after(segments, -7.0f);
  const DeviceArray<float> device_before(before);
  const DeviceArray<float> device_after(after);
  const std::size_t bytes = kvlean::cuda::bytes_required(view, reducer, test.options);
  kvlean::cuda::Workspace workspace(device.memory.data(), bytes);
  const kvlean::cuda::Context context{device.stream, workspace, device.error_word.data()};
  CUDA_REQUIRE(cudaDeviceSynchronize());
  reducer.threshold = carries ? device_before.data() : nullptr;
  reducer.next_threshold = device_after.data();
  CHECK_OK(
      kvlean::cuda::reduce(context, view, reducer, scores, limit.data(), test.options, plan.view));
  CHECK_OK(device.take_error());
  CHECK_TRUE(plan.memory.intact());
  const HostPlan host(plan.view);
  const std::vector<float> got = device_after.download();
  for (u32 l = 0; l < cache.spec().layers; ++l) {
    for (u32 q = 0; q < cache.spec().sequences; ++q) {
      const u32 first = cache.segment_of(l, q);
      reducer.threshold = carries ? before.data() + first : nullptr;
      reducer.next_threshold = after.data() + first;
      kvlean::Workspace host_workspace;
      kvlean::CompressionPlan expected;
      CHECK_OK(test.plan_on_host(reducer, l, q, host_workspace, expected));
      const kvlean::CacheView own = cache.layer(l, q);
      if (expected.num_slots() == own.total_length()) continue;  // it leaves the bars alone
      compared += own.segments;
      compare_close(got.data() + first, after.data() + first, own.segments, 1e-5, 1e-6, "bars");
      compare_plans(expected, own, host, first, 1e-5, 1e-6);
    }
  }
}

void test_d2o(Device& device, const Shape& shape, Keys keys, bool quick) {
  TestCache cache(shape.spec);
  fill_keys(cache, keys, 41);
  for (const Pattern pattern : {Pattern::skewed, Pattern::some_nan}) {
    const TestScores rank(cache, pattern, 3);
    if (quick && pattern != Pattern::skewed) continue;
    for (const double fraction : {0.1, 0.4, 1.0}) {
      if (quick && fraction != 0.4) continue;
      for (int kind = 0; kind < 4; ++kind) {
        kvlean::D2OReducer reducer;
        if (kind % 2 == 1) reducer.weights = kvlean::D2OWeights::code;
        if (kind == 2) reducer.keys = MergedKeys::pivot;
        reducer.momentum = 0.25f;
        test_case("D2O %s, keys %s, %s, kind %d, keep %g", shape.label, name_of(keys),
                  name_of(pattern), kind, fraction);
        MergeTest test{cache, rank};
        test.options.protection = {2, 3};
        test.keys = keys;
        test.limit = limits_of(cache, fraction, false);
        for (u32& slots : test.limit) slots = std::max(slots, 1u);
        check_d2o(test, reducer, kind >= 2, device);
      }
    }
  }
}

void test_fold(Device& device, const Shape& shape, Keys keys, bool quick) {
  TestCache cache(shape.spec);
  fill_keys(cache, keys, 31);
  std::vector<u32> observers(std::size_t{cache.num_segments()} * shape.spec.tokens);
  Random random(5);
  for (u32& count : observers) count = random.below(40);
  for (const Pattern pattern : {Pattern::skewed, Pattern::zeros, Pattern::some_nan}) {
    const TestScores rank(cache, pattern, 3);
    const TestScores mass(cache, pattern, 8);
    if (quick && pattern != Pattern::skewed) continue;
    for (const double fraction : {0.03, 0.35, 1.0}) {
      if (quick && fraction != 0.35) continue;
      for (int kind = 0; kind < 4; ++kind) {
        if (quick && kind != static_cast<int>(shape.spec.key_width / 8 % 4)) continue;
        kvlean::MassFoldReducer reducer;
        if (kind == 1) reducer.min_cosine = 0.4f;
        if (kind == 2) reducer.log_mass = false;
        if (kind == 3) reducer.max_ratio = 2.0f;
        test_case("MassFold %s d%u, keys %s, %s, kind %d, keep %g", shape.label,
                  shape.spec.key_width, name_of(keys), name_of(pattern), kind, fraction);
        MergeTest test{cache, rank};
        if (kind != 1) test.mass = &mass;
        if (kind == 0 || kind == 3) test.observers = &observers;
        test.options.protection = {1, 2};
        test.keys = keys;
        test.limit = limits_of(cache, fraction, false);
        for (u32& slots : test.limit) slots = std::max(slots, 1u);
        check_fold(test, reducer, device);
      }
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  const bool quick = parse_quick(argc, argv);
  const auto part = [&](const char* name) { return wants(argc, argv, name); };
  Device device(std::size_t{quick ? 12u : 192u} << 20);
  if (part("cam")) {
    CacheSpec spec = spec_of(2, 2, 2, 150, 8, DType::bf16, {150, 93, 0, 1, 150, 17, 2, 64});
    spec.frozen = 4;
    test_cam(device, {"frozen, lengths", spec}, quick);
    spec = spec_of(1, 2, 3, 130, 8, DType::f32, {130, 40});
    spec.positions = true;
    test_cam(device, {"positions", spec}, quick);
    if (!quick)
      test_cam(device, {"long", spec_of(1, 1, 2, 9000, 8, DType::f16, {9000, 8192})}, false);
  }
  if (part("d2o")) {
    const u32 tokens = quick ? 60 : 120;
    test_d2o(device, {"f32 d72", spec_of(2, 2, 2, tokens, 72, DType::f32, {tokens, 50})},
             Keys::walk, quick);
    CacheSpec spec = spec_of(1, 1, 2, 128, 64, DType::bf16);
    spec.page_tokens = 16;
    spec.log_mass = true;
    spec.frozen = 3;
    for (const Keys keys : {Keys::walk, Keys::equal, Keys::broken, Keys::twins}) {
      test_d2o(device, {"bf16 d64, paged, log mass, frozen", spec}, keys, quick);
    }
    test_d2o(device, {"f16 d128", spec_of(1, 2, 2, 150, 128, DType::f16, {150, 90})}, Keys::whole,
             quick);
  }
  if (part("fold")) {
    for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
      const char* type = dtype == DType::f32 ? "f32" : dtype == DType::bf16 ? "bf16" : "f16";
      for (const u32 width : {64u, 96u, 128u, 256u, 72u}) {
        if (quick && dtype == DType::f32 && width > 72) continue;
        const u32 tokens = quick ? 90 : 210;
        const Shape shape{type, spec_of(2, 1, 2, tokens, width, dtype, {tokens, 70, 64, 1})};
        test_fold(device, shape, Keys::walk, quick);
        test_fold(device, shape, Keys::twins, quick);
        if (quick && width != 128) continue;
        for (const Keys keys : {Keys::whole, Keys::equal, Keys::broken, Keys::extreme}) {
          test_fold(device, shape, keys, quick);
        }
      }
    }
    CacheSpec spec = spec_of(1, 1, 2, 256, 64, DType::bf16);
    spec.page_tokens = 16;
    spec.log_mass = true;
    spec.positions = true;
    spec.frozen = 5;
    test_fold(device, {"paged, log mass, frozen", spec}, Keys::walk, quick);
  }
  if (!quick && part("long")) {
    for (const Keys keys : {Keys::walk, Keys::whole, Keys::twins}) {
      test_fold(device, {"long bf16", spec_of(1, 1, 2, 6000, 128, DType::bf16)}, keys, false);
    }
    test_fold(device, {"long f32", spec_of(1, 1, 2, 3000, 128, DType::f32)}, Keys::walk, false);
  }
  std::printf("segments compared: %llu\n", static_cast<unsigned long long>(compared));
  return finish("test_fold");
}
