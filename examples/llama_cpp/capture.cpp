// kvlean-capture: writes the queries, keys and values of a real model, over a real text, to a
// capture file. See README.md beside this file for its use and bench/io/capture.hpp for the format.
#include "bench/io/capture.hpp"

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <filesystem>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "attention_tap.hpp"
#include "engine.hpp"

namespace {

using kvlean::io::Capture;
using kvlean::io::CaptureLayer;
using kvlean::io::DType;
using kvlean::io::Outcome;
using kvlean::io::Result;
using kvlean::io::RopePairing;
using kvlean::io::Tensor;
using kvlean::llama_cpp::AttentionTap;
using kvlean::llama_cpp::HeadRows;
using kvlean::llama_cpp::TappedLayer;

constexpr const char* program = "kvlean-capture";

struct Options {
  std::string model;
  std::vector<std::string> texts;
  std::string output;
  std::size_t context_tokens = 1024;
  std::size_t future_tokens = 128;
  std::size_t skipped_tokens = 0;
  std::string layers;  ///< empty: early, middle, late
  std::string dtype = "f16";
  int threads = 1;
  bool output_projection = false;
  bool verify = false;
  std::string model_name;
  std::string licence;
  std::string text_name;
};

/// The layers to capture, and how they were asked for.
struct Selection {
  enum class Kind { spread, all, listed };
  Kind kind = Kind::spread;
  std::set<std::size_t> layers;
};

/// At 10, 50 and 90 % of the given layers.
std::set<std::size_t> spread_over(const std::vector<std::size_t>& layers) {
  const std::size_t count = layers.size();
  return {layers[count / 10], layers[count / 2], layers[count - 1 - count / 10]};
}

Result<Selection> select_layers(const std::string& text, std::size_t count) {
  using R = Result<Selection>;
  Selection selection;
  std::vector<std::size_t> every;
  for (std::size_t layer = 0; layer < count; ++layer) every.push_back(layer);
  if (text.empty()) {
    selection.layers = spread_over(every);
  } else if (text == "all") {
    selection.kind = Selection::Kind::all;
    selection.layers.insert(every.begin(), every.end());
  } else {
    selection.kind = Selection::Kind::listed;
    for (std::size_t begin = 0; begin <= text.size();) {
      const std::size_t end = std::min(text.find(',', begin), text.size());
      const std::string item = text.substr(begin, end - begin);
      const auto layer = kvlean::io::detail::parse_number<std::size_t>(item);
      if (!layer) {
        return R::failure("--layers: '" + item + "' is not a layer number; give a list such as " +
                          "2,15,28, or all");
      }
      if (*layer >= count) {
        return R::failure("--layers: there is no layer " + item + "; the model has layers 0 to " +
                          std::to_string(count - 1));
      }
      selection.layers.insert(*layer);
      begin = end + 1;
    }
  }
  return R::success(std::move(selection));
}

/// Why a layer cannot be captured, or nothing. Only a selected layer has scores and output.
std::string trouble_with(const TappedLayer& layer, bool selected) {
  if (!layer.problem.empty()) return layer.problem;
  if (!layer.has_softmax || (selected && !(layer.has_scores && layer.has_output))) {
    return "has no attention that this program can read";
  }
  return {};
}

/// The tensor in the capture's dtype. Fails if a value does not fit it.
Result<Tensor> store(const std::vector<float>& values, std::vector<std::size_t> shape, DType dtype,
                     const std::string& name) {
  Tensor tensor{dtype, std::move(shape), {}};
  tensor.bytes.resize(values.size() * kvlean::io::dtype_bytes(dtype));
  const auto count = static_cast<std::int64_t>(values.size());
  if (dtype == DType::f16) {
    ggml_fp32_to_fp16_row(values.data(), reinterpret_cast<ggml_fp16_t*>(tensor.bytes.data()),
                          count);
  } else if (dtype == DType::bf16) {
    ggml_fp32_to_bf16_row(values.data(), reinterpret_cast<ggml_bf16_t*>(tensor.bytes.data()),
                          count);
  } else {
    std::memcpy(tensor.bytes.data(), values.data(), tensor.bytes.size());
  }
  if (!kvlean::io::detail::all_finite(tensor)) {
    const bool finite =
        std::all_of(values.begin(), values.end(), [](float value) { return std::isfinite(value); });
    return Result<Tensor>::failure(finite ? name + " has values too large for f16; use --dtype bf16"
                                          : name + " has values that are not finite");
  }
  return Result<Tensor>::success(std::move(tensor));
}

/// A stored tensor as floats again.
HeadRows load(const Tensor& tensor) {
  HeadRows rows;
  rows.resize(tensor.shape[0], tensor.shape[1], tensor.shape[2]);
  const auto count = static_cast<std::int64_t>(rows.values.size());
  if (tensor.dtype == DType::f16) {
    ggml_fp16_to_fp32_row(reinterpret_cast<const ggml_fp16_t*>(tensor.bytes.data()),
                          rows.values.data(), count);
  } else if (tensor.dtype == DType::bf16) {
    ggml_bf16_to_fp32_row(reinterpret_cast<const ggml_bf16_t*>(tensor.bytes.data()),
                          rows.values.data(), count);
  } else {
    std::memcpy(rows.values.data(), tensor.bytes.data(), tensor.bytes.size());
  }
  return rows;
}

/// The largest relative L2 distance |o' - o| / |o|, over query heads and at most 256 evenly spaced
/// queries (the last one among them), between the engine's attention output o and causal attention
/// o' over q, k and v in double precision.
double largest_error(const HeadRows& q, const HeadRows& k, const HeadRows& v,
                     const HeadRows& output, double scale, double softcap) {
  const std::size_t group = q.heads / k.heads;
  const std::size_t step = std::max<std::size_t>(1, q.tokens / 256);
  std::vector<double> weights(q.tokens);
  std::vector<double> mean(v.dim);
  double largest = 0.0;
  for (std::size_t head = 0; head < q.heads; ++head) {
    for (std::size_t back = 0; back < q.tokens; back += step) {
      const std::size_t token = q.tokens - 1 - back;
      const float* query = q.row(head, token);
      double top = -INFINITY;
      for (std::size_t t = 0; t <= token; ++t) {
        const float* key = k.row(head / group, t);
        double score = 0.0;
        for (std::size_t d = 0; d < q.dim; ++d) {
          score += static_cast<double>(query[d]) * static_cast<double>(key[d]);
        }
        score *= scale;
        weights[t] = softcap > 0.0 ? softcap * std::tanh(score / softcap) : score;
        top = std::max(top, weights[t]);
      }
      double total = 0.0;
      std::fill(mean.begin(), mean.end(), 0.0);
      for (std::size_t t = 0; t <= token; ++t) {
        const double weight = std::exp(weights[t] - top);
        total += weight;
        const float* value = v.row(head / group, t);
        for (std::size_t d = 0; d < v.dim; ++d) mean[d] += weight * static_cast<double>(value[d]);
      }
      const float* expected = output.row(head, token);
      double distance = 0.0;
      double norm = 0.0;
      for (std::size_t d = 0; d < v.dim; ++d) {
        const double o = static_cast<double>(expected[d]);
        distance += (mean[d] / total - o) * (mean[d] / total - o);
        norm += o * o;
      }
      largest = std::max(largest, std::sqrt(distance / std::max(norm, 1e-300)));
    }
  }
  return largest;
}

std::string file_name(const std::string& path) {
  return std::filesystem::path(path).filename().string();
}

/// Gathers the whole text and the name that the capture records for it.
Result<std::string> gather_text(const Options& options, std::string& name) {
  std::string all;
  for (const std::string& path : options.texts) {
    const Result<std::string> text = kvlean::llama_cpp::read_text(path);
    if (!text) return text;
    all += *text;
    name += (name.empty() ? "" : " + ") + file_name(path);
  }
  if (!options.text_name.empty()) name = options.text_name;
  name += ", " + std::to_string(options.context_tokens + options.future_tokens) +
          " tokens from token " + std::to_string(options.skipped_tokens);
  return Result<std::string>::success(std::move(all));
}

/// Evaluates the text and leaves in `tap` what was seen of the layers that `selection` names. A
/// selection that was not given layer by layer falls back to layers that can be captured.
Outcome tap_layers(llama_context* context, std::span<llama_token> tokens, std::size_t batch,
                   std::size_t layer_count, const Options& options, Selection& selection,
                   AttentionTap& tap) {
  const auto run = [&]() -> Outcome {
    tap.reset(
        {layer_count, tokens.size(), selection.layers, options.verify, options.output_projection});
    return kvlean::llama_cpp::evaluate(
        context, tokens, batch,
        [&](std::size_t first, std::size_t count) { tap.begin_batch(first, count); });
  };
  const auto first_trouble = [&]() -> std::string {
    for (const std::size_t layer : selection.layers) {
      if (const std::string why = trouble_with(tap.layers()[layer], true); !why.empty()) {
        return "layer " + std::to_string(layer) + " " + why;
      }
    }
    return {};
  };

  if (Outcome done = run(); !done) return done;
  const std::string trouble = first_trouble();
  if (trouble.empty()) return Outcome{};

  std::vector<std::size_t> usable;
  for (std::size_t layer = 0; layer < layer_count; ++layer) {
    if (trouble_with(tap.layers()[layer], selection.layers.contains(layer)).empty()) {
      usable.push_back(layer);
    }
  }
  if (usable.empty() || selection.kind == Selection::Kind::listed) {
    std::string list;
    for (const std::size_t layer : usable)
      list += (list.empty() ? "" : ",") + std::to_string(layer);
    return Outcome{trouble +
                   (list.empty() ? "; no other layer will do" : "; these will do: " + list)};
  }
  if (selection.kind == Selection::Kind::all) {
    selection.layers = std::set<std::size_t>(usable.begin(), usable.end());
    return Outcome{};
  }
  selection.layers = spread_over(usable);
  if (Outcome done = run(); !done) return done;
  return Outcome{first_trouble()};
}

/// Fills the numbers that hold for all layers of a capture; fails if the layers disagree.
Outcome describe_attention(const llama_model* model, const Selection& selection,
                           const AttentionTap& tap, Capture& capture) {
  switch (llama_model_rope_type(model)) {
    case LLAMA_ROPE_TYPE_NORM:
      capture.rope_pairing = RopePairing::norm;
      break;
    // Several position axes, but a text has the same position on each: then the same as NeoX.
    case LLAMA_ROPE_TYPE_MROPE:
    case LLAMA_ROPE_TYPE_IMROPE:
    case LLAMA_ROPE_TYPE_NEOX:
      capture.rope_pairing = RopePairing::neox;
      break;
    default:
      return Outcome{"the model has no rotary position embedding of a kind that a capture records"};
  }
  const std::string architecture = kvlean::llama_cpp::model_metadata(model, "general.architecture");
  const auto stated_theta = kvlean::io::detail::parse_number<double>(
      kvlean::llama_cpp::model_metadata(model, architecture + ".rope.freq_base"));

  std::optional<std::size_t> first;
  double softcap = 0.0;
  for (const std::size_t index : selection.layers) {
    const TappedLayer& layer = tap.layers()[index];
    const double theta = layer.rope_theta > 0.0 ? layer.rope_theta : stated_theta.value_or(10000.0);
    if (!first) {
      first = index;
      capture.rope_theta = theta;
      capture.attention_scale = layer.attention_scale;
      softcap = layer.logit_softcap;
      continue;
    }
    const char* differs = theta != capture.rope_theta                         ? "rotary base"
                          : layer.attention_scale != *capture.attention_scale ? "attention scale"
                          : layer.logit_softcap != softcap                    ? "logit softcap"
                                                                              : nullptr;
    if (differs != nullptr) {
      return Outcome{"layers " + std::to_string(*first) + " and " + std::to_string(index) +
                     " differ in " + differs + "; capture them apart (--layers)"};
    }
  }
  if (softcap > 0.0) capture.logit_softcap = softcap;
  return Outcome{};
}

/// Largest errors over the captured layers, from the engine's floats and from the stored values.
struct Verification {
  double engine = 0.0;
  double stored = 0.0;
};

/// Moves the tapped tensors into the capture, layer by layer.
Outcome collect_layers(const Options& options, const Selection& selection, AttentionTap& tap,
                       Capture& capture, Verification& verification) {
  const DType dtype = options.dtype == "f16"    ? DType::f16
                      : options.dtype == "bf16" ? DType::bf16
                                                : DType::f32;
  const double softcap = capture.logit_softcap.value_or(0.0);
  for (const std::size_t index : selection.layers) {
    TappedLayer& tapped = tap.layers()[index];
    CaptureLayer layer;
    layer.index = index;
    for (const auto& [part, rows, tensor] :
         {std::tuple{"q", &tapped.q, &layer.q}, std::tuple{"k", &tapped.k, &layer.k},
          std::tuple{"v", &tapped.v, &layer.v}}) {
      Result<Tensor> stored = store(rows->values, {rows->heads, rows->tokens, rows->dim}, dtype,
                                    kvlean::io::detail::layer_name(index, part));
      if (!stored) return Outcome{stored.error};
      *tensor = std::move(*stored);
    }
    if (options.output_projection) {
      const std::size_t columns = tapped.q.heads * tapped.v.dim;
      if (tapped.wo.size() != tapped.hidden * columns || tapped.hidden == 0) {
        return Outcome{"layer " + std::to_string(index) +
                       " has no output projection that this program can read"};
      }
      Result<Tensor> stored = store(tapped.wo, {tapped.hidden, columns}, dtype,
                                    kvlean::io::detail::layer_name(index, "wo"));
      if (!stored) return Outcome{stored.error};
      layer.wo = std::move(*stored);
    }
    if (options.verify) {
      const double scale = *capture.attention_scale;
      verification.engine =
          std::max(verification.engine,
                   largest_error(tapped.q, tapped.k, tapped.v, tapped.output, scale, softcap));
      verification.stored =
          std::max(verification.stored, largest_error(load(layer.q), load(layer.k), load(layer.v),
                                                      tapped.output, scale, softcap));
    }
    tapped = TappedLayer{};  // the floats are no longer needed
    capture.layers.push_back(std::move(layer));
  }
  return Outcome{};
}

/// Everything after the command line; the error is what the user reads.
Outcome run(const Options& options) {
  if (Outcome started = kvlean::llama_cpp::start_engine(program); !started) return started;
  // What is cheap to find out comes before what is slow.
  if (Outcome writable = kvlean::io::check_writable(options.output); !writable) return writable;
  Capture capture;
  const Result<std::string> text = gather_text(options, capture.text);
  if (!text) return Outcome{text.error};

  const auto model = kvlean::llama_cpp::load_model(options.model);
  if (!model) return Outcome{model.error};
  llama_model* const loaded = model->get();
  if (llama_model_has_encoder(loaded) || !llama_model_has_decoder(loaded)) {
    return Outcome{options.model + ": not a decoder-only model"};
  }
  const auto layer_count = static_cast<std::size_t>(std::max(0, llama_model_n_layer(loaded)));
  if (layer_count == 0) return Outcome{options.model + ": the model has no layers"};
  Result<Selection> selection = select_layers(options.layers, layer_count);
  if (!selection) return Outcome{selection.error};

  const std::size_t needed = options.context_tokens + options.future_tokens;
  const auto trained = static_cast<std::size_t>(std::max(0, llama_model_n_ctx_train(loaded)));
  if (trained > 0 && needed > trained) {
    return Outcome{"--context and --future ask for " + std::to_string(needed) +
                   " tokens; the model was made for at most " + std::to_string(trained)};
  }
  auto tokens = kvlean::llama_cpp::take_tokens(loaded, *text, options.skipped_tokens, needed);
  if (!tokens) return Outcome{tokens.error};

  AttentionTap tap;
  const std::size_t batch = needed <= 4096 ? 512 : 128;  // the scores of a batch are in memory
  const auto context = kvlean::llama_cpp::open_context(
      loaded, {needed, batch, options.threads, AttentionTap::on_node, &tap});
  if (!context) return Outcome{context.error};
  if (Outcome tapped =
          tap_layers(context->get(), *tokens, batch, layer_count, options, *selection, tap);
      !tapped) {
    return tapped;
  }

  const auto name_or = [&](const std::string& given, const char* key, const char* otherwise) {
    if (!given.empty()) return given;
    const std::string stated = kvlean::llama_cpp::model_metadata(loaded, key);
    return stated.empty() ? std::string(otherwise) : stated;
  };
  const std::string file = file_name(options.model);
  capture.model = options.model_name.empty()
                      ? name_or("", "general.name", "unnamed model") + " (" + file + ")"
                      : options.model_name;
  capture.licence = name_or(options.licence, "general.license", "unknown");
  capture.context_tokens = options.context_tokens;
  capture.num_layers = layer_count;
  if (Outcome described = describe_attention(loaded, *selection, tap, capture); !described) {
    return described;
  }
  Verification verification;
  if (Outcome collected = collect_layers(options, *selection, tap, capture, verification);
      !collected) {
    return collected;
  }
  if (options.verify) {
    std::printf("verify: largest relative error of recomputed attention %.2e (as stored %.2e)\n",
                verification.engine, verification.stored);
    constexpr double tolerance = 1e-3;
    if (!(verification.engine < tolerance)) {
      return Outcome{"--verify: the captured tensors do not reproduce the engine's attention"};
    }
  }
  if (Outcome saved = kvlean::io::save_capture(options.output, capture); !saved) return saved;

  std::string list;
  for (const std::size_t layer : selection->layers) {
    list += (list.empty() ? "" : ",") + std::to_string(layer);
  }
  std::printf("wrote %s: layers %s of %zu, %zu + %zu tokens, %s\n", options.output.c_str(),
              list.c_str(), layer_count, options.context_tokens, options.future_tokens,
              options.dtype.c_str());
  return Outcome{};
}

/// One line, whatever a message holds.
void complain(std::string message) {
  std::replace(message.begin(), message.end(), '\n', ' ');
  std::fprintf(stderr, "%s: %s\n", program, message.c_str());
}

}  // namespace

int main(int argc, char** argv) {
  try {
    Options options;
    CLI::App app("Writes queries, keys and values of a real model over a real text to a capture.",
                 program);
    constexpr std::size_t most_tokens = std::size_t{1} << 20;
    app.add_option("--model", options.model, "model file (GGUF)")->required();
    app.add_option("--text", options.texts, "text files, read one after the other")->required();
    app.add_option("--output", options.output, "capture to write (safetensors)")->required();
    app.add_option("--context", options.context_tokens, "tokens that are compressed")
        ->capture_default_str()
        ->check(CLI::Range(std::size_t{1}, most_tokens));
    app.add_option("--future", options.future_tokens, "tokens after them, for the queries")
        ->capture_default_str()
        ->check(CLI::Range(std::size_t{1}, most_tokens));
    app.add_option("--skip-tokens", options.skipped_tokens, "start so deep in the text")
        ->capture_default_str()
        ->check(CLI::Range(std::size_t{0}, std::size_t{1} << 30));
    app.add_option("--layers", options.layers,
                   "layers such as 2,15,28, or all (default: an early, a middle and a late one)");
    app.add_option("--dtype", options.dtype, "type to store")
        ->capture_default_str()
        ->check(CLI::IsMember({"f16", "bf16", "f32"}));
    app.add_option("--threads", options.threads, "threads of llama.cpp")
        ->capture_default_str()
        ->check(CLI::Range(1, 1024));
    app.add_flag("--output-projection", options.output_projection,
                 "also store the weights of the output projection");
    app.add_flag("--verify", options.verify,
                 "recompute causal attention in double precision from what was captured and "
                 "compare it with the engine's own output");
    app.add_option("--model-name", options.model_name, "name to record (default: the model's own)");
    app.add_option("--licence", options.licence, "licence to record (default: the model's own)");
    app.add_option("--text-name", options.text_name, "text to record (default: the file names)");
    app.failure_message([](const CLI::App*, const CLI::Error& error) {
      return std::string(program) + ": " + error.what() + "\n";
    });
    CLI11_PARSE(app, argc, argv);
    if (const Outcome done = run(options); !done) {
      complain(done.error);
      return 1;
    }
    return 0;
  } catch (const std::exception& error) {
    complain(error.what());
  } catch (...) {
    complain("unknown failure");
  }
  return 1;
}
