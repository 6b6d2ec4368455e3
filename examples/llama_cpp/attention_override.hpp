// Computes attention of a running llama.cpp graph from caches of our own.
//
// In a layer that is replaced, the queries and the new keys and values are read where attention
// itself reads them (see attention_tap.hpp), the new tokens join the layer's compressed cache, and
// what attention over that cache gives is written over the engine's own result, node
// `kqv-<layer>`, before anything reads it. All later nodes, hence all later layers, see the
// compressed cache only. Layers that are not replaced are left to the engine, which then must still
// hold their cells. The context must be opened as in engine.hpp: F32 cache, no flash attention.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "attention_tap.hpp"
#include "engine.hpp"
#include "kvlean/apply/to_ragged.hpp"
#include "kvlean/attention/attend.hpp"
#include "kvlean/attention/merge_parts.hpp"

namespace kvlean::llama_cpp {

/// One replaced layer: its compressed prefix, and behind it the tokens evaluated since.
class ReplacedLayer {
 public:
  /// Carries out `plan` on `prefix`, into memory with room for `room` more tokens a head.
  [[nodiscard]] Status load(const CompressionPlan& plan, const CacheView& prefix, DType dtype,
                            std::size_t room, const AttentionSpec& attention) {
    RaggedShape shape = ragged_shape(plan, prefix);
    shape.layout = RaggedLayout::fixed;
    shape.capacity_per_head = room;
    for (u32 s = 0; s < plan.segments; ++s) {
      shape.capacity_per_head = std::max(shape.capacity_per_head, plan.length[s] + room);
    }
    shape.key_dtype = dtype;
    shape.value_dtype = dtype;
    storage_.resize(std::max(storage_.size(), RaggedKVCache::bytes_required(shape)));
    KVLEAN_RETURN_IF_ERROR(cache_.bind(storage_, shape));
    KVLEAN_RETURN_IF_ERROR(apply(plan, prefix, cache_));
    spec = attention;
    prefix_lengths_.assign(plan.length, plan.length + plan.segments);
    prefix_end_ = prefix.next_position;
    return StatusCode::ok;
  }

  /// Appends tokens, [kv head][token] rows.
  [[nodiscard]] Status append(const Rows& keys, const Rows& values, std::size_t count,
                              std::size_t first_position) {
    return cache_.append(keys, values, static_cast<u32>(count), static_cast<i32>(first_position));
  }

  /// Forgets everything after the compressed prefix.
  [[nodiscard]] Status rollback() {
    KVLEAN_RETURN_IF_ERROR(cache_.set_lengths(prefix_lengths_));
    cache_.set_next_position(prefix_end_);
    return StatusCode::ok;
  }

  [[nodiscard]] CacheView view() const { return cache_.view(); }

  AttentionSpec spec;

 private:
  std::vector<std::byte> storage_;
  RaggedKVCache cache_;
  std::vector<u32> prefix_lengths_;
  i32 prefix_end_ = 0;
};

/// Rows [head][token][dim] as the library takes them.
[[nodiscard]] inline Rows rows_of(const HeadRows& from, std::size_t first, std::size_t count) {
  const auto stride = static_cast<std::ptrdiff_t>(from.dim);
  return strided(from.values.data() + first * from.dim,
                 Extents{.kv_heads = from.heads, .tokens = count, .dim = from.dim},
                 Strides{.head = static_cast<std::ptrdiff_t>(from.tokens) * stride,
                         .token = stride,
                         .dim = 1})
      .rows();
}

/// Queries [head][token][dim] at consecutive positions.
[[nodiscard]] inline Queries queries_of(const HeadRows& from, std::size_t first, std::size_t count,
                                        std::size_t first_position) {
  Queries queries;
  queries.rows = rows_of(from, first, count);
  queries.count = static_cast<u32>(count);
  queries.first_position = static_cast<i32>(first_position);
  return queries;
}

/// The evaluation callback that replaces attention. Load the layers, then announce every batch:
/// begin_block() ahead of tokens that continue the sequence, begin_branches() ahead of alternative
/// continuations that are evaluated together. After the batch, problem() says whether all went
/// well.
class AttentionOverride {
 public:
  /// As many layers as the model has; none of them is replaced.
  void reset(std::size_t layers) {
    layers_.resize(layers);
    replaced_.assign(layers, false);
    outputs_.resize(layers);
    problem_.clear();
  }
  /// Marks a layer as replaced and gives access to it.
  ReplacedLayer& replace(std::size_t layer) {
    replaced_[layer] = true;
    return layers_[layer];
  }
  ReplacedLayer& layer(std::size_t index) { return layers_[index]; }
  [[nodiscard]] bool replaces(std::size_t index) const { return replaced_[index]; }

  /// The next batch holds `count` tokens that follow all earlier ones, from `position` on.
  void begin_block(std::size_t position, std::size_t count) {
    position_ = position;
    branches_.clear();
    begin(count);
  }
  /// The next batch holds the tokens of several continuations one after the other, counts[b] of
  /// branch b, each of which starts at `position` and sees the tokens so far and itself. Nothing is
  /// appended.
  void begin_branches(std::size_t position, std::span<const std::size_t> counts) {
    position_ = position;
    branches_.assign(counts.begin(), counts.end());
    std::size_t total = 0;
    for (const std::size_t count : branches_) total += count;
    begin(total);
  }
  /// Forgets everything after the compressed prefixes.
  [[nodiscard]] Status rollback() {
    for (std::size_t l = 0; l < layers_.size(); ++l) {
      if (replaced_[l]) KVLEAN_RETURN_IF_ERROR(layers_[l].rollback());
    }
    return StatusCode::ok;
  }

  /// Why the last batch is not to be trusted; empty if it is.
  [[nodiscard]] std::string problem() const {
    if (!problem_.empty()) return problem_;
    for (std::size_t l = 0; l < layers_.size(); ++l) {
      if (replaced_[l] && !written_[l]) {
        return "attention of layer " + std::to_string(l) + " was not met in the graph";
      }
    }
    return {};
  }
  /// What was written in the last batch, [query head][token][value dim].
  [[nodiscard]] const HeadRows& output(std::size_t layer) const { return outputs_[layer]; }
  /// Processor seconds spent on attention since construction, and its multiplications and
  /// additions.
  [[nodiscard]] double seconds() const { return seconds_; }
  [[nodiscard]] double operations() const { return operations_; }

  /// For NodeSwitch.
  static bool on_node(ggml_tensor* node, bool ask, void* self) {
    return static_cast<AttentionOverride*>(self)->handle(node, ask);
  }

 private:
  void begin(std::size_t count) {
    count_ = count;
    cells_.clear();
    written_.assign(layers_.size(), false);
    problem_.clear();
  }

  bool handle(ggml_tensor* node, bool ask) {
    const std::string_view name = node->name;
    if (ask && node->op == GGML_OP_SET_ROWS) read_cells(node);
    if (node->op != GGML_OP_MUL_MAT) return !ask;
    auto layer = layer_of(name, "kq-");
    const bool is_scores = layer.has_value();
    if (!is_scores) layer = layer_of(name, "kqv-");
    if (!layer || *layer >= layers_.size() || !replaced_[*layer]) return !ask;
    if (ask || !problem_.empty()) return true;
    std::string trouble = is_scores ? read_scores(node) : write_output(node, *layer);
    if (!trouble.empty()) problem_ = "layer " + std::to_string(*layer) + " " + trouble;
    return true;  // false would drop the rest of the graph without an error
  }

  /// Where the engine puts the new tokens: the indices are an input, known before the graph runs.
  void read_cells(const ggml_tensor* node) {
    std::string_view name = node->name;
    name = name.substr(0, name.find(' '));  // "cache_k_l3 (view)"
    const auto layer = layer_of(name, "cache_k_l");
    if (!layer || *layer >= layers_.size() || !replaced_[*layer]) return;
    const ggml_tensor* indices = node->src[1];
    cells_.clear();
    if (indices == nullptr || indices->type != GGML_TYPE_I64 || indices->data == nullptr ||
        indices->ne[0] != static_cast<std::int64_t>(count_)) {
      return;
    }
    cells_.resize(count_);
    std::memcpy(cells_.data(), indices->data, count_ * sizeof(std::int64_t));
  }

  std::string read_scores(const ggml_tensor* node) {
    const ggml_tensor* keys = node->src[0];
    const ggml_tensor* queries = node->src[1];
    if (!is_readable(keys) || !is_readable(queries) || cells_.size() != count_ ||
        queries->ne[1] != static_cast<std::int64_t>(count_) || !cells_fit(keys->ne[1])) {
      return "lays out its queries and keys in a way this program does not know";
    }
    const auto extent = [](const ggml_tensor* tensor, int axis) {
      return static_cast<std::size_t>(tensor->ne[axis]);
    };
    queries_.resize(extent(queries, 2), count_, extent(queries, 0));
    for (std::size_t h = 0; h < queries_.heads; ++h) {
      for (std::size_t i = 0; i < count_; ++i) {
        copy_floats(queries, i * queries->nb[1] + h * queries->nb[2], queries->nb[0],
                    queries_.row(h, i), queries_.dim);
      }
    }
    keys_.resize(extent(keys, 2), count_, extent(keys, 0));
    for (std::size_t h = 0; h < keys_.heads; ++h) {
      for (std::size_t i = 0; i < count_; ++i) {
        copy_floats(keys, cell(i) * keys->nb[1] + h * keys->nb[2], keys->nb[0], keys_.row(h, i),
                    keys_.dim);
      }
    }
    return {};
  }

  std::string write_output(const ggml_tensor* node, std::size_t index) {
    const ggml_tensor* values = node->src[0];
    const std::size_t dim = static_cast<std::size_t>(node->ne[0]);
    if (!is_readable(values) || !is_readable(node) || !ggml_is_contiguous(node) ||
        node->ne[1] != static_cast<std::int64_t>(count_) || !cells_fit(values->ne[0]) ||
        static_cast<std::size_t>(node->ne[2]) != queries_.heads) {
      return "lays out its values in a way this program does not know";
    }
    values_.resize(static_cast<std::size_t>(values->ne[2]), count_, dim);
    for (std::size_t h = 0; h < values_.heads; ++h) {
      for (std::size_t i = 0; i < count_; ++i) {
        copy_floats(values, cell(i) * values->nb[0] + h * values->nb[2], values->nb[1],
                    values_.row(h, i), dim);
      }
    }
    HeadRows& output = outputs_[index];
    output.resize(queries_.heads, count_, dim);
    const double start = processor_seconds();
    const Status status = branches_.empty() ? attend_block(layers_[index], output)
                                            : attend_branches(layers_[index], output);
    seconds_ += processor_seconds() - start;
    if (!status) return std::string("cannot be attended to: ") + status.message();
    // The engine's own result is [query head][token][dim] as well.
    std::memcpy(node->data, output.values.data(), output.values.size() * sizeof(float));
    written_[index] = true;
    return {};
  }

  Status attend_block(ReplacedLayer& layer, HeadRows& output) {
    KVLEAN_RETURN_IF_ERROR(
        layer.append(rows_of(keys_, 0, count_), rows_of(values_, 0, count_), count_, position_));
    const CacheView cache = layer.view();
    count_operations(cache);
    return attend(queries_of(queries_, 0, count_, position_), cache, layer.spec,
                  AttentionOutput{output.values.data(), nullptr});
  }

  /// Every branch sees all of the cache, and its own tokens causally: two parts, merged.
  Status attend_branches(ReplacedLayer& layer, HeadRows& output) {
    const CacheView cache = layer.view();
    count_operations(cache);
    lse_.resize(queries_.heads * count_);
    Queries all = queries_of(queries_, 0, count_, position_);
    all.mask = Mask::none;
    KVLEAN_RETURN_IF_ERROR(
        attend(all, cache, layer.spec, AttentionOutput{output.values.data(), lse_.data()}));
    AttentionSpec own_spec = layer.spec;
    own_spec.sink_logits = nullptr;  // counted in the first part
    std::size_t first = 0;
    for (const std::size_t count : branches_) {
      if (count == 0) continue;
      KVCache own(HeadView{rows_of(keys_, first, count)}, HeadView{rows_of(values_, first, count)});
      const Queries queries = queries_of(queries_, first, count, 0);
      part_values_.resize(queries_.heads * count * values_.dim);
      part_lse_.resize(queries_.heads * count);
      const AttentionOutput part{part_values_.data(), part_lse_.data()};
      KVLEAN_RETURN_IF_ERROR(attend(queries, own, own_spec, part));
      // One head at a time: the log-sum-exp of a branch is a slice of the whole.
      const AttentionShape shape{1, static_cast<u32>(count), static_cast<u32>(values_.dim)};
      for (std::size_t h = 0; h < queries_.heads; ++h) {
        KVLEAN_RETURN_IF_ERROR(
            merge_parts(AttentionOutput{output.row(h, first), lse_.data() + h * count_ + first},
                        ConstAttentionOutput{part_values_.data() + h * count * values_.dim,
                                             part_lse_.data() + h * count},
                        shape));
      }
      first += count;
    }
    return StatusCode::ok;
  }

  /// A tensor that is nothing but a row description.
  struct HeadView {
    Rows description;
    [[nodiscard]] Rows rows() const noexcept { return description; }
  };

  void count_operations(const CacheView& cache) {
    const double pairs = static_cast<double>(cache.total_length()) *
                         static_cast<double>(queries_.heads / cache.segments * count_);
    operations_ += pairs * 2.0 * static_cast<double>(cache.keys.width + cache.values.width);
  }

  [[nodiscard]] std::size_t cell(std::size_t i) const {
    return static_cast<std::size_t>(cells_[i]);
  }
  [[nodiscard]] bool cells_fit(std::int64_t cells) const {
    return std::all_of(cells_.begin(), cells_.end(),
                       [&](std::int64_t index) { return index >= 0 && index < cells; });
  }

  std::vector<ReplacedLayer> layers_;
  std::vector<bool> replaced_;
  std::vector<bool> written_;
  std::vector<HeadRows> outputs_;
  std::vector<std::int64_t> cells_;
  std::vector<std::size_t> branches_;
  std::size_t position_ = 0;
  std::size_t count_ = 0;
  HeadRows queries_;
  HeadRows keys_;
  HeadRows values_;
  std::vector<float> lse_;
  std::vector<float> part_values_;
  std::vector<float> part_lse_;
  std::string problem_;
  double seconds_ = 0.0;
  double operations_ = 0.0;
};

}  // namespace kvlean::llama_cpp
