// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

// The single source of the version: CMake reads these lines.
#define KVLEAN_VERSION_MAJOR 0
#define KVLEAN_VERSION_MINOR 1
#define KVLEAN_VERSION_PATCH 0

/// One comparable integer: 10000 * major + 100 * minor + patch.
#define KVLEAN_VERSION \
  (KVLEAN_VERSION_MAJOR * 10000 + KVLEAN_VERSION_MINOR * 100 + KVLEAN_VERSION_PATCH)
