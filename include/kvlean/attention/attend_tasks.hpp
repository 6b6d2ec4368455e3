// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <limits>

#include "kvlean/attention/attend_few.hpp"
#include "kvlean/attention/attend_tile.hpp"
#include "kvlean/core/executor.hpp"

// The tasks of one call of attend().

KVLEAN_NAMESPACE_BEGIN
namespace detail {

/// A tile of query rows of one segment, and the tasks that it is cut into.
struct AttendUnit {
  TokenBlocks blocks;
  u32 first_task = 0;
  u32 tasks = 1;
  BlockPart parts;  ///< [tasks][rows] and [tasks][rows][value_width], where there are several tasks
};

/// Cuts the work of attend() into tasks and runs them.
class AttendTasks {
 public:
  AttendTasks(const AttendContext& context, const Executor& executor) noexcept
      : context_(context),
        executor_(executor),
        step_(context.tile_rows()),
        tiles_((context.group_rows() + step_ - 1) / step_) {}

  /// Tiles of query rows of all segments: the tasks where no tile is cut.
  [[nodiscard]] u64 units() const noexcept { return tiles_ * context_.cache.segments; }

  /// Whether more threads than one have to share long segments.
  [[nodiscard]] bool worth_cutting() const noexcept {
    constexpr u64 many = 4096;
    return executor_.run != nullptr && executor_.workers > 1 && units() <= many &&
           context_.cache.max_length() > block_min_tokens;
  }

  /// Describes every unit into `units` [units()] and chooses how many blocks a task takes: so few
  /// that the workers end at the same time, but no more parts than `most_bytes` holds. Returns the
  /// bytes of the parts.
  std::size_t plan(AttendUnit* units, std::size_t most_bytes) noexcept {
    units_ = units;
    u64 total = 0;
    for (u32 u = 0; u < this->units(); ++u) {
      units[u] = {};
      if (rows_of(u) <= simd::few_rows) {
        const TokenRange visible = context_.visible(segment_of(u), first_row_of(u), rows_of(u));
        units[u].blocks = TokenBlocks(visible, rows_of(u) * context_.cache.values.width);
      }
      total += units[u].blocks.all.end - units[u].blocks.all.begin;
    }
    const u64 most_tokens = total / (u64{executor_.workers} * 16) + 1;
    std::size_t bytes = 0;
    for (task_blocks_ = 1;; task_blocks_ *= 2) {
      u64 longest = 0;
      bytes = cut(longest);
      const bool fine = task_blocks_ == block_max_count || 2 * longest > most_tokens;
      if (task_blocks_ >= block_max_count || (bytes <= most_bytes && fine)) return bytes;
    }
  }

  /// Places the parts in memory of as many bytes as plan() said, aligned for double.
  void place_parts(std::byte* memory) noexcept {
    for (u32 u = 0; u < units(); ++u) {
      if (units_[u].tasks == 1) continue;
      const std::size_t softmax = softmax_bytes(u);
      units_[u].parts.softmax = reinterpret_cast<SoftmaxSum*>(memory);
      units_[u].parts.sums = reinterpret_cast<float*>(memory + softmax);
      memory += softmax + sums_bytes(u);
    }
  }

  /// Runs the tasks that plan() made.
  void run_planned() noexcept {
    parallel_for(executor_, tasks_, [this](u32, u32 task) noexcept {
      const AttendUnit* unit = std::upper_bound(
          units_, units_ + units(), task,
          [](u32 index, const AttendUnit& other) noexcept { return index < other.first_task; });
      --unit;
      const u32 u = static_cast<u32>(unit - units_);
      if (unit->tasks == 1) {
        run_unit(u, unit->blocks);
      } else {
        run_part(u, task - unit->first_task);
      }
    });
    parallel_for(executor_, static_cast<u32>(units()), [this](u32, u32 u) noexcept {
      if (units_[u].tasks > 1) merge_parts_of(u);
    });
  }

  /// Runs a task a unit.
  void run_whole() noexcept {
    parallel_for(executor_, static_cast<u32>(units()), [this](u32, u32 u) noexcept {
      TokenBlocks blocks;
      if (rows_of(u) <= simd::few_rows) {
        blocks = TokenBlocks(context_.visible(segment_of(u), first_row_of(u), rows_of(u)),
                             rows_of(u) * context_.cache.values.width);
      }
      run_unit(u, blocks);
    });
  }

 private:
  [[nodiscard]] u32 segment_of(u32 unit) const noexcept { return static_cast<u32>(unit / tiles_); }
  [[nodiscard]] u64 first_row_of(u32 unit) const noexcept { return unit % tiles_ * step_; }
  [[nodiscard]] u32 rows_of(u32 unit) const noexcept {
    return static_cast<u32>(std::min<u64>(step_, context_.group_rows() - first_row_of(unit)));
  }
  [[nodiscard]] std::size_t softmax_bytes(u32 unit) const noexcept {
    return std::size_t{units_[unit].tasks} * rows_of(unit) * sizeof(SoftmaxSum);
  }
  [[nodiscard]] std::size_t sums_bytes(u32 unit) const noexcept {
    const std::size_t floats =
        std::size_t{units_[unit].tasks} * rows_of(unit) * context_.cache.values.width;
    return (floats + 1) / 2 * 2 * sizeof(float);
  }

  /// Tasks of task_blocks_ blocks each. Returns the bytes of the parts.
  std::size_t cut(u64& longest) noexcept {
    std::size_t bytes = 0;
    tasks_ = 0;
    for (u32 u = 0; u < units(); ++u) {
      AttendUnit& unit = units_[u];
      unit.first_task = tasks_;
      unit.tasks = (unit.blocks.count + task_blocks_ - 1) / task_blocks_;
      tasks_ += unit.tasks;
      const u64 tokens = u64{unit.blocks.block_tokens} * std::min(task_blocks_, unit.blocks.count);
      longest = std::max(longest, tokens);
      if (unit.tasks > 1) bytes += softmax_bytes(u) + sums_bytes(u);
    }
    return bytes;
  }

  void run_unit(u32 u, const TokenBlocks& blocks) const noexcept {
    if (rows_of(u) <= simd::few_rows) {
      AttendFew few(context_, segment_of(u), first_row_of(u), rows_of(u));
      few.run(blocks, 0, blocks.count);
      few.write();
    } else {
      run_many(u);
    }
  }
  void run_many(u32 u) const noexcept {
    AttendTile(context_, segment_of(u), first_row_of(u), rows_of(u)).run();
  }
  void run_part(u32 u, u32 index) const noexcept {
    const AttendUnit& unit = units_[u];
    const u32 first = index * task_blocks_;
    AttendFew few(context_, segment_of(u), first_row_of(u), rows_of(u));
    few.run(unit.blocks, first, std::min(first + task_blocks_, unit.blocks.count));
    few.store(part_of(u, index));
  }
  [[nodiscard]] BlockPart part_of(u32 u, u32 index) const noexcept {
    const std::size_t first = std::size_t{index} * rows_of(u);
    return {units_[u].parts.softmax + first,
            units_[u].parts.sums + first * context_.cache.values.width};
  }
  /// Merges the parts of a unit in the order of the tree, and writes its output.
  void merge_parts_of(u32 u) const noexcept {
    const u32 rows = rows_of(u);
    const u32 count = units_[u].tasks;
    for (u32 step = 1; step < count; step *= 2) {
      for (u32 i = 0; i + step < count; i += 2 * step) {
        AttendFew::merge(context_, rows, part_of(u, i), part_of(u, i + step));
      }
    }
    const BlockPart all = part_of(u, 0);
    for (u32 r = 0; r < rows; ++r) {
      context_.write(segment_of(u), first_row_of(u) + r, all.softmax[r],
                     all.sums + std::size_t{r} * context_.cache.values.width);
    }
  }

  const AttendContext& context_;
  const Executor& executor_;
  u32 step_;
  u64 tiles_;
  AttendUnit* units_ = nullptr;
  u32 task_blocks_ = 1;
  u32 tasks_ = 0;
};

}  // namespace detail
KVLEAN_NAMESPACE_END
