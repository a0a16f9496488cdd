"""Inference: latency of one image and throughput of a batch, ours and the peers in turn, in one run.

    python benchmarks/inference.py [--check]        # ResNet-18 (64-128-256-512), T = 1, 2, 4, 8, two threads; minutes

Each contender in a process of its own, in evaluation mode and without graph; ours with batch norm folded. Ours is timed
in the quick number format (bfloat16 where the processor computes it) with and without channels_last, a peer in the
quick one with channels_last and in float32 as a user writes it (all with the same handling of freed memory); at each
batch and T the faster setting of each counts. Medians over alternating rounds. What early exit saves depends on data:
``spikedistill evaluate RUN --confidence P``.
"""

from rivals import PEERS, Contender, Figures, Row, finish, in_turn, median, options, spread
from step_time import KEEP

AT = 4
"""The number of steps at which the figures are taken."""


def start(name: str, size: list[str]) -> list[Contender]:
    """A contender in each setting that may be its fastest."""
    own, contender = name in ("ann", "ours"), "exact" if name == "ours" else name
    return [
        Contender.start(
            f"{name} {setting}",
            contender,
            *("--setting", setting, *size),
            environment=None if name == "ours" else KEEP,
        )
        for setting in ("best", "quick" if own else "default")
    ]


def measure(names: list[str], width: int, batch: int, steps: list[int], rounds: int, count: int) -> list[Row]:
    """For each T and contender the fastest setting at this batch."""
    size = ["--width", str(width), "--batch", str(batch)]
    contenders = [contender for name in names for contender in start(name, size)]
    rows = []
    for timesteps in steps:
        for contender in contenders:
            contender.ask(f"timesteps {timesteps}")
        times = in_turn(contenders, "infer", rounds, count)
        for name in names:
            label = min((label for label in times if label.split()[0] == name), key=lambda label: median(times[label]))
            taken = median(times[label])
            row: Row = {"contender": name, "T": timesteps, "batch": batch, "setting": label.split()[1]}
            rows.append({**row, "ms": 1e3 * taken, "spread": 1e3 * spread(times[label]), "images/s": batch / taken})
    for contender in contenders:
        contender.stop()
    return rows


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--batch", type=int, default=64, help="of the throughput; the latency is of one image")
    parser.add_argument("--timesteps", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    given = parser.parse_args()
    names = ["ours", "ann", *given.peers]
    rows: list[Row] = []
    figures: Figures = {}
    for what, batch, count in (("latency", 1, 10), ("throughput", given.batch, 1)):
        found = measure(names, given.width, batch, given.timesteps, given.rounds, count)
        rows += found
        taken = {row["contender"]: row["ms"] for row in found if row["T"] == AT}
        peers = [taken[peer] for peer in given.peers if peer in taken]
        if peers:
            figures[f"{what} at T={AT}, against the fastest peer"] = (min(peers) / taken["ours"], "at least", 2.0)
    finish("inference", rows, figures, given.check)


if __name__ == "__main__":
    main()
