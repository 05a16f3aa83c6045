// Python names of the compute kernels. Tensors come as addresses: the typed facade (lightning_zinf/ops/kernels.py)
// checks them. Every call that does work releases the GIL.
#include "kernels/adam.h"
#include "kernels/copy.h"
#include "kernels/crc32.h"
#include "kernels/isa.h"
#include "kernels/master.h"
#include "kernels/norm.h"
#include "kernels/thread_pool.h"

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

namespace nb = nanobind;
using NoGil = nb::call_guard<nb::gil_scoped_release>;

namespace {

template <class T> T *at(uintptr_t address) { return reinterpret_cast<T *>(address); }

void adam_update(uintptr_t weight, uintptr_t residual, uintptr_t exp_avg, uintptr_t exp_avg_sq, int64_t numel,
                 uintptr_t segments, int64_t num_segments, uintptr_t scalars, int64_t num_scalars) {
  const zinf::AdamPlanes planes{at<void>(weight), at<int16_t>(residual), at<float>(exp_avg), at<float>(exp_avg_sq),
                                numel};
  zinf::adam_update(planes, at<const zinf::AdamSegment>(segments), num_segments, at<const zinf::AdamScalars>(scalars),
                    num_scalars);
}

void squared_norms(uintptr_t tensors, int64_t count, uintptr_t sums) {
  zinf::squared_norms(at<const zinf::NormTensor>(tensors), count, at<double>(sums));
}

void split_master(uintptr_t master, uintptr_t weight, uintptr_t residual, int64_t numel) {
  zinf::split_master(at<const float>(master), at<uint16_t>(weight), at<int16_t>(residual), numel);
}

void join_master(uintptr_t weight, uintptr_t residual, uintptr_t master, int64_t numel) {
  zinf::join_master(at<const uint16_t>(weight), at<const int16_t>(residual), at<float>(master), numel);
}

void copy_regions(uintptr_t regions, int64_t count) { zinf::copy_regions(at<const zinf::CopyRegion>(regions), count); }

uint32_t crc32(uint32_t crc, uintptr_t data, size_t nbytes) { return zinf::crc32(crc, at<const void>(data), nbytes); }

nb::list isa_names() {
  nb::list names;
  for (const char *const *name = zinf::isa_names(); *name; ++name) names.append(nb::str(*name));
  return names;
}

} // namespace

void init_kernels(nb::module_ &m) {
  m.def("adam_update", &adam_update, NoGil());
  m.def("squared_norms", &squared_norms, NoGil());
  m.def("split_master", &split_master, NoGil());
  m.def("join_master", &join_master, NoGil());
  m.def("copy_regions", &copy_regions, NoGil());
  m.def("crc32", &crc32, NoGil());
  m.def("crc32_combine", &zinf::crc32_combine);
  m.def("set_num_threads", &zinf::set_num_threads, NoGil());
  m.def("num_threads", &zinf::num_threads, NoGil());
  m.def("isa", [] { return zinf::isa().name; });
  m.def("isa_names", &isa_names);
  m.def("set_isa", [](const std::string &name) { zinf::set_isa(name.c_str()); });
}
