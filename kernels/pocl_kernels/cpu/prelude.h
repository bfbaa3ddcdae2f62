/* Vectorisable float32 functions shared by the row kernels. Plain C11: no intrinsics, no libm in the loops, so that any
 * compiler turns the loops into the widest SIMD of the machine. NaN and infinities propagate; -ffast-math must stay off.
 * Polynomials: Cephes (S. L. Moshier), errors below 2 ulp. */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
enum { BLOCK = 1024 };  /* entries summed in float32 before the sum moves to double: 4 KB, stays in L1 */

INLINE float as_float(int32_t i) { float f; memcpy(&f, &i, 4); return f; }
INLINE int32_t as_int(float f) { int32_t i; memcpy(&i, &f, 4); return i; }

/* e^x; below -87.3 the result would be subnormal and is 0. The comparisons are written so that a NaN passes through. */
INLINE float f_exp(float x) {
    float c = x < -87.3f ? -87.3f : x;
    c = c > 88.37f ? 88.37f : c;
    float n = (c * 1.44269504088896341f + 12582912.0f) - 12582912.0f;  /* round to nearest by the 1.5 * 2^23 trick */
    float f = (c - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * f + 1.3981999507e-3f;
    p = p * f + 8.3334519073e-3f;
    p = p * f + 4.1665795894e-2f;
    p = p * f + 1.6666665459e-1f;
    p = p * f + 5.0000001201e-1f;
    p = p * f * f + f + 1.0f;
    float y = p * as_float(((int32_t)n + 127) << 23);
    y = x < -87.3f ? 0.0f : y;
    return x > 88.37f ? INFINITY : y;
}

/* Natural logarithm; log 0 = -inf, log of a negative number NaN. */
INLINE float f_log(float x) {
    int32_t e = ((as_int(x) - 0x3f3504f3) >> 23);
    float m = as_float(as_int(x) - (int32_t)((uint32_t)e << 23));  /* in [sqrt(1/2), sqrt(2)) */
    float s = (m - 1.0f) / (m + 1.0f), s2 = s * s;
    float p = 0.11111111f;
    p = p * s2 + 0.14285715f;
    p = p * s2 + 0.2f;
    p = p * s2 + 0.33333333f;
    p = p * s2 * s * 2.0f + s * 2.0f;
    float y = (float)e * 0.693359375f + (p - (float)e * 2.12194440e-4f);
    y = x < 1.17549435e-38f ? (x < 0.0f ? NAN : -INFINITY) : y;
    return x < INFINITY ? y : x + x;  /* +inf and NaN */
}

INLINE float f_tanh(float x) {
    float a = fabsf(x), a2 = x * x;
    float p = -5.70498872745e-3f;
    p = p * a2 + 2.06390887954e-2f;
    p = p * a2 - 5.37397155531e-2f;
    p = p * a2 + 1.33314422036e-1f;
    p = p * a2 - 3.33332819422e-1f;
    float near = p * a2 * x + x;
    float far = 1.0f - 2.0f / (f_exp(2.0f * a) + 1.0f);
    far = x < 0.0f ? -far : far;
    return a < 0.625f ? near : far + (x - x);  /* x - x keeps a NaN */
}

/* A head's transform after the projection, in place: bias, scale, softcap (softcap 0 means none). */
INLINE void transform(float *z, int64_t V, const float *bias, float scale, float softcap) {
    if (bias)
#pragma omp simd
        for (int64_t j = 0; j < V; j++) z[j] += bias[j];
    if (scale != 1.0f)
#pragma omp simd
        for (int64_t j = 0; j < V; j++) z[j] *= scale;
    if (softcap > 0.0f) {
        const float inverse = 1.0f / softcap;
#pragma omp simd
        for (int64_t j = 0; j < V; j++) z[j] = softcap * f_tanh(z[j] * inverse);
    }
}

/* log sum e^u = max + log_sum, log_sum = ln(sum), u = z * inv_T. A softmax is to be had by the sum: to round log_sum moves
 * all of a row's probabilities one way, and their gradient with them. */
typedef struct { float max, log_sum, entropy; double sum; int64_t block; } lse_t;  /* block: starts the one with the maximum */

/* Online over blocks: one read of the row from memory, block maximum and sum from L1. With e: also stores
 * e^(u - shift), where shift[b] is the running maximum at block b, so that the softmax needs no second exponential; and
 * makes the softmax's entropy, log sum - (sum e^u u) / sum with u from the maximum: both parts are positive. */
INLINE lse_t log_sum_exp(const float *z, int64_t V, float inv_T, float *e, float *shift) {
    float m = -INFINITY;
    double S = 0.0, U = 0.0;
    int64_t block = 0;
    for (int64_t b = 0; b < V; b += BLOCK) {
        const int64_t end = b + BLOCK < V ? b + BLOCK : V;
        float bm = -INFINITY;
#pragma omp simd reduction(max : bm)
        for (int64_t j = b; j < end; j++) bm = z[j] > bm ? z[j] : bm;
        bm *= inv_T;
        if (bm > m) {
            const double fall = (double)m - (double)bm, keep = exp(fall);
            U = S > 0.0 ? keep * (U + fall * S) : 0.0;  /* from -inf there is nothing to keep */
            S *= keep;
            m = bm;
            block = b;
        }
        const float by = m == -INFINITY ? 0.0f : m;  /* so far only masked logits */
        float s = 0.0f, su = 0.0f;
        if (e) {
            shift[b / BLOCK] = m;  /* not `by`: e^(0 - max) overflows where the rest is far below zero */
#pragma omp simd reduction(+ : s, su)
            for (int64_t j = b; j < end; j++) {
                const float u = z[j] * inv_T - by, x = f_exp(u);
                e[j] = x;
                s += x;
                su += x * (u < -87.3f ? -87.3f : u);  /* there x is 0, and 0 * -inf would be NaN */
            }
        } else {
#pragma omp simd reduction(+ : s)
            for (int64_t j = b; j < end; j++) s += f_exp(z[j] * inv_T - by);
        }
        S += (double)s;
        U += (double)su;
    }
    const lse_t result = {m, (float)log(S), (float)(log(S) - U / S), S, block};
    return result;
}
