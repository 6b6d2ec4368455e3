// Reads queries, keys and values out of a running llama.cpp graph.
//
// The tap sits on the attention itself and not on the projections before it: the operands of the
// node `kq-<layer>` are the queries and the cached keys exactly as attention reads them, after
// rotary embedding and after whatever norm or scaling an architecture puts around it, and the first
// operand of `kqv-<layer>` is the cached values. So one reader serves all architectures that build
// their attention in the usual way, whatever they call the nodes before it, and `kqv-<layer>`
// itself is the engine's own result to compare with. Scale and logit softcap come from the same
// nodes. The context must be opened as in engine.hpp: F32 cache, flash attention off, on the CPU.
#pragma once

#include <ggml-backend.h>
#include <ggml.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

namespace kvlean::llama_cpp {

/// A float tensor in memory, [heads, tokens, dim] row-major.
struct HeadRows {
  std::size_t heads = 0;
  std::size_t tokens = 0;
  std::size_t dim = 0;
  std::vector<float> values;

  float* row(std::size_t head, std::size_t token) {
    return values.data() + (head * tokens + token) * dim;
  }
  const float* row(std::size_t head, std::size_t token) const {
    return values.data() + (head * tokens + token) * dim;
  }
  void resize(std::size_t new_heads, std::size_t new_tokens, std::size_t new_dim) {
    if (heads == new_heads && tokens == new_tokens && dim == new_dim) return;
    heads = new_heads;
    tokens = new_tokens;
    dim = new_dim;
    values.assign(heads * tokens * dim, 0.0f);
  }
};

/// "kq-12" is the score node of layer 12; "kq-12 (view)" is something else.
inline std::optional<std::size_t> layer_of(std::string_view name, std::string_view prefix) {
  if (!name.starts_with(prefix)) return std::nullopt;
  name.remove_prefix(prefix.size());
  std::size_t layer = 0;
  const auto [end, code] = std::from_chars(name.data(), name.data() + name.size(), layer);
  if (code != std::errc() || end != name.data() + name.size()) return std::nullopt;
  return layer;
}

/// Whether the bytes of a float tensor can be read here.
inline bool is_readable(const ggml_tensor* tensor) {
  if (tensor == nullptr || tensor->type != GGML_TYPE_F32 || tensor->data == nullptr ||
      tensor->ne[3] != 1) {
    return false;
  }
  const ggml_backend_buffer_t buffer = tensor->buffer == nullptr && tensor->view_src != nullptr
                                           ? tensor->view_src->buffer
                                           : tensor->buffer;
  return buffer != nullptr && ggml_backend_buffer_is_host(buffer);
}

/// Copies `count` floats that lie `step` bytes apart, from byte `offset` of a tensor on.
inline void copy_floats(const ggml_tensor* from, std::size_t offset, std::size_t step, float* to,
                        std::size_t count) {
  const char* source = static_cast<const char*>(from->data) + offset;
  if (step == sizeof(float)) {
    std::memcpy(to, source, count * sizeof(float));
    return;
  }
  for (std::size_t i = 0; i < count; ++i) {
    std::memcpy(to + i, source + i * step, sizeof(float));
  }
}

/// What the tap saw of one layer.
struct TappedLayer {
  bool has_scores = false;   ///< its score node was seen; q and k are filled if it was selected
  bool has_softmax = false;  ///< its softmax was seen and checked
  bool has_output = false;   ///< its value product was seen; v and output are filled if selected
  std::string problem;       ///< why a capture cannot represent this attention; empty if it can
  double attention_scale = 0.0;
  double logit_softcap = 0.0;  ///< 0: none
  double rope_theta = 0.0;     ///< 0: no rotary node was recognised
  std::size_t rope_dims = 0;   ///< rotated elements of a row
  bool rope_scaled = false;    ///< the rotation is stretched in some way
  HeadRows q;
  HeadRows k;
  HeadRows v;
  HeadRows output;           ///< [query heads, tokens, value dim]; tokens from `output_from` on
  std::vector<double> mass;  ///< [kv heads, tokens] attention received so far, mean over the group
  std::size_t hidden = 0;    ///< rows of wo; 0 if it was not asked for or not found
  std::vector<float> wo;     ///< [hidden, query heads * value dim]
};

/// The evaluation callback of a llama.cpp context and what it collects. Call `begin_batch` ahead of
/// every batch; positions count from 0 in an empty cache. Every layer's softmax is checked; tensors
/// are copied for the selected layers only.
class AttentionTap {
 public:
  struct Options {
    std::size_t layers = 0;          ///< layers of the model
    std::size_t tokens = 0;          ///< tokens of the whole run
    std::set<std::size_t> selected;  ///< layers whose tensors are copied
    bool keep_output = false;        ///< also the engine's attention output
    bool keep_wo = false;            ///< also the weights of the output projection
    std::size_t output_from = 0;     ///< of the tokens from this one on
    bool keep_mass = false;          ///< also the attention that every token receives
  };

  /// Forgets everything and prepares for a run.
  void reset(Options options) {
    options_ = std::move(options);
    layers_.assign(options_.layers, TappedLayer{});
  }

  /// Says which positions the next batch holds.
  void begin_batch(std::size_t first, std::size_t count) {
    first_ = first;
    count_ = count;
  }

  /// Whether the next batches add to the attention mass.
  void keep_mass(bool keep) { options_.keep_mass = keep; }

  /// What was seen, by layer.
  const std::vector<TappedLayer>& layers() const { return layers_; }
  std::vector<TappedLayer>& layers() { return layers_; }

  /// For `llama_context_params::cb_eval`, with a pointer to the tap as user data.
  static bool on_node(ggml_tensor* node, bool ask, void* tap) {
    return static_cast<AttentionTap*>(tap)->handle(node, ask);
  }

 private:
  enum class Kind { other, scores, softmax, output };

  static float float_parameter(const ggml_tensor* node, std::size_t index) {
    float value = 0.0f;
    std::memcpy(&value, node->op_params + index, sizeof value);
    return value;
  }

  std::pair<Kind, std::size_t> classify(const ggml_tensor* node) const {
    const std::string_view name = node->name;
    if (node->op == GGML_OP_MUL_MAT) {
      if (const auto layer = layer_of(name, "kq-")) return {Kind::scores, *layer};
      if (const auto layer = layer_of(name, "kqv-")) return {Kind::output, *layer};
    } else if (node->op == GGML_OP_SOFT_MAX) {
      if (const auto layer = layer_of(name, "kq_soft_max-")) return {Kind::softmax, *layer};
    }
    return {Kind::other, 0};
  }

  bool handle(const ggml_tensor* node, bool ask) {
    const auto [kind, index] = classify(node);
    if (ask && kind == Kind::other) read_parameters(node);
    if (kind == Kind::other || index >= layers_.size()) return !ask;
    const bool selected = options_.selected.contains(index);
    if (ask) return selected || kind == Kind::softmax;
    TappedLayer& layer = layers_[index];
    if (layer.problem.empty()) {
      switch (kind) {
        case Kind::scores:
          layer.problem = read_scores(node, layer);
          break;
        case Kind::softmax:
          layer.problem = read_softmax(node, layer);
          break;
        case Kind::output:
          layer.problem = read_output(node, layer);
          break;
        case Kind::other:
          break;
      }
    }
    return true;  // false would drop the rest of the graph without an error
  }

  /// What is known before anything is computed: rotary base and weights.
  void read_parameters(const ggml_tensor* node) {
    const std::string_view name = node->name;
    if (node->op == GGML_OP_ROPE && name.starts_with("Kcur")) {
      const std::size_t dash = name.rfind('-');
      const auto index =
          dash == std::string_view::npos ? std::nullopt : layer_of(name.substr(dash), "-");
      if (index && *index < layers_.size()) {
        // Of the node's parameters: 1 rotated elements, 5 base, 6 scale, 7 extrapolation factor,
        // 8 attention factor.
        TappedLayer& layer = layers_[*index];
        layer.rope_theta = static_cast<double>(float_parameter(node, 5));
        layer.rope_dims = static_cast<std::size_t>(node->op_params[1]);
        layer.rope_scaled = node->src[2] != nullptr || float_parameter(node, 6) != 1.0f ||
                            float_parameter(node, 7) != 0.0f || float_parameter(node, 8) != 1.0f;
      }
    } else if (options_.keep_wo && node->op == GGML_OP_MUL_MAT) {
      constexpr std::string_view tail = ".attn_output.weight";
      std::string_view weight = node->src[0]->name;
      if (!weight.ends_with(tail)) return;
      weight.remove_suffix(tail.size());
      const auto index = layer_of(weight, "blk.");
      if (index && *index < layers_.size() && options_.selected.contains(*index)) {
        read_weights(node->src[0], layers_[*index]);
      }
    }
  }

  static void read_weights(const ggml_tensor* weight, TappedLayer& layer) {
    if (!layer.wo.empty() || !ggml_backend_buffer_is_host(weight->buffer)) return;
    const auto count = static_cast<std::size_t>(ggml_nelements(weight));
    layer.wo.resize(count);
    if (weight->type == GGML_TYPE_F32) {
      std::memcpy(layer.wo.data(), weight->data, count * sizeof(float));
    } else if (const auto to_float = ggml_get_type_traits(weight->type)->to_float) {
      to_float(weight->data, layer.wo.data(), static_cast<std::int64_t>(count));
    } else {
      layer.wo.clear();
      return;
    }
    layer.hidden = static_cast<std::size_t>(weight->ne[1]);
  }

  static float element(const ggml_tensor* tensor, std::size_t i0, std::size_t i1, std::size_t i2) {
    float value = 0.0f;
    std::memcpy(&value,
                static_cast<const char*>(tensor->data) + i0 * tensor->nb[0] + i1 * tensor->nb[1] +
                    i2 * tensor->nb[2],
                sizeof value);
    return value;
  }

  static std::size_t extent(const ggml_tensor* tensor, int axis) {
    return static_cast<std::size_t>(tensor->ne[axis]);
  }

  /// Copies the batch's tokens from a tensor whose axes are given, tokens starting at `offset`.
  /// Tokens before `from_token` are left out, and the rows count from it.
  void copy_rows(const ggml_tensor* from, int token_axis, std::size_t offset, HeadRows& to,
                 std::size_t from_token = 0) const {
    const int dim_axis = 1 - token_axis;
    to.resize(extent(from, 2), options_.tokens - from_token, extent(from, dim_axis));
    for (std::size_t head = 0; head < to.heads; ++head) {
      for (std::size_t i = first_ < from_token ? from_token - first_ : 0; i < count_; ++i) {
        copy_floats(from, (offset + i) * from->nb[token_axis] + head * from->nb[2],
                    from->nb[dim_axis], to.row(head, first_ + i - from_token), to.dim);
      }
    }
  }

  /// scores [cells, tokens, query heads] = keys [dim, cells, kv heads] . queries [dim, tokens, ...]
  std::string read_scores(const ggml_tensor* node, TappedLayer& layer) const {
    const ggml_tensor* keys = node->src[0];
    const ggml_tensor* queries = node->src[1];
    if (!is_readable(keys) || !is_readable(queries) || extent(queries, 1) != count_ ||
        extent(keys, 1) < first_ + count_ || extent(queries, 2) % extent(keys, 2) != 0) {
      return "lays out its queries and keys in a way this program does not know";
    }
    copy_rows(queries, 1, 0, layer.q);
    copy_rows(keys, 1, first_, layer.k);
    layer.has_scores = true;
    return {};
  }

  /// output [dim, tokens, query heads] = values [cells, dim, kv heads] . weights
  std::string read_output(const ggml_tensor* node, TappedLayer& layer) const {
    const ggml_tensor* values = node->src[0];
    if (!is_readable(values) || !is_readable(node) || extent(node, 1) != count_ ||
        extent(values, 0) < first_ + count_) {
      return "lays out its values in a way this program does not know";
    }
    copy_rows(values, 0, first_, layer.v);
    if (options_.keep_output && first_ + count_ > options_.output_from) {
      copy_rows(node, 1, 0, layer.output, options_.output_from);
    }
    layer.has_output = true;
    return {};
  }

  /// Adds what the batch's queries paid to every token. Few rows are summed in float, then in
  /// double: the same accuracy however long the text.
  void add_mass(const ggml_tensor* node, TappedLayer& layer) const {
    constexpr std::size_t rows_at_a_time = 32;
    const std::size_t heads = layer.k.heads;
    const std::size_t group = extent(node, 2) / heads;
    const std::size_t cells = first_ + count_;
    if (layer.mass.empty()) layer.mass.assign(heads * options_.tokens, 0.0);
    std::vector<float> sum(cells);
    for (std::size_t head = 0; head < extent(node, 2); ++head) {
      double* total = layer.mass.data() + head / group * options_.tokens;
      for (std::size_t begin = 0; begin < count_; begin += rows_at_a_time) {
        const std::size_t end = std::min(count_, begin + rows_at_a_time);
        std::fill(sum.begin(), sum.end(), 0.0f);
        for (std::size_t i = begin; i < end; ++i) {
          const auto* row = reinterpret_cast<const float*>(static_cast<const char*>(node->data) +
                                                           i * node->nb[1] + head * node->nb[2]);
          const std::size_t visible = first_ + i + 1;
          for (std::size_t cell = 0; cell < visible; ++cell) sum[cell] += row[cell];
        }
        for (std::size_t cell = 0; cell < cells; ++cell) {
          total[cell] += static_cast<double>(sum[cell]) / static_cast<double>(group);
        }
      }
    }
  }

  /// Scale, softcap and mask; what a capture cannot represent is a problem.
  std::string read_softmax(const ggml_tensor* node, TappedLayer& layer) const {
    const double scale = static_cast<double>(float_parameter(node, 0));
    if (float_parameter(node, 1) != 0.0f) return "uses ALiBi";
    if (node->src[2] != nullptr) return "uses attention sinks of its own (sink logits)";

    // Either the scores come straight from `kq`, or as cap * tanh(inner * kq).
    const ggml_tensor* scores = node->src[0];
    if (scores->op == GGML_OP_MUL_MAT) {
      layer.attention_scale = scale;
      layer.logit_softcap = 0.0;
    } else {
      const ggml_tensor* outer = scores;
      const ggml_tensor* tanh = outer->op == GGML_OP_SCALE ? outer->src[0] : nullptr;
      const ggml_tensor* inner = tanh != nullptr && tanh->op == GGML_OP_UNARY &&
                                         ggml_get_unary_op(tanh) == GGML_UNARY_OP_TANH
                                     ? tanh->src[0]
                                     : nullptr;
      const bool softcapped =
          inner != nullptr && inner->op == GGML_OP_SCALE && inner->src[0]->op == GGML_OP_MUL_MAT &&
          float_parameter(outer, 1) == 0.0f && float_parameter(inner, 1) == 0.0f;
      if (!softcapped) return "adds something to its scores that a capture cannot hold";
      layer.logit_softcap = scale * static_cast<double>(float_parameter(outer, 0));
      // Both factors are floats; so is the scale they stand for.
      const double product = layer.logit_softcap * static_cast<double>(float_parameter(inner, 0));
      layer.attention_scale = static_cast<double>(static_cast<float>(product));
    }
    layer.has_softmax = true;
    std::string problem = check_mask(node->src[1]);
    if (problem.empty() && options_.keep_mass && layer.has_scores) {
      if (!is_readable(node) || node->nb[0] != sizeof(float)) return "has no weights to be read";
      add_mass(node, layer);
    }
    return problem;
  }

  /// Cell c must be position c, and a query must see exactly the cells up to its own. The first and
  /// the last query of the batch are looked at.
  std::string check_mask(const ggml_tensor* mask) const {
    if (!is_readable(mask) || extent(mask, 1) < count_ || extent(mask, 0) < first_ + count_ ||
        extent(mask, 2) != 1) {
      return "has no attention mask that this program can read";
    }
    for (const std::size_t i : {std::size_t{0}, count_ - 1}) {
      const std::size_t position = first_ + i;
      for (std::size_t cell = 0; cell < extent(mask, 0); ++cell) {
        const bool visible = !std::isinf(element(mask, cell, i, 0));
        if (visible == (cell <= position)) continue;
        return visible ? "does not use causal attention"
                       : "does not attend to all earlier tokens (a sliding window, or chunks)";
      }
    }
    return {};
  }

  Options options_;
  std::vector<TappedLayer> layers_;
  std::size_t first_ = 0;
  std::size_t count_ = 0;
};

}  // namespace kvlean::llama_cpp
