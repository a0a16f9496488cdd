"""Cold start: from an empty cache to the first training step, and what another batch, image size or T costs then.

    python benchmarks/cold_start.py [--check]       # ResNet-18 (64-128-256-512), T=4, batch 64, two threads; a minute

One process with exact gradients and one with the rate-based gradient, each with an empty directory for compiled code.
'start' is everything from the command to the end of the first step: importing torch, building the network, compiling
its neurons. After each change two steps are taken: what the first took longer, and how many kernels it compiled.
"""

import tempfile
import time

from rivals import Contender, Figures, Row, finish, options

CHANGES = ("batch 48", "side 40", "timesteps 6", "timesteps 2")
"""Commands of contenders.py, one after another."""


def measure(name: str, size: list[str]) -> list[Row]:
    """Seconds and kernels of the first step, of the second, and of the first after each change."""
    with tempfile.TemporaryDirectory() as empty:
        began = time.perf_counter()
        contender = Contender.start(name, name, *size, environment={"TORCHINDUCTOR_CACHE_DIR": empty})
        try:
            (first,) = contender.ask("step 1")
            whole, kernels = time.perf_counter() - began, contender.ask("kernels")
            (steady,) = contender.ask("step 1")
            rows: list[Row] = [
                {"contender": name, "after": "start", "seconds": whole, "extra": whole - steady, "kernels": kernels},
                {"contender": name, "after": "first", "seconds": first, "extra": first - steady, "kernels": kernels},
            ]
            for change in CHANGES:
                contender.ask(change)
                first, second = contender.ask("step 2")
                more, kernels = contender.ask("kernels") - kernels, contender.ask("kernels")
                rows.append(
                    {"contender": name, "after": change, "seconds": first, "extra": first - second, "kernels": more}
                )
        finally:
            contender.stop()
    return rows


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--batch", type=int, default=64)
    given = parser.parse_args()
    size = ["--width", str(given.width), "--batch", str(given.batch)]
    rows = [row for name in ("exact", "rate") for row in measure(name, size)]
    found = {(row["contender"], row["after"]): row for row in rows}
    figures: Figures = {}
    for name in ("exact", "rate"):
        compiled = sum(found[name, change]["kernels"] for change in CHANGES)
        figures[f"first step, {name} (seconds)"] = (found[name, "first"]["seconds"], "at most", 15.0)
        figures[f"kernels compiled by changes, {name}"] = (compiled, "at most", 0)
    finish("cold_start", rows, figures, given.check)


if __name__ == "__main__":
    main()
