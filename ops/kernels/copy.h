// Copies between regions of memory, at the speed of the memory.
#pragma once

#include <cstdint>

namespace zinf {

// One region; three int64 in a row, packed so by the Python side.
struct CopyRegion {
  int64_t to;   // address of the first byte
  int64_t from; // likewise
  int64_t nbytes;
};
static_assert(sizeof(CopyRegion) == 3 * sizeof(int64_t), "packed by the Python side");

// Copies all regions, on all threads of the pool. No region that is written may overlap another.
void copy_regions(const CopyRegion *regions, int64_t count);

} // namespace zinf
