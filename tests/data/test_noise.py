import pytest
import torch
from torch import Generator

from spikedistill.data import noise
from spikedistill.data.noise import CORRUPTIONS, SEVERITIES, corrupt
from spikedistill.errors import ConfigError

IMAGES = [name for name, corruption in CORRUPTIONS.items() if corruption.kind != "event"]
every = pytest.mark.parametrize("name", IMAGES)
NOISES = [name for name, corruption in CORRUPTIONS.items() if corruption.kind == "noise"]


def scenes(count=24, channels=3):
    """Smooth colour patches with an edge: something that every corruption changes."""
    generator = Generator().manual_seed(1)
    coarse = torch.rand(count, channels, 4, 4, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (32, 32), mode="bilinear")
    smooth[..., 16:] = 0.3 * smooth[..., 16:] + 0.2
    return (smooth * 255).round().to(torch.uint8)


def grey(value, count=40):
    return torch.full((count, 3, 32, 32), value, dtype=torch.uint8)


def distance(changed, images):
    return float((changed.float() - images.float()).abs().mean()) / 255


def test_there_are_as_many_as_the_suite_promises():
    assert len(NOISES) >= 7
    assert len(IMAGES) - len(NOISES) >= 10


@every
def test_bytes_of_the_same_shape_that_differ_and_repeat(name):
    images = scenes()
    for severity in SEVERITIES:
        changed = corrupt(images, name, severity, seed=3)
        assert changed.dtype == torch.uint8 and changed.shape == images.shape
        assert not torch.equal(changed, images)
        assert torch.equal(changed, corrupt(images, name, severity, seed=3))


@pytest.mark.parametrize("name", sorted(set(IMAGES) - {"elastic"}))  # CIFAR-10-C's levels move less as they bend
def test_the_last_severity_is_stronger_than_the_first(name):
    images = scenes()
    assert distance(corrupt(images, name, 5), images) > distance(corrupt(images, name, 1), images)


@pytest.mark.parametrize("name", NOISES)
def test_noise_grows_with_every_severity(name):
    images = grey(128)
    strengths = [distance(corrupt(images, name, severity), images) for severity in SEVERITIES]
    if name == "erasing":  # of grey pixels by grey pixels
        images = grey(0)
        strengths = [distance(corrupt(images, name, severity), images) for severity in SEVERITIES]
    assert strengths == sorted(strengths)


@pytest.mark.parametrize("name", ["gaussian", "shot", "fog"])
def test_the_result_does_not_depend_on_how_a_set_is_cut(name, monkeypatch):
    name = "poisson" if name == "shot" else name
    monkeypatch.setattr(noise, "CHUNK", 8)
    images = scenes(24)
    assert torch.equal(corrupt(images[:8], name, 2), corrupt(images, name, 2)[:8])
    assert not torch.equal(corrupt(images[:8], name, 2), corrupt(images[:8], name, 2, seed=1))


@every
@pytest.mark.parametrize("channels", [1, 2, 4])
def test_other_channels_and_sizes_work(name, channels):
    images = scenes(4, channels)[..., :28, :28]
    assert corrupt(images, name, 5).shape == images.shape
    assert corrupt(images[:0], name, 5).shape == (0, channels, 28, 28)


class TestClosedForms:
    @pytest.mark.parametrize("severity", SEVERITIES)
    def test_deviations_are_the_stated_ones(self, severity):
        level = {name: CORRUPTIONS[name].levels[severity - 1] for name in NOISES}
        half = torch.full((200, 3, 32, 32), 0.5)
        draw = Generator().manual_seed(0)
        found = {
            "gaussian": (noise.gaussian(half, level["gaussian"], draw), level["gaussian"]),
            "uniform": (noise.uniform(half, level["uniform"], draw), level["uniform"] / 3**0.5),
            "speckle": (noise.speckle(half, level["speckle"], draw), 0.5 * level["speckle"]),
            "poisson": (noise.shot(half, level["poisson"], draw), (0.5 / level["poisson"]) ** 0.5),
        }
        for changed, deviation in found.values():
            assert float(changed.mean()) == pytest.approx(0.5, abs=0.002)
            assert float(changed.std()) == pytest.approx(deviation, rel=0.02)

    @pytest.mark.parametrize("severity", SEVERITIES)
    def test_shares_are_the_stated_ones(self, severity):
        images = grey(100, 100)
        for name in ("salt-and-pepper", "impulse"):
            changed = corrupt(images, name, severity)
            share = CORRUPTIONS[name].levels[severity - 1]
            assert float((changed == 0).double().mean()) == pytest.approx(share / 2, rel=0.1)
            assert float((changed == 255).double().mean()) == pytest.approx(share / 2, rel=0.1)
        whole = corrupt(images, "salt-and-pepper", severity)
        assert torch.equal(whole[:, :1].expand_as(whole), whole)
        erased = corrupt(images, "erasing", severity) != 100
        assert float(erased.double().mean()) == pytest.approx(CORRUPTIONS["erasing"].levels[severity - 1], rel=0.1)

    def test_an_even_image_stays_even_under_blurs_and_bends(self):
        images = grey(90, 3)
        for name in ("gaussian-blur", "glass-blur", "defocus-blur", "motion-blur", "zoom-blur", "pixelate", "elastic"):
            assert torch.equal(corrupt(images, name, 5), images), name
        for name in ("contrast", "saturate"):
            assert torch.equal(corrupt(images, name, 5), images), name

    def test_contrast_and_brightness_by_hand(self):
        x = torch.tensor([0.2, 0.4]).view(1, 1, 1, 2).expand(1, 3, 1, 2)
        generator = Generator()
        assert noise.contrast(x, 0.5, generator)[0, 0, 0].tolist() == pytest.approx([0.25, 0.35])
        colour = torch.tensor([0.4, 0.2, 0.0]).view(1, 3, 1, 1)
        assert noise.brightness(colour, 0.2, generator).flatten().tolist() == pytest.approx([0.6, 0.3, 0.0])
        assert noise.brightness(torch.zeros(1, 3, 1, 1), 0.2, generator).flatten().tolist() == pytest.approx([0.2] * 3)
        assert noise.saturate(colour, (0.5, 0.0), generator).flatten().tolist() == pytest.approx([0.4, 0.3, 0.2])

    def test_a_moved_edge_is_where_it_was_moved_to(self):
        x = torch.zeros(2, 1, 8, 8)
        x[..., 2] = 1.0
        moved = noise._shifted(x, torch.tensor([-1.0, 0.5]), torch.zeros(2))
        assert moved[0, 0, 0].tolist() == pytest.approx([0, 0, 0, 1, 0, 0, 0, 0], abs=1e-5)
        assert moved[1, 0, 0].tolist() == pytest.approx([0, 0.5, 0.5, 0, 0, 0, 0, 0], abs=1e-5)

    def test_snow_falls_and_motion_blur_drives(self):
        x = torch.rand(40, 1, 32, 32, generator=Generator().manual_seed(0))

        def steps(changed):
            return [float(changed.diff(dim=dim).abs().mean()) for dim in (2, 3)]

        falling = noise.snow(torch.zeros(40, 3, 32, 32), CORRUPTIONS["snow"].levels[4], Generator().manual_seed(0))
        down, right = steps(falling)
        assert down < 0.8 * right
        down, right = steps(noise.motion_blur(x, CORRUPTIONS["motion-blur"].levels[4], Generator().manual_seed(0)))
        assert right < 0.8 * down

    @pytest.mark.parametrize("height, width", [(32, 32), (48, 32)])
    def test_an_elastic_image_has_three_corners_moved_as_far_as_stated(self, height, width):
        move, side = 0.05, min(height, width)
        ramp = torch.arange(width, dtype=torch.float32).expand(4000, 1, height, width)
        slopes = noise.elastic(ramp, (0.0, 0.0, move), Generator().manual_seed(0))
        slope = (slopes[:, 0, height // 2, width // 2] - slopes[:, 0, height // 2, width // 2 - 4]) / 4 - 1
        # Two corners, a distance of 2 * (side // 3) apart, each moved by up to move * width along this axis.
        apart = 2 * (side // 3) * width / side
        assert float(slope.abs().max()) <= 2 * move * width / apart + 1e-3
        assert float(slope.std()) == pytest.approx((2 / 3) ** 0.5 * move * width / apart, rel=0.05)

    def test_jpeg_keeps_even_areas_and_loses_fine_detail(self):
        assert distance(corrupt(grey(90, 2), "jpeg", 5), grey(90, 2)) < 1.5 / 255
        generator = Generator().manual_seed(0)
        fine = torch.randint(0, 256, (4, 3, 32, 32), generator=generator, dtype=torch.uint8)
        assert float(corrupt(fine, "jpeg", 5).float().std()) < 0.9 * float(fine.float().std())


def test_unknown_names_and_severities_are_refused():
    with pytest.raises(ConfigError, match=r"'gausian'.*Did you mean 'gaussian'"):
        corrupt(scenes(1), "gausian", 1)
    with pytest.raises(ConfigError, match=r"severity \(=6\)"):
        corrupt(scenes(1), "gaussian", 6)
