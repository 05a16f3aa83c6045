#include "crc32.h"

#include "crc32_impl.h"
#include "isa.h"

#include <cstring>

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace zinf {
namespace {

constexpr int kSlices = 16;

// Entry [k][b]: what byte b adds to the state when k more bytes follow it.
struct Tables {
  uint32_t of[kSlices][256] = {};

  constexpr Tables() {
    for (uint32_t byte = 0; byte < 256; ++byte) {
      uint32_t v = byte;
      for (int bit = 0; bit < 8; ++bit) v = crc_times_x(v);
      of[0][byte] = v;
    }
    for (int k = 1; k < kSlices; ++k)
      for (int byte = 0; byte < 256; ++byte) of[k][byte] = (of[k - 1][byte] >> 8) ^ of[0][of[k - 1][byte] & 0xFF];
  }
};

constexpr Tables tables;

using Update = uint32_t (*)(uint32_t state, const uint8_t *data, size_t nbytes);

// By the instruction set in use, so that ZINF_ISA chooses here too; not every CPU that runs it multiplies carry-less.
Update choose() {
#if defined(__x86_64__)
  const char *name = isa().name;
  if (std::strcmp(name, "base") == 0) return crc_by_tables;
  if (std::strcmp(name, "avx512") == 0 && __builtin_cpu_supports("vpclmulqdq")) return crc_by_vclmul;
  if (__builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.1")) return crc_by_clmul;
#elif defined(__aarch64__) && defined(__linux__)
  if (getauxval(AT_HWCAP) & HWCAP_CRC32) return crc_by_arm;
#endif
  return crc_by_tables;
}

// a * b mod P
uint32_t product(uint32_t a, uint32_t b) {
  uint32_t result = 0;
  for (uint32_t bit = 0x80000000u; bit; bit >>= 1) {
    if (a & bit) result ^= b;
    b = crc_times_x(b);
  }
  return result;
}

} // namespace

uint32_t crc_by_tables(uint32_t state, const uint8_t *data, size_t nbytes) {
  for (; nbytes >= kSlices; data += kSlices, nbytes -= kSlices) {
    uint32_t next = 0;
    for (int i = 0; i < kSlices; ++i) {
      const uint32_t byte = i < 4 ? data[i] ^ ((state >> (8 * i)) & 0xFF) : data[i];
      next ^= tables.of[kSlices - 1 - i][byte];
    }
    state = next;
  }
  for (; nbytes; ++data, --nbytes) state = (state >> 8) ^ tables.of[0][(state ^ *data) & 0xFF];
  return state;
}

uint32_t crc32(uint32_t crc, const void *data, size_t nbytes) {
  return ~choose()(~crc, static_cast<const uint8_t *>(data), nbytes);
}

// Bytes that follow multiply by x^8 each; the inversions at both ends cancel out.
uint32_t crc32_combine(uint32_t first, uint32_t second, uint64_t nbytes) {
  uint32_t power = 0x80000000u, square = crc_x_to(8);
  for (; nbytes; nbytes >>= 1) {
    if (nbytes & 1) power = product(power, square);
    square = product(square, square);
  }
  return product(first, power) ^ second;
}

} // namespace zinf
