#include "thread_pool.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace zinf {
namespace {

// One parallel_for; lives on its caller's stack until nobody works on it.
struct Job {
  void (*fn)(void *, int64_t);
  void *context;
  int64_t num_chunks;
  std::atomic<int64_t> next{0};
  int workers = 0; // guarded by Pool::mutex

  void work() {
    for (int64_t chunk; (chunk = next.fetch_add(1, std::memory_order_relaxed)) < num_chunks;) fn(context, chunk);
  }
};

class Pool {
public:
  explicit Pool(int num_workers) {
    for (int i = 0; i < num_workers; ++i) workers_.emplace_back([this] { serve(); });
  }

  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stopping_ = true;
    }
    work_.notify_all();
    for (std::thread &worker : workers_) worker.join();
  }

  void run(Job &job) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      queue_.push_back(&job);
    }
    const int64_t helpers = std::min<int64_t>(job.num_chunks - 1, static_cast<int64_t>(workers_.size()));
    for (int64_t i = 0; i < helpers; ++i) work_.notify_one();
    job.work();
    std::unique_lock<std::mutex> lock(mutex_);
    retire(job);
    done_.wait(lock, [&] { return job.workers == 0; });
  }

private:
  void serve() {
    std::fesetenv(FE_DFL_ENV); // a new thread inherits its creator's
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      work_.wait(lock, [&] { return stopping_ || !queue_.empty(); });
      if (queue_.empty()) return;
      Job &job = *queue_.front();
      ++job.workers;
      lock.unlock();
      job.work();
      lock.lock();
      retire(job);
      if (--job.workers == 0) done_.notify_all();
    }
  }

  // No chunk is left to hand out, so nobody new should come. Called with the mutex held.
  void retire(Job &job) { queue_.erase(std::remove(queue_.begin(), queue_.end(), &job), queue_.end()); }

  std::mutex mutex_;
  std::condition_variable work_, done_;
  std::deque<Job *> queue_;
  bool stopping_ = false;
  std::vector<std::thread> workers_; // last: the workers use the members above
};

// The process-wide pool. Never destroyed, so that exit() need not wait for background callers.
struct State {
  std::mutex mutex;
  std::shared_ptr<Pool> pool;
  int num_threads = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
};

State *state = nullptr;

State &global() {
  static const bool once = [] {
    state = new State;
    // Forking with the mutex held leaves it free in the child; the child abandons the pool, whose threads it lacks.
    pthread_atfork([] { state->mutex.lock(); }, [] { state->mutex.unlock(); },
                   [] {
                     new std::shared_ptr<Pool>(std::move(state->pool));
                     state->mutex.unlock();
                   });
    return true;
  }();
  static_cast<void>(once);
  return *state;
}

std::shared_ptr<Pool> current_pool() {
  State &g = global();
  std::lock_guard<std::mutex> lock(g.mutex);
  if (!g.pool && g.num_threads > 1) g.pool = std::make_shared<Pool>(g.num_threads - 1);
  return g.pool;
}

} // namespace

void parallel_for(int64_t num_chunks, void (*fn)(void *, int64_t), void *context) {
  if (num_chunks <= 0) return;
  std::fenv_t saved;
  std::fegetenv(&saved);
  std::fesetenv(FE_DFL_ENV);
  Job job{fn, context, num_chunks};
  std::shared_ptr<Pool> pool = num_chunks > 1 ? current_pool() : nullptr;
  if (pool)
    pool->run(job);
  else
    job.work();
  std::fesetenv(&saved);
}

void set_num_threads(int n) {
  if (n < 1) throw std::invalid_argument("the number of threads must be at least 1, got " + std::to_string(n));
  State &g = global();
  std::shared_ptr<Pool> old; // joined outside the lock, here or by the last caller that still uses it
  std::lock_guard<std::mutex> lock(g.mutex);
  if (n == g.num_threads) return;
  g.num_threads = n;
  old.swap(g.pool);
}

int num_threads() {
  State &g = global();
  std::lock_guard<std::mutex> lock(g.mutex);
  return g.num_threads;
}

} // namespace zinf
