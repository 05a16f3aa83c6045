#include "io/posix.h"

#include <atomic>
#include <cerrno>
#include <fcntl.h>
#include <pthread.h>
#include <unistd.h>

namespace zinf::io {

namespace {

int allocate(int fd, uint64_t size) {
#ifdef __linux__
  // Not posix_fallocate: where a file system cannot allocate, glibc would emulate it by writing to every block.
  int result;
  do {
    result = ::fallocate(fd, 0, 0, static_cast<off_t>(size));
  } while (result != 0 && errno == EINTR);
  return result == 0 ? 0 : errno;
#else
  (void)fd;
  (void)size;
  return EOPNOTSUPP;
#endif
}

int32_t same(int32_t result, size_t) { return result; }

std::atomic<uint64_t> generation{0};

void in_child() { generation.fetch_add(1, std::memory_order_relaxed); }

} // namespace

Posix &posix() {
  static Posix table{::pread, ::pwrite, allocate, same};
  return table;
}

uint64_t fork_generation() {
  static const int registered = pthread_atfork(nullptr, nullptr, in_child);
  (void)registered;
  return generation.load(std::memory_order_relaxed);
}

} // namespace zinf::io
