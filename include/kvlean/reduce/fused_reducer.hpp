// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/core/concepts.hpp"

KVLEAN_NAMESPACE_BEGIN

/// A reducer that can also carry out its plan in place as it makes it, without the plan: what
/// compress() calls where it is offered. The result has the bits of reduce() and apply(), lengths,
/// positions and log mass included. `done` says whether it was done; where it wasn't, as on an
/// error, the cache is as it was. The next position stays.
template <class R>
concept FusedReducer = Reducer<R> &&
    requires(const R& reducer, CacheView& cache, const Scores& scores, const u32* limit,
             Context& context, bool& done) {
  { reducer.reduce_in_place(cache, scores, limit, context, done) }
  noexcept->std::same_as<Status>;
};

KVLEAN_NAMESPACE_END
