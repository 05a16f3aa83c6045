// Who carries out the pieces: a pool of threads (always there) or an io_uring (where the kernel lets us).
#pragma once

#include <condition_variable>
#include <cstddef>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "io/ticket.h"

namespace zinf::io {

// Requests in order of arrival, cut into pieces as they are taken: a request of 1 GB costs one entry, not a thousand.
// Reads and writes wait in two lines, and the line with less in flight is served first: a drive does both at once,
// and a long write must not stand before a read that somebody waits for.
class PieceQueue {
public:
  explicit PieceQueue(size_t block_bytes) : block_bytes_(block_bytes) {}

  void push(std::shared_ptr<Ticket> ticket);
  // Puts a piece back (for another backend to carry out); it goes before all requests.
  void push(Piece piece);
  // Blocks until there is work; an empty piece once stop() was called and nothing is left.
  Piece pop();
  // An empty piece when there is no work now.
  Piece try_pop();
  // Tells that a popped piece is done with.
  void finished(Op op);
  void stop();

private:
  Piece take(); // under the lock

  const size_t block_bytes_;
  std::mutex mutex_;
  std::condition_variable work_;
  std::deque<Piece> pieces_;
  std::deque<std::shared_ptr<Ticket>> tickets_[2];
  size_t in_flight_[2] = {0, 0};
  bool stopped_ = false;
};

class Backend {
public:
  virtual ~Backend() = default; // with no work pending; joins its threads
  virtual void submit(std::shared_ptr<Ticket> ticket) = 0;
};

// Blocking pread and pwrite. Takes every piece there is: unaligned, buffered, retried.
class ThreadBackend final : public Backend {
public:
  ThreadBackend(size_t threads, size_t block_bytes);
  ~ThreadBackend() override;
  void submit(std::shared_ptr<Ticket> ticket) override;
  void submit(Piece piece);

private:
  void start(); // threads come with the first work
  void run();

  const size_t num_threads_;
  PieceQueue queue_;
  std::once_flag started_;
  std::vector<std::thread> threads_;
};

// Null, with the reason in one line, where this kernel or its policy offers no io_uring. `threads` are for what the
// ring does not do; they start when there is such work.
std::unique_ptr<Backend> make_uring_backend(size_t threads, size_t queue_depth, size_t block_bytes,
                                            std::string *reason);

// Starts a thread that no signal is delivered to: they are the main thread's.
std::thread start_quiet_thread(void (*body)(void *), void *argument);

} // namespace zinf::io
