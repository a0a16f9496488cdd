"""Students as ONNX files, written and read: for programs in C++ and on phones, without Python and torch.

A file holds one of two forms of a student (``Form``). Its metadata, texts by name, say all that a program needs:

form, timesteps, levels        which form; T and D
classes                        names of the classes in the order of the logits (JSON)
input, answer                  in words: what goes in, and how the answer is read from what comes out
state                          step: a list of {"input", "output", "layer", "fresh"} (JSON); ``fresh`` is the value
                               before the first step, one number, or one per channel
data                           the data set of the run (JSON), by which ``measure_onnx`` tests the file
spikedistill, torch, opset     versions
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from spikedistill.data.augment import to_inputs
from spikedistill.errors import ConfigError, DataError, ShapeError, WeightsError
from spikedistill.evaluate.accuracy import accuracy_by_step
from spikedistill.inputs import check_pixels
from spikedistill.shapes import Logits
from spikedistill.student.conversion import read_part
from spikedistill.student.student import State, Student
from spikedistill.train.progress import Progress
from spikedistill.train.recipe import Data

Form = Literal["sequence", "step"]
"""sequence: images to the logits of all T steps. step: an image and a state to the logits of one step and a state."""
NEEDED = "pip install 'spikedistill[export]'"
STANDARD = ("", "ai.onnx")
"""Where an operation may come from: the standard of ONNX. Others would need code of their own."""
SMALLEST = 256
"""Weights of a layer from which on they are stored as int8."""
AT_ONCE = 64
"""Samples in a batch."""


class SequenceModule(nn.Module):
    """A student as a module from images, or frames, to logits ``[T, B, K]``."""

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.student = student

    def forward(self, images: Tensor) -> Tensor:
        """All time steps."""
        return self.student(images)


class StepModule(nn.Module):
    """A student as a module from an image and a state to logits ``[B, K]`` and the next state."""

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.student = student

    def forward(self, image: Tensor, state: State) -> tuple[Tensor, ...]:
        """One time step."""
        logits, after = self.student.step(image, state)
        return logits, *after


def traced(student: Student, example: Tensor, form: Form) -> Any:
    """A student as ``torch.export.ExportedProgram``, for any number of samples.

    Args:
        student: in evaluation mode, float32, on the CPU.
        example: two or more samples as the student takes them.
        form: see ``Form``.
    """
    batch, example = torch.export.Dim("batch", min=1, max=2**16), example.contiguous()
    if form == "sequence":
        axis = example.ndim - 4 if example.ndim > 4 else 0
        return torch.export.export(SequenceModule(student), (example,), dynamic_shapes=({axis: batch},))
    image = student.coding.frame(example, 0, student.timesteps).contiguous()
    state = student.initial_state(image)
    shapes: Any = ({0: batch}, tuple({0: batch} for _ in state))
    return torch.export.export(StepModule(student), (image, state), dynamic_shapes=shapes)


def onnx_model(student: Student, example: Tensor, form: Form, facts: Mapping[str, str], int8: bool) -> bytes:
    """The content of the ONNX file of a student.

    Args:
        student: in evaluation mode, float32, on the CPU.
        example: two or more samples as the student takes them.
        form: see ``Form``.
        facts: further metadata.
        int8: store weights of convolutions and linear layers as int8, with a scale per output channel.

    Raises:
        ConfigError: if the packages for ONNX are missing.
    """
    needs_onnx()
    inputs, outputs = ["images"], ["logits"]
    metadata = {"form": form, **facts}
    if form == "step":
        state = states_of(student, example)
        inputs = ["image", *(one["input"] for one in state)]
        outputs += [one["output"] for one in state]
        metadata["state"] = json.dumps(state)
    program: Any = torch.onnx.export(
        traced(student, example, form), dynamo=True, verbose=False, input_names=inputs, output_names=outputs
    )
    model = program.model
    for node in model.graph.all_nodes():
        node.metadata_props.clear()  # paths and lines of this machine
    metadata["opset"] = str(model.opset_imports.get("", ""))
    model.metadata_props.update(metadata)
    written = program.model_proto
    if int8:
        _round_weights(written)
    return written.SerializeToString()


def states_of(student: Student, example: Tensor) -> list[dict[str, Any]]:
    """What the metadata say of each tensor of a state: its input and output, its layer, its value before all steps."""
    layers, neurons = student.layers(), [*student.neurons.values()]
    found = []
    for number in range(student.states):
        fresh: Any = 0.0
        if number < len(layers):
            layer = neurons[number]
            fresh = layer.initial.tolist() if layer.neuron.learn_initial else layer.neuron.initial
        name = layers[number] if number < len(layers) else f"max pooling {number - len(layers) + 1}"
        found.append({"input": f"state_{number}", "output": f"next_{number}", "layer": name, "fresh": fresh})
    return found


def to_int8(values: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Values in float32 as int8, and a scale ``[K]`` per channel of the axis with which they are multiplied again."""
    others = tuple(number for number in range(values.ndim) if number != axis)
    scales = np.maximum(np.abs(values).max(others) / 127, np.float32(1e-12)).astype(np.float32)
    wide = np.expand_dims(scales, others)
    return np.clip(np.rint(values / wide), -127, 127).astype(np.int8), scales


def _round_weights(model: Any) -> None:
    """Store the weights of convolutions and linear layers as int8, in place."""
    from onnx import helper, numpy_helper

    graph = model.graph
    weights = {one.name: one for one in graph.initializer}
    for node in list(graph.node):
        axis = {"Conv": 0, "Gemm": 0, "MatMul": -1}.get(node.op_type)
        stored = weights.get(node.input[1]) if axis is not None and len(node.input) > 1 else None
        if stored is None or axis is None:
            continue
        values = numpy_helper.to_array(stored)
        turned = node.op_type == "Gemm" and not any(one.name == "transB" and one.i for one in node.attribute)
        axis = (1 if turned else axis) % max(1, values.ndim)
        if values.ndim < 2 or values.size < SMALLEST or values.dtype != np.float32:
            continue
        rounded, scales = to_int8(values, axis)
        name = stored.name
        graph.initializer.remove(stored)
        graph.initializer.append(numpy_helper.from_array(rounded, f"{name}.int8"))
        graph.initializer.append(numpy_helper.from_array(scales, f"{name}.scale"))
        given = [f"{name}.int8", f"{name}.scale"]
        graph.node.insert(0, helper.make_node("DequantizeLinear", given, [name], axis=axis))
        del weights[name]


class OnnxStudent:
    """The student in an ONNX file that ``export`` wrote, run by onnxruntime.

    Attributes:
        facts: its metadata.
        timesteps: T.

    Args:
        source: the file, or its content.
        threads: of onnxruntime; 0 for its own choice.

    Raises:
        ConfigError: if the packages for ONNX are missing.
        WeightsError: if the file is missing, damaged, not written by ``export``, or needs code or files of its own.
    """

    def __init__(self, source: str | Path | bytes, threads: int = 0) -> None:
        runtime = needs_onnx()
        self.name = "the ONNX file" if isinstance(source, bytes) else f"'{source}'"
        content = _content(source)
        self.facts = _checked(content, self.name)
        options = runtime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        try:
            self.session = runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's own classes derive from Exception alone
            raise WeightsError(f"{self.name} cannot be run by onnxruntime ({error}): export it again.") from error
        self.timesteps = int(self.facts["timesteps"])
        names = [one.name for one in self.session.get_inputs()]
        try:
            self.state: list[dict[str, Any]] = json.loads(self.facts.get("state", "[]"))
            stated = [one["input"] for one in self.state]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise WeightsError(
                f"The state that {self.name} names cannot be read ({error}): export it again."
            ) from error
        if self.facts["form"] == "step" and names[1:] != stated:
            raise WeightsError(f"{self.name} takes {names}, which its metadata do not name: export it again.")

    def __call__(self, images: Tensor) -> Logits:
        """Logits ``[T, B, K]`` for images ``[B, C, H, W]`` in 0..1, or frames ``[T, B, C, H, W]``.

        Raises:
            ShapeError: if the images have another shape, or are no pixels.
        """
        check_pixels(images)
        given = images.float().contiguous().numpy()
        takes = self.session.get_inputs()[0].shape
        there = given.shape[1:] if self.facts["form"] == "step" and given.ndim == 5 else given.shape
        if len(takes) != len(there) or any(isinstance(one, int) and one != n for one, n in zip(takes, there)):
            wanted = ", ".join("B" if isinstance(one, str) else str(one) for one in takes)
            raise ShapeError(f"Images of shape {tuple(images.shape)} were given to {self.name}: it takes [{wanted}].")
        if self.facts["form"] == "sequence":
            return torch.from_numpy(self.session.run(["logits"], {"images": given})[0])
        steps = [given[t] if given.ndim == 5 else given for t in range(self.timesteps)]
        state, logits = self.initial_state(steps[0]), []
        for image in steps:
            found, *after = self.session.run(None, {"image": image, **state})
            state = {one["input"]: value for one, value in zip(self.state, after)}
            logits.append(torch.from_numpy(found))
        return torch.stack(logits)

    def initial_state(self, image: Any) -> dict[str, Any]:
        """The state before the first step for a batch, by the names of the inputs."""
        kinds = {"tensor(float)": np.float32, "tensor(double)": np.float64}
        made = {}
        for one, known in zip(self.session.get_inputs()[1:], self.state):
            shape = (len(image), *one.shape[1:])
            value = np.asarray(known["fresh"]).reshape(-1, *[1] * (len(shape) - 2))
            made[one.name] = np.broadcast_to(value, shape).astype(kinds[one.type])
        return made


def _content(source: str | Path | bytes) -> bytes:
    if isinstance(source, bytes):
        return source
    try:
        return Path(source).read_bytes()
    except OSError as error:
        raise WeightsError(f"'{source}' cannot be read ({error}): give an ONNX file that 'export' wrote.") from error


def _checked(content: bytes, name: str) -> dict[str, str]:
    """The metadata of a model that is whole, ours, and needs neither code nor files of its own."""
    import onnx

    try:
        model = onnx.load_model_from_string(content)
        onnx.checker.check_model(model)
    except Exception as error:  # protobuf and the checker have classes of their own
        first = str(error).strip().splitlines()[0]
        raise WeightsError(f"{name} is damaged or no ONNX file ({first}): export it again.") from error
    facts = {one.key: one.value for one in model.metadata_props}
    strange = sorted({one.domain for one in (*model.opset_import, *_nodes(model.graph))} - {*STANDARD})
    outside = [one.name for one in _tensors(model.graph) if one.data_location or len(one.external_data)]
    if strange or outside or len(model.functions):
        what = f"operations of {', '.join(strange)}" if strange else "functions"
        what = f"weights in other files ({outside[0]})" if outside else what
        raise WeightsError(f"{name} needs {what}, which 'export' never writes: it is not used.")
    missing = [key for key in ("spikedistill", "form", "timesteps", "levels") if key not in facts]
    if missing:
        raise WeightsError(f"{name} has no {', '.join(missing)} in its metadata: give a file that 'export' wrote.")
    if facts["form"] not in ("sequence", "step") or not facts["timesteps"].isdecimal():
        raise WeightsError(
            f"{name} names the form '{facts['form'][:40]}', T={facts['timesteps'][:20]}: export it again."
        )
    return facts


def _graphs(graph: Any) -> Iterator[Any]:
    """A graph and those inside its nodes."""
    yield graph
    for node in graph.node:
        for one in node.attribute:
            for inner in (one.g, *one.graphs):
                if inner.node:
                    yield from _graphs(inner)


def _nodes(graph: Any) -> Iterator[Any]:
    for one in _graphs(graph):
        yield from one.node


def _tensors(graph: Any) -> Iterator[Any]:
    """All constants of a graph."""
    for one in _graphs(graph):
        yield from one.initializer
        for node in one.node:
            for attribute in node.attribute:
                yield from ([attribute.t] if attribute.HasField("t") else [])
                yield from attribute.tensors


def measure_onnx(path: Path, data_dir: str | None = None, progress: Progress | None = None) -> dict[str, Any]:
    """Measure an ONNX file of ``export`` on the test set of its run.

    Args:
        path: the file.
        data_dir: folder of the data, if it is no longer the one of the run.
        progress: shows the work; silent by default.

    Returns:
        ``test_accuracy`` in percent, ``accuracy_by_step`` and ``timesteps``.

    Raises:
        ConfigError: if the packages for ONNX are missing, or the file names no data set.
        WeightsError: if the file cannot be used; see ``OnnxStudent``.
        DataError: if the data do not exist, or have no labels.
    """
    student = OnnxStudent(path)
    if "data" not in student.facts:
        raise ConfigError(
            f"'{path}' names no data set, since it was not exported from a run: give OnnxStudent images of yours."
        )
    try:
        data = read_part(Data, json.loads(student.facts["data"]))
    except (ConfigError, ValueError, RecursionError) as error:
        raise WeightsError(f"The data set that '{path}' names cannot be read ({error}): export it again.") from error
    images = data.at(data_dir).load()
    if not images.test_labelled:
        raise DataError(f"'{images.name}' has no labels: the accuracy of '{path}' cannot be measured on it.")
    parts = images.test_images.split(AT_ONCE)
    with (progress or Progress.silent()).part(
        f"measuring on {len(images.test_images)} test images", len(parts)
    ) as seen:
        logits = []
        for part in parts:
            logits.append(student(to_inputs(part)))
            seen(1)
    found = accuracy_by_step(torch.cat(logits, 1), images.test_labels)
    return {
        "test_accuracy": found[-1],
        "accuracy_by_step": found,
        "timesteps": student.timesteps,
    }


def needs_onnx() -> Any:
    """onnxruntime, if it and all other packages for ONNX are installed.

    Raises:
        ConfigError: if one is missing.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"ONNX files need {error.name}, which is not installed: {NEEDED}") from error
    return onnxruntime
