// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>

#include "kvlean/core/rows.hpp"
#include "kvlean/simd/attention_kernels.hpp"

// Rows as kernels take them: pointers to contiguous elements, wherever the rows lie.

KVLEAN_NAMESPACE_BEGIN
namespace detail {

/// Whether the elements of a row are neighbours in memory, so that a kernel can read them there.
[[nodiscard]] inline bool is_contiguous_row(const Rows& rows) noexcept {
  return rows.load == nullptr && rows.dim_stride == 1;
}

/// Points pointers[i] at address + i * step.
inline void point_at_steps(const std::byte* address, i64 step, u32 count,
                           const std::byte** pointers) noexcept {
  u32 i = 0;
  for (; i + 4 <= count; i += 4, address += 4 * step) {
    pointers[i] = address;
    pointers[i + 1] = address + step;
    pointers[i + 2] = address + 2 * step;
    pointers[i + 3] = address + 3 * step;
  }
  for (; i < count; ++i, address += step) pointers[i] = address;
}

/// Points pointers[i] at row token + i of a head. Expects is_contiguous_row. O(count).
inline simd::RowPointers point_at_rows(const Rows& rows, u32 head, u32 token, u32 count,
                                       const std::byte** pointers) noexcept {
  const i64 step = rows.token_stride * static_cast<i64>(size_bytes(rows.dtype));
  u32 run = straight_tokens(rows, token, count);
  for (u32 done = 0; done < count;) {
    point_at_steps(row_address(rows, head, token + done), step, run, pointers + done);
    done += run;
    const u32 most = rows.order != nullptr ? 1 : rows.page_tokens;  // what follows begins a page
    run = std::min(most, count - done);
  }
  return {pointers, count};
}

/// Loads `count` rows whose tokens are neighbours in memory, as in a transposed value cache: a few
/// elements of many rows at a time, so that memory is read in order.
inline void load_transposed(const Rows& rows, u32 head, u32 token, u32 count, float* out,
                            u32 stride) noexcept {
  constexpr u32 dims = 16;
  constexpr u32 tokens = 64;
  float block[dims][tokens];
  const i64 step = rows.dim_stride * static_cast<i64>(size_bytes(rows.dtype));
  for (u32 done = 0; done < count;) {
    const u32 run = std::min(tokens, straight_tokens(rows, token + done, count - done));
    const std::byte* address = row_address(rows, head, token + done);
    for (u32 first = 0; first < rows.width; first += dims) {
      const u32 here = std::min(dims, rows.width - first);
      for (u32 d = 0; d < here; ++d, address += step) {
        __builtin_prefetch(address + dims * step);  // too far apart for the CPU to foresee
        simd::row_kernels().load(address, rows.dtype, block[d], run);
      }
      for (u32 t = 0; t < run; ++t) {
        float* to = out + static_cast<std::size_t>(done + t) * stride + first;
        for (u32 d = 0; d < here; ++d) to[d] = block[d][t];
      }
    }
    done += run;
  }
}

/// Loads `count` rows of a head as float, `stride` floats apart. O(count * width).
inline void load_rows(const Rows& rows, u32 head, u32 token, u32 count, float* out,
                      u32 stride) noexcept {
  if (rows.load == nullptr && rows.order == nullptr && rows.token_stride == 1 &&
      rows.dim_stride != 1 && count >= 8) {
    load_transposed(rows, head, token, count, out, stride);
    return;
  }
  for (u32 i = 0; i < count; ++i) {
    load_row(rows, head, token + i, out + static_cast<std::size_t>(i) * stride);
  }
}

/// The same rows for a kernel: in place where they are contiguous, else in `buffer` as floats.
struct TileRows {
  simd::RowPointers rows;
  DType dtype = DType::f32;
};
inline TileRows tile_rows(const Rows& rows, u32 head, u32 token, u32 count,
                          const std::byte** pointers, float* buffer, bool as_float) noexcept {
  if (is_contiguous_row(rows) && (!as_float || rows.dtype == DType::f32)) {
    return {point_at_rows(rows, head, token, count, pointers), rows.dtype};
  }
  load_rows(rows, head, token, count, buffer, rows.width);
  for (u32 i = 0; i < count; ++i) {
    pointers[i] = reinterpret_cast<const std::byte*>(buffer + std::size_t{i} * rows.width);
  }
  return {{pointers, count}, DType::f32};
}

/// Query rows as score_many takes them: [width][padded], one row a lane.
[[nodiscard]] constexpr u32 padded_query_rows(u32 rows) noexcept {
  return (rows + simd::query_block - 1) / simd::query_block * simd::query_block;
}
inline void put_query_column(const float* query, u32 width, u32 r, float* columns,
                             u32 padded) noexcept {
  for (u32 d = 0; d < width; ++d) columns[d * padded + r] = query[d];
}

}  // namespace detail
KVLEAN_NAMESPACE_END
