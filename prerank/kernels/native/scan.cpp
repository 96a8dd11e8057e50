// The k most similar of many rows: threads take chunks of rows in turn and each keeps the best it met; then these are
// merged.
//
// A similarity and its row are one integer, larger for a larger value or, of equal values, a smaller row. So what is
// kept does not depend on who met what first, and any number of threads gives the same answer.
#include "scan.h"

#include <pthread.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>

#include "export.h"

namespace prerank {
namespace {

constexpr int64_t QUERIES = 32;               // at once: their best and their lanes stay in the core's cache
constexpr int64_t BYTES_A_THREAD = 1 << 20;   // with less to read than this, starting a thread takes longer
constexpr int64_t SPARE = 2048;               // keys beyond k, so that a small k is not compacted at every turn
constexpr int64_t MOST_THREADS = 256;

int64_t rounded(int64_t bytes) { return (bytes + 63) / 64 * 64; }

float value_of(int64_t key) {
    const int32_t ordered = static_cast<int32_t>(key >> 32);
    const int32_t bits = ordered ^ ((ordered >> 31) & 0x7fffffff);
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

struct Memory {
    int64_t k, room, queries, lanes;

    Memory(const Scan& scan, int64_t count) {
        k = std::min(scan.k, count);
        room = 2 * k + SPARE;
        queries = std::min(QUERIES, scan.num_queries);
        lanes = padded(scan.dim);
    }

    int64_t bytes() const {
        return rounded(queries * sizeof(Best)) + rounded(8 * queries * room) + rounded(4 * queries * lanes) +
               rounded(4 * MOST_LANES * lanes) + rounded(2 * lanes) + rounded(8 * CHUNK);
    }

    void lay_out(Worker& worker, uint8_t* at) const {
        const auto take = [&at](int64_t bytes) {
            uint8_t* const taken = at;
            at += rounded(bytes);
            return taken;
        };
        worker.best = reinterpret_cast<Best*>(take(queries * sizeof(Best)));
        int64_t* const keys = reinterpret_cast<int64_t*>(take(8 * queries * room));
        worker.query = reinterpret_cast<float*>(take(4 * queries * lanes));
        worker.tile = reinterpret_cast<float*>(take(4 * MOST_LANES * lanes));
        worker.weights = reinterpret_cast<int16_t*>(take(2 * lanes));
        worker.listed = reinterpret_cast<int64_t*>(take(8 * CHUNK));
        for (int64_t n = 0; n < queries; n++) worker.best[n] = {keys + n * room, 0, k, room, -INFINITY};
    }
};

void* work(void* given) {
    Worker& worker = *static_cast<Worker*>(given);
    switch (worker.scan->level) {
#if defined(__x86_64__)
        case AMX_BF16:
        case AVX512_BF16: scan_avx512(worker); break;
        case AVX2: scan_avx2(worker); break;
#endif
        default: scan_portable(worker);
    }
    return nullptr;
}

void answer(const Scan& scan, Worker* workers, int64_t threads) {
    for (int64_t q = 0; q < workers[0].num; q++) {
        Best& best = workers[0].best[q];
        compact(best);
        for (int64_t t = 1; t < threads; t++) {
            Best& other = workers[t].best[q];
            compact(other);
            std::memcpy(best.keys + best.count, other.keys, 8 * other.count);
            best.count += other.count;
            compact(best);
        }
        std::sort(best.keys, best.keys + best.count, std::greater<int64_t>());
        const int64_t at = (workers[0].first + q) * scan.k;
        for (int64_t n = 0; n < scan.k; n++) {
            const bool is_there = n < best.count;
            scan.similarity[at + n] = is_there ? value_of(best.keys[n]) : -INFINITY;
            scan.found[at + n] = is_there ? 0xffffffff - (best.keys[n] & 0xffffffff) : -1;
        }
    }
}

}  // namespace

void compact(Best& best) {
    if (best.count < best.k) return;
    std::nth_element(best.keys, best.keys + best.k - 1, best.keys + best.count, std::greater<int64_t>());
    best.count = best.k;
    best.beaten = value_of(best.keys[best.k - 1]);
}

}  // namespace prerank

// 0, or 1 where there is not the memory for it; then nothing is written.
PRERANK_EXPORT int32_t prerank_scan(const prerank::Scan* asked) {
    using namespace prerank;
    const Scan& scan = *asked;
    const int64_t count = scan.rows ? scan.num_rows : scan.items;
    const Memory memory(scan, count);
    const int64_t chunks = (count + CHUNK - 1) / CHUNK;
    const int64_t bytes = count * scan.dim * (scan.kind == FLOAT32 ? 4 : scan.kind == BFLOAT16 ? 2 : 1);
    const int64_t worth = bytes * memory.queries / BYTES_A_THREAD;
    const int64_t threads = std::max<int64_t>(1, std::min({scan.threads, chunks, worth, MOST_THREADS}));
    uint8_t* const whole = static_cast<uint8_t*>(std::malloc(threads * memory.bytes() + 64));
    if (whole == nullptr) return 1;
    uint8_t* const start = whole + (64 - reinterpret_cast<uintptr_t>(whole) % 64);
    for (int64_t first = 0; first < scan.num_queries; first += memory.queries) {
        std::atomic<int64_t> next{0};
        Worker workers[MOST_THREADS];
        pthread_t started[MOST_THREADS];
        bool is_started[MOST_THREADS] = {};
        for (int64_t t = 0; t < threads; t++) {
            const int64_t num = std::min(memory.queries, scan.num_queries - first);
            workers[t] = {&scan, &next, first, num, nullptr, nullptr, nullptr, nullptr, nullptr};
            memory.lay_out(workers[t], start + t * memory.bytes());
            // one that cannot be started leaves its chunks to the others
            if (t) is_started[t] = pthread_create(&started[t], nullptr, work, &workers[t]) == 0;
        }
        work(&workers[0]);
        for (int64_t t = 1; t < threads; t++) {
            if (is_started[t]) pthread_join(started[t], nullptr);
        }
        answer(scan, workers, threads);
    }
    std::free(whole);
    return 0;
}
