// Evicts tokens inside the engine's own attention: an independent check of AttentionOverride.
//
// At the node `kq-<layer>` the raw scores of evicted (KV head, token) pairs become minus infinity,
// and those of kept ones get their log mass, divided by the attention scale that is applied later.
// The engine's own softmax and value product then compute attention over any ragged selection; no
// attention code of ours is involved. It cannot express rewritten keys or values, nor log mass
// under a logit softcap. The engine must hold the whole prefix, token t in cell t.
#pragma once

#include <cmath>
#include <cstddef>
#include <limits>
#include <string>
#include <vector>

#include "attention_tap.hpp"
#include "kvlean/core/plan.hpp"

namespace kvlean::llama_cpp {

/// An evaluation callback for NodeSwitch.
class ScoreMask {
 public:
  /// As many layers as the model has; none of them is masked.
  void reset(std::size_t layers) {
    layers_.assign(layers, {});
    problem_.clear();
  }

  /// What `plan` keeps of the `prefix` first tokens of a layer. `scale` is the attention scale.
  /// False if the plan rewrites keys or values.
  [[nodiscard]] bool mask(std::size_t layer, const CompressionPlan& plan, std::size_t prefix,
                          double scale) {
    constexpr u32 rewrites = needs_moved_keys | needs_changed_values | needs_new_positions;
    if ((plan.needs & rewrites) != 0 || plan.has_terms() || plan.has_literal_keys() ||
        plan.has_literal_values()) {
      return false;
    }
    Layer& own = layers_[layer];
    own.prefix = prefix;
    own.heads = plan.segments;
    own.bias.assign(plan.segments * prefix, -std::numeric_limits<float>::infinity());
    for (u32 s = 0; s < plan.segments; ++s) {
      for (u64 slot = plan.first[s]; slot < plan.first[s] + plan.length[s]; ++slot) {
        const double mass =
            plan.log_mass != nullptr ? static_cast<double>(plan.log_mass[slot]) : 0.0;
        own.bias[s * prefix + plan.anchor[slot]] = static_cast<float>(mass / scale);
      }
    }
    return true;
  }

  /// Why the results are not to be trusted; empty if they are.
  [[nodiscard]] const std::string& problem() const { return problem_; }

  static bool on_node(ggml_tensor* node, bool ask, void* self) {
    return static_cast<ScoreMask*>(self)->handle(node, ask);
  }

 private:
  struct Layer {
    std::size_t prefix = 0;
    std::size_t heads = 0;
    std::vector<float> bias;  ///< [KV head][prefix token], added to the raw score
  };

  bool handle(ggml_tensor* node, bool ask) {
    if (ask && node->op == GGML_OP_SOFT_MAX) {
      const auto layer = layer_of(node->name, "kq_soft_max-");
      if (layer && *layer < layers_.size() && layers_[*layer].prefix != 0 &&
          node->src[0]->op != GGML_OP_MUL_MAT) {
        problem_ = "layer " + std::to_string(*layer) + " transforms its scores before the softmax";
      }
    }
    if (node->op != GGML_OP_MUL_MAT) return !ask;
    const auto layer = layer_of(node->name, "kq-");
    if (!layer || *layer >= layers_.size() || layers_[*layer].prefix == 0) return !ask;
    if (!ask) write(node, layers_[*layer]);
    return true;  // false would drop the rest of the graph without an error
  }

  void write(ggml_tensor* node, const Layer& layer) {
    const auto query_heads = static_cast<std::size_t>(node->ne[2]);
    if (!is_readable(node) || node->nb[0] != sizeof(float) || query_heads % layer.heads != 0 ||
        static_cast<std::size_t>(node->ne[0]) < layer.prefix) {
      problem_ = "the scores are laid out in a way this program does not know";
      return;
    }
    const std::size_t group = query_heads / layer.heads;
    for (std::size_t h = 0; h < query_heads; ++h) {
      const float* bias = layer.bias.data() + h / group * layer.prefix;
      for (std::size_t i = 0; i < static_cast<std::size_t>(node->ne[1]); ++i) {
        auto* row = reinterpret_cast<float*>(static_cast<char*>(node->data) + i * node->nb[1] +
                                             h * node->nb[2]);
        for (std::size_t t = 0; t < layer.prefix; ++t) row[t] += bias[t];
      }
    }
  }

  std::vector<Layer> layers_;
  std::string problem_;
};

}  // namespace kvlean::llama_cpp
