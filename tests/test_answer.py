import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from spikedistill.answer import Answer, Learner
from spikedistill.student.build import to_spiking
from spikedistill.student.conversion import Conversion
from spikedistill.teacher.load import Teacher, TrainableANN


def drawn(timesteps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    inner = (
        {path: torch.randn(timesteps, 2, *size, generator=generator) for path in "ab"} for size in ((3,), (4,), (5,))
    )
    return Answer(torch.randn(timesteps, 2, 6, generator=generator), *inner)


def tensors(answer):
    kinds = ("features", "spikes", "potentials")
    return [answer.logits, *(x for kind in kinds for _, x in sorted(getattr(answer, kind).items()))]


def network():
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))


class TestAveraged:
    @given(timesteps=st.integers(1, 6), seed=st.integers(0, 10**6))
    def test_every_tensor_becomes_its_mean_with_one_step(self, timesteps, seed):
        answer = drawn(timesteps, seed)
        for mean, whole in zip(tensors(answer.averaged()), tensors(answer), strict=True):
            torch.testing.assert_close(mean, whole.mean(0, keepdim=True))

    def test_what_has_one_step_is_handed_on(self):
        answer = drawn(1)
        assert answer.averaged() is answer

    def test_twice_is_once(self):
        once = drawn(4).averaged()
        assert once.averaged() is once

    def test_a_view_that_is_the_same_at_every_step_is_not_summed(self):
        still = torch.randn(2, 4)
        mean = Answer(torch.zeros(3, 2, 4), {"stem": still.expand(3, 2, 4)}).averaged().features["stem"]
        assert mean.shape == (1, 2, 4) and mean.data_ptr() == still.data_ptr()

    def test_its_gradient_is_spread_over_the_steps(self):
        answer = drawn(4)
        answer.logits.requires_grad_()
        answer.features["a"].requires_grad_()
        mean = answer.averaged()
        (mean.logits.sum() + 2 * mean.features["a"].sum()).backward()
        torch.testing.assert_close(answer.logits.grad, torch.full((4, 2, 6), 0.25))
        torch.testing.assert_close(answer.features["a"].grad, torch.full((4, 2, 3), 0.5))


class TestLearner:
    @pytest.mark.parametrize("wrap", [Teacher, TrainableANN])
    def test_is_what_ann_and_student_both_are(self, wrap):
        student, _ = to_spiking(network(), Conversion(timesteps=3, inherit=False))
        images = torch.rand(5, 1, 4, 4)
        for learner, timesteps, layers in ((student, 3, ["1"]), (wrap(network(), [0.3], [0.2]), 1, [])):
            assert isinstance(learner, Learner)
            answer = learner.observe(images, ["0", "1"])
            assert answer.logits.shape == (timesteps, 5, 3)
            assert {path: x.shape for path, x in answer.features.items()} == dict.fromkeys(
                "01", (timesteps, 5, 2, 2, 2)
            )
            assert {"0", "1"} <= set(learner.paths()) and learner.layers() == layers

    def test_a_plain_network_is_none(self):
        assert not isinstance(network(), Learner)
