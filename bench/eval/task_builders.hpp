// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "bench/eval/items.hpp"
#include "bench/eval/words.hpp"

// One builder a family of tasks; items.cpp lists them and fills in what all items share.

namespace kvlean::eval::detail {

/// What every builder needs, made once for all items of a task.
class Work {
 public:
  Work(const TaskOptions& task_options, const Texts& task_texts, const CountTokens& counter);

  /// False if no text has a few sentences.
  [[nodiscard]] bool usable() const { return !sentences_.empty(); }

  /// Sentence `index` of a haystack that runs through one text from `start` on, around its end.
  struct Haystack {
    const std::vector<std::string>* sentences;
    std::size_t start;
    std::string source;
    std::size_t reserved = 0;  ///< sentences from `start` on that are left out
    [[nodiscard]] const std::string& sentence(std::size_t index) const;
  };
  /// The texts in turn, the start drawn.
  [[nodiscard]] Haystack haystack(std::size_t sample, Draws& draws) const;

  /// Words for lists, at least `least`.
  [[nodiscard]] const std::vector<std::string>& pool(std::size_t least);

  /// The largest item of low..high units whose tokens, with those to be generated or scored, fit.
  [[nodiscard]] Result<Item> largest(std::size_t low, std::size_t high,
                                     const std::function<Item(std::size_t units)>& build) const;

  const TaskOptions& options;
  const CountTokens& count_tokens;

 private:
  [[nodiscard]] bool fits(const Item& item) const;

  const Texts& texts_;
  std::vector<std::vector<std::string>> sentences_;
  std::vector<std::string> sources_;
  std::vector<std::string> pool_;
};

/// Which item of a task.
struct Place {
  std::size_t sample = 0;
  double depth = 0.0;
  std::string id;
  std::string seed;  ///< name of the item's stream of draws
};

[[nodiscard]] Result<Item> make_copy(Work& work, const TaskInfo& task, const Place& place);
[[nodiscard]] Result<Item> make_passkey(Work& work, const TaskInfo& task, const Place& place);
[[nodiscard]] Result<Item> make_needle(Work& work, const TaskInfo& task, const Place& place);
[[nodiscard]] Result<Item> make_tracking(Work& work, const TaskInfo& task, const Place& place);
[[nodiscard]] Result<Item> make_common_words(Work& work, const TaskInfo& task, const Place& place);
[[nodiscard]] Result<Item> make_frequent_words(Work& work, const TaskInfo& task,
                                               const Place& place);
[[nodiscard]] Result<Item> make_tiny(Work& work, const TaskInfo& task, const Place& place);

}  // namespace kvlean::eval::detail
