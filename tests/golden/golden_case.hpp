// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "kvlean/observe/observation.hpp"

// What kvlean-golden knows of a file: tensors, the layer they were computed from, and cases. A case
// is judged by a function of its method, which throws one of the three structs below where it
// cannot go on.

namespace kvlean::golden {

/// The case asks for something that is not compared: NOT_IMPLEMENTED.
struct NotImplemented {
  std::string why;
};
/// The case cannot be right as it stands, or the library refuses it: FAIL.
struct CaseFailed {
  std::string why;
};
/// A tensor is missing or has the wrong shape: FAIL, and exit status 2.
struct BrokenFile {
  std::string why;
};

using Shape = std::vector<std::size_t>;

/// "[3, 417]", for messages.
[[nodiscard]] std::string to_string(const Shape& shape);

/// A stored tensor. Every f32, i32 and u8 is exact in double.
struct Array {
  Shape shape;
  std::vector<double> values;

  [[nodiscard]] std::size_t width() const { return shape.empty() ? 1 : shape.back(); }
};

/// The inputs of one attention layer, float and contiguous.
struct Layer {
  u32 query_heads = 0;
  u32 kv_heads = 0;
  u32 group = 0;
  u32 tokens = 0;
  u32 key_dim = 0;
  u32 value_dim = 0;
  std::vector<float> q;            ///< [query_heads][tokens][key_dim]
  std::vector<float> k;            ///< [kv_heads][tokens][key_dim]
  std::vector<float> v;            ///< [kv_heads][tokens][value_dim]
  std::vector<float> column_sums;  ///< [query_heads][tokens] ref.attn_colsum, empty if not stored

  [[nodiscard]] CacheView cache() const;
  /// All queries; `last` > 0: only the newest; `first_of_group`: one head a KV head.
  [[nodiscard]] Queries queries(u32 last = 0, bool first_of_group = false) const;
  [[nodiscard]] const float* key(u32 head, u32 token) const {
    return k.data() + (std::size_t{head} * tokens + token) * key_dim;
  }
  [[nodiscard]] const float* value(u32 head, u32 token) const {
    return v.data() + (std::size_t{head} * tokens + token) * value_dim;
  }
};

enum class Outcome { pass, fail, not_implemented };

/// How one tensor compares.
struct Verdict {
  Outcome outcome = Outcome::pass;
  double error = 0.0;
  double tolerance = 0.0;
  std::string why = {};  ///< said beside the line, on standard error
};

/// One entry of a file's metadata and the tensors that belong to it.
class Case {
 public:
  std::string name;
  std::string method;
  nlohmann::json params;
  std::map<std::string, Array> outputs;
  std::set<std::string> method_outputs;  ///< output names of all cases of this method in the file
  std::map<std::string, Verdict> verdicts;

  /// The layer the case was computed on. Throws BrokenFile if the file's inputs are not usable.
  [[nodiscard]] const Layer& layer() const {
    if (layer_ == nullptr) throw BrokenFile{layer_problem_};
    return *layer_;
  }
  void set_layer(const Layer* layer, std::string problem) {
    layer_ = layer;
    layer_problem_ = std::move(problem);
  }

  [[nodiscard]] bool has(const std::string& output) const { return outputs.count(output) != 0; }
  /// A required output of known shape, or BrokenFile.
  [[nodiscard]] const Array& output(const std::string& output) const;
  [[nodiscard]] const Array& output(const std::string& output, const Shape& shape) const;

  // Parameters. A missing one, or one of a wrong type or range, throws CaseFailed.
  [[nodiscard]] bool has_param(const std::string& key);
  [[nodiscard]] u32 count(const std::string& key);
  [[nodiscard]] double real(const std::string& key);
  [[nodiscard]] std::string text(const std::string& key);
  /// `key` must have one of these values, or NotImplemented.
  void expect_text(const std::string& key, const std::set<std::string>& known);
  /// Parameters that no one asked for, without remarks.
  [[nodiscard]] std::string unread_params() const;

  void judge(const std::string& output, Verdict verdict) {
    verdicts.insert_or_assign(output, std::move(verdict));
  }

 private:
  [[nodiscard]] const nlohmann::json& param(const std::string& key);

  const Layer* layer_ = nullptr;
  std::string layer_problem_ = "the file has no inputs";
  std::set<std::string> read_;
};

/// A method of the format: what its cases store and need, and who judges them.
struct Method {
  std::vector<std::string> outputs;  ///< that every case must have
  std::vector<std::string> inputs;   ///< besides in.q, in.k and in.v
  void (*judge)(Case&) = nullptr;    ///< null: not compared yet
};

/// The methods of the format by name.
[[nodiscard]] const std::map<std::string, Method>& methods();

// kvlean_golden_scores.cpp
void judge_reference(Case&);
void judge_knorm(Case&);
void judge_keydiff(Case&);
void judge_snapkv(Case&);
void judge_streaming_llm(Case&);
void judge_tova(Case&);
void judge_observed_attention(Case&);
// kvlean_golden_budgets.cpp
void judge_adakv(Case&);
void judge_adakv_official(Case&);
void judge_pyramidkv(Case&);
// kvlean_golden_authors.cpp
void judge_h2o_official(Case&);
void judge_cam_official(Case&);
// kvlean_golden_merging.cpp
void judge_kvmerger(Case&);
void judge_massfold(Case&);

}  // namespace kvlean::golden
