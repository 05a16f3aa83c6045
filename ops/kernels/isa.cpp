// The choice of the instruction set: by the CPU, or by ZINF_ISA.
#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace zinf {

extern const Isa isa_base;
#if defined(__x86_64__)
extern const Isa isa_avx2;
extern const Isa isa_avx512;
#endif

namespace {

// The tables this CPU runs, worst first.
struct Supported {
  const Isa *tables[4] = {};
  const char *names[4] = {};
  int count = 0;

  Supported() {
    add(isa_base);
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) add(isa_avx2);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma"))
      add(isa_avx512);
#endif
  }

  void add(const Isa &table) {
    tables[count] = &table;
    names[count++] = table.name;
  }
};

const Supported &supported() {
  static const Supported result;
  return result;
}

const Isa *find(const char *name, const char *origin) {
  const Supported &all = supported();
  std::string known;
  for (int i = 0; i < all.count; ++i) {
    if (std::strcmp(all.names[i], name) == 0) return all.tables[i];
    known += (i ? ", " : "") + std::string(all.names[i]);
  }
  throw std::runtime_error(std::string(origin) + "='" + name + "' is not an instruction set this CPU runs; it runs " +
                           known);
}

const Isa *choose() {
  const char *name = std::getenv("ZINF_ISA");
  if (name && *name) return find(name, "ZINF_ISA");
  return supported().tables[supported().count - 1];
}

std::atomic<const Isa *> chosen{nullptr};

} // namespace

const Isa &isa() {
  const Isa *table = chosen.load(std::memory_order_acquire);
  if (!table) {
    // Two threads may both choose, and choose the same.
    table = choose();
    chosen.store(table, std::memory_order_release);
  }
  return *table;
}

void set_isa(const char *name) { chosen.store(find(name, "isa"), std::memory_order_release); }

const char *const *isa_names() { return supported().names; }

} // namespace zinf
