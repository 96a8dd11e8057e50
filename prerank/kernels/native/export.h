// What every source shares: a C interface of plain numbers and pointers, checked by the Python that calls it.
#pragma once

#include <cstdint>

#define PRERANK_EXPORT extern "C" __attribute__((visibility("default")))

// Raised with every new function and every change of a signature; prerank/kernels/native.py asks for the same number
// before it calls anything.
constexpr int32_t PRERANK_INTERFACE = 11;

namespace prerank {

// The instructions a kernel may use here, each level with all before it.
enum Level : int32_t { PORTABLE = 0, AVX2 = 1, AVX512_BF16 = 2, AMX_BF16 = 3 };

Level level();

}  // namespace prerank
