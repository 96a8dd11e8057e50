// Which rows every group of packed bitmaps lets through: AND of ORs in blocks that stay in the first cache, then the
// places of the bits that are left. The rows cost most: a loop until a word is empty guesses its end wrong once a word,
// so as many rows as most words have are written whether they are there or not, and the next word writes over the rest.
#include <cstring>

#include "export.h"

#if defined(__x86_64__)
#include <immintrin.h>
#define PRERANK_AVX2 __attribute__((target("avx2,bmi,bmi2,popcnt")))
#define PRERANK_AVX512 __attribute__((target("avx2,bmi,bmi2,popcnt,avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2")))
#endif
#define PRERANK_INLINE inline __attribute__((always_inline))  // so that each level compiles it for its own instructions

namespace prerank {
namespace {

constexpr int64_t WORD = 64;
constexpr int64_t BLOCK = 1024;  // words: the result and one group's are 8 KB each
constexpr int64_t AT_ONCE = 8;

struct Groups {
    const uint64_t* bitmaps;
    int64_t num_words, num_items;
    const int32_t* chosen;
    const int64_t* starts;
    const uint8_t* inverted;
    int64_t num_groups;

    const uint64_t* bitmap(int64_t place, int64_t from) const { return bitmaps + chosen[place] * num_words + from; }
};

// Words [from, from + size) of those eligible; how many bits they have.
PRERANK_INLINE int64_t block_of(const Groups& groups, int64_t from, int64_t size, uint64_t* out) {
    uint64_t any[BLOCK];
    std::memset(out, 0xff, size * sizeof(uint64_t));
    if (from + size == groups.num_words && groups.num_items % WORD) {
        out[size - 1] = (uint64_t{1} << groups.num_items % WORD) - 1;
    }
    for (int64_t g = 0; g < groups.num_groups; ++g) {
        const int64_t start = groups.starts[g], end = groups.starts[g + 1];
        const uint64_t flip = groups.inverted[g] ? ~uint64_t{0} : 0;
        const uint64_t* of_group = any;
        if (end - start == 1) {  // as most are
            of_group = groups.bitmap(start, from);
        } else {
            std::memset(any, 0, size * sizeof(uint64_t));
            for (int64_t place = start; place < end; ++place) {
                const uint64_t* bitmap = groups.bitmap(place, from);
                for (int64_t w = 0; w < size; ++w) any[w] |= bitmap[w];
            }
        }
        for (int64_t w = 0; w < size; ++w) out[w] &= of_group[w] ^ flip;
    }
    int64_t count = 0;
    for (int64_t w = 0; w < size; ++w) count += __builtin_popcountll(out[w]);
    return count;
}

PRERANK_INLINE int64_t words_of(const Groups& groups, uint64_t* words) {
    int64_t count = 0;
    for (int64_t from = 0; from < groups.num_words; from += BLOCK) {
        const int64_t left = groups.num_words - from;
        count += block_of(groups, from, left < BLOCK ? left : BLOCK, words + from);
    }
    return count;
}

PRERANK_INLINE void exactly(uint64_t word, int64_t first, int64_t* rows) {
    for (; word; word &= word - 1) *rows++ = first + __builtin_ctzll(word);
}

// `rows` has room for a whole word's.
PRERANK_INLINE void counted(uint64_t word, int64_t count, int64_t first, int64_t* rows) {
    constexpr uint64_t LAST = uint64_t{1} << (WORD - 1);  // an empty word has no first bit to count to
    for (int64_t done = 0; done < count; done += AT_ONCE) {
        for (int64_t n = 0; n < AT_ONCE; ++n) {
            rows[done + n] = first + __builtin_ctzll(word | LAST);
            word &= word - 1;
        }
    }
}

PRERANK_INLINE void rows_of(const uint64_t* words, int64_t num_words, int64_t* rows, const int64_t* end) {
    for (int64_t w = 0; w < num_words; ++w) {
        const int64_t count = __builtin_popcountll(words[w]);
        if (end - rows >= WORD) {
            counted(words[w], count, w * WORD, rows);
        } else {
            exactly(words[w], w * WORD, rows);
        }
        rows += count;
    }
}

#if defined(__x86_64__)
PRERANK_AVX2 int64_t words_avx2(const Groups& groups, uint64_t* words) { return words_of(groups, words); }

PRERANK_AVX2 void rows_avx2(const uint64_t* words, int64_t num_words, int64_t* rows, const int64_t* end) {
    rows_of(words, num_words, rows, end);
}

PRERANK_AVX512 int64_t words_avx512(const Groups& groups, uint64_t* words) { return words_of(groups, words); }

// The places of a word's bits as bytes, pressed together, then eight at a time as rows.
PRERANK_AVX512 void rows_avx512(const uint64_t* words, int64_t num_words, int64_t* rows, const int64_t* end) {
    alignas(64) uint8_t every[WORD];
    for (int64_t n = 0; n < WORD; ++n) every[n] = static_cast<uint8_t>(n);
    const __m512i places = _mm512_load_si512(every);
    for (int64_t w = 0; w < num_words; ++w) {
        const int64_t count = __builtin_popcountll(words[w]);
        const __m512i first = _mm512_set1_epi64(w * WORD);
        if (end - rows >= WORD) {
            const __m512i pressed = _mm512_maskz_compress_epi8(words[w], places);
            const __m128i low = _mm512_castsi512_si128(pressed);
            _mm512_storeu_si512(rows, _mm512_add_epi64(first, _mm512_cvtepu8_epi64(low)));
            _mm512_storeu_si512(rows + 8, _mm512_add_epi64(first, _mm512_cvtepu8_epi64(_mm_srli_si128(low, 8))));
            if (count > 16) {
                alignas(64) uint8_t bytes[WORD];
                _mm512_store_si512(bytes, pressed);
                for (int64_t done = 16; done < count; done += AT_ONCE) {
                    const __m128i some = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes + done));
                    _mm512_storeu_si512(rows + done, _mm512_add_epi64(first, _mm512_cvtepu8_epi64(some)));
                }
            }
        } else {
            exactly(words[w], w * WORD, rows);
        }
        rows += count;
    }
}

// Of processors with AVX-512 and bfloat16 only Cooper Lake cannot press bytes together.
bool can_press() {
    static const bool known = __builtin_cpu_supports("avx512vbmi2");
    return known;
}
#endif

}  // namespace
}  // namespace prerank

// bitmaps uint64 [., num_words]; group g has the rows chosen[starts[g]] to chosen[starts[g + 1]]. Writes the words of
// those eligible, bits past num_items cleared, and returns how many there are.
PRERANK_EXPORT int64_t prerank_eligible_words(const uint64_t* bitmaps, int64_t num_words, int64_t num_items,
                                              const int32_t* chosen, const int64_t* starts, const uint8_t* inverted,
                                              int64_t num_groups, uint64_t* words, int64_t level) {
    using namespace prerank;
    const Groups groups{bitmaps, num_words, num_items, chosen, starts, inverted, num_groups};
#if defined(__x86_64__)
    if (level >= AVX512_BF16 && can_press()) return words_avx512(groups, words);
    if (level >= AVX2) return words_avx2(groups, words);
#endif
    (void)level;
    return words_of(groups, words);
}

// The places of the set bits of `words`, ascending, into `rows`, which has room for exactly as many: `num_rows`.
PRERANK_EXPORT void prerank_rows_of_words(const uint64_t* words, int64_t num_words, int64_t* rows, int64_t num_rows,
                                          int64_t level) {
    using namespace prerank;
    const int64_t* end = rows + num_rows;
#if defined(__x86_64__)
    if (level >= AVX512_BF16 && can_press()) return rows_avx512(words, num_words, rows, end);
    if (level >= AVX2) return rows_avx2(words, num_words, rows, end);
#endif
    (void)level;
    rows_of(words, num_words, rows, end);
}
