// Streams and events of the simulated device.
//
// Note [Simulated streams]
// A stream is a queue and a thread that does its jobs in order, each after a random delay. An event is a mark in a
// queue: it has passed when the thread has come to it. A stream that waits for a mark stops there. So work of two
// streams runs in any order that the program allows, and seldom in the one in which it was submitted.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <vector>

namespace sim {

class Mark {
public:
  void pass();
  void wait();
  bool passed();

private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool passed_ = false;
};

using MarkPtr = std::shared_ptr<Mark>;

enum class Kind { order, compute, copy };

class Stream {
public:
  explicit Stream(int64_t id);
  void push(Kind kind, std::function<void()> run);
  MarkPtr mark();
  void wait_for(MarkPtr mark);
  void synchronize();
  bool idle();

private:
  struct Job {
    Kind kind;
    std::chrono::microseconds delay;
    std::function<void()> run;
  };

  void work();
  std::chrono::microseconds draw(Kind kind); // under the lock

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Job> queue_;
  bool busy_ = false;
  const int64_t id_;
  uint64_t seeded_ = 0;
  std::mt19937_64 noise_;
};

Stream &stream(int64_t id);
int64_t new_stream();
int64_t current();               // of this thread
int64_t exchange(int64_t other); // makes another one current, and returns which was
void synchronize_all();

// Delays from here on: at most so many microseconds before each job.
void set_delays(uint64_t seed, int64_t compute, int64_t copy);
uint64_t jobs_done();

// What was found to be wrong: a job that saw other bytes than the order of the program promises.
void report(const std::string &what);
std::vector<std::string> take_reports();

} // namespace sim
