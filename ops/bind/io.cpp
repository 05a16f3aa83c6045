// Files, engines, tickets and host memory for Python. The typed and documented face is lightning_zinf/ops/io.py and
// memory.py; what they pass here has been checked.
//
// Note [Who holds the buffer]
// A ticket holds its buffer's owner until its request is done. Workers never take the GIL, so they cannot let go of
// a Python object: a ticket that Python drops in flight leaves the owner in a list, swept at later submissions.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <exception>
#include <list>
#include <memory>

#include "io/engine.h"
#include "io/host_memory.h"

namespace nb = nanobind;
using namespace zinf::io;

namespace {

struct Orphan {
  std::shared_ptr<Ticket> ticket;
  nb::object owner;
};

// Touched with the GIL held only. Never destroyed: at exit there may be no interpreter left to release objects to.
std::list<Orphan> &orphans() {
  static auto *list = new std::list<Orphan>;
  return *list;
}

void sweep_orphans() {
  // Moved out first: releasing an owner may run Python code that comes back here.
  std::list<Orphan> ripe;
  for (auto it = orphans().begin(); it != orphans().end();) {
    const auto next = std::next(it);
    if (it->ticket->done()) ripe.splice(ripe.end(), orphans(), it);
    it = next;
  }
}

class PyTicket {
public:
  PyTicket(std::shared_ptr<Ticket> ticket, nb::object owner) : ticket_(std::move(ticket)), owner_(std::move(owner)) {}
  PyTicket(PyTicket &&) = default;
  ~PyTicket() {
    if (ticket_ && owner_.is_valid() && !ticket_->done()) orphans().push_back({std::move(ticket_), std::move(owner_)});
  }

  bool done() const { return ticket_->done(); }

  size_t wait(std::optional<double> timeout) {
    using clock = std::chrono::steady_clock;
    constexpr std::chrono::duration<double> kForever{1e9};
    const auto limit = std::min(kForever, std::chrono::duration<double>(std::max(0.0, timeout.value_or(1e9))));
    const auto end = clock::now() + std::chrono::duration_cast<clock::duration>(limit);
    // In slices, so that Ctrl-C gets through.
    for (bool done = ticket_->done(); !done;) {
      const auto left = end - clock::now();
      {
        nb::gil_scoped_release release;
        done = ticket_->wait_for(std::clamp<clock::duration>(left, clock::duration(0), std::chrono::milliseconds(100)));
      }
      if (PyErr_CheckSignals() != 0) throw nb::python_error();
      if (!done && left <= clock::duration(0)) throw_timeout();
    }
    owner_.reset();
    return ticket_->result();
  }

  int64_t elapsed() const { return ticket_->elapsed_ns(); }
  size_t nbytes() const { return ticket_->length(); }

private:
  [[noreturn]] void throw_timeout() const {
    const Ticket &t = *ticket_;
    PyErr_Format(PyExc_TimeoutError, "%s of %s at offset %llu, length %zu bytes not done after %lld ms", name(t.op()),
                 t.file().path().c_str(), static_cast<unsigned long long>(t.offset()), t.length(),
                 static_cast<long long>(t.elapsed_ns() / 1000000));
    throw nb::python_error();
  }

  std::shared_ptr<Ticket> ticket_;
  nb::object owner_;
};

// A holder of its own: nanobind's shared_ptr caster would make the last reference take the GIL, in a worker.
struct PyFile {
  std::shared_ptr<File> file;
};

// For the exit of the process. Touched with the GIL held only.
std::list<std::weak_ptr<Engine>> &live_engines() {
  static auto *list = new std::list<std::weak_ptr<Engine>>;
  return *list;
}

BackendKind parse_backend(const std::string &backend) {
  if (backend == "auto") return BackendKind::kAuto;
  if (backend == "threads") return BackendKind::kThreads;
  if (backend == "io_uring") return BackendKind::kUring;
  throw UsageError("backend must be 'auto', 'threads' or 'io_uring', not '" + backend + "'");
}

class PyEngine {
public:
  PyEngine(size_t threads, size_t queue_depth, size_t block_bytes, const std::string &backend)
      : engine_(std::make_shared<Engine>(EngineOptions{threads, queue_depth, block_bytes, parse_backend(backend)})) {
    live_engines().remove_if([](const std::weak_ptr<Engine> &engine) { return engine.expired(); });
    live_engines().push_back(engine_);
  }
  ~PyEngine() {
    nb::gil_scoped_release release;
    engine_.reset(); // drains
  }
  PyEngine(const PyEngine &) = delete;

  PyTicket submit(Op op, const PyFile &file, uint64_t offset, uintptr_t data, size_t nbytes, nb::object owner) {
    if (!orphans().empty()) sweep_orphans();
    return PyTicket(engine_->submit(op, file.file, offset, reinterpret_cast<void *>(data), nbytes), std::move(owner));
  }
  void close() {
    {
      nb::gil_scoped_release release;
      engine_->close();
    }
    sweep_orphans();
  }
  Engine &engine() { return *engine_; }

private:
  std::shared_ptr<Engine> engine_;
};

// Runs before the interpreter goes down, while threads can still be joined.
void close_all_engines() {
  std::list<std::shared_ptr<Engine>> engines;
  for (const auto &weak : live_engines()) {
    if (auto engine = weak.lock()) engines.push_back(std::move(engine));
  }
  {
    nb::gil_scoped_release release;
    for (const auto &engine : engines) engine->close();
    engines.clear();
  }
  sweep_orphans();
}

// OSError(errno, message, path): Python picks the subclass (FileNotFoundError, PermissionError...) from the errno.
void translate(const std::exception_ptr &pointer, void *) {
  try {
    std::rethrow_exception(pointer);
  } catch (const IoException &e) {
    const Error &error = e.error();
    const nb::object arguments = nb::make_tuple(error.code, error.message, error.path);
    PyErr_SetObject(PyExc_OSError, arguments.ptr());
  } catch (const UsageError &e) {
    PyErr_SetString(PyExc_ValueError, e.what());
  }
}

// The part of DLPack's ABI (version 0, stable) that carries a flat array of bytes to torch. With our own deleter in
// plain C the memory goes back without Python, whichever thread drops the last tensor.
struct DLTensor {
  void *data;
  int32_t device_type, device_id; // 1: CPU
  int32_t ndim;
  uint8_t code, bits; // 1: unsigned
  uint16_t lanes;
  int64_t *shape;
  int64_t *strides;
  uint64_t byte_offset;
};

struct DLManagedTensor {
  DLTensor tensor;
  void *context;
  void (*deleter)(DLManagedTensor *);
};

struct HostTensor {
  DLManagedTensor managed;
  int64_t shape;
  int64_t stride;
};

void delete_host_tensor(DLManagedTensor *managed) {
  auto *host = reinterpret_cast<HostTensor *>(managed);
  unmap_host(managed->tensor.data);
  delete host;
}

void delete_unused_capsule(PyObject *capsule) {
  if (!PyCapsule_IsValid(capsule, "dltensor")) return; // consumed: the tensor owns it
  auto *managed = static_cast<DLManagedTensor *>(PyCapsule_GetPointer(capsule, "dltensor"));
  managed->deleter(managed);
}

nb::object host_alloc(size_t nbytes, bool huge_pages) {
  void *data = map_host(nbytes, huge_pages);
  if (data == nullptr) {
    PyErr_Format(PyExc_MemoryError, "cannot map %zu bytes (%zu MiB) of host memory: %s", nbytes, nbytes >> 20,
                 std::strerror(errno));
    throw nb::python_error();
  }
  auto *host = new HostTensor{
      {{data, 1, 0, 1, 1, 8, 1, nullptr, nullptr, 0}, nullptr, delete_host_tensor}, static_cast<int64_t>(nbytes), 1};
  host->managed.tensor.shape = &host->shape;
  host->managed.tensor.strides = &host->stride;
  PyObject *capsule = PyCapsule_New(&host->managed, "dltensor", delete_unused_capsule);
  if (capsule == nullptr) {
    delete_host_tensor(&host->managed);
    throw nb::python_error();
  }
  return nb::steal(capsule);
}

void bind_file(nb::module_ &m) {
  nb::class_<PyFile>(m, "File")
      .def(
          "__init__",
          [](PyFile *self, const std::string &path, std::optional<uint64_t> size, bool create, bool unlink, bool direct,
             bool preallocate, bool writable) {
            std::shared_ptr<File> file;
            {
              nb::gil_scoped_release release; // allocation may take a while
              file = std::make_shared<File>(path, FileOptions{size, create, unlink, direct, preallocate, writable});
            }
            new (self) PyFile{std::move(file)};
          },
          nb::arg("path"), nb::arg("size").none(), nb::arg("create"), nb::arg("unlink"), nb::arg("direct"),
          nb::arg("preallocate"), nb::arg("writable"))
      .def_prop_ro("path", [](const PyFile &f) { return f.file->path(); })
      .def_prop_ro("size", [](const PyFile &f) { return f.file->size(); })
      .def_prop_ro("direct", [](const PyFile &f) { return f.file->direct(); })
      .def_prop_ro("ram_backed", [](const PyFile &f) { return f.file->ram_backed(); })
      .def_prop_ro("writable", [](const PyFile &f) { return f.file->writable(); })
      .def_prop_ro("closed", [](const PyFile &f) { return f.file->closed(); })
      .def_prop_ro("alignment", [](const PyFile &f) { return f.file->block(); })
      .def(
          "fsync", [](const PyFile &f) { f.file->fsync(); }, nb::call_guard<nb::gil_scoped_release>())
      .def("close", [](const PyFile &f) { f.file->close(); }, nb::call_guard<nb::gil_scoped_release>());
}

void bind_engine(nb::module_ &m) {
  nb::class_<PyTicket>(m, "IOTicket")
      .def("wait", &PyTicket::wait, nb::arg("timeout").none() = nb::none())
      .def("done", &PyTicket::done)
      .def_prop_ro("elapsed", &PyTicket::elapsed)
      .def_prop_ro("nbytes", &PyTicket::nbytes);

  nb::class_<PyEngine>(m, "IOEngine")
      .def(nb::init<size_t, size_t, size_t, const std::string &>(), nb::arg("threads"), nb::arg("queue_depth"),
           nb::arg("block_bytes"), nb::arg("backend"))
      .def(
          "read",
          [](PyEngine &e, const PyFile &file, uint64_t offset, uintptr_t data, size_t nbytes, nb::object owner) {
            return e.submit(Op::kRead, file, offset, data, nbytes, std::move(owner));
          },
          nb::arg("file"), nb::arg("offset"), nb::arg("data"), nb::arg("nbytes"), nb::arg("owner"))
      .def(
          "write",
          [](PyEngine &e, const PyFile &file, uint64_t offset, uintptr_t data, size_t nbytes, nb::object owner) {
            return e.submit(Op::kWrite, file, offset, data, nbytes, std::move(owner));
          },
          nb::arg("file"), nb::arg("offset"), nb::arg("data"), nb::arg("nbytes"), nb::arg("owner"))
      .def("close", &PyEngine::close)
      .def_prop_ro("closed", [](PyEngine &e) { return e.engine().closed(); })
      .def_prop_ro("backend", [](PyEngine &e) { return e.engine().backend(); })
      .def_prop_ro("backend_reason", [](PyEngine &e) { return e.engine().backend_reason(); })
      .def_prop_ro("in_flight", [](PyEngine &e) { return e.engine().in_flight(); })
      .def_prop_ro("bytes_read", [](PyEngine &e) { return e.engine().bytes(Op::kRead); })
      .def_prop_ro("bytes_written", [](PyEngine &e) { return e.engine().bytes(Op::kWrite); });
}

} // namespace

void init_io(nb::module_ &m) {
  nb::register_exception_translator(translate);
  bind_file(m);
  bind_engine(m);
  m.def("host_alloc", &host_alloc, nb::arg("nbytes"), nb::arg("huge_pages"));
  m.def(
      "host_release_pages",
      [](uintptr_t data, size_t nbytes) { return release_host_pages(reinterpret_cast<void *>(data), nbytes); },
      nb::arg("data"), nb::arg("nbytes"));
  nb::module_::import_("atexit").attr("register")(nb::cpp_function(&close_all_engines));
}
