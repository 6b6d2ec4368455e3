// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

// Every group of kernels. The one unit that compiles them for a program with
// KVLEAN_SEPARATE_KERNELS is this header after `#define KVLEAN_KERNELS_UNIT`.
#include "kvlean/simd/attention_kernels.hpp"
#include "kvlean/simd/matrix_kernels.hpp"
#include "kvlean/simd/merge_kernels.hpp"
#include "kvlean/simd/move_kernels.hpp"
#include "kvlean/simd/row_kernels.hpp"
#include "kvlean/simd/select_kernels.hpp"
