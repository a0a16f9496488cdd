import pytest
import torch
import torch.nn.functional as F
from features import draw_feature
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from spikedistill.answer import Answer
from spikedistill.errors import ConfigError
from spikedistill.objective.features import (
    compare_features,
    feature_distance,
    make_adapter,
    make_adapters,
    margin_relu,
    match_size,
    stage_pairs,
)
from spikedistill.objective.terms import Batch

seeds = st.integers(0, 10**6)


def drawn(seed, *shape, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, dtype=torch.float64, generator=generator)


class TestFeatureDistance:
    @pytest.mark.parametrize("partial", [False, True])
    def test_is_0_where_both_are_equal(self, partial):
        assert feature_distance(drawn(0, 4, 3, 2, 2), drawn(0, 4, 3, 2, 2), partial) == 0

    def test_is_1_for_a_silent_student(self):
        teacher = drawn(0, 4, 3, 2, 2)
        assert float(feature_distance(torch.zeros_like(teacher), teacher)) == pytest.approx(1)

    @settings(max_examples=20)
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


def compared(student, teacher):
    """A batch of two samples with these features."""
    said = (Answer(torch.zeros(len(next(iter(each.values()))), 2, 4), each) for each in (student, teacher))
    return Batch(labels=torch.tensor([0, 1]), **dict(zip(("student", "teacher"), said)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["channels last", "vectors", "cut out of a larger map", "the same at every step"])
def test_features_of_one_shape_have_the_distance_of_their_mean_and_its_gradient(name, dtype):
    same = name == "the same at every step"
    given = draw_feature("channels last" if same else name, dtype).detach()
    given = (given[0] if same else given).requires_grad_()
    feature = given.expand(3, *given.shape) if same else given
    teacher = torch.randn(feature.shape[1:])
    batch = compared({"b": feature}, {"a": teacher[None]})
    distance = 2.0 * compare_features(batch, (("a", "b"),), nn.ModuleDict({"0": nn.Identity()}), False, False)
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

    def test_are_made_for_every_pair_by_its_number_from_the_mean_over_time(self):
        student = {"late": torch.zeros(3, 2, 4, 8, 8), "even": torch.zeros(3, 2, 6)}
        teacher = {"deep": torch.zeros(5, 2, 7, 8, 8), "flat": torch.zeros(1, 2, 6)}
        adapters = make_adapters(compared(student, teacher), (("deep", "late"), ("flat", "even")), always=False)
        assert list(adapters) == ["0", "1"]
        assert adapters["0"].weight.shape == (7, 4, 1, 1) and isinstance(adapters["1"], nn.Identity)


class TestCompareFeatures:
    pairs = (("a", "b"),)
    same = nn.ModuleDict({"0": nn.Identity()})

    def test_a_teacher_with_time_is_compared_by_its_mean(self):
        student, teacher = drawn(0, 3, 2, 5).float(), drawn(1, 4, 2, 5).float()
        found = compare_features(compared({"b": student}, {"a": teacher}), self.pairs, self.same, False, False)
        torch.testing.assert_close(found, feature_distance(student.mean(0), teacher.mean(0)))

    def test_pairs_left_open_say_how_to_close_them(self):
        batch = compared({"b": torch.zeros(3, 2, 5)}, {"a": torch.zeros(1, 2, 5)})
        with pytest.raises(
            ConfigError, match=r"pairs of features are left open: give \(teacher path, student path\), or"
        ):
            compare_features(batch, (), nn.ModuleDict(), False, False)


class Named:
    """A network of which only the paths matter."""

    def __init__(self, *paths):
        self.known = list(paths)

    def observe(self, inputs, paths=(), *, spikes=(), potentials=()):
        raise AssertionError("was asked")

    def paths(self):
        return self.known

    def layers(self):
        return []


class TestStagePairs:
    @pytest.mark.parametrize(
        "theirs, ours, pairs",
        [
            (
                ["stem", "layer1", "layer2"],
                ["layer1", "layer1.0", "layer2"],
                [("layer1", "layer1"), ("layer2", "layer2")],
            ),
            (["layer1", "layer2", "layer3"], ["stage1", "stage_2"], [("layer2", "stage1"), ("layer3", "stage_2")]),
            (["stage1"], ["layer1", "layer2"], [("stage1", "layer2")]),
        ],
    )
    def test_match_the_ends_of_stages_from_the_last_backwards(self, theirs, ours, pairs):
        assert stage_pairs(Named(*theirs), Named(*ours)) == tuple(pairs)

    @pytest.mark.parametrize("theirs, ours", [(["conv"], ["layer1"]), (["layer1"], ["xlayer1", "layer1.0"]), ([], [])])
    def test_without_stages_they_have_to_be_named(self, theirs, ours):
        with pytest.raises(ConfigError, match=r"No stages named layer1.*--pairs TEACHER-PATH STUDENT-PATH"):
            stage_pairs(Named(*theirs), Named(*ours))

    def test_without_a_teacher_there_are_none(self):
        with pytest.raises(ConfigError, match="needs a teacher, and no teacher was given"):
            stage_pairs(None, Named("layer1"))
