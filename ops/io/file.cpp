#include "io/file.h"

#include <algorithm>
#include <fcntl.h>
#include <random>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#ifdef __linux__
#include <linux/stat.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#endif

#include "io/posix.h"

namespace zinf::io {

namespace {

int open_retry(const char *path, int flags, mode_t mode = 0600) {
  int fd;
  do {
    fd = ::open(path, flags | O_CLOEXEC, mode);
  } while (fd < 0 && errno == EINTR);
  return fd;
}

std::string folder_of(const std::string &path) {
  const size_t slash = path.rfind('/');
  if (slash == std::string::npos) return ".";
  return slash == 0 ? "/" : path.substr(0, slash);
}

std::string unique_name(const std::string &path) {
  std::random_device random;
  return path + ".tmp" + std::to_string(random()) + std::to_string(random());
}

// Bytes this process could still allocate, or nothing where the file system does not count.
std::optional<uint64_t> available_bytes(int fd) {
  struct statvfs info;
  if (::fstatvfs(fd, &info) != 0 || info.f_blocks == 0) return std::nullopt;
  const uint64_t blocks = ::geteuid() == 0 ? info.f_bfree : info.f_bavail; // root may use the reserve
  return blocks * static_cast<uint64_t>(info.f_frsize);
}

bool is_ram_backed(int fd) {
#ifdef __linux__
  struct statfs info;
  if (::fstatfs(fd, &info) != 0) return false;
  return info.f_type == 0x01021994 /* tmpfs */ || static_cast<uint32_t>(info.f_type) == 0x858458f6 /* ramfs */;
#else
  (void)fd;
  return false;
#endif
}

struct DirectAlignment {
  bool known = false;
  uint32_t memory = 0;
  uint32_t offset = 0; // 0 while known: no direct transfers on this file
};

DirectAlignment query_alignment(int fd) {
  DirectAlignment found;
#if defined(__linux__) && defined(SYS_statx)
  // The kernel's struct statx, as far as needed: older headers lack the two fields (added in Linux 6.1).
  struct {
    uint32_t mask;
    uint32_t skipped[37];
    uint32_t memory_align;
    uint32_t offset_align;
    uint32_t rest[24];
  } info = {};
  static_assert(sizeof(info) == 256, "struct statx is 256 bytes");
  constexpr uint32_t kDirectAlign = 0x2000;
  constexpr int kEmptyPath = 0x1000;
  if (::syscall(SYS_statx, fd, "", kEmptyPath, kDirectAlign, &info) == 0 && (info.mask & kDirectAlign)) {
    found = {true, info.memory_align, info.offset_align};
  }
#else
  (void)fd;
#endif
  return found;
}

} // namespace

File::File(std::string path, const FileOptions &options)
    : path_(std::move(path)), writable_(options.writable || options.create), generation_(fork_generation()) {
  try {
    if (options.create) {
      create(options);
    } else {
      open_existing(options);
    }
    ram_backed_ = is_ram_backed(buffered_fd_);
    find_alignment();
  } catch (...) {
    close_descriptors();
    throw;
  }
#ifdef __linux__
  ::posix_fadvise(buffered_fd_, 0, 0, POSIX_FADV_RANDOM);
#endif
}

File::~File() { close_descriptors(); }

void File::fail(int code, const char *operation, const std::string &detail) {
  throw IoException(file_error(code, operation, path_, detail));
}

void File::create(const FileOptions &options) {
  if (options.unlink && create_unnamed(options.direct)) {
    allocate(options);
    return;
  }
  // A name that lives for an instant must not collide with a real file.
  const std::string name = options.unlink ? unique_name(path_) : path_;
  buffered_fd_ = open_retry(name.c_str(), O_RDWR | O_CREAT | O_EXCL, 0600);
  if (buffered_fd_ < 0) fail(errno, "create");
  try {
    if (options.direct) open_direct(name);
    if (options.unlink && ::unlink(name.c_str()) != 0) fail(errno, "unlink");
    allocate(options);
  } catch (...) {
    ::unlink(name.c_str());
    throw;
  }
}

// A file that never has a name cannot be left behind. False: not possible here, use a name.
bool File::create_unnamed(bool direct) {
#if defined(__linux__) && defined(O_TMPFILE)
  buffered_fd_ = open_retry(folder_of(path_).c_str(), O_RDWR | O_TMPFILE, 0600);
  if (buffered_fd_ < 0) return false;
  if (!direct) return true;
  const std::string link = "/proc/self/fd/" + std::to_string(buffered_fd_);
  if (::access(link.c_str(), F_OK) == 0) {
    open_direct(link);
    return true;
  }
  close_descriptors(); // no /proc: the second descriptor needs a name
#else
  (void)direct;
#endif
  return false;
}

void File::open_existing(const FileOptions &options) {
  buffered_fd_ = open_retry(path_.c_str(), options.writable ? O_RDWR : O_RDONLY);
  if (buffered_fd_ < 0) fail(errno, options.writable ? "open for reading and writing" : "open for reading");
  struct stat info;
  if (::fstat(buffered_fd_, &info) != 0) fail(errno, "stat");
  if (S_ISDIR(info.st_mode)) fail(EISDIR, "open");
  if (options.size && static_cast<uint64_t>(info.st_size) < *options.size) {
    fail(kPastTheEnd, "open",
         "expected " + std::to_string(*options.size) + " bytes, the file has " + std::to_string(info.st_size));
  }
  if (options.direct) open_direct(path_);
}

// Not an error where O_DIRECT is not to be had: direct() then says so.
void File::open_direct(const std::string &path) {
#if defined(__linux__)
  direct_fd_ = open_retry(path.c_str(), (writable_ ? O_RDWR : O_RDONLY) | O_DIRECT);
  if (direct_fd_ < 0) {
    if (errno == EINVAL || errno == EOPNOTSUPP) return;
    fail(errno, "open with O_DIRECT");
  }
#elif defined(__APPLE__)
  direct_fd_ = open_retry(path.c_str(), writable_ ? O_RDWR : O_RDONLY);
  if (direct_fd_ < 0) fail(errno, "open");
  ::fcntl(direct_fd_, F_NOCACHE, 1);
#else
  (void)path;
#endif
  direct_.store(direct_fd_ >= 0);
}

void File::allocate(const FileOptions &options) {
  fixed_size_ = options.size;
  const uint64_t size = options.size.value_or(0);
  if (size == 0) return;
  const std::optional<uint64_t> available = available_bytes(buffered_fd_);
  const std::string numbers = "needs " + std::to_string(size) + " bytes, " +
                              (available ? std::to_string(*available) : std::string("an unknown number of")) +
                              " bytes available";
  if (options.preallocate) {
    // Asked beforehand, so that a hopeless request does not fill the disk on the way to its failure.
    if (available && *available < size) fail(ENOSPC, "allocate", numbers);
    const int code = posix().fallocate(buffered_fd_, size);
    if (code == 0) return;
    if (code != EOPNOTSUPP && code != ENOSYS) fail(code, "allocate", numbers);
  }
  if (::ftruncate(buffered_fd_, static_cast<off_t>(size)) != 0) fail(errno, "set size", numbers);
}

void File::find_alignment() {
  const size_t page = static_cast<size_t>(::sysconf(_SC_PAGESIZE));
  block_ = std::max<size_t>(4096, page); // see Note [Direct and buffered, one file]
  if (direct_fd_ < 0) return;
  const DirectAlignment alignment = query_alignment(direct_fd_);
  if (alignment.known) {
    if (alignment.offset == 0) lose_direct();
    block_ = std::max<size_t>(block_, alignment.offset);
    memory_alignment_ = std::max<size_t>(1, alignment.memory);
  }
  // Recent kernels take O_DIRECT on tmpfs and copy all the same: that is not what direct() promises.
  if (ram_backed_) lose_direct();
}

// In a forked child: what the parent had in flight is not ours to wait for.
void File::forget_parents_requests() {
  uint64_t mine = generation_.load(std::memory_order_acquire);
  const uint64_t now = fork_generation();
  if (mine != now && generation_.compare_exchange_strong(mine, now)) state_.fetch_and(kClosed);
}

void File::hold(const char *operation) {
  forget_parents_requests();
  if (state_.fetch_add(1, std::memory_order_acq_rel) & kClosed) {
    leave();
    throw UsageError(std::string(operation) + " on a closed file: " + path_);
  }
}

void File::leave() {
  if (state_.fetch_sub(1, std::memory_order_acq_rel) == (kClosed | 1)) {
    std::lock_guard<std::mutex> lock(mutex_);
    idle_.notify_all();
  }
}

void File::enter(Op op, uint64_t offset, uint64_t length) {
  if (op == Op::kWrite && !writable_) throw UsageError("write on a file opened for reading only: " + path_);
  if (offset > INT64_MAX || length > INT64_MAX - offset) throw UsageError("offset or length out of range: " + path_);
  if (op == Op::kWrite && fixed_size_ && offset + length > *fixed_size_) {
    throw UsageError("write at offset " + std::to_string(offset) + ", length " + std::to_string(length) +
                     " bytes ends past the file's fixed size of " + std::to_string(*fixed_size_) + " bytes: " + path_);
  }
  hold(name(op));
}

uint64_t File::size() {
  hold("size");
  struct stat info;
  const int code = ::fstat(buffered_fd_, &info) == 0 ? 0 : errno;
  leave();
  if (code != 0) fail(code, "stat");
  return static_cast<uint64_t>(info.st_size);
}

void File::fsync() {
  hold("fsync");
  int result;
  do {
    result = ::fsync(buffered_fd_); // the inode's data, whichever descriptor wrote it
  } while (result != 0 && errno == EINTR);
  const int code = errno;
  leave();
  if (result != 0) fail(code, "fsync");
}

void File::close() {
  forget_parents_requests();
  state_.fetch_or(kClosed, std::memory_order_acq_rel);
  std::unique_lock<std::mutex> lock(mutex_);
  idle_.wait(lock, [this] { return state_.load(std::memory_order_acquire) == kClosed; });
  close_descriptors();
}

void File::close_descriptors() {
  if (direct_fd_ >= 0) ::close(direct_fd_);
  if (buffered_fd_ >= 0) ::close(buffered_fd_);
  direct_fd_ = buffered_fd_ = -1;
}

} // namespace zinf::io
