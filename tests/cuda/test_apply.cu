// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
// Plans of the CPU library carried out on the device, and appending.
#include <kvlean/cuda/apply.cuh>
#include <kvlean/cuda/ragged_store.cuh>

#include "tests/cuda/check.cuh"

namespace {

using namespace cuda_test;
namespace gpu = kvlean::cuda;

double unit_of(DType dtype) {
  return dtype == DType::f32 ? 3e-6 : dtype == DType::f16 ? 1.1e-3 : 8.2e-3;
}
const char* name_of(DType dtype) {
  return dtype == DType::f32 ? "f32" : dtype == DType::f16 ? "f16" : "bf16";
}

/// A plan a layer of a sequence, all in one workspace.
struct Plans {
  kvlean::Workspace workspace;
  std::vector<kvlean::CompressionPlan> plans;
  std::vector<kvlean::CacheView> caches;
  u32 most_slots = 1;
  u32 most_terms = 0;
  bool log_mass = false;
  bool position = false;

  Plans(TestCache& cache, const char* policy_name, float kept, bool renumbered) {
    kvlean::AnyPolicy policy;
    CHECK_OK(kvlean::make_policy(policy_name, policy));
    for (u32 l = 0; l < cache.spec().layers; ++l) {
      for (u32 q = 0; q < cache.spec().sequences; ++q) caches.push_back(cache.layer(l, q));
    }
    plans.resize(caches.size());
    std::vector<float> mass(std::size_t{cache.spec().kv_heads} * cache.spec().tokens);
    Random random(3);
    for (float& x : mass) x = random.uniform();
    kvlean::Observation seen = kvlean::observe_mass(
        kvlean::Ragged<const float>(mass.data(), u64{cache.spec().tokens}), 64);
    kvlean::PlanOptions options;
    options.protection.sinks = 2;
    options.protection.recent = 5;
    for (std::size_t i = 0; i < plans.size(); ++i) {
      CHECK_OK(policy.plan(caches[i], seen, kvlean::Budget::fraction(kept), workspace, plans[i],
                           options));
      if (renumbered) CHECK_OK(kvlean::renumber(plans[i], caches[i], workspace));
      for (u32 s = 0; s < plans[i].segments; ++s)
        most_slots = std::max(most_slots, plans[i].length[s]);
      if (plans[i].has_terms()) most_terms = std::max<u32>(most_terms, cache.spec().tokens * 33);
      log_mass |= plans[i].log_mass != nullptr;
      position |= plans[i].position != nullptr;
    }
  }
  gpu::PlanShape shape() const {
    gpu::PlanShape shape;
    shape.segments = static_cast<u32>(plans.size()) * plans[0].segments;
    shape.max_slots = most_slots;
    shape.max_terms = most_terms;
    shape.log_mass = log_mass;
    shape.position = position;
    shape.values_differ = most_terms != 0;
    return shape;
  }
};

void run_case(Device& device, CacheSpec spec, const char* policy, float kept, bool renumbered) {
  test_case("%s %s width %u pages %u lengths %zu %s", policy, name_of(spec.key_dtype),
            spec.key_width, spec.page_tokens, spec.lengths.size(), renumbered ? "renumbered" : "");
  TestCache cache(spec);
  Plans plans(cache, policy, kept, renumbered);
  DevicePlan plan(plans.shape());
  upload_plans(plans.plans, plans.caches, plan);
  // One number for all sequences of a step; the CPU's plans here are one a sequence.
  plan.view.next_position = plans.plans[0].next_position;
  const bool plain = plans.most_terms == 0 && !renumbered;
  const double tolerance = plain ? 0.0 : unit_of(spec.key_dtype);

  // Elsewhere: a flat pool, packed, with room for one more token a segment.
  const u32 segments = cache.num_segments();
  u64 slots = segments;
  for (const auto& p : plans.plans) slots += p.num_slots();
  CacheSpec shape_spec = spec;
  DeviceArray<u8> keys(slots * spec.key_width * kvlean::size_bytes(spec.key_dtype));
  DeviceArray<u8> values(slots * spec.key_width * kvlean::size_bytes(spec.key_dtype));
  DeviceArray<i32> positions(slots), cu_lengths(segments + 1), next(spec.sequences);
  DeviceArray<float> log_mass(slots);
  DeviceArray<gpu::Segment> descriptors(segments);
  DeviceArray<u32> lengths(segments);
  gpu::CacheView packed = cache.view();
  packed.segments = descriptors.data();
  packed.lengths = lengths.data();
  packed.next_positions = next.data();
  packed.has_positions = packed.has_log_mass = true;
  packed.is_paged = false;
  gpu::FlatPool pool{keys.data(),     values.data(), positions.data(),
                     log_mass.data(), slots,         cu_lengths.data()};
  device.reset();
  CHECK_OK(gpu::pack_segments(device.context(), plan.view.length, 1, pool, cache.view(), packed));
  CHECK_OK(gpu::apply(device.context(), plan.view, cache.view(), packed));
  CHECK_OK(device.take_error());
  CHECK_TRUE(keys.intact() && values.intact() && positions.intact() && log_mass.intact() &&
             lengths.intact() && descriptors.intact() && cu_lengths.intact());

  // In place, on both sides.
  CHECK_OK(gpu::apply_in_place(device.context(), plan.view, cache.view()));
  CHECK_OK(device.take_error());
  cache.download();
  const std::vector<u8> got_keys = keys.download();
  const std::vector<u8> got_values = values.download();
  const std::vector<i32> got_positions = positions.download();
  const std::vector<float> got_mass = log_mass.download();
  const std::vector<u32> got_lengths = lengths.download();
  const std::vector<i32> got_cu = cu_lengths.download();
  const std::vector<i32> got_next = next.download();
  std::size_t p = 0;
  u64 first = 0;
  for (u32 l = 0; l < spec.layers; ++l) {
    for (u32 q = 0; q < spec.sequences; ++q, ++p) {
      kvlean::CacheView want = plans.caches[p];
      // Positions and masses of the packed copy, before the host's own move.
      std::vector<std::vector<i32>> want_positions(spec.kv_heads);
      std::vector<std::vector<float>> want_mass(spec.kv_heads);
      const kvlean::CompressionPlan& cpu = plans.plans[p];
      for (u32 h = 0; h < spec.kv_heads; ++h) {
        for (u32 j = 0; j < cpu.length[h]; ++j) {
          const u64 slot = cpu.first[h] + j;
          want_positions[h].push_back(cpu.position != nullptr ? cpu.position[slot]
                                                              : want.position(h, cpu.anchor[slot]));
          want_mass[h].push_back(cpu.log_mass != nullptr ? cpu.log_mass[slot]
                                                         : want.mass_bias(h, cpu.anchor[slot]));
        }
      }
      if (want.log_mass || cpu.log_mass == nullptr) {
        CHECK_OK(kvlean::apply(cpu, want, kvlean::in_place));
        compare_layers(cache.downloaded_layer(l, q), want, tolerance, tolerance);
      }
      for (u32 h = 0; h < spec.kv_heads; ++h) {
        const u32 s = cache.segment_of(l, q, h);
        CHECK_THAT(got_lengths[s] == cpu.length[h], "packed segment %u: length %u, expected %u", s,
                   got_lengths[s], cpu.length[h]);
        CHECK_THAT(got_cu[s] == static_cast<i32>(first), "cu_lengths[%u] = %d, expected %llu", s,
                   got_cu[s], static_cast<unsigned long long>(first));
        for (u32 j = 0; j < cpu.length[h]; ++j) {
          CHECK_THAT(got_positions[first + j] == want_positions[h][j],
                     "packed segment %u slot %u: position %d, expected %d", s, j,
                     got_positions[first + j], want_positions[h][j]);
          CHECK_THAT(got_mass[first + j] == want_mass[h][j],
                     "packed segment %u slot %u: log mass %g, expected %g", s, j,
                     got_mass[first + j], want_mass[h][j]);
          // The same rows as in place, to the bit.
          const kvlean::CacheView in_place = cache.downloaded_layer(l, q);
          std::vector<float> row(spec.key_width), other(spec.key_width);
          kvlean::load_row(in_place.keys, h, j, row.data());
          const std::size_t bytes = spec.key_width * kvlean::size_bytes(spec.key_dtype);
          for (const bool key : {true, false}) {
            kvlean::load_row(key ? in_place.keys : in_place.values, h, j, row.data());
            const u8* at = (key ? got_keys : got_values).data() + (first + j) * bytes;
            for (u32 d = 0; d < spec.key_width; ++d) {
              other[d] =
                  kvlean::load_element(at + d * kvlean::size_bytes(spec.key_dtype), spec.key_dtype);
            }
            CHECK_THAT(std::memcmp(row.data(), other.data(), spec.key_width * 4) == 0,
                       "packed segment %u slot %u: the %s differs from the one in place", s, j,
                       key ? "key" : "value");
          }
        }
        first += cpu.length[h] + 1;
      }
      const i32 next_expected =
          plan.view.next_position >= 0 ? plan.view.next_position : cache.next_position();
      CHECK_THAT(got_next[q] == next_expected, "next position %d, expected %d", got_next[q],
                 next_expected);
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  const bool quick = parse_quick(argc, argv);
  Device device(std::size_t{256} << 20);
  kvlean::RopeSpec neox;
  kvlean::RopeSpec norm;
  norm.pairing = kvlean::RopePairing::norm;
  norm.rotary_dims = 32;
  norm.first_dim = 8;
  const std::vector<const char*> policies = {
      "random+uniform+evict",         "knorm+adakv+evict",
      "h2o+uniform+kvmerger",         "h2o+adakv+kvmerger_mass",
      "h2o+uniform+kvmerger_aligned", "streaming_llm+uniform+cam",
      "h2o+adakv+massfold",           "h2o+uniform+d2o"};
  for (const DType dtype : {DType::bf16, DType::f16, DType::f32}) {
    u32 n = 0;
    for (const char* policy : policies) {
      for (const u32 width : quick ? std::vector<u32>{64} : std::vector<u32>{64, 128, 96, 256}) {
        CacheSpec spec;
        spec.seed = ++n;
        spec.layers = 2;
        spec.sequences = 2;
        spec.kv_heads = 3;
        spec.tokens = quick ? 150 : 420;
        if (n % 2 == 0) spec.lengths = {spec.tokens, 77};
        spec.key_width = width;
        spec.page_tokens = n % 3 == 0 ? 16 : 0;
        spec.positions = true;
        spec.log_mass = true;
        spec.rope = n % 2 == 0 ? &neox : &norm;
        spec.frozen = n % 5 == 0 ? 3 : 0;
        spec.with_dtype(dtype);
        run_case(device, spec, policy, n % 4 == 0 ? 0.7f : 0.35f, false);
        run_case(device, spec, policy, 0.35f, true);
      }
    }
  }
  {
    test_case("append");
    CacheSpec spec;
    spec.sequences = 2;
    spec.kv_heads = 2;
    spec.tokens = 40;
    spec.lengths = {30, 11};
    spec.positions = spec.log_mass = true;
    spec.page_tokens = 16;
    TestCache cache(spec);
    const u32 segments = cache.num_segments();
    const u32 count = 5;
    std::vector<float> rows(std::size_t{segments} * count * spec.key_width);
    Random random(5);
    for (float& x : rows) x = random.between(-1.0f, 1.0f);
    DeviceArray<float> device_rows(rows);
    DeviceArray<u32> counts(std::vector<u32>{5, 3});
    const i64 stride = spec.key_width * 4;
    CHECK_OK(gpu::append(device.context(), cache.view(), device_rows.data(), device_rows.data(),
                         stride, stride, count, counts.data()));
    CHECK_OK(device.take_error());
    cache.download();
    for (u32 b = 0; b < 2; ++b) {
      const kvlean::CacheView got = cache.downloaded_layer(0, b);
      const u32 added = b == 0 ? 5 : 3;
      for (u32 h = 0; h < 2; ++h) {
        const u32 s = b * 2 + h;
        const u32 old = cache.lengths[s];
        CHECK_THAT(got.length(h) == old + added, "length %u, expected %u", got.length(h),
                   old + added);
        for (u32 i = 0; i < added; ++i) {
          std::vector<float> row(spec.key_width);
          kvlean::load_row(got.values, h, old + i, row.data());
          CHECK_THAT(
              std::memcmp(row.data(), rows.data() + (std::size_t{s} * count + i) * spec.key_width,
                          spec.key_width * 4) == 0,
              "segment %u: appended row %u differs", s, i);
          CHECK_TRUE(got.position(h, old + i) == cache.next_position() + static_cast<i32>(i));
          CHECK_TRUE(got.mass_bias(h, old + i) == 0.0f);
        }
      }
    }
    // No room: nothing is changed, and the error stays until it is cleared.
    CHECK_OK(gpu::append(device.context(), cache.view(), device_rows.data(), device_rows.data(),
                         stride, stride, 20));
    CHECK_STATUS(device.take_error(), StatusCode::destination_too_small);
    const std::vector<u32> lengths = cache.device_lengths.download();
    CHECK_TRUE(lengths[0] == 35 && lengths[2] == 14);
    DeviceArray<i32> indptr(segments + 1), indices(64), last(segments);
    CHECK_OK(gpu::page_lists(device.context(), cache.view(), indptr.data(), indices.data(),
                             last.data()));
    CHECK_OK(device.take_error());
    const std::vector<i32> got = indptr.download();
    CHECK_TRUE(got[1] == 3 && got[2] == 6 && got[3] == 7 && got[4] == 8);
    CHECK_TRUE(last.download()[0] == 3 && last.download()[2] == 14);
  }
  return finish("test_apply");
}
