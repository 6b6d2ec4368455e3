// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/allocate/adakv_layers.hpp"
#include "kvlean/allocate/uniform.hpp"
#include "kvlean/cuda/select_options.cuh"
#include "kvlean/policy/policy.hpp"
#include "kvlean/reduce/evict.hpp"

KVLEAN_CUDA_NAMESPACE_BEGIN

/// A policy on the device: the CPU library's scorer and reducer structs, and the options of
/// allocation and selection (whose budget is an argument of plan() and compress(), and whose
/// recent_share is the EvictReducer's).
template <class S, class R = EvictReducer>
struct Policy {
  S scorer = {};
  SelectOptions select = {};
  R reducer = {};
  u64 seed = 0;  ///< for methods that draw
  u32 step = 0;

  constexpr Policy() noexcept = default;
  explicit constexpr Policy(S scorer_stage, const SelectOptions& options = {},
                            R reducer_stage = {}) noexcept
      : scorer(scorer_stage), select(options), reducer(reducer_stage) {}
};

namespace detail {

inline void set_allocator(const UniformAllocator&, SelectOptions& options) noexcept {
  options.allocator = AllocatorKind::uniform;
}
inline void set_allocator(const AdaKVAllocator& from, SelectOptions& options) noexcept {
  options.allocator = AllocatorKind::adakv;
  options.safeguard = from.safeguard;
  options.mode = from.mode;
  options.normalize = from.normalize;
  options.head_weight = from.head_weight;
  options.head_weight_stride = from.head_weight_stride;
}
inline void set_allocator(const AdaKVLayersAllocator& from, SelectOptions& options) noexcept {
  options.allocator = AllocatorKind::adakv_layers;
  options.safeguard = from.safeguard;
  options.head_weight = from.head_weight;
  options.head_weight_stride = from.head_weight_stride;
}
template <class Heads>
void set_allocator(const PyramidAllocator<Heads>& from, SelectOptions& options) noexcept {
  set_allocator(from.heads, options);
  options.allocator = options.allocator == AllocatorKind::adakv ? AllocatorKind::pyramid_adakv
                                                                : AllocatorKind::pyramid;
  options.beta = from.beta;
  options.form = from.form;
  options.window = from.window;
}

}  // namespace detail

/// The same policy for the device, with what plan() takes on the CPU: `on_device(AdaKVPolicy{})`,
/// `on_device(compose(TOVAScorer{}, UniformAllocator{}, EvictReducer{}), options)`. An allocator's
/// head_weight must point to device memory. The executor is not used.
template <class S, class A, class R>
[[nodiscard]] Policy<S, R> on_device(const kvlean::Policy<S, A, R>& policy,
                                     const PlanOptions& options = {}) noexcept {
  Policy<S, R> result(policy.scorer, {}, policy.reducer);
  detail::set_allocator(policy.allocator, result.select);
  result.select.protection = options.protection;
  result.select.sharing = options.sharing;
  result.select.layer = options.layer;
  result.select.num_layers = options.num_layers;
  result.seed = options.seed;
  result.step = options.step;
  return result;
}

KVLEAN_CUDA_NAMESPACE_END
