// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "kvlean/attention/attention_output.hpp"

KVLEAN_NAMESPACE_BEGIN

namespace detail {

/// One query of one head, in double precision, token by token.
class ReferenceRow {
 public:
  ReferenceRow(const Queries& queries, const CacheView& cache, const AttentionSpec& spec, u32 head,
               u32 i) noexcept
      : cache_(cache),
        spec_(spec),
        mask_(queries.mask),
        segment_(head / (queries.rows.heads / cache.segments)),
        position_(position_of(queries, cache, segment_, i)),
        sink_(spec.sink_logits != nullptr ? static_cast<double>(spec.sink_logits[head])
                                          : -infinity) {
    load_query(queries, head, i, query_);
  }

  /// Fills `values_` and returns the log-sum-exp.
  double attend() noexcept {
    std::fill_n(values_, cache_.values.width, 0.0);
    const u32 length = cache_.length(segment_);
    double maximum = sink_;
    for (u32 token = 0; token < length; ++token) {
      if (sees(token)) maximum = std::max(maximum, logit(token));
    }
    const double shift = maximum == -infinity ? 0.0 : maximum;
    double total = std::exp(sink_ - shift);
    for (u32 token = 0; token < length; ++token) {
      if (!sees(token)) continue;
      const double weight = std::exp(logit(token) - shift);
      total += weight;
      load_row(cache_.values, segment_, token, row_);
      for (u32 d = 0; d < cache_.values.width; ++d) {
        values_[d] += weight * static_cast<double>(row_[d]);
      }
    }
    if (total == 0.0) return -infinity;
    for (u32 d = 0; d < cache_.values.width; ++d) values_[d] /= total;
    return shift + std::log(total);
  }
  [[nodiscard]] const double* values() const noexcept { return values_; }

 private:
  static constexpr double infinity = std::numeric_limits<double>::infinity();

  [[nodiscard]] static i64 position_of(const Queries& queries, const CacheView& cache, u32 segment,
                                       u32 i) noexcept {
    if (queries.positions != nullptr) return queries.positions[i];
    if (queries.first_position >= 0) return static_cast<i64>(queries.first_position) + i;
    const i64 next = cache.positions ? i64{cache.next_position} : i64{cache.length(segment)};
    return next - static_cast<i64>(queries.count) + i;
  }
  [[nodiscard]] bool sees(u32 token) const noexcept {
    const i64 at = cache_.position(segment_, token);
    if (mask_ == Mask::causal && at > position_) return false;
    return spec_.sliding_window == 0 || at > position_ - static_cast<i64>(spec_.sliding_window);
  }
  [[nodiscard]] double logit(u32 token) noexcept {
    load_row(cache_.keys, segment_, token, row_);
    double product = 0.0;
    for (u32 d = 0; d < cache_.keys.width; ++d) {
      product += static_cast<double>(query_[d]) * static_cast<double>(row_[d]);
    }
    double result = static_cast<double>(spec_.scale_for(cache_.keys.width)) * product;
    const double cap = static_cast<double>(spec_.softcap);
    if (cap > 0.0) result = cap * std::tanh(result / cap);
    return result + static_cast<double>(cache_.mass_bias(segment_, token));
  }

  const CacheView& cache_;
  const AttentionSpec& spec_;
  Mask mask_;
  u32 segment_;
  i64 position_;
  double sink_;
  float query_[max_row_width];
  float row_[max_row_width];
  double values_[max_row_width];
};

template <class Element>
[[nodiscard]] Status attend_reference_view(const Queries& queries, const CacheView& cache,
                                           const AttentionSpec& spec,
                                           const BasicAttentionOutput<Element>& output) noexcept {
  KVLEAN_RETURN_IF_ERROR(check_attention(queries, cache, spec, output));
  const AttentionShape shape = attention_shape(queries, cache);
  for (u32 head = 0; head < shape.query_heads; ++head) {
    for (u32 i = 0; i < shape.count; ++i) {
      ReferenceRow row(queries, cache, spec, head, i);
      const double lse = row.attend();
      if (output.lse != nullptr) {
        output.log_sum_exp(shape, head, i) = static_cast<Element>(lse);
      }
      if (output.values == nullptr) continue;
      Element* values = output.row(shape, head, i);
      for (u32 d = 0; d < shape.value_width; ++d) {
        values[d] = static_cast<Element>(row.values()[d]);
      }
    }
  }
  return StatusCode::ok;
}

}  // namespace detail

/// What attend() means, in plain double precision: the same masks, log mass, softcap, sinks, shapes
/// and errors (see attend), one token at a time and every mask tested, nothing tiled or skipped.
/// For tests and checks against other implementations; slow. Writes double or float (rounded once).
/// The output must not overlap the cache or the queries. No allocation, about 33 KiB of stack.
/// O(query_heads * count * tokens * (key width + value width)).
template <Cache C>
[[nodiscard]] Status attend_reference(const Queries& queries, const C& cache,
                                      const AttentionSpec& spec,
                                      const BasicAttentionOutput<double>& output) noexcept {
  return detail::attend_reference_view(queries, view_of(cache), spec, output);
}
template <Cache C>
[[nodiscard]] Status attend_reference(const Queries& queries, const C& cache,
                                      const AttentionSpec& spec,
                                      const AttentionOutput& output) noexcept {
  return detail::attend_reference_view(queries, view_of(cache), spec, output);
}

KVLEAN_NAMESPACE_END
