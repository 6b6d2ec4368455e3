// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/allocate/adakv.hpp"
#include "kvlean/allocate/pyramid.hpp"
#include "kvlean/cuda/config.cuh"

KVLEAN_CUDA_NAMESPACE_BEGIN

/// The allocators of allocate/.
enum class AllocatorKind : u8 {
  uniform,       ///< UniformAllocator
  adakv,         ///< AdaKVAllocator: heads of a layer compete
  adakv_layers,  ///< AdaKVLayersAllocator: heads of all layers given compete
  pyramid,       ///< PyramidAllocator<UniformAllocator>
  pyramid_adakv  ///< PyramidAllocator<AdaKVAllocator>
};

/// What selection depends on besides scores and lengths: the options of the CPU's allocator, those
/// of PlanOptions, and EvictReducer's recent_share. Each sequence of a batch is a model run of its
/// own, as plan_layers() sees it.
struct SelectOptions {
  AllocatorKind allocator = AllocatorKind::uniform;
  Budget budget = Budget::fraction(1.0);
  Protection protection = {};
  Sharing sharing = {};
  float recent_share = 0.0f;                       ///< see EvictReducer
  float safeguard = 0.2f;                          ///< Ada-KV
  SafeguardMode mode = SafeguardMode::hard_floor;  ///< not adakv_layers, which has only this one
  bool normalize = false;                          ///< see AdaKVAllocator; not adakv_layers
  const float* head_weight = nullptr;              ///< DEVICE memory; see HeadWeights. null: all 1
  u32 head_weight_stride = 0;
  u32 beta = 20;  ///< PyramidKV
  PyramidForm form = PyramidForm::exact;
  u32 window = 32;     ///< PyramidKV, kvpress form
  u32 layer = 0;       ///< place of the first layer given in the model's schedule
  u32 num_layers = 0;  ///< layers of the schedule; 0: as many as are given

  [[nodiscard]] KVLEAN_HOST_DEVICE bool is_adakv() const noexcept {
    return allocator == AllocatorKind::adakv || allocator == AllocatorKind::adakv_layers ||
           allocator == AllocatorKind::pyramid_adakv;
  }
  [[nodiscard]] KVLEAN_HOST_DEVICE bool is_pyramid() const noexcept {
    return allocator == AllocatorKind::pyramid || allocator == AllocatorKind::pyramid_adakv;
  }
  /// One set of tokens serves the heads of a layer.
  [[nodiscard]] KVLEAN_HOST_DEVICE bool shares_tokens() const noexcept {
    return sharing.kind == SharingKind::same_tokens || sharing.kind == SharingKind::whole_pages;
  }
  /// Errors as the CPU's allocators and reducers have them.
  [[nodiscard]] Status check(u32 layers) const noexcept {
    KVLEAN_RETURN_IF_ERROR(budget.check());
    if (allocator > AllocatorKind::pyramid_adakv) return StatusCode::invalid_option;
    if (mode > SafeguardMode::paper_literal) return StatusCode::invalid_option;
    if (sharing.kind > SharingKind::whole_pages) return StatusCode::invalid_option;
    if (is_adakv() && !(safeguard >= 0.0f && safeguard <= 1.0f)) return StatusCode::invalid_option;
    if (!(recent_share >= 0.0f && recent_share <= 1.0f)) return StatusCode::invalid_option;
    if (sharing.kind == SharingKind::whole_pages && sharing.page_tokens == 0) {
      return StatusCode::invalid_option;
    }
    const u64 places = larger(u64{num_layers}, u64{layer} + layers);
    if (is_pyramid() && (beta < 1 || beta > 65536 || places > 16384)) {
      return StatusCode::invalid_option;
    }
    return StatusCode::ok;
  }
};

KVLEAN_CUDA_NAMESPACE_END
