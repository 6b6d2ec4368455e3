// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
// Carrying out an eviction: in place, by pages, out of place, turned to new positions.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "bench/ratio/floors.hpp"
#include "bench/ratio/oracle.hpp"

namespace kvlean::ratio {

namespace {

/// Pages of all heads, [page][head][token][dim], over a layer's memory, in shuffled order.
struct Pages {
  u32 page_tokens;
  std::vector<i32> table;

  Pages(u32 tokens, u32 in_page) : page_tokens(in_page), table(tokens / in_page) {
    std::iota(table.begin(), table.end(), 0);
    Draws draws(21);
    for (std::size_t i = table.size(); i > 1; --i) std::swap(table[i - 1], table[draws.next() % i]);
  }
  [[nodiscard]] AnyTensor tensor_over(void* data, const LayerShape& shape) const {
    AnyTensor result = tensor(data, shape.dtype, shape.heads, shape.tokens);
    Rows& rows = result.description;
    rows.head_stride = static_cast<i64>(page_tokens) * dim;
    rows.page_table = table.data();
    rows.page_tokens = page_tokens;
    rows.page_table_length = static_cast<u32>(table.size());
    rows.page_stride = static_cast<i64>(page_tokens) * dim * shape.heads;
    return result;
  }
};

struct Compaction {
  Layer layer;
  double keep;
  Room room;
  CompressionPlan plan;
  CompressionPlan turned;  ///< the same with contiguous positions
  RopeSpec rope;
  Pages pages16;
  Pages pages64;
  RaggedKVCache ragged;
  std::vector<Buffer> kept;
  std::vector<u32> by_score;  ///< the kept tokens of each head, best first
  Executor executor;

  Compaction(const LayerShape& shape, const Setup& setup, double kept_share)
      : layer(shape, setup.copies(2 * shape.bytes()), true, true),
        keep(kept_share),
        room(2 * plan_bytes_required({1, kv_heads, query_heads, shape.tokens, dim, 1, 0})),
        pages16(shape.tokens, 16),
        pages64(shape.tokens, 64),
        executor(setup.executor) {
    rope.theta = 500000.0;
    make_plans();
    for (std::size_t copy = 0; copy < layer.copies(); ++copy) {
      kept.emplace_back(kept_bytes());
    }
    static_cast<void>(ragged.allocate(ragged_shape(plan, layer.cache(0))).ok());
  }
  [[nodiscard]] std::size_t row_bytes() const { return dim * size_bytes(layer.shape().dtype); }
  [[nodiscard]] std::size_t kept_bytes() const { return 2 * plan.num_slots() * row_bytes(); }

  void make_plans() {
    const u32 tokens = layer.shape().tokens;
    Buffer scores(std::size_t{kv_heads} * tokens * sizeof(float));
    fill_mass(scores.as<float>(), kv_heads, tokens, 8);
    Observation seen;
    seen.external = Ragged<const float>(scores.as<float>(), u64{tokens});
    const auto policy = compose(ExternalScorer{}, UniformAllocator{}, EvictReducer{});
    AnyCache cache = layer.cache(0);
    cache.set_rope(&rope);
    const Budget budget = Budget::fraction(keep);
    const CacheView view = cache.view();
    const bool good = policy.plan(cache, seen, budget, room.workspace(), plan).ok() &&
                      policy.plan(cache, seen, budget, room.workspace(), turned).ok() &&
                      renumber({&turned, 1}, {&view, 1}, room.workspace()).ok();
    if (!good) plan = turned = {};
    for (u32 s = 0; s < plan.segments; ++s) {
      std::vector<u32> order(plan.anchor + plan.first[s], plan.anchor + plan.first[s + 1]);
      const float* head = scores.as<float>() + std::size_t{s} * tokens;
      std::sort(order.begin(), order.end(), [&](u32 a, u32 b) { return head[a] > head[b]; });
      by_score.insert(by_score.end(), order.begin(), order.end());
    }
  }

  Status compact(std::size_t copy) {
    AnyCache cache = layer.cache(copy);
    return apply(plan, cache, in_place, executor);
  }
  Status compact_turned(std::size_t copy) {
    AnyCache cache = layer.cache(copy);
    cache.set_rope(&rope);
    return apply(turned, cache, in_place, executor);
  }
  Status compact_pages(std::size_t copy, const Pages& pages) {
    AnyCache cache(pages.tensor_over(layer.keys(copy), layer.shape()),
                   pages.tensor_over(layer.values(copy), layer.shape()));
    return apply(plan, cache, in_place, executor);
  }
  Status to_ragged(std::size_t copy) { return apply(plan, layer.cache(copy), ragged, executor); }
  /// What "top-k, then gather" does: rows in the order of their scores, into memory just taken.
  Status gather(std::size_t copy) {
    const std::size_t row = row_bytes();
    Buffer fresh_keys(kept_bytes() / 2);
    Buffer fresh_values(kept_bytes() / 2);
    parallel_for(executor, kv_heads, [&](u32, u32 h) noexcept {
      for (const bool is_key : {true, false}) {
        const std::byte* from =
            static_cast<const std::byte*>(is_key ? layer.keys(copy) : layer.values(copy)) +
            std::size_t{h} * layer.shape().tokens * row;
        std::byte* to = (is_key ? fresh_keys : fresh_values).as<>() + plan.first[h] * row;
        for (u64 j = plan.first[h]; j < plan.first[h + 1]; ++j, to += row) {
          std::memcpy(to, from + by_score[j] * row, row);
        }
      }
    });
    return StatusCode::ok;
  }

  /// Plain moves keep the bits; turned keys are rounded once.
  Verdict check(bool with_turn) {
    Verdict verdict;
    if (with_turn) verdict.bound = 1e-3;
    const bool done = (with_turn ? compact_turned(0) : compact(0)).ok();
    AnyCache before(tensor(const_cast<void*>(layer.first_keys()), layer.shape().dtype, kv_heads,
                           layer.shape().tokens),
                    tensor(const_cast<void*>(layer.first_values()), layer.shape().dtype, kv_heads,
                           layer.shape().tokens));
    AnyCache after = layer.cache(0);
    after.set_length(plan.num_slots() / kv_heads);
    const double error = !done ? HUGE_VAL
                               : plan_error(with_turn ? turned : plan, before.view(), after.view(),
                                            with_turn ? &rope : nullptr);
    if (with_turn) verdict.error = error;
    verdict.good = with_turn ? error <= verdict.bound : error == 0.0;
    u64 digest = 1;
    for (u32 h = 0; h < kv_heads; ++h) {
      const std::size_t start = std::size_t{h} * layer.shape().tokens * row_bytes();
      const std::size_t bytes = kept_bytes() / 2 / kv_heads;
      digest = digest_of(static_cast<std::byte*>(layer.keys(0)) + start, bytes, digest);
      digest = digest_of(static_cast<std::byte*>(layer.values(0)) + start, bytes, digest);
    }
    verdict.digest = digest;
    layer.restore(0);
    return verdict;
  }
  Verdict check_pages(const Pages& pages) {
    Verdict verdict;
    const AnyCache source(
        pages.tensor_over(const_cast<void*>(layer.first_keys()), layer.shape()),
        pages.tensor_over(const_cast<void*>(layer.first_values()), layer.shape()));
    const bool done = compact_pages(0, pages).ok();
    AnyCache after(pages.tensor_over(layer.keys(0), layer.shape()),
                   pages.tensor_over(layer.values(0), layer.shape()));
    after.set_length(plan.num_slots() / kv_heads);
    verdict.good = done && plan_error(plan, source.view(), after.view(), nullptr) == 0.0;
    layer.restore(0);
    return verdict;
  }
  Verdict check_ragged() {
    Verdict verdict;
    verdict.good =
        to_ragged(0).ok() && plan_error(plan, layer.cache(0).view(), ragged.view(), nullptr) == 0.0;
    return verdict;
  }
};

Experiment build(const Setup& setup, const std::vector<std::string>& wanted, double keep) {
  LayerShape shape;
  shape.tokens = setup.tokens();
  auto work = std::make_shared<Compaction>(shape, setup, keep);
  Experiment experiment;
  experiment.data = work;
  const std::string text =
      shape.text() + ", keep " + std::to_string(static_cast<int>(100 * keep + 0.5)) + " %";
  const std::string isa = isa_name(vector_target());
  const std::string type = name(shape.dtype);
  experiment.label = {isa, type, text, "flat"};
  const double moved = 2.0 * static_cast<double>(work->kept_bytes());
  const auto add = [&](const char* label, std::function<Status(std::size_t)> run) {
    if (!wants(wanted, label)) return;
    Variant variant{label, std::move(run)};
    variant.copies = work->layer.copies();
    variant.bytes = moved;
    experiment.variants.push_back(std::move(variant));
  };
  add("memcpy of the kept bytes", [work](std::size_t copy) {
    const std::size_t half = work->kept_bytes() / 2;
    copy_bytes(work->kept[copy].as<>(), {static_cast<std::byte*>(work->layer.keys(copy)), half},
               work->executor);
    copy_bytes(work->kept[copy].as<>() + half,
               {static_cast<std::byte*>(work->layer.values(copy)), half}, work->executor);
    return Status();
  });
  // Moving rows that were moved before costs the same, so nothing is restored.
  add("in place", [work](std::size_t copy) { return work->compact(copy); });
  experiment.verify["in place"] = [work] { return work->check(false); };
  add("in place, turned", [work](std::size_t copy) { return work->compact_turned(copy); });
  experiment.verify["in place, turned"] = [work] { return work->check(true); };
  add("pages of 16", [work](std::size_t copy) { return work->compact_pages(copy, work->pages16); });
  experiment.verify["pages of 16"] = [work] { return work->check_pages(work->pages16); };
  experiment.labels["pages of 16"] = {isa, type, text, "paged16"};
  add("pages of 64", [work](std::size_t copy) { return work->compact_pages(copy, work->pages64); });
  experiment.verify["pages of 64"] = [work] { return work->check_pages(work->pages64); };
  experiment.labels["pages of 64"] = {isa, type, text, "paged64"};
  add("out of place", [work](std::size_t copy) { return work->to_ragged(copy); });
  experiment.verify["out of place"] = [work] { return work->check_ragged(); };
  experiment.labels["out of place"] = {isa, type, text, "ragged"};
  add("gather by score", [work](std::size_t copy) { return work->gather(copy); });
  return experiment;
}

auto keeping(double keep) {
  return [keep](const Setup& setup, const std::vector<std::string>& wanted) {
    return build(setup, wanted, keep);
  };
}

}  // namespace

void add_compaction_groups(std::vector<Group>& groups) {
  constexpr const char* floor = "memcpy of the kept bytes";
  groups.push_back({{{"compact_10", "in-place compaction, keep 10 %, against memcpy", "in place",
                      floor, Better::lower, 1.6, 1.2, needs_vectors}},
                    keeping(0.1)});
  groups.push_back(
      {{{"compact_25", "in-place compaction, keep 25 %, against memcpy", "in place", floor,
         Better::lower, 1.6, 1.2, needs_vectors},
        {"compact_25_pages16", "the same in pages of 16 tokens", "pages of 16", floor,
         Better::lower, none, 1.2, 0},
        {"compact_25_pages64", "the same in pages of 64 tokens", "pages of 64", floor,
         Better::lower, none, 1.2, 0},
        {"compact_25_ragged", "out of place into a ragged cache", "out of place", floor,
         Better::lower, none, 1.2, 0},
        {"compact_25_gather", "in place, against gathering in score order into fresh memory",
         "in place", "gather by score", Better::higher, none, none, 0},
        {"rerotate_25", "compaction with keys turned to new positions, against without",
         "in place, turned", "in place", Better::lower, none, 1.15, 0}},
       keeping(0.25)});
  groups.push_back({{{"compact_50", "in-place compaction, keep 50 %, against memcpy", "in place",
                      floor, Better::lower, 1.6, 1.2, needs_vectors}},
                    keeping(0.5)});
}

}  // namespace kvlean::ratio
