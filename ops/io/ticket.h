// One request and its outcome, shared by the caller who waits and the workers who carry out its pieces.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>

#include "io/error.h"
#include "io/file.h"

namespace zinf::io {

class Ticket;

// A stretch of a request that one system call can do.
struct Piece {
  std::shared_ptr<Ticket> ticket;
  uint64_t offset = 0; // in the file
  char *data = nullptr;
  size_t length = 0;
  explicit operator bool() const { return ticket != nullptr; }
};

// What a whole engine has done and has yet to do; outlives the engine while tickets are about.
struct Ledger {
  std::mutex mutex;
  std::condition_variable idle;
  uint64_t pending = 0;
  bool closed = false;
  std::atomic<uint64_t> bytes[2] = {};
};

class Ticket : public std::enable_shared_from_this<Ticket> {
public:
  // The file must have been entered; the ticket leaves it at completion.
  Ticket(Op op, std::shared_ptr<File> file, uint64_t offset, void *data, size_t length, std::shared_ptr<Ledger> ledger);

  Op op() const { return op_; }
  File &file() const { return *file_; }
  uint64_t offset() const { return offset_; }
  size_t length() const { return length_; }

  // Cuts the next piece off; an empty one when all are given out. Calls must be serialised (the queue's lock).
  Piece next_piece(size_t block_bytes);
  bool exhausted() const { return given_ == length_; }

  // Called once for every piece, in any order, from any thread.
  void finish_piece(size_t length, std::optional<Error> error);
  // A request of no bytes is done when it is made.
  void finish_empty() { finish_piece(0, std::nullopt); }

  bool done() const { return done_.load(std::memory_order_acquire); }
  // False after `timeout` without completion. Throws UsageError in a forked child, where nothing would ever come.
  bool wait_for(std::chrono::nanoseconds timeout) const;
  // After completion: throws IoException with the first error, or returns the bytes transferred.
  size_t result() const;
  // Submission to completion in nanoseconds; until now while not done.
  int64_t elapsed_ns() const;

private:
  void complete();

  const Op op_;
  std::shared_ptr<File> file_;
  const uint64_t offset_;
  char *const data_;
  const size_t length_;
  const std::shared_ptr<Ledger> ledger_;
  const std::chrono::steady_clock::time_point submitted_;
  const uint64_t generation_;

  size_t given_ = 0;
  std::atomic<size_t> remaining_;
  std::atomic<bool> done_{false};
  std::chrono::steady_clock::time_point finished_;
  mutable std::mutex mutex_;
  mutable std::condition_variable completed_;
  std::optional<Error> error_;
};

} // namespace zinf::io
