#include <array>
#include <cmath>
#include <limits>
#include <numeric>

#include "kvlean/allocate/adakv.hpp"
#include "kvlean/allocate/adakv_layers.hpp"
#include "kvlean/allocate/ledger.hpp"
#include "kvlean/allocate/pyramid.hpp"
#include "kvlean/allocate/uniform.hpp"
#include "tests/support/allocation.hpp"
#include "tests/support/catch.hpp"

using kvlean::AdaKVAllocator;
using kvlean::AdaKVLayersAllocator;
using kvlean::LayerLedger;
using kvlean::PyramidAllocator;
using kvlean::PyramidForm;
using kvlean::SafeguardMode;
using kvlean::Status;
using kvlean::StatusCode;
using kvlean::u32;
using kvlean::UniformAllocator;
using kvlean_test::make_layer;
using kvlean_test::Model;

namespace {

using Counts = std::vector<u32>;
constexpr float not_a_number = std::numeric_limits<float>::quiet_NaN();
constexpr float infinity = std::numeric_limits<float>::infinity();

// Figure 1 of the Ada-KV paper.
const std::vector<std::vector<float>> figure_1 = {{.32f, .01f, .18f, .08f, .22f, .19f},
                                                  {.89f, .01f, .05f, .02f, .01f, .02f},
                                                  {.68f, .01f, .08f, .04f, .09f, .10f}};
const std::vector<std::vector<float>> three_shapes = {
    {.40f, .20f, .10f, .05f, .02f, .01f, .005f, .003f, .002f, .001f},
    {.09f, .085f, .08f, .075f, .07f, .065f, .06f, .055f, .045f, .04f},
    {.70f, .015f, .012f, .009f, .008f, .007f, .006f, .004f, .0035f, .0025f}};

struct Shared {
  Counts counts;
  double mass;
};

template <class A>
Shared share(const std::vector<std::vector<float>>& scores, u32 nominal, const A& allocator) {
  Model model({make_layer(scores, nominal)});
  REQUIRE(model.run(allocator) == StatusCode::ok);
  return {model.limits[0], model.retained()};
}

AdaKVAllocator ada(float safeguard, SafeguardMode mode = SafeguardMode::hard_floor) {
  return {.safeguard = safeguard, .mode = mode};
}

}  // namespace

TEST_CASE("Ada-KV reproduces the paper's figure 1") {
  const Shared best = share(figure_1, 2, ada(0.0f));
  CHECK(best.counts == Counts{4, 1, 1});
  CHECK(best.mass == Approx(2.48).margin(1e-6));
  CHECK(share(figure_1, 2, UniformAllocator{}).mass == Approx(2.26).margin(1e-6));
  CHECK(share(figure_1, 2, ada(0.2f, SafeguardMode::authors_mix)).counts == Counts{3, 1, 1});
  CHECK(share(figure_1, 2, ada(0.5f, SafeguardMode::authors_mix)).counts == Counts{3, 2, 2});
}

TEST_CASE("every safeguard mode on three kinds of heads") {
  struct Row {
    u32 nominal;
    Counts f, authors_2, authors_5, literal, hard_2, hard_5;
    std::array<double, 5> mass;  // uniform, f, authors .2, authors .5, hard .5
  };
  const std::vector<Row> rows = {
      {2,
       {3, 2, 1},
       {2, 2, 1},
       {2, 2, 2},
       {2, 2, 2},
       {3, 2, 1},
       {3, 2, 1},
       {1.490, 1.575, 1.475, 1.490, 1.575}},
      {3,
       {3, 5, 1},
       {2, 4, 1},
       {2, 4, 2},
       {3, 3, 3},
       {3, 5, 1},
       {3, 5, 1},
       {1.682, 1.800, 1.630, 1.645, 1.800}},
      {4,
       {3, 8, 1},
       {2, 6, 1},
       {4, 6, 2},
       {4, 5, 3},
       {3, 8, 1},
       {3, 7, 2},
       {1.816, 1.980, 1.765, 1.930, 1.940}},
      {5,
       {4, 10, 1},
       {4, 9, 2},
       {4, 7, 2},
       {5, 6, 4},
       {4, 10, 1},
       {4, 9, 2},
       {1.914, 2.115, 2.090, 1.990, 2.090}},
      {6,
       {5, 10, 3},
       {5, 9, 3},
       {6, 8, 4},
       {6, 7, 5},
       {5, 10, 3},
       {5, 10, 3},
       {1.996, 2.162, 2.122, 2.096, 2.162}},
      {8,
       {7, 10, 7},
       {7, 9, 7},
       {8, 9, 8},
       {8, 8, 8},
       {7, 10, 7},
       {7, 10, 7},
       {2.129, 2.207, 2.167, 2.174, 2.207}},
  };
  for (const Row& row : rows) {
    CAPTURE(row.nominal);
    const Shared uniform = share(three_shapes, row.nominal, UniformAllocator{});
    const Shared f = share(three_shapes, row.nominal, ada(0.0f));
    const Shared authors_2 =
        share(three_shapes, row.nominal, ada(0.2f, SafeguardMode::authors_mix));
    const Shared authors_5 =
        share(three_shapes, row.nominal, ada(0.5f, SafeguardMode::authors_mix));
    const Shared hard_5 = share(three_shapes, row.nominal, ada(0.5f));
    CHECK(f.counts == row.f);
    CHECK(authors_2.counts == row.authors_2);
    CHECK(authors_5.counts == row.authors_5);
    CHECK(share(three_shapes, row.nominal, ada(0.2f, SafeguardMode::paper_literal)).counts ==
          row.literal);
    CHECK(share(three_shapes, row.nominal, ada(0.2f)).counts == row.hard_2);
    CHECK(hard_5.counts == row.hard_5);
    CHECK(uniform.mass == Approx(row.mass[0]).margin(6e-4));
    CHECK(f.mass == Approx(row.mass[1]).margin(6e-4));
    CHECK(authors_2.mass == Approx(row.mass[2]).margin(6e-4));
    CHECK(authors_5.mass == Approx(row.mass[3]).margin(6e-4));
    CHECK(hard_5.mass == Approx(row.mass[4]).margin(6e-4));
    // What the released code aims at and the printed formula are each other's mirror image.
    CHECK(share(three_shapes, row.nominal, ada(0.25f, SafeguardMode::exact_mix)).counts ==
          share(three_shapes, row.nominal, ada(0.75f, SafeguardMode::paper_literal)).counts);
  }
}

TEST_CASE("equal scores are shared from the first head on, NaN last") {
  const std::vector<float> flat(6, 1.0f);
  CHECK(share({flat, flat, flat}, 2, ada(0.0f)).counts == Counts{4, 1, 1});
  CHECK(share({flat, flat, flat}, 2, ada(0.5f)).counts == Counts{4, 1, 1});
  CHECK(share({flat, flat, flat}, 2, ada(1.0f)).counts == Counts{2, 2, 2});
  const std::vector<float> bad(6, not_a_number);
  const std::vector<float> low(6, -infinity);
  CHECK(share({bad, low, flat}, 3, ada(0.0f)).counts == Counts{1, 2, 6});
  CHECK(share({bad, bad, bad}, 2, ada(0.0f)).counts == Counts{4, 1, 1});
  const std::vector<float> high(6, infinity);
  CHECK(share({flat, high, bad}, 3, ada(0.2f)).counts == Counts{2, 6, 1});
  // -0 and +0 are one score.
  CHECK(share({{-0.0f, -0.0f, -0.0f}, {0.0f, 0.0f, 0.0f}}, 2, ada(0.0f)).counts == Counts{3, 1});
}

TEST_CASE("protected tokens do not compete and count in the nominal") {
  // Two sinks and two recent tokens of eight; the middle decides.
  const std::vector<float> big = {0, 0, 9, 8, 7, 6, 0, 0};
  const std::vector<float> small = {99, 99, 1, 2, 3, 4, 99, 99};
  Model model({make_layer({small, big}, 6)}, {2, 2});
  REQUIRE(model.run(ada(0.0f)) == StatusCode::ok);
  CHECK(model.limits[0] == Counts{4, 8});
  Model floored({make_layer({small, big}, 6)}, {2, 2});
  REQUIRE(floored.run(ada(0.9f)) == StatusCode::ok);  // int(6 * 0.9) = 5, four of them protected
  CHECK(floored.limits[0] == Counts{5, 7});
  Model frozen({make_layer({small, big}, 6, 4)}, {2, 2});
  REQUIRE(frozen.run(ada(0.0f)) == StatusCode::ok);
  CHECK(frozen.limits[0] == Counts{6, 6});
  // authors_mix: b = 2 outside the window, f = (0, 4): round(0 + 1), round(2 + 1).
  Model mixed({make_layer({small, big}, 6)}, {2, 2});
  REQUIRE(mixed.run(ada(0.5f, SafeguardMode::authors_mix)) == StatusCode::ok);
  CHECK(mixed.limits[0] == Counts{5, 7});
}

TEST_CASE("per-head weights move slots, a row for all layers or one each") {
  const std::vector<float> row = {4, 3, 2, 1};
  const float weights[] = {1.0f, 10.0f, 10.0f, 1.0f};
  AdaKVAllocator weighted = ada(0.0f);
  weighted.head_weight = weights;
  Model model({make_layer({row, row}, 2), make_layer({row, row}, 2)});
  REQUIRE(model.run(weighted) == StatusCode::ok);
  CHECK(model.limits == std::vector<Counts>{{1, 3}, {1, 3}});
  weighted.head_weight_stride = 2;
  Model two({make_layer({row, row}, 2), make_layer({row, row}, 2)});
  REQUIRE(two.run(weighted) == StatusCode::ok);
  CHECK(two.limits == std::vector<Counts>{{1, 3}, {3, 1}});
  Model second({make_layer({row, row}, 2)});
  second.place = 1;
  REQUIRE(second.run(weighted) == StatusCode::ok);
  CHECK(second.limits == std::vector<Counts>{{3, 1}});
}

TEST_CASE("normalising scales a head by the share its best tokens hold") {
  AdaKVAllocator allocator = ada(0.0f);
  const std::vector<std::vector<float>> close = {{.3f, .2f, .2f, .2f, .1f},
                                                 {.7f, .17f, .1f, .02f, .01f}};
  CHECK(share(close, 2, allocator).counts == Counts{3, 1});
  allocator.normalize = true;  // times .5 and .87: .10 .10 .10 .05 against .148 .087
  CHECK(share(close, 2, allocator).counts == Counts{2, 2});
  CHECK(
      share({{not_a_number, not_a_number, not_a_number}, {infinity, 1, 0}}, 1, allocator).counts ==
      Counts{1, 1});
}

TEST_CASE("uniform shares out what a short segment needs") {
  const std::vector<float> row(1000, 1.0f);
  kvlean_test::Layer ragged{
      {row, {row.begin(), row.begin() + 200}, {row.begin(), row.begin() + 10}, {}},
      {350, 70, 3, 0}};
  Model model({ragged}, {4, 32});
  REQUIRE(model.run(UniformAllocator{}) == StatusCode::ok);
  // 7 slots from 314 and 34 above their floors: 6.3 and 0.7.
  CHECK(model.limits[0] == Counts{344, 69, 10, 0});
  Model same({make_layer({row, row}, 300), make_layer({row, row}, 40)});
  REQUIRE(same.run(UniformAllocator{}) == StatusCode::ok);
  CHECK(same.limits == std::vector<Counts>{{300, 300}, {40, 40}});
}

TEST_CASE("the authors' pyramid overshoots as their code does") {
  struct Row {
    u32 b, n, first, last, sum;
  };
  const Row rows[] = {{96, 31500, 188, 33, 3536},
                      {224, 31500, 437, 34, 7536},
                      {480, 31500, 936, 37, 15568},
                      {992, 31500, 1935, 75, 32160},
                      {992, 1500, 1468, 538, 32096}};
  for (const Row& row : rows) {
    CAPTURE(row.b, row.n);
    const auto slots = [&](PyramidForm form, u32 layer) {
      return kvlean::pyramid_slots(form, row.b + 32, row.n, 32, 20, layer, 32) - 32;
    };
    u32 authors = 0;
    u32 exact = 0;
    for (u32 l = 0; l < 32; ++l) {
      authors += slots(PyramidForm::authors, l);
      exact += slots(PyramidForm::exact, l);
    }
    CHECK(slots(PyramidForm::authors, 0) == row.first);
    CHECK(slots(PyramidForm::authors, 31) == row.last);
    CHECK(authors == row.sum);
    CHECK(exact == 32 * row.b);
  }
}

TEST_CASE("the kvpress pyramid equals kvpress") {
  struct Row {
    double kept;
    u32 tokens;
    Counts slots;
  };
  const Row rows[] = {{4096 * (1 - 0.6), 4096, {3195, 2750, 2305, 1861, 1416, 971, 527, 82}},
                      {4096 * (1 - 0.8), 4096, {1597, 1375, 1153, 930, 708, 486, 263, 41}},
                      {4096 * (1 - 0.2), 4096, {4064, 3839, 3614, 3389, 3164, 2939, 2715, 2490}},
                      {417 * (1 - 0.6), 417, Counts(8, 167)}};
  for (const Row& row : rows) {
    for (u32 l = 0; l < 8; ++l) {
      CHECK(kvlean::kvpress_pyramid_slots(row.kept, row.tokens, 32, 20, l, 8) == row.slots[l]);
    }
  }
  // From whole slots, the form that allocators use: 2 * 1640 - 82 = 3198, down to 82.
  CHECK(kvlean::pyramid_slots(PyramidForm::kvpress, 1640, 4096, 32, 20, 0, 8) == 3198);
  CHECK(kvlean::pyramid_slots(PyramidForm::kvpress, 1640, 4096, 32, 20, 7, 8) == 82);
  const std::vector<float> row(200, 1.0f);
  Model model(std::vector<kvlean_test::Layer>(4, make_layer({row}, 80)), {0, 8});
  model.num_layers = 4;
  REQUIRE(model.run(PyramidAllocator<>{.beta = 4, .form = PyramidForm::kvpress, .window = 8}) ==
          StatusCode::ok);
  CHECK(model.limits == std::vector<Counts>{{140}, {100}, {60}, {20}});
}

TEST_CASE("a pyramid gives one layer its share and all layers the exact total") {
  const std::vector<float> row(500, 1.0f);
  std::vector<kvlean_test::Layer> layers(6, make_layer({row, row}, 100));
  Model all(layers, {4, 32});
  all.num_layers = 6;
  REQUIRE(all.run(PyramidAllocator<>{}) == StatusCode::ok);
  CHECK(all.total() == 1200);
  CHECK(all.limits[0][0] > all.limits[5][0]);
  for (u32 l = 0; l < 6; ++l) {
    Model one({make_layer({row, row}, 100)}, {4, 32});
    one.place = l;
    one.num_layers = 6;
    REQUIRE(one.run(PyramidAllocator<>{}) == StatusCode::ok);
    CHECK(one.limits[0] == all.limits[l]);
    CHECK(one.limits[0][0] == kvlean::pyramid_slots(PyramidForm::exact, 100, 500, 36, 20, l, 6));
  }
  Model single({make_layer({row, row}, 100)}, {4, 32});
  REQUIRE(single.run(PyramidAllocator<>{}) == StatusCode::ok);
  CHECK(single.limits[0] == Counts{100, 100});
}

TEST_CASE("Ada-Pyramid shares each layer's slots among its heads") {
  std::vector<float> spread(500), peaked(500);
  for (std::size_t t = 0; t < 500; ++t) {
    spread[t] = 1.0f / 500 + 1e-6f * static_cast<float>(t);
    peaked[t] = t == 100 ? 1.0f : 1e-5f * static_cast<float>(t) / 500;
  }
  const std::vector<kvlean_test::Layer> layers(4, make_layer({spread, peaked}, 100));
  Model plain(layers, {4, 32});
  Model adaptive(layers, {4, 32});
  plain.num_layers = adaptive.num_layers = 4;
  REQUIRE(plain.run(PyramidAllocator<>{}) == StatusCode::ok);
  PyramidAllocator<AdaKVAllocator> allocator;
  allocator.heads.safeguard = 0.5f;
  REQUIRE(adaptive.run(allocator) == StatusCode::ok);
  for (std::size_t l = 0; l < 4; ++l) {
    CHECK(adaptive.limits[l][0] + adaptive.limits[l][1] == plain.limits[l][0] + plain.limits[l][1]);
    CHECK(adaptive.limits[l][1] == std::max(plain.limits[l][1] / 2, 37u));
  }
}

TEST_CASE("layers compete when asked to") {
  const std::vector<float> low = {1, 1, 1, 1};
  const std::vector<float> high = {2, 2, 2, 2};
  Model model({make_layer({low, low}, 2), make_layer({low, high}, 2)});
  REQUIRE(model.run(AdaKVLayersAllocator{.safeguard = 0.0f}) == StatusCode::ok);
  CHECK(model.limits == std::vector<Counts>{{2, 1}, {1, 4}});
  Model apart({make_layer({low, low}, 2), make_layer({low, high}, 2)});
  REQUIRE(apart.run(AdaKVAllocator{.safeguard = 0.0f}) == StatusCode::ok);
  CHECK(apart.limits == std::vector<Counts>{{3, 1}, {1, 3}});
}

TEST_CASE("a ledger takes layers in any order") {
  const std::vector<float> low = {1, 1, 1, 1};
  const std::vector<float> high = {2, 2, 2, 2};
  Model model({make_layer({low, low}, 2), make_layer({low, high}, 2)});
  kvlean::LedgerShape shape;
  shape.tokens = 4;
  shape.segments = 2;
  shape.num_layers = 2;
  shape.nominal = 2;
  shape.protection = {0, 0};
  shape.safeguard = 0.0f;
  std::vector<std::byte> memory(LayerLedger::bytes_for(shape));
  kvlean::Workspace workspace{std::span<std::byte>(memory)};
  LayerLedger ledger;
  REQUIRE(ledger.start(shape, workspace) == StatusCode::ok);
  REQUIRE(ledger.add_layer(1, model.scores(1), model.cache(1)) == StatusCode::ok);
  CHECK(ledger.limit(0, 0) == 0);
  CHECK(ledger.limit(1, 0) == 2);
  CHECK(ledger.limit(1, 1) == 4);
  CHECK(!ledger.complete());
  REQUIRE(ledger.add_layer(0, model.scores(0), model.cache(0)) == StatusCode::ok);
  CHECK(ledger.complete());
  CHECK(ledger.layers_seen() == 2);
  CHECK(Counts{ledger.limit(0, 0), ledger.limit(0, 1), ledger.limit(1, 0), ledger.limit(1, 1)} ==
        Counts{2, 1, 1, 4});
}

TEST_CASE("allocators refuse what they cannot do and leave the limits alone") {
  const std::vector<float> row(40, 1.0f);
  const auto refused = [&](const auto& allocator, Model& model, StatusCode code) {
    const auto before = model.limits;
    CHECK(model.run(allocator) == code);
    CHECK(model.limits == before);
  };
  Model model({make_layer({row, row}, 20)}, {2, 2});
  for (float bad : {-0.1f, 1.1f, not_a_number, infinity}) {
    refused(ada(bad), model, StatusCode::invalid_option);
    refused(AdaKVLayersAllocator{.safeguard = bad}, model, StatusCode::invalid_option);
  }
  for (float bad : {-1.0f, not_a_number, infinity}) {
    const float weights[] = {1.0f, bad};
    AdaKVAllocator weighted;
    weighted.head_weight = weights;
    refused(weighted, model, StatusCode::invalid_option);
  }
  refused(PyramidAllocator<>{.beta = 0}, model, StatusCode::invalid_option);
  refused(PyramidAllocator<>{.beta = 65537}, model, StatusCode::invalid_option);
  Model tight({make_layer({row, row}, 20), make_layer({row, row}, 3)}, {2, 2});
  refused(UniformAllocator{}, tight, StatusCode::budget_below_protected);
  refused(ada(0.2f), tight, StatusCode::budget_below_protected);
  refused(PyramidAllocator<>{}, tight, StatusCode::budget_below_protected);
  Model tighter({make_layer({row, row}, 4), make_layer({row, row}, 3)}, {2, 2});
  refused(AdaKVLayersAllocator{}, tighter, StatusCode::budget_below_protected);

  kvlean::Workspace none{std::span<std::byte>{}};
  const auto before = model.limits;
  CHECK(model.run(UniformAllocator{}, none) == StatusCode::workspace_too_small);
  CHECK(model.run(ada(0.2f), none) == StatusCode::workspace_too_small);
  CHECK(model.run(AdaKVLayersAllocator{}, none) == StatusCode::workspace_too_small);
  CHECK(model.run(PyramidAllocator<>{}, none) == StatusCode::workspace_too_small);
  for (std::size_t bytes = 0; bytes < 18000; bytes += 64) {  // wherever it runs out
    std::vector<std::byte> memory(bytes);
    kvlean::Workspace some{std::span<std::byte>(memory)};
    Model again({make_layer({row, row}, 20), make_layer({row, row}, 20)}, {2, 2});
    again.num_layers = 2;
    const auto nominal = again.limits;
    if (!again.run(PyramidAllocator<AdaKVAllocator>{}, some)) CHECK(again.limits == nominal);
  }
  CHECK(model.limits == before);

  kvlean::Workspace workspace;
  kvlean::Context context{workspace, model.options, 0, 1};
  auto views = model.views();
  views[0].scores = nullptr;
  CHECK(AdaKVAllocator{}.allocate(views, context) == StatusCode::null_pointer);
  CHECK(UniformAllocator{}.allocate(views, context) == StatusCode::ok);  // reads no scores
  views = model.views();
  views[0].floor = nullptr;
  CHECK(UniformAllocator{}.allocate(views, context) == StatusCode::null_pointer);
  views = model.views();
  kvlean::Scores other = model.scores(0);
  other.segments = 1;
  views[0].scores = &other;
  CHECK(AdaKVAllocator{}.allocate(views, context) == StatusCode::shape_mismatch);
  CHECK(AdaKVLayersAllocator{}.allocate(views, context) == StatusCode::shape_mismatch);
  CHECK(AdaKVAllocator{}.allocate({}, context) == StatusCode::ok);
}

TEST_CASE("a ledger refuses what it cannot do") {
  const std::vector<float> row(40, 1.0f);
  Model model({make_layer({row, row}, 20)}, {2, 2});
  kvlean::LedgerShape shape;
  shape.tokens = 40;
  shape.segments = 2;
  shape.num_layers = 2;
  shape.nominal = 20;
  shape.protection = {2, 2};
  kvlean::Workspace workspace;
  LayerLedger ledger;
  CHECK(ledger.limit(0, 0) == 0);
  CHECK(ledger.add_layer(0, model.scores(0), model.cache(0)) == StatusCode::null_pointer);
  const auto started = [&](auto change) {
    kvlean::LedgerShape changed = shape;
    change(changed);
    return ledger.start(changed, workspace);
  };
  CHECK(started([](auto& s) { s.num_layers = 0; }) == StatusCode::invalid_shape);
  CHECK(started([](auto& s) { s.segments = 0; }) == StatusCode::invalid_shape);
  CHECK(started([](auto& s) { s.safeguard = not_a_number; }) == StatusCode::invalid_option);
  CHECK(started([](auto& s) { s.nominal = 3; }) == StatusCode::budget_below_protected);
  kvlean::Workspace none{std::span<std::byte>{}};
  CHECK(ledger.start(shape, none) == StatusCode::workspace_too_small);
  REQUIRE(ledger.start(shape, workspace) == StatusCode::ok);
  CHECK(ledger.add_layer(2, model.scores(0), model.cache(0)) == StatusCode::invalid_option);
  CHECK(ledger.add_layer(0, model.scores(0), model.cache(0)) == StatusCode::ok);
  CHECK(ledger.add_layer(0, model.scores(0), model.cache(0)) == StatusCode::invalid_option);
  kvlean::CacheView frozen = model.cache(0);
  frozen.frozen = 5;
  CHECK(ledger.add_layer(1, model.scores(0), frozen) == StatusCode::shape_mismatch);
  Model shorter({make_layer({{1, 2}, {3, 4}}, 1)});
  CHECK(ledger.add_layer(1, shorter.scores(0), shorter.cache(0)) == StatusCode::shape_mismatch);
  CHECK(ledger.layers_seen() == 1);
}
