// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
// KVMerger on the device against the CPU library's: sets, pivots, terms and evictions exactly,
// weights within stated bounds. Where keys are random, a segment whose cosines come within 1e-5 of
// a decision is left out and counted.
#include "kvlean/cuda/kvmerger.cuh"
#include "tests/cuda/merge_cases.cuh"

using namespace cuda_test;
using kvlean::KVMergerForm;
using kvlean::KVMergerReducer;
using kvlean::LogMass;
using kvlean::MergedKeys;
using kvlean::Sigma;
using kvlean::ValueScale;

namespace {

/// Whether a cosine lies within 1e-5 of what decided a head's links.
bool is_ambiguous(const kvlean::CacheView& view, u32 h, const kvlean::CompressionPlan& plan,
                  const KVMergerReducer& reducer, bool threshold) {
  const u32 length = view.length(h);
  if (length < 2) return false;
  std::vector<float> cosine(length);
  kvlean::detail::adjacent_cosines(view.keys, h, length, cosine.data());
  if (threshold) {
    for (u32 t = 0; t + 1 < length; ++t) {
      if (std::fabs(cosine[t] - reducer.epsilon) < 1e-5f) return true;
    }
    return false;
  }
  std::vector<u8> linked(length, 0);
  for (u64 slot = plan.first[h]; plan.has_terms() && slot < plan.first[h + 1]; ++slot) {
    u32 low = plan.anchor[slot];
    u32 high = low;
    for (u64 i = plan.term_begin[slot]; i < plan.term_end[slot]; ++i) {
      low = std::min(low, plan.term_token[i]);
      high = std::max(high, plan.term_token[i]);
    }
    for (u32 t = low; t < high; ++t) linked[t] = 1;
  }
  float least = 2.0f;
  for (u32 t = 0; t + 1 < length; ++t) {
    if (linked[t] != 0 && cosine[t] < least) least = cosine[t];
  }
  for (u32 t = 0; t + 1 < length; ++t) {
    if (linked[t] == 0 && std::fabs(cosine[t] - least) < 1e-5f) return true;
  }
  return false;
}

void check_merger(MergeTest& test, const KVMergerReducer& reducer, Device& device) {
  TestCache& cache = test.cache;
  const kvlean::cuda::CacheView view = cache.view();
  const u32 segments = cache.num_segments();
  device.reset();
  DevicePlan plan(kvlean::cuda::plan_shape(view, reducer, cache.spec().tokens));
  const DeviceArray<u32> limit(test.limit);
  kvlean::cuda::MergeScores scores;
  scores.rank = test.rank.view();
  if (test.mass != nullptr) scores.mass = test.mass->view();
  const std::size_t bytes = kvlean::cuda::bytes_required(view, reducer, test.options);
  CHECK_THAT(bytes <= device.memory.size(), "the test's workspace is too small: %zu of %zu", bytes,
             device.memory.size());
  kvlean::cuda::Workspace workspace(device.memory.data(), bytes);
  const kvlean::cuda::Context context{device.stream, workspace, device.error_word.data()};
  CUDA_REQUIRE(cudaDeviceSynchronize());
  CHECK_OK(kvlean::cuda::reduce(context, cache.view(), reducer, scores, limit.data(), test.options,
                                plan.view));
  const Status got = device.take_error();
  CHECK_TRUE(plan.memory.intact());
  const HostPlan host(plan.view);
  Status want;
  const bool shares = test.options.shares_tokens();
  for (u32 l = 0; l < cache.spec().layers; ++l) {
    for (u32 q = 0; q < cache.spec().sequences; ++q) {
      kvlean::Workspace host_workspace;
      kvlean::CompressionPlan expected;
      const Status status = test.plan_on_host(reducer, l, q, host_workspace, expected);
      if (want.ok()) want = status;
      if (!status.ok() || !got.ok()) continue;
      const kvlean::CacheView own = cache.layer(l, q);
      const u32 first = cache.segment_of(l, q);
      if (test.keys == Keys::walk) {
        bool ambiguous = shares;  // averaged cosines: look at what differs instead
        for (u32 h = 0; h < own.segments; ++h) {
          ambiguous = ambiguous || is_ambiguous(own, h, expected, reducer,
                                                reducer.form == KVMergerForm::threshold);
        }
        if (ambiguous) {
          skipped += own.segments;
          continue;
        }
      }
      compared += own.segments;
      compare_plans(expected, own, host, first, test.relative, test.absolute);
      for (u32 h = 0; h < own.segments; ++h) {
        CHECK_THAT(host.slots_evicted[first + h] == expected.slots_evicted[h],
                   "segment %u: %u slots evicted, expected %u", first + h,
                   host.slots_evicted[first + h], expected.slots_evicted[h]);
      }
    }
  }
  CHECK_THAT(got == want, "the error word says '%s', the CPU '%s'", got.message(), want.message());
  static_cast<void>(segments);
}

void run_merger(TestCache& cache, Keys keys, Pattern pattern, bool has_mass, double fraction,
                const SelectOptions& options, const KVMergerReducer& reducer, Device& device,
                const char* label) {
  const TestScores scores(cache, pattern, 17 + static_cast<u64>(pattern));
  test_case(
      "%s, keys %s, scores %s%s, keep %g, protect %u+%u, sharing %d/%u, form %d eps %g "
      "sigma %d values %d log mass %d keys %d enforce %d recent %g/%d heavy %g/%d",
      label, name_of(keys), name_of(pattern), has_mass ? " (mass)" : "", fraction,
      options.protection.sinks, options.protection.recent, static_cast<int>(options.sharing.kind),
      options.sharing.page_tokens, static_cast<int>(reducer.form),
      static_cast<double>(reducer.epsilon), static_cast<int>(reducer.sigma),
      static_cast<int>(reducer.values), static_cast<int>(reducer.log_mass),
      static_cast<int>(reducer.keys), reducer.enforce_limit ? 1 : 0, reducer.recent_fraction,
      static_cast<int>(reducer.recent_tokens), reducer.heavy_fraction,
      static_cast<int>(reducer.heavy_tokens));
  MergeTest test{cache, scores};
  if (has_mass) test.mass = &scores;
  test.options = options;
  test.keys = keys;
  test.limit = limits_of(cache, fraction, options.sharing.kind != kvlean::SharingKind::per_head);
  check_merger(test, reducer, device);
}

/// All forms and options at a few keys and scores; with `quick` a few of each.
void test_options(Device& device, const Shape& shape, Keys keys, bool quick) {
  TestCache cache(shape.spec);
  fill_keys(cache, keys, 5);
  const bool same_lengths = shape.spec.lengths.size() <= shape.spec.sequences;
  const Pattern patterns[] = {Pattern::skewed, Pattern::few, Pattern::some_nan};
  for (const Pattern pattern : patterns) {
    if (quick && pattern != patterns[shape.spec.key_width / 32 % 3]) continue;
    SelectOptions options;
    options.protection = {2, 5};
    for (const KVMergerForm form : {KVMergerForm::slots, KVMergerForm::threshold}) {
      for (const double fraction : {0.0, 0.1, 0.35, 0.7, 1.0}) {
        if (quick && fraction != 0.35) continue;
        KVMergerReducer reducer;
        reducer.form = form;
        run_merger(cache, keys, pattern, true, fraction, options, reducer, device, shape.label);
        reducer.enforce_limit = false;
        reducer.epsilon = 0.5f;
        run_merger(cache, keys, pattern, false, fraction, options, reducer, device, shape.label);
        reducer.enforce_limit = true;
        reducer.epsilon = 0.9f;
        reducer.recent_fraction = 0.1;
        reducer.heavy_tokens = 7;
        reducer.log_mass = LogMass::log_count;
        run_merger(cache, keys, pattern, true, fraction, options, reducer, device, shape.label);
        reducer.heavy_tokens = 0;
        reducer.recent_tokens = 3;
        reducer.log_mass = LogMass::entropy;
        reducer.keys = MergedKeys::pivot;
        run_merger(cache, keys, pattern, false, fraction, options, reducer, device, shape.label);
      }
    }
    for (const Sigma sigma : {Sigma::fixed, Sigma::mean_distance, Sigma::rms}) {
      for (const ValueScale values : {ValueScale::convex, ValueScale::paper_set_size}) {
        KVMergerReducer reducer;
        reducer.sigma = sigma;
        reducer.values = values;
        run_merger(cache, keys, pattern, true, 0.3, options, reducer, device, shape.label);
        if (values != ValueScale::convex) continue;
        reducer.log_mass = LogMass::log_count;
        run_merger(cache, keys, pattern, true, 0.3, options, reducer, device, shape.label);
        reducer.log_mass = LogMass::entropy;
        run_merger(cache, keys, pattern, false, 0.2, options, reducer, device, shape.label);
      }
    }
    if (!same_lengths) continue;
    for (const Sharing sharing :
         {Sharing::same_tokens(), Sharing::equal_count(), Sharing::whole_pages(8)}) {
      for (const KVMergerForm form : {KVMergerForm::slots, KVMergerForm::threshold}) {
        for (const double fraction : {0.2, 0.5, 1.0}) {
          if (quick && fraction != 0.2) continue;
          KVMergerReducer reducer;
          reducer.form = form;
          reducer.epsilon = 0.6f;
          reducer.enforce_limit = fraction < 0.4;
          options.sharing = sharing;
          run_merger(cache, keys, pattern, true, fraction, options, reducer, device, shape.label);
          run_merger(cache, keys, pattern, false, fraction, options, reducer, device, shape.label);
        }
      }
    }
  }
}

/// Every kind of scores.
void test_patterns(Device& device, const Shape& shape, Keys keys, bool quick) {
  TestCache cache(shape.spec);
  fill_keys(cache, keys, 9);
  for (const Pattern pattern : all_patterns) {
    for (const double fraction : {0.05, 0.35}) {
      if (quick && fraction != 0.05) continue;
      SelectOptions options;
      KVMergerReducer reducer;
      run_merger(cache, keys, pattern, true, fraction, options, reducer, device, shape.label);
      if (quick) continue;
      run_merger(cache, keys, pattern, false, fraction, options, reducer, device, shape.label);
      reducer.form = KVMergerForm::threshold;
      options.protection = {1, 3};
      run_merger(cache, keys, pattern, true, fraction, options, reducer, device, shape.label);
    }
  }
}

void test_aligned(Device& device) {
  for (const kvlean::RopePairing pairing : {kvlean::RopePairing::neox, kvlean::RopePairing::norm}) {
    kvlean::RopeSpec rope;
    rope.pairing = pairing;
    CacheSpec spec = spec_of(1, 2, 2, 160, 64, DType::f32, {160, 77});
    spec.rope = &rope;
    spec.positions = true;
    TestCache cache(spec);
    fill_keys(cache, Keys::walk, 3);
    KVMergerReducer reducer;
    reducer.keys = MergedKeys::aligned;
    SelectOptions options;
    for (const double fraction : {0.2, 0.5}) {
      run_merger(cache, Keys::walk, Pattern::skewed, true, fraction, options, reducer, device,
                 "aligned");
    }
  }
}

void test_long(Device& device, bool quick) {
  const Shape shape{"long", spec_of(1, 1, 2, 9000, 64, DType::bf16, {9000, 8193})};
  TestCache cache(shape.spec);
  for (const Keys keys : {Keys::whole, Keys::equal, Keys::broken}) {
    if (quick && keys != Keys::whole) continue;
    fill_keys(cache, keys, 21);
    for (const double fraction : {0.01, 0.35}) {
      for (const Pattern pattern : {Pattern::skewed, Pattern::some_nan, Pattern::few}) {
        if (quick && pattern != Pattern::some_nan) continue;
        KVMergerReducer reducer;
        run_merger(cache, keys, pattern, true, fraction, {}, reducer, device, shape.label);
        reducer.form = KVMergerForm::threshold;
        reducer.log_mass = LogMass::log_count;
        run_merger(cache, keys, pattern, true, fraction, {}, reducer, device, shape.label);
      }
    }
  }
}

void test_longer(Device& device) {
  const Shape shape{"longer", spec_of(2, 2, 4, 40000, 128, DType::bf16, {40000, 12289})};
  TestCache cache(shape.spec);
  for (const Keys keys : {Keys::whole, Keys::walk}) {
    fill_keys(cache, keys, 23);
    for (const double fraction : {0.05, 0.35}) {
      KVMergerReducer reducer;
      run_merger(cache, keys, Pattern::skewed, true, fraction, {}, reducer, device, shape.label);
      reducer.form = KVMergerForm::threshold;
      reducer.log_mass = LogMass::entropy;
      run_merger(cache, keys, Pattern::skewed, true, fraction, {}, reducer, device, shape.label);
      SelectOptions options;
      options.sharing = Sharing::equal_count();
      run_merger(cache, keys, Pattern::skewed, true, fraction, options, reducer, device,
                 shape.label);
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  const bool quick = parse_quick(argc, argv);
  const auto part = [&](const char* name) { return wants(argc, argv, name); };
  Device device(std::size_t{quick ? 12u : 192u} << 20);
  const u32 tokens = quick ? 90 : 140;
  const Shape plain{"f32 d64", spec_of(1, 1, 2, tokens, 64, DType::f32)};
  const Shape batch{"bf16 d128, 2 layers, lengths",
                    quick ? spec_of(2, 2, 2, 80, 128, DType::bf16, {80, 1})
                          : spec_of(2, 3, 2, 200, 128, DType::bf16, {200, 1, 63})};
  for (const Keys keys : {Keys::whole, Keys::broken, Keys::walk}) {
    if (quick && keys == Keys::walk) continue;
    if (part("merger plain")) test_options(device, plain, keys, quick);
    if (quick && keys != Keys::whole) continue;
    if (part("merger batch")) test_options(device, batch, keys, quick);
  }
  if (part("merger scores")) {
    test_patterns(device, {"f16 d96", spec_of(1, 2, 3, 150, 96, DType::f16, {150, 140})},
                  Keys::whole, quick);
    test_patterns(device, {"bf16 d256", spec_of(1, 1, 2, 90, 256, DType::bf16)}, Keys::equal,
                  quick);
  }
  if (part("merger aligned")) test_aligned(device);
  if (part("merger paged")) {
    CacheSpec spec = spec_of(1, 2, 2, 128, 64, DType::bf16, {128, 0, 100, 2});
    spec.page_tokens = 16;
    spec.log_mass = true;
    spec.positions = true;
    spec.frozen = 3;
    test_options(device, {"paged, log mass, frozen, empty segment", spec}, Keys::whole, quick);
    spec.lengths = {};
    spec.page_tokens = 24;
    spec.padding = 8;
    if (!quick) test_options(device, {"paged 24, padded", spec}, Keys::broken, quick);
  }
  if (part("merger wide")) {
    test_options(device, {"f32 d512", spec_of(1, 1, 1, quick ? 40 : 100, 512, DType::f32)},
                 Keys::whole, quick);
  }
  if (part("merger long")) test_long(device, quick);
  if (!quick && part("merger longer")) test_longer(device);
  std::printf(
      "segments compared: %llu, left out because a cosine is within 1e-5 of a decision: "
      "%llu\n",
      static_cast<unsigned long long>(compared), static_cast<unsigned long long>(skipped));
  return finish("test_merge");
}
