// Captures: the queries, keys and values of some layers of a real model over a real text.
//
// A capture is a safetensors file. For every captured layer L it holds
//   layer.<L>.q   [query heads, tokens, key dim]     after rotary position embedding
//   layer.<L>.k   [kv heads, tokens, key dim]        after rotary position embedding
//   layer.<L>.v   [kv heads, tokens, value dim]
//   layer.<L>.wo  [hidden, query heads * value dim]  optional: the output projection
// as F16, BF16 or F32, and as metadata strings `model`, `licence`, `text`, `rope_theta`,
// `rope_pairing`, `context_tokens`, and optionally `num_layers`, `attention_scale` and
// `logit_softcap`. Query head h reads KV head h / (query heads / kv heads). Tokens before
// `context_tokens` are the context that is compressed; the queries from there on are the future.
#pragma once

#include <charconv>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include "safetensors.hpp"

namespace kvlean::io {

/// Which dimensions of a row rotate together: (2i, 2i + 1) or (i, i + dim / 2).
enum class RopePairing { norm, neox };

/// The metadata string: "norm" or "neox".
inline std::string_view rope_pairing_name(RopePairing pairing) {
  return pairing == RopePairing::norm ? "norm" : "neox";
}

/// One captured layer. The sizes below may be asked of a validated layer only (`load_capture` and
/// `validate_capture` see to it).
struct CaptureLayer {
  std::size_t index = 0;     ///< the layer's number in the model, from 0
  Tensor q;                  ///< [query heads, tokens, key dim]
  Tensor k;                  ///< [kv heads, tokens, key dim]
  Tensor v;                  ///< [kv heads, tokens, value dim]
  std::optional<Tensor> wo;  ///< [hidden, query heads * value dim]

  std::size_t query_heads() const { return q.shape[0]; }
  std::size_t kv_heads() const { return k.shape[0]; }
  std::size_t tokens() const { return k.shape[1]; }
  std::size_t key_dim() const { return k.shape[2]; }
  std::size_t value_dim() const { return v.shape[2]; }
};

/// A capture in memory.
struct Capture {
  std::string model;    ///< what the tensors came out of
  std::string licence;  ///< the model's licence
  std::string text;     ///< what was read, and which part of it
  double rope_theta = 0.0;
  RopePairing rope_pairing = RopePairing::norm;
  std::size_t context_tokens = 0;         ///< C: tokens [0, C) are compressed
  std::optional<std::size_t> num_layers;  ///< layers of the whole model
  std::optional<double> attention_scale;  ///< factor of q.k; 1 / sqrt(key dim) if absent
  std::optional<double> logit_softcap;    ///< c of c * tanh(scale * q.k / c); none if absent
  std::vector<CaptureLayer> layers;       ///< ascending by index, never empty when valid

  /// Tokens of every layer, context and future together.
  std::size_t tokens() const { return layers.front().tokens(); }
  /// Tokens from `context_tokens` on.
  std::size_t future_tokens() const { return tokens() - context_tokens; }
  /// The factor of q.k that a layer uses.
  double scale(const CaptureLayer& layer) const {
    return attention_scale.value_or(1.0 / std::sqrt(static_cast<double>(layer.key_dim())));
  }
};

namespace detail {

inline bool is_float(DType dtype) {
  return dtype == DType::f32 || dtype == DType::f16 || dtype == DType::bf16;
}

/// Whether no element is an infinity or a NaN: such an element has all exponent bits set.
inline bool all_finite(const Tensor& tensor) {
  const auto check = [&](auto mask) {
    using Bits = decltype(mask);
    for (std::size_t at = 0; at + sizeof(Bits) <= tensor.bytes.size(); at += sizeof(Bits)) {
      Bits bits = 0;
      std::memcpy(&bits, tensor.bytes.data() + at, sizeof(Bits));
      if ((bits & mask) == mask) return false;
    }
    return true;
  };
  switch (tensor.dtype) {
    case DType::f32:
      return check(std::uint32_t{0x7f800000});
    case DType::f16:
      return check(std::uint16_t{0x7c00});
    case DType::bf16:
      return check(std::uint16_t{0x7f80});
    default:
      return true;
  }
}

inline std::string layer_name(std::size_t index, std::string_view part) {
  return "layer." + std::to_string(index) + "." + std::string(part);
}

/// Decimal text of a number, no exponent: what the metadata strings hold.
inline std::string number_text(double number) {
  char text[400];
  const auto end = std::to_chars(text, text + sizeof text, number, std::chars_format::fixed).ptr;
  return std::string(text, end);
}

/// The number that a whole string spells; empty if it is none.
template <class Number>
std::optional<Number> parse_number(std::string_view text) {
  Number number = {};
  const auto [end, code] = std::from_chars(text.data(), text.data() + text.size(), number);
  if (code != std::errc() || end != text.data() + text.size()) return std::nullopt;
  return number;
}

/// What is wrong with one tensor of a layer, or nothing.
inline std::string check_tensor(const std::string& name, const Tensor& tensor, std::size_t rank) {
  if (!is_float(tensor.dtype)) {
    return name + " has dtype " + std::string(dtype_name(tensor.dtype)) +
           "; F16, BF16 or F32 is needed";
  }
  if (tensor.shape.size() != rank) {
    return name + " has " + std::to_string(tensor.shape.size()) + " dimensions, not " +
           std::to_string(rank);
  }
  for (const std::size_t extent : tensor.shape) {
    if (extent == 0) return name + " is empty";
  }
  if (tensor_bytes(tensor.dtype, tensor.shape) != tensor.bytes.size()) {
    return name + " has bytes that do not fit its shape";
  }
  if (!all_finite(tensor)) return name + " holds a value that is not finite";
  return {};
}

/// Complains that an extent of two tensors differs.
inline std::string mismatch(const std::string& a, std::size_t a_extent, const std::string& b,
                            std::size_t b_extent, std::string_view what) {
  return a + " has " + std::to_string(a_extent) + " " + std::string(what) + " but " + b + " has " +
         std::to_string(b_extent);
}

inline std::string check_layer(const CaptureLayer& layer) {
  const std::string q = layer_name(layer.index, "q");
  const std::string k = layer_name(layer.index, "k");
  const std::string v = layer_name(layer.index, "v");
  for (const auto& [name, tensor] : {std::pair{&q, &layer.q}, {&k, &layer.k}, {&v, &layer.v}}) {
    if (std::string why = check_tensor(*name, *tensor, 3); !why.empty()) return why;
  }
  if (layer.v.shape[0] != layer.kv_heads()) {
    return mismatch(k, layer.kv_heads(), v, layer.v.shape[0], "heads");
  }
  if (layer.query_heads() % layer.kv_heads() != 0) {
    return q + " has " + std::to_string(layer.query_heads()) + " heads, not a multiple of the " +
           std::to_string(layer.kv_heads()) + " of " + k;
  }
  if (layer.q.shape[1] != layer.tokens()) {
    return mismatch(q, layer.q.shape[1], k, layer.tokens(), "tokens");
  }
  if (layer.v.shape[1] != layer.tokens()) {
    return mismatch(v, layer.v.shape[1], k, layer.tokens(), "tokens");
  }
  if (layer.q.shape[2] != layer.key_dim()) {
    return mismatch(q, layer.q.shape[2], k, layer.key_dim(), "dimensions a row");
  }
  if (layer.wo) {
    const std::string wo = layer_name(layer.index, "wo");
    if (std::string why = check_tensor(wo, *layer.wo, 2); !why.empty()) return why;
    if (layer.wo->shape[1] != layer.query_heads() * layer.value_dim()) {
      return wo + " has " + std::to_string(layer.wo->shape[1]) + " columns, not " +
             std::to_string(layer.query_heads()) + " heads * " + std::to_string(layer.value_dim());
    }
  }
  return {};
}

}  // namespace detail

/// Checks a capture in memory: at least one layer, ascending; shapes that agree within a layer and
/// as many tokens in every layer; finite values; metadata in range, 0 < context_tokens < tokens.
inline Outcome validate_capture(const Capture& capture) {
  if (capture.layers.empty()) return Outcome{"has no layers"};
  for (const CaptureLayer& layer : capture.layers) {
    if (std::string why = detail::check_layer(layer); !why.empty()) return Outcome{why};
    const CaptureLayer& first = capture.layers.front();
    if (layer.tokens() != first.tokens()) {
      return Outcome{detail::mismatch(detail::layer_name(layer.index, "k"), layer.tokens(),
                                      detail::layer_name(first.index, "k"), first.tokens(),
                                      "tokens")};
    }
    if (capture.num_layers && layer.index >= *capture.num_layers) {
      return Outcome{"has layer " + std::to_string(layer.index) + " but metadata 'num_layers' is " +
                     std::to_string(*capture.num_layers)};
    }
  }
  for (std::size_t i = 1; i < capture.layers.size(); ++i) {
    if (capture.layers[i - 1].index >= capture.layers[i].index) {
      return Outcome{"the layers are not in ascending order"};
    }
  }
  if (capture.context_tokens == 0 || capture.context_tokens >= capture.tokens()) {
    return Outcome{"metadata 'context_tokens' is " + std::to_string(capture.context_tokens) +
                   "; it must lie between 0 and the " + std::to_string(capture.tokens()) +
                   " tokens of the capture"};
  }
  const auto positive = [](double number) { return std::isfinite(number) && number > 0.0; };
  if (!positive(capture.rope_theta)) {
    return Outcome{"metadata 'rope_theta' is not a positive number"};
  }
  if (capture.attention_scale && !positive(*capture.attention_scale)) {
    return Outcome{"metadata 'attention_scale' is not a positive number"};
  }
  if (capture.logit_softcap && !positive(*capture.logit_softcap)) {
    return Outcome{"metadata 'logit_softcap' is not a positive number"};
  }
  return Outcome{};
}

namespace detail {

/// Reads the metadata strings; returns what is wrong, or nothing.
inline std::string read_metadata(const Metadata& metadata, Capture& capture) {
  const auto find = [&](const char* key) -> const std::string* {
    const auto found = metadata.find(key);
    return found == metadata.end() ? nullptr : &found->second;
  };
  for (const char* key :
       {"model", "licence", "text", "rope_theta", "rope_pairing", "context_tokens"}) {
    if (find(key) == nullptr) return "metadata '" + std::string(key) + "' is missing";
  }
  capture.model = *find("model");
  capture.licence = *find("licence");
  capture.text = *find("text");

  const auto not_a = [&](const char* key, const char* what) {
    return "metadata '" + std::string(key) + "' is '" + printable(*find(key)) + "', not " + what;
  };
  const auto theta = parse_number<double>(*find("rope_theta"));
  if (!theta) return not_a("rope_theta", "a number");
  capture.rope_theta = *theta;

  const std::string& pairing = *find("rope_pairing");
  if (pairing != "norm" && pairing != "neox") return not_a("rope_pairing", "norm or neox");
  capture.rope_pairing = pairing == "norm" ? RopePairing::norm : RopePairing::neox;

  const auto context = parse_number<std::size_t>(*find("context_tokens"));
  if (!context) return not_a("context_tokens", "a whole number");
  capture.context_tokens = *context;

  if (const std::string* text = find("num_layers")) {
    capture.num_layers = parse_number<std::size_t>(*text);
    if (!capture.num_layers) return not_a("num_layers", "a whole number");
  }
  if (const std::string* text = find("attention_scale")) {
    capture.attention_scale = parse_number<double>(*text);
    if (!capture.attention_scale) return not_a("attention_scale", "a number");
  }
  if (const std::string* text = find("logit_softcap")) {
    capture.logit_softcap = parse_number<double>(*text);
    if (!capture.logit_softcap) return not_a("logit_softcap", "a number");
  }
  return {};
}

/// The numbers of the layers a file has tensors of; fails on a name of the form `layer.*` that the
/// format does not know. Other names are left alone.
inline Result<std::set<std::size_t>> find_layers(const SafetensorsFile& file) {
  using R = Result<std::set<std::size_t>>;
  constexpr std::string_view prefix = "layer.";
  std::set<std::size_t> layers;
  for (const auto& [name, info] : file.tensors()) {
    if (!std::string_view(name).starts_with(prefix)) continue;
    const std::string_view rest = std::string_view(name).substr(prefix.size());
    const std::size_t dot = rest.find('.');
    const auto index = parse_number<std::size_t>(rest.substr(0, dot));
    const std::string_view part =
        dot == std::string_view::npos ? std::string_view() : rest.substr(dot + 1);
    const bool known = part == "q" || part == "k" || part == "v" || part == "wo";
    if (!index || !known || name != layer_name(*index, part)) {
      return R::failure("tensor '" + printable(name) +
                        "' is none of layer.<number>.q, .k, .v and .wo");
    }
    layers.insert(*index);
  }
  return R::success(std::move(layers));
}

}  // namespace detail

/// Loads and checks a capture. On failure the error is one line that begins with the path: a file
/// that is missing, truncated or no safetensors file; a layer without q, k or v; a wrong dtype or
/// shape; heads or tokens that do not agree; values that are not finite; metadata that is missing
/// or out of range.
inline Result<Capture> load_capture(const std::string& path) {
  using R = Result<Capture>;
  Result<SafetensorsFile> file = SafetensorsFile::open(path);
  if (!file) return R::failure(std::move(file.error));
  const auto fail = [&](const std::string& why) { return R::failure(file->path() + ": " + why); };

  Capture capture;
  const Result<std::set<std::size_t>> indices = detail::find_layers(*file);
  if (!indices) return fail(indices.error);
  if (indices->empty()) return fail("not a capture: it has no tensor named layer.<number>.k");
  if (const std::string why = detail::read_metadata(file->metadata(), capture); !why.empty()) {
    return fail(why);
  }
  for (const std::size_t index : *indices) {
    CaptureLayer layer;
    layer.index = index;
    for (const auto& [part, tensor] :
         {std::pair{"q", &layer.q}, std::pair{"k", &layer.k}, std::pair{"v", &layer.v}}) {
      const std::string name = detail::layer_name(index, part);
      if (file->find(name) == nullptr) return fail("tensor '" + name + "' is missing");
      Result<Tensor> read = file->read(name);
      if (!read) return R::failure(std::move(read.error));
      *tensor = std::move(*read);
    }
    if (const std::string name = detail::layer_name(index, "wo"); file->find(name) != nullptr) {
      Result<Tensor> read = file->read(name);
      if (!read) return R::failure(std::move(read.error));
      layer.wo = std::move(*read);
    }
    capture.layers.push_back(std::move(layer));
  }
  if (const Outcome valid = validate_capture(capture); !valid) return fail(valid.error);
  return R::success(std::move(capture));
}

/// Checks a capture and writes it. The file appears under its name only when complete. The error is
/// one line that begins with the path.
inline Outcome save_capture(const std::string& path, const Capture& capture) {
  if (const Outcome valid = validate_capture(capture); !valid) {
    return Outcome{detail::printable(path, 1000) + ": not written: " + valid.error};
  }
  Metadata metadata = {{"model", capture.model},
                       {"licence", capture.licence},
                       {"text", capture.text},
                       {"rope_theta", detail::number_text(capture.rope_theta)},
                       {"rope_pairing", std::string(rope_pairing_name(capture.rope_pairing))},
                       {"context_tokens", std::to_string(capture.context_tokens)}};
  if (capture.num_layers) metadata["num_layers"] = std::to_string(*capture.num_layers);
  if (capture.attention_scale) {
    metadata["attention_scale"] = detail::number_text(*capture.attention_scale);
  }
  if (capture.logit_softcap) {
    metadata["logit_softcap"] = detail::number_text(*capture.logit_softcap);
  }
  std::vector<TensorView> views;
  for (const CaptureLayer& layer : capture.layers) {
    const auto add = [&](std::string_view part, const Tensor& tensor) {
      views.push_back(TensorView{detail::layer_name(layer.index, part), tensor.dtype, tensor.shape,
                                 tensor.bytes});
    };
    add("q", layer.q);
    add("k", layer.k);
    add("v", layer.v);
    if (layer.wo) add("wo", *layer.wo);
  }
  return save_safetensors(path, views, metadata);
}

}  // namespace kvlean::io
