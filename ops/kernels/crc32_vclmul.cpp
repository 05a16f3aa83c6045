// CRC-32 by carry-less products of four lanes of 128 bits at once, see Note [Folding]; empty where there are none.
#if defined(__AVX512F__) && defined(__AVX512VL__) && defined(__VPCLMULQDQ__)
#include "crc32_impl.h"

#include <immintrin.h>

namespace zinf {

uint32_t crc_by_vclmul(uint32_t state, const uint8_t *data, size_t nbytes) {
  constexpr size_t kRegisters = 4, kStride = 64 * kRegisters;
  if (nbytes < kStride) return crc_by_tables(state, data, nbytes);
  constexpr long long kFirst = crc_fold_first(8 * kStride), kSecond = crc_fold_second(8 * kStride);
  const __m512i constants = _mm512_set_epi64(kSecond, kFirst, kSecond, kFirst, kSecond, kFirst, kSecond, kFirst);
  __m512i folded[kRegisters];
  for (size_t i = 0; i < kRegisters; ++i) folded[i] = _mm512_loadu_si512(data + 64 * i);
  folded[0] = _mm512_xor_si512(folded[0], _mm512_zextsi128_si512(_mm_cvtsi32_si128(int(state))));
  for (data += kStride, nbytes -= kStride; nbytes >= kStride; data += kStride, nbytes -= kStride) {
    for (size_t i = 0; i < kRegisters; ++i) {
      const __m512i next = _mm512_loadu_si512(data + 64 * i);
      const __m512i first = _mm512_clmulepi64_epi128(folded[i], constants, 0x00);
      const __m512i second = _mm512_clmulepi64_epi128(folded[i], constants, 0x11);
      folded[i] = _mm512_ternarylogic_epi64(first, second, next, 0x96); // the sum of all three
    }
  }
  uint8_t left[kStride];
  for (size_t i = 0; i < kRegisters; ++i) _mm512_storeu_si512(left + 64 * i, folded[i]);
  return crc_by_tables(crc_by_tables(0, left, kStride), data, nbytes);
}

} // namespace zinf
#endif
