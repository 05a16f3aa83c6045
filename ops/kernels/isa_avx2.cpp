// The loops for AVX2 + FMA; empty where the compiler was not asked for them (not x86-64).
#if defined(__AVX2__) && defined(__FMA__)
#define ZINF_ISA_TABLE isa_avx2
#define ZINF_ISA_NAME "avx2"
#include "isa_impl.inc"
#endif
