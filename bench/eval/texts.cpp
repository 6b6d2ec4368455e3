// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#include "bench/eval/texts.hpp"

#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>

#include "bench/eval/random.hpp"
#include "bench/eval/words.hpp"

namespace kvlean::eval {
namespace {

bool read_file(const std::string& path, std::string& content) {
  std::ifstream file(path, std::ios::binary);
  if (!file) return false;
  content.assign(std::istreambuf_iterator<char>(file), {});
  return !file.bad();
}

/// Where a document may start at or after `from`: at a paragraph, else at a line or a sentence that
/// begins with a capital. `npos` if there is no such place before `end`.
std::size_t next_start(std::string_view text, std::size_t from, std::size_t end) {
  constexpr std::size_t near = 1500;  // bytes; paragraphs further away are rare enough to skip
  const auto starts_well = [&](std::size_t at) {
    return at < end && std::isalpha(static_cast<unsigned char>(text[at])) != 0;
  };
  if (from == 0 && starts_well(0)) return 0;
  if (from > 0) --from;  // so that a paragraph that starts right here is found
  for (std::size_t at = text.find("\n\n", from > 0 ? from - 1 : 0);
       at != std::string_view::npos && at + 2 < end && at < from + near;
       at = text.find("\n\n", at + 1)) {
    if (starts_well(at + 2)) return at + 2;
  }
  for (std::size_t at = from; at + 2 < end; ++at) {
    const bool line = text[at] == '\n';
    const bool sentence = at > 0 && text[at] == ' ' &&
                          std::string_view(".?!").find(text[at - 1]) != std::string_view::npos;
    if ((line || sentence) && std::isupper(static_cast<unsigned char>(text[at + 1])) != 0) {
      return at + 1;
    }
  }
  return std::string_view::npos;
}

struct Cut {
  Document document;
  std::size_t end = 0;  ///< byte after the answer; 0 if nothing was cut
};

/// The document that starts at the first good place from `from` on and ends before `end`.
Cut cut_at(const Text& text, std::size_t from, std::size_t end, const DocumentOptions& options,
           const CountTokens& count_tokens, std::size_t guess) {
  Cut cut;
  const std::string_view all = std::string_view(text.content).substr(0, end);
  const std::size_t start = next_start(all, from, end);
  if (start == std::string_view::npos) return cut;
  const std::string_view body = all.substr(start);
  const std::size_t context = longest_words(body, options.context_tokens, count_tokens, guess);
  if (context == 0 || context >= body.size()) return cut;
  const std::string_view rest = body.substr(context);
  const std::size_t answer = longest_words(rest, options.answer_tokens, count_tokens,
                                           guess * options.answer_tokens / options.context_tokens);
  if (answer == 0 || answer >= rest.size()) return cut;
  cut.document = {text.name + "@" + std::to_string(start), text.name,
                  std::string(body.substr(0, context)), std::string(rest.substr(0, answer)), start};
  cut.end = start + context + answer;
  return cut;
}

}  // namespace

std::string_view split_name(Split split) { return split == Split::select ? "select" : "confirm"; }

ByteRange split_range(std::string_view text, Split split) {
  // The border is a line's start, the same for both halves.
  const std::size_t middle = text.find('\n', text.size() / 2);
  const std::size_t border = middle == std::string_view::npos ? text.size() / 2 : middle + 1;
  return split == Split::select ? ByteRange{0, border} : ByteRange{border, text.size()};
}

std::size_t longest_words(std::string_view text, std::size_t max_tokens,
                          const CountTokens& count_tokens, std::size_t guess) {
  const auto word_end = [&](std::size_t at) {  // the first end of a word at or after `at`
    const auto blank = [&](std::size_t i) {
      return std::isspace(static_cast<unsigned char>(text[i])) != 0;
    };
    at = std::min(std::max<std::size_t>(at, 1), text.size());
    while (at < text.size() && (blank(at - 1) || !blank(at))) ++at;
    return at;
  };
  const auto fits = [&](std::size_t end) {
    return count_tokens(text.substr(0, end)) <= max_tokens;
  };
  if (text.empty() || max_tokens == 0) return 0;
  std::size_t low = 0;  // fits
  std::size_t high = word_end(std::max<std::size_t>(guess, 16));
  while (fits(high)) {
    low = high;
    if (high >= text.size()) return high;
    high = word_end(high + std::max<std::size_t>(high / 4, 16));
  }
  while (true) {  // `high` does not fit
    const std::size_t middle = word_end(low + (high - low) / 2);
    if (middle >= high) {
      // The upper half is one word: go through the ends of words below it.
      std::size_t end = word_end(low + 1);
      while (end < high && fits(end)) {
        low = end;
        end = word_end(low + 1);
      }
      return low;
    }
    (fits(middle) ? low : high) = middle;
  }
}

std::string default_texts_folder() {
  const char* cache = std::getenv("XDG_CACHE_HOME");
  if (cache != nullptr && *cache != '\0') return std::string(cache) + "/kvlean/texts";
  const char* home = std::getenv("HOME");
  return std::string(home != nullptr ? home : ".") + "/.cache/kvlean/texts";
}

Result<Texts> load_texts(const std::string& folder) {
  using R = Result<Texts>;
  const std::string path = folder + "/manifest.json";
  std::string content;
  if (!read_file(path, content)) {
    return R::failure(path + ": cannot read; bench/eval/get_texts.sh gets the texts");
  }
  const nlohmann::json manifest = nlohmann::json::parse(content, nullptr, false);
  if (!manifest.is_object() || !manifest.contains("texts") || !manifest["texts"].is_array()) {
    return R::failure(path + ": no list \"texts\"");
  }
  Texts texts;
  for (const nlohmann::json& entry : manifest["texts"]) {
    const auto word = [&](const char* key) {
      return entry.is_object() && entry.contains(key) && entry[key].is_string()
                 ? entry[key].get<std::string>()
                 : std::string();
    };
    Text text{word("name"), word("licence"), word("package"), word("version"), word("sha256"), {}};
    const std::string file = word("file");
    if (text.name.empty() || file.empty() || file.find('/') != std::string::npos) {
      return R::failure(path + ": a text without a name or a plain file name");
    }
    if (!read_file(folder + "/" + file, text.content)) {
      return R::failure(folder + "/" + file + ": cannot read");
    }
    if (!entry.contains("bytes") || entry["bytes"] != text.content.size()) {
      return R::failure(folder + "/" + file + ": not the size that the manifest says");
    }
    texts.push_back(std::move(text));
  }
  if (texts.empty()) return R::failure(path + ": no texts");
  return R::success(std::move(texts));
}

std::vector<Document> documents(const Texts& texts, const DocumentOptions& options,
                                const CountTokens& count_tokens) {
  struct Source {
    const Text* text;
    ByteRange range;
    std::size_t guess;     ///< bytes of a context
    std::size_t capacity;  ///< documents at most, roughly
    std::size_t quota = 0;
    std::vector<Document> cut;
    bool exhausted = false;
  };
  if (options.context_tokens == 0 || options.answer_tokens == 0) return {};
  std::vector<Source> sources;
  for (const Text& text : texts) {
    Source source{&text, split_range(text.content, options.split), 0, 0, 0, {}, false};
    const std::string_view half =
        std::string_view(text.content)
            .substr(source.range.begin, source.range.end - source.range.begin);
    const std::string_view sample = half.substr(half.size() / 3, 16384);
    const std::size_t tokens = sample.empty() ? 0 : count_tokens(sample);
    if (tokens == 0) continue;
    const double bytes = static_cast<double>(sample.size()) / static_cast<double>(tokens);
    source.guess = static_cast<std::size_t>(bytes * static_cast<double>(options.context_tokens));
    const double whole =
        bytes * static_cast<double>(options.context_tokens + options.answer_tokens);
    source.capacity = static_cast<std::size_t>(static_cast<double>(half.size()) / whole);
    if (source.capacity > 0) sources.push_back(std::move(source));
  }

  // `quota` documents of one source: one in each of as many equal stretches, at a drawn place.
  // Where that fails, as many as fit one after the other.
  const auto cut_source = [&](Source& source) {
    const Text& text = *source.text;
    const std::size_t bytes = source.range.end - source.range.begin;
    Draws draws(options.seed, "documents/" + text.name);
    source.cut.clear();
    for (std::size_t s = 0; s < source.quota; ++s) {
      const std::size_t begin = source.range.begin + bytes * s / source.quota;
      const std::size_t end = source.range.begin + bytes * (s + 1) / source.quota;
      const std::size_t need =
          source.guess + source.guess * options.answer_tokens / options.context_tokens;
      const double slack = end - begin > need ? static_cast<double>(end - begin - need) : 0.0;
      const std::size_t shift = static_cast<std::size_t>(0.8 * slack * draws.unit());
      Cut cut = cut_at(text, begin + shift, end, options, count_tokens, source.guess);
      if (cut.end == 0) cut = cut_at(text, begin, end, options, count_tokens, source.guess);
      if (cut.end != 0) source.cut.push_back(std::move(cut.document));
    }
    if (source.cut.size() == source.quota) return;
    std::vector<Document> packed;
    for (std::size_t at = source.range.begin; at < source.range.end;) {
      Cut cut = cut_at(text, at, source.range.end, options, count_tokens, source.guess);
      if (cut.end == 0) break;
      at = cut.end;
      packed.push_back(std::move(cut.document));
    }
    if (packed.size() <= source.quota) {
      source.exhausted = true;
      if (packed.size() > source.cut.size()) source.cut = std::move(packed);
      source.quota = source.cut.size();
      return;
    }
    source.cut.clear();
    for (std::size_t s = 0; s < source.quota; ++s) {
      source.cut.push_back(std::move(packed[packed.size() * s / source.quota]));
    }
  };

  std::size_t have = 0;
  while (have < options.count) {
    std::size_t missing = options.count - have;
    std::vector<Source*> grown;
    for (bool any = true; missing > 0 && any;) {  // one document a source in turn, shortest first
      any = false;
      std::vector<Source*> turn;
      for (Source& source : sources) {
        if (!source.exhausted && source.quota < source.capacity) turn.push_back(&source);
      }
      std::stable_sort(turn.begin(), turn.end(),
                       [](const Source* a, const Source* b) { return a->quota < b->quota; });
      for (Source* source : turn) {
        if (missing == 0) break;
        if (source->quota > turn.front()->quota + 1) continue;
        ++source->quota;
        --missing;
        any = true;
        if (std::find(grown.begin(), grown.end(), source) == grown.end()) grown.push_back(source);
      }
    }
    if (grown.empty()) break;
    for (Source* source : grown) cut_source(*source);
    have = 0;
    for (const Source& source : sources) have += source.cut.size();
  }
  // In turn by source, so that a run that is stopped early has seen all of them.
  std::vector<Document> result;
  for (std::size_t i = 0; result.size() < have; ++i) {
    for (Source& source : sources) {
      if (i < source.cut.size()) result.push_back(std::move(source.cut[i]));
    }
  }
  if (result.size() > options.count) result.resize(options.count);
  return result;
}

}  // namespace kvlean::eval
