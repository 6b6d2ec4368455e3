// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
// What the device's tests and benches share: checks that print and go on, device arrays, random
// caches that the CPU library and the device see alike, plans up and down, timing.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <kvlean/kvlean.hpp>
#include <memory>
#include <string>
#include <vector>

#include "kvlean/core/validate_plan.hpp"
#include "kvlean/cuda/cache_view.cuh"
#include "kvlean/cuda/launch.cuh"
#include "kvlean/cuda/plan.cuh"

namespace cuda_test {

using kvlean::bf16;
using kvlean::DType;
using kvlean::f16;
using kvlean::i32;
using kvlean::i64;
using kvlean::Status;
using kvlean::StatusCode;
using kvlean::u16;
using kvlean::u32;
using kvlean::u64;
using kvlean::u8;

// ---- checks ------------------------------------------------------------------------------------

/// Counts checks; prints the first failures of each case in full and the rest as a number.
struct Report {
  const char* program = "";
  std::string current = "-";
  std::atomic<u64> checks = 0;  // threads may check too; test_case() is the main thread's
  std::atomic<u64> failures = 0;
  std::atomic<u64> case_failures = 0;
  static constexpr u64 shown_per_case = 6;

  static Report& get() {
    static Report report;
    return report;
  }
  void begin(const char* format, va_list arguments) {
    char line[512];
    std::vsnprintf(line, sizeof line, format, arguments);
    current = line;
    case_failures = 0;
  }
  void fail(const char* file, int line, const char* format, ...)
      __attribute__((format(printf, 4, 5))) {
    ++failures;
    if (++case_failures > shown_per_case) return;
    char text[1024];
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    const char* name = std::strrchr(file, '/');
    std::printf("FAIL %s:%d [%s] %s\n", name != nullptr ? name + 1 : file, line, current.c_str(),
                text);
    std::fflush(stdout);
  }
};

/// Names what the following checks are about, printf-style: shape, dtype, seed.
inline void test_case(const char* format, ...) __attribute__((format(printf, 1, 2)));
inline void test_case(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  Report::get().begin(format, arguments);
  va_end(arguments);
}

/// CHECK_THAT(condition, "format", ...): counts, and on failure prints the case and the text.
#define CHECK_THAT(condition, ...)                                      \
  do {                                                                  \
    ++::cuda_test::Report::get().checks;                                \
    if (!(condition)) {                                                 \
      ::cuda_test::Report::get().fail(__FILE__, __LINE__, __VA_ARGS__); \
    }                                                                   \
  } while (false)
#define CHECK_TRUE(condition) CHECK_THAT(condition, "%s", #condition)
#define CHECK_STATUS(expression, expected)                                          \
  do {                                                                              \
    const ::kvlean::Status check_got = (expression);                                \
    const ::kvlean::Status check_want = (expected);                                 \
    CHECK_THAT(check_got == check_want, "%s: got '%s', expected '%s'", #expression, \
               check_got.message(), check_want.message());                          \
  } while (false)
#define CHECK_OK(expression) CHECK_STATUS(expression, ::kvlean::StatusCode::ok)
/// A CUDA call that the test can't go on without.
#define CUDA_REQUIRE(call)                                           \
  do {                                                               \
    const cudaError_t cuda_error = (call);                           \
    if (cuda_error != cudaSuccess) {                                 \
      std::printf("FATAL %s:%d [%s] %s: %s\n", __FILE__, __LINE__,   \
                  ::cuda_test::Report::get().current.c_str(), #call, \
                  cudaGetErrorString(cuda_error));                   \
      std::fflush(stdout);                                           \
      std::_Exit(3);                                                 \
    }                                                                \
  } while (false)

/// Last line of every test's main: prints the summary, returns the exit code.
inline int finish(const char* program) {
  const Report& report = Report::get();
  CUDA_REQUIRE(cudaDeviceSynchronize());
  std::printf("%s %s: %llu checks, %llu failures\n", report.failures == 0 ? "PASS" : "FAIL",
              program, static_cast<unsigned long long>(report.checks.load()),
              static_cast<unsigned long long>(report.failures.load()));
  return report.failures == 0 ? 0 : 1;
}

/// `--quick` makes tests leave out the large shapes (for compute-sanitizer). Exits with code 77
/// ("skipped") when there is no device.
inline bool parse_quick(int argc, char** argv) {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::printf("SKIP no CUDA device\n");
    std::exit(77);
  }
  for (int i = 1; i < argc; ++i) {
    if (std::strcmp(argv[i], "--quick") == 0) return true;
  }
  return false;
}

// ---- random values, the same on every machine --------------------------------------------------

class Random {
 public:
  explicit Random(u64 seed) : state_(seed * 0x9e3779b97f4a7c15ull + 0x1234567) {}
  u64 next() {
    u64 z = (state_ += 0x9e3779b97f4a7c15ull);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
  }
  /// In [0, bound).
  u32 below(u32 bound) { return static_cast<u32>(((next() >> 32) * bound) >> 32); }
  /// In [0, 1).
  float uniform() { return static_cast<float>(next() >> 40) * 0x1p-24f; }
  float between(float low, float high) { return low + (high - low) * uniform(); }

 private:
  u64 state_;
};

// ---- device memory -----------------------------------------------------------------------------

/// Device memory of `count` elements, poisoned with 0xA5 bytes, with 256 guard bytes behind it that
/// intact() looks at.
template <class T>
class DeviceArray {
 public:
  static constexpr std::size_t guard = 256;
  DeviceArray() = default;
  explicit DeviceArray(std::size_t count) { allocate(count); }
  explicit DeviceArray(const std::vector<T>& values) { upload(values); }
  DeviceArray(DeviceArray&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), count_(std::exchange(other.count_, 0)) {}
  DeviceArray& operator=(DeviceArray&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(count_, other.count_);
    return *this;
  }
  ~DeviceArray() { static_cast<void>(cudaFree(data_)); }

  void allocate(std::size_t count) {
    static_cast<void>(cudaFree(data_));
    data_ = nullptr;
    count_ = count;
    CUDA_REQUIRE(cudaMalloc(reinterpret_cast<void**>(&data_), bytes() + guard));
    CUDA_REQUIRE(cudaMemset(data_, 0xA5, bytes() + guard));
  }
  void upload(const std::vector<T>& values) {
    if (data_ == nullptr || values.size() != count_) allocate(values.size());
    if (!values.empty()) {
      CUDA_REQUIRE(cudaMemcpy(data_, values.data(), bytes(), cudaMemcpyHostToDevice));
      CUDA_REQUIRE(cudaStreamSynchronize(nullptr));  // pageable: the bytes may still be under way
    }
  }
  void fill_bytes(int byte) { CUDA_REQUIRE(cudaMemset(data_, byte, bytes())); }
  std::vector<T> download() const {
    std::vector<T> values(count_);
    CUDA_REQUIRE(cudaDeviceSynchronize());
    if (count_ != 0) {
      CUDA_REQUIRE(cudaMemcpy(values.data(), data_, bytes(), cudaMemcpyDeviceToHost));
    }
    return values;
  }
  /// Nothing was written behind the end.
  bool intact() const {
    u8 bytes_behind[guard];
    CUDA_REQUIRE(cudaDeviceSynchronize());
    CUDA_REQUIRE(cudaMemcpy(bytes_behind, reinterpret_cast<const u8*>(data_) + bytes(), guard,
                            cudaMemcpyDeviceToHost));
    return std::all_of(bytes_behind, bytes_behind + guard, [](u8 b) { return b == 0xA5; });
  }
  T* data() const { return data_; }
  std::size_t size() const { return count_; }
  std::size_t bytes() const { return count_ * sizeof(T); }

 private:
  T* data_ = nullptr;
  std::size_t count_ = 0;
};

/// Stream, workspace of `bytes` and error word, as a caller owns them.
struct Device {
  cudaStream_t stream = nullptr;
  DeviceArray<u8> memory;
  DeviceArray<u32> error_word;
  std::unique_ptr<kvlean::cuda::Workspace> workspace;

  explicit Device(std::size_t bytes = std::size_t{64} << 20) : memory(bytes), error_word(1) {
    CUDA_REQUIRE(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    error_word.fill_bytes(0);
    workspace = std::make_unique<kvlean::cuda::Workspace>(memory.data(), bytes);
    CUDA_REQUIRE(cudaDeviceSynchronize());
  }
  ~Device() { static_cast<void>(cudaStreamDestroy(stream)); }
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  kvlean::cuda::Context context() { return {stream, *workspace, error_word.data()}; }
  /// Waits, returns what the error word says and clears it.
  Status take_error() {
    const cudaError_t error = cudaStreamSynchronize(stream);
    if (error != cudaSuccess) {
      std::printf("FATAL [%s] a kernel failed: %s\n", Report::get().current.c_str(),
                  cudaGetErrorString(error));
      std::fflush(stdout);
      std::_Exit(3);
    }
    const u32 word = error_word.download()[0];
    error_word.fill_bytes(0);
    CUDA_REQUIRE(cudaDeviceSynchronize());
    return kvlean::cuda::status_of(word);
  }
  /// Gives everything back and poisons it, so that no call relies on what an older one left.
  void reset() {
    *workspace = kvlean::cuda::Workspace(memory.data(), memory.size());
    memory.fill_bytes(0xA5);
    CUDA_REQUIRE(cudaDeviceSynchronize());
  }
};

// ---- caches that both sides see ----------------------------------------------------------------

/// Shape of a TestCache. lengths: empty, or one a sequence, or one a segment.
struct CacheSpec {
  u64 seed = 1;
  u32 layers = 1;
  u32 sequences = 1;
  u32 kv_heads = 2;
  u32 group_size = 1;
  u32 tokens = 64;  ///< capacity of each segment, and the length where `lengths` is empty
  std::vector<u32> lengths;
  u32 key_width = 64;
  u32 value_width = 0;  ///< 0: key_width
  DType key_dtype = DType::f32;
  DType value_dtype = DType::f32;
  u32 page_tokens = 0;  ///< 0: flat
  bool positions = false;
  bool log_mass = false;
  u32 frozen = 0;
  u32 padding = 0;  ///< further elements (multiple of 8) behind each row
  const kvlean::RopeSpec* rope = nullptr;

  CacheSpec& with_dtype(DType dtype) {
    key_dtype = value_dtype = dtype;
    return *this;
  }
};

/// K and V with values in [-2, 2) (log mass in [-1, 2), positions ascending with gaps) in host
/// memory and the same bytes in device memory. view() is the device's; layer(l, q) the CPU
/// library's view of one layer of one sequence over the HOST bytes; download() fetches what the
/// device made of its own into `device_*`. Not movable: views point into it.
class TestCache {
 public:
  explicit TestCache(const CacheSpec& spec) : spec_(spec) {
    if (spec_.value_width == 0) spec_.value_width = spec_.key_width;
    Random random(spec_.seed);
    const u32 segments = num_segments();
    lengths.resize(segments);
    for (u32 s = 0; s < segments; ++s) {
      if (spec_.lengths.empty()) {
        lengths[s] = spec_.tokens;
      } else if (spec_.lengths.size() == segments) {
        lengths[s] = spec_.lengths[s];
      } else {
        lengths[s] = spec_.lengths[s / spec_.kv_heads % spec_.sequences];
      }
    }
    if (spec_.page_tokens != 0) {
      pages_ = (spec_.tokens + spec_.page_tokens - 1) / spec_.page_tokens;
      table.resize(std::size_t{pages_} * spec_.sequences);
      for (std::size_t i = 0; i < table.size(); ++i) table[i] = static_cast<i32>(i);
      for (std::size_t i = table.size(); i > 1; --i) {
        std::swap(table[i - 1], table[random.below(static_cast<u32>(i))]);
      }
    }
    make(keys, spec_.key_width, spec_.key_dtype, random);
    make(values, spec_.value_width, spec_.value_dtype, random);
    if (spec_.positions) {
      positions.resize(std::size_t{segments} * spec_.tokens);
      for (u32 s = 0; s < segments; ++s) {
        i32 at = 0;
        for (u32 t = 0; t < spec_.tokens; ++t) {
          positions[std::size_t{s} * spec_.tokens + t] = at;
          at += 1 + static_cast<i32>(random.below(4) == 0 ? random.below(5) : 0);
        }
        next_position_ = std::max(next_position_, at);
      }
    }
    if (spec_.log_mass) {
      log_mass.resize(std::size_t{segments} * spec_.tokens);
      for (float& mass : log_mass) mass = random.between(-1.0f, 2.0f);
    }
    for (u32 l : lengths) next_position_ = std::max(next_position_, static_cast<i32>(l));
    upload();
  }
  TestCache(const TestCache&) = delete;
  TestCache& operator=(const TestCache&) = delete;

  const CacheSpec& spec() const { return spec_; }
  u32 num_segments() const { return spec_.layers * spec_.sequences * spec_.kv_heads; }
  u32 segment_of(u32 layer, u32 sequence, u32 head = 0) const {
    return (layer * spec_.sequences + sequence) * spec_.kv_heads + head;
  }

  /// Copies the host's bytes, lengths and so on to the device again.
  void upload() {
    device_keys.upload(keys);
    device_values.upload(values);
    device_lengths.upload(lengths);
    if (!table.empty()) device_table.upload(table);
    if (!positions.empty()) device_positions.upload(positions);
    if (!log_mass.empty()) device_log_mass.upload(log_mass);
    device_next.upload(std::vector<i32>(spec_.sequences, next_position_));
    kvlean::cuda::CacheLayout layout;
    layout.keys = tensor(device_keys.data(), spec_.key_width, spec_.key_dtype);
    layout.values = tensor(device_values.data(), spec_.value_width, spec_.value_dtype);
    layout.num_layers = spec_.layers;
    layout.num_sequences = spec_.sequences;
    layout.kv_heads = spec_.kv_heads;
    layout.capacity = capacity();
    if (!table.empty()) {
      layout.page_table = device_table.data();
      layout.page_tokens = spec_.page_tokens;
      layout.page_table_stride = pages_;
    }
    layout.positions = positions.empty() ? nullptr : device_positions.data();
    layout.log_mass = log_mass.empty() ? nullptr : device_log_mass.data();
    layout.slot_stride = spec_.tokens;
    layout.frozen = spec_.frozen;
    std::vector<kvlean::cuda::Segment> segments(num_segments());
    CHECK_OK(kvlean::cuda::describe(layout, segments));
    device_segments.upload(segments);
    CUDA_REQUIRE(cudaDeviceSynchronize());
  }

  kvlean::cuda::CacheView view() const {
    kvlean::cuda::CacheView view;
    view.segments = device_segments.data();
    view.lengths = device_lengths.data();
    view.next_positions = device_next.data();
    view.num_layers = spec_.layers;
    view.num_sequences = spec_.sequences;
    view.kv_heads = spec_.kv_heads;
    view.group_size = spec_.group_size;
    view.max_tokens = spec_.tokens;
    view.key_width = spec_.key_width;
    view.value_width = spec_.value_width;
    view.key_dtype = spec_.key_dtype;
    view.value_dtype = spec_.value_dtype;
    view.has_positions = !positions.empty();
    view.has_log_mass = !log_mass.empty();
    view.is_paged = !table.empty();
    view.frozen = spec_.frozen;
    view.rope = spec_.rope;
    return view;
  }

  /// The CPU library's view of one layer of one sequence; it writes into the host's arrays.
  kvlean::CacheView layer(u32 l, u32 q) {
    const u32 s = segment_of(l, q);
    kvlean::CacheView view;
    view.keys = rows(keys.data(), spec_.key_width, spec_.key_dtype, l, q);
    view.values = rows(values.data(), spec_.value_width, spec_.value_dtype, l, q);
    view.segments = spec_.kv_heads;
    view.capacity = capacity();
    view.lengths = lengths.data() + s;
    view.frozen = spec_.frozen;
    if (!positions.empty()) {
      view.positions =
          kvlean::Ragged<i32>(positions.data() + std::size_t{s} * spec_.tokens, u64{spec_.tokens});
    }
    if (!log_mass.empty()) {
      view.log_mass =
          kvlean::Ragged<float>(log_mass.data() + std::size_t{s} * spec_.tokens, u64{spec_.tokens});
    }
    view.next_position = next_position_;
    view.rope = spec_.rope;
    if (spec_.rope != nullptr) view.rope_pairing = spec_.rope->pairing;
    view.origin = {q, l, 0};
    return view;
  }
  /// The same layer over bytes fetched with download().
  kvlean::CacheView downloaded_layer(u32 l, u32 q) {
    kvlean::CacheView view = layer(l, q);
    view.keys = rows(fetched_keys.data(), spec_.key_width, spec_.key_dtype, l, q);
    view.values = rows(fetched_values.data(), spec_.value_width, spec_.value_dtype, l, q);
    const u32 s = segment_of(l, q);
    view.lengths = fetched_lengths.data() + s;
    if (!positions.empty()) {
      view.positions.data = fetched_positions.data() + std::size_t{s} * spec_.tokens;
    }
    if (!log_mass.empty()) {
      view.log_mass.data = fetched_log_mass.data() + std::size_t{s} * spec_.tokens;
    }
    return view;
  }
  void download() {
    fetched_keys = device_keys.download();
    fetched_values = device_values.download();
    fetched_lengths = device_lengths.download();
    if (!positions.empty()) fetched_positions = device_positions.download();
    if (!log_mass.empty()) fetched_log_mass = device_log_mass.download();
    CHECK_TRUE(device_keys.intact() && device_values.intact() && device_lengths.intact());
  }
  i32 next_position() const { return next_position_; }
  /// Tokens a segment can hold: whole pages where paged.
  u32 capacity() const {
    return spec_.page_tokens != 0 ? pages_ * spec_.page_tokens : spec_.tokens;
  }

  std::vector<u8> keys, values;  // host bytes
  std::vector<u32> lengths;      // [segments]
  std::vector<i32> table;        // [sequence][page]
  std::vector<i32> positions;    // [segment][tokens]
  std::vector<float> log_mass;   // [segment][tokens]
  std::vector<u8> fetched_keys, fetched_values;
  std::vector<u32> fetched_lengths;
  std::vector<i32> fetched_positions;
  std::vector<float> fetched_log_mass;
  DeviceArray<u8> device_keys, device_values;
  DeviceArray<u32> device_lengths;
  DeviceArray<i32> device_table, device_positions, device_next;
  DeviceArray<float> device_log_mass;
  DeviceArray<kvlean::cuda::Segment> device_segments;

 private:
  // Flat: [layer][sequence][head][token]; paged: [layer][page][head][token of the page].
  u32 tokens_of_block() const { return spec_.page_tokens != 0 ? spec_.page_tokens : spec_.tokens; }
  u32 blocks_of_layer() const {
    return spec_.page_tokens != 0 ? pages_ * spec_.sequences : spec_.sequences;
  }
  i64 row_elements(u32 width) const { return static_cast<i64>(width) + spec_.padding; }

  void make(std::vector<u8>& bytes, u32 width, DType dtype, Random& random) {
    const std::size_t rows_in_all =
        std::size_t{spec_.layers} * blocks_of_layer() * spec_.kv_heads * tokens_of_block();
    const std::size_t elements = rows_in_all * static_cast<std::size_t>(row_elements(width));
    bytes.resize(elements * kvlean::size_bytes(dtype));
    for (std::size_t i = 0; i < elements; ++i) {
      kvlean::store_element(bytes.data() + i * kvlean::size_bytes(dtype), dtype,
                            random.between(-2.0f, 2.0f));
    }
  }
  kvlean::cuda::TensorLayout tensor(void* data, u32 width, DType dtype) const {
    kvlean::cuda::TensorLayout layout;
    layout.data = data;
    layout.token_stride = row_elements(width) * static_cast<i64>(kvlean::size_bytes(dtype));
    layout.head_stride = layout.token_stride * tokens_of_block();
    const i64 block = layout.head_stride * spec_.kv_heads;
    layout.layer_stride = block * blocks_of_layer();
    if (spec_.page_tokens != 0) {
      layout.page_stride = block;
    } else {
      layout.sequence_stride = block;
    }
    return layout;
  }
  kvlean::Rows rows(u8* data, u32 width, DType dtype, u32 l, u32 q) {
    kvlean::Rows rows;
    rows.dtype = dtype;
    rows.writable = true;
    rows.width = width;
    rows.heads = spec_.kv_heads;
    rows.tokens = capacity();
    rows.token_stride = row_elements(width);
    rows.head_stride = rows.token_stride * tokens_of_block();
    const i64 block = rows.head_stride * spec_.kv_heads;
    i64 offset = block * blocks_of_layer() * l;
    if (spec_.page_tokens != 0) {
      rows.page_stride = block;
      rows.page_tokens = spec_.page_tokens;
      rows.page_table = table.data() + std::size_t{q} * pages_;
      rows.page_table_length = pages_;
    } else {
      offset += block * q;
    }
    rows.data = data + offset * static_cast<i64>(kvlean::size_bytes(dtype));
    return rows;
  }

  CacheSpec spec_;
  u32 pages_ = 0;
  i32 next_position_ = 0;
};

// ---- plans -------------------------------------------------------------------------------------

/// A device plan with memory of its own.
struct DevicePlan {
  DeviceArray<u8> memory;
  kvlean::cuda::PlanView view;

  explicit DevicePlan(const kvlean::cuda::PlanShape& shape)
      : memory(kvlean::cuda::bytes_required(shape)) {
    kvlean::cuda::Workspace workspace(memory.data(), memory.size());
    view = kvlean::cuda::take_plan(shape, workspace);
    CHECK_OK(workspace.status());
  }
};

/// What a device plan holds, on the host, with the views' own strides.
struct HostPlan {
  kvlean::cuda::PlanView view;  // pointers into the vectors below
  std::vector<u32> length, anchor, term_begin, term_end, term_token, slots_evicted;
  std::vector<float> log_mass, self_weight, self_value_weight, term_weight, term_value_weight;
  std::vector<i32> position;

  explicit HostPlan(const kvlean::cuda::PlanView& device) : view(device) {
    const std::size_t slots = device.segments * device.slot_stride;
    const std::size_t terms = device.segments * device.term_stride;
    CUDA_REQUIRE(cudaDeviceSynchronize());
    get(view.length, length, device.segments);
    get(view.anchor, anchor, slots);
    get(view.log_mass, log_mass, slots);
    get(view.position, position, slots);
    get(view.self_weight, self_weight, slots);
    get(view.self_value_weight, self_value_weight, slots);
    get(view.term_begin, term_begin, slots);
    get(view.term_end, term_end, slots);
    get(view.term_token, term_token, terms);
    get(view.term_weight, term_weight, terms);
    get(view.term_value_weight, term_value_weight, terms);
    get(view.slots_evicted, slots_evicted, device.segments);
  }

 private:
  template <class T>
  static void get(T*& pointer, std::vector<T>& values, std::size_t count) {
    if (pointer == nullptr) return;
    values.resize(count);
    if (count != 0) {
      CUDA_REQUIRE(cudaMemcpy(values.data(), pointer, count * sizeof(T), cudaMemcpyDeviceToHost));
    }
    pointer = values.data();
  }
};

/// Puts CPU plans, one a (layer, sequence) in the order of segments, into a device plan that was
/// laid out for them (optional arrays that a CPU plan lacks are filled with their defaults).
/// `caches` gives the log mass that anchors carry when a plan has none.
inline void upload_plans(const std::vector<kvlean::CompressionPlan>& plans,
                         const std::vector<kvlean::CacheView>& caches, const DevicePlan& target) {
  HostPlan host(target.view);
  const kvlean::cuda::PlanView& to = host.view;
  const auto put = [](auto* place, u64 at, auto value) {
    if (place != nullptr) place[at] = value;
  };
  u32 s = 0;
  u32 needs = target.view.needs;
  for (std::size_t p = 0; p < plans.size(); ++p) {
    const kvlean::CompressionPlan& plan = plans[p];
    needs |= plan.needs;
    for (u32 h = 0; h < plan.segments; ++h, ++s) {
      CHECK_THAT(plan.length[h] <= to.max_slots, "segment %u: %u slots, room for %u", s,
                 plan.length[h], to.max_slots);
      to.length[s] = plan.length[h];
      if (to.slots_evicted != nullptr) {
        to.slots_evicted[s] = plan.slots_evicted != nullptr ? plan.slots_evicted[h] : 0;
      }
      // Term ranges may overlap and be shared, so the segment's whole span is copied.
      u64 first_term = ~u64{0};
      u64 last_term = 0;
      for (u64 slot = plan.first[h]; plan.has_terms() && slot < plan.first[h + 1]; ++slot) {
        if (plan.term_begin[slot] == plan.term_end[slot]) continue;
        first_term = std::min(first_term, plan.term_begin[slot]);
        last_term = std::max(last_term, plan.term_end[slot]);
      }
      if (first_term > last_term) first_term = last_term = 0;
      CHECK_THAT(last_term - first_term <= to.term_stride, "segment %u: %llu terms, room for %llu",
                 s, static_cast<unsigned long long>(last_term - first_term),
                 static_cast<unsigned long long>(to.term_stride));
      for (u64 term = first_term; term < last_term; ++term) {
        const u64 at = to.term(s, static_cast<u32>(term - first_term));
        to.term_token[at] = plan.term_token[term];
        to.term_weight[at] = plan.term_weight != nullptr ? plan.term_weight[term] : 0.0f;
        put(to.term_value_weight, at, plan.value_term_weight(term));
      }
      for (u32 j = 0; j < plan.length[h]; ++j) {
        const u64 slot = plan.first[h] + j;
        const u64 at = to.slot(s, j);
        to.anchor[at] = plan.anchor[slot];
        put(to.log_mass, at,
            plan.log_mass != nullptr ? plan.log_mass[slot]
                                     : caches[p].mass_bias(h, plan.anchor[slot]));
        put(to.position, at,
            plan.position != nullptr ? plan.position[slot]
                                     : caches[p].position(h, plan.anchor[slot]));
        put(to.self_weight, at, plan.key_self_weight(slot));
        put(to.self_value_weight, at, plan.value_self_weight(slot));
        const bool terms = plan.has_terms() && plan.term_begin[slot] < plan.term_end[slot];
        put(to.term_begin, at, terms ? static_cast<u32>(plan.term_begin[slot] - first_term) : 0u);
        put(to.term_end, at, terms ? static_cast<u32>(plan.term_end[slot] - first_term) : 0u);
      }
    }
  }
  const auto send = [](auto* device, const auto& values) {
    if (device != nullptr && !values.empty()) {
      CUDA_REQUIRE(cudaMemcpy(device, values.data(), values.size() * sizeof(values[0]),
                              cudaMemcpyHostToDevice));
    }
  };
  send(target.view.length, host.length);
  send(target.view.anchor, host.anchor);
  send(target.view.log_mass, host.log_mass);
  send(target.view.position, host.position);
  send(target.view.self_weight, host.self_weight);
  send(target.view.self_value_weight, host.self_value_weight);
  send(target.view.term_begin, host.term_begin);
  send(target.view.term_end, host.term_end);
  send(target.view.term_token, host.term_token);
  send(target.view.term_weight, host.term_weight);
  send(target.view.term_value_weight, host.term_value_weight);
  send(target.view.slots_evicted, host.slots_evicted);
  const_cast<DevicePlan&>(target).view.needs = needs;
  CUDA_REQUIRE(cudaDeviceSynchronize());
}

/// Compares the lengths and anchors of one layer of one sequence, exactly. `first` is its first
/// segment. Returns whether they agree.
inline bool compare_anchors(const kvlean::CompressionPlan& expected, const HostPlan& got,
                            u32 first) {
  const u64 before = Report::get().failures;
  for (u32 h = 0; h < expected.segments; ++h) {
    const u32 s = first + h;
    CHECK_THAT(got.length[s] == expected.length[h], "segment %u: %u slots, expected %u", s,
               got.length[s], expected.length[h]);
    const u32 count = std::min(got.length[s], expected.length[h]);
    for (u32 j = 0; j < count; ++j) {
      const u32 want = expected.anchor[expected.first[h] + j];
      const u32 have = got.anchor[got.view.slot(s, j)];
      if (want == have) continue;
      CHECK_THAT(false, "segment %u slot %u of %u: anchor %u, expected %u", s, j, count, have,
                 want);
      break;
    }
    ++Report::get().checks;
  }
  return Report::get().failures == before;
}

/// Compares everything a plan says of one layer of one sequence: lengths, anchors and terms
/// exactly, weights and masses within |got - want| <= absolute + relative * |want|.
inline void compare_plans(const kvlean::CompressionPlan& expected, const kvlean::CacheView& cache,
                          const HostPlan& got, u32 first, double relative, double absolute) {
  if (!compare_anchors(expected, got, first)) return;
  const auto close = [&](float have, float want, const char* what, u32 s, u32 j, u32 i) {
    const double error = std::fabs(static_cast<double>(have) - static_cast<double>(want));
    const bool fine = have == want || (std::isnan(have) && std::isnan(want)) ||
                      error <= absolute + relative * std::fabs(static_cast<double>(want));
    CHECK_THAT(fine, "segment %u slot %u (term %u): %s %.9g, expected %.9g", s, j, i, what,
               static_cast<double>(have), static_cast<double>(want));
  };
  for (u32 h = 0; h < expected.segments; ++h) {
    const u32 s = first + h;
    for (u32 j = 0; j < expected.length[h]; ++j) {
      const u64 slot = expected.first[h] + j;
      const u64 at = got.view.slot(s, j);
      if (got.view.log_mass != nullptr) {
        close(got.log_mass[at],
              expected.log_mass != nullptr ? expected.log_mass[slot]
                                           : cache.mass_bias(h, expected.anchor[slot]),
              "log mass", s, j, 0);
      } else {
        CHECK_THAT(expected.log_mass == nullptr, "segment %u: log mass is missing", s);
      }
      if (got.view.position != nullptr || expected.position != nullptr) {
        const i32 want = expected.position != nullptr ? expected.position[slot]
                                                      : cache.position(h, expected.anchor[slot]);
        const i32 have =
            got.view.position != nullptr ? got.position[at] : cache.position(h, got.anchor[at]);
        CHECK_THAT(have == want, "segment %u slot %u: position %d, expected %d", s, j, have, want);
      }
      const float self = got.view.self_weight != nullptr ? got.self_weight[at] : 1.0f;
      close(self, expected.key_self_weight(slot), "self weight", s, j, 0);
      close(got.view.self_value_weight != nullptr ? got.self_value_weight[at] : self,
            expected.value_self_weight(slot), "self value weight", s, j, 0);
      const u64 want_terms =
          expected.has_terms() ? expected.term_end[slot] - expected.term_begin[slot] : 0;
      const u64 have_terms = got.view.has_terms() ? got.term_end[at] - got.term_begin[at] : 0;
      CHECK_THAT(want_terms == have_terms, "segment %u slot %u: %llu terms, expected %llu", s, j,
                 static_cast<unsigned long long>(have_terms),
                 static_cast<unsigned long long>(want_terms));
      for (u32 i = 0; want_terms == have_terms && i < want_terms; ++i) {
        const u64 want = expected.term_begin[slot] + i;
        const u64 have = got.view.term(s, got.term_begin[at] + i);
        CHECK_THAT(got.term_token[have] == expected.term_token[want],
                   "segment %u slot %u term %u: token %u, expected %u", s, j, i,
                   got.term_token[have], expected.term_token[want]);
        if (expected.term_weight != nullptr) {
          close(got.term_weight[have], expected.term_weight[want], "term weight", s, j, i);
        }
        close(got.view.term_value_weight != nullptr ? got.term_value_weight[have]
                                                    : got.term_weight[have],
              expected.value_term_weight(want), "term value weight", s, j, i);
      }
    }
  }
}

// ---- comparing arrays --------------------------------------------------------------------------

/// Exactly equal elements; prints the first difference and how many there are.
template <class T>
void compare_exact(const std::vector<T>& got, const std::vector<T>& want, const char* what) {
  CHECK_THAT(got.size() == want.size(), "%s: %zu elements, expected %zu", what, got.size(),
             want.size());
  std::size_t differ = 0;
  std::size_t first = 0;
  for (std::size_t i = 0; i < std::min(got.size(), want.size()); ++i) {
    if (std::memcmp(&got[i], &want[i], sizeof(T)) == 0) continue;
    if (differ++ == 0) first = i;
  }
  CHECK_THAT(differ == 0, "%s: %zu of %zu differ, first [%zu]: %.9g, expected %.9g", what, differ,
             want.size(), first, static_cast<double>(got[first]), static_cast<double>(want[first]));
}

/// |got - want| <= absolute + relative * |want| for every element; NaN only where NaN is expected.
/// Prints the worst element. Returns the relative L2 error.
inline double compare_close(const float* got, const float* want, std::size_t count, double relative,
                            double absolute, const char* what) {
  std::size_t differ = 0;
  std::size_t worst = 0;
  double worst_by = -1.0;
  double error_sum = 0.0;
  double sum = 0.0;
  for (std::size_t i = 0; i < count; ++i) {
    const double g = static_cast<double>(got[i]);
    const double w = static_cast<double>(want[i]);
    if (g == w || (std::isnan(g) && std::isnan(w))) {
      if (std::isfinite(w)) sum += w * w;
      continue;
    }
    const double error = std::fabs(g - w);
    const double allowed = absolute + relative * std::fabs(w);
    const double by = std::isfinite(error) ? error / (allowed > 0 ? allowed : 1e-300) : 1e300;
    if (!(error <= allowed)) ++differ;
    if (by > worst_by) {
      worst_by = by;
      worst = i;
    }
    error_sum += error * error;
    sum += w * w;
  }
  CHECK_THAT(differ == 0, "%s: %zu of %zu differ, worst [%zu]: %.9g, expected %.9g", what, differ,
             count, worst, static_cast<double>(got[worst]), static_cast<double>(want[worst]));
  return std::sqrt(error_sum / (sum > 0 ? sum : 1.0));
}
inline double compare_close(const std::vector<float>& got, const std::vector<float>& want,
                            double relative, double absolute, const char* what) {
  CHECK_THAT(got.size() == want.size(), "%s: %zu elements, expected %zu", what, got.size(),
             want.size());
  return compare_close(got.data(), want.data(), std::min(got.size(), want.size()), relative,
                       absolute, what);
}

/// Two layers over the same shape: lengths, positions and log mass exactly; rows to the bit when
/// `relative` is 0, else within relative * |want| + absolute.
inline void compare_layers(const kvlean::CacheView& got, const kvlean::CacheView& want,
                           double relative = 0.0, double absolute = 0.0) {
  std::vector<float> g(kvlean::max_row_width), w(kvlean::max_row_width);
  for (u32 h = 0; h < want.segments; ++h) {
    CHECK_THAT(got.length(h) == want.length(h), "head %u: length %u, expected %u", h, got.length(h),
               want.length(h));
    for (u32 t = 0; t < std::min(got.length(h), want.length(h)); ++t) {
      CHECK_THAT(got.position(h, t) == want.position(h, t),
                 "head %u token %u: position %d, expected %d", h, t, got.position(h, t),
                 want.position(h, t));
      const double mass =
          static_cast<double>(got.mass_bias(h, t)) - static_cast<double>(want.mass_bias(h, t));
      CHECK_THAT(
          got.mass_bias(h, t) == want.mass_bias(h, t) || std::fabs(mass) <= absolute + relative,
          "head %u token %u: log mass %.9g, expected %.9g", h, t,
          static_cast<double>(got.mass_bias(h, t)), static_cast<double>(want.mass_bias(h, t)));
      for (const bool keys : {true, false}) {
        const kvlean::Rows& from = keys ? got.keys : got.values;
        const kvlean::Rows& to = keys ? want.keys : want.values;
        kvlean::load_row(from, h, t, g.data());
        kvlean::load_row(to, h, t, w.data());
        for (u32 i = 0; i < to.width; ++i) {
          if (std::memcmp(&g[i], &w[i], 4) == 0) continue;
          const double error = std::fabs(static_cast<double>(g[i]) - static_cast<double>(w[i]));
          if (relative + absolute > 0.0 &&
              error <= absolute + relative * std::fabs(static_cast<double>(w[i]))) {
            continue;
          }
          CHECK_THAT(false, "head %u token %u %s[%u]: %.9g, expected %.9g", h, t,
                     keys ? "key" : "value", i, static_cast<double>(g[i]),
                     static_cast<double>(w[i]));
          break;
        }
        ++Report::get().checks;
      }
    }
  }
}

// ---- timing ------------------------------------------------------------------------------------

/// Median milliseconds of `runs` calls of work(run), each between two events, after `warm_up`
/// calls. Rotate buffers by `run`: more than 60 MB of them, or L2 is measured.
template <class Work>
double median_ms(cudaStream_t stream, Work&& work, int runs = 25, int warm_up = 3) {
  cudaEvent_t begin = nullptr;
  cudaEvent_t end = nullptr;
  CUDA_REQUIRE(cudaEventCreate(&begin));
  CUDA_REQUIRE(cudaEventCreate(&end));
  std::vector<float> times;
  for (int run = -warm_up; run < runs; ++run) {
    CUDA_REQUIRE(cudaEventRecord(begin, stream));
    work(run + warm_up);
    CUDA_REQUIRE(cudaEventRecord(end, stream));
    CUDA_REQUIRE(cudaEventSynchronize(end));
    float ms = 0.0f;
    CUDA_REQUIRE(cudaEventElapsedTime(&ms, begin, end));
    if (run >= 0) times.push_back(ms);
  }
  CUDA_REQUIRE(cudaEventDestroy(begin));
  CUDA_REQUIRE(cudaEventDestroy(end));
  std::sort(times.begin(), times.end());
  return static_cast<double>(times[times.size() / 2]);
}

/// The same for work captured into a graph once per buffer set: what an engine that replays graphs
/// sees, without launch gaps on the host. capture(set) puts the work of one buffer set on `stream`.
template <class Capture>
double median_graph_ms(cudaStream_t stream, int sets, Capture&& capture, int runs = 25) {
  std::vector<cudaGraphExec_t> graphs(static_cast<std::size_t>(sets), nullptr);
  for (int set = 0; set < sets; ++set) {
    cudaGraph_t graph = nullptr;
    CUDA_REQUIRE(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    capture(set);
    CUDA_REQUIRE(cudaStreamEndCapture(stream, &graph));
    CUDA_REQUIRE(cudaGraphInstantiate(&graphs[static_cast<std::size_t>(set)], graph, 0));
    CUDA_REQUIRE(cudaGraphDestroy(graph));
    CUDA_REQUIRE(cudaGraphUpload(graphs[static_cast<std::size_t>(set)], stream));
  }
  const double ms = median_ms(
      stream,
      [&](int run) {
        CUDA_REQUIRE(cudaGraphLaunch(graphs[static_cast<std::size_t>(run % sets)], stream));
      },
      runs);
  for (cudaGraphExec_t graph : graphs) CUDA_REQUIRE(cudaGraphExecDestroy(graph));
  return ms;
}

/// GB/s of a device-to-device copy of 1 GiB, bytes read plus bytes written: the roof of work that
/// only moves bytes. Measured once a process.
inline double copy_rate() {
  static const double rate = [] {
    const std::size_t bytes = std::size_t{1} << 30;
    DeviceArray<u8> from(bytes);
    DeviceArray<u8> to(bytes);
    cudaStream_t stream = nullptr;
    CUDA_REQUIRE(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    CUDA_REQUIRE(cudaDeviceSynchronize());
    const double ms = median_ms(stream, [&](int) {
      CUDA_REQUIRE(
          cudaMemcpyAsync(to.data(), from.data(), bytes, cudaMemcpyDeviceToDevice, stream));
    });
    CUDA_REQUIRE(cudaStreamDestroy(stream));
    return 2.0 * static_cast<double>(bytes) / (ms * 1e6);
  }();
  return rate;
}

/// First lines of every bench.
inline void bench_header(const char* program) {
  cudaDeviceProp device = {};
  int driver = 0;
  CUDA_REQUIRE(cudaGetDeviceProperties(&device, 0));
  CUDA_REQUIRE(cudaDriverGetVersion(&driver));
  std::printf("%s on %s, driver API %d, runtime %d, copy %.0f GB/s (bytes read plus written)\n",
              program, device.name, driver, CUDART_VERSION, copy_rate());
  std::printf("%-58s %10s %10s %8s %10s %6s\n", "work", "ms", "floor ms", "of copy", "must ms",
              "holds");
}
/// One row. bytes: the fewest bytes read plus written; floor = bytes / copy rate. must_ms 0: none.
inline void bench_row(const char* name, double ms, double bytes, double must_ms) {
  const double floor_ms = bytes / (copy_rate() * 1e6);
  char must[32] = "-";
  if (must_ms > 0) std::snprintf(must, sizeof must, "%.4f", must_ms);
  std::printf("%-58s %10.4f %10.4f %7.1f%% %10s %6s\n", name, ms, floor_ms, 100.0 * floor_ms / ms,
              must, must_ms <= 0 ? "-" : (ms <= must_ms ? "yes" : "NO"));
  std::fflush(stdout);
}

}  // namespace cuda_test
