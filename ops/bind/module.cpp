// The extension module `lightning_zinf._ext`. Only files in bind/ include nanobind.
#include <nanobind/nanobind.h>

namespace nb = nanobind;

void init_kernels(nb::module_ &m);
void init_io(nb::module_ &m);

NB_MODULE(_ext, m) {
  // Engines live until the interpreter ends, and with them files and tickets: that is no leak worth a warning.
  nb::set_leak_warnings(false);
  m.doc() = "Compiled core of lightning-zinf: optimizer kernels, host memory and asynchronous file I/O.";
  init_kernels(m);
  init_io(m);
}
