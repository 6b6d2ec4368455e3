// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

// The front door: everything that needs only the standard library.

#include "kvlean/config.hpp"
#include "kvlean/core/budget.hpp"
#include "kvlean/core/concepts.hpp"
#include "kvlean/core/dtype.hpp"
#include "kvlean/core/executor.hpp"
#include "kvlean/core/kv_cache.hpp"
#include "kvlean/core/plan.hpp"
#include "kvlean/core/random.hpp"
#include "kvlean/core/tensor.hpp"
#include "kvlean/core/workspace.hpp"
#include "kvlean/observe/observation.hpp"
#include "kvlean/status.hpp"
#include "kvlean/version.hpp"
