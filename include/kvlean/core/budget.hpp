// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "kvlean/core/executor.hpp"
#include "kvlean/core/kv_cache.hpp"

KVLEAN_NAMESPACE_BEGIN

/// Slots kept per KV head, averaged over the heads it covers, protected ones included. A limit: a
/// method may keep fewer. Above the length it means "keep all". A fraction f of a segment of n
/// tokens is floor(f * n + 1e-9) slots. Where heads have different lengths, as after Ada-KV, a
/// budget of B slots is B for every head: allocators that share slots hand on what a short head
/// can't use, so that compressing again and again keeps the total; with the others a head keeps at
/// most its length.
class Budget {
 public:
  [[nodiscard]] static constexpr Budget fraction(double kept) noexcept { return {kept, true}; }
  [[nodiscard]] static constexpr Budget slots(std::size_t per_head) noexcept {
    return {static_cast<double>(per_head), false};
  }
  [[nodiscard]] constexpr bool is_fraction() const noexcept { return is_fraction_; }
  [[nodiscard]] constexpr double value() const noexcept { return value_; }
  [[nodiscard]] Status check() const noexcept {
    return std::isfinite(value_) && value_ >= 0.0 ? StatusCode::ok : StatusCode::invalid_budget;
  }
  /// Slots that one segment of `length` tokens stands for in the total: slots as they are, above
  /// the length too; of a fraction slots_for().
  [[nodiscard]] u32 nominal_for(u32 length) const noexcept {
    if (is_fraction_) return slots_for(length);
    constexpr u32 most = std::numeric_limits<u32>::max();
    return value_ >= static_cast<double>(most) ? most : static_cast<u32>(value_);
  }
  /// Slots for one segment of `length` tokens; never more than its length.
  [[nodiscard]] u32 slots_for(u32 length) const noexcept {
    const double wanted = is_fraction_ ? std::floor(value_ * length + 1e-9) : value_;
    return wanted >= static_cast<double>(length) ? length : static_cast<u32>(wanted);
  }

 private:
  constexpr Budget(double value, bool is_fraction) noexcept
      : value_(value), is_fraction_(is_fraction) {}
  double value_;
  bool is_fraction_;
};

/// Tokens that are never dropped, never merged away, and whose keys never change: the first `sinks`
/// and the last `recent` of each segment. Their values receive mass only in reducers that say so.
struct Protection {
  u32 sinks = 4;
  u32 recent = 32;

  /// Protected or frozen tokens of a segment; the two ends may meet.
  [[nodiscard]] constexpr u32 count(u32 length, u32 frozen) const noexcept {
    const u64 front = std::max<u64>(sinks, frozen);
    const u64 total = front + recent;
    return total >= length ? length : static_cast<u32>(total);
  }
  [[nodiscard]] constexpr bool covers(u32 token, u32 length, u32 frozen) const noexcept {
    return token < sinks || token < frozen ||
           static_cast<u64>(token) + recent >= static_cast<u64>(length);
  }
};

/// What the caller's memory can hold.
enum class SharingKind : u8 {
  per_head,     ///< every head its own tokens and its own count
  equal_count,  ///< every head its own tokens, one count for all heads of a layer
  same_tokens,  ///< one set of tokens for all heads of a layer
  whole_pages,  ///< one set for all heads, and tokens leave only as whole pages
};

struct Sharing {
  SharingKind kind = SharingKind::per_head;
  u32 page_tokens = 0;  ///< whole_pages only; > 0

  [[nodiscard]] static constexpr Sharing per_head() noexcept { return {}; }
  [[nodiscard]] static constexpr Sharing equal_count() noexcept {
    return {SharingKind::equal_count, 0};
  }
  [[nodiscard]] static constexpr Sharing same_tokens() noexcept {
    return {SharingKind::same_tokens, 0};
  }
  [[nodiscard]] static constexpr Sharing whole_pages(u32 page_tokens) noexcept {
    return {SharingKind::whole_pages, page_tokens};
  }
  /// One set of tokens serves all heads.
  [[nodiscard]] constexpr bool shares_tokens() const noexcept {
    return kind == SharingKind::same_tokens || kind == SharingKind::whole_pages;
  }
};

/// Everything a plan depends on besides the cache, the observation and the budget.
struct PlanOptions {
  Protection protection = {};
  Sharing sharing = {};
  Executor executor = {};
  u64 seed = 0;        ///< for methods that draw
  u32 step = 0;        ///< decode step, a further counter of the draws
  u32 layer = 0;       ///< place of the (first) layer in the model's schedule
  u32 num_layers = 0;  ///< layers of the schedule; 0: as many as are given
};

KVLEAN_NAMESPACE_END
