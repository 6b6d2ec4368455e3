// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
// main() of the tests where Catch2 is the single header of version 2.
#define CATCH_CONFIG_MAIN
#include <catch2/catch.hpp>
