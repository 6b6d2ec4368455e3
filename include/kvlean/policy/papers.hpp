// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/allocate/adakv.hpp"
#include "kvlean/allocate/adakv_layers.hpp"
#include "kvlean/allocate/pyramid.hpp"
#include "kvlean/allocate/uniform.hpp"
#include "kvlean/policy/policy.hpp"
#include "kvlean/reduce/cam.hpp"
#include "kvlean/reduce/evict.hpp"
#include "kvlean/reduce/kvmerger.hpp"
#include "kvlean/score/h2o.hpp"
#include "kvlean/score/key_diff.hpp"
#include "kvlean/score/key_norm.hpp"
#include "kvlean/score/random.hpp"
#include "kvlean/score/rkv.hpp"
#include "kvlean/score/snapkv.hpp"
#include "kvlean/score/streaming_llm.hpp"
#include "kvlean/score/tova.hpp"

// The papers' methods as compositions. Each is a Policy whose stages can be changed after
// construction; docs/policies.md has a section for each.

KVLEAN_NAMESPACE_BEGIN

/// H2O (NeurIPS 2023): heavy hitters by accumulated attention, and half of the budget to the
/// newest.
struct H2OPolicy : Policy<H2OScorer, UniformAllocator, EvictReducer> {
  constexpr H2OPolicy() noexcept : Policy({}, {}, EvictReducer{.recent_share = 0.5f}) {}
};

/// SnapKV (arXiv 2404.14469): pooled attention of the last queries.
struct SnapKVPolicy : Policy<SnapKVScorer, UniformAllocator, EvictReducer> {
  constexpr SnapKVPolicy() noexcept : Policy({}, {}, {}) {}
};

/// StreamingLLM (arXiv 2309.17453): sinks and the newest tokens.
struct StreamingLLMPolicy : Policy<StreamingLLMScorer, UniformAllocator, EvictReducer> {
  constexpr StreamingLLMPolicy() noexcept : Policy({}, {}, {}) {}
};

/// TOVA (arXiv 2401.06104): attention of the last query, the same tokens for all heads.
struct TOVAPolicy : Policy<TOVAScorer, UniformAllocator, EvictReducer> {
  constexpr TOVAPolicy() noexcept : Policy({}, {}, {}) {}
};

/// Keys of small norm attract attention (arXiv 2406.11430).
struct KeyNormPolicy : Policy<KeyNormScorer, UniformAllocator, EvictReducer> {
  constexpr KeyNormPolicy() noexcept : Policy({}, {}, {}) {}
};

/// Keys unlike the others attract attention (arXiv 2504.15364).
struct KeyDiffPolicy : Policy<KeyDiffScorer, UniformAllocator, EvictReducer> {
  constexpr KeyDiffPolicy() noexcept : Policy({}, {}, {}) {}
};

/// Seeded random choice among the unprotected: the baseline every scorer must beat.
struct RandomPolicy : Policy<RandomScorer, UniformAllocator, EvictReducer> {
  constexpr RandomPolicy() noexcept : Policy({}, {}, {}) {}
};

/// R-KV (arXiv 2505.24133): importance less redundancy, meant for decoding: the authors compress
/// every 128 tokens (BudgetedOptions::compress_every) and keep the last 8.
struct RKVPolicy : Policy<RKVScorer, UniformAllocator, EvictReducer> {
  constexpr RKVPolicy() noexcept : Policy({}, {}, {}) {}
};

/// PyramidKV (arXiv 2406.02069): SnapKV scores, linearly falling layer budgets.
struct PyramidKVPolicy : Policy<SnapKVScorer, PyramidAllocator<>, EvictReducer> {
  constexpr PyramidKVPolicy() noexcept : Policy({}, {}, {}) {}
};

/// Ada-SnapKV (arXiv 2407.11550): SnapKV scores, budgets per head.
struct AdaKVPolicy : Policy<SnapKVScorer, AdaKVAllocator, EvictReducer> {
  constexpr AdaKVPolicy() noexcept : Policy({}, {}, {}) {}
};

/// CaM (ICML 2024) over StreamingLLM, as in the authors' code: call it with one token over the
/// budget at every decode step, and the accumulated attention in the observation.
struct CaMPolicy : Policy<StreamingLLMScorer, UniformAllocator, CaMReducer> {
  constexpr CaMPolicy() noexcept : Policy({}, {}, {}) {}
};

/// KVMerger (arXiv 2407.08454): merging sets of similar neighbours, accumulated attention as score.
struct KVMergerPolicy : Policy<H2OScorer, UniformAllocator, KVMergerReducer> {
  constexpr explicit KVMergerPolicy(KVMergerReducer options = {}) noexcept
      : Policy({}, {}, options) {}
};

KVLEAN_NAMESPACE_END
