// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#include "bench/quality/report_records.hpp"

#include <cerrno>
#include <cstdio>
#include <memory>

namespace kvlean::bench {
namespace {

nlohmann::ordered_json record_to_json(const Record& record) {
  nlohmann::ordered_json json;
  json["policy"] = record.policy;
  json["budget"] = record.budget;
  const bool ran = record.skipped.empty();
  const auto result = [&](const char* name, auto value) {
    json[name] = ran ? nlohmann::ordered_json(value) : nlohmann::ordered_json(nullptr);
  };
  result("kept_fraction", record.kept_fraction);
  result("compression_ratio", record.compression_ratio);
  result("attention_error", record.attention_error);
  result("attention_error_p95", record.attention_error_p95);
  result("lost_mass", record.lost_mass);
  result("seconds_plan", record.seconds_plan);
  result("seconds_apply", record.seconds_apply);
  json["input"] = record.input;
  json["tokens"] = record.tokens;
  json["layers"] = record.layers;
  result("slots", record.slots);
  json["bytes_before"] = record.bytes_before;
  result("bytes_after", record.bytes_after);
  result("slots_evicted", record.slots_evicted);
  if (!ran) json["skipped"] = record.skipped;
  return json;
}

std::string csv_cell(const nlohmann::ordered_json& value) {
  if (value.is_null()) return {};
  if (!value.is_string()) return value.dump();
  const auto& text = value.get_ref<const std::string&>();
  if (text.find_first_of(",\"\r\n") == std::string::npos) return text;
  std::string quoted = "\"";
  for (const char c : text) quoted += c == '"' ? std::string("\"\"") : std::string(1, c);
  return quoted + "\"";
}

}  // namespace

std::string to_json(const std::vector<Record>& records) {
  std::string text = "[";
  for (const Record& record : records) {
    text += text.size() == 1 ? "\n  " : ",\n  ";
    text += record_to_json(record).dump(-1, ' ', false,
                                        nlohmann::ordered_json::error_handler_t::replace);
  }
  return text + "\n]\n";
}

std::string to_csv(const std::vector<Record>& records) {
  std::string text;
  const nlohmann::ordered_json columns = record_to_json(Record{});
  for (const auto& [name, value] : columns.items()) text += name + ",";
  text += "skipped\n";
  for (const Record& record : records) {
    const nlohmann::ordered_json json = record_to_json(record);
    for (const auto& [name, value] : json.items()) {
      if (name != "skipped") text += csv_cell(value) + ",";
    }
    text += csv_cell(record.skipped) + "\n";
  }
  return text;
}

std::string write_file(const std::string& path, const std::string& text) {
  const auto fail = [&] { return path + ": cannot write: " + io::detail::errno_text(errno); };
  errno = 0;
  std::FILE* file = std::fopen(path.c_str(), "wb");
  if (file == nullptr) return fail();
  const bool written =
      std::fwrite(text.data(), 1, text.size(), file) == text.size() && std::fflush(file) == 0;
  const std::string why = written ? std::string() : fail();
  const bool closed = std::fclose(file) == 0;
  return !why.empty() || closed ? why : fail();
}

}  // namespace kvlean::bench
