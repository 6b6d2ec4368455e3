// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#include "bench/eval/task_builders.hpp"

#include <algorithm>
#include <cmath>
#include <set>

namespace kvlean::eval::detail {
namespace {

/// Something that stands before unit `index` of a haystack.
struct Insertion {
  std::size_t index = 0;
  std::string text;
};

/// Units and insertions (ascending), joined. Insertions stand on lines of their own if `own_lines`.
std::string assemble(std::size_t units, const std::function<std::string(std::size_t)>& unit,
                     const std::vector<Insertion>& insertions, std::string_view joint,
                     bool own_lines) {
  std::string out;
  const auto add = [&](std::string_view text, bool line) {
    if (!out.empty() && out.back() != '\n') out += line ? "\n" : joint;
    out += text;
    if (line) out += '\n';
  };
  std::size_t next = 0;
  for (std::size_t i = 0; i <= units; ++i) {
    while (next < insertions.size() && insertions[next].index <= i) {
      add(insertions[next++].text, own_lines);
    }
    if (i < units) add(unit(i), false);
  }
  while (!out.empty() && out.back() == '\n') out.pop_back();
  return out;
}

/// `count` different strings from `make`, none of those in `taken`, which grows by them.
template <class Make>
std::vector<std::string> distinct(std::size_t count, std::set<std::string>& taken,
                                  const Make& make) {
  std::vector<std::string> out;
  while (out.size() < count) {
    std::string text = make();
    if (taken.insert(text).second) out.push_back(std::move(text));
  }
  return out;
}

/// "a", "a and b", "a, b and c".
std::string listed(const std::vector<std::string>& words) {
  std::string out;
  for (std::size_t i = 0; i < words.size(); ++i) {
    if (i > 0) out += i + 1 == words.size() ? " and " : ", ";
    out += words[i];
  }
  return out;
}

std::string joined(const std::vector<std::string>& words, std::string_view joint) {
  std::string out;
  for (const std::string& word : words) {
    if (!out.empty()) out += joint;
    out += word;
  }
  return out;
}

/// Makes an item a choice: the answer and others, each after a blank, in drawn order.
void set_choice(Item& item, const std::string& answer, std::vector<std::string> others,
                Draws& draws) {
  others.push_back(answer);
  draws.shuffle(others);
  for (std::size_t i = 0; i < others.size(); ++i) {
    if (others[i] == answer) item.answer_index = i;
    item.candidates.push_back(" " + others[i]);
  }
  item.answer = " " + answer;
}

/// Makes an item a generation. `usual` tokens, or more where the tokenizer needs more.
void set_generation(Item& item, const std::vector<std::string>& references, std::size_t usual,
                    const CountTokens& count_tokens) {
  item.references = references;
  item.max_new_tokens = std::max(usual, count_tokens(joined(references, ", ")) + 8);
}

bool is_choice(const TaskInfo& task) { return task.kind == ItemKind::forced_choice; }

/// What no context of this many tokens can exceed: no unit is shorter than one token.
std::size_t most_units(const Work& work) { return work.options.context_tokens; }

}  // namespace

// ---- Work ---------------------------------------------------------------------------------------

Work::Work(const TaskOptions& task_options, const Texts& task_texts, const CountTokens& counter)
    : options(task_options), count_tokens(counter), texts_(task_texts) {
  constexpr std::size_t fewest = 20;
  for (const Text& text : texts_) {
    const ByteRange range = split_range(text.content, options.split);
    std::vector<std::string> sentences =
        sentences_of(std::string_view(text.content).substr(range.begin, range.end - range.begin));
    if (sentences.size() < fewest) continue;
    sentences_.push_back(std::move(sentences));
    sources_.push_back(text.name);
  }
}

const std::string& Work::Haystack::sentence(std::size_t index) const {
  const std::size_t free = sentences->size() - reserved;
  return (*sentences)[(start + reserved + index % free) % sentences->size()];
}

Work::Haystack Work::haystack(std::size_t sample, Draws& draws) const {
  const std::size_t text = sample % sentences_.size();
  return {&sentences_[text], draws.below(sentences_[text].size()), sources_[text], 0};
}

const std::vector<std::string>& Work::pool(std::size_t least) {
  if (pool_.size() < least) {
    Draws draws(options.seed, "word pool");
    pool_ = word_pool(texts_, options.split, least, draws);
  }
  return pool_;
}

bool Work::fits(const Item& item) const {
  std::size_t after = item.max_new_tokens;
  if (!item.answer.empty()) after = std::max(after, count_tokens(item.answer));
  for (const std::string& candidate : item.candidates) {
    after = std::max(after, count_tokens(candidate));
  }
  return count_tokens(item.context) + count_tokens(item.question) + after <= options.context_tokens;
}

Result<Item> Work::largest(std::size_t low, std::size_t high,
                           const std::function<Item(std::size_t units)>& build) const {
  using R = Result<Item>;
  Item best = build(low);
  if (high < low || !fits(best)) {
    return R::failure("does not fit into " + std::to_string(options.context_tokens) + " tokens");
  }
  std::size_t step = 1;
  std::size_t bad = high + 1;  // the smallest number of units known not to fit
  while (low + 1 < bad) {
    // Steps that double until one is too far, then bisection.
    const std::size_t next = bad <= high ? low + (bad - low) / 2 : std::min(high, low + step);
    Item item = build(next);
    if (fits(item)) {
      best = std::move(item);
      low = next;
      step *= 2;
    } else {
      bad = next;
    }
  }
  return R::success(std::move(best));
}

// ---- copying ------------------------------------------------------------------------------------

Result<Item> make_copy(Work& work, const TaskInfo& task, const Place& place) {
  using R = Result<Item>;
  Draws draws(work.options.seed, place.seed);
  Work::Haystack haystack = work.haystack(place.sample, draws);
  const std::size_t wanted = work.options.cue_tokens + work.options.answer_tokens;
  // The passage: whole sentences, or drawn words, of more tokens than are scored.
  std::string passage;
  if (task.name == "copy_random") {
    const std::vector<std::string>& pool = work.pool(2000);
    while (work.count_tokens(passage) < wanted + 4) {
      for (int i = 0; i < 8; ++i) {
        if (!passage.empty()) passage += ' ';
        passage += pool[draws.below(pool.size())];
      }
    }
  } else {
    const std::size_t available = haystack.sentences->size() / 2;
    for (std::size_t i = 0; i < available && work.count_tokens(passage) < wanted + 4; ++i) {
      if (!passage.empty()) passage += ' ';
      passage += haystack.sentence(i);
    }
    // The filler goes on after the passage and never repeats it.
    for (std::size_t bytes = 0; bytes < passage.size(); ++haystack.reserved) {
      bytes +=
          (*haystack.sentences)[(haystack.start + haystack.reserved) % haystack.sentences->size()]
              .size() +
          1;
    }
  }
  const std::size_t cue = longest_words(passage, work.options.cue_tokens, work.count_tokens, 64);
  const std::string_view rest = std::string_view(passage).substr(cue);
  const std::size_t scored = longest_words(rest, work.options.answer_tokens, work.count_tokens);
  if (cue == 0 || scored == 0) return R::failure("a text is too short for the passage");
  passage.resize(cue + scored);
  return work.largest(1, most_units(work), [&](std::size_t units) {
    Item item;
    item.source = haystack.source;
    const std::size_t index = static_cast<std::size_t>(place.depth * static_cast<double>(units));
    item.context = assemble(
        units, [&](std::size_t i) { return haystack.sentence(i); }, {{index, passage}}, " ", true);
    item.question = "\n" + passage.substr(0, cue);
    item.answer = passage.substr(cue);
    item.depth = static_cast<double>(index) / static_cast<double>(units);
    return item;
  });
}

// ---- pass key -----------------------------------------------------------------------------------

Result<Item> make_passkey(Work& work, const TaskInfo&, const Place& place) {
  Draws draws(work.options.seed, place.seed);
  const Work::Haystack haystack = work.haystack(place.sample, draws);
  std::set<std::string> taken;
  const auto number = [&] { return digits(draws, 5); };
  const std::string example = distinct(1, taken, number)[0];
  const std::string key = distinct(1, taken, number)[0];
  const std::vector<std::string> others = distinct(work.options.candidates - 1, taken, number);
  Item base;
  base.source = haystack.source;
  // One solved example of the same form, about something else.
  const std::string start = "The door number is " + example + ". Remember it. " + example +
                            " is the door number.\nWhat is the door number? The door number is " +
                            example + ".\n\n";
  const std::string statement =
      "The pass key is " + key + ". Remember it. " + key + " is the pass key.";
  base.question = "\nWhat is the pass key? The pass key is";
  set_choice(base, key, others, draws);
  return work.largest(1, most_units(work), [&](std::size_t units) {
    Item item = base;
    const std::size_t index =
        static_cast<std::size_t>(std::lround(place.depth * static_cast<double>(units)));
    item.context = start + assemble(
                               units, [&](std::size_t i) { return haystack.sentence(i); },
                               {{index, statement}}, " ", true);
    item.depth = place.depth;
    return item;
  });
}

// ---- needles ------------------------------------------------------------------------------------

namespace {

enum class Hay { noise, essay, needles };

struct NeedleForm {
  std::string_view task;
  Hay hay;
  bool uuid_keys;
  bool uuid_values;
  std::size_t keys;
  std::size_t values;   ///< a key
  std::size_t queries;  ///< keys asked for
};
constexpr NeedleForm needle_forms[] = {
    {"needle_single_1", Hay::noise, false, false, 1, 1, 1},
    {"needle_single_2", Hay::essay, false, false, 1, 1, 1},
    {"needle_single_3", Hay::essay, false, true, 1, 1, 1},
    {"needle_multikey_1", Hay::essay, false, false, 4, 1, 1},
    {"needle_multikey_2", Hay::needles, false, false, 1, 1, 1},
    {"needle_multikey_3", Hay::needles, true, true, 1, 1, 1},
    {"needle_multivalue", Hay::essay, false, false, 1, 4, 1},
    {"needle_multiquery", Hay::essay, false, false, 4, 1, 4},
};

}  // namespace

Result<Item> make_needle(Work& work, const TaskInfo& task, const Place& place) {
  const std::string_view name = task.name;
  const NeedleForm* form = nullptr;
  for (const NeedleForm& each : needle_forms) {
    if (name.starts_with(each.task)) form = &each;
  }
  if (form == nullptr) return Result<Item>::failure("no such needles");
  const std::string kind = form->uuid_values ? "secret code" : "secret number";
  const bool several = form->values > 1;
  const auto statement = [&](const std::string& key, const std::string& value) {
    return (several ? "One of the " + kind + "s" : "The " + kind) + " of " + key + " is " + value +
           ".";
  };
  constexpr std::size_t depths = 40;
  return work.largest(1, most_units(work), [&](std::size_t units) {
    // Drawn anew for every size, in an order that makes keys and values the same for all.
    Draws draws(work.options.seed, place.seed);
    const Work::Haystack haystack = work.haystack(place.sample, draws);
    std::set<std::string> taken_keys;
    std::set<std::string> taken_values;
    const auto new_key = [&] {
      if (form->uuid_keys) return uuid(draws);
      std::string key = word_pair(draws);
      // Pairs of words run out in very long contexts.
      return taken_keys.size() < 4000 ? key : key + "-" + word_pair(draws);
    };
    const auto new_value = [&] { return form->uuid_values ? uuid(draws) : digits(draws, 7); };
    const std::vector<std::string> keys = distinct(form->keys, taken_keys, new_key);
    const std::vector<std::string> values =
        distinct(form->keys * form->values, taken_values, new_value);
    std::vector<std::size_t> order(values.size());
    for (std::size_t i = 0; i < order.size(); ++i) order[i] = i;
    draws.shuffle(order);
    const std::vector<std::size_t> percents = draws.sample(depths, values.size());
    const std::vector<std::string> strangers =
        is_choice(task) ? distinct(work.options.candidates, taken_values, new_value)
                        : std::vector<std::string>();

    Item item;
    item.source = form->hay == Hay::essay ? haystack.source : "synthetic";
    std::vector<std::size_t> places;
    if (form->hay == Hay::essay) {
      for (const std::size_t percent : percents) {
        places.push_back(units * percent / (depths - 1));
      }
    } else {
      for (std::size_t i = 0; i < values.size(); ++i) places.push_back(draws.below(units + 1));
    }
    std::sort(places.begin(), places.end());
    std::vector<Insertion> insertions;
    for (std::size_t i = 0; i < order.size(); ++i) {
      const std::size_t value = order[i];
      insertions.push_back({places[i], statement(keys[value / form->values], values[value])});
      if (value == 0) item.depth = static_cast<double>(places[i]) / static_cast<double>(units);
    }
    std::vector<std::string> others;  // values of further needles
    std::vector<std::string> lines;
    if (form->hay == Hay::needles) {
      for (std::size_t i = 0; i < units; ++i) {
        others.push_back(distinct(1, taken_values, new_value)[0]);
        lines.push_back(statement(distinct(1, taken_keys, new_key)[0], others.back()));
      }
    }
    const auto unit = [&](std::size_t i) {
      if (form->hay == Hay::noise) return std::string(noise_line);
      return form->hay == Hay::needles ? lines[i] : haystack.sentence(i);
    };
    item.context = "Some " + kind +
                   "s are hidden in the text below. Keep them in mind: they are asked for at the "
                   "end.\n\n" +
                   assemble(units, unit, insertions, form->hay == Hay::essay ? " " : "\n", false);

    const std::vector<std::string> asked(keys.begin(),
                                         keys.begin() + static_cast<std::ptrdiff_t>(form->queries));
    if (is_choice(task)) {
      item.question =
          "\n\nWhat is the " + kind + " of " + keys[0] + "? The " + kind + " of " + keys[0] + " is";
      // The values of other needles first: telling them apart is the task.
      others.insert(others.begin(), values.begin() + 1, values.end());
      draws.shuffle(others);
      others.insert(others.end(), strangers.begin(), strangers.end());
      others.resize(work.options.candidates - 1);
      set_choice(item, values[0], others, draws);
    } else {
      const bool plural = form->queries * form->values > 1;
      const std::string what = kind + (plural ? "s of " : " of ") + listed(asked) +
                               " mentioned in the text above " + (plural ? "are" : "is");
      item.question = std::string("\n\nWhat ") + (plural ? "are all the " : "is the ") + kind +
                      (plural ? "s of " : " of ") + listed(asked) +
                      " mentioned in the text above? The " + what;
      set_generation(item,
                     {values.begin(),
                      values.begin() + static_cast<std::ptrdiff_t>(form->queries * form->values)},
                     128, work.count_tokens);
    }
    return item;
  });
}

// ---- variable tracking --------------------------------------------------------------------------

namespace {

/// The statements of one chain: VAR A = 12345, VAR B = VAR A, ...
std::vector<std::string> chain_lines(const std::vector<std::string>& names,
                                     const std::string& value) {
  std::vector<std::string> lines;
  for (std::size_t i = 0; i < names.size(); ++i) {
    lines.push_back("VAR " + names[i] + " = " + (i == 0 ? value : "VAR " + names[i - 1]));
  }
  return lines;
}

}  // namespace

Result<Item> make_tracking(Work& work, const TaskInfo& task, const Place& place) {
  constexpr std::size_t hops = 4;
  const std::size_t chains = is_choice(task) ? 4 : 1;
  return work.largest(chains * (hops + 1), most_units(work), [&](std::size_t units) {
    Draws draws(work.options.seed, place.seed);
    std::set<std::string> taken;
    const std::vector<std::string> short_names =
        distinct(hops + 1, taken, [&] { return letters(draws, 3, 'A'); });
    const std::string short_value = distinct(1, taken, [&] { return digits(draws, 5); })[0];
    std::vector<std::vector<std::string>> names;
    std::vector<std::string> values;
    for (std::size_t c = 0; c < chains; ++c) {
      names.push_back(distinct(hops + 1, taken, [&] { return letters(draws, 5, 'A'); }));
      values.push_back(distinct(1, taken, [&] { return digits(draws, 5); })[0]);
    }
    const std::vector<std::string> strangers =
        distinct(work.options.candidates, taken, [&] { return digits(draws, 5); });

    // What is asked, and how the example shows it.
    const auto ask = [&](const std::vector<std::string>& chain, const std::string& value) {
      if (is_choice(task)) {
        return "\nWhat is the value of VAR " + chain.back() + "? The value of VAR " + chain.back() +
               " is";
      }
      return "\nWhich variables hold the value " + value + "? " + std::to_string(chain.size()) +
             " variables hold the value " + value + ":";
    };
    std::string example;
    for (const std::string& line : chain_lines(short_names, short_value)) {
      example += std::string(noise_line) + "\n" + line + "\n";
    }
    example.pop_back();
    example += ask(short_names, short_value) + " " +
               (is_choice(task) ? short_value : joined(short_names, ", ")) + ".\n\n";

    std::vector<Insertion> insertions;
    Item item;
    item.source = "synthetic";
    for (std::size_t c = 0; c < chains; ++c) {
      std::vector<std::size_t> places = draws.sample(units, hops + 1);
      std::sort(places.begin(), places.end());
      const std::vector<std::string> lines = chain_lines(names[c], values[c]);
      for (std::size_t i = 0; i < lines.size(); ++i) insertions.push_back({places[i], lines[i]});
      if (c == 0) item.depth = static_cast<double>(places[0]) / static_cast<double>(units);
    }
    std::stable_sort(insertions.begin(), insertions.end(),
                     [](const Insertion& a, const Insertion& b) { return a.index < b.index; });
    item.context =
        "Variables get values in the text below, and hand them on.\n\n" + example +
        assemble(
            units, [](std::size_t) { return std::string(noise_line); }, insertions, "\n", true);
    item.question = ask(names[0], values[0]);
    if (is_choice(task)) {
      std::vector<std::string> others(values.begin() + 1, values.end());
      others.insert(others.end(), strangers.begin(), strangers.end());
      others.resize(work.options.candidates - 1);
      set_choice(item, values[0], others, draws);
    } else {
      set_generation(item, names[0], 30, work.count_tokens);
    }
    return item;
  });
}

// ---- common and frequent words ------------------------------------------------------------------

Result<Item> make_common_words(Work& work, const TaskInfo& task, const Place& place) {
  constexpr std::size_t common = 10;
  const bool small = work.options.context_tokens < 4096;
  const std::size_t example_words = small ? 20 : 40;
  const std::vector<std::string>& pool =
      work.pool(example_words + common + work.options.candidates + most_units(work) / 4);
  const auto list = [](const std::vector<std::string>& words, std::size_t often,
                       std::size_t otherwise, Draws& draws) {
    std::vector<std::string> all;
    for (std::size_t i = 0; i < words.size(); ++i) {
      for (std::size_t k = i < common ? often : otherwise; k > 0; --k) all.push_back(words[i]);
    }
    draws.shuffle(all);
    std::string out;
    for (std::size_t i = 0; i < all.size(); ++i) {
      if (i > 0) out += ' ';
      out += std::to_string(i + 1) + ". " + all[i];
    }
    return out;
  };
  const std::string ask = is_choice(task)
                              ? "\nA word that occurs most often in the list above is"
                              : "\nThe 10 words that occur most often in the list above are:";
  const std::size_t fewest = is_choice(task) ? common + work.options.candidates : common + 1;
  return work.largest(fewest, pool.size() - example_words, [&](std::size_t units) {
    Draws draws(work.options.seed, place.seed);
    const std::vector<std::size_t> chosen = draws.sample(pool.size(), example_words + units);
    std::vector<std::string> example;
    std::vector<std::string> words;
    for (std::size_t i = 0; i < chosen.size(); ++i) {
      (i < example_words ? example : words).push_back(pool[chosen[i]]);
    }
    const std::vector<std::string> top(words.begin(), words.begin() + common);
    Item item;
    item.source = "synthetic";
    item.context =
        "Below are numbered lists of words. Some words occur more often than others.\n\n" +
        list(example, small ? 3 : 10, small ? 1 : 3, draws) + ask + " " +
        (is_choice(task) ? example[0] : joined({example.begin(), example.begin() + common}, ", ")) +
        ".\n\n" + list(words, small ? 6 : 30, small ? 1 : 3, draws);
    item.question = ask;
    if (is_choice(task)) {
      std::vector<std::string> others(words.begin() + common, words.end());
      draws.shuffle(others);
      others.resize(work.options.candidates - 1);
      set_choice(item, top[draws.below(common)], others, draws);
    } else {
      set_generation(item, top, 120, work.count_tokens);
    }
    return item;
  });
}

Result<Item> make_frequent_words(Work& work, const TaskInfo& task, const Place& place) {
  constexpr double zeta = 1.6449340668482264;  // of 2
  const std::size_t vocabulary =
      std::max(work.options.context_tokens / 50, work.options.candidates + 3);
  // So many that ranks 2 to 5 differ in count.
  constexpr std::size_t fewest = 80;
  return work.largest(fewest, fewest + most_units(work), [&](std::size_t units) {
    Draws draws(work.options.seed, place.seed);
    std::set<std::string> taken;
    const std::vector<std::string> words =
        distinct(vocabulary, taken, [&] { return letters(draws, 6, 'a'); });
    std::vector<std::string> text;
    for (std::size_t rank = 1; rank <= vocabulary; ++rank) {
      const double share = 1.0 / (zeta * static_cast<double>(rank * rank));
      // A candidate must occur, or the choice would be between words and inventions.
      const std::size_t count =
          std::max<std::size_t>(static_cast<std::size_t>(static_cast<double>(units) * share), 1);
      for (std::size_t i = 0; i < count; ++i) text.push_back(rank == 1 ? "..." : words[rank - 1]);
    }
    draws.shuffle(text);
    Item item;
    item.source = "synthetic";
    item.context =
        "The text below is made of coded words. Dots stand for a word that does not "
        "count.\n\n" +
        joined(text, " ");
    if (is_choice(task)) {
      item.question = "\n\nThe coded word that occurs most often in the text above is";
      set_choice(item, words[1],
                 {words.begin() + 4,
                  words.begin() + static_cast<std::ptrdiff_t>(3 + work.options.candidates)},
                 draws);
    } else {
      item.question =
          "\n\nThe three coded words that occur most often in the text above, the dots aside, are:";
      set_generation(item, {words.begin() + 1, words.begin() + 4}, 50, work.count_tokens);
    }
    return item;
  });
}

// ---- the tiny model's own tasks -----------------------------------------------------------------

namespace {

/// Lines at drawn places of real text, as that model was trained on. `lines` keep their order only
/// within a group.
struct TinyBody {
  std::vector<std::vector<std::string>> groups;
  std::size_t asked = 0;  ///< the group that is asked for
  std::string question;
  std::string reference;
};

std::string drawn_letters(Draws& draws, std::size_t least, std::size_t most, char first) {
  const std::size_t count = draws.between(least, most);
  return letters(draws, count, first);
}

TinyBody tiny_recall(const Work& work, std::size_t sample, Draws& draws) {
  TinyBody body;
  std::vector<std::size_t> counts;
  for (const std::size_t count : {1u, 2u, 4u, 8u, 16u, 32u}) {
    // About 40 bytes a statement, of which the tokens are bytes.
    if (count * 40 < work.options.context_tokens * 4 / 5) counts.push_back(count);
  }
  const std::size_t count = counts.empty() ? 1 : counts[draws.below(counts.size())];
  std::set<std::string> taken;
  const std::vector<std::string> keys = distinct(count, taken, [&] {
    return sample % 2 == 0 ? drawn_letters(draws, 5, 8, 'a') : word_pair(draws);
  });
  const std::vector<std::string> values = distinct(count, taken, [&] {
    const std::size_t length = draws.between(5, 7);
    return digits(draws, length);
  });
  for (std::size_t i = 0; i < count; ++i) {
    body.groups.push_back({"the code of " + keys[i] + " is " + values[i] + "."});
  }
  body.question = "what is the code of " + keys[0] + "? ";
  body.reference = values[0];
  return body;
}

TinyBody tiny_copy(Work& work, Work::Haystack& haystack, std::size_t sample, Draws& draws) {
  constexpr std::size_t cue = 16;
  const std::size_t longest =
      std::max<std::size_t>(64, std::min<std::size_t>(512, work.options.context_tokens / 4));
  const std::size_t length = draws.between(64, longest);
  std::string text;
  const std::vector<std::string>& pool = work.pool(1000);
  std::size_t pieces = 0;
  for (; text.size() < length; ++pieces) {
    if (sample % 3 == 0) {
      const std::size_t pick = draws.below(30);  // four of thirty are blanks
      text += pick < 26 ? static_cast<char>('a' + static_cast<char>(pick)) : ' ';
    } else {
      if (!text.empty()) text += ' ';
      text += sample % 3 == 1 ? pool[draws.below(pool.size())] : haystack.sentence(pieces);
    }
  }
  // The filler goes on after the passage.
  if (sample % 3 == 2) haystack.reserved = std::min(pieces, haystack.sentences->size() / 2);
  text.resize(length);
  const auto blank = [](char c) { return c == ' '; };
  text.erase(text.begin(), std::find_if_not(text.begin(), text.end(), blank));
  while (!text.empty() && text.back() == ' ') text.pop_back();
  TinyBody body;
  body.groups.push_back({"passage: " + text});
  body.question = "repeat: " + text.substr(0, cue);
  // What is checked ends with a word, at most answer_tokens further on.
  std::size_t end = std::min(text.size(), cue + work.options.answer_tokens);
  if (end < text.size()) {
    const std::size_t space = text.rfind(' ', end);
    end = space != std::string::npos && space > cue + 8 ? space : text.find(' ', end);
  }
  body.reference = text.substr(cue, end == std::string::npos ? end : end - cue);
  return body;
}

TinyBody tiny_tracking(std::size_t sample, Draws& draws) {
  constexpr std::size_t chains = 3;
  TinyBody body;
  std::set<std::string> taken;
  for (std::size_t c = 0; c < chains; ++c) {
    const std::size_t hops = c == 0 ? 2 + sample % 4 : draws.between(2, 5);
    const std::vector<std::string> names =
        distinct(hops + 1, taken, [&] { return letters(draws, 5, 'A'); });
    const std::string value = distinct(1, taken, [&] { return digits(draws, 5); })[0];
    std::vector<std::string> lines;
    for (std::size_t i = 0; i < names.size(); ++i) {
      lines.push_back("VAR " + names[i] + " = " + (i == 0 ? value : names[i - 1]) + ".");
    }
    body.groups.push_back(std::move(lines));
    if (c == 0) {
      body.question = "which variables hold " + value + "? ";
      body.reference = joined(names, " ");
    }
  }
  return body;
}

}  // namespace

Result<Item> make_tiny(Work& work, const TaskInfo& task, const Place& place) {
  return work.largest(1, most_units(work), [&](std::size_t units) {
    Draws draws(work.options.seed, place.seed);
    Work::Haystack haystack = work.haystack(place.sample, draws);
    const TinyBody body = task.name == "tiny_recall" ? tiny_recall(work, place.sample, draws)
                          : task.name == "tiny_copy"
                              ? tiny_copy(work, haystack, place.sample, draws)
                              : tiny_tracking(place.sample, draws);
    Item item;
    item.source = haystack.source;
    std::vector<Insertion> insertions;
    for (std::size_t g = 0; g < body.groups.size(); ++g) {
      std::vector<std::size_t> places;
      for (std::size_t i = 0; i < body.groups[g].size(); ++i) {
        places.push_back(static_cast<std::size_t>(draws.unit() * static_cast<double>(units + 1)));
      }
      std::sort(places.begin(), places.end());
      for (std::size_t i = 0; i < places.size(); ++i) {
        insertions.push_back({places[i], body.groups[g][i]});
      }
      if (g == body.asked) {
        item.depth = static_cast<double>(places[0]) / static_cast<double>(units);
      }
    }
    std::stable_sort(insertions.begin(), insertions.end(),
                     [](const Insertion& a, const Insertion& b) { return a.index < b.index; });
    item.context = assemble(
        units, [&](std::size_t i) { return haystack.sentence(i); }, insertions, " ", true);
    item.question = "\n" + body.question;
    item.references = {body.reference};
    item.max_new_tokens = work.count_tokens(body.reference) + 4;
    item.exact_match = true;
    return item;
  });
}

}  // namespace kvlean::eval::detail
