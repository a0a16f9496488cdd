"""The measurements of a network for results.json, all from one pass over a set of images."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from spikedistill.compute.place import Place
from spikedistill.data.augment import to_inputs
from spikedistill.data.images import ImageSet, evenly
from spikedistill.errors import ConfigError, out_of_memory
from spikedistill.evaluate.accuracy import accuracy_by_step, check_finite, predict
from spikedistill.evaluate.agreement import agreement, divergence
from spikedistill.evaluate.early_exit import predict_early
from spikedistill.evaluate.firing import FiringRates, firing_rates
from spikedistill.evaluate.latency import latency_facts
from spikedistill.inputs import AnyLayout, evaluating
from spikedistill.student.student import Student
from spikedistill.student.substeps import LAYERS, RunSchedule, step_by_step
from spikedistill.teacher.load import Normalised


def measure_student(
    student: Student,
    teacher: nn.Module | None,
    images: ImageSet,
    place: Place,
    limit: int | None = None,
    confidence: float | None = None,
    schedule: RunSchedule = LAYERS,
    on_batch: Callable[[int], None] = lambda images: None,
) -> dict[str, Any]:
    """Accuracy at every step, agreement with the teacher and firing rates on the test set.

    Of images without labels, agreement is measured at every step, and no accuracy.

    Batch norm is not folded for this: folded weights round differently, which may change a spike near the threshold.

    Args:
        student: the network.
        teacher: for comparison, if it takes the same inputs.
        images: the data set, whose test part is used.
        place: device and number format.
        limit: measure on this many training images instead, evenly spaced. The test part is then not used.
        confidence: also measure early exit at this confidence.
        schedule: in which order the sub-steps of graded spikes run; with D = 1 both are the same.
        on_batch: called after each batch with the number of its images. Each pass (student, teacher, early exit) sees
            all images.

    Returns:
        ``accuracy_by_step`` and ``test_accuracy`` (percent), ``firing_rate`` and ``firing_rate_by_layer``
        (spikes per neuron and sub-step, in percent); ``timesteps`` (T) and ``levels`` (D) as they ran, ``schedule``,
        ``longest_path``, ``latency`` and ``buffers`` (``evaluate/latency.py``); with a teacher also
        ``teacher_accuracy``, ``agreement`` (percent) and ``divergence`` (nats); with a limit ``train_accuracy`` instead
        of ``test_accuracy``; with a confidence ``early_exit_accuracy`` (percent) and ``early_exit_steps`` (mean). For a
        set without labels ``agreement_by_step``; accuracies only on images whose labels are known.

    Raises:
        ConfigError: if the student cannot run step by step.
    """
    student = student if schedule == LAYERS else step_by_step(student)
    pixels, labels = images.test_images, images.test_labels
    if limit is not None:
        some = evenly(len(images.train_images), limit)
        pixels, labels = images.train_images[some], images.train_labels[some]
    place.prepare(student)
    with firing_rates(student) as rates:
        logits = predict(student, pixels, place.dtype, on_batch=on_batch)
    check_finite(logits)
    known = images.test_labelled if limit is None else images.labelled
    results: dict[str, Any] = {}
    if known:
        steps = accuracy_by_step(logits, labels)
        results = {"test_accuracy" if limit is None else "train_accuracy": steps[-1], "accuracy_by_step": steps}
    results["firing_rate"] = 100.0 * rates.mean()
    results["firing_rate_by_layer"] = {name: 100.0 * rate for name, rate in rates.by_layer().items()}
    results |= _steps(student, schedule, rates, len(pixels))
    if teacher is not None:
        place.prepare(teacher)
        theirs = predict(teacher, pixels, place.dtype, on_batch=on_batch)
        if known:
            results["teacher_accuracy"] = accuracy_by_step(theirs, labels)[-1]
        if not images.labelled:
            results["agreement_by_step"] = accuracy_by_step(logits, theirs.mean(0).argmax(-1))
        results["agreement"] = agreement(logits, theirs.mean(0))
        results["divergence"] = divergence(logits, theirs.mean(0))
    if confidence is not None:
        early = predict_early(student, pixels, confidence, place.dtype, on_batch=on_batch)
        if known:
            results["early_exit_accuracy"] = accuracy_by_step(early.logits[None], labels)[-1]
        if teacher is not None and not images.labelled:
            results["early_exit_agreement"] = agreement(early.logits[None], theirs.mean(0))
        results["early_exit_steps"] = early.mean_steps
    return results


def _steps(student: Student, schedule: RunSchedule, rates: FiringRates, images: int) -> dict[str, Any]:
    """T and D, the schedule and its latency."""
    timesteps, levels = student.timesteps, student.conversion.neuron_model.levels
    neurons = rates.neurons(images * timesteps * levels)
    facts = {"timesteps": timesteps, "levels": levels, "schedule": schedule}
    return {**facts, **latency_facts(student, schedule, neurons)}


def measure_teacher(
    network: nn.Module, images: ImageSet, place: Place, on_batch: Callable[[int], None] = lambda images: None
) -> dict[str, float]:
    """The accuracy of an ANN on the test set, ``test_accuracy`` in percent."""
    place.prepare(network)
    logits = predict(network, images.test_images, place.dtype, on_batch=on_batch)
    return {"test_accuracy": accuracy_by_step(logits, images.test_labels)[-1]}


def check_fits(network: nn.Module, images: ImageSet, name: str) -> None:
    """Try a network on two samples: a student on event frames if there are any, an ANN on a single frame.

    Raises:
        ConfigError: if it does not accept them, returns no tensor, does not have one output per class (if classes are
            known), or returns probabilities.
    """
    inputs = to_inputs(images.train_images[:2])
    try:
        with torch.no_grad(), evaluating(network):
            logits = _logits(network, inputs[0] if images.frames and isinstance(network, Normalised) else inputs)
    except Exception as error:  # whatever a third-party network raises
        if out_of_memory(error):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"{name} does not accept the images of '{images.name}' of shape {tuple(images.train_images.shape[1:])}"
            f" ({reason}). Give a network for such images; for a folder of images you can also change --image-size."
        ) from error
    if logits.shape[-2:] != (2, images.classes or logits.shape[-1]) or logits.ndim not in (2, 3):
        raise ConfigError(
            f"{name} returns logits of shape {tuple(logits.shape[1:])}, but '{images.name}' has {images.classes}"
            " classes: give it one output per class."
        )
    if (logits >= 0).all() and bool((logits.float().sum(-1) - 1).abs().max() < 1e-3):
        raise ConfigError(
            f"{name} returns probabilities, not logits: for two images all are 0 or more and add up to 1. Remove the"
            " softmax at its end, or return their logarithm."
        )


def _logits(network: nn.Module, inputs: Tensor) -> Tensor:
    with AnyLayout():
        logits = network.network(network.normalise(inputs)) if isinstance(network, Normalised) else network(inputs)
    if not isinstance(logits, Tensor):
        raise TypeError(f"it returns {type(logits).__name__}, not a tensor of logits")
    return logits
