"""The simulated event camera against counting by hand on scenes whose events are known."""

import math

import pytest
import torch

from spikedistill.data.camera import EventCamera, seen_by_camera
from spikedistill.data.images import ImageSet
from spikedistill.errors import ConfigError, DataError

IDEAL = {"mismatch": 0.0, "refractory": 0.0, "noise": 0.0}


def edge(side=32):
    """Black to the left, white to the right."""
    image = torch.zeros(1, 1, side, side, dtype=torch.uint8)
    image[..., side // 2 :] = 255
    return image


def test_a_grey_wall_sends_nothing():
    assert not EventCamera(**IDEAL).record(torch.full((2, 3, 8, 8), 77, dtype=torch.uint8)).any()


def test_an_edge_sends_what_its_contrast_holds():
    """Each pixel that the edge crosses goes from black to white and back: so many thresholds each way."""
    camera = EventCamera(amplitude=0.125, threshold=0.3, dark=0.1, looks=40, **IDEAL)
    counts = camera.record(edge())[0].sum(0).int()
    each = int(math.log(1.1 / 0.1) / 0.3)
    crossed = range(16 - 4, 16)  # it looks 4 pixels to the right and back, so the edge moves to the left
    for polarity in (0, 1):
        assert not counts[polarity, :, :12].any() and not counts[polarity, :, 16:].any()
        assert all(each - 1 <= int(count) <= each for count in counts[polarity, 5, list(crossed)])


def test_brighter_comes_before_darker_where_white_moves_in():
    counts = EventCamera(timesteps=3, **IDEAL).record(edge())[0].float().sum((2, 3))
    assert counts[0, 1] > 0 and counts[0, 0] == 0  # first saccade: white moves in
    assert counts[1, 1] == 0 and counts[1, 0] > 0  # second saccade: it moves out
    assert not counts[2].any()  # last saccade: straight up, along the edge


def test_the_camera_returns_to_where_it_began():
    path = EventCamera(timesteps=6, looks=5).path()
    assert path.shape == (31, 2) and not path[0].any() and not path[-1].any()
    assert path[:, 1].max() == pytest.approx(0.125, abs=1e-6) and path[20].tolist() == pytest.approx(
        [0.125, 0.0], abs=1e-6
    )


def test_the_same_seed_gives_the_same_events_and_another_does_not():
    images = torch.randint(0, 256, (3, 1, 16, 16), dtype=torch.uint8)
    camera = EventCamera()
    assert torch.equal(camera.record(images), camera.record(images))
    assert not torch.equal(camera.record(images), camera.record(images, seed=1))


def test_noise_is_as_frequent_as_said():
    images = torch.zeros(200, 1, 16, 16, dtype=torch.uint8)
    counts = EventCamera(noise=0.1, mismatch=0.1).record(images)
    assert float(counts.float().sum((1, 2)).mean()) == pytest.approx(0.2, rel=0.05)


def test_blind_pixels_send_less():
    counts = [EventCamera(**{**IDEAL, "refractory": blind}).record(edge()).sum() for blind in (0.0, 0.01, 0.1)]
    assert counts[0] > counts[1] > counts[2] > 0


def test_what_changes_while_a_pixel_is_blind_is_lost():
    """Two steps of brightness: the second comes while a pixel is blind after the first, on the way there and back."""
    image = torch.zeros(1, 1, 16, 16, dtype=torch.uint8)
    image[..., 8:], image[..., 10:] = 100, 255
    camera = EventCamera(timesteps=3, looks=100, amplitude=1.0, **{**IDEAL, "refractory": 0.2})
    column = 4 + 16 * camera.path()[:, 1]
    first, last = (int((column > place).nonzero()[0]) for place in (7, 10))
    assert 0 < last - first < 0.2 * 300 - 10 and last + 100 < 200 + 0.2 * 300
    counts = camera.record(image)[0, :, :, 5, 4].tolist()
    assert counts == [[0, 1], [1, 0], [0, 0]]  # first saccade: one brighter; second: one darker; third: along the steps


def test_higher_thresholds_send_less():
    counts = [EventCamera(**IDEAL, threshold=threshold).record(edge()).sum() for threshold in (0.1, 0.3, 1.0, 5.0)]
    assert counts[0] > counts[1] > counts[2] > counts[3] == 0


def test_frames_add_up_whatever_their_number():
    one, many = (EventCamera(timesteps=T, looks=48 // T, **IDEAL).record(edge()) for T in (1, 6))
    assert torch.equal(one[:, 0].int(), many.sum(1).int())


def test_a_border_shows_the_images_border():
    image = torch.full((1, 1, 8, 8), 90, dtype=torch.uint8)
    counts = EventCamera(border=3, **IDEAL).record(image)
    assert counts.shape == (1, 6, 2, 14, 14) and not counts.any()


@pytest.mark.parametrize(
    "fields", [{"timesteps": 0}, {"amplitude": 0.0}, {"amplitude": 2.0}, {"threshold": 0.0}, {"refractory": 2.0}]
)
def test_values_outside_their_range_are_refused(fields):
    with pytest.raises(ConfigError, match=rf"{next(iter(fields))} .* of the event camera"):
        EventCamera(**fields)


class TestSets:
    def make(self, images):
        labels = torch.tensor([0, 1, 0, 1])
        return ImageSet("some", images, labels, images, labels, ("a", "b"))

    def test_a_set_becomes_frames(self):
        images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
        seen = seen_by_camera(self.make(images), EventCamera(timesteps=4))
        assert seen.frames == 4 and seen.channels == 2 and seen.class_names == ("a", "b")
        assert "simulated" in seen.name and "EventCamera" in seen.notes[-1]

    def test_both_parts_are_seen_by_one_sensor_with_noise_of_their_own(self):
        images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
        still, noisy = EventCamera(noise=0.0, mismatch=0.5), EventCamera(noise=0.5)
        same = seen_by_camera(self.make(images), still)
        assert torch.equal(same.test_images, same.train_images) and torch.equal(same.train_images, still.record(images))
        assert not torch.equal(still.record(images), still.record(images, seed=1))
        other = seen_by_camera(self.make(images), noisy)
        assert not torch.equal(other.test_images, other.train_images)
        assert torch.equal(other.train_images, noisy.record(images))

    def test_frames_are_refused(self):
        frames = torch.zeros(4, 3, 2, 8, 8, dtype=torch.uint8)
        with pytest.raises(DataError, match="event frames already"):
            seen_by_camera(self.make(frames), EventCamera())

    def test_other_channels_are_refused(self):
        with pytest.raises(DataError, match="1 or 3 channels"):
            EventCamera().record(torch.zeros(1, 4, 8, 8, dtype=torch.uint8))
