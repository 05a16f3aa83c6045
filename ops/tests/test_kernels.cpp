// Tests of kernels/ without Python. `--quick` (the default under a sanitizer or an emulator) samples the exhaustive
// ones.
#include "check.h"

#include "kernels/adam.h"
#include "kernels/copy.h"
#include "kernels/master.h"
#include "kernels/norm.h"
#include "kernels/thread_pool.h"

// This file is compiled without fma instructions where the baseline lacks them, so that this is the emulated fma.
#define ZINF_ISA_TABLE isa_test
#define ZINF_ISA_NAME "test"
#include "kernels/isa_impl.inc"

#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cfenv>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#if defined(__SANITIZE_THREAD__)
#define ZINF_TSAN 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define ZINF_TSAN 1
#endif
#endif

using namespace zinf;

namespace {

#if defined(ZINF_TSAN) || defined(__SANITIZE_ADDRESS__) || defined(ZINF_EMULATED)
bool quick = true;
#else
bool quick = false;
#endif

std::mt19937_64 rng(20240611);

float random_bits() { return bit_cast<float>(uint32_t(rng())); }

float random_scaled() {
  std::normal_distribution<float> normal;
  return std::ldexp(normal(rng), int(rng() % 60) - 40);
}

bool same_float(float a, float b) {
  return (std::isnan(a) && std::isnan(b)) || bit_cast<uint32_t>(a) == bit_cast<uint32_t>(b);
}

const char *best_isa() {
  const char *const *name = isa_names();
  while (name[1]) ++name;
  return *name;
}

// Calls f for each instruction set and several thread counts, and leaves the default behind.
template <class F> void for_each_setting(F &&f) {
  for (const char *const *name = isa_names(); *name; ++name) {
    for (int threads : {1, 2, 3, 7}) {
      set_isa(*name);
      set_num_threads(threads);
      f();
    }
  }
  set_isa(best_isa());
}

void test_fma_emulation() {
  const int count = quick ? 200000 : 20000000;
  for (int i = 0; i < count; ++i) {
    const float a = random_bits(), b = random_bits(), c = random_bits();
    CHECK(same_float(fma32(a, b, c), std::fmaf(a, b, c)));
    const float x = random_scaled(), y = random_scaled(), z = random_scaled();
    CHECK(same_float(fma32(x, y, z), std::fmaf(x, y, z)));
    // A product that ends in or near half a unit in the last place of c, and cancellation.
    const float half_ulp = std::ldexp(1.0f, std::ilogb(z) - 24);
    const float nudge = 1.0f + std::ldexp(float(int(rng() % 7) - 3), -23);
    CHECK(same_float(fma32(half_ulp, nudge, z), std::fmaf(half_ulp, nudge, z)));
    CHECK(same_float(fma32(x, y, -x * y), std::fmaf(x, y, -x * y)));
    // Subnormal results.
    const float tiny = std::ldexp(x, -120);
    CHECK(same_float(fma32(tiny, y, std::ldexp(z, -110)), std::fmaf(tiny, y, std::ldexp(z, -110))));
  }
  const float largest = std::numeric_limits<float>::max(), inf = std::numeric_limits<float>::infinity();
  const float special[] = {0.0f, -0.0f, 1.0f, -1.0f, largest, -largest, inf, -inf, NAN, 1e-45f, std::ldexp(1.0f, 103)};
  for (float a : special)
    for (float b : special)
      for (float c : special) CHECK(same_float(fma32(a, b, c), std::fmaf(a, b, c)));
}

// All 2^32 patterns: the weight is the high half rounded half up, and joining restores the pattern.
void test_split_is_a_bijection() {
  constexpr int64_t kBlock = 1 << 14;
  const int64_t stride = quick ? 499 : 1;
  std::atomic<int64_t> wrong{0};
  const Isa &table = isa();
  const int64_t blocks = ((int64_t(1) << 32) / kBlock + stride - 1) / stride;
  parallel_for(blocks, [&](int64_t index) {
    static thread_local uint32_t bits[kBlock];
    static thread_local float master[kBlock], joined[kBlock];
    static thread_local uint16_t weight[kBlock];
    static thread_local int16_t residual[kBlock];
    const uint32_t first = uint32_t(index * stride * kBlock);
    for (int64_t i = 0; i < kBlock; ++i) bits[i] = first + uint32_t(i);
    std::memcpy(master, bits, sizeof(bits));
    table.split(master, weight, residual, kBlock);
    table.join(weight, residual, joined, kBlock);
    uint32_t differ = 0;
    for (int64_t i = 0; i < kBlock; ++i) differ |= weight[i] ^ uint16_t((bits[i] >> 16) + ((bits[i] >> 15) & 1));
    if (differ || std::memcmp(joined, bits, sizeof(bits)) != 0) ++wrong;
  });
  CHECK(wrong == 0);
}

void test_split_and_join_on_every_isa() {
  const int64_t n = 300007;
  std::vector<float> master(n), joined(n);
  for (float &x : master) x = random_bits();
  for_each_setting([&] {
    std::vector<uint16_t> weight(n);
    std::vector<int16_t> residual(n);
    split_master(master.data(), weight.data(), residual.data(), n);
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t bits = bit_cast<uint32_t>(master[i]);
      CHECK(weight[i] == uint16_t((bits + 0x8000u) >> 16) && uint16_t(residual[i]) == uint16_t(bits));
    }
    join_master(weight.data(), residual.data(), joined.data(), n);
    CHECK(std::memcmp(joined.data(), master.data(), n * sizeof(float)) == 0);
  });
}

struct State {
  std::vector<float> weight, exp_avg, exp_avg_sq;
  std::vector<uint16_t> high;
  std::vector<int16_t> residual;

  explicit State(int64_t n) : weight(n), exp_avg(n), exp_avg_sq(n), high(n), residual(n) {
    for (int64_t i = 0; i < n; ++i) {
      weight[i] = random_scaled();
      exp_avg[i] = random_scaled();
      exp_avg_sq[i] = std::fabs(random_scaled());
    }
    split_master(weight.data(), high.data(), residual.data(), n);
  }

  AdamPlanes plain() { return {weight.data(), nullptr, exp_avg.data(), exp_avg_sq.data(), int64_t(weight.size())}; }
  AdamPlanes split() {
    return {high.data(), residual.data(), exp_avg.data(), exp_avg_sq.data(), int64_t(weight.size())};
  }

  bool operator==(const State &o) const {
    auto same = [](const auto &a, const auto &b) { return !std::memcmp(a.data(), b.data(), a.size() * sizeof(a[0])); };
    return same(weight, o.weight) && same(exp_avg, o.exp_avg) && same(exp_avg_sq, o.exp_avg_sq) && same(high, o.high) &&
           same(residual, o.residual);
  }
};

const AdamScalars kScalars[] = {
    {1.0f, INFINITY, 0.99999f, 0.0f, 0.1f, 0.999f, 0.001f, 0.0316f, 1e-8f, -1e-3f},
    {-0.37f, 0.25f, 1.0f, 0.01f, 0.7f, 0.5f, 0.5f, 0.9f, 1e-6f, -3e-2f},
};

// Many segments of all small sizes, then a few large ones, with gaps between; gradients of both types.
std::vector<AdamSegment> make_segments(int64_t n, const std::vector<float> &grad, const std::vector<uint16_t> &half) {
  std::vector<AdamSegment> segments;
  int64_t at = 3;
  for (int64_t i = 0; at < n; ++i) {
    const int64_t numel = std::min(i < 400 ? i % 67 : 60000 + 7 * i, n - at);
    const bool bf16 = i % 3 == 1;
    const void *data = bf16 ? static_cast<const void *>(&half[at]) : &grad[at];
    segments.push_back({at, numel, int64_t(reinterpret_cast<uintptr_t>(data)), bf16 ? kBFloat16 : kFloat32, i % 2});
    at += numel + i % 5;
  }
  return segments;
}

void test_adam_is_bit_identical() {
  const int64_t n = 300007;
  std::vector<float> grad(n);
  std::vector<uint16_t> half(n);
  for (int64_t i = 0; i < n; ++i) {
    grad[i] = i % 11 == 0 ? random_bits() : random_scaled(); // some infinities and NaNs, some huge
    half[i] = uint16_t(bit_cast<uint32_t>(grad[i]) >> 16);
  }
  std::vector<AdamSegment> segments = make_segments(n, grad, half);
  const State start(n);
  for (bool split : {false, true}) {
    State expected = start;
    bool first = true;
    for_each_setting([&] {
      State state = start;
      adam_update(split ? state.split() : state.plain(), segments.data(), int64_t(segments.size()), kScalars, 2);
      if (first) expected = state;
      first = false;
      CHECK(state == expected);
      CHECK(!(state == start));
    });
    // Order of the list, and the caller's floating-point environment, do not matter.
    std::fesetround(FE_UPWARD);
    State state = start;
    std::vector<AdamSegment> reversed(segments.rbegin(), segments.rend());
    adam_update(split ? state.split() : state.plain(), reversed.data(), int64_t(reversed.size()), kScalars, 2);
    CHECK(std::fegetround() == FE_UPWARD);
    std::fesetround(FE_TONEAREST);
    CHECK(state == expected);
  }
}

void test_adam_rejects_bad_segments() {
  const State start(100);
  State state = start;
  std::vector<float> grad(100, 1.0f);
  const int64_t g = int64_t(reinterpret_cast<uintptr_t>(grad.data()));
  const int64_t huge = std::numeric_limits<int64_t>::max();
  const std::vector<std::vector<AdamSegment>> bad = {
      {{-1, 5, g, kFloat32, 0}},
      {{96, 5, g, kFloat32, 0}},
      {{huge, 5, g, kFloat32, 0}},
      {{5, huge, g, kFloat32, 0}},
      {{5, -1, g, kFloat32, 0}},
      {{0, 5, g, kFloat32, 2}},
      {{0, 5, g, kFloat32, -1}},
      {{0, 5, g, 7, 0}},
      {{0, 5, g, kFloat32, 0}, {4, 5, g, kFloat32, 0}},
      {{50, 5, g, kFloat32, 0}, {0, 60, g, kFloat32, 0}},
  };
  for (const std::vector<AdamSegment> &segments : bad)
    CHECK_THROWS(adam_update(state.plain(), segments.data(), int64_t(segments.size()), kScalars, 2),
                 std::invalid_argument);
  CHECK(state == start);
  adam_update(state.plain(), nullptr, 0, nullptr, 0);
  const AdamSegment empty[] = {{50, 50, g, kFloat32, 0}, {60, 0, 0, kFloat32, 0}, {0, 50, g, kFloat32, 1}};
  adam_update(state.plain(), empty, 3, kScalars, 2);
  CHECK(!(state == start));
}

void test_norm_is_bit_identical() {
  const int64_t sizes[] = {0, 1, 31, 32, 33, 1000, 65535, 65536, 65537, 200001};
  const int64_t count = sizeof(sizes) / sizeof(sizes[0]), slack = 70;
  std::vector<float> data(200001 + slack), moved(200001 + slack);
  for (float &x : data) x = random_scaled();
  std::vector<double> expected;
  for_each_setting([&] {
    for (int64_t shift : {0, 1, 5}) {
      std::memcpy(moved.data() + shift, data.data(), 200001 * sizeof(float));
      std::vector<NormTensor> tensors;
      for (int64_t n : sizes) {
        tensors.push_back({int64_t(reinterpret_cast<uintptr_t>(moved.data() + shift)), n, kFloat32});
        tensors.push_back({int64_t(reinterpret_cast<uintptr_t>(moved.data() + shift)), 2 * n, kBFloat16});
      }
      std::vector<double> sums(tensors.size(), -1.0);
      squared_norms(tensors.data(), 2 * count, sums.data());
      if (expected.empty()) expected = sums;
      CHECK(std::memcmp(sums.data(), expected.data(), sums.size() * sizeof(double)) == 0);
    }
  });
  for (int64_t k = 0; k < count; ++k) {
    long double exact = 0.0L;
    for (int64_t i = 0; i < sizes[k]; ++i) exact += static_cast<long double>(data[i]) * data[i];
    CHECK(std::fabs(static_cast<double>(expected[2 * k] - exact)) <= 1e-12 * static_cast<double>(exact));
  }
  for (float bad : {INFINITY, -INFINITY, NAN}) {
    moved[777] = bad;
    const NormTensor tensor{int64_t(reinterpret_cast<uintptr_t>(moved.data())), 200001, kFloat32};
    double sum = 0.0;
    squared_norms(&tensor, 1, &sum);
    CHECK(!std::isfinite(sum));
  }
}

void test_copies_of_all_sizes_at_all_addresses() {
  std::vector<uint8_t> from(3000000), expected, to;
  for (uint8_t &byte : from) byte = uint8_t(rng());
  for (int threads : {1, 2, 5}) {
    set_num_threads(threads);
    to.assign(from.size(), 0);
    expected = to;
    std::vector<CopyRegion> regions;
    int64_t at = 1;
    for (int64_t i = 0; i < 600; ++i) {
      const int64_t nbytes = i < 590 ? i % 211 : 200000 + 17 * i, source = int64_t(rng() % (from.size() - 300000));
      regions.push_back({int64_t(reinterpret_cast<uintptr_t>(to.data() + at)),
                         int64_t(reinterpret_cast<uintptr_t>(from.data() + source)), nbytes});
      std::memcpy(expected.data() + at, from.data() + source, nbytes);
      at += nbytes + i % 3;
    }
    CHECK(at <= int64_t(to.size()));
    copy_regions(regions.data(), int64_t(regions.size()));
    CHECK(to == expected);
  }
  copy_regions(nullptr, 0);
}

void test_pool_runs_every_chunk_once() {
  for (int threads : {1, 2, 5}) {
    set_num_threads(threads);
    CHECK(num_threads() == threads);
    for (int64_t chunks : {0, 1, 2, 3, 1000}) {
      std::vector<std::atomic<int>> hits(chunks);
      parallel_for(chunks, [&](int64_t i) { ++hits[i]; });
      for (std::atomic<int> &hit : hits) CHECK(hit == 1);
    }
  }
  CHECK_THROWS(set_num_threads(0), std::invalid_argument);
}

void test_pool_serves_concurrent_and_nested_callers() {
  set_num_threads(3);
  std::vector<std::thread> callers;
  std::atomic<int64_t> total{0};
  for (int caller = 0; caller < 4; ++caller) {
    callers.emplace_back([&, caller] {
      for (int round = 0; round < 200; ++round) {
        std::atomic<int64_t> sum{0};
        parallel_for(8, [&](int64_t i) { parallel_for(3, [&](int64_t j) { sum += 3 * i + j; }); });
        CHECK(sum == 276);
        total += sum;
        if (caller == 0 && round % 20 == 0) set_num_threads(2 + round % 3);
      }
    });
  }
  for (std::thread &caller : callers) caller.join();
  CHECK(total == 4 * 200 * 276);
}

void test_pool_survives_fork() {
#if !defined(ZINF_TSAN) && !defined(ZINF_EMULATED) // neither can start threads in a forked child
  set_num_threads(3);
  parallel_for(100, [](int64_t) {});
  const pid_t child = fork();
  if (child == 0) {
    std::atomic<int> count{0};
    for (int round = 0; round < 10; ++round) parallel_for(100, [&](int64_t) { ++count; });
    _exit(count == 1000 ? 0 : 1);
  }
  int status = -1;
  CHECK(waitpid(child, &status, 0) == child);
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  parallel_for(100, [](int64_t) {});
#endif
}

void test_isa_names() {
  CHECK(std::string(isa_names()[0]) == "base");
  CHECK_THROWS(set_isa("sse9"), std::runtime_error);
  for (const char *const *name = isa_names(); *name; ++name) {
    set_isa(*name);
    CHECK(std::string(isa().name) == *name);
  }
}

} // namespace

int main(int argc, char **argv) {
  for (int i = 1; i < argc; ++i)
    if (std::string(argv[i]) == "--quick") quick = true;
  RUN(test_isa_names);
  RUN(test_fma_emulation);
  RUN(test_copies_of_all_sizes_at_all_addresses);
  RUN(test_pool_runs_every_chunk_once);
  RUN(test_pool_serves_concurrent_and_nested_callers);
  RUN(test_pool_survives_fork);
  RUN(test_split_is_a_bijection);
  RUN(test_split_and_join_on_every_isa);
  RUN(test_adam_is_bit_identical);
  RUN(test_adam_rejects_bad_segments);
  RUN(test_norm_is_bit_identical);
  set_num_threads(1); // joins the workers
  return 0;
}
