// Memory of the simulated device.
//
// Note [Three addresses of a byte]
// A tensor on the device has an address that nobody may touch: its pages are not readable, so code of the host that
// takes it for its own memory faults. Behind it, at fixed distances, there are two more:
//
// - the *real* memory, which only jobs of streams read and write, when it is their turn;
// - the *program's* memory, which each operator and copy changes at once, when it is submitted: what the real one
//   will have when all is done, if whatever has to wait does wait.
//
// So results are computed when an operator is called, on the program's memory. Its job, later, looks whether the real
// memory has what the operator read, reports it if not, and writes the results there. What the host gets from the
// device comes from the real memory.
//
// Note [Reuse of memory]
// As with CUDA, memory that is freed may be had again at once on the stream that allocated it, since what comes later
// on that stream runs later; other streams have to be recorded, then it waits until they are done. Free memory is
// filled with 0xFF (NaN) by a job of its stream. What was freed last is given out first.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sim {

constexpr unsigned char POISON = 0xFF;

void *allocate(size_t nbytes);
void release(void *address);
void record(void *address, int64_t stream); // an address within an allocation

char *program(const void *address);
char *real(const void *address);
// Whether these are the program's bytes: the memory of what operators computed.
bool in_program(const void *address);
const void *address_of(const void *program);

struct Stats {
  int64_t allocated, peak, capacity;
};
Stats stats();
void reset_peak();
void set_capacity(int64_t nbytes);

// Host memory that jobs may read and write, later.
void pin(const void *begin, size_t nbytes);
bool unpin(const void *begin);
bool pinned(const void *begin, size_t nbytes);
int64_t pinned_bytes();

} // namespace sim
