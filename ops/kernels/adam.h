// Adam and AdamW over the flat planes of a shard.
#pragma once

#include "isa.h"

namespace zinf {

// The state of one shard. All planes have numel elements.
struct AdamPlanes {
  void *weight;      // float32 master, or bf16 if residual is set
  int16_t *residual; // low halves of the master, or null
  float *exp_avg;
  float *exp_avg_sq;
  int64_t numel;
};

// A run of elements [offset, offset + numel) of the planes with its own gradient and hyper-parameters. The fields are
// five int64 in a row: the Python side packs them so.
struct AdamSegment {
  int64_t offset;
  int64_t numel;
  int64_t grad; // address of the first gradient element
  int64_t grad_dtype;
  int64_t scalars; // row of the hyper-parameter table
};
static_assert(sizeof(AdamSegment) == 5 * sizeof(int64_t), "packed by the Python side");
static_assert(sizeof(AdamScalars) == 10 * sizeof(float), "packed by the Python side");

// Updates every segment once, in parallel. Throws std::invalid_argument, before it changes anything, if a segment
// leaves the planes, names a missing row, has an unknown dtype or overlaps another segment.
void adam_update(const AdamPlanes &planes, const AdamSegment *segments, int64_t num_segments,
                 const AdamScalars *scalars, int64_t num_scalars);

} // namespace zinf
