// For processors with tiles of bfloat16.
#include "program.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16,prefer-vector-width=512")
#endif
#include <immintrin.h>

#define PRERANK_BF16
#define PRERANK_AMX
#include "program_block.inc"

namespace prerank {

void run_block_amx(const Program& p, const Table* t, const Asked& a, int64_t first, uint8_t* scratch) {
    run(p, t, a, first, scratch);
}

// Palette 1, and eight tiles of 16 rows of 64 bytes. Not on the stack: the compiler believes the instruction reads eight
// bytes alone, and would leave out storing the rest.
alignas(64) static const uint8_t TILES[64] = {
    1, 0, 0, 0, 0, 0, 0, 0, 0,  0, 0,  0, 0,  0, 0,  0, 64, 0, 64, 0, 64, 0, 64, 0, 64, 0, 64, 0, 64, 0, 64, 0,
    0, 0, 0, 0, 0, 0, 0, 0, 0,  0, 0,  0, 0,  0, 0,  0, 16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0,
};

void begin_amx() { _tile_loadconfig(TILES); }

void end_amx() { _tile_release(); }

}  // namespace prerank

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
