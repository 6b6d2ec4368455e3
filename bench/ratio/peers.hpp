// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
// The torch forms of bench/peers, in a Python process that lives beside this one and is told over
// pipes to run one form once: so a peer takes its turn in every round like everything else.
#pragma once

#include <cstddef>
#include <kvlean/core/dtype.hpp>
#include <string>
#include <vector>

namespace kvlean::ratio {

/// An array handed to the peer, and its shape.
struct PeerArray {
  std::string name;
  const void* data = nullptr;
  DType dtype = DType::f32;
  std::vector<std::size_t> shape;
};

/// A number that the form needs.
struct PeerNumber {
  std::string name;
  double value = 0.0;
};

class Peers {
 public:
  /// Starts `python script`, which may use `cpus`. Throws std::runtime_error with one line.
  Peers(const std::string& python, const std::string& script, const std::vector<int>& cpus,
        u32 threads);
  Peers(const Peers&) = delete;
  Peers& operator=(const Peers&) = delete;
  ~Peers();

  [[nodiscard]] const std::string& version() const { return version_; }
  [[nodiscard]] int process() const { return process_; }

  /// Gives a form its data and runs it once to warm up.
  void load(const std::string& form, const std::vector<PeerArray>& arrays,
            const std::vector<PeerNumber>& numbers);
  /// Runs the loaded form once; seconds as the peer measured them.
  [[nodiscard]] double run();
  /// What the form computed last, as floats.
  [[nodiscard]] std::vector<float> result();
  /// Frees the form's data.
  void unload();

 private:
  [[nodiscard]] std::string ask(const std::string& line);
  void stop();

  std::string folder_;
  std::string version_;
  int process_ = 0;
  int to_peer_ = -1;
  int from_peer_ = -1;
  std::string pending_;
};

}  // namespace kvlean::ratio
