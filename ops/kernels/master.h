// The float32 master weight as two 16-bit planes, and back.
//
// Note. weight = (u + 0x8000) >> 16 (bf16, rounded half up) and residual = the low 16 bits of u, read as signed, with u
// the bits of the master; u = (weight << 16) + residual modulo 2^32. That is a bijection over all 2^32 patterns. The
// weight is the bf16 nearest to the master, but for NaNs with a payload above 0x7fff7fff, which the Adam kernel never
// writes.
#pragma once

#include <cstdint>

namespace zinf {

void split_master(const float *master, uint16_t *weight, int16_t *residual, int64_t numel);
void join_master(const uint16_t *weight, const int16_t *residual, float *master, int64_t numel);

} // namespace zinf
