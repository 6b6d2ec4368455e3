// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/cuda/attention_tiles.cuh"
#include "kvlean/cuda/launch.cuh"

// How attention of few queries is spread: the tokens of all segments are one row of tiles, cut into
// as many equal ranges as the device has places for blocks. A block's range may end in one segment
// and go on in the next; what it has of a segment is a piece. Pieces are joined by their
// log-sum-exp in a fixed order. Only the device knows the lengths, so every block adds them up.

KVLEAN_CUDA_NAMESPACE_BEGIN
namespace detail {

inline constexpr u32 attend_threads = 128;
inline constexpr u32 attend_warps = attend_threads / warp_threads;
inline constexpr u32 attend_rows = 16;  // query rows of a unit: heads of a group times queries
inline constexpr u32 attend_tile = 16;  // tokens
inline constexpr u32 most_attend_blocks = 1024;

/// A unit is a segment with 16 of its query rows; units are ordered by segment, then rows. Piece
/// (block, unit) is entry block + unit: both only grow along the tiles.
struct AttendPieces {
  float* values = nullptr;  ///< [pieces][rows][value_width] sum of 2^(x - largest) v, unscaled
  RowSum* sums = nullptr;   ///< [pieces][rows]
  u32 blocks = 0;
  u32 row_tiles = 0;
  u32 rows = 0;  ///< of a piece

  [[nodiscard]] KVLEAN_HOST_DEVICE u64 row(u32 block, u32 unit, u32 r) const noexcept {
    return (u64{block} + unit) * rows + r;
  }
};

/// Tiles of a unit.
[[nodiscard]] KVLEAN_DEVICE u32 unit_tiles(const CacheView& cache, const Queries& queries,
                                           u32 row_tiles, u32 unit) noexcept {
  const u32 s = unit / row_tiles;
  const u32 given =
      queries.counts != nullptr ? queries.counts[cache.sequence_of(s)] : queries.count;
  const u32 count = queries.newest != 0 ? smaller(given, queries.newest) : given;
  const bool has_rows = unit % row_tiles * attend_rows < count * cache.group_size;
  return has_rows ? ceil_div(cache.lengths[s], attend_tile) : 0;
}

/// Shared memory of AttendSplit.
struct AttendSplitScratch {
  u32 warp_tiles[attend_warps];
  u32 unit;
  u32 before;
};

/// What a block knows of all tiles.
struct AttendSplit {
  u32 units = 0;
  u32 tiles = 0;      ///< of all units
  u32 each = 0;       ///< of a block
  u32 own_first = 0;  ///< units that this thread added up: [own_first, own_last)
  u32 own_last = 0;
  u32 before = 0;  ///< tiles before those

  /// The whole block calls.
  [[nodiscard]] static KVLEAN_DEVICE AttendSplit of(const CacheView& cache, const Queries& queries,
                                                    const AttendPieces& pieces,
                                                    AttendSplitScratch& scratch) noexcept {
    const u32 warp = threadIdx.x / warp_threads;
    const u32 lane = threadIdx.x % warp_threads;
    AttendSplit split;
    split.units = cache.num_segments() * pieces.row_tiles;
    const u32 share = ceil_div(split.units, attend_threads);
    split.own_first = smaller(threadIdx.x * share, split.units);
    split.own_last = smaller(split.own_first + share, split.units);
    u32 own = 0;
    for (u32 unit = split.own_first; unit < split.own_last; ++unit) {
      own += unit_tiles(cache, queries, pieces.row_tiles, unit);
    }
    u32 sum = own;
#pragma unroll
    for (u32 step = 1; step < warp_threads; step *= 2) {
      const u32 other = __shfl_up_sync(full_warp, sum, step);
      if (lane >= step) sum += other;
    }
    if (lane == warp_threads - 1) scratch.warp_tiles[warp] = sum;
    __syncthreads();
    split.before = sum - own;
    for (u32 w = 0; w < attend_warps; ++w) {
      if (w < warp) split.before += scratch.warp_tiles[w];
      split.tiles += scratch.warp_tiles[w];
    }
    split.each = larger(ceil_div(split.tiles, pieces.blocks), attend_warps);
    return split;
  }
  /// The unit that tile `tile` belongs to, and the tiles before that unit. The whole block calls,
  /// once, with a tile that exists.
  KVLEAN_DEVICE void find_tile(const CacheView& cache, const Queries& queries, u32 row_tiles,
                               u32 tile, AttendSplitScratch& scratch) const noexcept {
    u32 at = before;
    for (u32 unit = own_first; unit < own_last && at <= tile; ++unit) {
      const u32 count = unit_tiles(cache, queries, row_tiles, unit);
      if (tile - at < count) {
        scratch.unit = unit;
        scratch.before = at;
      }
      at += count;
    }
    __syncthreads();
  }
  /// The tiles before a unit, in scratch.before. The whole block calls, once.
  KVLEAN_DEVICE void find_unit(const CacheView& cache, const Queries& queries, u32 row_tiles,
                               u32 unit, AttendSplitScratch& scratch) const noexcept {
    if (unit >= own_first && unit < own_last) {
      u32 at = before;
      for (u32 u = own_first; u < unit; ++u) at += unit_tiles(cache, queries, row_tiles, u);
      scratch.before = at;
    }
    __syncthreads();
  }
};

/// The part of a block in one unit.
struct AttendPiece {
  u32 unit = 0;
  u32 first = 0;  ///< tokens
  u32 last = 0;
};

/// Calls function(piece) for the block's pieces in order. The whole block calls.
template <class Function>
KVLEAN_DEVICE void for_each_piece(const CacheView& cache, const Queries& queries,
                                  const AttendPieces& pieces, AttendSplitScratch& scratch,
                                  Function&& function) noexcept {
  const AttendSplit split = AttendSplit::of(cache, queries, pieces, scratch);
  u32 tile = blockIdx.x * split.each;
  if (tile >= split.tiles) return;
  const u32 end = smaller(tile + split.each, split.tiles);
  split.find_tile(cache, queries, pieces.row_tiles, tile, scratch);
  u32 unit = scratch.unit;
  u32 before = scratch.before;
  while (tile < end) {
    const u32 count = unit_tiles(cache, queries, pieces.row_tiles, unit);
    const u32 stop = smaller(end, before + count);
    if (stop > tile) {
      const u32 length = cache.lengths[unit / pieces.row_tiles];
      function(AttendPiece{unit, (tile - before) * attend_tile,
                           smaller((stop - before) * attend_tile, length)});
      tile = stop;
    }
    before += count;
    ++unit;
  }
}

}  // namespace detail
KVLEAN_CUDA_NAMESPACE_END
