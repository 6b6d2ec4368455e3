// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#include "bench/ratio/floors.hpp"

#include <algorithm>
#include <atomic>
#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace kvlean::ratio {

namespace {

constexpr std::size_t line = 64;

struct Words {
  u64 word[line / sizeof(u64)];
};

std::atomic<u64> sink;  // so that nothing is optimised away

template <u32 streams>
void read_part(std::span<const std::byte> bytes) {
  const std::size_t piece = bytes.size() / streams / line * line;
  u64 sum[streams][2] = {};
#if defined(__SSE2__)
  __m128i total[streams] = {};
  for (std::size_t at = 0; at < piece; at += line) {
    for (u32 s = 0; s < streams; ++s) {
      const std::byte* from = bytes.data() + s * piece + at;
      __builtin_prefetch(from + 1024);
      for (std::size_t part = 0; part < line; part += sizeof(__m128i)) {
        total[s] =
            _mm_add_epi64(total[s], _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + part)));
      }
    }
  }
  for (u32 s = 0; s < streams; ++s) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(sum[s]), total[s]);
  }
#else
  for (std::size_t at = 0; at < piece; at += line) {
    for (u32 s = 0; s < streams; ++s) {
      Words words;
      std::memcpy(&words, bytes.data() + s * piece + at, line);
      for (const u64 word : words.word) sum[s][0] += word;
    }
  }
#endif
  u64 all = 0;
  for (const auto& pair : sum) all += pair[0] + pair[1];
  for (std::size_t at = piece * streams; at < bytes.size(); ++at) {
    all += static_cast<u64>(bytes[at]);
  }
  sink.fetch_add(all, std::memory_order_relaxed);
}

template <class Body>
void split(std::size_t bytes, const Executor& executor, Body&& body) {
  const u32 parts = std::max(executor.workers, 1u);
  parallel_for(executor, parts, [&](u32, u32 index) noexcept {
    const std::size_t begin = bytes / line * index / parts * line;
    const std::size_t end = index + 1 == parts ? bytes : bytes / line * (index + 1) / parts * line;
    body(begin, end - begin);
  });
}

void write_part(std::span<std::byte> bytes) {
#if defined(__SSE2__)
  std::byte* at = bytes.data();
  std::byte* const end = at + bytes.size() / sizeof(__m128i) * sizeof(__m128i);
  for (; at < end; at += sizeof(__m128i)) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(at), _mm_setzero_si128());
  }
  _mm_sfence();
#else
  std::memset(bytes.data(), 0, bytes.size());
#endif
}

}  // namespace

void read_bytes(std::span<const std::byte> bytes, const Executor& executor, u32 streams) {
  split(bytes.size(), executor, [&](std::size_t begin, std::size_t count) noexcept {
    if (streams == 1) {
      read_part<1>(bytes.subspan(begin, count));
    } else {
      read_part<8>(bytes.subspan(begin, count));
    }
  });
}

void copy_bytes(std::byte* to, std::span<const std::byte> from, const Executor& executor) {
  split(from.size(), executor, [&](std::size_t begin, std::size_t count) noexcept {
    std::memcpy(to + begin, from.data() + begin, count);
  });
}

void write_bytes(std::span<std::byte> bytes, const Executor& executor) {
  split(bytes.size(), executor, [&](std::size_t begin, std::size_t count) noexcept {
    write_part(bytes.subspan(begin, count));
  });
}

}  // namespace kvlean::ratio
