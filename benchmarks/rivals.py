"""What the comparisons share: peers in environments of their own, contenders in turn, medians, tables, checks."""

import argparse
import datetime
import importlib.util
import json
import os
import platform
import shlex
import site
import statistics
import subprocess
import sys
import tempfile
import venv
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any, Literal

import torch

from spikedistill.compute.place import choose_place
from spikedistill.files import write_csv

HERE = Path(__file__).resolve().parent
PEERS = {
    "spikingjelly": "spikingjelly==2.0.0",
    "snntorch": "snntorch==1.0.0",
    "norse": "norse==1.1.0",
    "sinabs": "sinabs==3.1.3",
}
TOOLS = {"neurobench": "neurobench==2.2.0"}
"""What else has an environment of its own."""
ENVIRONMENTS = Path(os.environ.get("SPIKEDISTILL_PEERS", "runs/peers"))
"""Where the peers' environments lie; made at the first use, kept for the next."""
QUICK = choose_place("cpu")
"""The number format of the quick settings, the same for all: bfloat16 where the processor computes it."""
Row = dict[str, Any]
Figures = dict[str, tuple[float, Literal["at least", "at most"], float]]
"""Figure -> what it is, and its bound."""


def options(description: str | None) -> argparse.ArgumentParser:
    """The options that the benchmarks of networks share; each adds its own."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="end with code 1 where a bound is missed")
    parser.add_argument("--width", type=int, default=64)
    return parser


def python_of(name: str) -> str:
    """An interpreter that has the contender: this one, or that of the peer's environment with the same torch.

    What follows a hyphen in a name is a way to use the same library.
    """
    name = name.split("-")[0]
    package = {**PEERS, **TOOLS}.get(name)
    if package is None or importlib.util.find_spec(name) is not None:
        return sys.executable
    home = ENVIRONMENTS / name
    python = home / "bin" / "python"
    if not (home / "ready").exists():
        print(f"setting up {package} in {home}", file=sys.stderr, flush=True)
        venv.create(home, with_pip=True, clear=True)
        packages = home / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
        (packages / "host.pth").write_text("\n".join(site.getsitepackages()) + "\n", encoding="utf-8")
        subprocess.run([python, "-m", "pip", "install", "--quiet", package], check=True)
        (home / "ready").touch()
    return str(python)


@dataclass
class Contender:
    """A contender's process; see contenders.py for what it understands."""

    label: str
    process: subprocess.Popen[str]
    said: IO[str]

    @classmethod
    def start(cls, label: str, name: str, *options: str, environment: dict[str, str] | None = None) -> "Contender":
        """Start one: ``options`` are those of contenders.py."""
        bf16 = ["--bf16"] if QUICK.dtype == torch.bfloat16 else []
        call = [python_of(name), str(HERE / "contenders.py"), name, *options, *bf16]
        said = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115 (lives as long as the process)
        process = subprocess.Popen(
            call,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            env={**os.environ, **(environment or {})},
        )
        return cls(label, process, said)

    def ask(self, line: str) -> Any:
        """Send a command, wait for its answer.

        Raises:
            RuntimeError: with the end of its output, if the contender died.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            self.said.seek(0)
            raise RuntimeError(f"{self.label} ended: {self.said.read().strip()[-600:]}")
        return json.loads(answer)

    def stop(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()


def in_turn(contenders: list[Contender], command: str, rounds: int, count: int = 1) -> dict[str, list[float]]:
    """One warm-up each, then rounds in which each contender works ``count`` times; seconds by label."""
    taken: dict[str, list[float]] = {}
    for contender in contenders:
        (first,) = contender.ask(f"{command} 1")
        print(f"{contender.label}: warm-up {first:.2f} s", file=sys.stderr, flush=True)
        taken[contender.label] = []
    for _ in range(rounds):
        for contender in contenders:
            taken[contender.label] += contender.ask(f"{command} {count}")
    return taken


def median(times: list[float]) -> float:
    return statistics.median(times)


def spread(times: list[float]) -> float:
    """Half of the distance between the quartiles."""
    if len(times) < 4:
        return (max(times) - min(times)) / 2
    quarters = statistics.quantiles(times, n=4)
    return (quarters[2] - quarters[0]) / 2


def machine() -> str:
    """The processor's name, how many of them, and the number format of the quick settings."""
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        if line.startswith("model name")
    ]
    card = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    processor = names[0] if names else platform.processor()
    return f"{card}{processor}, {os.cpu_count()} processors, {QUICK.dtype}: {QUICK.reason}"


def show(rows: list[Row]) -> None:
    """A table of rows that share their keys."""
    keys = list(rows[0])
    cells = [[f"{row[key]:.3f}" if isinstance(row[key], float) else str(row[key]) for key in keys] for row in rows]
    widths = [max(len(key), *(len(line[index]) for line in cells)) for index, key in enumerate(keys)]
    for line in (keys, *cells):
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())


def write_rows(name: str, rows: list[Row]) -> Path:
    """The rows as ``runs/benchmarks/<name>.csv``; each says its machine, versions, command and date."""
    used = [pin for peer, pin in {**PEERS, **TOOLS}.items() if any(peer in str(row.get("contender")) for row in rows)]
    own = [
        f"python=={platform.python_version()}",
        f"torch=={torch.__version__}",
        f"spikedistill=={version('spikedistill')}",
    ]
    made = {
        "machine": machine(),
        "versions": " ".join([*own, *used]),
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
    }
    path = Path("runs/benchmarks") / f"{name}.csv"
    write_csv(path, [*rows[0], *made], [[*(row[key] for key in rows[0]), *made.values()] for row in rows])
    return path


def finish(name: str, rows: list[Row], figures: Figures, check: bool) -> None:
    """Print the table and the figures, write ``<name>.csv`` and ``<name>.json``, and fail where a bound is missed.

    Args:
        name: of the benchmark.
        rows: what was measured.
        figures: what must hold.
        check: whether a missed bound ends the program with code 1.
    """
    print(f"{machine()}\n")
    show(rows)
    out = write_rows(name, rows).with_suffix(".json")
    out.write_text(json.dumps({"machine": machine(), "rows": rows, "figures": figures}, indent=1), encoding="utf-8")
    print()
    missed = []
    for figure, (value, kind, bound) in figures.items():
        fine = value >= bound if kind == "at least" else value <= bound
        print(f"{'' if fine else 'MISSED  '}{figure}: {value:.3g} ({kind} {bound})")
        missed += [] if fine else [figure]
    if check and missed:
        sys.exit(1)
