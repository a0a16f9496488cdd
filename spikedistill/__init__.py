"""Deep spiking neural networks from trained artificial networks, by knowledge distillation.

A trained teacher becomes a spiking student, is taught by an objective, is trained, measured and delivered.
Names are imported when they are first asked for, so that ``import spikedistill`` costs nothing.
"""

import difflib
import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spikedistill.answer import Answer, Learner
    from spikedistill.compute.place import Place, choose_place
    from spikedistill.compute.winograd import use_winograd
    from spikedistill.data.augment import Augment
    from spikedistill.data.camera import EventCamera
    from spikedistill.data.events import Binning, Recording, read_nmnist, to_frames
    from spikedistill.data.feed import Feed, Inputs, MemoryFeed, PairFeed
    from spikedistill.data.images import ImageSet, load_images, split
    from spikedistill.data.recordings import read_recording
    from spikedistill.deliver import plot
    from spikedistill.deliver.export import export, export_student
    from spikedistill.deliver.onnx import OnnxStudent
    from spikedistill.deliver.pretrained import PRETRAINED, pretrained
    from spikedistill.deliver.record import Record
    from spikedistill.deliver.report import report
    from spikedistill.errors import (
        ConfigError,
        ConversionError,
        DataError,
        RunError,
        ShapeError,
        SpikeDistillError,
        WeightsError,
    )
    from spikedistill.evaluate.accuracy import accuracy_by_step, predict
    from spikedistill.evaluate.activity import Activity, record_activity
    from spikedistill.evaluate.agreement import agreement, divergence
    from spikedistill.evaluate.early_exit import EarlyExit, early_exit
    from spikedistill.evaluate.firing import firing_rates
    from spikedistill.evaluate.immunity import immunity
    from spikedistill.evaluate.operations import operations
    from spikedistill.neuron.dynamics import IF, LIF, PLIF, Neuron, Reset
    from spikedistill.neuron.layer import Spiking
    from spikedistill.neuron.surrogate import ATan, Rectangle, Sigmoid, Triangle
    from spikedistill.objective.budget import Budget, Penalty
    from spikedistill.objective.cross_kd import CrossKD
    from spikedistill.objective.decoupled import TemporalDecoupling
    from spikedistill.objective.direct import TET, Direct
    from spikedistill.objective.kdsnn import KDSNN, KDSNNFeature, KDSNNResponse
    from spikedistill.objective.qcfs import QCFS
    from spikedistill.objective.schedule import Constant, Ramp, Schedule, Switch
    from spikedistill.objective.spikes import DistillingSpikes
    from spikedistill.objective.temperatures import HeterogeneousTemperatures
    from spikedistill.objective.terms import Batch, Needs, Objective, Sum
    from spikedistill.recipes.choices import StudentChoice, TeacherChoice
    from spikedistill.recipes.distill import Distill, distill
    from spikedistill.recipes.teach import Teach, teach
    from spikedistill.student.build import to_spiking
    from spikedistill.student.coding import DirectCoding, FrameCoding, LatencyCoding, RateCoding
    from spikedistill.student.conversion import Conversion
    from spikedistill.student.cos import run_with_offsets
    from spikedistill.student.fold import fold
    from spikedistill.student.report import ConversionReport
    from spikedistill.student.save import load_student, save_student
    from spikedistill.student.student import Student
    from spikedistill.student.substeps import run_in_substeps, step_by_step
    from spikedistill.teacher.load import Architecture, Teacher, load_teacher
    from spikedistill.teacher.spiking import SpikingTeacher
    from spikedistill.train.loop import fit
    from spikedistill.train.recipe import Data, Training
    from spikedistill.train.run import Run

__version__ = "0.1.0"

__all__ = [
    "IF",
    "KDSNN",
    "LIF",
    "PLIF",
    "PRETRAINED",
    "QCFS",
    "TET",
    "ATan",
    "Activity",
    "Answer",
    "Architecture",
    "Augment",
    "Batch",
    "Binning",
    "Budget",
    "ConfigError",
    "Constant",
    "Conversion",
    "ConversionError",
    "ConversionReport",
    "CrossKD",
    "Data",
    "DataError",
    "Direct",
    "DirectCoding",
    "Distill",
    "DistillingSpikes",
    "EarlyExit",
    "EventCamera",
    "Feed",
    "FrameCoding",
    "HeterogeneousTemperatures",
    "ImageSet",
    "Inputs",
    "KDSNNFeature",
    "KDSNNResponse",
    "LatencyCoding",
    "Learner",
    "MemoryFeed",
    "Needs",
    "Neuron",
    "Objective",
    "OnnxStudent",
    "PairFeed",
    "Penalty",
    "Place",
    "Ramp",
    "RateCoding",
    "Record",
    "Recording",
    "Rectangle",
    "Reset",
    "Run",
    "RunError",
    "Schedule",
    "ShapeError",
    "Sigmoid",
    "SpikeDistillError",
    "Spiking",
    "SpikingTeacher",
    "Student",
    "StudentChoice",
    "Sum",
    "Switch",
    "Teach",
    "Teacher",
    "TeacherChoice",
    "TemporalDecoupling",
    "Training",
    "Triangle",
    "WeightsError",
    "accuracy_by_step",
    "agreement",
    "choose_place",
    "distill",
    "divergence",
    "early_exit",
    "export",
    "export_student",
    "firing_rates",
    "fit",
    "fold",
    "immunity",
    "load_images",
    "load_student",
    "load_teacher",
    "operations",
    "plot",
    "predict",
    "pretrained",
    "read_nmnist",
    "read_recording",
    "record_activity",
    "report",
    "run_in_substeps",
    "run_with_offsets",
    "save_student",
    "split",
    "step_by_step",
    "teach",
    "to_frames",
    "to_spiking",
    "use_winograd",
]

_NAMES = {
    "answer": "Answer Learner",
    "compute.place": "Place choose_place",
    "compute.winograd": "use_winograd",
    "data.augment": "Augment",
    "data.camera": "EventCamera",
    "data.events": "Binning Recording read_nmnist to_frames",
    "data.feed": "Feed Inputs MemoryFeed PairFeed",
    "data.images": "ImageSet load_images split",
    "data.recordings": "read_recording",
    "deliver": "plot",
    "deliver.export": "export export_student",
    "deliver.onnx": "OnnxStudent",
    "deliver.pretrained": "PRETRAINED pretrained",
    "deliver.record": "Record",
    "deliver.report": "report",
    "errors": "ConfigError ConversionError DataError RunError ShapeError SpikeDistillError WeightsError",
    "evaluate.accuracy": "accuracy_by_step predict",
    "evaluate.agreement": "agreement divergence",
    "evaluate.early_exit": "EarlyExit early_exit",
    "evaluate.firing": "firing_rates",
    "evaluate.immunity": "immunity",
    "evaluate.activity": "Activity record_activity",
    "evaluate.operations": "operations",
    "neuron.dynamics": "IF LIF PLIF Neuron Reset",
    "neuron.layer": "Spiking",
    "neuron.surrogate": "ATan Rectangle Sigmoid Triangle",
    "objective.budget": "Budget Penalty",
    "objective.cross_kd": "CrossKD",
    "objective.decoupled": "TemporalDecoupling",
    "objective.spikes": "DistillingSpikes",
    "objective.temperatures": "HeterogeneousTemperatures",
    "objective.direct": "TET Direct",
    "objective.kdsnn": "KDSNN KDSNNFeature KDSNNResponse",
    "objective.qcfs": "QCFS",
    "objective.schedule": "Constant Ramp Schedule Switch",
    "objective.terms": "Batch Needs Objective Sum",
    "recipes.choices": "StudentChoice TeacherChoice",
    "recipes.distill": "Distill distill",
    "recipes.teach": "Teach teach",
    "student.build": "to_spiking",
    "student.coding": "DirectCoding FrameCoding LatencyCoding RateCoding",
    "student.conversion": "Conversion",
    "student.cos": "run_with_offsets",
    "student.fold": "fold",
    "student.report": "ConversionReport",
    "student.save": "load_student save_student",
    "student.student": "Student",
    "student.substeps": "run_in_substeps step_by_step",
    "teacher.load": "Architecture Teacher load_teacher",
    "teacher.spiking": "SpikingTeacher",
    "train.loop": "fit",
    "train.recipe": "Data Training",
    "train.run": "Run",
}
"""What each module holds of ``__all__``."""
_MODULES = {name: module for module, names in _NAMES.items() for name in names.split()}


if not TYPE_CHECKING:  # else type checkers would find every name, misspelt ones too

    def __getattr__(name: str) -> Any:
        """A public name, or a part of the package, imported now."""
        if name in _MODULES:
            value = getattr(importlib.import_module(f"spikedistill.{_MODULES[name]}"), name)
            globals()[name] = value
            return value
        if name.isidentifier() and name[0] != "_" and importlib.util.find_spec(f"spikedistill.{name}") is not None:
            return importlib.import_module(f"spikedistill.{name}")
        near = difflib.get_close_matches(name, _MODULES, n=1)
        raise AttributeError(
            f"module 'spikedistill' has no attribute '{name}'" + (f": did you mean '{near[0]}'?" if near else "")
        )


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
