// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#include "bench/eval/items.hpp"

#include <algorithm>
#include <cctype>
#include <cmath>
#include <set>
#include <utility>

#include "bench/eval/task_builders.hpp"

namespace kvlean::eval {
namespace {

using detail::Work;
using Maker = Result<Item> (*)(Work&, const TaskInfo&, const detail::Place&);

struct TaskEntry {
  TaskInfo info;
  Maker make = nullptr;  ///< null: `text`, which is cut in one go
  bool grid = false;     ///< `samples` items a depth
};

const std::vector<TaskEntry>& entries() {
  using enum ItemKind;
  static const std::vector<TaskEntry> all = {
      {{"text", "real documents; what follows them is scored", continuation}, nullptr},
      {{"copy", "a passage of real text, filler, its beginning again; the rest is scored",
        continuation},
       detail::make_copy},
      {{"copy_random", "the same with words in random order", continuation}, detail::make_copy},
      {{"passkey", "a number told once in real text, among others; depths by lengths",
        forced_choice},
       detail::make_passkey,
       true},
      {{"needle_single_1", "one number, named by a word, in repeated sentences", generation},
       detail::make_needle},
      {{"needle_single_2", "one number, named by a word, in real text", generation},
       detail::make_needle},
      {{"needle_single_3", "one UUID, named by a word, in real text", generation},
       detail::make_needle},
      {{"needle_multikey_1", "four numbers in real text, one asked for", generation},
       detail::make_needle},
      {{"needle_multikey_2", "nothing but numbers named by words, one asked for", generation},
       detail::make_needle},
      {{"needle_multikey_3", "nothing but UUIDs named by UUIDs, one asked for", generation},
       detail::make_needle},
      {{"needle_multivalue", "one word names four numbers in real text, all asked for", generation},
       detail::make_needle},
      {{"needle_multiquery", "four words name four numbers in real text, all asked for",
        generation},
       detail::make_needle},
      {{"needle_single_1_choice", "needle_single_1 as a choice among numbers", forced_choice},
       detail::make_needle},
      {{"needle_single_2_choice", "needle_single_2 as a choice among numbers", forced_choice},
       detail::make_needle},
      {{"needle_single_3_choice", "needle_single_3 as a choice among UUIDs", forced_choice},
       detail::make_needle},
      {{"needle_multikey_1_choice", "needle_multikey_1 as a choice, the other needles among it",
        forced_choice},
       detail::make_needle},
      {{"needle_multikey_2_choice", "needle_multikey_2 as a choice among its own numbers",
        forced_choice},
       detail::make_needle},
      {{"needle_multikey_3_choice", "needle_multikey_3 as a choice among its own UUIDs",
        forced_choice},
       detail::make_needle},
      {{"variable_tracking", "a value handed on over four variables; name all that hold it",
        generation},
       detail::make_tracking},
      {{"variable_tracking_choice", "four such chains; choose the value of the last variable",
        forced_choice},
       detail::make_tracking},
      {{"common_words", "a numbered list of words; name the ten that occur most often", generation},
       detail::make_common_words},
      {{"common_words_choice", "the same list; choose a common word among rare ones",
        forced_choice},
       detail::make_common_words},
      {{"frequent_words", "made-up words of falling frequency; name the three most frequent",
        generation},
       detail::make_frequent_words},
      {{"frequent_words_choice", "the same; choose the most frequent among rarer ones",
        forced_choice},
       detail::make_frequent_words},
      {{"tiny_recall", "the tiny model's own task: the code of a key", generation},
       detail::make_tiny},
      {{"tiny_copy", "the tiny model's own task: repeat a passage from its beginning", generation},
       detail::make_tiny},
      {{"tiny_tracking", "the tiny model's own task: which variables hold a value", generation},
       detail::make_tiny},
  };
  return all;
}

char lower(char c) { return static_cast<char>(std::tolower(static_cast<unsigned char>(c))); }

std::string lower(std::string_view text) {
  std::string result(text);
  for (char& c : result) c = lower(c);
  return result;
}

std::string_view without_leading_space(std::string_view text) {
  while (!text.empty() && std::isspace(static_cast<unsigned char>(text.front())) != 0) {
    text.remove_prefix(1);
  }
  return text;
}

std::string wrong_options(const TaskOptions& options) {
  if (options.context_tokens < 64) return "context_tokens must be at least 64";
  if (options.samples == 0) return "samples must be at least 1";
  if (options.answer_tokens == 0) return "answer_tokens must be at least 1";
  if (options.cue_tokens == 0) return "cue_tokens must be at least 1";
  if (options.candidates < 2) return "candidates must be at least 2";
  if (options.depths.empty()) return "depths must not be empty";
  for (const double depth : options.depths) {
    if (!(depth >= 0.0 && depth <= 1.0)) return "depths must lie between 0 and 1";
  }
  return {};
}

/// What sets items of unusual seeds and of the other split apart.
std::string id_ending(const TaskOptions& options) {
  std::string ending;
  if (options.split == Split::select) ending += "/select";
  if (options.seed != TaskOptions{}.seed) ending += "/seed" + std::to_string(options.seed);
  return ending;
}

Result<std::vector<Item>> make_text_items(const TaskInfo& info, const TaskOptions& options,
                                          const Texts& texts, const CountTokens& count_tokens) {
  using R = Result<std::vector<Item>>;
  const DocumentOptions how{options.context_tokens, options.answer_tokens, options.samples,
                            options.seed, options.split};
  std::vector<Item> items;
  for (Document& document : documents(texts, how, count_tokens)) {
    Item item;
    item.id = info.name + "/" + std::to_string(options.context_tokens) + "/" + document.id +
              id_ending(options);
    item.task = info.name;
    item.source = document.source;
    item.kind = info.kind;
    item.context = std::move(document.context);
    item.answer = std::move(document.answer);
    item.length = options.context_tokens;
    item.document = document.id;
    items.push_back(std::move(item));
  }
  if (items.empty()) {
    return R::failure("text: no text is long enough for a document of " +
                      std::to_string(options.context_tokens) + " tokens");
  }
  return R::success(std::move(items));
}

}  // namespace

std::string_view kind_name(ItemKind kind) {
  switch (kind) {
    case ItemKind::continuation:
      return "continuation";
    case ItemKind::forced_choice:
      return "forced_choice";
    case ItemKind::generation:
      return "generation";
  }
  return "?";
}

const std::vector<TaskInfo>& tasks() {
  static const std::vector<TaskInfo> all = [] {
    std::vector<TaskInfo> infos;
    for (const TaskEntry& entry : entries()) infos.push_back(entry.info);
    return infos;
  }();
  return all;
}

std::vector<std::string> task_names() {
  std::vector<std::string> names;
  for (const TaskInfo& info : tasks()) names.push_back(info.name);
  return names;
}

const TaskInfo* find_task(std::string_view name) {
  for (const TaskInfo& info : tasks()) {
    if (info.name == name) return &info;
  }
  return nullptr;
}

Result<std::vector<Item>> make_items(std::string_view task, const TaskOptions& options,
                                     const Texts& texts, const CountTokens& count_tokens) {
  using R = Result<std::vector<Item>>;
  const TaskEntry* entry = nullptr;
  for (const TaskEntry& each : entries()) {
    if (each.info.name == task) entry = &each;
  }
  if (entry == nullptr) return R::failure("unknown task: " + std::string(task));
  const TaskInfo& info = entry->info;
  if (const std::string wrong = wrong_options(options); !wrong.empty()) {
    return R::failure(info.name + ": " + wrong);
  }
  if (entry->make == nullptr) return make_text_items(info, options, texts, count_tokens);

  Work work(options, texts, count_tokens);
  if (!work.usable()) return R::failure(info.name + ": the texts are too short");
  std::vector<Item> items;
  const std::size_t rows = entry->grid ? options.depths.size() : 1;
  for (std::size_t row = 0; row < rows; ++row) {
    for (std::size_t sample = 0; sample < options.samples; ++sample) {
      detail::Place place;
      place.sample = sample;
      place.depth = options.depths[(entry->grid ? row : sample) % options.depths.size()];
      place.id = info.name + "/" + std::to_string(options.context_tokens);
      if (entry->grid) {
        place.id += "/d" + std::to_string(std::lround(100.0 * place.depth));
      }
      place.id += "/s" + std::to_string(sample) + id_ending(options);
      place.seed = std::string(split_name(options.split)) + "/" + place.id;
      Result<Item> item = entry->make(work, info, place);
      if (!item) return R::failure(info.name + ": " + item.error);
      item->id = place.id;
      item->task = info.name;
      item->kind = info.kind;
      item->length = options.context_tokens;
      item->document = place.id;
      items.push_back(std::move(*item));
    }
  }
  return R::success(std::move(items));
}

double reference_share(std::string_view output, std::span<const std::string> references) {
  if (references.empty()) return 0.0;
  const std::string text = lower(output);
  std::size_t found = 0;
  for (const std::string& reference : references) {
    if (text.find(lower(reference)) != std::string::npos) ++found;
  }
  return static_cast<double>(found) / static_cast<double>(references.size());
}

double score_generation(const Item& item, std::string_view output) {
  if (!item.exact_match) return reference_share(output, item.references);
  if (item.references.size() != 1) return 0.0;
  const std::string_view reference = without_leading_space(item.references.front());
  const std::string_view text = without_leading_space(output);
  if (reference.empty() || !text.starts_with(reference)) return 0.0;
  const bool longer = text.size() > reference.size() &&
                      std::isalnum(static_cast<unsigned char>(text[reference.size()])) != 0;
  return longer ? 0.0 : 1.0;
}

ChoiceScore score_choice(std::span<const CandidateScore> scores, std::size_t answer_index,
                         bool normalise) {
  ChoiceScore result;
  if (answer_index >= scores.size()) return result;
  const auto value = [&](const CandidateScore& score) {
    if (!normalise || score.tokens == 0) return score.log_prob;
    return score.log_prob / static_cast<double>(score.tokens);
  };
  const double answer = value(scores[answer_index]);
  result.rank = 1;
  for (std::size_t i = 0; i < scores.size(); ++i) {
    // Written so that not-a-number, on either side, counts against the answer.
    if (i != answer_index && !(value(scores[i]) < answer)) ++result.rank;
  }
  result.correct = result.rank == 1 ? 1.0 : 0.0;
  result.reciprocal_rank = 1.0 / static_cast<double>(result.rank);
  return result;
}

}  // namespace kvlean::eval
