// What PyTorch is told about the simulated device.
#pragma once

#include <c10/core/Allocator.h>
#include <c10/core/Device.h>
#include <c10/core/Storage.h>

namespace sim {

inline c10::Device device() { return {c10::kPrivateUse1, 0}; }
c10::Allocator *allocator();
void resize_storage(const c10::Storage &storage, size_t nbytes);

} // namespace sim
