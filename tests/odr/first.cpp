// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#include "tests/odr/units.hpp"
#include "tests/odr/work.hpp"

std::uint64_t first_unit() { return use_the_library(); }
const void* first_unit_constant() { return &kvlean::max_row_width; }
