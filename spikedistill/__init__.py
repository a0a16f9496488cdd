"""Deep spiking neural networks from trained artificial networks, by knowledge distillation.

A trained teacher becomes a spiking student, is taught by an objective, trained and measured.
"""

from spikedistill.data.augment import Augment
from spikedistill.data.events import Recording, read_nmnist, to_frames
from spikedistill.data.images import ImageSet, load_images, split
from spikedistill.errors import (
    ConfigError,
    ConversionError,
    DataError,
    RunError,
    ShapeError,
    SpikeDistillError,
    WeightsError,
)
from spikedistill.evaluate.accuracy import accuracy_by_step, answers
from spikedistill.evaluate.activity import firing_rates, operations
from spikedistill.evaluate.agreement import agreement, divergence
from spikedistill.evaluate.early_exit import EarlyExit, early_exit
from spikedistill.evaluate.immunity import immunity
from spikedistill.neuron.dynamics import IF, LIF, PLIF, Neuron, Reset
from spikedistill.neuron.layer import Spiking
from spikedistill.neuron.surrogate import ATan, Rectangle, Sigmoid, Triangle
from spikedistill.objective.direct import TET, Direct
from spikedistill.objective.kdsnn import KDSNN, KDSNNFeature, KDSNNResponse
from spikedistill.objective.terms import Batch, Objective
from spikedistill.recipes.choices import Method, StudentChoice, TeacherChoice
from spikedistill.recipes.distill import Distill, distill
from spikedistill.recipes.runs import load_student
from spikedistill.recipes.teach import Teach, teach
from spikedistill.student.build import Report, Student, to_spiking
from spikedistill.student.coding import Direct as DirectCoding
from spikedistill.student.coding import Frames, Latency, Rate
from spikedistill.student.fold import fold
from spikedistill.student.winograd import quicken
from spikedistill.teacher.load import Architecture, Teacher, load_teacher
from spikedistill.train.loop import fit
from spikedistill.train.recipe import Data, Training
from spikedistill.train.run import Run

__all__ = [
    "IF",
    "KDSNN",
    "LIF",
    "PLIF",
    "TET",
    "ATan",
    "Architecture",
    "Augment",
    "Batch",
    "ConfigError",
    "ConversionError",
    "Data",
    "DataError",
    "Direct",
    "DirectCoding",
    "Distill",
    "EarlyExit",
    "Frames",
    "ImageSet",
    "KDSNNFeature",
    "KDSNNResponse",
    "Latency",
    "Method",
    "Neuron",
    "Objective",
    "Rate",
    "Recording",
    "Rectangle",
    "Report",
    "Reset",
    "Run",
    "RunError",
    "ShapeError",
    "Sigmoid",
    "SpikeDistillError",
    "Spiking",
    "Student",
    "StudentChoice",
    "Teach",
    "Teacher",
    "TeacherChoice",
    "Training",
    "Triangle",
    "WeightsError",
    "accuracy_by_step",
    "agreement",
    "answers",
    "distill",
    "divergence",
    "early_exit",
    "firing_rates",
    "fit",
    "fold",
    "immunity",
    "load_images",
    "load_student",
    "load_teacher",
    "operations",
    "quicken",
    "read_nmnist",
    "split",
    "teach",
    "to_frames",
    "to_spiking",
]
