// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
// Random tensors in every layout that Rows can describe.
#pragma once

#include <algorithm>
#include <kvlean/kvlean.hpp>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

namespace kvlean_test {

/// A small generator whose numbers are the same with every standard library.
class Random {
 public:
  explicit Random(kvlean::u32 seed) : engine_(seed) {}
  /// In [low, high].
  kvlean::u32 between(kvlean::u32 low, kvlean::u32 high) {
    return low + static_cast<kvlean::u32>(engine_() % (kvlean::u64{high} - low + 1));
  }
  bool chance(kvlean::u32 percent) { return between(0, 99) < percent; }
  float real(float low, float high) {
    return low + (high - low) * static_cast<float>(engine_() >> 8) * 0x1p-24f;
  }
  /// `count` of the numbers below `limit`, ascending.
  std::vector<kvlean::u32> subset(kvlean::u32 limit, kvlean::u32 count) {
    std::vector<kvlean::u32> all = shuffled(limit);
    all.resize(count);
    std::sort(all.begin(), all.end());
    return all;
  }
  std::vector<kvlean::u32> shuffled(kvlean::u32 limit) {
    std::vector<kvlean::u32> all(limit);
    std::iota(all.begin(), all.end(), 0u);
    for (kvlean::u32 i = limit; i > 1; --i) std::swap(all[i - 1], all[between(0, i - 1)]);
    return all;
  }

 private:
  std::mt19937 engine_;
};

enum class Layout {
  contiguous,     ///< [head][token][dim]
  token_major,    ///< [token][head][dim]
  padded,         ///< rows and heads with gaps
  transposed,     ///< [head][dim][token]
  backwards,      ///< all strides negative
  strided_dims,   ///< elements of a row apart
  paged,          ///< one table for all heads
  paged_heads,    ///< a table a head
  indexed,        ///< an index list for all heads
  indexed_heads,  ///< an index list a head
  indexed_pages,  ///< an index list over pages
  accessor,       ///< tiles of 4 tokens behind load and store
  count
};

/// Models RowTensor: [head][tile][dim][4 tokens].
class TileTensor {
 public:
  TileTensor(std::size_t heads, std::size_t tokens, std::size_t width)
      : heads_(heads),
        tokens_(tokens),
        width_(width),
        data_(heads * ((tokens + 3) / 4) * 4 * width) {}
  [[nodiscard]] std::size_t num_heads() const noexcept { return heads_; }
  [[nodiscard]] std::size_t num_tokens() const noexcept { return tokens_; }
  [[nodiscard]] std::size_t width() const noexcept { return width_; }
  void load(kvlean::u32 head, kvlean::u32 token, float* row) const noexcept {
    for (std::size_t d = 0; d < width_; ++d) row[d] = data_[index(head, token, d)];
  }
  void store(kvlean::u32 head, kvlean::u32 token, const float* row) const noexcept {
    for (std::size_t d = 0; d < width_; ++d) data_[index(head, token, d)] = row[d];
  }

 private:
  [[nodiscard]] std::size_t index(std::size_t head, std::size_t token, std::size_t d) const {
    return ((head * ((tokens_ + 3) / 4) + token / 4) * width_ + d) * 4 + token % 4;
  }
  std::size_t heads_;
  std::size_t tokens_;
  std::size_t width_;
  mutable std::vector<float> data_;
};
static_assert(kvlean::RowTensor<TileTensor>);

/// Owns what its rows point at; not copyable: to have it twice, make it twice from one seed.
struct TensorMemory {
  std::vector<std::byte> bytes;
  std::vector<kvlean::i32> page_table;
  std::vector<kvlean::u32> order;
  std::unique_ptr<TileTensor> tiles;
  kvlean::Rows rows;

  TensorMemory() = default;
  TensorMemory(TensorMemory&&) = default;
  TensorMemory& operator=(TensorMemory&&) = default;
};

/// Random finite elements; `page_tokens` counts for the paged layouts.
inline TensorMemory make_tensor(Layout layout, kvlean::DType dtype, kvlean::u32 heads,
                                kvlean::u32 tokens, kvlean::u32 width, kvlean::u32 page_tokens,
                                Random& random) {
  using kvlean::i64;
  using kvlean::u32;
  TensorMemory memory;
  kvlean::Rows& rows = memory.rows;
  rows.dtype = dtype;
  rows.writable = true;
  rows.width = width;
  rows.heads = heads;
  rows.tokens = tokens;
  const i64 h = heads;
  const i64 t = tokens;
  const i64 w = width;
  i64 elements = h * t * w;
  i64 origin = 0;
  const auto strides = [&rows](i64 head, i64 token, i64 dim) {
    rows.head_stride = head;
    rows.token_stride = token;
    rows.dim_stride = dim;
  };
  const auto permutation = [&](u32 cells, u32 lists) {
    for (u32 i = 0; i < lists; ++i) {
      const auto one = random.shuffled(cells);
      memory.order.insert(memory.order.end(), one.begin(), one.end());
    }
    rows.order = memory.order.data();
    rows.order_stride = lists == 1 ? 0 : cells;
  };
  const auto pages = [&](u32 tables) {
    const u32 per_head = (tokens + page_tokens - 1) / page_tokens;
    const u32 spare = 3;
    const auto numbers = random.shuffled(per_head * tables + spare);
    for (u32 i = 0; i < per_head * tables; ++i) {
      memory.page_table.push_back(static_cast<kvlean::i32>(numbers[i]));
    }
    rows.page_table = memory.page_table.data();
    rows.page_tokens = page_tokens;
    rows.page_table_length = per_head;
    rows.page_table_stride = tables == 1 ? 0 : per_head;
    strides(page_tokens * w, w, 1);
    rows.page_stride = h * page_tokens * w;
    elements = static_cast<i64>(numbers.size()) * rows.page_stride;
  };
  switch (layout) {
    case Layout::contiguous:
      strides(t * w, w, 1);
      break;
    case Layout::token_major:
      strides(w, h * w, 1);
      break;
    case Layout::padded:
      strides(t * (w + 3) + 5, w + 3, 1);
      elements = h * rows.head_stride;
      break;
    case Layout::transposed:
      strides(t * w, 1, t);
      break;
    case Layout::backwards:
      strides(-t * w, -w, -1);
      origin = elements - 1;
      break;
    case Layout::strided_dims:
      strides(t * w * 2, w * 2, 2);
      elements *= 2;
      break;
    case Layout::paged:
      pages(1);
      break;
    case Layout::paged_heads:
      pages(heads);
      break;
    case Layout::indexed:
      strides(t * w, w, 1);
      permutation(tokens, 1);
      break;
    case Layout::indexed_heads:
      strides(t * w, w, 1);
      permutation(tokens, heads);
      break;
    case Layout::indexed_pages:
      pages(1);
      permutation(tokens, 1);
      break;
    case Layout::accessor:
    case Layout::count:
      memory.tiles = std::make_unique<TileTensor>(heads, tokens, width);
      memory.rows = kvlean::rows_of(*memory.tiles);
      break;
  }
  if (memory.tiles == nullptr) {
    const auto element = kvlean::size_bytes(dtype);
    const std::size_t misaligned = random.chance(30) ? random.between(1, 7) : 0;
    memory.bytes.resize(static_cast<std::size_t>(elements) * element + misaligned, std::byte{0x5a});
    rows.data = memory.bytes.data() + misaligned + static_cast<std::size_t>(origin) * element;
  }
  std::vector<float> row(width);
  for (u32 head = 0; head < heads; ++head) {
    for (u32 token = 0; token < tokens; ++token) {
      for (float& x : row) x = random.real(-2.0f, 2.0f);
      kvlean::store_row(rows, head, token, row.data());
    }
  }
  return memory;
}

}  // namespace kvlean_test
