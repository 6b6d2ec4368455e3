// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

std::uint64_t first_unit();
const void* first_unit_constant();
std::uint64_t second_unit();  ///< may be compiled for a newer CPU
const void* second_unit_constant();
