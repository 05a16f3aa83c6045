// The sum of squares of a list of tensors.
#pragma once

#include "isa.h"

namespace zinf {

// One contiguous tensor; three int64 in a row, packed so by the Python side.
struct NormTensor {
  int64_t data; // address of the first element
  int64_t numel;
  int64_t dtype;
};
static_assert(sizeof(NormTensor) == 3 * sizeof(int64_t), "packed by the Python side");

// Writes the sum of squares of each tensor, in double, to sums. A sum is infinite or NaN exactly if its tensor has an
// infinite or NaN element: squares of finite floats are below 1.2e77, so no real list of them overflows a double.
// The bits depend on the tensor's values only: not on its address, its neighbours, the threads or the instruction set.
void squared_norms(const NormTensor *tensors, int64_t count, double *sums);

} // namespace zinf
