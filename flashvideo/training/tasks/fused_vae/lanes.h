// Vectors of 16 channels, and arithmetic with them.

#pragma once

#include <immintrin.h>

#include <cstdint>

namespace fused_vae {

using Bf16 = uint16_t;  // the upper half of a float's bits
using Lanes = __m512;   // 16 channels of one position, in float32

constexpr int64_t LANES = 16;
constexpr float LARGEST_EXPONENT = 80.0f;  // e^80 is still a float32; a sigmoid there is as good as 0 or 1

inline Lanes load(const Bf16* from) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

inline void store(Bf16* to, Lanes values) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(values)));
}

inline Lanes load(const float* from) { return _mm512_loadu_ps(from); }

inline void add_to(float* sum, Lanes values) { _mm512_storeu_ps(sum, _mm512_add_ps(load(sum), values)); }

inline void add_to(double* sum, Lanes values) {
    alignas(64) float each[LANES];
    _mm512_store_ps(each, values);
    for (int64_t lane = 0; lane < LANES; lane++) sum[lane] += each[lane];
}

// e^x, to about 2e-6 of it: 2^whole times a polynomial of the rest (the Taylor series of 2^x around 0).
inline Lanes exponential(Lanes x) {
    const Lanes limit = _mm512_set1_ps(LARGEST_EXPONENT);
    x = _mm512_max_ps(_mm512_min_ps(x, limit), _mm512_sub_ps(_mm512_setzero_ps(), limit));
    const Lanes power = _mm512_mul_ps(x, _mm512_set1_ps(1.44269504f));
    const Lanes whole = _mm512_roundscale_ps(power, _MM_FROUND_TO_NEAREST_INT);
    const Lanes rest = _mm512_sub_ps(power, whole);
    Lanes sum = _mm512_set1_ps(0.00133335581f);
    for (const float term : {0.00961812911f, 0.0555041087f, 0.240226507f, 0.693147181f, 1.0f}) {
        sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(term));
    }
    return _mm512_scalef_ps(sum, whole);
}

inline Lanes sigmoid(Lanes x) {
    const Lanes one = _mm512_set1_ps(1.0f);
    const Lanes divisor = _mm512_add_ps(exponential(_mm512_sub_ps(_mm512_setzero_ps(), x)), one);
    const Lanes guess = _mm512_rcp14_ps(divisor);
    return _mm512_mul_ps(guess, _mm512_fnmadd_ps(divisor, guess, _mm512_set1_ps(2.0f)));  // one step of Newton's
}

}  // namespace fused_vae
