// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <atomic>
#include <memory>
#include <new>
#include <thread>

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif
#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

#include "kvlean/core/executor.hpp"

// Threads for programs that have none of their own. Not part of kvlean.hpp: the library itself
// starts no thread. Link with the system's thread library.

KVLEAN_NAMESPACE_BEGIN

struct ThreadPoolOptions {
  u32 workers = 0;  ///< the calling thread included; 0: as many as the machine has CPUs
  /// Binds each started thread to a CPU of its own among those that the creating thread may use
  /// and does not run on now (Linux; elsewhere nothing is bound). The creating thread is left
  /// alone.
  bool pin = false;
  u32 spins = 1000;  ///< pauses that an idle thread waits before it sleeps: on x86 about 50 us
};

/// Threads that wait for work, and an Executor over them. run() hands out the tasks one by one, to
/// the calling thread too, and returns when all are done; results do not depend on who took which.
/// Idle threads spin for a moment, then sleep. run() allocates nothing, wakes threads that sleep,
/// and waits for none that did not take part. Called inside a task, or while another thread's
/// call is running, it does all tasks itself. The pool must outlive its executors and calls.
class ThreadPool {
 public:
  explicit ThreadPool(const ThreadPoolOptions& options = {}) noexcept : spins_(options.spins) {
    u32 wanted = options.workers != 0 ? options.workers : std::thread::hardware_concurrency();
    if (wanted > most_workers) wanted = most_workers;
    if (wanted <= 1) return;
    threads_.reset(new (std::nothrow) std::thread[wanted - 1]);
    if (threads_ == nullptr) return;
    u32 started = 0;
    while (started < wanted - 1 && start(started + 1)) ++started;
    workers_ = started + 1;
    if (options.pin) pin();
  }
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;
  ~ThreadPool() {
    stop_.store(true, std::memory_order_relaxed);
    announce();
    for (u32 i = 0; i + 1 < workers_; ++i) threads_[i].join();
  }

  /// Threads that do tasks, the calling one included: fewer than asked for if the system refused.
  [[nodiscard]] u32 workers() const noexcept { return workers_; }

  [[nodiscard]] Executor executor() noexcept {
    return {this, workers_,
            [](void* self, u32 tasks, void (*task)(void*, u32, u32) noexcept, void* arg) noexcept {
              static_cast<ThreadPool*>(self)->run(tasks, task, arg);
            }};
  }

  /// What Executor::run asks for. O(1) on top of the tasks.
  void run(u32 tasks, void (*task)(void* arg, u32 worker, u32 index) noexcept, void* arg) noexcept {
    if (workers_ == 1 || tasks <= 1 || inside_task() || busy_.exchange(true)) {
      for (u32 index = 0; index < tasks; ++index) task(arg, 0, index);
      return;
    }
    task_ = task;
    arg_ = arg;
    tasks_ = tasks;
    next_.store(0, std::memory_order_relaxed);
    open_.store(true);
    announce();
    take_tasks(0);
    open_.store(false);
    // A thread that counted itself in before that may still be in a task, a later one does nothing.
    for (u32 spin = 0;;) {
      const u32 here = entered_.load();
      if (here == 0) break;
      if (spin < spins_) {
        ++spin;
        pause();
      } else {
        entered_.wait(here);
      }
    }
    busy_.store(false);
  }

 private:
  static constexpr u32 most_workers = 1024;

  static bool& inside_task() noexcept {
    static thread_local bool inside = false;
    return inside;
  }
  static void pause() noexcept {
#if defined(__x86_64__) || defined(__i386__)
    _mm_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb");
#else
    std::this_thread::yield();
#endif
  }

  /// Whether thread `worker` runs. The standard library can say no only with an exception.
  bool start(u32 worker) noexcept {
#if defined(__cpp_exceptions)
    try {
      threads_[worker - 1] = std::thread([this, worker] { wait_and_work(worker); });
    } catch (...) {
      return false;
    }
#else
    threads_[worker - 1] = std::thread([this, worker] { wait_and_work(worker); });
#endif
    return true;
  }

  void pin() noexcept {
#if defined(__linux__)
    cpu_set_t allowed;
    if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return;
    const int own = sched_getcpu();
    u32 thread = 0;
    for (int cpu = 0; cpu < CPU_SETSIZE && thread + 1 < workers_; ++cpu) {
      if (cpu == own || !CPU_ISSET(static_cast<unsigned>(cpu), &allowed)) continue;
      cpu_set_t one;
      CPU_ZERO(&one);
      CPU_SET(static_cast<unsigned>(cpu), &one);
      static_cast<void>(
          pthread_setaffinity_np(threads_[thread++].native_handle(), sizeof one, &one));
    }
#endif
  }

  void announce() noexcept {
    round_.fetch_add(1);
    round_.notify_all();
  }

  void wait_and_work(u32 worker) noexcept {
    u32 seen = 0;
    for (;;) {
      u32 round = round_.load();
      for (u32 spin = 0; round == seen; round = round_.load()) {
        if (spin < spins_) {
          ++spin;
          pause();
        } else {
          round_.wait(seen);
        }
      }
      if (stop_.load(std::memory_order_relaxed)) return;
      seen = round;
      entered_.fetch_add(1);
      // Both sides write, then read what the other wrote, in one order for all: either this thread
      // sees the call closed, or the call sees this thread and leaves task_ and the like alone.
      if (open_.load()) take_tasks(worker);
      if (entered_.fetch_sub(1) == 1) entered_.notify_all();
    }
  }

  void take_tasks(u32 worker) noexcept {
    inside_task() = true;
    for (;;) {
      const u64 index = next_.fetch_add(1, std::memory_order_relaxed);
      if (index >= tasks_) break;
      task_(arg_, worker, static_cast<u32>(index));
    }
    inside_task() = false;
  }

  std::unique_ptr<std::thread[]> threads_;
  u32 workers_ = 1;
  u32 spins_;
  std::atomic<bool> stop_{false};
  std::atomic<bool> busy_{false};
  void (*task_)(void* arg, u32 worker, u32 index) noexcept = nullptr;
  void* arg_ = nullptr;
  u64 tasks_ = 0;
  // Each on a cache line of its own.
  alignas(64) std::atomic<u64> next_{0};
  alignas(64) std::atomic<u32> entered_{0};  // threads between two waits
  alignas(64) std::atomic<u32> round_{0};    // counts calls
  alignas(64) std::atomic<bool> open_{false};
};

KVLEAN_NAMESPACE_END
