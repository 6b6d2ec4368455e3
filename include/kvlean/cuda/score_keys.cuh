// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/core/random.hpp"
#include "kvlean/cuda/draw.cuh"
#include "kvlean/cuda/launch.cuh"
#include "kvlean/cuda/load_store.cuh"
#include "kvlean/cuda/observation.cuh"
#include "kvlean/score/external.hpp"
#include "kvlean/score/key_diff.hpp"
#include "kvlean/score/key_norm.hpp"
#include "kvlean/score/random.hpp"
#include "kvlean/score/streaming_llm.hpp"

// Scorers that need no queries. The options are the CPU scorers themselves.

KVLEAN_CUDA_NAMESPACE_BEGIN
namespace detail {

inline constexpr u32 key_threads = 256;
inline constexpr u32 rows_in_flight = 4;  // of a team of lanes

/// Lanes that read a row together: one 16-byte chunk each, or as many as a warp has.
[[nodiscard]] inline u32 lanes_for(u32 row_bytes) noexcept {
  const u32 chunks = row_bytes / 16;
  return chunks <= 8 ? 8 : chunks <= 16 ? 16 : 32;
}
template <class Function>
void with_lanes(u32 lanes, Function&& function) noexcept {
  if (lanes == 8) return function(std::integral_constant<u32, 8>{});
  if (lanes == 16) return function(std::integral_constant<u32, 16>{});
  return function(std::integral_constant<u32, 32>{});
}

/// Calls visit(chunk, bits[rows_in_flight]) for every 16-byte chunk of this lane, for the rows
/// token + i * step, i < rows_in_flight; rows from `length` on repeat the last.
template <u32 Lanes, class Visit>
KVLEAN_DEVICE void visit_rows(const Segment& segment, u32 length, u32 token, u32 step,
                              u32 row_bytes, Visit&& visit) noexcept {
  const u32 lane = threadIdx.x % Lanes;
  const char* row[rows_in_flight];
#pragma unroll
  for (u32 i = 0; i < rows_in_flight; ++i) {
    row[i] = segment.key_row(smaller(token + i * step, length - 1));
  }
  for (u32 chunk = lane; chunk * 16 < row_bytes; chunk += Lanes) {
    uint4 bits[rows_in_flight];
#pragma unroll
    for (u32 i = 0; i < rows_in_flight; ++i) bits[i] = load_16_constant(row[i] + chunk * 16);
    visit(chunk, bits);
  }
}

/// rank = -|k|. Blocks (tokens, segment).
template <DType D, u32 Lanes>
__global__ void __launch_bounds__(key_threads)
    key_norm_kernel(const CacheView cache, DeviceRagged<float> rank) {
  constexpr u32 teams = key_threads / Lanes;
  const u32 s = blockIdx.y;
  const u32 length = cache.lengths[s];
  const u32 first = blockIdx.x * teams * rows_in_flight;
  if (first >= length) return;
  const u32 team = threadIdx.x / Lanes;
  float sum[rows_in_flight] = {};
  visit_rows<Lanes>(cache.segments[s], length, first + team, teams,
                    cache.key_width * element_bytes<D>,
                    [&](u32, const uint4(&bits)[rows_in_flight]) noexcept {
#pragma unroll
                      for (u32 i = 0; i < rows_in_flight; ++i) {
                        float x[elements_16<D>];
                        unpack<D>(bits[i], x);
#pragma unroll
                        for (u32 j = 0; j < elements_16<D>; ++j) sum[i] = fmaf(x[j], x[j], sum[i]);
                      }
                    });
#pragma unroll
  for (u32 i = 0; i < rows_in_flight; ++i) {
    const float norm = sqrtf(sum_lanes<Lanes>(sum[i]));
    const u32 t = first + team + i * teams;
    if (threadIdx.x % Lanes == 0 && t < length) rank.segment(s)[t] = -norm;
  }
}

inline constexpr u32 direction_tokens = 1024;  // summed by a block

/// What KeyDiff keeps between its kernels: sums of unit keys of each block, their counts, and the
/// mean direction scaled to length 1.
struct DirectionSums {
  float* part = nullptr;  ///< [segments][blocks][width]
  u32* finite = nullptr;  ///< [segments][blocks]
  float* mean = nullptr;  ///< [segments][width]
  u32 blocks = 0;
};

/// Blocks (direction_tokens tokens, segment); shared: teams * width floats.
template <DType D, u32 Lanes>
__global__ void __launch_bounds__(key_threads)
    unit_key_sums_kernel(const CacheView cache, const DirectionSums sums) {
  extern __shared__ float key_sums[];
  __shared__ u32 finite_keys;
  constexpr u32 teams = key_threads / Lanes;
  const u32 s = blockIdx.y;
  const u32 length = cache.lengths[s];
  const u32 first = blockIdx.x * direction_tokens;
  const u32 width = cache.key_width;
  if (first >= length) return;
  const u32 last = smaller(first + direction_tokens, length);
  const Segment& segment = cache.segments[s];
  const u32 team = threadIdx.x / Lanes;
  float* own = key_sums + team * width;
  if (threadIdx.x == 0) finite_keys = 0;
  for (u32 i = threadIdx.x; i < teams * width; i += key_threads) key_sums[i] = 0.0f;
  __syncthreads();
  u32 finite = 0;
  float first_chunk[elements_16<D>] = {};  // of this lane, all there is up to Lanes * 16 bytes
  // All lanes of a warp take the same turns: sums over lanes need them all.
  for (u32 base = first; base < last; base += teams * rows_in_flight) {
    float sum[rows_in_flight] = {};
    visit_rows<Lanes>(segment, length, base + team, teams, width * element_bytes<D>,
                      [&](u32, const uint4(&bits)[rows_in_flight]) noexcept {
#pragma unroll
                        for (u32 i = 0; i < rows_in_flight; ++i) {
                          float x[elements_16<D>];
                          unpack<D>(bits[i], x);
#pragma unroll
                          for (u32 j = 0; j < elements_16<D>; ++j) {
                            sum[i] = fmaf(x[j], x[j], sum[i]);
                          }
                        }
                      });
    float factor[rows_in_flight];
#pragma unroll
    for (u32 i = 0; i < rows_in_flight; ++i) {
      const float norm = sqrtf(sum_lanes<Lanes>(sum[i]));
      const bool counts = base + team + i * teams < last && norm < INFINITY;
      factor[i] = counts ? 1.0f / fmaxf(norm, 1e-12f) : 0.0f;
      if (counts && threadIdx.x % Lanes == 0) ++finite;
    }
    visit_rows<Lanes>(segment, length, base + team, teams, width * element_bytes<D>,
                      [&](u32 chunk, const uint4(&bits)[rows_in_flight]) noexcept {
#pragma unroll
                        for (u32 i = 0; i < rows_in_flight; ++i) {
                          if (factor[i] == 0.0f) continue;  // 0 times infinity is no number
                          float x[elements_16<D>];
                          unpack<D>(bits[i], x);
#pragma unroll
                          for (u32 j = 0; j < elements_16<D>; ++j) {
                            if (chunk < Lanes) {
                              first_chunk[j] = fmaf(x[j], factor[i], first_chunk[j]);
                            } else {
                              float& to = own[chunk * elements_16<D> + j];
                              to = fmaf(x[j], factor[i], to);
                            }
                          }
                        }
                      });
  }
  if (threadIdx.x % Lanes * elements_16<D> < width) {
#pragma unroll
    for (u32 j = 0; j < elements_16<D>; ++j) {
      own[threadIdx.x % Lanes * elements_16<D> + j] = first_chunk[j];
    }
  }
  if (finite != 0) atomicAdd(&finite_keys, finite);
  __syncthreads();
  const u64 block = static_cast<u64>(s) * sums.blocks + blockIdx.x;
  for (u32 i = threadIdx.x; i < width; i += key_threads) {
    float sum = 0.0f;
    for (u32 other = 0; other < teams; ++other) sum += key_sums[other * width + i];
    sums.part[block * width + i] = sum;
  }
  if (threadIdx.x == 0) sums.finite[block] = finite_keys;
}

/// Blocks (1, segment).
template <int = 0>
__global__ void __launch_bounds__(key_threads)
    mean_direction_kernel(const CacheView cache, const DirectionSums sums) {
  __shared__ float square[key_threads];
  const u32 s = blockIdx.y;
  const u32 width = cache.key_width;
  const u32 blocks = ceil_div(cache.lengths[s], direction_tokens);
  u64 finite = 0;
  for (u32 b = 0; b < blocks; ++b) finite += sums.finite[static_cast<u64>(s) * sums.blocks + b];
  const double count = finite != 0 ? static_cast<double>(finite) : 1.0;
  float squares = 0.0f;
  for (u32 i = threadIdx.x; i < width; i += key_threads) {
    double sum = 0.0;
    for (u32 b = 0; b < blocks; ++b) {
      sum += sums.part[(static_cast<u64>(s) * sums.blocks + b) * width + i];
    }
    const float mean = static_cast<float>(sum / count);
    sums.mean[static_cast<u64>(s) * width + i] = mean;
    squares = fmaf(mean, mean, squares);
  }
  square[threadIdx.x] = squares;
  __syncthreads();
  for (u32 half = key_threads / 2; half != 0; half /= 2) {
    if (threadIdx.x < half) square[threadIdx.x] += square[threadIdx.x + half];
    __syncthreads();
  }
  const float factor = 1.0f / fmaxf(sqrtf(square[0]), 1e-8f);
  for (u32 i = threadIdx.x; i < width; i += key_threads) {
    sums.mean[static_cast<u64>(s) * width + i] *= factor;
  }
}

/// rank = -cos(k, mean). Blocks (tokens, segment).
template <DType D, u32 Lanes>
__global__ void __launch_bounds__(key_threads)
    key_diff_kernel(const CacheView cache, const DirectionSums sums, DeviceRagged<float> rank) {
  constexpr u32 teams = key_threads / Lanes;
  const u32 s = blockIdx.y;
  const u32 length = cache.lengths[s];
  const u32 first = blockIdx.x * teams * rows_in_flight;
  if (first >= length) return;
  const u32 team = threadIdx.x / Lanes;
  const float* mean = sums.mean + static_cast<u64>(s) * cache.key_width;
  float square[rows_in_flight] = {};
  float product[rows_in_flight] = {};
  visit_rows<Lanes>(cache.segments[s], length, first + team, teams,
                    cache.key_width * element_bytes<D>,
                    [&](u32 chunk, const uint4(&bits)[rows_in_flight]) noexcept {
                      float m[elements_16<D>];
#pragma unroll
                      for (u32 j = 0; j < elements_16<D>; ++j) {
                        m[j] = __ldg(mean + chunk * elements_16<D> + j);
                      }
#pragma unroll
                      for (u32 i = 0; i < rows_in_flight; ++i) {
                        float x[elements_16<D>];
                        unpack<D>(bits[i], x);
#pragma unroll
                        for (u32 j = 0; j < elements_16<D>; ++j) {
                          square[i] = fmaf(x[j], x[j], square[i]);
                          product[i] = fmaf(x[j], m[j], product[i]);
                        }
                      }
                    });
#pragma unroll
  for (u32 i = 0; i < rows_in_flight; ++i) {
    const float norm = sqrtf(sum_lanes<Lanes>(square[i]));
    const float dot = sum_lanes<Lanes>(product[i]);
    const u32 t = first + team + i * teams;
    if (threadIdx.x % Lanes != 0 || t >= length) continue;
    rank.segment(s)[t] = norm < INFINITY ? -dot / fmaxf(norm, 1e-8f) : NAN;
  }
}

template <int = 0>
__global__ void streaming_kernel(const CacheView cache, u32 sinks, DeviceRagged<float> rank) {
  const u32 s = blockIdx.y;
  const u32 length = cache.lengths[s];
  const u32 t = blockIdx.x * blockDim.x + threadIdx.x;
  if (t >= length) return;
  rank.segment(s)[t] = t < sinks ? 1e30f : -static_cast<float>(length - 1 - t);
}

template <int = 0>
__global__ void random_kernel(const CacheView cache, u64 seed, u32 step, DeviceRagged<float> rank) {
  const u32 s = blockIdx.y;
  const u32 t = blockIdx.x * blockDim.x + threadIdx.x;
  if (t >= cache.lengths[s]) return;
  const Segment& segment = cache.segments[s];
  rank.segment(s)[t] = device_draw(seed, segment.layer, segment.kv_head, segment.position(t), step);
}

template <int = 0>
__global__ void copy_scores_kernel(const CacheView cache, DeviceRagged<const float> from,
                                   DeviceRagged<float> to, DeviceRagged<float> also) {
  const u32 s = blockIdx.y;
  const u32 t = blockIdx.x * blockDim.x + threadIdx.x;
  if (t >= cache.lengths[s]) return;
  const float x = from.segment(s)[t];
  to.segment(s)[t] = x;
  if (also.data != nullptr) also.segment(s)[t] = x;
}

[[nodiscard]] inline dim3 token_grid(const CacheView& cache, u32 threads = 256) noexcept {
  return dim3(ceil_div(cache.max_tokens, threads), cache.num_segments());
}
[[nodiscard]] inline Status check_rank(const CacheView& cache, const Scores& scores) noexcept {
  KVLEAN_RETURN_IF_ERROR(check_cache(cache));
  return scores.rank ? StatusCode::ok : StatusCode::null_pointer;
}

}  // namespace detail

/// rank = -|k|: kvlean::KeyNormScorer. Reads the keys once. Errors: those of check_cache,
/// null_pointer, launch_failed. As on the CPU up to rounding (relative 1e-6 * sqrt(width)).
[[nodiscard]] inline Status score(const Context& context, const CacheView& cache,
                                  const KeyNormScorer&, const Observation&,
                                  const Scores& scores) noexcept {
  KVLEAN_RETURN_IF_ERROR(detail::check_rank(cache, scores));
  Status status = StatusCode::ok;
  with_dtype(cache.key_dtype, [&](auto dtype) noexcept {
    detail::with_lanes(detail::lanes_for(cache.key_row_bytes()), [&](auto lanes) noexcept {
      const u32 rows = detail::key_threads / lanes() * detail::rows_in_flight;
      status =
          launch(context, {.grid = detail::token_grid(cache, rows), .block = detail::key_threads},
                 detail::key_norm_kernel<dtype(), lanes()>, cache, scores.rank);
    });
  });
  return status;
}

/// Bytes of device workspace that scoring with KeyDiff takes.
[[nodiscard]] inline std::size_t score_bytes_required(const CacheView& cache, const KeyDiffScorer&,
                                                      const Observation& = {}) noexcept {
  const std::size_t blocks =
      std::size_t{cache.num_segments()} * ceil_div(cache.max_tokens, detail::direction_tokens);
  Workspace counting = Workspace::counting();
  static_cast<void>(counting.take<float>(blocks * cache.key_width));
  static_cast<void>(counting.take<u32>(blocks));
  static_cast<void>(counting.take<float>(std::size_t{cache.num_segments()} * cache.key_width));
  return counting.bytes_required();
}

/// rank = -cos(k, mean unit key): kvlean::KeyDiffScorer. Reads the keys twice from memory. Errors:
/// those of check_cache, null_pointer, workspace_too_small, launch_failed.
[[nodiscard]] inline Status score(const Context& context, const CacheView& cache,
                                  const KeyDiffScorer&, const Observation&,
                                  const Scores& scores) noexcept {
  KVLEAN_RETURN_IF_ERROR(detail::check_rank(cache, scores));
  const WorkspaceScope scope(context.workspace);
  const u32 segments = cache.num_segments();
  detail::DirectionSums sums;
  sums.blocks = ceil_div(cache.max_tokens, detail::direction_tokens);
  sums.part = context.workspace.take<float>(std::size_t{segments} * sums.blocks * cache.key_width);
  sums.finite = context.workspace.take<u32>(std::size_t{segments} * sums.blocks);
  sums.mean = context.workspace.take<float>(std::size_t{segments} * cache.key_width);
  KVLEAN_RETURN_IF_ERROR(context.workspace.status());
  Status status = StatusCode::ok;
  with_dtype(cache.key_dtype, [&](auto dtype) noexcept {
    detail::with_lanes(detail::lanes_for(cache.key_row_bytes()), [&](auto lanes) noexcept {
      const u32 teams = detail::key_threads / lanes();
      const std::size_t shared = std::size_t{teams} * cache.key_width * sizeof(float);
      const auto sum_kernel = detail::unit_key_sums_kernel<dtype(), lanes()>;
      status = raise_shared_bytes(sum_kernel, shared);
      if (!status) return;
      status = launch(context,
                      {.grid = dim3(sums.blocks, segments),
                       .block = detail::key_threads,
                       .shared_bytes = shared},
                      sum_kernel, cache, sums);
      if (!status) return;
      status = launch(context, {.grid = dim3(1, segments), .block = detail::key_threads},
                      detail::mean_direction_kernel<>, cache, sums);
      if (!status) return;
      status = launch(context,
                      {.grid = detail::token_grid(cache, teams * detail::rows_in_flight),
                       .block = detail::key_threads},
                      detail::key_diff_kernel<dtype(), lanes()>, cache, sums, scores.rank);
    });
  });
  return status;
}

/// Sinks, then the newest: kvlean::StreamingLLMScorer, the same bits.
[[nodiscard]] inline Status score(const Context& context, const CacheView& cache,
                                  const StreamingLLMScorer& scorer, const Observation&,
                                  const Scores& scores) noexcept {
  KVLEAN_RETURN_IF_ERROR(detail::check_rank(cache, scores));
  return launch(context, {.grid = detail::token_grid(cache), .block = 256},
                detail::streaming_kernel<>, cache, scorer.sinks, scores.rank);
}

/// Seeded random scores: kvlean::RandomScorer, the same bits.
[[nodiscard]] inline Status score(const Context& context, const CacheView& cache,
                                  const RandomScorer&, const Observation&, const Scores& scores,
                                  u64 seed = 0, u32 step = 0) noexcept {
  KVLEAN_RETURN_IF_ERROR(detail::check_rank(cache, scores));
  return launch(context, {.grid = detail::token_grid(cache), .block = 256}, detail::random_kernel<>,
                cache, seed, step, scores.rank);
}

/// Scores that the caller supplies: kvlean::ExternalScorer, the same bits.
[[nodiscard]] inline Status score(const Context& context, const CacheView& cache,
                                  const ExternalScorer& scorer, const Observation& seen,
                                  const Scores& scores) noexcept {
  KVLEAN_RETURN_IF_ERROR(detail::check_rank(cache, scores));
  if (!seen.external) return StatusCode::missing_observation;
  if (scorer.is_mass && !scores.mass) return StatusCode::null_pointer;
  return launch(context, {.grid = detail::token_grid(cache), .block = 256},
                detail::copy_scores_kernel<>, cache, seen.external, scores.rank,
                scorer.is_mass ? scores.mass : DeviceRagged<float>{});
}

KVLEAN_CUDA_NAMESPACE_END
