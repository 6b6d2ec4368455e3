// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
// Includes Catch2, version 3 or the single header of version 2 (Debian 12), and makes these names
// the same in both: `Approx`, `ContainsSubstring`, `WithinAbs`, `WithinRel`.
#pragma once

#if __has_include(<catch2/catch_all.hpp>)
#include <catch2/catch_all.hpp>
using Catch::Approx;
using Catch::Matchers::ContainsSubstring;
#else
#include <catch2/catch.hpp>
#include <string>
inline auto ContainsSubstring(const std::string& text) { return Catch::Matchers::Contains(text); }
#endif
using Catch::Matchers::WithinAbs;
using Catch::Matchers::WithinRel;
