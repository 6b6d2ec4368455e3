// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
// The least that a kernel can cost: the bytes it must read and write, moved by nothing else.
#pragma once

#include <cstddef>
#include <kvlean/core/executor.hpp>
#include <span>

namespace kvlean::ratio {

/// Reads every byte once and adds up what it finds, each thread a part of it as `streams` (1 or 8)
/// equal pieces side by side.
void read_bytes(std::span<const std::byte> bytes, const Executor& executor, u32 streams = 8);

/// memcpy, each thread a part. No overlap.
void copy_bytes(std::byte* to, std::span<const std::byte> from, const Executor& executor);

/// Writes every byte past the caches (where the CPU can), each thread a part.
void write_bytes(std::span<std::byte> bytes, const Executor& executor);

}  // namespace kvlean::ratio
