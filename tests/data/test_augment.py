import itertools
import random

import pytest
import torch

from spikedistill.data.augment import (
    Augment,
    alternating_flip,
    random_crop,
    random_cutout,
    random_noise,
    random_zoom,
    to_inputs,
    to_unit,
)
from spikedistill.errors import ConfigError

EVERYTHING = Augment(crop=2, flip=True, cutout=3, policy="trivial", noise=0.1, zoom=0.6)
EACH = [
    Augment(crop=2),
    Augment(flip=True),
    Augment(cutout=3),
    Augment(policy="trivial"),
    Augment(policy="autoaugment"),
    Augment(noise=0.1),
    Augment(zoom=0.5),
    EVERYTHING,
]


@pytest.fixture
def pixels():
    return torch.randint(1, 256, (32, 3, 6, 8), dtype=torch.uint8)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def window(image, pad, top, left):
    """One pixel at a time: the image moved by the offset, black where there was nothing."""
    _, height, width = image.shape
    cut = torch.zeros_like(image)
    for row in range(height):
        for column in range(width):
            there, across = row + top - pad, column + left - pad
            if 0 <= there < height and 0 <= across < width:
                cut[:, row, column] = image[:, there, across]
    return cut


def square(height, width, side, centre_row, centre_column):
    """One pixel at a time: which pixels a square about a centre covers."""
    covered = torch.zeros(height, width, dtype=torch.bool)
    for row in range(centre_row - side // 2, centre_row - side // 2 + side):
        for column in range(centre_column - side // 2, centre_column - side // 2 + side):
            if 0 <= row < height and 0 <= column < width:
                covered[row, column] = True
    return covered


@pytest.mark.parametrize("augment", EACH)
@pytest.mark.parametrize("rows", [slice(0, 8), slice(8, 32), slice(31, 32)])
def test_some_rows_have_the_bits_that_they_have_in_the_whole_batch(augment, rows, pixels):
    turned = torch.arange(32) % 3 == 0
    assert torch.equal(augment(pixels, 5, turned, rows), augment(pixels, 5, turned)[rows])
    assert torch.equal(augment(pixels, 5, None, rows), augment(pixels, 5)[rows])


def test_nothing_asked_only_divides_by_255(pixels):
    torch.testing.assert_close(Augment()(pixels, 0), pixels.float() / 255, rtol=0, atol=0)


def test_bytes_become_numbers_from_0_to_1():
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    expected = [value / 255 for value in range(256)]
    assert to_unit(every).flatten().tolist() == pytest.approx(expected, abs=1e-7)


class TestToInputs:
    def test_images_become_numbers_from_0_to_1(self, pixels):
        assert torch.equal(to_inputs(pixels), to_unit(pixels))

    def test_frames_get_time_in_front_and_keep_their_counts(self):
        stored = torch.randint(0, 256, (3, 4, 2, 5, 6), dtype=torch.uint8)
        frames = to_inputs(stored)
        assert frames.shape == (4, 3, 2, 5, 6) and frames.dtype == torch.float32
        for sample, step in itertools.product(range(3), range(4)):
            assert torch.equal(frames[step, sample], stored[sample, step].float())

    @pytest.mark.parametrize("shape", [(3, 2, 5, 6), (3, 4, 2, 5, 6)])
    def test_stored_bytes_stay_as_they_are(self, shape):
        stored = torch.full(shape, 7, dtype=torch.uint8)
        to_inputs(stored).zero_()
        assert (stored == 7).all()


@pytest.mark.parametrize("augment", EACH, ids=repr)
class TestLaws:
    def test_a_seed_gives_the_same_bits_and_another_seed_others(self, augment, pixels):
        assert torch.equal(augment(pixels, 5), augment(pixels, 5))
        assert not torch.equal(augment(pixels, 5), augment(pixels, 6))

    def test_images_keep_their_shape_and_lie_between_0_and_1(self, augment, pixels):
        images = augment(pixels, 0)
        assert images.shape == pixels.shape
        assert images.dtype == torch.float32
        assert images.min() >= 0
        assert images.max() <= 1

    def test_no_global_random_numbers_are_used(self, augment, pixels):
        before, python = torch.get_rng_state(), random.getstate()
        augment(pixels, 0)
        assert torch.equal(torch.get_rng_state(), before)
        assert random.getstate() == python

    def test_the_stored_bytes_stay_as_they_are(self, augment, pixels):
        kept = pixels.clone()
        augment(pixels, 0)
        assert torch.equal(pixels, kept)

    @pytest.mark.parametrize("count", [1, 3])
    def test_a_small_grey_batch_is_taken_too(self, augment, pixels, count):
        assert augment(pixels[:count, :1], 0).shape == (count, 1, 6, 8)


class TestCrop:
    def test_every_output_is_a_window_of_the_padded_image_with_all_channels_alike(self, pixels):
        cropped = random_crop(pixels, 2, seeded())
        for image, output in zip(pixels, cropped):
            windows = [window(image, 2, top, left) for top in range(5) for left in range(5)]
            assert sum(torch.equal(output, candidate) for candidate in windows) == 1

    def test_mirrored_borders_are_those_of_torch(self, pixels):
        mirrored = torch.nn.functional.pad(pixels.float(), (2, 2, 2, 2), mode="reflect").to(torch.uint8)
        for number, output in enumerate(random_crop(pixels, 2, seeded(), mirror=True)):
            height, width = pixels.shape[-2:]
            windows = [
                mirrored[number, :, top : top + height, left : left + width] for top in range(5) for left in range(5)
            ]
            assert any(torch.equal(output, candidate) for candidate in windows)
        one = torch.full((2, 1, 1, 1), 7, dtype=torch.uint8)
        assert torch.equal(random_crop(one, 3, seeded(), mirror=True), one)

    def test_every_place_is_reached(self):
        image = torch.arange(1, 13, dtype=torch.uint8).view(1, 1, 3, 4)
        outputs = random_crop(image.expand(400, 1, 3, 4), 1, seeded())
        reached = {tuple(output.flatten().tolist()) for output in outputs}
        assert reached == {
            tuple(window(image[0], 1, top, left).flatten().tolist()) for top in range(3) for left in range(3)
        }


class TestFlip:
    def test_every_output_is_the_image_or_its_mirror_and_about_half_are_each(self, pixels):
        flipped = Augment(flip=True)(pixels, 0)
        images = to_unit(pixels)
        same = [torch.equal(output, image) for output, image in zip(flipped, images)]
        mirrored = [torch.equal(output, image.flip(-1)) for output, image in zip(flipped, images)]
        assert [not value for value in same] == mirrored
        assert 8 <= sum(mirrored) <= 24

    def test_in_two_epochs_in_turn_every_image_is_seen_both_ways(self, pixels):
        samples = torch.arange(100, 100 + len(pixels))
        seen = [Augment(flip=True)(pixels, 0, alternating_flip(400, samples, epoch)) for epoch in (1, 2, 3)]
        assert torch.equal(seen[0], seen[1].flip(-1)) and torch.equal(seen[0], seen[2])
        turned = alternating_flip(400, samples, 1)
        assert torch.equal(seen[0][turned], to_unit(pixels)[turned].flip(-1))
        assert torch.equal(seen[0][~turned], to_unit(pixels)[~turned])
        assert 150 < alternating_flip(400, torch.arange(400), 1).sum() < 250


class TestCutout:
    @pytest.mark.parametrize("side", [1, 2, 3, 9])
    def test_every_output_loses_one_square_clipped_at_the_border_and_every_centre_occurs(self, side):
        outputs = random_cutout(torch.ones(500, 2, 4, 5), side, seeded())
        assert torch.equal(outputs[:, 0], outputs[:, 1])
        lost = {tuple((output == 0).flatten().tolist()) for output in outputs[:, 0]}
        assert lost == {
            tuple(square(4, 5, side, row, column).flatten().tolist()) for row in range(4) for column in range(5)
        }

    def test_what_is_not_lost_stays(self, pixels):
        images = to_unit(pixels)
        outputs = random_cutout(images, 3, seeded())
        torch.testing.assert_close(outputs[outputs > 0], images[outputs > 0], rtol=0, atol=0)


class TestNoise:
    def test_deviations_are_drawn_evenly_up_to_the_largest(self):
        noise = random_noise(torch.full((4000, 1, 16, 16), 0.5), 0.1, seeded()) - 0.5
        deviations = noise.flatten(1).std(1)
        assert noise.mean().abs() < 1e-3
        assert deviations.max() < 0.12
        quartiles = torch.quantile(deviations, torch.tensor([0.25, 0.5, 0.75]))
        torch.testing.assert_close(quartiles, torch.tensor([0.025, 0.05, 0.075]), rtol=0, atol=0.004)

    def test_images_stay_between_0_and_1(self, pixels):
        outputs = random_noise(to_unit(pixels), 1.0, seeded())
        assert outputs.min() == 0 and outputs.max() == 1


@pytest.mark.parametrize("policy", ["trivial", "autoaugment"])
def test_a_policy_changes_images_in_more_than_one_way(pixels, policy):
    image = pixels[:1].expand(32, -1, -1, -1).contiguous()
    outputs = Augment(policy=policy)(image, 0)
    assert len({tuple(output.flatten().tolist()) for output in outputs}) > 2


@pytest.mark.parametrize("wrong", [{"crop": -1}, {"cutout": -2}])
def test_a_negative_size_is_refused(wrong):
    with pytest.raises(ConfigError, match=r"=-\d.*give 0 or more"):
        Augment(**wrong)


@pytest.mark.parametrize("noise", [-0.1, 1.5, float("nan")])
def test_noise_outside_its_range_is_refused(noise):
    with pytest.raises(ConfigError, match=rf"noise \(={noise}\).*give 0 to 1"):
        Augment(noise=noise)


@pytest.mark.parametrize("channels", [2, 4])
def test_a_policy_of_colours_refuses_other_channels(channels):
    with pytest.raises(ConfigError, match=rf"policy \(=trivial\) .* 1 or 3 channels, these have {channels}"):
        Augment(policy="trivial")(torch.zeros(2, channels, 8, 8, dtype=torch.uint8), 0)


def test_an_unknown_policy_is_told_the_nearest():
    with pytest.raises(ConfigError, match=r"no augmentation policy 'trivia'\. Did you mean 'trivial'"):
        Augment(policy="trivia")


class TestZoom:
    def test_samples_a_window_as_torch_s_affine_grid_does(self):
        images = torch.rand(16, 3, 12, 20)
        area, ratio, down, right = torch.rand(4, 16, generator=seeded(3))
        area, ratio = 0.3 + 0.7 * area, (4 / 3) ** (2 * ratio - 1)
        height, width = (area / ratio).sqrt().clamp(max=1), (area * ratio).sqrt().clamp(max=1)
        theta = torch.zeros(16, 2, 3)
        theta[:, 0, 0], theta[:, 1, 1] = width, height
        theta[:, 0, 2], theta[:, 1, 2] = (1 - width) * (2 * right - 1), (1 - height) * (2 * down - 1)
        grid = torch.nn.functional.affine_grid(theta, images.shape, align_corners=False)
        expected = torch.nn.functional.grid_sample(images, grid, padding_mode="border", align_corners=False)
        torch.testing.assert_close(random_zoom(images, 0.3, seeded(3)), expected, rtol=0, atol=1e-5)

    @pytest.mark.parametrize("smallest", [0.1, 0.5, 0.99])
    def test_keeps_at_least_the_share_of_the_area_that_was_asked_for(self, smallest):
        ramps = torch.linspace(0, 1, 64)[None, None, None, :].expand(500, 1, 64, 64)
        across, down = (random_zoom(one.contiguous(), smallest, seeded()) for one in (ramps, ramps.mT))
        width = (across[:, 0, 0, 40] - across[:, 0, 0, 24]) / (ramps[0, 0, 0, 40] - ramps[0, 0, 0, 24])
        height = (down[:, 0, 40, 0] - down[:, 0, 24, 0]) / (ramps[0, 0, 0, 40] - ramps[0, 0, 0, 24])
        cut = (width > 0.999) | (height > 0.999)  # a side that would be longer than the image
        share = (width * height)[~cut]
        assert share.min() > smallest - 0.02 and (width.max(), height.max()) <= (1.001, 1.001)
        assert len(share) > 50 or smallest > 0.9
        if len(share) > 50:
            assert (
                share.min() < smallest + 0.1 and 0.7 < (width / height)[~cut].min() < 1 < (width / height)[~cut].max()
            )

    def test_leaves_even_images_even(self):
        images = torch.rand(8, 3, 1, 1).expand(8, 3, 9, 7).contiguous()
        torch.testing.assert_close(random_zoom(images, 0.2, seeded()), images)

    @pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
    def test_of_no_share_is_refused(self, share):
        with pytest.raises(ConfigError, match=r"zoom \(="):
            Augment(zoom=share)
