// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#include "bench/ratio/blas.hpp"

#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>

#include "bench/ratio/machine.hpp"

namespace kvlean::ratio {

Blas::Blas(const std::vector<int>& cpus) {
  // Its threads otherwise keep spinning for a while after every call, beside what runs next.
  setenv("OPENBLAS_THREAD_TIMEOUT", "14", 0);
  const std::vector<int> before = thread_ids();
  void* library = dlopen("libopenblas.so.0", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) library = dlopen("libopenblas.so", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) return;
  set_threads_ = reinterpret_cast<void (*)(int)>(dlsym(library, "openblas_set_num_threads"));
  sgemm_ = reinterpret_cast<Sgemm>(dlsym(library, "cblas_sgemm"));
  if (set_threads_ == nullptr) sgemm_ = nullptr;
  const auto config = reinterpret_cast<const char* (*)()>(dlsym(library, "openblas_get_config"));
  const auto core = reinterpret_cast<const char* (*)()>(dlsym(library, "openblas_get_corename"));
  if (config != nullptr) version_ = config();
  if (core != nullptr && version_.find(core()) == std::string::npos) {
    version_ += std::string(" ") + core();
  }
  std::size_t next = 1;
  for (const int thread : thread_ids()) {
    if (std::find(before.begin(), before.end(), thread) != before.end() || cpus.empty()) continue;
    bind_thread(thread, {cpus[next++ % cpus.size()]});
  }
}

void Blas::set_threads(u32 threads) const {
  if (set_threads_ != nullptr) set_threads_(static_cast<int>(threads));
}

void Blas::multiply_transposed(u32 m, u32 n, u32 k, const float* a, const float* b,
                               float* out) const {
  constexpr int row_major = 101;
  constexpr int plain = 111;
  constexpr int transposed = 112;
  const int rows = static_cast<int>(m);
  const int columns = static_cast<int>(n);
  const int depth = static_cast<int>(k);
  sgemm_(row_major, plain, transposed, rows, columns, depth, 1.0f, a, depth, b, depth, 0.0f, out,
         columns);
}

}  // namespace kvlean::ratio
