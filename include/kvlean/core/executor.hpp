// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <type_traits>

#include "kvlean/config.hpp"

KVLEAN_NAMESPACE_BEGIN

/// How work is spread. The library starts no thread: `run` must call task(arg, worker, index) once
/// for every index below `tasks`, with worker < workers, and return when all are done. Work is
/// split by shape (one task a segment), never by workers, so results are the same bits at any
/// count.
struct Executor {
  void* self = nullptr;
  u32 workers = 1;
  void (*run)(void* self, u32 tasks, void (*task)(void* arg, u32 worker, u32 index) noexcept,
              void* arg) noexcept = nullptr;  ///< null: serial in the calling thread
};

/// Runs body(worker, index) for every index below `tasks`.
template <class Body>
void parallel_for(const Executor& executor, u32 tasks, Body&& body) noexcept {
  if (executor.run == nullptr || executor.workers <= 1 || tasks <= 1) {
    for (u32 index = 0; index < tasks; ++index) body(u32{0}, index);
    return;
  }
  executor.run(
      executor.self, tasks,
      [](void* arg, u32 worker, u32 index) noexcept {
        (*static_cast<std::remove_reference_t<Body>*>(arg))(worker, index);
      },
      const_cast<void*>(static_cast<const void*>(&body)));
}

KVLEAN_NAMESPACE_END
