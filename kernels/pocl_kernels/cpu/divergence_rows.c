/* Rows of student and teacher projections -> divergence, cross-entropy, entropies, accuracy, and the gradient, perhaps in
 * place.
 *
 *   u = z_s / T, v = z_t / T;  l = u - lse(u), r = v - lse(v);  D = sum value(l, r), c = sum slope(l, r)
 *   dL/dz_s = w [A (slope - q c) + B (q_1 - 1[label])],  A = d_coef, B = ce_coef, q_1 = softmax(z_s)
 *
 * zs, zt [rows, V]: student and teacher projections, transformed in place where a head has a transform; grad [rows, V],
 * which may be zs: written if want_grad. Rows lie one after the other, or where places says.
 * One row at a time through three passes; a row pair of 8 V bytes is read from memory once and then from cache.
 * Pass 1: both normalisers, entropies and, in scratch, the unnormalised softmaxes: 2 exponentials. Pass 2: D, c and, in their
 * place, q and the part of the gradient that needs no c. Pass 3: one multiply-add. The code between the markers is printed
 * from the divergence's definition. */

INLINE void row(const float *zs, const float *zt, float *grad, int64_t V, float inv_T, float softcap, float scale, int64_t label, float w, float A,
                float B, const float *uniform, float *scratch, float *out, const int want_grad, const int with_ce, const int tempered, const int ce_grad) {
    const int64_t blocks = (V + BLOCK - 1) / BLOCK;
    float *es = scratch, *et = es + V, *shift_s = et + V, *shift_t = shift_s + blocks;
    const lse_t S = log_sum_exp(zs, V, inv_T, es, shift_s), R = log_sum_exp(zt, V, inv_T, et, shift_t);
    const lse_t S1 = with_ce && tempered ? log_sum_exp(zs, V, 1.0f, NULL, NULL) : S;
    const float z_label = with_ce ? zs[label] : 0.0f;
    const float inv_softcap = softcap > 0.0f ? 1.0f / softcap : 0.0f;
    const float wA = w * A, wB = w * B, to_q1 = (float)(1.0 / S1.sum);
    double D = 0.0, c = 0.0;
    float jacobian_label = scale;
    if (with_ce && softcap > 0.0f) jacobian_label = scale * (1.0f - z_label * inv_softcap * z_label * inv_softcap);
    /* The anchor: l and r of the student's most probable token, to which all slopes are relative. */
    int64_t top = S.block;
    while (top + 1 < V && !(zs[top] * inv_T == S.max)) top++;
    const float l0 = -S.log_sum, r0 = (zt[top] * inv_T - R.max) - R.log_sum;
    const float shift = (float)(((double)S.max - (double)R.max) + log(S.sum / R.sum));
    const float d0 = (zs[top] - zt[top]) * inv_T - shift;
    /*ROW*/
    for (int64_t b = 0; b < V; b += BLOCK) {
        const int64_t end = b + BLOCK < V ? b + BLOCK : V;
        const float to_q = (float)(exp((double)shift_s[b / BLOCK] - (double)S.max) / S.sum);
        const float to_p = (float)(exp((double)shift_t[b / BLOCK] - (double)R.max) / R.sum);
        float Db = 0.0f, cb = 0.0f;
#pragma omp simd reduction(+ : Db, cb)
        for (int64_t j = b; j < end; j++) {
            const float z = zs[j];
            const float l = (z * inv_T - S.max) - S.log_sum;
            const float r = (zt[j] * inv_T - R.max) - R.log_sum;
            const float d = (z - zt[j]) * inv_T - shift;  /* l - r, with the digits that both have lost */
            const float q = es[j] * to_q, p = et[j] * to_p;
            /*BODY*/
            Db += value;
            cb += slope;
            if (want_grad) {
                const float zc = softcap > 0.0f ? z * inv_softcap : 0.0f;  /* -inf * 0 would be NaN */
                const float J = scale * (1.0f - zc * zc);
                float g = wA == 0.0f ? 0.0f : wA * slope;  /* an infinite slope without weight is nothing */
                if (ce_grad) g += wB * (tempered ? f_exp(z - S1.max) * to_q1 : q);
                et[j] = J * g;
                es[j] = J * q;
            }
        }
        D += (double)Db;
        c += (double)cb;
    }
    if (want_grad) {
        const float wAc = wA == 0.0f ? 0.0f : (float)((double)wA * c);
#pragma omp simd
        for (int64_t j = 0; j < V; j++) grad[j] = et[j] - wAc * es[j];
        if (ce_grad) grad[label] -= wB * jacobian_label;
    }
    out[0] = (float)D;
    out[1] = with_ce ? (S1.max - z_label) + S1.log_sum : 0.0f;
    out[2] = S.entropy;
    out[3] = R.entropy;
    out[4] = with_ce && z_label >= S1.max ? 1.0f : 0.0f;
}

/* Rows first <= i < last. labels NULL: no cross-entropy. out [rows, 5]: D, CE, entropies of
 * student and teacher, whether the label is a most probable token. scratch: 2 V floats and two a
 * block of 1024, for the caller's thread alone. rate = 1 / T, A and the n_uniform uniforms are one for all rows
 * (by_token 0) or one a row (1). places [3, n]: where the rows of zs, zt and grad begin; NULL: V apart. */
void divergence_rows(int64_t first, int64_t last, int64_t V, float *zs, float *zt, float *grad, const int64_t *places,
                     int64_t n, const float *bias_s, const float *bias_t,
                     float scale_s, float softcap_s, float scale_t, float softcap_t, const int64_t *labels, const float *w,
                     const float *rate, const float *As, float B, const float *uniforms, int64_t n_uniform, int64_t by_token,
                     float *scratch, float *out, int want_grad) {
    for (int64_t i = first; i < last; i++) {
        const float inv_T = rate[i * by_token], A = As[i * by_token], *uniform = uniforms + i * by_token * n_uniform;
        float *s = zs + (places ? places[i] : i * V), *t = zt + (places ? places[n + i] : i * V), *o = out + 5 * i;
        float *g = want_grad ? grad + (places ? places[2 * n + i] : i * V) : NULL;
        transform(s, V, bias_s, scale_s, softcap_s);
        transform(t, V, bias_t, scale_t, softcap_t);
#define ROW(G, C, T, CG) row(s, t, g, V, inv_T, softcap_s, scale_s, C ? labels[i] : 0, w[i], A, B, uniform, scratch, o, G, C, T, CG)
        if (want_grad && labels && B != 0.0f) {
            if (inv_T == 1.0f) ROW(1, 1, 0, 1);
            else ROW(1, 1, 1, 1);
        } else if (want_grad) {
            if (!labels) ROW(1, 0, 0, 0);
            else if (inv_T == 1.0f) ROW(1, 1, 0, 0);
            else ROW(1, 1, 1, 0);
        } else {
            if (!labels) ROW(0, 0, 0, 0);
            else if (inv_T == 1.0f) ROW(0, 1, 0, 0);
            else ROW(0, 1, 1, 0);
        }
    }
}
