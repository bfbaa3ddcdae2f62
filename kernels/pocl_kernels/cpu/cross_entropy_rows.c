/* Rows of projections -> loss and what it is made of and, if want_grad, the gradient in place.
 *
 *   loss = CE + smoothing (z[label] - mean z) + z_loss lse^2,   CE = lse - z[label],  lse = log sum e^z
 *   dloss/dz = (1 + 2 z_loss lse) q - (1 - smoothing) 1[label] - smoothing / V,   q = softmax(z)
 *
 * z [rows, V], overwritten by the gradient times w; out [rows, 5]: loss, CE, lse, nothing, whether the label is a most
 * probable token. One exponential an entry for the value, two with the gradient. */
void cross_entropy_rows(int64_t first, int64_t last, int64_t V, float *z, const float *bias, float scale, float softcap,
                        const int64_t *labels, const float *w, float smoothing, float z_loss, float *out, int want_grad) {
    const float inv_softcap = softcap > 0.0f ? 1.0f / softcap : 0.0f;
    for (int64_t i = first; i < last; i++) {
        float *x = z + i * V, *o = out + 5 * i;
        transform(x, V, bias, scale, softcap);
        const lse_t S = log_sum_exp(x, V, 1.0f, NULL, NULL);
        const float x_label = x[labels[i]], lse = S.max + S.log_sum;
        float loss = (S.max - x_label) + S.log_sum, rise = 1.0f;  /* rise: of every probability's slope */
        o[1] = loss;
        o[2] = lse;
        o[4] = x_label >= S.max ? 1.0f : 0.0f;
        if (smoothing != 0.0f) {
            double below = 0.0;  /* from the label's logit: a common offset of the logits costs no digits */
            for (int64_t b = 0; b < V; b += BLOCK) {
                const int64_t end = b + BLOCK < V ? b + BLOCK : V;
                float s = 0.0f;
#pragma omp simd reduction(+ : s)
                for (int64_t j = b; j < end; j++) s += x_label - x[j];
                below += (double)s;
            }
            loss += smoothing * (float)(below / (double)V);
        }
        if (z_loss != 0.0f) {
            loss += z_loss * lse * lse;
            rise += 2.0f * z_loss * lse;
        }
        o[0] = loss;
        if (!want_grad) continue;
        const float ws = w[i] * scale, to_q = (float)((double)(ws * rise) / S.sum), each = ws * smoothing / (float)V;
#pragma omp simd
        for (int64_t j = 0; j < V; j++) {
            const float xc = softcap > 0.0f ? x[j] * inv_softcap : 0.0f;  /* -inf * 0 would be NaN */
            x[j] = (1.0f - xc * xc) * (to_q * f_exp(x[j] - S.max) - each);
        }
        x[labels[i]] -= ws * (1.0f - smoothing) * (1.0f - x_label * inv_softcap * x_label * inv_softcap);
    }
}
