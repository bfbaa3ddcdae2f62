"""Every shape of input that is allowed, and every one that is refused with a word on what to do."""

import dataclasses
import math
from typing import Any

import pytest
import torch

import pocl_kernels
from pocl_kernels import JSD, Alpha, ForwardKL, Head, SkewForwardKL, SkewReverseKL
from tests.kernels.cases import NAMES, Case, Solution, assert_close, make_case, oracle, solve

loss = pocl_kernels.fused_linear_divergence


def shaped(case: Case, *shape: int) -> Case:
    return case.replace(
        student_hidden=case.student_hidden.reshape(*shape, -1),
        teacher_hidden=case.teacher_hidden.reshape(*shape, -1),
        labels=case.labels.reshape(shape),
    )


@pytest.mark.parametrize("shape", [(24,), (4, 6), (2, 3, 4), (1, 24, 1)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_any_leading_shape(engine: Any, shape: tuple[int, ...], reduction: str) -> None:
    case = make_case(24, 257, bias=True)
    call = dict(ce_weight=0.3, reduction=reduction)
    result, flat = solve(engine, shaped(case, *shape), **call), solve(engine, case, **call)
    assert result.hidden.shape == (*shape, 24)
    assert result.loss.shape == (shape if reduction == "none" else ())
    entropies = ("student_entropy", "teacher_entropy")
    parts = ("loss", "divergence", "cross_entropy", *entropies, "accuracy", "hidden")
    flattened = {name: getattr(result, name).reshape(getattr(flat, name).shape) for name in parts}
    assert_close(dataclasses.replace(result, **flattened), flat, 0.0)
    weight = torch.rand(shape)
    weighted = solve(engine, shaped(case, *shape), token_weight=weight, **call)
    assert float(weighted.loss.sum()) == pytest.approx(
        float(solve(engine, case, token_weight=weight.reshape(-1), **call).loss.sum()), rel=1e-6
    )


def test_a_single_token_without_leading_shape(engine: Any) -> None:
    case = make_case(1, 257)
    case = case.rows(0).replace(labels=torch.tensor(7))
    result = solve(engine, case, ce_weight=0.3, reduction="none")
    assert result.loss.shape == ()
    assert result.hidden.shape == (24,)
    rows = case.replace(
        student_hidden=case.student_hidden[None], teacher_hidden=case.teacher_hidden[None], labels=case.labels[None]
    )
    assert float(result.loss) == pytest.approx(float(oracle(rows, ce_weight=0.3).loss), rel=1e-6)


def test_views_and_strides(engine: Any) -> None:
    case = make_case(24, 257, bias=True)
    truth = oracle(case, ce_weight=0.3)
    column_major = case.student_head.weight.T.contiguous().T
    every_second = torch.stack([case.teacher_head.bias, torch.full((257,), math.nan)], dim=1)[:, 0]
    strided = Case(
        torch.cat([case.student_hidden, torch.full((24, 3), math.nan)], dim=1)[:, :24],
        Head(column_major, torch.stack([case.student_head.bias] * 2, dim=1)[:, 1]),
        case.teacher_hidden.T.contiguous().T,
        Head(torch.cat([torch.full((2, 40), math.nan), case.teacher_head.weight])[2:], every_second),
        torch.stack([case.labels, case.labels * 0 - 7], dim=1)[:, 0],
    )
    assert_close(solve(engine, strided, ce_weight=0.3), truth, 2e-6)
    # Leaves that are themselves strided: `solve` keeps their strides, `expand` has stride zero.
    expanded = make_case(1, 257, bias=True)
    many = expanded.replace(
        student_hidden=expanded.student_hidden.expand(6, 24),
        teacher_hidden=expanded.teacher_hidden.expand(6, 40),
        labels=torch.tensor(3).expand(6),
    )
    assert_close(solve(engine, many, ce_weight=0.3), oracle(many, ce_weight=0.3), 2e-6)


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_labels_of_either_integer_type(engine: Any, index: torch.dtype) -> None:
    case = make_case(24, 257)
    result = solve(engine, case.replace(labels=case.labels.to(index)), ce_weight=1.0)
    assert_close(result, oracle(case, ce_weight=1.0), 2e-6)


@pytest.mark.parametrize(
    ("hidden", "head"),
    [
        (torch.bfloat16, torch.float32),  # autocast: activations in bf16, parameters in float32
        (torch.float32, torch.bfloat16),  # a head kept in bf16
        (torch.float64, torch.float32),
    ],
    ids=str,
)
def test_hidden_states_and_head_of_different_dtypes(engine: Any, hidden: torch.dtype, head: torch.dtype) -> None:
    base = make_case(24, 257, bias=True)
    case = dataclasses.replace(
        base.to(head), student_hidden=base.student_hidden.to(hidden), teacher_hidden=base.teacher_hidden.to(hidden)
    )
    result, truth = solve(engine, case, ce_weight=0.3), oracle(case, ce_weight=0.3)
    assert (result.hidden.dtype, result.weight.dtype, result.bias.dtype) == (hidden, head, head)
    for name, error in result.errors(truth).items():
        assert error <= (3e-3 if getattr(result, name).dtype == torch.bfloat16 else 2e-6), name


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("rows", [0, 5])
def test_a_batch_without_valid_tokens_has_loss_zero_and_zero_gradients(engine: Any, rows: int, reduction: str) -> None:
    case = make_case(5, 257, bias=True).rows(slice(0, rows))
    case = case.replace(labels=torch.full((rows,), -100))
    for name in NAMES:
        result = solve(engine, case, divergence=name, ce_weight=0.3, reduction=reduction)
        for field in dataclasses.fields(Solution):
            value = getattr(result, field.name)
            assert value is not None
            assert float(value.abs().sum()) == 0.0, field.name
        assert result.loss.shape == ((rows,) if reduction == "none" else ())
    h = case.student_hidden.clone().requires_grad_()
    out = engine(h, case.student_head, case.teacher_hidden, case.teacher_head, labels=case.labels)
    assert int(out.num_tokens) == 0
    # The count over all processes may be zero as well.
    empty = engine(
        h, case.student_head, case.teacher_hidden, case.teacher_head, labels=case.labels, normalizer=torch.tensor(0)
    )
    assert float(empty.loss.detach()) == 0.0
    ce = engine.cross_entropy(h, case.student_head, case.labels)
    ce.backward()
    assert float(ce.detach()) == 0.0
    assert float(h.grad.abs().sum()) == 0.0


# --- Masked and broken logits ---


def masked(head: Head, *tokens: int) -> Head:
    bias = torch.zeros(head.vocab_size)
    bias[list(tokens)] = -math.inf
    return Head(head.weight, bias)


@pytest.mark.parametrize("name", NAMES)
def test_a_token_masked_on_both_sides_is_as_if_it_were_cut(engine: Any, name: str) -> None:
    case = make_case(16, 257)
    case = case.replace(labels=case.labels.clamp_max(255))
    both = case.replace(student_head=masked(case.student_head, 256), teacher_head=masked(case.teacher_head, 256))
    cut = case.replace(
        student_head=Head(case.student_head.weight[:256]), teacher_head=Head(case.teacher_head.weight[:256])
    )
    call = dict(divergence=name, ce_weight=0.3, temperature=2.0, wanted=("hidden", "weight"))
    result = solve(engine, both, **call)
    assert float(result.weight[256].abs().max()) == 0.0
    assert_close(dataclasses.replace(result, weight=result.weight[:256]), solve(engine, cut, **call), 2e-6)


def test_a_whole_block_of_masked_tokens_before_very_low_logits(engine: Any) -> None:
    # Nothing finite has been seen when the first two thousand entries are done, and what follows is far below zero.
    case = make_case(6, 2500)
    bias = torch.full((2500,), -300.0)
    bias[:2048] = -math.inf
    case = case.replace(
        student_head=Head(case.student_head.weight, bias),
        teacher_head=Head(case.teacher_head.weight, bias),
        labels=torch.full((6,), 2400),
    )
    rest = case.replace(
        student_head=Head(case.student_head.weight[2048:]),
        teacher_head=Head(case.teacher_head.weight[2048:]),
        labels=case.labels - 2048,
    )
    call = dict(divergence="jsd", ce_weight=0.3, temperature=2.0, wanted=("hidden", "weight"))
    result = solve(engine, case, **call)
    assert float(result.weight[:2048].abs().max()) == 0.0
    # Logits near -300 are spaced by 3e-5.
    assert_close(dataclasses.replace(result, weight=result.weight[2048:]), oracle(rest, **call), 1e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_token_masked_on_one_side(engine: Any, side: str, name: str) -> None:
    case = make_case(16, 257)
    head = masked(case.student_head if side == "student" else case.teacher_head, 3, 200)
    case = case.replace(**{f"{side}_head": head}, labels=torch.full((16,), 9))
    call = dict(divergence=name, ce_weight=0.3, wanted=("hidden", "weight"))
    result, truth = solve(engine, case, **call), oracle(case, **call)
    if math.isinf(truth.loss):
        assert math.isinf(result.loss)
        assert float(result.loss) > 0
    else:
        # The oracle's own autograd makes NaN of 0 x inf here: judge by the values, and the gradient by being finite.
        assert float(result.loss) == pytest.approx(float(truth.loss), rel=2e-6)
        assert float(result.student_entropy) == pytest.approx(float(truth.student_entropy), rel=2e-6)
        assert torch.isfinite(result.hidden).all()
        assert torch.isfinite(result.weight).all()
        if torch.isfinite(truth.weight).all():
            assert_close(result, truth, 5e-6)


def test_which_divergences_are_infinite_under_a_mask_on_one_side(engine: Any) -> None:
    case = make_case(4, 257)
    student = case.replace(student_head=masked(case.student_head, 3), labels=torch.full((4,), 9))
    teacher = case.replace(teacher_head=masked(case.teacher_head, 3), labels=torch.full((4,), 9))
    infinite = {
        side: {n for n in NAMES if math.isinf(solve(engine, c, divergence=n, wanted=()).loss)}
        for side, c in (("student", student), ("teacher", teacher))
    }
    assert infinite == {
        "student": {"fkl", "jeffreys", "mixed_kl"},
        "teacher": {"rkl", "jeffreys", "mixed_kl"},
    }


def test_an_infinite_divergence_without_weight_does_not_spoil_the_cross_entropy(engine: Any) -> None:
    case = make_case(8, 257)
    case = case.replace(teacher_head=masked(case.teacher_head, 3), labels=torch.full((8,), 9))
    result = solve(engine, case, divergence="rkl", ce_weight=1.0)
    truth = oracle(make_case(8, 257).replace(labels=case.labels), divergence="fkl", ce_weight=1.0)
    assert float(result.loss) == pytest.approx(float(truth.loss), rel=2e-6)
    assert torch.isfinite(result.hidden).all()
    of_the_teacher = dict(divergence=truth.divergence, teacher_entropy=truth.teacher_entropy)
    assert_close(dataclasses.replace(result, **of_the_teacher), truth, 2e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_broken_logits_give_a_loss_that_is_not_finite(engine: Any, value: float, side: str, name: str) -> None:
    case = make_case(8, 257, bias=True).replace(labels=torch.full((8,), 9))
    head = case.student_head if side == "student" else case.teacher_head
    bias = head.bias.clone()
    bias[100] = value
    broken = case.replace(**{f"{side}_head": Head(head.weight, bias)})
    assert not math.isfinite(solve(engine, broken, divergence=name, wanted=()).loss)
    hidden = getattr(case, f"{side}_hidden").clone()
    hidden[2, 5] = value
    one_row = case.replace(**{f"{side}_hidden": hidden})
    assert not math.isfinite(solve(engine, one_row, divergence=name, wanted=()).loss)
    rows = solve(engine, one_row, divergence=name, reduction="none", wanted=()).loss
    assert torch.isfinite(rows).tolist() == [True, True, False, True, True, True, True, True]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_softcap_does_not_hide_a_broken_hidden_state(engine: Any, value: float) -> None:
    case = make_case(8, 257, softcap=5.0)
    for broken_part in (
        slice(None),
        slice(5, 6),
    ):  # of the whole state the logits are NaN, of one entry they are infinite
        hidden = case.student_hidden.clone()
        hidden[2, broken_part] = value
        broken = case.replace(student_hidden=hidden, labels=torch.full((8,), 9))
        assert not math.isfinite(solve(engine, broken, wanted=()).loss)
        assert not math.isfinite(engine.cross_entropy(hidden, case.student_head, broken.labels))


def test_broken_logits_break_the_cross_entropy(engine: Any) -> None:
    case = make_case(8, 257)
    hidden = case.student_hidden.clone()
    hidden[2, 5] = math.nan
    rows = engine.cross_entropy(hidden, case.student_head, case.labels.clamp_min(0), reduction="none")
    assert torch.isfinite(rows).tolist() == [True, True, False, True, True, True, True, True]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_token_of_weight_zero_adds_nothing(engine: Any, reduction: str) -> None:
    check_weight_zero(engine, reduction)


def check_weight_zero(loss: Any, reduction: str, dtype: torch.dtype = torch.float32) -> None:
    case, weight = make_case(8, 67, dtype=dtype), torch.ones(8)
    weight[3] = 0.0

    def broken(hidden: torch.Tensor) -> torch.Tensor:
        return hidden.index_fill(0, torch.tensor(3), math.nan)

    call = dict(divergence="rkl", token_weight=weight, reduction=reduction)
    teacher = case.replace(teacher_hidden=broken(case.teacher_hidden))
    both = teacher.replace(student_hidden=broken(case.student_hidden))
    assert_close(solve(loss, both, **call), solve(loss, case, **call), 1e-6)
    assert_close(solve(loss, teacher, labels=False, **call), solve(loss, case, labels=False, **call), 1e-6)

    masked = torch.zeros(67)
    masked[5] = -math.inf
    infinite = case.replace(teacher_head=Head(case.teacher_head.weight, masked))
    nothing = solve(loss, infinite, divergence="rkl", token_weight=0 * weight, reduction=reduction)
    assert not nothing.loss.any()
    assert not nothing.hidden.any()
    assert not nothing.weight.any()

    # The caller's own mask: the upstream gradient of the tokens that it leaves out is 0.
    def masked_by_caller(*arguments: Any, **options: Any) -> Any:
        out = loss(*arguments, divergence="rkl", reduction="none", memory="auto", **options)
        return out._replace(loss=torch.where(weight == 1, out.loss, 0.0).sum())

    outcomes = [solve(masked_by_caller, x) for x in (teacher, case)]
    for gradient in Solution.GRADIENTS[:2]:
        assert torch.equal(*(getattr(outcome, gradient) for outcome in outcomes)), gradient


# --- What is refused ---

H, V = torch.randn(6, 4), torch.randn(50, 4)
LABELS = torch.zeros(6, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: loss(H, V, H[:5], V), r"teacher_hidden has leading shape \(5,\), student_hidden \(6,\)"),
        (lambda: loss(H, V, H.reshape(2, 3, 4), V), r"teacher_hidden has leading shape \(2, 3\)"),
        (lambda: loss(H, torch.randn(50, 5), H, V), r"student_hidden has shape \(6, 4\).*last dimension must be 5"),
        (lambda: loss(H, V, H, torch.randn(50, 5)), r"teacher_hidden has shape \(6, 4\).*last dimension must be 5"),
        (lambda: loss(torch.tensor(1.0), V, H, V), "student_hidden has shape"),
        (lambda: loss(H.long(), V, H, V), "student_hidden is torch.int64.*floating point"),
        (lambda: loss(H, V.int(), H, V), "head torch.int32.*floating point"),
        (lambda: loss(H.to("meta"), V, H, V), "student_hidden is on meta, its head's weight on cpu"),
        (lambda: loss(H, V, H.to("meta"), V.to("meta")), "teacher_hidden is on meta.*cpu"),
        (lambda: loss(H, V, H, V, labels=LABELS.to("meta")), "labels on meta, the hidden states on cpu"),
        (
            lambda: loss(H, V, H, V, token_weight=torch.ones(6, device="meta")),
            "token_weight on meta, the hidden states on cpu",
        ),
        (lambda: loss(H, V, H.clone().requires_grad_(), V), r"teacher_hidden requires grad.*no_grad"),
        (lambda: loss(H, V, H, torch.randn(57, 4)), "50 and 57 entries.*padding.*tokenizer"),
        (lambda: loss(H, torch.randn(57, 4), H, V), "57 and 50 entries.*padding.*tokenizer"),
        (lambda: loss(H, V, H, V, divergence="kl"), "divergence='kl'.*fkl, rkl"),
        (lambda: loss(H, V, H, V, divergence=ForwardKL), "divergence=.*instance"),
        (lambda: loss(H, V, H, V, temperature=0), "temperature=0 must be a positive"),
        (lambda: loss(H, V, H, V, temperature=-1.0), "temperature=-1.0"),
        (lambda: loss(H, V, H, V, temperature=math.nan), "temperature=nan"),
        (lambda: loss(H, V, H, V, temperature=math.inf), "temperature=inf"),
        (lambda: loss(H, V, H, V, temperature="2"), "temperature='2'"),
        (lambda: loss(H, V, H, V, ce_weight=1.5, labels=LABELS), r"ce_weight=1.5 must be in \[0, 1\]"),
        (lambda: loss(H, V, H, V, ce_weight=math.nan, labels=LABELS), "ce_weight=nan"),
        (lambda: loss(H, V, H, V, ce_weight=0.5), "ce_weight=0.5 needs labels"),
        (lambda: loss(H, V, H, V, labels=LABELS[:5]), r"labels have shape \(5,\).*\(6,\)"),
        (lambda: loss(H, V, H, V, labels=LABELS.float()), "labels are torch.float32.*int64"),
        (lambda: loss(H, V, H, V, labels=LABELS + 50), r"labels must be in \[0, 50\).*got 50 \(6 such\)"),
        (lambda: loss(H, V, H, V, labels=LABELS - 1), r"labels must be in \[0, 50\) or ignore_index=-100, got -1"),
        (lambda: loss(H, torch.randn(53, 4), H, V, labels=LABELS + 51), r"labels must be in \[0, 50\)"),
        (lambda: loss(H, V, H, V, token_weight=torch.ones(5)), r"token_weight has shape \(5,\), expected \(6,\)"),
        (lambda: loss(H, V, H, V, reduction="avg"), "reduction='avg' must be one of mean, sum, none"),
        (lambda: loss(H, V, H, V, normalizer=3.0, reduction="sum"), 'normalizer.*"mean".*"sum"'),
        (lambda: loss(H, V, H, V, normalizer=0.0), "normalizer is 0, but 6 tokens are valid"),
        (lambda: loss(H, V, H, V, normalizer=torch.tensor(0)), "normalizer is 0, but 6 tokens are valid"),
        (lambda: loss(H, V, H, V, normalizer=-2), "normalizer=-2 must not be negative"),
        (lambda: loss(H, V, H, V, normalizer=[6]), r"normalizer=\[6\] must be one number"),
        (lambda: loss(H, V, H, V, normalizer="6"), "normalizer='6' must be one number"),
        (lambda: loss(H, V, H, V, ce_weight="0.5", labels=LABELS), "ce_weight='0.5' must be one number"),
        (
            lambda: loss(H, V, H, V, ce_weight=torch.ones(6), labels=LABELS),
            r"ce_weight=tensor.*one number.*the same for all tokens",
        ),
        (lambda: JSD("0.5"), r"JSD\(beta='0.5'\): beta must be in \[0, 1\], a number or a tensor of one a token"),
        (lambda: Alpha(None), r"Alpha\(alpha=None\): alpha must be.*a number"),
        (lambda: SkewForwardKL([0.1] * 6), r"SkewForwardKL\(skew=\[.*a number or a tensor of one a token"),
        (lambda: loss(H, V, H, V * torch.ones((), requires_grad=True)), "teacher's head.*graph.*no_grad"),
        (lambda: loss(H, V, H, V, normalizer=torch.ones(6)), r"normalizer has shape \(6,\): it must be one number"),
        (lambda: loss(H, V, H, V, normalizer=torch.tensor(-2.0)), "normalizer=-2.0 must not be negative"),
        (lambda: loss(H, V, H, V, labels=LABELS.tolist()), "labels are a list.*tensor of token ids"),
        (lambda: loss(H, V, H, V, token_weight=[1.0] * 6), "token_weight is a list.*tensor"),
        (
            lambda: loss(H, Head(V, torch.zeros(50, device="meta")), H, V),
            "on cpu, its head's bias on meta",
        ),
        (lambda: loss(H, Head(V, torch.zeros(50).int()), H, V), "bias of the head of student_hidden is torch.int32"),
        (lambda: loss(H, torch.nn.Linear(4, 50), H, V), r"a Linear.*Head\(layer.weight, layer.bias\)"),
        (lambda: loss(H, None, H, V), "Head.weight is a NoneType"),
        (lambda: loss(H, torch.zeros(0, 4), H, V), r"Head.weight must be.*\(0, 4\)"),
        (lambda: loss(H, V, H, V, workspace_mb="1"), "workspace_mb='1' must be a positive"),
        (lambda: loss(H, V, H, V, workspace_mb=math.inf), "workspace_mb=inf"),
        (lambda: loss(H, V, H, V, memory="small"), "memory='small' must be one of auto, fast, low"),
        (lambda: loss(H, V, H, V, memory="fast", reduction="none"), 'memory="fast".*reduction="none".*"low"'),
        (lambda: loss(H, V, H, V, workspace_mb=0), "workspace_mb=0 must be a positive"),
        (lambda: loss(H, V, H, V, workspace_mb=math.nan), "workspace_mb=nan"),
        (lambda: Head(H[0]), r"Head.weight must be \[vocabulary, hidden\], got shape \(4,\)"),
        (lambda: Head(V, torch.zeros(49)), r"Head.bias must.*50.*got.*\(49,\)"),
        (lambda: Head(V, softcap=0.0), "Head.softcap=0.0 must be positive"),
        (lambda: Head(V, softcap=-1.0), "Head.softcap=-1.0"),
        (lambda: Head(V, softcap="30"), "Head.softcap='30' must be positive"),
        (lambda: Head(V, scale=None), "Head.scale=None must be one number"),
        (lambda: SkewForwardKL(1.0), r"SkewForwardKL\(skew=1.0\): skew must be in"),
        (lambda: SkewReverseKL(-0.1), r"SkewReverseKL\(skew=-0.1\)"),
        (lambda: JSD(-0.1), r"JSD\(beta=-0.1\): beta must be in \[0, 1\]"),
        (lambda: JSD(math.nan), r"JSD\(beta=nan\)"),
        (lambda: Alpha(1.1), r"Alpha\(alpha=1.1\)"),
    ],
)
def test_bad_input_is_refused_by_name(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"(?s){message}"):
        call()


@pytest.mark.parametrize("bad", [50, -1, 10**12])
def test_a_label_outside_the_vocabulary_is_refused_before_anything_is_computed(
    bad: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("something was computed")

    monkeypatch.setattr("pocl_kernels.operators.linear_loss", never)
    labels = LABELS.clone()
    labels[4] = bad
    with pytest.raises(ValueError, match=rf"got {bad} \(1 such\)"):
        loss(H, V, H, V, labels=labels)
    with pytest.raises(ValueError, match=rf"got {bad} \(1 such\)"):
        pocl_kernels.fused_linear_cross_entropy(H, V, labels)


def test_cross_entropy_refuses_the_same_things() -> None:
    ce = pocl_kernels.fused_linear_cross_entropy
    for call, message in (
        (lambda: ce(H, torch.randn(50, 5), LABELS), r"hidden has shape \(6, 4\)"),
        (lambda: ce(H, V, LABELS[:4]), "labels have shape"),
        (lambda: ce(H, V, None), "labels=None"),
        (lambda: ce(H, V, LABELS, reduction="avg"), "reduction='avg'"),
        (lambda: ce(H, V, LABELS, token_weight=torch.ones(2)), "token_weight has shape"),
        (lambda: ce(H, V, LABELS, normalizer=2.0, reduction="none"), "normalizer"),
        (lambda: ce(H, V, LABELS, workspace_mb=-1), "workspace_mb"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_a_teacher_that_requires_grad_is_fine_where_nothing_can_be_differentiated(engine: Any) -> None:
    case = make_case(6, 257)
    teacher = case.teacher_hidden.clone().requires_grad_()
    with torch.no_grad():
        out = engine(case.student_hidden, case.student_head, teacher, case.teacher_head)
    assert not out.loss.requires_grad
    weight = case.teacher_head.weight.clone().requires_grad_()  # a teacher's parameters often do; nothing flows to them
    hidden = case.student_hidden.clone().requires_grad_()
    engine(hidden, case.student_head, case.teacher_hidden, weight).loss.backward()
    assert weight.grad is None


def test_vocabularies_may_differ_by_padding_alone() -> None:
    from pocl_kernels.arguments import shared_vocab_size

    assert shared_vocab_size(151936, 152064) == 151936
    assert shared_vocab_size(152064, 151936) == 151936
    assert shared_vocab_size(50257, 50304) == 50257
    for student, teacher in ((32000, 50257), (151936, 151936 + 1025), (128, 145)):
        with pytest.raises(ValueError, match=f"{student} and {teacher}"):
            shared_vocab_size(student, teacher)
