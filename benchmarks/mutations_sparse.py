"""The ways in which ``mutations.py`` breaks sparse teachers: compiled rows, eager rows, Triton's kernels in the
interpreter, and what all of them are told of the teacher.
"""

from __future__ import annotations

from benchmarks.mutations_triton import Mutation

EQUALS = "sparse:every_divergence and compiled-fast-"
EAGER = "sparse:every_divergence and eager-fast-"
BUCKET, UNIFORM = EQUALS + "bucket-skew_rkl", EQUALS + "uniform-skew_rkl"
HEADS = "sparse:every_form_of_head and compiled-fast"
NEAR = "sparse:nothing_is_lost and compiled-fast"
INPUTS = "sparse_inputs:bad_input"
TRITON, LOW = (
    "triton/interpreted_sparse:tails and bucket-jsd-fast",
    "triton/interpreted_sparse:tails and bucket-jsd-low",
)
EACH = "triton/interpreted_sparse:tails and uniform-skew_rkl-fast"

ROWS, EAGER_ROWS, TARGETS = "cpu/sparse_rows.c", "eager/sparse.py", "targets.py"
DEVICE, STATISTICS = "triton_backend/sparse_device.py", "triton_backend/sparse_statistics.py"
VALUES, GRADIENT = "triton_backend/sparse_values.py", "triton_backend/sparse_gradient.py"
DRIVER = "triton_backend/sparse.py"

MUTATIONS = (
    # Compiled rows
    Mutation("the K tokens stay in the tail", ROWS, "if (ids[k] >= 0) x[ids[k]] = -INFINITY;", "", BUCKET),
    Mutation(
        "the tail's sum not moved to the common maximum",
        ROWS,
        "S.sum * exp((double)S.max - top) : S.sum;",
        "S.sum : S.sum;",
        NEAR,
    ),
    Mutation("the K logits not tempered", ROWS, "l[k] = zk[k] * rate - top", "l[k] = zk[k] - top", BUCKET),
    Mutation(
        "the tail left out of the slopes' sum",
        ROWS,
        "c += t.slope;\n        g[k]",
        "c += k < K ? t.slope : 0.0;\n        g[k]",
        EQUALS + "bucket-fkl",
    ),
    Mutation("the tail's gradient by all of q", ROWS, "exp(l[K]) * c) / S.sum", "c) / S.sum", BUCKET),
    Mutation(
        "the label not subtracted in the tail", ROWS, "if (wB != 0.0) x[*label] -=", "if (0) x[*label] -=", BUCKET
    ),
    Mutation(
        "the label not subtracted among the K",
        ROWS,
        "(ids[k] == *label ? 1.0 : 0.0)",
        "0.0",
        "sparse:all_tokens and compiled-fast-bucket-fkl",
    ),
    Mutation(
        "cross-entropy without the K tokens", ROWS, "sum_1 += ids[k] < 0 ? 0.0 : exp(zk[k] - top_all);", "", BUCKET
    ),
    Mutation("the tail's entropy left out", ROWS, "H += exp(l[K]) * (double)S.entropy;", "", BUCKET),
    Mutation(
        "softcap not in the gradient of the K",
        ROWS,
        "scale * (cap > 0.0 ? 1.0 - (zk[k] * cap) * (zk[k] * cap) : 1.0)",
        "scale",
        HEADS,
    ),
    Mutation("softcap not in the tail's gradient", ROWS, "scale * (1.0f - xc * xc) * g", "scale * g", HEADS),
    Mutation(
        "K tokens counted in a tail of own slopes",
        ROWS,
        "const int there = !(e[j] < 0.0f);",
        "const int there = 1;",
        UNIFORM,
    ),
    Mutation(
        "a rounded log for the tail's probability", ROWS, "p = (float)exp(r_)", "p = f_exp(1.00001f * r)", UNIFORM
    ),
    Mutation(
        "the student's tail in single precision", ROWS, "double sum = S.sum > 0.0", "float sum = S.sum > 0.0", NEAR
    ),
    # What the teacher says
    Mutation("the tail not spread under a temperature", TARGETS, "whole = one + count[:, None]", "whole = one", BUCKET),
    Mutation(
        "one token of the tail has all of it",
        TARGETS,
        "one, top = (missing - count)[:, None] / T",
        "one, top = missing[:, None] / T",
        UNIFORM,
    ),
    Mutation(
        "rounding hides nothing",
        TARGETS,
        "torch.maximum(1.0 - log_probs.exp().sum(1), least).log()",
        "(1.0 - log_probs.exp().sum(1)).clamp(min=0.0).log()",
        "sparse:merely_sure and compiled-fast",
    ),
    Mutation("an unnormalised teacher scaled", TARGETS, 'if plan.tail != "zero":', "if True:", EQUALS + "zero-fkl"),
    Mutation(
        "padding is a token",
        TARGETS,
        "tail, each = V - there.sum(1)",
        "tail, each = V - there.shape[1] + 0 * there.sum(1)",
        UNIFORM,
    ),
    Mutation("tokens named twice", TARGETS, "require(~twice,", "require(twice | ~twice,", INPUTS),
    Mutation(
        "probabilities above 1", TARGETS, "require(total <= 1.0 + excess,", "require(total <= 9.0 + excess,", INPUTS
    ),
    # Eager rows
    Mutation(
        "K tokens left in the eager tail",
        EAGER_ROWS,
        "x[places.rows, places.columns] = -torch.inf",
        "pass",
        EAGER + "bucket-jsd",
    ),
    Mutation(
        "accuracy by the K alone",
        EAGER_ROWS,
        "largest = torch.maximum(mass.largest, z.amax(1))[:, None]",
        "largest = z.amax(1)[:, None]",
        "sparse:right_only_if and eager-fast",
    ),
    # Triton
    Mutation(
        "a token that is taken out is -inf times the scale",
        DEVICE,
        "taken = (z == TAKEN) | (cols >= V)",
        "taken = cols >= V",
        "triton/interpreted_sparse:softcap and bucket and fast",
    ),
    Mutation("the tail's sum not rescaled", STATISTICS, "S = keep * S + e", "S = S + e", LOW),
    Mutation("the entropy's sum not moved", STATISTICS, "U = keep * (U - d * by_fours(S, BLOCK))", "U = keep * U", LOW),
    Mutation(
        "the K tokens of the next tile",
        STATISTICS,
        "place, column, inside = places_of(ids, row, start, K, first, V, K_BLOCK)",
        "place, column, inside = places_of(ids, row, start, K, 0, V, K_BLOCK)",
        LOW,
    ),
    Mutation(
        "K tokens among the tail's values",
        VALUES,
        "D += tl.where(taken, 0.0, value)",
        "D += tl.where(cols < V, value, 0.0)",
        EACH,
    ),
    Mutation(
        "only the first of the K tokens' gradients",
        GRADIENT,
        "for start in range(0, K, K_BLOCK):",
        "for start in range(0, 1, K_BLOCK):",
        TRITON,
    ),
    Mutation(
        "the gradient not weighted",
        GRADIENT,
        "w * jacobian(z, scale, softcap) * g)",
        "jacobian(z, scale, softcap) * g)",
        TRITON,
    ),
    Mutation(
        "the label not subtracted by the kernel", GRADIENT, "tl.where(cols == label, ce_weight, 0.0)", "0.0", TRITON
    ),
    Mutation(
        "the state's K gradients mixed up",
        DRIVER,
        "states[SPARSE_STATES:, part] = state, top.T",
        "states[SPARSE_STATES:, part] = state, 0.0 * top.T",
        LOW,
    ),
)
