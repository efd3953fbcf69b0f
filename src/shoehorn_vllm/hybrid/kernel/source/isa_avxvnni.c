/* AVX-VNNI: AVX2 with dot products of int8, on desktop processors since 2021. */
#define WITH_VNNI 1
#include "isa_avx2.h"
