import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from spikedistill.errors import ConfigError
from spikedistill.objective.direct import Direct, cross_entropy_of_mean
from spikedistill.objective.kdsnn import (
    KDSNN,
    KDSNNFeature,
    KDSNNResponse,
    feature_distance,
    make_adapter,
    margin_relu,
    match_size,
    over_time,
    soft_labels,
)
from spikedistill.objective.terms import Batch, total

NONE = nn.ModuleDict()
PAIRS = (("deep", "late"), ("flat", "even"))
seeds = st.integers(0, 10**6)


def drawn(seed, *shape, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, dtype=torch.float64, generator=generator)


def probabilities(logits):
    raised = np.exp(logits - logits.max(-1, keepdims=True))
    return raised / raised.sum(-1, keepdims=True)


@pytest.fixture
def batch():
    """Two pairs of features: maps with other channels and sizes, and vectors of equal length."""
    return Batch(
        drawn(0, 3, 4, 5).float(),
        torch.tensor([0, 1, 2, 4]),
        {"late": drawn(1, 3, 4, 2, 4, 4).float(), "even": drawn(2, 3, 4, 6).float()},
        drawn(3, 4, 5).float(),
        {"deep": drawn(4, 4, 3, 2, 2).float(), "flat": drawn(5, 4, 6).float()},
    )


class TestSoftLabels:
    @pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
    def test_are_numpys_divergence_times_the_squared_temperature(self, temperature):
        student, teacher = drawn(0, 4, 5, scale=3.0), drawn(1, 4, 5, scale=3.0)
        p, q = (probabilities(logits.numpy() / temperature) for logits in (teacher, student))
        expected = temperature**2 * np.mean(np.sum(p * np.log(p / q), axis=-1))
        assert float(soft_labels(student, teacher, temperature)) == pytest.approx(expected, rel=1e-9)

    @settings(deadline=None, max_examples=30)
    @given(seed=seeds, temperature=st.floats(0.5, 20))
    def test_of_the_teachers_own_answer_cost_nothing_and_others_no_less(self, seed, temperature):
        student, teacher = drawn(seed, 3, 4), drawn(seed + 1, 3, 4)
        assert float(soft_labels(teacher, teacher, temperature)) == pytest.approx(0, abs=1e-12)
        assert float(soft_labels(teacher + 7.0, teacher, temperature)) == pytest.approx(0, abs=1e-9)
        assert soft_labels(student, teacher, temperature) > 0

    @settings(deadline=None, max_examples=30)
    @given(seed=seeds)
    def test_approach_the_squared_difference_of_centred_logits_as_the_temperature_grows(self, seed):
        student, teacher = drawn(seed, 3, 4, scale=2.0), drawn(seed + 1, 3, 4, scale=2.0)
        difference = (teacher - teacher.mean(-1, keepdim=True)) - (student - student.mean(-1, keepdim=True))
        expected = difference.square().sum(-1).mean() / (2 * 4)
        assert float(soft_labels(student, teacher, 1e5)) == pytest.approx(float(expected), rel=1e-3, abs=1e-5)

    @pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
    def test_have_the_gradient_of_the_difference_of_probabilities(self, temperature):
        student, teacher = drawn(0, 4, 5).requires_grad_(), drawn(1, 4, 5)
        soft_labels(student, teacher, temperature).backward()
        p, q = (probabilities(logits.detach().numpy() / temperature) for logits in (teacher, student))
        np.testing.assert_allclose(student.grad, temperature * (q - p) / 4, atol=1e-12)

    def test_have_the_gradient_that_differences_give(self):
        student, teacher = drawn(0, 2, 3).requires_grad_(), drawn(1, 2, 3)
        assert torch.autograd.gradcheck(lambda answer: soft_labels(answer, teacher, 2.0), student)


class TestFeatureDistance:
    @pytest.mark.parametrize("partial", [False, True])
    def test_is_0_where_both_are_equal(self, partial):
        assert feature_distance(drawn(0, 4, 3, 2, 2), drawn(0, 4, 3, 2, 2), partial) == 0

    def test_is_1_for_a_silent_student(self):
        teacher = drawn(0, 4, 3, 2, 2)
        assert float(feature_distance(torch.zeros_like(teacher), teacher)) == pytest.approx(1)

    @settings(deadline=None, max_examples=20)
    @given(seed=seeds, scale=st.floats(0.1, 10))
    def test_does_not_depend_on_the_scale_of_both(self, seed, scale):
        student, teacher = drawn(seed, 4, 3), drawn(seed + 1, 4, 3)
        torch.testing.assert_close(
            feature_distance(scale * student, scale * teacher), feature_distance(student, teacher)
        )

    def test_partially_does_not_count_a_student_below_a_teacher_that_is_not_positive(self):
        teacher = torch.tensor([[-1.0, -1.0, 0.0, 0.0, 2.0, 2.0]])
        student = torch.tensor([[-3.0, 1.0, -1.0, 1.0, 1.0, 5.0]])
        assert float(feature_distance(student, teacher)) == pytest.approx((4 + 4 + 1 + 1 + 1 + 9) / 10)
        assert float(feature_distance(student, teacher, partial=True)) == pytest.approx((0 + 4 + 0 + 1 + 1 + 9) / 10)

    def test_has_no_gradient_where_it_does_not_count(self):
        student = torch.tensor([[-3.0, 1.0, 1.0]], requires_grad=True)
        feature_distance(student, torch.tensor([[-1.0, -1.0, 2.0]]), partial=True).backward()
        torch.testing.assert_close(student.grad, torch.tensor([[0.0, 2 * 2.0, 2 * -1.0]]) / 6)

    def test_of_a_silent_teacher_is_finite(self):
        assert torch.isfinite(feature_distance(torch.zeros(2, 3), torch.zeros(2, 3)))


class TestMarginReLU:
    def test_lifts_every_channel_to_its_mean_negative_response(self):
        teacher = torch.tensor([[[[-1.0, 2.0]], [[0.0, 5.0]]], [[[-3.0, -2.0]], [[1.0, 0.5]]]])
        lifted = torch.tensor([[[[-1.0, 2.0]], [[0.0, 5.0]]], [[[-2.0, -2.0]], [[1.0, 0.5]]]])
        torch.testing.assert_close(margin_relu(teacher), lifted)

    def test_of_vectors_counts_over_the_batch(self):
        torch.testing.assert_close(
            margin_relu(torch.tensor([[-4.0], [-2.0], [7.0]])), torch.tensor([[-3.0], [-2.0], [7.0]])
        )

    def test_leaves_what_is_not_negative(self):
        teacher = drawn(0, 3, 2, 2, 2).abs()
        torch.testing.assert_close(margin_relu(teacher), teacher, rtol=0, atol=0)


def draw_feature(name, dtype):
    """A feature ``[T, B, ...]`` of three steps, in one of the orders of memory that networks hand on."""
    rows = torch.randn(3 * 2, 4, 6, 5).to(dtype)
    return {
        "channels first": lambda: rows.unflatten(0, (3, 2)),
        "channels last": lambda: rows.contiguous(memory_format=torch.channels_last).unflatten(0, (3, 2)),
        "vectors": lambda: rows[:, :, 0, 0].contiguous().unflatten(0, (3, 2)),
        "cut out of a larger map": lambda: rows.unflatten(0, (3, 2))[..., 1:4, ::2],
        "time behind the batch": lambda: rows.unflatten(0, (2, 3)).transpose(0, 1),
    }[name]()


class TestOverTime:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
    @pytest.mark.parametrize(
        "name", ["channels first", "channels last", "vectors", "cut out of a larger map", "time behind the batch"]
    )
    def test_is_the_mean_with_its_gradient_and_the_order_of_memory_stays(self, name, dtype):
        torch.manual_seed(0)
        feature = draw_feature(name, dtype).detach().requires_grad_()
        weight = torch.randn(feature.shape[1:]).to(dtype)
        mean = over_time(feature)
        assert mean.stride() == torch.empty_like(feature[0]).stride()
        torch.testing.assert_close(mean, feature.detach().double().mean(0).to(dtype))
        (found,) = torch.autograd.grad((mean * weight).sum(), feature)
        torch.testing.assert_close(found, (weight.double() / 3).to(dtype).expand_as(feature))

    def test_autocast_does_not_round_it(self):
        feature = torch.randn(3, 2, 4)
        with torch.autocast("cpu", torch.bfloat16):
            assert over_time(feature).dtype == torch.float32

    def test_what_is_the_same_at_every_step_is_handed_on(self):
        feature = torch.randn(2, 4).expand(3, 2, 4)
        assert over_time(feature).data_ptr() == feature.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["channels last", "vectors", "cut out of a larger map", "the same at every step"])
def test_features_of_one_shape_have_the_distance_of_their_mean_and_its_gradient(name, dtype):
    same = name == "the same at every step"
    given = draw_feature("channels last" if same else name, dtype).detach()
    given = (given[0] if same else given).requires_grad_()
    feature = given.expand(3, *given.shape) if same else given
    teacher, labels = torch.randn(feature.shape[1:]), torch.tensor([0, 1])
    objective = KDSNNFeature(pairs=(("a", "b"),), weight=2.0)
    batch = Batch(torch.zeros(3, 2, 4), labels, {"b": feature}, None, {"a": teacher})
    distance = objective(batch, objective.adapters(batch))["features"]
    (found,) = torch.autograd.grad(distance, given)
    exact = given.detach().double().requires_grad_()
    mean = exact if same else exact.mean(0)
    expected = 2.0 * F.mse_loss(mean, teacher.double()) / teacher.double().square().mean()
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(distance.double(), expected, rtol=tolerance, atol=0)
    (wanted,) = torch.autograd.grad(expected, exact)
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=tolerance * float(wanted.abs().max()))


class TestMatchSize:
    @pytest.mark.parametrize("first, second", [(4, 2), (2, 4)])
    def test_the_larger_map_is_averaged_to_the_smaller(self, first, second):
        maps = {4: torch.arange(16.0).view(1, 1, 4, 4), 2: torch.zeros(1, 1, 2, 2)}
        pooled = torch.tensor([[[[2.5, 4.5], [10.5, 12.5]]]])
        expected = {4: pooled, 2: maps[2]}
        matched = match_size(maps[first], maps[second])
        torch.testing.assert_close(matched, (expected[first], expected[second]))

    def test_each_side_is_matched_on_its_own(self):
        student, teacher = match_size(torch.zeros(2, 3, 8, 2), torch.zeros(2, 5, 4, 4))
        assert (student.shape, teacher.shape) == ((2, 3, 4, 2), (2, 5, 4, 2))

    def test_equal_maps_and_vectors_stay_as_they_are(self):
        for shape in ((2, 3, 4, 4), (2, 3)):
            pair = (drawn(0, *shape), drawn(1, *shape))
            torch.testing.assert_close(match_size(*pair), pair, rtol=0, atol=0)


class TestAdapters:
    @pytest.mark.parametrize("size", [(8, 8), ()])
    def test_equal_channels_need_no_weights_unless_asked_for(self, size):
        student, teacher = torch.zeros(2, 3, *size), torch.zeros(2, 3, *size)
        assert isinstance(make_adapter(student, teacher, always=False), nn.Identity)
        assert [weight.shape[:2] for weight in make_adapter(student, teacher, always=True).parameters()] == [(3, 3)]

    @pytest.mark.parametrize("size", [(8, 8), ()])
    @pytest.mark.parametrize("always", [False, True])
    def test_other_channels_become_the_teachers_pixel_by_pixel(self, size, always):
        student = drawn(0, 2, 3, *size).float()
        adapter = make_adapter(student, torch.zeros(2, 5, *size), always)
        (weight,) = adapter.parameters()
        expected = torch.einsum("oi,bi...->bo...", weight.flatten(1), student)
        torch.testing.assert_close(adapter(student), expected)

    @pytest.mark.parametrize("student, teacher", [((2, 3), (2, 3, 4, 4)), ((2, 3, 4), (2, 3, 4))])
    def test_maps_and_vectors_cannot_be_paired(self, student, teacher):
        with pytest.raises(ConfigError, match="cannot be compared: pair maps"):
            make_adapter(torch.zeros(student), torch.zeros(teacher), always=False)

    @pytest.mark.parametrize("kind", [KDSNNFeature, KDSNN])
    @pytest.mark.parametrize("adapt, weights", [(False, ["0.weight"]), (True, ["0.weight", "1.weight"])])
    def test_there_is_one_for_each_pair_with_weights_where_they_are_needed(self, batch, kind, adapt, weights):
        adapters = kind(PAIRS, adapt=adapt).adapters(batch)
        assert list(adapters) == ["0", "1"]
        assert [name for name, _ in adapters.named_parameters()] == weights


class TestResponse:
    def test_its_terms_are_the_mixed_labels_and_answers(self, batch):
        terms = KDSNNResponse(temperature=3.0, alpha=0.4)(batch, NONE)
        assert terms.keys() == {"labels", "soft"}
        hard = cross_entropy_of_mean(batch.logits, batch.labels)
        torch.testing.assert_close(terms["labels"], 0.6 * hard)
        torch.testing.assert_close(terms["soft"], 0.4 * soft_labels(batch.logits.mean(0), batch.teacher_logits, 3.0))

    def test_with_alpha_0_it_is_training_on_labels(self, batch):
        torch.testing.assert_close(
            total(KDSNNResponse(alpha=0.0, label_smoothing=0.1)(batch, NONE)), total(Direct(0.1)(batch, NONE))
        )

    def test_with_alpha_1_it_forgets_the_labels(self, batch):
        other = Batch(batch.logits, batch.labels.flip(0), teacher_logits=batch.teacher_logits)
        first, second = (total(KDSNNResponse(alpha=1.0)(each, NONE)) for each in (batch, other))
        torch.testing.assert_close(first, second)
        torch.testing.assert_close(first, soft_labels(batch.logits.mean(0), batch.teacher_logits, 2.0))


class TestFeature:
    def test_its_features_are_the_weighted_mean_distance_over_pairs(self, batch):
        objective = KDSNNFeature(PAIRS, weight=2.0)
        adapters = objective.adapters(batch)
        terms = objective(batch, adapters)
        adapted = torch.einsum("oi,bihw->bohw", adapters["0"].weight[:, :, 0, 0], batch.features["late"].mean(0))
        small = adapted.unflatten(-1, (2, 2)).unflatten(-3, (2, 2)).mean((-1, -3))
        deep, flat = batch.teacher_features["deep"], batch.teacher_features["flat"]
        first = (small - deep).square().sum() / deep.square().sum()
        second = (batch.features["even"].mean(0) - flat).square().sum() / flat.square().sum()
        torch.testing.assert_close(terms["features"], 2.0 * (first + second) / 2)
        torch.testing.assert_close(terms["labels"], cross_entropy_of_mean(batch.logits, batch.labels))

    def test_margin_and_partial_are_those_of_the_functions(self, batch):
        pairs = (("flat", "even"),)
        objective = KDSNNFeature(pairs, margin=True, partial=True)
        lifted = margin_relu(batch.teacher_features["flat"])
        expected = feature_distance(batch.features["even"].mean(0), lifted, partial=True)
        torch.testing.assert_close(objective(batch, objective.adapters(batch))["features"], expected)

    def test_with_weight_0_it_is_training_on_labels(self, batch):
        objective = KDSNNFeature(PAIRS, weight=0.0)
        torch.testing.assert_close(total(objective(batch, objective.adapters(batch))), total(Direct()(batch, NONE)))

    def test_its_gradient_reaches_the_features_and_the_adapter(self, batch):
        batch.features["late"].requires_grad_()
        objective = KDSNNFeature(PAIRS)
        adapters = objective.adapters(batch)
        objective(batch, adapters)["features"].backward()
        assert batch.features["late"].grad.abs().sum() > 0
        assert adapters["0"].weight.grad.abs().sum() > 0


def test_both_forms_at_once_are_their_terms_together(batch):
    settings = {"weight": 2.0, "margin": True, "partial": True, "label_smoothing": 0.1}
    adapters = KDSNN(PAIRS).adapters(batch)
    terms = KDSNN(PAIRS, temperature=3.0, alpha=0.4, **settings)(batch, adapters)
    answered = KDSNNResponse(3.0, 0.4, 0.1)(batch, NONE)
    compared = KDSNNFeature(PAIRS, **settings)(batch, adapters)
    assert terms.keys() == {"labels", "soft", "features"}
    torch.testing.assert_close(terms, {**answered, "features": compared["features"]})


@pytest.mark.parametrize("kind", [KDSNNResponse, KDSNN])
@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": 0.0},
        {"temperature": -1.0},
        {"temperature": float("inf")},
        {"alpha": -0.1},
        {"alpha": 1.1},
        {"label_smoothing": 1.1},
    ],
    ids=repr,
)
def test_a_constant_of_the_response_outside_its_range_is_refused(kind, wrong):
    name, value = next(iter(wrong.items()))
    with pytest.raises(ConfigError, match=rf"{name} \(={value}\)"):
        kind(**wrong) if kind is KDSNNResponse else kind(pairs=PAIRS, **wrong)


@pytest.mark.parametrize("kind", [KDSNNFeature, KDSNN])
@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"pairs": ()}, r"at least one pair \(teacher path, student path\)"),
        ({"weight": -0.5}, r"weight \(=-0\.5\)"),
        ({"weight": float("nan")}, r"weight \(=nan\)"),
        ({"label_smoothing": -0.1}, "label_smoothing"),
    ],
)
def test_a_constant_of_the_features_outside_its_range_is_refused(kind, wrong, message):
    with pytest.raises(ConfigError, match=message):
        kind(**{"pairs": PAIRS, **wrong})
