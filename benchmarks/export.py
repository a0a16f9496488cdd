"""Exported students: equality, speed and memory of onnxruntime beside torch, at batches of 1 and 64.

    python benchmarks/export.py RUN ... --data-dir DATA --csv docs/results/export.csv

Each run is exported in both forms and with int8 weights. Then torch and onnxruntime run the same images in turn, with
the same number of threads; times are medians. The process that runs onnxruntime has no torch, so its memory is that of
onnxruntime alone.
"""

import argparse
import csv
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch

from spikedistill.data.augment import to_inputs
from spikedistill.deliver.export import export
from spikedistill.deliver.record import Record

COLUMNS = ("run", "program", "form", "batch", "ms", "memory (MB)", "file (MB)", "on a threshold", "same class (%)")
ALONE = """
import json, sys, time
sys.modules["torch"] = None
import numpy as np, onnxruntime
file, images, threads, seconds = sys.argv[1], np.load(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = threads
session = onnxruntime.InferenceSession(file, options)
session.run(None, {"images": images})
times, end = [], time.perf_counter() + seconds
while time.perf_counter() < end or len(times) < 3:
    begin = time.perf_counter()
    session.run(None, {"images": images})
    times.append(time.perf_counter() - begin)
memory = next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps([sorted(times)[len(times) // 2], memory]))
"""


def by_torch(student: torch.nn.Module, inputs: torch.Tensor, seconds: float) -> float:
    times, end = [], time.perf_counter() + seconds
    with torch.inference_mode():
        student(inputs)
        while time.perf_counter() < end or len(times) < 3:
            begin = time.perf_counter()
            student(inputs)
            times.append(time.perf_counter() - begin)
    return median(times)


def by_onnx(file: Path, inputs: torch.Tensor, threads: int, seconds: float) -> tuple[float, float]:
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder) / "images.npy", inputs.numpy())
        call = [sys.executable, "-c", ALONE, str(file), f"{folder}/images.npy", str(threads), str(seconds)]
        found = json.loads(subprocess.run(call, capture_output=True, text=True, check=True).stdout)
    return found[0], found[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--data-dir")
    parser.add_argument("--trust-code", action="store_true")
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--csv", type=Path)
    given = parser.parse_args()
    threads, rows = torch.get_num_threads(), []
    for path in given.runs:
        record, name = Record.read(path), path.name
        with tempfile.TemporaryDirectory() as folder:
            options = {"out": Path(folder), "data_dir": given.data_dir, "trust_code": given.trust_code}
            both = export(path, **options)
            whole, stepped = both
            try:
                (small,) = export(path, form="sequence", int8=True, **options)
            except Exception as error:
                print(f"{name}: no int8 ({error})", file=sys.stderr)
                small = None
            student = record.network(given.trust_code).eval()
            images = record.images(given.data_dir).test_images
            for batch in (1, 64):
                inputs = to_inputs(images[:batch]).contiguous()
                ours = by_torch(student, inputs, given.seconds)
                rows.append([name, "torch", "", batch, f"{1000 * ours:.2f}", "", "", "", ""])
                for kind, file in (("onnxruntime", whole), ("onnxruntime, int8 weights", small)):
                    if file is None:
                        continue
                    seconds, memory = by_onnx(file.path, inputs, threads, given.seconds)
                    size, same = file.path.stat().st_size / 1e6, 100 * file.same_class
                    row = [name, kind, "sequence", batch, f"{1000 * seconds:.2f}", f"{memory:.0f}", f"{size:.2f}"]
                    rows.append([*row, "" if file is small else file.on_threshold, f"{same:.1f}"])
            print(f"{name}: step by step {stepped.on_threshold} on a threshold, {100 * stepped.same_class:.1f} %")
        for row in (row for row in rows if row[0] == name):
            print("  ".join(map(str, row)))
    if given.csv:
        with given.csv.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])


if __name__ == "__main__":
    main()
