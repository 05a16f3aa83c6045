// The kernels against their formulas, one element after the other, in operations whose result IEEE 754 defines: so the
// bits must be the same on any CPU and from any compiler. (That instruction sets agree is tested in test_kernels.cpp.)
// The tests are compiled with contraction off, or a compiler for a CPU with fma would fuse what is written apart here.
#include "check.h"

#include "kernels/adam.h"
#include "kernels/master.h"
#include "kernels/norm.h"
#include "kernels/thread_pool.h"

#include <cmath>
#include <cstring>
#include <random>
#include <vector>

using namespace zinf;

namespace {

std::mt19937_64 rng(20240611);

template <class To, class From> To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// Both signs, any mantissa, 2^-40 to 2^20: from integers alone, since distributions differ between libraries.
float random_value() {
  const uint64_t r = rng();
  const uint32_t exponent = 127 - 40 + uint32_t(r >> 40) % 60;
  return bits_as<float>(uint32_t(r & 0x807FFFFFu) | exponent << 23);
}

// Now and then any pattern: a subnormal, an infinity, a NaN.
float random_gradient() { return rng() % 11 == 0 ? bits_as<float>(uint32_t(rng())) : random_value(); }

float canonical(float x) { return std::isnan(x) ? bits_as<float>(0x7FC00000u) : x; }

struct Element {
  float weight, exp_avg, exp_avg_sq;
};

// torch.optim.Adam or AdamW in float32, with a correctly rounded square root. fmaf of the C library rounds once.
Element expected_update(Element e, float g, const AdamScalars &s) {
  g *= s.grad_scale;
  if (g > s.clip) g = s.clip;
  if (g < -s.clip) g = -s.clip;
  if (s.l2 != 0.0f)
    g = std::fmaf(s.l2, e.weight, g);
  else
    e.weight *= s.decay;
  const float w = s.one_minus_beta1, distance = g - e.exp_avg;
  e.exp_avg = canonical(std::fabs(w) < 0.5f ? std::fmaf(w, distance, e.exp_avg) : std::fmaf(w - 1.0f, distance, g));
  const float scaled = s.one_minus_beta2 * g, decayed = e.exp_avg_sq * s.beta2;
  e.exp_avg_sq = canonical(std::fmaf(scaled, g, decayed));
  const float root = std::sqrt(e.exp_avg_sq) / s.bias2_sqrt, numerator = s.neg_step_size * e.exp_avg;
  const float change = numerator / (root + s.eps);
  e.weight = canonical(e.weight + change);
  return e;
}

const AdamScalars kScalars[] = {
    // grad_scale, clip, decay, l2, one_minus_beta1, beta2, one_minus_beta2, bias2_sqrt, eps, neg_step_size
    {1.0f, INFINITY, 0.99999f, 0.0f, 0.1f, 0.999f, 0.001f, 0.0316f, 1e-8f, -1e-3f},
    {-0.37f, 0.25f, 1.0f, 0.01f, 0.7f, 0.5f, 0.5f, 0.9f, 1e-6f, -3e-2f},
    {1.0f / 65536, INFINITY, 1.0f, 0.3f, 0.1f, 0.95f, 0.05f, 0.2236f, 1e-8f, -1e-2f},
    {3.0f, 1e3f, 0.97f, 0.0f, 0.5f, 0.0f, 1.0f, 1.0f, 0.0f, -1.0f},
};
constexpr int64_t kNumScalars = sizeof(kScalars) / sizeof(kScalars[0]);

// The planes of a shard, of which a kernel updates all elements with one row of hyper-parameters.
struct Planes {
  std::vector<float> weight, exp_avg, exp_avg_sq;
  std::vector<uint16_t> high;
  std::vector<int16_t> low;

  explicit Planes(int64_t n) : weight(n), exp_avg(n), exp_avg_sq(n), high(n), low(n) {
    for (int64_t i = 0; i < n; ++i) {
      weight[i] = random_value();
      exp_avg[i] = i % 13 == 0 ? 0.0f : random_value();
      exp_avg_sq[i] = i % 13 == 0 ? 0.0f : std::fabs(random_value());
    }
    split_master(weight.data(), high.data(), low.data(), n);
  }

  void update(bool split, const AdamSegment &segment) {
    const AdamPlanes whole{split ? static_cast<void *>(high.data()) : weight.data(), split ? low.data() : nullptr,
                           exp_avg.data(), exp_avg_sq.data(), int64_t(weight.size())};
    adam_update(whole, &segment, 1, kScalars, kNumScalars);
    if (split) join_master(high.data(), low.data(), weight.data(), int64_t(weight.size()));
  }
};

// Calls f for each instruction set, on one thread and on three, and leaves the default behind.
template <class F> void for_each_setting(F &&f) {
  const char *best = nullptr;
  for (const char *const *name = isa_names(); *name; ++name) {
    set_isa(best = *name);
    for (int threads : {1, 3}) {
      set_num_threads(threads);
      f();
    }
  }
  set_isa(best);
}

void test_adam_is_its_formula() {
  const int64_t n = 64 * 1024 + 2003; // more than a task, and no multiple of any vector
  const Planes start(n);
  std::vector<float> grad(n);
  std::vector<uint16_t> half(n);
  for (int64_t i = 0; i < n; ++i) {
    grad[i] = random_gradient();
    half[i] = uint16_t(bits_as<uint32_t>(grad[i]) >> 16);
  }
  for (int64_t row = 0; row < kNumScalars; ++row) {
    for (bool bf16 : {false, true}) {
      std::vector<Element> expected(n);
      for (int64_t i = 0; i < n; ++i) {
        const float g = bf16 ? bits_as<float>(uint32_t(half[i]) << 16) : grad[i];
        expected[i] = expected_update({start.weight[i], start.exp_avg[i], start.exp_avg_sq[i]}, g, kScalars[row]);
      }
      const void *data = bf16 ? static_cast<const void *>(half.data()) : grad.data();
      const AdamSegment segment{0, n, int64_t(reinterpret_cast<uintptr_t>(data)), bf16 ? kBFloat16 : kFloat32, row};
      for_each_setting([&] {
        for (bool split : {false, true}) {
          Planes planes = start;
          planes.update(split, segment);
          for (int64_t i = 0; i < n; ++i) {
            CHECK(bits_as<uint32_t>(planes.weight[i]) == bits_as<uint32_t>(expected[i].weight));
            CHECK(bits_as<uint32_t>(planes.exp_avg[i]) == bits_as<uint32_t>(expected[i].exp_avg));
            CHECK(bits_as<uint32_t>(planes.exp_avg_sq[i]) == bits_as<uint32_t>(expected[i].exp_avg_sq));
          }
        }
      });
    }
  }
}

// norm.h: pieces of 64Ki elements, in order; in a piece element i goes to lane i % 32, and the lanes are folded.
double expected_norm(const std::vector<float> &values) {
  constexpr size_t kPiece = 64 * 1024, kLanes = 32;
  double sum = 0.0;
  for (size_t first = 0; first < values.size(); first += kPiece) {
    double lanes[kLanes] = {};
    for (size_t i = 0; i < kPiece && first + i < values.size(); ++i) {
      const double square = double(values[first + i]) * double(values[first + i]);
      lanes[i % kLanes] += square;
    }
    for (size_t width = kLanes / 2; width > 0; width /= 2)
      for (size_t lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
    sum += lanes[0];
  }
  return sum;
}

void test_norm_is_its_formula() {
  for (size_t n : {0, 1, 31, 33, 1000, 65536, 65537, 200001}) {
    std::vector<float> values(n), rounded(n);
    std::vector<uint16_t> half(n);
    for (size_t i = 0; i < n; ++i) {
      values[i] = random_value();
      half[i] = uint16_t(bits_as<uint32_t>(values[i]) >> 16);
      rounded[i] = bits_as<float>(uint32_t(half[i]) << 16);
    }
    const NormTensor tensors[] = {{int64_t(reinterpret_cast<uintptr_t>(values.data())), int64_t(n), kFloat32},
                                  {int64_t(reinterpret_cast<uintptr_t>(half.data())), int64_t(n), kBFloat16}};
    const double expected[] = {expected_norm(values), expected_norm(rounded)};
    for_each_setting([&] {
      double sums[] = {-1.0, -1.0};
      squared_norms(tensors, 2, sums);
      CHECK(std::memcmp(sums, expected, sizeof(sums)) == 0);
    });
  }
}

} // namespace

int main() {
  RUN(test_adam_is_its_formula);
  RUN(test_norm_is_its_formula);
  set_num_threads(1); // joins the workers
  return 0;
}
