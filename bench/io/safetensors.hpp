// Reads and writes safetensors files.
//
// The format: eight bytes with the length of the header (little-endian), the header (a JSON object
// that gives every tensor its dtype, shape and byte range, and may hold a map of strings called
// `__metadata__`), then the bytes of all tensors without gaps. Everything is checked before it is
// used. Nothing here throws on bad data: functions return a `Result` or a `Outcome` that carries
// one line of text saying what is wrong and where.
#pragma once

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <limits>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

namespace kvlean::io {

static_assert(std::endian::native == std::endian::little, "safetensors data is little-endian");

/// Success, or one line of text that says what went wrong. True when ok.
struct [[nodiscard]] Outcome {
  std::string error;  ///< empty when ok

  explicit operator bool() const { return error.empty(); }
};

/// A value, or one line of text that says why there is none. True when there is a value; reading
/// the value of a failed result is undefined.
template <class T>
struct [[nodiscard]] Result {
  std::optional<T> value;
  std::string error;  ///< empty when there is a value

  explicit operator bool() const { return value.has_value(); }
  T& operator*() { return *value; }
  const T& operator*() const { return *value; }
  T* operator->() { return &*value; }
  const T* operator->() const { return &*value; }

  static Result success(T v) { return Result{std::move(v), {}}; }
  static Result failure(std::string why) { return Result{std::nullopt, std::move(why)}; }
};

/// Element types this reader and writer know.
enum class DType { f32, f16, bf16, i32, i64, u8 };

/// The name a safetensors header uses, such as "BF16".
inline std::string_view dtype_name(DType dtype) {
  switch (dtype) {
    case DType::f32:
      return "F32";
    case DType::f16:
      return "F16";
    case DType::bf16:
      return "BF16";
    case DType::i32:
      return "I32";
    case DType::i64:
      return "I64";
    case DType::u8:
      return "U8";
  }
  return "?";
}

/// Bytes of one element.
inline std::size_t dtype_bytes(DType dtype) {
  switch (dtype) {
    case DType::i64:
      return 8;
    case DType::f32:
    case DType::i32:
      return 4;
    case DType::f16:
    case DType::bf16:
      return 2;
    case DType::u8:
      return 1;
  }
  return 1;
}

/// The dtype of a header name; empty if it is not one of those above.
inline std::optional<DType> dtype_from_name(std::string_view name) {
  for (const DType dtype :
       {DType::f32, DType::f16, DType::bf16, DType::i32, DType::i64, DType::u8}) {
    if (dtype_name(dtype) == name) return dtype;
  }
  return std::nullopt;
}

/// Bytes of a dense tensor; empty if the product does not fit into std::size_t.
inline std::optional<std::size_t> tensor_bytes(DType dtype, std::span<const std::size_t> shape) {
  std::size_t bytes = dtype_bytes(dtype);
  for (const std::size_t extent : shape) {
    if (extent != 0 && bytes > std::numeric_limits<std::size_t>::max() / extent) {
      return std::nullopt;
    }
    bytes *= extent;
  }
  return bytes;
}

/// A dense, row-major tensor that owns its bytes. The storage is aligned for every dtype, so
/// `bytes.data()` may be read as an array of elements.
struct Tensor {
  DType dtype = DType::f32;
  std::vector<std::size_t> shape;
  std::vector<std::byte> bytes;
};

/// A named tensor whose bytes belong to the caller: what the writer takes.
struct TensorView {
  std::string name;
  DType dtype = DType::f32;
  std::vector<std::size_t> shape;
  std::span<const std::byte> bytes;
};

/// Where a tensor lies in a file: what the reader found in the header.
struct TensorInfo {
  DType dtype = DType::f32;
  std::vector<std::size_t> shape;
  std::size_t begin = 0;  ///< first byte, counted from the end of the header
  std::size_t end = 0;    ///< one past the last byte
};

using Metadata = std::map<std::string, std::string>;

namespace detail {

struct FileCloser {
  void operator()(std::FILE* file) const {
    if (file != nullptr) static_cast<void>(std::fclose(file));
  }
};
using FileHandle = std::unique_ptr<std::FILE, FileCloser>;

inline std::string errno_text(int code) {
  return std::error_code(code, std::generic_category()).message();
}

/// Text for an error line: control characters replaced, long strings cut.
inline std::string printable(std::string_view text, std::size_t longest = 80) {
  std::string result(text.substr(0, longest));
  for (char& c : result) {
    if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) c = '?';
  }
  if (text.size() > longest) result += "...";
  return result;
}

}  // namespace detail

/// An open safetensors file: the header is checked and in memory, tensors are read on demand.
class SafetensorsFile {
 public:
  /// Opens a file and checks the whole header against the file's size. Error lines begin with the
  /// path. Refused are: a file that cannot be read, one that is too short, a header that is not
  /// the JSON the format asks for, unknown dtypes, byte ranges that do not fit the shape, overlap,
  /// leave gaps or lie outside the file (a truncated file), and duplicate names.
  static Result<SafetensorsFile> open(const std::string& path) {
    using R = Result<SafetensorsFile>;
    const std::string shown = detail::printable(path, 1000);
    const auto fail = [&](const std::string& why) { return R::failure(shown + ": " + why); };

    SafetensorsFile file;
    file.path_ = shown;
    file.handle_.reset(std::fopen(path.c_str(), "rbe"));
    if (!file.handle_) return fail("cannot open: " + detail::errno_text(errno));
    struct stat info = {};
    if (fstat(fileno(file.handle_.get()), &info) != 0) {
      return fail("cannot read: " + detail::errno_text(errno));
    }
    if (!S_ISREG(info.st_mode)) return fail("not a regular file");
    const auto file_bytes = static_cast<std::uint64_t>(info.st_size);

    std::array<unsigned char, 8> prefix = {};
    if (file_bytes < prefix.size()) return fail("not a safetensors file: shorter than 8 bytes");
    if (std::fread(prefix.data(), 1, prefix.size(), file.handle_.get()) != prefix.size()) {
      return fail("cannot read the header length");
    }
    std::uint64_t header_bytes = 0;
    std::memcpy(&header_bytes, prefix.data(), prefix.size());
    constexpr std::uint64_t longest_header = 100'000'000;  // the limit of the format
    if (header_bytes < 2 || header_bytes > longest_header) {
      return fail("not a safetensors file: the header length is not plausible");
    }
    if (header_bytes > file_bytes - prefix.size()) {
      return fail("not a safetensors file, or truncated: the header is longer than the file");
    }
    std::string header(static_cast<std::size_t>(header_bytes), '\0');
    if (std::fread(header.data(), 1, header.size(), file.handle_.get()) != header.size()) {
      return fail("cannot read the header");
    }
    file.data_offset_ = prefix.size() + header_bytes;
    if (const std::string why = file.parse_header(header, file_bytes - file.data_offset_);
        !why.empty()) {
      return fail(why);
    }
    return R::success(std::move(file));
  }

  /// The path, as shown in error lines.
  const std::string& path() const { return path_; }

  /// All tensors of the file, by name.
  const std::map<std::string, TensorInfo>& tensors() const { return tensors_; }

  /// The strings of `__metadata__`; empty if the file has none.
  const Metadata& metadata() const { return metadata_; }

  /// The tensor of that name, or nullptr.
  const TensorInfo* find(const std::string& name) const {
    const auto found = tensors_.find(name);
    return found == tensors_.end() ? nullptr : &found->second;
  }

  /// Reads one tensor. Fails if the file has no tensor of that name or reading fails.
  Result<Tensor> read(const std::string& name) const {
    const auto fail = [&](const std::string& why) {
      return Result<Tensor>::failure(path_ + ": " + why);
    };
    const TensorInfo* info = find(name);
    if (info == nullptr) return fail("has no tensor '" + detail::printable(name) + "'");
    Tensor tensor{info->dtype, info->shape, {}};
    tensor.bytes.resize(info->end - info->begin);
    if (tensor.bytes.empty()) return Result<Tensor>::success(std::move(tensor));
    if (fseeko(handle_.get(), static_cast<off_t>(data_offset_ + info->begin), SEEK_SET) != 0 ||
        std::fread(tensor.bytes.data(), 1, tensor.bytes.size(), handle_.get()) !=
            tensor.bytes.size()) {
      return fail("cannot read tensor '" + detail::printable(name) + "'");
    }
    return Result<Tensor>::success(std::move(tensor));
  }

 private:
  using Json = nlohmann::json;

  /// Fills `tensors_` and `metadata_`; returns what is wrong, or nothing.
  std::string parse_header(const std::string& header, std::uint64_t data_bytes) {
    if (header.front() != '{') return "not a safetensors file: the header is not a JSON object";
    std::set<std::string> seen;
    std::string duplicate;
    const auto on_event = [&](int depth, Json::parse_event_t event, Json& parsed) {
      if (event == Json::parse_event_t::key && depth == 1) {
        const auto& name = parsed.get_ref<const std::string&>();
        if (!seen.insert(name).second && duplicate.empty()) duplicate = name;
      }
      return true;
    };
    const Json json = Json::parse(header, on_event, /*allow_exceptions=*/false);
    if (json.is_discarded() || !json.is_object()) {
      return "not a safetensors file: the header is not a JSON object";
    }
    if (!duplicate.empty()) {
      return "tensor '" + detail::printable(duplicate) + "' is listed more than once";
    }
    for (const auto& [name, entry] : json.items()) {
      const std::string why =
          name == "__metadata__" ? parse_metadata(entry) : parse_tensor(name, entry, data_bytes);
      if (!why.empty()) return why;
    }
    return check_ranges(data_bytes);
  }

  std::string parse_metadata(const Json& entry) {
    if (!entry.is_object()) return "the metadata is not a JSON object";
    for (const auto& [key, value] : entry.items()) {
      if (!value.is_string()) return "metadata '" + detail::printable(key) + "' is not a string";
      metadata_[key] = value.get_ref<const std::string&>();
    }
    return {};
  }

  std::string parse_tensor(const std::string& name, const Json& entry, std::uint64_t data_bytes) {
    const std::string where = "tensor '" + detail::printable(name) + "'";
    if (!entry.is_object()) return where + " is not described by a JSON object";
    const auto dtype = entry.find("dtype");
    const auto shape = entry.find("shape");
    const auto offsets = entry.find("data_offsets");
    if (dtype == entry.end() || !dtype->is_string()) return where + " has no dtype";
    if (shape == entry.end() || !shape->is_array()) return where + " has no shape";
    if (offsets == entry.end() || !offsets->is_array() || offsets->size() != 2 ||
        !(*offsets)[0].is_number_unsigned() || !(*offsets)[1].is_number_unsigned()) {
      return where + " has no valid data_offsets";
    }
    TensorInfo info;
    const auto& dtype_text = dtype->get_ref<const std::string&>();
    const std::optional<DType> known = dtype_from_name(dtype_text);
    if (!known) return where + " has unsupported dtype '" + detail::printable(dtype_text) + "'";
    info.dtype = *known;
    for (const Json& extent : *shape) {
      if (!extent.is_number_unsigned()) return where + " has a shape that is not a list of sizes";
      info.shape.push_back(extent.get<std::size_t>());
    }
    const auto begin = (*offsets)[0].get<std::uint64_t>();
    const auto end = (*offsets)[1].get<std::uint64_t>();
    if (begin > end) return where + " has data_offsets that run backwards";
    const std::optional<std::size_t> expected = tensor_bytes(info.dtype, info.shape);
    if (!expected) return where + " has a shape too large to address";
    if (end - begin != *expected) {
      return where + " has a shape of " + std::to_string(*expected) +
             " bytes but data_offsets of " + std::to_string(end - begin) + " bytes";
    }
    if (end > data_bytes) {
      return "truncated: " + where + " ends at byte " + std::to_string(end) +
             " of the data, which has " + std::to_string(data_bytes);
    }
    info.begin = static_cast<std::size_t>(begin);
    info.end = static_cast<std::size_t>(end);
    tensors_.emplace(name, std::move(info));
    return {};
  }

  /// The format wants every byte of the data to belong to exactly one tensor.
  std::string check_ranges(std::uint64_t data_bytes) const {
    std::vector<std::pair<std::size_t, std::size_t>> ranges;
    ranges.reserve(tensors_.size());
    for (const auto& [name, info] : tensors_) ranges.emplace_back(info.begin, info.end);
    std::sort(ranges.begin(), ranges.end());
    std::size_t position = 0;
    for (const auto& [begin, end] : ranges) {
      if (begin < position) return "two tensors overlap";
      if (begin > position) return "there is a gap between two tensors";
      position = end;
    }
    if (position != data_bytes) {
      return "there are " + std::to_string(data_bytes - position) + " bytes after the last tensor";
    }
    return {};
  }

  std::string path_;
  detail::FileHandle handle_;
  std::uint64_t data_offset_ = 0;
  std::map<std::string, TensorInfo> tensors_;
  Metadata metadata_;
};

namespace detail {

/// A file that appears under its name only when complete. Regular files are written to a temporary
/// file beside the target and renamed; anything else that exists (a device, a pipe) is written to
/// directly and never removed. An unfinished temporary file is removed.
class OutputFile {
 public:
  OutputFile() = default;
  OutputFile(const OutputFile&) = delete;
  OutputFile& operator=(const OutputFile&) = delete;
  ~OutputFile() { discard(); }

  /// Returns what is wrong, or nothing.
  std::string open(const std::string& path) {
    namespace fs = std::filesystem;
    std::error_code code;
    const fs::file_status status = fs::status(path, code);
    if (fs::is_directory(status)) return "is a directory";
    target_ = path;
    if (fs::exists(status) && !fs::is_regular_file(status)) {
      handle_.reset(std::fopen(path.c_str(), "wbe"));
      return handle_ ? std::string() : "cannot write: " + errno_text(errno);
    }
    // Follow a symbolic link, so that the file it names is replaced and not the link.
    if (fs::exists(status)) {
      if (const fs::path real = fs::canonical(path, code); !code) target_ = real.string();
    }
    temporary_ = target_ + ".partial-" + std::to_string(getpid());
    const int descriptor =
        ::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    if (descriptor < 0) {
      temporary_.clear();
      return "cannot write: " + errno_text(errno);
    }
    handle_.reset(fdopen(descriptor, "wb"));
    if (!handle_) {
      const int reason = errno;
      static_cast<void>(::close(descriptor));
      return "cannot write: " + errno_text(reason);
    }
    return {};
  }

  std::string write(std::span<const std::byte> bytes) {
    if (bytes.empty()) return {};
    if (std::fwrite(bytes.data(), 1, bytes.size(), handle_.get()) == bytes.size()) return {};
    return "cannot write: " + errno_text(errno);
  }

  /// Flushes, closes and renames. Nothing is left behind on failure.
  std::string commit() {
    if (std::fflush(handle_.get()) != 0) return "cannot write: " + errno_text(errno);
    if (!temporary_.empty() && fsync(fileno(handle_.get())) != 0) {
      return "cannot write: " + errno_text(errno);
    }
    if (std::fclose(handle_.release()) != 0) return "cannot write: " + errno_text(errno);
    if (temporary_.empty()) return {};
    if (std::rename(temporary_.c_str(), target_.c_str()) != 0) {
      return "cannot rename the finished file: " + errno_text(errno);
    }
    temporary_.clear();
    return {};
  }

  void discard() {
    handle_.reset();
    if (!temporary_.empty()) static_cast<void>(std::remove(temporary_.c_str()));
    temporary_.clear();
  }

 private:
  std::string target_;
  std::string temporary_;  ///< empty when the target is written to directly
  FileHandle handle_;
};

}  // namespace detail

/// Says early whether `save_safetensors(path, ...)` can create its file: a missing folder, a
/// folder without write permission, a directory in the place of the file. Changes nothing.
inline Outcome check_writable(const std::string& path) {
  detail::OutputFile output;
  if (const std::string why = output.open(path); !why.empty()) {
    return Outcome{detail::printable(path, 1000) + ": " + why};
  }
  return Outcome{};
}

/// Writes a safetensors file. Tensors are stored widest element first, otherwise in the given
/// order, so that every tensor is aligned. The file appears under its name only when it is
/// complete; on failure (a full disk, say) nothing is left behind and an earlier file of that name
/// is as it was. Fails also if a view's bytes do not fit its shape or a name is used twice.
/// Strings that are not UTF-8 are stored with replacement characters.
inline Outcome save_safetensors(const std::string& path, std::span<const TensorView> tensors,
                                const Metadata& metadata) {
  using Json = nlohmann::ordered_json;
  const std::string shown = detail::printable(path, 1000);
  const auto fail = [&](const std::string& why) { return Outcome{shown + ": " + why}; };

  std::vector<const TensorView*> order;
  order.reserve(tensors.size());
  for (const TensorView& tensor : tensors) order.push_back(&tensor);
  std::stable_sort(order.begin(), order.end(), [](const TensorView* a, const TensorView* b) {
    return dtype_bytes(a->dtype) > dtype_bytes(b->dtype);
  });

  Json header = Json::object();
  if (!metadata.empty()) header["__metadata__"] = metadata;
  std::size_t position = 0;
  for (const TensorView* tensor : order) {
    const std::string where = "tensor '" + detail::printable(tensor->name) + "'";
    if (tensor_bytes(tensor->dtype, tensor->shape) != tensor->bytes.size()) {
      return fail(where + " has bytes that do not fit its shape");
    }
    if (header.contains(tensor->name)) return fail(where + " is listed more than once");
    const std::size_t end = position + tensor->bytes.size();
    header[tensor->name] = {{"dtype", std::string(dtype_name(tensor->dtype))},
                            {"shape", tensor->shape},
                            {"data_offsets", {position, end}}};
    position = end;
  }
  std::string text = header.dump(-1, ' ', false, Json::error_handler_t::replace);
  text.resize((text.size() + 7) / 8 * 8, ' ');  // the data then starts at a multiple of 8
  const auto header_bytes = static_cast<std::uint64_t>(text.size());

  detail::OutputFile output;
  std::string why = output.open(path);
  if (why.empty()) why = output.write(std::as_bytes(std::span(&header_bytes, 1)));
  if (why.empty()) why = output.write(std::as_bytes(std::span(text)));
  for (const TensorView* tensor : order) {
    if (why.empty()) why = output.write(tensor->bytes);
  }
  if (why.empty()) why = output.commit();
  return why.empty() ? Outcome{} : fail(why);
}

}  // namespace kvlean::io
