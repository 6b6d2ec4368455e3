// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

// Carrying out a plan:
//   apply(plan, cache, in_place)            in the cache's own memory
//   apply(plan, cache, ragged_cache)        into another cache, perhaps of another type
//   apply_to_page_table(plan, cache, ...)   by dropping whole pages
//   renumber(plans, caches, workspace)      before: contiguous positions for what is kept
//   apply_state(plan, state, rule)          for the caller's own state of each token

#include "kvlean/apply/in_place.hpp"   // IWYU pragma: export
#include "kvlean/apply/pages.hpp"      // IWYU pragma: export
#include "kvlean/apply/renumber.hpp"   // IWYU pragma: export
#include "kvlean/apply/state.hpp"      // IWYU pragma: export
#include "kvlean/apply/to_ragged.hpp"  // IWYU pragma: export
