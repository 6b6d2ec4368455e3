// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#include <Eigen/Core>
#include <vector>

#include "kvlean/adapters/eigen.hpp"
#include "kvlean/apply/apply.hpp"
#include "tests/support/catch.hpp"
#include "tests/support/plan_builder.hpp"

using namespace kvlean;
using kvlean_test::PlanBuilder;

namespace {

using RowMajor = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using ColumnMajor = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::ColMajor>;

template <class Matrix>
void check_layer(Matrix matrix) {
  constexpr Eigen::Index tokens = 5;
  constexpr Eigen::Index dim = 3;
  matrix.resize(tokens, 2 * dim);
  for (Eigen::Index t = 0; t < tokens; ++t) {
    for (Eigen::Index c = 0; c < 2 * dim; ++c) {
      matrix(t, c) = typename Matrix::Scalar(static_cast<float>(10 * t + c));
    }
  }
  KVCache cache(eigen_tensor(matrix, 2), eigen_tensor(matrix, 2));
  const CacheView view = cache.view();
  REQUIRE(check_cache(view));
  CHECK((view.segments == 2 && view.capacity == 5 && view.keys.width == 3));
  CHECK(view.keys.writable);
  float row[3];
  load_row(view.keys, 1, 4, row);
  CHECK((row[0] == 43.0f && row[2] == 45.0f));
  PlanBuilder builder{{1, 4}, {0, 2}};
  REQUIRE(apply(builder.plan(), cache, in_place));
  CHECK(static_cast<float>(matrix(1, 0)) == 40.0f);
  CHECK(static_cast<float>(matrix(1, 4)) == 24.0f);

  const Matrix& constant = matrix;
  CHECK_FALSE(eigen_tensor(constant, 2).rows().writable);
  CHECK(check_rows(eigen_tensor(matrix, 4).rows(), 0) == StatusCode::invalid_shape);
  CHECK(check_rows(eigen_tensor(matrix, 0).rows(), 0) == StatusCode::invalid_shape);
}

}  // namespace

TEST_CASE("a matrix per layer is a tensor", "[eigen]") {
  check_layer(RowMajor());
  check_layer(ColumnMajor());
  check_layer(Eigen::Matrix<Eigen::half, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>());
  check_layer(Eigen::Matrix<Eigen::bfloat16, Eigen::Dynamic, Eigen::Dynamic>());
}

TEST_CASE("half and bfloat16 have the bits of f16 and bf16", "[eigen]") {
  for (float x : {0.0f, -1.5f, 3.140625f, 65504.0f, 1e-7f}) {
    Eigen::Matrix<Eigen::half, 1, 1> half;
    Eigen::Matrix<Eigen::bfloat16, 1, 1> brain;
    half(0, 0) = Eigen::half(x);
    brain(0, 0) = Eigen::bfloat16(x);
    float row[1];
    load_row(eigen_tensor(half, 1).rows(), 0, 0, row);
    CHECK(row[0] == static_cast<float>(f16(x)));
    CHECK(eigen_tensor(half, 1).rows().dtype == DType::f16);
    load_row(eigen_tensor(brain, 1).rows(), 0, 0, row);
    CHECK(row[0] == static_cast<float>(bf16(x)));
    CHECK(eigen_tensor(brain, 1).rows().dtype == DType::bf16);
  }
}

TEST_CASE("maps, strides, blocks and transposes are tensors", "[eigen]") {
  std::vector<float> data(200);
  for (std::size_t i = 0; i < data.size(); ++i) data[i] = static_cast<float>(i);
  using Outer = Eigen::Map<RowMajor, 0, Eigen::OuterStride<>>;
  Outer map(data.data(), 4, 6, Eigen::OuterStride<>(20));
  float row[8];
  load_row(eigen_tensor(map, 2).rows(), 1, 2, row);
  CHECK((row[0] == 43.0f && row[2] == 45.0f));
  load_row(eigen_tensor(map.block(1, 2, 3, 4), 2).rows(), 1, 0, row);
  CHECK(row[0] == 24.0f);
  load_row(eigen_tensor(map.transpose(), 1).rows(), 0, 5, row);  // [6 tokens x 4]
  CHECK((row[0] == 5.0f && row[3] == 65.0f));
  const Eigen::Map<const RowMajor> constant(data.data(), 4, 6);
  CHECK_FALSE(eigen_tensor(constant, 2).rows().writable);
  const Rows rows = eigen_tensor(Eigen::Map<RowMajor>(data.data(), 4, 6), 2).rows();
  CHECK((rows.writable && rows.token_stride == 6));
}

TEST_CASE("a map per head is a tensor when the heads are equally spaced", "[eigen]") {
  std::vector<float> data(300);
  for (std::size_t i = 0; i < data.size(); ++i) data[i] = static_cast<float>(i);
  using Map = Eigen::Map<RowMajor, 0, Eigen::OuterStride<>>;
  const auto at = [&](std::size_t offset, Eigen::Index rows = 4, Eigen::Index stride = 7) {
    return Map(data.data() + offset, rows, 5, Eigen::OuterStride<>(stride));
  };
  const auto status = [](std::vector<Map> maps) {
    return check_rows(eigen_tensor(std::span<Map>(maps)).rows(), 0);
  };
  std::vector<Map> heads{at(0), at(50), at(100)};
  const Rows rows = eigen_tensor(std::span<Map>(heads)).rows();
  REQUIRE(check_rows(rows, 4));
  float row[5];
  load_row(rows, 2, 3, row);
  CHECK(row[4] == 125.0f);
  CHECK(eigen_tensor(std::span<const Map>(heads)).rows().heads == 3);

  std::vector<Map> falling{at(100), at(50), at(0)};
  load_row(eigen_tensor(std::span<Map>(falling)).rows(), 2, 1, row);
  CHECK(row[0] == 7.0f);
  CHECK(status({at(3)}).ok());
  CHECK(status({}) == StatusCode::invalid_shape);
  CHECK(status({at(0), at(50), at(101)}) == StatusCode::invalid_shape);
  CHECK(status({at(0), at(50, 3), at(100)}) == StatusCode::invalid_shape);
  CHECK(status({at(0), at(50, 4, 6), at(100)}) == StatusCode::invalid_shape);
}
