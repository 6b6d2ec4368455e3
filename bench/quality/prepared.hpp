// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <vector>

#include "bench/io/capture.hpp"
#include "kvlean/attention/attend.hpp"
#include "kvlean/core/kv_cache.hpp"
#include "kvlean/core/workspace.hpp"

namespace kvlean::bench {

/// A captured tensor [head][token][dim] as the library takes it; read-only.
class CapturedTensor {
 public:
  /// Tokens [first, first + count) of `tensor`, which must outlive this.
  CapturedTensor(const io::Tensor& tensor, std::size_t first, std::size_t count);
  [[nodiscard]] Rows rows() const noexcept { return rows_; }

 private:
  Rows rows_;
};

/// One captured layer, ready for every job: views over the capture, and what does not depend on the
/// policy, computed once.
struct PreparedLayer {
  CacheView prefix;  ///< the context: what a policy compresses; points at `rope`
  RopeSpec rope;     ///< as the capture says; scalings aren't stored in captures
  Observation seen;  ///< context queries only, and the attention mass of all of them
  AttentionSpec spec;
  Queries future;           ///< the queries after the context, which no policy sees
  AttentionShape shape;     ///< of their output
  std::vector<float> mass;  ///< [kv_heads][context]
  double seconds_mass = 0.0;
  std::vector<float> reference_values;  ///< [query_heads][future][value_width], nothing compressed
  std::vector<float> reference_lse;
  std::vector<float> tail_values;  ///< the same over the uncompressed tail alone
  std::vector<float> tail_lse;

  /// Bytes of one token's key and value.
  [[nodiscard]] u64 row_bytes() const noexcept {
    return u64{prefix.keys.width} * size_bytes(prefix.keys.dtype) +
           u64{prefix.values.width} * size_bytes(prefix.values.dtype);
  }
};

/// Fills `result` from layer `layer` of a valid capture, which must outlive it. The mass is
/// computed only if `with_mass`.
[[nodiscard]] Status prepare_layer(const io::Capture& capture, std::size_t layer, bool with_mass,
                                   PreparedLayer& result);

/// A clock for the records. It counts the processor time of the calling thread, which does all the
/// work of a job: other jobs and other programs do not disturb it.
class Stopwatch {
 public:
  Stopwatch();
  /// Seconds of processor time since construction.
  [[nodiscard]] double seconds() const;

 private:
  i64 start_nanoseconds_;
};

}  // namespace kvlean::bench
