// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/decode/budgeted_cache.hpp"

KVLEAN_NAMESPACE_BEGIN

/// Ends the step of several sequences: accepted[i] tokens of sequences[i], each by itself, as
/// BudgetedCacheBase::commit does. Sequences run side by side, one task each; a worker uses
/// workspaces[worker], and the results do not depend on which. Their own executors are then best
/// left serial. statuses[i] is the result of sequence i: one that fails does not hold up the
/// others. Errors, with nothing done: shape_mismatch (spans of different sizes, or fewer workspaces
/// than workers), null_pointer.
[[nodiscard]] inline Status commit_batch(std::span<BudgetedCacheBase* const> sequences,
                                         std::span<const u32> accepted,
                                         std::span<Workspace* const> workspaces,
                                         std::span<Status> statuses,
                                         const Executor& executor = {}) noexcept {
  const u32 workers = executor.run == nullptr ? 1 : std::max<u32>(executor.workers, 1);
  if (accepted.size() != sequences.size() || statuses.size() != sequences.size() ||
      workspaces.size() < workers) {
    return StatusCode::shape_mismatch;
  }
  for (const BudgetedCacheBase* sequence : sequences) {
    if (sequence == nullptr) return StatusCode::null_pointer;
  }
  for (const Workspace* workspace : workspaces) {
    if (workspace == nullptr) return StatusCode::null_pointer;
  }
  parallel_for(executor, static_cast<u32>(sequences.size()), [&](u32 worker, u32 i) noexcept {
    statuses[i] = sequences[i]->commit(accepted[i], *workspaces[worker]);
  });
  return StatusCode::ok;
}

KVLEAN_NAMESPACE_END
