"""How the time of a training step grows with T, depth and batch: ours exact and rate-based, a peer beside them.

    python benchmarks/scaling.py [--check] [--peers spikingjelly]    # ResNet-18 (64-128-256-512), two threads; minutes

Starting from T=4, two blocks a stage and a batch of 64, one of the three is varied at a time. No teacher in the loop; a
contender each in a process of its own, the quick number format (bfloat16 where the processor computes it) and
channels_last, medians over alternating rounds. A contender that does not live through a point (memory) is left out.
"""

import sys

from rivals import PEERS, Contender, Figures, Row, finish, in_turn, median, options, spread
from step_time import KEEP

POINT = {"timesteps": 4, "blocks": 2, "batch": 64}
"""The place from which one axis is varied at a time."""


def points(axes: dict[str, list[int]]) -> list[dict[str, int]]:
    """Every value of every axis, the others as in ``POINT``; each place once."""
    found: list[dict[str, int]] = []
    for axis, values in axes.items():
        places = [{**POINT, axis: value} for value in values]
        found += [place for place in places if place not in found]
    return found


def measure(point: dict[str, int], names: list[str], width: int, rounds: int) -> list[Row]:
    """Seconds of a step of each contender at a point."""
    size = [part for name, value in {**point, "width": width}.items() for part in (f"--{name}", str(value))]
    started = [Contender.start(name, name, *size, environment=KEEP if name in PEERS else None) for name in names]
    alive = []
    for contender in started:
        try:
            contender.ask("step 1")
            alive.append(contender)
        except RuntimeError as error:
            print(f"left out at {point}: {error}", file=sys.stderr, flush=True)
    times = in_turn(alive, "step", rounds)
    for contender in started:
        contender.stop()
    return [
        {**point, "contender": label, "seconds": median(values), "spread": spread(values)}
        for label, values in times.items()
    ]


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--timesteps", nargs="*", type=int, default=[1, 2, 4, 8, 16])
    parser.add_argument("--blocks", nargs="*", type=int, default=[1, 2, 3], help="residual blocks a stage")
    parser.add_argument("--batch", nargs="*", type=int, default=[16, 64, 128])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=[])
    given = parser.parse_args()
    axes = {name: getattr(given, name) for name in POINT}
    rows = [
        row
        for point in points(axes)
        for row in measure(point, ["exact", "rate", *given.peers], given.width, given.rounds)
    ]
    rate = {row["timesteps"]: row["seconds"] for row in rows if row["contender"] == "rate" and _plain(row)}
    figures: Figures = {}
    if {4, 16} <= rate.keys():
        figures["rate-based step at T=16, against T=4"] = (rate[16] / rate[4], "at most", 2.0)
    finish("scaling", rows, figures, given.check)


def _plain(row: Row) -> bool:
    """Whether nothing but T was varied."""
    return all(row[axis] == value for axis, value in POINT.items() if axis != "timesteps")


if __name__ == "__main__":
    main()
