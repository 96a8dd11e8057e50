// For processors with AVX-512.
#include "scan.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,prefer-vector-width=512")
#endif
#include <immintrin.h>

namespace prerank {
namespace {

constexpr int LANES = 16;
constexpr uint32_t EVERY = 0xffff;
typedef __m512 Floats;

inline Floats zero() { return _mm512_setzero_ps(); }
inline Floats add_product(Floats a, Floats b, Floats sum) { return _mm512_fmadd_ps(a, b, sum); }
inline void store(float* p, Floats v) { _mm512_storeu_ps(p, v); }
inline Floats load(const float* p) { return _mm512_loadu_ps(p); }

inline Floats load(const uint16_t* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

inline Floats load(const int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}

inline Floats keep_last(Floats v, int64_t count) {
    return _mm512_maskz_mov_ps(static_cast<__mmask16>(0xffffu << (LANES - count)), v);
}

// The sums of two, or of two pairs, side by side in each quarter; then quarters of four and of all sixteen.
inline Floats pair(Floats a, Floats b) { return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)); }

inline Floats pairs(Floats a, Floats b) {
    const __m512d x = _mm512_castps_pd(a), y = _mm512_castps_pd(b);
    return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
}

inline Floats four(const Floats* s) { return pairs(pair(s[0], s[1]), pair(s[2], s[3])); }

inline Floats quarters(Floats a, Floats b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}

inline Floats sum_each(const Floats* s) {
    return quarters(quarters(four(s), four(s + 4)), quarters(four(s + 8), four(s + 12)));
}

// Products of bytes and whole numbers: WHOLE of a row at a time.
constexpr int64_t WHOLE = 32;
typedef __m512i Wholes;

inline Wholes no_wholes() { return _mm512_setzero_si512(); }
inline Floats to_floats(Wholes v) { return _mm512_cvtepi32_ps(v); }

inline Wholes add_wholes(const int8_t* row, const int16_t* weights, Wholes sum) {
    const __m512i wide = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row)));
    return _mm512_dpwssd_epi32(sum, wide, _mm512_loadu_si512(weights));
}

inline Floats magnitude(Floats v) { return _mm512_abs_ps(v); }

inline uint32_t above(Floats v, float least) { return _mm512_cmp_ps_mask(v, _mm512_set1_ps(least), _CMP_GT_OQ); }

inline uint32_t between(Floats v, float above) {
    const __mmask16 enters = _mm512_cmp_ps_mask(v, _mm512_set1_ps(above), _CMP_GT_OQ);
    return _mm512_mask_cmp_ps_mask(enters, v, _mm512_set1_ps(__builtin_inff()), _CMP_LT_OQ);
}

}  // namespace
}  // namespace prerank

#include "scan_rows.inc"

namespace prerank {

void scan_avx512(Worker& worker) { scan_rows(worker); }

}  // namespace prerank

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
