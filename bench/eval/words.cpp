// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#include "bench/eval/words.hpp"

#include <algorithm>
#include <cctype>
#include <iterator>
#include <map>
#include <set>
#include <utility>

namespace kvlean::eval {
namespace {

constexpr const char* adjectives[] = {
    "able",   "amber",    "ancient", "angry",  "bitter", "black",  "blank",   "blind",  "bold",
    "brave",  "brief",    "bright",  "broad",  "brown",  "calm",   "careful", "cheap",  "clean",
    "clear",  "clever",   "cold",    "common", "cool",   "crisp",  "curious", "damp",   "dark",
    "dear",   "deep",     "distant", "dry",    "dull",   "eager",  "early",   "empty",  "exact",
    "faint",  "fair",     "famous",  "fast",   "fierce", "final",  "firm",    "flat",   "formal",
    "fresh",  "friendly", "full",    "gentle", "glad",   "golden", "grand",   "grave",  "great",
    "green",  "grey",     "happy",   "hard",   "heavy",  "hidden", "hollow",  "honest", "humble",
    "hungry", "idle",     "kind",    "large",  "late",   "lazy",   "light",   "little", "lively",
    "lonely", "loose",    "loud",    "lucky",  "mild",   "modest", "narrow",  "neat",   "noble",
    "odd",    "open",     "pale",    "plain",  "polite", "proud",  "quick",   "quiet",  "rare",
    "ready",  "rough",    "round",   "sharp",  "silent", "simple", "sleepy",  "slow",   "smooth",
    "solid",  "steady",   "strange", "sweet",  "tall",   "thin",   "tidy",    "tiny",   "warm",
    "wide",   "wise"};
constexpr const char* nouns[] = {
    "anchor",   "apple",    "arrow",   "badger", "barrel",  "basket", "beacon", "bell",   "bird",
    "boat",     "bottle",   "branch",  "bridge", "brook",   "bucket", "button", "cabin",  "camel",
    "candle",   "carpet",   "castle",  "cedar",  "chair",   "cherry", "circle", "clock",  "cloud",
    "comet",    "copper",   "cottage", "crane",  "crown",   "desert", "donkey", "door",   "dragon",
    "drum",     "eagle",    "elbow",   "falcon", "feather", "fence",  "ferry",  "field",  "flute",
    "forest",   "fountain", "fox",     "garden", "gate",    "glove",  "goose",  "hammer", "harbour",
    "hawk",     "helmet",   "hill",    "horse",  "island",  "jacket", "kettle", "ladder", "lake",
    "lamp",     "lantern",  "leaf",    "lemon",  "lion",    "market", "meadow", "mirror", "moon",
    "mountain", "needle",   "oak",     "ocean",  "onion",   "otter",  "owl",    "paper",  "parrot",
    "pebble",   "pencil",   "piano",   "pillow", "planet",  "pocket", "pond",   "rabbit", "ribbon",
    "river",    "rocket",   "saddle",  "salmon", "shell",   "ship",   "spider", "spoon",  "stone",
    "table",    "thunder",  "tower",   "tunnel", "valley",  "violin", "wagon",  "walnut", "whale",
    "willow",   "window"};

}  // namespace

std::vector<std::string> sentences_of(std::string_view text) {
  constexpr std::size_t longest = 600;
  std::vector<std::string> sentences;
  std::string sentence;
  const auto flush = [&] {
    while (!sentence.empty() && sentence.back() == ' ') sentence.pop_back();
    if (sentence.size() > 1) sentences.push_back(sentence);
    sentence.clear();
  };
  for (std::size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (std::isspace(static_cast<unsigned char>(c)) == 0) {
      sentence += c;
      continue;
    }
    if (sentence.empty() || sentence.back() == ' ') continue;
    const char last = sentence.back();
    std::size_t next = i;
    while (next < text.size() && std::isspace(static_cast<unsigned char>(text[next])) != 0) ++next;
    const bool ends = (last == '.' || last == '?' || last == '!') && next < text.size() &&
                      std::isupper(static_cast<unsigned char>(text[next])) != 0;
    if (ends || sentence.size() >= longest) {
      flush();
    } else {
      sentence += ' ';
    }
  }
  flush();
  return sentences;
}

std::vector<std::string> word_pool(const Texts& texts, Split split, std::size_t least,
                                   Draws& draws) {
  // Of a long text only the usual words; sorted, so that the order does not depend on hashing.
  constexpr std::size_t most_of_texts = 6000;
  std::map<std::string, std::size_t> counts;
  for (const Text& text : texts) {
    const ByteRange range = split_range(text.content, split);
    std::string word;
    bool clean = true;
    for (std::size_t i = range.begin; i <= range.end; ++i) {
      const char c = i < range.end ? text.content[i] : ' ';
      if (c >= 'a' && c <= 'z') {
        word += c;
      } else if (c == ' ' || c == '\n' || c == ',' || c == '.' || c == ';') {
        if (clean && word.size() >= 4 && word.size() <= 10) ++counts[word];
        word.clear();
        clean = true;
      } else {
        clean = false;
      }
    }
  }
  std::vector<std::pair<std::size_t, std::string>> usual;
  for (const auto& [word, count] : counts) usual.emplace_back(count, word);
  std::stable_sort(usual.begin(), usual.end(),
                   [](const auto& a, const auto& b) { return a.first > b.first; });
  if (usual.size() > most_of_texts) usual.resize(most_of_texts);
  std::set<std::string> words;
  for (const auto& [count, word] : usual) words.insert(word);
  for (const char* word : adjectives) words.insert(word);
  for (const char* word : nouns) words.insert(word);
  constexpr std::string_view consonants = "bdfgklmnprstvz";
  constexpr std::string_view vowels = "aeiou";
  while (words.size() < least) {
    std::string word;
    for (std::size_t syllable = draws.between(2, 4); syllable > 0; --syllable) {
      word += consonants[draws.below(consonants.size())];
      word += vowels[draws.below(vowels.size())];
    }
    words.insert(word);
  }
  std::vector<std::string> pool(words.begin(), words.end());
  draws.shuffle(pool);
  return pool;
}

std::string word_pair(Draws& draws) {
  const std::string first = adjectives[draws.below(std::size(adjectives))];
  return first + "-" + nouns[draws.below(std::size(nouns))];
}

std::string digits(Draws& draws, std::size_t count) {
  std::string text;
  for (std::size_t i = 0; i < count; ++i) {
    text += static_cast<char>('0' + (i == 0 ? draws.between(1, 9) : draws.below(10)));
  }
  return text;
}

std::string letters(Draws& draws, std::size_t count, char first) {
  std::string text;
  for (std::size_t i = 0; i < count; ++i) {
    text += static_cast<char>(first + static_cast<char>(draws.below(26)));
  }
  return text;
}

std::string uuid(Draws& draws) {
  constexpr std::string_view hex = "0123456789abcdef";
  std::string text;
  for (const std::size_t part : {8u, 4u, 4u, 4u, 12u}) {
    if (!text.empty()) text += '-';
    for (std::size_t i = 0; i < part; ++i) text += hex[draws.below(16)];
  }
  return text;
}

}  // namespace kvlean::eval
