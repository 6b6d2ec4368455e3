// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
// The shipped threads: every task once, nested and concurrent calls, start and stop.
#include <atomic>
#include <kvlean/core/thread_pool.hpp>
#include <thread>
#include <vector>

#include "tests/support/catch.hpp"

namespace {

using namespace kvlean;

/// Runs `tasks` tasks and says whether each ran once, by a worker that exists.
bool runs_each_once(const Executor& executor, u32 tasks) {
  std::vector<std::atomic<u32>> count(tasks);
  std::atomic<bool> known{true};
  parallel_for(executor, tasks, [&](u32 worker, u32 index) noexcept {
    if (worker >= executor.workers || index >= tasks) {
      known = false;
    } else {
      ++count[index];
    }
  });
  bool once = known;
  for (const std::atomic<u32>& c : count) once = once && c == 1;
  return once;
}

}  // namespace

TEST_CASE("a thread pool runs every task once", "[thread_pool]") {
  for (const u32 workers : {1u, 2u, 3u, 8u}) {
    for (const u32 spins : {0u, 1000u}) {
      ThreadPool pool({.workers = workers, .spins = spins});
      REQUIRE(pool.workers() == workers);
      REQUIRE(pool.executor().workers == workers);
      CAPTURE(workers, spins);
      bool right = true;
      for (const u32 tasks : {0u, 1u, 2u, 7u, 1000u}) {
        right = right && runs_each_once(pool.executor(), tasks);
      }
      for (u32 call = 0; call < 300; ++call) {
        right = right && runs_each_once(pool.executor(), 1 + call % 5);
      }
      REQUIRE(right);
    }
  }
}

TEST_CASE("a thread pool publishes what tasks wrote", "[thread_pool]") {
  ThreadPool pool({.workers = 4, .spins = 50});
  std::vector<u64> plain(64);
  u64 wanted = 0;
  bool right = true;
  for (u64 call = 1; call <= 500; ++call) {  // plain memory, read and written from call to call
    parallel_for(pool.executor(), 64, [&](u32, u32 index) noexcept { plain[index] += call; });
    wanted += call;
    for (const u64 x : plain) right = right && x == wanted;
  }
  REQUIRE(right);
}

TEST_CASE("a worker is never in two tasks at a time", "[thread_pool]") {
  ThreadPool pool({.workers = 4});
  std::vector<u32> busy(pool.workers());
  std::atomic<u32> clashes{0};
  for (u32 call = 0; call < 50; ++call) {
    parallel_for(pool.executor(), 100, [&](u32 worker, u32) noexcept {
      if (busy[worker]++ != 0) ++clashes;
      --busy[worker];
    });
  }
  REQUIRE(clashes == 0);
}

TEST_CASE("a call inside a task runs in the same thread", "[thread_pool]") {
  ThreadPool pool({.workers = 3});
  ThreadPool other({.workers = 2});
  std::atomic<u32> inner{0};
  std::atomic<u32> moved{0};
  parallel_for(pool.executor(), 20, [&](u32, u32) noexcept {
    const std::thread::id here = std::this_thread::get_id();
    for (ThreadPool* nested : {&pool, &other}) {
      parallel_for(nested->executor(), 10, [&](u32 worker, u32) noexcept {
        ++inner;
        if (worker != 0 || std::this_thread::get_id() != here) ++moved;
      });
    }
  });
  REQUIRE(inner == 400);
  REQUIRE(moved == 0);
}

TEST_CASE("threads may share a pool", "[thread_pool]") {
  ThreadPool pool({.workers = 3, .spins = 10});
  std::atomic<u32> wrong{0};
  std::vector<std::thread> callers;
  for (u32 c = 0; c < 3; ++c) {
    callers.emplace_back([&] {
      for (u32 call = 0; call < 100; ++call) {
        if (!runs_each_once(pool.executor(), 1 + call % 9)) ++wrong;
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  REQUIRE(wrong == 0);
}

TEST_CASE("a pool starts and stops, also without work", "[thread_pool]") {
  for (u32 i = 0; i < 30; ++i) {
    ThreadPool pool({.workers = 1 + i % 5, .pin = i % 2 == 0, .spins = i % 3});
    if (i % 4 == 0) REQUIRE(runs_each_once(pool.executor(), 11));
  }
  const ThreadPool machine;
  REQUIRE(machine.workers() >= 1);
}
