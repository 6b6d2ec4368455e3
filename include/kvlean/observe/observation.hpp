// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cmath>

#include "kvlean/core/kv_cache.hpp"
#include "kvlean/simd/target.hpp"

KVLEAN_NAMESPACE_BEGIN

/// How the layer computes attention. Scoring, attending and the error measures all read it.
/// logit = softcap(scale * q.k) + log_mass, where softcap(x) = cap * tanh(x / cap) when cap > 0.
struct AttentionSpec {
  float scale = 0.0f;                  ///< 0: 1 / sqrt(key width)
  float softcap = 0.0f;                ///< 0: none
  u32 sliding_window = 0;              ///< a query sees positions > its own - window; 0: all
  const float* sink_logits = nullptr;  ///< [num_query_heads] one more logit in the denominator
  /// Instructions to compute with; a target that this CPU lacks means scalar. Results of different
  /// targets differ by rounding. `best` and `amx` sum the attention to bf16 keys with AMX tiles
  /// where the CPU and the operating system allow it; name another target to forbid that.
  simd::Target target = simd::Target::best;
  /// Whether tiles may also serve f16 and f32 keys and queries, rounded to bf16: faster, and
  /// probabilities are then off by about 2^-9 times the logit, relative.
  bool round_to_bf16 = false;

  [[nodiscard]] float scale_for(u32 key_width) const noexcept {
    return scale != 0.0f ? scale : 1.0f / std::sqrt(static_cast<float>(key_width));
  }
};

/// Which tokens a query sees.
enum class Mask : u8 {
  none,    ///< every token
  causal,  ///< tokens at or before the query's position
};

/// Query rows [num_query_heads][count][dim], after RoPE. The group size is num_query_heads divided
/// by the cache's KV heads: query head h reads KV head h / group_size.
struct Queries {
  Rows rows;          ///< heads = query heads
  u32 first_row = 0;  ///< query i is row first_row + i
  u32 count = 0;
  const i32* positions = nullptr;  ///< [count], ascending; null: first_position + i
  i32 first_position = -1;         ///< negative: the queries are the newest `count` tokens
  Mask mask = Mask::causal;
  const float* lse = nullptr;  ///< [query_heads][count] log-sum-exp the engine already has

  [[nodiscard]] explicit operator bool() const noexcept { return count != 0; }
  /// Position of query i over a cache whose next position is `next_position`.
  [[nodiscard]] i32 position(u32 i, i32 next_position) const noexcept {
    if (positions != nullptr) return positions[i];
    const i32 start =
        first_position >= 0 ? first_position : next_position - static_cast<i32>(count);
    return start + static_cast<i32>(i);
  }
};

/// How the scores of a group's query heads become one score of their KV head.
enum class GroupReduction : u8 { mean, max, sum };

/// What was seen of one layer. Give what the policy needs; the rest stays empty.
struct Observation {
  AttentionSpec attention = {};
  Queries window = {};                ///< the last queries (SnapKV, TOVA)
  Queries reference = {};             ///< queries to accumulate over: all of a prefill (H2O)
  Ragged<const float> mass = {};      ///< [kv_head][token] attention received so far, ready-made
  Ragged<const float> external = {};  ///< [kv_head][token] scores computed elsewhere
  Rows output_projection = {};  ///< [query_head][dim][hidden]: W_O of each query head, or empty
  u32 observers = 0;            ///< queries that `mass` was summed over; 0: unknown
  Ragged<const float> mass_observers =
      {};  ///< [kv_head][token] the same of each token, where they differ; else empty
};

/// Reads query i of a query head as float. O(width).
inline void load_query(const Queries& queries, u32 query_head, u32 i, float* row) noexcept {
  load_row(queries.rows, query_head, queries.first_row + i, row);
}

/// Wraps queries [query_head][count][dim]; see Queries.
template <Tensor Q>
[[nodiscard]] Queries queries(const Q& tensor, Mask mask = Mask::causal) noexcept {
  Queries result;
  result.rows = rows_of(tensor);
  result.count = result.rows.tokens;
  result.mask = mask;
  return result;
}

/// The last queries of the prompt were seen: all that SnapKV and TOVA need. Nothing is computed
/// yet.
template <Tensor Q>
[[nodiscard]] Observation observe_window(const Q& tensor, AttentionSpec attention = {}) noexcept {
  Observation seen;
  seen.attention = attention;
  seen.window = queries(tensor);
  return seen;
}

/// All queries of a prefill were seen: accumulated attention (H2O) will be summed over them, and
/// the last `window` of them serve window scorers.
template <Tensor Q>
[[nodiscard]] Observation observe_prefill(const Q& tensor, std::size_t window = 32,
                                          AttentionSpec attention = {}) noexcept {
  Observation seen;
  seen.attention = attention;
  seen.reference = queries(tensor);
  seen.window = seen.reference;
  seen.window.count = std::min(detail::saturate_u32(window), seen.reference.count);
  seen.window.first_row = seen.reference.count - seen.window.count;
  return seen;
}

/// The engine already has the attention mass each token received, [kv_head][token].
[[nodiscard]] inline Observation observe_mass(Ragged<const float> mass,
                                              u32 observers = 0) noexcept {
  Observation seen;
  seen.mass = mass;
  seen.observers = observers;
  return seen;
}

/// The same where every token has a count of its own, as a cache that lives through decoding keeps
/// it: `mass_observers` [kv_head][token], rounded to whole queries, at least 1.
[[nodiscard]] inline Observation observe_mass(Ragged<const float> mass,
                                              Ragged<const float> mass_observers) noexcept {
  Observation seen;
  seen.mass = mass;
  seen.mass_observers = mass_observers;
  return seen;
}

/// Checks queries against a cache: heads, widths, group. O(1).
[[nodiscard]] inline Status check_queries(const Queries& queries, const CacheView& cache) noexcept {
  if (!queries) return StatusCode::missing_observation;
  const u64 last_row = static_cast<u64>(queries.first_row) + queries.count;
  if (last_row > queries.rows.tokens) return StatusCode::invalid_length;
  KVLEAN_RETURN_IF_ERROR(check_rows(queries.rows, static_cast<u32>(last_row)));
  if (cache.segments == 0 || queries.rows.heads % cache.segments != 0) {
    return StatusCode::invalid_group;
  }
  if (queries.rows.width != cache.keys.width) return StatusCode::shape_mismatch;
  return StatusCode::ok;
}

KVLEAN_NAMESPACE_END
