// The system calls that move data, behind one table, so that tests can inject short transfers and errors.
#pragma once

#include <cstddef>
#include <cstdint>
#include <sys/types.h>

namespace zinf::io {

struct Posix {
  ssize_t (*pread)(int fd, void *data, size_t length, off_t offset);
  ssize_t (*pwrite)(int fd, const void *data, size_t length, off_t offset);
  int (*fallocate)(int fd, uint64_t size); // 0 or an errno
  // Sees each result of the ring (bytes or -errno) and the length asked for; returns what the ring backend shall see.
  int32_t (*ring_result)(int32_t result, size_t length);
};

// Change it only while no engine has work: workers read it without a lock.
Posix &posix();

// Counts the forks this process descends from. Threads do not survive a fork, so whoever owns threads remembers
// the value and compares: a different one means "I am a copy in a child; my threads are not here".
uint64_t fork_generation();

} // namespace zinf::io
