// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/config.hpp"

KVLEAN_NAMESPACE_BEGIN

/// Why a call did not do its work. One value a cause; on any but `ok` nothing was written.
enum class StatusCode : u32 {
  ok = 0,
  null_pointer,            ///< a required pointer is null (tensor data, page table, output)
  invalid_shape,           ///< an extent is zero, or an offset does not fit its type
  shape_mismatch,          ///< two inputs disagree about heads, tokens or widths
  row_too_wide,            ///< a row is wider than max_row_width
  invalid_length,          ///< a valid length exceeds the capacity
  invalid_page_table,      ///< a page is negative, or the table is shorter than the length
  invalid_frozen,          ///< the frozen prefix is longer than a segment
  invalid_group,           ///< query heads are not a multiple of KV heads
  invalid_option,          ///< an option is outside its documented range
  invalid_budget,          ///< the fraction is not finite or negative
  budget_below_protected,  ///< the budget is smaller than what must be kept
  missing_observation,     ///< the policy needs queries or attention mass that were not given
  workspace_too_small,     ///< the caller's workspace cannot hold the plan
  out_of_memory,           ///< a growing workspace or owning buffer could not allocate
  invalid_plan,            ///< the plan breaks a rule of CompressionPlan or does not fit the cache
  frozen_token_changed,    ///< the plan drops, moves or rewrites a frozen token
  needs_ragged_lengths,    ///< the destination cannot hold heads of different lengths
  needs_log_mass,          ///< the plan sets log mass and the destination has no array for it
  needs_positions,         ///< the plan sets positions and the destination has no array for them
  destination_too_small,   ///< the destination has fewer rows than the plan keeps
  destination_overlaps,    ///< the destination shares memory with the source
  read_only,               ///< in-place work was asked of a tensor that cannot be written
  unknown_policy,          ///< no scorer, allocator or reducer of that name
  invalid_rope,            ///< the RopeSpec is out of range or does not fit the key's width
  needs_rope,              ///< the plan aligns keys and the cache does not say how they are rotated
  launch_failed,           ///< CUDA refused a kernel launch or another call
  exchange_failed,         ///< a communicator could not exchange data between ranks
  bad_snapshot,            ///< not a snapshot, of another version, damaged or truncated
  bad_data,                ///< validate() met NaN or infinity, or positions that do not ascend
};

/// The result of every public call: converts to true when ok. Cheap to copy, never throws.
class [[nodiscard]] Status {
 public:
  constexpr Status() noexcept = default;
  constexpr Status(StatusCode code) noexcept : code_(code) {}  // NOLINT: implicit on purpose

  [[nodiscard]] constexpr StatusCode code() const noexcept { return code_; }
  [[nodiscard]] constexpr bool ok() const noexcept { return code_ == StatusCode::ok; }
  constexpr explicit operator bool() const noexcept { return ok(); }
  friend constexpr bool operator==(Status a, Status b) noexcept { return a.code_ == b.code_; }

  /// One line for a log, without a full stop. Static storage.
  [[nodiscard]] constexpr const char* message() const noexcept {
    switch (code_) {
      case StatusCode::ok:
        return "ok";
      case StatusCode::null_pointer:
        return "a required pointer is null";
      case StatusCode::invalid_shape:
        return "an extent is zero or an offset does not fit";
      case StatusCode::shape_mismatch:
        return "inputs disagree about heads, tokens or widths";
      case StatusCode::row_too_wide:
        return "a row is wider than max_row_width";
      case StatusCode::invalid_length:
        return "a valid length exceeds the capacity";
      case StatusCode::invalid_page_table:
        return "the page table is too short or names a bad page";
      case StatusCode::invalid_frozen:
        return "the frozen prefix is longer than a segment";
      case StatusCode::invalid_group:
        return "query heads are not a multiple of KV heads";
      case StatusCode::invalid_option:
        return "an option is outside its documented range";
      case StatusCode::invalid_budget:
        return "the budget is not a finite, non-negative number";
      case StatusCode::budget_below_protected:
        return "the budget is smaller than what is protected";
      case StatusCode::missing_observation:
        return "the policy needs queries or attention mass that were not given";
      case StatusCode::workspace_too_small:
        return "the workspace is too small";
      case StatusCode::out_of_memory:
        return "out of memory";
      case StatusCode::invalid_plan:
        return "the plan is not valid for this cache";
      case StatusCode::frozen_token_changed:
        return "the plan changes a frozen token";
      case StatusCode::needs_ragged_lengths:
        return "the plan gives heads different lengths, which the destination cannot hold";
      case StatusCode::needs_log_mass:
        return "the plan sets log mass, which the destination lacks";
      case StatusCode::needs_positions:
        return "the plan sets positions, which the destination lacks";
      case StatusCode::destination_too_small:
        return "the destination is too small";
      case StatusCode::destination_overlaps:
        return "the destination overlaps the source";
      case StatusCode::read_only:
        return "the tensor cannot be written";
      case StatusCode::unknown_policy:
        return "no scorer, allocator or reducer of that name";
      case StatusCode::invalid_rope:
        return "the rotation does not fit the keys or a number of it is out of range";
      case StatusCode::needs_rope:
        return "the plan aligns keys, whose rotation the cache does not describe";
      case StatusCode::launch_failed:
        return "CUDA refused a call";
      case StatusCode::exchange_failed:
        return "ranks could not exchange data";
      case StatusCode::bad_snapshot:
        return "not a snapshot, or damaged, truncated or of another version";
      case StatusCode::bad_data:
        return "the cache holds NaN, infinity or unordered positions";
    }
    return "unknown status";
  }

 private:
  StatusCode code_ = StatusCode::ok;
};

KVLEAN_NAMESPACE_END

/// Returns from the enclosing function when `expression` yields a Status that is not ok.
#define KVLEAN_RETURN_IF_ERROR(expression)                               \
  do {                                                                   \
    if (::kvlean::Status kvlean_status = (expression); !kvlean_status) { \
      return kvlean_status;                                              \
    }                                                                    \
  } while (false)
