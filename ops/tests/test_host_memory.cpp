// Mappings: alignment, pages given back, and nobody else's memory touched.
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <initializer_list>

#include "io/host_memory.h"
#include "tests/check.h"

using namespace zinf::io;

namespace {

void test_host_memory() {
  for (const bool huge : {true, false}) {
    for (const size_t size : {size_t{1}, size_t{100000}, kHugePage * 3 + 5}) {
      char *data = static_cast<char *>(map_host(size, huge));
      CHECK(data != nullptr);
      CHECK(reinterpret_cast<uintptr_t>(data) % (huge && size >= kHugePage ? kHugePage : 4096) == 0);
      std::memset(data, 7, size);
      const long long released = release_host_pages(data, size);
      CHECK(released >= 0 && static_cast<size_t>(released) <= size);
      if (released > 0) CHECK(data[0] == 0);
      CHECK(release_host_pages(data + 1, kHugePage * 8) == -1);
      unmap_host(data);
      CHECK(release_host_pages(data, size) == -1);
    }
  }
  CHECK(map_host(SIZE_MAX, true) == nullptr && errno == ENOMEM);
}

} // namespace

int main() {
  RUN(test_host_memory);
  return 0;
}
