// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
// Scores of many kinds, and the CPU library's plan for them: what test_select and test_ranks
// compare the device with.
#pragma once

#include "kvlean/cuda/select.cuh"
#include "tests/cuda/check.cuh"

namespace cuda_test {

using kvlean::cuda::AllocatorKind;

enum class Pattern {
  uniform,
  skewed,  ///< like attention mass: many tiny, few large
  few,     ///< five values: ties everywhere
  zeros,   ///< 0 and -0
  equal,
  some_nan,
  all_nan,
  infinite,  ///< both infinities, NaN of both signs, numbers of all sizes, subnormals
  negative,
  ascending,
  per_head,  ///< heads differ in size by powers of ten
};
inline constexpr Pattern all_patterns[] = {Pattern::uniform,   Pattern::skewed,   Pattern::few,
                                           Pattern::zeros,     Pattern::equal,    Pattern::some_nan,
                                           Pattern::all_nan,   Pattern::infinite, Pattern::negative,
                                           Pattern::ascending, Pattern::per_head};
inline const char* name_of(Pattern pattern) {
  constexpr const char* names[] = {"uniform",  "skewed",    "few",     "zeros",
                                   "equal",    "some_nan",  "all_nan", "infinite",
                                   "negative", "ascending", "per_head"};
  return names[static_cast<int>(pattern)];
}

inline float draw(Pattern pattern, Random& random, u32 token, u32 head) {
  const float u = random.uniform();
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const float infinity = std::numeric_limits<float>::infinity();
  switch (pattern) {
    case Pattern::uniform:
      return u;
    case Pattern::skewed:
      return std::exp(-12.0f * u) * u * u;
    case Pattern::few:
      return static_cast<float>(random.below(5)) * 0.25f;
    case Pattern::zeros:
      return u < 0.5f ? 0.0f : -0.0f;
    case Pattern::equal:
      return 0.125f;
    case Pattern::some_nan:
      return u < 0.3f ? nan : random.between(-1.0f, 1.0f);
    case Pattern::all_nan:
      return u < 0.5f ? nan : -nan;
    case Pattern::infinite: {
      if (u < 0.1f) return infinity;
      if (u < 0.2f) return -infinity;
      if (u < 0.3f) return u < 0.25f ? nan : -nan;
      if (u < 0.35f) return 1e-42f * static_cast<float>(random.below(9));
      return std::ldexp(random.between(-1.0f, 1.0f), static_cast<int>(random.below(200)) - 100);
    }
    case Pattern::negative:
      return -u * 3.0f;
    case Pattern::ascending:
      return static_cast<float>(token) * 0.001f;
    case Pattern::per_head:
      return u * std::pow(10.0f, static_cast<float>(head % 5) - 2.0f);
  }
  return 0.0f;
}

/// Scores [segment][stride] on both sides.
struct TestScores {
  std::vector<float> host;
  DeviceArray<float> device;
  u64 stride = 0;

  TestScores(const TestCache& cache, Pattern pattern, u64 seed) {
    Random random(seed * 7919 + 13);
    stride = cache.spec().tokens + 3;  // odd, so that segments are not aligned
    host.resize(stride * cache.num_segments());
    for (u32 s = 0; s < cache.num_segments(); ++s) {
      for (u64 t = 0; t < stride; ++t) {
        host[s * stride + t] =
            draw(pattern, random, static_cast<u32>(t), s % cache.spec().kv_heads);
      }
    }
    device.upload(host);
  }
  kvlean::cuda::DeviceRagged<const float> view() const { return {device.data(), stride, nullptr}; }
};

/// Hands the CPU library scores that are there already.
struct GivenScorer {
  const TestCache* cache;
  const TestScores* given;

  Status score(const kvlean::CacheView& view, const kvlean::Observation&, kvlean::Context&,
               kvlean::Scores& scores) const noexcept {
    const u32 first = cache->segment_of(view.origin.layer, view.origin.sequence);
    for (u32 h = 0; h < view.segments; ++h) {
      const float* from = given->host.data() + (first + h) * given->stride;
      std::copy_n(from, view.length(h), scores.rank.segment(h));
    }
    return {};
  }
};

/// The plans of all layers of one sequence, by the CPU library.
struct ExpectedPlans {
  kvlean::Workspace workspace;
  std::vector<kvlean::CacheView> views;
  std::vector<kvlean::CompressionPlan> plans;
  Status status;

  template <class Allocator>
  void plan_with(TestCache& cache, const TestScores& scores, u32 sequence,
                 const kvlean::cuda::SelectOptions& options, const Allocator& allocator) {
    for (u32 l = 0; l < cache.spec().layers; ++l) views.push_back(cache.layer(l, sequence));
    plans.resize(views.size());
    const std::vector<kvlean::Observation> seen(views.size());
    const GivenScorer scorer{&cache, &scores};
    const kvlean::EvictReducer reducer{options.recent_share};
    kvlean::PlanOptions plan_options;
    plan_options.protection = options.protection;
    plan_options.sharing = options.sharing;
    plan_options.layer = options.layer;
    plan_options.num_layers = options.num_layers;
    status = kvlean::plan_layers(kvlean::stages_of(scorer, allocator, reducer), views, seen,
                                 options.budget, workspace, plans, plan_options);
  }
  /// `head_weight`: the options' device array, on the host.
  void plan(TestCache& cache, const TestScores& scores, u32 sequence,
            const kvlean::cuda::SelectOptions& options, const float* head_weight) {
    kvlean::AdaKVAllocator adakv;
    adakv.safeguard = options.safeguard;
    adakv.mode = options.mode;
    adakv.normalize = options.normalize;
    adakv.head_weight = head_weight;
    adakv.head_weight_stride = options.head_weight_stride;
    switch (options.allocator) {
      case AllocatorKind::uniform:
        return plan_with(cache, scores, sequence, options, kvlean::UniformAllocator{});
      case AllocatorKind::adakv:
        return plan_with(cache, scores, sequence, options, adakv);
      case AllocatorKind::adakv_layers:
        return plan_with(cache, scores, sequence, options,
                         kvlean::AdaKVLayersAllocator{options.safeguard, head_weight,
                                                      options.head_weight_stride});
      case AllocatorKind::pyramid:
        return plan_with(
            cache, scores, sequence, options,
            kvlean::PyramidAllocator<>{options.beta, options.form, {}, options.window});
      case AllocatorKind::pyramid_adakv:
        return plan_with(cache, scores, sequence, options,
                         kvlean::PyramidAllocator<kvlean::AdaKVAllocator>{
                             options.beta, options.form, adakv, options.window});
    }
  }
};

inline const char* name_of(AllocatorKind kind) {
  constexpr const char* names[] = {"uniform", "adakv", "adakv_layers", "pyramid", "pyramid_adakv"};
  return names[static_cast<int>(kind)];
}

/// Selects on the device and compares with the CPU's plans, and the masks with the anchors.
inline void check_selection(TestCache& cache, const TestScores& scores, Device& device,
                            const kvlean::cuda::SelectOptions& options,
                            const std::vector<float>& head_weight = {}) {
  const u32 segments = cache.num_segments();
  const u32 tokens = cache.spec().tokens;
  device.reset();
  DevicePlan plan({.segments = segments, .max_slots = tokens});
  DeviceArray<u32> limit(segments);
  DeviceArray<u8> keep(std::size_t{segments} * tokens);
  DeviceArray<u32> slot_of(std::size_t{segments} * tokens);
  kvlean::cuda::Selection out;
  out.plan = plan.view;
  out.limit = limit.data();
  out.keep = keep.data();
  out.slot_of = slot_of.data();
  out.token_stride = tokens;
  const kvlean::cuda::CacheView view = cache.view();
  const std::size_t bytes = kvlean::cuda::select_bytes_required(view, options);
  CHECK_THAT(bytes <= device.memory.size(), "the test's workspace is too small: %zu of %zu", bytes,
             device.memory.size());
  kvlean::cuda::Workspace workspace(device.memory.data(), bytes);
  const kvlean::cuda::Context context{device.stream, workspace, device.error_word.data()};
  CHECK_OK(kvlean::cuda::select(view, scores.view(), options, context, out));
  const Status got = device.take_error();

  std::vector<std::unique_ptr<ExpectedPlans>> expected;
  Status want;
  for (u32 q = 0; q < cache.spec().sequences; ++q) {
    expected.push_back(std::make_unique<ExpectedPlans>());
    expected.back()->plan(cache, scores, q, options,
                          head_weight.empty() ? nullptr : head_weight.data());
    if (want.ok()) want = expected.back()->status;
  }
  // Where several layers fail, each in its own way, the first to be told may be another one's.
  const bool is_told =
      got == want || (cache.spec().layers > 1 && got.ok() == want.ok() && !got.ok());
  CHECK_THAT(is_told, "the error word says '%s', the CPU '%s'", got.message(), want.message());
  CHECK_TRUE(plan.memory.intact() && limit.intact() && keep.intact() && slot_of.intact());
  if (!got.ok() || !want.ok()) return;
  const HostPlan host(plan.view);
  const std::vector<u32> host_limit = limit.download();
  const std::vector<u8> host_keep = keep.download();
  const std::vector<u32> host_slot = slot_of.download();
  for (u32 q = 0; q < cache.spec().sequences; ++q) {
    for (u32 l = 0; l < cache.spec().layers; ++l) {
      compare_anchors(expected[q]->plans[l], host, cache.segment_of(l, q));
    }
  }
  for (u32 s = 0; s < segments; ++s) {
    const u32 length = cache.lengths[s];
    if (!options.shares_tokens()) {
      CHECK_THAT(host_limit[s] == host.length[s], "segment %u: limit %u, %u slots", s,
                 host_limit[s], host.length[s]);
    }
    u32 j = 0;
    for (u32 t = 0; t < length; ++t) {
      const bool kept = j < host.length[s] && host.anchor[host.view.slot(s, j)] == t;
      const std::size_t at = std::size_t{s} * tokens + t;
      if (host_keep[at] != (kept ? 1 : 0) || host_slot[at] != (kept ? j : 0xffffffffu)) {
        CHECK_THAT(false, "segment %u token %u: kept %d, keep %u, slot %u", s, t, kept ? 1 : 0,
                   host_keep[at], host_slot[at]);
        break;
      }
      j += kept ? 1 : 0;
    }
  }
}

}  // namespace cuda_test
