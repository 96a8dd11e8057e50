// For processors with AVX2.
#include "scan.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#include <immintrin.h>

namespace prerank {
namespace {

constexpr int LANES = 8;
constexpr uint32_t EVERY = 0xff;
typedef __m256 Floats;

inline Floats zero() { return _mm256_setzero_ps(); }
inline Floats add_product(Floats a, Floats b, Floats sum) { return _mm256_fmadd_ps(a, b, sum); }
inline void store(float* p, Floats v) { _mm256_storeu_ps(p, v); }
inline Floats load(const float* p) { return _mm256_loadu_ps(p); }

inline Floats load(const uint16_t* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}

inline Floats load(const int8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}

inline Floats keep_last(Floats v, int64_t count) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i kept = _mm256_cmpgt_epi32(lane, _mm256_set1_epi32(LANES - 1 - static_cast<int>(count)));
    return _mm256_and_ps(v, _mm256_castsi256_ps(kept));
}

inline Floats sum_each(const Floats* s) {
    const Floats low = _mm256_hadd_ps(_mm256_hadd_ps(s[0], s[1]), _mm256_hadd_ps(s[2], s[3]));
    const Floats high = _mm256_hadd_ps(_mm256_hadd_ps(s[4], s[5]), _mm256_hadd_ps(s[6], s[7]));
    return _mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31));
}

// Products of bytes and whole numbers: WHOLE of a row at a time.
constexpr int64_t WHOLE = 16;
typedef __m256i Wholes;

inline Wholes no_wholes() { return _mm256_setzero_si256(); }
inline Floats to_floats(Wholes v) { return _mm256_cvtepi32_ps(v); }

inline Wholes add_wholes(const int8_t* row, const int16_t* weights, Wholes sum) {
    const __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row)));
    const __m256i of_query = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weights));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(wide, of_query));
}

inline Floats magnitude(Floats v) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v); }

inline uint32_t above(Floats v, float least) {
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(v, _mm256_set1_ps(least), _CMP_GT_OQ)));
}

inline uint32_t between(Floats v, float above) {
    const Floats enters = _mm256_cmp_ps(v, _mm256_set1_ps(above), _CMP_GT_OQ);
    const Floats is_finite = _mm256_cmp_ps(v, _mm256_set1_ps(__builtin_inff()), _CMP_LT_OQ);
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_and_ps(enters, is_finite)));
}

}  // namespace
}  // namespace prerank

#include "scan_rows.inc"

namespace prerank {

void scan_avx2(Worker& worker) { scan_rows(worker); }

}  // namespace prerank

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
