#include "adam.h"

#include "thread_pool.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

namespace zinf {
namespace {

// Elements a task updates. Segments are laid end to end and cut at multiples of this, so that thousands of tiny
// segments cost a few tasks. Where the cuts fall does not change any result.
constexpr int64_t kTaskElements = 64 * 1024;

std::string describe(const AdamSegment &s, int64_t index) {
  return "segment " + std::to_string(index) + " (offset " + std::to_string(s.offset) + ", " + std::to_string(s.numel) +
         " elements)";
}

void check_segments(const AdamPlanes &planes, const AdamSegment *segments, int64_t count, int64_t num_scalars) {
  bool ascending = true;
  for (int64_t i = 0; i < count; ++i) {
    const AdamSegment &s = segments[i];
    if (s.numel < 0 || s.offset < 0 || s.numel > planes.numel || s.offset > planes.numel - s.numel)
      throw std::invalid_argument(describe(s, i) + " is outside the planes of " + std::to_string(planes.numel) +
                                  " elements");
    if (s.scalars < 0 || s.scalars >= num_scalars)
      throw std::invalid_argument(describe(s, i) + " names row " + std::to_string(s.scalars) + " of " +
                                  std::to_string(num_scalars) + " hyper-parameter rows");
    if (s.grad_dtype != kFloat32 && s.grad_dtype != kBFloat16)
      throw std::invalid_argument(describe(s, i) + " has an unknown gradient dtype");
    ascending = ascending && (i == 0 || segments[i - 1].offset + segments[i - 1].numel <= s.offset);
  }
  if (ascending) return;
  std::vector<int64_t> order;
  for (int64_t i = 0; i < count; ++i)
    if (segments[i].numel) order.push_back(i);
  std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return segments[a].offset < segments[b].offset; });
  for (size_t i = 1; i < order.size(); ++i) {
    const AdamSegment &a = segments[order[i - 1]], &b = segments[order[i]];
    if (a.offset + a.numel > b.offset)
      throw std::invalid_argument(describe(a, order[i - 1]) + " overlaps " + describe(b, order[i]));
  }
}

// Elements [first, first + numel) of one segment.
AdamRange range_of(const AdamPlanes &planes, const AdamSegment &s, int64_t first, int64_t numel) {
  const int64_t at = s.offset + first;
  const int64_t grad_bytes = s.grad_dtype == kBFloat16 ? 2 : 4;
  AdamRange r;
  r.weight = static_cast<char *>(planes.weight) + at * (planes.residual ? 2 : 4);
  r.residual = planes.residual ? planes.residual + at : nullptr;
  r.exp_avg = planes.exp_avg + at;
  r.exp_avg_sq = planes.exp_avg_sq + at;
  r.grad = reinterpret_cast<const char *>(static_cast<uintptr_t>(s.grad)) + first * grad_bytes;
  r.grad_dtype = s.grad_dtype;
  r.numel = numel;
  return r;
}

} // namespace

void adam_update(const AdamPlanes &planes, const AdamSegment *segments, int64_t count, const AdamScalars *scalars,
                 int64_t num_scalars) {
  check_segments(planes, segments, count, num_scalars);
  std::vector<int64_t> ends(count); // of each segment, on the line of all segments end to end
  int64_t total = 0;
  for (int64_t i = 0; i < count; ++i) ends[i] = total += segments[i].numel;

  const Isa &table = isa();
  parallel_for((total + kTaskElements - 1) / kTaskElements, [&](int64_t task) {
    int64_t at = task * kTaskElements;
    const int64_t end = std::min(at + kTaskElements, total);
    int64_t i = std::upper_bound(ends.begin(), ends.end(), at) - ends.begin();
    for (; at < end; ++i) {
      const AdamSegment &s = segments[i];
      const int64_t numel = std::min(ends[i], end) - at;
      if (numel) table.adam(range_of(planes, s, at - (ends[i] - s.numel), numel), scalars[s.scalars]);
      at += numel;
    }
  });
}

} // namespace zinf
