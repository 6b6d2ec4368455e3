// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
// Scores on the device against the CPU library's.
#include <kvlean/cuda/score_attention.cuh>

#include "tests/cuda/check.cuh"

namespace {

using namespace cuda_test;
namespace gpu = kvlean::cuda;
using kvlean::GroupReduction;
using kvlean::Pooling;
using kvlean::PoolOrder;
using kvlean::SnapKVScorer;

const char* name_of(DType dtype) {
  return dtype == DType::f32 ? "f32" : dtype == DType::f16 ? "f16" : "bf16";
}

/// Query rows that both sides see, and what goes with them.
struct TestQueries {
  std::vector<u8> bytes;
  std::vector<float> lse;      // [layer][sequence][head][count], or empty
  std::vector<i32> positions;  // [sequence][count], or empty
  std::vector<u32> counts;     // [sequence], or empty
  std::vector<float> sinks;    // [layer][head], or empty
  DeviceArray<u8> device;
  DeviceArray<float> device_lse, device_sinks;
  DeviceArray<i32> device_positions;
  DeviceArray<u32> device_counts;
  const CacheSpec* spec = nullptr;
  u32 count = 0;

  TestQueries(const CacheSpec& cache, u32 queries, u64 seed) : spec(&cache), count(queries) {
    Random random(seed);
    const std::size_t elements =
        std::size_t{cache.layers} * cache.sequences * heads() * count * cache.key_width;
    bytes.resize(elements * kvlean::size_bytes(cache.key_dtype));
    for (std::size_t i = 0; i < elements; ++i) {
      kvlean::store_element(bytes.data() + i * kvlean::size_bytes(cache.key_dtype), cache.key_dtype,
                            random.between(-2.0f, 2.0f));
    }
    device.upload(bytes);
  }
  u32 heads() const { return spec->kv_heads * spec->group_size; }
  u32 count_of(u32 sequence) const { return counts.empty() ? count : counts[sequence]; }
  std::size_t offset(u32 layer, u32 sequence) const {
    return (std::size_t{layer} * spec->sequences + sequence) * heads() * count;
  }
  void upload() {
    if (!lse.empty()) device_lse.upload(lse);
    if (!positions.empty()) device_positions.upload(positions);
    if (!counts.empty()) device_counts.upload(counts);
    if (!sinks.empty()) device_sinks.upload(sinks);
  }
  gpu::Queries on_device(const gpu::CacheView& cache) const {
    gpu::Queries queries = gpu::Queries::contiguous(cache, device.data(), count);
    queries.lse = lse.empty() ? nullptr : device_lse.data();
    queries.positions = positions.empty() ? nullptr : device_positions.data();
    queries.counts = counts.empty() ? nullptr : device_counts.data();
    return queries;
  }
  kvlean::Queries on_host(u32 layer, u32 sequence) {
    kvlean::Queries queries;
    queries.rows.data = bytes.data() + offset(layer, sequence) * spec->key_width *
                                           kvlean::size_bytes(spec->key_dtype);
    queries.rows.dtype = spec->key_dtype;
    queries.rows.width = spec->key_width;
    queries.rows.heads = heads();
    queries.rows.tokens = count;
    queries.rows.token_stride = spec->key_width;
    queries.rows.head_stride = static_cast<i64>(spec->key_width) * count;
    queries.count = count_of(sequence);
    if (!positions.empty()) queries.positions = positions.data() + std::size_t{sequence} * count;
    if (!lse.empty()) queries.lse = lse.data() + offset(layer, sequence);
    return queries;
  }
};

struct Options {
  kvlean::AttentionSpec attention;
  kvlean::Mask mask = kvlean::Mask::causal;
  i32 first_position = -1;
  u32 observers = 0;
};

/// Scores of one layer of one sequence on the CPU.
struct HostScores {
  std::vector<float> rank, mass;
  std::vector<u32> lengths;
  kvlean::Scores scores;

  HostScores(const kvlean::CacheView& cache, u32 stride)
      : rank(std::size_t{cache.segments} * stride), mass(rank.size()) {
    for (u32 s = 0; s < cache.segments; ++s) lengths.push_back(cache.length(s));
    scores.segments = cache.segments;
    scores.lengths = lengths.data();
    scores.rank = {rank.data(), u64{stride}};
    scores.mass = {mass.data(), u64{stride}};
  }
};

/// |got - want| within `relative` of the largest finite value of each segment; NaN where expected.
void compare_scores(const TestCache& cache, u32 first, const std::vector<float>& got,
                    const HostScores& want, bool of_mass, double relative, const char* what) {
  const u32 stride = cache.spec().tokens;
  for (u32 h = 0; h < cache.spec().kv_heads; ++h) {
    const u32 s = first + h;
    const float* a = got.data() + std::size_t{s} * stride;
    const float* b = (of_mass ? want.mass : want.rank).data() + std::size_t{h} * stride;
    double largest = 0.0;
    for (u32 t = 0; t < cache.lengths[s]; ++t) {
      if (std::isfinite(b[t]) && std::fabs(b[t]) < 1e29f) {
        largest = std::max(largest, std::fabs(static_cast<double>(b[t])));
      }
    }
    u32 differ = 0;
    u32 worst = 0;
    double most = -1.0;
    for (u32 t = 0; t < cache.lengths[s]; ++t) {
      const double error = std::fabs(static_cast<double>(a[t]) - static_cast<double>(b[t]));
      const bool same = a[t] == b[t] || (std::isnan(a[t]) && std::isnan(b[t]));
      if (same || error <= relative * largest + 1e-7) continue;
      ++differ;
      if (!(error <= most)) {
        most = error;
        worst = t;
      }
    }
    CHECK_THAT(differ == 0,
               "%s: segment %u (length %u): %u tokens differ, worst %u: %.9g, expected %.9g "
               "(largest %.4g)",
               what, s, cache.lengths[s], differ, worst, a[worst], b[worst], largest);
  }
}

struct Fixture {
  TestCache& cache;
  TestQueries& queries;
  Options options;
  Device& device;
  double tolerance;

  template <class Scorer>
  void run(const char* what, const Scorer& scorer, bool window, bool compare_mass,
           double relative = -1.0, u64 seed = 0) {
    const u32 stride = cache.spec().tokens;
    DeviceArray<float> rank(std::size_t{cache.num_segments()} * stride);
    DeviceArray<float> mass(rank.size());
    gpu::Observation seen;
    seen.attention.scale = options.attention.scale;
    seen.attention.softcap = options.attention.softcap;
    seen.attention.sliding_window = options.attention.sliding_window;
    seen.attention.sink_logits = queries.sinks.empty() ? nullptr : queries.device_sinks.data();
    gpu::Queries q = queries.on_device(cache.view());
    q.mask = options.mask;
    q.first_position = options.first_position;
    (window ? seen.window : seen.reference) = q;
    const gpu::Scores scores{{rank.data(), stride}, {mass.data(), stride}};
    device.reset();
    if constexpr (std::is_same_v<Scorer, kvlean::RandomScorer>) {
      CHECK_OK(gpu::score(device.context(), cache.view(), scorer, seen, scores, seed));
    } else {
      CHECK_OK(gpu::score(device.context(), cache.view(), scorer, seen, scores));
    }
    CHECK_OK(device.take_error());
    CHECK_THAT(rank.intact() && mass.intact() && device.memory.intact(), "%s wrote behind", what);
    const std::vector<float> got_rank = rank.download();
    const std::vector<float> got_mass = mass.download();
    kvlean::Workspace workspace;
    kvlean::PlanOptions plan_options;
    plan_options.seed = seed;
    for (u32 l = 0; l < cache.spec().layers; ++l) {
      for (u32 b = 0; b < cache.spec().sequences; ++b) {
        const kvlean::CacheView view = cache.layer(l, b);
        HostScores want(view, stride);
        kvlean::Observation on_host;
        on_host.attention = options.attention;
        if (!queries.sinks.empty()) {
          on_host.attention.sink_logits = queries.sinks.data() + std::size_t{l} * queries.heads();
        }
        kvlean::Queries hq = queries.on_host(l, b);
        hq.mask = options.mask;
        hq.first_position = options.first_position;
        (window ? on_host.window : on_host.reference) = hq;
        kvlean::Context context{workspace, plan_options};
        const Status status = scorer.score(view, on_host, context, want.scores);
        CHECK_THAT(static_cast<bool>(status), "%s on the CPU: %s", what, status.message());
        const double bound = relative >= 0.0 ? relative : tolerance;
        compare_scores(cache, cache.segment_of(l, b), got_rank, want, false, bound, what);
        if (compare_mass) {
          const std::string mass_name = std::string(what) + ", mass";
          compare_scores(cache, cache.segment_of(l, b), got_mass, want, true, bound,
                         mass_name.c_str());
        }
      }
    }
  }

  void attention_scorers() {
    run("h2o", kvlean::H2OScorer{}, false, true);
    run("h2o sum", kvlean::H2OScorer{.group = GroupReduction::sum}, false, true);
    run("h2o max", kvlean::H2OScorer{.group = GroupReduction::max}, false, true);
    run("observed_attention", kvlean::ObservedAttentionScorer{}, false, true);
    run("snapkv", SnapKVScorer{}, true, true);
    run("snapkv wide", SnapKVScorer{.window = 16, .kernel = 31, .pooling = Pooling::max}, true,
        true);
    run("snapkv max group", SnapKVScorer{.window = 0, .kernel = 7, .group = GroupReduction::max},
        true, true);
    run("snapkv group then pool",
        SnapKVScorer{.window = 9,
                     .kernel = 3,
                     .pooling = Pooling::max,
                     .order = PoolOrder::query_mean_group_pool,
                     .group = GroupReduction::max,
                     .pin_window = false},
        true, true);
    run("snapkv rows",
        SnapKVScorer{.window = 12,
                     .kernel = 5,
                     .pooling = Pooling::max,
                     .order = PoolOrder::pool_query_mean_group},
        true, true);
    run("tova", kvlean::TOVAScorer{}, true, true);
    run("tova unpinned", kvlean::TOVAScorer{.pin_last = false}, true, true);
  }
  void key_scorers() {
    run("knorm", kvlean::KeyNormScorer{}, false, false);
    run("keydiff", kvlean::KeyDiffScorer{}, false, false);
    run("streaming_llm", kvlean::StreamingLLMScorer{.sinks = 3}, false, false, 0.0);
    run("random", kvlean::RandomScorer{}, false, false, 0.0, 77);
  }
};

void set_key(TestCache& cache, u32 segment, u32 token, float value) {
  const u32 l = segment / (cache.spec().sequences * cache.spec().kv_heads);
  const u32 q = segment / cache.spec().kv_heads % cache.spec().sequences;
  kvlean::CacheView view = cache.layer(l, q);
  std::vector<float> row(cache.spec().key_width, value);
  kvlean::store_row(view.keys, segment % cache.spec().kv_heads, token, row.data());
}

}  // namespace

int main(int argc, char** argv) {
  const bool quick = parse_quick(argc, argv);
  Device device(std::size_t{256} << 20);
  const std::vector<u32> widths =
      quick ? std::vector<u32>{64, 128} : std::vector<u32>{64, 96, 128, 256, 80};
  for (const DType dtype : {DType::bf16, DType::f16, DType::f32}) {
    for (const u32 width : widths) {
      for (const u32 group : quick ? std::vector<u32>{3} : std::vector<u32>{1, 4, 16}) {
        CacheSpec spec;
        spec.seed = width + group;
        spec.kv_heads = 2;
        spec.group_size = group;
        spec.tokens = group == 4 ? 333 : 201;
        spec.key_width = width;
        spec.with_dtype(dtype);
        test_case("%s width %u group %u", name_of(dtype), width, group);
        TestCache cache(spec);
        TestQueries queries(spec, 57, 5);
        queries.upload();
        Fixture fixture{cache, queries, {}, device, 1e-4};
        fixture.attention_scorers();
        fixture.key_scorers();
      }
    }
    // Everything at once: batches, lengths, pages, positions, log mass, masks, sinks, caps.
    for (u32 variant = 0; variant < (quick ? 3u : 10u); ++variant) {
      CacheSpec spec;
      spec.seed = 100 + variant;
      spec.layers = 2;
      spec.sequences = 3;
      spec.kv_heads = 2;
      spec.group_size = 1 + variant % 4;
      spec.tokens = 300;
      spec.lengths = {300, 1, 177};
      spec.key_width = variant % 2 == 0 ? 128 : 64;
      spec.page_tokens = variant % 3 == 0 ? 16 : variant % 3 == 1 ? 0 : 24;
      spec.positions = variant % 2 == 1;
      spec.log_mass = variant % 4 >= 2;
      spec.padding = variant == 4 ? 8 : 0;
      spec.with_dtype(dtype);
      test_case("%s variant %u", name_of(dtype), variant);
      TestCache cache(spec);
      TestQueries queries(spec, variant == 7 ? 300 : 40, 50 + variant);
      Options options;
      if (variant == 1 || variant == 5) options.attention.softcap = 3.0f;
      if (variant == 2 || variant == 6 || variant == 7) options.attention.sliding_window = 50;
      if (variant == 3) options.attention.scale = 0.3f;
      if (variant == 4) options.mask = kvlean::Mask::none;
      if (variant == 8) options.first_position = 100;
      if (variant == 5 || variant == 6) {
        Random random(9);
        queries.sinks.resize(std::size_t{spec.layers} * queries.heads());
        for (float& x : queries.sinks) x = random.between(-1.0f, 3.0f);
      }
      if (variant == 9) {
        queries.positions.resize(std::size_t{spec.sequences} * queries.count);
        for (u32 b = 0; b < spec.sequences; ++b) {
          for (u32 i = 0; i < queries.count; ++i) {
            queries.positions[b * queries.count + i] = static_cast<i32>(b * 20 + i * 9);
          }
        }
      }
      if (variant == 3 || variant == 8) {  // a log-sum-exp of the engine's
        Random random(3);
        queries.lse.resize(std::size_t{spec.layers} * spec.sequences * queries.heads() *
                           queries.count);
        for (float& x : queries.lse) x = random.between(3.0f, 9.0f);
      }
      if (variant == 0) queries.counts = {40, 1, 33};
      queries.upload();
      Fixture fixture{cache, queries, options, device, 1e-4};
      fixture.attention_scorers();
      fixture.key_scorers();
    }
    {
      test_case("%s bad data", name_of(dtype));
      CacheSpec spec;
      spec.kv_heads = 2;
      spec.group_size = 2;
      spec.tokens = 150;
      spec.key_width = 64;
      spec.with_dtype(dtype);
      TestCache cache(spec);
      set_key(cache, 0, 6, NAN);
      set_key(cache, 1, 9, INFINITY);
      cache.upload();
      TestQueries queries(spec, 150, 4);
      queries.upload();
      Fixture fixture{cache, queries, {}, device, 1e-4};
      fixture.attention_scorers();
      fixture.run("knorm", kvlean::KeyNormScorer{}, false, false);
      fixture.run("keydiff", kvlean::KeyDiffScorer{}, false, false);
    }
    {
      test_case("%s infinite logits share the mass", name_of(dtype));
      CacheSpec spec;
      spec.kv_heads = 1;
      spec.group_size = 2;
      spec.tokens = 140;
      spec.key_width = 128;
      spec.log_mass = true;
      spec.with_dtype(dtype);
      TestCache cache(spec);
      cache.log_mass[20] = INFINITY;
      cache.log_mass[90] = INFINITY;
      cache.log_mass[33] = -INFINITY;
      cache.upload();
      TestQueries queries(spec, 140, 4);
      queries.upload();
      Fixture fixture{cache, queries, {}, device, 1e-4};
      fixture.attention_scorers();
    }
    if (!quick) {
      // As many rows as fill the device at once: both passes by warpgroups where there are any.
      for (const u32 window : {0u, 90u}) {
        test_case("%s many rows, window %u", name_of(dtype), window);
        CacheSpec spec;
        spec.seed = 3;
        spec.layers = 4;
        spec.sequences = 3;
        spec.kv_heads = 2;
        spec.group_size = 16;
        spec.tokens = 700;
        spec.lengths = {700, 300, 177};
        spec.key_width = dtype == DType::bf16 ? 128 : 64;
        spec.with_dtype(dtype);
        TestCache cache(spec);
        set_key(cache, 1, 6, NAN);
        set_key(cache, 2, 9, INFINITY);
        cache.upload();
        TestQueries queries(spec, 176, 8);
        queries.upload();
        Options options;
        options.attention.sliding_window = window;
        Fixture fixture{cache, queries, options, device, 1e-4};
        fixture.run("h2o", kvlean::H2OScorer{}, false, true);
      }
    }
    if (!quick) {
      test_case("%s long", name_of(dtype));
      CacheSpec spec;
      spec.layers = 1;
      spec.kv_heads = 2;
      spec.group_size = 4;
      spec.tokens = 5000;
      spec.key_width = 128;
      spec.with_dtype(dtype);
      TestCache cache(spec);
      TestQueries queries(spec, 600, 8);
      queries.upload();
      Fixture fixture{cache, queries, {}, device, 1e-4};
      fixture.run("h2o", kvlean::H2OScorer{}, false, true);
      fixture.run("h2o max", kvlean::H2OScorer{.group = GroupReduction::max}, false, true);
      fixture.run("snapkv", SnapKVScorer{}, true, true);
      fixture.run("snapkv 64", SnapKVScorer{.window = 64, .pooling = Pooling::max}, true, true);
      fixture.run("tova", kvlean::TOVAScorer{}, true, true);
      fixture.key_scorers();
    }
  }
  {
    test_case("errors");
    CacheSpec spec;
    TestCache cache(spec);
    Device small(4096);
    TestQueries queries(spec, 8, 2);
    DeviceArray<float> rank(std::size_t{2} * spec.tokens);
    const gpu::Scores scores{{rank.data(), spec.tokens}, {}};
    gpu::Observation seen;
    const auto score = [&](auto scorer) {
      return gpu::score(small.context(), cache.view(), scorer, seen, scores);
    };
    CHECK_STATUS(score(SnapKVScorer{}), StatusCode::missing_observation);
    CHECK_STATUS(score(kvlean::H2OScorer{}), StatusCode::missing_observation);
    CHECK_STATUS(score(kvlean::ExternalScorer{}), StatusCode::missing_observation);
    seen.window = seen.reference = queries.on_device(cache.view());
    CHECK_STATUS(score(SnapKVScorer{.kernel = 4}), StatusCode::invalid_option);
    gpu::Workspace none(nullptr, 0);
    CHECK_STATUS(
        gpu::score({small.stream, none, nullptr}, cache.view(), SnapKVScorer{}, seen, scores),
        StatusCode::workspace_too_small);
    CHECK_STATUS(gpu::score(small.context(), cache.view(), SnapKVScorer{}, seen, {}),
                 StatusCode::null_pointer);
    gpu::CacheView odd = cache.view();
    odd.key_width = 3;
    CHECK_STATUS(gpu::score(small.context(), odd, kvlean::KeyNormScorer{}, seen, scores),
                 StatusCode::invalid_shape);
    // Exactly the bytes that are asked for are enough.
    const std::size_t bytes = gpu::score_bytes_required(cache.view(), SnapKVScorer{}, seen);
    DeviceArray<u8> memory(bytes);
    gpu::Workspace exact(memory.data(), bytes);
    CHECK_OK(
        gpu::score({small.stream, exact, nullptr}, cache.view(), SnapKVScorer{}, seen, scores));
    CHECK_OK(small.take_error());
    CHECK_TRUE(memory.intact());
  }
  return finish("test_score");
}
