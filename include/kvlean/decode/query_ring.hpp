// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>

#include "kvlean/observe/observation.hpp"

KVLEAN_NAMESPACE_BEGIN
namespace detail {

/// The newest queries of every layer, in a ring of `cells` rows a query head: up to `window`
/// remembered ones, then the pending ones of the current step. Everything but the rows is the same
/// in all layers, because all of them advance together.
class QueryRing {
 public:
  struct Shape {
    u32 layers = 0;
    u32 query_heads = 0;
    u32 width = 0;
    u32 window = 0;
    u32 cells = 0;
    DType dtype = DType::f32;

    [[nodiscard]] std::size_t layer_bytes() const noexcept {
      return std::size_t{query_heads} * cells * width * size_bytes(dtype);
    }
    [[nodiscard]] std::size_t row_bytes() const noexcept { return layers * layer_bytes(); }
  };
  /// What changes from step to step, to save and to go back to.
  struct Place {
    u32 start = 0;   ///< cell of the oldest remembered query
    u32 filled = 0;  ///< remembered queries
  };

  QueryRing() noexcept = default;
  /// `rows` [layers][query_heads][cells][width], `order` [cells], `positions` [window].
  QueryRing(const Shape& shape, std::byte* rows, u32* order, i32* positions) noexcept
      : shape_(shape), rows_(rows), order_(order), positions_(positions) {
    go_to({});
  }

  [[nodiscard]] const Shape& shape() const noexcept { return shape_; }
  [[nodiscard]] std::span<std::byte> bytes() const noexcept {
    return {rows_, rows_ == nullptr ? 0 : shape_.row_bytes()};
  }
  [[nodiscard]] std::span<i32> positions() const noexcept { return {positions_, place_.filled}; }
  [[nodiscard]] Place place() const noexcept { return place_; }
  /// Pending queries that fit behind the remembered ones.
  [[nodiscard]] u32 pending_cells() const noexcept { return shape_.cells - shape_.window; }

  void go_to(Place place) noexcept {
    place_ = place;
    for (u32 i = 0; i < shape_.cells; ++i) order_[i] = (place.start + i) % shape_.cells;
  }

  /// The remembered queries of a layer.
  [[nodiscard]] Queries window(u32 layer) const noexcept {
    Queries queries;
    queries.rows = rows(layer);
    queries.count = place_.filled;
    queries.positions = positions_;
    return queries;
  }
  /// The first `count` pending queries of a layer, the newest ones from `position` on.
  [[nodiscard]] Queries pending(u32 layer, u32 count, i32 position) const noexcept {
    Queries queries;
    queries.rows = rows(layer);
    queries.first_row = place_.filled;
    queries.count = count;
    queries.first_position = position;
    return queries;
  }
  /// Copies the last `count` queries behind `at` pending ones.
  void push(u32 layer, const Queries& from, u32 count, u32 at) noexcept {
    const Rows to = rows(layer);
    for (u32 head = 0; head < shape_.query_heads; ++head) {
      for (u32 i = 0; i < count; ++i) {
        copy_row(from.rows, head, from.first_row + from.count - count + i, to, head,
                 place_.filled + at + i);
      }
    }
  }
  /// Remembers the first `count` pending queries, the first of which has `position`; the oldest
  /// ones beyond the window are forgotten.
  void advance(u32 count, i32 position) noexcept {
    const u32 all = place_.filled + count;
    const u32 filled = std::min(all, shape_.window);
    const u32 gone = all - filled;
    for (u32 i = 0; i < filled; ++i) {
      const u32 old = gone + i;
      positions_[i] =
          old < place_.filled ? positions_[old] : position + static_cast<i32>(old - place_.filled);
    }
    go_to({shape_.cells == 0 ? 0 : (place_.start + gone) % shape_.cells, filled});
  }
  /// All cells of a layer in ring order; remembered queries come first.
  [[nodiscard]] Rows rows(u32 layer) const noexcept {
    Rows rows;
    rows.data = rows_ + layer * shape_.layer_bytes();
    rows.dtype = shape_.dtype;
    rows.writable = true;
    rows.width = shape_.width;
    rows.heads = shape_.query_heads;
    rows.tokens = shape_.cells;
    rows.head_stride = static_cast<i64>(shape_.cells) * shape_.width;
    rows.token_stride = shape_.width;
    rows.order = order_;
    return rows;
  }

 private:
  Shape shape_;
  std::byte* rows_ = nullptr;
  u32* order_ = nullptr;
  i32* positions_ = nullptr;
  Place place_;
};

}  // namespace detail
KVLEAN_NAMESPACE_END
