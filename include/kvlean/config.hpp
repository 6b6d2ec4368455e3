// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>

#include "kvlean/version.hpp"

// Everything lives in kvlean::v0_1 (inline), so that two versions can share a process.
#define KVLEAN_NAMESPACE_BEGIN \
  namespace kvlean {           \
  inline namespace v0_1 {
#define KVLEAN_NAMESPACE_END \
  }                          \
  }

/// Internal consistency check. Off by default; define it before the first include to turn it on.
/// Never used for caller errors: those return a Status.
#ifndef KVLEAN_ASSERT
#define KVLEAN_ASSERT(condition) static_cast<void>(0)
#endif

KVLEAN_NAMESPACE_BEGIN

using i32 = std::int32_t;
using i64 = std::int64_t;
using u8 = std::uint8_t;
using u16 = std::uint16_t;
using u32 = std::uint32_t;
using u64 = std::uint64_t;

/// Widest key or value row, in elements, that kernels accept: rows pass through stack buffers.
inline constexpr u32 max_row_width = 2048;

KVLEAN_NAMESPACE_END
