// Note [The ring takes the straight road only]
// One thread owns the ring: it turns whole, aligned, direct pieces into submissions and takes completions. Whatever is
// not of that kind (partial blocks, unaligned memory, files without O_DIRECT), and whatever came back short or failed,
// goes to a thread backend, which alone knows how to retry and what an error is. So both backends have the same
// semantics, because the semantics exist once.
#include "io/backend.h"

#ifdef __linux__

#include <algorithm>
#include <atomic>
#include <cstring>
#include <future>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <system_error>
#include <unistd.h>

#include "io/posix.h"
#include "io/uring_abi.h"

namespace zinf::io {

namespace {

constexpr uint64_t kWake = ~uint64_t{0}; // user_data of the read on the event descriptor

// A ring with its shared memory; for one thread. Errors are errno values, 0 for success.
class Ring {
public:
  ~Ring() {
    if (entries_ != nullptr) ::munmap(entries_, entries_bytes_);
    if (rings_ != nullptr) ::munmap(rings_, rings_bytes_);
    if (fd_ >= 0) ::close(fd_);
  }

  int open(uint32_t entries);
  int check_operations() const;

  // There must be room: callers keep at most `entries` in flight.
  void prepare(uint8_t opcode, int fd, void *data, size_t length, uint64_t offset, uint64_t user_data);
  // Hands over what is prepared; waits for one completion at least.
  int submit_and_wait();
  bool take(uring::Completion *completion);

private:
  template <typename T> T *at(uint32_t offset) { return reinterpret_cast<T *>(static_cast<char *>(rings_) + offset); }

  int fd_ = -1;
  void *rings_ = nullptr;
  size_t rings_bytes_ = 0;
  uring::Submission *entries_ = nullptr;
  size_t entries_bytes_ = 0;
  uint32_t *sq_tail_ = nullptr;
  uint32_t *sq_array_ = nullptr;
  uint32_t sq_mask_ = 0;
  uint32_t *cq_head_ = nullptr;
  uint32_t *cq_tail_ = nullptr;
  uint32_t cq_mask_ = 0;
  uring::Completion *completions_ = nullptr;
  uint32_t prepared_ = 0;
};

int Ring::open(uint32_t entries) {
  using namespace uring;
  Params params;
  // Newest options first; a kernel that does not know one says EINVAL.
  constexpr uint32_t kModern = kSetupSubmitAll | kSetupCoopTaskrun | kSetupSingleIssuer | kSetupDeferTaskrun;
  for (const uint32_t flags : {kSetupClamp | kModern, kSetupClamp | kSetupSubmitAll, kSetupClamp}) {
    std::memset(&params, 0, sizeof params);
    params.flags = flags;
    fd_ = static_cast<int>(::syscall(kSysSetup, entries, &params));
    if (fd_ >= 0 || errno != EINVAL) break;
  }
  if (fd_ < 0) return errno;
  constexpr uint32_t kNeeded = kFeatureSingleMmap | kFeatureNoDrop;
  if ((params.features & kNeeded) != kNeeded) return ENOSYS;
  const size_t submissions_bytes = params.sq.array + params.sq_entries * sizeof(uint32_t);
  const size_t completions_bytes = params.cq.cqes + params.cq_entries * sizeof(Completion);
  rings_bytes_ = std::max(submissions_bytes, completions_bytes);
  const int protection = PROT_READ | PROT_WRITE;
  void *rings = ::mmap(nullptr, rings_bytes_, protection, MAP_SHARED | MAP_POPULATE, fd_, kOffsetSubmission);
  if (rings == MAP_FAILED) return errno;
  rings_ = rings;
  entries_bytes_ = params.sq_entries * sizeof(Submission);
  void *slots = ::mmap(nullptr, entries_bytes_, protection, MAP_SHARED | MAP_POPULATE, fd_, kOffsetEntries);
  if (slots == MAP_FAILED) return errno;
  entries_ = static_cast<Submission *>(slots);
  // A forked child must not share the parent's ring.
  ::madvise(rings_, rings_bytes_, MADV_DONTFORK);
  ::madvise(entries_, entries_bytes_, MADV_DONTFORK);
  sq_tail_ = at<uint32_t>(params.sq.tail);
  sq_array_ = at<uint32_t>(params.sq.array);
  sq_mask_ = *at<uint32_t>(params.sq.ring_mask);
  cq_head_ = at<uint32_t>(params.cq.head);
  cq_tail_ = at<uint32_t>(params.cq.tail);
  cq_mask_ = *at<uint32_t>(params.cq.ring_mask);
  completions_ = at<Completion>(params.cq.cqes);
  return 0;
}

int Ring::check_operations() const {
  uring::Probe probe;
  std::memset(&probe, 0, sizeof probe);
  if (::syscall(uring::kSysRegister, fd_, uring::kRegisterProbe, &probe, 64) != 0) return errno;
  for (const uint8_t op : {uring::kOpRead, uring::kOpWrite}) {
    if (op > probe.last_op || !(probe.ops[op].flags & uring::kOpSupported)) return ENOSYS;
  }
  return 0;
}

void Ring::prepare(uint8_t opcode, int fd, void *data, size_t length, uint64_t offset, uint64_t user_data) {
  const uint32_t tail = *sq_tail_; // only this thread moves it
  const uint32_t slot = tail & sq_mask_;
  uring::Submission &entry = entries_[slot];
  std::memset(&entry, 0, sizeof entry);
  entry.opcode = opcode;
  entry.fd = fd;
  entry.offset = offset;
  entry.address = reinterpret_cast<uint64_t>(data);
  entry.length = static_cast<uint32_t>(length);
  entry.user_data = user_data;
  sq_array_[slot] = slot;
  __atomic_store_n(sq_tail_, tail + 1, __ATOMIC_RELEASE);
  ++prepared_;
}

int Ring::submit_and_wait() {
  const long taken = ::syscall(uring::kSysEnter, fd_, prepared_, 1u, uring::kEnterGetEvents, nullptr, size_t{0});
  if (taken < 0) return errno;
  prepared_ -= static_cast<uint32_t>(taken);
  return 0;
}

bool Ring::take(uring::Completion *completion) {
  const uint32_t head = *cq_head_;
  if (head == __atomic_load_n(cq_tail_, __ATOMIC_ACQUIRE)) return false;
  *completion = completions_[head & cq_mask_];
  __atomic_store_n(cq_head_, head + 1, __ATOMIC_RELEASE);
  return true;
}

class UringBackend final : public Backend {
public:
  UringBackend(size_t threads, size_t queue_depth, size_t block_bytes)
      : queue_(block_bytes), slots_(queue_depth), rest_(threads, block_bytes) {}

  ~UringBackend() override {
    if (thread_.joinable()) {
      stopping_.store(true);
      wake();
      thread_.join();
    }
    if (event_ >= 0) ::close(event_);
  }

  // 0, or the errno that made it impossible, with the operation in `what`.
  int open(const char **what);

  void submit(std::shared_ptr<Ticket> ticket) override {
    queue_.push(std::move(ticket));
    if (sleeping_.exchange(false)) wake();
  }

private:
  void run(std::promise<int> ready);
  int open_ring();
  void fill();
  void drain();
  void listen();
  void finish(uint32_t slot, int32_t result);
  void wake() {
    const uint64_t one = 1;
    while (::write(event_, &one, sizeof one) < 0 && errno == EINTR) {
    }
  }

  PieceQueue queue_;
  std::vector<Piece> slots_; // in flight, by user_data
  std::vector<uint32_t> free_;
  ThreadBackend rest_;
  Ring ring_; // the thread's own
  int event_ = -1;
  uint64_t event_value_ = 0;
  bool listening_ = false;
  std::atomic<bool> sleeping_{false};
  std::atomic<bool> stopping_{false};
  std::promise<int> ready_;
  std::thread thread_;
};

int UringBackend::open(const char **what) {
  *what = "eventfd";
  event_ = ::eventfd(0, EFD_CLOEXEC);
  if (event_ < 0) return errno;
  *what = "io_uring_setup";
  std::future<int> ready = ready_.get_future();
  try {
    thread_ = start_quiet_thread(
        [](void *self) {
          auto *backend = static_cast<UringBackend *>(self);
          backend->run(std::move(backend->ready_));
        },
        this);
  } catch (const std::system_error &error) {
    *what = "starting a thread";
    return error.code().value();
  }
  return ready.get();
}

// In the ring's own thread: kSetupSingleIssuer binds the ring to its creator.
int UringBackend::open_ring() {
  const int code = ring_.open(static_cast<uint32_t>(slots_.size() + 1)); // one more for the wake-up
  return code != 0 ? code : ring_.check_operations();
}

void UringBackend::run(std::promise<int> ready) {
  const int code = open_ring();
  ready.set_value(code);
  if (code != 0) return;
  for (uint32_t slot = 0; slot < slots_.size(); ++slot) free_.push_back(slot);
  for (;;) {
    fill();
    const bool idle = free_.size() == slots_.size();
    if (!free_.empty()) { // ready for more: let submit() wake us, unless more came just now
      sleeping_.store(true);
      if (stopping_.load() && idle) return;
      if (const size_t before = free_.size(); fill(), free_.size() != before) sleeping_.store(false);
    }
    listen();
    const int error = ring_.submit_and_wait();
    sleeping_.store(false);
    // EAGAIN, EBUSY: the kernel is short of something for now; completions, or a moment, free it.
    if (error != 0 && error != EINTR) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    drain();
  }
}

void UringBackend::fill() {
  while (!free_.empty()) {
    Piece piece = queue_.try_pop();
    if (!piece) return;
    const Op op = piece.ticket->op();
    const File &file = piece.ticket->file();
    const bool straight = file.direct() && piece.offset % file.block() == 0 && piece.length % file.block() == 0 &&
                          reinterpret_cast<uintptr_t>(piece.data) % file.memory_alignment() == 0;
    if (!straight) {
      queue_.finished(op);
      rest_.submit(std::move(piece));
      continue;
    }
    const uint32_t slot = free_.back();
    free_.pop_back();
    ring_.prepare(op == Op::kRead ? uring::kOpRead : uring::kOpWrite, file.direct_fd(), piece.data, piece.length,
                  piece.offset, slot);
    slots_[slot] = std::move(piece);
  }
}

void UringBackend::listen() {
  if (listening_) return;
  ring_.prepare(uring::kOpRead, event_, &event_value_, sizeof event_value_, 0, kWake);
  listening_ = true;
}

void UringBackend::drain() {
  uring::Completion completion;
  while (ring_.take(&completion)) {
    if (completion.user_data == kWake) {
      listening_ = false;
    } else {
      finish(static_cast<uint32_t>(completion.user_data), completion.result);
    }
  }
}

void UringBackend::finish(uint32_t slot, int32_t result) {
  Piece piece = std::move(slots_[slot]);
  slots_[slot] = {};
  free_.push_back(slot);
  queue_.finished(piece.ticket->op());
  result = posix().ring_result(result, piece.length);
  if (result == static_cast<int32_t>(piece.length)) {
    piece.ticket->finish_piece(piece.length, std::nullopt);
    return;
  }
  if (result > 0) { // short: the rest is another piece
    const size_t count = static_cast<size_t>(result);
    Piece rest{piece.ticket, piece.offset + count, piece.data + count, piece.length - count};
    rest_.submit(std::move(rest));
    piece.ticket->finish_piece(count, std::nullopt);
    return;
  }
  rest_.submit(std::move(piece));
}

std::string explain(const char *what, int code) {
  std::string text = std::string(what) + ": " + std::strerror(code);
  if (code == EPERM) text += " (forbidden by kernel.io_uring_disabled or the container's seccomp profile)";
  if (code == ENOSYS) text += " (needs Linux 5.6 or later, or a seccomp profile that allows it)";
  if (code == ENOMEM) text += " (locked memory: raise ulimit -l)";
  return text;
}

} // namespace

std::unique_ptr<Backend> make_uring_backend(size_t threads, size_t queue_depth, size_t block_bytes,
                                            std::string *reason) {
  auto backend = std::make_unique<UringBackend>(threads, queue_depth, block_bytes);
  const char *what = "";
  const int code = backend->open(&what);
  if (code != 0) {
    *reason = explain(what, code);
    return nullptr;
  }
  return backend;
}

} // namespace zinf::io

#else

namespace zinf::io {

std::unique_ptr<Backend> make_uring_backend(size_t, size_t, size_t, std::string *reason) {
  *reason = "io_uring is Linux only";
  return nullptr;
}

} // namespace zinf::io

#endif
