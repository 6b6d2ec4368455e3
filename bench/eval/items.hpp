// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "bench/eval/texts.hpp"

// The tasks of the evaluation and the items they are made of.

namespace kvlean::eval {

enum class ItemKind { continuation, forced_choice, generation };

/// "continuation", "forced_choice" or "generation".
[[nodiscard]] std::string_view kind_name(ItemKind kind);

/// One thing to be asked of a model. The parts are meant to be tokenised apart and joined in the
/// order context, question, answer: the cuts lie before white space, where tokenizers cut anyway.
struct Item {
  std::string id;      ///< stable and unique: "passkey/1024/d25/s3"
  std::string task;    ///< "text", "copy", "passkey", "needle_single_1", ...
  std::string source;  ///< where the words come from: a text's name, several, or "synthetic"
  ItemKind kind = ItemKind::continuation;
  std::string context;   ///< what a policy may compress
  std::string question;  ///< follows the context; compressed as well in query-aware runs only
  std::string answer;    ///< continuation: to be scored; forced choice: the right candidate
  std::vector<std::string> candidates;  ///< forced choice: with the answer, in drawn order
  std::size_t answer_index = 0;         ///< of the answer among the candidates
  std::vector<std::string> references;  ///< generation: strings to be found in the output
  std::size_t max_new_tokens = 0;       ///< generation: the budget
  double depth = -1.0;       ///< place of the evidence, 0 (start) to 1 (end); -1 if it has none
  std::size_t length = 0;    ///< the context length asked for, in tokens
  std::string document;      ///< items of one document (or one draw) are no independent samples
  bool exact_match = false;  ///< generation: the output must begin with the one reference
};

struct TaskOptions {
  /// `text`: tokens of the context, the answer follows. All others: context, question and answer
  /// (or generation budget) together fit into this many tokens.
  std::size_t context_tokens = 2048;
  /// Items. Tasks that have a grid of depths (`passkey`): items a depth.
  std::size_t samples = 50;
  std::uint64_t seed = 42;
  std::vector<double> depths = {0.0, 0.25, 0.5, 0.75, 1.0};
  std::size_t answer_tokens = 64;  ///< of `text` and the copy tasks, at most
  std::size_t cue_tokens = 16;     ///< the copy tasks: how much of the passage is shown again
  std::size_t candidates = 20;     ///< of forced choices
  Split split = Split::confirm;    ///< which half of the texts is used
};

struct TaskInfo {
  std::string name;
  std::string description;  ///< one line
  ItemKind kind = ItemKind::continuation;
};

/// Every task there is, in the order of a report.
[[nodiscard]] const std::vector<TaskInfo>& tasks();
[[nodiscard]] std::vector<std::string> task_names();
/// Null if there is no such task.
[[nodiscard]] const TaskInfo* find_task(std::string_view name);

/// The items of a task, each as long as fits (found by bisection with `count_tokens`). The same
/// options, texts and tokenizer give the same items. Fails with one line on an unknown task, an
/// option out of range, a text that is too short or a length that the task does not fit into.
[[nodiscard]] Result<std::vector<Item>> make_items(std::string_view task,
                                                   const TaskOptions& options, const Texts& texts,
                                                   const CountTokens& count_tokens);

/// The share of `references` that occur in `output`, letter case aside. 0 without references.
[[nodiscard]] double reference_share(std::string_view output,
                                     std::span<const std::string> references);

/// Score of a generated output, 0 to 1: the share of references found, or, for items with
/// `exact_match`, 1 if the output (leading white space aside) begins with the reference and no
/// further letter or digit follows it directly.
[[nodiscard]] double score_generation(const Item& item, std::string_view output);

/// Log-probability of one candidate given the context and the question.
struct CandidateScore {
  double log_prob = 0.0;   ///< of the whole candidate, summed over its tokens
  std::size_t tokens = 1;  ///< of the candidate
};

struct ChoiceScore {
  double correct = 0.0;          ///< 1 if the answer ranks first, alone
  double reciprocal_rank = 0.0;  ///< 1 / rank; ties rank the answer last of the tied
  std::size_t rank = 0;          ///< from 1
};

/// Ranks the right candidate. `normalise` divides each log-probability by the candidate's tokens,
/// for candidates of different lengths. Rank 0 and zero scores if the index is out of range.
[[nodiscard]] ChoiceScore score_choice(std::span<const CandidateScore> scores,
                                       std::size_t answer_index, bool normalise = false);

}  // namespace kvlean::eval
