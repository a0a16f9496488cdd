import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from spikedistill.errors import ShapeError
from spikedistill.student.build import to_spiking
from spikedistill.student.coding import FrameCoding, RateCoding
from spikedistill.student.conversion import Conversion
from spikedistill.student.pool import MAX_POOLS, CumulativeMaxPool
from spikedistill.teacher.zoo import ZOO

POOLS = {
    "1d": (nn.MaxPool1d(2), (6,)),
    "2d": (nn.MaxPool2d(2), (6, 4)),
    "overlapping": (nn.MaxPool2d(3, 2, 1, ceil_mode=True), (5, 4)),
    "dilated": (nn.MaxPool2d(2, 1, dilation=2), (4, 4)),
    "3d": (nn.MaxPool3d(2), (2, 4, 2)),
    "adaptive 1d": (nn.AdaptiveMaxPool1d(3), (7,)),
    "adaptive 2d": (nn.AdaptiveMaxPool2d(1), (3, 3)),
    "adaptive 3d": (nn.AdaptiveMaxPool3d((1, 2, 1)), (2, 2, 3)),
}


def trains(shape, timesteps, height=1.0, seed=0):
    """Random spikes ``[T*2, 3, ...]`` of one height."""
    generator = torch.Generator().manual_seed(seed)
    return torch.bernoulli(torch.full((timesteps * 2, 3, *shape), 0.4), generator=generator) * height


def literally(x, pool, timesteps):
    """The definition, in float64: the growth of the maximum of cumulative sums."""
    sums = x.double().unflatten(0, (timesteps, -1)).cumsum(0)
    largest = torch.stack([pool(step) for step in sums])
    return torch.cat([largest[:1], largest[1:] - largest[:-1]]).flatten(0, 1)


def test_every_kind_of_max_pooling_is_tried():
    assert {type(pool) for pool, _ in POOLS.values()} == set(MAX_POOLS)


@pytest.mark.parametrize("name", POOLS)
def test_it_is_the_growth_of_the_largest_sum(name):
    pool, shape = POOLS[name]
    for x in (trains(shape, 5), torch.randn(10, 3, *shape, generator=torch.Generator().manual_seed(1))):
        found, state = CumulativeMaxPool(pool)(x, 5)
        torch.testing.assert_close(found.double(), literally(x, pool, 5), rtol=1e-6, atol=1e-6)
        assert state is None and found.dtype == x.dtype


@settings(max_examples=40)
@given(st.integers(1, 12), st.floats(1e-3, 1e3), st.sampled_from(sorted(POOLS)), st.integers(0, 99))
def test_over_spikes_of_one_height_a_step_is_a_spike_to_the_last_bit(timesteps, height, name, seed):
    pool, shape = POOLS[name]
    x = trains(shape, timesteps, height, seed)
    height = x.max() if x.any() else torch.tensor(1.0)
    found, total = CumulativeMaxPool(pool)(x, timesteps, keep=True)
    counts = found / height
    assert bool(((counts == 0) | (counts == 1)).all())
    summed = (x != 0).unflatten(0, (timesteps, 2)).float().sum(0)
    assert torch.equal(counts.unflatten(0, (timesteps, 2)).sum(0), pool(summed))
    torch.testing.assert_close(total.float(), summed * height)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_long_trains_stay_spikes(dtype):
    x = trains((4, 4), 300, 0.3).to(dtype)
    found, _ = CumulativeMaxPool(nn.MaxPool2d(2))(x, 300)
    assert set(found.unique().tolist()) == {0.0, x.max().item()}


@pytest.mark.parametrize("name", POOLS)
def test_gradients_are_those_of_the_definition(name):
    pool, shape = POOLS[name]
    x = torch.randn(8, 3, *shape, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(literally(x, pool, 4).shape, dtype=torch.float64)
    (expected,) = torch.autograd.grad((literally(x, pool, 4) * weights).sum(), x)
    (found,) = torch.autograd.grad((CumulativeMaxPool(pool)(x, 4)[0] * weights).sum(), x)
    torch.testing.assert_close(found, expected)


def test_gradients_pass_through_the_state():
    pool = CumulativeMaxPool(nn.MaxPool2d(2))
    x = torch.randn(3, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    state = torch.randn(1, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, state: pool(x, 3, 1, state, True), (x, state))


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_the_order_of_memory_stays_and_changes_nothing(layout):
    x = torch.randn(6, 3, 4, 4)
    pool = CumulativeMaxPool(nn.MaxPool2d(2))
    given_ = x.clone(memory_format=layout).requires_grad_()
    found, _ = pool(given_, 3)
    found.square().sum().backward()
    expected = x.clone().requires_grad_()
    pool(expected, 3)[0].square().sum().backward()
    assert found.is_contiguous(memory_format=layout) and given_.grad.is_contiguous(memory_format=layout)
    assert torch.equal(found, pool(x, 3)[0]) and torch.equal(given_.grad, expected.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_step_is_the_pool_itself_with_the_bits_of_the_growth_and_its_gradient(dtype):
    def bits(layer, disjoint):
        layer.disjoint = disjoint
        x = torch.randn(2, 3, 8, 6, generator=torch.Generator().manual_seed(0)).relu().to(dtype).requires_grad_()
        found, state = layer(x, 1)
        (found * torch.arange(12).view(4, 3)).sum().backward()
        return found, x.grad, state

    layer = CumulativeMaxPool(nn.MaxPool2d(2))
    assert layer.disjoint and not CumulativeMaxPool(nn.MaxPool2d(3, 2)).disjoint
    (plain, slope, state), (grown, again, _) = bits(layer, True), bits(layer, False)
    assert torch.equal(plain, grown) and torch.equal(slope, again) and state is None
    assert torch.equal(
        plain, nn.MaxPool2d(2)(torch.randn(2, 3, 8, 6, generator=torch.Generator().manual_seed(0)).relu().to(dtype))
    )


def test_the_same_input_at_every_step():
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    repeated = x.detach().repeat(4, 1, 1, 1).requires_grad_()
    pool = CumulativeMaxPool(nn.MaxPool2d(2))
    found, state = pool(x, 4, repeats=4, keep=True)
    expected, kept = pool(repeated, 4, keep=True)
    assert torch.equal(found, expected) and torch.equal(state, kept)
    found.square().sum().backward(), expected.square().sum().backward()
    torch.testing.assert_close(x.grad, repeated.grad.unflatten(0, (4, 2)).sum(0))


def test_a_call_over_t_is_two_calls_with_the_state_carried():
    x = trains((4, 4), 6, 0.7)
    pool = CumulativeMaxPool(nn.MaxPool2d(2))
    whole, end = pool(x, 6, keep=True)
    first, state = pool(x[:8], 4, keep=True)
    second, after = pool(x[8:], 2, state=state, keep=True)
    assert torch.equal(torch.cat([first, second]), whole) and torch.equal(after, end)
    with pytest.raises(ShapeError, match=r"state of a max pooling has shape \(2, 3, 4, 4\).*\(3, 3, 4, 4\)"):
        pool(torch.rand(3, 3, 4, 4), 1, state=state)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_seen(value):
    x = torch.zeros(4, 1, 2, 2)
    x[2, 0, 1, 1] = value
    found, _ = CumulativeMaxPool(nn.MaxPool2d(2))(x, 4)
    assert torch.isfinite(found[:2]).all() and not torch.isfinite(found[2:]).any()


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::FutureWarning")
def test_torchscript_traces_it():
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.pool = CumulativeMaxPool(nn.MaxPool2d(2))

        def forward(self, x):
            return self.pool(x, 4)[0]

    first, second = (trains((4, 4), 4, seed=seed) for seed in (0, 1))
    torch.testing.assert_close(torch.jit.trace(Pooled(), (first,))(second), Pooled()(second))


def test_of_means_is_the_mean():
    x = trains((4, 4), 16)
    pool = CumulativeMaxPool(nn.MaxPool2d(2))
    mean = pool(x, 16)[0].unflatten(0, (16, 2)).mean(0)
    torch.testing.assert_close(pool.of_means(x.unflatten(0, (16, 2)).mean(0)), mean)


def vgg(timesteps, **fields):
    torch.manual_seed(0)
    network, images = ZOO["vgg9"](width=4).train(), torch.rand(24, 3, 32, 32)
    for _ in range(5):
        network(images)
    return (
        network.eval(),
        images,
        lambda t=timesteps: to_spiking(network, Conversion(timesteps=t, **fields), calibration_images=images),
    )


def test_conversion_converges_and_with_a_logical_or_it_does_not():
    def errors(how):
        network, images, convert = vgg(0, max_pool=how)
        with torch.no_grad():
            wanted = network(images)
            spread = (wanted - wanted.mean(0)).norm()
            return [float((convert(t)[0].eval()(images).mean(0) - wanted).norm() / spread) for t in (16, 64)]

    short, long = errors("cumulative")
    assert long < short / 2
    short, long = errors("or")
    assert long > short / 2


@pytest.mark.parametrize("coding", [None, RateCoding(seed=3), FrameCoding()])
def test_a_stream_is_the_whole_call(coding):
    _, images, convert = vgg(3, **({} if coding is None else {"coding": coding}))
    student = convert()[0].eval()
    given_ = torch.rand(3, 2, 3, 32, 32) if isinstance(coding, FrameCoding) else images[:2]
    with torch.no_grad():
        for each in (student, copy.deepcopy(student), pickle.loads(pickle.dumps(student))):
            state, logits = None, []
            for t in range(3):
                answer, state = each.step(each.coding.frame(given_, t, 3), state)
                logits.append(answer)
            assert torch.equal(torch.stack(logits), student(given_)) and len(state) == student.states == 8 + 3


class First(nn.Module):
    """Pools the image before the first neuron, and spikes behind it."""

    def __init__(self):
        super().__init__()
        self.pool, self.conv, self.fc = nn.MaxPool2d(2), nn.Conv2d(1, 4, 3, padding=1), nn.Linear(16, 3)

    def forward(self, x):
        return self.fc(self.pool(F.relu(self.conv(self.pool(x)))).flatten(1))


def test_before_the_first_neuron_an_image_is_pooled_once_and_frames_over_time():
    images = torch.rand(3, 1, 8, 8)
    student, report = to_spiking(First(), Conversion(timesteps=4), calibration_images=images)
    assert student.states == 2 and [pool.name for pool in report.pools] == ["pool", "pool#2"]
    assert [pool.note.split(":")[0] for pool in report.pools] == ["before the first neuron", "cumulative"]
    assert all(pool.name in str(report) and pool.source in str(report) for pool in report.pools)
    frames, _ = to_spiking(First(), Conversion(timesteps=4, coding=FrameCoding()), calibration_images=images)
    assert frames.states == 3
    pooled = frames.eval().observe(torch.randn(4, 2, 1, 8, 8), ["pool"]).features["pool"]
    assert pooled.shape == (4, 2, 4, 2, 2)  # a module that is called twice has its last result


@pytest.mark.parametrize("how, note", [("or", "logical or: its error does not shrink"), ("average", "replaced by")])
def test_the_report_says_what_becomes_of_each_pool(how, note):
    _, report = to_spiking(ZOO["vgg9"](width=2), Conversion(inherit=False, max_pool=how))
    assert len(report.pools) == 3 and all(note in pool.note for pool in report.pools)


@pytest.mark.parametrize("gradient", ["exact", "rate", "quantised"])
@pytest.mark.parametrize("recompute", ["nothing", "neurons", "stages"])
def test_students_with_it_learn_by_every_gradient(gradient, recompute):
    _, images, convert = vgg(2)
    student = convert()[0].train()
    student.gradient, student.recompute = gradient, recompute
    student(images).square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in student.parameters())
    assert all(p.grad.abs().max() > 0 for name, p in student.named_parameters() if name.endswith("weight"))
