// Captures and safetensors files: what is written can be read, and every way a file can be bad has
// its own line.
#include <unistd.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <limits>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "bench/io/capture.hpp"
#include "tests/support/catch.hpp"

namespace io = kvlean::io;
namespace fs = std::filesystem;

namespace {

/// A folder of the test's own, removed at the end.
class Folder {
 public:
  Folder() {
    std::string pattern = (fs::temp_directory_path() / "kvlean-capture-XXXXXX").string();
    REQUIRE(mkdtemp(pattern.data()) != nullptr);
    path_ = pattern;
  }
  Folder(const Folder&) = delete;
  Folder& operator=(const Folder&) = delete;
  ~Folder() { fs::remove_all(path_); }
  std::string file(const std::string& name) const { return (path_ / name).string(); }
  std::size_t entries() const {
    return static_cast<std::size_t>(
        std::distance(fs::directory_iterator(path_), fs::directory_iterator()));
  }

 private:
  fs::path path_;
};

std::string read_bytes(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

void write_bytes(const std::string& path, const std::string& bytes) {
  std::ofstream file(path, std::ios::binary);
  file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
}

/// A safetensors file from a header text and data.
std::string file_bytes(const std::string& header, const std::string& data) {
  const std::uint64_t length = header.size();
  std::string bytes(sizeof length, '\0');
  std::memcpy(bytes.data(), &length, sizeof length);
  return bytes + header + data;
}

io::Tensor floats(std::vector<std::size_t> shape, float first = 0.0f) {
  io::Tensor tensor{io::DType::f32, std::move(shape), {}};
  std::size_t count = 1;
  for (const std::size_t extent : tensor.shape) count *= extent;
  std::vector<float> values(count);
  for (std::size_t i = 0; i < count; ++i) values[i] = first + static_cast<float>(i) * 0.25f;
  tensor.bytes.resize(count * sizeof(float));
  if (count > 0) std::memcpy(tensor.bytes.data(), values.data(), tensor.bytes.size());
  return tensor;
}

/// 4 query heads, 2 KV heads, 5 tokens, keys of 6, values of 3.
io::CaptureLayer small_layer(std::size_t index) {
  io::CaptureLayer layer;
  layer.index = index;
  layer.q = floats({4, 5, 6}, 1.0f);
  layer.k = floats({2, 5, 6}, 2.0f);
  layer.v = floats({2, 5, 3}, 3.0f);
  return layer;
}

io::Capture small_capture() {
  io::Capture capture;
  capture.model = "a model";
  capture.licence = "MIT";
  capture.text = "a text";
  capture.rope_theta = 100000.0;
  capture.rope_pairing = io::RopePairing::neox;
  capture.context_tokens = 3;
  capture.layers = {small_layer(1), small_layer(7)};
  return capture;
}

/// The line that saving the changed capture ends with.
std::string save_error(const std::function<void(io::Capture&)>& change) {
  const Folder folder;
  io::Capture capture = small_capture();
  change(capture);
  const io::Outcome saved = io::save_capture(folder.file("c.safetensors"), capture);
  CHECK(folder.entries() == (saved ? 1u : 0u));
  return saved.error;
}

/// The line that loading ends with when the header of a good file has been changed.
std::string load_error(const std::function<void(nlohmann::json&)>& change) {
  const Folder folder;
  const std::string path = folder.file("c.safetensors");
  REQUIRE(io::save_capture(path, small_capture()));
  const std::string bytes = read_bytes(path);
  std::uint64_t length = 0;
  std::memcpy(&length, bytes.data(), sizeof length);
  nlohmann::json header = nlohmann::json::parse(bytes.substr(8, length));
  change(header);
  write_bytes(path, file_bytes(header.dump(), bytes.substr(8 + length)));
  const io::Result<io::Capture> loaded = io::load_capture(path);
  CHECK(loaded.error.find('\n') == std::string::npos);
  return loaded.error;
}

/// The line that opening a file of these bytes ends with.
std::string open_error(const std::string& bytes) {
  const Folder folder;
  const std::string path = folder.file("s.safetensors");
  write_bytes(path, bytes);
  return io::SafetensorsFile::open(path).error;
}

}  // namespace

TEST_CASE("a capture survives a round trip") {
  const Folder folder;
  io::Capture capture = small_capture();
  capture.num_layers = 8;
  capture.attention_scale = 0.0625;
  capture.logit_softcap = 50.0;
  capture.layers[0].wo = floats({7, 12});
  const std::string path = folder.file("c.safetensors");
  const io::Outcome saved = io::save_capture(path, capture);
  REQUIRE(saved.error == "");
  REQUIRE(folder.entries() == 1);

  const io::Result<io::Capture> loaded = io::load_capture(path);
  REQUIRE(loaded.error == "");
  CHECK(loaded->model == "a model");
  CHECK(loaded->licence == "MIT");
  CHECK(loaded->text == "a text");
  CHECK(loaded->rope_theta == 100000.0);
  CHECK(loaded->rope_pairing == io::RopePairing::neox);
  CHECK(loaded->context_tokens == 3);
  CHECK(loaded->num_layers == std::size_t{8});
  CHECK(loaded->attention_scale == 0.0625);
  CHECK(loaded->logit_softcap == 50.0);
  CHECK(loaded->tokens() == 5);
  CHECK(loaded->future_tokens() == 2);
  REQUIRE(loaded->layers.size() == 2);
  for (std::size_t i = 0; i < 2; ++i) {
    CHECK(loaded->layers[i].index == capture.layers[i].index);
    CHECK(loaded->layers[i].q.shape == capture.layers[i].q.shape);
    CHECK(loaded->layers[i].q.bytes == capture.layers[i].q.bytes);
    CHECK(loaded->layers[i].k.bytes == capture.layers[i].k.bytes);
    CHECK(loaded->layers[i].v.bytes == capture.layers[i].v.bytes);
    CHECK(loaded->layers[i].value_dim() == 3);
  }
  REQUIRE(loaded->layers[0].wo);
  CHECK(loaded->layers[0].wo->bytes == capture.layers[0].wo->bytes);
  CHECK_FALSE(loaded->layers[1].wo);
}

TEST_CASE("the attention scale defaults to one over the root of the key dim") {
  io::Capture capture = small_capture();
  CHECK(capture.scale(capture.layers[0]) == Approx(1.0 / std::sqrt(6.0)));
  capture.attention_scale = 2.0;
  CHECK(capture.scale(capture.layers[0]) == 2.0);
}

TEST_CASE("a capture that contradicts itself is not written") {
  using io::Capture;
  CHECK(save_error([](Capture&) {}) == "");
  const auto expect = [](const char* line, const std::function<void(Capture&)>& change) {
    CHECK_THAT(save_error(change), ContainsSubstring(line));
  };
  expect("has no layers", [](Capture& c) { c.layers.clear(); });
  expect("not in ascending order", [](Capture& c) { std::swap(c.layers[0], c.layers[1]); });
  expect("layer.1.k has 2 heads but layer.1.v has 1", [](Capture& c) {
    c.layers[0].v = floats({1, 5, 3});
  });
  expect("layer.1.q has 3 heads, not a multiple of the 2 of layer.1.k", [](Capture& c) {
    c.layers[0].q = floats({3, 5, 6});
  });
  expect("layer.1.q has 4 tokens but layer.1.k has 5", [](Capture& c) {
    c.layers[0].q = floats({4, 4, 6});
  });
  expect("layer.1.v has 6 tokens but layer.1.k has 5", [](Capture& c) {
    c.layers[0].v = floats({2, 6, 3});
  });
  expect("layer.1.q has 8 dimensions a row but layer.1.k has 6", [](Capture& c) {
    c.layers[0].q = floats({4, 5, 8});
  });
  expect("layer.7.k has 4 tokens but layer.1.k has 5", [](Capture& c) {
    c.layers[1].q = floats({4, 4, 6});
    c.layers[1].k = floats({2, 4, 6});
    c.layers[1].v = floats({2, 4, 3});
  });
  expect("layer.1.q has 2 dimensions, not 3", [](Capture& c) { c.layers[0].q = floats({20, 6}); });
  expect("layer.7.v is empty", [](Capture& c) { c.layers[1].v = floats({2, 5, 0}); });
  expect("layer.1.k has dtype I32", [](Capture& c) { c.layers[0].k.dtype = io::DType::i32; });
  expect("layer.1.k has bytes that do not fit",
         [](Capture& c) { c.layers[0].k.dtype = io::DType::f16; });
  expect("layer.1.wo has 11 columns", [](Capture& c) { c.layers[0].wo = floats({7, 11}); });
  expect("layer.7.q holds a value that is not finite", [](Capture& c) {
    const float nan = std::numeric_limits<float>::quiet_NaN();
    std::memcpy(c.layers[1].q.bytes.data() + 4, &nan, sizeof nan);
  });
  expect("'context_tokens' is 0", [](Capture& c) { c.context_tokens = 0; });
  expect("'context_tokens' is 5", [](Capture& c) { c.context_tokens = 5; });
  expect("has layer 7 but metadata 'num_layers' is 7", [](Capture& c) { c.num_layers = 7; });
  expect("'rope_theta'", [](Capture& c) { c.rope_theta = 0.0; });
  expect("'attention_scale'", [](Capture& c) { c.attention_scale = -1.0; });
  expect("'logit_softcap'", [](Capture& c) { c.logit_softcap = 0.0; });
}

TEST_CASE("half-precision infinities are found") {
  io::Tensor tensor{io::DType::f16, {1, 1, 2}, std::vector<std::byte>(4)};
  CHECK(io::detail::all_finite(tensor));
  tensor.bytes[3] = std::byte{0x7b};
  CHECK(io::detail::all_finite(tensor));
  tensor.bytes[3] = std::byte{0xfc};
  CHECK_FALSE(io::detail::all_finite(tensor));
  tensor.dtype = io::DType::bf16;
  CHECK(io::detail::all_finite(tensor));
  tensor.bytes[3] = std::byte{0x7f};
  tensor.bytes[2] = std::byte{0x80};
  CHECK_FALSE(io::detail::all_finite(tensor));
}

TEST_CASE("a bad capture file ends with one clear line") {
  using Json = nlohmann::json;
  CHECK(load_error([](Json&) {}) == "");
  const auto expect = [](const char* line, const std::function<void(Json&)>& change) {
    CHECK_THAT(load_error(change), ContainsSubstring(line));
  };
  for (const char* key :
       {"model", "licence", "text", "rope_theta", "rope_pairing", "context_tokens"}) {
    const std::string line = "metadata '" + std::string(key) + "' is missing";
    expect(line.c_str(), [&](Json& header) { header["__metadata__"].erase(key); });
  }
  expect("metadata 'model' is missing", [](Json& header) { header.erase("__metadata__"); });
  const auto metadata = [](const char* key, const char* value) {
    return [=](Json& header) { header["__metadata__"][key] = value; };
  };
  expect("'context_tokens' is '-3'", metadata("context_tokens", "-3"));
  expect("'context_tokens' is '3.5'", metadata("context_tokens", "3.5"));
  expect("'context_tokens' is ''", metadata("context_tokens", ""));
  expect("it must lie between 0 and the 5 tokens", metadata("context_tokens", "5"));
  expect("'rope_theta' is 'big'", metadata("rope_theta", "big"));
  expect("'rope_theta' is not a positive", metadata("rope_theta", "inf"));
  expect("'rope_pairing' is 'both', not norm or neox", metadata("rope_pairing", "both"));
  expect("'num_layers' is 'x'", metadata("num_layers", "x"));
  expect("'attention_scale' is '1,0'", metadata("attention_scale", "1,0"));
  expect("'logit_softcap' is 'none'", metadata("logit_softcap", "none"));

  const auto renamed = [](const char* from, const char* to) {
    return [=](Json& header) {
      header[to] = header[from];
      header.erase(from);
    };
  };
  expect("tensor 'layer.7.k' is missing", renamed("layer.7.k", "other"));
  expect("'layer.7.key' is none of", renamed("layer.7.k", "layer.7.key"));
  expect("'layer.07.k' is none of", renamed("layer.7.k", "layer.07.k"));
  expect("'layer.k' is none of", renamed("layer.7.k", "layer.k"));
  expect("not a capture", [](Json& header) {
    Json other = {{"__metadata__", header["__metadata__"]}};
    for (const auto& [name, entry] : header.items()) {
      if (name != "__metadata__") other["x" + name] = entry;
    }
    header = other;
  });
  expect("layer.1.k has dtype I32", [](Json& header) { header["layer.1.k"]["dtype"] = "I32"; });
  expect("layer.1.k has 1 heads but", [](Json& header) {
    header["layer.1.k"]["shape"] = {1, 10, 6};
  });
}

TEST_CASE("a file that is no safetensors file ends with one clear line") {
  const std::string good = R"({"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}})";
  CHECK(open_error(file_bytes(good, "xy")) == "");
  const auto expect = [](const char* line, const std::string& bytes) {
    const std::string error = open_error(bytes);
    CHECK_THAT(error, ContainsSubstring(line));
    CHECK(error.find('\n') == std::string::npos);
  };
  expect("shorter than 8 bytes", "");
  expect("shorter than 8 bytes", "1234567");
  expect("header length is not plausible", std::string(8, '\0'));
  expect("header length is not plausible", "plain text, and no safetensors file");
  expect("header is longer than the file", file_bytes(good, "").substr(0, 20));
  expect("not a JSON object", file_bytes("[1,2]", ""));
  expect("not a JSON object", file_bytes("{\"a\":", ""));
  expect("not a JSON object", file_bytes("{} {}", ""));
  expect("not a JSON object", file_bytes("{\"\xff\":1}", ""));
  expect("truncated", file_bytes(good, "x"));
  expect("1 bytes after the last tensor", file_bytes(good, "xyz"));

  const auto tensor = [](const std::string& entry) {
    return file_bytes("{\"a\n\":" + entry + "}", "xy");
  };
  expect("not a JSON object", tensor("{}"));  // a raw line break inside a JSON string
  const auto named = [](const std::string& entry) {
    return file_bytes("{\"a\\n\":" + entry + "}", "xy");
  };
  expect("tensor 'a?' is not described", named("3"));
  expect("has no dtype", named(R"({"shape":[2],"data_offsets":[0,2]})"));
  expect("unsupported dtype 'F8'", named(R"({"dtype":"F8","shape":[2],"data_offsets":[0,2]})"));
  expect("has no shape", named(R"({"dtype":"U8","shape":2,"data_offsets":[0,2]})"));
  expect("not a list of sizes", named(R"({"dtype":"U8","shape":[-2],"data_offsets":[0,2]})"));
  expect("not a list of sizes", named(R"({"dtype":"U8","shape":[2.0],"data_offsets":[0,2]})"));
  expect("no valid data_offsets", named(R"({"dtype":"U8","shape":[2],"data_offsets":[0]})"));
  expect("no valid data_offsets", named(R"({"dtype":"U8","shape":[2],"data_offsets":[-1,1]})"));
  expect("run backwards", named(R"({"dtype":"U8","shape":[2],"data_offsets":[2,0]})"));
  expect("shape of 3 bytes", named(R"({"dtype":"U8","shape":[3],"data_offsets":[0,2]})"));
  expect("too large to address",
         named(R"({"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,2]})"));
  expect("metadata is not a JSON object", file_bytes(R"({"__metadata__":[]})", ""));
  expect("metadata 'k' is not a string", file_bytes(R"({"__metadata__":{"k":1}})", ""));

  const auto two = [](const std::string& first, const std::string& second) {
    return file_bytes(R"({"a":{"dtype":"U8","shape":[1],"data_offsets":)" + first +
                          R"(},"b":{"dtype":"U8","shape":[1],"data_offsets":)" + second + "}}",
                      "xy");
  };
  CHECK(open_error(two("[1,2]", "[0,1]")) == "");
  expect("overlap", two("[0,1]", "[0,1]"));
  expect("1 bytes after",
         file_bytes(good.substr(0, good.find("[2]")) + R"([1],"data_offsets":[0,1]}})", "xy"));
  expect("gap", file_bytes(R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}})", "xy"));
  expect("more than once", file_bytes(R"({"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},)"
                                      R"("a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}})",
                                      "xy"));
}

TEST_CASE("a file cut anywhere is refused") {
  const Folder folder;
  const std::string path = folder.file("c.safetensors");
  REQUIRE(io::save_capture(path, small_capture()));
  const std::string bytes = read_bytes(path);
  for (std::size_t length = 0; length < bytes.size(); ++length) {
    write_bytes(path, bytes.substr(0, length));
    const io::Result<io::Capture> loaded = io::load_capture(path);
    REQUIRE_FALSE(loaded);
    REQUIRE(loaded.error.starts_with(path + ": "));
  }
}

TEST_CASE("a file with a changed header byte is read or refused, never worse") {
  const Folder folder;
  const std::string path = folder.file("c.safetensors");
  REQUIRE(io::save_capture(path, small_capture()));
  const std::string bytes = read_bytes(path);
  std::uint64_t length = 0;
  std::memcpy(&length, bytes.data(), sizeof length);
  for (std::size_t at = 0; at < 8 + length; ++at) {
    for (const char replacement : {'\0', '9', '"', '}', '\xff'}) {
      std::string changed = bytes;
      changed[at] = replacement;
      write_bytes(path, changed);
      const io::Result<io::Capture> loaded = io::load_capture(path);
      CHECK(bool(loaded) == loaded.error.empty());
    }
  }
}

TEST_CASE("files that cannot be opened say why") {
  const Folder folder;
  CHECK(io::load_capture(folder.file("absent")).error ==
        folder.file("absent") + ": cannot open: No such file or directory");
  CHECK_THAT(io::load_capture(folder.file(".")).error, ContainsSubstring("not a regular file"));
}

TEST_CASE("a failed write leaves nothing behind and an earlier file alone") {
  const Folder folder;
  const io::Capture capture = small_capture();
  CHECK_THAT(io::save_capture(folder.file("absent/c"), capture).error,
             ContainsSubstring("cannot write: No such file"));
  CHECK_THAT(io::save_capture(folder.file("."), capture).error,
             ContainsSubstring("is a directory"));
  CHECK_THAT(io::check_writable(folder.file("absent/c")).error, ContainsSubstring("cannot write"));
  CHECK(io::check_writable(folder.file("c")));
  CHECK(folder.entries() == 0);

  write_bytes(folder.file("c"), "earlier");
  io::Capture bad = capture;
  bad.context_tokens = 0;
  CHECK_FALSE(io::save_capture(folder.file("c"), bad));
  const std::vector<io::TensorView> views = {{"a", io::DType::u8, {2}, {}}};
  CHECK_THAT(io::save_safetensors(folder.file("c"), views, {}).error,
             ContainsSubstring("do not fit its shape"));
  CHECK(read_bytes(folder.file("c")) == "earlier");

  fs::create_symlink(folder.file("c"), folder.file("link"));
  CHECK(io::save_capture(folder.file("link"), capture));
  CHECK(fs::is_symlink(folder.file("link")));
  CHECK(io::load_capture(folder.file("c")));
  CHECK(folder.entries() == 2);

  if (fs::is_character_file("/dev/full")) {
    CHECK_THAT(io::save_capture("/dev/full", capture).error,
               ContainsSubstring("cannot write: No space left"));
    CHECK(fs::is_character_file("/dev/full"));
  }
}

TEST_CASE("tensors are stored widest element first and aligned") {
  const Folder folder;
  const std::vector<std::byte> bytes(24);
  const auto view = [&](const char* name, io::DType dtype, std::size_t count) {
    return io::TensorView{
        name, dtype, {count}, std::span(bytes).first(count * io::dtype_bytes(dtype))};
  };
  const std::vector<io::TensorView> views = {
      view("u8", io::DType::u8, 3), view("bf16", io::DType::bf16, 3),
      view("f32", io::DType::f32, 3), view("i64", io::DType::i64, 3)};
  REQUIRE(io::save_safetensors(folder.file("s"), views, {{"note", "not UTF-8: \xff"}}));
  const auto file = io::SafetensorsFile::open(folder.file("s"));
  REQUIRE(file.error == "");
  CHECK(file->metadata().size() == 1);
  for (const auto& [name, info] : file->tensors()) {
    CHECK(info.begin % io::dtype_bytes(info.dtype) == 0);
    CHECK(file->read(name)->bytes.size() == info.end - info.begin);
  }
  CHECK_THAT(file->read("none").error, ContainsSubstring("has no tensor 'none'"));
  CHECK(read_bytes(folder.file("s")).find("\"i64\"") <
        read_bytes(folder.file("s")).find("\"f32\""));
}

TEST_CASE("the bundled captures are sound and small") {
  std::uintmax_t bytes = 0;
  std::size_t captures = 0;
  for (const fs::directory_entry& entry : fs::directory_iterator("bench/data")) {
    if (entry.path().extension() != ".safetensors") continue;
    const io::Result<io::Capture> capture = io::load_capture(entry.path().string());
    REQUIRE(capture.error == "");
    CHECK(capture->context_tokens >= 1024);
    CHECK(capture->future_tokens() >= 128);
    CHECK(capture->layers.size() >= 3);
    bytes += entry.file_size();
    ++captures;
  }
  CHECK(captures > 0);
  CHECK(bytes <= 10'000'000);
}
