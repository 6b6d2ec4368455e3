// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstring>

#include "kvlean/decode/budgeted_cache.hpp"
#include "kvlean/decode/snapshot.hpp"

KVLEAN_NAMESPACE_BEGIN

/// What is saved beside the slots: this, then the remembered queries [layer][head][query], their
/// positions and the thresholds. Only fixed-width fields, no padding.
struct BudgetedCacheBase::Saved {
  static constexpr u32 expected_version = 1;

  u32 version = expected_version;
  u32 layers = 0;
  u32 query_heads = 0;
  u32 query_dtype = 0;
  u32 window = 0;
  u32 filled = 0;
  u32 mass = 0;
  u32 tokens = 0;
  u32 contiguous = 0;
  i32 next = 0;
  i32 first_position = 0;
  u32 since = 0;
  u32 compressions = 0;
  u32 reserved = 0;
  u64 tokens_seen = 0;
};

inline std::size_t BudgetedCacheBase::blob_bytes(u32 filled) const noexcept {
  const auto& ring = ring_.shape();
  const std::size_t rows = std::size_t{ring.layers} * ring.query_heads * filled;
  return sizeof(Saved) + rows * ring.width * size_bytes(ring.dtype) + filled * sizeof(i32) +
         segments() * sizeof(float);
}

inline std::size_t BudgetedCacheBase::snapshot_bytes() const noexcept {
  return is_bound() ? kvlean::snapshot_bytes(cache_, blob_bytes(ring_.place().filled)) : 0;
}

inline Status BudgetedCacheBase::save(std::span<std::byte> out, std::size_t& written,
                                      Workspace& workspace) noexcept {
  written = 0;
  if (!is_bound()) return StatusCode::invalid_shape;
  if (tentative() != 0) return StatusCode::invalid_option;
  const u32 filled = ring_.place().filled;
  const WorkspaceScope scope(workspace);
  const std::size_t bytes = blob_bytes(filled);
  std::byte* blob = workspace.take<std::byte>(bytes);
  if (blob == nullptr) return workspace.exhausted();
  std::byte* at = blob;
  const auto put = [&at](const void* data, std::size_t size) noexcept {
    if (size != 0) std::memcpy(at, data, size);
    at += size;
  };
  Saved saved;
  saved.layers = layers();
  saved.query_heads = query_heads();
  saved.query_dtype = static_cast<u32>(options_.query_dtype);
  saved.window = static_cast<u32>(options_.window);
  saved.filled = filled;
  saved.mass = options_.accumulate_mass ? 1 : 0;
  saved.tokens = options_.count_tokens ? 1 : 0;
  saved.contiguous = options_.positions == Positions::contiguous ? 1 : 0;
  saved.next = next_;
  saved.first_position = first_position_;
  saved.since = since_;
  saved.compressions = compressions_;
  saved.tokens_seen = tokens_seen_;
  put(&saved, sizeof saved);
  const std::size_t row = ring_.shape().width * size_bytes(options_.query_dtype);
  for (u32 l = 0; filled != 0 && l < layers(); ++l) {
    const Rows rows = ring_.rows(l);
    for (u32 head = 0; head < query_heads(); ++head) {
      for (u32 i = 0; i < filled; ++i) put(row_address(rows, head, i), row);
    }
  }
  put(ring_.positions().data(), filled * sizeof(i32));
  put(threshold_, segments() * sizeof(float));
  return kvlean::save(cache_, out, written, {blob, bytes});
}

inline Status BudgetedCacheBase::restore(std::span<const std::byte> snapshot) noexcept {
  if (!is_bound()) return StatusCode::invalid_shape;
  std::span<const std::byte> blob;
  KVLEAN_RETURN_IF_ERROR(snapshot_blob(snapshot, blob));
  Saved saved;
  if (blob.size() < sizeof saved) return StatusCode::bad_snapshot;
  std::memcpy(&saved, blob.data(), sizeof saved);
  if (saved.version != Saved::expected_version) return StatusCode::bad_snapshot;
  const bool same = saved.layers == layers() && saved.query_heads == query_heads() &&
                    saved.query_dtype == static_cast<u32>(options_.query_dtype) &&
                    saved.window == options_.window &&
                    saved.mass == (options_.accumulate_mass ? 1u : 0u) &&
                    saved.tokens == (options_.count_tokens ? 1u : 0u) &&
                    saved.contiguous == (options_.positions == Positions::contiguous ? 1u : 0u);
  if (!same) return StatusCode::shape_mismatch;
  if (saved.filled > saved.window || blob.size() != blob_bytes(saved.filled) || saved.next < 0 ||
      saved.first_position < 0) {
    return StatusCode::bad_snapshot;
  }
  KVLEAN_RETURN_IF_ERROR(kvlean::restore(snapshot, cache_));
  cache_.set_rope(options_.rope);
  cache_.respace();
  ring_.go_to({0, saved.filled});
  const std::byte* at = blob.data() + sizeof saved;
  const auto get = [&at](void* data, std::size_t size) noexcept {
    if (size != 0) std::memcpy(data, at, size);
    at += size;
  };
  const std::size_t row = ring_.shape().width * size_bytes(options_.query_dtype);
  for (u32 l = 0; saved.filled != 0 && l < layers(); ++l) {
    const Rows rows = ring_.rows(l);
    for (u32 head = 0; head < query_heads(); ++head) {
      for (u32 i = 0; i < saved.filled; ++i) get(row_address(rows, head, i), row);
    }
  }
  get(ring_.positions().data(), saved.filled * sizeof(i32));
  get(threshold_, segments() * sizeof(float));
  for (Step& step : steps()) step = {};
  next_ = saved.next;
  cache_.set_next_position(next_);
  first_position_ = saved.first_position;
  tokens_seen_ = saved.tokens_seen;
  since_ = saved.since;
  compressions_ = saved.compressions;
  return StatusCode::ok;
}

KVLEAN_NAMESPACE_END
