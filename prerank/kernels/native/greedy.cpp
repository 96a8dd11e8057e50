// The k best in order, at most so many of a group: candidates by falling value, one is skipped where a group of its is
// full. Only the best few thousand are ever sorted; more follow where those did not make k.
#include <algorithm>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "export.h"

namespace prerank {
namespace {

constexpr uint32_t NEVER = UINT32_MAX;  // the key of what can never win; no finite float has it
constexpr int BIN_BITS = 16;
constexpr size_t NUM_BINS = size_t{1} << BIN_BITS;
constexpr int64_t LEAST_AT_ONCE = 4096, AT_ONCE_PER_WINNER = 4;

struct Entry {
    int64_t row;
    uint32_t key, position;

    bool operator<(const Entry& other) const {
        if (key != other.key) return key < other.key;
        return row != other.row ? row < other.row : position < other.position;
    }
};

// Floats by falling value as rising integers; 0.0 and -0.0 are equal.
inline uint32_t falling(float value) {
    const float plain = value + 0.0f;
    uint32_t bits;
    std::memcpy(&bits, &plain, sizeof bits);
    const uint32_t is_finite = (bits & 0x7F800000u) != 0x7F800000u;
    const uint32_t negative = 0u - (bits >> 31);
    const uint32_t key = bits ^ (~negative & 0x7FFFFFFFu);
    return is_finite ? key : NEVER;
}

// How many of each group have won, for one rule: open addressing, never more than half full.
class Counts {
public:
    explicit Counts(int64_t most) {
        size_t size = 4;
        while (size < 2 * static_cast<size_t>(most)) size *= 2;
        mask_ = size - 1;
        slots_.assign(size, Slot{-1, 0});
    }

    int64_t of(int32_t group) const { return slots_[place(group)].count; }

    void add(int32_t group) {
        Slot& slot = slots_[place(group)];
        slot.group = group;
        slot.count++;
    }

private:
    struct Slot {
        int32_t group, count;
    };

    size_t place(int32_t group) const {
        size_t at = (static_cast<uint32_t>(group) * 0x9E3779B1u >> 7) & mask_;
        while (slots_[at].group != group && slots_[at].group >= 0) at = (at + 1) & mask_;
        return at;
    }

    size_t mask_;
    std::vector<Slot> slots_;
};

struct Asked {
    const float* utility;
    const int64_t* rows;
    const uint8_t* valid;
    const int32_t* groups;
    const int64_t* at_most;
    int64_t num, num_rules, rule_step, candidate_step, k;
    int64_t* positions;
};

class Greedy {
public:
    explicit Greedy(const Asked& asked) : asked_(asked) {
        counts_.reserve(asked.num_rules);
        for (int64_t rule = 0; rule < asked.num_rules; rule++) counts_.emplace_back(std::min(asked.k, asked.num));
    }

    void run() {
        std::fill_n(asked_.positions, asked_.k, int64_t{-1});
        if (asked_.k <= 0 || asked_.num <= 0) return;
        std::unique_ptr<uint32_t[]> keys(new uint32_t[asked_.num]);
        for (int64_t n = 0; n < asked_.num; n++) {
            const uint32_t key = falling(asked_.utility[n]);
            keys[n] = asked_.valid[n] ? key : NEVER;
        }
        if (asked_.num <= 2 * LEAST_AT_ONCE) return take(keys.get(), 0, NUM_BINS, asked_.num, asked_.num);
        std::vector<uint32_t> bins(NUM_BINS);
        for (int64_t n = 0; n < asked_.num; n++) bins[keys[n] >> (32 - BIN_BITS)]++;
        bins.back() = 0;  // nothing but NEVER is in the last one

        int64_t at_once = asked_.num_rules ? AT_ONCE_PER_WINNER * asked_.k : asked_.k;
        at_once = std::max(LEAST_AT_ONCE, std::min(at_once, asked_.num));
        for (size_t first = 0, past = 0; past < NUM_BINS && num_won_ < asked_.k; first = past, at_once *= 2) {
            int64_t found = 0;
            while (past < NUM_BINS && found < at_once) found += bins[past++];
            if (found) take(keys.get(), first, past, found, at_once);
        }
    }

private:
    // The candidates whose keys are in the bins [first, past), `found` of them or fewer.
    void take(const uint32_t* keys, size_t first, size_t past, int64_t found, int64_t at_once) {
        const uint32_t low = static_cast<uint32_t>(first) << (32 - BIN_BITS);
        const uint32_t span = static_cast<uint32_t>(past - first) << (32 - BIN_BITS);  // 0: all of them, without NEVER
        entries_.clear();
        entries_.reserve(found);
        for (int64_t n = 0; n < asked_.num; n++) {
            if (keys[n] == NEVER || keys[n] - low > span - 1) continue;
            entries_.push_back({asked_.rows[n], keys[n], static_cast<uint32_t>(n)});
        }
        for (auto begin = entries_.begin(); begin != entries_.end() && num_won_ < asked_.k;) {
            auto end = entries_.end();
            if (end - begin > 2 * at_once) {  // many of nearly one value
                end = begin + at_once;
                std::nth_element(begin, end, entries_.end());
            }
            std::sort(begin, end);
            for (; begin != end && num_won_ < asked_.k; ++begin) offer(begin->position);
        }
    }

    void offer(int64_t position) {
        const int32_t* groups = asked_.groups + position * asked_.candidate_step;
        for (int64_t rule = 0; rule < asked_.num_rules; rule++) {
            const int32_t group = groups[rule * asked_.rule_step];
            if (group >= 0 && counts_[rule].of(group) >= asked_.at_most[rule]) return;
        }
        for (int64_t rule = 0; rule < asked_.num_rules; rule++) {
            const int32_t group = groups[rule * asked_.rule_step];
            if (group >= 0) counts_[rule].add(group);
        }
        asked_.positions[num_won_++] = position;
    }

    const Asked& asked_;
    std::vector<Counts> counts_;
    std::vector<Entry> entries_;
    int64_t num_won_ = 0;
};

}  // namespace
}  // namespace prerank

// utility, rows and valid are [num_requests, num]; groups has the three steps, in elements; positions are
// [num_requests, k].
PRERANK_EXPORT void prerank_greedy_top_k(const float* utility, const int64_t* rows, const uint8_t* valid,
                                         const int32_t* groups, const int64_t* at_most, int64_t num_requests,
                                         int64_t num, int64_t num_rules, int64_t request_step, int64_t rule_step,
                                         int64_t candidate_step, int64_t k, int64_t* positions) {
    for (int64_t b = 0; b < num_requests; b++) {
        const prerank::Asked asked{utility + b * num, rows + b * num, valid + b * num,
                                   groups + b * request_step, at_most, num, num_rules,
                                   rule_step, candidate_step, k, positions + b * k};
        prerank::Greedy(asked).run();
    }
}
