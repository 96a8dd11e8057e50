// A ranker's program as the executor reads it; kernels/engine.py lays out the same structures, field by field.
#pragma once

#include <cstdint>

#include "stop.h"

namespace prerank {

enum Operation : int64_t { GATHER, SCALE, LINEAR, NORM, SOFTMAX, MIX, MATCH, DOT, CLEAR, OUTPUT, QUANTIZE };
enum Activation : int64_t { NONE, GELU };
constexpr int64_t MOST_EXPERTS = 16;

// A register of a block of R rows: [R, ld] floats from R * f32 bytes of the scratch memory, or [R, ld] bfloat16 from
// R * bf16 bytes, or both; negative where it is not kept. Of what is multiplied as eight bits there are also [R, ld] bytes
// from R * int8 on, then R scales.
struct Register {
    int64_t ld, f32, bf16, int8;
};

// Columns of a register.
struct Part {
    int64_t reg, start, width;
};

// One step. What a field means depends on the operation; a negative `reg` or number is none.
struct Step {
    int64_t operation;
    Part out, x, add, x0, x1, extra;  // extra: the log of a softmax's sum, the weights of a mix
    int64_t activation, table, weight_slot, bias_slot;
    const uint16_t* weight;  // packed as `pack` does, [width of out, width of x]
    const float* bias;       // padded to 32 with zeros
    const float* scale;      // of a norm; of `coarse`, padded to 32, one a column of out
    const int8_t* coarse;    // in place of `weight`: [width of out / 16][width of x / 4][16][4]
    const int32_t* begin;    // where the sums of `coarse` begin, padded to 32
    double eps;
    int64_t num_experts;
    Part experts[MOST_EXPERTS];
};

// A tensor of the item side, [I, width] of `bytes` each: floats where it is gathered, whole numbers where it is matched.
struct Table {
    const void* data;
    int64_t width, bytes;
};

struct Program {
    const Step* steps;
    int64_t num_steps;
    const Register* registers;
    int64_t row_bytes;  // of scratch memory, a row of a block
    int64_t block;      // rows of a block, a multiple of 32
    int64_t num_tasks;
};

// How often a code is among a user's: an entry of a table of a power of two of them, at most half full; 0 is no code.
struct CodeCount {
    int32_t code, count;
};

// Where a code stands, or where it would.
inline uint32_t code_place(const CodeCount* codes, uint32_t mask, int64_t code) {
    uint32_t at = (static_cast<uint32_t>(code) * 2654435769u >> 15) & mask;
    while (codes[at].code != code && codes[at].code != 0) at = (at + 1) & mask;
    return at;
}

// What one request brings: its rows of the tables and what its user is, by slot: vectors padded to 32 floats, packed
// matrices, tables of codes of `lengths` entries. Answers go to logits [count, num_tasks].
struct Asked {
    const int64_t* rows;
    int64_t count;
    const void* const* slots;
    const int64_t* lengths;
    float* logits;
    const Stop* stop;  // once it is left, nobody waits for the logits
};

// The rows from `first` on, at most a block of them, in `scratch` of program.block * program.row_bytes bytes.
void run_block_portable(const Program&, const Table*, const Asked&, int64_t first, uint8_t* scratch);
void run_block_avx2(const Program&, const Table*, const Asked&, int64_t first, uint8_t* scratch);
void run_block_avx512(const Program&, const Table*, const Asked&, int64_t first, uint8_t* scratch);
void run_block_amx(const Program&, const Table*, const Asked&, int64_t first, uint8_t* scratch);

// Tiles are state of the thread: set before its first block, and released after the last.
void begin_amx();
void end_amx();

}  // namespace prerank
