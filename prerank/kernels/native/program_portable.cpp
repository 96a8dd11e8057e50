// For any processor.
#include "program.h"

#include "program_block.inc"

namespace prerank {

void run_block_portable(const Program& p, const Table* t, const Asked& a, int64_t first, uint8_t* scratch) {
    run(p, t, a, first, scratch);
}

}  // namespace prerank
