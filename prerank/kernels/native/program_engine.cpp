// Who runs blocks: one thread a core, pinned to it, taking the next block of the request that waits longest. A lone
// request is on every core; when many wait, each core has work of its own. No block is ever split.
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif

#include "export.h"
#include "program.h"
#include "turns.h"

namespace prerank {
namespace {

struct Job {
    const Program& program;
    const Table* tables;
    const Asked& asked;
    int64_t next = 0, left = 0;  // where the next block begins; blocks that are not done; guarded by Engine::lock
    std::condition_variable done{};
};

class Engine {
public:
    Engine(int64_t num_threads, bool is_pinned, Level level, int32_t nicer) : level_(level), nicer_(nicer) {
        const std::vector<int> cores = allowed_cores();
        for (int64_t n = 0; n < num_threads; n++) {
            threads_.emplace_back([this] { work(); });
            if (is_pinned && static_cast<size_t>(num_threads) <= cores.size()) pin(threads_.back(), cores[n]);
        }
    }

    ~Engine() {
        {
            std::lock_guard<std::mutex> held(lock_);
            is_ending_ = true;
        }
        wake_.notify_all();
        for (std::thread& thread : threads_) thread.join();
    }

    void run(const Program& program, const Table* tables, const Asked& asked) {
        if (asked.count <= 0) return;
        Job job{program, tables, asked};
        job.left = (asked.count + program.block - 1) / program.block;
        const bool is_one = job.left == 1;
        std::unique_lock<std::mutex> held(lock_);
        jobs_.push_back(&job);
        is_one ? wake_.notify_one() : wake_.notify_all();
        job.done.wait(held, [&job] { return job.left == 0; });
    }

private:
    void work() {
        take_turns(nicer_, 0);
        uint8_t* scratch = nullptr;
        size_t size = 0;
        std::unique_lock<std::mutex> held(lock_);
        while (true) {
            wake_.wait(held, [this] { return is_ending_ || !jobs_.empty(); });
            if (is_ending_) break;
            if (level_ == AMX_BF16) begin();
            while (!jobs_.empty()) {
                Job& job = *jobs_.front();
                const int64_t first = job.next;
                job.next += job.program.block;
                if (job.next >= job.asked.count) jobs_.pop_front();
                held.unlock();
                const bool is_wanted = !job.asked.stop->is_left();
                const size_t wanted = static_cast<size_t>(job.program.block * job.program.row_bytes);
                if (wanted > size) {
                    std::free(scratch);
                    size = (wanted + 4095) / 4096 * 4096;
                    scratch = static_cast<uint8_t*>(std::aligned_alloc(4096, size));
                    std::memset(scratch, 0, size);
                }
                if (is_wanted) run_block(job.program, job.tables, job.asked, first, scratch);
                held.lock();
                if (--job.left == 0) job.done.notify_one();  // the job is its caller's, who goes on when we unlock
            }
            if (level_ == AMX_BF16) end();
        }
        held.unlock();
        std::free(scratch);
    }

    void run_block(const Program& p, const Table* t, const Asked& a, int64_t first, uint8_t* scratch) const {
#if defined(__x86_64__)
        if (level_ == AMX_BF16) return run_block_amx(p, t, a, first, scratch);
        if (level_ == AVX512_BF16) return run_block_avx512(p, t, a, first, scratch);
        if (level_ == AVX2) return run_block_avx2(p, t, a, first, scratch);
#endif
        run_block_portable(p, t, a, first, scratch);
    }

    static void begin() {
#if defined(__x86_64__)
        begin_amx();
#endif
    }

    static void end() {
#if defined(__x86_64__)
        end_amx();
#endif
    }

    static std::vector<int> allowed_cores() {
        std::vector<int> found;
#if defined(__linux__)
        cpu_set_t allowed;
        if (sched_getaffinity(0, sizeof allowed, &allowed) == 0)
            for (int core = 0; core < CPU_SETSIZE; core++)
                if (CPU_ISSET(core, &allowed)) found.push_back(core);
#endif
        return found;
    }

    static void pin(std::thread& thread, int core) {
#if defined(__linux__)
        cpu_set_t one;
        CPU_ZERO(&one);
        CPU_SET(core, &one);
        pthread_setaffinity_np(thread.native_handle(), sizeof one, &one);
#else
        (void)thread, (void)core;
#endif
    }

    const Level level_;
    const int32_t nicer_;  // than who started it: others that wake have the core
    std::mutex lock_;
    std::condition_variable wake_;
    std::deque<Job*> jobs_;  // those with blocks that nobody took
    bool is_ending_ = false;
    std::vector<std::thread> threads_;
};

// Round to nearest, ties to even; NaN stays one.
uint16_t to_bf16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (value != value) return 0x7fc0;
    return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

}  // namespace
}  // namespace prerank

using prerank::Engine;

// `level` is one the processor has.
PRERANK_EXPORT Engine* prerank_engine_make(int64_t num_threads, int32_t is_pinned, int32_t level, int32_t nicer) {
    return new (std::nothrow) Engine(num_threads, is_pinned != 0, static_cast<prerank::Level>(level), nicer);
}

PRERANK_EXPORT void prerank_engine_free(Engine* engine) { delete engine; }

// Waits until every candidate's logits are written, or `asked->stop` is left and no block is under way.
PRERANK_EXPORT void prerank_engine_run(Engine* engine, const prerank::Program* program, const prerank::Table* tables,
                                       const prerank::Asked* asked) {
    engine->run(*program, tables, *asked);
}

// weight [rows, depth], `row_step` and `column_step` numbers apart -> bfloat16 [rows / 16][depth / 2][16][2], rows
// rounded up to 32 and depth to 32 with zeros: what one instruction multiplies stands side by side.
PRERANK_EXPORT void prerank_pack(const float* weight, int64_t rows, int64_t depth, int64_t row_step, int64_t column_step,
                                 float factor, uint16_t* packed) {
    const int64_t all_rows = (rows + 31) / 32 * 32, all_depth = (depth + 31) / 32 * 32;
    std::memset(packed, 0, static_cast<size_t>(all_rows * all_depth) * 2);
    for (int64_t n = 0; n < rows; n++)
        for (int64_t k = 0; k < depth; k++)
            packed[(n / 16) * all_depth * 16 + (k / 2) * 32 + (n % 16) * 2 + k % 2] =
                prerank::to_bf16(factor * weight[n * row_step + k * column_step]);
}

// One slot of what a request brings, found in the tensor `source` of its user side from number `offset` on.
struct Slot {
    int64_t kind;  // 0 a vector of `rows`, 1 a matrix [rows, depth], 2 `rows` codes of `bytes` each, a table of `depth`
    int64_t source, offset, rows, depth, row_step, column_step, bytes;
    double factor;
    int64_t target;  // bytes from the start of the request's memory, a multiple of 64
};

namespace {

int64_t code(const void* source, int64_t at, int64_t bytes) {
    if (bytes == 1) return static_cast<const int8_t*>(source)[at];
    if (bytes == 2) return static_cast<const int16_t*>(source)[at];
    if (bytes == 4) return static_cast<const int32_t*>(source)[at];
    return static_cast<const int64_t*>(source)[at];
}

}  // namespace

// Fills a request's memory, and `slots` and `lengths` with where each is and how long.
PRERANK_EXPORT void prerank_bind(const Slot* asked, int64_t count, const void* const* sources, uint8_t* memory,
                                 const void** slots, int64_t* lengths) {
    for (int64_t n = 0; n < count; n++) {
        const Slot& slot = asked[n];
        const float* floats = static_cast<const float*>(sources[slot.source]);
        const float factor = static_cast<float>(slot.factor);
        slots[n] = memory + slot.target;
        lengths[n] = slot.rows;
        if (slot.kind == 1) {
            prerank_pack(floats + slot.offset, slot.rows, slot.depth, slot.row_step, slot.column_step, factor,
                         reinterpret_cast<uint16_t*>(memory + slot.target));
        } else if (slot.kind == 0) {
            float* out = reinterpret_cast<float*>(memory + slot.target);
            for (int64_t i = 0; i < (slot.rows + 31) / 32 * 32; i++)
                out[i] = i < slot.rows ? factor * floats[slot.offset + i * slot.row_step] : 0.0f;
        } else {
            prerank::CodeCount* out = reinterpret_cast<prerank::CodeCount*>(memory + slot.target);
            std::memset(out, 0, static_cast<size_t>(slot.depth) * sizeof *out);
            lengths[n] = slot.depth;
            for (int64_t i = 0; i < slot.rows; i++) {
                const int64_t own = code(sources[slot.source], slot.offset + i * slot.row_step, slot.bytes);
                if (own <= 0 || own > INT32_MAX) continue;
                prerank::CodeCount& entry = out[prerank::code_place(out, static_cast<uint32_t>(slot.depth - 1), own)];
                entry.code = static_cast<int32_t>(own);
                entry.count++;
            }
        }
    }
}
