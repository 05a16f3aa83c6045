// The loops for AVX-512 (F, BW, DQ, VL); empty where the compiler was not asked for them (not x86-64).
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define ZINF_ISA_TABLE isa_avx512
#define ZINF_ISA_NAME "avx512"
#include "isa_impl.inc"
#endif
