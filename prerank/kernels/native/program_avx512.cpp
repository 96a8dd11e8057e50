// For processors with AVX-512, its bfloat16 products and those of eight bits.
#include "program.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vnni"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vnni,prefer-vector-width=512")
#endif
#include <immintrin.h>

#define PRERANK_BF16
#define PRERANK_INT8
#include "program_block.inc"

namespace prerank {

void run_block_avx512(const Program& p, const Table* t, const Asked& a, int64_t first, uint8_t* scratch) {
    run(p, t, a, first, scratch);
}

}  // namespace prerank

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
