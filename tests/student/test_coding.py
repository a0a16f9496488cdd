import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spikedistill.errors import ShapeError
from spikedistill.student.coding import CODINGS, Coding, DirectCoding, FrameCoding, LatencyCoding, RateCoding

law = settings(max_examples=50)
BYTES = st.lists(st.integers(0, 255), min_size=1, max_size=12)
LENGTHS = st.integers(1, 16)


def image(values: list[int]) -> torch.Tensor:
    """One image a row of pixels, raw between 0 and 1."""
    return torch.tensor(values, dtype=torch.float32).view(1, 1, 1, -1) / 255


@pytest.mark.parametrize("coding", [DirectCoding(), RateCoding(seed=3), LatencyCoding()], ids=repr)
@pytest.mark.parametrize("timesteps", [1, 4])
def test_a_whole_input_is_its_frames_one_after_another(coding, timesteps):
    images = torch.rand(3, 2, 4, 4)
    rows, repeats = coding.encode(images, timesteps)
    frames = [coding.frame(images, t, timesteps) for t in range(timesteps)]
    assert torch.equal(torch.cat([rows] * repeats), torch.cat(frames))
    assert repeats * len(rows) == timesteps * 3 and rows.dtype == images.dtype


class TestDirect:
    def test_uses_the_image_itself_at_every_step(self):
        images = torch.rand(2, 3, 4, 4)
        rows, repeats = DirectCoding().encode(images, 6)
        assert rows is images and repeats == 6


class TestFrames:
    def test_rows_are_time_by_batch(self):
        frames = torch.arange(12.0).view(3, 2, 1, 1, 2)
        rows, repeats = FrameCoding().encode(frames, 3)
        assert repeats == 1 and rows.flatten(1).tolist() == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11]]
        assert torch.equal(torch.cat([FrameCoding().frame(frames, t, 3) for t in range(3)]), rows)

    @pytest.mark.parametrize("shape", [(4, 2, 1, 3, 3), (3, 5)])
    def test_another_number_of_frames_is_refused(self, shape):
        with pytest.raises(ShapeError, match=r"timesteps=3: expected \[T, B, ...\]; bin the events into T frames"):
            FrameCoding().encode(torch.rand(shape), 3)


class TestRate:
    def test_the_mean_over_many_draws_is_the_pixel(self):
        levels = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0])
        rows, repeats = RateCoding().encode(levels.view(5, 1).expand(5, 4000), 10)
        spikes = rows.view(10, 5, 4000)
        assert repeats == 1 and set(spikes.unique().tolist()) == {0.0, 1.0}
        # five standard deviations of the mean of 40000 draws
        deviation = (levels * (1 - levels) / 40_000).sqrt()
        assert ((spikes.mean((0, 2)) - levels).abs() <= 5 * deviation).all()

    def test_steps_are_drawn_apart(self):
        rows, _ = RateCoding(seed=0).encode(torch.full((1, 10_000), 0.5), 2)
        both = rows.prod(0).mean()
        assert abs(float(both) - 0.25) <= 5 * (0.25 * 0.75 / 10_000) ** 0.5

    def test_a_seed_repeats_and_no_seed_does_not(self):
        images = torch.rand(2, 1, 8, 8)
        first, again, other = (RateCoding(seed=seed).encode(images, 3)[0] for seed in (1, 1, 7))
        assert torch.equal(first, again) and not torch.equal(first, other)
        assert not torch.equal(RateCoding().encode(images, 3)[0], RateCoding().encode(images, 3)[0])

    def test_a_seed_leaves_the_global_generator_alone(self):
        torch.manual_seed(5)
        expected = torch.rand(3)
        torch.manual_seed(5)
        RateCoding(seed=1).encode(torch.rand(1, generator=torch.Generator()), 4)
        assert torch.equal(torch.rand(3), expected)

    def test_pixels_outside_their_range_are_clipped(self):
        rows, _ = RateCoding().encode(torch.tensor([[-0.5, 1.5]]), 20)
        assert rows.mean(0).tolist() == [0.0, 1.0]


class TestLatency:
    @law
    @given(values=BYTES, timesteps=LENGTHS)
    def test_every_pixel_spikes_once_and_black_never(self, values, timesteps):
        rows, repeats = LatencyCoding().encode(image(values), timesteps)
        assert repeats == 1 and rows.shape[0] == timesteps
        assert rows.sum(0).flatten().tolist() == [float(value > 0) for value in values]

    @law
    @given(values=BYTES, timesteps=LENGTHS)
    def test_brighter_is_not_later(self, values, timesteps):
        rows, _ = LatencyCoding().encode(image(sorted(value for value in values if value) or [1]), timesteps)
        assert (rows.argmax(0).flatten().diff() <= 0).all()

    def test_four_steps_by_hand(self):
        rows, _ = LatencyCoding().encode(torch.tensor([[1.0, 0.8, 0.75, 0.5, 0.3, 0.1, 0.0]]), 4)
        assert rows.tolist() == [
            [1, 1, 0, 0, 0, 0, 0],
            [0, 0, 1, 0, 0, 0, 0],
            [0, 0, 0, 1, 1, 0, 0],
            [0, 0, 0, 0, 0, 1, 0],
        ]


def test_every_name_makes_a_coding():
    assert all(isinstance(coding(), Coding) for coding in CODINGS.values())


@pytest.mark.parametrize("coding", [DirectCoding(), RateCoding(), RateCoding(seed=3), LatencyCoding()], ids=repr)
def test_a_pixel_that_is_not_finite_stays_so_at_every_step_and_no_other_changes(coding):
    images = torch.rand(2, 1, 2, 3)
    broken = images.clone()
    broken[0, 0, 0], broken[1, 0, 1, 0] = torch.tensor([torch.nan, torch.inf, -torch.inf]), torch.nan
    lost = ~broken.isfinite()
    for t in range(3):
        with torch.random.fork_rng():
            expected = coding.frame(images, t, 3)
        found = coding.frame(broken, t, 3)
        assert torch.equal(~found.isfinite(), lost) and torch.equal(found[~lost], expected[~lost])
