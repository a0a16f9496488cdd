import warnings
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from spikedistill.neuron import fused
from spikedistill.neuron.dynamics import IF, LIF, PLIF, Neuron, Reset, run, run_with_slope
from spikedistill.neuron.layer import Spiking
from spikedistill.neuron.surrogate import ATan, Rectangle, Sigmoid
from spikedistill.student.conversion import INHERITED_NEURON

T = 3


@dataclass(frozen=True)
class Case:
    """Everything that a kernel is compiled for; what may vary within a kernel is varied within a test."""

    neuron: Neuron
    dtype: torch.dtype = torch.float32
    constant: bool = False
    state: bool = False
    keep: bool = True


CASES = {
    "if": Case(IF, keep=False),
    "if, learned threshold, half, constant": Case(
        Neuron(initial=0.5, learn_threshold=True), torch.bfloat16, constant=True
    ),
    "if, to zero, state": Case(Neuron(reset=Reset.ZERO, surrogate=Rectangle()), state=True),
    "lif, state": Case(LIF, state=True),
    "lif, to zero, detached, constant": Case(Neuron(leak=0.4, reset=Reset.ZERO, detach_reset=True), constant=True),
    "rounding, half": Case(INHERITED_NEURON, torch.bfloat16, keep=False),
    "graded, learned threshold": Case(Neuron(initial=0.5, levels=4, learn_threshold=True)),
    "graded lif, half, state": Case(Neuron(leak=0.5, levels=3), torch.bfloat16, state=True),
    "graded, detached, constant": Case(Neuron(levels=2, detach_reset=True), constant=True, keep=False),
    "plif": Case(replace(PLIF, surrogate=ATan()), keep=False),
    "plif, learned threshold, half, state": Case(replace(PLIF, learn_threshold=True), torch.bfloat16, state=True),
    "plif, subtractive, detached, current as it is, learned threshold": Case(
        Neuron(leak=0.6, learn_leak=True, learn_threshold=True, detach_reset=True, surrogate=Sigmoid(3.0)),
        constant=True,
        state=True,
    ),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
SHAPES = [(2, 3, 4, 2), (5, 7), (3, 4, 1, 6)]


def answers(case: Case, backend: str, current: Tensor, state: Tensor | None, threshold: float) -> dict[str, Tensor]:
    """What a layer returns and every gradient, by name."""
    layer = Spiking(case.neuron, threshold, backend)
    current = current.clone(memory_format=torch.preserve_format).requires_grad_()
    state = None if state is None else state.clone(memory_format=torch.preserve_format).requires_grad_()
    spikes, last = layer(current, T, T if case.constant else 1, state, case.keep)
    weight = torch.linspace(-1, 2, spikes.numel()).view(spikes.shape)
    loss = (spikes * weight).sum() + (0 if last is None else (last * weight[: len(last)]).sum())
    loss.backward()
    found = {"spikes": spikes, "potential": last, "to current": current.grad}
    found |= {"to state": None if state is None else state.grad}
    found |= {f"to {name}": parameter.grad for name, parameter in layer.named_parameters()}
    return {name: value for name, value in found.items() if value is not None}


def draw(case: Case, shape: tuple[int, ...], last: bool) -> tuple[Tensor, Tensor | None]:
    form = torch.channels_last if last else torch.contiguous_format
    batch, rows = shape[0], (1 if case.constant else T) * shape[0]
    current = (torch.randn(rows, *shape[1:]) * 1.5 + 0.3).to(case.dtype).contiguous(memory_format=form)
    return current, torch.rand(batch, *shape[1:]).contiguous(memory_format=form) if case.state else None


@every_case
class TestEqualsTheReference:
    def test_in_every_result_and_gradient_without_compiling_twice(self, case):
        for shape, last, threshold in zip(SHAPES, (False, False, True), (1.0, 0.6, 2.3)):
            current, state = draw(case, shape, last)
            expected = answers(case, "reference", current, state, threshold)
            with torch._dynamo.config.patch(error_on_recompile=True):
                found = answers(case, "fused", current, state, threshold)
            assert 0 < (expected["spikes"] > 0).float().mean() < 1
            assert found["spikes"].is_contiguous(memory_format=torch.channels_last) >= last
            torch.testing.assert_close(found, expected)

    def test_with_one_kernel_for_every_size_layout_leak_and_threshold(self, case):
        answers(case, "fused", *draw(case, (2, 3), False), 1.0)
        compiled = fused._compiled.cache_info().misses
        with torch._dynamo.config.patch(error_on_recompile=True):
            for shape, last in ((2, 9), False), ((3, 2, 5, 5), False), ((1, 2, 3, 4), True):
                for neuron in (
                    case.neuron,
                    replace(case.neuron, leak=case.neuron.leak if case.neuron.leak == 1 else 0.3),
                ):
                    answers(replace(case, neuron=neuron), "fused", *draw(case, shape, last), 0.8)
        assert fused._compiled.cache_info().misses == compiled

    @pytest.mark.parametrize("backend", ["fused", "reference"])
    def test_makes_nan_of_what_is_not_finite_and_of_nothing_else(self, case, backend):
        current, state = draw(case, (2, 3, 4, 2), False)
        clean = answers(case, backend, current, state, 1.0)
        broken, times = current.clone(), current.view(-1, 2, 24)
        rows = broken.view(times.shape)
        first = 0 if case.constant else 1
        for number, value in enumerate((float("nan"), float("inf"), -float("inf"))):
            rows[first, number % 2, 5 + number] = value
        lost = torch.zeros(T, 2, 24, dtype=torch.bool)
        lost[first:] = ~rows[first].isfinite()
        found = answers(case, backend, broken, state, 1.0)
        assert torch.equal(found["spikes"].isnan().view(T, 2, 24), lost)
        spared = ~lost[-1]
        for name, value in found.items():
            if name.startswith("to ") and value.ndim < 2:
                continue  # a sum over all neurons
            kept, expected = (one.view(-1, 2, 24)[:, spared] for one in (value, clean[name]))
            assert torch.equal(kept, expected), name
        assert "potential" not in found or torch.equal(found["potential"].isnan().view(2, 24), lost[-1])
        assert found["to current"].view(times.shape)[first, 0, 5].isnan()


@pytest.mark.parametrize("backend", ["fused", "reference"])
def test_rates_and_slopes_of_a_current_that_is_not_finite_are_nan(backend):
    layer, current = Spiking(IF, 1.0, backend), torch.tensor([0.5, torch.nan, torch.inf, -torch.inf] * T).view(T, 4)
    spikes, rate, slope = layer.with_slope(current, T)
    assert spikes.isnan().all(0).tolist() == rate[0].isnan().tolist() == [False, True, True, True]
    assert slope.isnan()[0, :2].tolist() == [False, True]


def test_a_state_that_is_not_finite_stays_so():
    state = torch.tensor([[0.0, torch.nan, torch.inf]])
    for backend in ("fused", "reference"):
        spikes, last = Spiking(IF, 1.0, backend)(torch.ones(T, 3), T, state=state, keep=True)
        assert last.isnan().tolist() == [[False, True, True]] and spikes.isnan().all(0).tolist() == [False, True, True]


def test_a_current_that_is_the_same_at_every_step_needs_no_kernel_of_its_own():
    case = Case(Neuron())
    answers(case, "fused", *draw(case, (2, 3), False), 1.0)
    compiled = fused._compiled.cache_info().misses
    constant = replace(case, constant=True)
    answers(constant, "fused", *draw(constant, (2, 3), False), 1.0)
    assert fused._compiled.cache_info().misses == compiled


@pytest.mark.parametrize("name", ["if, learned threshold, half, constant", "plif"])
def test_rates_and_slopes_equal_the_reference(name):
    case = CASES[name]
    current, leak, threshold = draw(case, (2, 3), False)[0], torch.tensor(case.neuron.leak), torch.tensor(0.7)
    for size in (1, 2):
        given = current.view(1 if case.constant else T, -1).repeat(1, size)
        with torch._dynamo.config.patch(error_on_recompile=True):
            found = fused.fused_run_with_slope(given, None, case.neuron, leak, threshold, T)
        torch.testing.assert_close(found, run_with_slope(given, None, case.neuron, leak, threshold, T))


CHAINED = ["if, learned threshold, half, constant", "if, to zero, state", "plif"]


@pytest.mark.parametrize("name", CHAINED)
def test_a_chain_of_chunks_equals_the_reference(name, monkeypatch):
    monkeypatch.setattr(fused, "CHUNK", 2)
    case = CASES[name]
    current, state = draw(case, (5, 7), False)
    torch.testing.assert_close(
        answers(case, "fused", current, state, 0.8), answers(case, "reference", current, state, 0.8)
    )
    leak, threshold = torch.tensor(case.neuron.leak), torch.tensor(0.8)
    given = current.view(1 if case.constant else T, -1)
    torch.testing.assert_close(
        fused.fused_run_with_slope(given, None, case.neuron, leak, threshold, T),
        run_with_slope(given, None, case.neuron, leak, threshold, T),
    )


def test_another_number_of_steps_needs_no_new_kernel():
    one = torch.tensor(1.0)

    def every_way(timesteps):
        current = torch.randn(timesteps, 6).requires_grad_()
        found, _ = fused.fused_run(current, None, IF, one, one, timesteps, False)
        found.sum().backward()
        torch.testing.assert_close(found, run(current, None, IF, one, one, timesteps)[0])
        fused.fused_run_with_slope(current.detach(), None, IF, one, one, timesteps)

    every_way(3 * fused.CHUNK)
    compiled = fused._compiled.cache_info().misses
    for chunks in (2, 4, 8):
        every_way(chunks * fused.CHUNK)
    assert fused._compiled.cache_info().misses == compiled


def test_a_single_neuron_needs_no_special_case():
    case = CASES["lif, state"]
    current, state = draw(case, (1, 1), False)
    found = answers(case, "fused", current, state, 0.5)
    torch.testing.assert_close(found, answers(case, "reference", current, state, 0.5))


def test_two_calls_with_the_state_carried_equal_one():
    current, zero, one = torch.randn(2 * T, 40) + 0.3, torch.zeros(40), torch.tensor(1.0)
    whole = current.clone().requires_grad_()
    spikes, last = run(whole, None, LIF, one / 2, one, 2 * T)
    parts = current.clone().requires_grad_()
    first, state = fused.fused_run(parts[:T], zero, LIF, one / 2, one, T, True)
    second, end = fused.fused_run(parts[T:], state, LIF, one / 2, one, T, True)
    torch.testing.assert_close(torch.cat([first, second]), spikes)
    torch.testing.assert_close(end, last)
    weight = torch.randn(2 * T, 40)
    (torch.cat([first, second]) * weight).sum().backward()
    (spikes * weight).sum().backward()
    torch.testing.assert_close(parts.grad, whole.grad)


@pytest.mark.parametrize("through", ["spikes", "potential"])
def test_gradients_flow_through_either_result_alone(through):
    found = []
    for way in (fused.fused_run, lambda *facts: run(*facts[:-1])):
        current = torch.linspace(-1, 2, 20 * T).view(T, 20).requires_grad_()
        state = torch.full((20,), 0.2, requires_grad=True)
        spikes, last = way(current, state, LIF, torch.tensor(0.5), torch.tensor(1.0), T, True)
        result = spikes if through == "spikes" else last
        found.append(torch.autograd.grad(result.square().sum(), (current, state)))
    torch.testing.assert_close(found[0], found[1])


def test_frozen_inputs_get_no_gradient_and_record_no_graph():
    current = torch.randn(T, 8)
    spikes, last = fused.fused_run(current, torch.zeros(8), LIF, torch.tensor(0.5), torch.tensor(1.0), T, True)
    assert not spikes.requires_grad and not last.requires_grad


def contexts():
    """The ways in which one network is called in one program."""
    yield "evaluation", torch.no_grad(), False
    yield "a frozen network", torch.enable_grad(), False
    yield "training", torch.enable_grad(), True
    yield "training in mixed precision", torch.autocast("cpu", dtype=torch.bfloat16), True
    yield "inference", torch.inference_mode(), False


def test_one_kernel_serves_training_evaluation_and_mixed_precision():
    half, one = torch.tensor(0.5), torch.tensor(1.0)
    fused.fused_run(torch.randn(T, 8).requires_grad_(), torch.zeros(8), LIF, half, one, T, True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _name, context, learns in contexts():
            with context:
                current = torch.randn(T, 8).requires_grad_(learns)
                found = fused.fused_run(current, torch.rand(8).requires_grad_(learns), LIF, half, one, T, True)
                assert found[0].requires_grad is learns


def test_changing_circumstances_never_end_a_program():
    half, one = torch.tensor(0.5), torch.tensor(1.0)
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for size in (1, 6):
                for _name, context, learns in contexts():
                    with context:
                        current, state = torch.randn(T, size).requires_grad_(learns), torch.zeros(size)
                        expected, _ = run(current, state, LIF, half, one, T)
                        found, _ = fused.fused_run(current, state, LIF, half, one, T, True)
                        torch.testing.assert_close(found, expected)
    finally:
        torch.set_num_threads(1)


class TestWithoutACompiler:
    @pytest.fixture(autouse=True)
    def _broken(self, monkeypatch):
        def fail(*facts):
            raise RuntimeError("InvalidCxxCompiler: no C++ compiler\nand a long trace")

        monkeypatch.setattr(fused, "_compiled", fail)
        fused.works.cache_clear()
        yield
        fused.works.cache_clear()

    def test_says_so_once_and_answers_as_the_reference(self):
        current = torch.randn(T * 2, 5)
        layer = Spiking(LIF, 0.7)
        with pytest.warns(UserWarning, match=r"\(InvalidCxxCompiler: no C\+\+ compiler\): neurons.*g\+\+") as said:
            spikes, _ = layer(current, T)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            again, _ = Spiking(LIF, 0.7)(current, T)
        expected, _ = Spiking(LIF, 0.7, "reference")(current, T)
        assert len(said) == 1
        assert torch.equal(spikes, expected) and torch.equal(again, expected)

    def test_a_layer_that_must_be_fused_fails(self):
        with pytest.raises(RuntimeError, match="InvalidCxxCompiler"):
            Spiking(LIF, backend="fused")(torch.randn(T, 5), T)


def test_this_machine_compiles():
    assert fused.works("cpu")
