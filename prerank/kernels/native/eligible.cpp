// Which rows every group of packed bitmaps lets through: AND of ORs in blocks that stay in the first cache, then
// the rows by counting trailing zeros. Plain 64-bit words: compilers vectorise the blocks for any processor, and the
// rows cost about one step each whatever its width.
#include <cstring>

#include "export.h"

namespace {

constexpr int64_t WORD = 64;
constexpr int64_t BLOCK = 1024;  // words: the result and one group's are 8 KB each

}  // namespace

// bitmaps uint64 [., num_words]; group g has the rows chosen[starts[g]] to chosen[starts[g + 1]]. Writes the words of
// those eligible, bits past num_items cleared, and returns how many there are.
PRERANK_EXPORT int64_t prerank_eligible_words(const uint64_t* bitmaps, int64_t num_words, int64_t num_items,
                                              const int32_t* chosen, const int64_t* starts, const uint8_t* inverted,
                                              int64_t num_groups, uint64_t* words) {
    uint64_t group[BLOCK];
    int64_t count = 0;
    for (int64_t from = 0; from < num_words; from += BLOCK) {
        const int64_t size = num_words - from < BLOCK ? num_words - from : BLOCK;
        uint64_t* out = words + from;
        std::memset(out, 0xff, size * sizeof(uint64_t));
        if (from + size == num_words && num_items % WORD) out[size - 1] = (uint64_t{1} << num_items % WORD) - 1;
        for (int64_t g = 0; g < num_groups; ++g) {
            std::memset(group, 0, size * sizeof(uint64_t));
            for (int64_t c = starts[g]; c < starts[g + 1]; ++c) {
                const uint64_t* bitmap = bitmaps + chosen[c] * num_words + from;
                for (int64_t w = 0; w < size; ++w) group[w] |= bitmap[w];
            }
            const uint64_t flip = inverted[g] ? ~uint64_t{0} : 0;
            for (int64_t w = 0; w < size; ++w) out[w] &= group[w] ^ flip;
        }
        for (int64_t w = 0; w < size; ++w) count += __builtin_popcountll(out[w]);
    }
    return count;
}

// The places of the set bits of `words`, ascending, into `rows`, which has room for exactly as many.
PRERANK_EXPORT void prerank_rows_of_words(const uint64_t* words, int64_t num_words, int64_t* rows) {
    for (int64_t w = 0; w < num_words; ++w) {
        const int64_t first = w * WORD;
        uint64_t word = words[w];
        if (word == ~uint64_t{0}) {
            for (int64_t bit = 0; bit < WORD; ++bit) rows[bit] = first + bit;
            rows += WORD;
            continue;
        }
        for (; word; word &= word - 1) *rows++ = first + __builtin_ctzll(word);
    }
}
