#include "memory.h"

#include <c10/util/Exception.h>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <sys/mman.h>
#include <vector>

#include "stream.h"

namespace sim {

namespace {

constexpr size_t ARENA = size_t{4} << 30; // addresses; pages cost memory when they are used
constexpr size_t ALIGNMENT = 512;

char *map(int protection) {
  void *found = mmap(nullptr, ARENA, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  TORCH_CHECK(found != MAP_FAILED, "the simulated device cannot map ", ARENA, " bytes");
  return static_cast<char *>(found);
}

struct Block {
  size_t nbytes;
  int64_t stream;
  std::set<int64_t> others; // that were recorded
};

struct Waiting {
  char *address;
  Block block;
  std::vector<MarkPtr> marks;
};

struct Memory {
  std::mutex mutex;
  char *const faces = map(PROT_NONE);
  char *const programs = map(PROT_READ | PROT_WRITE);
  char *const reals = map(PROT_READ | PROT_WRITE);
  size_t used = 0;
  std::map<char *, Block> live;
  std::map<std::pair<int64_t, size_t>, std::vector<char *>> free;
  std::vector<Waiting> waiting;
  int64_t allocated = 0, peak = 0, capacity = int64_t{1} << 30;
  std::map<const char *, size_t> pinned;
};

Memory &memory() {
  static auto *found = new Memory;
  return *found;
}

void give_back(Memory &all, char *address, const Block &block) {
  std::memset(program(address), POISON, block.nbytes);
  char *bytes = real(address);
  const size_t nbytes = block.nbytes;
  stream(block.stream).push(Kind::compute, [bytes, nbytes] { std::memset(bytes, POISON, nbytes); });
  all.free[{block.stream, block.nbytes}].push_back(address);
}

void look_after_waiting(Memory &all) {
  std::vector<Waiting> still;
  for (Waiting &one : all.waiting) {
    bool done = true;
    for (const MarkPtr &mark : one.marks) {
      done = done && mark->passed();
    }
    if (done) {
      give_back(all, one.address, one.block);
    } else {
      still.push_back(std::move(one));
    }
  }
  all.waiting = std::move(still);
}

} // namespace

void *allocate(size_t nbytes) {
  if (nbytes == 0) {
    return nullptr;
  }
  Memory &all = memory();
  std::lock_guard<std::mutex> lock(all.mutex);
  const size_t rounded = (nbytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
  look_after_waiting(all);
  TORCH_CHECK_WITH(OutOfMemoryError, all.allocated + static_cast<int64_t>(rounded) <= all.capacity,
                   "the simulated device is out of memory: ", all.allocated, " of ", all.capacity,
                   " bytes are taken, and ", rounded, " more are wanted");
  auto &fitting = all.free[{current(), rounded}];
  char *found = nullptr;
  if (!fitting.empty()) {
    found = fitting.back();
    fitting.pop_back();
  } else {
    TORCH_CHECK_WITH(OutOfMemoryError, all.used + rounded <= ARENA, "the simulated device has no more addresses");
    found = all.faces + all.used;
    all.used += rounded;
    std::memset(program(found), POISON, rounded);
    std::memset(real(found), POISON, rounded);
  }
  all.live[found] = {rounded, current(), {}};
  all.allocated += static_cast<int64_t>(rounded);
  all.peak = std::max(all.peak, all.allocated);
  return found;
}

void release(void *address) {
  if (address == nullptr) {
    return;
  }
  Memory &all = memory();
  std::lock_guard<std::mutex> lock(all.mutex);
  const auto found = all.live.find(static_cast<char *>(address));
  TORCH_INTERNAL_ASSERT(found != all.live.end());
  const Block block = found->second;
  all.live.erase(found);
  all.allocated -= static_cast<int64_t>(block.nbytes);
  if (block.others.empty()) {
    give_back(all, static_cast<char *>(address), block);
    return;
  }
  std::vector<MarkPtr> marks;
  for (const int64_t other : block.others) {
    marks.push_back(stream(other).mark());
  }
  all.waiting.push_back({static_cast<char *>(address), block, std::move(marks)});
}

void record(void *address, int64_t stream) {
  Memory &all = memory();
  std::lock_guard<std::mutex> lock(all.mutex);
  auto found = all.live.upper_bound(static_cast<char *>(address));
  if (address == nullptr || found == all.live.begin()) {
    return;
  }
  Block &block = (--found)->second;
  if (block.stream != stream) {
    block.others.insert(stream);
  }
}

char *program(const void *address) { return memory().programs + (static_cast<const char *>(address) - memory().faces); }

char *real(const void *address) { return memory().reals + (static_cast<const char *>(address) - memory().faces); }

bool in_program(const void *address) {
  const auto *byte = static_cast<const char *>(address);
  return memory().programs <= byte && byte < memory().programs + ARENA;
}

const void *address_of(const void *program) {
  return memory().faces + (static_cast<const char *>(program) - memory().programs);
}

Stats stats() {
  std::lock_guard<std::mutex> lock(memory().mutex);
  return {memory().allocated, memory().peak, memory().capacity};
}

void reset_peak() {
  std::lock_guard<std::mutex> lock(memory().mutex);
  memory().peak = memory().allocated;
}

void set_capacity(int64_t nbytes) {
  std::lock_guard<std::mutex> lock(memory().mutex);
  memory().capacity = nbytes;
}

void pin(const void *begin, size_t nbytes) {
  std::lock_guard<std::mutex> lock(memory().mutex);
  memory().pinned[static_cast<const char *>(begin)] = nbytes;
}

bool unpin(const void *begin) {
  std::lock_guard<std::mutex> lock(memory().mutex);
  return memory().pinned.erase(static_cast<const char *>(begin)) != 0;
}

bool pinned(const void *begin, size_t nbytes) {
  const auto *first = static_cast<const char *>(begin);
  std::lock_guard<std::mutex> lock(memory().mutex);
  auto found = memory().pinned.upper_bound(first);
  return found != memory().pinned.begin() && (--found, first + nbytes <= found->first + found->second);
}

int64_t pinned_bytes() {
  std::lock_guard<std::mutex> lock(memory().mutex);
  int64_t total = 0;
  for (const auto &[begin, nbytes] : memory().pinned) {
    total += static_cast<int64_t>(nbytes);
  }
  return total;
}

} // namespace sim
