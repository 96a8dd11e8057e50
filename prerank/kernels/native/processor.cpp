// Which instructions this processor and its operating system let us use.
#include "export.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace prerank {
namespace {

#if defined(__x86_64__)
bool has_amx() {
#if defined(__linux__) && defined(SYS_arch_prctl)
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
    const bool has_bf16 = edx & (1u << 22), has_tiles = edx & (1u << 24);
    // the tiles are 8 KB of state that Linux hands out only to those who ask (ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)
    return has_bf16 && has_tiles && syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
    return false;
#endif
}
#endif

Level found() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return PORTABLE;
    const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                            __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
    if (!has_avx512) return AVX2;
    return has_amx() ? AMX_BF16 : AVX512_BF16;
#else
    return PORTABLE;
#endif
}

}  // namespace

Level level() {
    static const Level known = found();
    return known;
}

}  // namespace prerank

PRERANK_EXPORT int32_t prerank_interface() { return PRERANK_INTERFACE; }

PRERANK_EXPORT int32_t prerank_level() { return prerank::level(); }
