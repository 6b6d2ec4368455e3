// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#include "bench/ratio/peers.hpp"

#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <stdexcept>

extern char** environ;

namespace kvlean::ratio {

namespace {

std::string make_folder() {
  const bool shared = std::filesystem::is_directory("/dev/shm");
  std::string name =
      (shared ? std::string("/dev/shm") : std::filesystem::temp_directory_path().string()) +
      "/kvlean-ratio-XXXXXX";
  if (mkdtemp(name.data()) == nullptr) throw std::runtime_error("peers: cannot make a folder");
  return name;
}

}  // namespace

Peers::Peers(const std::string& python, const std::string& script, const std::vector<int>& cpus,
             u32 threads)
    : folder_(make_folder()) {
  int down[2];
  int up[2];
  if (pipe2(down, O_CLOEXEC) != 0 || pipe2(up, O_CLOEXEC) != 0) {
    std::filesystem::remove_all(folder_);
    throw std::runtime_error("peers: cannot make a pipe");
  }
  std::string list;
  for (const int cpu : cpus) {
    if (!list.empty()) list += ',';
    list += std::to_string(cpu);
  }
  const std::string count = std::to_string(threads);
  const char* const arguments[] = {python.c_str(), script.c_str(), "--serve",    "--threads",
                                   count.c_str(),  "--cpus",       list.c_str(), nullptr};
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_adddup2(&actions, down[0], 0);
  posix_spawn_file_actions_adddup2(&actions, up[1], 1);
  pid_t process = 0;
  const int failed = posix_spawnp(&process, python.c_str(), &actions, nullptr,
                                  const_cast<char* const*>(arguments), environ);
  posix_spawn_file_actions_destroy(&actions);
  close(down[0]);
  close(up[1]);
  to_peer_ = down[1];
  from_peer_ = up[0];
  if (failed == 0) process_ = process;
  try {
    if (failed != 0) throw std::runtime_error("peers: cannot start " + python);
    signal(SIGPIPE, SIG_IGN);
    version_ = nlohmann::json::parse(ask("{\"do\":\"hello\"}")).at("version").get<std::string>();
  } catch (const std::exception&) {
    stop();
    throw;
  }
}

Peers::~Peers() { stop(); }

void Peers::stop() {
  close(to_peer_);  // the peer ends at the end of its input
  close(from_peer_);
  if (process_ != 0) waitpid(process_, nullptr, 0);
  process_ = 0;
  std::error_code ignored;
  std::filesystem::remove_all(folder_, ignored);
}

std::string Peers::ask(const std::string& line) {
  const std::string text = line + "\n";
  for (std::size_t at = 0; at < text.size();) {
    const ssize_t written = write(to_peer_, text.data() + at, text.size() - at);
    if (written <= 0) throw std::runtime_error("peers: the Python process ended");
    at += static_cast<std::size_t>(written);
  }
  while (pending_.find('\n') == std::string::npos) {
    char piece[4096];
    const ssize_t got = read(from_peer_, piece, sizeof piece);
    if (got <= 0) throw std::runtime_error("peers: the Python process ended");
    pending_.append(piece, static_cast<std::size_t>(got));
  }
  const std::size_t end = pending_.find('\n');
  const std::string answer = pending_.substr(0, end);
  pending_.erase(0, end + 1);
  const nlohmann::json parsed = nlohmann::json::parse(answer);
  if (parsed.contains("error")) {
    throw std::runtime_error("peers: " + parsed.at("error").get<std::string>());
  }
  return answer;
}

void Peers::load(const std::string& form, const std::vector<PeerArray>& arrays,
                 const std::vector<PeerNumber>& numbers) {
  nlohmann::json request = {{"do", "load"}, {"form", form}};
  for (const PeerArray& array : arrays) {
    std::size_t bytes = size_bytes(array.dtype);
    for (const std::size_t extent : array.shape) bytes *= extent;
    const std::string path = folder_ + "/" + array.name;
    std::ofstream file(path, std::ios::binary);
    file.write(static_cast<const char*>(array.data), static_cast<std::streamsize>(bytes));
    file.close();
    if (!file) throw std::runtime_error("peers: cannot write " + path);
    request["arrays"][array.name] = {
        {"path", path}, {"dtype", name(array.dtype)}, {"shape", array.shape}};
  }
  for (const PeerNumber& number : numbers) request["numbers"][number.name] = number.value;
  static_cast<void>(ask(request.dump()));
  for (const PeerArray& array : arrays) std::filesystem::remove(folder_ + "/" + array.name);
}

double Peers::run() {
  return nlohmann::json::parse(ask("{\"do\":\"run\"}")).at("seconds").get<double>();
}

std::vector<float> Peers::result() {
  const std::string path = folder_ + "/result";
  static_cast<void>(ask(nlohmann::json{{"do", "result"}, {"path", path}}.dump()));
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  std::vector<float> values(static_cast<std::size_t>(file.tellg()) / sizeof(float));
  file.seekg(0);
  file.read(reinterpret_cast<char*>(values.data()),
            static_cast<std::streamsize>(values.size() * sizeof(float)));
  std::filesystem::remove(path);
  return values;
}

void Peers::unload() { static_cast<void>(ask("{\"do\":\"unload\"}")); }

}  // namespace kvlean::ratio
