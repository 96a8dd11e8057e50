// Where ids are among others: open addressing by a multiplied hash, the places alone, for the ids themselves are there
// already. What several ids touch is asked of the memory at once, so that they wait together.
#include <algorithm>

#include "export.h"

namespace {

constexpr int64_t AT_ONCE = 16;
constexpr uint64_t GOLDEN = 0x9E3779B97F4A7C15u;

inline uint64_t home(int64_t id, int32_t bits) { return (static_cast<uint64_t>(id) * GOLDEN) >> (64 - bits); }

}  // namespace

// Fill `places` [2^bits], all 0 before, with the ids' [num] places from 1 on; fewer ids than places, 1 to 31 bits.
PRERANK_EXPORT void prerank_lookup_build(const int64_t* ids, int64_t num, int32_t* places, int32_t bits) {
    const uint64_t mask = (uint64_t{1} << bits) - 1;
    for (int64_t first = 0; first < num; first += AT_ONCE) {
        const int64_t end = std::min(num, first + AT_ONCE);
        for (int64_t n = first; n < end; n++) __builtin_prefetch(places + home(ids[n], bits), 1);
        for (int64_t n = first; n < end; n++) {
            uint64_t at = home(ids[n], bits);
            while (places[at]) at = (at + 1) & mask;
            places[at] = static_cast<int32_t>(n + 1);
        }
    }
}

// The place of each of `wanted` [num] in `ids`, -1 for one that is not there.
PRERANK_EXPORT void prerank_lookup(const int64_t* ids, const int32_t* places, int32_t bits, const int64_t* wanted,
                                   int64_t num, int64_t* found) {
    const uint64_t mask = (uint64_t{1} << bits) - 1;
    for (int64_t first = 0; first < num; first += AT_ONCE) {
        const int64_t end = std::min(num, first + AT_ONCE);
        for (int64_t n = first; n < end; n++) __builtin_prefetch(places + home(wanted[n], bits));
        for (int64_t n = first; n < end; n++) {
            const int32_t place = places[home(wanted[n], bits)];
            if (place) __builtin_prefetch(ids + place - 1);
        }
        for (int64_t n = first; n < end; n++) {
            uint64_t at = home(wanted[n], bits);
            while (places[at] && ids[places[at] - 1] != wanted[n]) at = (at + 1) & mask;
            found[n] = static_cast<int64_t>(places[at]) - 1;
        }
    }
}
