"""A hundred networks of torchvision and timm: each is converted and keeps five laws, or is refused with a reason.

    python benchmarks/conversions.py [--resume] [--only timm/resnet18 ...]     # some twenty minutes on two cores

Weights are random, with the statistics of trained ones (``lively``): a dead network converts trivially, and one whose
activations are half silent is chaotic: at 50 layers whatever differs in the first decides the last. Images have 64
pixels, or the smallest size that the network accepts; clips have four frames. Thresholds are the largest activations
over ``CALIBRATION`` images; errors are measured on the first ``TESTED`` of them: nothing is clipped, and what is left
is the error of a finite T. The laws of what was converted:

- alive: the logits differ between images, and every activation is active somewhere;
- error: ``|mean over time of the student's logits - y| / |y - mean over images of y|``, y the ANN's, at T=64 is at most
  half of that at T=16 (the first 16 of the 64 steps). Where it is above 1 at T=16, hardly any signal has come through
  so many layers: such a network is late if its error at T=256 is at most half of that at T=64, and the reason says so;
- step: one step of SGD by the exact gradient at T=2 has finite gradients and changes a quarter of the weight tensors
  (shifts before a batch norm have no gradient, and what is left after 60 layers may be less than a rounding);
- stream: a loop of ``step`` gives the logits of the whole call, in float64, where no spike hangs on a rounding;
- save: what ``load_student`` builds from the file alone has the same bits and gives the same logits.

A refusal is an error of this package's own. Anything else that is raised is a fault, and so is a refusal of images that
the ANN takes. Ends with code 1 where there is a fault or a law is broken.
"""

import argparse
import csv
import datetime
import multiprocessing
import re
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from rivals import Row, machine
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from spikedistill.errors import SpikeDistillError
from spikedistill.files import write_csv, write_text
from spikedistill.student.build import to_spiking
from spikedistill.student.conversion import Conversion
from spikedistill.student.save import load_student, save_student
from spikedistill.student.student import Student
from spikedistill.teacher.load import Architecture, Teacher

NETWORKS = {
    "torchvision": """
        alexnet vgg11 vgg11_bn vgg13_bn vgg16 vgg16_bn vgg19_bn resnet18 resnet34 resnet50 resnet101 resnet152
        resnext50_32x4d wide_resnet50_2 densenet121 densenet169 googlenet inception_v3 mobilenet_v2 mnasnet0_5
        mnasnet1_0 shufflenet_v2_x0_5 shufflenet_v2_x1_0 squeezenet1_0 squeezenet1_1 regnet_x_400mf regnet_x_800mf
        r3d_18 mc3_18 r2plus1d_18 mobilenet_v3_small mobilenet_v3_large efficientnet_b0 efficientnet_v2_s regnet_y_400mf
        convnext_tiny vit_b_16 swin_t maxvit_t swin3d_t""",
    "timm": """
        repvgg_a0 resnet10t resnet14t resnet18 resnet18d resnet26d resnet34 resnet50 resnet50d resnetaa34d
        resnetblur18 resnetv2_18 resnetv2_50 resnext50d_32x4d legacy_xception xception41 res2net50_26w_4s res2next50
        dla34 dla46_c dla60x_c dpn68 hrnet_w18_small densenetblur121d inception_v4 selecsls42 selecsls60 darknet17
        darknet53 cspdarknet53 cspresnet50 vovnet39a gernet_s hgnetv2_b0 mobilenetv1_100 mobilenetv2_100
        mobilenetv4_conv_small mobileone_s0 efficientnet_lite0 efficientnet_es fbnetc_100 spnasnet_100 regnetx_002
        convmixer_768_32 vgg11_bn efficientnet_b0 tf_efficientnet_lite0 mobilenetv3_small_100 seresnet50 skresnet18
        ecaresnet26t ghostnet_100 nf_resnet26 resnetv2_50x1_bit convnext_atto vit_tiny_patch16_224 mixer_s32_224
        levit_128s swin_tiny_patch4_window7_224 mobilevit_xxs""",
}
NAMES = [f"{library}/{name}" for library, names in NETWORKS.items() for name in names.split()]
VIDEO = ("r3d_18", "mc3_18", "r2plus1d_18", "swin3d_t")
CLASSES, SIZES, FRAMES = 1000, (64, 96, 128, 160, 192, 224, 256, 299), 4
CALIBRATION, TESTED, GRAINS = 16, 4, (1, 2, 4, 8, 16, 32)
STEPS, LONG = (16, 64), 256
SCALES, SHIFTS = (0.3, 0.5), (1.0, 0.2)
"""Of batch norms: bounds of the scales, and mean and deviation of the shifts."""
ACTIVATIONS = ("relu", "relu_", "relu6", "hardtanh", "hardtanh_", "leaky_relu", "leaky_relu_")
COLUMNS = (
    *("network", "parameters", "pixels", "neurons", "max_pools", "active", "spread", "outcome", "reason"),
    *("error_16", "error_64", "ratio", "step", "stream", "save", "seconds"),
)
"""``neurons``: layers of them. ``active``: the smallest share of positive outputs of an activation. ``spread``: the
deviation of the logits between images over their size. ``step``: the share of the weight tensors that it changed.
``stream``: the largest difference over the largest logit. ``seconds``: of the processor."""


def pictures(count: int, pixels: int, video: bool) -> Tensor:
    """Images in 0..1 with equal contrast at every scale: ``[count, 3, (frames,) pixels, pixels]``."""
    frames = FRAMES if video else 1
    parts = [torch.randn(count * frames, 3, grain, grain) for grain in GRAINS]
    whole = sum(interpolate(part, size=(pixels, pixels), mode="bilinear", align_corners=False) for part in parts)
    images = (0.5 + 0.2 * whole).clamp(0, 1).unflatten(0, (count, frames)).transpose(1, 2)  # type: ignore[union-attr]
    return images if video else images.squeeze(2)


class Watch(TorchFunctionMode):
    """Counts max pools and sees how many of the outputs of activations are positive."""

    def __init__(self) -> None:
        super().__init__()
        self.max_pools = 0
        self.active: list[float] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """What the function returns."""
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        self.max_pools += "max_pool" in name
        if name in ACTIVATIONS:
            self.active.append(float((result > 0).float().mean()))
        return result


@torch.no_grad()
def lively(ann: nn.Module, teacher: Teacher, images: Tensor) -> None:
    """Give batch norms the statistics of these images, and scales and shifts as training would.

    Every layer is scaled, and shifted where it has a bias, as if a batch norm followed it.
    """
    norms = [module for module in ann.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
        if norm.affine:
            norm.weight.uniform_(*SCALES)
            norm.bias.normal_(*SHIFTS)
    layers = [module for module in ann.modules() if isinstance(module, (nn.Conv2d, nn.Conv3d, nn.Linear))]
    hooks = [layer.register_forward_hook(_scale) for layer in layers]
    teacher(images)
    for hook in hooks:
        hook.remove()
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum
    ann.eval()


def _scale(layer: Any, _: Any, result: Tensor) -> Tensor:
    """Channels of mean 0 and deviation 1, shifted a little."""
    axes = [axis for axis in range(result.ndim) if axis != (result.ndim - 1 if isinstance(layer, nn.Linear) else 1)]
    deviation, mean = torch.std_mean(result, axes)
    scale = torch.empty_like(mean).uniform_(*SCALES) / deviation.clamp_min(1e-3)
    layer.weight.mul_(scale.view(-1, *[1] * (layer.weight.ndim - 1)))
    moved = torch.zeros_like(mean)
    if layer.bias is not None:
        moved = torch.empty_like(mean).normal_(*SHIFTS) - mean * scale
        layer.bias.mul_(scale).add_(moved)
    shape = [1 if axis in axes else -1 for axis in range(result.ndim)]
    return result * scale.view(shape) + moved.view(shape)


def accepted(teacher: Teacher, video: bool) -> int:
    """The smallest of ``SIZES`` that the network takes."""
    for pixels in SIZES:
        try:
            teacher(pictures(2, pixels, video))
        except (RuntimeError, ValueError, AssertionError):
            continue
        return pixels
    raise ValueError(f"it accepts none of {SIZES} pixels")


def measure(name: str) -> Row:
    """The row of one network."""
    begun = time.process_time()
    torch.manual_seed(0)
    row: Row = dict.fromkeys(COLUMNS, "") | {"network": name}
    try:
        _measure(name, row)
    except Exception as error:  # whatever the libraries raise
        lines = traceback.extract_tb(error.__traceback__)
        own = [f"{Path(line.filename).name}:{line.lineno}" for line in lines if "spikedistill" in line.filename]
        row |= {"outcome": "fault", "reason": f"{_said(error)} (at {own[-1] if own else 'the network itself'})"}
    row["seconds"] = round(time.process_time() - begun, 1)
    return row


def _said(error: Exception) -> str:
    """The first line of a message without the folders of this machine."""
    first = (str(error).strip().splitlines() or [""])[0]
    kind = "" if isinstance(error, SpikeDistillError) else f"{type(error).__name__}: "
    return kind + re.sub(r"/\S*site-packages/", "", first)


def _measure(name: str, row: Row) -> None:
    architecture = Architecture(name, CLASSES)
    ann = architecture.build()
    row["parameters"] = sum(weight.numel() for weight in ann.parameters())
    video = name.endswith(VIDEO)
    mean, std = ((0.45,), (0.225,)) if video else ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    teacher = Teacher(ann, mean, std)
    with torch.no_grad():
        row["pixels"] = accepted(teacher, video)
        images = pictures(CALIBRATION, row["pixels"], video)
        lively(ann, teacher, images)
        with Watch() as watch:
            wanted = teacher(images[:TESTED])
    if not torch.isfinite(wanted).all():
        raise ValueError("the logits of the ANN are not finite")
    spread = (wanted - wanted.mean(0)).norm() / wanted.norm()
    row |= {"max_pools": watch.max_pools, "spread": _digits(spread)}
    row["active"] = _digits(min(watch.active)) if watch.active else ""
    try:
        student, _ = to_spiking(teacher, Conversion(timesteps=STEPS[0], rule="max"), calibration_images=images)
    except SpikeDistillError as error:
        false = "does not accept the calibration images" in str(error)
        row |= {"outcome": "fault" if false else "refused", "reason": _said(error)}
        return
    row["neurons"] = len(student.layers())
    broken = [] if spread > 0.1 and min(watch.active) > 0.01 else ["alive"]
    broken += _laws(student.eval(), architecture, images[:TESTED], wanted, row)
    row["outcome"] = f"broken: {', '.join(broken)}" if broken else "converted"


def _laws(student: Student, architecture: Architecture, images: Tensor, wanted: Tensor, row: Row) -> list[str]:
    """The names of the laws that it breaks."""
    broken = []
    laws: Mapping[str, Any] = {"error": _error, "save": _save, "stream": _stream, "step": _step}
    for law, kept in laws.items():
        try:
            fine = kept(student, architecture, images, wanted, row)
        except Exception as error:  # whatever is raised breaks the law
            fine = False
            row[law if law in COLUMNS else "ratio"] = "raised"
            row["reason"] = f"{row['reason']} {law}: {_said(error)}".strip()
        broken += [] if fine else [law]
    return broken


@torch.no_grad()
def _error(student: Student, _: Architecture, images: Tensor, wanted: Tensor, row: Row) -> bool:
    student.set_timesteps(STEPS[1])
    logits = student(images)
    size = (wanted - wanted.mean(0)).norm()
    errors = [float((logits[:steps].mean(0) - wanted).norm() / size) for steps in STEPS]
    for steps, error in zip(STEPS, errors):
        row[f"error_{steps}"] = _digits(error)
    row["ratio"] = _digits(errors[1] / errors[0])
    return errors[1] <= errors[0] / 2 or (errors[0] > 1 and _late(student, images, wanted, errors[1], row))


def _late(student: Student, images: Tensor, wanted: Tensor, before: float, row: Row) -> bool:
    """Whether the error at ``LONG`` steps is at most half of that before; image by image, for memory's sake."""
    student.set_timesteps(LONG)
    logits = torch.cat([student(image[None]).mean(0) for image in images])
    error = float((logits - wanted).norm() / (wanted - wanted.mean(0)).norm())
    row["reason"] = f"late: error {_digits(error)} at T={LONG}"
    return error <= before / 2


@torch.no_grad()
def _save(student: Student, architecture: Architecture, images: Tensor, _: Tensor, row: Row) -> bool:
    student.set_timesteps(2)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_student(path, student, architecture=architecture)
        loaded = load_student(path)
    own, other = student.state_dict(), loaded.state_dict()
    fine = own.keys() == other.keys() and all(torch.equal(own[key], other[key]) for key in own)
    fine = fine and torch.equal(student(images), loaded(images))
    row["save"] = "equal" if fine else "differs"
    return fine


@torch.no_grad()
def _stream(student: Student, _: Architecture, images: Tensor, wanted: Tensor, row: Row) -> bool:
    timesteps = 3
    student.double().set_timesteps(timesteps)
    images = images.double()
    whole = student(images)
    state, steps = None, []
    for t in range(timesteps):
        logits, state = student.step(student.coding.frame(images, t, timesteps), state)
        steps.append(logits)
    student.float()
    difference = float((torch.stack(steps) - whole).abs().max() / whole.abs().max())
    row["stream"] = f"{difference:.0e}"
    return difference < 1e-9


def _step(student: Student, _: Architecture, images: Tensor, wanted: Tensor, row: Row) -> bool:
    student.train().set_timesteps(2)
    before = [weight.detach().clone() for weight in student.parameters()]
    optimiser = torch.optim.SGD(student.parameters(), lr=0.1)
    loss = cross_entropy(student(images).mean(0), wanted.argmin(1))
    loss.backward()
    gradients = [weight.grad for weight in student.parameters() if weight.grad is not None]
    optimiser.step()
    after = list(student.parameters())
    changed = sum(not torch.equal(old, new) for old, new in zip(before, after)) / len(before)
    row["step"] = _digits(changed)
    return changed > 0.25 and all(bool(torch.isfinite(given).all()) for given in (loss, *gradients, *after))


def _digits(value: Any) -> float:
    return float(f"{float(value):.3g}")


def _work(asked: Connection) -> None:
    """A process that measures what it is told, so that a crash ends one row and not the others."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    while (name := asked.recv()) is not None:
        asked.send(measure(name))


def in_processes(names: list[str], jobs: int, limit: float) -> Iterator[Row]:
    """Rows as they come, each network within so many seconds."""
    context = multiprocessing.get_context("fork")
    queue = list(names)
    idle: list[tuple[Any, Connection]] = []
    busy: dict[Connection, tuple[Any, str, float]] = {}
    while queue or busy:
        while queue and len(busy) < jobs:
            if not idle:
                here, there = context.Pipe()
                process = context.Process(target=_work, args=(there,), daemon=True)
                process.start()
                there.close()
                idle.append((process, here))
            process, here = idle.pop()
            busy[here] = (process, queue.pop(0), time.monotonic() + limit)
            here.send(busy[here][1])
        for ready in wait(list(busy), timeout=5):
            process, name, _ = busy.pop(ready)  # type: ignore[index]
            try:
                yield ready.recv()  # type: ignore[union-attr]
                idle.append((process, ready))  # type: ignore[arg-type]
            except EOFError:
                process.join()
                yield _ended(name, f"the process ended with code {process.exitcode}")
        for late in [each for each, (_, _, until) in busy.items() if time.monotonic() > until]:
            process, name, _ = busy.pop(late)
            process.kill()
            yield _ended(name, f"no answer within {limit:.0f} s")
    for process, here in idle:
        here.send(None)
        process.join()


def _ended(name: str, reason: str) -> Row:
    return dict.fromkeys(COLUMNS, "") | {"network": name, "outcome": "fault", "reason": reason}


def read(path: Path) -> dict[str, Row]:
    """The rows of an earlier run by network."""
    if not path.is_file():
        return {}
    with path.open(encoding="utf-8", newline="") as file:
        return {row["network"]: dict(row) for row in csv.DictReader(file)}


def write(path: Path, rows: Mapping[str, Row]) -> None:
    """The table as CSV and as Markdown."""
    ordered = [rows[name] for name in NAMES if name in rows]
    write_csv(path, COLUMNS, [[row[column] for column in COLUMNS] for row in ordered])
    converted = [row for row in ordered if row["neurons"] != ""]
    others = [row for row in ordered if row["neurons"] == ""]
    shown = [column for column in COLUMNS if column != "reason"]
    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}, timm {timm.__version__}"
    text = [
        "# Networks of torchvision and timm, converted or refused\n",
        f"`python benchmarks/conversions.py`, {datetime.date.today()}, {machine()}; {versions}.\n",
        f"{summary(rows)}. What the columns are: the head of `benchmarks/conversions.py`.\n",
        "Weights are random, and their statistics ours: set by the ratios of about ten of these networks, so that most"
        " units are active (`active`) and the networks nearly linear. With half of the units silent, as in trained"
        " networks, random ones of fifty layers are chaotic, with spikes or without. So the table shows that every part"
        " converts and converges. It says nothing of trained networks.\n",
        *_table(shown, converted),
        "",
        *(f"{row['network']} is {row['reason']}.\n" for row in converted if row["reason"]),
        *_table(["network", "parameters", "pixels", "outcome", "reason"], others),
    ]
    write_text(path.with_suffix(".md"), "\n".join(text) + "\n")


def _table(columns: list[str], rows: list[Row]) -> list[str]:
    lines = [[str(row[column]).replace("|", "\\|") for column in columns] for row in rows]
    return ["| " + " | ".join(line) + " |" for line in (columns, ["---"] * len(columns), *lines)]


def summary(rows: Mapping[str, Row]) -> str:
    """How many were converted and refused, and what failed."""
    outcomes = {name: str(row["outcome"]) for name, row in rows.items()}
    failed = [name for name, outcome in outcomes.items() if outcome not in ("converted", "refused")]
    counted = [sum(outcome == kind for outcome in outcomes.values()) for kind in ("converted", "refused")]
    failures = f"{len(failed)} failed{': ' if failed else ''}{', '.join(failed)}"
    return f"{len(rows)} networks: {counted[0]} converted, {counted[1]} refused, {failures}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/results/conversions.csv"))
    parser.add_argument("--resume", action="store_true", help="keep the rows that the table has")
    parser.add_argument("--only", nargs="+", choices=NAMES, metavar="NAME", help="measure these and keep other rows")
    parser.add_argument("--jobs", type=int, default=2, help="networks measured side by side")
    parser.add_argument("--limit", type=float, default=300, help="seconds for one network")
    given = parser.parse_args()
    begun = time.monotonic()
    rows = read(given.out) if given.resume or given.only else {}
    names = given.only or [name for name in NAMES if name not in rows]
    for count, row in enumerate(in_processes(names, given.jobs, given.limit), 1):
        rows[row["network"]] = row
        write(given.out, rows)
        numbers = " ".join(f"{key}={row[key]}" for key in ("error_16", "error_64", "step", "seconds") if row[key] != "")
        print(f"{count}/{len(names)} {row['network']}: {row['outcome']} {numbers} {row['reason'][:100]}", flush=True)
    print(f"{summary(rows)}, in {time.monotonic() - begun:.0f} s")
    sys.exit(any(row["outcome"] not in ("converted", "refused") for row in rows.values()))


if __name__ == "__main__":
    main()
