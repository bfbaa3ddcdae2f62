/* Rows of projections -> cross-entropy with the labels and, if want_grad, its gradient in place: w (q - 1[label]).
 * z [rows, V], overwritten by the gradient; out [rows]. One exponential an entry for the value, two with the gradient. */
void cross_entropy_rows(int64_t first, int64_t last, int64_t V, float *z, const float *bias, float scale, float softcap,
                        const int64_t *labels, const float *w, float *out, int want_grad) {
    const float inv_softcap = softcap > 0.0f ? 1.0f / softcap : 0.0f;
    for (int64_t i = first; i < last; i++) {
        float *x = z + i * V;
        transform(x, V, bias, scale, softcap);
        const lse_t S = log_sum_exp(x, V, 1.0f, NULL, NULL);
        const float x_label = x[labels[i]];
        out[i] = (S.max - x_label) + S.log_sum;
        if (!want_grad) continue;
        const float ws = w[i] * scale, to_q = (float)((double)ws / S.sum);
#pragma omp simd
        for (int64_t j = 0; j < V; j++) {
            const float xc = softcap > 0.0f ? x[j] * inv_softcap : 0.0f;  /* -inf * 0 would be NaN */
            x[j] = to_q * (1.0f - xc * xc) * f_exp(x[j] - S.max);
        }
        x[labels[i]] -= ws * (1.0f - x_label * inv_softcap * x_label * inv_softcap);
    }
}
