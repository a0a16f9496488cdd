import inspect
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import run_command
from hypothesis import HealthCheck, settings

from spikedistill.data.images import ImageSet
from spikedistill.neuron import fused

# The same examples in every run; a busy machine fails no test.
settings.register_profile(
    "repeatable", max_examples=50, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("repeatable")

SLOW = [
    *("train/test_resume", "studies/test_reproduce", "student/test_recompute", "test_readme"),
    *("recipes/test_distill", "train/test_loop", "student/test_save", "compute/test_place", "neuron/test_fused"),
    *("evaluate/test_immunity", "test_cli", "test_wrong_inputs", "teacher/test_cache", "test_own_code"),
    *("test_processes", "recipes/test_demo", "deliver/test_immunity", "recipes/test_several", "test_old_runs"),
    *("recipes/test_config", "test_lazy", "neuron/test_compiling", "deliver/test_compare", "train/test_extend"),
    "recipes/test_preview",
]
"""Files of more than ten seconds; they start first, so that processes that share the files end together."""


def pytest_collection_modifyitems(items):
    places = {Path(__file__).parent / f"{name}.py": place for place, name in enumerate(SLOW)}
    for item in items:
        if item.path in places:
            item.add_marker("slow")
    items.sort(key=lambda item: places.get(item.path, len(places)))


torch.set_num_threads(1)  # from the first fixture of a module on
fused.slope_step = inspect.unwrap(fused.slope_step)  # torch 2.6 compiles nothing that jaxtyping wraps
fused.SAID.set()  # whichever test compiles first, its output is its own


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


@pytest.fixture(scope="module")
def symbolic_shapes():
    """Arguments are not checked in a whole module of tests: torch.export gives sizes that are no ``int``."""
    from jaxtyping import config

    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


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
