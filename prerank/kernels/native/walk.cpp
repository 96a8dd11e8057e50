// A walk over a graph of rows, to those whose codes are most similar to a query's weights (Malkov & Yashunin 2016,
// "Efficient and robust approximate nearest neighbor search using HNSW graphs", Algorithms 2 and 5).
//
// What a walk waits for is memory: the links and the codes of a row are where no other row's are. So a row's links are
// read together, what they lead to is asked for before any of it is compared, and the links of the row that is likely
// to be next are on their way meanwhile.
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <functional>

#include "export.h"
#include "stop.h"

#if defined(__x86_64__)
#include <immintrin.h>
#define PRERANK_AVX2 __attribute__((target("avx2")))
#define PRERANK_AVX512 __attribute__((target("avx2,avx512f,avx512bw")))
#endif

namespace prerank {
namespace {

constexpr int64_t MOST_THREADS = 256;
constexpr int64_t MOST_LINKS = 256;
constexpr int64_t STEPS_A_LOOK = 64;  // rows whose links are followed before somebody is asked whether to stop

// What is asked, as kernels/walk.py lays it out.
struct Walk {
    const uint8_t* codes;      // [rows, stride], the numbers of a row and zeros
    const int16_t* weights;    // [num_queries, stride]
    const int32_t* lowest;     // [rows, lowest_links], -1 past the last
    const int32_t* upper;      // [., upper_links] of the rows that are on a level above, level by level, -1 past the last
    const int64_t* first_of;   // [rows]: the first of a row in `upper`
    const uint8_t* may;        // a bit a row, the lowest first: those that may be found; null is all
    int64_t* found;            // [num_queries, width], -1 past the last
    int64_t rows, stride, lowest_links, upper_links, entry, levels, num_queries, width, threads, level;
    const Stop* stop;  // once it is left, nobody waits for the answer
};

// A row and how similar it is, as one integer: larger for a larger similarity or, of equal ones, a smaller row.
int64_t key_of(int32_t similarity, int64_t row) {
    return static_cast<int64_t>(static_cast<uint64_t>(static_cast<int64_t>(similarity)) << 32) | (0xffffffff - row);
}
int64_t row_of(int64_t key) { return 0xffffffff - (key & 0xffffffff); }

typedef void (*Similar)(const Walk&, const int16_t* query, const int32_t* rows, int64_t num, int32_t* similarity);

void similar_portable(const Walk& walk, const int16_t* query, const int32_t* rows, int64_t num, int32_t* similarity) {
    for (int64_t n = 0; n < num; n++) {
        const uint8_t* const codes = walk.codes + rows[n] * walk.stride;
        int32_t sum = 0;
        for (int64_t d = 0; d < walk.stride; d++) sum += codes[d] * query[d];
        similarity[n] = sum;
    }
}

#if defined(__x86_64__)
PRERANK_AVX2 void similar_avx2(
    const Walk& walk, const int16_t* query, const int32_t* rows, int64_t num, int32_t* similarity) {
    for (int64_t n = 0; n < num; n++) {
        const uint8_t* const codes = walk.codes + rows[n] * walk.stride;
        __m256i sums = _mm256_setzero_si256();
        for (int64_t d = 0; d < walk.stride; d += 16) {
            const __m256i wide = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + d)));
            const __m256i weights = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(query + d));
            sums = _mm256_add_epi32(sums, _mm256_madd_epi16(wide, weights));
        }
        __m128i four = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
        four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
        similarity[n] = _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
    }
}

PRERANK_AVX512 void similar_avx512(
    const Walk& walk, const int16_t* query, const int32_t* rows, int64_t num, int32_t* similarity) {
    for (int64_t n = 0; n < num; n++) {
        const uint8_t* const codes = walk.codes + rows[n] * walk.stride;
        __m512i sums = _mm512_setzero_si512();
        for (int64_t d = 0; d < walk.stride; d += 32) {
            const __m512i wide = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + d)));
            sums = _mm512_add_epi32(sums, _mm512_madd_epi16(wide, _mm512_loadu_si512(query + d)));
        }
        similarity[n] = _mm512_reduce_add_epi32(sums);
    }
}
#endif

Similar similar_of(int64_t level) {
#if defined(__x86_64__)
    if (level >= AVX512_BF16) return similar_avx512;
    if (level == AVX2) return similar_avx2;
#endif
    (void)level;
    return similar_portable;
}

void prefetch(const void* from, int64_t bytes) {
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(static_cast<const char*>(from) + at);
}

// One thread's memory for one query after the other.
struct Walker {
    const Walk& walk;
    Similar similar;
    const int16_t* query = nullptr;
    uint64_t* met;    // a bit a row
    int64_t* beam;    // the best met so far, at most `width`: a heap whose first is the worst
    int64_t* open;    // of those met whose links were not followed: a heap whose first is the best
    int64_t* passed;  // of those met that may be found, where not all may: the best `width` of them, and more
    int64_t num_beam = 0, num_open = 0, num_passed = 0;
    int64_t least_passed = INT64_MIN;

    static int64_t words(const Walk& walk) { return (walk.rows + 63) / 64; }
    static int64_t room(const Walk& walk) { return 2 * walk.width + MOST_LINKS; }
    static int64_t bytes(const Walk& walk) { return 8 * (words(walk) + walk.width + 1 + 2 * room(walk)); }

    Walker(const Walk& walk, uint8_t* memory) : walk(walk), similar(similar_of(walk.level)) {
        met = reinterpret_cast<uint64_t*>(memory);
        beam = reinterpret_cast<int64_t*>(met + words(walk));
        open = beam + walk.width + 1;
        passed = open + room(walk);
    }

    bool may(int64_t row) const { return walk.may[row >> 3] >> (row & 7) & 1; }

    // The best row on the way down to the lowest level, by its key.
    int64_t descend() const {
        int32_t similarity[MOST_LINKS];
        const int32_t start = static_cast<int32_t>(walk.entry);
        similar(walk, query, &start, 1, similarity);
        int64_t best = key_of(similarity[0], start);
        for (int64_t level = walk.levels - 1; level > 0; level--) {
            for (int64_t from = 0; from != best;) {
                from = best;
                const int32_t* const links =
                    walk.upper + (walk.first_of[row_of(from)] + level - 1) * walk.upper_links;
                const int64_t num = std::find(links, links + walk.upper_links, -1) - links;
                for (int64_t n = 0; n < num; n++) prefetch(walk.codes + links[n] * walk.stride, walk.stride);
                similar(walk, query, links, num, similarity);
                for (int64_t n = 0; n < num; n++) best = std::max(best, key_of(similarity[n], links[n]));
            }
        }
        return best;
    }

    bool is_full() const { return num_beam == walk.width; }

    void meet(int64_t key) {
        const int64_t row = row_of(key);
        if (walk.may && key > least_passed && may(row)) pass(key);
        if (is_full() && key < beam[0]) return;
        beam[num_beam++] = key;
        std::push_heap(beam, beam + num_beam, std::greater<int64_t>());
        if (num_beam > walk.width) std::pop_heap(beam, beam + num_beam--, std::greater<int64_t>());
        if (num_open == room(walk)) forget();
        open[num_open++] = key;
        std::push_heap(open, open + num_open);
    }

    void pass(int64_t key) {
        passed[num_passed++] = key;
        if (num_passed < room(walk)) return;
        std::nth_element(passed, passed + walk.width - 1, passed + num_passed, std::greater<int64_t>());
        num_passed = walk.width;
        least_passed = passed[walk.width - 1];
    }

    // Leaves those open that are in the beam: the others' links will not be followed.
    void forget() {
        const int64_t worst = beam[0];
        num_open = std::remove_if(open, open + num_open, [worst](int64_t key) { return key < worst; }) - open;
        std::make_heap(open, open + num_open);
    }

    // The rows that `row` leads to and that were not met before, asked for.
    int64_t unmet(int64_t row, int32_t* fresh) {
        const int32_t* const links = walk.lowest + row * walk.lowest_links;
        int64_t num = 0;
        for (int64_t n = 0; n < walk.lowest_links && links[n] >= 0; n++) {
            const int32_t next = links[n];
            uint64_t& word = met[next >> 6];
            const uint64_t bit = uint64_t{1} << (next & 63);
            fresh[num] = next;
            num += (word & bit) == 0;
            word |= bit;
        }
        for (int64_t n = 0; n < num; n++) prefetch(walk.codes + fresh[n] * walk.stride, walk.stride);
        return num;
    }


    void run(int64_t number) {
        query = walk.weights + number * walk.stride;
        std::memset(met, 0, 8 * words(walk));
        num_beam = num_open = num_passed = 0;
        least_passed = INT64_MIN;
        const int64_t start = descend();
        met[row_of(start) >> 6] |= uint64_t{1} << (row_of(start) & 63);
        meet(start);
        int32_t fresh[MOST_LINKS], similarity[MOST_LINKS];
        for (int64_t step = 0; num_open && (step % STEPS_A_LOOK || !walk.stop->is_left()); step++) {
            const int64_t key = open[0];
            if (is_full() && key < beam[0]) break;
            std::pop_heap(open, open + num_open--);
            const int64_t num = unmet(row_of(key), fresh);
            if (num_open) prefetch(walk.lowest + row_of(open[0]) * walk.lowest_links, 4 * walk.lowest_links);
            similar(walk, query, fresh, num, similarity);
            for (int64_t n = 0; n < num; n++) meet(key_of(similarity[n], fresh[n]));
        }
        answer(walk.found + number * walk.width);
    }

    void answer(int64_t* found) {
        const int64_t* const best = walk.may ? passed : beam;
        int64_t num = num_beam;
        if (walk.may) {
            num = std::min(num_passed, walk.width);
            if (num < num_passed) {
                std::nth_element(passed, passed + num - 1, passed + num_passed, std::greater<int64_t>());
            }
        }
        for (int64_t n = 0; n < walk.width; n++) found[n] = n < num ? row_of(best[n]) : -1;
    }
};

struct Task {
    const Walk* walk;
    std::atomic<int64_t>* next;  // the query that nobody has taken yet
    uint8_t* memory;
};

void* work(void* given) {
    const Task& task = *static_cast<Task*>(given);
    Walker walker(*task.walk, task.memory);
    for (;;) {
        const int64_t number = task.next->fetch_add(1, std::memory_order_relaxed);
        if (number >= task.walk->num_queries || task.walk->stop->is_left()) return nullptr;
        walker.run(number);
    }
}

}  // namespace
}  // namespace prerank

// 0, or 1 where there is not the memory for it; then nothing is written.
PRERANK_EXPORT int32_t prerank_walk(const prerank::Walk* asked) {
    using namespace prerank;
    const int64_t threads = std::max<int64_t>(1, std::min({asked->threads, asked->num_queries, MOST_THREADS}));
    const int64_t bytes = Walker::bytes(*asked);
    uint8_t* const memory = static_cast<uint8_t*>(std::malloc(threads * bytes));
    if (memory == nullptr) return 1;
    std::atomic<int64_t> next{0};
    Task tasks[MOST_THREADS];
    pthread_t started[MOST_THREADS];
    bool is_started[MOST_THREADS] = {};
    for (int64_t t = 0; t < threads; t++) {
        tasks[t] = {asked, &next, memory + t * bytes};
        // one that cannot be started leaves its queries to the others
        if (t) is_started[t] = pthread_create(&started[t], nullptr, work, &tasks[t]) == 0;
    }
    work(&tasks[0]);
    for (int64_t t = 1; t < threads; t++) {
        if (is_started[t]) pthread_join(started[t], nullptr);
    }
    std::free(memory);
    return 0;
}
