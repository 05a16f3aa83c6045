// Asynchronous reads and writes of any size at any offset: what the offload engine moves its planes with.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "io/backend.h"
#include "io/file.h"
#include "io/ticket.h"

namespace zinf::io {

enum class BackendKind : uint8_t { kAuto, kThreads, kUring };

struct EngineOptions {
  size_t threads = 8;
  size_t queue_depth = 64;
  size_t block_bytes = size_t{1} << 20;
  BackendKind backend = BackendKind::kAuto;
};

class Engine {
public:
  // Throws UsageError on senseless options, and if kUring was demanded and is not to be had.
  explicit Engine(const EngineOptions &options);
  // Drains, then joins. In a forked child it leaves the parent's threads and requests alone.
  ~Engine();
  Engine(const Engine &) = delete;
  Engine &operator=(const Engine &) = delete;

  // `data` must stay valid until the ticket is done. Requests in flight must not overlap if one of them writes.
  // In a forked child the first request starts a new set of threads.
  std::shared_ptr<Ticket> submit(Op op, const std::shared_ptr<File> &file, uint64_t offset, void *data, size_t length);

  // Waits for all requests made so far, then joins the threads. Safe to repeat.
  void close();
  bool closed() const;

  const EngineOptions &options() const { return options_; }
  std::string backend() const;
  std::string backend_reason() const;
  uint64_t in_flight() const;
  uint64_t bytes(Op op) const;

private:
  struct Running; // everything with threads in it: left alone, not destroyed, in a forked child
  Running *running();
  Running *start() const;
  static void admit(Ledger &ledger, const File &file, Op op);
  static void dismiss(Ledger &ledger);

  const EngineOptions options_;
  std::atomic<Running *> running_{nullptr};
};

} // namespace zinf::io
