#include "norm.h"

#include "thread_pool.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace zinf {
namespace {

// Part of the result's definition: a tensor is summed in pieces of this many elements, the pieces in order.
constexpr int64_t kPieceElements = 64 * 1024;

struct Piece {
  const void *data;
  int64_t dtype;
  int64_t numel;
};

} // namespace

void squared_norms(const NormTensor *tensors, int64_t count, double *sums) {
  std::vector<Piece> pieces;
  std::vector<size_t> tasks{0}; // first piece of each task; small tensors share a task
  int64_t task_elements = 0;
  for (int64_t i = 0; i < count; ++i) {
    const NormTensor &t = tensors[i];
    const char *data = reinterpret_cast<const char *>(static_cast<uintptr_t>(t.data));
    const int64_t bytes = t.dtype == kBFloat16 ? 2 : 4;
    for (int64_t first = 0; first < t.numel; first += kPieceElements) {
      pieces.push_back({data + first * bytes, t.dtype, std::min(kPieceElements, t.numel - first)});
      task_elements += pieces.back().numel;
      if (task_elements >= kPieceElements) {
        tasks.push_back(pieces.size());
        task_elements = 0;
      }
    }
  }
  if (tasks.back() != pieces.size()) tasks.push_back(pieces.size());

  const Isa &table = isa();
  std::vector<double> partial(pieces.size());
  parallel_for(static_cast<int64_t>(tasks.size()) - 1, [&](int64_t task) {
    for (size_t i = tasks[task]; i < tasks[task + 1]; ++i)
      partial[i] = table.squared_norm(pieces[i].data, pieces[i].dtype, pieces[i].numel);
  });

  size_t next = 0;
  for (int64_t i = 0; i < count; ++i) {
    sums[i] = 0.0;
    for (int64_t first = 0; first < tensors[i].numel; first += kPieceElements) sums[i] += partial[next++];
    if (std::isnan(sums[i])) sums[i] = std::numeric_limits<double>::quiet_NaN(); // which NaN is up to the compiler
  }
}

} // namespace zinf
