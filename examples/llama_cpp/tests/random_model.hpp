// A small random model in F32, written as a GGUF file: nothing is rounded on the way through
// llama.cpp, so that what differs in its logits is a difference of the caches.
#pragma once

#include <ggml.h>
#include <gguf.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace kvlean::test {

struct RandomModel {
  std::string architecture = "llama";  ///< llama (norm pairing), qwen2 or gemma3 (neox)
  bool frequency_factors = false;      ///< llama only
  std::uint32_t layers = 2;            ///< gemma3: every sixth attends to everything
  std::uint32_t heads = 4;
  std::uint32_t kv_heads = 2;
  std::uint32_t head_dim = 16;
  std::uint32_t hidden = 64;
  std::uint32_t feed_forward = 96;
  std::uint32_t vocabulary = 96;
  std::uint32_t window = 48;  ///< gemma3 only
};

namespace detail {

class ModelFile {
 public:
  explicit ModelFile(const RandomModel& shape)
      : shape_(shape),
        tensors_(ggml_init({std::size_t{32} << 20, nullptr, false})),
        file_(gguf_init_empty()) {}

  bool write(const char* path) {
    const std::string& name = shape_.architecture;
    gguf_set_val_str(file_.get(), "general.architecture", name.c_str());
    gguf_set_val_str(file_.get(), "tokenizer.ggml.model", "no_vocab");
    number("vocab_size", shape_.vocabulary);
    number("context_length", 4096);
    number("embedding_length", shape_.hidden);
    number("feed_forward_length", shape_.feed_forward);
    number("block_count", shape_.layers);
    number("attention.head_count", shape_.heads);
    number("attention.head_count_kv", shape_.kv_heads);
    number("attention.key_length", shape_.head_dim);
    number("attention.value_length", shape_.head_dim);
    number("rope.dimension_count", shape_.head_dim);
    gguf_set_val_f32(file_.get(), (name + ".attention.layer_norm_rms_epsilon").c_str(), 1e-5f);
    gguf_set_val_f32(file_.get(), (name + ".rope.freq_base").c_str(), 5000.0f);
    const bool gemma = name == "gemma3";
    if (gemma) number("attention.sliding_window", shape_.window);

    random("token_embd.weight", {shape_.hidden, shape_.vocabulary}, 1.0f);
    random("output.weight", {shape_.hidden, shape_.vocabulary}, 0.3f);
    ones("output_norm.weight", shape_.hidden);
    if (shape_.frequency_factors) {
      float* factors = add("rope_freqs.weight", {shape_.head_dim / 2});
      for (std::uint32_t i = 0; i < shape_.head_dim / 2; ++i) {
        factors[i] = 1.0f + 0.5f * static_cast<float>(i);
      }
    }
    const std::uint32_t q = shape_.heads * shape_.head_dim;
    const std::uint32_t kv = shape_.kv_heads * shape_.head_dim;
    for (std::uint32_t layer = 0; layer < shape_.layers; ++layer) {
      const std::string block = "blk." + std::to_string(layer) + ".";
      ones(block + "attn_norm.weight", shape_.hidden);
      ones(block + "ffn_norm.weight", shape_.hidden);
      // Sharp attention: which tokens stay then matters.
      random(block + "attn_q.weight", {shape_.hidden, q}, 0.35f);
      random(block + "attn_k.weight", {shape_.hidden, kv}, 0.35f);
      random(block + "attn_v.weight", {shape_.hidden, kv}, 0.2f);
      random(block + "attn_output.weight", {q, shape_.hidden}, 0.2f);
      random(block + "ffn_gate.weight", {shape_.hidden, shape_.feed_forward}, 0.1f);
      random(block + "ffn_up.weight", {shape_.hidden, shape_.feed_forward}, 0.1f);
      random(block + "ffn_down.weight", {shape_.feed_forward, shape_.hidden}, 0.1f);
      if (name == "qwen2") {
        random(block + "attn_q.bias", {q}, 0.5f);
        random(block + "attn_k.bias", {kv}, 0.5f);
        random(block + "attn_v.bias", {kv}, 0.5f);
      }
      if (gemma) {
        ones(block + "attn_q_norm.weight", shape_.head_dim);
        ones(block + "attn_k_norm.weight", shape_.head_dim);
        ones(block + "post_attention_norm.weight", shape_.hidden);
        ones(block + "post_ffw_norm.weight", shape_.hidden);
      }
    }
    return gguf_write_to_file(file_.get(), path, false);
  }

 private:
  struct Free {
    void operator()(ggml_context* context) const { ggml_free(context); }
    void operator()(gguf_context* context) const { gguf_free(context); }
  };

  void number(const char* key, std::uint32_t value) {
    gguf_set_val_u32(file_.get(), (shape_.architecture + "." + key).c_str(), value);
  }
  float* add(const std::string& name, const std::vector<std::int64_t>& extents) {
    ggml_tensor* tensor = ggml_new_tensor(tensors_.get(), GGML_TYPE_F32,
                                          static_cast<int>(extents.size()), extents.data());
    ggml_set_name(tensor, name.c_str());
    gguf_add_tensor(file_.get(), tensor);
    return static_cast<float*>(tensor->data);
  }
  void ones(const std::string& name, std::uint32_t count) {
    float* values = add(name, {count});
    for (std::uint32_t i = 0; i < count; ++i) values[i] = 1.0f;
  }
  void random(const std::string& name, const std::vector<std::int64_t>& extents, float scale) {
    float* values = add(name, extents);
    std::int64_t count = 1;
    for (const std::int64_t extent : extents) count *= extent;
    for (std::int64_t i = 0; i < count; ++i) {
      state_ = state_ * 6364136223846793005ull + 1442695040888963407ull;
      const double uniform = static_cast<double>(state_ >> 33) / 2147483648.0;
      values[i] = scale * static_cast<float>(2.0 * uniform - 1.0);
    }
  }

  RandomModel shape_;
  std::unique_ptr<ggml_context, Free> tensors_;
  std::unique_ptr<gguf_context, Free> file_;
  std::uint64_t state_ = 12345;
};

}  // namespace detail

/// Writes the model; false if it cannot.
inline bool write_random_model(const RandomModel& shape, const std::string& path) {
  return detail::ModelFile(shape).write(path.c_str());
}

}  // namespace kvlean::test
