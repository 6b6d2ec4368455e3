// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
// Whole compressions on the device against the CPU library: plans, moved rows, graphs.
#include <kvlean/cuda/compress.cuh>
#include <kvlean/cuda/kvmerger.cuh>
#include <kvlean/cuda/massfold.cuh>

#include "tests/cuda/check.cuh"

namespace {

using namespace cuda_test;
namespace gpu = kvlean::cuda;
using kvlean::AnyAllocator;
using kvlean::Budget;
using kvlean::Pooling;
using kvlean::PoolOrder;
using kvlean::SnapKVScorer;

const char* name_of(DType dtype) {
  return dtype == DType::f32 ? "f32" : dtype == DType::f16 ? "f16" : "bf16";
}

/// Queries (with peaks, so that attention is not flat), and attention mass, of a cache.
struct Seen {
  const CacheSpec& spec;
  u32 count;
  std::vector<u8> bytes;
  std::vector<float> mass;  // [segment][tokens]
  DeviceArray<u8> device_bytes;
  DeviceArray<float> device_mass;

  Seen(const TestCache& cache, u32 queries) : spec(cache.spec()), count(queries) {
    Random random(spec.seed + 99);
    const std::size_t elements =
        std::size_t{spec.layers} * spec.sequences * heads() * count * spec.key_width;
    bytes.resize(elements * kvlean::size_bytes(spec.key_dtype));
    for (std::size_t i = 0; i < elements; ++i) {
      kvlean::store_element(bytes.data() + i * kvlean::size_bytes(spec.key_dtype), spec.key_dtype,
                            random.between(-2.0f, 2.0f));
    }
    mass.resize(std::size_t{cache.num_segments()} * spec.tokens);
    for (float& x : mass) x = std::exp(4.0f * random.uniform());
    device_bytes.upload(bytes);
    device_mass.upload(mass);
  }
  u32 heads() const { return spec.kv_heads * spec.group_size; }
  gpu::Observation on_device(const gpu::CacheView& cache, bool with_mass) const {
    gpu::Observation seen;
    const gpu::Queries queries = gpu::Queries::contiguous(cache, device_bytes.data(), count);
    seen.window = seen.reference = queries;
    if (with_mass) {
      seen.mass = {device_mass.data(), spec.tokens, nullptr};
      seen.observers = count;
    }
    return seen;
  }
  kvlean::Observation on_host(u32 layer, u32 sequence, bool with_mass) {
    kvlean::Queries queries;
    const std::size_t first = (std::size_t{layer} * spec.sequences + sequence) * heads() * count;
    queries.rows.data = bytes.data() + first * spec.key_width * kvlean::size_bytes(spec.key_dtype);
    queries.rows.dtype = spec.key_dtype;
    queries.rows.width = spec.key_width;
    queries.rows.heads = heads();
    queries.rows.tokens = count;
    queries.rows.token_stride = spec.key_width;
    queries.rows.head_stride = static_cast<i64>(spec.key_width) * count;
    queries.count = count;
    kvlean::Observation seen;
    seen.window = seen.reference = queries;
    if (with_mass) {
      const std::size_t s = (std::size_t{layer} * spec.sequences + sequence) * spec.kv_heads;
      seen.mass = {mass.data() + s * spec.tokens, u64{spec.tokens}};
      seen.observers = count;
    }
    return seen;
  }
};

/// A layer as one of several that start at layer 0: plan_layers() counts from the first.
kvlean::CacheView layer_of(TestCache& cache, u32 layer, u32 sequence) {
  kvlean::CacheView view = cache.layer(layer, sequence);
  view.origin.layer = 0;
  return view;
}

/// The CPU's plans of all layers of each sequence.
struct CpuPlans {
  kvlean::Workspace workspace;
  std::vector<std::vector<kvlean::CompressionPlan>> of_sequence;
  Status status;

  template <class SeenOf>
  CpuPlans(TestCache& cache, const kvlean::AnyPolicy& policy, const Budget& budget,
           const kvlean::PlanOptions& options, SeenOf&& seen_of) {
    for (u32 q = 0; q < cache.spec().sequences; ++q) {
      std::vector<kvlean::CacheView> views;
      std::vector<kvlean::Observation> seen;
      for (u32 l = 0; l < cache.spec().layers; ++l) {
        views.push_back(layer_of(cache, l, q));
        seen.push_back(seen_of(l, q));
      }
      std::vector<kvlean::CompressionPlan>& plans = of_sequence.emplace_back(views.size());
      const Status made = policy.plan(views, seen, budget, workspace, plans, options);
      if (status.ok()) status = made;
    }
  }
};

/// A packed store on the device with room for `slots`.
struct PackedStore {
  DeviceArray<u8> keys, values;
  DeviceArray<i32> positions, cu_lengths, next;
  DeviceArray<float> log_mass;
  DeviceArray<gpu::Segment> descriptors;
  DeviceArray<u32> lengths;
  gpu::PackedDestination destination;

  PackedStore(const TestCache& cache, u64 slots, u32 slack)
      : keys(slots * cache.view().key_row_bytes()),
        values(slots * cache.view().value_row_bytes()),
        positions(slots),
        cu_lengths(cache.num_segments() + 1),
        next(cache.spec().sequences),
        log_mass(slots),
        descriptors(cache.num_segments()),
        lengths(cache.num_segments()) {
    destination.view = cache.view();
    destination.view.segments = descriptors.data();
    destination.view.lengths = lengths.data();
    destination.view.next_positions = next.data();
    destination.view.has_positions = destination.view.has_log_mass = true;
    destination.view.is_paged = false;
    destination.pool = {keys.data(),     values.data(), positions.data(),
                        log_mass.data(), slots,         cu_lengths.data()};
    destination.slack = slack;
  }
  bool intact() const {
    return keys.intact() && values.intact() && positions.intact() && cu_lengths.intact() &&
           log_mass.intact() && descriptors.intact() && lengths.intact();
  }
};

struct Allocation {
  const char* name;
  AnyAllocator allocator;
  bool across_layers = false;
};

/// One cache and what was seen of it.
struct Fixture {
  TestCache& cache;
  Seen& seen;
  Device& device;
  u32 swapped = 0;

  /// Tokens that only one of two plans keeps must score within `bound` of the segment's cut.
  template <class S>
  void compare_near_cut(const S& scorer, const kvlean::PlanOptions& options, bool with_mass,
                        const CpuPlans& want, const HostPlan& got, u32 pinned, double bound,
                        const char* what) {
    const u32 tokens = cache.spec().tokens;
    for (u32 q = 0; q < cache.spec().sequences; ++q) {
      for (u32 l = 0; l < cache.spec().layers; ++l) {
        const kvlean::CacheView view = layer_of(cache, l, q);
        kvlean::Workspace workspace;
        kvlean::Context context{workspace, options};
        context.layer = l;
        std::vector<float> rank(std::size_t{view.segments} * tokens), mass(rank.size());
        std::vector<u32> lengths;
        for (u32 h = 0; h < view.segments; ++h) lengths.push_back(view.length(h));
        kvlean::Scores scores;
        scores.segments = view.segments;
        scores.lengths = lengths.data();
        scores.rank = {rank.data(), u64{tokens}};
        scores.mass = {mass.data(), u64{tokens}};
        CHECK_OK(scorer.score(view, seen.on_host(l, q, with_mass), context, scores));
        const kvlean::CompressionPlan& plan = want.of_sequence[q][l];
        double largest = 0.0;
        for (u32 h = 0; h < view.segments; ++h) {
          for (u32 t = 0; t + pinned < view.length(h); ++t) {
            const double x = std::fabs(static_cast<double>(scores.rank(h, t)));
            if (std::isfinite(x) && x < 1e29) largest = std::max(largest, x);
          }
        }
        for (u32 h = 0; h < view.segments; ++h) {
          const u32 s = cache.segment_of(l, q, h);
          std::vector<u8> kept(tokens, 0), have(tokens, 0);
          for (u32 j = 0; j < plan.length[h]; ++j) kept[plan.anchor[plan.first[h] + j]] = 1;
          for (u32 j = 0; j < got.length[s]; ++j) have[got.anchor[got.view.slot(s, j)]] = 1;
          double lowest = 1e300;
          double highest = -1e300;
          for (u32 t = 0; t < view.length(h); ++t) {
            if (options.protection.covers(t, view.length(h), view.frozen)) {
              CHECK_THAT(kept[t] == have[t], "%s segment %u: protected token %u: kept %u, %u", what,
                         s, t, have[t], kept[t]);
              continue;
            }
            const double x = static_cast<double>(scores.rank(h, t));
            if (kept[t] != 0) {
              lowest = std::min(lowest, x);
            } else {
              highest = std::max(highest, x);
            }
          }
          u32 differ = 0;
          for (u32 t = 0; t < view.length(h); ++t) {
            if (kept[t] == have[t]) continue;
            ++differ;
            const double x = static_cast<double>(scores.rank(h, t));
            const double away = kept[t] != 0 ? x - lowest : highest - x;
            CHECK_THAT(away <= 2.0 * bound * largest,
                       "%s segment %u: token %u (score %.9g) is %s, %.3g from the cut (largest "
                       "%.4g)",
                       what, s, t, x, kept[t] != 0 ? "missing" : "kept", away, largest);
          }
          CHECK_THAT(differ <= 4 + view.length(h) / 20, "%s segment %u: %u of %u tokens differ",
                     what, s, differ, view.length(h));
          swapped += differ;
        }
      }
    }
  }

  /// Plans and compresses with every kind of destination. `bound`: of scores; 0: the same bits.
  template <class S>
  void run(const char* what, const S& scorer, const Allocation& how, double kept, double bound,
           u32 pinned = 0, bool with_mass = false, float recent_share = 0.0f,
           kvlean::Sharing sharing = {}) {
    const Budget budget = Budget::fraction(kept);
    kvlean::PlanOptions options;
    options.protection = {3, 9};
    options.sharing = sharing;
    options.seed = 5;
    kvlean::AnyPolicy cpu;
    cpu.scorer = scorer;
    cpu.allocator = how.allocator;
    cpu.reducer = kvlean::EvictReducer{recent_share};
    const std::string label = std::string(what) + "+" + how.name;
    const char* text = label.c_str();

    gpu::Policy<S> policy = std::visit(
        [&](const auto& allocator) {
          return gpu::on_device(
              kvlean::compose(scorer, allocator, kvlean::EvictReducer{recent_share}), options);
        },
        how.allocator);
    const gpu::CacheView view = cache.view();
    const gpu::Observation observed = seen.on_device(view, with_mass);
    const std::size_t bytes = gpu::compress_bytes_required(view, policy, budget, observed);
    CHECK_THAT(bytes <= device.memory.size(), "%s: the test's memory is too small: %zu", text,
               bytes);
    device.reset();
    gpu::Workspace workspace(device.memory.data(), bytes);
    const gpu::Context context{device.stream, workspace, device.error_word.data()};
    gpu::PlanView plan;
    CHECK_OK(gpu::plan(context, view, policy, budget, observed, plan));
    CHECK_OK(device.take_error());
    const HostPlan got(plan);

    // Near the CPU's own plan.
    const CpuPlans want(cache, cpu, budget, options,
                        [&](u32 l, u32 q) { return seen.on_host(l, q, with_mass); });
    CHECK_OK(want.status);
    if (!want.status.ok()) return;
    compare_near_cut(scorer, options, with_mass, want, got, pinned, bound, text);

    // The CPU's plan for the device's scores, exactly.
    const u32 tokens = cache.spec().tokens;
    DeviceArray<float> rank(std::size_t{cache.num_segments()} * tokens), mass(rank.size());
    const gpu::Scores scores{{rank.data(), tokens}, {mass.data(), tokens}};
    device.reset();
    if constexpr (std::is_same_v<S, kvlean::RandomScorer>) {
      CHECK_OK(gpu::score(device.context(), view, scorer, observed, scores, options.seed));
    } else {
      CHECK_OK(gpu::score(device.context(), view, scorer, observed, scores));
    }
    CHECK_OK(device.take_error());
    const std::vector<float> host_rank = rank.download();
    cpu.scorer = kvlean::ExternalScorer{};
    const CpuPlans exact(cache, cpu, budget, options, [&](u32 l, u32 q) {
      kvlean::Observation external;
      external.external = {host_rank.data() + std::size_t{cache.segment_of(l, q)} * tokens,
                           u64{tokens}};
      return external;
    });
    CHECK_OK(exact.status);
    if (!exact.status.ok()) return;
    for (u32 q = 0; q < cache.spec().sequences; ++q) {
      for (u32 l = 0; l < cache.spec().layers; ++l) {
        compare_anchors(exact.of_sequence[q][l], got, cache.segment_of(l, q));
      }
    }
    check_packed(text, policy, budget, observed, exact);
    // Given scores take the same way.
    gpu::Policy<kvlean::ExternalScorer> given;
    given.select = policy.select;
    given.reducer = policy.reducer;
    gpu::Observation external;
    external.external = {rank.data(), tokens, nullptr};
    check_elsewhere(text, given, budget, external, exact);
    check_in_place(text, given, budget, external, exact);
  }

  /// Into another cache with room of its own.
  template <class S, class R>
  void check_elsewhere(const char* what, const gpu::Policy<S, R>& policy, const Budget& budget,
                       const gpu::Observation& observed, const CpuPlans& want) {
    TestCache other(cache.spec());
    device.reset();
    CHECK_OK(gpu::compress(device.context(), cache.view(), policy, budget, observed, other.view()));
    CHECK_OK(device.take_error());
    other.download();
    for (u32 q = 0; q < cache.spec().sequences; ++q) {
      for (u32 l = 0; l < cache.spec().layers; ++l) {
        compare_moved(what, other.downloaded_layer(l, q), cache.layer(l, q),
                      want.of_sequence[q][l]);
      }
    }
  }

  /// Into a packed store, by a graph that is replayed twice.
  template <class S, class R>
  void check_packed(const char* what, const gpu::Policy<S, R>& policy, const Budget& budget,
                    const gpu::Observation& observed, const CpuPlans& want) {
    const gpu::CacheView view = cache.view();
    const u32 slack = 2;
    u64 slots = u64{slack} * cache.num_segments();
    for (const auto& plans : want.of_sequence) {
      for (const kvlean::CompressionPlan& plan : plans) slots += plan.num_slots();
    }
    PackedStore store(cache, slots, slack);
    device.reset();
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t replay = nullptr;
    CUDA_REQUIRE(cudaStreamBeginCapture(device.stream, cudaStreamCaptureModeThreadLocal));
    CHECK_OK(gpu::compress(device.context(), view, policy, budget, observed, store.destination));
    CUDA_REQUIRE(cudaStreamEndCapture(device.stream, &graph));
    CUDA_REQUIRE(cudaGraphInstantiate(&replay, graph, 0));
    std::vector<u8> first_keys, first_values;
    for (int run = 0; run < 2; ++run) {
      device.memory.fill_bytes(run == 0 ? 0x5a : 0xff);
      store.keys.fill_bytes(0xa5);
      store.values.fill_bytes(0xa5);
      store.lengths.fill_bytes(0xa5);
      CUDA_REQUIRE(cudaDeviceSynchronize());
      CUDA_REQUIRE(cudaGraphLaunch(replay, device.stream));
      CHECK_OK(device.take_error());
      if (run == 0) {
        first_keys = store.keys.download();
        first_values = store.values.download();
      }
    }
    CUDA_REQUIRE(cudaGraphExecDestroy(replay));
    CUDA_REQUIRE(cudaGraphDestroy(graph));
    CHECK_THAT(store.intact(), "%s: wrote behind the packed store", what);
    const std::vector<u8> keys = store.keys.download();
    const std::vector<u8> values = store.values.download();
    CHECK_THAT(keys == first_keys && values == first_values, "%s: a replay differs", what);
    const std::vector<u32> lengths = store.lengths.download();
    const std::vector<i32> cu = store.cu_lengths.download();
    const std::vector<i32> positions = store.positions.download();
    const std::size_t row = view.key_row_bytes();
    u64 first = 0;
    for (u32 s = 0; s < cache.num_segments(); ++s) {
      const u32 q = s / cache.spec().kv_heads % cache.spec().sequences;
      const u32 l = s / cache.spec().kv_heads / cache.spec().sequences;
      const u32 h = s % cache.spec().kv_heads;
      const kvlean::CompressionPlan& plan = want.of_sequence[q][l];
      const kvlean::CacheView from = cache.layer(l, q);
      CHECK_THAT(lengths[s] == plan.length[h] && cu[s] == static_cast<i32>(first),
                 "%s: packed segment %u: length %u at %d, expected %u at %llu", what, s, lengths[s],
                 cu[s], plan.length[h], static_cast<unsigned long long>(first));
      std::vector<float> a(view.key_width), b(view.key_width);
      for (u32 j = 0; j < plan.length[h]; ++j) {
        const u32 token = plan.anchor[plan.first[h] + j];
        CHECK_THAT(positions[first + j] == from.position(h, token),
                   "%s: packed segment %u slot %u: position %d", what, s, j, positions[first + j]);
        for (const bool key : {true, false}) {
          kvlean::load_row(key ? from.keys : from.values, h, token, a.data());
          const u8* at = (key ? keys : values).data() + (first + j) * row;
          for (u32 d = 0; d < view.key_width; ++d) {
            b[d] =
                kvlean::load_element(at + d * kvlean::size_bytes(view.key_dtype), view.key_dtype);
          }
          CHECK_THAT(std::memcmp(a.data(), b.data(), view.key_width * 4) == 0,
                     "%s: packed segment %u slot %u: another %s", what, s, j,
                     key ? "key" : "value");
        }
      }
      first += plan.length[h] + slack;
    }
  }

  /// Within the cache, by a graph that is replayed on the restored cache.
  template <class S, class R>
  void check_in_place(const char* what, const gpu::Policy<S, R>& policy, const Budget& budget,
                      const gpu::Observation& observed, const CpuPlans& want) {
    const gpu::CacheView view = cache.view();
    device.reset();
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t replay = nullptr;
    CUDA_REQUIRE(cudaStreamBeginCapture(device.stream, cudaStreamCaptureModeThreadLocal));
    CHECK_OK(gpu::compress(device.context(), view, policy, budget, observed, kvlean::in_place));
    CUDA_REQUIRE(cudaStreamEndCapture(device.stream, &graph));
    CUDA_REQUIRE(cudaGraphInstantiate(&replay, graph, 0));
    for (int run = 0; run < 2; ++run) {
      cache.upload();
      device.memory.fill_bytes(0x77);
      CUDA_REQUIRE(cudaDeviceSynchronize());
      CUDA_REQUIRE(cudaGraphLaunch(replay, device.stream));
      CHECK_OK(device.take_error());
      cache.download();
      for (u32 q = 0; q < cache.spec().sequences; ++q) {
        for (u32 l = 0; l < cache.spec().layers; ++l) {
          compare_moved(what, cache.downloaded_layer(l, q), cache.layer(l, q),
                        want.of_sequence[q][l]);
        }
      }
    }
    CUDA_REQUIRE(cudaGraphExecDestroy(replay));
    CUDA_REQUIRE(cudaGraphDestroy(graph));
    cache.upload();
  }
  void compare_moved(const char* what, const kvlean::CacheView& got, const kvlean::CacheView& from,
                     const kvlean::CompressionPlan& plan) {
    std::vector<float> a(got.keys.width), b(got.keys.width);
    for (u32 h = 0; h < from.segments; ++h) {
      CHECK_THAT(got.length(h) == plan.length[h], "%s moved: head %u: length %u, expected %u", what,
                 h, got.length(h), plan.length[h]);
      for (u32 j = 0; j < plan.length[h]; ++j) {
        const u32 token = plan.anchor[plan.first[h] + j];
        bool same = !from.positions || got.position(h, j) == from.position(h, token);
        same = same && got.mass_bias(h, j) == from.mass_bias(h, token);
        for (const bool key : {true, false}) {
          kvlean::load_row(key ? got.keys : got.values, h, j, a.data());
          kvlean::load_row(key ? from.keys : from.values, h, token, b.data());
          same = same && std::memcmp(a.data(), b.data(), a.size() * 4) == 0;
        }
        CHECK_THAT(same, "%s moved: head %u slot %u is not token %u", what, h, j, token);
        if (!same) break;
      }
    }
  }
};

const Allocation uniform{"uniform", kvlean::UniformAllocator{}};
const Allocation adakv{"adakv", kvlean::AdaKVAllocator{}};

void run_policies(Fixture& fixture, bool all) {
  const double bound = 1e-4;
  const SnapKVScorer snapkv{.window = 16};
  const SnapKVScorer wide{.window = 16, .kernel = 31, .pooling = Pooling::max};
  fixture.run("snapkv", snapkv, adakv, 0.35, bound, 16);
  fixture.run("snapkv max", wide, uniform, 0.4, bound, 16);
  fixture.run("h2o", kvlean::H2OScorer{}, uniform, 0.3, bound, 0, false, 0.5f);
  fixture.run("tova", kvlean::TOVAScorer{}, uniform, 0.3, bound, 1);
  fixture.run("knorm", kvlean::KeyNormScorer{}, uniform, 0.5, 2e-5);
  fixture.run("keydiff", kvlean::KeyDiffScorer{}, uniform, 0.35, 2e-5);
  fixture.run("streaming_llm", kvlean::StreamingLLMScorer{.sinks = 3}, uniform, 0.25, 0.0);
  if (!all) return;
  fixture.run("snapkv group pool",
              SnapKVScorer{.window = 16, .order = PoolOrder::query_mean_group_pool}, uniform, 0.35,
              bound, 16);
  fixture.run("snapkv max group pool",
              SnapKVScorer{.window = 16,
                           .kernel = 7,
                           .pooling = Pooling::max,
                           .order = PoolOrder::query_mean_group_pool},
              adakv, 0.35, bound, 16);
  fixture.run("snapkv", snapkv,
              {"adakv mix", kvlean::AdaKVAllocator{.mode = kvlean::SafeguardMode::exact_mix}}, 0.35,
              bound, 16);
  fixture.run("snapkv", snapkv, {"adakv 0.6", kvlean::AdaKVAllocator{.safeguard = 0.6f}}, 0.2,
              bound, 16);
  fixture.run("snapkv", snapkv, {"adakv normalized", kvlean::AdaKVAllocator{.normalize = true}},
              0.35, bound, 16);
  fixture.run("snapkv", snapkv, {"adakv_layers", kvlean::AdaKVLayersAllocator{}}, 0.35, bound, 16);
  fixture.run("snapkv", snapkv, {"pyramid", kvlean::PyramidAllocator<>{}}, 0.35, bound, 16);
  fixture.run("snapkv", snapkv,
              {"pyramid_adakv", kvlean::PyramidAllocator<kvlean::AdaKVAllocator>{}}, 0.35, bound,
              16);
  fixture.run("h2o of mass", kvlean::H2OScorer{}, uniform, 0.3, 0.0, 0, true, 0.5f);
  fixture.run("observed_attention", kvlean::ObservedAttentionScorer{}, adakv, 0.3, bound);
  fixture.run("random", kvlean::RandomScorer{}, uniform, 0.3, 0.0);
  fixture.run("knorm", kvlean::KeyNormScorer{}, uniform, 1.0, 2e-5);
}

/// A merging policy in place, against the CPU's, from ready-made mass.
template <class R>
void check_merging(Device& device, const char* what, const R& reducer, bool positions) {
  test_case("%s%s", what, positions ? ", positions" : "");
  CacheSpec spec;
  spec.seed = 77;
  spec.layers = 2;
  spec.sequences = 2;
  spec.tokens = 260;
  spec.lengths = {260, 133};
  spec.positions = positions;
  spec.log_mass = true;
  TestCache cache(spec);
  Seen seen(cache, 40);
  kvlean::PlanOptions options;
  options.protection = {3, 9};
  const auto cpu = kvlean::compose(kvlean::H2OScorer{}, kvlean::UniformAllocator{}, reducer);
  const auto policy = gpu::on_device(cpu, options);
  const Budget budget = Budget::fraction(0.6);
  const gpu::CacheView view = cache.view();
  const gpu::Observation observed = seen.on_device(view, true);
  device.reset();
  gpu::Workspace workspace(device.memory.data(),
                           gpu::compress_bytes_required(view, policy, budget, observed));
  const gpu::Context context{device.stream, workspace, device.error_word.data()};
  CHECK_OK(gpu::compress(context, view, policy, budget, observed, kvlean::in_place));
  CHECK_OK(device.take_error());
  cache.download();
  for (u32 q = 0; q < spec.sequences; ++q) {
    for (u32 l = 0; l < spec.layers; ++l) {
      kvlean::CacheView want = cache.layer(l, q);
      // What the device sees: without positions a length says how much has been dropped.
      if (!positions) want.next_position = cache.next_position();
      kvlean::Workspace host;
      kvlean::CompressionPlan made;
      CHECK_OK(cpu.plan(want, seen.on_host(l, q, true), budget, host, made, options));
      CHECK_OK(kvlean::apply(made, want, kvlean::in_place));
      compare_layers(cache.downloaded_layer(l, q), want, 1e-4, 1e-4);
    }
  }
}

void check_errors(Device& device) {
  test_case("errors");
  CacheSpec spec;
  spec.tokens = 200;
  spec.with_dtype(DType::bf16);
  TestCache cache(spec);
  const gpu::CacheView view = cache.view();
  gpu::Policy<kvlean::KeyNormScorer> policy;
  const Budget budget = Budget::slots(100);
  {
    gpu::Workspace little(device.memory.data(), 4096);
    const gpu::Context context{device.stream, little, device.error_word.data()};
    CHECK_STATUS(gpu::compress(context, view, policy, budget, {}, kvlean::in_place),
                 StatusCode::workspace_too_small);
  }
  device.reset();
  CHECK_STATUS(
      gpu::compress(device.context(), view, policy, Budget::fraction(-1.0), {}, kvlean::in_place),
      StatusCode::invalid_budget);
  CHECK_STATUS(gpu::compress(device.context(), view, gpu::Policy<kvlean::ExternalScorer>{}, budget,
                             {}, kvlean::in_place),
               StatusCode::missing_observation);
  CHECK_STATUS(gpu::compress(device.context(), view, gpu::Policy<kvlean::TOVAScorer>{}, budget, {},
                             kvlean::in_place),
               StatusCode::missing_observation);
  // On the device: fewer slots than protected tokens; the cache stays.
  CHECK_OK(gpu::compress(device.context(), view, policy, Budget::slots(20), {}, kvlean::in_place));
  CHECK_STATUS(device.take_error(), StatusCode::budget_below_protected);
  cache.download();
  CHECK_TRUE(cache.fetched_keys == cache.keys && cache.fetched_values == cache.values &&
             cache.fetched_lengths == cache.lengths);
  // A pool that is too small by one row.
  PackedStore store(cache, 199, 0);
  CHECK_OK(gpu::compress(device.context(), view, policy, budget, {}, store.destination));
  CHECK_STATUS(device.take_error(), StatusCode::destination_too_small);
  CHECK_THAT(store.intact(), "wrote behind a small pool");
  // A cache with too little room.
  CacheSpec short_spec = spec;
  short_spec.tokens = 99;
  TestCache short_cache(short_spec);
  CHECK_OK(gpu::compress(device.context(), view, policy, budget, {}, short_cache.view()));
  CHECK_STATUS(device.take_error(), StatusCode::destination_too_small);
  short_cache.download();
  CHECK_TRUE(short_cache.fetched_keys == short_cache.keys &&
             short_cache.fetched_values == short_cache.values &&
             short_cache.fetched_lengths == short_cache.lengths);
  // An earlier report: nothing happens.
  CUDA_REQUIRE(cudaMemset(device.error_word.data(), 1, 1));
  CUDA_REQUIRE(cudaDeviceSynchronize());
  CHECK_OK(gpu::compress(device.context(), view, policy, budget, {}, kvlean::in_place));
  CHECK_STATUS(device.take_error(), static_cast<StatusCode>(1));
  cache.download();
  CHECK_TRUE(cache.fetched_keys == cache.keys && cache.fetched_lengths == cache.lengths);
}

}  // namespace

int main(int argc, char** argv) {
  const bool quick = parse_quick(argc, argv);
  Device device(std::size_t{quick ? 16u : 128u} << 20);
  u32 swapped = 0;
  const auto run = [&](const CacheSpec& spec, bool all) {
    test_case("%s width %u, %u heads of %u, %u layers of %u, pages %u", name_of(spec.key_dtype),
              spec.key_width, spec.kv_heads, spec.group_size, spec.layers, spec.sequences,
              spec.page_tokens);
    TestCache cache(spec);
    Seen seen(cache, 40);
    Fixture fixture{cache, seen, device};
    run_policies(fixture, all);
    swapped += fixture.swapped;
  };
  struct Shape {
    DType dtype;
    u32 width, heads, group;
  };
  const std::vector<Shape> shapes = {
      {DType::f32, 64, 2, 2},   {DType::bf16, 128, 8, 4}, {DType::f16, 96, 3, 3},
      {DType::f16, 256, 2, 16}, {DType::bf16, 64, 4, 1},  {DType::f32, 128, 2, 8},
      {DType::f16, 128, 2, 5},  {DType::bf16, 256, 1, 7}, {DType::f32, 96, 4, 1}};
  for (std::size_t i = 0; i < (quick ? 2 : shapes.size()); ++i) {
    CacheSpec spec;
    spec.seed = i + 1;
    spec.layers = quick ? 1 : 2;
    spec.sequences = i % 2 != 0 ? 1 : quick ? 2 : 3;
    spec.kv_heads = quick ? 2 : shapes[i].heads;
    spec.group_size = shapes[i].group;
    spec.key_width = shapes[i].width;
    spec.tokens = quick ? 80 : 420;
    if (spec.sequences > 1) spec.lengths = {spec.tokens, 61, 79};
    spec.page_tokens = i % 3 == 2 ? 16 : 0;
    spec.positions = i % 2 == 0;
    spec.log_mass = i % 4 == 0;
    spec.with_dtype(shapes[i].dtype);
    run(spec, !quick);
  }
  if (!quick) {
    // Long enough for selection by several launches.
    CacheSpec spec;
    spec.seed = 50;
    spec.kv_heads = 4;
    spec.group_size = 2;
    spec.tokens = 20011;
    spec.key_width = 64;
    spec.with_dtype(DType::bf16);
    run(spec, false);
    // More segments than one block of threads looks at.
    spec.layers = 33;
    spec.kv_heads = 8;
    spec.tokens = 70;
    run(spec, false);
  }
  for (const bool positions : {true, false}) {
    if (quick && positions) continue;
    check_merging(device, "kvmerger", kvlean::KVMergerReducer{}, positions);
    check_merging(device, "kvmerger, log count",
                  kvlean::KVMergerReducer{.log_mass = kvlean::LogMass::log_count}, positions);
    check_merging(device, "massfold", kvlean::MassFoldReducer{}, positions);
  }
  check_errors(device);
  std::printf("%u tokens near a cut differ from the CPU's plans\n", swapped);
  return finish("test_compress");
}
