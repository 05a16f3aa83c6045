// What a failed operation says: enough to find the byte on the disk.
#pragma once

#include <cerrno>
#include <cstdint>
#include <cstring>
#include <exception>
#include <string>
#include <utility>

namespace zinf::io {

enum class Op : uint8_t { kRead = 0, kWrite = 1 };

inline const char *name(Op op) { return op == Op::kRead ? "read" : "write"; }

// A read that meets the end of the file. POSIX has no errno for it; it must never look like a device error.
constexpr int kPastTheEnd = ENODATA;

struct Error {
  int code = 0; // errno
  std::string path;
  std::string message; // strerror, the operation, offset and length
};

inline Error io_error(int code, Op op, const std::string &path, uint64_t offset, uint64_t length,
                      const std::string &detail = "") {
  std::string message = std::strerror(code);
  message += std::string(": ") + name(op) + " at offset " + std::to_string(offset) + ", length " +
             std::to_string(length) + " bytes";
  if (!detail.empty()) message += " (" + detail + ")";
  return {code, path, std::move(message)};
}

inline Error file_error(int code, const char *operation, const std::string &path, const std::string &detail = "") {
  std::string message = std::string(std::strerror(code)) + ": " + operation;
  if (!detail.empty()) message += " (" + detail + ")";
  return {code, path, std::move(message)};
}

// The binding turns it into an OSError; nothing else in io/ throws across threads.
class IoException : public std::exception {
public:
  explicit IoException(Error error) : error_(std::move(error)), what_(error_.message + " [" + error_.path + "]") {}
  const Error &error() const { return error_; }
  const char *what() const noexcept override { return what_.c_str(); }

private:
  Error error_;
  std::string what_;
};

// Use of something closed, or of the wrong kind: the caller's mistake, a ValueError in Python.
class UsageError : public std::exception {
public:
  explicit UsageError(std::string what) : what_(std::move(what)) {}
  const char *what() const noexcept override { return what_.c_str(); }

private:
  std::string what_;
};

} // namespace zinf::io
