// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#include "bench/quality/prepared.hpp"

#include <ctime>

#include "bench/quality/sweep.hpp"
#include "kvlean/observe/attention_mass.hpp"

namespace kvlean::bench {
namespace {

DType storage_of(io::DType dtype) {
  switch (dtype) {
    case io::DType::f16:
      return DType::f16;
    case io::DType::bf16:
      return DType::bf16;
    default:
      return DType::f32;
  }
}

RopeSpec rope_of(const io::Capture& capture) {
  RopeSpec rope;
  rope.pairing =
      capture.rope_pairing == io::RopePairing::norm ? RopePairing::norm : RopePairing::neox;
  rope.theta = capture.rope_theta;
  return rope;
}

CacheView view_of_layer(const RopeSpec& rope, const io::CaptureLayer& layer, std::size_t first,
                        std::size_t count) {
  KVCache cache(CapturedTensor(layer.k, first, count), CapturedTensor(layer.v, first, count));
  cache.set_rope(&rope);
  cache.set_origin({0, static_cast<u32>(layer.index), 0});
  return cache.view();
}

i64 thread_nanoseconds() {
  std::timespec now = {};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<i64>(now.tv_sec) * 1'000'000'000 + static_cast<i64>(now.tv_nsec);
}

}  // namespace

CapturedTensor::CapturedTensor(const io::Tensor& tensor, std::size_t first, std::size_t count) {
  const std::size_t width = tensor.shape[2];
  rows_.dtype = storage_of(tensor.dtype);
  // Rows carry constness in `writable`, which stays false.
  rows_.data =
      const_cast<std::byte*>(tensor.bytes.data()) + first * width * size_bytes(rows_.dtype);
  rows_.width = static_cast<u32>(width);
  rows_.heads = static_cast<u32>(tensor.shape[0]);
  rows_.tokens = static_cast<u32>(count);
  rows_.token_stride = static_cast<i64>(width);
  rows_.head_stride = static_cast<i64>(tensor.shape[1] * width);
}

Status prepare_layer(const io::Capture& capture, std::size_t index, bool with_mass,
                     PreparedLayer& result) {
  const io::CaptureLayer& layer = capture.layers[index];
  const std::size_t context = capture.context_tokens;
  const std::size_t tokens = capture.tokens();
  const std::size_t future = tokens - context;

  result.spec.scale = static_cast<float>(capture.scale(layer));
  result.spec.softcap = static_cast<float>(capture.logit_softcap.value_or(0.0));
  result.rope = rope_of(capture);
  result.prefix = view_of_layer(result.rope, layer, 0, context);

  // Queries without positions are the newest of the cache they meet: of the context for what a
  // policy sees, of the tail (or of everything) for the future.
  result.seen.attention = result.spec;
  result.seen.reference = queries(CapturedTensor(layer.q, 0, context));
  result.seen.window = result.seen.reference;
  result.seen.window.count = std::min(window_queries, result.seen.reference.count);
  result.seen.window.first_row = result.seen.reference.count - result.seen.window.count;
  result.future = queries(CapturedTensor(layer.q, context, future));

  Workspace workspace;
  if (with_mass) {
    const Stopwatch watch;
    result.mass.assign(layer.kv_heads() * context, 0.0f);
    KVLEAN_RETURN_IF_ERROR(accumulate_attention(result.prefix, result.seen.reference, result.spec,
                                                GroupReduction::mean, workspace, Executor{},
                                                Ragged<float>(result.mass.data(), context)));
    result.seconds_mass = watch.seconds();
  }

  const CacheView everything = view_of_layer(result.rope, layer, 0, tokens);
  const CacheView tail = view_of_layer(result.rope, layer, context, future);
  result.shape = attention_shape(result.future, everything);
  const auto attend_to = [&](const CacheView& cache, std::vector<float>& values,
                             std::vector<float>& lse) {
    values.resize(result.shape.rows() * result.shape.value_width);
    lse.resize(result.shape.rows());
    return attend(result.future, cache, result.spec, AttentionOutput{values.data(), lse.data()});
  };
  KVLEAN_RETURN_IF_ERROR(attend_to(everything, result.reference_values, result.reference_lse));
  KVLEAN_RETURN_IF_ERROR(attend_to(tail, result.tail_values, result.tail_lse));
  return StatusCode::ok;
}

Stopwatch::Stopwatch() : start_nanoseconds_(thread_nanoseconds()) {}

double Stopwatch::seconds() const {
  return static_cast<double>(thread_nanoseconds() - start_nanoseconds_) * 1e-9;
}

}  // namespace kvlean::bench
