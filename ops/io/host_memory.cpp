#include "io/host_memory.h"

#include <cerrno>
#include <cstdint>
#include <map>
#include <mutex>
#include <sys/mman.h>
#include <unistd.h>

namespace zinf::io {

namespace {

// Which addresses are ours to give back: dropping pages of anybody else's memory would destroy data silently.
struct Registry {
  std::mutex mutex;
  std::map<uintptr_t, size_t> mappings; // start -> bytes
};

Registry &registry() {
  static Registry *instance = new Registry; // never destroyed: tensors may outlive static objects
  return *instance;
}

uintptr_t round_up(uintptr_t value, size_t step) { return (value + step - 1) / step * step; }

size_t page_size() { return static_cast<size_t>(::sysconf(_SC_PAGESIZE)); }

} // namespace

void *map_host(size_t nbytes, bool huge_pages) {
  const bool huge = huge_pages && nbytes >= kHugePage;
  const size_t slack = huge ? kHugePage : 0;
  if (nbytes > SIZE_MAX / 2) {
    errno = ENOMEM;
    return nullptr;
  }
  const size_t size = round_up(nbytes, page_size());
  void *mapped = ::mmap(nullptr, size + slack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return nullptr;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(mapped);
  const uintptr_t start = huge ? round_up(begin, kHugePage) : begin;
  const uintptr_t end = begin + size + slack;
  if (start > begin) ::munmap(mapped, start - begin);
  if (start + size < end) ::munmap(reinterpret_cast<void *>(start + size), end - (start + size));
#ifdef MADV_HUGEPAGE
  if (huge) ::madvise(reinterpret_cast<void *>(start), size, MADV_HUGEPAGE);
#endif
  std::lock_guard<std::mutex> lock(registry().mutex);
  registry().mappings[start] = size;
  return reinterpret_cast<void *>(start);
}

void unmap_host(void *data) {
  std::lock_guard<std::mutex> lock(registry().mutex);
  const auto found = registry().mappings.find(reinterpret_cast<uintptr_t>(data));
  if (found == registry().mappings.end()) return;
  // Under the lock: the moment it is unmapped another thread may be given the same address.
  ::munmap(data, found->second);
  registry().mappings.erase(found);
}

long long release_host_pages(void *data, size_t nbytes) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data);
  std::lock_guard<std::mutex> lock(registry().mutex);
  auto found = registry().mappings.upper_bound(begin);
  if (found == registry().mappings.begin()) return -1;
  --found;
  if (nbytes > found->second || begin - found->first > found->second - nbytes) return -1;
  const size_t page = page_size();
  const uintptr_t first = round_up(begin, page);
  const uintptr_t last = (begin + nbytes) / page * page;
  if (first >= last) return 0;
  if (::madvise(reinterpret_cast<void *>(first), last - first, MADV_DONTNEED) != 0) return 0;
  return static_cast<long long>(last - first);
}

} // namespace zinf::io
