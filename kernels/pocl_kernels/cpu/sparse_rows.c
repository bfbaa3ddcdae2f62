/* Rows of student projections and the teacher's K likeliest tokens -> divergence, cross-entropy, entropies, accuracy, and
 * the gradient in place.
 *
 *   u = z / T;  l_k = u_k - lse(u);  the tail: all tokens but the K, l_tail = log-sum-exp of its own u, less lse(u)
 *   D = sum value(l_k, r_k) + value(l_tail, r_tail),  c = sum slope
 *   dL/dz_k = w [A (slope_k - q_k c) + B (q_1k - 1[label])],  dL/dz_j = w [A (slope_tail - q_tail c) q_j / q_tail + ...]
 *
 * z [rows, V], overwritten. The K logits are taken out of a row, so that the tail is summed without them and nothing is
 * subtracted; what concerns K + 1 numbers is done in double precision, what concerns V in float: one exponential an entry, or
 * two with a cross-entropy at T != 1. With `each` every token of the tail has the teacher's r_tail and a slope of its
 * own. The code between the markers is printed from the divergence's definition, once in each precision. */

typedef struct { double value, slope; } term_t;

INLINE term_t outcome(double l, double r, double l0, double r0, const double *uniform) {
    const double d = l - r, d0 = l0 - r0, q = exp(l), p = exp(r);
    (void)d, (void)d0, (void)q, (void)p, (void)uniform;
    /*OUTCOME*/
    const term_t t = {value, slope};
    return t;
}

/* Values and slopes over the tail, block by block; slopes also into s. e [j] < 0 marks the K tokens. */
INLINE term_t tail_terms(const float *x, const float *e, const float *shift, int64_t V, float inv_T, lse_t S, double q_top,
                         float l_top, double r_, double l0_, double r0_, const double *uniforms, float *s) {
    const float l0 = (float)l0_, r0 = (float)r0_, d0 = (float)(l0_ - r0_);
    const float r = (float)r_, p = (float)exp(r_);  /* common to all of the tail: not from a rounded r */
    const float base = S.max == -INFINITY ? 0.0f : S.max;  /* a tail that is masked as a whole */
    (void)l0, (void)r0, (void)d0, (void)p, (void)uniforms;
    /*ROW*/
    term_t sum = {0.0, 0.0};
    for (int64_t b = 0; b < V; b += BLOCK) {
        const int64_t end = b + BLOCK < V ? b + BLOCK : V;
        const float to_q = (float)(exp((double)shift[b / BLOCK] - (double)base) * q_top);
        float values = 0.0f, slopes = 0.0f;
#pragma omp simd reduction(+ : values, slopes)
        for (int64_t j = b; j < end; j++) {
            const float l = (x[j] * inv_T - base) + l_top, d = l - r, q = e[j] * to_q;
            (void)d, (void)q;
            /*ENTRY*/
            const int there = !(e[j] < 0.0f);  /* so that a NaN is */
            values += there ? value : 0.0f;
            slopes += there ? slope : 0.0f;
            s[j] = there ? slope : 0.0f;
        }
        sum.value += (double)values;
        sum.slope += (double)slopes;
    }
    return sum;
}

/* The tail's gradient: from s, less by_q e, or by_e e; and labels e^(x - max_1) where that needs an exponential of its
 * own. by_e and by_q are of the row, below the maximum of the tail. */
INLINE void tail_gradient(float *x, const float *e, const float *s, const float *shift, int64_t V, lse_t S, float scale,
                          float inv_softcap, float by_s, double by_e, float labels, float max_1, const int each, const int tempered) {
    for (int64_t b = 0; b < V; b += BLOCK) {
        const int64_t end = b + BLOCK < V ? b + BLOCK : V;
        const float here = S.sum > 0.0 ? (float)(exp((double)shift[b / BLOCK] - (double)S.max) * by_e) : 0.0f;
#pragma omp simd
        for (int64_t j = b; j < end; j++) {
            const float xc = inv_softcap > 0.0f ? x[j] * inv_softcap : 0.0f;  /* -inf * 0 would be NaN */
            float g = here * e[j];
            if (each) g += by_s == 0.0f ? 0.0f : by_s * s[j];  /* an infinite slope without weight is nothing */
            if (tempered) g += labels * f_exp(x[j] - max_1);
            x[j] = scale * (1.0f - xc * xc) * g;
        }
    }
}

/* One row: see below. u, l, q, g [K + 1] and zk [K] are the caller's doubles. */
static void sparse_row(float *x, int64_t V, float scale, float softcap, const int64_t *ids, int64_t K, const double *r,
                       int64_t count, int each, const int64_t *label, double w, double rate, double A, double B, double slopes,
                       const double *uniform, float *scratch, double *numbers, float *o, int want_grad) {
    const int64_t blocks = (V + BLOCK - 1) / BLOCK;
    float *e = scratch, *shift = e + V, *s = shift + blocks;
    double *zk = numbers, *l = zk + K + 1, *g = l + K + 1;
    const float inv_T = (float)rate, inv_softcap = softcap > 0.0f ? 1.0f / softcap : 0.0f;
    const float z_label = label ? x[*label] : 0.0f;
    double top = -INFINITY, top_1 = -INFINITY;
    for (int64_t k = 0; k < K; k++) {
        zk[k] = ids[k] < 0 ? -INFINITY : (double)x[ids[k]];
        if (ids[k] >= 0) x[ids[k]] = -INFINITY;
        if (zk[k] > top_1) top_1 = zk[k];
    }
    const lse_t S = log_sum_exp(x, V, inv_T, e, shift);
    const lse_t S1 = label && rate != 1.0 ? log_sum_exp(x, V, 1.0f, NULL, NULL) : S;
    top = top_1 * rate > (double)S.max ? top_1 * rate : (double)S.max;

    double sum = S.sum > 0.0 ? S.sum * exp((double)S.max - top) : S.sum;
    for (int64_t k = 0; k < K; k++) sum += ids[k] < 0 ? 0.0 : exp(zk[k] * rate - top);
    const double log_sum = log(sum), l_top = (double)S.max - top - log_sum;
    double l0 = each ? l_top : l_top + log(S.sum), r0 = r[K];
    l[K] = l_top + log(S.sum);
    for (int64_t k = 0; k < K; k++) {
        l[k] = zk[k] * rate - top - log_sum;
        if (l[k] > l0) l0 = l[k], r0 = r[k];
    }
    double D = 0.0, c = 0.0, H = 0.0, Ht = 0.0;
    for (int64_t k = 0; k <= K; k++) {
        g[k] = 0.0;
        if (k < K ? ids[k] < 0 : count == 0) continue;
        const double q = exp(l[k]), p = exp(r[k]), many = k == K && each ? (double)count : 1.0;
        if (q != 0.0) H -= q * l[k];
        if (p != 0.0) Ht -= many * p * r[k];
        if (k == K && each) continue;
        const term_t t = outcome(l[k], r[k], l0, r0, uniform);
        D += t.value;
        c += t.slope;
        g[k] = t.slope;
    }
    if (S.sum > 0.0) H += exp(l[K]) * (double)S.entropy;
    if (each && count > 0) {
        for (int64_t k = 0; k < K; k++)
            if (ids[k] >= 0) e[ids[k]] = -1.0f;
        const double q_top = exp(l_top);
        const term_t t = tail_terms(x, e, shift, V, inv_T, S, q_top, (float)l_top, r[K], l0, r0, uniform, s);
        D += t.value;
        c = isnan(slopes) ? c + t.slope : slopes;
    }
    double top_all = label && (double)S1.max > top_1 ? (double)S1.max : top_1, sum_1 = 0.0;
    if (label) {
        sum_1 = S1.sum > 0.0 ? S1.sum * exp((double)S1.max - top_all) : S1.sum;
        for (int64_t k = 0; k < K; k++) sum_1 += ids[k] < 0 ? 0.0 : exp(zk[k] - top_all);
    }
    o[0] = (float)D;
    o[1] = label ? (float)((top_all - (double)z_label) + log(sum_1)) : 0.0f;
    o[2] = (float)H;
    o[3] = (float)Ht;
    o[4] = label && (double)z_label >= top_all ? 1.0f : 0.0f;
    if (!want_grad) return;

    const double wA = w * A, wB = label ? w * B : 0.0;
    double by_e = wA == 0.0 || S.sum == 0.0 ? 0.0 : wA * (g[K] - exp(l[K]) * c) / S.sum;
    if (each) by_e = wA == 0.0 ? 0.0 : -wA * c * exp(l_top);
    const double by_e1 = wB != 0.0 && S1.sum > 0.0 ? wB * exp((double)S1.max - top_all) / sum_1 : 0.0;
    const int tempered = by_e1 != 0.0 && rate != 1.0;
    if (!tempered) by_e += by_e1;
    const float by_s = (float)wA;
#define TAIL(EACH, TEMPERED) tail_gradient(x, e, s, shift, V, S, scale, inv_softcap, by_s, by_e, (float)by_e1, S1.max, EACH, TEMPERED)
    if (each && tempered) TAIL(1, 1);
    else if (each) TAIL(1, 0);
    else if (tempered) TAIL(0, 1);
    else TAIL(0, 0);
    const double cap = (double)inv_softcap;
    if (wB != 0.0) x[*label] -= (float)(wB * scale * (1.0 - (z_label * cap) * (z_label * cap)));
    for (int64_t k = 0; k < K; k++) {
        if (ids[k] < 0) continue;
        double of_z = wA == 0.0 ? 0.0 : wA * (g[k] - exp(l[k]) * c);
        if (wB != 0.0) of_z += wB * (exp(zk[k] - top_all) / sum_1 - (ids[k] == *label ? 1.0 : 0.0));
        x[ids[k]] = (float)(scale * (cap > 0.0 ? 1.0 - (zk[k] * cap) * (zk[k] * cap) : 1.0) * of_z);
    }
}

/* Rows first <= i < last. ids [rows, K], negative: padding; r [rows, K + 1], of the K tokens and of the tail, or with
 * `each` of one of its `tail` [rows] tokens. labels NULL: no cross-entropy. out [rows, 5]: D, CE, entropies of student and
 * teacher, whether the label is a most probable token. rate = 1 / T, A and the n_uniform uniforms are one for all rows
 * (by_token 0) or one a row (1). slopes: their sum where it is known beforehand, else NaN: a float sum of many equal terms
 * is off by more than they are. scratch: V floats and one a block of 1024, with `each` V more; numbers: 3 (K + 1)
 * doubles; both for the caller's thread alone. */
void sparse_rows(int64_t first, int64_t last, int64_t V, float *z, const float *bias, float scale, float softcap,
                 const int64_t *ids, int64_t K, const double *r, const int64_t *tail, int each, const int64_t *labels,
                 const float *w, const double *rate, const double *As, double B, double slopes, const double *uniforms,
                 int64_t n_uniform, int64_t by_token, float *out, int want_grad, float *scratch, double *numbers) {
    for (int64_t i = first; i < last; i++) {
        transform(z + i * V, V, bias, scale, softcap);
        sparse_row(z + i * V, V, scale, softcap, ids + i * K, K, r + i * (K + 1), tail[i], each, labels ? labels + i : NULL,
                   (double)w[i], rate[i * by_token], As[i * by_token], B, slopes, uniforms + i * by_token * n_uniform, scratch,
                   numbers, out + 5 * i, want_grad);
    }
}
