"""The losses inside PyTorch: what requires grad, second backwards, scalers, autocast, checkpoints, compilation."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.utils.checkpoint import checkpoint

import pocl_kernels
from pocl_kernels import Head, SkewReverseKL, operators, reference
from pocl_kernels.cpu import backend as cpu_backend
from tests.kernels.cases import Case, Solution, assert_close, make_case, oracle, pytorch, solve

CALL = {"divergence": "jsd", "temperature": 2.0, "ce_weight": 0.3}


def leaves_of(case: Case) -> tuple[Tensor, Head, list[Tensor]]:
    hidden = case.student_hidden.clone().requires_grad_()
    weight = case.student_head.weight.clone().requires_grad_()
    bias = case.student_head.bias.clone().requires_grad_()
    return hidden, Head(weight, bias), [hidden, weight, bias]


@pytest.fixture
def case() -> Case:
    return make_case(24, 257, bias=True)


def test_second_backward_adds_the_same_gradient_again(engine: Any, case: Case) -> None:
    hidden, head, leaves = leaves_of(case)
    out = engine(hidden, head, case.teacher_hidden, case.teacher_head, labels=case.labels, **CALL)
    first = torch.autograd.grad(out.loss, leaves, grad_outputs=torch.tensor(3.0), retain_graph=True)
    kept = [g.clone() for g in first]
    second = torch.autograd.grad(out.loss, leaves, grad_outputs=torch.tensor(3.0), retain_graph=True)
    third = torch.autograd.grad(out.loss, leaves)
    for a, b, c, k in zip(first, second, third, kept, strict=True):
        assert reference.relative_error(b, k) <= 1e-6
        assert reference.relative_error(3 * c, k) <= 1e-6
        assert torch.equal(a, k), "a gradient that was given away has changed"
        assert a.data_ptr() != b.data_ptr()


def test_constants_changed_before_the_gradient_is_computed_are_noticed(engine: Any, case: Case) -> None:
    for constant in ("teacher_hidden", "labels"):
        for reduction in ("mean", "none"):
            hidden, head, _ = leaves_of(case)
            mine = case.replace(**{constant: getattr(case, constant).clone()})
            out = engine(hidden, head, mine.teacher_hidden, mine.teacher_head, labels=mine.labels, reduction=reduction)
            getattr(mine, constant).zero_()
            if engine.memory == "fast" and reduction == "mean":  # the gradient is there already
                out.loss.backward()
                assert reference.relative_error(hidden.grad, solve(engine, case).hidden) <= 1e-6
            else:
                with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                    out.loss.sum().backward()


def test_a_broken_upstream_gradient_reaches_the_valid_rows_alone(engine: Any, case: Case) -> None:
    hidden, head, _ = leaves_of(case)
    out = engine(hidden, head, case.teacher_hidden, case.teacher_head, labels=case.labels, reduction="none")
    out.loss.backward(torch.full_like(out.loss, torch.nan))
    valid = case.labels != -100
    assert hidden.grad[valid].isnan().all()
    assert not hidden.grad[~valid].any()


def test_a_teacher_of_inference_mode_serves(engine: Any, case: Case) -> None:
    with torch.inference_mode():
        teacher, labels = case.teacher_hidden.clone(), case.labels.clone()
    hidden, head, _ = leaves_of(case)
    out = engine(hidden, head, teacher, case.teacher_head, labels=labels, reduction="none")
    out.loss.sum().backward()
    assert reference.relative_error(hidden.grad, solve(engine, case, reduction="sum").hidden) <= 1e-6


def test_gradients_accumulate_over_calls(engine: Any, case: Case) -> None:
    hidden, head, leaves = leaves_of(case)
    for _ in range(2):
        engine(hidden, head, case.teacher_hidden, case.teacher_head, labels=case.labels, **CALL).loss.backward()
    once = solve(engine, case, **CALL)
    for leaf, name in zip(leaves, Solution.GRADIENTS, strict=True):
        assert reference.relative_error(leaf.grad, 2 * getattr(once, name)) <= 1e-6


@pytest.mark.parametrize("factor", [-2.5, 1e-6, 65536.0])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradients_are_proportional_to_the_upstream_gradient(
    engine: Any, case: Case, reduction: str, factor: float
) -> None:
    once = solve(engine, case, reduction=reduction, **CALL)
    scaled = solve(engine, case, reduction=reduction, upstream=factor, **CALL)
    expected = {name: factor * getattr(once, name) for name in Solution.GRADIENTS}
    assert_close(scaled, dataclasses.replace(once, **expected), 1e-6)


def test_a_loss_multiplied_by_a_trained_number_and_added_to_another(engine: Any, case: Case) -> None:
    hidden, head, leaves = leaves_of(case)
    factor = torch.tensor(0.7, requires_grad=True)
    out = engine(hidden, head, case.teacher_hidden, case.teacher_head, labels=case.labels, **CALL)
    (factor * out.loss + hidden.square().sum()).backward()
    once = solve(engine, case, **CALL)
    torch.testing.assert_close(factor.grad, once.loss)
    torch.testing.assert_close(hidden.grad, 0.7 * once.hidden + 2 * case.student_hidden)
    torch.testing.assert_close(leaves[1].grad, 0.7 * once.weight)


@pytest.mark.parametrize("name", ["fkl", "skew_rkl", "tvd"])
def test_reduction_none_takes_any_upstream_gradient(engine: Any, case: Case, name: str) -> None:
    upstream = torch.randn(24)
    upstream[::4] = 0
    call = dict(divergence=name, temperature=2.0, ce_weight=0.3, reduction="none", upstream=upstream)
    assert_close(solve(engine, case, **call), oracle(case, **call), 5e-6)
    # One token alone: no other row's gradient leaks in.
    one = torch.zeros(24)
    row = int(torch.nonzero(case.labels >= 0)[3])
    one[row] = 1.0
    single = solve(engine, case, **{**call, "upstream": one})
    assert torch.nonzero(single.hidden.abs().sum(-1)).flatten().tolist() == [row]


@pytest.mark.parametrize(
    "wanted", [(), ("hidden",), ("weight",), ("bias",), ("weight", "bias"), ("hidden", "bias")], ids=str
)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_only_what_requires_grad_gets_one(engine: Any, case: Case, reduction: str, wanted: tuple[str, ...]) -> None:
    every = solve(engine, case, reduction=reduction, **CALL)
    some = solve(engine, case, reduction=reduction, wanted=wanted, **CALL)
    missing = {name: None for name in Solution.GRADIENTS if name not in wanted}
    assert_close(some, dataclasses.replace(every, **missing), 0.0)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_without_gradients_none_are_computed(
    engine: Any, case: Case, mode: Any, reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = solve(engine, case, reduction=reduction, **CALL)

    def never(*_: Any) -> None:
        raise AssertionError("a gradient was computed")

    monkeypatch.setattr(cpu_backend.Projection, "accumulate", never)
    hidden, head, _ = leaves_of(case)
    with mode():
        out = engine(
            hidden, head, case.teacher_hidden, case.teacher_head, labels=case.labels, reduction=reduction, **CALL
        )
        ce = engine.cross_entropy(hidden, head, case.labels, reduction=reduction)
    assert not out.loss.requires_grad
    assert torch.equal(out.loss, expected.loss)
    torch.testing.assert_close(ce, expected.cross_entropy, rtol=1e-6, atol=0)


def test_all_but_the_loss_is_detached(engine: Any, case: Case) -> None:
    hidden, head, _ = leaves_of(case)
    out = engine(hidden, head, case.teacher_hidden, case.teacher_head, labels=case.labels, **CALL)
    assert out.loss.requires_grad
    assert not any(x.requires_grad for x in out[1:])
    assert out.num_tokens.dtype == torch.int64


def test_a_derivative_of_the_gradient_is_refused(engine: Any, case: Case) -> None:
    hidden, head, _ = leaves_of(case)
    out = engine(hidden, head, case.teacher_hidden, case.teacher_head, **{**CALL, "ce_weight": 0.0})
    (gradient,) = torch.autograd.grad(out.loss, hidden, create_graph=True)
    # A gradient penalty would otherwise be left out in silence.
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        gradient.square().sum().backward()


# --- Training in sixteen bits ---


def test_float16_gradients_survive_through_a_loss_scale(engine: Any) -> None:
    # The mean over a million tokens: most entries of dW lie far below float16's smallest number, 6e-8.
    case = make_case(16, 2053, dtype=torch.float16)
    scale, tokens = 2.0**16, 2.0**20
    truth = oracle(case, normalizer=tokens, upstream=scale)
    result = solve(engine, case, normalizer=tokens, upstream=scale)
    plain = pytorch(case.to(torch.float32), divergence="fkl", upstream=scale * int((case.labels >= 0).sum()) / tokens)
    held = dataclasses.replace(plain, weight=plain.weight.half(), hidden=plain.hidden.half())
    for name in ("hidden", "weight"):
        bound = max(1.2 * held.errors(truth)[name], 1e-6)
        assert result.errors(truth)[name] <= bound
    unscaled = solve(engine, case, normalizer=tokens)
    lost = float((unscaled.weight == 0).float().mean())
    assert lost > 0.5, "the test is too easy: most entries must underflow without the scale"
    assert float((result.weight == 0).float().mean()) < 0.8 * lost


def test_a_gradient_scaler_sees_every_loss(engine: Any) -> None:
    case = make_case(16, 257, bias=True)
    hidden, head, leaves = leaves_of(case)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(leaves, lr=0.1)
    loss = engine(hidden, head, case.teacher_hidden, case.teacher_head, labels=case.labels, **CALL).loss
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    once = solve(engine, case, **CALL)
    for leaf, name in zip(leaves, Solution.GRADIENTS, strict=True):
        assert reference.relative_error(leaf.grad, getattr(once, name)) <= 1e-6


def test_autocast_changes_nothing_but_the_dtype_of_the_hidden_states(engine: Any, case: Case) -> None:
    mixed = case.replace(student_hidden=case.student_hidden.bfloat16(), teacher_hidden=case.teacher_hidden.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        inside = solve(engine, mixed, **CALL)
        ce = engine.cross_entropy(mixed.student_hidden, mixed.student_head, mixed.labels)
    assert inside.loss.dtype == ce.dtype == torch.float32
    assert inside.weight.dtype == torch.float32
    assert_close(inside, solve(engine, mixed, **CALL), 0.0)
    truth = oracle(mixed, **CALL)
    assert float(inside.loss) == pytest.approx(float(truth.loss), rel=2e-6)
    assert inside.errors(truth)["weight"] <= 2e-6


# --- Around other machinery of PyTorch ---


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_around_the_loss(engine: Any, case: Case, reentrant: bool) -> None:
    hidden, head, leaves = leaves_of(case)

    def block(x: Tensor) -> Tensor:
        return engine(torch.tanh(x), head, case.teacher_hidden, case.teacher_head, labels=case.labels, **CALL).loss

    block(hidden).backward()
    expected = [leaf.grad.clone() for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    checkpoint(block, hidden, use_reentrant=reentrant).backward()
    for leaf, gradient in zip(leaves, expected, strict=True):
        assert reference.relative_error(leaf.grad, gradient) <= 1e-6


def test_a_head_tied_to_the_embedding_collects_both_gradients(engine: Any, case: Case) -> None:
    weight = case.student_head.weight.clone().requires_grad_()
    tokens = torch.arange(24)
    hidden = weight[tokens] + case.student_hidden
    engine(hidden, weight, case.teacher_hidden, case.teacher_head, labels=case.labels, **CALL).loss.backward()
    untied = case.replace(
        student_hidden=hidden.detach(), student_head=Head(case.student_head.weight), teacher_head=case.teacher_head
    )
    parts = solve(engine, untied, **CALL)
    torch.testing.assert_close(weight.grad, parts.weight.index_add(0, tokens, parts.hidden))


def test_low_rank_updates_of_the_head_train_through_it(engine: Any, case: Case) -> None:
    a = torch.randn(3, 24, requires_grad=True)
    b = torch.randn(257, 3, requires_grad=True)
    frozen = case.student_head.weight
    grads = []
    for dtype, loss in ((torch.float32, engine), (torch.float64, None)):
        x, y = (t.detach().to(dtype).requires_grad_() for t in (a, b))
        head = Head(frozen.to(dtype) + 0.1 * y @ x)
        call = reference.fused_linear_divergence if loss is None else loss
        call(
            case.student_hidden, head, case.teacher_hidden, case.teacher_head, labels=case.labels, **CALL
        ).loss.backward()
        grads.append((x.grad, y.grad))
    for mine, truth in zip(*grads, strict=True):
        torch.testing.assert_close(mine.double(), truth, rtol=1e-4, atol=1e-6)


def test_an_optimizer_brings_the_student_to_its_teacher(engine: Any) -> None:
    case = make_case(64, 67, hidden=(12, 12), near=0.3)
    weight = case.student_head.weight.clone().requires_grad_()
    optimizer = torch.optim.Adam([weight], lr=0.02)
    values = []
    for _ in range(60):
        optimizer.zero_grad()
        out = engine(case.student_hidden, weight, case.teacher_hidden, case.teacher_head, temperature=2.0)
        out.loss.backward()
        optimizer.step()
        values.append(float(out.divergence))
    assert values[-1] < 0.01 * values[0]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # torch.compile's own
def test_compiles_into_one_graph() -> None:
    case = make_case(12, 67, bias=True)
    *_, leaves = leaves_of(case)

    def step(h: Tensor, w: Tensor, b: Tensor, labels: Tensor) -> Tensor:
        scaled = 1.5 * h
        return pocl_kernels.fused_linear_divergence(
            scaled, Head(w, b), case.teacher_hidden, case.teacher_head, labels=labels, **CALL
        ).loss

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(step(*leaves, case.labels), leaves)
    loss = compiled(*leaves, case.labels)
    for mine, truth in zip(torch.autograd.grad(loss, leaves), expected, strict=True):
        torch.testing.assert_close(mine, truth, rtol=1e-5, atol=1e-7)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("what", ["temperature", "ce_weight", "divergence"])
def test_a_schedule_is_compiled_twice_at_most(what: str) -> None:
    """For the first value, and for all others."""
    case, graphs = make_case(12, 67), []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def step(h: Tensor, **call: Any) -> Tensor:
        return pocl_kernels.fused_linear_divergence(
            h, case.student_head, case.teacher_hidden, case.teacher_head, labels=case.labels, **call
        ).loss

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=aot_autograd(fw_compiler=backend))
    for x in (0.1, 0.2, 0.35, 0.5):
        call = {what: SkewReverseKL(x) if what == "divergence" else x}
        h, g = (case.student_hidden.clone().requires_grad_() for _ in range(2))
        compiled(h, **call).backward()
        step(g, **call).backward()
        assert reference.relative_error(h.grad, g.grad) <= 1e-6
    assert len(graphs) <= 4  # forward and backward


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", ["divergence", "cross_entropy"])
def test_the_operator_keeps_its_promises_to_the_compiler(
    engine: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    operator, calls = operators.operator, []

    def called(inputs: Any, numbers: Any, *rest: Any) -> Any:
        calls.append((list(inputs), torch.tensor(numbers, dtype=torch.float64), *rest[:-1], "\n".join(rest[-1])))
        return operators.Rows(*operator(*calls[-1]))

    monkeypatch.setattr(operators, "linear_loss", called)
    for rows in (6, 1, 0):
        case = make_case(6, 67, bias=True).rows(slice(0, rows))
        for wanted in (Solution.GRADIENTS, ("weight",)):
            if name == "divergence":
                solve(engine, case, wanted=wanted, **CALL)
            else:
                weight = case.student_head.weight.clone().requires_grad_()
                engine.cross_entropy(case.student_hidden, weight, case.labels).backward()
    assert len(calls) >= 6
    for arguments in calls:
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("normalizer", [0, 0.0, torch.tensor(0)], ids=str)
def test_nothing_valid_over_nothing_is_nothing(normalizer: Any) -> None:
    case = make_case(6, 67)
    case = case.replace(labels=torch.full_like(case.labels, -100))
    out = solve(pocl_kernels.fused_linear_divergence, case, normalizer=normalizer)
    assert float(out.loss) == 0.0
    assert out.hidden is not None
    assert not out.hidden.any()
