// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#include "bench/eval/records.hpp"

#include <unistd.h>

#include <cerrno>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <utility>

namespace kvlean::eval {
namespace {

using Json = nlohmann::ordered_json;

Json number(double value) { return std::isfinite(value) ? Json(value) : Json(nullptr); }

template <class T>
Json maybe(const std::optional<T>& value) {
  if (!value) return nullptr;
  if constexpr (std::is_floating_point_v<T>) {
    return number(*value);
  } else {
    return *value;
  }
}

Json maybe(const std::optional<AttentionError>& error) {
  if (!error) return nullptr;
  return Json{{"mean", number(error->mean)},
              {"median", number(error->median)},
              {"p95", number(error->p95)}};
}

double six_digits(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%.5e", value);
  return std::strtod(text, nullptr);
}

/// Reads fields of an object; remembers the first one of a wrong type.
struct Reader {
  const Json& json;
  std::string wrong = {};

  const Json* find(const char* key) const {
    const auto found = json.find(key);
    return found == json.end() || found->is_null() ? nullptr : &*found;
  }
  void refuse(const char* key) {
    if (wrong.empty()) wrong = key;
  }
  void read(const char* key, std::string& value) {
    if (const Json* field = find(key)) {
      field->is_string() ? void(value = field->get<std::string>()) : refuse(key);
    }
  }
  void read(const char* key, double& value) {
    if (const Json* field = find(key)) {
      field->is_number() ? void(value = field->get<double>()) : refuse(key);
    }
  }
  void read(const char* key, std::uint64_t& value) {
    if (const Json* field = find(key)) {
      field->is_number_unsigned() ? void(value = field->get<std::uint64_t>()) : refuse(key);
    }
  }
  template <class T>
  void read(const char* key, std::optional<T>& value) {
    if (find(key) == nullptr) return;
    T known{};
    read(key, known);
    value = known;
  }
  void read(const char* key, AttentionError& value) {
    const Json* field = find(key);
    if (field == nullptr) return;
    if (!field->is_object()) return refuse(key);
    Reader inner{*field};
    inner.read("mean", value.mean);
    inner.read("median", value.median);
    inner.read("p95", value.p95);
    if (!inner.wrong.empty()) refuse(key);
  }
};

static_assert(std::is_same_v<std::size_t, std::uint64_t>);

/// One line that says what an errno value means.
std::string because(int error) { return std::strerror(error); }

/// Reads records; `whole`, if given, receives the bytes up to the end of the last good line.
Result<std::vector<ItemRecord>> read_lines(const std::string& path, std::uint64_t* whole) {
  using R = Result<std::vector<ItemRecord>>;
  if (whole != nullptr) *whole = 0;
  std::error_code error;
  if (!std::filesystem::exists(path, error)) return R::success({});
  std::ifstream file(path, std::ios::binary);
  if (!file) return R::failure(path + ": cannot read");
  const std::string content{std::istreambuf_iterator<char>(file), {}};
  if (file.bad()) return R::failure(path + ": cannot read");
  std::vector<ItemRecord> records;
  std::size_t line_number = 0;
  for (std::size_t begin = 0; begin < content.size();) {
    ++line_number;
    const std::size_t end = content.find('\n', begin);
    if (end == std::string::npos) break;  // torn
    const std::string_view line = std::string_view(content).substr(begin, end - begin);
    if (!line.empty()) {
      Result<ItemRecord> record = from_json_line(line);
      if (!record) {
        if (end + 1 == content.size()) break;  // torn, and ended by the next run's first write
        return R::failure(path + ":" + std::to_string(line_number) + ": " + record.error);
      }
      records.push_back(std::move(*record));
    }
    begin = end + 1;
    if (whole != nullptr) *whole = begin;
  }
  return R::success(std::move(records));
}

}  // namespace

bool is_yardstick(std::string_view policy) {
  return policy == policy_full || policy == policy_noise_floor || policy == policy_engine_weights ||
         policy == policy_cache_f16 || policy == policy_cache_q8_0 || policy == policy_cache_q4_0;
}

void ItemRecord::add(const TokenComparison& token) {
  ++tokens;
  nll_full = nll_full.value_or(0.0) + token.nll_full;
  nll = nll.value_or(0.0) + token.nll;
  kl.push_back(token.kl);
  top1_agree = top1_agree.value_or(0) + (token.top1_agrees ? 1 : 0);
  top5_common = top5_common.value_or(0) + token.top5_overlap;
  top1_correct = top1_correct.value_or(0) + (token.correct ? 1 : 0);
  top1_correct_full = top1_correct_full.value_or(0) + (token.correct_full ? 1 : 0);
}

void set_item(ItemRecord& record, const Item& item) {
  record.item = item.id;
  record.task = item.task;
  record.source = item.source;
  record.document = item.document;
  record.kind = kind_name(item.kind);
  record.length = item.length;
  record.depth = item.depth;
  record.chance = item.candidates.empty() ? 0.0 : 1.0 / static_cast<double>(item.candidates.size());
}

std::string key_of(const ItemRecord& record) {
  char budget[32];
  std::snprintf(budget, sizeof budget, "%.9g", record.budget);
  const std::string& model = record.model_sha256.empty() ? record.model : record.model_sha256;
  std::string key;
  for (const std::string_view part :
       {std::string_view(model), std::string_view(record.settings), std::string_view(record.mode),
        std::string_view(record.cache_type), std::string_view(record.policy),
        std::string_view(budget), std::string_view(record.item)}) {
    key += part;
    key += '\x1f';
  }
  return key;
}

std::string to_json_line(const ItemRecord& record) {
  Json json;
  json["model"] = record.model;
  json["model_sha256"] = record.model_sha256;
  json["mode"] = record.mode;
  json["policy"] = record.policy;
  json["budget"] = number(record.budget);
  json["cache_type"] = record.cache_type;
  json["settings"] = record.settings;
  json["item"] = record.item;
  json["task"] = record.task;
  json["source"] = record.source;
  json["document"] = record.document;
  json["kind"] = record.kind;
  json["length"] = record.length;
  json["depth"] = number(record.depth);
  json["chance"] = number(record.chance);
  json["kept_fraction"] = number(record.kept_fraction);
  json["compression_ratio"] = number(record.compression_ratio);
  json["bytes"] = record.bytes;
  json["context_tokens"] = record.context_tokens;
  json["tokens"] = record.tokens;
  json["nll_full"] = maybe(record.nll_full);
  json["nll"] = maybe(record.nll);
  Json& kl = json["kl"] = Json::array();
  for (const double value : record.kl) kl.push_back(number(six_digits(value)));
  json["top1_agree"] = maybe(record.top1_agree);
  json["top5_common"] = maybe(record.top5_common);
  json["top1_correct"] = maybe(record.top1_correct);
  json["top1_correct_full"] = maybe(record.top1_correct_full);
  json["attention_error_open"] = maybe(record.attention_error_open);
  json["attention_error_closed"] = maybe(record.attention_error_closed);
  json["score"] = maybe(record.score);
  json["score_full"] = maybe(record.score_full);
  json["reciprocal_rank"] = maybe(record.reciprocal_rank);
  json["reciprocal_rank_full"] = maybe(record.reciprocal_rank_full);
  json["output"] = record.output;
  json["seconds_prefill"] = number(record.seconds_prefill);
  json["seconds_plan"] = number(record.seconds_plan);
  json["seconds_apply"] = number(record.seconds_apply);
  json["seconds_score"] = number(record.seconds_score);
  // A model's output need not be valid UTF-8.
  return json.dump(-1, ' ', false, Json::error_handler_t::replace);
}

Result<ItemRecord> from_json_line(std::string_view line) {
  using R = Result<ItemRecord>;
  const Json json = Json::parse(line, nullptr, false);
  if (!json.is_object()) return R::failure("no JSON object");
  ItemRecord record;
  Reader reader{json};
  reader.read("model", record.model);
  reader.read("model_sha256", record.model_sha256);
  reader.read("mode", record.mode);
  reader.read("policy", record.policy);
  reader.read("budget", record.budget);
  reader.read("cache_type", record.cache_type);
  reader.read("settings", record.settings);
  reader.read("item", record.item);
  reader.read("task", record.task);
  reader.read("source", record.source);
  reader.read("document", record.document);
  reader.read("kind", record.kind);
  reader.read("length", record.length);
  reader.read("depth", record.depth);
  reader.read("chance", record.chance);
  reader.read("kept_fraction", record.kept_fraction);
  reader.read("compression_ratio", record.compression_ratio);
  reader.read("bytes", record.bytes);
  reader.read("context_tokens", record.context_tokens);
  reader.read("tokens", record.tokens);
  reader.read("nll_full", record.nll_full);
  reader.read("nll", record.nll);
  // A value that was infinite stands as null; it must not vanish from a mean.
  if (const Json* kl = reader.find("kl"); kl != nullptr && kl->is_array()) {
    for (const Json& entry : *kl) {
      if (!entry.is_number() && !entry.is_null()) reader.refuse("kl");
      record.kl.push_back(entry.is_number() ? entry.get<double>() : HUGE_VAL);
    }
  }
  reader.read("top1_agree", record.top1_agree);
  reader.read("top5_common", record.top5_common);
  reader.read("top1_correct", record.top1_correct);
  reader.read("top1_correct_full", record.top1_correct_full);
  reader.read("attention_error_open", record.attention_error_open);
  reader.read("attention_error_closed", record.attention_error_closed);
  reader.read("score", record.score);
  reader.read("score_full", record.score_full);
  reader.read("reciprocal_rank", record.reciprocal_rank);
  reader.read("reciprocal_rank_full", record.reciprocal_rank_full);
  reader.read("output", record.output);
  reader.read("seconds_prefill", record.seconds_prefill);
  reader.read("seconds_plan", record.seconds_plan);
  reader.read("seconds_apply", record.seconds_apply);
  reader.read("seconds_score", record.seconds_score);
  if (!reader.wrong.empty()) return R::failure("\"" + reader.wrong + "\" is of the wrong type");
  if (record.item.empty() || record.policy.empty()) {
    return R::failure("no \"item\" or no \"policy\"");
  }
  return R::success(std::move(record));
}

Result<std::vector<ItemRecord>> read_records(const std::string& path) {
  return read_lines(path, nullptr);
}

RecordFile::~RecordFile() {
  if (file_ != nullptr) std::fclose(file_);
}

RecordFile::RecordFile(RecordFile&& other) noexcept
    : path_(std::move(other.path_)),
      file_(std::exchange(other.file_, nullptr)),
      keys_(std::move(other.keys_)),
      records_(std::move(other.records_)) {}

RecordFile& RecordFile::operator=(RecordFile&& other) noexcept {
  if (this != &other) {
    if (file_ != nullptr) std::fclose(file_);
    path_ = std::move(other.path_);
    file_ = std::exchange(other.file_, nullptr);
    keys_ = std::move(other.keys_);
    records_ = std::move(other.records_);
  }
  return *this;
}

Result<RecordFile> RecordFile::open(const std::string& path, bool resume) {
  using R = Result<RecordFile>;
  RecordFile file;
  file.path_ = path;
  if (resume) {
    std::uint64_t whole = 0;
    Result<std::vector<ItemRecord>> read = read_lines(path, &whole);
    if (!read) return R::failure(read.error);
    file.records_ = std::move(*read);
    for (const ItemRecord& record : file.records_) file.keys_.insert(key_of(record));
    std::error_code error;
    if (std::filesystem::exists(path, error)) {
      std::filesystem::resize_file(path, whole, error);
      if (error) return R::failure(path + ": cannot cut off a torn line: " + error.message());
    }
  }
  file.file_ = std::fopen(path.c_str(), resume ? "ab" : "wb");
  if (file.file_ == nullptr) return R::failure(path + ": cannot write: " + because(errno));
  return R::success(std::move(file));
}

Outcome RecordFile::append(const ItemRecord& record) {
  if (file_ == nullptr) return Outcome{path_ + ": not open"};
  const std::string line = to_json_line(record) + "\n";
  if (std::fwrite(line.data(), 1, line.size(), file_) != line.size() || std::fflush(file_) != 0) {
    return Outcome{path_ + ": cannot write: " + because(errno)};
  }
  keys_.insert(key_of(record));
  records_.push_back(record);
  return {};
}

}  // namespace kvlean::eval
