// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#include <CLI/CLI.hpp>
#include <Eigen/Core>
#include <nlohmann/json.hpp>

#include "tests/support/catch.hpp"

TEST_CASE("every fetched dependency works") {
  CHECK(nlohmann::json::parse("{\"tokens\": 3}")["tokens"] == 3);
  CHECK(Eigen::Vector2f(3.0f, 4.0f).norm() == Approx(5.0f));
  CLI::App app("fallback");
  int tokens = 0;
  app.add_option("--tokens", tokens);
  app.parse("--tokens 3", false);
  CHECK(tokens == 3);
}
