// The I/O engine against a model in memory, on every backend; short transfers and errors come through the seam.
#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <fcntl.h>
#include <random>
#include <string>
#include <sys/stat.h>
#include <sys/wait.h>
#include <thread>
#include <unistd.h>
#include <vector>

#ifdef __linux__
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#endif

#include "io/engine.h"
#include "io/posix.h"
#include "tests/check.h"

using namespace zinf::io;

namespace {

constexpr size_t kBlock = 16384; // small, so that small requests have many pieces

std::string folder() {
  const char *name = std::getenv("ZINF_TEST_FOLDER");
  return name != nullptr ? name : "."; // the build folder: /tmp may be a tmpfs
}

std::string path(const char *name) { return folder() + "/test_io_" + std::to_string(::getpid()) + "_" + name; }

FileOptions sized(uint64_t size) {
  FileOptions options;
  options.size = size;
  return options;
}

std::shared_ptr<File> make_file(uint64_t size, bool direct = true) {
  FileOptions options = sized(size);
  options.direct = direct;
  return std::make_shared<File>(path("file"), options);
}

std::vector<BackendKind> backends() {
  std::vector<BackendKind> found{BackendKind::kThreads};
  std::string reason;
  if (make_uring_backend(1, 1, kBlock, &reason)) {
    found.push_back(BackendKind::kUring);
  } else {
    std::printf("  io_uring not tested: %s\n", reason.c_str());
  }
  return found;
}

EngineOptions options_of(BackendKind kind) { return {3, 4, kBlock, kind}; }

size_t finish(const std::shared_ptr<Ticket> &ticket) {
  CHECK(ticket->wait_for(std::chrono::seconds(60)));
  return ticket->result();
}

Error error_of(const std::shared_ptr<Ticket> &ticket) {
  try {
    finish(ticket);
  } catch (const IoException &e) {
    return e.error();
  }
  return {};
}

// Puts the table back, and counts the calls that were interfered with.
struct Seam {
  const Posix original = posix();
  ~Seam() { posix() = original; }
};

std::atomic<int> interference{0};

ssize_t short_pread(int fd, void *data, size_t length, off_t offset) {
  const int turn = interference.fetch_add(1) % 4;
  errno = turn == 0 ? EINTR : EAGAIN;
  if (turn <= 1) return -1;
  if (turn == 2 && length > 4096) length -= 4096;
  if (turn == 3 && length > 700) length = (::fcntl(fd, F_GETFL) & O_DIRECT) ? 512 : 699;
  return ::pread(fd, data, length, offset);
}

ssize_t short_pwrite(int fd, const void *data, size_t length, off_t offset) {
  const int turn = interference.fetch_add(1) % 3;
  errno = EINTR;
  if (turn == 0) return -1;
  if (turn == 1 && length > 4096) length = 4096;
  return ::pwrite(fd, data, length, offset);
}

int32_t short_result(int32_t result, size_t length) {
  const int turn = interference.fetch_add(1) % 3;
  if (turn == 0) return -EAGAIN;
  if (turn == 1 && length > 4096) return 4096;
  return result;
}

// Random requests that do not overlap, several in flight, then the file read back whole and compared.
void check_random(BackendKind kind, bool direct, unsigned seed) {
  constexpr size_t kSize = 300 * 1024 + 77;
  std::mt19937 random(seed);
  Engine engine(options_of(kind));
  auto file = make_file(kSize, direct);
  std::vector<char> model(kSize, 0);
  std::vector<char> buffer(kSize + 8192);
  for (int round = 0; round < 8; ++round) {
    char *data = buffer.data() + random() % 4096;
    std::vector<std::shared_ptr<Ticket>> tickets;
    for (size_t at = 0; at < kSize;) {
      size_t length = 1 + random() % 50000;
      if (random() % 2) length = (length + 4095) / 4096 * 4096 - at % 4096;
      length = std::min(length, kSize - at);
      if (random() % 3) {
        for (size_t i = 0; i < length; ++i) data[at + i] = static_cast<char>(random());
        std::memcpy(model.data() + at, data + at, length);
        tickets.push_back(engine.submit(Op::kWrite, file, at, data + at, length));
      }
      at += length;
    }
    for (auto &ticket : tickets) finish(ticket);
    std::vector<char> seen(kSize);
    CHECK(finish(engine.submit(Op::kRead, file, 0, seen.data(), kSize)) == kSize);
    CHECK(seen == model);
  }
}

void test_random_requests() {
  for (const BackendKind kind : backends()) {
    for (const bool direct : {true, false}) check_random(kind, direct, 1);
  }
}

void test_short_transfers_are_completed() {
  Seam seam;
  posix().pread = short_pread;
  posix().pwrite = short_pwrite;
  posix().ring_result = short_result;
  for (const BackendKind kind : backends()) {
    for (const bool direct : {true, false}) check_random(kind, direct, 2);
  }
  CHECK(interference.load() > 0);
}

void test_read_past_the_end() {
  for (const BackendKind kind : backends()) {
    for (const uint64_t size : {uint64_t{40960}, uint64_t{41000}}) {
      Engine engine(options_of(kind));
      auto file = make_file(size);
      std::vector<char> data(131072);
      const Error error = error_of(engine.submit(Op::kRead, file, 0, data.data(), data.size()));
      CHECK(error.code == kPastTheEnd);
      CHECK(error.path == file->path());
      CHECK(error.message.find("read at offset") != std::string::npos);
      CHECK(finish(engine.submit(Op::kRead, file, 0, data.data(), size)) == size);
    }
  }
}

std::atomic<int> failures{0};

ssize_t failing_pwrite(int fd, const void *data, size_t length, off_t offset) {
  if (offset >= 32768) {
    failures.fetch_add(1);
    errno = EIO;
    return -1;
  }
  return ::pwrite(fd, data, length, offset);
}

int32_t failing_result(int32_t, size_t) { return -EIO; }

void test_first_error_wins_and_all_pieces_end() {
  Seam seam;
  posix().pwrite = failing_pwrite;
  posix().ring_result = failing_result;
  for (const BackendKind kind : backends()) {
    failures = 0;
    Engine engine(options_of(kind));
    auto file = make_file(10 * kBlock);
    std::vector<char> data(10 * kBlock);
    auto ticket = engine.submit(Op::kWrite, file, 0, data.data(), data.size());
    const Error error = error_of(ticket);
    CHECK(error.code == EIO);
    CHECK(error.message.find("length 16384 bytes") != std::string::npos);
    CHECK(failures.load() == 8); // pieces 2 to 9, each tried once
    CHECK(engine.in_flight() == 0);
    CHECK(engine.bytes(Op::kWrite) == 0);
    CHECK(error_of(ticket).code == EIO); // again
  }
}

ssize_t refusing_pwrite(int fd, const void *data, size_t length, off_t offset) {
  if (::fcntl(fd, F_GETFL) & O_DIRECT) {
    errno = EINVAL;
    return -1;
  }
  return ::pwrite(fd, data, length, offset);
}

int32_t refusing_result(int32_t, size_t) { return -EINVAL; }

void test_direct_refused_at_first_transfer() {
  Seam seam;
  posix().pwrite = refusing_pwrite;
  posix().ring_result = refusing_result;
  for (const BackendKind kind : backends()) {
    Engine engine(options_of(kind));
    auto file = make_file(65536);
    if (!file->direct()) return; // nothing to refuse here
    std::vector<char> data(65536, 'x'), seen(65536);
    CHECK(finish(engine.submit(Op::kWrite, file, 0, data.data(), data.size())) == data.size());
    CHECK(!file->direct());
    CHECK(finish(engine.submit(Op::kRead, file, 0, seen.data(), seen.size())) == seen.size());
    CHECK(seen == data);
  }
}

int no_space(int, uint64_t) { return ENOSPC; }
int not_supported(int, uint64_t) { return EOPNOTSUPP; }

bool exists(const std::string &name) {
  struct stat info;
  return ::stat(name.c_str(), &info) == 0;
}

void test_creation() {
  CHECK_THROWS(File("no/such/folder/file", sized(4096)), IoException);
  CHECK_THROWS(File(path("huge"), sized(uint64_t{1} << 60)), IoException);
  Seam seam;
  FileOptions named = sized(4096);
  named.unlink = false;
  posix().fallocate = no_space;
  CHECK_THROWS(File(path("full"), named), IoException);
  CHECK(!exists(path("full")));
  posix().fallocate = not_supported;
  {
    File file(path("named"), named);
    CHECK(file.size() == 4096);
    CHECK_THROWS(File(path("named"), named), IoException);
  }
  CHECK(exists(path("named")));
  FileOptions existing;
  existing.create = existing.writable = false;
  existing.size = 5000;
  CHECK_THROWS(File(path("named"), existing), IoException);
  existing.size = 4096;
  {
    Engine engine(options_of(BackendKind::kThreads));
    auto file = std::make_shared<File>(path("named"), existing);
    char byte = 0;
    CHECK_THROWS(engine.submit(Op::kWrite, file, 0, &byte, 1), UsageError);
    CHECK(finish(engine.submit(Op::kRead, file, 4095, &byte, 1)) == 1);
    CHECK(finish(engine.submit(Op::kRead, file, 0, nullptr, 0)) == 0);
  }
  CHECK(exists(path("named")));
  ::unlink(path("named").c_str());
}

void test_close_waits() {
  for (const BackendKind kind : backends()) {
    auto file = make_file(64 * kBlock);
    std::vector<char> data(64 * kBlock, 'y');
    std::vector<std::shared_ptr<Ticket>> tickets;
    {
      Engine engine(options_of(kind));
      for (int i = 0; i < 64; ++i) {
        tickets.push_back(engine.submit(Op::kWrite, file, i * kBlock, data.data() + i * kBlock, kBlock));
      }
      file->close();
      for (auto &ticket : tickets) CHECK(finish(ticket) == kBlock);
      CHECK_THROWS(engine.submit(Op::kWrite, file, 0, data.data(), kBlock), UsageError);
      CHECK_THROWS(file->size(), UsageError);
      engine.close();
      engine.close();
      CHECK_THROWS(engine.submit(Op::kWrite, make_file(4096), 0, data.data(), 4096), UsageError);
      CHECK(engine.bytes(Op::kWrite) == 64 * kBlock);
    }
    CHECK(tickets[0]->elapsed_ns() > 0);
  }
}

void test_many_threads_submit() {
  for (const BackendKind kind : backends()) {
    constexpr size_t kThreads = 4, kRequests = 50, kLength = 5000;
    Engine engine(options_of(kind));
    auto file = make_file(kThreads * kRequests * kLength);
    std::vector<std::thread> threads;
    for (size_t t = 0; t < kThreads; ++t) {
      threads.emplace_back([&, t] {
        std::vector<char> data(kRequests * kLength, static_cast<char>('a' + t)), seen(kRequests * kLength);
        const uint64_t base = t * kRequests * kLength;
        std::vector<std::shared_ptr<Ticket>> tickets;
        for (size_t i = 0; i < kRequests; ++i) {
          tickets.push_back(engine.submit(Op::kWrite, file, base + i * kLength, &data[i * kLength], kLength));
        }
        for (auto &ticket : tickets) finish(ticket);
        finish(engine.submit(Op::kRead, file, base, seen.data(), seen.size()));
        CHECK(seen == data);
      });
    }
    for (std::thread &thread : threads) thread.join();
  }
}

void test_options() {
  EngineOptions options;
  options.block_bytes = 5000;
  CHECK_THROWS(Engine{options}, UsageError);
  options = {};
  options.threads = 0;
  CHECK_THROWS(Engine{options}, UsageError);
  options = {};
  options.queue_depth = 0;
  CHECK_THROWS(Engine{options}, UsageError);
}

int run_child(void (*body)()) {
  const pid_t child = ::fork();
  CHECK(child >= 0);
  if (child == 0) {
    body();
    ::_exit(0);
  }
  int status = 0;
  CHECK(::waitpid(child, &status, 0) == child);
  return status;
}

void test_forked_child() {
  for (const BackendKind kind : backends()) {
    static Engine *engine;
    static std::shared_ptr<File> file;
    engine = new Engine(options_of(kind));
    file = make_file(kBlock * 4);
    std::vector<char> data(kBlock, 'z');
    finish(engine->submit(Op::kWrite, file, 0, data.data(), kBlock));
    CHECK(run_child([] {
            std::vector<char> seen(kBlock);
            finish(engine->submit(Op::kRead, file, 0, seen.data(), kBlock));
            CHECK(seen[kBlock - 1] == 'z');
            delete engine;
            file->close();
          }) == 0);
    finish(engine->submit(Op::kWrite, file, kBlock, data.data(), kBlock));
    delete engine;
    file.reset();
  }
}

#ifdef __linux__
void test_forbidden_ring() {
  if (::prctl(PR_GET_SECCOMP) < 0) { // not in this kernel, or not in the emulator that stands for it
    std::printf("  not tested: there is no seccomp here\n");
    return;
  }
  CHECK(run_child([] {
          sock_filter rules[] = {
              BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
              BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, 425 /* io_uring_setup */, 0, 1),
              BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
              BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
          };
          sock_fprog program{4, rules};
          CHECK(::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0);
          CHECK(::prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0);
          Engine engine(options_of(BackendKind::kAuto));
          CHECK(engine.backend() == "threads");
          CHECK(engine.backend_reason().find("seccomp") != std::string::npos);
          CHECK_THROWS(Engine{options_of(BackendKind::kUring)}, UsageError);
          std::vector<char> data(kBlock);
          finish(engine.submit(Op::kWrite, make_file(kBlock), 0, data.data(), kBlock));
        }) == 0);
}
#endif

} // namespace

int main() {
#ifdef __linux__
  RUN(test_forbidden_ring);
#endif
// The sanitizers' runtimes are not fork-safe: thread's does not let a forked child start threads, and address's may be
// forked while another thread holds its allocator's lock, which then hangs the child now and then. QEMU, as of 7.2, is
// like thread's.
#if !defined(__SANITIZE_THREAD__) && !defined(__SANITIZE_ADDRESS__) && !defined(ZINF_EMULATED)
  RUN(test_forked_child);
#endif
  RUN(test_options);
  RUN(test_creation);
  RUN(test_random_requests);
  RUN(test_short_transfers_are_completed);
  RUN(test_read_past_the_end);
  RUN(test_first_error_wins_and_all_pieces_end);
  RUN(test_direct_refused_at_first_transfer);
  RUN(test_close_waits);
  RUN(test_many_threads_submit);
  return 0;
}
