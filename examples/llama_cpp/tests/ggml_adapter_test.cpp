// ggml tensors as KVLean tensors: every layout and type that llama.cpp's cache and graph have.
#include <ggml-cpu.h>
#include <ggml.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "kvlean/adapters/ggml.hpp"
#include "kvlean/kvlean.hpp"
#include "tests/support/catch.hpp"

namespace {

using kvlean::ggml_view;
using kvlean::GgmlAxes;
using kvlean::GgmlTensor;
using kvlean::Rows;
using kvlean::StatusCode;
using kvlean::u32;

struct Free {
  void operator()(ggml_context* context) const { ggml_free(context); }
};
using Ggml = std::unique_ptr<ggml_context, Free>;

Ggml make_context() { return Ggml(ggml_init({std::size_t{4} << 20, nullptr, false})); }

/// Different at every place, and exact in F16 and BF16.
float number(std::size_t head, std::size_t token, std::size_t d) {
  return static_cast<float>((head * 7 + token * 3 + d) % 61) - 30.0f;
}

/// Writes an element of a plain type at ggml indices.
void put(ggml_tensor* tensor, std::size_t i0, std::size_t i1, std::size_t i2, float value) {
  char* at = static_cast<char*>(tensor->data) + i0 * tensor->nb[0] + i1 * tensor->nb[1] +
             i2 * tensor->nb[2];
  if (tensor->type == GGML_TYPE_F32) {
    std::memcpy(at, &value, sizeof value);
  } else if (tensor->type == GGML_TYPE_F16) {
    const ggml_fp16_t half = ggml_fp32_to_fp16(value);
    std::memcpy(at, &half, sizeof half);
  } else {
    const ggml_bf16_t half = ggml_fp32_to_bf16(value);
    std::memcpy(at, &half, sizeof half);
  }
}

void check_numbers(const Rows& rows, const std::vector<u32>& order) {
  for (u32 head = 0; head < rows.heads; ++head) {
    for (u32 token = 0; token < rows.tokens; ++token) {
      std::vector<float> row(rows.width);
      kvlean::load_row(rows, head, token, row.data());
      for (u32 d = 0; d < rows.width; ++d) {
        REQUIRE(row[d] == number(head, order.empty() ? token : order[token], d));
      }
    }
  }
}

constexpr std::size_t heads = 3;
constexpr std::size_t tokens = 10;
constexpr std::size_t dim = 32;

}  // namespace

TEST_CASE("plain ggml tensors are read and written where they lie") {
  for (const ggml_type type : {GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16}) {
    const Ggml context = make_context();
    ggml_tensor* captured = ggml_new_tensor_3d(context.get(), type, dim, heads, tokens);
    ggml_tensor* operand = ggml_new_tensor_3d(context.get(), type, dim, tokens, heads);
    ggml_tensor* columns = ggml_new_tensor_3d(context.get(), type, tokens, dim, heads);
    ggml_tensor* cache = ggml_new_tensor_2d(context.get(), type, heads * dim, tokens);
    ggml_tensor* transposed = ggml_new_tensor_2d(context.get(), type, tokens, heads * dim);
    for (std::size_t h = 0; h < heads; ++h) {
      for (std::size_t t = 0; t < tokens; ++t) {
        for (std::size_t d = 0; d < dim; ++d) {
          const float x = number(h, t, d);
          put(captured, d, h, t, x);
          put(operand, d, t, h, x);
          put(columns, t, d, h, x);
          put(cache, h * dim + d, t, 0, x);
          put(transposed, t, h * dim + d, 0, x);
        }
      }
    }
    const std::vector<u32> order = {7, 0, 9, 3};
    for (const bool indexed : {false, true}) {
      const std::vector<u32> cells = indexed ? order : std::vector<u32>{};
      const GgmlTensor views[] = {
          ggml_view(captured, GgmlAxes::captured(), cells),
          ggml_view(operand, GgmlAxes::operand(), cells),
          ggml_view(columns, GgmlAxes::transposed_operand(), cells),
          ggml_view(cache, GgmlAxes::cache(heads), cells),
          ggml_view(transposed, GgmlAxes::transposed_cache(heads), cells),
          ggml_view(ggml_permute(context.get(), captured, 0, 2, 1, 3), GgmlAxes::operand(), cells)};
      for (const GgmlTensor& view : views) {
        REQUIRE(view.status());
        const Rows rows = view.rows();
        CHECK(rows.heads == heads);
        CHECK(rows.tokens == (indexed ? order.size() : tokens));
        CHECK(rows.width == dim);
        CHECK(rows.writable);
        check_numbers(rows, cells);
      }
    }
    const Rows rows = ggml_view(cache, GgmlAxes::cache(heads), order).rows();
    const std::vector<float> row(dim, 5.0f);
    kvlean::store_row(rows, 2, 1, row.data());
    const Rows plain = ggml_view(cache, GgmlAxes::cache(heads)).rows();
    std::vector<float> read(dim);
    kvlean::load_row(plain, 2, 0, read.data());
    CHECK(read == row);
    kvlean::load_row(plain, 1, 0, read.data());
    CHECK(read[0] == number(1, 0, 0));
    const ggml_tensor* constant = cache;
    CHECK(!ggml_view(constant, GgmlAxes::cache(heads)).rows().writable);
  }
}

TEST_CASE("quantised ggml tensors are converted row by row, as ggml does it") {
  for (const ggml_type type : {GGML_TYPE_Q8_0, GGML_TYPE_Q4_0, GGML_TYPE_Q4_1, GGML_TYPE_Q5_0,
                               GGML_TYPE_Q5_1, GGML_TYPE_IQ4_NL}) {
    const Ggml context = make_context();
    ggml_tensor* cache = ggml_new_tensor_2d(context.get(), type, heads * 64, tokens);
    ggml_quantize_init(type);
    std::vector<float> all(heads * 64 * tokens);
    for (std::size_t i = 0; i < all.size(); ++i) {
      all[i] = std::sin(static_cast<float>(i) * 0.37f) * 3.0f;
    }
    ggml_quantize_chunk(type, all.data(), cache->data, 0, tokens, heads * 64, nullptr);
    std::vector<float> expected(all.size());
    ggml_get_type_traits(type)->to_float(cache->data, expected.data(),
                                         static_cast<std::int64_t>(expected.size()));

    const std::vector<u32> order = {4, 1, 8};
    const GgmlTensor view = ggml_view(cache, GgmlAxes::cache(heads), order);
    REQUIRE(view.status());
    // The view may move before it is asked.
    const GgmlTensor moved = view;  // NOLINT: the copy is the point
    const Rows rows = moved.rows();
    REQUIRE(rows.load != nullptr);
    float row[64];
    for (u32 head = 0; head < heads; ++head) {
      for (u32 t = 0; t < order.size(); ++t) {
        kvlean::load_row(rows, head, t, row);
        for (std::size_t d = 0; d < 64; ++d) {
          REQUIRE(row[d] == expected[order[t] * heads * 64 + head * 64 + d]);
        }
      }
    }
    REQUIRE(rows.writable);
    std::vector<float> wanted(64);
    for (std::size_t d = 0; d < 64; ++d) wanted[d] = static_cast<float>(d % 8) - 4.0f;
    kvlean::store_row(rows, 1, 2, wanted.data());
    kvlean::load_row(rows, 1, 2, row);
    for (std::size_t d = 0; d < 64; ++d) CHECK(std::fabs(row[d] - wanted[d]) < 0.6f);
    // Neighbours keep theirs.
    kvlean::load_row(rows, 0, 2, row);
    CHECK(row[63] == expected[8 * heads * 64 + 63]);
    kvlean::load_row(rows, 2, 2, row);
    CHECK(row[0] == expected[8 * heads * 64 + 2 * 64]);
  }
}

TEST_CASE("a ggml cache is compressed in its own memory") {
  const Ggml context = make_context();
  for (const ggml_type type : {GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_Q8_0}) {
    ggml_tensor* k = ggml_new_tensor_2d(context.get(), type, heads * dim, 64);
    ggml_tensor* v = ggml_new_tensor_2d(context.get(), type, heads * dim, 64);
    std::vector<float> row(dim);
    for (ggml_tensor* tensor : {k, v}) {
      const GgmlTensor view = ggml_view(tensor, GgmlAxes::cache(heads));
      for (u32 h = 0; h < heads; ++h) {
        for (u32 t = 0; t < 64; ++t) {
          for (std::size_t d = 0; d < dim; ++d) row[d] = number(h, t, d);
          kvlean::store_row(view.rows(), h, t, row.data());
        }
      }
    }
    auto layer =
        kvlean::KVCache(ggml_view(k, GgmlAxes::cache(heads)), ggml_view(v, GgmlAxes::cache(heads)));
    std::vector<float> before(dim);
    kvlean::load_row(kvlean::rows_of(layer.keys()), 1, 63, before.data());
    kvlean::Workspace workspace;
    REQUIRE(kvlean::StreamingLLMPolicy().compress(layer, {}, kvlean::Budget::slots(40), workspace));
    CHECK(layer.length() == 40);
    kvlean::load_row(kvlean::rows_of(layer.keys()), 1, 39, row.data());
    CHECK(row == before);
  }
}

TEST_CASE("ggml tensors that cannot be wrapped say why") {
  const Ggml context = make_context();
  ggml_tensor* good = ggml_new_tensor_2d(context.get(), GGML_TYPE_F16, heads * dim, tokens);
  const auto why = [](const GgmlTensor& view) {
    CHECK(!view.status());
    // No stage takes it.
    CHECK(!kvlean::check_cache(kvlean::KVCache(view, view).view()));
    return view.status().code();
  };
  ggml_tensor* nothing = nullptr;
  CHECK(why(ggml_view(nothing, GgmlAxes::cache(heads))) == StatusCode::null_pointer);
  CHECK(why(ggml_view(good, GgmlAxes::cache(5))) == StatusCode::invalid_shape);
  CHECK(why(ggml_view(good, GgmlAxes::cache(0))) == StatusCode::invalid_shape);
  CHECK(why(ggml_view(good, {0, 0, 1, 0})) == StatusCode::invalid_shape);
  CHECK(why(ggml_view(good, {0, 1, 4, 0})) == StatusCode::invalid_shape);
  CHECK(why(ggml_view(good, {0, -1, 0, 1})) == StatusCode::invalid_shape);
  const std::vector<u32> past = {0, tokens};
  CHECK(why(ggml_view(good, GgmlAxes::cache(heads), past)) == StatusCode::invalid_length);
  ggml_tensor* deep = ggml_new_tensor_3d(context.get(), GGML_TYPE_F16, dim, heads, tokens);
  CHECK(why(ggml_view(deep, GgmlAxes::cache(1))) == StatusCode::invalid_shape);
  ggml_tensor* wide =
      ggml_new_tensor_2d(context.get(), GGML_TYPE_F16, kvlean::max_row_width + 1, 2);
  CHECK(why(ggml_view(wide, GgmlAxes::cache(1))) == StatusCode::row_too_wide);

  ggml_tensor odd = *good;
  odd.nb[1] += 1;
  CHECK(why(ggml_view(&odd, GgmlAxes::cache(heads))) == StatusCode::invalid_shape);
  ggml_tensor empty = *good;
  empty.data = nullptr;
  CHECK(why(ggml_view(&empty, GgmlAxes::cache(heads))) == StatusCode::null_pointer);

  ggml_tensor* blocks = ggml_new_tensor_2d(context.get(), GGML_TYPE_Q8_0, 96, tokens);
  CHECK(why(ggml_view(blocks, GgmlAxes::cache(2))) == StatusCode::invalid_shape);  // 48 a head
  CHECK(why(ggml_view(blocks, GgmlAxes::transposed_cache(2))) == StatusCode::invalid_shape);
  ggml_tensor shifted = *blocks;
  shifted.data = static_cast<char*>(shifted.data) + 1;
  CHECK(why(ggml_view(&shifted, GgmlAxes::cache(3))) == StatusCode::invalid_shape);
  ggml_tensor* whole = ggml_new_tensor_2d(context.get(), GGML_TYPE_I32, 32, tokens);
  CHECK(why(ggml_view(whole, GgmlAxes::cache(1))) == StatusCode::invalid_shape);
}
