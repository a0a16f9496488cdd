"""``report``: one page of HTML that tells what was built and what happened, from the files of one or several runs.

The page holds everything: it opens from disk without a network, in light and dark, on a phone and on paper. Its
pictures are those of ``spikedistill.plot``, each with its numbers as a table.
"""

import base64
import datetime
import hashlib
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from jinja2 import Environment
from tyro.conf import arg

from spikedistill import __version__
from spikedistill.deliver.compare import Group, grouped, table
from spikedistill.deliver.curves import history, over_seeds
from spikedistill.deliver.figures import draw_curves
from spikedistill.deliver.inspect import Picture, RunInspection, flat, inspect, learning, pictured
from spikedistill.deliver.record import Record, RunDirectories
from spikedistill.deliver.results import Result, runs_in
from spikedistill.deliver.tables import Table
from spikedistill.errors import ConfigError, SpikeDistillError
from spikedistill.evaluate.latency import latency_in_words
from spikedistill.evaluate.paired import with_deviation
from spikedistill.files import check_replaceable, write_text
from spikedistill.shapes import steps_and_levels
from spikedistill.train.extend import trains
from spikedistill.train.progress import Progress
from spikedistill.train.run import Run

TEMPLATE = Path(__file__).with_name("report.html")
MARK = "<!doctype html>"
LARGEST = 5_000_000
"""Bytes of a page. Samples are left out of a page that would be larger."""
SCRIPT = """
for (const one of document.querySelectorAll("input[type=radio]"))
  one.addEventListener("change", () => {
    for (const other of document.getElementsByName(one.name))
      document.getElementById(other.value).hidden = !other.checked;
  });
"""
"""All that the page does: show the chosen sample."""
CONTENTS = {
    "built": "What was built",
    "learning": "How it learned",
    "time": "Over time",
    "inside": "Inside",
    "mistakes": "Mistakes",
    "noise": "Under noise",
    "energy": "Energy",
    "again": "Make it again",
}
"""The sections of a run by the ends of their ids."""


@dataclass
class Part:
    """What the page says of one run, or of several that differ in the seed alone."""

    name: str
    title: str
    lead: str
    tiles: Sequence[tuple[str, str]] = ()
    built: Sequence[tuple[str, str]] = ()
    layers: Sequence[Sequence[str]] = ()
    notes: Sequence[str] = ()
    seen: RunInspection = field(default_factory=RunInspection)
    commands: Sequence[str] = ()
    recipe: Sequence[tuple[str, str]] = ()
    machine: Sequence[tuple[str, str]] = ()

    @property
    def contents(self) -> list[tuple[str, str]]:
        """The sections that it has."""
        there = {
            "learning": self.seen.learning,
            "time": self.seen.time,
            "inside": self.seen.layers,
            "mistakes": self.seen.mistakes or self.seen.apart,
            "noise": self.seen.robust,
            "energy": self.seen.energy,
        }
        return [(key, name) for key, name in CONTENTS.items() if there.get(key, True)]


def report(
    runs: RunDirectories,
    out: Annotated[Path | None, arg(metavar="FILE.html")] = None,
    images: int = 1000,
    baseline: str | None = None,
    data_dir: str | None = None,
    trust_code: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write a page that tells what was built and what happened.

    It is one HTML file for a browser, which needs no network. Several runs are compared; those that differ in the seed
    alone have means and deviations. An unfinished run has a page of what it has done so far.

    Args:
        runs: run directories, or folders that hold several.
        out: the file (default: report.html in the run directory, for several runs in the current folder).
        images: number of test images that are looked at, evenly spaced.
        baseline: of several runs the row, by its name or its method, that others are compared to seed by seed (default:
            direct, if there is such a row, else the first student).
        data_dir: folder of the data, if it is no longer the one of the runs.
        trust_code: execute Python code that a run may name as its networks. Without it such a run is told from its
            files alone.
        progress: shows the work; silent by default.

    Raises:
        RunError: if a path holds no run that can be read, or the file exists and is no page.
        ConfigError: if no run or no image is given, or the file's name does not end in .html.
    """
    if not runs:
        raise ConfigError("No runs were given: name one or more run directories.")
    if images < 1:
        raise ConfigError(f"images (={images}) must be 1 or more.")
    paths = runs_in(runs)
    file = out or (paths[0] if len(paths) == 1 else Path()) / "report.html"
    if file.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"out (={file}) is a page: give a name that ends in .html.")
    check_replaceable(file, MARK)
    progress = progress or Progress.silent()
    records = [Record.read(path) for path in paths]
    results = [Result.read(record) for record in records if Run(record.path).finished]
    groups, repeated = grouped(results)
    given: dict[str, Any] = {"images": images, "data_dir": data_dir, "trust_code": trust_code, "progress": progress}
    parts = [_finished(number, group, **given) for number, group in enumerate(groups)]
    parts += [_unfinished(len(parts) + n, one) for n, one in enumerate(r for r in records if r not in _of(results))]
    compared: list[Picture] = []
    comparison: Table | None = None
    if len(results) > 1:
        comparison, compared = table(results, baseline, repeated), _compared(groups)
    title = records[0].name if len(records) == 1 else f"{len(records)} runs"
    lead = parts[0].lead if len(parts) == 1 else "Runs side by side, then each by itself."
    again = shlex.join(["spikedistill", "report", *map(str, runs)])
    page = _page(title, lead, parts, comparison, compared, again)
    if len(page.encode()) > LARGEST:
        for part in parts:
            part.seen.samples = []
        page = _page(title, lead, parts, comparison, compared, again)
    write_text(file, page)
    return file


def _of(results: Sequence[Result]) -> list[Record]:
    return [result.record for result in results]


def _page(
    title: str, lead: str, parts: Sequence[Part], comparison: Table | None, compared: Sequence[Picture], command: str
) -> str:
    """The page from its template. Everything that comes from files is escaped, except pictures, which are ours."""
    made = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    return made.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=title,
        lead=lead,
        parts=parts,
        comparison=comparison,
        compared=compared,
        command=command,
        script=SCRIPT,
        script_hash=digest,
        version=__version__,
        date=datetime.date.today().isoformat(),
    )


def _finished(
    number: int, group: Group, images: int, data_dir: str | None, trust_code: bool, progress: Progress
) -> Part:
    """The part of a finished run, or of several seeds; the first is looked at more closely."""
    result, name, notes = group.first, f"run{number}", []
    record = result.record
    try:
        seen = inspect(record, record.images(data_dir), name, images, trust_code, progress)
    except (SpikeDistillError, OSError) as error:  # what the run names may be gone, or be code that is not trusted
        seen = RunInspection(learning(record, name))
        notes.append(f"Told from its files alone, since it could not be run here: {error}")
    if len(group.results) > 1:
        told = ", ".join(f"{seed}: {value:.2f} %" for seed, value in group.accuracies.items())
        notes.append(f"{len(group.results)} seeds ({told}). Below is the run of seed {result.seed}.")
    part = Part(name, group.name, _lead(group, seen), _tiles(group, seen), seen=seen, notes=notes)
    return _described(part, record, result)


def _unfinished(number: int, record: Record) -> Part:
    """The part of a run that has not ended."""
    name, run = f"run{number}", Run(record.path)
    done, of = len(run.lines("metrics")), record.recipe["training"]["epochs"]
    lead = f"Not finished: {done} of {of} epochs are done. The command that began it continues it with --resume."
    part = Part(name, record.name, lead, seen=RunInspection(learning(record, name)))
    return _described(part, record, None)


def _lead(group: Group, seen: RunInspection) -> str:
    """What it is and how good, in a sentence."""
    result = group.first
    value = f"{with_deviation([*group.accuracies.values()])} %"
    if not result.record.is_student:
        return f"An ANN ({result.network}) on {result.record.data.name}. Its test accuracy is {value}."
    steps = steps_and_levels(result.timesteps or 1, result.levels or 1)
    said = f"A spiking student ({result.network}, {steps}) on {result.record.data.name}, made by {result.method}. "
    said += f"Its test {result.measure} is {value}"
    theirs = result.found.get("teacher_accuracy")
    return said + (f", where its teacher has {theirs:.2f} %." if theirs is not None else ".")


def _tiles(group: Group, seen: RunInspection) -> list[tuple[str, str]]:
    """The figures to see first."""
    result = group.first
    tiles = [(f"{with_deviation([*group.accuracies.values()])} %", f"test {result.measure}")]
    for key, label, form in (
        ("teacher_accuracy", "teacher's test accuracy", "{:.2f} %"),
        ("agreement", "same answer as the teacher", "{:.2f} %"),
        ("firing_rate", "of neurons fire in a sub-step", "{:.1f} %"),
    ):
        if result.found.get(key) is not None and key != result.measure:
            tiles.append((form.format(result.found[key]), label))
    if seen.top5 is not None:
        tiles.append((f"{seen.top5:.2f} %", f"right class among the first five ({seen.images} images)"))
    if result.record.is_student:
        tiles.append((f"{result.timesteps} x {result.levels}", "time steps x levels"))
    if result.minutes:
        long = result.minutes >= 1
        tiles.append(
            (
                f"{result.minutes if long else 60 * result.minutes:.1f}",
                f"{'minutes' if long else 'seconds'} of training",
            )
        )
    return tiles


def _described(part: Part, record: Record, result: Result | None) -> Part:
    """The part with what it was made of, its recipe and its machine."""
    run, recipe = Run(record.path), record.recipe
    made = run.read("conversion") if record.is_student and (record.path / "conversion.json").exists() else {}
    built = [("data", _data(run, record))]
    if record.is_student:
        choice, method = recipe["teacher"], recipe["method"]
        fields = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in method.items() if k not in ("name", "sha256") and v)
        built += [
            ("teacher", f"{choice['source']}" + (f" ({choice['network']})" if choice.get("network") else "")),
            ("student", f"{made.get('network', recipe['student']['network'])}, {_neuron(recipe['student'])}"),
            ("weights", _weights(made)),
            ("method", f"{method['name']}" + (f" ({fields})" if fields else "")),
        ]
    else:
        built.append(("network", str(recipe.get("network"))))
    if result and "latency" in result.found:
        built.append(("latency", _latency(result.found)))
    training = recipe["training"]
    said = f"{training['epochs']} epochs, batch {training['batch_size']}, {training['optimizer']}, learning rate"
    said += f" {training['lr']}, {training['schedule']}, seed {training['seed']}"
    built.append(("training", said if trains(recipe) else "none: converted"))
    part.built = built
    part.layers = [
        [one["name"], one["kind"], Path(str(one["source"])).name, f"{one['threshold']:.4g}"]
        for one in made.get("sites", [])
    ]
    verb = "distill" if record.is_student else "teach"
    same, other = shlex.quote(str(record.path)), shlex.quote(f"{record.path}-again")
    finish = [] if result else [f"spikedistill {verb} --config {same} --out {same} --resume"]
    again = f"spikedistill {verb} --config {same} --out {other}"
    part.commands = [*finish, again, *([f"spikedistill evaluate {same}"] if result else [])]
    part.recipe = flat({k: v for k, v in recipe.items() if k not in ("kind", "format", "run", "checksum")})
    environment = run.read("environment") if (record.path / "environment.json").exists() else {}
    part.machine = flat({k: v for k, v in environment.items() if k not in ("run", "checksum")})
    return part


def _neuron(student: Mapping[str, Any]) -> str:
    """Time steps, levels and neuron in words."""
    steps = steps_and_levels(student["timesteps"], student.get("levels", 1))
    return f"{steps}, {student['neuron']} neurons, {student.get('coding', 'direct')} coding"


def _weights(made: Mapping[str, Any]) -> str:
    """Where a student's weights came from, in words."""
    if made.get("start"):
        return f"those of the student {made['start']}"
    return "inherited from the teacher" if made.get("inherited") else "fresh"


def _latency(found: Mapping[str, Any]) -> str:
    """Sub-steps until the answer, and how many spikes wait meanwhile, in words."""
    times = " or ".join(latency_in_words(found["latency"]))
    bits = sum(one["bits"] for one in found["buffers"])
    waiting = f"; {bits:,} bits of spikes wait in {len(found['buffers'])} buffers" if bits else ""
    return f"{times} (sub-steps until the answer){waiting}"


def _data(run: Run, record: Record) -> str:
    if not (run.path / "data.json").exists():
        return record.data.name
    facts = run.read("data")["data"]
    shape = " x ".join(map(str, facts["shape"]))
    counts = f"{facts['train_images']:,} training and {facts['test_images']:,} test samples"
    return f"{Path(record.data.name).name}: {counts} of {shape}, {len(facts['class_names'])} classes"


def _compared(groups: Sequence[Group]) -> list[Picture]:
    """Accuracy at each time step, and over training time, of all runs."""
    found = []
    steps = {
        group.name: [(float(t), sum(values) / len(values)) for t, values in
                     enumerate(zip(*(result.steps for result in group.results)), 1)]
        for group in groups if group.first.record.is_student
    }  # fmt: skip
    teachers = {one.name: one.accuracy for one in groups if not one.first.record.is_student}
    if longest := max((len(points) for points in steps.values()), default=0):
        curves = {name: points for name, points in steps.items() if points}
        ends = [(1.0, 0.0), (float(longest), 0.0)]
        curves |= {name: [(t, value) for t, _ in ends] for name, value in teachers.items()}
        rows = [[name, *(f"{value:.2f}" for _, value in points)] for name, points in steps.items()]
        columns = ["run", *(f"t={t}" for t in range(1, longest + 1))]
        rows = [[*row, *[""] * (len(columns) - len(row))] for row in rows]
        drawn = draw_curves({"": curves}, "time step", "accuracy (%)")
        about = "Mean over seeds, on the whole test set."
        found.append(pictured("compared-steps", "Accuracy at each time step", about, drawn, columns, rows))
    learned = {group.name: over_seeds([history(one) for one in group.results]) for group in groups}
    learned = {name: points for name, points in learned.items() if points}
    if learned:
        drawn = draw_curves({"": learned}, "minutes of training", "accuracy (%)")
        rows = [[name, f"{x:.2f}", f"{y:.2f}"] for name, points in learned.items() for x, y in points]
        columns = ["run", "minutes", "validation accuracy (%)"]
        about = "Validation accuracy, mean over seeds. Minutes are those of each run's machine."
        found.append(pictured("compared-learning", "Over training time", about, drawn, columns, rows))
    return found
