// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <concepts>
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
  flat,   ///< one pool: back to back, or apart by what respace() gives each to grow
  fixed,  ///< `capacity_per_head` slots each: appending is O(new tokens)
};

/// Shape of a RaggedKVCache.
struct RaggedShape {
  std::size_t kv_heads = 0;   ///< of all layers together
  std::size_t key_dim = 0;    ///< elements
  std::size_t value_dim = 0;  ///< elements
  DType key_dtype = DType::f32;
  DType value_dtype = DType::f32;
  RaggedLayout layout = RaggedLayout::flat;
  std::size_t total_slots = 0;        ///< flat: of all heads together
  std::size_t capacity_per_head = 0;  ///< fixed
  bool log_mass = false;              ///< slots carry a logit bias
  bool positions = true;              ///< slots carry their position
  u32 layer_heads = 0;                ///< KV heads of one layer; 0: all are one layer's
  u32 state_arrays = 0;               ///< floats a slot carries for the caller

  [[nodiscard]] static RaggedShape flat(std::size_t kv_heads, std::size_t dim, DType dtype,
                                        std::size_t total_slots) noexcept {
    RaggedShape shape = uniform(kv_heads, dim, dtype);
    shape.total_slots = total_slots;
    return shape;
  }
  [[nodiscard]] static RaggedShape fixed(std::size_t kv_heads, std::size_t dim, DType dtype,
                                         std::size_t capacity_per_head) noexcept {
    RaggedShape shape = uniform(kv_heads, dim, dtype);
    shape.layout = RaggedLayout::fixed;
    shape.capacity_per_head = capacity_per_head;
    return shape;
  }

 private:
  [[nodiscard]] static RaggedShape uniform(std::size_t kv_heads, std::size_t dim,
                                           DType dtype) noexcept {
    RaggedShape shape;
    shape.kv_heads = kv_heads;
    shape.key_dim = shape.value_dim = dim;
    shape.key_dtype = shape.value_dtype = dtype;
    return shape;
  }
};

/// A cache whose heads have lengths of their own: of one layer, or of all layers of a sequence one
/// after the other (layer l is heads [l * layer_heads, (l + 1) * layer_heads)). K and V row-major,
/// positions, log mass and the caller's states beside them, all in one block of memory, the
/// caller's (bind) or its own (allocate). What apply(plan, source, destination) writes; its view()
/// is the input of every stage again. Views point into the block: they outlive a move of the
/// object, but neither bind(), allocate(), pack() nor respace(). Lengths they share with the cache;
/// what they say of capacity and the next position is from when they were taken.
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

  /// Bytes of a slot: key, value, position, log mass and states.
  [[nodiscard]] static std::size_t slot_bytes(const RaggedShape& shape) noexcept {
    return shape.key_dim * size_bytes(shape.key_dtype) +
           shape.value_dim * size_bytes(shape.value_dtype) + (shape.positions ? 4u : 0u) +
           (shape.log_mass ? 4u : 0u) + std::size_t{4} * shape.state_arrays;
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

  /// What every stage takes; mutable. Of an unbound cache: no segments. O(heads).
  [[nodiscard]] CacheView view() const noexcept {
    return view(0, static_cast<u32>(num_kv_heads()));
  }
  /// The heads [first_head, first_head + heads) alone, as a cache that shares their memory and
  /// lengths: in-place work on it is work on this cache. Its origin is the first head's place in
  /// the model. Empty when the heads are out of range. O(heads).
  [[nodiscard]] CacheView view(u32 first_head, u32 heads) const noexcept;
  /// One layer's heads; see RaggedShape::layer_heads.
  [[nodiscard]] CacheView layer(u32 index) const noexcept {
    const u32 heads = layer_heads();
    if (index >= num_layers()) return {};
    return view(index * heads, heads);
  }

  [[nodiscard]] const RaggedShape& shape() const noexcept { return parts_.shape; }
  [[nodiscard]] std::size_t num_kv_heads() const noexcept { return parts_.shape.kv_heads; }
  /// KV heads of a layer.
  [[nodiscard]] u32 layer_heads() const noexcept {
    const RaggedShape& shape = parts_.shape;
    return shape.layer_heads != 0 ? shape.layer_heads : static_cast<u32>(shape.kv_heads);
  }
  [[nodiscard]] u32 num_layers() const noexcept {
    return num_kv_heads() == 0 ? 0 : static_cast<u32>(num_kv_heads()) / layer_heads();
  }
  /// Valid slots of a head.
  [[nodiscard]] u32 length(u32 head) const noexcept { return parts_.lengths[head]; }
  /// Slots a head can hold where it lies; flat: what it held when its lengths were last set, or
  /// what respace() gave it.
  [[nodiscard]] u32 capacity(u32 head) const noexcept {
    return detail::saturate_u32(
        static_cast<std::size_t>(parts_.offsets[head + 1] - parts_.offsets[head]));
  }
  /// Tokens that can be appended to a head as it lies.
  [[nodiscard]] u32 room(u32 head) const noexcept { return capacity(head) - length(head); }
  /// The least room of the heads [first_head, first_head + heads); 0 when there are none. O(heads).
  [[nodiscard]] u32 min_room(u32 first_head, u32 heads) const noexcept {
    if (!has_heads(first_head, heads)) return 0;
    u32 least = room(first_head);
    for (u32 h = 1; h < heads; ++h) least = std::min(least, room(first_head + h));
    return least;
  }
  [[nodiscard]] u32 min_room() const noexcept {
    return min_room(0, static_cast<u32>(num_kv_heads()));
  }
  /// Slot offset of each head, [kv_heads + 1].
  [[nodiscard]] std::span<const u64> offsets() const noexcept {
    return {parts_.offsets, parts_.offsets == nullptr ? 0 : num_kv_heads() + 1};
  }
  [[nodiscard]] std::size_t total_length() const noexcept {
    return static_cast<std::size_t>(view().total_length());
  }
  /// Bytes of what is kept: K and V in their types, 4 of position, 4 of log mass and 4 of each
  /// state a slot where present, 8 a head.
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

  /// The caller's values of the slots, one of RaggedShape::state_arrays, moved along with the rows
  /// by pack() and respace() and zero for appended tokens; apply_state() takes them through a plan.
  /// A copy made by apply() out of place leaves the destination's to the caller. Null when there is
  /// no such array.
  [[nodiscard]] Ragged<float> state(u32 index) const noexcept { return state(index, 0); }
  /// The same from `first_head` on, beside view(first_head, heads).
  [[nodiscard]] Ragged<float> state(u32 index, u32 first_head) const noexcept {
    if (index >= parts_.shape.state_arrays || !has_heads(first_head, 1)) return {};
    return Ragged<float>(parts_.states + index * parts_.slots, parts_.offsets + first_head);
  }
  [[nodiscard]] i32 next_position() const noexcept { return parts_.next_position; }
  [[nodiscard]] u32 frozen() const noexcept { return parts_.frozen; }
  [[nodiscard]] SegmentId origin() const noexcept { return parts_.origin; }
  [[nodiscard]] RopePairing rope_pairing() const noexcept { return parts_.rope_pairing; }
  [[nodiscard]] const RopeSpec* rope() const noexcept { return parts_.rope; }

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
  /// How the keys are rotated; null: not known. The spec stays the caller's and must outlive the
  /// cache's use.
  void set_rope(const RopeSpec* rope) noexcept {
    parts_.rope = rope;
    parts_.rope_pairing = rope != nullptr ? rope->pairing : RopePairing::none;
  }
  void set_origin(SegmentId origin) noexcept { parts_.origin = origin; }

  /// Gives the heads new lengths, and flat ones new places, back to back; the slots, their log mass
  /// and states are then for the caller to write through view(). Errors: shape_mismatch (one length
  /// a head), destination_too_small.
  [[nodiscard]] Status set_lengths(std::span<const u32> lengths) noexcept {
    if (lengths.size() != num_kv_heads()) return StatusCode::shape_mismatch;
    return set_lengths([lengths](std::size_t head) noexcept { return lengths[head]; });
  }
  /// The same with the lengths from a function of the head.
  template <std::invocable<std::size_t> LengthOf>
  [[nodiscard]] Status set_lengths(LengthOf length_of) noexcept;

  /// Appends `count` tokens to every head: row i of head h of `keys` and `values` gets position
  /// first_position + i, log mass 0 and states 0, and the next position follows them. Types are
  /// converted. A flat cache has room where in-place compression or respace() left some. Errors,
  /// with nothing written: invalid_shape (no heads), shape_mismatch, those of check_rows,
  /// invalid_option (first_position below next_position, or past the range),
  /// destination_too_small, destination_overlaps. O(count * heads * width).
  [[nodiscard]] Status append(const Rows& keys, const Rows& values, u32 count,
                              i32 first_position) noexcept {
    if (first_position < parts_.next_position && num_kv_heads() != 0) {
      return StatusCode::invalid_option;
    }
    return append_rows(0, static_cast<u32>(num_kv_heads()), keys, values, count, first_position);
  }
  /// The same for the heads [first_head, first_head + heads), whose rows are heads [0, heads) of
  /// `keys` and `values`: one layer after the other, as a model computes them. The next position is
  /// the cache's, so each slice of a step gives the same positions, and it becomes first_position +
  /// count unless it is past that already. invalid_option also when first_position is negative or
  /// not above the position of each of these heads' newest token; invalid_shape also for heads out
  /// of range.
  [[nodiscard]] Status append(u32 first_head, u32 heads, const Rows& keys, const Rows& values,
                              u32 count, i32 first_position) noexcept;

  /// Drops the newest `count` tokens of each of the heads [first_head, first_head + heads): the way
  /// back from tokens that were appended tentatively. The next position stays for the caller to
  /// set. Errors, with nothing changed: invalid_shape (heads out of range), invalid_length (a head
  /// has fewer tokens), frozen_token_changed. O(heads).
  [[nodiscard]] Status truncate(u32 first_head, u32 heads, u32 count) noexcept;
  /// The same for every head; the next position falls by `count`.
  [[nodiscard]] Status truncate(u32 count) noexcept {
    KVLEAN_RETURN_IF_ERROR(truncate(0, static_cast<u32>(num_kv_heads()), count));
    const i64 next = static_cast<i64>(parts_.next_position) - static_cast<i64>(count);
    parts_.next_position = static_cast<i32>(std::max<i64>(next, 0));
    return StatusCode::ok;
  }

  /// Flat: closes the gaps that in-place compression left, so that heads are back to back again.
  /// Fixed: nothing to do. Frozen rows move too: this is the cache's own memory. O(slots moved *
  /// width).
  void pack() noexcept { place_apart(0); }
  /// Flat: places the heads so that each has the same room to grow, floor(free / heads) slots,
  /// where free is what total_slots leaves over. Nothing is allocated, a row moves at most once,
  /// and rows that are in place already stay; frozen ones move too. Views and states must be taken
  /// again. Fixed: nothing to do. O(slots moved * width).
  void respace() noexcept {
    if (parts_.shape.layout == RaggedLayout::fixed || num_kv_heads() == 0) return;
    place_apart((parts_.slots - total_length()) / num_kv_heads());
  }

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
    float* states = nullptr;  // [state_arrays][slots]
    std::size_t slots = 0;    // of all heads together
    const RopeSpec* rope = nullptr;
    u32 frozen = 0;
    i32 next_position = 0;
    RopePairing rope_pairing = RopePairing::none;
    SegmentId origin;
  };

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
  [[nodiscard]] bool has_heads(u32 first_head, u32 heads) const noexcept {
    return heads != 0 && first_head < num_kv_heads() && heads <= num_kv_heads() - first_head;
  }
  [[nodiscard]] Status append_rows(u32 first_head, u32 heads, const Rows& keys, const Rows& values,
                                   u32 count, i32 first_position) noexcept;
  // Moves the slots of a head by whole rows; places may overlap.
  void move_head(u64 from, u64 to, std::size_t slots) noexcept;
  // Flat: heads in order, each followed by `gap` free slots.
  void place_apart(std::size_t gap) noexcept;

  Parts parts_;
  void* owned_ = nullptr;
};
static_assert(Cache<RaggedKVCache>);

KVLEAN_NAMESPACE_END

#include "kvlean/core/ragged_kv_cache-inl.hpp"  // IWYU pragma: export
