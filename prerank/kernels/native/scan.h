// The scan of an index: what its driver and the code for each set of instructions share.
#pragma once

#include <atomic>
#include <cstdint>

#include "stop.h"

namespace prerank {

enum Kind : int64_t { FLOAT32 = 0, BFLOAT16 = 1, INT8 = 2 };

// What is asked, as kernels/scan.py lays it out: `mask` has a byte an item, `rows` rise strictly; null is all items.
struct Scan {
    const void* vectors;
    const float* scales;
    const float* query;
    const uint8_t* mask;
    const int64_t* rows;
    float* similarity;
    int64_t* found;
    int64_t kind, items, dim, num_queries, k, num_rows, threads, level;
    const Stop* stop;  // once it is left, nobody waits for the answer
};

// The best of one query so far, as keys: at most `room`, of which the `k` largest count. Below `beaten` none can enter.
struct Best {
    int64_t* keys;
    int64_t count, k, room;
    float beaten;
};

// Leaves the k largest keys and what they beat.
void compact(Best& best);

// The memory of one thread, for queries [first, first + num) of a scan.
struct Worker {
    const Scan* scan;
    std::atomic<int64_t>* next;  // the chunk of items, or of rows, that nobody has taken yet
    int64_t first, num;
    Best* best;       // of each query
    float* query;     // of each query, in the lanes in which a row is read
    float* tile;      // rows as float32, read once for several queries
    int16_t* weights;  // of the only query, in whole numbers
    int64_t* listed;  // the eligible rows of a chunk
};

constexpr int64_t MOST_LANES = 16;
constexpr int64_t CHUNK = 4096;

inline int64_t padded(int64_t dim) { return (dim + MOST_LANES - 1) / MOST_LANES * MOST_LANES; }

void scan_portable(Worker& worker);
void scan_avx2(Worker& worker);
void scan_avx512(Worker& worker);

}  // namespace prerank
