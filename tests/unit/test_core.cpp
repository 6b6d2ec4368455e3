// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <set>
#include <string>
#include <vector>

#include "kvlean/core/order.hpp"
#include "kvlean/kvlean.hpp"
#include "tests/support/catch.hpp"
#include "tests/support/layouts.hpp"

using namespace kvlean;

namespace {

// What a 16-bit float means, from its definition: exponent and mantissa bits, in double.
double decode(u32 bits, int exponent_bits, int mantissa_bits) {
  const u32 mantissa = bits & ((1u << mantissa_bits) - 1);
  const u32 exponent = (bits >> mantissa_bits) & ((1u << exponent_bits) - 1);
  const double sign = (bits >> 15) != 0 ? -1.0 : 1.0;
  const int bias = (1 << (exponent_bits - 1)) - 1;
  if (exponent == (1u << exponent_bits) - 1) {
    if (mantissa != 0) return std::numeric_limits<double>::quiet_NaN();
    return sign * std::numeric_limits<double>::infinity();
  }
  const double fraction = static_cast<double>(mantissa) / static_cast<double>(1 << mantissa_bits);
  if (exponent == 0) return sign * std::ldexp(fraction, 1 - bias);
  return sign * std::ldexp(1.0 + fraction, static_cast<int>(exponent) - bias);
}

// Every pair of neighbouring finite values below infinity: the middle goes to the even one, a float
// to either side of it to the nearer one.
template <class Encode>
u32 count_wrong_halfways(int exponent_bits, int mantissa_bits, Encode encode) {
  u32 wrong = 0;
  const u32 infinity = ((1u << exponent_bits) - 1) << mantissa_bits;
  for (u32 low = 0; low < infinity; ++low) {
    const u32 high = low + 1;
    const double a = decode(low, exponent_bits, mantissa_bits);
    // The value that infinity stands for in rounding: one step past the largest.
    const double b = high == infinity ? 2 * a - decode(low - 1, exponent_bits, mantissa_bits)
                                      : decode(high, exponent_bits, mantissa_bits);
    const double middle = (a + b) / 2;
    const float exact = static_cast<float>(middle);
    if (static_cast<double>(exact) != middle) return ~0u;  // the test would prove nothing
    const u32 even = (low & 1) == 0 ? low : high;
    const float huge = std::numeric_limits<float>::infinity();
    for (const float sign : {1.0f, -1.0f}) {
      const u32 bit = sign < 0 ? 0x8000u : 0u;
      wrong += encode(sign * exact) != (even | bit);
      wrong += encode(sign * std::nextafter(exact, 0.0f)) != (low | bit);
      wrong += encode(sign * std::nextafter(exact, huge)) != (high | bit);
      wrong += encode(sign * static_cast<float>(a)) != (low | bit);
    }
  }
  return wrong;
}

}  // namespace

TEST_CASE("all 65536 values of f16 and bf16 decode, and encode to themselves", "[core][dtype]") {
  u32 wrong = 0;
  for (u32 bits = 0; bits < 65536; ++bits) {
    const u16 half = static_cast<u16>(bits);
    const float as_f16 = detail::f16_bits_to_f32(half);
    const float as_bf16 = detail::bf16_bits_to_f32(half);
    const double f16_value = decode(bits, 5, 10);
    const double bf16_value = decode(bits, 8, 7);
    if (std::isnan(f16_value)) {
      wrong += !std::isnan(as_f16);
      const u16 back = detail::f32_to_f16_bits(as_f16);
      wrong += back != (half | 0x200u);  // quiet, the payload kept
    } else {
      wrong += static_cast<double>(as_f16) != f16_value;
      wrong += std::signbit(as_f16) != ((bits >> 15) != 0);
      wrong += detail::f32_to_f16_bits(as_f16) != half;
    }
    if (std::isnan(bf16_value)) {
      wrong += !std::isnan(as_bf16);
      wrong += detail::f32_to_bf16_bits(as_bf16) != (half | 0x40u);
    } else {
      wrong += static_cast<double>(as_bf16) != bf16_value;
      wrong += detail::f32_to_bf16_bits(as_bf16) != half;
    }
  }
  CHECK(wrong == 0);
}

TEST_CASE("rounding is to nearest even at every halfway point", "[core][dtype]") {
  CHECK(count_wrong_halfways(5, 10, [](float x) { return u32{detail::f32_to_f16_bits(x)}; }) == 0);
  CHECK(count_wrong_halfways(8, 7, [](float x) { return u32{detail::f32_to_bf16_bits(x)}; }) == 0);
}

TEST_CASE("ends of the ranges", "[core][dtype]") {
  const float infinity = std::numeric_limits<float>::infinity();
  CHECK(f16(infinity).bits == 0x7c00);
  CHECK(f16(-infinity).bits == 0xfc00);
  CHECK(f16(65504.0f).bits == 0x7bff);
  CHECK(f16(65519.996f).bits == 0x7bff);
  CHECK(f16(65520.0f).bits == 0x7c00);
  CHECK(f16(1e30f).bits == 0x7c00);
  CHECK(f16(-0.0f).bits == 0x8000);
  CHECK(f16(0x1p-24f).bits == 1);
  CHECK(f16(0x1p-25f).bits == 0);
  CHECK(f16(0x1.000002p-25f).bits == 1);
  CHECK(f16(std::numeric_limits<float>::denorm_min()).bits == 0);
  CHECK(bf16(std::numeric_limits<float>::max()).bits == 0x7f80);
  CHECK(bf16(-infinity).bits == 0xff80);
  // A NaN whose payload lies in the dropped bits stays a NaN.
  CHECK((f16(std::bit_cast<float>(0x7f800001u)).bits & 0x7fff) > 0x7c00);
  CHECK((bf16(std::bit_cast<float>(0x7f800001u)).bits & 0x7fff) > 0x7f80);
  CHECK(std::string(name(DType::bf16)) == "bf16");
  CHECK((size_bytes(DType::f32) == 4 && size_bytes(DType::f16) == 2));
  std::array<std::byte, 5> odd{};
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    store_element(odd.data() + 1, dtype, -1.5f);
    CHECK(load_element(odd.data() + 1, dtype) == -1.5f);
  }
}

TEST_CASE("addresses are computed in 64 bits", "[core][rows]") {
  // No memory is touched: only the distance from the base is looked at.
  std::vector<std::byte> anchor(1);
  Rows rows;
  rows.data = anchor.data();
  rows.dtype = DType::bf16;
  rows.width = 128;
  rows.heads = 8;
  rows.tokens = 0xffffffffu;
  rows.head_stride = i64{1} << 40;
  rows.token_stride = 128;
  const auto offset = [&](u32 head, u32 token) {
    return static_cast<i64>(reinterpret_cast<std::uintptr_t>(row_address(rows, head, token)) -
                            reinterpret_cast<std::uintptr_t>(anchor.data()));
  };
  CHECK(offset(7, 0xfffffffeu) == 2 * (7 * (i64{1} << 40) + i64{0xfffffffe} * 128));
  rows.token_stride = -128;
  CHECK(offset(1, 0x80000000u) == 2 * ((i64{1} << 40) - (i64{128} << 31)));
  const u64 first[] = {0, u64{1} << 33};
  rows.first = first;
  rows.token_stride = 128;
  rows.head_stride = 0;
  CHECK(offset(1, 3) == 2 * 128 * ((i64{1} << 33) + 3));
  const i32 table[] = {0, 0x7fffffff};
  rows.page_table = table;
  rows.page_tokens = 16;
  rows.page_stride = 16 * 128;
  CHECK(offset(0, 17) == 2 * (i64{0x7fffffff} * 16 * 128 + 128));
}

TEST_CASE("every layout reads what was written", "[core][rows]") {
  using kvlean_test::Layout;
  kvlean_test::Random random(1);
  for (u32 layout = 0; layout < static_cast<u32>(Layout::count); ++layout) {
    for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
      CAPTURE(layout);
      auto memory =
          kvlean_test::make_tensor(static_cast<Layout>(layout), dtype, 3, 10, 6, 4, random);
      REQUIRE(check_rows(memory.rows, 10));
      float row[6];
      for (u32 h = 0; h < 3; ++h) {
        for (u32 t = 0; t < 10; ++t) {
          for (u32 d = 0; d < 6; ++d) row[d] = static_cast<float>(h * 64 + t * 6 + d);
          store_row(memory.rows, h, t, row);
        }
      }
      u32 wrong = 0;
      for (u32 h = 0; h < 3; ++h) {
        for (u32 t = 0; t < 10; ++t) {
          load_row(memory.rows, h, t, row);
          for (u32 d = 0; d < 6; ++d) wrong += row[d] != static_cast<float>(h * 64 + t * 6 + d);
        }
      }
      CHECK(wrong == 0);
    }
  }
}

TEST_CASE("the factories describe what they are given", "[core][tensor]") {
  std::vector<float> data(4 * 2 * 3 * 2);
  for (std::size_t i = 0; i < data.size(); ++i) data[i] = static_cast<float>(i);
  float row[3];
  load_row(strided(data.data(), Extents{2, 4, 3}).rows(), 1, 2, row);
  CHECK(row[0] == 18.0f);
  load_row(strided(data.data(), Extents{2, 4, 3}, {12, 1, 4}).rows(), 1, 2, row);
  CHECK((row[0] == 14.0f && row[2] == 22.0f));

  const std::vector<i32> table{1, 0};
  const auto pages = paged(data.data(), {2, 4, 3}, {6, 3, 1}, 12, 2, table);
  CHECK(pages.rows().page_table_length == 2);
  load_row(pages.rows(), 1, 1, row);
  CHECK(row[0] == 12.0f + 6.0f + 3.0f);
  const std::vector<i32> per_head{1, 0, 3, 2};
  const auto own = paged(data.data(), {2, 4, 3}, {6, 3, 1}, 12, 2, per_head, 2);
  CHECK(own.rows().page_table_length == 2);
  load_row(own.rows(), 1, 2, row);
  CHECK(row[0] == 2 * 12.0f + 6.0f);

  const std::vector<u32> order{3, 1};
  const auto cells = indexed(data.data(), {2, 4, 3}, {}, order);
  CHECK(cells.rows().tokens == 2);
  load_row(cells.rows(), 1, 0, row);
  CHECK(row[0] == 12.0f + 9.0f);

  const float* constant = data.data();
  CHECK_FALSE(strided(constant, Extents{2, 4, 3}).rows().writable);
  const kvlean_test::TileTensor tiles(2, 5, 3);
  const KVCache cache(tiles, tiles);
  REQUIRE(check_cache(cache.view()));
  CHECK(cache.view().keys.accessor == &cache.keys());
  CHECK(cache.capacity() == 5);
}

TEST_CASE("rows are copied between layouts and types", "[core][rows]") {
  std::vector<float> source{1, 2, 3, 4, 5, 6};
  std::vector<f16> target(6);
  const Rows from = strided(source.data(), Extents{1, 2, 3}).rows();
  const Rows to = strided(target.data(), Extents{1, 2, 3}, {6, 1, 2}).rows();
  copy_row(from, 0, 1, to, 0, 0);
  CHECK((static_cast<float>(target[0]) == 4.0f && static_cast<float>(target[4]) == 6.0f));
  const Rows columns = strided(source.data(), Extents{1, 2, 3}, {6, 1, 2}).rows();
  copy_row(columns, 0, 1, columns, 0, 0);
  CHECK((source == std::vector<float>{2, 2, 4, 4, 6, 6}));
}

TEST_CASE("check_cache names what is wrong", "[core][cache]") {
  std::vector<float> data(2 * 8 * 4);
  KVCache cache(strided(data.data(), Extents{2, 8, 4}), strided(data.data(), Extents{2, 8, 4}));
  cache.set_length(6);
  CacheView view = cache.view();
  REQUIRE(check_cache(view) == Status());
  u32 lengths[] = {6, 3};
  const i32 table[] = {0, 1, 2, -1};
  SECTION("no segments") {
    view.segments = 0;
    CHECK(check_cache(view) == StatusCode::invalid_shape);
  }
  SECTION("heads differ") {
    view.values.heads = 3;
    CHECK(check_cache(view) == StatusCode::shape_mismatch);
  }
  SECTION("tokens differ") {
    view.values.tokens = 7;
    CHECK(check_cache(view) == StatusCode::shape_mismatch);
  }
  SECTION("length past the capacity") {
    view.uniform_length = 9;
    CHECK(check_cache(view) == StatusCode::invalid_length);
    lengths[1] = 9;
    view.lengths = lengths;
    CHECK(check_cache(view) == StatusCode::invalid_length);
  }
  SECTION("length past the rows") {
    view.capacity = 20;
    view.uniform_length = 9;
    CHECK(check_cache(view) == StatusCode::invalid_length);
  }
  SECTION("no width") {
    view.values.width = 0;
    CHECK(check_cache(view) == StatusCode::invalid_shape);
  }
  SECTION("too wide") {
    view.keys.width = max_row_width + 1;
    CHECK(check_cache(view) == StatusCode::row_too_wide);
  }
  SECTION("null data") {
    view.values.data = nullptr;
    CHECK(check_cache(view) == StatusCode::null_pointer);
  }
  SECTION("frozen past a segment") {
    view.lengths = lengths;
    view.frozen = 4;
    CHECK(check_cache(view) == StatusCode::invalid_frozen);
    view.frozen = 3;
    CHECK(check_cache(view) == Status());
  }
  SECTION("page size") {
    view.keys.page_table = table;
    CHECK(check_cache(view) == StatusCode::invalid_shape);
  }
  SECTION("short table") {
    view.keys.page_table = table;
    view.keys.page_tokens = 2;
    view.keys.page_table_length = 2;
    CHECK(check_cache(view) == StatusCode::invalid_page_table);
    view.keys.page_table_length = 3;
    CHECK(check_cache(view) == Status());
  }
  SECTION("bad page") {
    view.keys.page_table = table + 1;
    view.keys.page_tokens = 2;
    view.keys.page_table_length = 3;
    CHECK(check_cache(view) == StatusCode::invalid_page_table);
  }
}

TEST_CASE("validate finds bad data", "[core][cache]") {
  std::vector<f16> data(2 * 4 * 2);
  std::vector<i32> positions{0, 1, 2, 3, 0, 5, 6, 7};
  std::vector<float> mass(8);
  KVCache cache(strided(data.data(), Extents{2, 4, 2}), strided(data.data(), Extents{2, 4, 2}));
  cache.set_length(3)
      .set_positions(Ragged<i32>(positions.data(), 4), 7)
      .set_log_mass(Ragged<float>(mass.data(), 4));
  REQUIRE(validate(cache) == Status());
  REQUIRE(validate(cache.view()) == Status());
  SECTION("NaN") { data[9] = f16(std::numeric_limits<float>::quiet_NaN()); }
  SECTION("infinity") { data[12] = f16(1e9f); }
  SECTION("log mass") { mass[4] = std::numeric_limits<float>::infinity(); }
  SECTION("positions stand still") { positions[5] = 0; }
  SECTION("positions fall") { positions[2] = 0; }
  SECTION("positions from the future") { positions[6] = 7; }
  CHECK(validate(cache) == StatusCode::bad_data);
  data[6] = f16(0.0f);
}

TEST_CASE("data past the length is nobody's business", "[core][cache]") {
  std::vector<float> data(4, std::numeric_limits<float>::quiet_NaN());
  data[0] = data[1] = 0.0f;
  KVCache cache(strided(data.data(), Extents{1, 4, 1}), strided(data.data(), Extents{1, 4, 1}));
  cache.set_length(2);
  CHECK(validate(cache) == Status());
}

TEST_CASE("a fixed workspace never allocates and says when it is full", "[core][workspace]") {
  std::vector<std::byte> memory(1024 + 1);
  Workspace workspace(std::span<std::byte>(memory).subspan(1));
  const double* a = workspace.take<double>(10);
  REQUIRE(a != nullptr);
  CHECK(reinterpret_cast<std::uintptr_t>(a) % Workspace::alignment == 0);
  const auto mark = workspace.mark();
  const std::size_t used = workspace.high_water_bytes();
  u32* b = workspace.take_zeroed<u32>(100);
  REQUIRE(b != nullptr);
  CHECK(b[99] == 0);
  CHECK(reinterpret_cast<std::byte*>(b) >= reinterpret_cast<const std::byte*>(a + 10));
  CHECK(workspace.take<std::byte>(1000) == nullptr);
  CHECK(workspace.take<double>(static_cast<std::size_t>(-1) / 4) == nullptr);
  const std::size_t high = workspace.high_water_bytes();
  CHECK(high > used);
  workspace.rewind(mark);
  CHECK(workspace.take<u32>(100) == b);
  workspace.reset();
  CHECK(workspace.take<double>(10) == a);
  CHECK(workspace.high_water_bytes() == high);
  CHECK(workspace.take<int>(0) != nullptr);
  CHECK(workspace.exhausted() == StatusCode::workspace_too_small);
  Workspace nothing{std::span<std::byte>{}};
  CHECK(nothing.take<int>(1) == nullptr);
}

TEST_CASE("a growing workspace says what a fixed one needs", "[core][workspace]") {
  Workspace growing;
  CHECK(growing.exhausted() == StatusCode::out_of_memory);
  const std::size_t sizes[] = {100, 40000, 3, 1000000, 17};
  const auto run = [&](Workspace& workspace) {
    bool complete = true;
    for (const std::size_t n : sizes) {
      float* data = workspace.take<float>(n);
      complete = complete && data != nullptr;
      if (data != nullptr) data[0] = data[n - 1] = 1.0f;
    }
    return complete;
  };
  {
    WorkspaceScope scope(growing);
    REQUIRE(run(growing));
  }
  REQUIRE(run(growing));
  std::vector<std::byte> memory(growing.high_water_bytes() + Workspace::alignment - 1);
  Workspace fixed(memory);
  CHECK(run(fixed));
  CHECK(fixed.high_water_bytes() == growing.high_water_bytes());
  std::size_t bound = 0;
  for (const std::size_t n : sizes) bound += Workspace::bytes_for<float>(n);
  CHECK(growing.high_water_bytes() <= bound);
  growing.reset();
  CHECK(run(growing));
  growing.reset();
  const float* largest = growing.take<float>(1000000);  // the chunk that held it was kept
  growing.reset();
  CHECK(growing.take<float>(1000000) == largest);
}

TEST_CASE("scope ends give back what was taken inside, across chunks", "[core][workspace]") {
  Workspace workspace;
  u32* outer = workspace.take<u32>(10);
  outer[9] = 7;
  u32* first = nullptr;
  for (int round = 0; round < 3; ++round) {
    WorkspaceScope scope(workspace);
    u32* inner = workspace.take<u32>(8);
    inner[7] = 1;
    if (first == nullptr) first = inner;
    CHECK(inner == first);
    REQUIRE(workspace.take<u32>(1u << 20) != nullptr);
  }
  CHECK(outer[9] == 7);
}

TEST_CASE("order keys sort as scores do", "[core][order]") {
  const float infinity = std::numeric_limits<float>::infinity();
  const float not_a_number = std::numeric_limits<float>::quiet_NaN();
  const float ascending[] = {-infinity, -3.0f, -1e-40f, 0.0f, 1e-40f, 2.0f, infinity};
  for (std::size_t i = 1; i < std::size(ascending); ++i) {
    CHECK(score_key(ascending[i - 1]) < score_key(ascending[i]));
  }
  CHECK(score_key(-0.0f) == score_key(0.0f));
  CHECK(score_key(not_a_number) == 0);
  CHECK(score_key(-not_a_number) == 0);
  CHECK(score_key(-infinity) > 0);
  CHECK(token_key(1.0f, 3) > token_key(1.0f, 4));
  CHECK(token_key(1.0f, 4) > token_key(0.5f, 0));
  CHECK(token_key(not_a_number, 4) > token_key(not_a_number, 3));
  CHECK(token_key(-infinity, 0xffffffffu) > token_key(not_a_number, 0xffffffffu));
  for (const float score : {1.0f, -2.0f, not_a_number}) {
    for (const u32 token : {0u, 5u, 0xffffffffu}) {
      CHECK(token_of_key(token_key(score, token)) == token);
    }
  }
}

TEST_CASE("draws are functions of their counters, uniform and independent", "[core][random]") {
  static_assert(draw(1, 2, 3, 4, 5) == draw(1, 2, 3, 4, 5));
  CHECK(draw(1, 2, 3, 4, 5) != draw(2, 2, 3, 4, 5));
  CHECK(draw(1, 2, 3, 4, 5) != draw(1, 3, 2, 4, 5));
  CHECK(draw(1, 2, 3, 4, 5) != draw(1, 2, 3, 5, 4));
  CHECK(draw(1, 2, 3, 4, 5) != draw(1, 2, 3, 4, 6));
  CHECK(draw(0, 0, 0, -1) != draw(0, 0, 0, 1));
  constexpr int bins = 64;
  constexpr int draws = 64 * 4096;
  std::vector<int> count(bins);
  double sum = 0.0;
  double neighbours = 0.0;
  float previous = 0.5f;
  bool inside = true;
  for (int i = 0; i < draws; ++i) {
    const float x = draw(7, static_cast<u32>(i / 65536), static_cast<u32>(i / 4096 % 16), i % 4096);
    inside = inside && x >= 0.0f && x < 1.0f;
    ++count[static_cast<std::size_t>(x * bins)];
    sum += static_cast<double>(x);
    neighbours += (static_cast<double>(x) - 0.5) * (static_cast<double>(previous) - 0.5);
    previous = x;
  }
  CHECK(inside);
  CHECK(sum / draws == Approx(0.5).margin(0.003));
  CHECK(neighbours / draws == Approx(0.0).margin(0.001));
  double chi_squared = 0.0;
  for (const int n : count) chi_squared += (n - 4096.0) * (n - 4096.0) / 4096.0;
  CHECK(chi_squared < 120.0);  // 63 degrees of freedom: one in 100000
}

TEST_CASE("every status has a message of its own", "[core][status]") {
  std::set<std::string> messages;
  const u32 last = static_cast<u32>(StatusCode::bad_data);
  for (u32 code = 0; code <= last; ++code) {
    const std::string message = Status(static_cast<StatusCode>(code)).message();
    CHECK_FALSE(message.empty());
    CHECK(message != "unknown status");
    CHECK(message.back() != '.');
    messages.insert(message);
  }
  CHECK(messages.size() == last + 1);
  CHECK(std::string(Status(static_cast<StatusCode>(last + 1)).message()) == "unknown status");
  CHECK(Status().ok());
  CHECK(static_cast<bool>(Status()));
  CHECK_FALSE(static_cast<bool>(Status(StatusCode::bad_data)));
  CHECK(Status(StatusCode::bad_data).code() == StatusCode::bad_data);
}

TEST_CASE("ragged arrays by offsets or by stride", "[core][ragged]") {
  float values[] = {0, 1, 2, 3, 4, 5};
  const u64 first[] = {0, 1, 4};
  const Ragged<float> by_offset(values, first);
  const Ragged<float> by_stride(values, u64{2});
  CHECK((by_offset(1, 2) == 3.0f && by_offset(2, 1) == 5.0f && by_stride(2, 1) == 5.0f));
  const Ragged<const float> constant = by_offset;
  CHECK(constant(1, 0) == 1.0f);
  CHECK_FALSE(static_cast<bool>(Ragged<float>()));
}

TEST_CASE("an executor runs every task once", "[core][executor]") {
  std::vector<int> runs(10);
  parallel_for(Executor{}, 10,
               [&](u32 worker, u32 index) { runs[index] += 1 + static_cast<int>(worker); });
  Executor other;
  other.workers = 2;
  other.run = [](void*, u32 tasks, void (*task)(void*, u32, u32) noexcept, void* arg) noexcept {
    for (u32 i = tasks; i > 0; --i) task(arg, 0, i - 1);
  };
  parallel_for(other, 10, [&](u32, u32 index) { ++runs[index]; });
  CHECK((runs == std::vector<int>(10, 2)));
}
