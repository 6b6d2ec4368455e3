// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#include "bench/eval/progress.hpp"

#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <utility>

namespace kvlean::eval {
namespace {

constexpr double bar_pause = 0.1;    // seconds between two drawings
constexpr double line_pause = 30.0;  // seconds between two plain lines

std::size_t columns_of(std::FILE* stream) {
  winsize size{};
  if (ioctl(fileno(stream), TIOCGWINSZ, &size) == 0 && size.ws_col > 20) return size.ws_col;
  return 80;
}

}  // namespace

std::string clock_text(double seconds) {
  if (!(seconds >= 0.0) || seconds > 1e8) return "?";
  const long whole = std::lround(seconds);
  char text[48];
  if (whole >= 3600) {
    std::snprintf(text, sizeof text, "%ld:%02ld:%02ld", whole / 3600, whole / 60 % 60, whole % 60);
  } else {
    std::snprintf(text, sizeof text, "%ld:%02ld", whole / 60, whole % 60);
  }
  return text;
}

Progress::Progress(std::string label, std::size_t total, Style style, std::FILE* stream)
    : label_(std::move(label)),
      total_(total),
      style_(style),
      stream_(stream),
      start_(Clock::now()),
      drawn_(start_) {
  if (style_ == Style::automatic) {
    const char* terminal = std::getenv("TERM");
    const bool plain = terminal != nullptr && std::string_view(terminal) == "dumb";
    style_ = isatty(fileno(stream_)) != 0 && !plain ? Style::bar : Style::lines;
  }
  if (style_ == Style::bar) draw(false);
}

Progress::~Progress() { finish(); }

double Progress::seconds() const {
  return std::chrono::duration<double>(Clock::now() - start_).count();
}

void Progress::note(std::string_view text) {
  note_ = text;
  if (style_ == Style::bar) draw(false);
}

void Progress::advance(std::size_t steps) {
  done_ += steps;
  draw(false);
}

void Progress::skip(std::size_t steps) {
  done_ += steps;
  skipped_ += steps;
  draw(false);
}

void Progress::say(std::string_view line) {
  if (style_ == Style::quiet) return;
  if (style_ == Style::bar && !finished_) std::fprintf(stream_, "\r\x1b[K");
  std::fprintf(stream_, "%.*s\n", static_cast<int>(line.size()), line.data());
  if (style_ == Style::bar && !finished_) {
    drawn_once_ = false;
    draw(false);
  }
  std::fflush(stream_);
}

void Progress::finish() {
  if (finished_) return;
  draw(true);
  finished_ = true;
}

void Progress::draw(bool last) {
  if (finished_ || style_ == Style::quiet) return;
  const Clock::time_point now = Clock::now();
  const double pause = style_ == Style::bar ? bar_pause : line_pause;
  const bool due = std::chrono::duration<double>(now - drawn_).count() >= pause ||
                   (style_ == Style::bar && !drawn_once_);
  if (!last && !due) return;
  drawn_ = now;
  drawn_once_ = true;

  const double elapsed = seconds();
  const std::size_t worked = done_ - skipped_;
  std::string text =
      std::to_string(done_) + "/" + std::to_string(total_) + ", " + clock_text(elapsed);
  if (!last && worked > 0 && done_ < total_) {
    const double each = elapsed / static_cast<double>(worked);
    text += ", " + clock_text(each * static_cast<double>(total_ - done_)) + " left";
  }
  if (!note_.empty() && !last) text += "  " + note_;
  if (style_ == Style::lines) {
    std::fprintf(stream_, "%s: %s\n", label_.c_str(), text.c_str());
    std::fflush(stream_);
    return;
  }
  constexpr std::size_t bar_width = 24;
  const std::size_t filled =
      total_ > 0 ? std::min(bar_width, done_ * bar_width / total_) : bar_width;
  std::string line =
      label_ + " [" + std::string(filled, '#') + std::string(bar_width - filled, '.') + "] " + text;
  const std::size_t columns = columns_of(stream_) - 1;
  if (line.size() > columns) line.resize(columns);
  std::fprintf(stream_, "\r%s\x1b[K%s", line.c_str(), last ? "\n" : "");
  std::fflush(stream_);
}

}  // namespace kvlean::eval
