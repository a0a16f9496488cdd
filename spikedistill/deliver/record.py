"""Finished runs, read back: one as a ``Record``, measured again; several on one data set."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from spikedistill.compute.place import Place
from spikedistill.data.images import ImageSet, evenly
from spikedistill.errors import ConfigError, RunError, WeightsError
from spikedistill.evaluate.early_exit import check_confidence
from spikedistill.evaluate.measure import check_fits, measure_student, measure_teacher
from spikedistill.files import note, read_facts, weights_file
from spikedistill.student.build import Student
from spikedistill.student.save import load_student
from spikedistill.student.upgrade import upgrade
from spikedistill.teacher.load import Architecture, Teacher, from_library, load_teacher, pretrained
from spikedistill.train.recipe import Data, Training
from spikedistill.train.run import Run, differences, environment

NO_TEACHER = "none"
"""What a recipe calls its teacher where there is none."""
ROUNDING = 1.0
"""Points by which an accuracy may move where it is computed elsewhere; more has another cause."""


@dataclass(frozen=True)
class Record:
    """A run directory of ``teach`` or ``distill``, finished or not; or the file of a student.

    Args:
        path: the directory, or the file.
        recipe: every choice of the run as names and values, in today's format whoever wrote it.
    """

    path: Path
    recipe: Mapping[str, Any]

    @staticmethod
    def read(path: str | Path) -> "Record":
        """The record of a run directory or of a student's file; nothing that it names is executed.

        Raises:
            RunError: if it holds no recipe of a teacher or student.
        """
        facts = read_facts(Path(path))
        if Path(path).is_file() and "recipe" not in facts:
            raise RunError(f"'{path}' holds no recipe: give a run directory, or the model of a student's run.")
        recipe = upgrade(facts["recipe"]) if "recipe" in facts else Run(Path(path)).recipe()
        if recipe.get("kind") not in ("teach", "distill"):
            raise RunError(f"'{path}' holds a run of kind {recipe.get('kind')!r}: give runs of 'teach' or 'distill'.")
        return Record(Path(path), recipe)

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
        """On what it was trained."""
        return self._part(Data, "data")

    @property
    def training(self) -> Training:
        """How it was trained, and where it computed."""
        return self._part(Training, "training")

    def place(self) -> Place:
        """Where the run computed, by its recipe, and by its own record (``timing.jsonl``) where that says 'auto'.

        Without such a record, or such a device here, it is what 'auto' takes on this machine.
        """
        try:
            return self._where_it_was().place()
        except ConfigError:
            return dataclasses.replace(self.training, device="auto").place()

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
            return kind(**self.recipe[name])
        except (KeyError, TypeError) as error:
            raise RunError(
                f"The recipe in '{self.path}' cannot be read ({error}): was it written by a newer version?"
            ) from error

    def results(self) -> dict[str, Any]:
        """What was measured on the test set.

        Raises:
            RunError: if the run is not finished.
        """
        return Run(self.path).read("results")

    def stored_accuracy(self) -> float | None:
        """The accuracy on the test set (percent) that was measured when the run ended, if it was written down."""
        if self.path.is_file():
            found = read_facts(self.path).get("results", {})
        else:
            found = self.results() if Run(self.path).finished else {}
        return found.get("test_accuracy")

    def elsewhere(self, place: Place) -> list[str]:
        """In what this machine, and this place on it, differ from those of the run, as far as it says."""
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
            raise RunError(f"'{self.path}' holds no finished run: end it by the same command with --resume.")
        if self.is_student:
            return load_student(self.path, trust_code=trust_code)
        return load_teacher(self.path, trust_code=trust_code)[0]

    def images(self, data_dir: str | None = None) -> ImageSet:
        """Its data set, which may lie in another place by now.

        Raises:
            DataError: if it is not there.
        """
        return dataclasses.replace(self.data, data_dir=data_dir or self.data.data_dir).load()


def read_records(paths: Sequence[Path], data_dir: str | None = None) -> tuple[list[Record], ImageSet]:
    """Several runs on one data set, and that set.

    Raises:
        ConfigError: if none is given, two have one name, or they were trained on different data.
    """
    if not paths:
        raise ConfigError("No runs were given: name one or more run directories.")
    records = [Record.read(path) for path in paths]
    names = [record.name for record in records]
    parts = [record.data for record in records]
    sets = [f"{data.name} at {data.image_size}" if data.image_size else data.name for data in parts]
    if len(set(names)) < len(names):
        raise ConfigError(f"Two of the runs have one name ({', '.join(names)}): give directories of other names.")
    if len(set(sets)) > 1:
        raise ConfigError(f"The runs were trained on different data ({', '.join(sets)}): compare runs of one set.")
    return records, records[0].images(data_dir)


def some_of(images: ImageSet, count: int | None) -> tuple[Tensor, Tensor]:
    """So many test images, evenly spaced, and their labels; all by default.

    Raises:
        ConfigError: if the count is below 1.
    """
    if count is not None and count < 1:
        raise ConfigError(f"images (={count}) must be 1 or more; leave it away for the whole test set.")
    everything = len(images.test_images)
    places = evenly(everything, everything if count is None else count)
    return images.test_images[places], images.test_labels[places]


def evaluate(
    path: Path,
    timesteps: int | None = None,
    data_dir: str | None = None,
    confidence: float | None = None,
    trust_code: bool = False,
) -> dict[str, Any]:
    """Measure a finished run again on its test set: a student perhaps with other steps or early exit, or a teacher.

    Where the accuracy is not the one that the run wrote down, a note says so, and what may be the cause.

    Args:
        path: the run directory.
        timesteps: another T.
        data_dir: another place of the data.
        confidence: of early exit, 0..1.
        trust_code: execute the Python code that the run may name as its networks. Without it a teacher of such a kind
            is left out.

    Returns:
        As ``measure_student``; the teacher is left out where its files are gone. Of a teacher ``test_accuracy``.

    Raises:
        ConfigError: if the number of steps is below 1, the confidence outside 0..1, or either is asked of a teacher.
    """
    if confidence is not None:
        check_confidence(confidence)
    record = Record.read(path)
    stored = record.stored_accuracy()
    place, network = record.place(), record.network(trust_code)
    if not isinstance(network, Student):
        if timesteps is not None or confidence is not None:
            raise ConfigError(
                f"'{path}' holds a teacher, which has no time steps: leave timesteps and confidence away."
            )
        found: dict[str, Any] = dict(measure_teacher(network, record.images(data_dir), place))
        _compare(record, stored, found, place)
        return found
    same = timesteps in (None, network.timesteps)
    if timesteps is not None:
        network.set_timesteps(timesteps)
    images = record.images(data_dir)
    found = measure_student(network, its_teacher(record, images, trust_code), images, place, confidence=confidence)
    if same:
        _compare(record, stored, found, place)
    return found


def _compare(record: Record, stored: float | None, found: Mapping[str, Any], place: Place) -> None:
    """Say where an accuracy is not the one that the run wrote down: in the same place it is equal."""
    accuracy = found.get("test_accuracy")
    if stored is None or accuracy is None or accuracy == stored:
        return
    changed = record.elsewhere(place)
    if not changed:
        why = "it is computed in the same place, so images, weights or the file are not those of the run"
    elif abs(accuracy - stored) > ROUNDING:
        why = f"more than computing elsewhere explains ({'; '.join(changed)}): compare the images with those of the run"
    else:
        why = f"it is computed elsewhere ({'; '.join(changed)}), where rounding moves it a little"
    note(f"the test accuracy is {accuracy:.2f} %, and the run '{record.path}' wrote down {stored:.2f} %: {why}.")


def its_teacher(record: Record, images: ImageSet, trust_code: bool) -> nn.Module | None:
    """The teacher of a finished student, if it is still there and saw the same inputs."""
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


def is_published(source: str, network: str | None) -> bool:
    """Whether a library's network with its published weights is meant."""
    return network is None and from_library(source) and not Path(source).exists()


def find_teacher(
    images: ImageSet,
    source: str,
    network: str | None = None,
    width: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    trust_code: bool = False,
) -> tuple[Teacher | Student | None, Architecture | None]:
    """The teacher that a recipe names, fit for the data: an ANN, or a student of ``distill``.

    Args:
        images: what it will see.
        source: a run directory, a weights file, a library's network, or ``none``.
        network: what a bare weights file belongs to.
        width: of a zoo network.
        mean: input normalisation of a bare weights file, per channel.
        std: likewise.
        trust_code: execute the Python code that a weights file may name as its network.

    Raises:
        ConfigError: if it has another number of classes, or was never trained.
    """
    if source == NO_TEACHER:
        return None, None
    given = None if network is None else Architecture(network, images.classes, images.channels, width)
    if is_published(source, network):
        teacher, architecture = pretrained(source)
    elif given is None and not Path(source).exists():
        raise ConfigError(
            f"There is no teacher at '{source}': train one by 'spikedistill teach ... --out {source}', or give a"
            " weights file with --teacher-network, --teacher-mean and --teacher-std, or 'none'."
        )
    elif (facts := read_facts(weights_file(source))).get("kind") == "student":
        return _spiking_teacher(images, source, facts, given, trust_code)
    else:
        teacher, architecture = load_teacher(source, architecture=given, mean=mean, std=std, trust_code=trust_code)
    if images.frames:
        raise ConfigError(
            f"The teacher '{source}' is an ANN without time steps, '{images.name}' holds event frames: give it images"
            " by --source, a spiking teacher, or none."
        )
    for what, its, ours in (
        ("knows {} classes", architecture.classes, images.classes),
        ("normalises {} channels", len(teacher.mean), images.channels),
    ):
        if its != ours:
            raise ConfigError(
                f"The teacher '{source}' {what.format(its)}, '{images.name}' has {ours}: give the data that it was"
                " trained on."
            )
    check_fits(teacher, images, f"The teacher '{source}' ({architecture.name})")
    return teacher, architecture


def _spiking_teacher(
    images: ImageSet, source: str, facts: Mapping[str, Any], given: Architecture | None, trust_code: bool
) -> tuple[Student, Architecture | None]:
    """A student as teacher, with its architecture if its file names one."""
    student = load_student(source, None if given is None else given.build(), trust_code)
    check_fits(student, images, f"The spiking teacher '{source}'")
    named = facts.get("network", facts.get("architecture", {}))
    try:
        return student, given or (Architecture(**named) if "name" in named else None)
    except TypeError as error:
        raise WeightsError(
            f"'{source}' names its network in a way that this version does not know ({error})."
        ) from error
