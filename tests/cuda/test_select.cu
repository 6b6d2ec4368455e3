// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
// Allocation and selection on the device against the CPU library's, to the last token.
#include <limits>

#include "tests/cuda/select_cases.cuh"

using namespace cuda_test;
using kvlean::Budget;
using kvlean::PyramidForm;
using kvlean::SafeguardMode;
using kvlean::Sharing;
using kvlean::cuda::SelectOptions;

namespace {

__global__ void keys_of(const float* scores, u32 count, u32* key, u64* token_key) {
  const u32 i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= count) return;
  key[i] = kvlean::cuda::device_score_key(scores[i]);
  token_key[i] = kvlean::cuda::device_token_key(scores[i], i);
}

void test_order() {
  test_case("order of scores");
  std::vector<float> scores;
  Random random(3);
  for (int i = 0; i < 4096; ++i) {
    const u32 bits = static_cast<u32>(random.next());
    float value;
    std::memcpy(&value, &bits, 4);
    scores.push_back(value);
    scores.push_back(draw(Pattern::infinite, random, 0, 0));
  }
  const u32 count = static_cast<u32>(scores.size());
  const DeviceArray<float> device(scores);
  const DeviceArray<u32> key(count);
  const DeviceArray<u64> token_key(count);
  CUDA_REQUIRE(cudaDeviceSynchronize());
  u32* key_data = key.data();
  u64* token_key_data = token_key.data();
  Device caller(4096);
  CHECK_OK(kvlean::cuda::launch(caller.context(), {.grid = {count / 256}, .block = {256}}, keys_of,
                                static_cast<const float*>(device.data()), count, key_data,
                                token_key_data));
  CHECK_OK(caller.take_error());
  std::vector<u32> want;
  std::vector<u64> want_token;
  for (u32 i = 0; i < count; ++i) {
    want.push_back(kvlean::score_key(scores[i]));
    want_token.push_back(kvlean::token_key(scores[i], i));
  }
  compare_exact(key.download(), want, "score_key");
  compare_exact(token_key.download(), want_token, "token_key");

  for (u32 length : {0u, 1u, 5u, 36u, 37u, 100u}) {
    for (u32 sinks : {0u, 4u, 200u}) {
      for (u32 recent : {0u, 32u, 99u, 0xffffffffu}) {
        for (u32 frozen : {0u, 3u, 50u}) {
          const kvlean::Protection protection{sinks, recent};
          const auto range = kvlean::cuda::ProtectedRange::of(protection, length, frozen);
          test_case("protected: length %u sinks %u recent %u frozen %u", length, sinks, recent,
                    frozen);
          CHECK_THAT(range.count(length) == protection.count(length, frozen), "count %u",
                     range.count(length));
          for (u32 t = 0; t < length; ++t) {
            CHECK_THAT(range.covers(t) == protection.covers(t, length, frozen), "token %u", t);
          }
        }
      }
    }
  }
}

struct Shape {
  CacheSpec spec;
  const char* label;
};

CacheSpec small_spec(u32 layers, u32 sequences, u32 heads, u32 tokens,
                     std::vector<u32> lengths = {}) {
  CacheSpec spec;
  spec.layers = layers;
  spec.sequences = sequences;
  spec.kv_heads = heads;
  spec.tokens = tokens;
  spec.lengths = std::move(lengths);
  spec.key_width = 8;
  spec.with_dtype(DType::f16);
  return spec;
}

SelectOptions options_of(AllocatorKind allocator, Budget budget) {
  SelectOptions options;
  options.allocator = allocator;
  options.budget = budget;
  return options;
}

void check(TestCache& cache, const TestScores& scores, Device& device, const SelectOptions& options,
           Pattern pattern, const char* label, const std::vector<float>& weights = {}) {
  test_case(
      "%s, %s, %s, budget %g%s, mode %d safeguard %g, protect %u+%u, sharing %d/%u, "
      "recent_share %g, form %d, normalize %d",
      label, name_of(pattern), name_of(options.allocator), options.budget.value(),
      options.budget.is_fraction() ? "" : " slots", static_cast<int>(options.mode),
      static_cast<double>(options.safeguard), options.protection.sinks, options.protection.recent,
      static_cast<int>(options.sharing.kind), options.sharing.page_tokens,
      static_cast<double>(options.recent_share), static_cast<int>(options.form),
      options.normalize ? 1 : 0);
  check_selection(cache, scores, device, options, weights);
}

constexpr AllocatorKind all_allocators[] = {AllocatorKind::uniform, AllocatorKind::adakv,
                                            AllocatorKind::adakv_layers, AllocatorKind::pyramid,
                                            AllocatorKind::pyramid_adakv};

/// Every pattern and allocator at two budgets.
void test_patterns(Device& device, const Shape& shape, bool quick = false) {
  TestCache cache(shape.spec);
  u64 seed = 1;
  for (const Pattern pattern : all_patterns) {
    const TestScores scores(cache, pattern, seed++);
    for (const AllocatorKind allocator : all_allocators) {
      if (quick && (seed + static_cast<u64>(allocator)) % 2 != 0) continue;
      check(cache, scores, device, options_of(allocator, Budget::fraction(0.35)), pattern,
            shape.label);
      SelectOptions options = options_of(allocator, Budget::slots(48));
      options.protection = {2, 7};
      options.safeguard = 0.5f;
      check(cache, scores, device, options, pattern, shape.label);
    }
  }
}

/// All options at one or two patterns.
void test_options(Device& device, const Shape& shape, bool thorough) {
  TestCache cache(shape.spec);
  const CacheSpec& spec = shape.spec;
  std::vector<float> weights;
  Random random(77);
  for (u32 i = 0; i < 3 * spec.kv_heads + 64 * spec.kv_heads; ++i) {
    weights.push_back(i % 7 == 3 ? 0.0f : random.between(0.25f, 4.0f));
  }
  const DeviceArray<float> device_weights(weights);
  for (const Pattern pattern : {Pattern::skewed, Pattern::few, Pattern::infinite}) {
    if (!thorough && pattern != Pattern::few) continue;
    const TestScores scores(cache, pattern, 5);
    for (const Budget budget :
         {Budget::fraction(0.0), Budget::fraction(0.2), Budget::fraction(0.9),
          Budget::fraction(1.0), Budget::slots(0), Budget::slots(37), Budget::slots(1u << 20)}) {
      for (const AllocatorKind allocator : all_allocators) {
        SelectOptions options = options_of(allocator, budget);
        check(cache, scores, device, options, pattern, shape.label);
        options.protection = {0, 0};
        check(cache, scores, device, options, pattern, shape.label);
      }
    }
    for (const SafeguardMode mode : {SafeguardMode::hard_floor, SafeguardMode::authors_mix,
                                     SafeguardMode::exact_mix, SafeguardMode::paper_literal}) {
      for (const float safeguard : {0.0f, 0.2f, 0.7f, 1.0f}) {
        for (const AllocatorKind allocator :
             {AllocatorKind::adakv, AllocatorKind::pyramid_adakv, AllocatorKind::adakv_layers}) {
          for (const Budget budget : {Budget::fraction(0.3), Budget::slots(50)}) {
            SelectOptions options = options_of(allocator, budget);
            options.mode = mode;
            options.safeguard = safeguard;
            check(cache, scores, device, options, pattern, shape.label);
            if (safeguard != 0.2f) continue;
            options.head_weight = device_weights.data();
            options.head_weight_stride = spec.kv_heads;
            options.layer = 1;
            check(cache, scores, device, options, pattern, shape.label, weights);
            options.head_weight_stride = 0;
            options.recent_share = 0.5f;
            check(cache, scores, device, options, pattern, shape.label, weights);
            options.head_weight = nullptr;
            options.normalize = true;
            check(cache, scores, device, options, pattern, shape.label);
          }
        }
      }
    }
    for (const PyramidForm form :
         {PyramidForm::exact, PyramidForm::kvpress, PyramidForm::authors}) {
      for (const u32 beta : {1u, 3u, 20u, 65536u}) {
        for (const u32 num_layers : {0u, 32u}) {
          SelectOptions options = options_of(AllocatorKind::pyramid, Budget::fraction(0.4));
          options.form = form;
          options.beta = beta;
          options.num_layers = num_layers;
          options.layer = num_layers != 0 ? 5 : 0;
          check(cache, scores, device, options, pattern, shape.label);
          options.allocator = AllocatorKind::pyramid_adakv;
          options.budget = Budget::slots(60);
          check(cache, scores, device, options, pattern, shape.label);
        }
      }
    }
    for (const float share : {0.25f, 0.5f, 1.0f}) {
      for (const AllocatorKind allocator : all_allocators) {
        SelectOptions options = options_of(allocator, Budget::fraction(0.35));
        options.recent_share = share;
        check(cache, scores, device, options, pattern, shape.label);
      }
    }
    for (const Sharing sharing :
         {Sharing::equal_count(), Sharing::same_tokens(), Sharing::whole_pages(16),
          Sharing::whole_pages(7), Sharing::whole_pages(1)}) {
      for (const AllocatorKind allocator : all_allocators) {
        SelectOptions options = options_of(allocator, Budget::fraction(0.4));
        options.sharing = sharing;
        check(cache, scores, device, options, pattern, shape.label);
        options.protection = {0, 0};
        options.recent_share = 0.25f;
        check(cache, scores, device, options, pattern, shape.label);
      }
    }
  }
}

/// Limits that are given, and limits alone.
void test_parts(Device& device) {
  TestCache cache(small_spec(2, 2, 3, 700, {700, 333}));
  const TestScores scores(cache, Pattern::few, 9);
  const u32 segments = cache.num_segments();
  SelectOptions options = options_of(AllocatorKind::adakv, Budget::fraction(0.3));
  for (const SafeguardMode mode : {SafeguardMode::hard_floor, SafeguardMode::exact_mix}) {
    test_case("allocate() then select_kept(), mode %d", static_cast<int>(mode));
    options.mode = mode;
    device.reset();
    DevicePlan whole({.segments = segments, .max_slots = 700});
    DevicePlan parts({.segments = segments, .max_slots = 700});
    DeviceArray<u32> limit(segments);
    const auto view = cache.view();
    CHECK_OK(kvlean::cuda::select(view, scores.view(), options, device.context(), {whole.view}));
    CHECK_OK(kvlean::cuda::allocate(view, scores.view(), options, device.context(), limit.data()));
    CHECK_OK(kvlean::cuda::select_kept(view, scores.view(), limit.data(), options, device.context(),
                                       {parts.view}));
    CHECK_OK(device.take_error());
    const HostPlan a(whole.view), b(parts.view);
    compare_exact(b.length, a.length, "lengths");
    for (u32 s = 0; s < segments; ++s) {
      for (u32 j = 0; j < a.length[s]; ++j) {
        const u64 at = a.view.slot(s, j);
        if (a.anchor[at] == b.anchor[at]) continue;
        CHECK_THAT(false, "segment %u slot %u: %u, expected %u", s, j, b.anchor[at], a.anchor[at]);
        break;
      }
    }
  }
}

void test_errors(Device& device) {
  TestCache cache(small_spec(1, 1, 2, 100));
  const TestScores scores(cache, Pattern::uniform, 2);
  const auto view = cache.view();
  device.reset();
  DevicePlan plan({.segments = 2, .max_slots = 100});
  const kvlean::cuda::Selection out{plan.view};
  SelectOptions options = options_of(AllocatorKind::adakv, Budget::fraction(0.5));
  test_case("errors at once");
  {
    kvlean::cuda::Workspace tiny(device.memory.data(), 1000);
    const kvlean::cuda::Context context{device.stream, tiny, device.error_word.data()};
    CHECK_STATUS(kvlean::cuda::select(view, scores.view(), options, context, out),
                 StatusCode::workspace_too_small);
  }
  CHECK_STATUS(kvlean::cuda::select(view, {}, options, device.context(), out),
               StatusCode::null_pointer);
  options.safeguard = 1.5f;
  CHECK_STATUS(kvlean::cuda::select(view, scores.view(), options, device.context(), out),
               StatusCode::invalid_option);
  options.safeguard = 0.2f;
  options.budget = Budget::fraction(-1.0);
  CHECK_STATUS(kvlean::cuda::select(view, scores.view(), options, device.context(), out),
               StatusCode::invalid_budget);
  CHECK_OK(device.take_error());
  test_case("more slots than the plan has room for");
  options.budget = Budget::fraction(0.9);
  DevicePlan small({.segments = 2, .max_slots = 50});
  CHECK_OK(kvlean::cuda::select(view, scores.view(), options, device.context(), {small.view}));
  CHECK_STATUS(device.take_error(), StatusCode::destination_too_small);
  CHECK_TRUE(small.memory.intact());
  test_case("a bad head weight");
  const DeviceArray<float> weights(std::vector<float>{1.0f, -1.0f});
  options.head_weight = weights.data();
  CHECK_OK(kvlean::cuda::select(view, scores.view(), options, device.context(), out));
  CHECK_STATUS(device.take_error(), StatusCode::invalid_option);
}

/// Captured into a graph and replayed over changed scores and lengths.
void test_graph(Device& device) {
  test_case("replayed graph");
  TestCache cache(small_spec(3, 1, 4, 9000));
  TestScores scores(cache, Pattern::skewed, 21);
  const SelectOptions options = options_of(AllocatorKind::adakv, Budget::fraction(0.25));
  device.reset();
  DevicePlan plan({.segments = cache.num_segments(), .max_slots = 9000});
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  CUDA_REQUIRE(cudaStreamBeginCapture(device.stream, cudaStreamCaptureModeThreadLocal));
  CHECK_OK(
      kvlean::cuda::select(cache.view(), scores.view(), options, device.context(), {plan.view}));
  CUDA_REQUIRE(cudaStreamEndCapture(device.stream, &graph));
  CUDA_REQUIRE(cudaGraphInstantiate(&executable, graph, 0));
  for (u32 round = 0; round < 3; ++round) {
    for (u32 s = 0; s < cache.num_segments(); ++s) cache.lengths[s] = 9000 - 1234 * round - s;
    cache.upload();
    const TestScores fresh(cache, round == 1 ? Pattern::few : Pattern::skewed, 30 + round);
    scores.host = fresh.host;
    scores.device.upload(scores.host);
    CUDA_REQUIRE(cudaDeviceSynchronize());
    CUDA_REQUIRE(cudaGraphLaunch(executable, device.stream));
    CHECK_OK(device.take_error());
    ExpectedPlans expected;
    expected.plan(cache, scores, 0, options, nullptr);
    CHECK_OK(expected.status);
    const HostPlan host(plan.view);
    for (u32 l = 0; l < 3; ++l) compare_anchors(expected.plans[l], host, cache.segment_of(l, 0));
  }
  CUDA_REQUIRE(cudaGraphExecDestroy(executable));
  CUDA_REQUIRE(cudaGraphDestroy(graph));
}

}  // namespace

int main(int argc, char** argv) {
  const bool quick = parse_quick(argc, argv);
  Device device(std::size_t{quick ? 32u : 512u} << 20);
  test_order();
  test_errors(device);
  test_parts(device);
  if (quick) {
    CacheSpec spec = small_spec(2, 2, 3, 5000, {5000, 4097});
    test_patterns(device, {small_spec(2, 1, 2, 90, {90, 37, 36, 1}), "2x1x2, short and ragged"},
                  true);
    TestCache cache(spec);
    const TestScores scores(cache, Pattern::few, 3);
    for (const AllocatorKind allocator : all_allocators) {
      check(cache, scores, device, options_of(allocator, Budget::fraction(0.35)), Pattern::few,
            "2x2x3 of 5000");
    }
    test_patterns(device, {small_spec(1, 2, 8, 300, {300, 111}), "1x2x8, one launch"}, true);
    return finish("test_select (quick)");
  }
  test_graph(device);
  test_patterns(device, {small_spec(1, 1, 1, 1), "one token"});
  test_patterns(device, {small_spec(1, 1, 8, 4096), "4096"});
  test_patterns(device, {small_spec(3, 1, 8, 4097 + 4096), "3x8 of 8193, one launch"});
  test_patterns(device, {small_spec(1, 8, 8, 17001, {17001, 0, 1, 16385, 9000, 36, 12345, 4096}),
                         "8x8 of up to 17001, one launch"});
  test_patterns(device, {small_spec(2, 2, 4, 200, {200, 61}), "200 and 61"});
  test_patterns(device,
                {small_spec(3, 1, 3, 1500, {1500, 0, 1, 33, 1499, 37, 36, 700, 5}), "ragged"});
  test_patterns(device, {small_spec(2, 2, 2, 20011, {20011, 8193}), "20011 and 8193"});
  CacheSpec frozen = small_spec(2, 1, 2, 600);
  frozen.frozen = 45;
  test_patterns(device, {frozen, "frozen 45"});
  CacheSpec positions = small_spec(1, 2, 4, 900, {900, 512});
  positions.positions = true;
  test_patterns(device, {positions, "positions"});
  test_options(device, {small_spec(3, 2, 4, 300, {300, 123}), "3x2x4 of 300, 123"}, true);
  test_options(device, {small_spec(2, 1, 3, 260, {260, 0, 77, 5, 199, 64}), "2x1x3 ragged"}, true);
  test_options(device, {small_spec(2, 1, 8, 9001), "2x1x8 of 9001"}, false);
  test_options(device, {small_spec(32, 1, 8, 500), "32x1x8 of 500"}, false);
  {
    TestCache cache(small_spec(1, 1, 8, 131072));
    for (const Pattern pattern : {Pattern::skewed, Pattern::few, Pattern::equal}) {
      const TestScores scores(cache, pattern, 99);
      for (const AllocatorKind allocator : {AllocatorKind::uniform, AllocatorKind::adakv}) {
        check(cache, scores, device, options_of(allocator, Budget::fraction(0.35)), pattern,
              "8 x 131072");
      }
    }
  }
  return finish("test_select");
}
