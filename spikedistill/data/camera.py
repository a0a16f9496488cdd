"""A simulated event camera: it looks at a still image along three saccades and sends events.

A pixel remembers the logarithm of the brightness at its last event. When the brightness now differs from it by a
threshold, the pixel sends an event, brighter or darker, and remembers the new value (Lichtsteiner et al., 2008, doi
10.1109/JSSC.2007.914337). Real pixels have thresholds of their own, are blind for a short time after an event, and send
events without a cause; so do these. While a pixel is blind it is held at the present brightness, so what changes
meanwhile is lost.

The camera moves as for N-MNIST (Orchard et al., 2015, doi 10.3389/fnins.2015.00437): three straight saccades along a
triangle, back to where it began. We do not know the motion's exact course and the sensor's constants. A saccade here
speeds up and slows down as half a cosine, and the constants are chosen so that simulated MNIST resembles N-MNIST
recordings of the same digits (``benchmarks/event_camera.py``).
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from spikedistill.data.events import MOST, background_activity
from spikedistill.data.images import ImageSet
from spikedistill.errors import ConfigError, DataError
from spikedistill.shapes import Pixels

CORNERS = ((0.0, 0.0), (0.5, 1.0), (1.0, 0.0), (0.0, 0.0))
"""Where the camera looks before, between and after the saccades: rows and columns in parts of the amplitude."""
BLOCK = 500
"""Images that are simulated together."""
GREY = (0.299, 0.587, 0.114)
"""Brightness of red, green and blue (ITU-R BT.601)."""


@dataclass(frozen=True)
class EventCamera:
    """A simulated event camera.

    Args:
        timesteps: T, the number of frames of equal duration into which events are counted.
        amplitude: reach of the saccades in parts of the image's longer side, above 0 to 1.
        threshold: change of the natural logarithm of brightness that makes an event, above 0.
        mismatch: standard deviation of the pixels' thresholds, relative to ``threshold``, 0 to 1.
        refractory: time after an event in which a pixel is blind, in parts of the recording, 0 to 1.
        noise: events without a cause, on average per pixel and polarity over the recording, 0 or more.
        dark: brightness that is added to all pixels, in parts of the brightest, above 0: what black still sends.
        border: pixels around the image that show its border's brightness.
        looks: how often brightness is compared within a frame, 1 or more.

    Raises:
        ConfigError: if a value is outside its range.
    """

    timesteps: int = 6
    amplitude: float = 0.125
    threshold: float = 0.28
    mismatch: float = 0.1
    refractory: float = 0.003
    noise: float = 0.02
    dark: float = 0.15
    border: int = 0
    looks: int = 6

    def __post_init__(self) -> None:
        least = {"timesteps": 1, "looks": 1, "border": 0, "noise": 0}
        wrong = [name for name, low in least.items() if not getattr(self, name) >= low]
        wrong += [name for name in ("amplitude", "threshold", "dark") if not getattr(self, name) > 0]
        wrong += [name for name in ("amplitude", "mismatch", "refractory") if not 0 <= getattr(self, name) <= 1]
        if wrong:
            said = ", ".join(f"{name} (={getattr(self, name)})" for name in wrong)
            raise ConfigError(f"{said} of the event camera cannot be: see the ranges of EventCamera.")

    def record(self, images: Pixels, seed: int = 0, take: int = 0) -> Tensor:
        """The events of images, counted in frames; the same images, seed and take give the same events.

        Args:
            images: bytes ``[N, C, H, W]`` of 1 or 3 channels.
            seed: of the sensor, whose pixels have thresholds of their own, and of noise.
            take: another number means other noise on the same sensor.

        Returns:
            Counts as bytes ``[N, T, 2, H + 2 border, W + 2 border]``, polarity 0 darker and 1 brighter.

        Raises:
            DataError: if the images have another number of channels.
        """
        if images.shape[1] not in (1, 3):
            raise DataError(f"The event camera sees images of 1 or 3 channels, these have {images.shape[1]}.")
        generator = torch.Generator().manual_seed(seed)
        side = [size + 2 * self.border for size in images.shape[-2:]]
        varied = 1 + self.mismatch * torch.randn(side, generator=generator)
        thresholds = self.threshold * varied.clamp_min(0.2)
        if take:
            generator.manual_seed(seed + take)
        parts = [self._record(part, thresholds, generator) for part in images.split(BLOCK)]
        return torch.cat(parts)

    def path(self) -> Tensor:
        """Where the camera looks at each moment, rows and columns in parts of the longer side, ``[T looks + 1, 2]``."""
        moments = torch.linspace(0, 3, self.timesteps * self.looks + 1, dtype=torch.float64)
        saccade = moments.floor().clamp(max=2).long()
        done = 0.5 - 0.5 * torch.cos(torch.pi * (moments - saccade))
        corners = torch.tensor(CORNERS, dtype=torch.float64)
        return (self.amplitude * torch.lerp(corners[saccade], corners[saccade + 1], done[:, None])).float()

    def _record(self, images: Pixels, thresholds: Tensor, generator: Generator) -> Tensor:
        pixels = max(images.shape[-2:])
        moments, reach = self.path() * pixels, int(self.amplitude * pixels) + 2
        scene = F.pad(_brightness(images), [self.border + reach] * 4, mode="replicate")
        level = self._seen(scene, moments[0], reach)
        blind = torch.zeros_like(level)
        looks = len(moments) - 1
        most = max(1, int(1 / max(self.refractory * looks, 1e-9)))
        counts = torch.zeros(len(images), self.timesteps, 2, *level.shape[1:])
        for look in range(looks):
            now = self._seen(scene, moments[look + 1], reach)
            wanted = ((now - level) / thresholds).trunc()
            sees = blind <= 0
            sent = wanted.clamp(-most, most) * sees
            level = torch.where(sees & (sent == wanted), level + sent * thresholds, now)
            blind = torch.where(sent != 0, self.refractory * looks, blind) - 1
            frame = counts[:, look // self.looks]
            frame[:, 0] += (-sent).clamp_min(0)
            frame[:, 1] += sent.clamp_min(0)
        noisy = background_activity(counts, self.noise / self.timesteps, generator)
        return noisy.clamp_(max=MOST).to(torch.uint8)

    def _seen(self, scene: Tensor, place: Tensor, reach: int) -> Tensor:
        """The logarithm of brightness ``[N, H, W]`` when the camera looks at a place, by bilinear interpolation."""
        whole, part = place.floor().int().tolist(), (place - place.floor()).tolist()
        height, width = (size - 2 * reach for size in scene.shape[-2:])
        seen: Tensor = torch.zeros(())
        for down in (0, 1):
            for right in (0, 1):
                share = (part[0] if down else 1 - part[0]) * (part[1] if right else 1 - part[1])
                top, left = reach + whole[0] + down, reach + whole[1] + right
                if share:
                    seen = seen + share * scene[:, 0, top : top + height, left : left + width]
        return (seen + self.dark).log_()


def _brightness(images: Pixels) -> Tensor:
    """Brightness ``[N, 1, H, W]``, 0..1."""
    unit = images.float() / 255
    if unit.shape[1] == 1:
        return unit
    return (unit * torch.tensor(GREY).view(3, 1, 1)).sum(1, keepdim=True)


def seen_by_camera(images: ImageSet, camera: EventCamera) -> ImageSet:
    """A data set as an event camera records it: frames in place of images. Both parts are seen by one sensor.

    Raises:
        DataError: if it holds event frames already.
    """
    if images.frames:
        raise DataError(f"'{images.name}' holds event frames already: leave out --events.")
    return replace(
        images,
        name=f"{images.name}, simulated events",
        train_images=camera.record(images.train_images),
        test_images=camera.record(images.test_images, take=1),
        notes=(*images.notes, f"events are simulated: {camera}"),
    )
