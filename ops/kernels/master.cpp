#include "master.h"

#include "isa.h"
#include "thread_pool.h"

#include <algorithm>

namespace zinf {
namespace {

constexpr int64_t kTaskElements = 128 * 1024;

template <class F> void for_ranges(int64_t numel, F &&f) {
  parallel_for((numel + kTaskElements - 1) / kTaskElements, [&](int64_t task) {
    const int64_t first = task * kTaskElements;
    f(first, std::min(kTaskElements, numel - first));
  });
}

} // namespace

void split_master(const float *master, uint16_t *weight, int16_t *residual, int64_t numel) {
  const Isa &table = isa();
  for_ranges(numel, [&](int64_t i, int64_t n) { table.split(master + i, weight + i, residual + i, n); });
}

void join_master(const uint16_t *weight, const int16_t *residual, float *master, int64_t numel) {
  const Isa &table = isa();
  for_ranges(numel, [&](int64_t i, int64_t n) { table.join(weight + i, residual + i, master + i, n); });
}

} // namespace zinf
