// Operators of the simulated device; see memory.h for what they compute on.
#include <ATen/EmptyTensor.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_local_scalar_dense_native.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/is_set_to_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <algorithm>
#include <cstring>
#include <torch/library.h>

#include "backend.h"
#include "memory.h"
#include "stream.h"

namespace sim {

namespace {

using at::Tensor;
using Bytes = std::vector<char>;

bool ours(const Tensor &tensor) { return tensor.defined() && tensor.is_privateuseone(); }

// The elements of a tensor, as runs of bytes; two with the same sizes and strides have the same runs.
class Region {
public:
  explicit Region(const Tensor &tensor, const void *begin)
      : begin_(static_cast<char *>(const_cast<void *>(begin))), run_(tensor.element_size()) {
    if (tensor.numel() == 0) {
      run_ = 0;
      return;
    }
    std::vector<std::pair<int64_t, int64_t>> dims; // stride in bytes, size
    for (int64_t i = 0; i < tensor.dim(); ++i) {
      if (tensor.size(i) > 1 && tensor.stride(i) != 0) {
        dims.emplace_back(tensor.stride(i) * static_cast<int64_t>(tensor.element_size()), tensor.size(i));
      }
    }
    std::sort(dims.begin(), dims.end());
    for (const auto &[stride, size] : dims) {
      if (dims_.empty() && stride == static_cast<int64_t>(run_)) {
        run_ *= static_cast<size_t>(size);
      } else {
        dims_.emplace_back(stride, size);
      }
    }
  }

  size_t nbytes() const {
    size_t total = run_;
    for (const auto &[stride, size] : dims_) {
      total *= static_cast<size_t>(size);
    }
    return total;
  }

  bool dense() const { return dims_.empty(); }
  char *begin() const { return begin_; }

  template <class Visit> void runs(char *base, const Visit &visit) const {
    if (run_ != 0) {
      walk(base, dims_.size(), visit);
    }
  }

  Bytes read(char *base) const {
    Bytes found(nbytes());
    char *to = found.data();
    runs(base, [&](char *at) {
      std::memcpy(to, at, run_);
      to += run_;
    });
    return found;
  }

  void write(char *base, const Bytes &bytes) const {
    const char *from = bytes.data();
    runs(base, [&](char *at) {
      std::memcpy(at, from, run_);
      from += run_;
    });
  }

  bool has(char *base, const Bytes &bytes) const {
    const char *expected = bytes.data();
    bool same = true;
    runs(base, [&](char *at) {
      same = same && std::memcmp(at, expected, run_) == 0;
      expected += run_;
    });
    return same;
  }

private:
  template <class Visit> void walk(char *at, size_t depth, const Visit &visit) const {
    if (depth == 0) {
      visit(at);
      return;
    }
    const auto &[stride, size] = dims_[depth - 1];
    for (int64_t i = 0; i < size; ++i) {
      walk(at + i * stride, depth - 1, visit);
    }
  }

  char *begin_;
  size_t run_;
  std::vector<std::pair<int64_t, int64_t>> dims_;
};

// A tensor of the host on the program's memory, or on the real memory, of one of ours.
Tensor on(char *begin, const Tensor &tensor) {
  return at::from_blob(begin, tensor.sizes(), tensor.strides(), at::TensorOptions().dtype(tensor.dtype()));
}

Tensor on_program(const Tensor &tensor) { return on(program(tensor.const_data_ptr()), tensor); }

// What one operator reads and writes, from when it is submitted to when its job runs.
class Work {
public:
  explicit Work(std::string name) : name_(std::move(name)) {}

  // To be called before the operator changes anything.
  void reads(const Tensor &tensor) {
    const Region region(tensor, tensor.const_data_ptr());
    reads_.push_back({region, region.nbytes() ? region.read(program(region.begin())) : Bytes()});
  }

  // To be called after it.
  void writes(const Tensor &tensor) {
    const Region region(tensor, tensor.const_data_ptr());
    writes_.push_back({region, region.nbytes() ? region.read(program(region.begin())) : Bytes()});
  }

  // What the operator has changed of what it read; batch norm's schema does not say so of its running statistics.
  void writes_what_changed() {
    for (const Part &part : reads_) {
      if (part.region.nbytes() && !part.region.has(program(part.region.begin()), part.bytes)) {
        writes_.push_back({part.region, part.region.read(program(part.region.begin()))});
      }
    }
  }

  void submit(Kind kind) {
    stream(current()).push(kind, [work = std::move(*this)] { work.run(); });
  }

  void run() const {
    bool right = true;
    for (size_t i = 0; i < reads_.size(); ++i) {
      const auto &[region, bytes] = reads_[i];
      if (region.nbytes() && !region.has(real(region.begin()), bytes)) {
        report(name_ + " read other bytes than it should have (tensor " + std::to_string(i) + ", " +
               std::to_string(bytes.size()) + " bytes)");
        right = false;
      }
    }
    for (const auto &[region, bytes] : writes_) {
      if (region.nbytes()) {
        region.write(real(region.begin()), right ? bytes : Bytes(bytes.size(), static_cast<char>(POISON)));
      }
    }
  }

private:
  struct Part {
    Region region;
    Bytes bytes;
  };

  std::string name_;
  std::vector<Part> reads_, writes_;
};

void synchronize() { stream(current()).synchronize(); }

// ---------------------------------------------------------------------- operators that the host computes

struct Argument {
  Tensor tensor; // ours
  Tensor host;
  const c10::AliasInfo *alias;
};

class Call {
public:
  Call(const c10::OperatorHandle &op, torch::jit::Stack *stack)
      : schema_(op.schema()), stack_(*stack), work_(op.operator_name().name) {
    const size_t count = schema_.arguments().size(), first = stack_.size() - count;
    for (size_t i = 0; i < count; ++i) {
      convert(stack_[first + i], schema_.arguments()[i].alias_info());
    }
  }

  void finish() {
    for (const Argument &argument : arguments_) {
      if (writes(argument.alias)) {
        if (argument.host.sizes() != argument.tensor.sizes()) {
          argument.tensor.resize_(argument.host.sizes());
          on_program(argument.tensor).copy_(argument.host);
        }
        work_.writes(argument.tensor);
      }
    }
    work_.writes_what_changed();
    bool tells_host = false;
    const size_t count = schema_.returns().size(), first = stack_.size() - count;
    for (size_t i = 0; i < count; ++i) {
      c10::IValue &value = stack_[first + i];
      const c10::AliasInfo *alias = schema_.returns()[i].alias_info();
      if (value.isTensor()) {
        value = back(value.toTensor(), alias);
      } else if (value.isTensorList()) {
        c10::List<Tensor> list;
        for (const Tensor &tensor : value.toTensorVector()) {
          list.push_back(back(tensor, alias));
        }
        value = list;
      } else {
        tells_host = true;
      }
    }
    work_.submit(Kind::compute);
    if (tells_host) {
      synchronize();
    }
  }

private:
  static bool writes(const c10::AliasInfo *alias) { return alias != nullptr && alias->isWrite(); }

  void convert(c10::IValue &value, const c10::AliasInfo *alias) {
    if (value.isTensor()) {
      value = there(value.toTensor(), alias);
    } else if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor &tensor : value.toTensorVector()) {
        list.push_back(there(tensor, alias));
      }
      value = list;
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> list;
      for (const std::optional<Tensor> &tensor : value.toOptionalTensorVector()) {
        list.push_back(tensor.has_value() ? std::optional<Tensor>(there(*tensor, alias)) : std::nullopt);
      }
      value = list;
    } else if (value.isDevice()) {
      value = c10::Device(c10::kCPU);
    }
  }

  Tensor there(const Tensor &tensor, const c10::AliasInfo *alias) {
    if (!ours(tensor)) {
      return tensor;
    }
    work_.reads(tensor);
    // What has no elements may be an `out` that is to be resized.
    const bool empty = tensor.numel() == 0;
    Tensor host = empty ? at::empty_strided(tensor.sizes(), tensor.strides(), at::TensorOptions().dtype(tensor.dtype()))
                        : on_program(tensor);
    arguments_.push_back({tensor, host, alias});
    return host;
  }

  Tensor back(const Tensor &host, const c10::AliasInfo *alias) {
    if (!host.defined()) {
      return host;
    }
    for (const Argument &argument : arguments_) {
      const bool same =
          writes(alias) ? argument.alias != nullptr && *argument.alias == *alias : argument.host.is_same(host);
      if (same) {
        return argument.tensor;
      }
    }
    TORCH_CHECK(host.numel() == 0 || !in_program(host.const_data_ptr()), schema_.name(),
                " returns a view, which the simulated device cannot");
    Tensor tensor = at::empty_strided(host.sizes(), host.strides(), host.options().device(device()));
    if (host.numel() != 0) {
      on_program(tensor).copy_(host);
      work_.writes(tensor);
    }
    return tensor;
  }

  const c10::FunctionSchema &schema_;
  torch::jit::Stack &stack_;
  Work work_;
  std::vector<Argument> arguments_;
};

void compute(const c10::OperatorHandle &op, torch::jit::Stack *stack) {
  const at::AutoDispatchBelowADInplaceOrView below;
  Call call(op, stack);
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  call.finish();
}

// An operator that backends have to bring, by the one of the host that does the same.
template <class... Args> torch::jit::Stack call_host(const char *name, Args... args) {
  torch::jit::Stack stack{c10::IValue(std::move(args))...};
  compute(c10::Dispatcher::singleton().findSchemaOrThrow(name, ""), &stack);
  return stack;
}

Tensor convolution(const Tensor &input, const Tensor &weight, const std::optional<Tensor> &bias, at::IntArrayRef stride,
                   at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed, at::IntArrayRef output_padding,
                   int64_t groups) {
  return call_host("aten::convolution", input, weight, bias, stride.vec(), padding.vec(), dilation.vec(), transposed,
                   output_padding.vec(), groups)[0]
      .toTensor();
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(const Tensor &grad, const Tensor &input, const Tensor &weight,
                                                        at::IntArrayRef stride, at::IntArrayRef padding,
                                                        at::IntArrayRef dilation, bool transposed,
                                                        at::IntArrayRef output_padding, int64_t groups,
                                                        std::array<bool, 3> mask) {
  const std::optional<std::vector<int64_t>> bias_sizes =
      mask[2] ? std::make_optional(std::vector<int64_t>{grad.size(1)}) : std::nullopt;
  auto found =
      call_host("aten::convolution_backward", grad, input, weight, bias_sizes, stride.vec(), padding.vec(),
                dilation.vec(), transposed, output_padding.vec(), groups, std::vector<bool>(mask.begin(), mask.end()));
  return {found[0].toTensor(), found[1].toTensor(), found[2].toTensor()};
}

// ---------------------------------------------------------------------- copies

// To the device. Memory that is not pinned is read at once, as CUDA stages it.
void copy_up(const Tensor &host, const Tensor &tensor, bool later) {
  const Region from(host, host.const_data_ptr()), to(tensor, tensor.const_data_ptr());
  const bool alike = host.dtype() == tensor.dtype() && from.dense() && to.dense() && from.nbytes() == to.nbytes() &&
                     host.strides() == tensor.strides();
  on_program(tensor).copy_(host);
  if (!later || !alike || !pinned(from.begin(), from.nbytes())) {
    Work work("a copy to the device");
    work.writes(tensor);
    work.submit(Kind::copy);
    if (!later) {
      synchronize();
    }
    return;
  }
  stream(current()).push(Kind::copy, [from, to, expected = from.read(from.begin())] {
    if (!from.has(from.begin(), expected)) {
      report("host memory had changed when it was copied to the device (" + std::to_string(expected.size()) +
             " bytes)");
    }
    to.write(real(to.begin()), from.read(from.begin()));
  });
}

// To the host, whose memory is written when the job runs.
void copy_down(const Tensor &tensor, const Tensor &host, bool later) {
  const Region from(tensor, tensor.const_data_ptr()), to(host, host.const_data_ptr());
  const bool alike = host.dtype() == tensor.dtype() && from.dense() && to.dense() && from.nbytes() == to.nbytes() &&
                     host.strides() == tensor.strides();
  const auto copy = [from, expected = from.read(program(from.begin()))](const Region *to) {
    if (!from.has(real(from.begin()), expected)) {
      report("device memory had changed when it was copied to the host (" + std::to_string(expected.size()) +
             " bytes)");
    }
    if (to != nullptr) {
      to->write(to->begin(), from.read(real(from.begin())));
    }
  };
  if (later && alike && pinned(to.begin(), to.nbytes())) {
    stream(current()).push(Kind::copy, [copy, to] { copy(&to); });
    return;
  }
  stream(current()).push(Kind::copy, [copy] { copy(nullptr); });
  synchronize();
  Tensor(host).copy_(on(real(from.begin()), tensor));
}

Tensor copy_from(const Tensor &from, const Tensor &to, bool non_blocking) {
  const at::AutoDispatchBelowADInplaceOrView below;
  if (to.numel() == 0) {
    return to;
  }
  const Tensor source = from.sizes() == to.sizes() ? from : from.expand(to.sizes());
  if (!ours(source)) {
    copy_up(source, to, non_blocking);
  } else if (!ours(to)) {
    copy_down(source, to, non_blocking);
  } else {
    Work work("copy_");
    work.reads(source);
    on_program(to).copy_(on_program(source));
    work.writes(to);
    work.submit(Kind::compute);
  }
  return to;
}

c10::Scalar item(const Tensor &tensor) {
  const Tensor host = at::empty(tensor.sizes(), at::TensorOptions().dtype(tensor.dtype()));
  copy_from(tensor, host, false);
  return at::native::_local_scalar_dense_cpu(host);
}

// ---------------------------------------------------------------------- tensors

Tensor empty(c10::IntArrayRef size, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout>,
             std::optional<c10::Device>, std::optional<bool>, std::optional<c10::MemoryFormat> format) {
  return at::detail::empty_generic(size, allocator(), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                   c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<c10::ScalarType> dtype,
                     std::optional<c10::Layout>, std::optional<c10::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(
      size, stride, allocator(), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::dtype_or_default(dtype));
}

const Tensor &resize(const Tensor &self, c10::IntArrayRef size, std::optional<c10::MemoryFormat> format) {
  auto *impl = self.unsafeGetTensorImpl();
  if (impl->sizes() == size && !format.has_value()) {
    return self;
  }
  impl->set_sizes_contiguous(size);
  if (format.has_value()) {
    impl->empty_tensor_restride(*format);
  }
  const auto needed = static_cast<size_t>(impl->storage_offset() + impl->numel()) * impl->itemsize();
  if (needed > impl->storage().nbytes()) {
    resize_storage(impl->storage(), needed);
  }
  return self;
}

void record_stream(Tensor &tensor, c10::Stream stream) { record(tensor.storage().mutable_data(), stream.id()); }

// `p.data = x` may bring a parameter from the host to the device and back, as with CUDA.
bool may_replace(const Tensor &self, const Tensor &from) {
  const auto dense = [](const Tensor &t) { return t.layout() == c10::kStrided && (t.is_cpu() || ours(t)); };
  return dense(self) && dense(from);
}

} // namespace

void resize_storage(const c10::Storage &storage, size_t nbytes) {
  auto *impl = storage.unsafeGetStorageImpl();
  const size_t kept = std::min(nbytes, impl->nbytes());
  c10::DataPtr fresh = allocator()->allocate(nbytes);
  if (kept != 0) {
    const char *from = real(impl->data());
    char *to = real(fresh.get());
    std::memcpy(program(fresh.get()), program(impl->data()), kept);
    stream(current()).push(Kind::compute, [from, to, kept] { std::memcpy(to, from, kept); });
  }
  impl->set_data_ptr_noswap(std::move(fresh));
  impl->set_nbytes(nbytes);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&compute>()); }

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("resize_", &resize);
  m.impl("as_strided", &at::native::as_strided_tensorimpl);
  m.impl("view", &at::native::view);
  m.impl("_reshape_alias", &at::native::_reshape_alias);
  m.impl("unfold", &at::native::unfold);
  m.impl("set_.source_Tensor", &at::native::set_tensor_);
  m.impl("set_.source_Storage", static_cast<Tensor &(*)(Tensor &, at::Storage)>(&at::native::set_));
  m.impl("set_.source_Storage_storage_offset", &at::native::set_storage_cpu_);
  m.impl("is_set_to", &at::native::is_set_to);
  m.impl("_copy_from", &copy_from);
  m.impl("_local_scalar_dense", &item);
  m.impl("record_stream", &record_stream);
  m.impl("_has_compatible_shallow_copy_type", &may_replace);
  m.impl("convolution_overrideable", &convolution);
  m.impl("convolution_backward_overrideable", &convolution_backward);
  // For other devices torch has compositions of these, with other roundings.
  for (const char *name : {"native_layer_norm", "native_group_norm", "silu_backward"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&compute>());
  }
}

} // namespace sim
