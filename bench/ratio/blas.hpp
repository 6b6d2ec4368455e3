// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
// OpenBLAS, if the machine has it: found when the program starts, linked to nothing.
#pragma once

#include <kvlean/config.hpp>
#include <string>
#include <vector>

namespace kvlean::ratio {

class Blas {
 public:
  /// Loads the library and binds its threads to `cpus` past the first, which is the caller's.
  explicit Blas(const std::vector<int>& cpus);
  [[nodiscard]] bool present() const { return sgemm_ != nullptr; }
  /// What the library calls itself.
  [[nodiscard]] const std::string& version() const { return version_; }
  void set_threads(u32 threads) const;
  /// out[m][n] = a[m][k] b[n][k]^T, row-major.
  void multiply_transposed(u32 m, u32 n, u32 k, const float* a, const float* b, float* out) const;

 private:
  using Sgemm = void (*)(int, int, int, int, int, int, float, const float*, int, const float*, int,
                         float, float*, int);
  Sgemm sgemm_ = nullptr;
  void (*set_threads_)(int) = nullptr;
  std::string version_;
};

}  // namespace kvlean::ratio
