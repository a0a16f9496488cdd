"""Finished runs in one table. Runs that differ only in the seed are one row, compared seed by seed with a baseline."""

import json
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from spikedistill.deliver.results import Result, main_measure, read_results
from spikedistill.deliver.tables import Table
from spikedistill.errors import ConfigError, unknown
from spikedistill.evaluate.paired import error_of, interval_of, p_value, paired_differences, verdict, with_deviation
from spikedistill.shapes import steps_by_levels
from spikedistill.student.substeps import LAYERS

FEW = 8
"""Up to this many time steps each has a column; beyond, only powers of two and the last."""
STEPS = """T x D: time steps times levels, the most spikes of a neuron within a step, which are as many binary
sub-steps. The firing rate is spikes per neuron and sub-step. Minutes are for training, on the machine of the run."""
LATENCY = "Latency: sub-steps until the answer, layer by layer."
CAPTION = f"""Accuracy on the test set after the last epoch, and after each time step t; the teacher's is on the same
images. {STEPS}"""
WITHOUT_LABELS = f"""Agreement with the teacher on the test set, which has no labels, after the last epoch, and after
each time step t. {STEPS}"""
OVER_SEEDS = """± is the sample standard deviation over n seeds; each teacher was trained once, so ± does not include
the variation of teachers. Difference: points above {baseline}, paired by seed, with its standard error (s.e.) and the p
value of a paired t-test."""
BOLD = "Bold: the highest mean {measure} of a student, significant or not."


@dataclass(frozen=True)
class Group:
    """Runs that differ only in the seed: one row of the table."""

    name: str
    results: Sequence[Result]

    @property
    def first(self) -> Result:
        """The first run, for everything that all runs of the group share."""
        return self.results[0]

    @property
    def accuracies(self) -> dict[int, float]:
        """Accuracy of each seed, in percent."""
        return {result.seed: result.accuracy for result in self.results}

    @property
    def accuracy(self) -> float:
        """The mean accuracy over seeds, in percent."""
        return statistics.fmean(self.accuracies.values())


def compare(paths: Sequence[Path], baseline: str | None = None) -> Table:
    """Compare runs in a table. No code that the runs name is executed.

    Args:
        paths: run directories of ``teach`` and ``distill``, or folders of them. Unfinished runs are named in a note.
        baseline: as for ``table``.

    Raises:
        RunError: if a path holds no run that can be read, or no run is finished.
        ConfigError: if the baseline does not exist.
    """
    results, unfinished = read_results(paths)
    return table(results, baseline, unfinished)


def table(results: Sequence[Result], baseline: str | None = None, notes: Sequence[str] = ()) -> Table:
    """The table of finished runs, with one row for each recipe.

    If a row has several seeds, there are columns for their number ``n`` and for the paired difference from a baseline:
    mean ± sample deviation, standard error, p value, and in how many seeds it is positive. A row with other data or
    another teacher than the baseline has no difference; a note says so.

    Args:
        results: at least one.
        baseline: name or method of a row (default: ``direct``, cross-entropy only, else the first student).
        notes: notes that the table already has.

    Raises:
        ConfigError: if the baseline does not exist or is ambiguous.
    """
    groups, repeated = grouped(results)
    several = any(len(group.results) > 1 for group in groups)
    base = _baseline(groups, baseline)
    apart = {group.name: _apart(group, base) for group in groups if group is not base} if several else {}
    told = [OVER_SEEDS.format(baseline=base.name).replace("\n", " ")] if several else []
    told += [*notes, *repeated, *(f"{name} has no difference: {why}." for name, why in apart.items() if why)]
    told += [*_doubts(groups), *_changed_teachers(groups)]
    sets = dict.fromkeys(group.first.record.data.name for group in groups)
    if len({group.first.test_set for group in groups}) > 1:
        told.append(f"The runs were tested on different sets ({', '.join(sets)}): compare accuracies within one set.")
    measure = main_measure(results)
    cells = [_cells(group, several, base, bool(apart.get(group.name)), groups, measure) for group in groups]
    gains = {group.name: gain for group in groups if not apart.get(group.name) and (gain := _gains(group, base))}
    told += [said.strip()] if several and (said := verdict(gains)) else []
    bold = _best(groups, list(cells[0]).index(f"{measure} (%)"))
    about = [CAPTION if measure == "accuracy" else WITHOUT_LABELS, *([LATENCY] if "latency" in cells[0] else [])]
    caption = " ".join([*about, *([BOLD.format(measure=measure)] if bold else [])]).replace("\n", " ")
    return Table(list(cells[0]), [list(row.values()) for row in cells], caption, told, bold)


def grouped(results: Sequence[Result]) -> tuple[list[Group], list[str]]:
    """Runs grouped by recipe, in order of first appearance; and sentences on runs that repeat others.

    A second run with the same recipe and seed is left out: it is not an independent sample.
    """
    found: dict[str, dict[int, Result]] = {}
    notes = []
    for result in results:
        seeds = found.setdefault(json.dumps(result.choices, sort_keys=True), {})
        if result.seed in seeds:
            other = seeds[result.seed].record.path
            notes.append(f"'{result.record.path}' has the same recipe and seed as '{other}' and is left out.")
        else:
            seeds[result.seed] = result
    sorted_seeds = [[seeds[seed] for seed in sorted(seeds)] for seeds in found.values()]
    return [Group(name, seeds) for name, seeds in zip(_names(sorted_seeds), sorted_seeds)], notes


def _names(groups: Sequence[Sequence[Result]]) -> list[str]:
    """A name for each row: its directory's, for several seeds without the seed; with the folder if two are equal."""
    names = [_shared_name([result.record.name for result in group]) for group in groups]
    paths = [group[0].record.path.resolve().parent / name for group, name in zip(groups, names)]
    longer = [f"{path.parent.name}/{path.name}" if names.count(path.name) > 1 else path.name for path in paths]
    return [str(path) if longer.count(name) > 1 else name for path, name in zip(paths, longer)]


def _shared_name(names: Sequence[str]) -> str:
    """The common part of the directories' names before the seed at their end; else the first name.

    >>> _shared_name(["kdsnn-t4-s0", "kdsnn-t4-s1"]), _shared_name(["a-s0"]), _shared_name(["one", "two"])
    ('kdsnn-t4', 'a-s0', 'one')
    """
    bare = {re.sub(r"[-_.]?(s|seed)?[-_.]?\d+$", "", name) for name in names}
    return bare.pop() or names[0] if len(names) > 1 and len(bare) == 1 else names[0]


def _baseline(groups: Sequence[Group], asked: str | None) -> Group:
    if asked is None:
        students = [group for group in groups if group.first.record.is_student]
        return next((group for group in students if group.first.method == "direct"), [*students, *groups][0])
    named = [group for group in groups if group.name == asked]
    named = named or [group for group in groups if asked in (group.first.method, group.first.record.name)]
    if not named:
        raise ConfigError(unknown("row to compare with", asked, [group.name for group in groups]))
    if len(named) > 1:
        names = ", ".join(group.name for group in named)
        raise ConfigError(f"baseline (={asked}) is the method of several rows ({names}): give one of these names.")
    if not named[0].first.record.is_student and any(group.first.record.is_student for group in groups):
        raise ConfigError(f"baseline (={asked}) is a teacher, and students are compared with a student: name one.")
    return named[0]


def _apart(group: Group, base: Group) -> str:
    """Why a row cannot be compared with the baseline seed by seed; empty if it can, or if it is a teacher."""
    ours, theirs = group.first, base.first
    if ours.test_set != theirs.test_set:
        return f"its data ({ours.record.data.name}) are not those of {base.name} ({theirs.record.data.name})"
    if ours.measure != theirs.measure:
        return f"it is measured by {ours.measure}, and {base.name} by {theirs.measure}"
    if ours.has_teacher and theirs.has_teacher and ours.teacher != theirs.teacher:
        return f"its teacher ({ours.teacher[0]}) is not that of {base.name} ({theirs.teacher[0]})"
    if ours.record.is_student != theirs.record.is_student:
        return ""
    return "" if _gains(group, base) else f"it shares no seed with {base.name}"


def _gains(group: Group, base: Group) -> list[float]:
    """Points above the baseline for each seed; empty between a student and a teacher."""
    if group is base or group.first.record.is_student != base.first.record.is_student:
        return []
    return paired_differences(group.accuracies, base.accuracies)


def _doubts(groups: Sequence[Group]) -> list[str]:
    """The doubts about their teachers that the runs reported, each once."""
    by: dict[str, dict[str, None]] = {}
    for name, result in ((group.name, result) for group in groups for result in group.results):
        for doubt in result.found.get("teacher", {}).get("doubts", ()):
            by.setdefault(doubt, {})[name] = None
    return [f"Check the teacher of {', '.join(names)}: {doubt}." for doubt, names in by.items()]


def _changed_teachers(groups: Sequence[Group]) -> list[str]:
    """Teachers whose accuracy was not the same in all runs."""
    by: dict[tuple[str, ...], set[str]] = {}
    for result in (result for group in groups for result in group.results):
        if "teacher_accuracy" in result.found:
            key = (result.teacher[0], *map(str, result.test_set))
            by.setdefault(key, set()).add(f"{result.found['teacher_accuracy']:.2f}")
    return [
        f"The teacher '{key[0]}' did not have the same accuracy in all runs ({', '.join(sorted(found))} %): it was"
        " trained again in between, or the runs were computed on different machines."
        for key, found in by.items()
        if len(found) > 1
    ]


def _cells(
    group: Group, several: bool, base: Group, apart: bool, groups: Sequence[Group], measure: str
) -> dict[str, str]:
    """The cells of a row, by column."""
    one, results = group.first, group.results
    row = {"run": group.name} | ({"n": str(len(results))} if several else {})
    row[f"{measure} (%)"] = with_deviation([*group.accuracies.values()] if one.measure == measure else [])
    if several:
        row |= _difference("baseline" if group is base else [] if apart else _gains(group, base))
    row |= {"method": one.method, "network": one.network, "T x D": _steps(one)}
    if any(map(_latency, groups)):
        row["latency"] = _latency(group)
    row["weights"] = one.weights
    row["teacher (%)"] = _teacher(group)
    row["epochs"] = _span([str(result.epochs) for result in results])
    minutes = [result.minutes for result in results if result.minutes is not None]
    mean = statistics.fmean(minutes or [0.0])
    row["minutes"] = f"{mean:.{1 if mean >= 1 else 2}f}" if minutes else ""
    for name in ("firing_rate", "agreement"):
        row[f"{name.replace('_', ' ')} (%)"] = with_deviation([r.found[name] for r in results if name in r.found])
    for t in _shown_steps(groups):
        at = [result.steps[t - 1] for result in results if len(result.steps) >= t and result.measure == measure]
        row[f"t={t} (%)"] = f"{statistics.fmean(at):.2f}" if at else ""
    return row


def _steps(result: Result) -> str:
    """T x D of a student; empty for a teacher."""
    if result.timesteps is None or result.levels is None:
        return ""
    return steps_by_levels(result.timesteps, result.levels)


def _latency(group: Group) -> str:
    """Sub-steps until the answer, layer by layer; empty for a teacher, and for runs of earlier versions."""
    found = (result.found.get("latency", {}) for result in group.results)
    return _span([str(latency[LAYERS]) for latency in found if LAYERS in latency])


def _difference(gains: Sequence[float] | str) -> dict[str, str]:
    """The columns of a paired difference; the baseline has the word ``baseline`` instead."""
    columns = ["difference (points)", "s.e. (points)", "95 % interval", "p", "positive in"]
    if isinstance(gains, str) or not gains:
        return dict(zip(columns, [gains if isinstance(gains, str) else "", "", "", "", ""]))
    error, interval, p = error_of(gains), interval_of(gains), p_value(gains)
    shown = "" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"
    positive = f"{sum(gain > 0 for gain in gains)} of {len(gains)}"
    cells = [with_deviation(gains, sign=True), "" if error is None else f"{error:.2f}"]
    cells.append("" if interval is None else f"{interval[0]:+.2f} to {interval[1]:+.2f}")
    return dict(zip(columns, [*cells, shown, positive]))


def _teacher(group: Group) -> str:
    """The teacher's accuracy on the test set, else on other images; with a question mark if the run doubts it."""
    told = []
    for found in (result.found for result in group.results):
        about = found.get("teacher", {})
        doubt = " ?" if about.get("doubts") else ""
        if "teacher_accuracy" in found:
            told.append(f"{found['teacher_accuracy']:.2f}{doubt}")
        elif "accuracy" in about:
            told.append(f"{about['accuracy']:.2f} on {about['images']} other images{doubt}")
    return _span(told)


def _span(values: Sequence[str]) -> str:
    """The common value, or all different values."""
    return ", ".join(dict.fromkeys(values))


def _shown_steps(groups: Sequence[Group]) -> list[int]:
    """The time steps that have columns."""
    lengths = {len(result.steps) for group in groups for result in group.results} - {0}
    most = max(lengths, default=0)
    if most <= FEW:
        return list(range(1, most + 1))
    return sorted(lengths | {2**power for power in range(most.bit_length())})


def _best(groups: Sequence[Group], place: int) -> frozenset[tuple[int, int]]:
    """The cells with the highest mean accuracy of a student; none for a single student or several test sets."""
    students = {row: group.accuracy for row, group in enumerate(groups) if group.first.record.is_student}
    if len(students) < 2 or len({(groups[row].first.test_set, groups[row].first.measure) for row in students}) > 1:
        return frozenset()
    return frozenset((row, place) for row, mean in students.items() if mean == max(students.values()))
