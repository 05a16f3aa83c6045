// The table of inner loops, one per instruction set, and the choice among them.
//
// Note. The inner loops live in isa_impl.inc, which every isa_*.cpp includes and compiles with its own flags; nothing
// else in the core is compiled with such flags, so no code of a newer instruction set can leak into common functions.
// The loops are written so that the result has the same bits on every instruction set: contraction is off, each fused
// multiply-add is explicit, division and square root are IEEE, and sums run over a fixed number of virtual lanes.
// Every written NaN is the canonical quiet NaN, because which payload survives an operation depends on the compiler.
#pragma once

#include <cstddef>
#include <cstdint>

namespace zinf {

// Element types, with the numbers the Python side uses.
enum DType : int64_t { kFloat32 = 0, kBFloat16 = 1 };

// One row of the hyper-parameter table, already rounded to float32 the way torch rounds Python scalars.
struct AdamScalars {
  float grad_scale; // factor on each gradient element; negative to maximize
  float clip;       // gradient elements are clamped to [-clip, clip] after scaling; infinity for none
  float decay;      // 1 - lr * weight_decay if decoupled, else 1
  float l2;         // weight decay added to the gradient; 0 for none
  float one_minus_beta1;
  float beta2;
  float one_minus_beta2;
  float bias2_sqrt; // sqrt(1 - beta2^step)
  float eps;
  float neg_step_size; // -lr / (1 - beta1^step)
};

// A contiguous run of elements of every plane.
struct AdamRange {
  void *weight;      // float32 master, or bf16 high halves if residual is set
  int16_t *residual; // low halves, or null
  float *exp_avg;
  float *exp_avg_sq;
  const void *grad;
  int64_t grad_dtype;
  int64_t numel;
};

struct Isa {
  const char *name;
  void (*adam)(const AdamRange &range, const AdamScalars &scalars);
  double (*squared_norm)(const void *data, int64_t dtype, int64_t numel);
  void (*split)(const float *master, uint16_t *weight, int16_t *residual, int64_t numel);
  void (*join)(const uint16_t *weight, const int16_t *residual, float *master, int64_t numel);
};

// The table in use: the best one the CPU runs, or the one ZINF_ISA names. Throws std::runtime_error if ZINF_ISA names
// one that is unknown, not built or not supported by this CPU.
const Isa &isa();

// Switches the table for later calls; for tests. Throws like isa().
void set_isa(const char *name);

// The tables this CPU can run, worst first, as a null-terminated array of names.
const char *const *isa_names();

} // namespace zinf
