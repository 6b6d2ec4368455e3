// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <Eigen/Core>
#include <span>
#include <type_traits>

#include "kvlean/core/tensor.hpp"

// Eigen matrices as tensors: `KVCache(eigen_tensor(k, 8), eigen_tensor(v, 8))`. Needs Eigen, so
// kvlean.hpp does not include it; link kvlean::eigen.

KVLEAN_NAMESPACE_BEGIN

namespace detail {

template <class Scalar>
struct EigenStorage {
  using type = Scalar;  // float, f16 and bf16 stay; others are refused where the view is made
};
template <>
struct EigenStorage<Eigen::half> {
  using type = f16;
};
template <>
struct EigenStorage<Eigen::bfloat16> {
  using type = bf16;
};
static_assert(sizeof(Eigen::half) == sizeof(f16) && sizeof(Eigen::bfloat16) == sizeof(bf16));

/// float, f16 or bf16, const where the expression's data is.
template <class Matrix>
using EigenElement = std::conditional_t<
    std::is_const_v<std::remove_pointer_t<decltype(std::declval<Matrix&>().data())>>,
    const typename EigenStorage<typename std::remove_cvref_t<Matrix>::Scalar>::type,
    typename EigenStorage<typename std::remove_cvref_t<Matrix>::Scalar>::type>;

template <class Matrix>
[[nodiscard]] auto* eigen_data(Matrix& matrix) noexcept {
  using Element = EigenElement<Matrix>;
  if constexpr (std::is_const_v<Element>) {
    return static_cast<Element*>(static_cast<const void*>(matrix.data()));
  } else {
    return static_cast<Element*>(static_cast<void*>(matrix.data()));
  }
}

}  // namespace detail

/// A matrix, map, block or transpose with its elements in memory.
template <class Matrix>
concept EigenExpression = requires(Matrix& matrix) {
  typename std::remove_cvref_t<Matrix>::Scalar;
  { matrix.rows() } -> std::convertible_to<Eigen::Index>;
  { matrix.rowStride() } -> std::convertible_to<Eigen::Index>;
  { matrix.colStride() } -> std::convertible_to<Eigen::Index>;
  matrix.data();
};

/// One layer as one matrix [tokens x (kv_heads * dim)], row- or column-major, of float, Eigen::half
/// or Eigen::bfloat16 (the same bits as f16 and bf16). For [(kv_heads * dim) x tokens] pass
/// matrix.transpose(). A const matrix gives a read-only view. Nothing is copied; the elements must
/// outlive the view, so a temporary matrix does not compile. When the heads do not divide the
/// columns the view has no heads, and every stage answers invalid_shape.
template <class Matrix>
requires EigenExpression<Matrix>
[[nodiscard]] auto eigen_tensor(Matrix&& matrix, std::size_t kv_heads) noexcept {
  using Plain = std::remove_cvref_t<Matrix>;
  static_assert(std::is_lvalue_reference_v<Matrix> ||
                    !std::is_base_of_v<Eigen::PlainObjectBase<Plain>, Plain>,
                "a temporary matrix would leave the view dangling");
  using Element = detail::EigenElement<std::remove_reference_t<Matrix>>;
  const auto columns = static_cast<std::size_t>(matrix.cols());
  if (kv_heads == 0 || columns % kv_heads != 0) return Strided<Element>(nullptr, {});
  const std::size_t dim = columns / kv_heads;
  return Strided<Element>(detail::eigen_data(matrix),
                          {kv_heads, static_cast<std::size_t>(matrix.rows()), dim},
                          {static_cast<std::ptrdiff_t>(dim) * matrix.colStride(),
                           matrix.rowStride(), matrix.colStride()});
}

/// One layer as a map [tokens x dim] a head. The maps must agree in shape and strides and be
/// equally spaced in memory, in either direction; otherwise the view has no heads, and every stage
/// answers invalid_shape. O(heads).
template <class Map>
requires EigenExpression<Map>
[[nodiscard]] auto eigen_tensor(std::span<Map> heads) noexcept {
  using Element = detail::EigenElement<Map>;
  const Strided<Element> none(nullptr, {});
  if (heads.empty()) return none;
  const auto address = [&](std::size_t h) noexcept {
    return static_cast<i64>(reinterpret_cast<std::uintptr_t>(heads[h].data()));
  };
  constexpr i64 element = sizeof(Element);
  const i64 spacing = heads.size() > 1 ? address(1) - address(0) : 0;
  if (spacing % element != 0) return none;
  const Map& front = heads.front();
  for (std::size_t h = 1; h < heads.size(); ++h) {
    const Map& map = heads[h];
    if (map.rows() != front.rows() || map.cols() != front.cols() ||
        map.rowStride() != front.rowStride() || map.colStride() != front.colStride() ||
        address(h) - address(h - 1) != spacing) {
      return none;
    }
  }
  return Strided<Element>(detail::eigen_data(heads.front()),
                          {heads.size(), static_cast<std::size_t>(front.rows()),
                           static_cast<std::size_t>(front.cols())},
                          {spacing / element, front.rowStride(), front.colStride()});
}

KVLEAN_NAMESPACE_END
