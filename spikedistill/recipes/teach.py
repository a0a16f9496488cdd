"""Where there is no trained teacher: train one, and save it so that it knows itself."""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from spikedistill.compute.place import return_freed_memory
from spikedistill.errors import ConfigError
from spikedistill.evaluate.measure import check_fits, measure_teacher
from spikedistill.files import write_tensors
from spikedistill.objective.direct import Direct
from spikedistill.recipes.tutor import introduce, known_images
from spikedistill.student.upgrade import FORMAT
from spikedistill.teacher.load import Architecture, OneStep, is_elsewhere
from spikedistill.train.loop import fit
from spikedistill.train.progress import Progress
from spikedistill.train.recipe import Data, Training, check
from spikedistill.train.run import Run


@dataclass(frozen=True)
class Teach:
    """A teacher and how it is trained."""

    network: str = "resnet18"
    """A zoo name (resnet18, resnet19, resnet20, resnet34, preact-resnet18, wrn16-2, wrn28-4, pyramidnet18, vgg9, vgg11,
    vgg16), torchvision/NAME, timm/NAME or FILE.py:FUNCTION, which is called with classes=K and returns the module."""
    width: int | None = None
    """Channels of the first stage; a network that is not the zoo's has its own."""
    label_smoothing: float = 0.0
    """Share of probability spread over all classes; smoothed teachers teach less (arXiv 1906.02629)."""
    data: Data = field(default_factory=Data)
    """What comes in."""
    training: Training = field(default_factory=Training)
    """How it is trained."""

    def written(self) -> dict[str, Any]:
        """What recipe.json holds."""
        training = replace(self.training, lr=self.training.peak)
        return {"kind": "teach", "format": FORMAT, **asdict(replace(self, training=training))}


def teach(recipe: Teach, out: Path, resume: bool = False, progress: Progress | None = None) -> dict[str, float]:
    """Train a teacher into a run directory and test it once.

    Args:
        recipe: network, data and training.
        out: the run directory.
        resume: go on with the run that lies there.
        progress: what shows the work.

    Returns:
        What results.json holds; ``test_accuracy`` is in percent.

    Raises:
        ConfigError: if the recipe cannot work, the network does not fit the images, or the loss is no longer a number.
        DataError: if there are no such images.
        RunError: if another run lies in the directory.
    """
    progress = progress or Progress.silent()
    check(recipe.data, recipe.training)
    if not recipe.training.keep_memory:
        return_freed_memory()
    images = recipe.data.load()
    if images.frames:
        raise ConfigError(
            f"'{images.name}' holds event frames, and an ANN has no time steps: train a student by distill."
        )
    width = None if is_elsewhere(recipe.network) else recipe.width
    if width != recipe.width:
        progress.say(f"width {recipe.width} is left out: '{recipe.network}' has its own")
    architecture = Architecture(recipe.network, images.classes, images.channels, width)
    torch.manual_seed(recipe.training.seed)
    mean, std = images.statistics()
    network = OneStep(architecture.build(), mean, std)
    check_fits(network, images, f"The network '{recipe.network}'")
    run = Run(out)
    run.start(recipe.written(), resume, Teach().written())
    introduce(run, progress.say, images)
    with progress:
        feed = recipe.data.feed(images, recipe.training)
        fit(network, Direct(recipe.label_smoothing), feed, recipe.training, run, progress=progress)
        results = measure_teacher(network, images, recipe.training.place())
    known = {"architecture": architecture.facts(), "mean": mean, "std": std}
    known |= known_images(images, recipe.data.validation)
    write_tensors(run.model, network.network.state_dict(), {"kind": "teacher", **known, **results})
    run.write("results", results)
    return results
