// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <bit>
#include <cstring>
#include <span>

#include "kvlean/core/ragged_kv_cache.hpp"

// The bytes of a snapshot, all little-endian, without padding:
//
//   magic "KVLsnap\n"; u32 version; u32 flags; u64 bytes in all
//   shape: u64 heads; u32 key_dim, value_dim, key_dtype, value_dtype, layout, layer_heads,
//          state_arrays; u64 total_slots, capacity_per_head
//   cache: i32 next_position; u32 frozen, rope_pairing, sequence, layer, head; u64 blob bytes
//   rope:  u32 pairing, scaling, rotary_dims, first_dim, original_context, whole_ramp_pairs,
//          factors; f64 theta, factor, low_freq_factor, high_freq_factor, beta_fast, beta_slow,
//          extrapolation, attention_factor; f32 frequency_factors [factors]
//   u32 lengths [heads]
//   head by head, [length] each: i32 positions; f32 log mass; f32 of each state; key rows; value
//          rows
//   the caller's blob; u64 checksum of everything before it
//
// The rope part, positions and log mass are there when their flag is set.

KVLEAN_NAMESPACE_BEGIN
namespace detail::snapshot {

inline constexpr char magic[9] = "KVLsnap\n";
inline constexpr u32 version = 1;
enum Flags : u32 { has_positions = 1u << 0, has_log_mass = 1u << 1, has_rope = 1u << 2 };
inline constexpr u32 all_flags = has_positions | has_log_mass | has_rope;
inline constexpr std::size_t checksum_bytes = 8;

/// Copies elements of `size` bytes between memory and the little-endian form.
inline void copy_elements(void* to, const void* from, std::size_t count,
                          std::size_t size) noexcept {
  if (count == 0) return;
  std::memcpy(to, from, count * size);
  if constexpr (std::endian::native == std::endian::big) {
    auto* bytes = static_cast<std::byte*>(to);
    for (std::size_t i = 0; i < count; ++i) std::reverse(bytes + i * size, bytes + (i + 1) * size);
  }
}

/// 64 bits over any bytes, at about the speed of memory: four lanes, each xor, rotate, multiply by
/// an odd number. Every step can be undone, so a change within one word always changes the sum.
[[nodiscard]] inline u64 checksum(std::span<const std::byte> bytes) noexcept {
  constexpr u64 odd = 0x9e3779b97f4a7c15u;
  u64 lane[4] = {odd, odd * 3, odd * 5, odd * 7};
  const auto add = [&](const std::byte* block) noexcept {
    u64 word[4];
    copy_elements(word, block, 4, 8);
    for (int i = 0; i < 4; ++i) lane[i] = std::rotl(lane[i] ^ word[i], 27) * odd;
  };
  std::size_t at = 0;
  for (; bytes.size() - at >= 32; at += 32) add(bytes.data() + at);
  std::byte tail[32] = {};
  std::copy(bytes.begin() + static_cast<std::ptrdiff_t>(at), bytes.end(), tail);
  add(tail);
  u64 sum = bytes.size();
  for (const u64 part : lane) {
    sum = std::rotl(sum ^ part, 31) * odd;
    sum ^= sum >> 29;
  }
  return sum;
}

/// Writes one thing after another, or only counts the bytes when there is nowhere to write.
class Writer {
 public:
  explicit Writer(std::byte* out) noexcept : out_(out) {}
  void put(const void* data, std::size_t count, std::size_t size) noexcept {
    if (out_ != nullptr) copy_elements(out_ + bytes_, data, count, size);
    bytes_ += count * size;
  }
  template <class T>
  void put(T value) noexcept {
    put(&value, 1, sizeof value);
  }
  [[nodiscard]] std::size_t bytes() const noexcept { return bytes_; }

 private:
  std::byte* out_;
  std::size_t bytes_ = 0;
};

/// Reads one thing after another; past the end it reads zeros and is no longer good.
class Reader {
 public:
  explicit Reader(std::span<const std::byte> bytes) noexcept : bytes_(bytes) {}
  template <class T>
  [[nodiscard]] T take() noexcept {
    T value{};
    if (const std::byte* data = skip(sizeof value)) copy_elements(&value, data, 1, sizeof value);
    return value;
  }
  [[nodiscard]] const std::byte* skip(u64 count) noexcept {
    if (count > left()) {
      good_ = false;
      return nullptr;
    }
    const std::byte* data = bytes_.data();
    bytes_ = bytes_.subspan(static_cast<std::size_t>(count));
    return data;
  }
  [[nodiscard]] std::size_t left() const noexcept { return good_ ? bytes_.size() : 0; }
  [[nodiscard]] bool good() const noexcept { return good_; }

 private:
  std::span<const std::byte> bytes_;
  bool good_ = true;
};

inline void write_rope(Writer& writer, const RopeSpec& rope, u32 factors) noexcept {
  writer.put(static_cast<u32>(rope.pairing));
  writer.put(static_cast<u32>(rope.scaling));
  writer.put(rope.rotary_dims);
  writer.put(rope.first_dim);
  writer.put(rope.original_context);
  writer.put(u32{rope.whole_ramp_pairs});
  writer.put(factors);
  for (const double number :
       {rope.theta, rope.factor, rope.low_freq_factor, rope.high_freq_factor, rope.beta_fast,
        rope.beta_slow, rope.extrapolation, rope.attention_factor}) {
    writer.put(number);
  }
  writer.put(rope.frequency_factors, factors, sizeof(float));
}

/// Calls visit(data, count, element size) for what a slot of `view` consists of, segment by
/// segment, in the order of the format.
template <class Visit>
void for_each_array(const RaggedKVCache& cache, Visit&& visit) noexcept {
  const RaggedShape& shape = cache.shape();
  const CacheView view = cache.view();
  for (u32 h = 0; h < view.segments; ++h) {
    const std::size_t length = view.lengths[h];
    if (view.positions) visit(static_cast<void*>(view.positions.segment(h)), length, sizeof(i32));
    if (view.log_mass) visit(static_cast<void*>(view.log_mass.segment(h)), length, sizeof(float));
    for (u32 i = 0; i < shape.state_arrays; ++i) {
      visit(static_cast<void*>(cache.state(i).segment(h)), length, sizeof(float));
    }
    visit(static_cast<void*>(row_address(view.keys, h, 0)), length * shape.key_dim,
          size_bytes(shape.key_dtype));
    visit(static_cast<void*>(row_address(view.values, h, 0)), length * shape.value_dim,
          size_bytes(shape.value_dtype));
  }
}

/// Writes everything but the checksum; `total` is the size of all.
inline void write_cache(Writer& writer, const RaggedKVCache& cache, u64 total,
                        std::span<const std::byte> blob) noexcept {
  const RaggedShape& shape = cache.shape();
  const RopeSpec* rope = cache.rope();
  writer.put(magic, 8, 1);
  writer.put(version);
  writer.put((shape.positions ? u32{has_positions} : 0u) |
             (shape.log_mass ? u32{has_log_mass} : 0u) | (rope != nullptr ? u32{has_rope} : 0u));
  writer.put(total);
  writer.put(u64{shape.kv_heads});
  for (const u32 number : {static_cast<u32>(shape.key_dim), static_cast<u32>(shape.value_dim),
                           static_cast<u32>(shape.key_dtype), static_cast<u32>(shape.value_dtype),
                           static_cast<u32>(shape.layout), shape.layer_heads, shape.state_arrays}) {
    writer.put(number);
  }
  writer.put(u64{shape.total_slots});
  writer.put(u64{shape.capacity_per_head});
  const SegmentId origin = cache.origin();
  writer.put(cache.next_position());
  for (const u32 number : {cache.frozen(), static_cast<u32>(cache.rope_pairing()), origin.sequence,
                           origin.layer, origin.head}) {
    writer.put(number);
  }
  writer.put(u64{blob.size()});
  if (rope != nullptr) {
    const u32 pairs = rope->dims(static_cast<u32>(shape.key_dim)) / 2;
    write_rope(writer, *rope, rope->frequency_factors != nullptr ? pairs : 0);
  }
  for (u32 h = 0; h < shape.kv_heads; ++h) writer.put(cache.length(h));
  for_each_array(cache, [&](const void* data, std::size_t count, std::size_t size) noexcept {
    writer.put(data, count, size);
  });
  writer.put(blob.data(), blob.size(), 1);
}

/// A snapshot that was checked. Pointers lead into its bytes, at any alignment.
struct Contents {
  RaggedShape shape;
  i32 next_position = 0;
  u32 frozen = 0;
  RopePairing rope_pairing = RopePairing::none;
  SegmentId origin;
  bool with_rope = false;
  RopeSpec rope;  ///< without its frequency_factors
  u32 factors = 0;
  const std::byte* factor_bytes = nullptr;
  const std::byte* length_bytes = nullptr;
  const std::byte* slot_bytes = nullptr;
  std::span<const std::byte> blob;

  [[nodiscard]] u32 length(std::size_t head) const noexcept {
    u32 result = 0;
    copy_elements(&result, length_bytes + head * sizeof result, 1, sizeof result);
    return result;
  }
};

inline bool read_rope(Reader& reader, Contents& contents) noexcept {
  RopeSpec& rope = contents.rope;
  const u32 pairing = reader.take<u32>();
  const u32 scaling = reader.take<u32>();
  rope.rotary_dims = reader.take<u32>();
  rope.first_dim = reader.take<u32>();
  rope.original_context = reader.take<u32>();
  rope.whole_ramp_pairs = reader.take<u32>() != 0;
  contents.factors = reader.take<u32>();
  for (double* number :
       {&rope.theta, &rope.factor, &rope.low_freq_factor, &rope.high_freq_factor, &rope.beta_fast,
        &rope.beta_slow, &rope.extrapolation, &rope.attention_factor}) {
    *number = reader.take<double>();
  }
  contents.factor_bytes = reader.skip(u64{contents.factors} * sizeof(float));
  if (pairing > static_cast<u32>(RopePairing::neox)) return false;
  if (scaling > static_cast<u32>(RopeScaling::llama3)) return false;
  rope.pairing = static_cast<RopePairing>(pairing);
  rope.scaling = static_cast<RopeScaling>(scaling);
  const u32 width = static_cast<u32>(contents.shape.key_dim);
  return rope.check(width) && (contents.factors == 0 || contents.factors == rope.dims(width) / 2);
}

inline bool read_shape(Reader& reader, u32 flags, RaggedShape& shape) noexcept {
  shape.kv_heads = static_cast<std::size_t>(reader.take<u64>());
  shape.key_dim = reader.take<u32>();
  shape.value_dim = reader.take<u32>();
  const u32 key_dtype = reader.take<u32>();
  const u32 value_dtype = reader.take<u32>();
  const u32 layout = reader.take<u32>();
  shape.layer_heads = reader.take<u32>();
  shape.state_arrays = reader.take<u32>();
  shape.total_slots = static_cast<std::size_t>(reader.take<u64>());
  shape.capacity_per_head = static_cast<std::size_t>(reader.take<u64>());
  constexpr u32 last_dtype = static_cast<u32>(DType::bf16);
  if (key_dtype > last_dtype || value_dtype > last_dtype || layout > 1) return false;
  shape.key_dtype = static_cast<DType>(key_dtype);
  shape.value_dtype = static_cast<DType>(value_dtype);
  shape.layout = static_cast<RaggedLayout>(layout);
  shape.positions = (flags & has_positions) != 0;
  shape.log_mass = (flags & has_log_mass) != 0;
  return RaggedKVCache::bytes_required(shape) != 0;
}

/// Checks the lengths against the shape and finds the slots: false when they do not fit.
inline bool read_slots(Reader& reader, Contents& contents) noexcept {
  const RaggedShape& shape = contents.shape;
  if (shape.kv_heads > reader.left() / sizeof(u32)) return false;
  contents.length_bytes = reader.skip(shape.kv_heads * sizeof(u32));
  const bool flat = shape.layout == RaggedLayout::flat;
  const u64 most = reader.left() / RaggedKVCache::slot_bytes(shape);
  u64 slots = 0;
  for (std::size_t h = 0; h < shape.kv_heads; ++h) {
    const u32 length = contents.length(h);
    if (!flat && length > shape.capacity_per_head) return false;
    slots += length;
    if (slots > most) return false;
  }
  if (flat && slots > shape.total_slots) return false;
  contents.slot_bytes = reader.skip(slots * RaggedKVCache::slot_bytes(shape));
  return true;
}

/// Checks all of a snapshot. bad_snapshot for anything that save() did not write.
[[nodiscard]] inline Status read(std::span<const std::byte> bytes, Contents& contents) noexcept {
  if (bytes.data() == nullptr) return StatusCode::null_pointer;
  if (bytes.size() < 24 + checksum_bytes) return StatusCode::bad_snapshot;
  const std::span<const std::byte> body = bytes.first(bytes.size() - checksum_bytes);
  Reader reader(body);
  const bool ours = std::memcmp(reader.skip(8), magic, 8) == 0;
  const bool known = reader.take<u32>() == version;
  const u32 flags = reader.take<u32>();
  const bool whole = reader.take<u64>() == bytes.size();
  if (!ours || !known || !whole || (flags & ~all_flags) != 0) return StatusCode::bad_snapshot;
  Reader end(bytes.last(checksum_bytes));
  if (end.take<u64>() != checksum(body)) return StatusCode::bad_snapshot;

  Contents read;
  if (!read_shape(reader, flags, read.shape)) return StatusCode::bad_snapshot;
  read.next_position = reader.take<i32>();
  read.frozen = reader.take<u32>();
  const u32 pairing = reader.take<u32>();
  read.origin.sequence = reader.take<u32>();
  read.origin.layer = reader.take<u32>();
  read.origin.head = reader.take<u32>();
  const u64 blob_bytes = reader.take<u64>();
  if (pairing > static_cast<u32>(RopePairing::neox)) return StatusCode::bad_snapshot;
  read.rope_pairing = static_cast<RopePairing>(pairing);
  read.with_rope = (flags & has_rope) != 0;
  if (read.with_rope && !read_rope(reader, read)) return StatusCode::bad_snapshot;
  if (!read_slots(reader, read)) return StatusCode::bad_snapshot;
  const std::byte* blob = reader.skip(blob_bytes);
  if (!reader.good() || reader.left() != 0) return StatusCode::bad_snapshot;
  read.blob = {blob, static_cast<std::size_t>(blob_bytes)};
  contents = read;
  return StatusCode::ok;
}

}  // namespace detail::snapshot
KVLEAN_NAMESPACE_END
