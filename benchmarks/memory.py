"""Memory of one training step: ours and SpikingJelly, each in its leanest form.

    python benchmarks/memory.py [--check]           # ResNet-18 (64-128-256-512), T=4, batch 64, two threads; minutes

Resident peak above the process before the model: what a contender's libraries, network, gradients and activations add
to a process that has torch alone. Each runs alone in a process of its own, some steps in channels_last and bfloat16
autocast where the processor computes that, without a teacher (the peer in an environment of its own, made at the first
run). Ours twice: as it trains by default, and 'lean' as with keep_memory=False; the figures take the lean ones.
SpikingJelly leaves freed memory to the C library, as a user's process does. '-neurons' and '-stages': ``recompute``.
"""

from rivals import Contender, Figures, finish, median, options

OURS = ("exact", "exact-neurons", "exact-stages", "rate")
CONTENDERS = ("ann", *OURS, *(f"{name} lean" for name in OURS), "spikingjelly", "spikingjelly-memopt")


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--timesteps", type=int, default=4)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    names = ("width", "batch", "timesteps", "threads")
    size = [part for name in names for part in (f"--{name}", str(getattr(given, name)))]

    rows, peaks = [], {}
    for label in CONTENDERS:
        name, *lean = label.split()
        contender = Contender.start(label, name, "--setting", "best", *size, *(f"--{how}" for how in lean))
        try:
            seconds = contender.ask(f"step {given.steps}")
            memory = contender.ask("memory")
        finally:
            contender.stop()
        peaks[label] = (memory["most"] - memory["began"]) / 1e6
        rows.append({"contender": label, "megabytes": peaks[label], "seconds": median(seconds[1:])})

    peer, memopt = peaks["spikingjelly"], peaks["spikingjelly-memopt"]
    figures: Figures = {
        "exact / SpikingJelly": (peaks["exact lean"] / peer, "at most", 0.4),
        "exact, neurons computed again / SpikingJelly": (peaks["exact-neurons lean"] / peer, "at most", 0.4),
        "rate / SpikingJelly": (peaks["rate lean"] / peer, "at most", 0.2),
        "exact, stages computed again / SpikingJelly with memopt": (
            peaks["exact-stages lean"] / memopt,
            "at most",
            0.8,
        ),
    }
    finish("memory", rows, figures, given.check)


if __name__ == "__main__":
    main()
