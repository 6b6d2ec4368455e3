#include "eval_model.hpp"

#include <gguf.h>
#include <unistd.h>

#include <array>
#include <bit>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <system_error>
#include <vector>

namespace kvlean::llama_cpp {
namespace {

/// FIPS 180-4.
class Sha256 {
 public:
  void add(const unsigned char* data, std::size_t size) {
    total_ += size;
    while (size > 0) {
      const std::size_t taken = std::min(size, block_.size() - filled_);
      std::copy_n(data, taken, block_.begin() + static_cast<std::ptrdiff_t>(filled_));
      filled_ += taken;
      data += taken;
      size -= taken;
      if (filled_ == block_.size()) {
        compress();
        filled_ = 0;
      }
    }
  }

  std::string finish() {
    const std::uint64_t bits = total_ * 8;
    const unsigned char one = 0x80;
    const unsigned char zero = 0;
    add(&one, 1);
    while (filled_ != 56) add(&zero, 1);
    std::array<unsigned char, 8> length = {};
    for (std::size_t i = 0; i < 8; ++i) {
      length[i] = static_cast<unsigned char>(bits >> (56 - 8 * i));
    }
    add(length.data(), length.size());
    std::string text;
    for (const std::uint32_t word : state_) {
      std::array<char, 9> digits = {};
      std::snprintf(digits.data(), digits.size(), "%08x", word);
      text += digits.data();
    }
    return text;
  }

 private:
  void compress() {
    static constexpr std::array<std::uint32_t, 64> k = {
        0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4,
        0xab1c5ed5, 0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe,
        0x9bdc06a7, 0xc19bf174, 0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f,
        0x4a7484aa, 0x5cb0a9dc, 0x76f988da, 0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7,
        0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967, 0x27b70a85, 0x2e1b2138, 0x4d2c6dfc,
        0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85, 0xa2bfe8a1, 0xa81a664b,
        0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070, 0x19a4c116,
        0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
        0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7,
        0xc67178f2};
    std::array<std::uint32_t, 64> w = {};
    for (std::size_t i = 0; i < 16; ++i) {
      for (std::size_t b = 0; b < 4; ++b) w[i] = w[i] << 8 | block_[4 * i + b];
    }
    for (std::size_t i = 16; i < 64; ++i) {
      const std::uint32_t a = w[i - 15];
      const std::uint32_t b = w[i - 2];
      w[i] = w[i - 16] + (std::rotr(a, 7) ^ std::rotr(a, 18) ^ a >> 3) + w[i - 7] +
             (std::rotr(b, 17) ^ std::rotr(b, 19) ^ b >> 10);
    }
    std::array<std::uint32_t, 8> s = state_;
    for (std::size_t i = 0; i < 64; ++i) {
      const std::uint32_t choice = (s[4] & s[5]) ^ (~s[4] & s[6]);
      const std::uint32_t majority = (s[0] & s[1]) ^ (s[0] & s[2]) ^ (s[1] & s[2]);
      const std::uint32_t first = s[7] +
                                  (std::rotr(s[4], 6) ^ std::rotr(s[4], 11) ^ std::rotr(s[4], 25)) +
                                  choice + k[i] + w[i];
      const std::uint32_t second =
          (std::rotr(s[0], 2) ^ std::rotr(s[0], 13) ^ std::rotr(s[0], 22)) + majority;
      s = {first + second, s[0], s[1], s[2], s[3] + first, s[4], s[5], s[6]};
    }
    for (std::size_t i = 0; i < 8; ++i) state_[i] += s[i];
  }

  std::array<std::uint32_t, 8> state_ = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                         0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  std::array<unsigned char, 64> block_ = {};
  std::size_t filled_ = 0;
  std::uint64_t total_ = 0;
};

}  // namespace

Result<std::string> file_sha256(const std::string& path) {
  using R = Result<std::string>;
  const auto fail = [&](const std::string& why) { return R::failure(path + ": " + why); };
  const io::detail::FileHandle file(std::fopen(path.c_str(), "rbe"));
  if (!file) return fail("cannot open: " + io::detail::errno_text(errno));
  Sha256 hash;
  std::vector<unsigned char> block(std::size_t{1} << 20);
  std::size_t count = 0;
  while ((count = std::fread(block.data(), 1, block.size(), file.get())) > 0) {
    hash.add(block.data(), count);
  }
  if (std::ferror(file.get()) != 0) return fail("cannot read: " + io::detail::errno_text(errno));
  return R::success(hash.finish());
}

std::string models_folder() {
  const char* cache = std::getenv("XDG_CACHE_HOME");
  if (cache != nullptr && *cache != '\0') return std::string(cache) + "/kvlean/models";
  const char* home = std::getenv("HOME");
  return std::string(home != nullptr ? home : ".") + "/.cache/kvlean/models";
}

Result<bool> has_float_weights(const std::string& path) {
  using R = Result<bool>;
  detail::first_complaint().clear();
  gguf_init_params params = {};
  params.no_alloc = true;
  const std::unique_ptr<gguf_context, void (*)(gguf_context*)> file(
      gguf_init_from_file(path.c_str(), params), gguf_free);
  if (!file) {
    const std::string& why = detail::first_complaint();
    return R::failure(path + ": not a GGUF file" + (why.empty() ? why : ": " + why));
  }
  for (std::int64_t i = 0; i < gguf_get_n_tensors(file.get()); ++i) {
    if (gguf_get_tensor_type(file.get(), i) != GGML_TYPE_F32) return R::success(false);
  }
  return R::success(true);
}

Result<std::string> float_copy(const std::string& path, const std::string& sha256) {
  using R = Result<std::string>;
  const Result<bool> is_float = has_float_weights(path);
  if (!is_float) return R::failure(is_float.error);
  if (*is_float) return R::success(std::string(path));
  const std::string folder = models_folder();
  const std::string copy = folder + "/" + sha256.substr(0, 16) + "-f32.gguf";
  std::error_code error;
  if (std::filesystem::exists(copy, error)) return R::success(std::string(copy));
  std::filesystem::create_directories(folder, error);
  // Beside the final place and renamed at the end: an interrupted run leaves no half copy.
  const std::string partial = copy + "." + std::to_string(getpid()) + ".partial";
  llama_model_quantize_params params = llama_model_quantize_default_params();
  params.nthread = 1;
  params.ftype = LLAMA_FTYPE_ALL_F32;
  params.output_tensor_type = GGML_TYPE_F32;
  params.token_embedding_type = GGML_TYPE_F32;
  params.allow_requantize = true;
  detail::first_complaint().clear();
  const bool written = llama_model_quantize(path.c_str(), partial.c_str(), &params) == 0;
  if (written) std::filesystem::rename(partial, copy, error);
  if (!written || error) {
    const std::string why = error ? error.message() : detail::first_complaint();
    std::filesystem::remove(partial, error);
    return R::failure(copy + ": cannot write the model in F32" + (why.empty() ? why : ": " + why));
  }
  return R::success(std::string(copy));
}

}  // namespace kvlean::llama_cpp
