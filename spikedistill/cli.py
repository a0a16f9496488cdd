"""The command line: parses, calls, prints. Results go to standard output, everything else to standard error."""

import dataclasses
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from spikedistill.errors import ConfigError, SpikeDistillError, ended_by, one_of

USAGE = """usage: spikedistill COMMAND [OPTIONS]

A trained ANN becomes a spiking student: deep spiking networks by knowledge distillation.

  demo                 a teacher and three students on the embedded digits (a minute)
  teach [RECIPE]       train a teacher (an ANN)
  distill [RECIPE]     teacher -> spiking student -> measured
  evaluate RUN         measure a finished run again
  compare RUN...       finished runs in one table
  immunity RUN...      finished runs under noise, corruptions, faults and attacks
  energy RUN...        their spikes, synaptic operations and estimated energy
  reproduce STUDY      a published comparison, measured here: table, figure, CSV
  recipes              the ready recipes

'spikedistill COMMAND --help' lists the options of a command.
Begin with: spikedistill demo"""

AGAIN = dict.fromkeys(
    ("distill", "immunity", "teach"), "the same command with --resume goes on from the last checkpoint"
)
AGAIN |= dict.fromkeys(("demo", "reproduce"), "the same command goes on from the last checkpoint")
"""What an interrupted command leaves, if anything."""

TO_STDERR = logging.lastResort or logging.StreamHandler()
"""Prints notes as they are to standard error."""
PLAIN = {"divergence": ".4f", "early_exit_steps": ".2f"}
"""Measures that are no percentages, and how they are printed."""


@dataclass(frozen=True)
class Where:
    """Where a run goes."""

    out: Path | None = None
    """Run directory; by default runs/RECIPE-METHOD-tT, for a teacher runs/RECIPE-teacher; without a recipe the name of
    the data stands for it."""
    resume: bool = False
    """Go on with the run that lies there."""


@dataclass(frozen=True)
class Trust(Where):
    """Where a run goes, and whom it trusts."""

    trust_code: bool = False
    """Execute the file of Python code that a teacher's weights file names as its network."""


def main() -> None:
    """Run the command that the arguments name; end with code 2 and one message where something is wrong."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return
    logging.getLogger("spikedistill").addHandler(TO_STDERR)
    try:
        one_of("command", arguments[0], COMMANDS)
        COMMANDS[arguments[0]](arguments[1:])
    except SpikeDistillError as error:
        Console(file=sys.stderr, soft_wrap=True, highlight=False).print(f"spikedistill: {error}", markup=False)
        sys.exit(2)
    except BrokenPipeError:  # who read our output has left, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        print(f"spikedistill: {error}: check the path and its permissions.", file=sys.stderr)
        sys.exit(2)
    except BaseException as error:  # Ctrl-C, an option that is wrong, or whatever code of the user's ends us with
        if type(error) is KeyboardInterrupt:
            print(f"\nspikedistill: interrupted; {AGAIN.get(arguments[0], 'nothing was kept')}.", file=sys.stderr)
            sys.exit(130)
        if isinstance(error, Exception) or (place := ended_by(error, parser=tyro.__file__)) is None:
            raise
        said = f"ended this command by {type(error).__name__}({error}), and nothing was finished"
        print(f"spikedistill: {place} {said}: let that code return, or raise an Exception.", file=sys.stderr)
        sys.exit(2)


def _teach(arguments: Sequence[str]) -> None:
    from spikedistill.recipes import TEACHERS
    from spikedistill.recipes.teach import Teach, teach
    from spikedistill.train.progress import Progress

    name, recipe, rest = _recipe(arguments, TEACHERS, Teach)
    parsed = _parse("teach", Teach, {"where": Where(), "recipe": recipe}, rest)
    where, recipe = parsed.where, parsed.recipe
    out = where.out or Path("runs") / f"{name or Path(recipe.data.name).stem}-teacher"
    results = teach(recipe, out, where.resume, Progress.stderr("teacher"))
    print(f"test accuracy {results['test_accuracy']:.2f} %; the teacher is in {out}")


def _distill(arguments: Sequence[str]) -> None:
    from spikedistill.recipes import STUDENTS
    from spikedistill.recipes.distill import Distill, distill
    from spikedistill.train.progress import Progress

    name, recipe, rest = _recipe(arguments, STUDENTS, Distill)
    asked = [value for option, value in zip(rest, [*rest[1:], ""]) if option == "--method"]
    asked += [option.removeprefix("--method=") for option in rest if option.startswith("--method=")]
    recipe = recipe.with_method(asked[-1]) if asked else recipe
    parts = {part.name: getattr(recipe, part.name) for part in dataclasses.fields(recipe)}
    given = {"where": Trust(), "named": Named(recipe.method_name), **parts}
    try:
        parsed = _parse("distill", Distill, {key: part for key, part in given.items() if part is not None}, rest)
    except AssertionError as error:  # of tyro
        fields = ", ".join(field.name for field in dataclasses.fields(recipe.method))
        raise ConfigError(
            f"A field of {recipe.method_name} ({fields}) is an option already, or holds fields as a schedule does:"
            " rename it, or make such values inside the class."
        ) from error
    recipe = dataclasses.replace(recipe, **{key: getattr(parsed, key, None) for key in parts})
    if recipe.method is None and recipe.method_name != parsed.named.method:
        raise ConfigError(
            f"rule (={recipe.student.rule}) is not that of --method {parsed.named.method}: leave --rule away, or give"
            f" --method {recipe.method_name}."
        )
    where, kind = parsed.where, recipe.method_name.rpartition(":")[2]
    out = where.out or Path("runs") / f"{name or Path(recipe.data.name).stem}-{kind}-t{recipe.student.timesteps}"
    distill(recipe, out, where.resume, Progress.stderr(kind), where.trust_code)
    _print_table([out])
    print(f"the student is in {out}")


@dataclass(frozen=True)
class Named:
    """What is taught."""

    method: str = "kdsnn"
    """direct or tet: cross-entropy only. kdsnn-response, kdsnn-feature, kdsnn: with the teacher's logits, its features,
    or both. conversion-max, -percentile, -least-squares: no training, thresholds by that rule; conversion-qcfs: the
    quantised stand-in is trained, then run with neurons. FILE.py:CLASS: an objective of your own. The options of the
    chosen method are listed below, as 'method options'."""


def _recipe(
    arguments: Sequence[str], known: dict[str, Callable[[], Any]], kind: type
) -> tuple[str, Any, Sequence[str]]:
    """The recipe that the first argument names, if it is no option; else the defaults."""
    if not arguments or arguments[0].startswith("-"):
        return "", kind(), arguments
    one_of("recipe", arguments[0], known)
    return arguments[0], known[arguments[0]](), arguments[1:]


def _parse(command: str, kind: type, parts: dict[str, Any], arguments: Sequence[str]) -> Any:
    """Every field of these values as an option; what they are by default is what they are here."""
    joined = dataclasses.make_dataclass(
        kind.__name__ + "Command", [(name, type(part), field(default=part)) for name, part in parts.items()]
    )
    joined.__doc__ = (
        f"{kind.__doc__}\n\nRECIPE comes first, if at all: see 'spikedistill recipes'. Its fields are options."
    )
    return tyro.cli(
        tyro.conf.OmitArgPrefixes[joined],  # type: ignore[valid-type, misc]
        prog=f"spikedistill {command} [RECIPE]",
        args=list(arguments),
    )


def _demo(arguments: Sequence[str]) -> None:
    def demo(out: Path = Path("runs/demo")) -> None:
        """On the embedded digits: a teacher, two students by cross-entropy only (fresh, inherited) and one by KDSNN.

        Args:
            out: where the four run directories go; finished ones are kept.
        """
        from spikedistill.recipes.demo import demo as run

        _print_table(run(out))

    tyro.cli(demo, prog="spikedistill demo", args=list(arguments))


def _evaluate(arguments: Sequence[str]) -> None:
    def evaluate(
        run: Annotated[Path, tyro.conf.Positional],
        timesteps: int | None = None,
        data_dir: str | None = None,
        confidence: float | None = None,
        trust_code: bool = False,
    ) -> None:
        """Measure a finished run again on its test set.

        Args:
            run: a run directory of 'distill' or 'teach'.
            timesteps: another number of steps than the student was trained with.
            data_dir: another place of the data than it was trained with.
            confidence: also measure early exit: a sample leaves once its likeliest class is above this, 0..1.
            trust_code: execute the file of Python code that the run names as its network.
        """
        from spikedistill.deliver.record import NO_TEACHER, Record
        from spikedistill.deliver.record import evaluate as measure

        results = measure(run, timesteps, data_dir, confidence, trust_code)
        shown = Table("measure", "value", box=None)
        for name, value in results.items():
            if isinstance(value, dict):
                for layer, rate in value.items():
                    shown.add_row(f"{name.removesuffix('_by_layer')} {layer}", f"{rate:.2f} %")
            elif isinstance(value, list):
                shown.add_row(name, "  ".join(f"{part:.2f}" for part in value))
            else:
                shown.add_row(name, f"{value:{PLAIN[name]}}" if name in PLAIN else f"{value:.2f} %")
        Console(highlight=False).print(shown)
        alone = "accuracy_by_step" in results and "agreement" not in results
        if alone and Record.read(run).recipe["teacher"]["source"] != NO_TEACHER:
            reasons = "is not where it was, sees other inputs, or names Python code (see --trust-code)"
            print(f"The teacher of this run {reasons}: agreement with it is left out.", file=sys.stderr)

    tyro.cli(evaluate, prog="spikedistill evaluate", args=list(arguments))


def _compare(arguments: Sequence[str]) -> None:
    def compare(runs: Annotated[tuple[Path, ...], tyro.conf.Positional]) -> None:
        """Set finished runs side by side.

        Args:
            runs: run directories.
        """
        if not runs:
            raise ConfigError("No runs to compare were given: name one or more run directories.")
        _print_table(runs)

    tyro.cli(compare, prog="spikedistill compare", args=list(arguments))


def _immunity(arguments: Sequence[str]) -> None:
    def immunity(
        runs: Annotated[tuple[Path, ...], tyro.conf.Positional],
        kinds: tuple[str, ...] = (),
        images: int | None = None,
        attacked: int = 500,
        seed: int = 0,
        baseline: str | None = None,
        data_dir: str | None = None,
        out: Path = Path("runs/immunity"),
        resume: bool = False,
        trust_code: bool = False,
    ) -> None:
        """Measure how immune finished runs are to noise: accuracy at five severities, curves, corruption error.

        Args:
            runs: run directories of 'teach' and 'distill' on one data set.
            kinds: noise (7, on pixels), natural (14 corruptions), hardware (5 faults), attack (FGSM, PGD); of event
                frames: event (5), hardware.
            images: so many test images, evenly spaced, instead of all.
            attacked: so many of them are attacked.
            seed: of all that is drawn.
            baseline: the run, by the name of its directory, that others are compared to; by default the first.
            data_dir: another place of the data than the runs were trained with.
            out: where scores.csv, immunity.md and a picture for each kind go.
            resume: go on with what lies there.
            trust_code: execute the file of Python code that a run names as its network.
        """
        from spikedistill.deliver.immunity import measure_immunity
        from spikedistill.train.progress import Progress

        shown = measure_immunity(
            runs,
            out,
            kinds=kinds,
            images=images,
            attacked=attacked,
            seed=seed,
            baseline=baseline,
            data_dir=data_dir,
            resume=resume,
            trust_code=trust_code,
            say=Progress.stderr("immunity").say,
        )
        _show(*shown)
        print(f"scores, table and curves are in {out}")

    tyro.cli(immunity, prog="spikedistill immunity", args=list(arguments))


def _energy(arguments: Sequence[str]) -> None:
    columns = ("network", "metric", "value")

    def energy(
        runs: Annotated[tuple[Path, ...], tyro.conf.Positional],
        images: int = 1000,
        data_dir: str | None = None,
        out: Path | None = None,
        trust_code: bool = False,
    ) -> None:
        """Count spikes and synaptic operations, and estimate energy against a quantised ANN of equal information.

        Args:
            runs: run directories of 'teach' and 'distill' on one data set.
            images: so many test images, evenly spaced.
            data_dir: another place of the data than the runs were trained with.
            out: a CSV file to write.
            trust_code: execute the file of Python code that a run names as its network.
        """
        from spikedistill.deliver.energy import lines, measure_energy, table
        from spikedistill.files import check_replaceable, write_csv
        from spikedistill.train.progress import Progress

        if out is not None:
            check_replaceable(out, f"{columns[0]},")
        bills = measure_energy(runs, images, data_dir, Progress.stderr("energy").say, trust_code)
        _show(*table(bills))
        for warning in (line for bill in bills for line in bill.warnings):
            print(warning)
        if out is not None:
            write_csv(out, columns, lines(bills))

    tyro.cli(energy, prog="spikedistill energy", args=list(arguments))


def _reproduce(arguments: Sequence[str]) -> None:
    from spikedistill.studies.kdsnn import STUDIES

    def reproduce(
        study: Annotated[str, tyro.conf.Positional],
        budget: Literal["full", "small"] = "full",
        data_dir: str | None = None,
        runs: Path = Path("runs/studies"),
        out: Path = Path("docs/results"),
        seeds: int | None = None,
        jobs: int = 1,
    ) -> None:
        """Measure a published comparison: trains what is missing, skips what is finished, writes table, figure, CSV.

        Args:
            study: kdsnn-pairs, kdsnn-timesteps, kdsnn-mnist, kdsnn-noise or kdsnn-energy.
            budget: full is of the paper's size, for a GPU; small is for two cores and some hours (mnist: the same).
            data_dir: where named data sets lie.
            runs: where run directories go; the same command goes on with what lies there.
            out: where STUDY.csv, STUDY.md and pictures go; a page of all studies is written beside it, as OUT.md.
            seeds: only the first so many of the study's seeds.
            jobs: students trained side by side, each with its share of the cores; on small networks faster than one
                after another.
        """
        from spikedistill.studies.reproduce import reproduce as run
        from spikedistill.train.progress import Progress

        one_of("study", study, STUDIES)
        made = STUDIES[study](budget, data_dir, runs)
        print(run(made, out, seeds, Progress.stderr(study), jobs))

    tyro.cli(reproduce, prog="spikedistill reproduce", args=list(arguments))


def _recipes(arguments: Sequence[str]) -> None:
    def recipes() -> None:
        """List the ready recipes."""
        from spikedistill.recipes import STUDENTS, TEACHERS

        for command, known in (("teach", TEACHERS), ("distill", STUDENTS)):
            for name, make in known.items():
                print(f"{command:8}{name:10}{(make.__doc__ or '').splitlines()[0].replace('``', chr(39))}")

    tyro.cli(recipes, prog="spikedistill recipes", args=list(arguments))


def _print_table(paths: Sequence[Path]) -> None:
    from spikedistill.deliver.tables import compare

    _show(*compare(paths))


def _show(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    shown = Table(*columns, box=None)
    for row in rows:
        shown.add_row(*row)
    console = Console(highlight=False)
    Console(width=max(console.width, 140), highlight=False).print(shown)


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "compare": _compare,
    "demo": _demo,
    "distill": _distill,
    "energy": _energy,
    "evaluate": _evaluate,
    "immunity": _immunity,
    "recipes": _recipes,
    "reproduce": _reproduce,
    "teach": _teach,
}
