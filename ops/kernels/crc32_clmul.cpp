// CRC-32 by carry-less products of 128-bit registers, see Note [Folding]; empty where there are none.
#if defined(__PCLMUL__) && defined(__SSE4_1__)
#include "crc32_impl.h"

#include <immintrin.h>

namespace zinf {

uint32_t crc_by_clmul(uint32_t state, const uint8_t *data, size_t nbytes) {
  constexpr size_t kRegisters = 8, kStride = 16 * kRegisters; // as many as it takes to hide the latency
  if (nbytes < kStride) return crc_by_tables(state, data, nbytes);
  constexpr long long kFirst = crc_fold_first(8 * kStride), kSecond = crc_fold_second(8 * kStride);
  const __m128i constants = _mm_set_epi64x(kSecond, kFirst);
  __m128i folded[kRegisters];
  for (size_t i = 0; i < kRegisters; ++i) folded[i] = _mm_loadu_si128(reinterpret_cast<const __m128i *>(data + 16 * i));
  folded[0] = _mm_xor_si128(folded[0], _mm_cvtsi32_si128(int(state)));
  for (data += kStride, nbytes -= kStride; nbytes >= kStride; data += kStride, nbytes -= kStride) {
    for (size_t i = 0; i < kRegisters; ++i) {
      const __m128i next = _mm_loadu_si128(reinterpret_cast<const __m128i *>(data + 16 * i));
      const __m128i first = _mm_clmulepi64_si128(folded[i], constants, 0x00);
      const __m128i second = _mm_clmulepi64_si128(folded[i], constants, 0x11);
      folded[i] = _mm_xor_si128(_mm_xor_si128(first, second), next);
    }
  }
  uint8_t left[kStride];
  for (size_t i = 0; i < kRegisters; ++i) _mm_storeu_si128(reinterpret_cast<__m128i *>(left + 16 * i), folded[i]);
  return crc_by_tables(crc_by_tables(0, left, kStride), data, nbytes);
}

} // namespace zinf
#endif
