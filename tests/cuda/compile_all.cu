// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
// Compiled, never run: every call of the backend and the example of docs/cuda.md. run.sh --headers
// has every header included first.
#include <kvlean/cuda/apply.cuh>
#include <kvlean/cuda/attend.cuh>
#include <kvlean/cuda/attention_mass.cuh>
#include <kvlean/cuda/cam.cuh>
#include <kvlean/cuda/compress.cuh>
#include <kvlean/cuda/d2o.cuh>
#include <kvlean/cuda/kvmerger.cuh>
#include <kvlean/cuda/massfold.cuh>
#include <kvlean/cuda/ragged_store.cuh>
#include <kvlean/cuda/score_attention.cuh>
#include <kvlean/cuda/select.cuh>
#if defined(KVLEAN_TEST_NCCL)
#include <kvlean/cuda/nccl_communicator.cuh>
#endif
#include <kvlean/policy/papers.hpp>
#include <kvlean/reduce/massfold.hpp>
#include <vector>

using namespace kvlean;  // NOLINT: the example is short

// ---- the example of docs/cuda.md ---------------------------------------------------------------

/// Ada-SnapKV for a step: 32 layers of two sequences, 8 KV heads of 128, bf16, 25 % kept, in place.
Status compress_step(void* keys, void* values, u32* lengths, void* queries, float* lse,
                     void* memory, std::size_t bytes, u32* error_word, cuda::Segment* descriptors,
                     cudaStream_t stream) {
  constexpr u32 layers = 32, sequences = 2, heads = 8, room = 8192, row_bytes = 256;

  // Once: where every head of every layer and sequence lies.
  cuda::CacheLayout layout;
  layout.keys = cuda::TensorLayout::contiguous(keys, sequences, heads, room, row_bytes);
  layout.values = cuda::TensorLayout::contiguous(values, sequences, heads, room, row_bytes);
  layout.num_layers = layers;
  layout.num_sequences = sequences;
  layout.kv_heads = heads;
  layout.capacity = room;
  std::vector<cuda::Segment> segments(layers * sequences * heads);
  KVLEAN_RETURN_IF_ERROR(describe(layout, segments));
  cudaMemcpy(descriptors, segments.data(), segments.size() * sizeof(cuda::Segment),
             cudaMemcpyHostToDevice);

  // Each step: what kernels read, what was seen, and one call.
  cuda::CacheView cache;
  cache.segments = descriptors;
  cache.lengths = lengths;
  cache.num_layers = layers;
  cache.num_sequences = sequences;
  cache.kv_heads = heads;
  cache.group_size = 4;
  cache.max_tokens = room;
  cache.key_width = cache.value_width = 128;
  cache.key_dtype = cache.value_dtype = DType::bf16;
  cuda::Observation seen;
  seen.window = cuda::Queries::contiguous(cache, queries, 32);
  seen.window.lse = lse;  // what a flash kernel has; null: computed

  const auto policy = cuda::on_device(AdaKVPolicy{});
  const Budget budget = Budget::fraction(0.25);
  if (compress_bytes_required(cache, policy, budget, seen) > bytes) {
    return StatusCode::workspace_too_small;
  }
  cuda::Workspace workspace(memory, bytes);
  const cuda::Context context{stream, workspace, error_word};
  return compress(context, cache, policy, budget, seen, in_place);
}

// ---- every call --------------------------------------------------------------------------------

bool use_every_call(const cuda::Context& context, const cuda::CacheView& cache,
                    const cuda::Observation& seen, const cuda::Scores& scores,
                    const cuda::PackedDestination& packed, void* data) {
  bool ok = true;
  const auto check = [&ok](Status status) { ok = ok && status.ok(); };
  u32* words = static_cast<u32*>(data);
  i32* signed_words = static_cast<i32*>(data);
  float* floats = static_cast<float*>(data);
  const Budget budget = Budget::fraction(0.5);
  const cuda::DeviceRagged<const float> rank{floats, 1, nullptr};

  check(score(context, cache, KeyNormScorer{}, seen, scores));
  check(score(context, cache, KeyDiffScorer{}, seen, scores));
  check(score(context, cache, StreamingLLMScorer{}, seen, scores));
  check(score(context, cache, RandomScorer{}, seen, scores, 1, 2));
  check(score(context, cache, ExternalScorer{}, seen, scores));
  check(score(context, cache, SnapKVScorer{}, seen, scores));
  check(score(context, cache, TOVAScorer{}, seen, scores));
  check(score(context, cache, H2OScorer{}, seen, scores));
  check(score(context, cache, ObservedAttentionScorer{}, seen, scores));
  check(accumulate_attention(context, cache, seen.reference, seen.attention, GroupReduction::mean,
                             scores.mass, true));

  cuda::SelectOptions options;
  cuda::PlanView plan;
  cuda::Selection selection;
  selection.plan = plan;
  check(select(cache, rank, options, context, selection));
  check(allocate(cache, rank, options, context, words));
  check(select_kept(cache, rank, words, options, context, selection));
#if defined(KVLEAN_TEST_NCCL)
  const cuda::NcclCommunicator ranks(nullptr);
  check(select(cache, rank, options, context, selection, ranks, cuda::HeadShard{}));
#endif

  check(apply(context, plan, cache, packed.view));
  check(apply_in_place(context, plan, cache));
  check(pack_segments(context, words, 0, packed.pool, cache, packed.view));
  check(append(context, cache, data, data, 16, 16, 1));
  check(page_lists(context, cache, signed_words, signed_words, signed_words));
  check(attend(context, cache, seen.window, seen.attention, floats, floats));

  check(compress(context, cache, cuda::on_device(PyramidKVPolicy{}), budget, seen, packed));
  check(compress(context, cache, cuda::on_device(H2OPolicy{}), budget, seen, packed.view));
  check(compress(context, cache, cuda::Policy<KeyDiffScorer>{}, budget, seen, in_place));
  check(cuda::plan(context, cache, cuda::Policy<ExternalScorer>{}, budget, seen, plan));
  check(compress(context, cache, cuda::Policy<H2OScorer, KVMergerReducer>{}, budget, seen, packed));
  check(compress(context, cache, cuda::Policy<H2OScorer, D2OReducer>{}, budget, seen, packed));
  check(compress(context, cache, cuda::Policy<SnapKVScorer, CaMReducer>{}, budget, seen, in_place));
  check(compress(context, cache, cuda::Policy<SnapKVScorer, MassFoldReducer>{}, budget, seen,
                 packed));
  return ok;
}
