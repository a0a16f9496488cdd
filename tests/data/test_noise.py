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
        assert torch.equal(corrupt(images, "contrast", 5), images)

    def test_contrast_and_brightness_by_hand(self):
        x = torch.tensor([0.2, 0.4]).view(1, 1, 1, 2).expand(1, 3, 1, 2)
        generator = Generator()
        assert noise.contrast(x, 0.5, generator)[0, 0, 0].tolist() == pytest.approx([0.25, 0.35])
        colour = torch.tensor([0.4, 0.2, 0.0]).view(1, 3, 1, 1)
        assert noise.brightness(colour, 0.2, generator).flatten().tolist() == pytest.approx([0.6, 0.3, 0.0])
        assert noise.brightness(torch.zeros(1, 3, 1, 1), 0.2, generator).flatten().tolist() == pytest.approx([0.2] * 3)
        assert noise.saturate(colour, (0.5, 0.0), generator).flatten().tolist() == pytest.approx([0.4, 0.3, 0.2])

    def test_snow_falls_and_motion_blur_drives(self):
        x = torch.rand(40, 1, 32, 32, generator=Generator().manual_seed(0))

        def steps(changed):
            return [float(changed.diff(dim=dim).abs().mean()) for dim in (2, 3)]

        falling = noise.snow(torch.zeros(40, 3, 32, 32), CORRUPTIONS["snow"].levels[4], Generator().manual_seed(0))
        down, right = steps(falling)
        assert down < 0.8 * right
        down, right = steps(noise.motion_blur(x, CORRUPTIONS["motion-blur"].levels[4], Generator().manual_seed(0)))
        assert right < 0.8 * down

    def test_jpeg_keeps_even_areas_and_loses_fine_detail(self):
        assert distance(corrupt(grey(90, 2), "jpeg", 5), grey(90, 2)) < 1.5 / 255
        generator = Generator().manual_seed(0)
        fine = torch.randint(0, 256, (4, 3, 32, 32), generator=generator, dtype=torch.uint8)
        assert float(corrupt(fine, "jpeg", 5).float().std()) < 0.9 * float(fine.float().std())


@every
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (8, 8), (5, 40)])
def test_the_smallest_and_the_longest_images_work(name, size):
    images = torch.randint(0, 256, (3, 3, *size), generator=Generator().manual_seed(0)).to(torch.uint8)
    assert corrupt(images, name, 5).shape == images.shape


@every
def test_black_stays_dark_and_white_bright(name):
    black, white = (corrupt(grey(value, 2), name, 5).float().mean() for value in (0, 255))
    assert black < 0.3 * 255 and white > 0.7 * 255  # bytes that wrap around would be near the middle or beyond


@pytest.mark.parametrize("severity", [6, 0, -1, 10**9, True])
def test_unknown_names_and_severities_are_refused(severity):
    with pytest.raises(ConfigError, match=r"'gausian'.*Did you mean 'gaussian'"):
        corrupt(scenes(1), "gausian", 1)
    with pytest.raises(ConfigError, match=r"severity \(="):
        corrupt(scenes(1), "gaussian", severity)


@pytest.mark.parametrize("name", ["gaussian", "fog", "jpeg", "pixelate", "poisson"])
@pytest.mark.parametrize(
    "given",
    [
        scenes(2).float() / 255,
        torch.full((2, 3, 32, 32), float("nan")),
        torch.full((2, 3, 32, 32), float("inf")),
        scenes(2).long() + 300,
        scenes(2) > 100,
        scenes(2).to(torch.int8),
    ],
    ids=["0..1", "NaN", "inf", "above 255", "booleans", "int8"],
)
def test_what_is_no_bytes_is_refused(name, given):
    with pytest.raises(ConfigError, match=rf"'{name}' was given {given.dtype}: expected bytes"):
        corrupt(given, name, 1)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.1, 1.5])
@pytest.mark.parametrize("name", ["pixelate", "jpeg"])
def test_what_cannot_become_bytes_is_refused(name, value):
    x = torch.full((1, 3, 8, 8), 0.5)
    x[0, 1, 2, 3] = value
    with pytest.raises(ConfigError, match=r"outside 0\.\.1, or NaN"):
        CORRUPTIONS[name].change(x, CORRUPTIONS[name].levels[0], Generator())
