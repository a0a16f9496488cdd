import pytest
import torch

from spikedistill.data.images import ImageSet


@pytest.fixture(autouse=True)
def _repeatable():
    """Every test begins with the same random numbers, on one thread, so that results do not depend on the order."""
    torch.manual_seed(0)
    torch.set_num_threads(1)


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
