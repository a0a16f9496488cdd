"""Seconds of one training step: ours and the peers in turn, in one run.

    python benchmarks/step_time.py [--check]        # ResNet-18 (64-128-256-512), T=4, batch 64, two threads; minutes

ResNet-18 for 32x32 images, teacher in the loop, each contender in a process of its own (peers in an environment of
their own, made at the first run); 'best' is bfloat16 autocast (where the processor computes bfloat16) and
channels_last, and for the peers the same handling of freed memory that ours has; 'default' is float32 as a user writes
it. Where float32 is computed ours has its own convolutions (``compute/winograd.py``), as it does by default; the ANN,
and ours once, is timed with either. What the teacher and the loss take is timed inside the step. Medians over
alternating rounds; each peer takes turns with ours, one peer after another, so that every ratio comes from one stretch
of time. 'graded' is one time step of T levels, the others take T steps of one level.
"""

import sys

from rivals import PEERS, Contender, Figures, Row, finish, in_turn, median, options, spread

KEEP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "-1"}
"""What ``keep_freed_memory`` does, for processes that do not call it."""


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--timesteps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    given = parser.parse_args()
    size = ["--width", str(given.width), "--batch", str(given.batch), "--timesteps", str(given.timesteps)]
    best, default = ["--setting", "best", *size], ["--setting", "default", *size]

    def ours(label: str, gradient: str, teacher: str, convolutions: str = "auto") -> Contender:
        return Contender.start(label, gradient, *best, "--teacher", teacher, "--convolutions", convolutions)

    rows: list[Row] = []

    def measure(*contenders: Contender) -> dict[str, float]:
        """Medians of contenders that work in turn; they end then, since all at once would not fit into memory."""
        times = in_turn(list(contenders), "step", given.rounds)
        for contender in contenders:
            if "KDSNN" in contender.label:
                times[f"{contender.label}: teacher and loss"] = contender.ask("spent")[1:]
            contender.stop()
        rows.extend({"contender": key, "seconds": median(times[key]), "spread": spread(times[key])} for key in times)
        found = {label: median(values) for label, values in times.items()}
        print(f"medians: {found}", file=sys.stderr, flush=True)
        return found

    alone = measure(
        Contender.start("ann", "ann", *best, environment=KEEP),
        Contender.start("ann, our convolutions", "ann-own", *best, environment=KEEP),
        ours("exact", "exact", "none"),
        ours("exact, PyTorch's convolutions", "exact", "none", "torch"),
        ours("exact, KDSNN", "exact", "joint"),
        ours("exact, KDSNN cached", "exact", "cached"),
        ours("rate", "rate", "none"),
        ours("graded", "graded", "none"),
    )

    def part(label: str) -> float:
        return alone[f"{label}: teacher and loss"] / alone[label]

    figures: Figures = {
        "exact step / (T x the ANN's step)": (alone["exact"] / (given.timesteps * alone["ann"]), "at most", 1.0),
        "teacher and joint distillation, share of the exact step": (part("exact, KDSNN"), "at most", 0.10),
        "the same with answers from disk": (part("exact, KDSNN cached"), "at most", 0.01),
    }
    against: dict[str, list[float]] = {"exact": [], "rate": [], "graded": []}
    for peer in given.peers:
        steps = measure(
            ours("exact with teacher", "exact", "answers"),
            ours("rate with teacher", "rate", "answers"),
            ours("graded with teacher", "graded", "answers"),
            Contender.start(f"{peer} best", peer, *best, "--teacher", "answers", environment=KEEP),
            Contender.start(f"{peer} default", peer, *default, "--teacher", "answers"),
        )
        for gradient, ratios in against.items():
            ratios.append(steps[f"{peer} best"] / steps[f"{gradient} with teacher"])
        if peer in ("spikingjelly", "snntorch"):
            ratio = steps[f"{peer} default"] / steps["exact with teacher"]
            figures[f"exact, against {peer} as users get it"] = (ratio, "at least", 4.0)
    if given.peers:
        figures |= {
            "exact, against the fastest peer at its best": (min(against["exact"]), "at least", 1.8),
            "rate, against the fastest peer at its best": (min(against["rate"]), "at least", 3.3),
            "graded, against the fastest peer at its best": (min(against["graded"]), "at least", 4.0),
        }
    finish("step_time", rows, figures, given.check)


if __name__ == "__main__":
    main()
