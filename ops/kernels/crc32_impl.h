// What the ways to compute a CRC-32 share; crc32.cpp chooses among them.
//
// Note. A CRC is a polynomial over GF(2) modulo P = x^32 + x^26 + ... + 1. Everything here is reflected: in a register
// of n bits, bit i stands for x^(n - 1 - i), so the first bit of a message is the lowest bit of its first byte and the
// highest power. The *state* is the CRC without the inversions. A state may be added (xor) to the first four bytes of
// the rest of the message, and the state before them is zero then.
//
// Note [Folding]. A register of 128 bits of the message may be multiplied by x^d modulo P and added to the 128 bits
// that come d bits later: the remainder stays the same. The product of a half of 64 bits and a constant of 32 bits has
// less than 128. A carry-less product of two 64-bit registers, read as a 128-bit register, is the product times x, and
// a constant in the lower half of its register is times x^32: so the first half, which is x^64 above the second, is
// multiplied by x^(d + 64 - 33) mod P, the second by x^(d - 33) mod P. When fewer than a whole stride is left, the
// registers are as good as message bytes, and tables take it from there. After V. Gopal et al., "Fast CRC Computation
// for Generic Polynomials Using PCLMULQDQ Instruction", Intel 2009, less its last steps.
//
// As in isa_impl.inc, no C++ library header and nothing with external linkage is defined here: this is compiled for
// newer instruction sets too.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace zinf {

constexpr uint32_t kCrcPolynomial = 0xEDB88320u; // P without x^32

// v * x mod P
static constexpr uint32_t crc_times_x(uint32_t v) { return (v >> 1) ^ (v & 1 ? kCrcPolynomial : 0u); }

// x^n mod P
static constexpr uint32_t crc_x_to(unsigned n) {
  uint32_t v = 0x80000000u;
  for (unsigned i = 0; i < n; ++i) v = crc_times_x(v);
  return v;
}

// The constants that fold a register onto what comes `bits` later.
static constexpr uint64_t crc_fold_first(unsigned bits) { return crc_x_to(bits + 64 - 33); }
static constexpr uint64_t crc_fold_second(unsigned bits) { return crc_x_to(bits - 33); }

// Each goes from the state before nbytes bytes to the state after them.
uint32_t crc_by_tables(uint32_t state, const uint8_t *data, size_t nbytes);
uint32_t crc_by_clmul(uint32_t state, const uint8_t *data, size_t nbytes);  // x86-64 with PCLMULQDQ
uint32_t crc_by_vclmul(uint32_t state, const uint8_t *data, size_t nbytes); // with AVX-512 and VPCLMULQDQ
uint32_t crc_by_arm(uint32_t state, const uint8_t *data, size_t nbytes);    // arm64 with the CRC32 extension

} // namespace zinf
