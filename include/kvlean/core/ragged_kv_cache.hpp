// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <limits>
#include <new>
#include <span>
#include <utility>

#include "kvlean/core/byte_range.hpp"
#include "kvlean/core/kv_cache.hpp"

KVLEAN_NAMESPACE_BEGIN

/// How the segments of a RaggedKVCache share its slots.
enum class RaggedLayout : u8 {
  flat,   ///< back to back: exactly as many slots as are kept, no room to grow
  fixed,  ///< `capacity_per_head` slots each: appending is O(new tokens)
};

/// Shape of a RaggedKVCache.
struct RaggedShape {
  std::size_t kv_heads = 0;
  std::size_t key_dim = 0;    ///< elements
  std::size_t value_dim = 0;  ///< elements
  DType key_dtype = DType::f32;
  DType value_dtype = DType::f32;
  RaggedLayout layout = RaggedLayout::flat;
  std::size_t total_slots = 0;        ///< flat: of all heads together
  std::size_t capacity_per_head = 0;  ///< fixed
  bool log_mass = false;              ///< slots carry a logit bias
  bool positions = true;              ///< slots carry their position

  [[nodiscard]] static RaggedShape flat(std::size_t kv_heads, std::size_t dim, DType dtype,
                                        std::size_t total_slots) noexcept {
    return {kv_heads, dim, dim, dtype, dtype, RaggedLayout::flat, total_slots, 0, false, true};
  }
  [[nodiscard]] static RaggedShape fixed(std::size_t kv_heads, std::size_t dim, DType dtype,
                                         std::size_t capacity_per_head) noexcept {
    return {kv_heads,          dim,   dim, dtype, dtype, RaggedLayout::fixed, 0,
            capacity_per_head, false, true};
  }
};

/// A cache of one layer whose heads have lengths of their own: K and V row-major, positions and log
/// mass beside them, all in one block of memory, the caller's (bind) or its own (allocate). What
/// apply(plan, source, destination) writes; its view() is the input of every stage again. Views
/// point into the block: they outlive a move of the object, but neither bind() nor allocate(), and
/// they see later lengths only when taken again.
class RaggedKVCache {
 public:
  RaggedKVCache() noexcept = default;
  RaggedKVCache(const RaggedKVCache&) = delete;
  RaggedKVCache& operator=(const RaggedKVCache&) = delete;
  RaggedKVCache(RaggedKVCache&& other) noexcept
      : parts_(std::exchange(other.parts_, {})), owned_(std::exchange(other.owned_, nullptr)) {}
  RaggedKVCache& operator=(RaggedKVCache&& other) noexcept {
    std::swap(parts_, other.parts_);
    std::swap(owned_, other.owned_);
    return *this;
  }
  ~RaggedKVCache() { ::operator delete (owned_, std::align_val_t{alignment}); }

  /// Bytes that bind() needs at any alignment of the storage; 0 when the shape is invalid or the
  /// size does not fit.
  [[nodiscard]] static std::size_t bytes_required(const RaggedShape& shape) noexcept {
    Parts parts;
    std::size_t bytes = 0;
    return place(shape, nullptr, parts, bytes) ? bytes + alignment - 1 : 0;
  }

  /// Lays the cache out in the caller's memory, empty; the memory must outlive it. Errors:
  /// invalid_shape (a zero head count or width, a size that does not fit), row_too_wide,
  /// null_pointer, destination_too_small (storage below bytes_required). O(heads).
  [[nodiscard]] Status bind(std::span<std::byte> storage, const RaggedShape& shape) noexcept {
    KVLEAN_RETURN_IF_ERROR(check(shape));
    if (storage.data() == nullptr) return StatusCode::null_pointer;
    if (storage.size() < bytes_required(shape)) return StatusCode::destination_too_small;
    adopt(storage.data(), shape, nullptr);
    return StatusCode::ok;
  }
  /// The same in memory of its own, freed by the destructor. Also out_of_memory; on an error the
  /// cache stays what it was.
  [[nodiscard]] Status allocate(const RaggedShape& shape) noexcept {
    KVLEAN_RETURN_IF_ERROR(check(shape));
    void* block = ::operator new (bytes_required(shape), std::align_val_t{alignment}, std::nothrow);
    if (block == nullptr) return StatusCode::out_of_memory;
    adopt(static_cast<std::byte*>(block), shape, block);
    return StatusCode::ok;
  }

  /// What every stage takes; mutable. Of an unbound cache: no segments.
  [[nodiscard]] CacheView view() const noexcept {
    const RaggedShape& shape = parts_.shape;
    const bool flat = shape.layout == RaggedLayout::flat;
    CacheView view;
    view.segments = static_cast<u32>(shape.kv_heads);
    for (u32 h = 0; h < view.segments; ++h) view.capacity = std::max(view.capacity, capacity(h));
    const auto rows = [&](std::byte* data, DType dtype, std::size_t dim) noexcept {
      Rows result;
      result.data = data;
      result.dtype = dtype;
      result.writable = true;
      result.width = static_cast<u32>(dim);
      result.heads = view.segments;
      result.tokens = view.capacity;
      result.token_stride = static_cast<i64>(dim);
      result.head_stride = flat ? 0 : static_cast<i64>(shape.capacity_per_head * dim);
      result.first = flat ? parts_.offsets : nullptr;
      return result;
    };
    view.keys = rows(parts_.keys, shape.key_dtype, shape.key_dim);
    view.values = rows(parts_.values, shape.value_dtype, shape.value_dim);
    view.lengths = parts_.lengths;
    view.frozen = parts_.frozen;
    view.positions = Ragged<i32>(parts_.positions, parts_.offsets);
    view.log_mass = Ragged<float>(parts_.log_mass, parts_.offsets);
    view.next_position = parts_.next_position;
    view.rope_pairing = parts_.rope_pairing;
    view.origin = parts_.origin;
    return view;
  }

  [[nodiscard]] const RaggedShape& shape() const noexcept { return parts_.shape; }
  [[nodiscard]] std::size_t num_kv_heads() const noexcept { return parts_.shape.kv_heads; }
  /// Valid slots of a head.
  [[nodiscard]] u32 length(u32 head) const noexcept { return parts_.lengths[head]; }
  /// Slots a head can hold where it lies; flat: what it held when its lengths were last set.
  [[nodiscard]] u32 capacity(u32 head) const noexcept {
    return static_cast<u32>(parts_.offsets[head + 1] - parts_.offsets[head]);
  }
  /// Slot offset of each head, [kv_heads + 1].
  [[nodiscard]] std::span<const u64> offsets() const noexcept {
    return {parts_.offsets, parts_.offsets == nullptr ? 0 : num_kv_heads() + 1};
  }
  [[nodiscard]] std::size_t total_length() const noexcept {
    return static_cast<std::size_t>(view().total_length());
  }
  /// Bytes of what is kept: K and V in their types, 4 of position and 4 of log mass a slot where
  /// present, 8 a head.
  [[nodiscard]] std::size_t bytes_used() const noexcept {
    return total_length() * slot_bytes(parts_.shape) + num_kv_heads() * 8;
  }
  /// The block of memory, for overlap checks.
  [[nodiscard]] std::span<const std::byte> storage() const noexcept {
    return {parts_.begin, static_cast<std::size_t>(parts_.end - parts_.begin)};
  }
  /// Whether the heads lie back to back, so that cu_lengths() addresses rows.
  [[nodiscard]] bool is_packed() const noexcept {
    for (u32 h = 0; h < num_kv_heads(); ++h) {
      if (length(h) != capacity(h)) return false;
    }
    return true;
  }

  /// Forgets all slots; the next position becomes 0. Keeps memory and shape.
  void clear() noexcept {
    for (u32 h = 0; h < num_kv_heads(); ++h) parts_.lengths[h] = 0;
    if (parts_.shape.layout == RaggedLayout::flat) {
      for (std::size_t h = 0; h < num_kv_heads(); ++h) parts_.offsets[h + 1] = 0;
    }
    parts_.next_position = 0;
    parts_.frozen = 0;
  }
  void set_next_position(i32 position) noexcept { parts_.next_position = position; }
  /// The first `tokens` slots of every head are never written, moved or merged into.
  void set_frozen(std::size_t tokens) noexcept { parts_.frozen = detail::saturate_u32(tokens); }
  void set_rope_pairing(RopePairing pairing) noexcept { parts_.rope_pairing = pairing; }
  void set_origin(SegmentId origin) noexcept { parts_.origin = origin; }

  /// Gives the heads new lengths, and flat ones new places; the slots are then for the caller to
  /// write through view(). Errors: shape_mismatch (one length a head), destination_too_small.
  [[nodiscard]] Status set_lengths(std::span<const u32> lengths) noexcept;

  /// Appends `count` tokens to every head: row i of head h of `keys` and `values` gets position
  /// first_position + i and log mass 0, and the next position follows them. Types are converted. A
  /// flat cache has room only where in-place compression left some. Errors, with nothing written:
  /// shape_mismatch, those of check_rows, invalid_option (first_position below next_position, or
  /// past the range), destination_too_small, destination_overlaps. O(count * heads * width).
  [[nodiscard]] Status append(const Rows& keys, const Rows& values, u32 count,
                              i32 first_position) noexcept;

  /// Flat: closes the gaps that in-place compression left, so that heads are back to back again.
  /// Fixed: nothing to do. O(slots moved * width).
  void pack() noexcept;

  /// Prefix sums of the lengths, [kv_heads + 1], as variable-length attention kernels take them.
  /// They address rows when is_packed(). Errors: shape_mismatch (size), invalid_shape (past int32).
  [[nodiscard]] Status cu_lengths(std::span<i32> sums) const noexcept {
    if (sums.size() != num_kv_heads() + 1) return StatusCode::shape_mismatch;
    if (total_length() > std::numeric_limits<i32>::max()) return StatusCode::invalid_shape;
    sums[0] = 0;
    for (u32 h = 0; h < num_kv_heads(); ++h) sums[h + 1] = sums[h] + static_cast<i32>(length(h));
    return StatusCode::ok;
  }

 private:
  static constexpr std::size_t alignment = 64;

  struct Parts {
    RaggedShape shape;
    std::byte* begin = nullptr;
    std::byte* end = nullptr;
    u64* offsets = nullptr;
    u32* lengths = nullptr;
    std::byte* keys = nullptr;
    std::byte* values = nullptr;
    i32* positions = nullptr;
    float* log_mass = nullptr;
    u32 frozen = 0;
    i32 next_position = 0;
    RopePairing rope_pairing = RopePairing::none;
    SegmentId origin;
  };

  [[nodiscard]] static std::size_t slot_bytes(const RaggedShape& shape) noexcept {
    return shape.key_dim * size_bytes(shape.key_dtype) +
           shape.value_dim * size_bytes(shape.value_dtype) + (shape.positions ? 4u : 0u) +
           (shape.log_mass ? 4u : 0u);
  }
  [[nodiscard]] static Status check(const RaggedShape& shape) noexcept {
    if (shape.kv_heads == 0 || shape.key_dim == 0 || shape.value_dim == 0) {
      return StatusCode::invalid_shape;
    }
    if (shape.key_dim > max_row_width || shape.value_dim > max_row_width) {
      return StatusCode::row_too_wide;
    }
    return bytes_required(shape) != 0 ? StatusCode::ok : StatusCode::invalid_shape;
  }
  // Finds the place of every array after `base`; false when the shape is invalid.
  static bool place(const RaggedShape& shape, std::byte* base, Parts& parts,
                    std::size_t& bytes) noexcept;
  void adopt(std::byte* storage, const RaggedShape& shape, void* block) noexcept;

  Parts parts_;
  void* owned_ = nullptr;
};
static_assert(Cache<RaggedKVCache>);

KVLEAN_NAMESPACE_END

#include "kvlean/core/ragged_kv_cache-inl.hpp"  // IWYU pragma: export
