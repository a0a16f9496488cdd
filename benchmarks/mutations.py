"""Whether the tests notice a wrong formula: one place of the source after the other is changed, and tests must fail.

    python benchmarks/mutations.py [--only N ...]

Each mutation of ``MUTATIONS`` is a line that names a source file and the tests which should notice (and ``-k`` with
words, where the file is slow), a line ``-`` with text that occurs once in the source, and a line ``+`` with what takes
its place. Signs, constants, axes, operands and missing divisions are taken; every mutant can be imported, and none
computes the same. It is applied in a copy of the package, and these tests run on the copy: killed where one fails.
First they must pass on the copy as it is. At most two mutations may survive; the exit code says so. About ten seconds a
mutation on one thread.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MOST = 2
"""So many mutations may survive."""
PLAIN = ("-o", "addopts=--import-mode=importlib")
"""Without checks of shapes at every call, which cost a third of the time."""
MUTATIONS = """
# neurons and surrogates
neuron/dynamics.py  neuron/test_dynamics.py
- leak * potential + ((1.0 - leak) * current
+ leak * potential + (leak * current
neuron/dynamics.py  neuron/test_dynamics.py
- charged * (1.0 - taken)
+ charged * (1.0 - spikes)
neuron/dynamics.py  neuron/test_dynamics.py
- (1.0 - spikes) * moved - charged * felt
+ (1.0 - spikes) * moved - felt
neuron/dynamics.py  neuron/test_dynamics.py
- slope = slope + spiked / timesteps
+ slope = slope + spiked
neuron/layer.py  neuron/test_layer.py
- scale = 1.0 / math.sqrt(neurons)
+ scale = 1.0 / neurons
neuron/surrogate.py  neuron/test_surrogate.py
- self.width - u.abs()).clamp_min(0.0) / self.width**2
+ self.width - u.abs()).clamp_min(0.0) / self.width
# objectives and schedules
objective/logits.py  objective/test_logits.py
- return temperature * own * F.kl_div
+ return temperature * F.kl_div
objective/direct.py  objective/test_direct.py
- (1 - self.lam) * judged
+ judged
objective/features.py  objective/test_features.py
- scale = grad * (2 / (ctx.shape[0] * difference.numel()))
+ scale = grad * (2 / difference.numel())
objective/schedule.py  objective/test_schedule.py
- ((progress - self.at) / self.width + 0.5)
+ ((progress - self.at) / self.width)
objective/terms.py  objective/test_terms.py
- terms[name] = terms.get(name, 0.0) + scale * term
+ terms[name] = scale * term
# pooling over time, mixing rules
student/pool.py  student/test_pool.py
- gradients[t] if t + 1 == len(places) else gradients[t] - gradients[t + 1]
+ gradients[t]
student/pool.py  student/test_pool.py
- led.scatter_add_(2, first.flatten(2), -gradients[0].flatten(2))
+ led.scatter_add_(2, first.flatten(2), gradients[0].flatten(2))
student/mixing.py  student/test_mixing.py
- and _same(sums[:, 0], first[node][:, 0]) and _same(sums[:, 1], second[node][:, 1])
+ and _same(sums[:, 0], first[node][:, 0])
# conversion and calibration
data/feed.py  data/test_feed.py -k calibration
- to_inputs(images.train_images[evenly(len(images.train_images), count)])
+ to_inputs(images.test_images[evenly(len(images.test_images), count)])
student/calibrate.py  student/test_calibrate.py
- torch.quantile(positive, percentile / 100)
+ torch.quantile(activations, percentile / 100)
student/calibrate.py  student/test_calibrate.py
- taken = 1.0 if rule == "least-squares" or neuron.gain == 1 else neuron.gain / MARGIN
+ taken = 1.0 if neuron.gain == 1 else neuron.gain / MARGIN
student/calibrate.py  student/test_calibrate.py -k Biases
- by_channel(value)[None] * len(value))
+ by_channel(value)[None] * batch_size)
student/fold.py  student/test_fold.py
- or users[0].op != "call_module" or node.name in kept
+ or users[0].op != "call_module"
# rate-based and quantised gradients
student/rate.py  student/test_rate.py
- inverse.pow(-2) - eps
+ inverse.pow(-2)
student/rate.py  student/test_rate.py
- 1.0 / float(layer.num_batches_tracked) if momentum is None
+ 0.1 if momentum is None
neuron/layer.py  student/test_quantised.py
- levels=timesteps * self.neuron.levels
+ levels=timesteps
neuron/layer.py  student/test_quantised.py
- self.leak, threshold / timesteps, 1)
+ self.leak, threshold, 1)
neuron/surrogate.py  student/test_not_finite.py -k level
- clamp(0.0, float(levels)) + 0.0 * charged
+ clamp(0.0, float(levels))
# graded spikes
student/substeps.py  student/test_substeps.py
- torch.cat([steps[:, :1], steps[:, 1:] - constant[:, 1:]], 1)
+ steps
student/substeps.py  student/test_substeps.py
- potential = potential - fired
+ potential = potential - self.levels * fired
evaluate/latency.py  evaluate/test_latency.py
- (longest + timesteps - 1) * levels
+ (longest + timesteps) * levels
evaluate/latency.py  evaluate/test_latency.py
- deepest - depth > (found
+ deepest - depth >= (found
evaluate/energy.py  evaluate/test_energy.py
- self.timesteps * self.levels + 1))
+ self.timesteps + self.levels))
evaluate/immunity.py  evaluate/test_immunity.py -k counts
- (counts > number)
+ counts
evaluate/immunity.py  evaluate/test_immunity.py -k counts
- always = layer.neuron.levels * layer
+ always = layer
# corruptions, events, normalisation
data/noise.py  data/test_published_noise.py
- _clouds(x, decay**2, generator)
+ _clouds(x, decay, generator)
data/noise.py  data/test_published_noise.py -k tables
- (0.06, 0.10, 0.12, 0.16, 0.20)
+ (0.06, 0.10, 0.12, 0.16, 0.22)
data/events.py  data/test_events.py
- ROUND = 2**13
+ ROUND = 2**14
inputs.py  test_inputs.py
- LARGEST = 32.0
+ LARGEST = 320.0
# data on disk
data/arrays.py  data/test_arrays.py
- array.transpose(0, 3, 1, 2)
+ array.transpose(0, 3, 2, 1)
data/pictures.py  data/test_folders.py
- opened.getexif().get(ORIENTATION, 1) in range(2, 9)
+ opened.getexif().get(ORIENTATION, 1) in range(2, 8)
files.py  test_files.py
- if CHECKSUM in entries or RUN in entries:
+ if CHECKSUM in entries:
files.py  test_files.py
- if run != (home := run_of(path.parent)) and home:
+ if run != (home := run_of(path.parent)) and home and run:
train/run.py  train/test_run.py
- if line["epoch"] <= epoch]
+ if line["epoch"] < epoch]
# training
train/optimise.py  train/test_optimise.py
- (step - rise) / max(1.0, steps - rise)
+ step / steps
train/optimise.py  train/test_optimise.py
- multi_avg_fn=follow, use_buffers=True
+ multi_avg_fn=follow, use_buffers=False
train/loop.py  train/test_loop.py -k gradient_that_is_not_finite
- if not math.isfinite(norm):
+ if math.isnan(norm):
train/loop.py  train/test_loop.py -k Averaged
- self.student if self.averaged is None else self.averaged.module
+ self.student
recipes/checks.py  recipes/test_checks.py
- known = facts.get("samples") == training_samples(images, validation)
+ known = facts.get("samples") == training_samples(images, 0.1)
# measurements
evaluate/accuracy.py  evaluate/test_accuracy.py
- (cumulative(logits).argmax(-1) == labels)
+ (logits.argmax(-1) == labels)
evaluate/agreement.py  evaluate/test_agreement.py
- F.kl_div(answer, target
+ F.kl_div(target, answer
evaluate/early_exit.py  evaluate/test_early_exit.py
- (sums[staying] / t).softmax(-1)
+ sums[staying].softmax(-1)
evaluate/examine.py  evaluate/test_examine.py
- held[evenly(len(held), MOST)] if len(held)
+ train[evenly(len(train), MOST)] if len(held)
evaluate/examine.py  evaluate/test_examine.py
- 1 - _at_most(hits - 1, len(right), share)
+ 1 - _at_most(hits, len(right), share)
evaluate/operations.py  evaluate/test_operations.py
- return ever & ~before
+ return ever
evaluate/energy.py  evaluate/test_energy.py
- "quantised-sparse": model.ann(cost.active, activations, cost.bits)
+ "quantised-sparse": model.ann(cost.active, cost.updates, cost.bits)
evaluate/attacks.py  evaluate/test_attacks.py -k pgd
- epsilon if steps == 1 else 2.5 * epsilon / steps
+ epsilon if steps == 1 else epsilon / steps
evaluate/attacks.py  evaluate/test_attacks.py -k fooled
- torch.stack(masks).all(0)
+ torch.stack(masks).any(0)
evaluate/immunity.py  evaluate/test_attacks.py -k attacked
- torch.randperm(total, generator=Generator().manual_seed(seed))[:count]
+ torch.arange(total)[:count]
evaluate/immunity.py  evaluate/test_immunity.py -k membrane
- (layer.heights(current) / gain)
+ (1 / gain)
evaluate/scores.py  evaluate/test_scores.py
- "attacked" if attack else "clean"
+ "clean"
# tables
deliver/immunity.py  deliver/test_immunity.py
- sum(fall(scores, name, what) < fall(scores, baseline, what)
+ sum(fall(scores, name, what) <= fall(scores, baseline, what)
evaluate/paired.py  evaluate/test_deviation.py evaluate/test_paired.py
- statistics.stdev(values) if
+ statistics.pstdev(values) if
evaluate/paired.py  evaluate/test_paired.py
- math.sqrt(len(gains))), len(gains) - 1)
+ math.sqrt(len(gains))), len(gains))
evaluate/paired.py  evaluate/test_paired.py
- p * (len(p_values) - passed) >= level
+ p * len(p_values) >= level
"""


@dataclass(frozen=True)
class Mutation:
    """One place of the source, what takes its place, and who should notice."""

    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def mutated(self, source: Path) -> str:
        """The file with the change; exits where the old text does not occur exactly once."""
        text = (source / self.file).read_text(encoding="utf-8")
        if text.count(self.old) != 1:
            sys.exit(f"{self.file} holds {self.old!r} {text.count(self.old)} times, not once: mend MUTATIONS.")
        return text.replace(self.old, self.new)

    def __str__(self) -> str:
        return f"{self.file}: {self.old}  ->  {self.new}"


def read(text: str) -> list[Mutation]:
    """The mutations that a text lists; see the top of this file."""
    lines = [line for line in text.strip().splitlines() if not line.startswith("#")]
    found = []
    for place, old, new in zip(lines[::3], lines[1::3], lines[2::3], strict=True):
        if not (old.startswith("- ") and new.startswith("+ ")):
            sys.exit(f"After '{place}' come {old!r} and {new!r}: expected a line '- ' and a line '+ '.")
        file, *tests = shlex.split(place)
        found.append(Mutation(file, old[2:], new[2:], tuple(tests)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=int, nargs="+", metavar="N", help="these of the list alone, counted from 1")
    asked = parser.parse_args().only
    mutations = dict(enumerate(read(MUTATIONS), 1))
    chosen = {number: mutations[number] for number in asked or mutations}
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name)
        for part in ("spikedistill", "tests"):
            shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        for mutation in chosen.values():
            mutation.mutated(copy / "spikedistill")
        selections = dict.fromkeys(mutation.tests for mutation in chosen.values())
        together = tuple(name for tests in selections if "-k" not in tests for name in tests)
        for tests in filter(None, (together, *(tests for tests in selections if "-k" in tests))):
            if told := failure(copy, tests):
                sys.exit(f"{' '.join(tests)} fails on the source as it is: {told}")
        survivors = [mutation for number, mutation in chosen.items() if survives(copy, number, mutation)]
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} mutations were killed, {len(survivors)} survived")
    for mutation in survivors:
        print(f"survived: {mutation} ({' '.join(mutation.tests)})")
    sys.exit(len(survivors) > MOST)


def survives(copy: Path, number: int, mutation: Mutation) -> bool:
    """Whether no test notices; the copy is as before afterwards."""
    file, began = copy / "spikedistill" / mutation.file, time.monotonic()
    before = file.read_text(encoding="utf-8")
    file.write_text(mutation.mutated(copy / "spikedistill"), encoding="utf-8")
    try:
        told = failure(copy, mutation.tests)
    finally:
        file.write_text(before, encoding="utf-8")
    print(f"{number:3} {time.monotonic() - began:4.0f} s  {mutation}\n{'':12}{told or 'SURVIVED'}", flush=True)
    return not told


def failure(copy: Path, tests: Sequence[str]) -> str:
    """The first test that fails on the copy; empty where all pass.

    With ``CI`` set Hypothesis draws the same examples every time and knows no deadline, which a busy machine misses.
    """
    names = [f"tests/{test}" if test.endswith(".py") else test for test in tests]
    command = [sys.executable, "-B", "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *PLAIN, *names]
    env = {**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1", "CI": "1"}
    done = subprocess.run(command, cwd=copy, env=env, capture_output=True, text=True, timeout=600, check=False)
    if not done.returncode:
        return ""
    told = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return (told or done.stdout.splitlines() or [done.stderr])[0][:150]


if __name__ == "__main__":
    main()
