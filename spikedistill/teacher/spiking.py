"""Spiking networks of the user's own as teachers, written for instance in SpikingJelly, snnTorch or plain torch."""

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from spikedistill.answer import Answer
from spikedistill.errors import ConfigError, ShapeError, one_of
from spikedistill.inputs import AnyLayout, normalise
from spikedistill.shapes import Logits
from spikedistill.teacher.capture import capture_calls, first_of, watched
from spikedistill.teacher.load import Teacher

RESETS = ("reset", "reset_mem")
"""Methods that put the state of a layer back, as SpikingJelly and snnTorch name them."""
CLOSE = 1e-3
"""Logits of two calls with the same images differ by at most this, relative and absolute."""


class SpikingTeacher(nn.Module):
    """A trained SNN of the user's own that never changes: frozen, in evaluation mode, with its own normalisation.

    Before every call, each of its modules that has a method ``reset()`` (SpikingJelly) or ``reset_mem()`` (snnTorch)
    without required arguments is reset by it. Any other state must be reset at the start of the network's ``forward``.

    Args:
        network: any module from normalised images ``[B, C, H, W]`` to logits ``[T, B, K]``.
        mean: one value per channel, 0..1 like the images.
        std: one value per channel, above 0 and at most 1.
        images: a few raw images ``[B, C, H, W]`` in 0..1, on which the network is tried.
        layers: module paths of its layers of neurons, whose outputs are counts of spikes, 0, 1, 2 ... (default: all
            modules that turn currents into spikes on these images; they have no kernels and are no ``nn.Sequential``).
        class_names: the names of its classes, if they are known.

    Raises:
        ConfigError: if the normalisation is outside its range, the network keeps state between calls, it returns
            anything but logits of every step, or a layer does not exist or returns no counts.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: nn.Module,
        mean: Sequence[float],
        std: Sequence[float],
        images: Tensor,
        layers: Sequence[str] = (),
        class_names: Sequence[str] = (),
    ) -> None:
        super().__init__()
        frozen = Teacher(network, mean, std, class_names)  # checks what is given
        frozen.to(next(network.parameters(), frozen.mean).device)
        self.network, self.class_names = frozen.network, frozen.class_names
        self.register_buffer("mean", frozen.mean, persistent=False)
        self.register_buffer("std", frozen.std, persistent=False)
        self.train(False)
        images = images.to(self.mean.device)
        with torch.no_grad():
            self._check_calls(images)
            self._layers = list(layers) or self._find_layers(images)
            self.observe(images, spikes=self._layers)

    def forward(self, images: Tensor) -> Logits:
        """Images ``[B, C, H, W]`` in 0..1 to logits ``[T, B, K]``."""
        with _buffers_kept(self.network):
            return self._logits(images)

    def observe(
        self, inputs: Tensor, paths: Sequence[str] = (), *, spikes: Sequence[str] = (), potentials: Sequence[str] = ()
    ) -> Answer:
        """Logits ``[T, B, K]``, with features and counts of spikes ``[T, B, ...]`` at module paths of the network.

        A module may be called once with all steps, ``[T, B, ...]`` or ``[T*B, ...]`` with time first, or once per step
        with ``[B, ...]``. Of a tuple, the first is its output.

        Raises:
            ConfigError: if there is no module at a path, it is called in another way, a layer of neurons returns no
                counts, or potentials are asked for.
        """
        if potentials:
            raise ConfigError(
                f"The potentials of {type(self.network).__name__} at {', '.join(potentials)} are not known: ask for"
                " spikes or features."
            )
        for path in spikes:
            one_of("layer of neurons", path, self._layers)
        asked = list(dict.fromkeys((*paths, *spikes)))
        with _buffers_kept(self.network), capture_calls(self.network, asked) as calls:
            logits = self._logits(inputs)
        seen = {path: over_steps(path, outputs, logits) for path, outputs in calls.items()}
        return Answer(
            logits, {path: seen[path] for path in paths}, {path: counts_of(path, seen[path]) for path in spikes}
        )

    def paths(self) -> list[str]:
        """The paths of all modules of the network."""
        return [name for name, _ in self.network.named_modules() if name]

    def layers(self) -> list[str]:
        """The paths of the layers of neurons: as they were named, else in order of execution.

        Raises:
            ConfigError: if none was named, and none was found.
        """
        if not self._layers:
            raise ConfigError(
                f"No layer of neurons was found in {type(self.network).__name__}: expected modules that get currents"
                " and return counts of spikes. Make the neurons modules of their own; in Python you can also name"
                " modules that return counts, SpikingTeacher(layers=...)."
            )
        return list(self._layers)

    def train(self, mode: bool = True) -> "SpikingTeacher":
        """Stay in evaluation mode, whatever ``mode`` is."""
        return super().train(False)

    def _logits(self, images: Tensor) -> Logits:
        if images.ndim != 4:
            raise ShapeError(f"Inputs of shape {tuple(images.shape)} were given: expected images [B, C, H, W].")
        _reset(self.network)
        with AnyLayout():
            logits = self.network(normalise(images, self.mean, self.std))
        if not isinstance(logits, Tensor) or logits.ndim != 3 or logits.shape[1] != len(images):
            given = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
            raise ConfigError(
                f"{type(self.network).__name__} returns {given} for {len(images)} images: expected logits [T, B, K],"
                " time first. Stack the logits of its steps by torch.stack; an ANN teaches as Teacher(...)."
            )
        return logits

    def _check_calls(self, images: Tensor) -> None:
        """Refuse a network whose second call differs. A copy is called, as in training, with the same random numbers.

        Neurons that are reset through a list of all neurons, as by snnTorch's ``utils.reset``, are not reset in a copy.
        """
        with _buffers_kept(self.network):
            with torch.random.fork_rng([images.device] if images.is_cuda else []):
                first = self._logits(images)
            second = copy.deepcopy(self)._logits(images)
        if first.shape == second.shape and torch.allclose(first, second, CLOSE, CLOSE, equal_nan=True):
            return
        raise ConfigError(
            f"{type(self.network).__name__} keeps state between calls: its second logits for the same {len(images)}"
            " images are others. Reset it at the start of forward, or give the modules with state a method reset()."
        )

    def _find_layers(self, images: Tensor) -> list[str]:
        """Modules that turn currents into spikes: all their outputs are counts, not all of their inputs are.

        They fire at least once. A module with kernels or an ``nn.Sequential`` may hold more than neurons and is left
        out. Of modules inside each other, the outermost is taken.
        """
        calls: dict[str, list[Tensor]] = {}
        fired, driven, others = set[str](), set[str](), set[str]()

        def see(path: str, given: tuple[object, ...], output: object) -> None:
            current, spikes = first_of(given), first_of(output)
            if not isinstance(spikes, Tensor) or not are_counts(spikes):
                others.add(path)
                return
            calls.setdefault(path, []).append(torch.empty_like(spikes, device="meta"))
            if spikes.any():
                fired.add(path)
            if isinstance(current, Tensor) and not are_counts(current):
                driven.add(path)

        with _buffers_kept(self.network), watched(self.network, self.paths(), see):
            logits = self._logits(images)
        found = []
        for path, outputs in calls.items():
            module = self.network.get_submodule(path)
            plain = not (isinstance(module, nn.Sequential) or any(map(_is_kernel, module.parameters())))
            if plain and path in (fired & driven) - others and _has_steps(outputs, logits):
                found.append(path)
        return [path for path in found if not any(path.startswith(f"{outer}.") for outer in found)]


def with_steps(teacher: Teacher, images: Tensor) -> Teacher | SpikingTeacher:
    """The same network as a spiking teacher, if it returns logits with three axes for these images.

    Raises:
        ConfigError: as for ``SpikingTeacher``.
    """
    try:
        with torch.no_grad(), AnyLayout():
            logits = teacher.network(teacher.normalise(images))
    except Exception:  # whatever a third-party network raises: who measures it says so
        return teacher
    if not isinstance(logits, Tensor) or logits.ndim != 3:
        return teacher
    mean, std = teacher.mean.flatten().tolist(), teacher.std.flatten().tolist()
    return SpikingTeacher(teacher.network, mean, std, images, class_names=teacher.class_names)


def over_steps(path: str, calls: Sequence[Tensor], logits: Logits) -> Tensor:
    """The outputs of a module as ``[T, B, ...]``, told apart by the number of its calls and their shapes.

    Raises:
        ConfigError: if it was called in another way.
    """
    steps, images = logits.shape[:2]
    if len(calls) == 1 and calls[0].shape[:2] == (steps, images):
        return calls[0]
    if len(calls) == 1 and calls[0].shape[:1] == (steps * images,):
        return calls[0].unflatten(0, (steps, images))
    if len(calls) == steps and all(output.shape[:1] == (images,) for output in calls):
        return torch.stack(list(calls))
    shapes = ", ".join(str(list(shape)) for shape in dict.fromkeys(output.shape for output in calls))
    raise ConfigError(
        f"The module '{path}' was called {len(calls)} times{f' and returned {shapes}' if shapes else ''}, for T={steps}"
        f" time steps of B={images} images: expected one call with [T, B, ...] or [T*B, ...], or T calls with [B, ...]."
        " Name another module."
    )


def counts_of(path: str, output: Tensor) -> Tensor:
    """The output of a layer of neurons, which is taken as it is.

    Raises:
        ConfigError: if it holds anything but counts.
    """
    counts = output if output.is_floating_point() else output.float()
    if not are_counts(counts):
        faulty = counts[~((counts >= 0) & (counts == counts.round()))]
        raise ConfigError(
            f"The layer '{path}' returns values such as {float(faulty[0]):.4g}: expected counts of spikes, 0, 1, 2 ..."
            " Name a layer of neurons. If its spikes have a height, multiply by the height behind the layer."
        )
    return counts


def are_counts(values: Tensor) -> bool:
    """Whether all values are whole numbers, 0 or more.

    >>> are_counts(torch.tensor([0.0, 2.0])), are_counts(torch.tensor([0.5])), are_counts(torch.tensor([True]))
    (True, False, True)
    """
    whole = values if values.is_floating_point() else values.float()
    return bool(((whole >= 0) & (whole == whole.round())).all())


@contextmanager
def _buffers_kept(network: nn.Module) -> Iterator[None]:
    """Put back buffers that a call replaces, as those of snnTorch's neurons: they would change a fingerprint."""
    before = [(module, dict(module._buffers)) for module in network.modules()]
    try:
        yield
    finally:
        for module, buffers in before:
            module._buffers.update(buffers)


def _reset(network: nn.Module) -> None:
    for module in network.modules():
        for name in RESETS:
            method = getattr(type(module), name, None)  # snnTorch's neurons hold a tensor named reset
            if inspect.isfunction(method) and _needs_nothing(method):
                method(module)


def _needs_nothing(method: object) -> bool:
    """Whether a method can be called without arguments."""
    try:
        inspect.signature(method).bind(None)  # type: ignore[arg-type]
    except TypeError:
        return False
    return True


def _has_steps(calls: Sequence[Tensor], logits: Logits) -> bool:
    try:
        over_steps("", calls, logits)
    except ConfigError:
        return False
    return True


def _is_kernel(parameter: Tensor) -> bool:
    """Whether a parameter mixes neurons, as the weights of a convolution do. One value per channel does not."""
    return sum(size > 1 for size in parameter.shape) > 1
