// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0

// kvlean-golden DIR: compares the library with every golden file in DIR. README.md beside this file
// describes the files and the comparing rules.

#include <algorithm>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "bench/io/safetensors.hpp"
#include "kvlean/core/dtype.hpp"
#include "tests/golden/golden_case.hpp"

namespace {

namespace fs = std::filesystem;
using kvlean::u32;
using namespace kvlean::golden;

constexpr const char* usage =
    "usage: kvlean-golden DIR\n"
    "Compares the library with every *.safetensors file in DIR. Prints a line a tensor,\n"
    "PASS|FAIL|NOT_IMPLEMENTED file tensor max_error tolerance (nan where nothing was compared), "
    "then\n"
    "a count of each; reasons go to standard error. Inputs (in.*) are counted, not judged.\n"
    "Exit status: 0; 1 on any FAIL; 2 when a file cannot be read, none is found, or a tensor is\n"
    "missing.\n";

/// The text without characters that would break a line into other fields.
std::string one_word(const std::string& text) {
  std::string word = text;
  for (char& c : word) {
    if (static_cast<unsigned char>(c) <= 0x20 || c == 0x7f) c = '?';
  }
  return word.empty() ? "?" : word;
}

Array to_array(const kvlean::io::Tensor& tensor) {
  Array array{tensor.shape, {}};
  const auto read = [&]<class Element>(Element, auto&& convert) {
    array.values.resize(tensor.bytes.size() / sizeof(Element));
    for (std::size_t i = 0; i < array.values.size(); ++i) {
      Element element;
      std::memcpy(&element, tensor.bytes.data() + i * sizeof(Element), sizeof(Element));
      array.values[i] = static_cast<double>(convert(element));
    }
  };
  const auto same = [](auto element) { return element; };
  switch (tensor.dtype) {
    case kvlean::io::DType::f32:
      read(float{}, same);
      break;
    case kvlean::io::DType::f16:
      read(kvlean::u16{}, kvlean::detail::f16_bits_to_f32);
      break;
    case kvlean::io::DType::bf16:
      read(kvlean::u16{}, kvlean::detail::bf16_bits_to_f32);
      break;
    case kvlean::io::DType::i32:
      read(std::int32_t{}, same);
      break;
    case kvlean::io::DType::i64:
      read(std::int64_t{}, same);
      break;
    case kvlean::io::DType::u8:
      read(std::uint8_t{}, same);
      break;
  }
  return array;
}

/// Reads a tensor or throws BrokenFile.
Array read_array(const kvlean::io::SafetensorsFile& file, const std::string& name) {
  if (file.find(name) == nullptr) throw BrokenFile{name + " is missing"};
  const auto tensor = file.read(name);
  if (!tensor) throw BrokenFile{tensor.error};
  return to_array(*tensor);
}

std::vector<float> floats_of(const Array& array) {
  return std::vector<float>(array.values.begin(), array.values.end());
}

/// The inputs of a file, checked against each other. Throws BrokenFile.
Layer read_layer(const kvlean::io::SafetensorsFile& file) {
  const Array q = read_array(file, "in.q");
  const Array k = read_array(file, "in.k");
  const Array v = read_array(file, "in.v");
  const auto describe = [&] {
    return "in.q " + to_string(q.shape) + ", in.k " + to_string(k.shape) + " and in.v " +
           to_string(v.shape);
  };
  const bool three = q.shape.size() == 3 && k.shape.size() == 3 && v.shape.size() == 3;
  if (!three || q.values.empty() || k.values.empty() || v.values.empty()) {
    throw BrokenFile{describe() + " are not [heads, tokens, dim]"};
  }
  if (q.shape[0] % k.shape[0] != 0 || k.shape[0] != v.shape[0] || q.shape[1] != k.shape[1] ||
      k.shape[1] != v.shape[1] || q.shape[2] != k.shape[2]) {
    throw BrokenFile{describe() + " do not fit together"};
  }
  Layer layer;
  layer.query_heads = static_cast<u32>(q.shape[0]);
  layer.kv_heads = static_cast<u32>(k.shape[0]);
  layer.group = layer.query_heads / layer.kv_heads;
  layer.tokens = static_cast<u32>(k.shape[1]);
  layer.key_dim = static_cast<u32>(k.shape[2]);
  layer.value_dim = static_cast<u32>(v.shape[2]);
  const auto check_metadata = [&](const char* key, std::size_t actual) {
    const auto found = file.metadata().find(key);
    if (found != file.metadata().end() && found->second != std::to_string(actual)) {
      throw BrokenFile{std::string("the metadata says ") + key + " = " + found->second + ", but " +
                       describe()};
    }
  };
  check_metadata("q_heads", layer.query_heads);
  check_metadata("kv_heads", layer.kv_heads);
  check_metadata("tokens", layer.tokens);
  check_metadata("head_dim", layer.key_dim);
  layer.q = floats_of(q);
  layer.k = floats_of(k);
  layer.v = floats_of(v);
  if (file.find("ref.attn_colsum") != nullptr) {
    const Array sums = read_array(file, "ref.attn_colsum");
    if (sums.shape != Shape{layer.kv_heads, layer.group, layer.tokens}) {
      throw BrokenFile{"ref.attn_colsum has shape " + to_string(sums.shape)};
    }
    layer.column_sums = floats_of(sums);
  }
  return layer;
}

/// Judges the files of a folder, prints as it goes.
class Judge {
 public:
  explicit Judge(fs::path folder) : folder_(std::move(folder)) {}

  int run() {
    std::vector<fs::path> paths;
    std::error_code error;
    for (fs::directory_iterator entry(folder_, error), end; !error && entry != end;
         entry.increment(error)) {
      if (entry->path().extension() == ".safetensors") paths.push_back(entry->path());
    }
    if (error) {
      broken(folder_.string(), error.message());
      return 2;
    }
    if (paths.empty()) broken(folder_.string(), "holds no *.safetensors file");
    std::sort(paths.begin(), paths.end());
    for (const fs::path& path : paths) {
      try {
        judge_file(path);
      } catch (const BrokenFile& fault) {
        broken(path.filename().string(), fault.why);
      }
    }
    std::printf(
        "total: %zu PASS, %zu FAIL, %zu NOT_IMPLEMENTED; %zu inputs not judged, %zu errors\n",
        counts_[0], counts_[1], counts_[2], inputs_, errors_);
    return errors_ != 0 ? 2 : counts_[1] != 0 ? 1 : 0;
  }

 private:
  using File = kvlean::io::SafetensorsFile;

  void broken(const std::string& file, const std::string& why) {
    ++errors_;
    std::fprintf(stderr, "error: %s: %s\n", file.c_str(), why.c_str());
  }

  void print(const std::string& file, const std::string& tensor, const Verdict& verdict) {
    static constexpr const char* words[] = {"PASS", "FAIL", "NOT_IMPLEMENTED"};
    const auto outcome = static_cast<std::size_t>(verdict.outcome);
    ++counts_[outcome];
    const std::string name = one_word(tensor);
    if (verdict.outcome == Outcome::not_implemented) {
      std::printf("%s %s %s nan nan\n", words[outcome], one_word(file).c_str(), name.c_str());
    } else {
      std::printf("%s %s %s %.3g %.3g\n", words[outcome], one_word(file).c_str(), name.c_str(),
                  verdict.error, verdict.tolerance);
    }
    if (!verdict.why.empty()) {
      std::fflush(stdout);
      std::fprintf(stderr, "note: %s: %s: %s\n", file.c_str(), name.c_str(), verdict.why.c_str());
    }
  }

  File open(const fs::path& path) {
    auto file = File::open(path.string());
    if (!file) throw BrokenFile{file.error};
    return std::move(*file);
  }

  void judge_file(const fs::path& path) {
    const std::string shown = path.filename().string();
    const File file = open(path);

    // An oracle file names the file that holds its inputs; any other file holds its own.
    std::optional<Layer> layer;
    std::string problem;
    std::optional<File> other;
    const auto source = file.metadata().find("source");
    const bool oracle = source != file.metadata().end();
    try {
      if (oracle) other.emplace(open(folder_ / source->second));
      layer = read_layer(oracle ? *other : file);
    } catch (const BrokenFile& fault) {
      problem = (oracle ? source->second + ": " : std::string()) + fault.why;
    }
    const auto has_input = [&](const std::string& name) {
      return (oracle ? (other ? other->find(name) : nullptr) : file.find(name)) != nullptr;
    };

    std::vector<Case> cases = read_cases(file);
    assign_tensors(file, shown, oracle, cases);
    bool needs_layer = oracle;
    for (Case& c : cases) needs_layer = needs_layer || c.method != "pyramidkv";
    if (!layer && needs_layer) broken(shown, problem);
    for (Case& c : cases) {
      c.set_layer(layer ? &*layer : nullptr, problem);
      const auto method = methods().find(c.method);
      if (method == methods().end()) continue;
      for (const std::string& name : method->second.inputs) {
        if (!has_input(name)) broken(shown, name + ", which " + c.name + " needs, is missing");
      }
    }
    for (Case& c : cases) judge_case(c, shown);
  }

  static std::vector<Case> read_cases(const File& file) {
    std::vector<Case> cases;
    for (const auto& [name, text] : file.metadata()) {
      const auto json = nlohmann::json::parse(text, nullptr, /*allow_exceptions=*/false);
      if (!json.is_object()) continue;  // a remark about the whole file
      Case c;
      c.name = name;
      if (json.contains("method") && json["method"].is_string()) {
        c.method = json["method"].get<std::string>();
        c.params = json.value("params", nlohmann::json::object());
      } else {  // the oracle's short form: kvmerger.<setting>, and nothing but parameters
        c.method = name.substr(0, name.find('.'));
        c.params = json;
      }
      cases.push_back(std::move(c));
    }
    return cases;
  }

  /// Gives every tensor to its case, the one with the longest fitting name.
  void assign_tensors(const File& file, const std::string& shown, bool oracle,
                      std::vector<Case>& cases) {
    Case reference;
    reference.name = "ref";
    reference.method = "ref";
    reference.params = nlohmann::json::object();
    std::map<std::string, std::set<std::string>> outputs_of_method;
    bool has_inputs = false;
    for (const auto& [name, info] : file.tensors()) {
      if (name.rfind("in.", 0) == 0) {
        ++inputs_;
        has_inputs = true;
        continue;
      }
      Case* owner = name.rfind("ref.", 0) == 0 ? &reference : nullptr;
      for (Case& c : cases) {
        if (owner == &reference) break;
        if (name.rfind(c.name + ".", 0) != 0) continue;
        if (owner == nullptr || c.name.size() > owner->name.size()) owner = &c;
      }
      if (owner == nullptr) {
        const std::string why = "the metadata has no case for it";
        print(shown, name, {Outcome::fail, infinity, 0.0, why});
        broken(shown, name + ": " + why);
        continue;
      }
      const std::string output = name.substr(owner->name.size() + 1);
      outputs_of_method[owner->method].insert(output);
      try {
        owner->outputs.emplace(output, read_array(file, name));
      } catch (const BrokenFile& fault) {
        print(shown, name, {Outcome::fail, infinity, 0.0, fault.why});
        broken(shown, fault.why);
      }
    }
    for (Case& c : cases) c.method_outputs = outputs_of_method[c.method];
    if (!reference.outputs.empty() || (has_inputs && !oracle)) cases.push_back(reference);
  }

  void judge_case(Case& c, const std::string& shown) {
    static const Method reference{{"attn_out", "attn_colsum"}, {}, judge_reference};
    const auto found = methods().find(c.method);
    const Method* method = c.method == "ref"          ? &reference
                           : found != methods().end() ? &found->second
                                                      : nullptr;
    std::set<std::string> missing;
    if (method != nullptr) {
      for (const std::string& output : method->outputs) {
        if (!c.has(output)) missing.insert(output);
      }
    }
    if (c.outputs.empty() && missing.empty()) missing.insert("*");
    for (const std::string& output : missing) {
      broken(shown, c.name + "." + output + " is missing");
    }

    Verdict rest{Outcome::not_implemented, 0.0, 0.0, {}};
    if (method == nullptr) {
      rest.why = "unknown method '" + c.method + "'";
    } else if (method->judge != nullptr) {
      rest.why = "unknown output";
      try {
        method->judge(c);
      } catch (const NotImplemented& fault) {
        rest.why = fault.why;
      } catch (const CaseFailed& fault) {
        rest = {Outcome::fail, infinity, 0.0, fault.why};
      } catch (const BrokenFile& fault) {
        rest = {Outcome::fail, infinity, 0.0, fault.why};
        if (missing.empty()) broken(shown, fault.why);
      }
      if (const std::string unread = c.unread_params(); !unread.empty()) {
        std::fprintf(stderr, "note: %s: %s: parameters not read: %s\n", shown.c_str(),
                     c.name.c_str(), unread.c_str());
      }
    }
    for (const auto& [output, array] : c.outputs) {
      const auto verdict = c.verdicts.find(output);
      print(shown, c.name + "." + output, verdict == c.verdicts.end() ? rest : verdict->second);
    }
  }

  static constexpr double infinity = std::numeric_limits<double>::infinity();
  fs::path folder_;
  std::size_t counts_[3] = {};
  std::size_t inputs_ = 0;
  std::size_t errors_ = 0;
};

}  // namespace

int main(int argc, char** argv) {
  const std::string argument = argc == 2 ? argv[1] : "";
  if (argument == "--help" || argument == "-h") {
    std::fputs(usage, stdout);
    return 0;
  }
  if (argc != 2 || argument.empty() || argument.front() == '-') {
    std::fputs(usage, stderr);
    return 2;
  }
  try {
    return Judge(argument).run();
  } catch (const std::exception& fault) {
    std::fprintf(stderr, "error: %s\n", fault.what());
    return 2;
  }
}
