// The compute pool: one per process, created at the first parallel call.
//
// Note. The caller works too, so a pool of n threads has n - 1 workers, a nested call cannot deadlock, and a call with
// one chunk never wakes anybody. Concurrent callers queue their jobs; workers serve the oldest first while every caller
// serves its own. Chunks are handed out one at a time in ascending order. After fork() the child starts a pool of its
// own: the parent's workers do not exist there.
#pragma once

#include <cstdint>

namespace zinf {

// Calls fn(context, i) once for each i in [0, num_chunks), on any thread, and returns when all have returned. Each call
// runs in the default floating-point environment (round to nearest, subnormals kept), whatever the caller's is.
// fn must not throw.
void parallel_for(int64_t num_chunks, void (*fn)(void *context, int64_t chunk), void *context);

// The same for a callable.
template <class F> void parallel_for(int64_t num_chunks, F &&f) {
  parallel_for(num_chunks, [](void *context, int64_t chunk) { (*static_cast<F *>(context))(chunk); }, &f);
}

// Sets how many threads, the caller included, work on later calls; jobs already running keep their workers. Throws
// std::invalid_argument if n < 1.
void set_num_threads(int n);

// The number of threads, the caller included. Default: the CPUs this process may run on.
int num_threads();

} // namespace zinf
