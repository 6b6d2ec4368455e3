// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#include "bench/ratio/buffer.hpp"

#include <sys/mman.h>

#include <cstdlib>
#include <new>

namespace kvlean::ratio {

namespace {
constexpr std::size_t huge_page = std::size_t{1} << 21;
}

Buffer::Buffer(std::size_t bytes) : bytes_(bytes) {
  const std::size_t room = (bytes + huge_page - 1) / huge_page * huge_page;
  void* block = std::aligned_alloc(huge_page, room == 0 ? huge_page : room);
  if (block == nullptr) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
  if (room != 0) static_cast<void>(madvise(block, room, MADV_HUGEPAGE));  // advice only
#endif
  std::memset(block, 0, room);
  data_.reset(static_cast<std::byte*>(block));
}

void Buffer::Free::operator()(std::byte* data) const { std::free(data); }

u64 digest_of(const void* data, std::size_t bytes, u64 digest) {
  const unsigned char* at = static_cast<const unsigned char*>(data);
  for (; bytes >= sizeof(u64); bytes -= sizeof(u64), at += sizeof(u64)) {
    u64 word;
    std::memcpy(&word, at, sizeof word);
    digest = (digest ^ word) * 0x100000001b3ull;
    digest ^= digest >> 29;  // whole words at a time, so spread the high bits
  }
  for (; bytes != 0; --bytes, ++at) digest = (digest ^ *at) * 0x100000001b3ull;
  return digest;
}

}  // namespace kvlean::ratio
