#include "stream.h"

#include <atomic>
#include <map>
#include <thread>
#include <utility>

namespace sim {

namespace {

constexpr int64_t POOL = 32; // as many as CUDA has of a priority; then they are shared
constexpr size_t MOST_REPORTS = 50;

struct Settings {
  std::atomic<uint64_t> seed{1};
  std::atomic<int64_t> compute{0}, copy{0};
  std::atomic<uint64_t> jobs{0};
};

// Never destroyed: threads of streams run until the process ends.
Settings &settings() {
  static auto *found = new Settings;
  return *found;
}

struct Streams {
  std::mutex mutex;
  std::map<int64_t, Stream *> by_id;
  int64_t handed_out = 0;
};

Streams &streams() {
  static auto *found = new Streams;
  return *found;
}

struct Reports {
  std::mutex mutex;
  std::vector<std::string> found;
};

Reports &reports() {
  static auto *found = new Reports;
  return *found;
}

thread_local int64_t current_id = 0;

} // namespace

void Mark::pass() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    passed_ = true;
  }
  changed_.notify_all();
}

void Mark::wait() {
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait(lock, [this] { return passed_; });
}

bool Mark::passed() {
  std::lock_guard<std::mutex> lock(mutex_);
  return passed_;
}

Stream::Stream(int64_t id) : id_(id) {
  std::thread([this] { work(); }).detach();
}

void Stream::push(Kind kind, std::function<void()> run) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    queue_.push_back({kind, draw(kind), std::move(run)});
  }
  changed_.notify_one();
}

MarkPtr Stream::mark() {
  auto mark = std::make_shared<Mark>();
  push(Kind::order, [mark] { mark->pass(); });
  return mark;
}

void Stream::wait_for(MarkPtr mark) {
  push(Kind::order, [mark = std::move(mark)] { mark->wait(); });
}

void Stream::synchronize() { mark()->wait(); }

bool Stream::idle() {
  std::lock_guard<std::mutex> lock(mutex_);
  return queue_.empty() && !busy_;
}

void Stream::work() {
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    busy_ = false;
    changed_.wait(lock, [this] { return !queue_.empty(); });
    busy_ = true;
    Job job = std::move(queue_.front());
    queue_.pop_front();
    lock.unlock();
    if (job.delay.count() > 0) std::this_thread::sleep_for(job.delay);
    job.run();
    job.run = nullptr;
    if (job.kind != Kind::order) {
      ++settings().jobs;
    }
    lock.lock();
  }
}

std::chrono::microseconds Stream::draw(Kind kind) {
  const Settings &now = settings();
  const int64_t most = kind == Kind::compute ? now.compute.load() : kind == Kind::copy ? now.copy.load() : 0;
  if (most <= 0) {
    return {};
  }
  if (seeded_ != now.seed) {
    seeded_ = now.seed;
    noise_.seed(seeded_ * 1000003 + static_cast<uint64_t>(id_));
  }
  // Often none, so that the queues run empty too.
  const auto drawn = static_cast<int64_t>(noise_() % static_cast<uint64_t>(2 * most));
  return std::chrono::microseconds(drawn < most ? drawn : 0);
}

Stream &stream(int64_t id) {
  Streams &all = streams();
  std::lock_guard<std::mutex> lock(all.mutex);
  Stream *&found = all.by_id[id];
  if (found == nullptr) {
    found = new Stream(id);
  }
  return *found;
}

int64_t new_stream() {
  Streams &all = streams();
  std::lock_guard<std::mutex> lock(all.mutex);
  return 1 + all.handed_out++ % POOL;
}

int64_t current() { return current_id; }

int64_t exchange(int64_t other) {
  const int64_t before = current_id;
  current_id = other;
  return before;
}

void synchronize_all() {
  std::vector<Stream *> found;
  {
    Streams &all = streams();
    std::lock_guard<std::mutex> lock(all.mutex);
    for (const auto &[id, one] : all.by_id) {
      found.push_back(one);
    }
  }
  for (Stream *one : found) {
    one->synchronize();
  }
}

void set_delays(uint64_t seed, int64_t compute, int64_t copy) {
  settings().seed = seed;
  settings().compute = compute;
  settings().copy = copy;
}

uint64_t jobs_done() { return settings().jobs; }

void report(const std::string &what) {
  std::lock_guard<std::mutex> lock(reports().mutex);
  if (reports().found.size() < MOST_REPORTS) {
    reports().found.push_back(what);
  }
}

std::vector<std::string> take_reports() {
  std::lock_guard<std::mutex> lock(reports().mutex);
  return std::exchange(reports().found, {});
}

} // namespace sim
