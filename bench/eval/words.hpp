// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

#include "bench/eval/random.hpp"
#include "bench/eval/texts.hpp"

// Pieces of text that the tasks are built from.

namespace kvlean::eval {

struct ByteRange {
  std::size_t begin = 0;
  std::size_t end = 0;
};

/// The bytes of a text that belong to a split.
[[nodiscard]] ByteRange split_range(std::string_view text, Split split);

/// Bytes of the longest beginning of `text` that ends with a whole word and has at most
/// `max_tokens` tokens. `guess`: about how many bytes that is. O(log bytes) calls.
[[nodiscard]] std::size_t longest_words(std::string_view text, std::size_t max_tokens,
                                        const CountTokens& count_tokens, std::size_t guess = 256);

/// The sentences of a text, white space made single blanks. Very long ones are cut.
[[nodiscard]] std::vector<std::string> sentences_of(std::string_view text);

/// Lower-case words of 4 to 10 letters, all different, in drawn order: those of `texts`, and
/// made-up ones if that is fewer than `least`.
[[nodiscard]] std::vector<std::string> word_pool(const Texts& texts, Split split, std::size_t least,
                                                 Draws& draws);

/// "quiet-otter". There are about 10000.
[[nodiscard]] std::string word_pair(Draws& draws);
[[nodiscard]] std::string digits(Draws& draws, std::size_t count);  ///< the first is not 0
[[nodiscard]] std::string letters(Draws& draws, std::size_t count, char first);  ///< 'a' or 'A'
[[nodiscard]] std::string uuid(Draws& draws);

/// The filler that says nothing.
inline constexpr std::string_view noise_line =
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.";

}  // namespace kvlean::eval
