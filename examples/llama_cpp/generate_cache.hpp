// The cache of a running llama.cpp context as KVLean sees it: fetched as a state blob, compressed
// where it lies, and written back with fewer cells.
//
// One cell array serves all layers and heads, so slot j of every head goes into cell j, whichever
// tokens those are. What the engine does not keep is kept here: the position of each slot, its log
// mass, and the attention it has received.
#pragma once

#include <llama.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <numeric>
#include <span>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "engine.hpp"
#include "generate_tap.hpp"
#include "kvlean/apply/renumber.hpp"
#include "kvlean/kvlean.hpp"
#include "state_blob.hpp"

namespace kvlean::llama_cpp {

/// What becomes of the log mass that a policy gives to slots.
enum class LogMassUse {
  refuse,  ///< it is an error
  drop,    ///< slots lose it
  add,     ///< the tap adds it to the scores; heads may then differ in length as well
};

struct SlotCacheOptions {
  PlanOptions plan;
  bool contiguous = false;  ///< slots are renumbered from 0 and their keys turned
  LogMassUse log_mass = LogMassUse::refuse;
};

/// Whether a policy needs attention summed over all queries, and not only the newest of them.
inline bool needs_accumulated_mass(const AnyPolicy& policy) {
  const PolicyStages stages = policy.stages();
  if (stages.keeps_everything) return false;
  const AnyScorer& scorer = policy.scorer;
  const bool has_own_mass =
      std::holds_alternative<SnapKVScorer>(scorer) || std::holds_alternative<TOVAScorer>(scorer);
  const bool needs_none = std::holds_alternative<StreamingLLMScorer>(scorer) ||
                          std::holds_alternative<KeyNormScorer>(scorer) ||
                          std::holds_alternative<RandomScorer>(scorer);
  if (stages.wants_mass && (stages.prefers_accumulated_mass || !has_own_mass)) return true;
  return !has_own_mass && !needs_none;
}

class SlotCache {
 public:
  SlotCache(GenerateTap& tap, const AnyPolicy& policy, const SlotCacheOptions& options)
      : tap_(tap),
        policy_(policy),
        options_(options),
        wants_mass_(needs_accumulated_mass(policy)) {}
  SlotCache(const SlotCache&) = delete;
  SlotCache& operator=(const SlotCache&) = delete;

  /// Finds the layers whose cache has `context_cells` cells, after the tap has learnt them: those
  /// of fewer cells have a sliding window and stay as they are. Fails if there are none, or if one
  /// attends in a way that cannot be compressed.
  Outcome find_layers(std::size_t context_cells) {
    for (std::size_t index = 0; index < tap_.layers().size(); ++index) {
      AttentionLayer& layer = tap_.layers()[index];
      if (!layer.has_keys) continue;
      const std::string name = "layer " + std::to_string(index);
      if (layer.cells != context_cells) {
        window_layers_.push_back(index);
        layer.queries = {};
        continue;
      }
      if (!layer.problem.empty()) return Outcome{name + " " + layer.problem};
      if (!layer.has_attention || layer.kv_heads == 0 || layer.query_heads % layer.kv_heads != 0) {
        return Outcome{name + " has no attention that this program can read"};
      }
      if (options_.contiguous && !layer.rope_known) {
        return Outcome{name + " is rotated in a way that this program does not know; use " +
                       "--positions keep"};
      }
      if (options_.log_mass == LogMassUse::add && layer.attention.softcap > 0.0f) {
        options_.log_mass = LogMassUse::refuse;  // log mass belongs behind the softcap
      }
      layer.recorded = true;
      Layer& added = layers_.emplace_back();
      added.index = index;
      added.heads = layer.kv_heads;
      added.lengths.resize(layer.kv_heads);
      added.stored_lengths.resize(layer.kv_heads);
    }
    for (const std::size_t index : window_layers_) {
      if (options_.contiguous && !tap_.layers()[index].rope_known) {
        return Outcome{"layer " + std::to_string(index) + " is rotated in a way that this " +
                       "program does not know; use --positions keep"};
      }
    }
    if (layers_.empty()) return Outcome{"the model has no layers with a KV cache of all tokens"};
    return Outcome{};
  }

  /// Takes what the context holds now: the slots of the last store(), then the newer tokens.
  Outcome fetch(llama_context* context) {
    bytes_.resize(llama_state_seq_get_size(context, 0));
    const std::size_t size = llama_state_seq_get_data(
        context, reinterpret_cast<std::uint8_t*>(bytes_.data()), bytes_.size(), 0);
    if (size == 0 || size != bytes_.size()) return Outcome{"llama.cpp did not give its state"};
    io::Result<StateBlob> blob = parse_state(bytes_);
    if (!blob) return Outcome{blob.error};
    blob_ = std::move(*blob);
    const BlobCache& cache = blob_.caches.front();
    if (cache.layers.size() != layers_.size() || cache.cells() < known_ || cache.cells() == 0) {
      return Outcome{"the engine's state does not hold the layers that its graph has"};
    }
    if (blob_.caches.size() == 2 && blob_.caches[1].cells() != 0 &&
        blob_.caches[1].layers.size() != window_layers_.size()) {
      return Outcome{"the engine's state does not hold the window layers that its graph has"};
    }
    const std::vector<u32> cell_of = cache.by_position();
    next_position_ = cache.positions[cell_of.back()] + 1;
    for (std::size_t l = 0; l < layers_.size(); ++l) {
      extend(layers_[l], cell_of, cache);
      const AttentionLayer& seen = tap_.layers()[layers_[l].index];
      const BlobLayer& blob_layer = cache.layers[l];
      if (blob_layer.keys.width != seen.kv_heads * seen.key_dim ||
          blob_layer.values.width % seen.kv_heads != 0) {
        return Outcome{"the engine's state does not have the heads that its graph has"};
      }
    }
    cells_ = known_ = cache.cells();
    return Outcome{};
  }

  /// Adds what the queries since the last call paid to the fetched tokens, if the policy wants it.
  Outcome accumulate() {
    const auto count = static_cast<std::size_t>(next_position_ - accumulated_to_);
    if (!wants_mass_ || count == 0) return Outcome{};
    for (std::size_t l = 0; l < layers_.size(); ++l) {
      AttentionLayer& seen = tap_.layers()[layers_[l].index];
      if (seen.query_count() < count) return Outcome{"queries of the text were not recorded"};
      const LayerCache cache = view(layers_[l], blob_.caches.front().layers[l]);
      workspace_.reset();
      const Status status = accumulate_attention(
          cache.view(), newest_queries(seen, count), seen.attention, GroupReduction::mean,
          workspace_, options_.plan.executor, Ragged<float>(layers_[l].mass.data(), cells_));
      if (!status) return Outcome{std::string("observing attention: ") + status.message()};
    }
    accumulated_to_ = next_position_;
    return Outcome{};
  }

  /// Shrinks what was fetched to at most `slots` a head and prepares it for store().
  Outcome compress(std::size_t slots) {
    if (Outcome added = accumulate(); !added) return added;
    workspace_.reset();
    std::vector<LayerCache> caches;
    std::vector<CacheView> views;
    std::vector<Observation> seen;
    for (std::size_t l = 0; l < layers_.size(); ++l) {
      caches.push_back(view(layers_[l], blob_.caches.front().layers[l]));
      AttentionLayer& layer = tap_.layers()[layers_[l].index];
      Observation& observation = seen.emplace_back();
      observation.attention = layer.attention;
      if (layer.query_count() != 0) {
        observation.window = newest_queries(layer, layer.query_count());
      }
      if (wants_mass_) observation.mass = Ragged<const float>(layers_[l].mass.data(), cells_);
    }
    for (const LayerCache& cache : caches) views.push_back(cache.view());
    std::vector<CompressionPlan> plans(layers_.size());
    Status status =
        policy_.plan(views, seen, Budget::slots(slots), workspace_, plans, options_.plan);
    ++options_.plan.step;
    if (status == Status(StatusCode::budget_below_protected)) {
      return Outcome{
          "a budget of " + std::to_string(slots) + " slots is smaller than what is " +
          "protected, " + std::to_string(options_.plan.protection.sinks) + " sinks and " +
          std::to_string(options_.plan.protection.recent) +
          " recent tokens; give a longer text, a larger --budget, or a smaller --recent"};
    }
    if (!status) return Outcome{std::string("planning: ") + status.message()};
    if (Outcome fits = check_lengths(plans, slots); !fits) return fits;

    if (options_.contiguous) {
      RenumberOptions renumbering{options_.plan.protection.sinks, -1};
      if (window_cells() > longest_) {  // the window's cells need positions as well
        renumbering.next_position = static_cast<i32>(window_cells());
      }
      status = renumber(plans, views, workspace_, renumbering);
      if (!status) return Outcome{std::string("renumbering: ") + status.message()};
    }
    for (std::size_t l = 0; l < layers_.size(); ++l) {
      if (wants_mass_) {
        status =
            apply_state(plans[l], Ragged<float>(layers_[l].mass.data(), cells_), MoveRule::sum);
      }
      if (status) status = apply(plans[l], caches[l], in_place);
      if (!status) return Outcome{std::string("applying the plan: ") + status.message()};
    }
    const i32 next = plans.front().next_position;
    const i32 shift = next < 0 ? 0 : next - next_position_;
    next_position_ += shift;
    accumulated_to_ += shift;
    if (Outcome turned = turn_others(shift); !turned) return turned;
    pack(caches, shift);
    return Outcome{};
  }

  /// Writes the compressed cache into a context, whose cache is emptied first.
  Outcome store(llama_context* context) {
    llama_memory_clear(llama_get_memory(context), false);
    detail::first_complaint().clear();
    const std::size_t read = llama_state_seq_set_data(
        context, reinterpret_cast<const std::uint8_t*>(packed_.data()), packed_.size(), 0);
    if (read != packed_.size()) {
      const std::string& why = detail::first_complaint();
      return Outcome{"llama.cpp did not take the compressed cache" +
                     (why.empty() ? why : ": " + why)};
    }
    for (const Layer& layer : layers_) tap_.layers()[layer.index].bias = layer.bias;
    stored_ = known_ = longest_;
    return Outcome{};
  }

  bool wants_mass() const { return wants_mass_; }
  std::size_t num_layers() const { return layers_.size(); }
  std::size_t num_window_layers() const { return window_layers_.size(); }
  /// Cells that were fetched.
  std::size_t cells() const { return cells_; }
  /// Fetched cells of the window layers.
  std::size_t window_cells() const {
    return blob_.caches.size() == 2 ? blob_.caches[1].cells() : 0;
  }
  /// Slots of the shortest and the longest head after compress().
  std::size_t shortest() const { return shortest_; }
  std::size_t longest() const { return longest_; }
  i32 next_position() const { return next_position_; }
  /// The model's layer that is the l-th compressed one.
  std::size_t layer_index(std::size_t l) const { return layers_[l].index; }
  /// What the l-th compressed layer holds: slots of a head, and each one's position and log mass.
  u32 length(std::size_t l, std::size_t head) const { return layers_[l].lengths[head]; }
  i32 position(std::size_t l, std::size_t head, std::size_t slot) const {
    return layers_[l].positions[head * layers_[l].stride + slot];
  }
  float log_mass(std::size_t l, std::size_t head, std::size_t slot) const {
    return layers_[l].log_mass[head * layers_[l].stride + slot];
  }
  /// The blob that store() writes.
  std::span<const std::byte> packed() const { return packed_; }

 private:
  using LayerCache = KVCache<ByteRows>;

  struct Layer {
    std::size_t index = 0;  ///< in the model
    std::size_t heads = 0;
    std::size_t stride = 0;           ///< of the arrays below from head to head
    std::vector<u32> lengths;         ///< [heads]
    std::vector<u32> stored_lengths;  ///< [heads] slots in the first cells of the last store()
    std::vector<u32> order;           ///< [heads][stride] the cell of each token, as all below
    std::vector<i32> positions;
    std::vector<float> log_mass;
    std::vector<float> mass;
    std::vector<float> bias;  ///< [heads][cells of the next store()], or empty
  };

  /// Moves a layer's arrays to the stride of the fetched cache and adds the new tokens to each
  /// head.
  void extend(Layer& layer, const std::vector<u32>& cell_of, const BlobCache& cache) const {
    const std::size_t stride = cell_of.size();
    const std::size_t added = stride - known_;
    std::vector<u32> order(layer.heads * stride);
    std::vector<i32> positions(layer.heads * stride);
    std::vector<float> log_mass(layer.heads * stride);
    std::vector<float> mass(layer.heads * stride);
    for (std::size_t head = 0; head < layer.heads; ++head) {
      const std::size_t length = layer.lengths[head];
      const std::size_t from = head * layer.stride;
      const std::size_t to = head * stride;
      for (std::size_t t = 0; t < length; ++t) {
        positions[to + t] = layer.positions[from + t];
        log_mass[to + t] = layer.log_mass[from + t];
        mass[to + t] = layer.mass[from + t];
      }
      for (std::size_t t = 0; t < length + added; ++t) {
        // Shorter heads leave cells empty between their slots and the newer tokens.
        const std::size_t slots = layer.stored_lengths[head];
        order[to + t] = cell_of[t < slots ? t : stored_ + t - slots];
        if (t >= length) positions[to + t] = cache.positions[order[to + t]];
      }
      layer.lengths[head] = static_cast<u32>(length + added);
    }
    layer.order = std::move(order);
    layer.positions = std::move(positions);
    layer.log_mass = std::move(log_mass);
    layer.mass = std::move(mass);
    layer.stride = stride;
  }

  LayerCache view(Layer& layer, const BlobLayer& blob) {
    AttentionLayer& seen = tap_.layers()[layer.index];
    const auto rows = [&](const BlobTensor& tensor) {
      return blob_rows(bytes_, tensor, cells_, layer.heads, layer.order.data(), layer.stride);
    };
    LayerCache cache(rows(blob.keys), rows(blob.values));
    cache.set_lengths(layer.lengths.data())
        .set_positions(Ragged<i32>(layer.positions.data(), layer.stride), next_position_)
        .set_origin({0, static_cast<u32>(layer.index), 0});
    if (seen.rope_known) cache.set_rope(&seen.rope);
    if (options_.log_mass != LogMassUse::refuse) {
      cache.set_log_mass(Ragged<float>(layer.log_mass.data(), layer.stride));
    }
    return cache;
  }

  /// The newest `count` recorded queries; they end where the cache ends.
  Queries newest_queries(AttentionLayer& layer, std::size_t count) const {
    const std::size_t recorded = layer.query_count();
    Queries result = queries(recorded_rows(layer));
    result.count = static_cast<u32>(count);
    result.first_row = static_cast<u32>(recorded - count);
    result.first_position = next_position_ - static_cast<i32>(count);
    return result;
  }
  static Strided<float> recorded_rows(AttentionLayer& layer) {
    const auto dim = static_cast<std::ptrdiff_t>(layer.key_dim);
    const auto each = static_cast<std::ptrdiff_t>(layer.query_floats());
    return strided(layer.queries.data(),
                   QueryExtents{layer.query_heads, layer.query_count(), layer.key_dim},
                   Strides{dim, each, 1});
  }

  /// Finds the shortest and the longest head, and whether the engine can hold both.
  Outcome check_lengths(std::span<const CompressionPlan> plans, std::size_t slots) {
    shortest_ = std::numeric_limits<std::size_t>::max();
    longest_ = 0;
    bool has_log_mass = false;
    for (const CompressionPlan& plan : plans) {
      for (u32 head = 0; head < plan.segments; ++head) {
        shortest_ = std::min<std::size_t>(shortest_, plan.length[head]);
        longest_ = std::max<std::size_t>(longest_, plan.length[head]);
      }
      has_log_mass = has_log_mass || plan.log_mass != nullptr;
    }
    const std::string needs = "; it needs --flash-attention off, and a model without softcap";
    if (has_log_mass && options_.log_mass == LogMassUse::refuse) {
      return Outcome{"the policy gives slots a log mass, which flash attention cannot add" + needs +
                     ", or --log-mass drop"};
    }
    if (shortest_ != longest_ && options_.log_mass != LogMassUse::add) {
      return Outcome{"the policy keeps from " + std::to_string(shortest_) + " to " +
                     std::to_string(longest_) + " tokens a head, and the engine has one count " +
                     "for all" + needs};
    }
    if (slots < cells_ && longest_ >= cells_ && !policy_.keeps_everything) {
      return Outcome{"the policy keeps all " + std::to_string(cells_) + " tokens of some head"};
    }
    return Outcome{};
  }

  /// Turns what must follow the renumbered slots: the window layers' keys and the queries.
  Outcome turn_others(i32 shift) {
    if (shift == 0) return Outcome{};
    Status status;
    for (const Layer& layer : layers_) {
      AttentionLayer& seen = tap_.layers()[layer.index];
      if (!status || seen.query_count() == 0) continue;
      status =
          rotate_rows(recorded_rows(seen), static_cast<u32>(seen.query_count()), seen.rope, shift);
    }
    for (std::size_t l = 0; status && window_cells() != 0 && l < window_layers_.size(); ++l) {
      const AttentionLayer& seen = tap_.layers()[window_layers_[l]];
      const BlobCache& window = blob_.caches[1];
      const ByteRows keys =
          blob_rows(bytes_, window.layers[l].keys, window.cells(), seen.kv_heads, nullptr, 0);
      status = rotate_rows(keys, static_cast<u32>(window.cells()), seen.rope, shift);
    }
    if (!status) return Outcome{std::string("renumbering: ") + status.message()};
    return Outcome{};
  }

  /// Writes the new blob and the biases that go with it.
  void pack(std::span<const LayerCache> caches, i32 shift) {
    // A cell's position only says who sees it: all slots lie before the next token.
    std::vector<std::int32_t> positions(longest_);
    std::iota(positions.begin(), positions.end(),
              next_position_ - static_cast<std::int32_t>(longest_));
    const BlobCache& base = blob_.caches.front();
    BlobWriter writer(packed_, blob_.sequence);
    writer.begin_cache(positions, base.layers.front().values.transposed, layers_.size());
    for (std::size_t l = 0; l < layers_.size(); ++l) {
      writer.keys(caches[l].view().keys, layers_[l].lengths.data());
    }
    for (std::size_t l = 0; l < layers_.size(); ++l) {
      writer.values(caches[l].view().values, layers_[l].lengths.data());
    }
    if (blob_.caches.size() == 2) writer.copy_cache(bytes_, blob_.caches[1], shift);
    for (Layer& layer : layers_) {
      layer.stored_lengths = layer.lengths;
      if (options_.log_mass == LogMassUse::drop) {
        std::fill(layer.log_mass.begin(), layer.log_mass.end(), 0.0f);
      } else if (options_.log_mass == LogMassUse::add) {
        set_bias(layer);
      }
    }
  }

  void set_bias(Layer& layer) const {
    std::vector<float>& bias = layer.bias;
    bias.assign(layer.heads * longest_, -std::numeric_limits<float>::infinity());
    bool any = false;
    for (std::size_t head = 0; head < layer.heads; ++head) {
      const auto from = layer.log_mass.begin() + static_cast<std::ptrdiff_t>(head * layer.stride);
      std::copy_n(from, layer.lengths[head],
                  bias.begin() + static_cast<std::ptrdiff_t>(head * longest_));
    }
    for (const float value : bias) any = any || value != 0.0f;
    if (!any) bias.clear();
  }

  GenerateTap& tap_;
  const AnyPolicy& policy_;
  SlotCacheOptions options_;
  bool wants_mass_ = false;
  std::vector<Layer> layers_;
  std::vector<std::size_t> window_layers_;  ///< in the model
  std::vector<std::byte> bytes_;            ///< the blob that was fetched
  std::vector<std::byte> packed_;           ///< the blob to store
  StateBlob blob_;
  std::size_t cells_ = 0;   ///< fetched
  std::size_t known_ = 0;   ///< cells that the layers' arrays describe
  std::size_t stored_ = 0;  ///< cells of the last store(): the longest head's slots
  std::size_t shortest_ = 0;
  std::size_t longest_ = 0;
  i32 next_position_ = 0;
  i32 accumulated_to_ = 0;  ///< queries from this position on have not been accumulated
  Workspace workspace_;
};

}  // namespace kvlean::llama_cpp
