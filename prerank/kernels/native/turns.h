#pragma once

#include <cstdint>

namespace prerank {

// The calling thread is so much nicer to others than it was, and goes on for so long before one that waits has its turn;
// 0: as long as the system thinks right. One that wakes has the processor from one of longer slices (Linux 6.12 on;
// earlier ones take the niceness alone).
bool take_turns(int32_t nicer, int64_t slice_ns);

}  // namespace prerank
