"""Seconds of one training step: ours and the peers in turn, in one run.

    python benchmarks/step_time.py [--check]        # ResNet-18 (64-128-256-512), T=4, batch 64, two threads; minutes

ResNet-18 for 32x32 images, teacher in the loop, each contender in a process of its own (peers in an environment of
their own, made at the first run); 'best' is bfloat16 autocast and channels_last, and for the peers the same handling of
freed memory that ours has; 'default' is float32 as a user writes it. Medians over alternating rounds.
"""

from rivals import PEERS, Contender, Figures, finish, in_turn, median, options, spread

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

    contenders = [
        Contender.start("ann", "ann", *best, environment=KEEP),
        Contender.start("exact", "exact", *best),
        Contender.start("exact with teacher", "exact", *best, "--teacher", "answers"),
        Contender.start("exact, KDSNN", "exact", *best, "--teacher", "joint"),
        Contender.start("exact, KDSNN cached", "exact", *best, "--teacher", "cached"),
        Contender.start("rate", "rate", *best),
        Contender.start("rate with teacher", "rate", *best, "--teacher", "answers"),
    ]
    for peer in given.peers:
        contenders.append(Contender.start(f"{peer} best", peer, *best, "--teacher", "answers", environment=KEEP))
        contenders.append(Contender.start(f"{peer} default", peer, *default, "--teacher", "answers"))
    times = in_turn(contenders, "step", given.rounds)
    for contender in contenders:
        contender.stop()

    steps = {label: median(values) for label, values in times.items()}
    rows = [{"contender": label, "seconds": steps[label], "spread": spread(values)} for label, values in times.items()]
    exact, rate = steps["exact with teacher"], steps["rate with teacher"]

    def part(whole: float) -> float:
        return (whole - steps["exact"]) / whole

    figures: Figures = {
        "exact step / (T x the ANN's step)": (steps["exact"] / (given.timesteps * steps["ann"]), "at most", 1.0),
        "teacher and joint distillation, share of the exact step": (part(steps["exact, KDSNN"]), "at most", 0.10),
        "the same with answers from disk": (part(steps["exact, KDSNN cached"]), "at most", 0.01),
    }
    bests = [steps[f"{peer} best"] for peer in given.peers]
    if bests:
        figures |= {
            "exact, against the fastest peer at its best": (min(bests) / exact, "at least", 1.8),
            "rate, against the fastest peer at its best": (min(bests) / rate, "at least", 3.3),
        }
    for peer in {"spikingjelly", "snntorch"} & set(given.peers):
        figures[f"exact, against {peer} as users get it"] = (steps[f"{peer} default"] / exact, "at least", 4.0)
    finish("step_time", rows, figures, given.check)


if __name__ == "__main__":
    main()
