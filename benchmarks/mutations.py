"""Breaks the kernels in many ways, one at a time, and shows that the tests notice each.

Every mutation replaces one piece of text in a copy of the kernels and runs the tests that ought to fail, in a process
of its own. A mutation is *caught* if a test fails, *survives* if all pass, and is *stale* if its text is gone or the
broken kernel does not even compile. Run as ``make mutations`` or::

    python -m benchmarks.mutations [-j JOBS] [-k WORD] [--save]

Exits with 1 unless every mutation is caught. Takes about three seconds of one core for each. How the Triton kernels
are broken is in ``mutations_triton.py``.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, NoReturn

from benchmarks.measure import save_results
from benchmarks.mutations_triton import MUTATIONS as TRITON
from benchmarks.mutations_triton import Mutation

ROOT = Path(__file__).resolve().parent.parent
KERNELS = "kernels/pocl_kernels"
CONTEXT = multiprocessing.get_context("forkserver")
PRELOADED = ["torch", "torch._dynamo", "torch.testing", "torch.distributed", "torch.multiprocessing", "triton",
             "triton.language", "triton.runtime.interpreter", "hypothesis.strategies", "pytest"]  # fmt: skip

# Selections of tests, `file[:expression]`, each narrow enough for a second or two.
FKL = "exactness:unrelated_models_in_float32 and compiled-fast-fkl"
POWER = FKL.removesuffix("fkl") + "alpha"  # which reads r itself
SKEW = "exactness:unrelated_models_in_float32 and compiled-fast-skew_rkl"
UNRELATED = "exactness:unrelated_models_in_float32 and eager-fast-"
EAGER = UNRELATED + "fkl"
HEADS = "exactness:form_of_head and compiled-fast-fkl"
EAGER_HEADS = "exactness:form_of_head and eager-fast-fkl"
ORACLE = "reference"
LABELS = "cross_entropy:option_against and compiled-fast"
EAGER_LABELS = "cross_entropy:option_against and eager-fast"
OUTPUTS = "outputs:full_logits and compiled-fast-fkl"
EAGER_OUTPUTS = "outputs:full_logits and eager-fast-fkl"
AT_HAND = "logits:"
BY_TOKEN = "by_token:call_of_its_own and compiled-fast-jsd"

ROWS, PRELUDE, CE_ROWS = "cpu/divergence_rows.c", "cpu/prelude.h", "cpu/cross_entropy_rows.c"
MUTATIONS = (
    # Compiled rows
    Mutation("sign of the softmax's Jacobian", ROWS, "et[j] - wAc * es[j]", "et[j] + wAc * es[j]", FKL),
    Mutation("label not subtracted", ROWS, "grad[label] -= wB * jacobian_label", "grad[label] -= 0.0f", FKL),
    Mutation("teacher not tempered", ROWS, "(zt[j] * inv_T - R.max)", "(zt[j] - R.max)", POWER),
    Mutation("wrong normaliser for the teacher", ROWS, "- R.max) - R.log_sum;", "- R.max) - S.log_sum;", POWER),
    Mutation("entropy's sign", PRELUDE, "log(S) - U / S", "log(S) + U / S", FKL),
    Mutation("entropy's sum not moved to a new maximum", PRELUDE, "keep * (U + fall * S)", "keep * U", OUTPUTS),
    Mutation("entropy's sum moved from nothing", PRELUDE, "S > 0.0 ? keep * (U + fall * S) : 0.0",
             "keep * (U + fall * S)", OUTPUTS),
    Mutation("0 x -inf in an entropy", PRELUDE, "(u < -87.3f ? -87.3f : u)", "u", "outputs:masks and compiled-fast"),
    Mutation("the student's entropy for the teacher's", ROWS, "out[3] = R.entropy", "out[3] = S.entropy", OUTPUTS),
    Mutation("a tie is wrong", ROWS, "z_label >= S1.max", "z_label > S1.max", OUTPUTS),
    Mutation("accuracy by the tempered maximum", ROWS, "z_label >= S1.max", "z_label >= S.max", OUTPUTS),
    Mutation("cross-entropy tempered", ROWS, "(S1.max - z_label) + S1.log_sum", "(S.max - z_label) + S.log_sum", FKL),
    Mutation("cross-entropy's gradient tempered", ROWS, "tempered ? f_exp(z - S1.max)", "0 ? f_exp(z - S1.max)", FKL),
    Mutation("only the last block's slope", ROWS, "c += (double)cb;", "c = (double)cb;", FKL),
    Mutation("weight of a token not on its label", ROWS, "wB = w * B", "wB = B", FKL),
    Mutation("softcap not in the gradient", ROWS, "scale * (1.0f - zc * zc)", "scale", HEADS),
    Mutation("softcap not in the label's gradient", ROWS, "if (with_ce && softcap > 0.0f)", "if (0)", HEADS),
    Mutation("scale not in the gradient", ROWS, "scale * (1.0f - zc * zc)", "1.0f - zc * zc", HEADS),
    Mutation("0 x -inf under no softcap", ROWS, "softcap > 0.0f ? z * inv_softcap : 0.0f", "z * inv_softcap",
             "inputs:masked_on_both_sides and compiled-fast"),
    Mutation("0 x inf without weight", ROWS, "wA == 0.0f ? 0.0f : wA * slope", "wA * slope",
             "inputs:infinite_divergence_without_weight and compiled-fast"),
    Mutation("no shift by the maximum", PRELUDE, "m == -INFINITY ? 0.0f : m;", "0.0f;",
             "exactness:peaked and compiled-fast-fkl"),
    Mutation("sum not rescaled to a new maximum", PRELUDE, "S *= keep;", "", FKL),
    Mutation("maximum not tempered", PRELUDE, "bm *= inv_T;", "", "exactness:peaked and compiled-fast-fkl"),
    Mutation("off by one at the end of the vocabulary", PRELUDE,
             "end = b + BLOCK < V ? b + BLOCK : V;", "end = b + BLOCK < V ? b + BLOCK : V - 1;", FKL),
    Mutation("bias left out", PRELUDE, "z[j] += bias[j]", "z[j] += 0.0f", FKL),
    Mutation("scale after the softcap", PRELUDE, "softcap * f_tanh(z[j] * inverse)",
             "scale * softcap * f_tanh(z[j] * inverse / scale)", HEADS),
    Mutation("softcap ignored", PRELUDE, "if (softcap > 0.0f) {", "if (0) {", HEADS),
    Mutation("a block of masked tokens overflows", PRELUDE, "shift[b / BLOCK] = m;", "shift[b / BLOCK] = by;",
             "inputs:whole_block and compiled-fast"),
    Mutation("exponential that does not underflow", PRELUDE, "y = x < -87.3f ? 0.0f : y;", "",
             "inputs:masked_on_both_sides and compiled-fast-fkl"),
    Mutation("cross-entropy rows: label added", CE_ROWS, "x[labels[i]] -= ws", "x[labels[i]] += ws",
             "exactness:cross_entropy_alone and compiled-fast"),
    Mutation("cross-entropy rows: softcap not in the gradient", CE_ROWS, "(1.0f - xc * xc) * (to_q", "(to_q",
             "exactness:cross_entropy_alone and compiled-fast"),
    Mutation("cross-entropy rows: nothing smoothed", CE_ROWS, "loss += smoothing *", "loss += 0.0f *", LABELS),
    Mutation("cross-entropy rows: the sum smoothed, not the mean", CE_ROWS, "(below / (double)V)", "below", LABELS),
    Mutation("cross-entropy rows: one block smoothed", CE_ROWS, "below += (double)s;", "below = (double)s;", LABELS),
    Mutation("cross-entropy rows: smoothed towards the label", CE_ROWS, "s += x_label - x[j]", "s += x[j] - x_label",
             LABELS),
    Mutation("cross-entropy rows: z-loss of the first order", CE_ROWS, "z_loss * lse * lse", "z_loss * lse", LABELS),
    Mutation("cross-entropy rows: half of the z-loss's slope", CE_ROWS, "2.0f * z_loss * lse", "z_loss * lse", LABELS),
    Mutation("cross-entropy rows: gradient of the smoothing left out", CE_ROWS, "- each);", "- 0.0f * each);", LABELS),
    Mutation("cross-entropy rows: the label's whole slope", CE_ROWS, "ws * (1.0f - smoothing) * (1.0f", "ws * (1.0f",
             LABELS),
    Mutation("cross-entropy rows: a tie is wrong", CE_ROWS, "x_label >= S.max", "x_label > S.max", LABELS),
    Mutation("cross-entropy rows: log-sum-exp without its maximum", CE_ROWS, "lse = S.max + S.log_sum",
             "lse = S.log_sum", LABELS),
    # Eager rows
    Mutation("eager labels: nothing smoothed", "eager/rows.py", "weighted(smoothing, label - mean)",
             "weighted(smoothing, 0.0 * label)", EAGER_LABELS),
    Mutation("eager labels: z-loss of the first order", "eager/rows.py", "weighted(plan.z_loss, lse * lse)",
             "weighted(plan.z_loss, lse)", EAGER_LABELS),
    Mutation("eager labels: half of the z-loss's slope", "eager/rows.py", "weighted(2.0 * plan.z_loss, lse[:, None])",
             "weighted(plan.z_loss, lse[:, None])", EAGER_LABELS),
    Mutation("eager labels: gradient of the smoothing", "eager/rows.py", "gradient -= smoothing / V", "pass",
             EAGER_LABELS),
    Mutation("eager labels: the label's whole slope", "eager/rows.py", "(smoothing - 1.0) * inside", "-1.0 * inside",
             EAGER_LABELS),
    Mutation("eager labels: a tie is wrong", "eager/rows.py", "(label >= 0.0)", "(label > 0.0)", EAGER_LABELS),
    Mutation("eager labels: log-sum-exp without its maximum", "eager/rows.py", "lse = largest + log_sum",
             "lse = 0 * largest + log_sum", EAGER_LABELS),
    Mutation("labels smoothed over one process's share", "parallel.py", "self.total = int(sizes.sum())",
             "self.total = local_vocab_size", "parallel_losses"),
    Mutation("one process's gradient of shared labels", "cpu/backend.py",
             "    if group is not None and student.grad_hidden is not None:\n        group.sum(student.grad_hidden)\n"
             "    return Rows(chunks", "    return Rows(chunks", "parallel_losses"),
    Mutation("another process's numbers by token", "eager/rows.py", "plan.at((part, None)",
             "plan.at((slice(0, 1), None)",
             "parallel_losses"),
    Mutation("a smoothing out of range", "cross_entropy.py", "0.0 <= label_smoothing <= 1.0", "0.0 <= label_smoothing",
             "cross_entropy:out_of_range"),
    Mutation("a negative z-loss", "cross_entropy.py", "0.0 <= z_loss < math.inf", "z_loss < math.inf",
             "cross_entropy:out_of_range"),
    Mutation("the plain loss is differentiated", "cross_entropy.py", "Result(results, 1.0, 0.0",
             "Result(results, 0.0, 1.0", LABELS),
    Mutation("a gradient for a frozen head", "cpu/backend.py",
             "memory.empty(weight.shape, dtype) if wanted.weight else None",
             "memory.empty(weight.shape, dtype)", "frozen_head"),
    Mutation("eager: student not tempered", "eager/rows.py", "_log_softmax(z / own.temperature", "_log_softmax(z",
             EAGER),
    Mutation("eager: mean slope without q", "eager/rows.py", "slope - q * (sums[:, RESULTS, None]",
             "slope - (sums[:, RESULTS, None]",
             EAGER),
    Mutation("eager: label's share in float32", "eager/rows.py", "-plan.ce_weight * inside[:, None].to(gradient.dtype)",
             "torch.where(inside, -plan.ce_weight, 0.0)[:, None].to(gradient.dtype)",
             "exactness:unrelated_models_in_float64 and fkl"),
    Mutation("eager: weight of a token left out", "eager/rows.py",
             "gradient = weighted(row_scale[part, None], gradient)", "pass", EAGER),
    Mutation("eager: softcap's slope to first order", "eager/rows.py", "(z / softcap) ** 2", "(z / softcap).abs()",
             EAGER_HEADS),
    Mutation("eager: entropy's sign", "eager/rows.py", "-weighted(q, l)", "weighted(q, l)", EAGER),
    Mutation("eager: the teacher's entropy", "eager/rows.py", "-weighted(r.exp(), r)", "-weighted(r.exp(), l)",
             EAGER_OUTPUTS),
    Mutation("eager: a tie is wrong", "eager/rows.py", ">= _largest(l1, group)", "> _largest(l1, group)",
             EAGER_OUTPUTS),
    Mutation("right within one process's share", "eager/rows.py", "group.maximum(l.amax(-1))", "l.amax(-1)",
             "parallel_losses"),
    Mutation("eager: infinite slope without weight", "eager/rows.py", "weighted(coefficient, slope - q",
             "coefficient * (slope - q",
             "inputs:infinite_divergence_without_weight and eager-fast"),
    Mutation("a softcap hides what is broken", "eager/rows.py", " + (z - z)", "", "inputs:softcap and eager-fast"),
    # Chunks, products, threads
    Mutation("mask by sign instead of by index", "arguments.py", "valid = flat != ignore_index",
             "valid = flat >= 0", "laws:any_index and eager-fast"),
    Mutation("ignored rows count", "plan.py", "(labels != ignore_index).logical_and_(row_scale)",
             "row_scale",
             "autograd:broken_upstream and eager-low"),
    Mutation("every chunk overwrites dW", "cpu/backend.py", "            if self._first:", "            if True:",
             "laws:chunk_size and eager-fast"),
    Mutation("stale dW where nothing was valid", "cpu/backend.py", "0 if self._first else self.V :", "self.V :",
             "inputs:without_valid_tokens and eager-fast"),
    Mutation("db of the last chunk alone", "cpu/backend.py", "self.grad_bias[: self.V] += ",
             "self.grad_bias[: self.V] = ",
             "laws:chunk_size and eager-fast"),
    Mutation("padding takes part", "plan.py", "min(V, self.teacher_weight.shape[0])", "V",
             "laws:padded_vocabulary and eager-fast-student-fkl"),
    Mutation("a thread skips its first row", "cpu/backend.py", "(*share, *arguments",
             "(share[0] + (share[0] > 0), share[1], *arguments", "compiler:threads_share and compiled-fast-2"),
    Mutation("a lone thread skips its first row", "cpu/backend.py", "function(0, rows,", "function(1, rows,", FKL),
    Mutation("threads share a row of scratch", "cpu/backend.py", "first + 4 * row * thread", "first",
             "compiler:threads_share and compiled-fast-2"),
    Mutation("numbers of another temperature", "cpu/backend.py", "(1.0 / temperature, factor / temperature,",
             "(1.0 / temperature, factor,", FKL),
    Mutation("the first teacher's chunk for all", "cpu/backend.py",
             "slice(part.start - among.start, part.stop - among.start)", "slice(0, part.stop - part.start)",
             "laws:chunk_size and eager-fast"),
    Mutation("the first rows of a chunk for all", "chunks.py", "else x[part]", "else x[: part.stop - part.start]",
             "laws:chunk_size and eager-fast"),
    Mutation("gradients of rows that are not taken", "cpu/backend.py", "(torch.empty if whole else torch.zeros)(",
             "(lambda *a, **k: torch.full(*a, 7.0, **k))(", "inputs:weight_zero and eager-fast"),
    Mutation("results without the rows' weights", "autograd.py", "result.results * row_scale", "result.results", EAGER),
    Mutation("a part without weight enters", "autograd.py", "if result.ce_weight == 1:", "if False:",
             "inputs:infinite_divergence_without_weight and eager-fast"),
    Mutation("the cross-entropy's share left out", "autograd.py", "if result.ce_weight == 0 else", "if True else",
             EAGER),
    Mutation("nothing divided by the count", "arguments.py", "scale.div_(divisor)", "scale", EAGER),
    Mutation("nothing valid divided by nothing", "arguments.py", "if int(count) == 0:", "if False:",
             "autograd:nothing_valid"),
    Mutation("a number by token is another's", "operators.py", "ce_weight = heads[4]", "ce_weight = 0.0", BY_TOKEN),
    Mutation("a gradient read as logits", "autograd.py", "return _place(logits) in places and", "return False and",
             "logits_inplace:gradient_by_now"),
    Mutation("another view's gradient", "autograd.py", "return _place(logits) in places and", "return bool(places) and",
             "logits_inplace:gradient_by_now"),
    Mutation("new logits in old memory refused", "autograd.py", "places and version == base._version", "places",
             "logits_inplace:made_anew"),
    # Interface and autograd
    Mutation("T squared dropped", "api.py", "temperature**2 if scale_by", "1.0 if scale_by", EAGER),
    Mutation("T instead of T squared", "api.py", "temperature**2 if scale_by", "temperature if scale_by", EAGER),
    Mutation("divergence not diluted by the cross-entropy", "api.py", "(1.0 - ce_weight) * (", "1.0 * (", EAGER),
    Mutation("mean over ignored tokens too", "arguments.py", "count, scale = valid.sum(), valid.to(dtype)",
             "count, scale = torch.ones_like(labels).sum(), valid.to(dtype)", EAGER),
    Mutation("label one beyond the vocabulary", "arguments.py", "high.item() < vocab_size",
             "high.item() <= vocab_size", "inputs:outside_the_vocabulary or refused_by_name"),
    Mutation("weights of ignored tokens count", "arguments.py", "torch.where(scale > 0, weight, scale)",
             "scale * weight", "laws:contents_of_ignored and eager-fast"),
    Mutation("gradients under no_grad", "api.py", 'mode == "fast" and torch.is_grad_enabled()', 'mode == "fast"',
             "autograd:without_gradients and eager-fast"),
    Mutation("a second backward scales again", "autograd.py", "gradients, ctx.ready = ready, None", "gradients = ready",
             "autograd:second_backward and eager-fast"),
    Mutation("upstream gradient ignored", "autograd.py", "gradient.mul_(upstream)", "gradient.mul_(1.0)",
             "autograd:upstream and eager-fast"),
    Mutation("upstream gradient of tokens ignored", "autograd.py", "row_scale * upstream, ctx", "row_scale, ctx",
             "autograd:reduction_none and eager-fast"),
    Mutation("constants that may change unnoticed", "autograd.py", "compiling and x.is_inference()", "compiling",
             "autograd:noticed and eager-low"),
    Mutation("chunks of a process's own size", "cpu/backend.py", "share = V if group is None else group.largest",
             "share = V", "parallel"),
    Mutation("a KL's claim inherited", "divergences.py", "cls.kl_weights = None  #", "pass  #", "scalar:bases_kl"),
    Mutation("rounded before the loss scale", "autograd.py", "result.gradients if now",
             "tuple(g.half().float() for g in result.gradients) if now", "autograd:float16_gradients and eager-fast"),
    # Definitions
    Mutation("fkl: slope's sign", "divergences.py", "        return -exp(r)\n", "        return exp(r)\n", EAGER),
    Mutation("skew_rkl: mixture's weights exchanged", "divergences.py",
             "log_ratios(l, r, 1.0 - self.skew)[1])", "log_ratios(l, r, self.skew)[1])",
             UNRELATED + "skew_rkl"),
    Mutation("jsd: beta on the student", "divergences.py", "exp(l), log_ratios(l, r, self.beta)",
             "exp(l), log_ratios(l, r, 1.0 - self.beta)",
             UNRELATED + "jsd"),
    Mutation("jeffreys: half of the slope", "divergences.py", "weighted(exp(l), l - r) + (exp(l) - exp(r))",
             "weighted(exp(l), l - r)",
             UNRELATED + "jeffreys"),
    Mutation("alpha: slope over 1 - alpha", "divergences.py", "1.0 - a)) * share(1.0, a)\n",
             "1.0 - a)) * share(1.0, 1.0 - a)\n",
             UNRELATED + "alpha"),
    Mutation("tvd: slope of a sum, not of half of it", "divergences.py", "0.5 * weighted(exp(l), sign",
             "weighted(exp(l), sign",
             UNRELATED + "tvd"),
    Mutation("skew_fkl: difference of slopes without the anchor", "divergences.py", "(ratio * q - p)", "(q - p)",
             UNRELATED + "skew_fkl"),
    Mutation("slopes relative to nothing", "divergences.py", " - exp(l) * (self.slope(l0, r0) / exp(l0))", "",
             "scalar:relative_slope_is_the_slope"),
    Mutation("a difference of slopes inherited", "divergences.py", "cls.relative_slope = Divergence.relative_slope",
             "pass", "own_divergence:another_slope"),
    Mutation("jsd(0) is nothing", "divergences.py", "forward = where(equal(self.beta, 0.0), 1.0, 0.0)",
             "forward = 0.0 * self.beta", UNRELATED + "jsd"),
    Mutation("alpha_beta: slope of the powers", "divergences.py", "self.beta / total) / total\n",
             "self.beta / total)\n",
             UNRELATED + "alpha_beta"),
    Mutation("alpha(0) by its division", "scalar.py", "return a / b if b else 0.0", "return a / b",
             UNRELATED + "alpha"),
    Mutation("mixed_kl: the two exchanged", "divergences.py", "weighted(1.0 - w, weighted(q, l - r)) + w * (q - p)",
             "weighted(w, weighted(q, l - r)) + (1.0 - w) * (q - p)", UNRELATED + "mixed_kl"),
    Mutation("mixture's ratio by the wrong part", "scalar.py", "where(student, by_q, by_p - d)",
             "where(student, by_p - d, by_q)", "scalar:log_ratios"),
    Mutation("the wrong anchor", ROWS, "while (top + 1 < V && !(zs[top] * inv_T == S.max)) top++;", "",
             "sharp:sharpest and compiled-fast"),
    Mutation("l - r without its shift", ROWS, "(z - zt[j]) * inv_T - shift;", "(z - zt[j]) * inv_T;", FKL),
    # Logits at hand
    Mutation("the teacher's rows at the student's places", ROWS, "places ? places[n + i]", "places ? places[i]",
             AT_HAND + "compiled and padding"),
    Mutation("the gradient's rows V apart", ROWS, "grad + (places ? places[2 * n + i] : i * V)", "grad + i * V",
             AT_HAND + "compiled and padding and beside-student"),
    Mutation("rows V apart wherever they lie", ROWS, "places ? places[i] : i * V", "i * V",
             AT_HAND + "compiled and where_they_lie"),
    Mutation("padding's gradient left as it was", "eager/logits.py", "gradient[..., V:] = 0", "pass",
             AT_HAND + "eager and padding and inplace"),
    Mutation("ignored rows' gradient left as it was", "eager/logits.py",
             "gradient[torch.unravel_index(without, gradient.shape[:-1])] = 0", "pass",
             AT_HAND + "eager and ignored_rows and inplace"),
    Mutation("over the logits without being asked", "eager/logits.py", "if plan.inplace else", "if True else",
             AT_HAND + "eager and where_they_lie and beside"),
    Mutation("float16 rounded before the loss scale", "logits.py", "student_logits.dtype == torch.float16",
             "False", AT_HAND + "compiled and loss_scale"),
    Mutation("a second backward pass from a gradient", "autograd.py", "if ctx.overwritten and (", "if False and (",
             "logits_inplace:second"),
    Mutation("no one is told that logits are a gradient", "autograd.py",
             "torch.autograd.graph.increment_version(logits)", "pass", "logits_inplace:saved"),
    Mutation("a leaf overwritten", "logits.py", "if base.is_leaf and base.requires_grad:", "if False:",
             "logits_inplace:named"),
    Mutation("a teacher overwritten", "logits.py", "if first < other_last and other_first < last:", "if False:",
             "logits_inplace:named"),
    Mutation("one temperature for all tokens", ROWS, "rate[i * by_token]", "rate[0]", BY_TOKEN),
    Mutation("one factor for all tokens", ROWS, "As[i * by_token]", "As[0]", BY_TOKEN),
    Mutation("one parameter for all tokens", ROWS, "uniforms + i * by_token * n_uniform", "uniforms", BY_TOKEN),
    Mutation("eager: the least probable anchor", "eager/rows.py", "l.max(-1, keepdim=True)", "l.min(-1, keepdim=True)",
             "sharp:sharpest and eager-fast"),
    Mutation("eager: another token's numbers", "eager/rows.py", "plan.at((part, None)", "plan.at((slice(0, 1), None)",
             "by_token:own and eager-fast"),
    Mutation("a token out of range", "divergences.py", "elif not holds.all():", "elif False:", "by_token:named"),
    Mutation("a gradient's derivative left out", "autograd.py", "_Once.apply(g, upstream, *inputs)", "g",
             "autograd:derivative_of_the_gradient and eager-fast"),
    Mutation("textbook KL, which cancels", "scalar.py", "where(absolute(x) < 0.5, near, far))", "-a * x)",
             "exactness:nearly_equal_models_in_float32 and eager-fast-fkl"),
    Mutation("no series near zero", "scalar.py", "where(absolute(x) < 0.5, near, far))", "far)",
             "exactness:nearly_equal_models_in_float32 and eager-fast-fkl"),
    Mutation("0 x inf for a masked token", "scalar.py", "where(equal(a, 0.0), 0.0, a * x)", "a * x",
             "inputs:masked_on_both_sides and eager-fast"),
    Mutation("slope over T squared", "plan.py", "self.divergence_factor / self.temperature",
             "self.divergence_factor / self.temperature**2", EAGER),
    Mutation("a library that others can write is loaded", "cpu/compiler.py", "stat.S_IWGRP | stat.S_IWOTH", "0",
             "compiler:others_can_write"),
    Mutation("a library of somebody else's is loaded", "cpu/compiler.py", "status.st_uid != os.geteuid()", "False",
             "compiler:somebody_else"),
    Mutation("one library for every source", "cpu/compiler.py", '"\\0".join((text, ', '"\\0".join((',
             "compiler:another_source"),
    # The oracle itself
    Mutation("oracle: beta on the student", "reference.py", "m = log_mix(r, l, beta)",
             "m = log_mix(l, r, beta)", ORACLE),
    Mutation("oracle: forward for reverse", "reference.py", 'if name == "rkl":\n        return kl(l, r)',
             'if name == "rkl":\n        return kl(r, l)', ORACLE),
    Mutation("oracle: padding as logits", "reference.py", "logits(hidden, head)[:, :vocab_size]",
             "logits(hidden, head)", ORACLE),
)  # fmt: skip


def copy_tree(target: Path) -> None:
    """The kernels and their tests, without the parts that no mutation touches."""
    ignore = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(ROOT / "kernels", target / "kernels", ignore=ignore)
    shutil.copytree(ROOT / "tests" / "kernels", target / "tests" / "kernels", ignore=ignore)
    shutil.copy(ROOT / "tests" / "conftest.py", target / "tests")
    shutil.copy(ROOT / "pyproject.toml", target)
    # Most of the time would go into optimising kernels that run for milliseconds.
    compiler = target / KERNELS / "cpu" / "compiler.py"
    compiler.write_text(compiler.read_text().replace('"-O3"', '"-O0"'))


class Run(NamedTuple):
    """What pytest said."""

    code: int
    output: str


def run_tests(tree: Path, tests: str, cache: Path) -> Run:
    """pytest on a copied tree; ``tests`` is ``file`` or ``file:expression``.

    In a process forked from one that has imported torch and triton already, which take longer than most tests.
    """
    with tempfile.NamedTemporaryFile("r", prefix="pocl-mutation-output-") as output:
        process = CONTEXT.Process(target=_pytest, args=(str(tree), tests, str(cache), output.name))
        process.start()
        process.join(600)
        if process.is_alive():
            process.kill()
            process.join()
        return Run(process.exitcode or 0, output.read())


def _pytest(tree: str, tests: str, cache: str, output: str) -> NoReturn:
    # Both the oracle of the copy and its kernels must be the ones that are tested, not the installed ones.
    here = [tree, f"{tree}/kernels"]
    ours = {str(ROOT), str(ROOT / "kernels"), ""}
    sys.path[:] = [*here, *(x for x in sys.path if x not in ours)]
    assert "pocl_kernels" not in sys.modules
    os.environ |= {"PYTHONPATH": os.pathsep.join(here), "POCL_CACHE": cache, "OMP_NUM_THREADS": "1"}
    os.environ.pop("POCL_TEST_ENGINES", None)
    os.chdir(tree)
    with open(output, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    file, _, expression = tests.partition(":")
    folder, _, name = file.rpartition("/")
    command = ["-x", "-q", "--no-header", "-p", "no:cacheprovider", "-p", "no:randomly"]
    command += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # of what is imported already
    command += [f"tests/kernels/{folder}/test_{name}.py", *(["-k", expression] if expression else [])]
    import pytest

    code = int(pytest.main(command))
    sys.stdout.flush()
    os._exit(code)


def judge(mutation: Mutation, cache: Path) -> tuple[str, str]:
    """("caught" | "survived" | "stale", the test that failed or what is wrong)."""
    with tempfile.TemporaryDirectory(prefix="pocl-mutation-") as folder:
        tree = Path(folder)
        copy_tree(tree)
        file = tree / KERNELS / mutation.file
        text = file.read_text()
        if mutation.old not in text:
            return "stale", f"{mutation.old!r} is not in {mutation.file}"
        file.write_text(text.replace(mutation.old, mutation.new))
        result = run_tests(tree, mutation.tests, cache)
    output = result.output
    if "did not compile" in output:
        return "stale", "the broken kernel does not compile"
    if result.code == 0:
        return "survived", mutation.tests
    failed = next((line for line in output.splitlines() if line.startswith("FAILED ")), "")
    if result.code != 1 or not failed:
        return "stale", f"pytest exited with {result.code}: {output.strip().splitlines()[-1][:120]}"
    return "caught", failed.split("::")[-1].split(" - ")[0]


def sound(cache: Path) -> Iterator[str]:
    """The selections that fail, or select nothing, on the unbroken kernels."""
    with tempfile.TemporaryDirectory(prefix="pocl-mutation-") as folder:
        copy_tree(Path(folder))
        for tests in sorted({m.tests for m in (*MUTATIONS, *TRITON)}):
            result = run_tests(Path(folder), tests, cache)
            if result.code:
                yield f"{tests}: {(result.output.strip().splitlines() or ['nothing said'])[-1]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-j", "--jobs", type=int, default=1, help="mutations at a time (default 1)")
    parser.add_argument("--save", action="store_true", help="file the verdicts under benchmarks/results")
    parser.add_argument("-k", "--keyword", default="", help="only mutations whose description or file contains this")
    options = parser.parse_args()
    chosen = [m for m in (*MUTATIONS, *TRITON) if options.keyword in m.what or options.keyword in m.file]
    started = time.monotonic()
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    CONTEXT.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory(prefix="pocl-mutation-cache-") as folder:
        cache = Path(folder)
        broken = [] if options.keyword else list(sound(cache))
        if broken:
            print("These tests fail on the kernels as they are:", *broken, sep="\n  ")
            return 1
        counts: dict[str, int] = {}
        verdicts: dict[str, list[str]] = {}
        with ThreadPoolExecutor(options.jobs) as pool:
            for mutation, (verdict, detail) in zip(chosen, pool.map(lambda m: judge(m, cache), chosen), strict=True):
                counts[verdict] = counts.get(verdict, 0) + 1
                verdicts[f"{mutation.file}: {mutation.what}"] = [verdict, detail]
                if options.save:  # as it goes: an hour's work must not be lost
                    save_results("mutations", {"verdicts": verdicts})
                print(f"{verdict:9}{mutation.file:25}{mutation.what:52}{detail}", flush=True)
    print(
        ", ".join(f"{n} {verdict}" for verdict, n in counts.items()),
        f"of {len(chosen)} in {time.monotonic() - started:.0f} s",
    )
    return int(counts.get("caught", 0) != len(chosen))


if __name__ == "__main__":
    sys.exit(main())
