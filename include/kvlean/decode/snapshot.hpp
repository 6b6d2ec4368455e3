// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/decode/snapshot_format.hpp"

// A RaggedKVCache as bytes, to be put away and brought back: the same bytes for the same cache on
// every machine, packed (only slots that are kept), with a checksum.

KVLEAN_NAMESPACE_BEGIN

/// Bytes that save() writes for this cache and a blob of that size; 0 when save() would refuse it.
/// O(heads).
[[nodiscard]] inline std::size_t snapshot_bytes(const RaggedKVCache& cache,
                                                std::size_t blob_bytes = 0) noexcept {
  if (cache.num_kv_heads() == 0) return 0;
  if (cache.rope() != nullptr && !cache.rope()->check(static_cast<u32>(cache.shape().key_dim))) {
    return 0;
  }
  detail::snapshot::Writer counter(nullptr);
  detail::snapshot::write_cache(counter, cache, 0, {});
  return counter.bytes() + blob_bytes + detail::snapshot::checksum_bytes;
}

/// Writes a cache of any layout, shape and type to the front of `out`: shape, next position, frozen
/// count, origin, the rotation by value, lengths, positions, log mass, states and rows, then
/// `blob`, bytes of the caller's own. `written` becomes the bytes written, 0 on an error. Errors,
/// with nothing written: invalid_shape (no cache), null_pointer, those of RopeSpec::check,
/// destination_too_small (below snapshot_bytes), destination_overlaps (`out` touches the cache or
/// the blob). O(bytes).
[[nodiscard]] inline Status save(const RaggedKVCache& cache, std::span<std::byte> out,
                                 std::size_t& written,
                                 std::span<const std::byte> blob = {}) noexcept {
  using detail::ByteRange;
  written = 0;
  if (cache.num_kv_heads() == 0) return StatusCode::invalid_shape;
  if (cache.rope() != nullptr) {
    KVLEAN_RETURN_IF_ERROR(cache.rope()->check(static_cast<u32>(cache.shape().key_dim)));
  }
  if (out.data() == nullptr) return StatusCode::null_pointer;
  const std::size_t bytes = snapshot_bytes(cache, blob.size());
  if (out.size() < bytes) return StatusCode::destination_too_small;
  const ByteRange target = ByteRange::of(out.data(), bytes);
  const std::span<const std::byte> storage = cache.storage();
  if (target.overlaps(ByteRange::of(storage.data(), storage.size())) ||
      target.overlaps(ByteRange::of(blob.data(), blob.size()))) {
    return StatusCode::destination_overlaps;
  }
  detail::snapshot::Writer writer(out.data());
  detail::snapshot::write_cache(writer, cache, bytes, blob);
  writer.put(detail::snapshot::checksum(out.first(writer.bytes())));
  KVLEAN_ASSERT(writer.bytes() == bytes);
  written = bytes;
  return StatusCode::ok;
}

namespace detail::snapshot {

/// Whether keys rotated by the one are rotated as the other says.
[[nodiscard]] inline bool same_rotation(const Contents& contents, const RopeSpec& own) noexcept {
  const u32 width = static_cast<u32>(contents.shape.key_dim);
  RopeSpec saved = contents.rope;
  float factors[max_row_width / 2];
  copy_elements(factors, contents.factor_bytes, contents.factors, sizeof(float));
  if (contents.factors != 0) saved.frequency_factors = factors;
  if (!saved.check(width) || !own.check(width)) return false;
  if (saved.pairing != own.pairing || saved.dims(width) != own.dims(width)) return false;
  if (saved.pairing == RopePairing::none) return true;
  double saved_frequency[max_row_width / 2];
  double own_frequency[max_row_width / 2];
  rope_frequencies(saved, width, saved_frequency);
  rope_frequencies(own, width, own_frequency);
  return saved.first_dim == own.first_dim && saved.magnitude() == own.magnitude() &&
         std::equal(saved_frequency, saved_frequency + saved.dims(width) / 2, own_frequency);
}

/// Whether a cache that is there can take the slots: everything but layout and room agrees.
[[nodiscard]] inline bool same_slots(const RaggedShape& a, const RaggedShape& b) noexcept {
  return a.kv_heads == b.kv_heads && a.key_dim == b.key_dim && a.value_dim == b.value_dim &&
         a.key_dtype == b.key_dtype && a.value_dtype == b.value_dtype && a.log_mass == b.log_mass &&
         a.positions == b.positions && a.layer_heads == b.layer_heads &&
         a.state_arrays == b.state_arrays;
}

/// Copies the slots and the rest into a cache of that shape; nothing is changed on an error.
[[nodiscard]] inline Status fill(const Contents& contents, RaggedKVCache& cache) noexcept {
  KVLEAN_RETURN_IF_ERROR(
      cache.set_lengths([&](std::size_t head) noexcept { return contents.length(head); }));
  const std::byte* from = contents.slot_bytes;
  for_each_array(cache, [&](void* data, std::size_t count, std::size_t size) noexcept {
    copy_elements(data, from, count, size);
    from += count * size;
  });
  cache.set_next_position(contents.next_position);
  cache.set_frozen(contents.frozen);
  cache.set_origin(contents.origin);
  if (cache.rope() == nullptr) cache.set_rope_pairing(contents.rope_pairing);
  return StatusCode::ok;
}

}  // namespace detail::snapshot

/// Brings a saved cache back. A cache without memory gets memory of its own, with the snapshot's
/// shape. One that is bound or allocated keeps its memory and must hold the same kind of slots;
/// layout and room may differ. A flat cache comes back packed: respace() gives it room again.
/// `blob` becomes the caller's bytes, inside `snapshot`. The cache keeps its own rope pointer,
/// which must describe the snapshot's rotation where both have one; without one, see
/// snapshot_rope().
///
/// Errors, with cache and blob as they were: null_pointer; bad_snapshot (not a snapshot, of another
/// version, damaged, cut off or with bytes behind it: the checksum covers all); shape_mismatch
/// (heads, layer_heads, widths, types, positions, log mass or states are others);
/// destination_too_small; destination_overlaps (the snapshot lies in the cache's memory);
/// invalid_rope (the cache's rotation is another); out_of_memory. O(bytes).
[[nodiscard]] inline Status restore(std::span<const std::byte> snapshot, RaggedKVCache& cache,
                                    std::span<const std::byte>& blob) noexcept {
  using detail::ByteRange;
  detail::snapshot::Contents contents;
  KVLEAN_RETURN_IF_ERROR(detail::snapshot::read(snapshot, contents));
  if (const RopeSpec* rope = cache.rope()) {
    const bool agrees = contents.with_rope ? detail::snapshot::same_rotation(contents, *rope)
                                           : contents.rope_pairing == RopePairing::none ||
                                                 contents.rope_pairing == rope->pairing;
    if (!agrees) return StatusCode::invalid_rope;
  }
  if (cache.num_kv_heads() == 0) {
    RaggedKVCache made;
    KVLEAN_RETURN_IF_ERROR(made.allocate(contents.shape));
    if (cache.rope() != nullptr) made.set_rope(cache.rope());
    KVLEAN_RETURN_IF_ERROR(detail::snapshot::fill(contents, made));
    cache = std::move(made);
  } else {
    if (!detail::snapshot::same_slots(contents.shape, cache.shape())) {
      return StatusCode::shape_mismatch;
    }
    const std::span<const std::byte> storage = cache.storage();
    if (ByteRange::of(snapshot.data(), snapshot.size())
            .overlaps(ByteRange::of(storage.data(), storage.size()))) {
      return StatusCode::destination_overlaps;
    }
    KVLEAN_RETURN_IF_ERROR(detail::snapshot::fill(contents, cache));
  }
  blob = contents.blob;
  return StatusCode::ok;
}

/// The same when no blob is wanted.
[[nodiscard]] inline Status restore(std::span<const std::byte> snapshot,
                                    RaggedKVCache& cache) noexcept {
  std::span<const std::byte> blob;
  return restore(snapshot, cache, blob);
}

/// The caller's bytes of a snapshot, without a cache. Errors: null_pointer, bad_snapshot. O(bytes).
[[nodiscard]] inline Status snapshot_blob(std::span<const std::byte> snapshot,
                                          std::span<const std::byte>& blob) noexcept {
  detail::snapshot::Contents contents;
  KVLEAN_RETURN_IF_ERROR(detail::snapshot::read(snapshot, contents));
  blob = contents.blob;
  return StatusCode::ok;
}

/// The shape of a snapshot, to bind memory before restore(). Errors: null_pointer, bad_snapshot.
/// O(bytes).
[[nodiscard]] inline Status snapshot_shape(std::span<const std::byte> snapshot,
                                           RaggedShape& shape) noexcept {
  detail::snapshot::Contents contents;
  KVLEAN_RETURN_IF_ERROR(detail::snapshot::read(snapshot, contents));
  shape = contents.shape;
  return StatusCode::ok;
}

/// How a snapshot's keys are rotated. Frequency factors, where it has any, are copied to the front
/// of `frequency_factors` (dims / 2 of them), to which the spec then points. Errors, with nothing
/// changed: null_pointer, bad_snapshot, needs_rope (none was saved), destination_too_small.
/// O(bytes).
[[nodiscard]] inline Status snapshot_rope(std::span<const std::byte> snapshot, RopeSpec& rope,
                                          std::span<float> frequency_factors = {}) noexcept {
  detail::snapshot::Contents contents;
  KVLEAN_RETURN_IF_ERROR(detail::snapshot::read(snapshot, contents));
  if (!contents.with_rope) return StatusCode::needs_rope;
  if (frequency_factors.size() < contents.factors) return StatusCode::destination_too_small;
  detail::snapshot::copy_elements(frequency_factors.data(), contents.factor_bytes, contents.factors,
                                  sizeof(float));
  rope = contents.rope;
  if (contents.factors != 0) rope.frequency_factors = frequency_factors.data();
  return StatusCode::ok;
}

KVLEAN_NAMESPACE_END
