// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdio>
#include <string>
#include <string_view>

namespace kvlean::eval {

/// A progress bar on stderr if that is a terminal; else a plain line now and then. Not for use by
/// several threads at once.
class Progress {
 public:
  enum class Style { automatic, bar, lines, quiet };

  /// `total` steps. Work that a resumed run skips is reported by skip(), and does not count for the
  /// estimate of the time that remains.
  Progress(std::string label, std::size_t total, Style style = Style::automatic,
           std::FILE* stream = stderr);
  ~Progress();  ///< as finish()
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  /// What is being worked on, shown behind the bar.
  void note(std::string_view text);
  void advance(std::size_t steps = 1);
  void skip(std::size_t steps = 1);
  /// Prints a line of its own above the bar.
  void say(std::string_view line);
  /// Draws the last state and ends the line. Later calls do nothing.
  void finish();

  [[nodiscard]] std::size_t done() const { return done_; }
  [[nodiscard]] double seconds() const;  ///< since the start

 private:
  using Clock = std::chrono::steady_clock;
  void draw(bool last);

  std::string label_;
  std::string note_;
  std::size_t total_;
  std::size_t done_ = 0;
  std::size_t skipped_ = 0;
  Style style_;
  std::FILE* stream_;
  Clock::time_point start_;
  Clock::time_point drawn_;
  bool drawn_once_ = false;
  bool finished_ = false;
};

/// "2:05", "1:02:33".
[[nodiscard]] std::string clock_text(double seconds);

}  // namespace kvlean::eval
