// The bytes of `llama_state_seq_get_data`, read and written: what one sequence holds in the cache
// of a llama.cpp context. Needs no header of llama.cpp.
//
//   u32 magic, i32 sequence, then one cache, or two where a model has sliding-window layers (those
//   that attend to everything first). A cache, packed and without alignment, little-endian:
//     u32 streams (1), u32 cells; nothing more when there are none
//     cells times: i32 position, u32 number of sequences (1), i32 sequence
//     u32 transposed values (1 when flash attention is off), u32 layers
//     each layer's K: i32 ggml type, u64 bytes of a cell, the cells one after the other, each with
//       its heads one after the other
//     each layer's V: the same; or, transposed, i32 ggml type, u32 bytes of an element, u32
//       elements of a cell, and for each of these the cells one after the other
//
// Keys are stored after their rotation. A cell's position says only which queries see it, so the
// j-th slots of all layers and heads may share a cell whatever tokens they hold.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "bench/io/safetensors.hpp"
#include "kvlean/core/rows.hpp"
#include "kvlean/core/tensor.hpp"

namespace kvlean::llama_cpp {

/// Rows inside somebody's bytes, at any alignment: a tensor that KVCache can wrap.
struct ByteRows {
  Rows description;
  [[nodiscard]] Rows rows() const noexcept { return description; }
};

/// K or V of one layer in a blob.
struct BlobTensor {
  DType dtype = DType::f32;
  std::size_t width = 0;    ///< elements of a cell: heads * dim
  std::size_t offset = 0;   ///< bytes from the start of the blob
  bool transposed = false;  ///< the cells of one element are neighbours
  std::size_t cell_bytes() const { return width * size_bytes(dtype); }
};

struct BlobLayer {
  BlobTensor keys;
  BlobTensor values;
};

/// One cache of a blob.
struct BlobCache {
  std::vector<std::int32_t> positions;  ///< of each cell
  std::vector<BlobLayer> layers;
  std::size_t begin = 0;  ///< its bytes in the blob
  std::size_t end = 0;
  std::size_t cells() const { return positions.size(); }
  /// Bytes of K and V.
  std::size_t row_bytes() const {
    std::size_t bytes = 0;
    for (const BlobLayer& layer : layers) {
      bytes += layer.keys.cell_bytes() + layer.values.cell_bytes();
    }
    return bytes * cells();
  }
  /// The cells by ascending position.
  std::vector<u32> by_position() const {
    std::vector<u32> order(cells());
    std::iota(order.begin(), order.end(), 0u);
    std::sort(order.begin(), order.end(),
              [&](u32 a, u32 b) { return positions[a] < positions[b]; });
    return order;
  }
};

/// What a blob holds; the bytes stay the caller's.
struct StateBlob {
  std::int32_t sequence = 0;
  std::vector<BlobCache> caches;  ///< one; or two, the window layers' second
};

namespace detail {

constexpr std::uint32_t state_magic = 0xaf143cd8u;

/// ggml's numbers of the element types that a cache of plain elements may have.
inline std::optional<DType> dtype_of_ggml_type(std::int32_t type) {
  switch (type) {
    case 0:
      return DType::f32;
    case 1:
      return DType::f16;
    case 30:
      return DType::bf16;
    default:
      return std::nullopt;
  }
}
inline std::int32_t ggml_type_of(DType dtype) {
  return dtype == DType::f32 ? 0 : dtype == DType::f16 ? 1 : 30;
}

/// Reads a blob from front to back; the first trouble is kept, and everything after it reads zero.
class BlobReader {
 public:
  explicit BlobReader(std::span<const std::byte> bytes) : bytes_(bytes) {}

  template <class T>
  T read(const char* what) {
    T value{};
    if (!has(sizeof value, what)) return value;
    std::memcpy(&value, bytes_.data() + at_, sizeof value);
    at_ += sizeof value;
    return value;
  }
  /// Steps over count * each bytes and returns where they begin.
  std::size_t skip(std::uint64_t count, std::uint64_t each, const char* what) {
    const std::size_t begin = at_;
    if (each != 0 && count > left() / each) {
      complain(std::string("ends within ") + what);
      return begin;
    }
    if (!has(static_cast<std::size_t>(count * each), what)) return begin;
    at_ += static_cast<std::size_t>(count * each);
    return begin;
  }
  void complain(const std::string& why) {
    if (error_.empty()) error_ = "the engine's state " + why;
  }
  bool good() const { return error_.empty(); }
  const std::string& error() const { return error_; }
  std::size_t at() const { return at_; }
  std::size_t left() const { return bytes_.size() - at_; }

 private:
  bool has(std::size_t count, const char* what) {
    if (!good()) return false;
    if (count > left()) complain(std::string("ends within ") + what);
    return good();
  }

  std::span<const std::byte> bytes_;
  std::size_t at_ = 0;
  std::string error_;
};

inline DType read_dtype(BlobReader& reader) {
  const auto type = reader.read<std::int32_t>("the type of a layer");
  const std::optional<DType> dtype = dtype_of_ggml_type(type);
  if (reader.good() && !dtype) {
    reader.complain("has elements of ggml type " + std::to_string(type) +
                    "; only f32, f16 and bf16 can be rewritten");
  }
  return dtype.value_or(DType::f32);
}

inline BlobTensor read_rows(BlobReader& reader, std::size_t cells) {
  BlobTensor tensor;
  tensor.dtype = read_dtype(reader);
  const auto bytes = reader.read<std::uint64_t>("the size of a cell");
  if (reader.good() && (bytes == 0 || bytes % size_bytes(tensor.dtype) != 0)) {
    reader.complain("has cells of " + std::to_string(bytes) + " bytes");
  }
  tensor.width = static_cast<std::size_t>(bytes) / size_bytes(tensor.dtype);
  tensor.offset = reader.skip(cells, bytes, "the rows of a layer");
  return tensor;
}

inline BlobTensor read_columns(BlobReader& reader, std::size_t cells) {
  BlobTensor tensor;
  tensor.transposed = true;
  tensor.dtype = read_dtype(reader);
  const auto element = reader.read<std::uint32_t>("the size of an element");
  if (reader.good() && element != size_bytes(tensor.dtype)) {
    reader.complain("has elements of " + std::to_string(element) + " bytes");
  }
  tensor.width = reader.read<std::uint32_t>("the size of a cell");
  if (reader.good() && tensor.width == 0) reader.complain("has cells of 0 elements");
  tensor.offset = reader.skip(tensor.width, std::uint64_t{cells} * element, "a layer's values");
  return tensor;
}

inline BlobCache read_cache(BlobReader& reader) {
  BlobCache cache;
  cache.begin = reader.at();
  const auto streams = reader.read<std::uint32_t>("the number of streams");
  if (reader.good() && streams != 1) {
    reader.complain("has " + std::to_string(streams) + " streams where one is expected");
  }
  const auto cells = reader.read<std::uint32_t>("the number of cells");
  constexpr std::size_t cell_entry = 12;
  if (reader.good() && cells > reader.left() / cell_entry) reader.complain("ends within the cells");
  for (std::uint32_t i = 0; reader.good() && i < cells; ++i) {
    cache.positions.push_back(reader.read<std::int32_t>("a cell"));
    const auto sequences = reader.read<std::uint32_t>("a cell");
    reader.read<std::int32_t>("a cell");
    if (!reader.good()) break;
    if (cache.positions.back() < 0 || sequences != 1) {
      reader.complain("has a cell with position " + std::to_string(cache.positions.back()) +
                      " and " + std::to_string(sequences) + " sequences");
    }
  }
  if (reader.good() && cells != 0) {
    std::vector<std::int32_t> sorted = cache.positions;
    std::sort(sorted.begin(), sorted.end());
    const auto twice = std::adjacent_find(sorted.begin(), sorted.end());
    if (twice != sorted.end()) {
      reader.complain("has position " + std::to_string(*twice) + " twice");
    }
    const auto transposed = reader.read<std::uint32_t>("the layout of values");
    if (reader.good() && transposed > 1) reader.complain("has values in an unknown layout");
    const auto layers = reader.read<std::uint32_t>("the number of layers");
    constexpr std::uint32_t most_layers = 4096;
    if (reader.good() && (layers == 0 || layers > most_layers)) {
      reader.complain("has " + std::to_string(layers) + " layers");
    }
    for (std::uint32_t i = 0; reader.good() && i < layers; ++i) {
      cache.layers.push_back({read_rows(reader, cells), {}});
    }
    for (std::uint32_t i = 0; reader.good() && i < layers; ++i) {
      cache.layers[i].values =
          transposed != 0 ? read_columns(reader, cells) : read_rows(reader, cells);
    }
  }
  cache.end = reader.at();
  return cache;
}

}  // namespace detail

/// Takes a blob apart. Every size is checked against the bytes that are there; fails in one line.
inline io::Result<StateBlob> parse_state(std::span<const std::byte> bytes) {
  detail::BlobReader reader(bytes);
  StateBlob blob;
  const auto magic = reader.read<std::uint32_t>("its first word");
  if (reader.good() && magic != detail::state_magic) {
    reader.complain("begins with an unknown word");
  }
  blob.sequence = reader.read<std::int32_t>("the sequence number");
  while (reader.good() && (blob.caches.empty() || reader.left() != 0)) {
    if (blob.caches.size() == 2) {
      reader.complain("goes on after its caches");
      break;
    }
    blob.caches.push_back(detail::read_cache(reader));
  }
  if (!reader.good()) return io::Result<StateBlob>::failure(reader.error());
  return io::Result<StateBlob>::success(std::move(blob));
}

/// K or V of a layer as rows [head][token] in the blob's own bytes: token t of head h is cell
/// order[h * order_stride + t]. `width` must be a multiple of `heads`, otherwise there are no rows.
inline ByteRows blob_rows(std::span<std::byte> bytes, const BlobTensor& tensor, std::size_t cells,
                          std::size_t heads, const u32* order, std::size_t order_stride) {
  ByteRows result;
  if (heads == 0 || tensor.width % heads != 0) return result;
  Rows& rows = result.description;
  rows.data = bytes.data() + tensor.offset;
  rows.dtype = tensor.dtype;
  rows.writable = true;
  rows.heads = static_cast<u32>(heads);
  rows.width = static_cast<u32>(tensor.width / heads);
  rows.tokens = static_cast<u32>(cells);
  rows.order = order;
  rows.order_stride = static_cast<i64>(order_stride);
  const i64 dim = static_cast<i64>(rows.width);
  if (tensor.transposed) {
    rows.dim_stride = static_cast<i64>(cells);
    rows.token_stride = 1;
    rows.head_stride = dim * static_cast<i64>(cells);
  } else {
    rows.dim_stride = 1;
    rows.token_stride = static_cast<i64>(tensor.width);
    rows.head_stride = dim;
  }
  return result;
}

/// Writes a blob, front to back. The bytes go to a vector that keeps its memory between blobs.
class BlobWriter {
 public:
  /// Starts a blob in `bytes`, whose content is lost.
  BlobWriter(std::vector<std::byte>& bytes, std::int32_t sequence)
      : bytes_(bytes), sequence_(sequence) {
    bytes_.clear();
    put(detail::state_magic);
    put(sequence_);
  }

  /// A cache as it is in another blob, its positions moved by `shift`.
  void copy_cache(std::span<const std::byte> from, const BlobCache& cache, std::int32_t shift) {
    const std::size_t begin = bytes_.size();
    bytes_.insert(bytes_.end(), from.begin() + static_cast<std::ptrdiff_t>(cache.begin),
                  from.begin() + static_cast<std::ptrdiff_t>(cache.end));
    for (std::size_t i = 0; i < cache.cells(); ++i) {
      const std::int32_t position = cache.positions[i] + shift;
      std::memcpy(bytes_.data() + begin + 8 + 12 * i, &position, sizeof position);
    }
  }

  /// Begins a cache with these cells. For each layer its keys must follow, then all values.
  void begin_cache(std::span<const std::int32_t> positions, bool transposed_values,
                   std::size_t layers) {
    cells_ = positions.size();
    transposed_ = transposed_values;
    put(std::uint32_t{1});
    put(static_cast<std::uint32_t>(cells_));
    for (const std::int32_t position : positions) {
      put(position);
      put(std::uint32_t{1});
      put(sequence_);
    }
    if (cells_ == 0) return;
    put(static_cast<std::uint32_t>(transposed_ ? 1 : 0));
    put(static_cast<std::uint32_t>(layers));
  }
  /// The first length[h] rows of each head h; cells past them are zero.
  void keys(const Rows& rows, const u32* length) {
    put(detail::ggml_type_of(rows.dtype));
    put(std::uint64_t{rows.width} * rows.heads * size_bytes(rows.dtype));
    tensor(rows, length, false);
  }
  void values(const Rows& rows, const u32* length) {
    put(detail::ggml_type_of(rows.dtype));
    if (transposed_) {
      put(static_cast<std::uint32_t>(size_bytes(rows.dtype)));
      put(static_cast<std::uint32_t>(rows.width * rows.heads));
    } else {
      put(std::uint64_t{rows.width} * rows.heads * size_bytes(rows.dtype));
    }
    tensor(rows, length, transposed_);
  }

 private:
  template <class T>
  void put(T value) {
    const auto* begin = reinterpret_cast<const std::byte*>(&value);
    bytes_.insert(bytes_.end(), begin, begin + sizeof value);
  }
  void tensor(const Rows& rows, const u32* length, bool transposed) {
    const BlobTensor place{rows.dtype, std::size_t{rows.width} * rows.heads, bytes_.size(),
                           transposed};
    bytes_.resize(bytes_.size() + cells_ * place.cell_bytes());
    const Rows to = blob_rows(bytes_, place, cells_, rows.heads, nullptr, 0).description;
    for (u32 head = 0; head < rows.heads; ++head) {
      for (u32 slot = 0; slot < length[head]; ++slot) copy_row(rows, head, slot, to, head, slot);
    }
  }

  std::vector<std::byte>& bytes_;
  std::int32_t sequence_ = 0;
  std::size_t cells_ = 0;
  bool transposed_ = false;
};

}  // namespace kvlean::llama_cpp
