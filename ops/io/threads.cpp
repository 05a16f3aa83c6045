#include "io/backend.h"

#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <fcntl.h>
#include <pthread.h>
#include <system_error>
#include <unistd.h>

#include "io/posix.h"

namespace zinf::io {

namespace {

// Aligned memory of one worker for transfers whose own memory is not aligned as O_DIRECT wants it.
class Bounce {
public:
  ~Bounce() { std::free(data_); }

  char *get(size_t size, size_t alignment) {
    if (size > size_ || alignment > alignment_) {
      std::free(data_);
      data_ = nullptr;
      size_ = alignment_ = 0;
      if (::posix_memalign(&data_, std::max<size_t>(alignment, 4096), size) != 0) return nullptr;
      size_ = size;
      alignment_ = alignment;
    }
    return static_cast<char *>(data_);
  }

private:
  void *data_ = nullptr;
  size_t size_ = 0;
  size_t alignment_ = 0;
};

bool is_aligned(const void *data, size_t alignment) { return reinterpret_cast<uintptr_t>(data) % alignment == 0; }

// One transfer, possibly short; -1 with errno.
ssize_t transfer(Op op, int fd, char *data, size_t length, uint64_t offset) {
  const off_t at = static_cast<off_t>(offset);
  return op == Op::kRead ? posix().pread(fd, data, length, at) : posix().pwrite(fd, data, length, at);
}

ssize_t transfer_direct(Op op, const File &file, char *data, size_t length, uint64_t offset, Bounce &bounce) {
  if (is_aligned(data, file.memory_alignment())) return transfer(op, file.direct_fd(), data, length, offset);
  char *aligned = bounce.get(length, file.memory_alignment());
  if (aligned == nullptr) {
    errno = ENOMEM;
    return -1;
  }
  if (op == Op::kWrite) std::memcpy(aligned, data, length);
  const ssize_t count = transfer(op, file.direct_fd(), aligned, length, offset);
  if (op == Op::kRead && count > 0) std::memcpy(data, aligned, static_cast<size_t>(count));
  return count;
}

// How much of the rest one call may take, and whether directly: see Note [Direct and buffered, one file].
size_t next_stretch(const File &file, uint64_t offset, size_t left, bool *direct) {
  const size_t block = file.block();
  *direct = file.direct() && offset % block == 0 && left >= block;
  if (*direct) return left - left % block;
  return file.direct() ? std::min<uint64_t>(left, block - offset % block) : left;
}

// Where the page cache takes everything, it must not take all memory: write out and forget what was transferred.
void drop_cached(const File &file, uint64_t offset, size_t length) {
#ifdef __linux__
  ::posix_fadvise(file.buffered_fd(), static_cast<off_t>(offset), static_cast<off_t>(length), POSIX_FADV_DONTNEED);
#else
  (void)file, (void)offset, (void)length;
#endif
}

std::optional<Error> execute(const Piece &piece, Bounce &bounce) {
  File &file = piece.ticket->file();
  const Op op = piece.ticket->op();
  uint64_t offset = piece.offset;
  char *data = piece.data;
  size_t left = piece.length;
  while (left > 0) {
    bool direct;
    const size_t length = next_stretch(file, offset, left, &direct);
    const ssize_t count = direct ? transfer_direct(op, file, data, length, offset, bounce)
                                 : transfer(op, file.buffered_fd(), data, length, offset);
    if (count < 0) {
      const int code = errno;
      if (code == EINTR) continue;
      if (code == EAGAIN) {
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
        continue;
      }
      if (code == EINVAL && direct) {
        file.lose_direct();
        continue;
      }
      return io_error(code, op, file.path(), offset, left);
    }
    if (count == 0) {
      if (op == Op::kRead) return io_error(kPastTheEnd, op, file.path(), offset, left, "past the end of the file");
      return io_error(EIO, op, file.path(), offset, left, "the system wrote nothing");
    }
    offset += static_cast<uint64_t>(count);
    data += count;
    left -= static_cast<size_t>(count);
  }
  if (!file.direct() && !file.ram_backed()) drop_cached(file, piece.offset, piece.length);
  return std::nullopt;
}

} // namespace

std::thread start_quiet_thread(void (*body)(void *), void *argument) {
  sigset_t all, before;
  sigfillset(&all);
  ::pthread_sigmask(SIG_SETMASK, &all, &before);
  std::thread thread;
  try {
    thread = std::thread(body, argument);
  } catch (...) {
    ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
    throw;
  }
  ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
#ifdef __linux__
  ::pthread_setname_np(thread.native_handle(), "zinf-io");
#endif
  return thread;
}

ThreadBackend::ThreadBackend(size_t threads, size_t block_bytes) : num_threads_(threads), queue_(block_bytes) {}

ThreadBackend::~ThreadBackend() {
  queue_.stop();
  for (std::thread &thread : threads_) thread.join();
}

void ThreadBackend::start() {
  std::call_once(started_, [this] {
    threads_.reserve(num_threads_);
    for (size_t i = 0; i < num_threads_; ++i) {
      try {
        threads_.push_back(start_quiet_thread([](void *self) { static_cast<ThreadBackend *>(self)->run(); }, this));
      } catch (const std::system_error &) {
        if (threads_.empty()) throw; // with one at least, all gets done
        return;
      }
    }
  });
}

void ThreadBackend::submit(std::shared_ptr<Ticket> ticket) {
  start();
  queue_.push(std::move(ticket));
}

void ThreadBackend::submit(Piece piece) {
  start();
  queue_.push(std::move(piece));
}

void ThreadBackend::run() {
  Bounce bounce;
  while (Piece piece = queue_.pop()) {
    const Op op = piece.ticket->op();
    std::optional<Error> error = execute(piece, bounce);
    queue_.finished(op);
    piece.ticket->finish_piece(piece.length, std::move(error));
  }
}

} // namespace zinf::io
