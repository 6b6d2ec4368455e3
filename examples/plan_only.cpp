// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0

// Deciding without doing: the plan is data. Here an "engine" with a layout KVLean knows nothing
// about carries it out itself, and the plan is checked, measured and compared before a byte moves.

#include <cstdio>
#include <map>
#include <random>
#include <vector>

#include "kvlean/kvlean.hpp"

namespace {

// A cache that keeps each token as an object: no strides, no rows in memory one after another. Any
// type with these five functions is a kvlean::Tensor.
struct ObjectStore {
  std::size_t heads, tokens, dim;
  mutable std::map<std::pair<kvlean::u32, kvlean::u32>, std::vector<float>> rows;

  std::size_t num_heads() const noexcept { return heads; }
  std::size_t num_tokens() const noexcept { return tokens; }
  std::size_t width() const noexcept { return dim; }
  void load(kvlean::u32 head, kvlean::u32 token, float* row) const noexcept {
    const auto& found = rows.at({head, token});
    std::copy(found.begin(), found.end(), row);
  }
  void store(kvlean::u32 head, kvlean::u32 token, const float* row) const noexcept {
    rows[{head, token}].assign(row, row + dim);
  }
};
static_assert(kvlean::Tensor<ObjectStore>);

}  // namespace

int main() {
  using namespace kvlean;
  constexpr u32 heads = 2, tokens = 128, dim = 32;
  ObjectStore keys{heads, tokens, dim, {}}, values{heads, tokens, dim, {}};
  std::mt19937 random(4);
  std::normal_distribution<float> normal;
  std::vector<float> row(dim, 0.0f), noise(dim);
  for (u32 head = 0; head < heads; ++head) {
    for (u32 token = 0; token < tokens; ++token) {
      for (float& x : row) x = 0.9f * x + 0.4f * normal(random);  // neighbours alike
      keys.store(head, token, row.data());
      for (float& x : noise) x = normal(random);
      values.store(head, token, noise.data());
    }
  }
  const auto cache = KVCache(keys, values);
  std::vector<float> mass(heads * tokens);
  for (float& x : mass) x = std::abs(normal(random));

  // The engine has the attention mass already; memory for the plan is known from shapes.
  std::vector<std::byte> memory(
      plan_bytes_required({.num_kv_heads = heads, .tokens = tokens, .key_dim = dim}));
  Workspace workspace{std::span<std::byte>(memory)};
  CompressionPlan plan;
  const KVMergerPolicy policy(KVMergerReducer{.log_mass = LogMass::log_count});
  const Observation seen = observe_mass({mass.data(), u64{tokens}});
  if (Status s = policy.plan(cache, seen, Budget::fraction(0.5), workspace, plan); !s) {
    std::fprintf(stderr, "plan: %s\n", s.message());
    return 1;
  }
  if (Status s = validate_plan(plan, cache.view()); !s) {
    std::fprintf(stderr, "validate: %s\n", s.message());
    return 1;
  }
  std::printf("%zu bytes of workspace, %llu slots, %llu merged tokens; needs:%s%s%s%s\n",
              workspace.high_water_bytes(), static_cast<unsigned long long>(plan.num_slots()),
              static_cast<unsigned long long>(plan.num_terms),
              (plan.needs & needs_ragged_lengths) != 0 ? " ragged lengths" : "",
              (plan.needs & needs_log_mass) != 0 ? " log mass" : "",
              (plan.needs & needs_moved_keys) != 0 ? " moved keys" : "",
              (plan.needs & needs_changed_values) != 0 ? " changed values" : "");

  // Carry it out by hand.
  ObjectStore new_keys{heads, tokens, dim, {}};
  std::vector<float> merged(dim);
  for (u32 head = 0; head < heads; ++head) {
    for (u32 j = 0; j < plan.length[head]; ++j) {
      const u64 slot = plan.first[head] + j;
      keys.load(head, plan.anchor[slot], merged.data());
      row_math::scale(merged.data(), plan.key_self_weight(slot), dim);
      for (u64 t = plan.has_terms() ? plan.term_begin[slot] : 0;
           plan.has_terms() && t < plan.term_end[slot]; ++t) {
        keys.load(head, plan.term_token[t], row.data());
        row_math::add_scaled(merged.data(), row.data(), plan.term_weight[t], dim);
      }
      new_keys.store(head, j, merged.data());
    }
  }

  // The same by the library, through the same five functions.
  std::vector<float> log_mass(heads * tokens);
  auto owned = KVCache(keys, values).set_log_mass({log_mass.data(), u64{tokens}});
  if (Status s = apply(plan, owned, in_place); !s) {
    std::fprintf(stderr, "apply: %s\n", s.message());
    return 1;
  }
  std::vector<float> other(dim);
  for (u32 head = 0; head < heads; ++head) {
    for (u32 j = 0; j < plan.length[head]; ++j) {
      new_keys.load(head, j, merged.data());
      owned.keys().load(head, j, other.data());
      if (merged != other) {
        std::fprintf(stderr, "head %u slot %u differs\n", head, j);
        return 1;
      }
    }
  }
  std::printf("carried out twice, by hand and by apply(): the same bits\n");
  return 0;
}
