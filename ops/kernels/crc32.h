// CRC-32 as zlib computes it: reflected, polynomial 0x04C11DB7, all bits inverted at both ends.
#pragma once

#include <cstddef>
#include <cstdint>

namespace zinf {

// The checksum of what crc is the checksum of (0: of nothing), followed by nbytes bytes from data on. By the calling
// thread alone: who has several pieces has several threads.
uint32_t crc32(uint32_t crc, const void *data, size_t nbytes);

// The checksum of two byte strings, one after the other, from those of each and the length of the second.
uint32_t crc32_combine(uint32_t first, uint32_t second, uint64_t nbytes);

} // namespace zinf
