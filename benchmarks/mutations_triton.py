"""The ways in which ``mutations.py`` breaks the Triton kernels; the tests run in Triton's interpreter."""

from __future__ import annotations

from typing import NamedTuple


class Mutation(NamedTuple):
    """One way to break the kernels: in ``file``, ``old`` becomes ``new``; ``tests`` must notice."""

    what: str
    file: str
    old: str
    new: str
    tests: str


LOSSES, KERNELS = "triton/interpreted_losses:", "triton/interpreted_kernels:"
FAST = LOSSES + "every_divergence and jsd-fast"
LOW = LOSSES + "every_divergence and jsd-low"
KL = LOSSES + "every_divergence and fkl-low"
HEADS = LOSSES + "form_of_head and scale and fast"
NEAR = KERNELS + "one_pass and near"
PADDING = KERNELS + "never_reads_the_padding and fkl"
HALF = LOSSES + "16_bit_models_lose and fast and bfloat16 and unrelated"

OUTPUTS = "triton/interpreted_outputs:full_logits and jsd-fast"
LOW_OUTPUTS = "triton/interpreted_outputs:full_logits and jsd-low"
LABELS = "triton/interpreted_outputs:every_option and "
GROUPS = "triton/interpreted_groups:chunks_and_groups"

AT_HAND = "logits:triton and "
DEVICE, ROWS = "triton_backend/device.py", "triton_backend/divergence_rows.py"
STATISTICS, VALUES = "triton_backend/tile_statistics.py", "triton_backend/tile_values.py"
SHARP, OWN_NUMBERS = "triton/interpreted_sharp:digits and ", "triton/interpreted_sharp:own_numbers and "
CE_ROWS, EAGER_TILES = "triton_backend/cross_entropy_rows.py", "triton_backend/tiles_eager.py"
STATE, PROJECTION = "triton_backend/state.py", "triton_backend/projection.py"

MUTATIONS = (
    Mutation("sign of the softmax's Jacobian", DEVICE, "(slope - q * c)", "(slope + q * c)", FAST),
    Mutation("label not subtracted", DEVICE, "tl.where(is_label, 1.0, 0.0)", "0.0 * q", FAST),
    Mutation("sum not moved to a lane's new maximum", DEVICE, "S * e + 1.0", "S + 1.0", FAST),
    Mutation("padding as logits", DEVICE, 'tl.where(cols < V, cap(z * scale, softcap), -float("inf"))',
             "cap(z * scale, softcap)", PADDING),
    Mutation("softcap's derivative", DEVICE, "1.0 - t * t", "1.0 - t", HEADS),
    Mutation("one-pass KL that cancels", DEVICE, "tl.where(near, a * forward, (b - a) - a * x)", "(b - a) - a * x",
             NEAR),
    Mutation("0 x inf where one model masks", DEVICE, "f = tl.where(a == 0.0, b, ", "f = tl.where(a < 0.0, b, ",
             KERNELS + "zero_times_infinity"),
    Mutation("wrong normaliser for the teacher", ROWS, "(zt, max_t, S_t, log_t, inv_T)",
             "(zt, max_t, S_s, log_s, inv_T)",
             FAST),
    Mutation("teacher not tempered", ROWS, "(zt, max_t, S_t, log_t, inv_T)", "(zt, max_t, S_t, log_t, 1.0)", FAST),
    Mutation("entropy's sign", ROWS, "H_s -= by", "H_s += by", FAST),
    Mutation("the student's logs in the teacher's entropy", ROWS, "times_log(p, r)", "times_log(p, l)", OUTPUTS),
    Mutation("a tie is wrong", ROWS, "z_label >= max_s", "z_label > max_s", OUTPUTS),
    Mutation("0 x -inf in an entropy", DEVICE, "p * tl.maximum(log_p, -1e30)", "p * log_p",
             "triton/interpreted_outputs:masks and auto"),
    Mutation("an entropy of every fourth token", DEVICE, "tl.sum(tl.reshape(x, [BLOCK // 4, 4]), 1)",
             "tl.max(tl.reshape(x, [BLOCK // 4, 4]), 1)", OUTPUTS),
    Mutation("cross-entropy tempered", ROWS, "S_1 = add_exp(m_s, S_1, zs, 1.0)", "S_1 = add_exp(m_s, S_1, zs, inv_T)",
             FAST),
    Mutation("only the last block's slopes", ROWS, "C += tl.where", "C = tl.where", FAST),
    Mutation("logits at hand as rows of a buffer", DEVICE, "tl.load(places + which * n + row) * UNIT",
             "row * stride * UNIT", AT_HAND + "where_they_lie"),
    Mutation("the student's places for all", DEVICE, "places + which * n + row", "places + row",
             AT_HAND + "padding and inplace-teacher"),
    Mutation("unaligned rows by sixteens", "triton_backend/logits.py", "all(map(aligned, tensors))", "True",
             AT_HAND + "where_they_lie and odd"),
    Mutation("a final gradient cut at float16's end", "triton_backend/tile_gradient.py", "gradient, places is None",
             "gradient, True", AT_HAND + "loss_scale"),
    Mutation("block ends of a row of its own width", "triton_backend/steps.py", "V // tile.places.unit",
             "V // ROW_ALIGNMENT", AT_HAND + "every_divergence and jsd"),
    Mutation("rows side by side, without padding", ROWS, "student += row * stride16 * 16", "student += row * V",
             PADDING),
    Mutation("entropy's sum not moved", STATISTICS, "(U - d_s * by_fours(S_s, BLOCK))", "U", KL),
    Mutation("the teacher's entropy not moved", STATISTICS, "(W - d_t * by_fours(S_t, BLOCK))", "W", LOW_OUTPUTS),
    Mutation("only the last tile's entropy of the teacher", STATISTICS, "W = lanes(sums + SUM_W * step, BLOCK // 4)",
             "W = lanes(sums + SUM_W * step, BLOCK) * 0.0", LOW_OUTPUTS),
    Mutation("the teacher's entropy not moved between processes", STATE, "keep_t * (W - d_t * S_t)", "keep_t * W",
             KERNELS + "raised_afterwards"),
    Mutation("the student's entropy for the teacher's", STATE, "sums[SUM_U.value : SUM_W.value + 1] / S",
             "sums[SUM_U.value] / S", LOW_OUTPUTS),
    Mutation("right by less than the maximum", STATE, "sums[LABEL.value] >= sums[MAX_S.value]",
             "sums[LABEL.value] > sums[MAX_S.value]", LOW_OUTPUTS),
    Mutation("KL's sum not moved", STATISTICS, "keep_t * F + moved * E + moved_f * by_fours(S_t, BLOCK)", "keep_t * F",
             KERNELS + "one_pass and rising"),
    Mutation("label counted from the tile's start", STATISTICS, ".to(tl.int32) - first", ".to(tl.int32)", LOW),
    Mutation("a maximum that rises from nothing", STATISTICS, 'tl.where(old == -float("inf"), 0.0, new - old)',
             "new - old", KL),
    Mutation("only the last tile's value", VALUES, "tl.load(sums + VALUE * step) + tl.sum(D, 0)", "tl.sum(D, 0)", LOW),
    Mutation("second order of the KL dropped", STATE, "F / S_t - excess(E / S_t)", "F / S_t", KL),
    Mutation("c of the reverse KL", STATE, "reverse, reverse - a\n",
             "reverse, reverse + a\n", LOSSES + "every_divergence and fkl-low"),
    Mutation("only the last chunk's gradient", PROJECTION, "add=self._products_of_weight > 0", "add=False", FAST),
    Mutation("only the last tile's gradient", PROJECTION, "add=part.start > 0", "add=False", LOW),
    Mutation("tiles of a group over each other", PROJECTION, "self._kept_rows += gradient.shape[0]", "pass", GROUPS),
    Mutation("a group's gradient instead of the sum", PROJECTION, "self._products_of_weight += 1", "pass", GROUPS),
    Mutation("weight's gradient without the upstream one", "triton_backend/later.py",
             "torch.mul(product, upstream, out=result[part])", "result[part] = product",
             "triton/interpreted_groups:upstream"),
    Mutation("padding of the weight's gradient left as it was", "triton_backend/later.py", "result[V:].zero_()",
             "result[V:].fill_(1.0)", "triton/interpreted_groups:second_backward"),
    Mutation("float16 tile overflows", DEVICE, "tl.minimum(tl.maximum(g, -65504.0), 65504.0)", "g",
             "triton/interpreted_groups:masked_teacher"),
    Mutation("exponential to the base two", DEVICE, "tl.exp2(x * 1.4426950408889634)", "tl.exp2(x)", FAST),
    Mutation("a block left out on the way back", ROWS, "tl.cdiv(width, BLOCK) - 1", "width // BLOCK - 1", FAST),
    Mutation("scale of the hidden states kept", PROJECTION, "alpha /= 2.0**HIDDEN_EXPONENT", "pass", HALF),
    Mutation("float16 tile not scaled", PROJECTION, "2.0 ** (TILE_EXPONENT - math.frexp(largest)[1])", "1.0",
             LOSSES + "size_of_the_weights and fast and 1e-09"),
    Mutation("float16 tile for all models", "triton_backend/layout.py", "return dtype, dtype",
             "return dtype, torch.float16", FAST),
    Mutation("half of the z-loss's slope", DEVICE, "1.0 + 2.0 * z_loss * lse", "1.0 + z_loss * lse", LABELS + "fast"),
    Mutation("the label's whole slope", DEVICE, "tl.where(is_label, 1.0 - smoothing, 0.0)",
             "tl.where(is_label, 1.0, 0.0)", LABELS + "fast"),
    Mutation("gradient of the smoothing left out", DEVICE, "0.0) - share", "0.0)", LABELS + "low"),
    Mutation("nothing smoothed", CE_ROWS, "smoothing * (tl.sum(Z, 0) / V)", "0.0 * smoothing", LABELS + "fast"),
    Mutation("padding smoothed", CE_ROWS, "tl.where(cols < V, z_label - z, 0.0)", "z_label - z", LABELS + "fast"),
    Mutation("one block smoothed", CE_ROWS, "Z += by_fours", "Z = by_fours", LABELS + "fast"),
    Mutation("z-loss of the first order", CE_ROWS, "z_loss * lse * lse", "z_loss * lse", LABELS + "fast"),
    Mutation("log-sum-exp without its maximum", CE_ROWS, "lse = max_z + log_sum", "lse = log_sum", LABELS + "fast"),
    Mutation("labels: a tie is wrong", CE_ROWS, "z_label >= max_z", "z_label > max_z", LABELS + "fast"),
    Mutation("only the last tile's logits smoothed", STATISTICS,
             "(SUM_U if teacher is not None else SUM_Z) * step, BLOCK // 4)",
             "SUM_U * step, BLOCK // 4)", LABELS + "low"),
    Mutation("padding in a tile's logits", STATISTICS, "tl.where(cols < V, raw_s, 0.0)", "raw_s", LABELS + "low"),
    Mutation("smoothed without the label", STATE, "sums[LABEL.value] - sums[SUM_Z.value] / V",
             "-sums[SUM_Z.value] / V", LABELS + "low"),
    Mutation("tiles: z-loss of the first order", STATE, "log_sum_exp(sums) ** 2", "log_sum_exp(sums)", LABELS + "low"),
    Mutation("tiles: log-sum-exp without its maximum", STATE, "return sums[MAX_S.value] + sums[SUM_1.value].log()",
             "return sums[SUM_1.value].log()", LABELS + "low"),
    Mutation("tiles: log-sum-exp of another row's sum", "triton_backend/tile_gradient.py", "max_s + tl.log(S_1), cols",
             "tl.log(S_1), cols", LABELS + "low"),
    Mutation("double tiles: half of the z-loss's slope", EAGER_TILES, "weighted(2.0 * z_loss, log",
             "weighted(z_loss, log",
             LABELS + "low"),
    Mutation("double tiles: the label's whole slope", EAGER_TILES, "(1.0 - smoothing) * is_label", "1.0 * is_label",
             LABELS + "low"),
    Mutation("double tiles: gradient of the smoothing", EAGER_TILES, "[:, None])) - share",
             "[:, None]))", LABELS + "low"),
    Mutation("double tiles: logits not summed", EAGER_TILES, "sums[SUM_Z.value] += logits.sum(1)", "pass",
             LABELS + "low"),
    Mutation("double tiles: the teacher's entropy", EAGER_TILES, "weighted(a, v).sum(1)", "weighted(a, u).sum(1)",
             LOW_OUTPUTS),
    Mutation("labels smoothed over a share", "triton_backend/backend.py", "V if group is None else group.total", "V",
             "triton/interpreted_parallel_losses"),
    Mutation("rows of a group with others' numbers", "triton_backend/steps.py", "rate=rate[part].clone()",
             "rate=rate.flip(0)[part].clone()", "triton/interpreted_parallel_losses"),
    Mutation("a float16 tile that the z-loss overflows", "triton_backend/steps.py",
             "1.0 + 2.0 * self.z_loss * LIKELY_LOG_SUM",
             "1.0", "triton/interpreted_outputs:heavy_z_loss"),
    Mutation("a gradient for a frozen head", PROJECTION, "wanted.weight and self.grad_weight is None",
             "self.grad_weight is None", "triton/interpreted_outputs:frozen"),
    Mutation("one uniform for all", "triton_backend/terms.py", 'else "uniforms[{}]"', 'else "uniforms[0]"',
             LOSSES + "every_divergence and skew_fkl-fast"),
    # An anchor may be any token in exact arithmetic; the teacher's own top has another sign.
    Mutation("the teacher's anchor in the rows", ROWS, 'tl.max(tl.where(m_s == max_s, z_t, -float("inf")), 0)', "max_t",
             SHARP + "fast"),
    Mutation("the teacher's anchor in the tiles", STATISTICS, "top_t = tl.where(raw_s > top_s, zt, top_t)",
             "top_t = tl.zeros_like(zt) + m_t", SHARP + "low"),
    Mutation("the anchor's slope not taken off the sum", STATE, "return _times(b, d) -", "return 0.0 * d -",
             LOSSES + "every_divergence and rkl-low"),
    Mutation("one temperature for all tokens", ROWS, "tl.load(inv_T + row)", "tl.load(inv_T)", OWN_NUMBERS + "fast"),
    Mutation("other rows' numbers", "triton_backend/steps.py", "rate=rate[part].clone()", "rate=rate.flip(0)",
             OWN_NUMBERS + "low"),
    Mutation("rows without weight count", "plan.py", ".logical_and_(row_scale)", "",
             LOSSES + "weight_zero and fast"),
    Mutation("low: the anchor's slope by rounded sums", "triton_backend/state.py", "eps.log1p()", "(S_s / S_t).log()",
             "triton/interpreted_sharp:made_another_way and rkl"),
    Mutation("low: slopes by rounded normalisers", "divergences.py",
             "return where(absolute(x) < 0.5, near, far), weighted", "return far, weighted",
             "triton/interpreted_sharp:made_another_way and jeffreys"),
    Mutation("low: the anchor's slope near the teacher only", "triton_backend/state.py", "eps.abs() < 0.5",
             "eps.abs() < 2.0", "triton/interpreted_sharp:far_apart"),
    Mutation("an infinite result without weight", "chunks.py", "torch.where(self._weights == 0, 0.0, results)",
             "results", LOSSES + "weight_zero and low"),
    Mutation("rows without weight count where nothing is labelled", DEVICE, "tl.where(w == 0.0, 0.0, w * jacobian",
             "tl.where(w == -1.0, 0.0, w * jacobian", LOSSES + "weight_zero and low"),
)  # fmt: skip
