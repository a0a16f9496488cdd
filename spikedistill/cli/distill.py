"""``spikedistill distill``: a teacher becomes a spiking student."""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import arg

from spikedistill.cli.parse import Where, find_recipe, given_to, names_of, parse_recipe
from spikedistill.cli.show import print_table
from spikedistill.errors import ConfigError
from spikedistill.recipes import STUDENTS
from spikedistill.recipes.config import check_code
from spikedistill.recipes.distill import Distill, distill
from spikedistill.train.progress import Progress
from spikedistill.train.recipe import Training

ABOUT = """Turn a trained teacher into a spiking student, train it, and test it once.

RECIPE, if given, comes first. Options change it. See 'spikedistill recipes'.
--help lists what most people need, --help-all every option."""
EXAMPLES = """examples:
  spikedistill distill digits --method direct --timesteps 8
  spikedistill distill --teacher runs/my-teacher --data photos --epochs 20
  spikedistill distill digits --method direct kdsnn --seeds 3
  spikedistill distill --config runs/digits-kdsnn-t4 --lr 0.01 --out runs/slow"""


@dataclass(frozen=True)
class Method:
    """What the student is taught, and the options of that method."""

    method: Annotated[tuple[str, ...], arg(metavar="NAME ...")] = ("kdsnn",)
    """direct, tet: cross-entropy only. kdsnn-response, kdsnn-feature, kdsnn: with the teacher's logits, its features,
    or both. temporal-decoupling: with labels and teacher at every time step, and self-teaching.
    heterogeneous-temperatures: teacher and student with temperatures of their own, for fewer spikes. budget:
    with a target for spikes or synaptic operations. distilling-spikes: with a spiking teacher's spikes. cross-kd:
    events are learned from an image teacher. conversion-qcfs: a quantised ANN is trained, then run with spiking
    neurons. conversion-max, conversion-percentile, conversion-least-squares: no training, firing thresholds by that
    rule. FILE.py:CLASS: an objective of your own. With several names one student is trained for each."""


@dataclass(frozen=True)
class Runs(Where):
    """Where the run is written, and where it starts from."""

    seeds: Annotated[int | None, arg(metavar="N")] = None
    """Train one student for each of N seeds, counted from --seed, and print mean and deviation. Finished runs are kept,
    so the same command goes on."""
    assistants: Annotated[tuple[int, ...], arg(metavar="WIDTH ...")] = ()
    """Widths of assistants, from large to small, between a spiking teacher and the student. They have the student's
    network, and each is taught by the one before. Finished stages are kept, so the same command goes on."""


def main(arguments: Sequence[str]) -> None:
    """Parse, train, print the table of the student."""
    name, base, rest = find_recipe(arguments, STUDENTS, Distill)
    asked = given_to("--method", rest)
    if len(asked) == 1 and not given_to("--config", rest):  # a config has been read with its method
        base = base.with_method(asked[0])
    recipe, methods, where = _parse(base, asked, rest)
    called = name or Path(recipe.data.name).stem
    if where.assistants:
        _train_in_stages(recipe, methods, where, called)
    elif len(methods) > 1 or where.seeds is not None:
        _train_several(recipe, methods, where, called)
    else:
        _train(recipe, where, called)


def _parse(base: Distill, asked: Sequence[str], arguments: Sequence[str]) -> tuple[Distill, Sequence[str], Runs]:
    """The recipe with the options that were given, the methods, and where runs go."""
    _check_shared(base, asked, arguments)
    objective = [base.method] if base.method is not None and len(asked) < 2 else []
    groups: dict[str, list[Any]] = {
        "data": [base.data],
        "training": [base.training],
        "method": [Method(tuple(asked) or (base.method_name,)), *objective],
        "teacher": [base.teacher],
        "student": [base.student],
        "run": [Runs()],
    }
    parsed = parse_recipe("distill", ABOUT, groups, arguments, EXAMPLES)
    data, training, named, *changed, teacher, student, where = parsed
    recipe = Distill(teacher, student, changed[0] if changed else base.method, data, training)
    if not named.method:
        raise ConfigError("No method was given: name one or more after --method.")
    if where.config is not None:
        check_code(where.config, recipe, base, where.trust_code)
    if len(named.method) < 2 and recipe.method is None and recipe.method_name != base.method_name:
        raise ConfigError(
            f"rule (={student.rule}) is not that of --method {base.method_name}: leave --rule out, or give"
            f" --method {recipe.method_name}."
        )
    return recipe, named.method, where


def _train(recipe: Distill, where: Runs, called: str) -> None:
    kind, seed = recipe.method_name.rpartition(":")[2], recipe.training.seed
    end = "" if seed == Training().seed else f"-s{seed}"
    out = where.out or Path("runs") / f"{called}-{kind}-{recipe.student.steps_name}{end}"
    results = distill(recipe, out, where.resume, Progress.stderr(kind), where.trust_code)
    print_table([out])
    print(f"the student is in {out}")
    print(next_commands(recipe.teacher.source, out, "test_accuracy" in results, where.trust_code), file=sys.stderr)


def next_commands(teacher: str, out: Path, labelled: bool, trust_code: bool = False) -> str:
    """What can be done with a student, beside its teacher where that is a run too; one command per line.

    Without labels the teacher was trained on other data, and noise immunity cannot be measured.
    """
    known = [teacher] if labelled and (Path(teacher) / "results.json").exists() else []
    trust = ["--trust-code"] if trust_code else []
    commands = [["evaluate", str(out), *trust], ["energy", *known, str(out), *trust]]
    commands += [["immunity", *known, str(out), *trust]] if labelled else []
    return "next:\n" + "\n".join(f"  spikedistill {shlex.join(command)}" for command in commands)


def _train_several(recipe: Distill, methods: Sequence[str], where: Runs, called: str) -> None:
    from spikedistill.recipes.several import several

    methods = [recipe.method_name] if len(methods) < 2 else methods
    seeds = 1 if where.seeds is None else where.seeds
    out = where.out or Path("runs") / f"{called}-students"
    runs = several(recipe, methods, seeds, out, where.resume, Progress.stderr, where.trust_code)
    print_table(runs)
    print(f"the students are in {out}")


def _train_in_stages(recipe: Distill, methods: Sequence[str], where: Runs, called: str) -> None:
    from spikedistill.recipes.stages import in_stages

    if len(methods) > 1 or where.seeds is not None:
        raise ConfigError("Stages (--assistants) are for one method and one seed: leave --seeds and other methods out.")
    out = where.out or Path("runs") / f"{called}-stages"
    runs = in_stages(recipe, where.assistants, out, Progress.stderr, where.trust_code)
    print_table(runs)
    print(f"the student is in {runs[-1]}, its assistants are beside it")


def _check_shared(base: Distill, asked: Sequence[str], arguments: Sequence[str]) -> None:
    """With several methods refuse an option that belongs to one of them."""
    made = [base.with_method(name).method for name in asked] if len(asked) > 1 else []
    own = {f"--{name}" for method in made if method is not None for name in names_of(method)}
    for word in arguments:
        if word.partition("=")[0] in own:
            raise ConfigError(
                f"{word} is an option of one method, and {len(asked)} are given ({', '.join(asked)}), which are trained"
                " with their usual values: leave the option out, or train one --method after another with --seeds and"
                " the same --out DIR, whose runs 'spikedistill compare DIR' takes together."
            )
