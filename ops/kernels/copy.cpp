// Note. What is copied is larger than caches, and is not read soon. So where the instruction set has stores that go
// past the caches (on x86-64 the first one has), they are used: others first read each line that they are about to
// overwrite.
#include "copy.h"

#include "thread_pool.h"

#include <algorithm>
#include <cstring>
#include <vector>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace zinf {
namespace {

constexpr int64_t kChunkBytes = 256 * 1024; // short enough that nobody waits long for a thread that lost its core

void copy_past_caches(char *to, const char *from, int64_t nbytes) {
#if defined(__SSE2__)
  constexpr int64_t kLine = 64, kVector = 16;
  const int64_t head = std::min<int64_t>(nbytes, -reinterpret_cast<intptr_t>(to) & (kLine - 1));
  std::memcpy(to, from, head);
  int64_t at = head;
  for (; at + kLine <= nbytes; at += kLine) {
    __m128i line[kLine / kVector];
    for (int64_t i = 0; i < kLine / kVector; ++i)
      line[i] = _mm_loadu_si128(reinterpret_cast<const __m128i *>(from + at + i * kVector));
    for (int64_t i = 0; i < kLine / kVector; ++i)
      _mm_stream_si128(reinterpret_cast<__m128i *>(to + at + i * kVector), line[i]);
  }
  _mm_sfence(); // before this thread says that it is done
  std::memcpy(to + at, from + at, nbytes - at);
#else
  std::memcpy(to, from, nbytes);
#endif
}

} // namespace

void copy_regions(const CopyRegion *regions, int64_t count) {
  std::vector<CopyRegion> chunks;
  for (int64_t i = 0; i < count; ++i) {
    const CopyRegion &r = regions[i];
    for (int64_t at = 0; at < r.nbytes; at += kChunkBytes)
      chunks.push_back({r.to + at, r.from + at, std::min(kChunkBytes, r.nbytes - at)});
  }
  parallel_for(static_cast<int64_t>(chunks.size()), [&](int64_t i) {
    copy_past_caches(reinterpret_cast<char *>(static_cast<uintptr_t>(chunks[i].to)),
                     reinterpret_cast<const char *>(static_cast<uintptr_t>(chunks[i].from)), chunks[i].nbytes);
  });
}

} // namespace zinf
