// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0

// An engine with a block table: pages of 16 tokens, all heads of a page together, a pool shared by
// many sequences. Shown: compaction inside the pages with heads that differ, and dropping whole
// pages for engines whose heads must share tokens.

#include <cstdio>
#include <numeric>
#include <random>
#include <vector>

#include "kvlean/kvlean.hpp"

int main() {
  using namespace kvlean;
  constexpr std::size_t page_tokens = 16, pool_pages = 64, kv_heads = 4, dim = 64;
  constexpr std::size_t tokens = 300;  // the 19th page holds 12
  constexpr std::size_t pages = (tokens + page_tokens - 1) / page_tokens;

  // The pool: [page][kv_head][token][dim]. This sequence's pages lie scattered in it.
  std::vector<f16> key_pool(pool_pages * kv_heads * page_tokens * dim), value_pool(key_pool.size());
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  for (f16& x : key_pool) x = f16(normal(random));
  for (f16& x : value_pool) x = f16(normal(random));
  std::vector<i32> all_pages(pool_pages);
  std::iota(all_pages.begin(), all_pages.end(), 0);
  std::shuffle(all_pages.begin(), all_pages.end(), random);
  std::vector<i32> table(all_pages.begin(), all_pages.begin() + pages);

  const Extents extents{.kv_heads = kv_heads, .tokens = pages * page_tokens, .dim = dim};
  const Strides in_page{.head = page_tokens * dim, .token = dim, .dim = 1};
  const std::ptrdiff_t page_stride = kv_heads * page_tokens * dim;
  Workspace workspace;

  // 1. Heads of their own: each keeps other tokens, moved together in place. The pages behind the
  //    longest head are free afterwards.
  std::vector<u32> lengths(kv_heads, tokens);
  std::vector<i32> positions(kv_heads * pages * page_tokens);
  for (std::size_t i = 0; i < positions.size(); ++i) {
    positions[i] = static_cast<i32>(i % (pages * page_tokens));
  }
  auto cache =
      KVCache(paged(key_pool.data(), extents, in_page, page_stride, page_tokens, table),
              paged(value_pool.data(), extents, in_page, page_stride, page_tokens, table))
          .set_length(tokens)
          .set_lengths(lengths.data())
          .set_positions({positions.data(), u64{pages * page_tokens}}, static_cast<i32>(tokens));
  const auto per_head = compose(KeyNormScorer{}, AdaKVAllocator{}, EvictReducer{});
  if (Status s = per_head.compress(cache, {}, Budget::fraction(0.5), workspace); !s) {
    std::fprintf(stderr, "per head: %s\n", s.message());
    return 1;
  }
  u32 longest = 0;
  for (std::size_t head = 0; head < kv_heads; ++head) {
    std::printf("head %zu: %u tokens\n", head, lengths[head]);
    longest = std::max(longest, lengths[head]);
  }
  std::printf("pages in use: %u of %zu\n", pages_used(longest, page_tokens), pages);

  // 2. One set of whole pages for all heads: no row moves, only the table shrinks.
  auto shared = KVCache(paged(key_pool.data(), extents, in_page, page_stride, page_tokens, table),
                        paged(value_pool.data(), extents, in_page, page_stride, page_tokens, table))
                    .set_length(200);
  PlanOptions options;
  options.sharing = Sharing::whole_pages(page_tokens);
  CompressionPlan plan;
  const KeyNormPolicy policy;
  if (Status s = policy.plan(shared, {}, Budget::fraction(0.5), workspace, plan, options); !s) {
    std::fprintf(stderr, "whole pages, plan: %s\n", s.message());
    return 1;
  }
  std::size_t pages_kept = 0;
  if (Status s = apply_to_page_table(plan, shared, table, pages_kept); !s) {
    std::fprintf(stderr, "whole pages, apply: %s\n", s.message());
    return 1;
  }
  std::printf("whole pages kept: %zu, tokens %zu\n", pages_kept, shared.length());
  return 0;
}
