// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "bench/io/safetensors.hpp"

// Real texts for the evaluation, and documents cut from them.

namespace kvlean::eval {

using io::Outcome;
using io::Result;

/// Tokens of a text by the model's tokenizer, without a begin-of-text token.
using CountTokens = std::function<std::size_t(std::string_view)>;

struct Text {
  std::string name;  ///< short and stable: "opticks"
  std::string licence;
  std::string package;  ///< Debian package, or "built in"
  std::string version;
  std::string sha256;  ///< of `content`, as the manifest says
  std::string content;
};
using Texts = std::vector<Text>;

/// Reads the texts of a folder that get_texts.sh filled, in the order of its manifest.json. Fails
/// with one line if the manifest is missing or broken, or a file is missing or of another size.
[[nodiscard]] Result<Texts> load_texts(const std::string& folder);

/// A short public-domain passage compiled in, so that something runs without a download.
[[nodiscard]] const Texts& builtin_texts();

/// ${XDG_CACHE_HOME:-$HOME/.cache}/kvlean/texts, the folder get_texts.sh fills by default.
[[nodiscard]] std::string default_texts_folder();

/// Which part of every text is used. `select` (the first half) is for choosing settings, `confirm`
/// (the second half) for published numbers; they share no byte, whatever the lengths asked for.
enum class Split { select, confirm };

/// "select" or "confirm".
[[nodiscard]] std::string_view split_name(Split split);

struct DocumentOptions {
  std::size_t context_tokens = 2048;
  std::size_t answer_tokens = 64;  ///< that follow the context
  std::size_t count = 40;
  std::uint64_t seed = 42;
  Split split = Split::confirm;
};

/// A stretch of a text: `answer` follows `context` without a gap.
struct Document {
  std::string id;  ///< "opticks@81920": the text and the byte offset it starts at
  std::string source;
  std::string context;  ///< the longest run of whole words of at most context_tokens
  std::string answer;   ///< likewise, of at most answer_tokens; begins with white space
  std::size_t offset = 0;
};

/// Cuts documents that don't overlap, each from the start of a paragraph (of a sentence, where
/// paragraphs are rare), spread evenly over the texts and over each text. Fewer than `count` if the
/// texts are too short; deterministic in the seed. `count_tokens` must not shrink when text is
/// added.
[[nodiscard]] std::vector<Document> documents(const Texts& texts, const DocumentOptions& options,
                                              const CountTokens& count_tokens);

}  // namespace kvlean::eval
