// How soon a thread has its turn on a processor that others want too, where the system lets it say so (Linux).
#include "turns.h"

#include <algorithm>

#if defined(__linux__)
#include <sched.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "export.h"

namespace prerank {

// Whether the system took it. A thread that runs by another policy than the usual one keeps it.
bool take_turns(int32_t nicer, int64_t slice_ns) {
#if defined(__linux__) && defined(SYS_sched_setattr)
    if (sched_getscheduler(0) != SCHED_OTHER) return false;
    struct {  // sched_attr of linux/sched/types.h, which not every system's headers have
        uint32_t size, policy;
        uint64_t flags;
        int32_t nice;
        uint32_t priority;
        uint64_t runtime, deadline, period;
    } asked{};
    asked.size = sizeof asked;
    asked.policy = SCHED_OTHER;
    asked.nice = std::min(19, getpriority(PRIO_PROCESS, 0) + nicer);  // of this thread, on Linux
    asked.runtime = static_cast<uint64_t>(slice_ns);
    return syscall(SYS_sched_setattr, 0, &asked, 0) == 0;
#else
    (void)nicer, (void)slice_ns;
    return false;
#endif
}

}  // namespace prerank

PRERANK_EXPORT int32_t prerank_take_turns(int32_t nicer, int64_t slice_ns) {
    return prerank::take_turns(nicer, slice_ns) ? 1 : 0;
}
