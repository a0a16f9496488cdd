"""Where there is no trained teacher: train one, and save it so that it knows itself."""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spikedistill.data.augment import to_unit
from spikedistill.data.images import ImageSet, load_images
from spikedistill.errors import ConfigError
from spikedistill.evaluate.accuracy import accuracy_by_step, answers
from spikedistill.files import write_tensors
from spikedistill.objective.direct import Direct
from spikedistill.teacher.load import Architecture, Normalised, OneStep, is_elsewhere
from spikedistill.train.device import choose_device, choose_precision, return_freed_memory, settle
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
        return {"kind": "teach", **asdict(replace(self, training=training))}


def check_answers(network: Normalised, images: ImageSet, name: str) -> None:
    """Ask a network about two images.

    Raises:
        ConfigError: if it does not accept them, returns no tensor, or has not one answer for each class.
    """
    pixels = to_unit(images.train_images[:2])
    training = network.training
    network.eval()
    try:
        with torch.no_grad():
            logits = network.network(network.normalise(pixels))
        if not isinstance(logits, Tensor):
            raise TypeError(f"it returns {type(logits).__name__}, not a tensor of logits")
    except Exception as error:  # whatever a stranger's network raises
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"{name} does not accept the images of '{images.name}' of shape {tuple(pixels.shape[1:])} ({reason})."
            " Give a network that was made for them, or for a folder of images another --image-size."
        ) from error
    finally:
        network.train(training)
    if logits.shape != (len(pixels), images.classes):
        raise ConfigError(
            f"{name} answers with shape {tuple(logits.shape[1:])}, '{images.name}' has {images.classes} classes: give"
            " it one output a class."
        )


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
    images = load_images(recipe.data.data, recipe.data.data_dir, recipe.data.image_size)
    width = None if is_elsewhere(recipe.network) else recipe.width
    if width != recipe.width:
        progress.say(f"width {recipe.width} is left out: '{recipe.network}' has its own")
    architecture = Architecture(recipe.network, images.classes, images.channels, width)
    torch.manual_seed(recipe.training.seed)
    mean, std = images.statistics()
    network = OneStep(architecture.build(), mean, std)
    check_answers(network, images, f"The network '{recipe.network}'")
    run = Run(out)
    run.start(recipe.written(), resume, Teach().written())
    augment, held = recipe.data.augment(), recipe.data.validation
    with progress:
        fit(
            network,
            Direct(recipe.label_smoothing),
            images,
            recipe.training,
            run,
            augment=augment,
            validation=held,
            progress=progress,
        )
        results = measure(network, images, recipe.training)
    known = {"architecture": architecture.facts(), "mean": mean, "std": std, "class_names": images.class_names}
    write_tensors(run.model, network.network.state_dict(), {"kind": "teacher", **known, "data": images.name, **results})
    run.write("results", results)
    return results


def measure(network: nn.Module, images: ImageSet, training: Training) -> dict[str, float]:
    """The accuracy of an ANN on the test set, ``test_accuracy`` in percent.

    Args:
        network: it, in evaluation mode or as training left it.
        images: whose test part is used.
        training: names device, precision and memory order.
    """
    device = choose_device(training.device)
    layout = torch.channels_last if training.channels_last else torch.contiguous_format
    settle(network, device, layout, training)
    logits = answers(network, images.test_images, choose_precision(training, device).dtype)
    return {"test_accuracy": accuracy_by_step(logits, images.test_labels)[-1]}
