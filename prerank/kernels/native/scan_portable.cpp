// For any processor.
#include "scan.h"

namespace prerank {
namespace {

constexpr int LANES = 4;
constexpr uint32_t EVERY = 0xf;
typedef float Floats __attribute__((vector_size(16)));
typedef uint32_t Bits __attribute__((vector_size(16)));

inline Floats zero() { return Floats{}; }
inline Floats add_product(Floats a, Floats b, Floats sum) { return a * b + sum; }
inline void store(float* p, Floats v) { __builtin_memcpy(p, &v, sizeof v); }

inline Floats load(const float* p) {
    Floats v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}

inline Floats load(const uint16_t* p) {
    const Bits wide = {p[0], p[1], p[2], p[3]};
    return reinterpret_cast<Floats>(wide << 16);
}

inline Floats load(const int8_t* p) {
    Floats v = zero();
    for (int n = 0; n < LANES; n++) v[n] = p[n];
    return v;
}

inline Floats keep_last(Floats v, int64_t count) {
    Floats kept = zero();
    for (int64_t n = LANES - count; n < LANES; n++) kept[n] = v[n];
    return kept;
}

inline Floats sum_each(const Floats* sums) {
    Floats each = zero();
    for (int n = 0; n < LANES; n++) each[n] = (sums[n][0] + sums[n][2]) + (sums[n][1] + sums[n][3]);
    return each;
}

// Products of bytes and whole numbers: WHOLE of a row at a time.
constexpr int64_t WHOLE = 4;
typedef int32_t Wholes __attribute__((vector_size(16)));

inline Wholes no_wholes() { return Wholes{}; }
inline Floats to_floats(Wholes v) { return __builtin_convertvector(v, Floats); }

inline Wholes add_wholes(const int8_t* row, const int16_t* weights, Wholes sum) {
    for (int n = 0; n < LANES; n++) sum[n] += row[n] * weights[n];
    return sum;
}

inline Floats magnitude(Floats v) { return v < 0.0f ? -v : v; }

inline uint32_t above(Floats v, float least) {
    uint32_t bits = 0;
    for (int n = 0; n < LANES; n++) bits |= static_cast<uint32_t>(v[n] > least) << n;
    return bits;
}

inline uint32_t between(Floats v, float above) {
    uint32_t bits = 0;
    for (int n = 0; n < LANES; n++) bits |= static_cast<uint32_t>(v[n] > above && v[n] < __builtin_inff()) << n;
    return bits;
}

}  // namespace
}  // namespace prerank

#include "scan_rows.inc"

namespace prerank {

void scan_portable(Worker& worker) { scan_rows(worker); }

}  // namespace prerank
