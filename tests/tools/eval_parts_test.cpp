// The parts of the end-to-end evaluation that need no engine: metrics against naive values,
// intervals, texts, the items of every task, records, summary and report.
#include <unistd.h>

#include <cctype>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "bench/chart/chart.hpp"
#include "bench/eval/items.hpp"
#include "bench/eval/metrics.hpp"
#include "bench/eval/progress.hpp"
#include "bench/eval/random.hpp"
#include "bench/eval/records.hpp"
#include "bench/eval/report.hpp"
#include "bench/eval/statistics.hpp"
#include "bench/eval/summary.hpp"
#include "bench/eval/texts.hpp"
#include "bench/eval/words.hpp"
#include "tests/support/catch.hpp"

namespace chart = kvlean::chart;
namespace eval = kvlean::eval;
namespace fs = std::filesystem;

namespace {

/// A folder of the test's own, removed at the end.
class Folder {
 public:
  Folder() {
    std::string pattern = (fs::temp_directory_path() / "kvlean-eval-XXXXXX").string();
    REQUIRE(mkdtemp(pattern.data()) != nullptr);
    path_ = pattern;
  }
  Folder(const Folder&) = delete;
  Folder& operator=(const Folder&) = delete;
  ~Folder() { fs::remove_all(path_); }
  std::string path() const { return path_.string(); }
  std::string file(const std::string& name) const { return (path_ / name).string(); }

 private:
  fs::path path_;
};

std::string read_bytes(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

void write_bytes(const std::string& path, const std::string& bytes) {
  std::ofstream file(path, std::ios::binary);
  file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
}

/// A byte is a token, as in the tiny model.
std::size_t count_bytes(std::string_view text) { return text.size(); }

/// About what a subword tokenizer does: pieces of up to five letters, digits and signs one by one.
std::size_t count_pieces(std::string_view text) {
  std::size_t tokens = 0;
  std::size_t run = 0;
  for (const char c : text) {
    const unsigned char u = static_cast<unsigned char>(c);
    if (std::isalpha(u) != 0) {
      if (run++ % 5 == 0) ++tokens;
    } else {
      run = 0;
      if (c != ' ') ++tokens;
    }
  }
  return tokens;
}

std::size_t occurrences(const std::string& text, const std::string& what) {
  std::size_t count = 0;
  for (std::size_t at = text.find(what); at != std::string::npos; at = text.find(what, at + 1)) {
    ++count;
  }
  return count;
}

std::vector<std::string> words_of(const std::string& text) {
  std::istringstream stream(text);
  return {std::istream_iterator<std::string>(stream), {}};
}

std::vector<float> random_logits(eval::Draws& draws, std::size_t count, float scale) {
  std::vector<float> logits(count);
  for (float& logit : logits) logit = scale * static_cast<float>(2.0 * draws.unit() - 1.0);
  return logits;
}

/// Softmax probabilities, in the plainest way.
std::vector<double> probabilities(const std::vector<float>& logits) {
  std::vector<double> p;
  double sum = 0.0;
  for (const float logit : logits) sum += std::exp(static_cast<double>(logit));
  for (const float logit : logits) p.push_back(std::exp(static_cast<double>(logit)) / sum);
  return p;
}

}  // namespace

TEST_CASE("Draws are the same everywhere and even") {
  eval::Draws draws(1);
  // The published first values of SplitMix64 for the seed 1.
  CHECK(draws.next() == 0x910a2dec89025cc1ull);
  CHECK(draws.next() == 0xbeeb8da1658eec67ull);

  eval::Draws again(7, "name", 3);
  eval::Draws same(7, "name", 3);
  eval::Draws other(7, "name", 4);
  const std::uint64_t first = again.next();
  CHECK(first == same.next());
  CHECK(first != other.next());

  std::vector<std::size_t> counts(6);
  for (int i = 0; i < 60000; ++i) ++counts[draws.below(6)];
  for (const std::size_t count : counts) {
    CHECK(count > 9600);
    CHECK(count < 10400);
  }
  const std::vector<std::size_t> sample = draws.sample(20, 8);
  CHECK(std::set<std::size_t>(sample.begin(), sample.end()).size() == 8);
  CHECK(draws.sample(3, 9).size() == 3);
}

TEST_CASE("KL, NLL and agreement equal naive sums over probabilities") {
  eval::Draws draws(11);
  for (const std::size_t size : {1u, 2u, 7u, 257u, 1000u}) {
    const std::vector<float> full = random_logits(draws, size, 6.0f);
    std::vector<float> other = full;
    for (float& logit : other) logit += 0.7f * static_cast<float>(draws.unit());
    const std::vector<double> p = probabilities(full);
    const std::vector<double> q = probabilities(other);
    double kl = 0.0;
    for (std::size_t i = 0; i < size; ++i) kl += p[i] * std::log(p[i] / q[i]);
    const std::size_t token = draws.below(size);
    const eval::TokenComparison result = eval::compare_logits(full, other, token);
    CHECK(result.kl == Approx(kl).margin(1e-13));
    CHECK(result.nll_full == Approx(-std::log(p[token])));
    CHECK(result.nll == Approx(-std::log(q[token])));
    const auto best = [](const std::vector<double>& values) {
      return std::max_element(values.begin(), values.end()) - values.begin();
    };
    CHECK(result.top1_agrees == (best(p) == best(q)));
    CHECK(result.correct == (static_cast<std::size_t>(best(q)) == token));
  }
}

TEST_CASE("KL of rows that are equal, shifted or far apart") {
  const std::vector<float> row = {1.0f, -2.0f, 500.0f, 3.0f};
  CHECK(eval::kl_divergence(row, row) == 0.0);
  std::vector<float> shifted = row;
  for (float& logit : shifted) logit -= 400.0f;
  CHECK(eval::kl_divergence(row, shifted) == Approx(0.0).margin(1e-9));
  // All mass on one token, of which the other row gives 1 / (1 + e^2).
  const std::vector<float> sure = {1000.0f, 0.0f};
  const std::vector<float> doubtful = {0.0f, 2.0f};
  CHECK(eval::kl_divergence(sure, doubtful) == Approx(std::log1p(std::exp(2.0))));
  // Impossible tokens: no part in the sum if the full cache rules them out, infinite if only the
  // other does.
  const float never = -std::numeric_limits<float>::infinity();
  const std::vector<float> masked = {never, 0.0f, 0.0f};
  const std::vector<float> open = {0.0f, 0.0f, 0.0f};
  CHECK(eval::kl_divergence(masked, open) == Approx(std::log(1.5)));
  CHECK(std::isinf(eval::kl_divergence(open, masked)));
}

TEST_CASE("Overlap of the most likely tokens, ties by index") {
  const std::vector<float> a = {9, 8, 7, 6, 5, 0, 0, 0};
  const std::vector<float> b = {0, 8, 7, 6, 5, 9, 0, 0};
  CHECK(eval::top_overlap(a, a) == 5);
  CHECK(eval::top_overlap(a, b) == 4);
  CHECK(eval::top_overlap(a, b, 1) == 0);
  CHECK(eval::top_overlap(a, b, 8) == 8);
  const std::vector<float> flat(10, 1.0f);
  CHECK(eval::argmax(flat) == 0);
  CHECK(eval::top_overlap(flat, a) == 5);
  CHECK(eval::top_overlap({}, {}) == 0);
}

TEST_CASE("Relative error of vectors") {
  const std::vector<float> full = {3.0f, 4.0f};
  const std::vector<float> other = {3.0f, 4.5f};
  CHECK(eval::relative_error(full, other) == Approx(0.1));
  const std::vector<float> zero = {0.0f, 0.0f};
  CHECK(eval::relative_error(zero, zero) == 0.0);
  CHECK(std::isinf(eval::relative_error(zero, full)));
}

TEST_CASE("Quantiles interpolate") {
  const std::vector<double> values = {4.0, 1.0, 3.0, 2.0};
  const eval::Distribution d = eval::summarise(values);
  CHECK(d.count == 4);
  CHECK(d.mean == 2.5);
  CHECK(d.median == 2.5);
  CHECK(d.p95 == Approx(3.85));
  CHECK(d.p99 == Approx(3.97));
  const std::vector<double> one = {7.0};
  CHECK(eval::summarise(one).p99 == 7.0);
  CHECK(std::isnan(eval::summarise({}).mean));
}

TEST_CASE("Retention counts only documents whose distant context is worth something") {
  CHECK(*eval::context_benefit_retention(3.0, 2.5, 2.0) == Approx(0.5));
  CHECK(*eval::context_benefit_retention(3.0, 3.5, 2.0) == Approx(-0.5));
  CHECK(*eval::context_benefit_retention(2.05, 2.0, 2.0, 0.04999) == Approx(1.0));
  CHECK_FALSE(eval::context_benefit_retention(2.04, 2.0, 2.0));
  CHECK_FALSE(eval::context_benefit_retention(1.5, 2.0, 2.0));
  CHECK_FALSE(eval::context_benefit_retention(std::nan(""), 2.0, 2.0));
}

TEST_CASE("The gate: 80 % generated, or a choice that beats guessing") {
  // Ten tosses of a coin: P(X >= 8) = (45 + 10 + 1) / 1024.
  CHECK(eval::binomial_tail(8, 10, 0.5) == Approx(56.0 / 1024.0));
  CHECK(eval::binomial_tail(0, 10, 0.5) == 1.0);
  CHECK(eval::binomial_tail(11, 10, 0.5) == 0.0);
  CHECK(eval::binomial_tail(10, 10, 1.0) == 1.0);
  double sum = 0.0;  // 100 items of 20 candidates, at least 14 right
  for (int k = 14; k <= 100; ++k) {
    double term = 1.0;
    for (int i = 0; i < k; ++i) term *= (100.0 - i) / (i + 1.0) * 0.05;
    sum += term * std::pow(0.95, 100 - k);
  }
  CHECK(eval::binomial_tail(14, 100, 0.05) == Approx(sum));
  CHECK(eval::passes_generation_gate(0.8));
  CHECK_FALSE(eval::passes_generation_gate(0.799));
  CHECK(eval::passes_choice_gate(14, 100, 0.05));
  CHECK_FALSE(eval::passes_choice_gate(10, 100, 0.05));
  CHECK_FALSE(eval::passes_choice_gate(2, 2, 0.05));  // p = 0.0025: two items prove nothing
}

TEST_CASE("Bootstrap intervals cover the true mean about 95 times in 100") {
  // Documents differ a lot, tokens of one document hardly: an interval over tokens would be far
  // too narrow.
  eval::Draws draws(5);
  const auto normal = [&] {  // a sum of twelve even draws
    double sum = -6.0;
    for (int i = 0; i < 12; ++i) sum += draws.unit();
    return sum;
  };
  eval::BootstrapOptions options;
  options.resamples = 400;
  int covered = 0;
  constexpr int runs = 300;
  for (int run = 0; run < runs; ++run) {
    std::vector<eval::Cluster> documents;
    for (int d = 0; d < 40; ++d) {
      const double level = 1.0 + normal();
      eval::Cluster cluster{0.0, 0.0};
      for (int t = 0; t < 16; ++t) {
        cluster.sum += level + 0.1 * normal();
        cluster.weight += 1.0;
      }
      documents.push_back(cluster);
    }
    options.seed = static_cast<std::uint64_t>(run);
    const eval::Interval interval = eval::bootstrap_mean(documents, options);
    CHECK(interval.low <= interval.mean);
    CHECK(interval.mean <= interval.high);
    if (interval.low <= 1.0 && 1.0 <= interval.high) ++covered;
  }
  CHECK(covered > runs * 90 / 100);
  CHECK(covered < runs * 985 / 1000);
}

TEST_CASE("A paired interval is as narrow as the differences, and reproducible") {
  eval::Draws draws(9);
  std::vector<eval::Cluster> a;
  std::vector<eval::Cluster> b;
  for (int d = 0; d < 50; ++d) {
    const double level = 10.0 * draws.unit();
    const double weight = 1.0 + static_cast<double>(draws.below(5));
    a.push_back({weight * (level + 0.5 + 0.01 * draws.unit()), weight});
    b.push_back({weight * level, weight});
  }
  const eval::Interval difference = eval::bootstrap_difference(a, b);
  CHECK(difference.mean == Approx(0.505).margin(0.005));
  CHECK(difference.high - difference.low < 0.01);
  CHECK(difference.low > 0.5);
  const eval::Interval alone = eval::bootstrap_mean(a);
  CHECK(alone.high - alone.low > 0.5);
  const eval::Interval again = eval::bootstrap_difference(a, b);
  CHECK(again.low == difference.low);
  CHECK(again.high == difference.high);

  CHECK(std::isnan(eval::bootstrap_mean({}).mean));
  const std::vector<eval::Cluster> one = {{3.0, 2.0}};
  CHECK(eval::bootstrap_mean(one).low == 1.5);
  CHECK(std::isnan(eval::bootstrap_difference(a, one).mean));
}

TEST_CASE("The built-in text gives documents of 1500 bytes in both splits") {
  const eval::Texts& texts = eval::builtin_texts();
  REQUIRE(texts.size() == 1);
  for (const char c : texts[0].content) REQUIRE(static_cast<unsigned char>(c) < 0x80);
  std::set<std::size_t> taken;
  for (const eval::Split split : {eval::Split::select, eval::Split::confirm}) {
    eval::DocumentOptions options;
    options.context_tokens = 1500;
    options.answer_tokens = 64;
    options.count = 4;
    options.split = split;
    const std::vector<eval::Document> documents = eval::documents(texts, options, count_bytes);
    CHECK(documents.size() == 4);
    for (const eval::Document& document : documents) {
      const std::string& text = texts[0].content;
      CHECK(document.context.size() <= 1500);
      CHECK(document.context.size() > 1480);
      CHECK(document.answer.size() <= 64);
      CHECK(document.answer.size() > 40);
      CHECK(std::isspace(static_cast<unsigned char>(document.answer[0])) != 0);
      CHECK(text.compare(document.offset, document.context.size() + document.answer.size(),
                         document.context + document.answer) == 0);
      for (std::size_t i = 0; i < document.context.size() + document.answer.size(); ++i) {
        REQUIRE(taken.insert(document.offset + i).second);  // no byte twice, in no split
      }
    }
  }
}

TEST_CASE("Documents are spread over the sources and fill them where they must") {
  eval::Texts texts(3);
  eval::Draws draws(3);
  for (std::size_t t = 0; t < texts.size(); ++t) {
    texts[t].name = std::string("t").append(std::to_string(t));
    const std::size_t paragraphs = t == 0 ? 16 : 400;
    for (std::size_t p = 0; p < paragraphs; ++p) {
      for (int s = 0; s < 5; ++s) {
        texts[t].content +=
            "The " + eval::word_pair(draws) + " saw a " + eval::word_pair(draws) + ".";
        texts[t].content += s < 4 ? " " : "\n\n";
      }
    }
  }
  eval::DocumentOptions options;
  options.context_tokens = 300;
  options.answer_tokens = 40;
  options.count = 30;
  const std::vector<eval::Document> documents = eval::documents(texts, options, count_pieces);
  REQUIRE(documents.size() == 30);
  std::map<std::string, std::size_t> counts;
  std::set<std::string> ids;
  for (const eval::Document& document : documents) {
    ++counts[document.source];
    ids.insert(document.id);
    CHECK(document.context.starts_with("The "));
    CHECK(count_pieces(document.context) <= 300);
    CHECK(count_pieces(document.context) > 290);
  }
  CHECK(ids.size() == 30);
  CHECK(counts["t0"] >= 1);  // short, but not left out
  CHECK(counts["t0"] < counts["t1"]);
  CHECK(counts["t1"] >= 12);
  CHECK(counts["t2"] >= 12);
  const std::vector<eval::Document> again = eval::documents(texts, options, count_pieces);
  CHECK(again.front().context == documents.front().context);
  options.seed = 43;
  CHECK(eval::documents(texts, options, count_pieces).front().id != documents.front().id);
  options.count = 100000;
  const std::size_t all = eval::documents(texts, options, count_pieces).size();
  CHECK(all > 60);
  CHECK(all < 100000);
}

TEST_CASE("Longest beginning of whole words") {
  const std::string text = "one two  three\nfour";
  CHECK(eval::longest_words(text, 3, count_bytes) == 3);
  CHECK(eval::longest_words(text, 7, count_bytes) == 7);
  CHECK(eval::longest_words(text, 8, count_bytes) == 7);
  CHECK(eval::longest_words(text, 13, count_bytes) == 7);
  CHECK(eval::longest_words(text, 14, count_bytes) == 14);
  CHECK(eval::longest_words(text, 100, count_bytes) == text.size());
  CHECK(eval::longest_words(text, 2, count_bytes) == 0);
  CHECK(eval::longest_words("", 5, count_bytes) == 0);
  for (std::size_t limit = 0; limit < 30; ++limit) {
    for (const std::size_t guess : {1u, 5u, 100u}) {
      std::size_t best = 0;  // by trying every end
      for (const std::size_t end : {3u, 7u, 14u, 19u}) best = end <= limit ? end : best;
      CHECK(eval::longest_words(text, limit, count_bytes, guess) == best);
    }
  }
}

TEST_CASE("A folder of texts is read by its manifest, and every fault has its line") {
  const Folder folder;
  const auto manifest = [&](const std::string& json) {
    write_bytes(folder.file("manifest.json"), json);
    const auto texts = eval::load_texts(folder.path());
    return texts ? std::string() : texts.error;
  };
  CHECK_THAT(eval::load_texts(folder.path()).error, ContainsSubstring("get_texts.sh"));
  CHECK_THAT(manifest("{"), ContainsSubstring("no list"));
  CHECK_THAT(manifest(R"({"texts": []})"), ContainsSubstring("no texts"));
  CHECK_THAT(manifest(R"({"texts": [3]})"), ContainsSubstring("without a name"));
  CHECK_THAT(manifest(R"({"texts": [{"name": "a", "file": "../a.txt", "bytes": 3}]})"),
             ContainsSubstring("plain file name"));
  const std::string good = R"({"texts": [{"name": "a", "file": "a.txt", "bytes": 3,
      "licence": "public domain", "package": "p", "version": "1", "sha256": "x"}]})";
  CHECK_THAT(manifest(good), ContainsSubstring("a.txt: cannot read"));
  write_bytes(folder.file("a.txt"), "ab");
  CHECK_THAT(manifest(good), ContainsSubstring("not the size"));
  write_bytes(folder.file("a.txt"), "abc");
  CHECK(manifest(good).empty());
  const auto texts = eval::load_texts(folder.path());
  REQUIRE(texts);
  CHECK(texts->at(0).content == "abc");
  CHECK(texts->at(0).licence == "public domain");
}

TEST_CASE("Every task gives items that fit, are told apart and can be made again") {
  const eval::Texts& texts = eval::builtin_texts();
  for (const bool bytes : {false, true}) {
    const eval::CountTokens count = bytes ? count_bytes : count_pieces;
    eval::TaskOptions options;
    options.samples = 3;
    for (const eval::TaskInfo& task : eval::tasks()) {
      CAPTURE(task.name, bytes);
      // The built-in text is short: room for three documents at different places.
      options.context_tokens = task.name == "text" ? (bytes ? 1000 : 300) : (bytes ? 3000 : 1200);
      const auto made = eval::make_items(task.name, options, texts, count);
      INFO(made.error);
      REQUIRE(made);
      const std::vector<eval::Item>& items = *made;
      const bool grid = task.name == "passkey";
      CHECK(items.size() == (grid ? 3 * options.depths.size() : 3));
      const auto again = eval::make_items(task.name, options, texts, count);
      std::set<std::string> ids;
      for (std::size_t i = 0; i < items.size(); ++i) {
        const eval::Item& item = items[i];
        CAPTURE(item.id);
        ids.insert(item.id);
        CHECK(item.task == task.name);
        CHECK(item.kind == task.kind);
        CHECK(item.length == options.context_tokens);
        CHECK_FALSE(item.document.empty());
        CHECK_FALSE(item.source.empty());
        CHECK(item.context == (*again)[i].context);
        CHECK(item.question == (*again)[i].question);
        CHECK(item.candidates == (*again)[i].candidates);
        std::size_t after = std::max(item.max_new_tokens, count(item.answer));
        for (const std::string& candidate : item.candidates) {
          after = std::max(after, count(candidate));
        }
        const std::size_t prompt = count(item.context) + count(item.question);
        if (task.name == "text") {
          CHECK(prompt <= options.context_tokens);
          CHECK(count(item.answer) <= options.answer_tokens);
        } else {
          CHECK(prompt + after <= options.context_tokens);
        }
        // As long as it gets: what is left would not take another unit (a sentence, a statement).
        CHECK(prompt + after + 650 > options.context_tokens);

        switch (item.kind) {
          case eval::ItemKind::continuation:
            CHECK_FALSE(item.answer.empty());
            break;
          case eval::ItemKind::forced_choice: {
            REQUIRE(item.candidates.size() == options.candidates);
            CHECK(item.candidates[item.answer_index] == item.answer);
            CHECK(std::set<std::string>(item.candidates.begin(), item.candidates.end()).size() ==
                  item.candidates.size());
            CHECK(item.answer.starts_with(" "));
            CHECK(item.context.find(item.answer.substr(1)) != std::string::npos);
            break;
          }
          case eval::ItemKind::generation:
            CHECK_FALSE(item.references.empty());
            CHECK(item.max_new_tokens > 0);
            if (task.name != "tiny_tracking") {
              for (const std::string& reference : item.references) {
                CHECK(item.context.find(reference) != std::string::npos);
              }
            }
            // The right answer scores 1, none scores 0.
            std::string right;
            for (const std::string& reference : item.references) right += reference + ". ";
            CHECK(eval::score_generation(item, " " + right) == 1.0);
            CHECK(eval::score_generation(item, "") == 0.0);
            break;
        }
      }
      CHECK(ids.size() == items.size());

      eval::TaskOptions other = options;
      other.seed = 1;
      const auto reseeded = eval::make_items(task.name, other, texts, count);
      REQUIRE(reseeded);
      CHECK(reseeded->front().id != items.front().id);
      std::size_t changed = 0;  // two seeds may begin at the same place of a short text
      for (std::size_t i = 0; i < std::min(items.size(), reseeded->size()); ++i) {
        if ((*reseeded)[i].context != items[i].context) ++changed;
      }
      if (task.name != "text") CHECK(changed > 0);
      other = options;
      other.split = eval::Split::select;
      const auto selected = eval::make_items(task.name, other, texts, count);
      REQUIRE(selected);
      CHECK(selected->front().context != items.front().context);
      CHECK(ids.count(selected->front().id) == 0);
    }
  }
}

TEST_CASE("The pass key is told once, at the depth asked for") {
  eval::TaskOptions options;
  options.context_tokens = 2000;
  options.samples = 2;
  const auto items = eval::make_items("passkey", options, eval::builtin_texts(), count_pieces);
  REQUIRE(items);
  for (const eval::Item& item : *items) {
    CAPTURE(item.id);
    const std::string key = item.answer.substr(1);
    CHECK(key.size() == 5);
    const std::string statement = "The pass key is " + key + ".";
    CHECK(occurrences(item.context, statement) == 1);
    CHECK(occurrences(item.context, "The pass key") == 1);
    const std::size_t example = item.context.find("\n\n");
    const double place = static_cast<double>(item.context.find(statement) - example) /
                         static_cast<double>(item.context.size() - example);
    CHECK(place == Approx(item.depth).margin(0.08));
    CHECK(item.question.ends_with("The pass key is"));
    for (const std::string& candidate : item.candidates) {
      if (candidate != item.answer) CHECK(item.context.find(candidate) == std::string::npos);
    }
  }
  CHECK(items->front().id == "passkey/2000/d0/s0");
  CHECK(items->back().id == "passkey/2000/d100/s1");
}

TEST_CASE("Needles: every asked key has its values, and no other needle has them") {
  eval::TaskOptions options;
  options.context_tokens = 1500;
  options.samples = 4;
  const std::map<std::string, std::pair<std::size_t, std::size_t>> expected = {
      // needles in the context (0: many), references
      {"needle_single_1", {1, 1}},   {"needle_single_2", {1, 1}},   {"needle_single_3", {1, 1}},
      {"needle_multikey_1", {4, 1}}, {"needle_multikey_2", {0, 1}}, {"needle_multikey_3", {0, 1}},
      {"needle_multivalue", {4, 4}}, {"needle_multiquery", {4, 4}}};
  for (const auto& [task, counts] : expected) {
    const auto items = eval::make_items(task, options, eval::builtin_texts(), count_pieces);
    REQUIRE(items);
    std::set<double> depths;
    for (const eval::Item& item : *items) {
      CAPTURE(item.id);
      const std::size_t needles = occurrences(item.context, "he secret number of ") +
                                  occurrences(item.context, "he secret code of ") +
                                  occurrences(item.context, "One of the secret numbers of ");
      if (counts.first > 0) {
        CHECK(needles == counts.first);
      } else {
        CHECK(needles > 15);
      }
      CHECK(item.references.size() == counts.second);
      for (const std::string& reference : item.references) {
        CHECK(occurrences(item.context, reference) == 1);
        // The sentence that ends with the value names a key that is asked for.
        const std::size_t value = item.context.find(" is " + reference + ".");
        REQUIRE(value != std::string::npos);
        const std::size_t key = item.context.rfind(" of ", value) + 4;
        CHECK(item.question.find(item.context.substr(key, value - key)) != std::string::npos);
      }
      if (counts.second == 1) {
        const double place = static_cast<double>(item.context.find(item.references[0])) /
                             static_cast<double>(item.context.size());
        CHECK(place == Approx(item.depth).margin(0.12));
      }
      depths.insert(item.depth);
    }
    CHECK(depths.size() > 1);
  }
  const auto choice =
      eval::make_items("needle_multikey_2_choice", options, eval::builtin_texts(), count_pieces);
  REQUIRE(choice);
  for (const std::string& candidate : choice->front().candidates) {
    CHECK(occurrences(choice->front().context, candidate) == 1);  // all stand in the text
  }
}

TEST_CASE("Tracked variables hold their value by running the statements") {
  eval::TaskOptions options;
  options.context_tokens = 1500;
  options.samples = 4;
  for (const char* task : {"variable_tracking", "variable_tracking_choice", "tiny_tracking"}) {
    const auto items = eval::make_items(task, options, eval::builtin_texts(), count_pieces);
    REQUIRE(items);
    for (const eval::Item& item : *items) {
      CAPTURE(item.id);
      std::map<std::string, std::string> held;
      std::vector<std::string> order;
      std::istringstream lines(item.context);
      for (std::string line; std::getline(lines, line);) {
        std::vector<std::string> words = words_of(line);
        if (words.size() < 4 || words[0] != "VAR" || words[2] != "=") continue;
        if (words.back().back() == '.') words.back().pop_back();
        const std::string& right = words.back();
        if (std::isdigit(static_cast<unsigned char>(right[0])) != 0) {
          held[words[1]] = right;
        } else {
          REQUIRE(held.contains(right));  // handed on only after it was set
          held[words[1]] = held[right];
        }
        order.push_back(words[1]);
      }
      if (std::string(task) == "variable_tracking_choice") {
        const std::vector<std::string> question = words_of(item.question);
        CHECK(held.at(question[question.size() - 2]) == item.answer.substr(1));
        continue;
      }
      std::vector<std::string> names;
      for (const std::string& name : order) {
        if (item.question.find(held[name]) != std::string::npos) names.push_back(name);
      }
      const std::vector<std::string> references =
          std::string(task) == "tiny_tracking" ? words_of(item.references[0]) : item.references;
      CHECK(names == references);
    }
  }
}

TEST_CASE("Common and frequent words are the most common and frequent") {
  eval::TaskOptions options;
  options.context_tokens = 2500;
  options.samples = 3;
  for (const char* task :
       {"common_words", "common_words_choice", "frequent_words", "frequent_words_choice"}) {
    const auto items = eval::make_items(task, options, eval::builtin_texts(), count_pieces);
    REQUIRE(items);
    for (const eval::Item& item : *items) {
      CAPTURE(item.id);
      std::map<std::string, std::size_t> counts;
      for (const std::string& word : words_of(item.context.substr(item.context.rfind("\n\n")))) {
        if (std::isalpha(static_cast<unsigned char>(word[0])) != 0) ++counts[word];
      }
      std::size_t least = std::numeric_limits<std::size_t>::max();
      std::set<std::string> asked;
      for (const std::string& reference : item.references) asked.insert(reference);
      if (item.kind == eval::ItemKind::forced_choice) asked.insert(item.answer.substr(1));
      for (const std::string& word : asked) least = std::min(least, counts[word]);
      if (item.kind == eval::ItemKind::generation) {
        CHECK(asked.size() == (std::string(task) == "common_words" ? 10 : 3));
        for (const auto& [word, count] : counts) {
          if (asked.count(word) == 0) CHECK(count < least);
        }
      } else {
        for (const std::string& candidate : item.candidates) {
          const std::string word = candidate.substr(1);
          CHECK(counts[word] >= 1);
          if (asked.count(word) == 0) CHECK(counts[word] < least);
        }
      }
    }
  }
}

TEST_CASE("The copy tasks show the passage once and score what follows its beginning") {
  eval::TaskOptions options;
  options.context_tokens = 1500;
  options.samples = 5;
  for (const char* task : {"copy", "copy_random"}) {
    const auto items = eval::make_items(task, options, eval::builtin_texts(), count_pieces);
    REQUIRE(items);
    std::set<int> depths;
    for (const eval::Item& item : *items) {
      CAPTURE(item.id);
      const std::string cue = item.question.substr(1);
      CHECK(count_pieces(cue) <= options.cue_tokens);
      CHECK(count_pieces(cue) > 10);
      CHECK(count_pieces(item.answer) <= options.answer_tokens);
      CHECK(count_pieces(item.answer) > 50);
      CHECK(occurrences(item.context, cue + item.answer) == 1);
      CHECK(occurrences(item.context, cue) == 1);
      const double place =
          static_cast<double>(item.context.find(cue)) / static_cast<double>(item.context.size());
      CHECK(place < item.depth + 0.05);
      CHECK(place > item.depth - 0.35);
      depths.insert(static_cast<int>(100.0 * item.depth));
    }
    CHECK(depths.size() == 5);
  }
}

TEST_CASE("The tiny model's tasks have the formats it was trained on") {
  eval::TaskOptions options;
  options.context_tokens = 2048;
  options.samples = 6;
  const auto recall = eval::make_items("tiny_recall", options, eval::builtin_texts(), count_bytes);
  REQUIRE(recall);
  for (const eval::Item& item : *recall) {
    REQUIRE(item.question.starts_with("\nwhat is the code of "));
    REQUIRE(item.question.ends_with("? "));
    const std::string key = item.question.substr(21, item.question.size() - 23);
    const std::string statement = "the code of " + key + " is " + item.references[0] + ".\n";
    CHECK(occurrences(item.context + "\n", statement) == 1);
    CHECK(item.exact_match);
  }
  const auto copy = eval::make_items("tiny_copy", options, eval::builtin_texts(), count_bytes);
  REQUIRE(copy);
  for (const eval::Item& item : *copy) {
    REQUIRE(item.question.starts_with("\nrepeat: "));
    CHECK(item.question.size() == 9 + 16);
    CHECK(item.context.find("passage: " + item.question.substr(9) + item.references[0]) !=
          std::string::npos);
    CHECK(item.references[0].size() <= options.answer_tokens + 64);
  }
  const auto track = eval::make_items("tiny_tracking", options, eval::builtin_texts(), count_bytes);
  REQUIRE(track);
  CHECK(track->front().question.starts_with("\nwhich variables hold "));
}

TEST_CASE("Tasks that cannot be made say why") {
  eval::TaskOptions options;
  const auto error = [&](const char* task, const eval::Texts& texts) {
    const auto items = eval::make_items(task, options, texts, count_pieces);
    return items ? std::string() : items.error;
  };
  CHECK_THAT(error("nothing", eval::builtin_texts()), ContainsSubstring("unknown task"));
  CHECK_THAT(error("copy", {}), ContainsSubstring("too short"));
  CHECK_THAT(error("text", {}), ContainsSubstring("no text is long enough"));
  options.context_tokens = 100;
  CHECK_THAT(error("variable_tracking", eval::builtin_texts()), ContainsSubstring("does not fit"));
  options.context_tokens = 10;
  CHECK_THAT(error("passkey", eval::builtin_texts()), ContainsSubstring("context_tokens"));
  options = {};
  options.depths = {1.5};
  CHECK_THAT(error("passkey", eval::builtin_texts()), ContainsSubstring("depths"));
  options = {};
  options.candidates = 1;
  CHECK_THAT(error("passkey", eval::builtin_texts()), ContainsSubstring("candidates"));
  CHECK(eval::find_task("text") != nullptr);
  CHECK(eval::find_task("texts") == nullptr);
  CHECK(eval::task_names().size() == eval::tasks().size());
}

TEST_CASE("Outputs are scored by what they contain, choices by rank") {
  const std::vector<std::string> references = {"Otter", "1234567"};
  CHECK(eval::reference_share("the OTTER, and 1234567.", references) == 1.0);
  CHECK(eval::reference_share("an otter", references) == 0.5);
  CHECK(eval::reference_share("", references) == 0.0);
  CHECK(eval::reference_share("anything", {}) == 0.0);
  eval::Item item;
  item.exact_match = true;
  item.references = {"12345"};
  CHECK(eval::score_generation(item, " 12345.\n") == 1.0);
  CHECK(eval::score_generation(item, "12345") == 1.0);
  CHECK(eval::score_generation(item, "123456") == 0.0);
  CHECK(eval::score_generation(item, "is 12345") == 0.0);

  const std::vector<eval::CandidateScore> scores = {{-3.0, 1}, {-2.0, 1}, {-5.0, 4}, {-2.5, 1}};
  CHECK(eval::score_choice(scores, 1).correct == 1.0);
  CHECK(eval::score_choice(scores, 0).rank == 3);
  CHECK(eval::score_choice(scores, 0).reciprocal_rank == Approx(1.0 / 3.0));
  CHECK(eval::score_choice(scores, 2).rank == 4);
  CHECK(eval::score_choice(scores, 2, true).rank == 1);  // -1.25 a token
  CHECK(eval::score_choice(scores, 9).rank == 0);
  const std::vector<eval::CandidateScore> tied = {{-1.0, 1}, {-1.0, 1}};
  CHECK(eval::score_choice(tied, 0).correct == 0.0);
  const std::vector<eval::CandidateScore> broken = {{std::nan(""), 1}, {-1.0, 1}};
  CHECK(eval::score_choice(broken, 0).rank == 2);
}

namespace {

eval::ItemRecord record_of(const std::string& policy, double budget, int document, double kl,
                           double nll) {
  eval::ItemRecord record;
  record.model = "model";
  record.model_sha256 = "abc";
  record.mode = "agnostic";
  record.policy = policy;
  record.budget = budget;
  record.cache_type = "f16";
  record.settings = "seed=42";
  record.item = std::string("text/512/doc").append(std::to_string(document));
  record.document = std::string("doc").append(std::to_string(document));
  record.task = "text";
  record.source = document % 2 == 0 ? "a" : "b";
  record.kind = "continuation";
  record.length = 512;
  record.compression_ratio = 1.0 / budget;
  record.kept_fraction = budget;
  record.bytes = static_cast<std::uint64_t>(1000.0 * budget);
  for (int t = 0; t < 4; ++t) {
    record.add({kl, 2.0, nll, t != 0, 4, true, t > 1});
  }
  return record;
}

}  // namespace

TEST_CASE("Records go to the file and back") {
  eval::ItemRecord record = record_of("h2o", 0.25, 1, 0.012345678, 2.5);
  record.attention_error_open = eval::AttentionError{0.1, 0.05, 0.3};
  record.score = 0.5;
  record.output = "not UTF-8: \xff\n";
  const std::string line = eval::to_json_line(record);
  CHECK(line.find('\n') == std::string::npos);
  const auto back = eval::from_json_line(line);
  REQUIRE(back);
  CHECK(eval::key_of(*back) == eval::key_of(record));
  CHECK(back->kl.size() == 4);
  CHECK(back->kl[0] == Approx(0.0123457).epsilon(1e-5));
  CHECK(*back->nll == 10.0);
  CHECK(*back->top1_agree == 3);
  CHECK(*back->top5_common == 16);
  CHECK(*back->top1_correct == 2);
  CHECK(back->attention_error_open->p95 == 0.3);
  CHECK_FALSE(back->attention_error_closed);
  CHECK(*back->score == 0.5);
  CHECK_FALSE(back->score_full);
  CHECK(back->bytes == 250);

  record.kl[1] = std::numeric_limits<double>::infinity();
  CHECK(std::isinf(eval::from_json_line(eval::to_json_line(record))->kl[1]));
  CHECK_FALSE(eval::from_json_line("[]"));
  CHECK_FALSE(eval::from_json_line("{}"));
  CHECK_THAT(eval::from_json_line(R"({"item": "a", "policy": "b", "tokens": -1})").error,
             ContainsSubstring("tokens"));
  for (const auto change : {+[](eval::ItemRecord& r) { r.budget = 0.5; },
                            +[](eval::ItemRecord& r) { r.policy = "snapkv"; },
                            +[](eval::ItemRecord& r) { r.mode = "aware"; },
                            +[](eval::ItemRecord& r) { r.cache_type = "f32"; },
                            +[](eval::ItemRecord& r) { r.settings = "seed=1"; },
                            +[](eval::ItemRecord& r) { r.item = "other"; },
                            +[](eval::ItemRecord& r) { r.model_sha256 = "def"; }}) {
    eval::ItemRecord other = record;
    change(other);
    CHECK(eval::key_of(other) != eval::key_of(record));
  }
}

TEST_CASE("A run goes on where it was, without a torn last line") {
  const Folder folder;
  const std::string path = folder.file("run.jsonl");
  const eval::ItemRecord first = record_of("h2o", 0.25, 1, 0.1, 2.5);
  const eval::ItemRecord second = record_of("h2o", 0.25, 2, 0.1, 2.5);
  {
    auto file = eval::RecordFile::open(path, true);
    REQUIRE(file);
    CHECK(file->append(first));
    CHECK(file->has(first));
    CHECK_FALSE(file->has(second));
    CHECK(read_bytes(path) == eval::to_json_line(first) + "\n");  // flushed
  }
  for (const std::string& torn : {eval::to_json_line(second), std::string("{\"item\": \"te"),
                                  std::string("{\"item\": \"te\n")}) {
    write_bytes(path, eval::to_json_line(first) + "\n" + torn);
    CHECK(eval::read_records(path)->size() == 1);
    auto file = eval::RecordFile::open(path, true);
    REQUIRE(file);
    CHECK(file->records().size() == 1);
    CHECK(file->has(first));
    CHECK_FALSE(file->has(second));
    CHECK(file->append(second));
    CHECK(read_bytes(path) == eval::to_json_line(first) + "\n" + eval::to_json_line(second) + "\n");
  }
  write_bytes(path, "nonsense\n" + eval::to_json_line(first) + "\n");
  CHECK_THAT(eval::RecordFile::open(path, true).error, ContainsSubstring(":1: no JSON object"));
  CHECK_FALSE(eval::read_records(path));
  auto fresh = eval::RecordFile::open(path, false);
  REQUIRE(fresh);
  CHECK(fresh->records().empty());
  CHECK(read_bytes(path).empty());
  CHECK(eval::read_records(folder.file("none"))->empty());
  CHECK_FALSE(eval::RecordFile::open(folder.file("no/such/folder"), false));
}

TEST_CASE("The summary: means, retention, paired differences") {
  std::vector<eval::ItemRecord> records;
  for (int d = 0; d < 10; ++d) {
    const double hard = 0.1 * d;
    records.push_back(record_of("full", 1.0, d, 0.0, 2.0));
    records.push_back(record_of("streaming_llm", 0.25, d, 0.2 + hard, 2.01 + hard));
    records.push_back(record_of("h2o", 0.25, d, 0.1 + hard, 2.0 + 0.25 * hard));
  }
  records.push_back(records.back());  // the same piece of work twice counts once
  const std::vector<eval::SummaryRecord> summary = eval::summarise_records(records);
  REQUIRE(summary.size() == 3);
  const eval::SummaryRecord& full = summary[0];
  const eval::SummaryRecord& window = summary[1];
  const eval::SummaryRecord& h2o = summary[2];
  CHECK(full.policy == "full");
  CHECK(full.kl_interval->mean == 0.0);
  CHECK(h2o.items == 10);
  CHECK(h2o.documents == 10);
  CHECK(h2o.sources == 2);
  CHECK(h2o.tokens == 40);
  CHECK(h2o.kl_interval->mean == Approx(0.55));
  CHECK(h2o.kl.median == Approx(0.55));
  CHECK(h2o.kl_interval->low < 0.5);
  CHECK(h2o.top1->mean == 0.75);
  CHECK(h2o.top5->mean == Approx(0.8));
  CHECK(h2o.copy_accuracy->mean == 0.5);
  CHECK(*h2o.copy_accuracy_full == 1.0);
  CHECK(h2o.delta_nll->mean == Approx(0.25 * 0.45));
  CHECK(*h2o.nll_full == Approx(2.0));
  CHECK(h2o.compression_ratio == Approx(4.0));
  CHECK_FALSE(h2o.gate);
  // The first document's window loses 0.01 nats only, so it does not qualify.
  CHECK(h2o.retention_documents == 9);
  CHECK(window.retention->mean == Approx(0.0).margin(1e-12));
  double gained = 0.0;
  double possible = 0.0;
  for (int d = 1; d < 10; ++d) {
    gained += 0.01 + 0.075 * d;
    possible += 0.01 + 0.1 * d;
  }
  CHECK(h2o.retention->mean == Approx(gained / possible));
  REQUIRE(h2o.versus.contains("streaming_llm"));
  const eval::Difference& difference = h2o.versus.at("streaming_llm");
  CHECK(difference.documents == 10);
  CHECK(difference.kl->mean == Approx(-0.1));
  CHECK(difference.kl->high == Approx(-0.1));  // the same for every document
  CHECK_FALSE(difference.score);
  CHECK_FALSE(h2o.versus.contains("h2o"));
  CHECK(eval::ranks_before(h2o, window));

  const nlohmann::ordered_json json =
      nlohmann::ordered_json::parse(eval::to_json(eval::RunMeta{}, summary));
  REQUIRE(json["records"].size() == 3);
  for (const auto& record : json["records"]) {
    for (const auto& [name, value] : record.items()) CHECK(value.is_primitive());
  }
  CHECK(json["records"][2]["kl_vs_streaming_llm"].get<double>() == Approx(-0.1));
  CHECK(json["records"][2]["score"].is_null());
  CHECK_THAT(eval::to_tables(summary), ContainsSubstring("streaming_llm"));
}

TEST_CASE("The summary lets only tasks through that the full cache passes") {
  std::vector<eval::ItemRecord> records;
  const auto add = [&](const std::string& task, const std::string& kind, int item, double full,
                       double score) {
    eval::ItemRecord record = record_of("h2o", 0.25, item, 0.0, 2.0);
    record.task = task;
    record.item = task + std::to_string(item);
    record.kind = kind;
    record.chance = kind == "forced_choice" ? 0.05 : 0.0;
    record.score = score;
    record.score_full = full;
    records.push_back(record);
  };
  for (int i = 0; i < 20; ++i) {
    add("good", "generation", i, i < 16 ? 1.0 : 0.0, i < 8 ? 1.0 : 0.0);
    add("bad", "generation", i, i < 15 ? 1.0 : 0.0, 0.0);
    add("choice", "forced_choice", i, i < 6 ? 1.0 : 0.0, i < 3 ? 1.0 : 0.0);
    add("guess", "forced_choice", i, i < 3 ? 1.0 : 0.0, 0.0);
  }
  std::map<std::string, eval::SummaryRecord> by_task;
  for (const eval::SummaryRecord& record : eval::summarise_records(records)) {
    by_task[record.task] = record;
  }
  CHECK(*by_task["good"].gate);
  CHECK(by_task["good"].score->mean == Approx(0.4));
  CHECK(*by_task["good"].score_relative == Approx(0.5));
  CHECK_FALSE(*by_task["bad"].gate);
  CHECK(*by_task["choice"].gate);
  CHECK(*by_task["choice"].gate_p == Approx(eval::binomial_tail(6, 20, 0.05)));
  CHECK_FALSE(*by_task["guess"].gate);

  const std::string html =
      eval::to_html(eval::RunMeta{}, eval::summarise_records(records), records);
  CHECK_THAT(html, ContainsSubstring("<th>good<br>512</th>"));
  CHECK(html.find("<th>bad<br>") == std::string::npos);
  CHECK_THAT(html, ContainsSubstring("bad at 512 (75 %)"));
}

TEST_CASE("The report draws curves and heat maps, and is one page without scripts") {
  std::vector<eval::ItemRecord> records;
  for (const double budget : {0.5, 0.25, 0.125}) {
    for (int d = 0; d < 6; ++d) {
      const double loss = 0.05 / budget * (1.0 + 0.1 * d);
      records.push_back(record_of("streaming_llm", budget, d, 2.0 * loss, 2.0 + loss));
      records.push_back(record_of("<b>&h2o", budget, d, loss, 2.0 + 0.5 * loss));
      for (const double depth : {0.0, 0.5, 1.0}) {
        eval::ItemRecord record = record_of("<b>&h2o", budget, d, 0.0, 2.0);
        record.task = "passkey";
        record.kind = "forced_choice";
        record.depth = depth;
        record.item = "passkey/" + std::to_string(d) + "/" + std::to_string(depth);
        record.chance = 0.05;
        record.score = depth >= 0.5 ? 1.0 : 0.0;
        record.score_full = 1.0;
        records.push_back(record);
      }
    }
  }
  for (int d = 0; d < 6; ++d) {
    records.push_back(record_of("noise_floor", 1.0, d, 1e-5, 2.0));
    records.push_back(record_of("cache_q4_0", 1.0, d, 0.004, 2.0));
  }
  const std::vector<eval::SummaryRecord> summary = eval::summarise_records(records);
  eval::RunMeta meta;
  meta.command = "kvlean-eval --quick & more";
  const std::string html = eval::to_html(meta, summary, records);
  CHECK(html.find("<script") == std::string::npos);
  CHECK(html.find("<b>&h2o") == std::string::npos);
  CHECK_THAT(html, ContainsSubstring("&lt;b&gt;&amp;h2o"));
  CHECK_THAT(html, ContainsSubstring("kvlean-eval --quick &amp; more"));
  CHECK_THAT(html, ContainsSubstring("noise floor"));
  CHECK_THAT(html, ContainsSubstring("q4_0 cache"));
  CHECK_THAT(html, ContainsSubstring("prefers-color-scheme:dark"));
  CHECK(html.find("nan") == std::string::npos);
  CHECK(occurrences(html, "<svg") == occurrences(html, "</svg>"));
  CHECK(occurrences(html, "<table") == occurrences(html, "</table>"));
  const auto plots = eval::to_plots(summary, records);
  CHECK(plots.size() == 5);  // KL, retention, and a heat map a budget
  std::set<std::string> names;
  for (const auto& [name, svg] : plots) {
    names.insert(name);
    CHECK(svg.starts_with("<svg"));
    CHECK(svg.find("nan") == std::string::npos);
    CHECK(svg.find("inf") == std::string::npos);
  }
  CHECK(names.contains("kl-text-512-agnostic.svg"));
  CHECK_FALSE(eval::to_html(eval::RunMeta{}, {}, {}).empty());

  const Folder folder;
  CHECK(eval::write_file(folder.file("report.html"), html));
  CHECK(read_bytes(folder.file("report.html")) == html);
  CHECK_THAT(eval::write_file(folder.file("no/report.html"), html).error,
             ContainsSubstring("cannot write"));
}

TEST_CASE("Charts leave out what has no place on a logarithmic axis") {
  chart::Chart plot;
  plot.log_x = plot.log_y = true;
  plot.lines = {{"zero", {}, {{2.0, 0.0, {}, {}, {}}}}};
  CHECK(chart::to_svg(plot, false).empty());
  plot.lines.push_back(
      {"one", chart::Look::nth(1), {{2.0, 0.5, -0.1, 0.9, {}}, {4.0, 1.0, {}, {}, {}}}});
  plot.levels = {{"floor", 0.0, {}}, {"level", 0.1, 3.0}};
  const std::string svg = chart::to_svg(plot, false);
  CHECK(svg.find(">zero<") == std::string::npos);
  CHECK(svg.find(">floor<") == std::string::npos);
  CHECK_THAT(svg, ContainsSubstring(">level<"));
  CHECK(svg.find("nan") == std::string::npos);
}

TEST_CASE("Progress prints plain lines where there is no terminal") {
  CHECK(eval::clock_text(125.4) == "2:05");
  CHECK(eval::clock_text(3753.0) == "1:02:33");
  CHECK(eval::clock_text(-1.0) == "?");
  const Folder folder;
  std::FILE* file = std::fopen(folder.file("log").c_str(), "wb");
  REQUIRE(file != nullptr);
  {
    eval::Progress progress("items", 3, eval::Progress::Style::automatic, file);
    progress.skip();
    progress.note("needle");
    progress.advance();
    progress.say("one line");
    progress.advance();
    CHECK(progress.done() == 3);
    progress.finish();
    progress.finish();
  }
  std::fclose(file);
  CHECK(read_bytes(folder.file("log")) == "one line\nitems: 3/3, 0:00\n");
  file = std::fopen(folder.file("bar").c_str(), "wb");
  REQUIRE(file != nullptr);
  {
    eval::Progress progress("items", 2, eval::Progress::Style::bar, file);
    progress.advance(2);
  }
  std::fclose(file);
  CHECK_THAT(read_bytes(folder.file("bar")),
             ContainsSubstring("items [########################] 2/2"));
}
