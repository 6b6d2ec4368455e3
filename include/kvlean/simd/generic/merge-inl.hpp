// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
// The kernels of merging, and their table.
#include "kvlean/simd/generic/gaussians-inl.hpp"
#include "kvlean/simd/generic/row_sums-inl.hpp"
#include "kvlean/simd/generic/weigh-inl.hpp"
// (fetch_row, weigh_row)
#include "kvlean/simd/generic/merge_slots-inl.hpp"
#include "kvlean/simd/generic/windows-inl.hpp"

inline void stream_done() noexcept { stream_end(); }

[[nodiscard]] constexpr MergeKernels merge_kernels_here() noexcept {
  return {squared_norms, neighbours,        cosines,        roots,      gaussians,
          products,      squared_distances, pair_distances, weigh,      merge_slots,
          add_windows,   add_weighed,       add_scaled,     stream_row, stream_done};
}
