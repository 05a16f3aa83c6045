// CRC-32 by the instructions of arm64 that have this very polynomial; empty where there are none.
#if defined(__aarch64__) && defined(__ARM_FEATURE_CRC32)
#include "crc32_impl.h"

#include <arm_acle.h>

namespace zinf {

uint32_t crc_by_arm(uint32_t state, const uint8_t *data, size_t nbytes) {
  for (; nbytes >= 8; data += 8, nbytes -= 8) {
    uint64_t word;
    __builtin_memcpy(&word, data, 8);
    state = __crc32d(state, word);
  }
  for (; nbytes; ++data, --nbytes) state = __crc32b(state, *data);
  return state;
}

} // namespace zinf
#endif
