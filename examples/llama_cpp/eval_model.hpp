// The model of an evaluation: what file it is, and a copy of it whose arithmetic does not round.
#pragma once

#include <string>

#include "engine.hpp"

namespace kvlean::llama_cpp {

/// SHA-256 of a file, in lower-case hexadecimal. Fails, in one line, if it cannot be read.
[[nodiscard]] Result<std::string> file_sha256(const std::string& path);

/// ${XDG_CACHE_HOME:-$HOME/.cache}/kvlean/models.
[[nodiscard]] std::string models_folder();

/// Whether every tensor of a GGUF file is F32. Fails if it is none.
[[nodiscard]] Result<bool> has_float_weights(const std::string& path);

/// The same model with every weight written out in F32: the values are those of the file, but
/// llama.cpp then computes with float activations. With quantised weights it also rounds
/// activations, to 8 bits, and a difference of one unit in the last place between two ways to
/// compute the same attention grows to percents of a logit within a few layers: differences between
/// policies would drown in it. The copy is made once and kept in models_folder() under the file's
/// SHA-256; the path is returned.
[[nodiscard]] Result<std::string> float_copy(const std::string& path, const std::string& sha256);

}  // namespace kvlean::llama_cpp
