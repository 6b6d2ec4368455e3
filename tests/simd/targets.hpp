// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
// What the tests of the kernels share: the targets of this machine, and memory that faults.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <kvlean/simd/target.hpp>
#include <vector>

namespace kvlean_test {

/// Every target that this CPU can run, scalar first.
inline std::vector<kvlean::simd::Target> targets() {
  using kvlean::simd::Target;
  std::vector<Target> all{Target::scalar};
  for (const Target target : {Target::avx2, Target::avx512, Target::amx, Target::neon}) {
    if (kvlean::simd::supported(target)) all.push_back(target);
  }
  return all;
}

/// `bytes` bytes between two pages that must not be touched: `end()` is the first byte of one.
class GuardedBytes {
 public:
  explicit GuardedBytes(std::size_t bytes)
      : page_(static_cast<std::size_t>(sysconf(_SC_PAGESIZE))),
        whole_((bytes + page_ - 1) / page_ * page_),
        bytes_(bytes) {
    void* memory = mmap(nullptr, whole_ + 2 * page_, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) std::abort();
    base_ = static_cast<std::byte*>(memory);
    if (mprotect(base_, page_, PROT_NONE) != 0 ||
        mprotect(base_ + page_ + whole_, page_, PROT_NONE) != 0) {
      std::abort();
    }
  }
  GuardedBytes(const GuardedBytes&) = delete;
  GuardedBytes& operator=(const GuardedBytes&) = delete;
  ~GuardedBytes() { munmap(base_, whole_ + 2 * page_); }

  /// The bytes that end at the upper guard, or that begin at the lower one.
  [[nodiscard]] std::byte* last() const { return base_ + page_ + whole_ - bytes_; }
  [[nodiscard]] std::byte* first() const { return base_ + page_; }

 private:
  std::size_t page_;
  std::size_t whole_;
  std::size_t bytes_;
  std::byte* base_ = nullptr;
};

}  // namespace kvlean_test
