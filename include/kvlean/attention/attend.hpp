// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <limits>

#include "kvlean/attention/attend_tasks.hpp"
#include "kvlean/core/workspace.hpp"

KVLEAN_NAMESPACE_BEGIN
namespace detail {

inline constexpr u32 attend_stack_units = 128;
inline constexpr std::size_t attend_stack_bytes = std::size_t{1} << 16;

/// Long segments cut for several workers, with what there is of stack.
inline void attend_cut(AttendTasks& tasks) noexcept {
  AttendUnit units[attend_stack_units];
  alignas(64) std::byte parts[attend_stack_bytes];
  if (tasks.plan(units, sizeof parts) <= sizeof parts) tasks.place_parts(parts);
  tasks.run_planned();
}

[[nodiscard]] inline Status attend_view(const Queries& queries, const CacheView& cache,
                                        const AttentionSpec& spec, const AttentionOutput& output,
                                        const Executor& executor,
                                        Workspace* workspace = nullptr) noexcept {
  KVLEAN_RETURN_IF_ERROR(check_attention(queries, cache, spec, output));
  const AttendContext context(queries, cache, spec, output);
  AttendTasks tasks(context, executor);
  if (tasks.units() > std::numeric_limits<u32>::max()) return StatusCode::invalid_shape;
  if (!tasks.worth_cutting()) {
    tasks.run_whole();
    return StatusCode::ok;
  }
  if (workspace != nullptr) {
    const WorkspaceScope scope(*workspace);
    AttendUnit* units = workspace->take<AttendUnit>(tasks.units());
    if (units == nullptr) return workspace->exhausted();
    const std::size_t bytes = tasks.plan(units, std::numeric_limits<std::size_t>::max());
    std::byte* parts = workspace->take<std::byte>(bytes);
    if (parts == nullptr) return workspace->exhausted();
    tasks.place_parts(parts);
    tasks.run_planned();
  } else if (tasks.units() <= attend_stack_units) {
    attend_cut(tasks);
  } else {
    tasks.run_whole();
  }
  return StatusCode::ok;
}

}  // namespace detail

/// Softmax attention of every query over its segment, as `spec` says, ragged lengths and log mass
/// included: query head h reads KV head h / group_size, where group_size is query heads / KV heads.
///   logit(t)  = softcap(scale * q.k_t) + log_mass_t
///   Z         = sum_t exp(logit(t)) [+ exp(sink)]
///   output    = sum_t exp(logit(t)) v_t / Z,   lse = log Z
/// over the tokens t that the query's mask and the sliding window leave. Positions must ascend, for
/// tokens (see CacheView) and queries; in a cache without positions the index is the position, and
/// queries without any are the newest `count` tokens of each segment. A query that sees nothing
/// gets zeros and -inf, or its sink's logit; NaN and infinity in the data show in the results.
/// `output.values` may be null when only the LSE is wanted: then no value row is read.
///
/// float arithmetic, Z summed in double over tiles; any layout and storage type. The output must
/// not overlap the cache or the queries. A loaded K/V row serves up to 32 query rows of its group.
/// O(query_heads * count * visible tokens * (key width + value width)).
///
/// Few query rows of a group (8, less where rows are very wide) are what decoding has. Then tokens
/// are read at the speed of memory, in blocks of 1024 or more by shape alone, whose results are
/// merged in a fixed order: a long segment is work for several workers, and the bits are the same
/// for any executor. No allocation: about 70 KiB of stack a worker, and 64 KiB more in the calling
/// thread where segments are cut.
///
/// Errors, all found before anything is written: those of check_cache and check_queries (no
/// queries: missing_observation), null_pointer (no output at all), invalid_option (scale or softcap
/// not finite, softcap negative), invalid_shape (more than 2^32 tiles).
template <Cache C>
[[nodiscard]] Status attend(const Queries& queries, const C& cache, const AttentionSpec& spec,
                            const AttentionOutput& output, const Executor& executor = {}) noexcept {
  return detail::attend_view(queries, view_of(cache), spec, output, executor);
}

/// The same bits, with the parts of cut segments in the workspace, which is given back: finer cuts
/// than the stack has room for, which pays with many workers or very uneven segments. At most
/// 32 * (4 * value width + 16) bytes a query row of a group and 64 a segment; nothing is taken
/// where nothing is cut. Errors also: workspace_too_small or out_of_memory.
template <Cache C>
[[nodiscard]] Status attend(const Queries& queries, const C& cache, const AttentionSpec& spec,
                            const AttentionOutput& output, Workspace& workspace,
                            const Executor& executor = {}) noexcept {
  return detail::attend_view(queries, view_of(cache), spec, output, executor, &workspace);
}

/// The same with the default AttentionSpec: scale 1 / sqrt(key width), nothing else.
template <Cache C>
[[nodiscard]] Status attend(const Queries& queries, const C& cache, const AttentionOutput& output,
                            const Executor& executor = {}) noexcept {
  return detail::attend_view(queries, view_of(cache), AttentionSpec{}, output, executor);
}

KVLEAN_NAMESPACE_END
