// The portable loops: SSE2 on x86-64, NEON on arm64.
#define ZINF_ISA_TABLE isa_base
#define ZINF_ISA_NAME "base"
#include "isa_impl.inc"
