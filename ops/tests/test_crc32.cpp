// Tests of the checksum without Python: every way to compute it against one bit at a time.
#include "check.h"

#include "kernels/crc32.h"
#include "kernels/crc32_impl.h"
#include "kernels/isa.h"

#include <algorithm>
#include <cstring>
#include <random>
#include <vector>

using namespace zinf;

namespace {

std::mt19937_64 rng(20240611);

std::vector<uint8_t> random_bytes(size_t count) {
  std::vector<uint8_t> bytes(count);
  for (uint8_t &byte : bytes) byte = uint8_t(rng());
  return bytes;
}

// The definition.
uint32_t bitwise(uint32_t crc, const uint8_t *data, size_t nbytes) {
  crc = ~crc;
  for (size_t i = 0; i < nbytes; ++i) {
    crc ^= data[i];
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ (crc & 1 ? 0xEDB88320u : 0u);
  }
  return ~crc;
}

template <class F> void for_each_isa(F &&f) {
  const char *best = nullptr;
  for (const char *const *name = isa_names(); *name; ++name) {
    set_isa(best = *name);
    f();
  }
  set_isa(best);
}

void test_published_values() {
  for_each_isa([] {
    CHECK(crc32(0, "", 0) == 0);
    CHECK(crc32(0, "123456789", 9) == 0xCBF43926u); // the check value of CRC-32/ISO-HDLC
    CHECK(crc32(0x12345678u, nullptr, 0) == 0x12345678u);
  });
}

// Around each stride of each way, at any address and from any state.
void test_all_short_lengths_and_shifts() {
  const std::vector<uint8_t> bytes = random_bytes(1100);
  for_each_isa([&] {
    for (size_t shift = 0; shift < 20; ++shift)
      for (size_t length = 0; length + shift <= bytes.size(); length += length < 600 ? 1 : 37) {
        const uint32_t before = uint32_t(rng());
        CHECK(crc32(before, bytes.data() + shift, length) == bitwise(before, bytes.data() + shift, length));
      }
  });
}

void test_single_bits() {
  std::vector<uint8_t> bytes(777, 0);
  for_each_isa([&] {
    for (size_t bit = 0; bit < 8 * bytes.size(); bit += 5) {
      bytes[bit / 8] = uint8_t(1u << bit % 8);
      CHECK(crc32(0, bytes.data(), bytes.size()) == bitwise(0, bytes.data(), bytes.size()));
      bytes[bit / 8] = 0;
    }
  });
}

void test_long_ones_in_pieces() {
  const std::vector<uint8_t> bytes = random_bytes(3000017);
  const uint32_t expected = bitwise(0, bytes.data(), bytes.size());
  for_each_isa([&] {
    CHECK(crc32(0, bytes.data(), bytes.size()) == expected);
    uint32_t one_by_one = 0, combined = 0;
    for (size_t at = 0, length = 1; at < bytes.size(); at += length) {
      length = std::min<size_t>(bytes.size() - at, rng() % 300000);
      one_by_one = crc32(one_by_one, bytes.data() + at, length);
      combined = crc32_combine(combined, crc32(0, bytes.data() + at, length), length);
    }
    CHECK(one_by_one == expected);
    CHECK(combined == expected);
  });
}

// Ends where a page does: nothing beyond it is read (the sanitizers see that).
void test_reads_nothing_beyond() {
  for_each_isa([] {
    for (size_t length : {0, 1, 15, 16, 17, 127, 128, 129, 255, 256, 257, 1000}) {
      const std::vector<uint8_t> bytes = random_bytes(length);
      CHECK(crc32(0, bytes.data(), length) == bitwise(0, bytes.data(), length));
    }
  });
}

// What the others end with, and what is left where no instruction helps: on arm64 nothing else gets there.
void test_tables() {
  const std::vector<uint8_t> bytes = random_bytes(400);
  for (size_t shift = 0; shift < 20; ++shift)
    for (size_t length = 0; length + shift <= bytes.size(); ++length) {
      const uint32_t before = uint32_t(rng());
      CHECK(~crc_by_tables(~before, bytes.data() + shift, length) == bitwise(before, bytes.data() + shift, length));
    }
}

// Many zeros: lengths that no test could have in memory.
void test_combining_with_huge_lengths() {
  const uint32_t a = 0x9ABCDEF0u;
  uint32_t doubled = a;
  for (int i = 0; i < 2; ++i) doubled = crc32_combine(doubled, 0, uint64_t(1) << 40);
  CHECK(doubled == crc32_combine(a, 0, uint64_t(1) << 41));
  CHECK(crc32_combine(a, 77, 0) == (a ^ 77));
}

} // namespace

int main() {
  RUN(test_published_values);
  RUN(test_all_short_lengths_and_shifts);
  RUN(test_single_bits);
  RUN(test_long_ones_in_pieces);
  RUN(test_reads_nothing_beyond);
  RUN(test_tables);
  RUN(test_combining_with_huge_lengths);
  return 0;
}
