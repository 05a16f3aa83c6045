#include "io/ticket.h"

#include <algorithm>

#include "io/posix.h"

namespace zinf::io {

Ticket::Ticket(Op op, std::shared_ptr<File> file, uint64_t offset, void *data, size_t length,
               std::shared_ptr<Ledger> ledger)
    : op_(op), file_(std::move(file)), offset_(offset), data_(static_cast<char *>(data)), length_(length),
      ledger_(std::move(ledger)), submitted_(std::chrono::steady_clock::now()), generation_(fork_generation()),
      remaining_(length) {}

Piece Ticket::next_piece(size_t block_bytes) {
  if (exhausted()) return {};
  const uint64_t start = offset_ + given_;
  const size_t left = length_ - given_;
  const size_t block = file_->block();
  const size_t piece_bytes = (block_bytes + block - 1) / block * block;
  size_t length = std::min<uint64_t>(left, piece_bytes - start % piece_bytes);
  // Partial blocks become pieces of their own, so that a piece is either wholly direct or wholly buffered.
  if (start % block != 0) {
    length = std::min<uint64_t>(length, block - start % block);
  } else if (length > block) {
    length -= length % block;
  }
  Piece piece{shared_from_this(), start, data_ + given_, length};
  given_ += length;
  return piece;
}

void Ticket::finish_piece(size_t length, std::optional<Error> error) {
  if (error) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!error_) error_ = std::move(error);
  }
  if (remaining_.fetch_sub(length, std::memory_order_acq_rel) == length) complete();
}

void Ticket::complete() {
  // Leave before telling: who has waited finds the file and the engine without this request.
  file_->leave();
  if (!error_) ledger_->bytes[static_cast<size_t>(op_)].fetch_add(length_, std::memory_order_relaxed);
  {
    std::lock_guard<std::mutex> lock(ledger_->mutex);
    if (--ledger_->pending == 0) ledger_->idle.notify_all();
  }
  std::lock_guard<std::mutex> lock(mutex_);
  finished_ = std::chrono::steady_clock::now();
  done_.store(true, std::memory_order_release);
  completed_.notify_all();
}

bool Ticket::wait_for(std::chrono::nanoseconds timeout) const {
  if (done()) return true;
  if (generation_ != fork_generation()) {
    throw UsageError("this ticket was made before a fork and belongs to the parent process: " + file_->path());
  }
  std::unique_lock<std::mutex> lock(mutex_);
  return completed_.wait_for(lock, timeout, [this] { return done(); });
}

size_t Ticket::result() const {
  std::lock_guard<std::mutex> lock(mutex_);
  if (error_) throw IoException(*error_);
  return length_;
}

int64_t Ticket::elapsed_ns() const {
  const auto end = done() ? finished_ : std::chrono::steady_clock::now();
  return std::chrono::duration_cast<std::chrono::nanoseconds>(end - submitted_).count();
}

} // namespace zinf::io
