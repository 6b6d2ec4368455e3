// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
// kvlean-kernels: how fast the kernels are, on every target of this CPU, one thread. Rates are per
// second of CPU time: `bytes` is what must be read at least (keys, values), `flops` counts the two
// products. bench_read is the floor of everything that reads a cache once.
#include <benchmark/benchmark.h>

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <kvlean/attention/attend.hpp>
#include <kvlean/kvlean.hpp>
#include <kvlean/observe/attention_mass.hpp>
#include <new>
#include <string>
#include <vector>

namespace {

using namespace kvlean;

/// Numbers in [-1, 1), on whole pages that are touched before the clock runs.
template <class T>
class Buffer {
 public:
  explicit Buffer(std::size_t count) {
    constexpr std::size_t page = 1u << 21;
    data_ = static_cast<T*>(std::aligned_alloc(page, (count * sizeof(T) + page - 1) / page * page));
    if (data_ == nullptr) std::abort();
    u32 state = 1;
    for (std::size_t i = 0; i < count; ++i) {
      state = state * 1664525u + 1013904223u;
      new (data_ + i) T(static_cast<float>(state >> 8) * 0x1p-23f - 1.0f);
    }
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }
  [[nodiscard]] T* data() const { return data_; }

 private:
  T* data_ = nullptr;
};

void report(benchmark::State& state, double bytes, double flops) {
  const double rounds = static_cast<double>(state.iterations());
  using benchmark::Counter;
  if (bytes > 0.0) state.counters["bytes"] = Counter(bytes * rounds, Counter::kIsRate);
  if (flops > 0.0) state.counters["flops"] = Counter(flops * rounds, Counter::kIsRate);
}

/// The floor: the same bytes, read as eight streams and added up.
void bench_read(benchmark::State& state) {
  const std::size_t count = static_cast<std::size_t>(state.range(0)) / sizeof(u64);
  const Buffer<float> memory(2 * count);
  const std::size_t eighth = count / 8;
  const std::byte* base = reinterpret_cast<const std::byte*>(memory.data());
  for (auto _ : state) {
    u64 sum[8] = {};
    for (std::size_t i = 0; i < eighth; ++i) {
      for (std::size_t s = 0; s < 8; ++s) {
        u64 word;
        std::memcpy(&word, base + (s * eighth + i) * sizeof word, sizeof word);
        sum[s] += word;
      }
    }
    for (u64& s : sum) benchmark::DoNotOptimize(s);
  }
  report(state, static_cast<double>(state.range(0)), 0.0);
}

constexpr u32 dim = 128;

/// One decode step over 8 KV heads: ranges are tokens, group size.
template <class T>
void bench_decode(benchmark::State& state, simd::Target target) {
  const u32 heads = 8;
  const u32 tokens = static_cast<u32>(state.range(0));
  const u32 group = static_cast<u32>(state.range(1));
  const std::size_t elements = std::size_t{heads} * tokens * dim;
  const Buffer<T> keys(elements);
  const Buffer<T> values(elements);
  const Buffer<T> q(std::size_t{heads} * group * dim);
  const Buffer<float> mass(std::size_t{heads} * tokens);
  CacheView cache = KVCache(strided(keys.data(), Extents{heads, tokens, dim}),
                            strided(values.data(), Extents{heads, tokens, dim}))
                        .view();
  cache.log_mass = Ragged<float>(mass.data(), u64{tokens});
  const Queries asked = queries(strided(q.data(), Extents{std::size_t{heads} * group, 1, dim}));
  std::vector<float> output(std::size_t{heads} * group * dim);
  AttentionSpec spec;
  spec.target = target;
  for (auto _ : state) {
    if (!detail::attend_view(asked, cache, spec, AttentionOutput{output.data(), nullptr}, {})) {
      state.SkipWithError("attend failed");
      break;
    }
    benchmark::DoNotOptimize(output.data());
  }
  report(state, 2.0 * static_cast<double>(elements * sizeof(T)),
         4.0 * group * static_cast<double>(elements));
}

/// Attention received by every token: ranges are tokens, query rows of a head, group size. All rows
/// (a whole prefill) is H2O's score, a window of 32 SnapKV's.
template <class T>
void bench_mass(benchmark::State& state, simd::Target target) {
  const u32 tokens = static_cast<u32>(state.range(0));
  const u32 count = static_cast<u32>(state.range(1));
  const u32 group = static_cast<u32>(state.range(2));
  const Buffer<T> keys(std::size_t{tokens} * dim);
  const Buffer<T> q(std::size_t{group} * count * dim);
  const KVCache cache(strided(keys.data(), Extents{1, tokens, dim}),
                      strided(keys.data(), Extents{1, tokens, dim}));
  const Queries asked = queries(strided(q.data(), Extents{group, count, dim}));
  std::vector<float> mass(tokens);
  Workspace workspace;
  AttentionSpec spec;
  spec.target = target;
  for (auto _ : state) {
    if (!accumulate_attention(cache.view(), asked, spec, GroupReduction::sum, workspace, {},
                              Ragged<float>(mass.data(), u64{tokens}))) {
      state.SkipWithError("accumulate_attention failed");
      break;
    }
    benchmark::DoNotOptimize(mass.data());
  }
  // Pairs that a causal mask leaves.
  const double pairs = static_cast<double>(count) * tokens - 0.5 * count * (count - 1.0);
  report(state, static_cast<double>(tokens) * dim * sizeof(T), 2.0 * dim * group * pairs);
}

/// Attention of a whole prefill with itself: ranges are tokens.
template <class T>
void bench_prefill(benchmark::State& state, simd::Target target) {
  const u32 tokens = static_cast<u32>(state.range(0));
  const Buffer<T> rows(std::size_t{tokens} * dim);
  const KVCache cache(strided(rows.data(), Extents{1, tokens, dim}),
                      strided(rows.data(), Extents{1, tokens, dim}));
  const Queries asked = queries(strided(rows.data(), Extents{1, tokens, dim}));
  std::vector<float> output(std::size_t{tokens} * dim);
  AttentionSpec spec;
  spec.target = target;
  for (auto _ : state) {
    if (!attend(asked, cache, spec, AttentionOutput{output.data(), nullptr})) {
      state.SkipWithError("attend failed");
      break;
    }
    benchmark::DoNotOptimize(output.data());
  }
  report(state, 0.0, 2.0 * dim * static_cast<double>(tokens) * tokens);
}

/// Rows of 128 elements to float and back, in the first cache level.
template <class T>
void bench_convert(benchmark::State& state, simd::Target target, bool load) {
  const u32 rows = 64;
  const Buffer<T> storage(rows * dim);
  const Buffer<float> floats(rows * dim);
  const simd::RowKernels& kernels = simd::row_kernels(target);
  for (auto _ : state) {
    for (u32 r = 0; r < rows; ++r) {
      if (load) {
        kernels.load(storage.data() + r * dim, dtype_of<T>, floats.data() + r * dim, dim);
      } else {
        kernels.store(floats.data() + r * dim, storage.data() + r * dim, dtype_of<T>, dim);
      }
    }
    benchmark::ClobberMemory();
  }
  report(state, static_cast<double>(rows * dim) * (sizeof(T) + sizeof(float)), 0.0);
}

/// exp of 512 logits, and their sum.
void bench_exponentials(benchmark::State& state, simd::Target target) {
  const Buffer<float> logits(512);
  std::vector<float> x(512);
  const simd::AttentionKernels& kernels = simd::attention_kernels(target);
  for (auto _ : state) {
    std::memcpy(x.data(), logits.data(), x.size() * sizeof(float));
    benchmark::DoNotOptimize(kernels.exponentials(x.data(), 512, 1.0f));
  }
  state.SetItemsProcessed(state.iterations() * 512);
}

template <class T>
void add_type(simd::Target target) {
  const std::string suffix = std::string("/") + simd::name(target) + "/" + name(dtype_of<T>);
  const auto unit = benchmark::kMillisecond;
  benchmark::RegisterBenchmark(("decode" + suffix).c_str(), bench_decode<T>, target)
      ->ArgNames({"tokens", "group"})
      ->ArgsProduct({{2048, 16384}, {1, 4, 8}})
      ->Unit(unit);
  benchmark::RegisterBenchmark(("window" + suffix).c_str(), bench_mass<T>, target)
      ->ArgNames({"tokens", "queries", "group"})
      ->Args({32768, 32, 4})
      ->Args({32768, 1, 4})
      ->Unit(unit);
  benchmark::RegisterBenchmark(("accumulate" + suffix).c_str(), bench_mass<T>, target)
      ->ArgNames({"tokens", "queries", "group"})
      ->Args({2048, 2048, 1})
      ->Unit(unit);
  benchmark::RegisterBenchmark(("prefill" + suffix).c_str(), bench_prefill<T>, target)
      ->ArgName("tokens")
      ->Arg(1024)
      ->Unit(unit);
  benchmark::RegisterBenchmark(("load" + suffix).c_str(), bench_convert<T>, target, true);
  benchmark::RegisterBenchmark(("store" + suffix).c_str(), bench_convert<T>, target, false);
}

}  // namespace

int main(int argc, char** argv) {
  for (int i = 1; i < argc; ++i) {
    if (std::strcmp(argv[i], "--help") == 0) {  // which Google Benchmark answers with an error code
      benchmark::PrintDefaultHelp();
      return 0;
    }
  }
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  benchmark::RegisterBenchmark("read", bench_read)
      ->ArgName("bytes")
      ->Arg(64 << 20)
      ->Unit(benchmark::kMillisecond);
  for (const simd::Target target :
       {simd::Target::scalar, simd::Target::avx2, simd::Target::avx512, simd::Target::neon}) {
    if (!simd::supported(target)) continue;
    add_type<float>(target);
    add_type<f16>(target);
    add_type<bf16>(target);
    const std::string title = std::string("exponentials/") + simd::name(target);
    benchmark::RegisterBenchmark(title.c_str(), bench_exponentials, target);
  }
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
  return 0;
}
