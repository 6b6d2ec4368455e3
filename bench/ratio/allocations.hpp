// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
// Counts what the whole program takes from operator new, on any thread.
#pragma once

#include <kvlean/config.hpp>

namespace kvlean::ratio {

[[nodiscard]] u64 allocations_so_far();

}  // namespace kvlean::ratio
