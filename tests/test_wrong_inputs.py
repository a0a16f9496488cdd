"""Every wrong input ends with code 2 and one message that names what is wrong, never with a traceback."""

import dataclasses
import errno
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from spikedistill import files
from spikedistill.cli import main
from spikedistill.files import read_tensors, write_tensors
from spikedistill.teacher.load import Architecture

OWN = """
from torch import nn

class Gelu(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.first, self.act, self.last = nn.Linear(192, 8), nn.GELU(), nn.Linear(8, classes)

    def forward(self, x):
        return self.last(self.act(self.first(x.flatten(1))))

def gelu(classes):
    return Gelu(classes)

def no_activation(classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(192, classes))

def without_classes():
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 3))

def no_network(classes):
    return "a string"

def too_large(classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(999, 8), nn.ReLU(), nn.Linear(8, classes))

class Two(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.last = nn.Linear(192, classes)

    def forward(self, x):
        return self.last(x.flatten(1)), x

def two_answers(classes):
    return Two(classes)

def probabilities(classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, classes), nn.Softmax(1))

def too_few(classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 2))
"""
QUICK = "--epochs 1 --batch-size 16 --lr 0.05 --device cpu --precision fp32"
TEACH = f"teach --data {{home}}/blobs.npz --network vgg9 --width 4 {QUICK} --out {{out}}"
STUDENT = "--student vgg9 --student-width 4 --timesteps 2 --calibration 16"
DISTILL = f"distill --data {{home}}/blobs.npz --teacher {{home}}/teacher {STUDENT} {QUICK} --out {{out}}"
FINISHED = DISTILL.replace("{out}", "{home}/run")
SAME = DISTILL.replace(STUDENT, "--student same --timesteps 2")
BARE = "--teacher-network vgg9 --teacher-width 4 --teacher-mean 0.4 0.4 0.4 --teacher-std 0.2 0.2 0.2"

TABLE = {
    "data file that is missing": (f"{TEACH} --data {{home}}/nowhere.npz", r"nowhere\.npz' does not exist"),
    "data folder that is missing": (f"{TEACH} --data {{home}}/nowhere", r"nowhere' does not exist"),
    "data set that is unknown": (f"{TEACH} --data cifar11", r"'cifar11'.*Did you mean 'cifar10'"),
    "data of another kind": (f"{TEACH} --data {{home}}/own.py", r"own\.py' is neither a folder nor a \.npz"),
    "folder without images": (f"{TEACH} --data {{home}}/empty", r"empty' holds no images"),
    "name that is too long": (f"{TEACH} --data {'x' * 300}", r"File name too long: '?x+'?: check the path"),
    "folder with an unreadable image": (f"{TEACH} --data {{home}}/unreadable", r"b/3\.png' cannot be read"),
    "folder with a cut image": (f"{TEACH} --data {{home}}/cut", r"b/3\.png' cannot be read"),
    "folder of several sizes": (f"{TEACH} --data {{home}}/sizes", r"b/3\.png' has shape \(9, 9, 3\).*--image-size"),
    "image size of a set that has one": (f"{TEACH} --image-size 8", r"image_size \(=8\) is for folders of images"),
    "network that returns no tensor": (
        f"{TEACH} --network {{home}}/own.py:two_answers ",
        r"does not accept the images.*it returns tuple, not a tensor of logits",
    ),
    "width of a student that is its teacher's": (
        f"{SAME} --student-width 16",
        r"student_width \(=16\) needs a network other than 'same'",
    ),
    "threshold of inherited weights": (f"{SAME} --threshold 2", r"threshold \(=2\.0\) is for fresh weights"),
    "image size of 0": (f"{TEACH} --data {{home}}/sizes --image-size 0", r"image_size \(=0\)"),
    "image size below 0": (f"{TEACH} --data {{home}}/sizes --image-size -1", r"image_size \(=-1\)"),
    "npz with pickled objects": (f"{TEACH} --data {{home}}/pickled.npz", r"pickled\.npz' cannot be read"),
    "npz cut short": (f"{TEACH} --data {{home}}/truncated.npz", r"truncated\.npz' cannot be read"),
    "npz with flipped bytes": (f"{TEACH} --data {{home}}/flipped.npz", r"flipped\.npz' cannot be read"),
    "npz that is no zip": (f"{TEACH} --data {{home}}/text.npz", r"text\.npz' cannot be read"),
    "npz of floats": (f"{TEACH} --data {{home}}/floats.npz", r"floats\.npz' are float64.*expected bytes"),
    "npz without test part": (f"{TEACH} --data {{home}}/half.npz", r"half\.npz' cannot be read .*test_images"),
    "npz of one-hot labels": (f"{TEACH} --data {{home}}/onehot.npz", r"labels of .*onehot.*\(48, 3\)"),
    "npz with fewer labels": (f"{TEACH} --data {{home}}/fewer.npz", r"'fewer' has 48 images and 47 labels"),
    "npz with a negative label": (f"{TEACH} --data {{home}}/negative.npz", r"'negative' run from -1 to 2"),
    "classes too small to split": (f"{TEACH} --validation 0.01", r"validation share of 0\.01 cannot be cut"),
    "immunity of no run": ("immunity --out {out}", r"[Rr]equired|No runs were given"),
    "immunity of a folder that is no run": ("immunity {home}/empty --out {out}", r"empty/recipe\.json' cannot be read"),
    "immunity to an unknown kind": (
        "immunity {home}/run --kinds nois --out {out}",
        r"'nois'.*Did you mean 'noise'",
    ),
    "immunity against nobody": (
        "immunity {home}/run --baseline rnu --out {out}",
        r"'rnu'.*Did you mean 'run'",
    ),
    "energy of no image": ("energy {home}/run --images 0", r"images \(=0\) must be 1 or more"),
    "study that is unknown": ("reproduce kdsnn-pair --out {out}", r"'kdsnn-pair'.*Did you mean 'kdsnn-pairs'"),
    "study of no seed": ("reproduce kdsnn-pairs --seeds 0 --out {out}", r"seeds \(=0\) must be 1 or more"),
    "conversion of another network": (
        f"{DISTILL} --method conversion-max",
        r"method \(=conversion-max\) keeps the teacher's weights",
    ),
    "one step for all of a leaky neuron": (
        f"{SAME} --gradient quantised --neuron lif",
        r"gradient=quantised trains all steps as one",
    ),
    "teacher of other classes": (f"{DISTILL} --data {{home}}/four.npz", r"knows 3 classes, but 'four' has 4"),
    "teacher of other channels": (f"{DISTILL} --data {{home}}/grey.npz", r"normalises 3 channels, but 'grey' has 1"),
    "teacher that is missing": (f"{DISTILL} --teacher {{home}}/nobody", r"no teacher at '.*nobody'"),
    "teacher without weights": (f"{DISTILL} --teacher {{home}}/empty", r"empty/model\.safetensors' does not exist"),
    "weights cut short": (
        f"{DISTILL} --teacher {{home}}/truncated.safetensors",
        r"truncated\.safetensors' cannot be read",
    ),
    "weights that are a pickle": (f"{DISTILL} --teacher {{home}}/evil.pt {BARE}", r"evil\.pt' cannot be read safely"),
    "weights that are a plain pickle": (f"{DISTILL} --teacher {{home}}/evil.pkl {BARE}", r"evil\.pkl' cannot be read"),
    "weights in a pickle named safetensors": (
        f"{DISTILL} --teacher {{home}}/evil.safetensors {BARE}",
        r"evil\.safetensors' cannot be read as safetensors",
    ),
    "weights in a npz cut short": (
        f"{DISTILL} --teacher {{home}}/truncated.npz {BARE}",
        r"truncated\.npz' cannot be read",
    ),
    "weights with NaN": (f"{DISTILL} --teacher {{home}}/nan.safetensors", r"classifier\.2\.bias' holds NaN"),
    "weights of another shape": (
        f"{DISTILL} --teacher {{home}}/wide.safetensors",
        r"size mismatch for .*: \(8, .*network's is \(4, ",
    ),
    "weights of another network": (
        f"{DISTILL} --teacher {{home}}/teacher --teacher-network resnet20",
        r"do not fit ResidualNet: size mismatch for 'classifier",
    ),
    "weights without their network": (f"{DISTILL} --teacher {{home}}/bare.safetensors", r"name the architecture"),
    "weights without normalisation": (
        f"{DISTILL} --teacher {{home}}/bare.safetensors --teacher-network vgg9 --teacher-width 4",
        r"bare\.safetensors' does not say how its inputs were normalised",
    ),
    "deviation of 0": (
        f"{DISTILL} --teacher {{home}}/bare.safetensors {BARE.replace('0.2 0.2 0.2', '0.2 0.0 0.2')}",
        r"std \(0\.2, 0\.0, 0\.2\)",
    ),
    "deviation of bytes": (
        f"{DISTILL} --teacher {{home}}/bare.safetensors {BARE.replace('0.2 0.2 0.2', '51 51 51')}",
        r"std \(51\.0, 51\.0, 51\.0\) do not fit images in 0\.\.1.* Divide values for bytes by 255",
    ),
    "mean of bytes": (
        f"{DISTILL} --teacher {{home}}/bare.safetensors {BARE.replace('0.4 0.4 0.4', '102 102 102')}",
        r"mean \(102\.0, 102\.0, 102\.0\).* Divide values for bytes by 255",
    ),
    "network that returns probabilities": (
        f"{TEACH} --network {{home}}/own.py:probabilities",
        r"probabilities' returns probabilities, not logits.* Remove the softmax at its end",
    ),
    "teacher that returns probabilities": (
        f"{DISTILL} --method direct --teacher {{home}}/probabilities.safetensors --trust-code",
        r"probabilities\) returns probabilities, not logits",
    ),
    "teacher of classes in another order": (
        f"{DISTILL} --data {{home}}/named.npz",
        r"in another order: 'b' is 0 and 1",
    ),
    "npz with labels from 1": (f"{TEACH} --data {{home}}/from1.npz", r"'from1' run from 1 to 3 .* Subtract 1"),
    "npz with a label to be ignored": (f"{TEACH} --data {{home}}/ignore.npz", r"Remove the images labelled 255, or"),
    "npz with one huge label": (
        f"{TEACH} --data {{home}}/huge.npz",
        r"run from 0 to 1000000000 .* labelled 1000000000",
    ),
    "folder of a training part alone": (
        f"{TEACH} --data {{home}}/alone",
        r"'Training' but no 'test' or 'val' beside it",
    ),
    "folder of parts of unknown names": (f"{TEACH} --data {{home}}/unknown", r"hold the same folders \(a, b\)"),
    "no time steps": (f"{DISTILL} --timesteps 0", r"timesteps \(=0\)"),
    "no epochs": (f"{DISTILL} --epochs 0", r"epochs \(=0\)"),
    "rate below 0": (f"{DISTILL} --lr -1", r"lr \(=-1\.0\)"),
    "rate that is no number": (f"{DISTILL} --lr nan", r"lr \(=nan\)"),
    "rate that explodes": (f"{TEACH} --lr 1e30 --epochs 3", r"lower --lr \(=1e\+30\)"),
    "several values at once": (f"{DISTILL} --timesteps 0 --epochs -2", r"timesteps \(=0\).*epochs \(=-2\)"),
    "batch larger than the data": (f"{DISTILL} --batch-size 49", r"batch_size \(=49\) must be at most the 43"),
    "validation of everything": (f"{DISTILL} --validation 1", r"validation \(=1\.0\)"),
    "width of a teacher from elsewhere": (
        f"{DISTILL} --teacher {{home}}/bare.safetensors {BARE} --teacher-network timm/test_resnet",
        r"width \(=4\) is for the zoo's networks, 'timm/test_resnet' has its own",
    ),
    "width of 0": (f"{TEACH} --width 0", r"width \(=0\) of 'vgg9' must be 1 or more"),
    "device that is not here": (f"{TEACH} --device tpu9", r"device 'tpu9' cannot be used"),
    "network that the zoo has not": (f"{TEACH} --network resnet21", r"'resnet21'. Did you mean 'resnet"),
    "network that torchvision has not": (
        f"{TEACH} --network torchvision/resnet21",
        r"There is no torchvision model 'resnet21'. Did you mean 'resnet",
    ),
    "student that the zoo has not": (f"{DISTILL} --student vgg10", r"'vgg10'. Did you mean 'vgg1"),
    "file of a network that is missing": (f"{TEACH} --network {{home}}/none.py:make", r"none\.py' .* does not exist"),
    "file without that function": (f"{TEACH} --network {{home}}/own.py:gelo", r"'gelo'. Did you mean 'gelu'"),
    "function without classes": (f"{TEACH} --network {{home}}/own.py:without_classes", r"without_classes.*classes"),
    "function that gives no network": (f"{TEACH} --network {{home}}/own.py:no_network", r"no_network' returned str"),
    "file that cannot be imported": (f"{TEACH} --network {{home}}/syntax.py:make", r"syntax\.py"),
    "network for other images": (f"{TEACH} --network {{home}}/own.py:too_large", r"too_large"),
    "network of other classes": (f"{TEACH} --network {{home}}/own.py:too_few", r"too_few.*2.* 3 "),
    "student for other images": (
        f"{DISTILL} --student {{home}}/own.py:too_large --student-width None --method direct",
        r"too_large",
    ),
    "student of other classes": (
        f"{DISTILL} --student {{home}}/own.py:too_few --student-width None --method direct",
        r"too_few.*2.* 3 ",
    ),
    "teacher for other images": (
        f"{DISTILL} --method direct --teacher {{home}}/large.safetensors --trust-code",
        r"too_large\) does not accept the images",
    ),
    "teacher of code that is not trusted": (
        f"{DISTILL} --method direct --teacher {{home}}/large.safetensors",
        r"large\.safetensors' names Python code .*own\.py:too_large.* --trust-code",
    ),
    "network with GELU": (
        f"{DISTILL} --student {{home}}/own.py:gelu --student-width None",
        r"act. \(GELU\) at .*own\.py:10 .*nn\.ReLU",
    ),
    "network without activation": (
        f"{DISTILL} --student {{home}}/own.py:no_activation --student-width None",
        r"nothing would spike",
    ),
    "inheriting by an unlike student": (f"{DISTILL} --inherit True", r"inherit .*'vgg9', not 'same'"),
    "leak of a neuron without": (f"{DISTILL} --leak 0.5", r"leak \(=0\.5\) is for lif and plif"),
    "leak beyond its range": (f"{DISTILL} --neuron lif --leak 1.5", r"leak \(=1\.5\)"),
    "percentile beyond its range": (f"{DISTILL} --rule percentile --percentile 200", r"percentile \(=200\.0\)"),
    "alpha beyond its range": (f"{DISTILL} --alpha 2", r"alpha \(=2\.0\)"),
    "temperature of 0": (f"{DISTILL} --temperature 0", r"temperature \(=0\.0\)"),
    "weight of features below 0": (f"{DISTILL} --weight -1", r"weight \(=-1\.0\)"),
    "label smoothing beyond its range": (f"{TEACH} --label-smoothing 1.5", r"label_smoothing \(=1\.5\)"),
    "teacher's path that is no module": (f"{DISTILL} --pairs layr1 layer1", r"'layr1'. Did you mean 'layer1'"),
    "student's path that is no module": (f"{DISTILL} --pairs layer1 layr1", r"'layr1'. Did you mean 'layer1'"),
    "paths that cannot be compared": (f"{DISTILL} --pairs layer1 classifier", r"\(\d+, 4, 4, 4\).*cannot be compared"),
    **{
        f"no teacher for {name}": (
            f"{DISTILL} --teacher none --method {name}",
            rf"method \(={name}\) needs a teacher: name one by teacher, or use direct or tet",
        )
        for name in ("kdsnn", "kdsnn-feature", "kdsnn-response")
    },
    "no teacher whose network the student could take": (
        f"{SAME} --teacher none --method direct",
        r"the network of 'none' is not known: name the student's network by --student",
    ),
    "method that is unknown": (f"{DISTILL} --method kdsn", r"'kdsn'. Did you mean 'kdsnn'.*FILE\.py:CLASS"),
    "run that exists": (FINISHED, r"run' already holds a run"),
    "resuming where nothing lies": (f"{DISTILL} --resume", r"There is no run in '.*out' to resume"),
    "resuming with another recipe": (f"{FINISHED} --resume --lr 0.7", r"lr was 0\.05, now 0\.7"),
    "resuming with another kind": (TEACH.replace("{out}", "{home}/run --resume"), r"kind was 'distill', now 'teach'"),
    "resuming with a broken recipe": (
        DISTILL.replace("{out}", "{home}/broken --resume"),
        r"broken/recipe\.json' cannot",
    ),
    "resuming from a broken checkpoint": (
        DISTILL.replace("{out}", "{home}/damaged --resume"),
        r"damaged/checkpoint\.safetensors' cannot be read",
    ),
    "out that is a file": (DISTILL.replace("{out}", "{home}/own.py"), r"own\.py"),
    "out that is the teacher's": (
        DISTILL.replace("{out}", "{home}/teacher"),
        r"teacher' holds files .* choose an empty",
    ),
    "out that is the data's": (
        TEACH.replace("blobs.npz", "photos").replace("{out}", "{home}/photos --validation 0 --batch-size 4"),
        r"photos' is inside the folder of the data",
    ),
    "out among the images": (
        TEACH.replace("blobs.npz", "photos").replace("{out}", "{home}/photos/run --validation 0 --batch-size 4"),
        r"photos/run' is inside the folder of the data",
    ),
    "out that is somebody else's": (
        TEACH.replace("{out}", "{home}/else"),
        r"else' holds files \(notes\.md, notes\.txt, recipe\.json\) but no run of spikedistill",
    ),
    "immunity into somebody else's folder": (
        "immunity {home}/run --kinds noise --images 3 --out {home}/else",
        r"else' holds files",
    ),
    "immunity into the run that is measured": (
        "immunity {home}/run --kinds noise --images 3 --out {home}/run",
        r"run' already holds a run, of 'distill'",
    ),
    "energy over another file": (
        "energy {home}/run --images 3 --out {home}/else/recipe.json",
        r"else/recipe\.json' exists and was not written by this command",
    ),
    "study over another file": (
        "reproduce kdsnn-mnist --runs {out} --out {home}/else/notes",
        r"else/notes\.md' exists and was not written by this command",
    ),
    "demo in somebody else's folder": ("demo --out {home}/demo", r"demo/teacher' holds files \(thesis\.tex\)"),
    "out that cannot be made": (
        DISTILL.replace("{out}", "/proc/nowhere/run"),
        r"/proc/nowhere/run.* could not be written",
    ),
    "evaluating a teacher's weights": (
        "evaluate {home}/teacher",
        r"teacher/recipe\.json' cannot be read .*the directory of a run\?",
    ),
    "evaluating nothing": ("evaluate {home}/nobody", "nobody' does not exist: give a run directory"),
    "evaluating an unfinished run": (
        "evaluate {home}/unfinished",
        r"unfinished' holds no finished run: finish it by .* --resume",
    ),
    "evaluating broken weights": ("evaluate {home}/cut-run", r"cut-run/model\.safetensors' cannot be read"),
    "evaluating a weights file": (
        "evaluate {home}/bare.safetensors",
        r"bare\.safetensors' holds no recipe: give a run directory",
    ),
    "evaluating a run with a teacher's weights": (
        "evaluate {home}/mixed",
        r"mixed/model\.safetensors' was written by no run, .* and lies in the directory of the run",
    ),
    "evaluating without steps": ("evaluate {home}/run --timesteps 0", r"timesteps \(=0\)"),
    "evaluating with more than certainty": ("evaluate {home}/run --confidence 1.5", r"confidence \(=1\.5\)"),
    "evaluating with a negative confidence": ("evaluate {home}/run --confidence -0.1", r"confidence \(=-0\.1\)"),
    "evaluating with a confidence that is no number": (
        "evaluate {home}/run --confidence nan",
        r"confidence \(=nan\)",
    ),
    "comparing nothing but an unfinished run": (
        "compare {home}/unfinished",
        r"unfinished' is unfinished",
    ),
    "comparing a broken run": ("compare {home}/broken", r"broken/recipe\.json' cannot be read"),
    "comparing an empty recipe": ("compare {home}/hollow", r"hollow"),
    "comparing nothing": ("compare", r"[Nn]o runs to compare"),
    "same student of a teacher with GELU": (
        f"{SAME} --teacher {{home}}/gelu.safetensors --trust-code --method direct",
        r"act. \(GELU\) at .*own\.py:10 .*nn\.ReLU",
    ),
}


pytestmark = pytest.mark.usefixtures("without_compiler")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder full of good and broken things."""
    folder = tmp_path_factory.mktemp("wrong")
    (folder / "own.py").write_text(OWN)
    (folder / "syntax.py").write_text("def make(classes:\n")
    make_data(folder)
    make_folders(folder)
    make_weights(folder)
    make_runs(folder)
    return folder


def make_data(folder):
    random = np.random.default_rng(0)

    def arrays(classes, channels):
        made = {}
        for part, count in (("train", 48), ("test", 24)):
            made[f"{part}_images"] = random.integers(0, 256, (count, 8, 8, channels)).astype(np.uint8)
            made[f"{part}_labels"] = np.arange(count) % classes
        return made

    good = arrays(3, 3)
    np.savez(folder / "blobs.npz", **good)
    np.savez(folder / "four.npz", **arrays(4, 3))
    np.savez(folder / "grey.npz", **arrays(3, 1))
    np.savez(folder / "floats.npz", **{**good, "train_images": good["train_images"] / 255})
    np.savez(folder / "pickled.npz", **{**good, "train_images": np.array([{"a": 1}], dtype=object)})
    np.savez(folder / "onehot.npz", **{**good, "train_labels": np.eye(3, dtype=int)[good["train_labels"]]})
    np.savez(folder / "fewer.npz", **{**good, "train_labels": good["train_labels"][:-1]})
    np.savez(folder / "negative.npz", **{**good, "train_labels": np.r_[-1, good["train_labels"][1:]]})
    np.savez(folder / "from1.npz", **{name: array + ("labels" in name) for name, array in good.items()})
    for name, label in (("ignore", 255), ("huge", 10**9)):
        np.savez(folder / f"{name}.npz", **{**good, "train_labels": np.r_[label, good["train_labels"][1:]]})
    np.savez(folder / "named.npz", **good, class_names=np.array(["b", "a", "c"]))
    np.savez(folder / "half.npz", **{name: value for name, value in good.items() if "train" in name})
    content = (folder / "blobs.npz").read_bytes()
    (folder / "truncated.npz").write_bytes(content[: len(content) // 2])
    (folder / "flipped.npz").write_bytes(content[:500] + b"\0" * 500 + content[1000:])
    (folder / "text.npz").write_text("no zip at all")


def make_folders(folder):
    (folder / "empty").mkdir()
    for name in ("else/recipe.json", "else/notes.txt", "else/notes.md", "demo/teacher/thesis.tex"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine")
    for name in ("unreadable", "cut", "sizes", "photos"):
        for number, label in enumerate("aaaabbbb"):
            (folder / name / label).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / name / label / f"{number % 4}.png")
    for parts in (("alone/Training",), ("unknown/part1", "unknown/part2")):
        for part in parts:
            shutil.copytree(folder / "sizes", folder / part)
    (folder / "unreadable" / "b" / "3.png").write_text("no image")
    whole = (folder / "cut" / "b" / "3.png").read_bytes()
    (folder / "cut" / "b" / "3.png").write_bytes(whole[:50])
    Image.new("RGB", (9, 9)).save(folder / "sizes" / "b" / "3.png")


class Evil:
    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


def make_weights(folder):
    def facts(network):
        normal = {"mean": [0.4] * 3, "std": [0.2] * 3}
        named = {"architecture": dataclasses.asdict(network), "class_names": ["a", "b", "c"]}
        return {"kind": "teacher", **named, **normal}

    small = Architecture("vgg9", 3, 3, 4)
    tensors = small.build().state_dict()
    write_tensors(folder / "teacher" / "model.safetensors", tensors, facts(small))
    write_tensors(folder / "bare.safetensors", tensors, {})
    spoilt = {**tensors, "classifier.2.bias": torch.tensor([0.0, torch.nan, 0.0])}
    write_tensors(folder / "nan.safetensors", spoilt, facts(small))
    write_tensors(folder / "wide.safetensors", Architecture("vgg9", 3, 3, 8).build().state_dict(), facts(small))
    content = (folder / "teacher" / "model.safetensors").read_bytes()
    (folder / "truncated.safetensors").write_bytes(content[: len(content) // 2])
    torch.save({"weight": Evil(folder / "was-here")}, folder / "evil.pt")
    for name in ("evil.pkl", "evil.safetensors"):
        (folder / name).write_bytes(pickle.dumps(Evil(folder / "was-here")))
    for name, function in (("gelu", "gelu"), ("large", "too_large"), ("probabilities", "probabilities")):
        own = Architecture(f"{folder / 'own.py'}:{function}", 3, 3)
        write_tensors(folder / f"{name}.safetensors", own.build().state_dict(), facts(own))


def make_runs(folder):
    assert call(FINISHED, folder, folder / "out") == 0
    for name in ("unfinished", "broken", "damaged", "hollow", "cut-run", "mixed"):
        shutil.copytree(folder / "run", folder / name)
    for name in ("results.json", "model.safetensors"):
        (folder / "unfinished" / name).unlink()
    (folder / "broken" / "recipe.json").write_text('{"kind": "dist')
    (folder / "hollow" / "recipe.json").write_text("{}")
    for name, file in (("damaged", "checkpoint.safetensors"), ("cut-run", "model.safetensors")):
        whole = (folder / name / file).read_bytes()
        (folder / name / file).write_bytes(whole[:-100])
    shutil.copy(folder / "teacher" / "model.safetensors", folder / "mixed")


def call(command, home, out):
    """Run a command in this process; return its exit code."""
    arguments = [part.format(home=home, out=out) for part in command.split()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["spikedistill", *arguments])
        try:
            main()
        except SystemExit as end:
            return end.code
    return 0


def the_message(capsys):
    """The one message; what was said before it is progress."""
    caught = capsys.readouterr()
    assert caught.out == "" and "Traceback" not in caught.err
    (message,) = re.findall(r"^spikedistill: (.*)\Z", caught.err, flags=re.MULTILINE | re.DOTALL)
    return message.strip()


@pytest.mark.parametrize("command, expected", TABLE.values(), ids=TABLE)
def test_a_wrong_input_ends_with_code_2_and_a_message_that_names_it(command, expected, home, tmp_path, capsys):
    assert call(command, home, tmp_path / "out") == 2
    message = the_message(capsys)
    assert re.search(expected, message, flags=re.DOTALL), message
    assert len(message) < 600 and message.endswith((".", "?", ")"))


def test_the_commands_that_the_table_spoils_are_good(home, tmp_path):
    for number, command in enumerate((TEACH, DISTILL, SAME)):
        assert call(command, home, tmp_path / str(number)) == 0
    assert call("evaluate {home}/run", home, None) == call("compare {home}/run", home, None) == 0


def test_nothing_that_was_pickled_was_ever_run(home, tmp_path, capsys):
    for name in ("evil.pt", "evil.pkl", "evil.safetensors"):
        assert call(f"{DISTILL} --teacher {{home}}/{name} {BARE}", home, tmp_path / "out") == 2
    assert not (home / "was-here").exists()
    pickle.loads((home / "evil.pkl").read_bytes())  # so it would be seen
    assert (home / "was-here").exists()


def test_what_is_somebody_else_s_is_left_as_it_was(home):
    assert {file.name: file.read_text() for file in (home / "else").iterdir()} == dict.fromkeys(
        ("recipe.json", "notes.txt", "notes.md"), "mine"
    )
    assert sorted(file.name for file in (home / "photos").iterdir()) == ["a", "b"]


class TestFullDisk:
    full = OSError(errno.ENOSPC, "No space left on device")

    def fail_at(self, calls, original):
        left = [calls]

        def limited(*args, **kwargs):
            if not left[0]:
                raise self.full
            left[0] -= 1
            return original(*args, **kwargs)

        return limited

    @pytest.mark.parametrize("calls", range(6))
    def test_when_a_file_is_moved_to_its_place(self, calls, home, tmp_path, monkeypatch, capsys):
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", self.fail_at(calls, os.replace))
            assert call(DISTILL, home, tmp_path / "out") == 2
        assert re.search(r"out/.*' could not be written .*No space left.*--resume", the_message(capsys))
        assert not list((tmp_path / "out").glob("*.part"))

    @pytest.mark.parametrize("calls", range(2))
    def test_when_tensors_are_written(self, calls, home, tmp_path, monkeypatch, capsys):
        with monkeypatch.context() as patch:
            patch.setattr(files, "save_file", self.fail_at(calls, files.save_file))
            assert call(DISTILL, home, tmp_path / "out") == 2
        assert re.search(r"\.safetensors' could not be written .*No space left.*--resume", the_message(capsys))
        assert call(f"{DISTILL} --resume", home, tmp_path / "out") == 0
        tensors, _ = read_tensors(tmp_path / "out" / "model.safetensors")
        whole, _ = read_tensors(home / "run" / "model.safetensors")
        assert all(torch.equal(value, whole[name]) for name, value in tensors.items())

    @pytest.mark.parametrize("name", ["metrics", "timing"])
    def test_when_a_line_is_appended(self, name, home, tmp_path, monkeypatch, capsys):
        original = Path.open

        def limited(path, mode="r", *args, **kwargs):
            if path.name == f"{name}.jsonl" and "a" in mode:
                raise self.full
            return original(path, mode, *args, **kwargs)

        monkeypatch.setattr(Path, "open", limited)
        assert call(DISTILL, home, tmp_path / "out") == 2
        assert re.search(rf"{name}\.jsonl' could not be written .*No space left", the_message(capsys))


CALLS = {
    "Neuron(reset='subtract')": "reset (='subtract') must be Reset.SUBTRACT or Reset.ZERO",
    "Neuron(surrogate='sigmoid')": "surrogate (='sigmoid') must have gradient(u): give Triangle()",
    "Neuron(surrogate=Triangle)": "must have gradient(u): give Triangle()",
    "to_spiking(nn.ReLU(), Conversion(inherit=False, rule='maximum'))": "no rule 'maximum'. Did you mean 'max'",
    "to_spiking(nn.ReLU(), Conversion(inherit=False, max_pool='avg'))": "no max_pool 'avg'. Did you mean 'average'",
    "to_spiking(nn.ReLU(), calibration_images=[[0.5]])": "calibration_images is a list: give a tensor of raw images in",
}


def test_a_call_with_a_value_of_another_kind_is_refused_outside_of_tests_too():
    # inside of them the types of arguments are checked, so a process of its own
    lines = ["from torch import nn", "from spikedistill import Conversion, ConfigError, Neuron, Triangle, to_spiking"]
    for call in CALLS:
        lines += ["try:", f"    {call}", "except ConfigError as error:", "    print(error)"]
    command = [sys.executable, "-c", "\n".join(lines)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    for found, expected in zip(printed, CALLS.values(), strict=True):
        assert expected in found
