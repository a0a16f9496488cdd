import numpy as np
import pytest
import torch
from commands import run_command

from spikedistill.data.images import ImageSet
from spikedistill.neuron import fused


@pytest.fixture(autouse=True)
def _repeatable():
    """Every test begins with the same random numbers, on one thread, so that results do not depend on the order."""
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def without_compiler():
    """Neurons run step by step in a whole module of tests, which spares their compilation."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "works", lambda device: False)
        yield


@pytest.fixture
def blobs() -> ImageSet:
    """Three classes of 8 x 8 images that a tiny network tells apart at once: a bright third of the image each."""
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.arange(count) % 3
        images = torch.randint(0, 60, (count, 3, 8, 8), generator=generator)
        for row, label in enumerate(labels.tolist()):
            images[row, label] += 150
        return images.to(torch.uint8), labels

    return ImageSet("blobs", *draw(96), *draw(48), ("red", "green", "blue"))


@pytest.fixture(scope="session")
def write_blobs():
    """Writes blobs.npz into a folder: three classes of 8 x 8 images, each bright in a channel of its own."""

    def write(folder, train, test):
        random, arrays = np.random.default_rng(0), {}
        for part, count in (("train", train), ("test", test)):
            labels = np.arange(count) % 3
            images = random.integers(0, 60, (count, 8, 8, 3)).astype(np.uint8)
            images[np.arange(count), :, :, labels] += 150
            arrays |= {f"{part}_images": images, f"{part}_labels": labels}
        np.savez(folder / "blobs.npz", **arrays)

    return write


@pytest.fixture(scope="session")
def call():
    """Runs the command line in this process; its exit code."""
    return run_command
