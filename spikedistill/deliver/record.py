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
from spikedistill.errors import ConfigError, RunError, WeightsError
from spikedistill.evaluate.early_exit import check_confidence
from spikedistill.evaluate.measure import check_fits, measure_student, measure_teacher
from spikedistill.files import note, read_facts, weights_file
from spikedistill.student.build import Student
from spikedistill.student.save import load_student
from spikedistill.student.upgrade import upgrade
from spikedistill.teacher.load import Architecture, Teacher, from_library, load_teacher, pretrained
from spikedistill.train.machine import environment
from spikedistill.train.progress import Progress, Seen
from spikedistill.train.recipe import Data, Training
from spikedistill.train.run import Run, differences

NO_TEACHER = "none"
"""The value of a recipe's teacher if it has none."""
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
        if not Path(path).exists():
            raise RunError(f"'{path}' does not exist: give a run directory, or the model of a student's run.")
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
            return kind(**self.recipe[name])
        except (KeyError, TypeError) as error:
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
            DataError: if it does not exist.
        """
        return dataclasses.replace(self.data, data_dir=data_dir or self.data.data_dir).load()


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
    sets = [f"{data.name} at {data.image_size}" if data.image_size else data.name for data in parts]
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
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure a finished run again on its test set.

    A student may run with another T than it was trained with. A note then says that thresholds belong to the T that
    they were trained for. If the accuracy differs from the one that the run wrote, a note says so and names possible
    causes.

    Args:
        path: run directory of 'teach' or 'distill', or the file of a student.
        timesteps: another T than the student was trained with; its thresholds stay.
        data_dir: folder of the data, if it is no longer the one of the run.
        confidence: also measure early exit: a sample leaves once its likeliest class has more than this probability,
            0 to 1.
        trust_code: execute the Python code that the run may name as its networks. Without it such a teacher is left
            out.
        device: cpu, cuda ...; auto takes a GPU if there is one (default: where the run was trained).
        precision: number format of the large operations; auto takes what suits the device (default: that of the run).
        progress: shows the work; silent by default.

    Returns:
        For a student see ``measure_student``; its teacher is left out if its files are gone. For a teacher
        ``test_accuracy``.

    Raises:
        ConfigError: if ``timesteps`` is below 1, the confidence is outside 0..1, either is given for a teacher, or the
            device does not exist here.
    """
    if confidence is not None:
        check_confidence(confidence)
    record = Record.read(path)
    stored = record.stored_accuracy()
    place, network = record.place(device, precision), record.network(trust_code)
    if not isinstance(network, Student):
        if timesteps is not None or confidence is not None:
            raise ConfigError(f"'{path}' holds a teacher, which has no time steps: omit timesteps and confidence.")
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
        found = measure_student(network, teacher, images, place, confidence=confidence, seen=seen)
    if network.timesteps == own:
        _compare(record, stored, found, place)
    return found


def _testing(images: ImageSet, passes: int, progress: Progress | None) -> AbstractContextManager[Seen]:
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


def is_published(source: str, network: str | None) -> bool:
    """Whether the source is a library's network with its published weights."""
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
    """The teacher that a recipe names, checked against the data: an ANN, or a student of ``distill``.

    Args:
        images: the data set.
        source: a run directory, a weights file, a library's network, or ``none``.
        network: the network of a weights file that does not name it.
        width: channels of the first stage of a zoo network.
        mean: mean per channel for the input normalisation of a weights file that does not hold it.
        std: standard deviation per channel, likewise.
        trust_code: execute the Python code that a weights file may name as its network.

    Raises:
        ConfigError: if it does not exist, does not fit the data, or was never trained.
        RunError: if its run is not finished.
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
    elif (Path(source) / "recipe.json").exists() and not (run := Run(Path(source))).finished:
        raise RunError(f"The teacher '{source}' {run.unfinished()}: end it by its own command with --resume.")
    elif (facts := read_facts(weights_file(source))).get("kind") == "student":
        return _spiking_teacher(images, source, facts, given, trust_code)
    else:
        teacher, architecture = load_teacher(source, architecture=given, mean=mean, std=std, trust_code=trust_code)
    if images.frames:
        raise ConfigError(
            f"The teacher '{source}' is an ANN without time steps, but '{images.name}' holds event frames: give it"
            " images by --source, or use a spiking teacher or none."
        )
    for what, its, ours in (
        ("knows {} classes", architecture.classes, images.classes),
        ("normalises {} channels", len(teacher.mean), images.channels),
    ):
        if its != ours:
            raise ConfigError(
                f"The teacher '{source}' {what.format(its)}, but '{images.name}' has {ours}: give the data that it was"
                " trained on."
            )
    check_fits(teacher, images, f"The teacher '{source}' ({architecture.name})")
    return teacher, architecture


def _spiking_teacher(
    images: ImageSet, source: str, facts: Mapping[str, Any], given: Architecture | None, trust_code: bool
) -> tuple[Student, Architecture | None]:
    """A student as the teacher, with its architecture if its file names one."""
    student = load_student(source, None if given is None else given.build(), trust_code)
    check_fits(student, images, f"The spiking teacher '{source}'")
    named = facts.get("network", facts.get("architecture", {}))
    try:
        return student, given or (Architecture(**named) if "name" in named else None)
    except TypeError as error:
        raise WeightsError(
            f"This version cannot read the description of the network in '{source}' ({error}): save it again."
        ) from error
