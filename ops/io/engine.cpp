#include "io/engine.h"

#include <system_error>

#include "io/posix.h"

namespace zinf::io {

struct Engine::Running {
  const uint64_t generation = fork_generation();
  const std::shared_ptr<Ledger> ledger = std::make_shared<Ledger>();
  std::unique_ptr<Backend> backend;
  std::string name;
  std::string reason;
};

Engine::Engine(const EngineOptions &options) : options_(options) {
  if (options.threads < 1 || options.threads > 1024) throw UsageError("threads must be between 1 and 1024");
  if (options.queue_depth < 1 || options.queue_depth > 4096) {
    throw UsageError("queue_depth must be between 1 and 4096");
  }
  if (options.block_bytes < 4096 || options.block_bytes % 4096 != 0 || options.block_bytes > (size_t{1} << 30)) {
    throw UsageError("block_bytes must be a multiple of 4096, at most 1 GiB");
  }
  running_.store(start(), std::memory_order_release);
}

Engine::~Engine() {
  close();
  Running *current = running_.load(std::memory_order_acquire);
  if (current->generation == fork_generation()) delete current;
}

Engine::Running *Engine::start() const {
  auto running = std::make_unique<Running>();
  const char *const reason = options_.backend == BackendKind::kAuto
                                 ? "auto: io_uring is available, and no slower than threads"
                                 : "chosen by the caller";
  if (options_.backend != BackendKind::kThreads) {
    std::string refusal;
    running->backend = make_uring_backend(options_.threads, options_.queue_depth, options_.block_bytes, &refusal);
    if (running->backend) {
      running->name = "io_uring";
      running->reason = reason;
      return running.release();
    }
    if (options_.backend == BackendKind::kUring) throw UsageError("backend io_uring is not available: " + refusal);
    running->reason = "auto: io_uring is not available: " + refusal;
  } else {
    running->reason = reason;
  }
  running->backend = std::make_unique<ThreadBackend>(options_.threads, options_.block_bytes);
  running->name = "threads";
  return running.release();
}

Engine::Running *Engine::running() {
  Running *current = running_.load(std::memory_order_acquire);
  if (current->generation == fork_generation()) return current;
  // A child. The parent's threads and perhaps held locks came along as dead memory; leave them and begin anew.
  Running *fresh = start();
  if (running_.compare_exchange_strong(current, fresh)) return fresh;
  delete fresh;
  return current;
}

void Engine::admit(Ledger &ledger, const File &file, Op op) {
  std::lock_guard<std::mutex> lock(ledger.mutex);
  if (ledger.closed) throw UsageError(std::string(name(op)) + " on a closed engine: " + file.path());
  ++ledger.pending;
}

void Engine::dismiss(Ledger &ledger) {
  std::lock_guard<std::mutex> lock(ledger.mutex);
  if (--ledger.pending == 0) ledger.idle.notify_all();
}

std::shared_ptr<Ticket> Engine::submit(Op op, const std::shared_ptr<File> &file, uint64_t offset, void *data,
                                       size_t length) {
  Running &current = *running();
  const std::shared_ptr<Ledger> ledger = current.ledger;
  admit(*ledger, *file, op);
  std::shared_ptr<Ticket> ticket;
  try {
    file->enter(op, offset, length);
    ticket = std::make_shared<Ticket>(op, file, offset, data, length, ledger);
  } catch (...) {
    dismiss(*ledger);
    throw;
  }
  if (length == 0) {
    ticket->finish_empty();
    return ticket;
  }
  try {
    current.backend->submit(ticket);
  } catch (const std::system_error &error) { // no thread to be had
    ticket->finish_piece(length, io_error(error.code().value(), op, file->path(), offset, length, "starting threads"));
  }
  return ticket;
}

bool Engine::closed() const {
  Running *current = running_.load(std::memory_order_acquire);
  if (current->generation != fork_generation()) return false;
  std::lock_guard<std::mutex> lock(current->ledger->mutex);
  return current->ledger->closed;
}

void Engine::close() {
  Running *current = running_.load(std::memory_order_acquire);
  if (current == nullptr || current->generation != fork_generation()) return;
  Ledger &ledger = *current->ledger;
  std::unique_lock<std::mutex> lock(ledger.mutex);
  ledger.closed = true;
  ledger.idle.wait(lock, [&] { return ledger.pending == 0; });
  current->backend.reset();
}

std::string Engine::backend() const { return running_.load(std::memory_order_acquire)->name; }

std::string Engine::backend_reason() const { return running_.load(std::memory_order_acquire)->reason; }

uint64_t Engine::in_flight() const {
  Running *current = running_.load(std::memory_order_acquire);
  if (current->generation != fork_generation()) return 0;
  std::lock_guard<std::mutex> lock(current->ledger->mutex);
  return current->ledger->pending;
}

uint64_t Engine::bytes(Op op) const {
  const Running *current = running_.load(std::memory_order_acquire);
  return current->ledger->bytes[static_cast<size_t>(op)].load(std::memory_order_relaxed);
}

} // namespace zinf::io
