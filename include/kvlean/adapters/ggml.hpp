// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ggml-backend.h>
#include <ggml.h>

#include <span>

#include "kvlean/core/tensor.hpp"

// Tensors of ggml as tensors of KVLean: `KVCache(ggml_view(k, GgmlAxes::cache(8)),
// ggml_view(v, GgmlAxes::cache(8)))`. Needs ggml, so kvlean.hpp does not include it.

KVLEAN_NAMESPACE_BEGIN

/// Which axis of a ggml tensor (0 is the fastest) holds dimensions, KV heads and tokens.
struct GgmlAxes {
  int dim = 0;
  int head = 1;  ///< negative: the heads follow each other along `dim`
  int token = 2;
  std::size_t kv_heads = 0;  ///< how many follow each other; only read when `head` is negative

  /// [dim, heads, tokens]: llama.cpp's Qcur, Kcur and Vcur.
  [[nodiscard]] static constexpr GgmlAxes captured() noexcept { return {0, 1, 2, 0}; }
  /// [dim, tokens, heads]: queries and keys as attention reads them, values with flash attention.
  [[nodiscard]] static constexpr GgmlAxes operand() noexcept { return {0, 2, 1, 0}; }
  /// [tokens, dim, heads]: values as attention reads them without flash attention.
  [[nodiscard]] static constexpr GgmlAxes transposed_operand() noexcept { return {1, 2, 0, 0}; }
  /// [heads * dim, cells]: llama.cpp's cache_k_l<i>, and cache_v_l<i> with flash attention.
  [[nodiscard]] static constexpr GgmlAxes cache(std::size_t kv_heads) noexcept {
    return {0, -1, 1, kv_heads};
  }
  /// [cells, heads * dim]: transposed values.
  [[nodiscard]] static constexpr GgmlAxes transposed_cache(std::size_t kv_heads) noexcept {
    return {1, -1, 0, kv_heads};
  }
};

/// A ggml tensor in host memory, not copied. F32, F16 and BF16 are read and written where they lie,
/// with any strides. Quantised types (all with a to_float) go row by row through ggml's own
/// conversion: `dim` must be axis 0, a row must be whole blocks, and storing needs the type's
/// from_float. A cached key of a quantised type may lie in a rotated basis;
/// it is handed out as it lies.
///
/// What cannot be wrapped gives a view without heads, for which every stage answers with an error;
/// status() says why: null_pointer (no tensor, no data, or data in a device's memory),
/// invalid_shape (axes that are not three different ones, a further axis longer than 1, heads that
/// do not divide the axis, a stride that is no multiple of the element, a quantised row that is not
/// whole blocks or not aligned for them, a type without conversion), invalid_length (more cells
/// named than the tensor has), row_too_wide.
class GgmlTensor {
 public:
  /// `order`: logical token t is cell order[t], entries distinct and below the axis' extent; it
  /// must outlive the view. Empty: all cells in their order. O(order).
  GgmlTensor(const ::ggml_tensor* tensor, const GgmlAxes& axes, bool writable,
             std::span<const u32> order = {}) noexcept {
    status_ = wrap(tensor, axes, writable, order);
    if (!status_) rows_ = Rows{};
  }

  /// Why there is nothing to see; ok if there is.
  [[nodiscard]] Status status() const noexcept { return status_; }
  /// Of a quantised tensor: points at this object.
  [[nodiscard]] Rows rows() const noexcept {
    Rows rows = rows_;
    if (rows.load != nullptr) rows.accessor = this;
    return rows;
  }

 private:
  [[nodiscard]] Status wrap(const ::ggml_tensor* tensor, const GgmlAxes& axes, bool writable,
                            std::span<const u32> order) noexcept {
    if (tensor == nullptr || tensor->data == nullptr) return StatusCode::null_pointer;
    const auto* owner =
        tensor->buffer == nullptr && tensor->view_src != nullptr ? tensor->view_src : tensor;
    if (owner->buffer != nullptr && !ggml_backend_buffer_is_host(owner->buffer)) {
      return StatusCode::null_pointer;
    }
    const auto valid = [](int axis) noexcept { return axis >= 0 && axis < GGML_MAX_DIMS; };
    const bool split = axes.head < 0;
    if (!valid(axes.dim) || !valid(axes.token) || axes.dim == axes.token ||
        (!split && (!valid(axes.head) || axes.head == axes.dim || axes.head == axes.token))) {
      return StatusCode::invalid_shape;
    }
    for (int axis = 0; axis < GGML_MAX_DIMS; ++axis) {
      const bool used = axis == axes.dim || axis == axes.token || axis == axes.head;
      if (tensor->ne[axis] < 0 || (!used && tensor->ne[axis] != 1)) {
        return StatusCode::invalid_shape;
      }
    }
    const auto extent = [&](int axis) noexcept {
      return static_cast<std::size_t>(tensor->ne[axis]);
    };
    const std::size_t heads = split ? axes.kv_heads : extent(axes.head);
    if (heads == 0 || extent(axes.dim) == 0 || (split && extent(axes.dim) % heads != 0)) {
      return StatusCode::invalid_shape;
    }
    const std::size_t width = split ? extent(axes.dim) / heads : extent(axes.dim);
    if (width > max_row_width) return StatusCode::row_too_wide;
    if (order.size() > extent(axes.token)) return StatusCode::invalid_length;
    for (const u32 cell : order) {
      if (cell >= extent(axes.token)) return StatusCode::invalid_length;
    }

    rows_.width = static_cast<u32>(width);
    rows_.heads = detail::saturate_u32(heads);
    rows_.tokens = detail::saturate_u32(order.empty() ? extent(axes.token) : order.size());
    rows_.order = order.empty() ? nullptr : order.data();
    const bool plain = tensor->type == GGML_TYPE_F32 || tensor->type == GGML_TYPE_F16 ||
                       tensor->type == GGML_TYPE_BF16;
    return plain ? wrap_elements(*tensor, axes, writable) : wrap_blocks(*tensor, axes, writable);
  }

  [[nodiscard]] Status wrap_elements(const ::ggml_tensor& tensor, const GgmlAxes& axes,
                                     bool writable) noexcept {
    rows_.dtype = tensor.type == GGML_TYPE_F32   ? DType::f32
                  : tensor.type == GGML_TYPE_F16 ? DType::f16
                                                 : DType::bf16;
    const std::size_t element = size_bytes(rows_.dtype);
    for (const int axis : {axes.dim, axes.token, axes.head}) {
      if (axis >= 0 && tensor.nb[axis] % element != 0) return StatusCode::invalid_shape;
    }
    const auto stride = [&](int axis) noexcept {
      return static_cast<i64>(tensor.nb[axis] / element);
    };
    rows_.data = tensor.data;
    rows_.writable = writable;
    rows_.dim_stride = stride(axes.dim);
    rows_.token_stride = stride(axes.token);
    rows_.head_stride =
        axes.head >= 0 ? stride(axes.head) : static_cast<i64>(rows_.width) * rows_.dim_stride;
    return StatusCode::ok;
  }

  [[nodiscard]] Status wrap_blocks(const ::ggml_tensor& tensor, const GgmlAxes& axes,
                                   bool writable) noexcept {
    const ggml_type_traits* traits = ggml_get_type_traits(tensor.type);
    if (traits == nullptr || !traits->is_quantized || traits->to_float == nullptr ||
        axes.dim != 0) {
      return StatusCode::invalid_shape;
    }
    const std::size_t block = static_cast<std::size_t>(traits->blck_size);
    // ggml's blocks hold 16-bit scales, or words where their size allows it.
    const std::size_t alignment = traits->type_size % 4 == 0 ? 4 : 2;
    if (rows_.width % block != 0 || tensor.nb[0] != traits->type_size) {
      return StatusCode::invalid_shape;
    }
    data_ = static_cast<std::byte*>(tensor.data);
    token_bytes_ = tensor.nb[axes.token];
    head_bytes_ = axes.head >= 0 ? tensor.nb[axes.head] : rows_.width / block * traits->type_size;
    const auto address = reinterpret_cast<std::uintptr_t>(data_);
    if ((address | token_bytes_ | head_bytes_) % alignment != 0) return StatusCode::invalid_shape;
    to_float_ = traits->to_float;
    from_float_ = traits->from_float_ref;
    rows_.writable = writable && from_float_ != nullptr;
    rows_.load = [](const void* self, u32 head, u32 token, float* row) noexcept {
      const auto& view = *static_cast<const GgmlTensor*>(self);
      view.to_float_(view.block(head, token), row, view.rows_.width);
    };
    if (rows_.writable) {
      rows_.store = [](const void* self, u32 head, u32 token, const float* row) noexcept {
        const auto& view = *static_cast<const GgmlTensor*>(self);
        view.from_float_(row, view.block(head, token), view.rows_.width);
      };
    }
    return StatusCode::ok;
  }

  [[nodiscard]] std::byte* block(u32 head, u32 token) const noexcept {
    const std::size_t cell = rows_.order != nullptr ? rows_.order[token] : token;
    return data_ + head * head_bytes_ + cell * token_bytes_;
  }

  Rows rows_;
  Status status_;
  std::byte* data_ = nullptr;  ///< quantised types only, as all below
  std::size_t token_bytes_ = 0;
  std::size_t head_bytes_ = 0;
  ggml_to_float_t to_float_ = nullptr;
  ggml_from_float_t from_float_ = nullptr;
};
static_assert(Tensor<GgmlTensor>);

/// Wraps a ggml tensor; see GgmlTensor.
[[nodiscard]] inline GgmlTensor ggml_view(::ggml_tensor* tensor, const GgmlAxes& axes,
                                          std::span<const u32> order = {}) noexcept {
  return {tensor, axes, true, order};
}
/// The same, read-only.
[[nodiscard]] inline GgmlTensor ggml_view(const ::ggml_tensor* tensor, const GgmlAxes& axes,
                                          std::span<const u32> order = {}) noexcept {
  return {tensor, axes, false, order};
}

KVLEAN_NAMESPACE_END
