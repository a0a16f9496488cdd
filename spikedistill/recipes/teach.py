"""``teach``: train a teacher, and save it with the description of its network."""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from spikedistill.compute.place import return_freed_memory
from spikedistill.data.feed import calibration_inputs
from spikedistill.data.images import ImageSet
from spikedistill.errors import ConfigError
from spikedistill.evaluate.measure import check_fits, measure_teacher
from spikedistill.files import write_tensors
from spikedistill.objective.direct import Direct
from spikedistill.recipes.checks import known_images, report_data
from spikedistill.student.upgrade import FORMAT
from spikedistill.teacher.airbench import StartsFromImages
from spikedistill.teacher.load import Architecture, TrainableANN, is_elsewhere
from spikedistill.train.loop import fit
from spikedistill.train.processes import join
from spikedistill.train.progress import Progress
from spikedistill.train.recipe import Data, Training, check
from spikedistill.train.run import Run

WHITENED = 1000
"""Number of training images that ``start_from_images`` is given; airbench takes 5000."""


@dataclass(frozen=True)
class Teach:
    """The teacher, an ordinary network (ANN)."""

    network: str = "resnet18"
    """A zoo name (resnet18, resnet19, resnet20, resnet34, preact-resnet18, wrn16-2, wrn28-4, pyramidnet18, vgg9, vgg11,
    vgg16, airbench94, airbench95, airbench96), torchvision/NAME, timm/NAME or FILE.py:FUNCTION, which is called with
    classes=K and returns the module."""
    width: int | None = None
    """Channels of the first stage, for a zoo network (default: its own)."""
    label_smoothing: float = 0.0
    """Fraction of the labels' probability that is spread over all classes, 0 to 1. Students gain less from a teacher
    with label smoothing (arXiv 1906.02629)."""
    data: Data = field(default_factory=Data)
    """What comes in."""
    training: Training = field(default_factory=Training)
    """How it is trained."""

    def written(self) -> dict[str, Any]:
        """The content of recipe.json."""
        training = replace(self.training, lr=self.training.peak)
        return {"kind": "teach", "format": FORMAT, **asdict(replace(self, training=training))}


def teach(recipe: Teach, out: Path, resume: bool = False, progress: Progress | None = None) -> dict[str, Any]:
    """Train a teacher into a run directory and test it once.

    Args:
        recipe: network, data and training.
        out: the run directory.
        resume: go on with the run in that directory.
        progress: what shows the work.

    Returns:
        The content of results.json; ``test_accuracy`` is in percent.

    Raises:
        ConfigError: if the recipe cannot work, the network does not fit the images, or the loss is no longer finite.
        DataError: if the images do not exist or cannot be read.
        RunError: if the directory holds another run, or another process of this run has ended.
    """
    processes = join()
    progress = progress if progress is not None and processes.is_main_process else Progress.silent()
    if not recipe.training.keep_memory:
        return_freed_memory()
    run = Run(out)
    with processes.main_process_first():
        run.check(recipe.written(), resume)  # before data are read, which can take long
        images, architecture, network = _prepare(recipe, progress)
        feed = recipe.data.feed(images, recipe.training).shared(processes.rank, processes.world_size)
    with progress:
        processes.on_main_process(lambda: _begin(recipe, images, run, resume, progress, processes.world_size))
        fit(network, Direct(recipe.label_smoothing), feed, recipe.training, run, progress=progress)
        return processes.on_main_process(lambda: _end(recipe, images, architecture, network, run, progress))


def _prepare(recipe: Teach, progress: Progress) -> tuple[ImageSet, Architecture, TrainableANN]:
    """Load and build everything that a recipe names; nothing is written."""
    check(recipe.data, recipe.training)
    recipe.training.place()
    images = recipe.data.load()
    if images.frames:
        raise ConfigError(
            f"'{images.name}' holds event frames, but an ANN has no time steps: train a student by 'distill'."
        )
    if not images.labelled:
        raise ConfigError(f"'{images.name}' has no labels, and a teacher learns from labels: give images by class.")
    width = None if is_elsewhere(recipe.network) else recipe.width
    if width != recipe.width:
        progress.say(f"width {recipe.width} is left out: '{recipe.network}' has its own")
    architecture = Architecture(recipe.network, images.classes, images.channels, width)
    torch.manual_seed(recipe.training.seed)
    mean, std = images.statistics()
    network = TrainableANN(architecture.build(), mean, std)
    check_fits(network, images, f"The network '{recipe.network}'")
    if isinstance(network.network, StartsFromImages):
        some = calibration_inputs(images, min(WHITENED, len(images.train_images)))
        network.network.start_from_images(network.normalise(some))
        progress.say(f"the first weights of '{recipe.network}' are computed from {len(some)} training images")
    return images, architecture, network


def _begin(recipe: Teach, images: ImageSet, run: Run, resume: bool, progress: Progress, processes: int) -> None:
    """Begin the run, or go on with it."""
    run.start(recipe.written(), resume, Teach().written(), processes)
    report_data(run, progress.say, images)


def _end(
    recipe: Teach, images: ImageSet, architecture: Architecture, network: TrainableANN, run: Run, progress: Progress
) -> dict[str, Any]:
    """Measure the teacher on the test set. Write the teacher and its results."""
    tested = len(images.test_images)
    with progress.part(f"measuring on {tested} test images", tested) as seen:
        results: dict[str, Any] = {**measure_teacher(network, images, recipe.training.place(), seen), **run.earlier()}
    mean, std = images.statistics()
    known = {"architecture": architecture.facts(), "mean": mean, "std": std}
    known |= known_images(images, recipe.data.validation)
    write_tensors(run.model, network.network.state_dict(), {"kind": "teacher", **known, **results})
    run.write("results", results)
    return results
