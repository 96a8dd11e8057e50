// Whether somebody still waits for what runs, as kernels/stop.py lays it out.
#pragma once

#include <cstdint>
#include <ctime>

namespace prerank {

// Once `is_set` is not 0, or the time is `until_ns`, nobody waits any more. 0 is no such time; CLOCK_MONOTONIC's.
struct Stop {
    int32_t is_set;
    int64_t until_ns;

    bool is_left() const {
        if (__atomic_load_n(&is_set, __ATOMIC_RELAXED)) return true;
        const int64_t until = __atomic_load_n(&until_ns, __ATOMIC_RELAXED);
        if (!until) return false;
        timespec now;
        clock_gettime(CLOCK_MONOTONIC, &now);
        return now.tv_sec * INT64_C(1000000000) + now.tv_nsec >= until;
    }
};

}  // namespace prerank
