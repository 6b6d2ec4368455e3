// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
// SnapKV's window scores and H2O's accumulated attention.
#include <algorithm>
#include <cmath>

#include "bench/ratio/floors.hpp"
#include "bench/ratio/oracle.hpp"

namespace kvlean::ratio {

namespace {

struct Scoring {
  Layer layer;
  ScoreArrays arrays;
  Room room;
  Executor executor;
  Observation seen;
  std::vector<float> lse;
  Buffer product;               ///< [heads][queries of a group][tokens]: sgemm's output
  std::vector<Buffer> stacked;  ///< sgemm's left side: the queries of each KV head
  std::vector<float> peer;      ///< what torch computed, if it did

  Scoring(const LayerShape& shape, const Setup& setup, simd::Target target)
      : layer(shape, setup.copies(shape.bytes()), false),
        arrays(shape.heads, shape.tokens),
        room(shape.tokens, setup.threads),
        executor(setup.executor) {
    seen.attention.target = target;
    seen.window = seen.reference = layer.asked();
  }

  /// The log-sum-exp that an engine's prefill has computed anyway.
  void make_lse() {
    lse.resize(std::size_t{layer.shape().heads} * group_size * layer.shape().queries);
    const AttentionOutput only_lse{nullptr, lse.data()};
    if (!attend(layer.asked(), layer.cache(0), only_lse, executor)) lse.clear();
  }
  template <class Scorer>
  Status score(const Scorer& scorer, std::size_t copy, bool with_lse) {
    const CacheView cache = layer.cache(copy).view();
    const PlanOptions options = options_with(executor);
    Context context{room.workspace(), options, 0, 1};
    Observation observation = seen;
    if (with_lse) observation.window.lse = observation.reference.lse = lse.data();
    const WorkspaceScope scope(room.workspace());
    return scorer.score(cache, observation, context, arrays.scores());
  }
  [[nodiscard]] bool agrees_with_peer() const;
  /// The first KV head's mass; window scorers give the mean over queries.
  template <class Scorer>
  Verdict check(const Scorer& scorer, bool with_lse, double bound, double factor) {
    Verdict verdict;
    verdict.bound = bound;
    if (!score(scorer, 0, with_lse)) return {HUGE_VAL, bound, false, 0};
    std::vector<double> want = attention_mass(layer, 0);
    for (double& x : want) x *= factor;
    verdict.error = relative_error({arrays.mass(), layer.shape().tokens}, want);
    verdict.good = verdict.error <= bound && agrees_with_peer();
    verdict.digest =
        digest_of(arrays.mass(), arrays.bytes(), digest_of(arrays.rank(), arrays.bytes()));
    return verdict;
  }
};

// Torch rounds attention to 16 bits before it adds, so it only has to be near.
bool Scoring::agrees_with_peer() const {
  const std::vector<double> want(peer.begin(), peer.end());
  return want.empty() || scaled_error({arrays.rank(), want.size()}, want) <= 0.05;
}

constexpr double error_bound = 1e-3;

constexpr double window_pairs = double{query_heads} * window;

Label label_of(const LayerShape& shape, simd::Target target) {
  return {isa_name(target), name(shape.dtype),
          shape.text() + ", " + std::to_string(shape.queries) + " queries", "flat"};
}

Variant read_keys(const std::shared_ptr<Scoring>& work, u32 streams) {
  const double bytes = static_cast<double>(work->layer.shape().bytes());
  const char* const name = streams == 1 ? "reading K, one stream" : "reading K";
  Variant read{name, [work, streams](std::size_t copy) {
                 read_bytes({static_cast<const std::byte*>(work->layer.keys(copy)),
                             work->layer.shape().bytes()},
                            work->executor, streams);
                 return Status();
               }};
  read.copies = work->layer.copies();
  read.bytes = bytes;
  return read;
}

Variant score_variant(const std::shared_ptr<Scoring>& work, const char* label, bool with_lse) {
  Variant variant{label, [work, with_lse](std::size_t copy) {
                    return work->score(SnapKVScorer{}, copy, with_lse);
                  }};
  variant.copies = work->layer.copies();
  variant.bytes = static_cast<double>(work->layer.shape().bytes());
  variant.flops = 2.0 * dim * window_pairs * work->layer.shape().tokens;
  return variant;
}

void add_window_kernel(Experiment& experiment, const std::shared_ptr<Scoring>& work,
                       const char* label, bool with_lse) {
  experiment.variants.push_back(score_variant(work, label, with_lse));
  experiment.verify[label] = [work, with_lse] {
    return work->check(SnapKVScorer{}, with_lse, error_bound, 1.0 / window);
  };
  experiment.scratch_bytes[label] = [work] { return work->room.workspace().high_water_bytes(); };
}

Experiment build_against_sgemm(const Setup& setup, DType dtype) {
  LayerShape shape;
  shape.tokens = setup.tokens();
  shape.dtype = dtype;
  const simd::Target target = vector_target();
  auto work = std::make_shared<Scoring>(shape, setup, target);
  Experiment experiment;
  experiment.data = work;
  experiment.label = label_of(shape, target);
  add_window_kernel(experiment, work, "score", false);

  // The same products alone, K widened to f32 beforehand.
  constexpr u32 rows = group_size * window;
  const std::size_t plane = std::size_t{shape.tokens} * dim;
  auto wide = std::make_shared<std::vector<Buffer>>();
  const std::size_t copies = setup.copies(shape.elements() * sizeof(float));
  for (std::size_t copy = 0; dtype != DType::f32 && copy < copies; ++copy) {
    wide->emplace_back(shape.elements() * sizeof(float));
    for (std::size_t i = 0; copy == 0 && i < shape.elements(); ++i) {
      (*wide)[0].as<float>()[i] = element(work->layer.keys(0), dtype, i);
    }
    if (copy != 0) (*wide)[copy].copy_from((*wide)[0]);
  }
  Buffer queries(std::size_t{query_heads} * window * dim * sizeof(float));
  for (std::size_t i = 0; i < std::size_t{query_heads} * window * dim; ++i) {
    queries.as<float>()[i] = element(work->layer.queries(), dtype, i);
  }
  work->stacked.push_back(std::move(queries));
  work->product = Buffer(std::size_t{rows} * shape.tokens * sizeof(float));
  const Blas* blas = setup.blas;
  const u32 threads = setup.threads;
  Variant sgemm{
      "OpenBLAS sgemm", [=](std::size_t copy) {
        blas->set_threads(threads);
        const float* keys = dtype == DType::f32 ? static_cast<const float*>(work->layer.keys(copy))
                                                : (*wide)[copy].as<float>();
        for (u32 head = 0; head < kv_heads; ++head) {
          blas->multiply_transposed(rows, work->layer.shape().tokens, dim,
                                    work->stacked[0].as<float>() + std::size_t{head} * rows * dim,
                                    keys + head * plane, work->product.as<float>());
        }
        return Status();
      }};
  sgemm.copies = dtype == DType::f32 ? work->layer.copies() : wide->size();
  sgemm.bytes = static_cast<double>(shape.elements() * sizeof(float));
  sgemm.flops = 2.0 * dim * window_pairs * shape.tokens;
  experiment.variants.push_back(std::move(sgemm));
  return experiment;
}

Experiment build_against_read(const Setup& setup, const std::vector<std::string>&) {
  LayerShape shape;
  shape.tokens = setup.tokens();
  shape.dtype = DType::bf16;
  const simd::Target target = scoring_target(shape.dtype);
  auto work = std::make_shared<Scoring>(shape, setup, target);
  work->make_lse();
  Experiment experiment;
  experiment.data = work;
  experiment.label = label_of(shape, target);
  for (const u32 streams : {8u, 1u}) experiment.variants.push_back(read_keys(work, streams));
  add_window_kernel(experiment, work, "score, LSE given", true);
  add_window_kernel(experiment, work, "score", false);
  return experiment;
}

void add_peer(Experiment& experiment, const Setup& setup, const std::shared_ptr<Scoring>& work,
              const char* form, bool repeats_keys) {
  const Layer& layer = work->layer;
  const LayerShape& shape = layer.shape();
  const std::size_t heads = shape.heads;
  setup.peers->load(
      form,
      {{"keys", layer.keys(0), shape.dtype, {heads, shape.tokens, dim}},
       {"queries", layer.queries(), shape.dtype, {heads * group_size, shape.queries, dim}}},
      {{"window", window}, {"kernel", 5}});
  Peers* peers = setup.peers;
  // The window's own tokens are ranked above all others, each in its own way: first head, prefix.
  work->peer = peers->result();
  work->peer.resize(shape.tokens - window);
  Variant variant{"torch", {}};
  variant.elsewhere = [peers] { return peers->run(); };
  variant.bytes = static_cast<double>(shape.bytes()) * (repeats_keys ? group_size : 1);
  experiment.variants.push_back(std::move(variant));
}

Experiment build_against_torch(const Setup& setup, const std::vector<std::string>&) {
  LayerShape shape;
  shape.tokens = setup.tokens();
  shape.dtype = DType::bf16;
  const simd::Target target = scoring_target(shape.dtype);
  auto work = std::make_shared<Scoring>(shape, setup, target);
  Experiment experiment;
  experiment.data = work;
  experiment.label = label_of(shape, target);
  add_window_kernel(experiment, work, "score", false);
  add_peer(experiment, setup, work, "snapkv_scores", true);
  return experiment;
}

// The whole layer's torch form takes gigabytes and tens of seconds; heads are alike, so two KV
// heads stand for eight.
constexpr u32 accumulated_heads = 2;

Experiment build_accumulated(const Setup& setup, DType dtype) {
  LayerShape shape;
  shape.tokens = setup.quick ? 1024 : 4096;
  shape.heads = accumulated_heads;
  shape.queries = shape.tokens;
  shape.dtype = dtype;
  const simd::Target target = scoring_target(dtype);
  auto work = std::make_shared<Scoring>(shape, setup, target);
  Experiment experiment;
  experiment.data = work;
  experiment.label = label_of(shape, target);
  Variant kernel{"accumulate",
                 [work](std::size_t copy) { return work->score(H2OScorer{}, copy, false); }};
  kernel.copies = work->layer.copies();
  const double pairs = 0.5 * shape.tokens * (shape.tokens + 1.0) * shape.heads * group_size;
  kernel.flops = 2.0 * dim * pairs;
  kernel.bytes = static_cast<double>(shape.bytes()) * (1.0 + group_size);
  experiment.variants.push_back(std::move(kernel));
  experiment.verify["accumulate"] = [work] {
    return work->check(H2OScorer{}, false, error_bound, 1.0);
  };
  experiment.scratch_bytes["accumulate"] = [work] {
    return work->room.workspace().high_water_bytes();
  };
  add_peer(experiment, setup, work, "h2o_sums", true);
  return experiment;
}

}  // namespace

void add_scoring_groups(std::vector<Group>& groups) {
  groups.push_back(
      {{{"snapkv_fp32", "SnapKV scoring, f32 cache, SIMD, against OpenBLAS sgemm alone", "score",
         "OpenBLAS sgemm", Better::lower, 0.95, 0.65, needs_vectors | needs_blas}},
       [](const Setup& setup, const std::vector<std::string>&) {
         return build_against_sgemm(setup, DType::f32);
       }});
  groups.push_back({{{"snapkv_f16", "the same from an f16 cache, K given to sgemm as f32", "score",
                      "OpenBLAS sgemm", Better::lower, none, 0.65, needs_vectors | needs_blas}},
                    [](const Setup& setup, const std::vector<std::string>&) {
                      return build_against_sgemm(setup, DType::f16);
                    }});
  groups.push_back(
      {{{"snapkv_amx_lse", "SnapKV scoring, AMX, LSE given, against reading K", "score, LSE given",
         "reading K", Better::lower, 3.5, 2.0, needs_matrix},
        {"snapkv_amx", "SnapKV scoring, AMX, LSE not given, against reading K", "score",
         "reading K", Better::lower, 6.5, 3.5, needs_matrix},
        {"snapkv_amx_lse_one", "LSE given, against reading K in one stream", "score, LSE given",
         "reading K, one stream", Better::lower, none, none, needs_matrix},
        {"snapkv_amx_one", "LSE not given, against reading K in one stream", "score",
         "reading K, one stream", Better::lower, none, none, needs_matrix}},
       build_against_read});
  groups.push_back(
      {{{"snapkv_bf16_torch", "SnapKV scoring, bf16, LSE not given, against kvpress in torch bf16",
         "score", "torch", Better::higher, 10.0, 40.0, needs_torch}},
       build_against_torch});
  groups.push_back({{{"h2o_torch", "accumulated attention (H2O), bf16, against eager torch bf16",
                      "accumulate", "torch", Better::higher, 15.0, 60.0, needs_torch}},
                    [](const Setup& setup, const std::vector<std::string>&) {
                      return build_accumulated(setup, DType::bf16);
                    }});
  groups.push_back({{{"h2o_torch_f32", "the same, f32 against eager torch f32", "accumulate",
                      "torch", Better::higher, none, none, needs_torch}},
                    [](const Setup& setup, const std::vector<std::string>&) {
                      return build_accumulated(setup, DType::f32);
                    }});
}

}  // namespace kvlean::ratio
