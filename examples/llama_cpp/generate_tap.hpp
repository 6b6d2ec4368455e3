// What kvlean-generate sees of a running llama.cpp graph: how each layer attends and rotates, how
// large its cache is, and the newest queries. With flash attention off it can also add a bias to
// the scores of each cell, which is how slots that stand for several tokens get their log mass.
#pragma once

#include <ggml-backend.h>
#include <ggml.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <vector>

#include "attention_tap.hpp"
#include "kvlean/adapters/ggml.hpp"
#include "kvlean/observe/observation.hpp"

namespace kvlean::llama_cpp {

/// One layer, as the graph computes it.
struct AttentionLayer {
  bool has_attention = false;
  bool has_keys = false;
  std::string problem;  ///< why its cache cannot be compressed; empty if it can
  std::size_t query_heads = 0;
  std::size_t kv_heads = 0;
  std::size_t key_dim = 0;
  AttentionSpec attention;
  std::vector<float> sink_logits;  ///< what attention.sink_logits points at
  bool rope_known = false;
  RopeSpec rope;
  std::vector<float> frequency_factors;  ///< what rope.frequency_factors points at
  std::size_t cells = 0;                 ///< of the engine's cache tensors
  std::size_t key_bytes = 0;             ///< of the engine's cache tensor, all cells
  std::size_t value_bytes = 0;
  bool recorded = false;       ///< its queries are wanted
  std::vector<float> queries;  ///< [token][query head][dim], the newest last
  std::vector<float> bias;     ///< [kv head][cell] added to logits; empty: none

  std::size_t query_floats() const { return query_heads * key_dim; }
  std::size_t query_count() const {
    return query_floats() == 0 ? 0 : queries.size() / query_floats();
  }
};

/// The evaluation callback of a context and what it collects.
class GenerateTap {
 public:
  explicit GenerateTap(std::size_t layers) : layers_(layers) {}
  GenerateTap(const GenerateTap&) = delete;
  GenerateTap& operator=(const GenerateTap&) = delete;

  std::vector<AttentionLayer>& layers() { return layers_; }
  const std::vector<AttentionLayer>& layers() const { return layers_; }

  /// Looks at the shapes and numbers of the next graphs, until `learnt`.
  void learn() { learning_ = true; }
  void learnt() { learning_ = false; }
  /// Keeps at most this many of the newest queries of the recorded layers; 0 records nothing.
  void record(std::size_t newest) { newest_ = newest; }
  /// Whether the graphs must be watched at all.
  bool busy() const {
    return newest_ != 0 || std::any_of(layers_.begin(), layers_.end(),
                                       [](const auto& layer) { return !layer.bias.empty(); });
  }

  /// For `llama_context_params::cb_eval`, with a pointer to the tap as user data.
  static bool on_node(ggml_tensor* node, bool ask, void* tap) {
    return static_cast<GenerateTap*>(tap)->handle(node, ask);
  }

 private:
  static float float_parameter(const ggml_tensor* node, std::size_t index) {
    float value = 0.0f;
    std::memcpy(&value, node->op_params + index, sizeof value);
    return value;
  }

  /// The whole cache tensor that a node reads through views and casts, or null.
  static const ggml_tensor* cache_behind(const ggml_tensor* node, std::string_view prefix) {
    for (int depth = 0; node != nullptr && depth < 16; ++depth) {
      if (layer_of(node->name, prefix)) return node;
      node = node->view_src != nullptr ? node->view_src : node->src[0];
    }
    return nullptr;
  }

  AttentionLayer* layer_behind(const ggml_tensor* node, std::string_view prefix) {
    const ggml_tensor* cache = cache_behind(node, prefix);
    if (cache == nullptr) return nullptr;
    const auto index = layer_of(cache->name, prefix);
    return index && *index < layers_.size() ? &layers_[*index] : nullptr;
  }

  static bool is_scores(const ggml_tensor* node) {
    return node->op == GGML_OP_MUL_MAT && layer_of(node->name, "kq-").has_value();
  }

  bool handle(ggml_tensor* node, bool ask) {
    if (ask && learning_) read_node(node);
    AttentionLayer* layer = nullptr;
    const bool scores = is_scores(node);
    if (scores) {
      layer = layer_behind(node->src[0], keys_name);
    } else if (node->op == GGML_OP_FLASH_ATTN_EXT) {
      layer = layer_behind(node->src[1], keys_name);
    }
    const bool biased = layer != nullptr && scores && !layer->bias.empty();
    // What a first graph computes is recorded before it is known which layers are compressed.
    const bool recorded = layer != nullptr && newest_ != 0 && (layer->recorded || learning_);
    if (ask) return biased || recorded;
    if (recorded) append_queries(node->src[scores ? 1 : 0], *layer);
    if (biased) add_bias(*node, *layer);
    return true;  // false would drop the rest of the graph without an error
  }

  void read_node(const ggml_tensor* node) {
    if (is_scores(node)) {
      if (AttentionLayer* layer = layer_behind(node->src[0], keys_name)) {
        read_shape(node->src[1], node->src[0], *layer);
      }
    } else if (node->op == GGML_OP_SOFT_MAX) {
      const auto index = layer_of(node->name, "kq_soft_max-");
      if (index && *index < layers_.size()) read_softmax(node, layers_[*index]);
    } else if (node->op == GGML_OP_FLASH_ATTN_EXT) {
      if (AttentionLayer* layer = layer_behind(node->src[1], keys_name)) {
        read_shape(node->src[0], node->src[1], *layer);
        layer->attention.scale = float_parameter(node, 0);
        layer->attention.softcap = float_parameter(node, 2);
        if (float_parameter(node, 1) != 0.0f) layer->problem = "uses ALiBi";
        read_sinks(node->src[4], *layer);
        layer->has_attention = true;
      }
    } else if (node->op == GGML_OP_SET_ROWS) {
      read_store(node);
    }
  }

  /// Queries [dim, tokens, query heads], keys [dim, cells, kv heads].
  static void read_shape(const ggml_tensor* queries, const ggml_tensor* keys,
                         AttentionLayer& layer) {
    layer.key_dim = static_cast<std::size_t>(queries->ne[0]);
    layer.query_heads = static_cast<std::size_t>(queries->ne[2]);
    layer.kv_heads = static_cast<std::size_t>(keys->ne[2]);
    if (queries->type != GGML_TYPE_F32 || queries->ne[3] != 1) {
      layer.problem = "has queries in a form that this program cannot read";
    }
  }

  static void read_sinks(const ggml_tensor* sinks, AttentionLayer& layer) {
    if (sinks == nullptr || !layer.sink_logits.empty()) return;
    if (sinks->type != GGML_TYPE_F32 || !ggml_backend_buffer_is_host(sinks->buffer) ||
        static_cast<std::size_t>(ggml_nelements(sinks)) != layer.query_heads) {
      layer.problem = "has sink logits that this program cannot read";
      return;
    }
    layer.sink_logits.resize(layer.query_heads);
    std::memcpy(layer.sink_logits.data(), sinks->data, layer.query_heads * sizeof(float));
    layer.attention.sink_logits = layer.sink_logits.data();
  }

  /// Scores come straight from `kq`, or as cap * tanh(inner * kq).
  static void read_softmax(const ggml_tensor* node, AttentionLayer& layer) {
    layer.has_attention = true;
    layer.attention.scale = float_parameter(node, 0);
    if (float_parameter(node, 1) != 0.0f) layer.problem = "uses ALiBi";
    read_sinks(node->src[2], layer);
    const ggml_tensor* outer = node->src[0];
    if (outer->op == GGML_OP_MUL_MAT) return;
    const ggml_tensor* tanh = outer->op == GGML_OP_SCALE ? outer->src[0] : nullptr;
    const ggml_tensor* inner = tanh != nullptr && tanh->op == GGML_OP_UNARY &&
                                       ggml_get_unary_op(tanh) == GGML_UNARY_OP_TANH
                                   ? tanh->src[0]
                                   : nullptr;
    if (inner == nullptr || inner->op != GGML_OP_SCALE || inner->src[0]->op != GGML_OP_MUL_MAT) {
      layer.problem = "adds something to its scores that this program does not know";
      return;
    }
    layer.attention.softcap = layer.attention.scale * float_parameter(outer, 0);
    layer.attention.scale = layer.attention.softcap * float_parameter(inner, 0);
  }

  /// A store into the cache tells the tensors' sizes, and the rotation of what is stored.
  void read_store(const ggml_tensor* node) {
    AttentionLayer* layer = layer_behind(node->view_src, keys_name);
    if (layer == nullptr) {
      layer = layer_behind(node->view_src, values_name);
      if (layer != nullptr) layer->value_bytes = ggml_nbytes(cache_behind(node, values_name));
      return;
    }
    const ggml_tensor* cache = cache_behind(node, keys_name);
    layer->has_keys = true;
    layer->cells = static_cast<std::size_t>(cache->ne[1]);
    layer->key_bytes = ggml_nbytes(cache);
    const ggml_tensor* source = node->src[0];
    for (int depth = 0; depth < 8 && source != nullptr; ++depth) {
      if (source->op == GGML_OP_ROPE) {
        read_rope(source, *layer);
        return;
      }
      const bool moves_only = source->op == GGML_OP_VIEW || source->op == GGML_OP_RESHAPE ||
                              source->op == GGML_OP_PERMUTE || source->op == GGML_OP_CONT ||
                              source->op == GGML_OP_CPY;
      if (!moves_only) break;
      source = source->src[0];
    }
    // A projection or a norm that goes into the cache as it is: a layer without rotation.
    const bool plain =
        source != nullptr && (source->op == GGML_OP_MUL_MAT || source->op == GGML_OP_ADD ||
                              source->op == GGML_OP_MUL || source->op == GGML_OP_RMS_NORM);
    layer->rope_known = plain;
    layer->rope.pairing = RopePairing::none;
  }

  static void read_rope(const ggml_tensor* node, AttentionLayer& layer) {
    RopeSpec rope;
    const std::int32_t mode = node->op_params[2];
    if (mode != GGML_ROPE_TYPE_NORMAL && mode != GGML_ROPE_TYPE_NEOX) return;
    rope.pairing = mode == GGML_ROPE_TYPE_NEOX ? RopePairing::neox : RopePairing::norm;
    rope.rotary_dims = static_cast<u32>(node->op_params[1]);
    rope.first_dim = static_cast<u32>(node->op_params[15]);
    rope.theta = static_cast<double>(float_parameter(node, 5));
    const double stretch = static_cast<double>(float_parameter(node, 6));
    rope.extrapolation = static_cast<double>(float_parameter(node, 7));
    if (rope.extrapolation != 0.0) {
      rope.scaling = RopeScaling::yarn;
      rope.original_context = static_cast<u32>(node->op_params[4]);
      rope.beta_fast = static_cast<double>(float_parameter(node, 9));
      rope.beta_slow = static_cast<double>(float_parameter(node, 10));
    } else if (stretch != 1.0) {
      rope.scaling = RopeScaling::linear;
    }
    rope.factor = 1.0 / stretch;
    if (const ggml_tensor* factors = node->src[2]) {
      const auto pairs = static_cast<std::size_t>(rope.rotary_dims / 2);
      if (factors->type != GGML_TYPE_F32 || !ggml_backend_buffer_is_host(factors->buffer) ||
          static_cast<std::size_t>(ggml_nelements(factors)) < pairs) {
        return;
      }
      layer.frequency_factors.resize(pairs);
      std::memcpy(layer.frequency_factors.data(), factors->data, pairs * sizeof(float));
      rope.frequency_factors = layer.frequency_factors.data();
    }
    layer.rope = rope;
    layer.rope_known = rope.check(static_cast<u32>(node->ne[0])).ok();
  }

  void append_queries(const ggml_tensor* node, AttentionLayer& layer) const {
    const GgmlTensor view = ggml_view(node, GgmlAxes::operand());
    const Rows rows = view.rows();
    if (!view.status() || rows.dtype != DType::f32 || layer.query_floats() == 0) {
      layer.problem = "has queries in a form that this program cannot read";
      return;
    }
    const std::size_t each = layer.query_floats();
    const std::size_t added = std::min<std::size_t>(rows.tokens, newest_);
    const std::size_t kept = std::min(layer.query_count(), newest_ - added);
    layer.queries.erase(layer.queries.begin(),
                        layer.queries.end() - static_cast<std::ptrdiff_t>(kept * each));
    layer.queries.resize((kept + added) * each);
    float* to = layer.queries.data() + kept * each;
    for (std::size_t i = 0; i < added; ++i) {
      for (u32 head = 0; head < rows.heads; ++head, to += layer.key_dim) {
        load_row(rows, head, static_cast<u32>(rows.tokens - added + i), to);
      }
    }
  }

  /// Scores [cells, tokens, query heads] are scaled after this node.
  static void add_bias(ggml_tensor& node, const AttentionLayer& layer) {
    const std::size_t cells = layer.bias.size() / layer.kv_heads;
    const std::size_t group = layer.query_heads / layer.kv_heads;
    const std::size_t seen = std::min(cells, static_cast<std::size_t>(node.ne[0]));
    for (std::size_t head = 0; head < layer.query_heads; ++head) {
      const float* bias = layer.bias.data() + head / group * cells;
      for (std::size_t token = 0; token < static_cast<std::size_t>(node.ne[1]); ++token) {
        auto* scores = reinterpret_cast<float*>(static_cast<char*>(node.data) + token * node.nb[1] +
                                                head * node.nb[2]);
        for (std::size_t cell = 0; cell < seen; ++cell) {
          scores[cell] += bias[cell] / layer.attention.scale;
        }
      }
    }
  }

  static constexpr std::string_view keys_name = "cache_k_l";
  static constexpr std::string_view values_name = "cache_v_l";

  std::vector<AttentionLayer> layers_;
  std::size_t newest_ = 0;
  bool learning_ = false;
};

}  // namespace kvlean::llama_cpp
