"""Finished runs read back: one run as a ``Record``, several runs on one data set, and ``evaluate``."""

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from torch import Tensor, nn
from tyro.conf import Positional, arg

from spikedistill.compute.place import Place, Precision
from spikedistill.data.images import ImageSet, evenly
from spikedistill.data.parts import class_order, listed
from spikedistill.deliver.teachers import find_teacher, is_published
from spikedistill.errors import ConfigError, DataError, RunError
from spikedistill.evaluate.early_exit import check_confidence
from spikedistill.evaluate.measure import measure_student, measure_teacher
from spikedistill.files import note, read_facts, shipped, weights_file
from spikedistill.student.conversion import read_part
from spikedistill.student.save import load_student
from spikedistill.student.student import Student
from spikedistill.student.substeps import LAYERS, RunSchedule
from spikedistill.student.upgrade import upgrade
from spikedistill.teacher.load import Teacher, load_teacher
from spikedistill.train.changes import differences
from spikedistill.train.machine import environment
from spikedistill.train.progress import Advance, Progress
from spikedistill.train.recipe import Data, Training
from spikedistill.train.run import Run

RunDirectories = Annotated[Sequence[Path], Positional, arg(metavar="RUN ...")]
"""Paths of runs, positional arguments on the command line."""
ROUNDING = 1.0
"""Points by which an accuracy may differ on another machine or device; a larger difference has another cause."""


@dataclass(frozen=True)
class Record:
    """A run directory of ``teach`` or ``distill``, finished or not, or the file of a student.

    Args:
        path: the directory or the file.
        recipe: every choice of the run as names and values, upgraded to today's format.
    """

    path: Path
    recipe: Mapping[str, Any]

    @staticmethod
    def read(path: str | Path) -> "Record":
        """The record of a run directory or of a student's file. No code that it names is executed.

        Raises:
            RunError: if there is nothing, or no recipe of 'teach' or 'distill'.
        """
        path = shipped(path)
        if not path.exists():
            raise RunError(f"'{path}' does not exist: give a run directory, or the model of a student's run.")
        facts = read_facts(path)
        if path.is_file() and "recipe" not in facts:
            raise RunError(f"'{path}' holds no recipe: give a run directory, or the model of a student's run.")
        recipe = upgrade(facts["recipe"]) if "recipe" in facts else Run(path).recipe()
        if recipe.get("kind") not in ("teach", "distill"):
            raise RunError(f"'{path}' holds a run of kind {recipe.get('kind')!r}: give runs of 'teach' or 'distill'.")
        return Record(path, recipe)

    @property
    def name(self) -> str:
        """The name of the directory."""
        return self.path.resolve().name

    @property
    def is_student(self) -> bool:
        """Whether it is a run of ``distill``."""
        return self.recipe["kind"] == "distill"

    @property
    def data(self) -> Data:
        """The data it was trained on."""
        return self._part(Data, "data")

    @property
    def training(self) -> Training:
        """How it was trained, with its device and precision."""
        return self._part(Training, "training")

    def place(self, device: str | None = None, precision: Precision | None = None) -> Place:
        """Device and number format of the run, from its recipe, or from ``timing.jsonl`` if the recipe says 'auto'.

        Without that file it is what 'auto' takes on this machine. The same holds, with a note, if this machine does not
        have the run's device.

        Args:
            device: another device; ``auto`` takes the best one here.
            precision: another number format; ``auto`` takes what suits the device.

        Raises:
            ConfigError: if the given device or precision does not exist here.
        """
        wished = {"device": device, "precision": precision}
        given: dict[str, Any] = {name: value for name, value in wished.items() if value is not None}
        there = dataclasses.replace(self._where_it_was(), **given)
        try:
            return there.place()
        except ConfigError:
            if given:
                raise
            found = dataclasses.replace(self.training, device="auto").place()
            note(f"'{self.path}' was computed on {there.device}, which cannot be used here: using {found.device}.")
            return found

    def _where_it_was(self) -> Training:
        training = self.training
        lines = [] if self.path.is_file() else Run(self.path).lines("timing")
        computed = lines[-1] if lines else {}
        precision = {"bfloat16": "bf16", "float32": "fp32"}.get(computed.get("dtype", ""), "auto")
        known = {"device": computed.get("device", "auto"), "precision": precision}
        known["convolutions"] = computed.get("convolutions", "auto")
        left_open = {name: value for name, value in known.items() if getattr(training, name) == "auto"}
        return dataclasses.replace(training, **left_open)

    def _part(self, kind: Any, name: str) -> Any:
        try:
            return read_part(kind, self.recipe[name])
        except (KeyError, ConfigError) as error:
            raise RunError(
                f"The recipe in '{self.path}' cannot be read ({error}): was it written by a newer version?"
            ) from error

    def results(self) -> dict[str, Any]:
        """The measurements on the test set, from results.json.

        Raises:
            RunError: if the run is not finished.
        """
        run = Run(self.path)
        if not run.finished:
            raise RunError(f"'{self.path}' {run.unfinished()}: finish it by the same command with --resume.")
        return run.read("results")

    def stored_accuracy(self) -> float | None:
        """The test accuracy (percent) that the run wrote when it ended, or None."""
        if self.path.is_file():
            found = read_facts(self.path).get("results", {})
        else:
            found = self.results() if Run(self.path).finished else {}
        return found.get("test_accuracy")

    def elsewhere(self, place: Place) -> list[str]:
        """How this machine, device and number format differ from those of the run, as far as it recorded them."""
        now = environment()
        there = {"device": str(place.device), "dtype": str(place.dtype).removeprefix("torch.")}
        there |= {"processor": now["processor"], "torch": now["versions"]["torch"]}
        if self.path.is_file():
            return []
        run = Run(self.path)
        then: dict[str, Any] = {**run.lines("timing")[-1]} if run.lines("timing") else {}
        if (self.path / "environment.json").exists():
            began = run.read("environment")
            then |= {"processor": began.get("processor"), "torch": began.get("versions", {}).get("torch")}
        then = {name: value for name, value in then.items() if name in there}
        return differences(then, {name: there[name] for name in then}, {})

    def network(self, trust_code: bool = False) -> Student | Teacher:
        """The trained network.

        Args:
            trust_code: execute the Python code that the file may name as its network.

        Raises:
            RunError: if the run is not finished.
            WeightsError: if its weights cannot be read.
            ConfigError: if its file names Python code and is not trusted.
        """
        if not weights_file(self.path).exists():
            raise RunError(f"'{self.path}' holds no finished run: finish it by the same command with --resume.")
        if self.is_student:
            return load_student(self.path, trust_code=trust_code)
        return load_teacher(self.path, trust_code=trust_code)[0]

    def images(self, data_dir: str | None = None) -> ImageSet:
        """Its data set, which may be in another folder by now.

        Raises:
            DataError: if it does not exist, or has other classes than the network.
        """
        found = self.data.at(data_dir).load()
        names = read_facts(weights_file(self.path)).get("class_names", found.class_names)
        if not found.labelled:
            return found.with_classes(names)
        if len(names) != found.classes or class_order(found.class_names, names)[0]:
            raise DataError(
                f"The classes of '{found.name}' are {listed(found.class_names)}, but '{self.path}' was trained on"
                f" {listed(names)}: give the data of the run, with --data-dir if they are in another folder."
            )
        return found


def read_records(paths: Sequence[Path], data_dir: str | None = None) -> tuple[list[Record], ImageSet]:
    """Several runs on one data set, and that set.

    Raises:
        ConfigError: if none is given, two have the same name, or they were trained on different data.
    """
    if not paths:
        raise ConfigError("No runs were given: name one or more run directories.")
    records = [Record.read(path) for path in paths]
    names = [record.name for record in records]
    parts = [record.data for record in records]
    sets = [data.loaded for data in parts]
    if len(set(names)) < len(names):
        raise ConfigError(f"Two of the runs have one name ({', '.join(names)}): give directories of other names.")
    if len(set(sets)) > 1:
        raise ConfigError(f"The runs were trained on different data ({', '.join(sets)}): compare runs of one set.")
    return records, records[0].images(data_dir)


def some_of(images: ImageSet, count: int | None) -> tuple[Tensor, Tensor]:
    """This number of test images, evenly spaced, and their labels; None takes all.

    Raises:
        ConfigError: if the count is below 1.
    """
    if count is not None and count < 1:
        raise ConfigError(f"images (={count}) must be 1 or more; omit it for the whole test set.")
    everything = len(images.test_images)
    places = evenly(everything, everything if count is None else count)
    return images.test_images[places], images.test_labels[places]


def evaluate(
    path: Annotated[Path, Positional, arg(metavar="RUN")],
    timesteps: int | None = None,
    data_dir: str | None = None,
    confidence: float | None = None,
    trust_code: bool = False,
    device: str | None = None,
    precision: Precision | None = None,
    schedule: RunSchedule = LAYERS,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure a finished run again on its test set.

    A student may run with another T than it was trained with. A note then says that its thresholds belong to its own.
    If the accuracy differs from the one that the run wrote, a note says so and names possible causes.

    Args:
        path: run directory of 'teach' or 'distill', the file of a student, or the name of one that comes with the
            package (see 'spikedistill pretrained'); or an .onnx file of 'spikedistill export'.
        timesteps: another T than the student was trained with; its thresholds stay.
        data_dir: folder of the data, if it is no longer the one of the run.
        confidence: also measure early exit: a sample leaves once its likeliest class is more likely than this, 0 to 1.
        trust_code: execute Python code that the run may name as its networks. Without it such a teacher is left out.
        device: cpu, cuda ...; auto takes a GPU if there is one (default: where the run was trained).
        precision: number format of the large operations; auto takes what suits the device (default: that of the run).
        schedule: how the D sub-steps of graded spikes run: layer-by-layer, as trained, or step-by-step, the same
            weights with T D steps of one spike each. With D=1 both are the same.
        progress: shows the work; silent by default.

    Returns:
        For a student see ``measure_student``, with its teacher if that still exists. For a teacher ``test_accuracy``.

    Raises:
        ConfigError: if ``timesteps`` is below 1, the confidence is outside 0..1, one of them or a schedule is given
            for a teacher, a student cannot run step by step, or the device does not exist here.
    """
    if confidence is not None:
        check_confidence(confidence)
    if path.suffix == ".onnx":
        if (timesteps, confidence, device, precision, schedule) != (None, None, None, None, LAYERS):
            raise ConfigError(f"'{path}' runs as it is, by onnxruntime: give --data-dir alone.")
        from spikedistill.deliver.onnx import measure_onnx

        return measure_onnx(path, data_dir, progress)
    record = Record.read(path)
    stored = record.stored_accuracy()
    place, network = record.place(device, precision), record.network(trust_code)
    if not isinstance(network, Student):
        if (timesteps, confidence, schedule) != (None, None, LAYERS):
            raise ConfigError(f"'{path}' holds a teacher, without time steps: omit timesteps, confidence and schedule.")
        images = record.images(data_dir)
        with _testing(images, 1, progress) as seen:
            found: dict[str, Any] = dict(measure_teacher(network, images, place, seen))
        _compare(record, stored, found, place)
        return found
    own = network.timesteps
    if timesteps not in (None, own):
        network.set_timesteps(timesteps)
        note(
            f"the thresholds were trained or calibrated for T={own}: a student distilled for T={timesteps} may be"
            f" better at it (distill --timesteps {timesteps})."
        )
    images = record.images(data_dir)
    teacher = its_teacher(record, images, trust_code)
    passes = 1 + (teacher is not None) + (confidence is not None)
    with _testing(images, passes, progress) as seen:
        found = measure_student(network, teacher, images, place, None, confidence, schedule, seen)
    if network.timesteps == own and (schedule == LAYERS or network.conversion.neuron_model.levels == 1):
        _compare(record, stored, found, place)
    return found


def _testing(images: ImageSet, passes: int, progress: Progress | None) -> AbstractContextManager[Advance]:
    """The progress display of a measurement on the test set, with this number of passes."""
    tested = len(images.test_images)
    return (progress or Progress.silent()).part(f"measuring on {tested} test images", passes * tested)


def _compare(record: Record, stored: float | None, found: Mapping[str, Any], place: Place) -> None:
    """Note if an accuracy differs from the one that the run wrote. On the same machine both must be equal."""
    accuracy = found.get("test_accuracy")
    if stored is None or accuracy is None or accuracy == stored:
        return
    changed = record.elsewhere(place)
    if not changed:
        why = "machine and device are those of the run, so images, weights or the file must have changed"
    elif abs(accuracy - stored) > ROUNDING:
        why = f"this is more than another machine explains ({'; '.join(changed)}): are the images those of the run?"
    else:
        why = f"it is computed elsewhere ({'; '.join(changed)}), where rounding differs a little"
    note(f"the test accuracy is {accuracy:.2f} %, but the run '{record.path}' wrote {stored:.2f} %: {why}.")


def its_teacher(record: Record, images: ImageSet, trust_code: bool) -> nn.Module | None:
    """The teacher of a finished student, if it still exists and had the same inputs."""
    choice = record.recipe["teacher"]
    source, network = choice["source"], choice.get("network")
    there = Path(source).exists() or is_published(source, network)
    if record.data.source is not None or not there or (_names_code(source, network) and not trust_code):
        return None
    fields = {name: choice.get(name) for name in ("network", "width", "mean", "std")}
    return find_teacher(images, source, **fields, trust_code=trust_code)[0]


def _names_code(source: str, network: str | None) -> bool:
    """Whether a teacher's network is Python code, by the recipe or by its file."""
    facts = read_facts(weights_file(source))
    named = facts.get("network", facts.get("architecture", {}))
    return ".py:" in str(network) or ".py:" in str(named) or "code" in named
