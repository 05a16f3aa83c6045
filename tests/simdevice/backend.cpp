#include "backend.h"

#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <cstdlib>
#include <cstring>

#include "memory.h"
#include "stream.h"

namespace sim {

namespace {

class DeviceAllocator final : public c10::Allocator {
public:
  c10::DataPtr allocate(size_t nbytes) override {
    void *address = sim::allocate(nbytes);
    return {address, address, &sim::release, device()};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &sim::release; }

  void copy_data(void *, const void *, std::size_t) const override {
    TORCH_CHECK(false, "the host cannot copy memory of the simulated device");
  }
};

// Host memory that is pinned for as long as it is there.
class PinnedAllocator final : public c10::Allocator {
public:
  c10::DataPtr allocate(size_t nbytes) override {
    void *address = std::aligned_alloc(64, (nbytes + 64) / 64 * 64);
    pin(address, nbytes);
    return {address, address, &give_back, c10::Device(c10::kCPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &give_back; }

  void copy_data(void *to, const void *from, std::size_t nbytes) const override { default_copy_data(to, from, nbytes); }

private:
  static void give_back(void *address) {
    synchronize_all(); // copies may be under way
    unpin(address);
    std::free(address);
  }
};

struct Event {
  MarkPtr mark;
};

class Guard final : public c10::impl::DeviceGuardImplInterface {
public:
  c10::DeviceType type() const override { return c10::kPrivateUse1; }
  c10::Device exchangeDevice(c10::Device) const override { return device(); }
  c10::Device getDevice() const override { return device(); }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }

  c10::Stream getStream(c10::Device) const override { return named(current()); }
  c10::Stream getDefaultStream(c10::Device) const override { return named(0); }
  c10::Stream getStreamFromGlobalPool(c10::Device, bool) const override { return named(new_stream()); }
  c10::Stream getNewStream(c10::Device, int) const override { return named(new_stream()); }
  c10::Stream exchangeStream(c10::Stream other) const override { return named(exchange(other.id())); }
  bool queryStream(const c10::Stream &one) const override { return stream(one.id()).idle(); }
  void synchronizeStream(const c10::Stream &one) const override { stream(one.id()).synchronize(); }
  void synchronizeDevice(const c10::DeviceIndex) const override { synchronize_all(); }

  void record(void **event, const c10::Stream &on, const c10::DeviceIndex, const c10::EventFlag) const override {
    if (*event == nullptr) {
      *event = new Event;
    }
    static_cast<Event *>(*event)->mark = stream(on.id()).mark();
  }

  void block(void *event, const c10::Stream &waiting) const override {
    if (event != nullptr) {
      stream(waiting.id()).wait_for(static_cast<Event *>(event)->mark);
    }
  }

  bool queryEvent(void *event) const override {
    return event == nullptr || static_cast<Event *>(event)->mark->passed();
  }

  void synchronizeEvent(void *event) const override {
    if (event != nullptr) {
      static_cast<Event *>(event)->mark->wait();
    }
  }

  void destroyEvent(void *event, const c10::DeviceIndex) const noexcept override { delete static_cast<Event *>(event); }

  void recordDataPtrOnStream(const c10::DataPtr &memory, const c10::Stream &on) const override {
    sim::record(memory.get(), on.id());
  }

private:
  static c10::Stream named(int64_t id) { return c10::Stream(c10::Stream::UNSAFE, device(), id); }
};

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  bool isPinnedPtr(const void *data) const override { return pinned(data, 1); }

  c10::Allocator *getPinnedMemoryAllocator() const override {
    static auto *found = new PinnedAllocator;
    return found;
  }

  void resizePrivateUse1Bytes(const c10::Storage &storage, size_t nbytes) const override {
    resize_storage(storage, nbytes);
  }
};

DeviceAllocator the_allocator;

const bool registered = [] {
  static auto *hooks = new Hooks;
  at::RegisterPrivateUse1HooksInterface(hooks);
  c10::SetAllocator(c10::kPrivateUse1, &the_allocator);
  return true;
}();

} // namespace

c10::Allocator *allocator() { return &the_allocator; }

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

} // namespace sim

// For ctypes.
extern "C" {
void sim_set_delays(uint64_t seed, int64_t compute, int64_t copy) { sim::set_delays(seed, compute, copy); }
uint64_t sim_jobs() { return sim::jobs_done(); }
int64_t sim_current_stream() { return sim::current(); }
void sim_set_stream(int64_t id) { sim::exchange(id); }
void sim_synchronize() { sim::synchronize_all(); }
int64_t sim_allocated() { return sim::stats().allocated; }
int64_t sim_peak() { return sim::stats().peak; }
int64_t sim_capacity() { return sim::stats().capacity; }
void sim_reset_peak() { sim::reset_peak(); }
void sim_set_capacity(int64_t nbytes) { sim::set_capacity(nbytes); }
void sim_pin(uintptr_t begin, size_t nbytes) { sim::pin(reinterpret_cast<void *>(begin), nbytes); }
bool sim_unpin(uintptr_t begin) { return sim::unpin(reinterpret_cast<void *>(begin)); }
int64_t sim_pinned_bytes() { return sim::pinned_bytes(); }

// What was found to be wrong since the last call, a line each; free() it.
char *sim_reports() {
  std::string all;
  for (const std::string &one : sim::take_reports()) {
    all += one + "\n";
  }
  return strdup(all.c_str());
}
}
