// For processors with AVX2.
#include "program.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#include <immintrin.h>

#define PRERANK_AVX2
#include "program_block.inc"

namespace prerank {

void run_block_avx2(const Program& p, const Table* t, const Asked& a, int64_t first, uint8_t* scratch) {
    run(p, t, a, first, scratch);
}

}  // namespace prerank

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
