"""Cross KD against closed forms and independent code."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from spikedistill.answer import Answer
from spikedistill.errors import ConfigError
from spikedistill.objective.cross_kd import CrossKD, StepWeights, cross_entropies, linear_cka
from spikedistill.objective.logits import cross_entropy_per_step, soft_target_divergence
from spikedistill.objective.terms import Batch
from spikedistill.student.build import to_spiking
from spikedistill.student.coding import FrameCoding
from spikedistill.student.conversion import Conversion


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class TestCKA:
    def test_is_that_of_cross_covariances(self):
        """Kornblith et al., equation 4: |Y'X|^2 / (|X'X| |Y'Y|) of centred columns, in the space of features."""
        x, y = drawn(0, 20, 5).double().numpy(), drawn(1, 20, 3).double().numpy()
        x, y = x - x.mean(0), y - y.mean(0)
        norm = np.linalg.norm
        expected = norm(y.T @ x) ** 2 / (norm(x.T @ x) * norm(y.T @ y))
        found = linear_cka(torch.from_numpy(x), torch.from_numpy(y))
        assert float(found) == pytest.approx(expected, rel=1e-5)

    @given(scale=st.floats(0.1, 10), shift=st.floats(-5, 5), seed=st.integers(0, 100))
    def test_does_not_see_rotation_scale_and_shift(self, scale, shift, seed):
        x = drawn(seed, 12, 4)
        turn, _ = torch.linalg.qr(drawn(seed + 1, 4, 4))
        assert float(linear_cka(x, scale * x @ turn + shift)) == pytest.approx(1, abs=1e-3)

    def test_is_computed_in_float32_whatever_networks_compute_in(self):
        x, y = drawn(0, 40, 6), drawn(1, 40, 6)
        usual = linear_cka(x, y)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(linear_cka(x, y), usual)
            assert float(linear_cka(x, x)) == pytest.approx(1, abs=1e-5)

    def test_of_a_silent_layer_is_zero(self):
        assert float(linear_cka(drawn(0, 6, 3), torch.zeros(6, 2, 2))) == 0


def test_cross_entropies_average_to_that_of_all_steps():
    logits, labels = drawn(0, 3, 4, 5), torch.tensor([0, 1, 4, 2])
    torch.testing.assert_close(cross_entropies(logits, labels, 0.1).mean(), cross_entropy_per_step(logits, labels, 0.1))


@pytest.fixture
def batch():
    return Batch(
        labels=torch.tensor([0, 1, 2, 4]),
        student=Answer(drawn(0, 3, 4, 5), potentials={"last": drawn(1, 3, 4, 6)}),
        source=Answer(drawn(2, 3, 4, 5), potentials={"last": drawn(3, 3, 4, 6)}),
        teacher=Answer(drawn(4, 1, 4, 5)),
    )


def at(batch, progress):
    fields = ("labels", "student", "source", "teacher")
    return Batch(**{name: getattr(batch, name) for name in fields}, progress=torch.tensor(progress))


def test_learned_weights_never_take_the_events_away():
    """Where similarity costs less than cross-entropy, weights would all go to 1; relative ones cannot."""
    weights = StepWeights(4)
    optimiser = torch.optim.SGD(weights.parameters(), lr=1.0)
    for _ in range(200):
        optimiser.zero_grad()
        found = weights()
        ((1 - found) * torch.tensor([2.0, 1.0, 1.0, 1.0]) + found * 0.1).mean().backward()
        optimiser.step()
    assert weights.logits.std() > 0.1 and float(1 - weights().detach().mean()) > 0.3
    assert weights()[0] > 0.5 > weights()[1]


def test_its_terms_are_those_of_the_docstring(batch):
    made = CrossKD(layer="last", temperature=3.0, alpha=0.7, similarity=0.4, label_smoothing=0.1)
    assert made.needs.every_step
    modules = made.modules(batch, None)
    with torch.no_grad():
        modules["steps"].logits.copy_(torch.tensor([0.0, 1.0, -2.0]))
    terms = made(batch, modules)
    share = torch.tensor([1 / 3, 4 / 3, -5 / 3]).sigmoid()  # around their mean
    pairs = zip(batch.student.potentials["last"], batch.source.potentials["last"])
    apart = torch.stack([1 - linear_cka(ours, theirs) for ours, theirs in pairs])
    soft = soft_target_divergence(batch.source.logits.mean(0), batch.teacher.logits[0], 3.0)
    smooth = partial(F.cross_entropy, target=batch.labels, label_smoothing=0.1)
    each = torch.stack([smooth(step) for step in batch.student.logits])
    expected = {
        "events": ((1 - share) * each).mean(),
        "images": cross_entropy_per_step(batch.source.logits, batch.labels, 0.1),
        "soft": 0.7 * soft,
        "dissimilarity": 0.4 * (share * apart).mean(),
    }
    torch.testing.assert_close(terms, expected)


def test_the_teacher_speaks_in_the_first_phase_and_falls_silent(batch):
    made = CrossKD(similarity=0.0, switch=0.5, switch_width=0.2)
    said = [float(made(at(batch, progress), nn.ModuleDict())["soft"]) for progress in (0.0, 0.39, 0.5, 0.61, 1.0)]
    assert said[0] == said[1] > 0 and said[2] == pytest.approx(said[0] / 2, rel=1e-5) and said[3] == said[4] == 0


def test_without_similarity_labels_are_smoothed_too(batch):
    terms = CrossKD(similarity=0.0, label_smoothing=0.1)(batch, nn.ModuleDict())
    expected = torch.stack([F.cross_entropy(one, batch.labels, label_smoothing=0.1) for one in batch.student.logits])
    torch.testing.assert_close(terms["events"], expected.mean())


def test_events_alone_are_left_when_all_is_switched_off(batch):
    terms = CrossKD(similarity=0.0, alpha=0.0, replacement=0.0)(batch, nn.ModuleDict())
    torch.testing.assert_close(terms["events"], cross_entropy_per_step(batch.student.logits, batch.labels))
    assert terms["soft"] == 0 and CrossKD(replacement=0.0).needs.replacement == 0


def test_it_takes_the_last_layer_of_neurons(without_compiler):
    ann = nn.Sequential(nn.Flatten(), nn.Linear(32, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    conversion = Conversion(timesteps=2, coding=FrameCoding())
    student, _ = to_spiking(ann, conversion, calibration_images=torch.rand(4, 2, 4, 4))
    made = CrossKD().settled(None, student, False)
    assert made.needs.potentials == (student.layers()[-1],) and made.settled(None, student, False) == made
    assert CrossKD(similarity=0.0).settled(None, student, False).needs.potentials == ()


@pytest.mark.parametrize(
    "fields", [{"temperature": 0.0}, {"alpha": -1.0}, {"similarity": -1.0}, {"replacement": -1.0}, {"switch": 2.0}]
)
def test_values_outside_their_range_are_refused(fields):
    with pytest.raises(ConfigError, match="at" if "switch" in fields else next(iter(fields))):
        CrossKD(**fields)
