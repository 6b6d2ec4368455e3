// The state of a llama.cpp sequence: every layout is read where it lies, a rewritten one holds what
// was kept, and every way a blob can be damaged has one line.
#include "examples/llama_cpp/state_blob.hpp"

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <vector>

#include "kvlean/core/kv_cache.hpp"
#include "tests/support/catch.hpp"

namespace {

using kvlean::DType;
using kvlean::llama_cpp::blob_rows;
using kvlean::llama_cpp::BlobWriter;
using kvlean::llama_cpp::parse_state;
using Bytes = std::vector<std::byte>;

template <class T>
void put(Bytes& bytes, T value) {
  const auto* begin = reinterpret_cast<const std::byte*>(&value);
  bytes.insert(bytes.end(), begin, begin + sizeof value);
}

void put_element(Bytes& bytes, DType dtype, float value) {
  const std::size_t at = bytes.size();
  bytes.resize(at + size_bytes(dtype));
  kvlean::store_element(bytes.data() + at, dtype, value);
}

struct Shape {
  DType dtype = DType::f32;
  bool transposed = false;
  std::vector<std::int32_t> positions = {0, 1, 2};
  std::uint32_t layers = 2;
  std::uint32_t heads = 2;
  std::uint32_t key_dim = 3;
  std::uint32_t value_dim = 5;
};

/// A number that tells where it stands, exact in f32 and f16.
float element(std::uint32_t layer, bool value, std::size_t cell, std::uint32_t column) {
  return static_cast<float>(layer * 64 + (value ? 32 : 0) + cell * 8) +
         static_cast<float>(column) / 16.0f;
}
std::int32_t type_number(DType dtype) {
  return dtype == DType::f32 ? 0 : dtype == DType::f16 ? 1 : 30;
}

void put_cache(Bytes& bytes, const Shape& shape) {
  const std::size_t cells = shape.positions.size();
  put(bytes, std::uint32_t{1});
  put(bytes, static_cast<std::uint32_t>(cells));
  for (const std::int32_t position : shape.positions) {
    put(bytes, position);
    put(bytes, std::uint32_t{1});
    put(bytes, std::int32_t{0});
  }
  if (cells == 0) return;
  put(bytes, static_cast<std::uint32_t>(shape.transposed));
  put(bytes, shape.layers);
  const auto element_bytes = static_cast<std::uint32_t>(size_bytes(shape.dtype));
  for (std::uint32_t layer = 0; layer < shape.layers; ++layer) {
    put(bytes, type_number(shape.dtype));
    put(bytes, std::uint64_t{shape.heads} * shape.key_dim * element_bytes);
    for (std::size_t cell = 0; cell < cells; ++cell) {
      for (std::uint32_t i = 0; i < shape.heads * shape.key_dim; ++i) {
        put_element(bytes, shape.dtype, element(layer, false, cell, i));
      }
    }
  }
  const std::uint32_t columns = shape.heads * shape.value_dim;
  for (std::uint32_t layer = 0; layer < shape.layers; ++layer) {
    put(bytes, type_number(shape.dtype));
    if (shape.transposed) {
      put(bytes, element_bytes);
      put(bytes, columns);
      for (std::uint32_t i = 0; i < columns; ++i) {
        for (std::size_t cell = 0; cell < cells; ++cell) {
          put_element(bytes, shape.dtype, element(layer, true, cell, i));
        }
      }
    } else {
      put(bytes, std::uint64_t{columns} * element_bytes);
      for (std::size_t cell = 0; cell < cells; ++cell) {
        for (std::uint32_t i = 0; i < columns; ++i) {
          put_element(bytes, shape.dtype, element(layer, true, cell, i));
        }
      }
    }
  }
}

Bytes make_blob(const std::vector<Shape>& caches) {
  Bytes bytes;
  put(bytes, std::uint32_t{0xaf143cd8u});
  put(bytes, std::int32_t{0});
  for (const Shape& shape : caches) put_cache(bytes, shape);
  return bytes;
}

std::string why_not(const Bytes& bytes) { return parse_state(bytes).error; }

}  // namespace

TEST_CASE("a state blob is read where it lies, in every layout") {
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    for (const bool transposed : {false, true}) {
      Shape shape;
      shape.dtype = dtype;
      shape.transposed = transposed;
      shape.positions = {9, 4, 7, 5};
      Bytes bytes = make_blob({shape});
      const auto blob = parse_state(bytes);
      REQUIRE(blob);
      REQUIRE(blob->caches.size() == 1);
      const auto& cache = blob->caches.front();
      CHECK(cache.positions == shape.positions);
      REQUIRE(cache.layers.size() == shape.layers);
      const std::vector<kvlean::u32> order = cache.by_position();
      CHECK(order == std::vector<kvlean::u32>{1, 3, 2, 0});

      for (std::uint32_t layer = 0; layer < shape.layers; ++layer) {
        const auto& tensors = cache.layers[layer];
        const kvlean::KVCache view(
            blob_rows(bytes, tensors.keys, cache.cells(), shape.heads, order.data(), 0),
            blob_rows(bytes, tensors.values, cache.cells(), shape.heads, order.data(), 0));
        REQUIRE(kvlean::check_cache(view.view()));
        for (std::uint32_t head = 0; head < shape.heads; ++head) {
          for (std::uint32_t token = 0; token < cache.cells(); ++token) {
            float key[3];
            float value[5];
            kvlean::load_row(view.view().keys, head, token, key);
            kvlean::load_row(view.view().values, head, token, value);
            for (std::uint32_t d = 0; d < 3; ++d) {
              std::byte storage[4];
              kvlean::store_element(storage, dtype,
                                    element(layer, false, order[token], head * 3 + d));
              CHECK(key[d] == kvlean::load_element(storage, dtype));
            }
            for (std::uint32_t d = 0; d < 5; ++d) {
              std::byte storage[4];
              kvlean::store_element(storage, dtype,
                                    element(layer, true, order[token], head * 5 + d));
              CHECK(value[d] == kvlean::load_element(storage, dtype));
            }
          }
        }
      }
      CHECK(blob_rows(bytes, cache.layers[0].keys, cache.cells(), 4, nullptr, 0).rows().heads == 0);
      CHECK(blob_rows(bytes, cache.layers[0].keys, cache.cells(), 0, nullptr, 0).rows().heads == 0);
    }
  }
}

TEST_CASE("writing what was read gives the same bytes") {
  for (const bool transposed : {false, true}) {
    Shape base;
    base.dtype = DType::f16;
    base.transposed = transposed;
    base.positions = {0, 1, 2, 3, 4};
    Shape window = base;
    window.positions = {3, 4};
    window.layers = 3;
    Bytes bytes = make_blob({base, window});
    const auto blob = parse_state(bytes);
    REQUIRE(blob);
    REQUIRE(blob->caches.size() == 2);
    CHECK(blob->caches[1].cells() == 2);

    Bytes written = {std::byte{7}};
    BlobWriter writer(written, 0);
    const auto& cache = blob->caches[0];
    const std::vector<kvlean::u32> length(base.heads, 5);
    const auto rows = [&](const kvlean::llama_cpp::BlobTensor& tensor) {
      return blob_rows(bytes, tensor, cache.cells(), base.heads, nullptr, 0).rows();
    };
    writer.begin_cache(cache.positions, transposed, cache.layers.size());
    for (const auto& layer : cache.layers) writer.keys(rows(layer.keys), length.data());
    for (const auto& layer : cache.layers) writer.values(rows(layer.values), length.data());
    writer.copy_cache(bytes, blob->caches[1], 0);
    CHECK(written == bytes);
  }
}

TEST_CASE("a rewritten blob holds each head's own tokens, and zeros after the shorter ones") {
  for (const bool transposed : {false, true}) {
    Shape base;
    base.transposed = transposed;
    base.positions = {0, 1, 2, 3, 4, 5};
    Bytes bytes = make_blob({base, base});
    const auto blob = parse_state(bytes);
    REQUIRE(blob);
    const auto& cache = blob->caches[0];
    // Head 0 keeps cells 1 and 4, head 1 keeps 0, 2 and 5.
    const std::vector<kvlean::u32> order = {1, 4, 0, 0, 2, 5};
    const std::vector<kvlean::u32> length = {2, 3};
    const auto rows = [&](const kvlean::llama_cpp::BlobTensor& tensor) {
      return blob_rows(bytes, tensor, cache.cells(), base.heads, order.data(), 3).rows();
    };
    Bytes written;
    BlobWriter writer(written, 0);
    const std::vector<std::int32_t> positions = {3, 4, 5};
    writer.begin_cache(positions, transposed, cache.layers.size());
    for (const auto& layer : cache.layers) writer.keys(rows(layer.keys), length.data());
    for (const auto& layer : cache.layers) writer.values(rows(layer.values), length.data());
    writer.copy_cache(bytes, blob->caches[1], 10);

    const auto again = parse_state(written);
    REQUIRE(again);
    CHECK(again->caches[0].positions == positions);
    CHECK(again->caches[1].positions == std::vector<std::int32_t>{10, 11, 12, 13, 14, 15});
    for (std::uint32_t layer = 0; layer < base.layers; ++layer) {
      const auto& tensors = again->caches[0].layers[layer];
      const auto keys = blob_rows(written, tensors.keys, 3, base.heads, nullptr, 0).rows();
      const auto values = blob_rows(written, tensors.values, 3, base.heads, nullptr, 0).rows();
      for (std::uint32_t head = 0; head < base.heads; ++head) {
        for (std::uint32_t slot = 0; slot < 3; ++slot) {
          const bool kept = slot < length[head];
          float key[3];
          float value[5];
          kvlean::load_row(keys, head, slot, key);
          kvlean::load_row(values, head, slot, value);
          const std::size_t cell = order[head * 3 + slot];
          CHECK(key[1] == (kept ? element(layer, false, cell, head * 3 + 1) : 0.0f));
          CHECK(value[4] == (kept ? element(layer, true, cell, head * 5 + 4) : 0.0f));
        }
      }
    }
  }
}

TEST_CASE("an empty cache has nothing after its cell count") {
  Shape none;
  none.positions = {};
  const Bytes bytes = make_blob({none});
  const auto blob = parse_state(bytes);
  REQUIRE(blob);
  CHECK(blob->caches[0].cells() == 0);
  CHECK(blob->caches[0].layers.empty());
}

TEST_CASE("every damage to a state blob has its line") {
  Shape shape;
  const Bytes good = make_blob({shape});
  REQUIRE(parse_state(good));
  const auto with = [&](std::size_t at, auto value) {
    Bytes bytes = good;
    std::memcpy(bytes.data() + at, &value, sizeof value);
    return why_not(bytes);
  };
  constexpr std::size_t cells = 8;            // stream count, cell count, then 12 bytes a cell
  constexpr std::size_t after = 16 + 3 * 12;  // layout of values, layers, then the first layer
  CHECK_THAT(with(0, std::uint32_t{1}), ContainsSubstring("unknown word"));
  CHECK_THAT(with(cells, std::uint32_t{2}), ContainsSubstring("2 streams"));
  CHECK_THAT(with(cells + 4, std::uint32_t{0xffffffffu}),
             ContainsSubstring("ends within the cells"));
  CHECK_THAT(with(cells + 8, std::int32_t{-5}), ContainsSubstring("position -5"));
  CHECK_THAT(with(cells + 8, std::int32_t{2}), ContainsSubstring("position 2 twice"));
  CHECK_THAT(with(cells + 12, std::uint32_t{3}), ContainsSubstring("3 sequences"));
  CHECK_THAT(with(after, std::uint32_t{2}), ContainsSubstring("unknown layout"));
  CHECK_THAT(with(after + 4, std::uint32_t{0}), ContainsSubstring("0 layers"));
  CHECK_THAT(with(after + 4, std::uint32_t{1u << 30}), ContainsSubstring("layers"));
  CHECK_THAT(with(after + 8, std::int32_t{8}), ContainsSubstring("ggml type 8"));
  CHECK_THAT(with(after + 12, std::uint64_t{0}), ContainsSubstring("cells of 0 bytes"));
  CHECK_THAT(with(after + 12, std::uint64_t{23}), ContainsSubstring("cells of 23 bytes"));
  CHECK_THAT(with(after + 12, ~std::uint64_t{0} - 3), ContainsSubstring("ends within the rows"));
  Bytes longer = good;
  put_cache(longer, shape);
  put_cache(longer, shape);
  CHECK_THAT(why_not(longer), ContainsSubstring("goes on"));
}

TEST_CASE("a state blob cut anywhere is refused in one line") {
  for (const bool transposed : {false, true}) {
    Shape shape;
    shape.transposed = transposed;
    const Bytes good = make_blob({shape, shape});
    std::size_t first_cache = 0;
    {
      const auto blob = parse_state(good);
      REQUIRE(blob);
      first_cache = blob->caches[0].end;
    }
    for (std::size_t size = 0; size < good.size(); ++size) {
      // A blob of its own size, so that a read past its end is seen.
      const Bytes cut(good.begin(), good.begin() + static_cast<std::ptrdiff_t>(size));
      const std::string why = why_not(cut);
      // Cut between its two caches a blob is a whole one.
      CHECK(why.empty() == (size == first_cache));
      CHECK(why.find('\n') == std::string::npos);
    }
  }
}

TEST_CASE("a state blob with flipped bytes is read or refused, never more") {
  for (const bool transposed : {false, true}) {
    Shape shape;
    shape.transposed = transposed;
    shape.dtype = transposed ? DType::f32 : DType::f16;
    const Bytes good = make_blob({shape, shape});
    kvlean::u64 refused = 0;
    const auto check = [&](Bytes& bytes) {
      const auto blob = parse_state(bytes);
      if (!blob) {
        ++refused;
        CHECK(!blob.error.empty());
        CHECK(blob.error.find('\n') == std::string::npos);
        return;
      }
      // What was accepted can be read to its last element.
      float row[kvlean::max_row_width];
      for (const auto& cache : blob->caches) {
        for (const auto& layer : cache.layers) {
          for (const auto* tensor : {&layer.keys, &layer.values}) {
            const auto rows = blob_rows(bytes, *tensor, cache.cells(), 1, nullptr, 0).rows();
            if (rows.width > kvlean::max_row_width) continue;
            for (std::uint32_t t = 0; t < cache.cells(); ++t) kvlean::load_row(rows, 0, t, row);
          }
        }
      }
    };
    for (std::size_t at = 0; at < good.size(); ++at) {
      for (const unsigned flip : {0x01u, 0x80u, 0xffu}) {
        Bytes bytes = good;
        bytes[at] ^= static_cast<std::byte>(flip);
        check(bytes);
      }
    }
    kvlean::u64 seed = 1;
    for (int round = 0; round < 2000; ++round) {
      Bytes bytes = good;
      for (int k = 0; k < 4; ++k) {
        seed = seed * 6364136223846793005ull + 1442695040888963407ull;
        bytes[(seed >> 33) % bytes.size()] = static_cast<std::byte>(seed >> 56);
      }
      check(bytes);
    }
    CHECK(refused > 100);
  }
}
