// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
// Tiles and what is done with them: one instruction each.

inline constexpr u32 block_tokens = 16;  // of a block of products, [16 tokens][32 rows]
inline constexpr u32 key_steps = 4;      // steps that stay in tiles
inline constexpr u32 tile_bytes = 1024;

/// Eight tiles of 16 rows of 64 bytes, for as long as it lives.
class Tiles {
 public:
  Tiles() noexcept {
    struct alignas(64) Configuration {
      u8 palette = 1;
      u8 start_row = 0;
      u8 reserved[14] = {};
      u16 row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      u8 rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    };
    static_assert(sizeof(Configuration) == 64);
    const Configuration configuration;
    __asm__ volatile("ldtilecfg %0" : : "m"(configuration));
  }
  ~Tiles() { __asm__ volatile("tilerelease" : : : "memory"); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

// Tile numbers are part of the instruction. Tiles 0 and 1 are sums, 2 queries, 4 to 7 keys.
// What load_tile reads was written before the call that sets up the tiles.
template <u32 tile>
inline void load_tile(const std::byte* from, i64 stride) noexcept {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(tile));
}
template <u32 tile>
inline void store_tile(float* to) noexcept {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)"
                   :
                   : "r"(to), "r"(i64{lane_rows * sizeof(float)}), "i"(tile)
                   : "memory");
}
template <u32 tile>
inline void clear_tile() noexcept {
  __asm__ volatile("tilezero %%tmm%c0" : : "i"(tile));
}
template <u32 sum, u32 keys, u32 queries>
inline void multiply_tiles() noexcept {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sum), "i"(keys), "i"(queries));
}

/// What has to lie between two tile instructions where no vectors do: eight others or more. Where
/// tiles follow each other at once, the same products were seen to take 250 ns, not 155, for most
/// of the time on a shared host (and 60 in both forms now and then).
inline void part_tiles() noexcept {
  __asm__ volatile("nop\n\tnop\n\tnop\n\tnop\n\tnop\n\tnop\n\tnop\n\tnop");
}

/// Up to four steps of 16 keys.
inline void load_keys(const std::byte* key, i64 stride, u32 steps) noexcept {
  load_tile<4>(key, stride);
  part_tiles();
  if (steps > 1) load_tile<5>(key + 64, stride);
  part_tiles();
  if (steps > 2) load_tile<6>(key + 128, stride);
  part_tiles();
  if (steps > 3) load_tile<7>(key + 192, stride);
}

/// Adds one of those steps, times the queries in tile 2, to a sum.
template <u32 sum>
inline void multiply_step(u32 step) noexcept {
  if (step == 0) multiply_tiles<sum, 4, 2>();
  if (step == 1) multiply_tiles<sum, 5, 2>();
  if (step == 2) multiply_tiles<sum, 6, 2>();
  if (step == 3) multiply_tiles<sum, 7, 2>();
}
template <u32 sum>
inline void multiply_steps(const std::byte* packed, u32 steps) noexcept {
  for (u32 i = 0; i < steps; ++i, packed += 2 * tile_bytes) {
    load_tile<2>(packed, 64);
    part_tiles();
    multiply_step<sum>(i);
    part_tiles();
  }
}
