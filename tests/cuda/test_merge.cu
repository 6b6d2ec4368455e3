// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
// The merging reducers on the device against the CPU library's: sets, pivots, terms and evictions
// exactly, weights within stated bounds. Where keys are random, a segment whose cosines come within
// 1e-5 of a decision is left out and counted.
#include <limits>

#include "kvlean/cuda/cam.cuh"
#include "kvlean/cuda/d2o.cuh"
#include "kvlean/cuda/kvmerger.cuh"
#include "kvlean/cuda/massfold.cuh"
#include "tests/cuda/select_cases.cuh"

using namespace cuda_test;
using kvlean::KVMergerForm;
using kvlean::KVMergerReducer;
using kvlean::LogMass;
using kvlean::MergedKeys;
using kvlean::Sharing;
using kvlean::Sigma;
using kvlean::ValueScale;
using kvlean::cuda::SelectOptions;

namespace {

u64 skipped = 0;  // segments left out
u64 compared = 0;

enum class Keys {
  whole,   ///< small whole numbers: cosines are exact, ties abound
  walk,    ///< each key like the one before
  equal,   ///< all the same
  broken,  ///< whole, some rows zero, some with NaN or infinity
};
const char* name_of(Keys keys) {
  constexpr const char* names[] = {"whole", "walk", "equal", "broken"};
  return names[static_cast<int>(keys)];
}

void fill_keys(TestCache& cache, Keys kind, u64 seed) {
  Random random(seed + 1000);
  const CacheSpec& spec = cache.spec();
  std::vector<float> row(spec.key_width);
  for (u32 l = 0; l < spec.layers; ++l) {
    for (u32 q = 0; q < spec.sequences; ++q) {
      const kvlean::CacheView view = cache.layer(l, q);
      for (u32 h = 0; h < spec.kv_heads; ++h) {
        for (float& x : row) x = 1.0f;
        for (u32 t = 0; t < cache.capacity(); ++t) {
          if (kind == Keys::walk) {
            for (float& x : row) {
              x = t == 0 ? random.between(-1.0f, 1.0f)
                         : 0.85f * x + 0.5f * random.between(-1.0f, 1.0f);
            }
          } else if (kind != Keys::equal) {
            const u32 changes = random.below(4) == 0 ? spec.key_width : random.below(6);
            for (u32 i = 0; i < changes; ++i) {
              row[random.below(spec.key_width)] = static_cast<float>(random.below(5)) - 2.0f;
            }
          }
          std::vector<float> stored = row;
          if (kind == Keys::broken) {
            const u32 fate = random.below(24);
            const float odd[] = {std::numeric_limits<float>::quiet_NaN(),
                                 std::numeric_limits<float>::infinity(),
                                 -std::numeric_limits<float>::infinity()};
            if (fate < 3) stored[random.below(spec.key_width)] = odd[fate];
            if (fate == 3) std::fill(stored.begin(), stored.end(), 0.0f);
          }
          kvlean::store_row(view.keys, h, t, stored.data());
        }
      }
    }
  }
  cache.upload();
}

struct MergeTest {
  TestCache& cache;
  const TestScores& rank;
  const TestScores* mass = nullptr;
  std::vector<u32> limit = {};
  const std::vector<u32>* observers = nullptr;  ///< [segment][tokens]
  SelectOptions options = {};
  kvlean::cuda::MergeDraws draws = {};
  Keys keys = Keys::whole;
  double relative = 1e-4;
  double absolute = 1e-6;

  template <class Reducer>
  Status plan_on_host(const Reducer& reducer, u32 l, u32 q, kvlean::Workspace& workspace,
                      kvlean::CompressionPlan& plan) const {
    const kvlean::CacheView view = cache.layer(l, q);
    const u32 first = cache.segment_of(l, q);
    kvlean::Scores scores;
    scores.segments = view.segments;
    scores.lengths = view.lengths;
    scores.rank = kvlean::Ragged<float>(const_cast<float*>(rank.host.data()) + first * rank.stride,
                                        rank.stride);
    if (mass != nullptr) {
      scores.mass = kvlean::Ragged<float>(
          const_cast<float*>(mass->host.data()) + first * mass->stride, mass->stride);
      scores.has_mass = true;
    }
    if (observers != nullptr) {
      scores.observers = kvlean::Ragged<u32>(
          const_cast<u32*>(observers->data()) + std::size_t{first} * cache.spec().tokens,
          u64{cache.spec().tokens});
      scores.has_observers = true;
    }
    kvlean::PlanOptions plan_options;
    plan_options.protection = options.protection;
    plan_options.sharing = options.sharing;
    plan_options.seed = draws.seed;
    plan_options.step = draws.step;
    kvlean::Context context{workspace, plan_options, 0, cache.spec().layers};
    return reducer.reduce(view, scores, limit.data() + first, context, plan);
  }
};

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

struct Shape {
  const char* label;
  CacheSpec spec;
};

CacheSpec spec_of(u32 layers, u32 sequences, u32 heads, u32 tokens, u32 width, DType dtype,
                  std::vector<u32> lengths = {}) {
  CacheSpec spec;
  spec.layers = layers;
  spec.sequences = sequences;
  spec.kv_heads = heads;
  spec.tokens = tokens;
  spec.key_width = width;
  spec.value_width = 8;
  spec.lengths = std::move(lengths);
  spec.with_dtype(dtype);
  return spec;
}

std::vector<u32> limits_of(const TestCache& cache, double fraction, bool alike) {
  std::vector<u32> limit(cache.num_segments());
  for (u32 s = 0; s < limit.size(); ++s) {
    const u32 head = s % cache.spec().kv_heads;
    const double own = alike ? fraction : fraction * (0.5 + 0.5 * static_cast<double>(head));
    limit[s] = std::min(cache.lengths[s], static_cast<u32>(own * cache.lengths[s]));
  }
  return limit;
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

/// All forms and options at a few keys and scores.
void test_options(Device& device, const Shape& shape, Keys keys) {
  TestCache cache(shape.spec);
  fill_keys(cache, keys, 5);
  const bool same_lengths = shape.spec.lengths.size() <= shape.spec.sequences;
  for (const Pattern pattern : {Pattern::skewed, Pattern::few, Pattern::some_nan}) {
    SelectOptions options;
    options.protection = {2, 5};
    for (const KVMergerForm form : {KVMergerForm::slots, KVMergerForm::threshold}) {
      for (const double fraction : {0.0, 0.1, 0.35, 0.7, 1.0}) {
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
void test_patterns(Device& device, const Shape& shape, Keys keys) {
  TestCache cache(shape.spec);
  fill_keys(cache, keys, 9);
  for (const Pattern pattern : all_patterns) {
    for (const double fraction : {0.05, 0.35}) {
      SelectOptions options;
      KVMergerReducer reducer;
      run_merger(cache, keys, pattern, true, fraction, options, reducer, device, shape.label);
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

void test_cam(Device& device, const Shape& shape) {
  TestCache cache(shape.spec);
  const bool same_lengths = shape.spec.lengths.size() <= shape.spec.sequences;
  for (const Pattern pattern :
       {Pattern::skewed, Pattern::few, Pattern::some_nan, Pattern::infinite, Pattern::zeros}) {
    const TestScores rank(cache, pattern, 3);
    const TestScores mass(cache, pattern, 8);
    for (const u32 receivers : {1u, 32u, 1000u}) {
      for (const kvlean::CaMMode mode : {kvlean::CaMMode::expected, kvlean::CaMMode::sampled}) {
        for (const double fraction : {0.02, 0.3, 0.999, 1.0}) {
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

/// Whether some dropped token of a head has two receivers within 1e-5 of the best that are not
/// exactly alike, or a cosine that close to the bar.
bool is_near(const kvlean::CacheView& view, u32 h, const kvlean::CompressionPlan& plan,
             float min_cosine, const kvlean::Protection* spared = nullptr) {
  const u32 length = view.length(h);
  const u32 width = view.keys.width;
  std::vector<float> unit(std::size_t{length} * width);
  for (u32 t = 0; t < length; ++t) {
    kvlean::detail::load_unit_key(view.keys, h, t, unit.data() + std::size_t{t} * width);
  }
  std::vector<u8> kept(length, 0);
  for (u64 slot = plan.first[h]; slot < plan.first[h + 1]; ++slot) kept[plan.anchor[slot]] = 1;
  std::vector<float> cosine;
  for (u32 t = 0; t < length; ++t) {
    if (kept[t] != 0) continue;
    cosine.clear();
    float best = -2.0f;
    u32 best_token = 0;
    for (u64 slot = plan.first[h]; slot < plan.first[h + 1]; ++slot) {
      const u32 a = plan.anchor[slot];
      if (a < view.frozen) continue;
      if (spared != nullptr && spared->covers(a, length, view.frozen)) continue;
      float sum = 0.0f;
      for (u32 i = 0; i < width; ++i) {
        sum += unit[std::size_t{t} * width + i] * unit[std::size_t{a} * width + i];
      }
      if (sum > best + 1e-5f) {
        best = sum;
        best_token = a;
        cosine.clear();
      } else if (sum > best - 1e-5f) {
        // The same bytes make the same cosine on both sides.
        const bool alike =
            std::equal(unit.begin() + static_cast<std::ptrdiff_t>(a * width),
                       unit.begin() + static_cast<std::ptrdiff_t>((a + 1) * width),
                       unit.begin() + static_cast<std::ptrdiff_t>(best_token * width));
        if (!alike) cosine.push_back(sum);
      }
    }
    if (!cosine.empty() || std::fabs(best - min_cosine) < 1e-5f) return true;
  }
  return false;
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
      bool near = false;
      for (u32 h = 0; h < own.segments; ++h) {
        near = near || is_near(own, h, expected, reducer.min_cosine);
      }
      if (near) {
        skipped += own.segments;
        compare_anchors(expected, host, cache.segment_of(l, q));
        continue;
      }
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
      bool near = false;
      for (u32 h = 0; h < own.segments; ++h) {
        near = near || is_near(own, h, expected, after[first + h], &test.options.protection);
      }
      if (near) {
        skipped += own.segments;
        compare_anchors(expected, host, first);
        continue;
      }
      compared += own.segments;
      compare_close(got.data() + first, after.data() + first, own.segments, 1e-5, 1e-6, "bars");
      compare_plans(expected, own, host, first, 1e-5, 1e-6);
    }
  }
}

void test_d2o(Device& device, const Shape& shape, Keys keys) {
  TestCache cache(shape.spec);
  fill_keys(cache, keys, 41);
  for (const Pattern pattern : {Pattern::skewed, Pattern::some_nan}) {
    const TestScores rank(cache, pattern, 3);
    for (const double fraction : {0.1, 0.4, 1.0}) {
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

void test_fold(Device& device, const Shape& shape, Keys keys) {
  TestCache cache(shape.spec);
  fill_keys(cache, keys, 31);
  std::vector<u32> observers(std::size_t{cache.num_segments()} * shape.spec.tokens);
  Random random(5);
  for (u32& count : observers) count = random.below(40);
  for (const Pattern pattern : {Pattern::skewed, Pattern::zeros, Pattern::some_nan}) {
    const TestScores rank(cache, pattern, 3);
    const TestScores mass(cache, pattern, 8);
    for (const double fraction : {0.03, 0.35, 1.0}) {
      for (int kind = 0; kind < 4; ++kind) {
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

/// `--only TEXT`: just the parts whose name contains it.
bool wants(int argc, char** argv, const char* part) {
  for (int i = 1; i + 1 < argc; ++i) {
    if (std::strcmp(argv[i], "--only") == 0 && std::strstr(part, argv[i + 1]) == nullptr) {
      return false;
    }
  }
  std::printf("part %s\n", part);
  std::fflush(stdout);
  return true;
}

void test_long(Device& device, bool quick) {
  const Shape shape{"long", spec_of(1, 1, 2, 9000, 64, DType::bf16, {9000, 8193})};
  TestCache cache(shape.spec);
  for (const Keys keys : {Keys::whole, Keys::equal, Keys::broken}) {
    if (quick && keys == Keys::broken) continue;
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
  const Shape plain{"f32 d64", spec_of(1, 1, 2, 140, 64, DType::f32)};
  const Shape batch{"bf16 d128, 2 layers, lengths",
                    spec_of(2, 3, 2, 200, 128, DType::bf16, {200, 1, 63})};
  if (part("merger plain whole")) test_options(device, plain, Keys::whole);
  if (part("merger plain broken")) test_options(device, plain, Keys::broken);
  if (part("merger plain walk")) test_options(device, plain, Keys::walk);
  if (!quick && part("merger batch whole")) test_options(device, batch, Keys::whole);
  if (!quick && part("merger batch broken")) test_options(device, batch, Keys::broken);
  if (!quick && part("merger batch walk")) test_options(device, batch, Keys::walk);
  if (part("merger scores")) {
    test_patterns(device, {"f16 d96", spec_of(1, 2, 3, 150, 96, DType::f16, {150, 140})},
                  Keys::whole);
    test_patterns(device, {"bf16 d256", spec_of(1, 1, 2, 90, 256, DType::bf16)}, Keys::equal);
  }
  if (part("merger aligned")) test_aligned(device);
  if (part("merger paged")) {
    CacheSpec spec = spec_of(1, 2, 2, 128, 64, DType::bf16, {128, 0, 100, 2});
    spec.page_tokens = 16;
    spec.log_mass = true;
    spec.positions = true;
    spec.frozen = 3;
    test_options(device, {"paged, log mass, frozen, empty segment", spec}, Keys::whole);
    spec.lengths = {};
    spec.page_tokens = 24;
    spec.padding = 8;
    test_options(device, {"paged 24, padded", spec}, Keys::broken);
  }
  if (part("merger wide")) {
    test_options(device, {"f32 d512", spec_of(1, 1, 1, 100, 512, DType::f32)}, Keys::whole);
  }
  if (part("merger long")) test_long(device, quick);
  if (part("cam")) {
    CacheSpec spec = spec_of(2, 2, 2, 150, 8, DType::bf16, {150, 93, 0, 1, 150, 17, 2, 64});
    spec.frozen = 4;
    test_cam(device, {"frozen, lengths", spec});
    spec = spec_of(1, 2, 3, 130, 8, DType::f32, {130, 40});
    spec.positions = true;
    test_cam(device, {"positions", spec});
    if (!quick) test_cam(device, {"long", spec_of(1, 1, 2, 9000, 8, DType::f16, {9000, 8192})});
  }
  if (part("d2o")) {
    test_d2o(device, {"f32 d72", spec_of(2, 2, 2, 120, 72, DType::f32, {120, 50})}, Keys::walk);
    CacheSpec spec = spec_of(1, 1, 2, 128, 64, DType::bf16);
    spec.page_tokens = 16;
    spec.log_mass = true;
    spec.frozen = 3;
    test_d2o(device, {"bf16 d64, paged, log mass, frozen", spec}, Keys::walk);
    test_d2o(device, {"bf16 d64, paged, log mass, frozen", spec}, Keys::equal);
  }
  if (part("fold")) {
    for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
      for (const u32 width : {64u, 96u, 128u, 256u, 72u}) {
        if (quick && (width == 96 || width == 256)) continue;
        CacheSpec spec = spec_of(2, 1, 2, 210, width, dtype, {210, 130, 64, 1});
        const Shape shape{dtype == DType::f32    ? "f32"
                          : dtype == DType::bf16 ? "bf16"
                                                 : "f16",
                          spec};
        test_fold(device, shape, Keys::walk);
        if (width == 128 && quick) continue;
        test_fold(device, shape, Keys::equal);
        test_fold(device, shape, Keys::broken);
      }
    }
    CacheSpec spec = spec_of(1, 1, 2, 256, 64, DType::bf16);
    spec.page_tokens = 16;
    spec.log_mass = true;
    spec.positions = true;
    spec.frozen = 5;
    test_fold(device, {"paged, log mass, frozen", spec}, Keys::walk);
    if (!quick) {
      test_fold(device, {"long", spec_of(1, 1, 2, 6000, 128, DType::bf16)}, Keys::walk);
    }
  }
  if (!quick && part("merger longer")) test_longer(device);
  std::printf(
      "segments compared: %llu, left out because a cosine is within 1e-5 of a decision: "
      "%llu\n",
      static_cast<unsigned long long>(compared), static_cast<unsigned long long>(skipped));
  return finish("test_merge");
}
