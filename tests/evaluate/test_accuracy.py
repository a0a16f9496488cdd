import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from spikedistill.errors import ConfigError
from spikedistill.evaluate.accuracy import accuracy_by_step, cumulative, predict
from spikedistill.evaluate.agreement import agreement, divergence
from spikedistill.student.build import to_spiking
from spikedistill.student.conversion import Conversion


class Steps(nn.Module):
    """Answers at two steps of time: the given network's logits, and their double."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, images):
        logits = self.network(images)
        return torch.stack([logits, 2 * logits])


@pytest.fixture
def network():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, 3)
    )


def drawn(seed, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class TestCumulative:
    def test_is_the_mean_of_the_steps_so_far(self):
        logits = drawn(0, 5, 3, 4)
        expected = [sum(logits[: step + 1]) / (step + 1) for step in range(5)]
        torch.testing.assert_close(cumulative(logits), torch.stack(expected))

    @settings(max_examples=20)
    @given(seed=st.integers(0, 10**6), steps=st.integers(1, 6))
    def test_ends_at_the_mean_and_begins_at_the_first_step(self, seed, steps):
        logits = drawn(seed, steps, 2, 3)
        torch.testing.assert_close(cumulative(logits)[-1], logits.mean(0))
        torch.testing.assert_close(cumulative(logits)[0], logits[0])


class TestAccuracyByStep:
    def test_counts_right_answers_in_percent_after_each_step(self):
        first = [[2.0, 0.0], [2.0, 0.0], [0.0, 2.0], [0.0, 2.0]]
        second = [[0.0, 1.0], [0.0, 3.0], [0.0, 1.0], [3.0, 0.0]]
        labels = torch.tensor([0, 1, 1, 1])
        assert accuracy_by_step(torch.tensor([first, second]), labels) == [75.0, 75.0]
        assert accuracy_by_step(torch.tensor([second, first]), labels) == [50.0, 75.0]

    @settings(max_examples=20)
    @given(seed=st.integers(0, 10**6), steps=st.integers(1, 4))
    def test_counts_the_largest_mean_logit_of_each_sample_in_any_order(self, seed, steps):
        logits, order = drawn(seed, steps, 7, 3), torch.tensor([3, 1, 6, 0, 2, 5, 4])
        labels = torch.arange(7) % 3
        shown = accuracy_by_step(logits, labels)
        rows = logits.tolist()
        for step in range(steps):
            sums = [[sum(rows[t][n][k] for t in range(step + 1)) for k in range(3)] for n in range(7)]
            hits = sum(row.index(max(row)) == label for row, label in zip(sums, labels.tolist()))
            assert shown[step] == pytest.approx(100 * hits / 7)
        assert len(shown) == steps
        assert accuracy_by_step(logits[:, order], labels[order]) == pytest.approx(shown)

    def test_of_its_own_answers_is_100(self):
        logits = drawn(0, 1, 9, 3)
        assert accuracy_by_step(logits, logits[0].argmax(-1)) == [100.0]


class TestAnswers:
    @pytest.mark.parametrize("batch_size", [1, 7, 48, 100])
    def test_are_those_of_the_whole_set_in_evaluation_mode_whatever_the_batch(self, network, blobs, batch_size):
        expected = network.eval()(blobs.test_images / 255.0)
        network.train()
        logits = predict(network, blobs.test_images, batch_size=batch_size)
        torch.testing.assert_close(logits, expected[None].detach())

    def test_keep_the_steps_of_a_network_with_time(self, network, blobs):
        logits = predict(Steps(network), blobs.test_images, batch_size=20)
        assert logits.shape == (2, 48, 3)
        torch.testing.assert_close(logits, torch.stack([logits[0], 2 * logits[0]]))
        torch.testing.assert_close(logits[:1], predict(network, blobs.test_images, batch_size=20))

    @pytest.mark.parametrize("training", [True, False])
    def test_leave_every_layer_in_the_mode_it_was_in(self, network, blobs, training):
        network.train(training)
        network[1].eval()
        modes = [module.training for module in network.modules()]
        predict(network, blobs.test_images)
        assert [module.training for module in network.modules()] == modes

    def test_carry_no_gradient(self, network, blobs):
        assert not predict(network, blobs.test_images).requires_grad

    def test_of_a_network_in_channels_last_are_the_same(self, network, blobs):
        logits = predict(network, blobs.test_images)
        network.to(memory_format=torch.channels_last)
        torch.testing.assert_close(predict(network, blobs.test_images), logits)

    def test_in_bfloat16_are_near_and_come_back_as_floats(self, network, blobs):
        logits, exact = (predict(network, blobs.test_images, dtype) for dtype in (torch.bfloat16, torch.float32))
        assert logits.dtype == torch.float32
        assert not torch.equal(logits, exact)
        torch.testing.assert_close(logits, exact, atol=0.05, rtol=0.05)


class TestNotFinite:
    """Logits that are no numbers are handed on as they are, and no figure is made of them."""

    def test_predictions_of_a_broken_network_are_nan(self):
        network = nn.Sequential(nn.Flatten(), nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 3))
        student, _ = to_spiking(network, Conversion(timesteps=2, inherit=False))
        for layer in student.neurons.values():
            layer.backend = "reference"
        student.core.get_submodule("1").weight.data.fill_(torch.inf)
        assert predict(student, torch.full((2, 1, 2, 2), 9, dtype=torch.uint8)).isnan().all()

    @pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
    def test_no_accuracy_or_agreement_is_made_of_them(self, value):
        logits, clean = torch.randn(2, 5, 3), torch.randn(5, 3)
        logits[1, 3, 0] = value
        message = "The logits of 1 of 5 samples hold NaN or infinity, the first at sample 3"
        for figure in (
            lambda: accuracy_by_step(logits, torch.zeros(5, dtype=torch.long)),
            *(lambda: agreement(logits, clean), lambda: divergence(logits, clean)),
            *(lambda: agreement(clean[None], logits[1]), lambda: divergence(clean[None], logits[1])),
        ):
            with pytest.raises(ConfigError, match=message):
                figure()
