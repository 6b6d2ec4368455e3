// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
// One decode step over a compressed layer, and appending to it.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "bench/ratio/floors.hpp"
#include "bench/ratio/oracle.hpp"

namespace kvlean::ratio {

namespace {

constexpr u32 appends = 32;  // of one timed run: one alone is too short for the clock

/// Ragged caches of the same head lengths, as many copies as no cache holds.
struct Copies {
  std::vector<RaggedKVCache> caches;
  u64 tokens = 0;

  Copies(const std::vector<u32>& lengths, DType dtype, std::size_t copies, u32 room) {
    tokens = std::accumulate(lengths.begin(), lengths.end(), u64{0});
    Draws draws(31);
    for (std::size_t copy = 0; copy < copies; ++copy) {
      caches.emplace_back();
      RaggedShape shape = RaggedShape::flat(kv_heads, dim, dtype, tokens + kv_heads * room);
      if (!caches[copy].allocate(shape) || !caches[copy].set_lengths(lengths)) {
        throw std::bad_alloc();
      }
      fill(caches[copy], copy, draws);
      if (room != 0) caches[copy].respace();
    }
  }
  [[nodiscard]] std::size_t bytes() const {
    return tokens * 2 * dim * size_bytes(caches[0].shape().key_dtype);
  }
  /// Keys and values lie in one piece each.
  [[nodiscard]] std::span<const std::byte> rows(std::size_t copy, bool keys) const {
    const CacheView view = caches[copy].view();
    return {row_address(keys ? view.keys : view.values, 0, 0), bytes() / 2};
  }

 private:
  void fill(RaggedKVCache& cache, std::size_t copy, Draws& draws) {
    const CacheView view = cache.view();
    const std::size_t head_bytes = dim * size_bytes(view.keys.dtype);
    for (u32 s = 0; s < kv_heads; ++s) {
      for (u32 t = 0; t < view.length(s); ++t) {
        if (view.positions) view.positions(s, t) = static_cast<i32>(t);
        std::byte* key = row_address(view.keys, s, t);
        std::byte* value = row_address(view.values, s, t);
        if (copy != 0) {
          const CacheView first = caches[0].view();
          std::memcpy(key, row_address(first.keys, s, t), head_bytes);
          std::memcpy(value, row_address(first.values, s, t), head_bytes);
          continue;
        }
        for (u32 i = 0; i < dim; ++i) {
          set_element(key, view.keys.dtype, i, draws.normal());
          set_element(value, view.values.dtype, i, draws.uniform());
        }
      }
    }
    cache.set_next_position(static_cast<i32>(view.max_length()));
  }
};

struct Decoding {
  Executor executor;
  Copies ragged;
  std::unique_ptr<Copies> even;
  std::unique_ptr<Copies> skewed;
  std::unique_ptr<Copies> little;  ///< a cache of few tokens
  std::unique_ptr<Copies> warm;    ///< one that the second cache level holds
  std::unique_ptr<Layer> paged;
  std::vector<i32> table16;
  std::vector<i32> table64;
  Buffer queries_memory;
  Buffer bias;
  Buffer output;
  Buffer new_rows;
  std::vector<Buffer> flat;  ///< where copy-append writes its new cache
  Queries asked;
  DType dtype;

  Decoding(const std::vector<u32>& lengths, DType type, const Setup& setup, std::size_t copies)
      : executor(setup.executor),
        ragged(lengths, type, copies, 0),
        queries_memory(std::size_t{query_heads} * dim * sizeof(float)),
        bias(ragged.tokens * sizeof(float)),
        output(std::size_t{query_heads} * dim * sizeof(float)),
        new_rows(2 * std::size_t{kv_heads} * dim * sizeof(float)),
        dtype(type) {
    Draws draws(32);
    for (std::size_t i = 0; i < std::size_t{query_heads} * dim; ++i) {
      set_element(queries_memory.as<void>(), dtype, i, 1.5f * draws.normal());
    }
    for (std::size_t i = 0; i < ragged.tokens; ++i) bias.as<float>()[i] = draws.uniform();
    for (std::size_t i = 0; i < 2 * std::size_t{kv_heads} * dim; ++i) {
      set_element(new_rows.as<void>(), dtype, i, draws.normal());
    }
    asked = kvlean::queries(tensor(queries_memory.as<void>(), dtype, query_heads, 1));
    asked.mask = Mask::none;
  }
  Status step(const CacheView& cache, const Queries& queries) {
    return attend(queries, cache, AttentionOutput{output.as<float>(), nullptr}, executor);
  }
  Status step(const Copies& copies, std::size_t copy, bool with_bias) {
    CacheView view = copies.caches[copy].view();
    if (with_bias)
      view.log_mass = Ragged<float>(bias.as<float>(), copies.caches[copy].offsets().data());
    return step(view, asked);
  }
  /// One query head at a time over its KV head, as if K and V had been repeated.
  Status step_by_query_head(std::size_t copy) {
    const CacheView view = ragged.caches[copy].view();
    Queries one = asked;
    one.rows.heads = kv_heads;
    one.rows.head_stride = i64{group_size} * dim;
    for (u32 g = 0; g < group_size; ++g) {
      one.rows.data = queries_memory.as<>() + std::size_t{g} * dim * size_bytes(dtype);
      KVLEAN_RETURN_IF_ERROR(step(view, one));
    }
    return StatusCode::ok;
  }
  [[nodiscard]] AnyCache paged_cache(std::size_t copy, u32 page_tokens) const {
    const std::vector<i32>& table = page_tokens == 16 ? table16 : table64;
    const auto over = [&](void* data) {
      AnyTensor result = tensor(data, dtype, kv_heads, paged->shape().tokens);
      Rows& rows = result.description;
      rows.head_stride = static_cast<i64>(page_tokens) * dim;
      rows.page_table = table.data();
      rows.page_tokens = page_tokens;
      rows.page_table_length = static_cast<u32>(table.size());
      rows.page_stride = static_cast<i64>(page_tokens) * dim * kv_heads;
      return result;
    };
    return AnyCache(over(paged->keys(copy)), over(paged->values(copy)));
  }
  Status append(Copies& copies, std::size_t copy) {
    RaggedKVCache& cache = copies.caches[copy];
    const Rows keys = tensor(new_rows.as<void>(), dtype, kv_heads, 1).rows();
    const Rows values = tensor(new_rows.as<>() + std::size_t{kv_heads} * dim * size_bytes(dtype),
                               dtype, kv_heads, 1)
                            .rows();
    for (u32 i = 0; i < appends; ++i) {
      KVLEAN_RETURN_IF_ERROR(cache.append(keys, values, 1, cache.next_position()));
    }
    return StatusCode::ok;
  }
  /// A flat cache without room: every head is copied to its new place, and a row written behind it.
  void copy_append(std::size_t copy) {
    const CacheView view = ragged.caches[copy].view();
    const std::size_t row = dim * size_bytes(dtype);
    parallel_for(executor, kv_heads, [&](u32, u32 h) noexcept {
      const std::size_t before = ragged.caches[copy].offsets()[h] * row;
      for (const bool keys : {true, false}) {
        std::byte* to = flat[keys ? 0 : 1].as<>() + before + h * row;
        const std::size_t bytes = view.length(h) * row;
        std::memcpy(to, row_address(keys ? view.keys : view.values, h, 0), bytes);
        std::memcpy(to + bytes, new_rows.as<>() + h * row, row);
      }
    });
  }

  Verdict check(const CacheView& view, const float* bias_of_all, const u64* first) {
    Verdict verdict;
    verdict.bound = 1e-4;
    verdict.error = step(view, asked).ok() ? 0.0 : HUGE_VAL;
    for (const u32 head : {u32{0}, kv_heads - 1}) {
      const u32 q = head * group_size + 1;
      std::vector<float> query(dim);
      for (u32 i = 0; i < dim; ++i) {
        query[i] = element(queries_memory.as<void>(), dtype, std::size_t{q} * dim + i);
      }
      const std::vector<double> want = attention_output(
          view, head, query, bias_of_all != nullptr ? bias_of_all + first[head] : nullptr);
      verdict.error = std::max(
          verdict.error, scaled_error({output.as<float>() + std::size_t{q} * dim, dim}, want));
    }
    verdict.good = verdict.error <= verdict.bound;
    verdict.digest = digest_of(output.as<void>(), output.bytes());
    return verdict;
  }
  Verdict check(const Copies& copies, bool with_bias) {
    CacheView view = copies.caches[0].view();
    const u64* first = copies.caches[0].offsets().data();
    if (with_bias) view.log_mass = Ragged<float>(bias.as<float>(), first);
    return check(view, with_bias ? bias.as<float>() : nullptr, first);
  }
};

std::vector<u32> ragged_lengths(u32 mean) {
  std::vector<u32> lengths;
  for (const u32 eighths : {4u, 6u, 7u, 8u, 8u, 9u, 10u, 12u}) {
    lengths.push_back(mean / 8 * eighths);
  }
  return lengths;
}

constexpr u32 full_mean = 16384;
constexpr u32 quick_mean = 4096;

Experiment build(const Setup& setup, const std::vector<std::string>& wanted, DType dtype) {
  const u32 mean = setup.quick ? quick_mean : full_mean;
  const std::size_t bytes = std::size_t{2} * kv_heads * mean * dim * size_bytes(dtype);
  const std::size_t copies = setup.copies(bytes);
  auto work = std::make_shared<Decoding>(ragged_lengths(mean), dtype, setup, copies);
  Experiment experiment;
  experiment.data = work;
  const std::string text = "32/8 heads, d 128, " + std::to_string(mean) + " tokens a head";
  const std::string isa = isa_name(vector_target());
  const auto label = [&](const char* layout) { return Label{isa, name(dtype), text, layout}; };
  experiment.label = label("ragged, heads of 0.5 to 1.5 times the mean");
  const auto add = [&](const char* variant_name, std::size_t its_copies, double its_bytes,
                       std::function<Status(std::size_t)> run) {
    Variant variant{variant_name, std::move(run)};
    variant.copies = its_copies;
    variant.bytes = its_bytes;
    experiment.variants.push_back(std::move(variant));
  };
  const double read = static_cast<double>(bytes);
  for (const u32 streams : {8u, 1u}) {
    const char* const variant_name = streams == 8 ? "pure read" : "pure read, one stream";
    if (!wants(wanted, variant_name)) continue;
    add(variant_name, copies, read, [work, streams](std::size_t copy) {
      for (const bool keys : {true, false}) {
        read_bytes(work->ragged.rows(copy, keys), work->executor, streams);
      }
      return Status();
    });
  }
  add("ragged", copies, read,
      [work](std::size_t copy) { return work->step(work->ragged, copy, false); });
  experiment.verify["ragged"] = [work] { return work->check(work->ragged, false); };
  if (wants(wanted, "ragged, bias")) {
    add("ragged, bias", copies, read,
        [work](std::size_t copy) { return work->step(work->ragged, copy, true); });
    experiment.verify["ragged, bias"] = [work] { return work->check(work->ragged, true); };
  }
  if (wants(wanted, "one query head at a time")) {
    add("one query head at a time", copies, read * group_size,
        [work](std::size_t copy) { return work->step_by_query_head(copy); });
  }
  if (wants(wanted, "even") || wants(wanted, "append")) {
    work->even = std::make_unique<Copies>(std::vector<u32>(kv_heads, mean), dtype, copies, appends);
    add("even", copies, read,
        [work](std::size_t copy) { return work->step(*work->even, copy, false); });
  }
  if (wants(wanted, "one head 8 times as long")) {
    std::vector<u32> lengths(kv_heads, mean * kv_heads / (kv_heads + 7));
    lengths[0] = mean * kv_heads - (kv_heads - 1) * lengths[1];
    work->skewed = std::make_unique<Copies>(lengths, dtype, copies, 0);
    add("one head 8 times as long", copies, read,
        [work](std::size_t copy) { return work->step(*work->skewed, copy, false); });
    experiment.verify["one head 8 times as long"] = [work] {
      return work->check(*work->skewed, false);
    };
    experiment.labels["one head 8 times as long"] = label("ragged, one head of 8 times the others");
  }
  if (wants(wanted, "pages of 16") || wants(wanted, "pages of 64")) {
    LayerShape shape;
    shape.tokens = mean;
    shape.dtype = dtype;
    work->paged = std::make_unique<Layer>(shape, copies, true);
    const auto shuffled = [](u32 pages) {
      std::vector<i32> table(pages);
      std::iota(table.begin(), table.end(), 0);
      Draws draws(33);
      for (std::size_t i = pages; i > 1; --i) std::swap(table[i - 1], table[draws.next() % i]);
      return table;
    };
    work->table16 = shuffled(mean / 16);
    work->table64 = shuffled(mean / 64);
    for (const u32 page : {16u, 64u}) {
      const char* const variant_name = page == 16 ? "pages of 16" : "pages of 64";
      add(variant_name, copies, read, [work, page](std::size_t copy) {
        return work->step(work->paged_cache(copy, page).view(), work->asked);
      });
      experiment.verify[variant_name] = [work, page] {
        const AnyCache cache = work->paged_cache(0, page);
        return work->check(cache.view(), nullptr, nullptr);
      };
      experiment.labels[variant_name] =
          label(page == 16 ? "paged16, shuffled" : "paged64, shuffled");
    }
  }
  const auto add_append = [&](const char* variant_name, Copies& caches) {
    Variant variant{variant_name,
                    [work, &caches](std::size_t copy) { return work->append(caches, copy); }};
    variant.restore = [&caches](std::size_t copy) {
      static_cast<void>(caches.caches[copy].truncate(appends).ok());
    };
    variant.copies = caches.caches.size();
    variant.repeats = appends;
    variant.bytes = 2.0 * kv_heads * dim * static_cast<double>(size_bytes(dtype));
    experiment.variants.push_back(std::move(variant));
    experiment.verify[variant_name] = [work, &caches] {
      Verdict verdict;
      const u32 before = caches.caches[0].length(0);
      verdict.good = work->append(caches, 0).ok();
      const CacheView view = caches.caches[0].view();
      verdict.good =
          verdict.good && view.length(0) == before + appends &&
          std::memcmp(row_address(view.keys, 3, view.length(3) - 1),
                      work->new_rows.as<>() + std::size_t{3} * dim * size_bytes(work->dtype),
                      dim * size_bytes(work->dtype)) == 0;
      static_cast<void>(caches.caches[0].truncate(appends).ok());
      return verdict;
    };
  };
  if (wants(wanted, "append")) add_append("append", *work->even);
  if (wants(wanted, "append to a short cache")) {
    work->little =
        std::make_unique<Copies>(std::vector<u32>(kv_heads, mean / 16), dtype, copies * 4, appends);
    add_append("append to a short cache", *work->little);
  }
  if (wants(wanted, "append by copying")) {
    const std::size_t room = (work->ragged.tokens + kv_heads) * dim * size_bytes(dtype);
    work->flat.emplace_back(room);
    work->flat.emplace_back(room);
    add("append by copying", copies, 2.0 * read, [work](std::size_t copy) {
      work->copy_append(copy);
      return Status();
    });
  }
  if (wants(wanted, "in the second cache level")) {
    constexpr u32 few = 256;
    work->warm = std::make_unique<Copies>(std::vector<u32>(kv_heads, few), dtype, 1, 0);
    const double warm_bytes = static_cast<double>(work->warm->bytes());
    constexpr u32 repeats = 16;
    add("in the second cache level", 1, warm_bytes, [work](std::size_t) {
      for (u32 i = 0; i < repeats; ++i) {
        KVLEAN_RETURN_IF_ERROR(work->step(*work->warm, 0, false));
      }
      return Status();
    });
    experiment.variants.back().repeats = repeats;
    experiment.labels["in the second cache level"] = {
        isa, name(dtype), "32/8 heads, d 128, " + std::to_string(few) + " tokens a head", "warm"};
    experiment.units["in the second cache level"] = warm_bytes;
    experiment.units["ragged"] = read;
  }
  return experiment;
}

}  // namespace

void add_decoding_groups(std::vector<Group>& groups) {
  const auto of_type = [](DType dtype) {
    return [dtype](const Setup& setup, const std::vector<std::string>& wanted) {
      return build(setup, wanted, dtype);
    };
  };
  groups.push_back(
      {{{"decode_f16", "decode attention, f16, ragged heads, against a pure read", "ragged",
         "pure read", Better::lower, 1.15, 1.03, needs_vectors},
        {"decode_f16_one", "the same against a read in one stream", "ragged",
         "pure read, one stream", Better::lower, none, none, needs_vectors},
        {"decode_bias", "the same with log mass, against without", "ragged, bias", "ragged",
         Better::lower, 1.02, none, needs_vectors},
        {"decode_pages16", "16-token pages, of flat", "pages of 16", "even", Better::lower, 1.2,
         none, needs_vectors},
        {"decode_pages64", "64-token pages, of flat", "pages of 64", "even", Better::lower, none,
         1.1, 0},
        {"decode_skew", "one head with 8 times the tokens of each other, of even heads",
         "one head 8 times as long", "even", Better::lower, 1.1, none, needs_vectors},
        {"decode_repeat_kv", "four query heads a KV row, against one at a time", "ragged",
         "one query head at a time", Better::higher, none, none, 0},
        {"read_streams", "the floor itself: 8 streams, against one", "pure read",
         "pure read, one stream", Better::lower, none, none, 0}},
       of_type(DType::f16)});
  groups.push_back({{{"append", "appending one token a head, of a decode step", "append", "even",
                      Better::lower, 0.01, none, needs_vectors},
                     {"append_growth", "the same in a cache of 16 times the tokens: O(1)", "append",
                      "append to a short cache", Better::lower, 2.0, none, 0},
                     {"append_copying", "append, against copying the whole flat cache to make room",
                      "append", "append by copying", Better::higher, none, none, 0}},
                    of_type(DType::f16)});
  groups.push_back({{{"decode_bf16", "decode attention, bf16, against a pure read", "ragged",
                      "pure read", Better::lower, none, 1.03, 0}},
                    of_type(DType::bf16)});
  groups.push_back({{{"decode_f32", "decode attention, f32, against a pure read", "ragged",
                      "pure read", Better::lower, none, 1.03, 0}},
                    of_type(DType::f32)});
  groups.push_back({{{"decode_warm", "a byte of a cache that level 2 holds, of one from memory",
                      "in the second cache level", "ragged", Better::lower, none, none, 0}},
                    of_type(DType::f16)});
}

}  // namespace kvlean::ratio
