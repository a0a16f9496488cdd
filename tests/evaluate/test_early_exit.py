from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from spikedistill.errors import ConfigError, ShapeError
from spikedistill.evaluate.accuracy import cumulative, predict
from spikedistill.evaluate.early_exit import EarlyExit, early_exit, predict_early
from spikedistill.neuron.dynamics import LIF
from spikedistill.student.build import to_spiking
from spikedistill.student.coding import DirectCoding, FrameCoding, LatencyCoding, RateCoding
from spikedistill.student.conversion import Conversion
from spikedistill.student.fold import fold
from spikedistill.student.student import Student

STEPS, BATCH = 5, 12
DIRECT = DirectCoding()


class Net(nn.Module):
    """Two layers of neurons, the first of which is met again after the second."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn, self.act1 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()
        self.conv2, self.act2 = nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()
        self.fc = nn.Linear(256, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv1(x))
        x = self.act2(self.conv2(self.act1(x)) + x)
        return 8 * self.fc(x.flatten(1))


def student_of(coding=DIRECT, dtype=torch.float64, **options) -> Student:
    """In double precision, where no rounding tips a spike; its neurons run step by step, nothing is compiled."""
    network = Net().to(dtype)
    network(torch.rand(20, 3, 8, 8, dtype=dtype))
    many = torch.rand(16, 3, 8, 8, dtype=dtype)
    student, _ = to_spiking(
        network.eval(), Conversion(timesteps=STEPS, coding=coding, **options), calibration_images=many
    )
    for layer in student.neurons.values():
        layer.backend = "reference"
    return student.eval()


def inputs(coding=DIRECT, dtype=torch.float64) -> Tensor:
    shape = (STEPS, BATCH, 3, 8, 8) if isinstance(coding, FrameCoding) else (BATCH, 3, 8, 8)
    return torch.rand(shape, dtype=dtype)


@torch.no_grad()
def so_far(student: Student, images: Tensor) -> Tensor:
    """The mean logits after each step of the whole run."""
    logits = student(images)
    return cumulative(logits.to(torch.promote_types(logits.dtype, torch.float32)))


def middle(means: Tensor) -> float:
    """A confidence at which some leave after each of the first steps and some stay: the median of all but the last."""
    return float(means[:-1].softmax(-1).amax(-1).median())


def cut(means: Tensor, confidence: float) -> EarlyExit:
    """Early exit read off the whole run, sample by sample."""
    sure = means.softmax(-1).amax(-1) > confidence
    sure[-1] = True
    steps = sure.int().argmax(0)
    return EarlyExit(means[steps, torch.arange(means.shape[1])], steps + 1)


@pytest.mark.parametrize("coding", [DIRECT, FrameCoding(), RateCoding(seed=1), LatencyCoding()], ids=repr)
class TestEverySample:
    def test_answers_as_the_whole_run_cut_after_its_last_step(self, coding):
        student, images = student_of(coding), inputs(coding)
        means = so_far(student, images)
        expected = cut(means, middle(means))
        found = early_exit(student, images, middle(means))
        assert len(expected.steps.unique()) > 1, "the test asks nothing where all leave together"
        assert torch.equal(found.steps, expected.steps)
        torch.testing.assert_close(found.logits, expected.logits)

    def test_takes_all_steps_where_certainty_is_asked(self, coding):
        student, images = student_of(coding), inputs(coding)
        found = early_exit(student, images, 1.0)
        assert found.steps.tolist() == [STEPS] * BATCH and found.mean_steps == STEPS
        torch.testing.assert_close(found.logits, so_far(student, images)[-1])

    def test_takes_one_step_where_nothing_is_asked(self, coding):
        student, images = student_of(coding), inputs(coding)
        found = early_exit(student, images, 0.0)
        assert found.steps.tolist() == [1] * BATCH and found.mean_steps == 1
        torch.testing.assert_close(found.logits, so_far(student, images)[0])


def test_unseeded_rate_coding_draws_the_spikes_of_the_whole_run():
    student, images = student_of(RateCoding()), inputs()
    torch.manual_seed(7)
    means = so_far(student, images)
    torch.manual_seed(7)
    found = early_exit(student, images, middle(means))
    expected = cut(means, middle(means))
    assert torch.equal(found.steps, expected.steps)
    torch.testing.assert_close(found.logits, expected.logits)


def test_leaky_neurons_carry_their_state_along():
    student, images = student_of(neuron=LIF), inputs()
    means = so_far(student, images)
    torch.testing.assert_close(early_exit(student, images, 0.6).logits, cut(means, 0.6).logits)


def test_more_confidence_takes_no_fewer_steps():
    student, images = student_of(), inputs()
    found = [early_exit(student, images, confidence / 10) for confidence in range(11)]
    for lower, higher in pairwise(found):
        assert (lower.steps <= higher.steps).all()
    means = [early.mean_steps for early in found]
    assert means == sorted(means) and means[0] == 1 < means[5] < means[-1] == STEPS


def test_who_else_is_in_the_batch_does_not_matter():
    student, images = student_of(), inputs()
    confidence = middle(so_far(student, images))
    whole = early_exit(student, images, confidence)
    alone = [early_exit(student, image[None], confidence) for image in images]
    assert torch.equal(whole.steps, torch.cat([one.steps for one in alone]))
    torch.testing.assert_close(whole.logits, torch.cat([one.logits for one in alone]))


def test_the_batch_shrinks_as_samples_leave():
    student, images = student_of(), inputs()
    confidence = middle(so_far(student, images))
    seen = []
    hook = student.core.get_submodule("conv2").register_forward_hook(lambda _m, args, _o: seen.append(len(args[0])))
    steps = early_exit(student, images, confidence).steps
    hook.remove()
    assert seen == [int((steps > t).sum()) for t in range(steps.max())]
    assert seen[0] == BATCH > seen[-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prepare", [lambda student: student, fold], ids=["plain", "folded"])
def test_it_runs_in_channels_last_and_bfloat16_and_folded(dtype, prepare):
    student = prepare(student_of(dtype=torch.float32)).to(memory_format=torch.channels_last)
    images = inputs(dtype=torch.float32).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        means = so_far(student, images)
        found, expected = early_exit(student, images, middle(means)), cut(means, middle(means))
    assert found.logits.dtype == torch.float32 and not found.logits.requires_grad
    # in less than double precision another batch size may tip a spike, so not every sample need agree
    assert (found.steps == expected.steps).double().mean() > 0.7
    assert (found.logits.argmax(-1) == expected.logits.argmax(-1)).double().mean() > 0.7


def test_a_single_step_leaves_nothing_to_leave():
    student, images = student_of(), inputs()
    student.set_timesteps(1)
    found = early_exit(student, images, 1.0)
    assert found.steps.tolist() == [1] * BATCH
    torch.testing.assert_close(found.logits, so_far(student, images)[0])


class TestAWholeSet:
    @pytest.mark.parametrize("batch_size", [7, 48])
    def test_answers_as_its_batches_do_and_leaves_the_mode(self, blobs, batch_size):
        student = student_of(dtype=torch.float32).train()
        student.core.get_submodule("bn").eval()
        modes = [module.training for module in student.modules()]
        means = cumulative(predict(student, blobs.test_images))
        expected = cut(means, middle(means))
        found = predict_early(student, blobs.test_images, middle(means), batch_size=batch_size)
        assert (found.steps == expected.steps).double().mean() > 0.9
        assert (found.logits - expected.logits).abs().amax(-1).median() < 1e-4
        assert [module.training for module in student.modules()] == modes


class TestWrongUse:
    @pytest.mark.parametrize("confidence", [-0.1, 1.01, float("nan"), float("inf")])
    def test_a_confidence_that_is_no_probability_is_refused(self, confidence):
        with pytest.raises(ConfigError, match=r"confidence \(=.*\) .* 0 \(.*\) to 1 \("):
            early_exit(student_of(), inputs(), confidence)

    def test_a_student_in_training_mode_is_refused(self):
        with pytest.raises(ConfigError, match=r"training mode.*student\.eval\(\)"):
            early_exit(student_of().train(), inputs(), 0.5)

    def test_too_few_frames_are_refused(self):
        with pytest.raises(ShapeError, match="timesteps=5"):
            early_exit(student_of(FrameCoding()), inputs(FrameCoding())[:3], 0.5)
