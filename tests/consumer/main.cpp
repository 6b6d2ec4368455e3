// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#include <cstdio>
#include <kvlean/kvlean.hpp>

int main() {
  std::printf("KVLean %d.%d.%d\n", KVLEAN_VERSION_MAJOR, KVLEAN_VERSION_MINOR,
              KVLEAN_VERSION_PATCH);
  return 0;
}
