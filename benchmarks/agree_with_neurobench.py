"""Synaptic operations as NeuroBench counts them and as this package does, on one spiking network.

    python benchmarks/agree_with_neurobench.py

NeuroBench (arXiv 2304.04640) gets an environment of its own with the same torch. Its hooks listen to the very student
that is counted here, with spikes of height 1, since it takes no other for spikes. Ends with 1 where a figure differs.
"""

import os
import subprocess
import sys
from pathlib import Path

import torch
from rivals import python_of

HERE = Path(__file__).resolve().parent


def main() -> int:
    if "inside" not in sys.argv:
        paths = {**os.environ, "PYTHONPATH": str(HERE.parent)}
        return subprocess.run([python_of("neurobench"), __file__, "inside"], env=paths).returncode
    from neurobench.metrics.workload import SynapticOperations
    from neurobench.models import TorchModel

    from spikedistill import IF, Architecture, Conversion, operations, to_spiking

    torch.manual_seed(0)
    agreed = True
    for name, width in (("vgg9", 8), ("resnet20", 8), ("resnet18", 8)):
        student, _ = to_spiking(
            Architecture(name, 10, 3, width).build(), Conversion(timesteps=4, neuron=IF, inherit=False)
        )
        images = torch.rand(16, 3, 32, 32)
        student.train()(images)  # batch norm sees data, so that neurons fire
        student.eval()
        with torch.no_grad(), operations(student) as counted:
            student(images)
        model, metric = TorchModel(student), SynapticOperations()
        model.register_hooks()
        with torch.no_grad():
            answers = model(images)
        theirs = metric(model, answers, (images, torch.zeros(len(images))))
        model.cleanup_hooks()
        ours = counted.per_image()
        for what, key in (("acs", "Effective_ACs"), ("macs", "Effective_MACs"), ("dense", "Dense")):
            counted_there = float(theirs[key])
            same = abs(ours[what] - counted_there) <= 1e-5 * counted_there
            agreed &= same
            verdict = "" if same else "DIFFERS"
            print(f"{name:10} {what:6} ours {ours[what]:14.1f}  NeuroBench {counted_there:14.1f}  {verdict}")
    return 0 if agreed else 1


if __name__ == "__main__":
    sys.exit(main())
