// Note [Direct and buffered, one file]
// A File keeps two descriptors of one inode. Whole blocks go through the O_DIRECT one; the partial blocks at the
// head and tail of a request go through the page cache. That is coherent as long as requests in flight do not
// overlap: a block is either covered by one request (direct) or shared by several (all of them buffered), never
// both at a time, and the kernel writes back and drops cached pages before it serves a direct transfer over them.
// Hence the block is never smaller than a page, and read-ahead is off on the buffered descriptor, so that it
// caches no page it was not asked for.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>

#include "io/error.h"

namespace zinf::io {

struct FileOptions {
  std::optional<uint64_t> size;
  bool create = true;
  bool unlink = true; // only of files created here
  bool direct = true;
  bool preallocate = true;
  bool writable = true;
};

class File {
public:
  // Creates or opens. Throws IoException, and then leaves nothing behind.
  File(std::string path, const FileOptions &options);
  ~File();
  File(const File &) = delete;
  File &operator=(const File &) = delete;

  const std::string &path() const { return path_; }
  bool writable() const { return writable_; }
  bool ram_backed() const { return ram_backed_; }
  bool closed() const { return (state_.load(std::memory_order_acquire) & kClosed) != 0; }
  bool direct() const { return direct_.load(std::memory_order_acquire); }
  uint64_t size(); // now, in bytes
  size_t block() const { return block_; }
  size_t memory_alignment() const { return memory_alignment_; }

  void fsync();
  // Waits for the requests in flight, then closes. Safe to repeat.
  void close();

  // For the engine: a request enters (throws UsageError if it may not) and leaves.
  void enter(Op op, uint64_t offset, uint64_t length);
  void leave();
  int direct_fd() const { return direct_fd_; }
  int buffered_fd() const { return buffered_fd_; }
  // The file system took O_DIRECT at open and refused it at a transfer: stay buffered from here on.
  void lose_direct() { direct_.store(false, std::memory_order_release); }

private:
  void create(const FileOptions &options);
  void open_existing(const FileOptions &options);
  void open_direct(const std::string &path);
  void hold(const char *operation);
  void forget_parents_requests();
  bool create_unnamed(bool direct);
  void allocate(const FileOptions &options);
  void find_alignment();
  void close_descriptors();
  [[noreturn]] void fail(int code, const char *operation, const std::string &detail = "");

  const std::string path_;
  const bool writable_;
  std::optional<uint64_t> fixed_size_; // a created file of known size does not grow
  int buffered_fd_ = -1;
  int direct_fd_ = -1;
  std::atomic<bool> direct_{false};
  bool ram_backed_ = false;
  size_t block_ = 4096;
  size_t memory_alignment_ = 4096;

  // Requests in flight, and a bit for "closed": no lock on the way in and out, so none can be found taken after a fork.
  static constexpr uint64_t kClosed = uint64_t{1} << 63;
  std::atomic<uint64_t> state_{0};
  std::atomic<uint64_t> generation_;
  std::mutex mutex_; // only of those who close
  std::condition_variable idle_;
};

} // namespace zinf::io
