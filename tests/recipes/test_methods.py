import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from spikedistill.errors import ConfigError
from spikedistill.objective.direct import TET, Direct
from spikedistill.objective.kdsnn import KDSNN
from spikedistill.objective.schedule import Ramp
from spikedistill.objective.terms import Objective, Sum
from spikedistill.recipes.methods import CONVERSIONS, METHODS, find_method, name_of, source_of, written

OWN = """
from dataclasses import dataclass
from spikedistill import Objective

@dataclass(frozen=True)
class Own(Objective):
    strength: float = 0.5

    def __call__(self, batch, modules):
        return {"size": self.strength * batch.student.logits.square().mean()}

@dataclass(frozen=True)
class Silent(Objective):
    strength: float = 0.5

@dataclass
class Changing(Objective):
    strength: float = 0.5

class Bare(Objective):
    pass

@dataclass(frozen=True)
class Other:
    strength: float = 0.5

def function():
    pass
"""


@pytest.fixture
def file(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    return tmp_path / "own.py"


class TestByName:
    @pytest.mark.parametrize("name", METHODS)
    def test_every_method_is_a_frozen_objective_with_defaults_that_knows_its_name(self, name):
        kind = find_method(name)
        assert issubclass(kind, Objective) and name_of(kind()) == name
        with pytest.raises(dataclasses.FrozenInstanceError):
            kind().label_smoothing = 0.5

    def test_an_unknown_one_is_refused_with_what_was_probably_meant(self):
        with pytest.raises(ConfigError, match=r"'kdsn'. Did you mean 'kdsnn'.*FILE\.py:CLASS"):
            find_method("kdsn")

    @pytest.mark.parametrize("name", CONVERSIONS)
    def test_a_conversion_is_no_objective(self, name):
        with pytest.raises(ConfigError, match=rf"'{name}'"):
            find_method(name)


class TestOfAFile:
    def test_is_its_class(self, file):
        kind = find_method(f"{file}:Own")
        assert (kind.__name__, kind().strength) == ("Own", 0.5)
        assert name_of(kind()) == "own.py:Own" and source_of(kind()) == file

    @pytest.mark.parametrize("name", ["Other", "Bare", "Changing", "function"])
    def test_what_is_no_objective_is_refused(self, name, file):
        with pytest.raises(ConfigError, match=rf"own\.py:{name}' is not an objective: expected .*frozen=True"):
            find_method(f"{file}:{name}")

    def test_a_class_that_says_no_terms_is_refused(self, file):
        with pytest.raises(ConfigError, match=r"own\.py:Silent' lacks __call__\(self, batch, modules\)"):
            find_method(f"{file}:Silent")

    def test_a_missing_class_or_file_is_refused(self, file):
        with pytest.raises(ConfigError, match=r"'Onw'. Did you mean 'Own'"):
            find_method(f"{file}:Onw")
        with pytest.raises(ConfigError, match=r"none\.py' .* does not exist"):
            find_method(f"{file.parent / 'none.py'}:Own")

    def test_is_written_with_its_file_and_hash(self, file):
        facts = written(find_method(f"{file}:Own")(strength=2.0))
        expected = hashlib.sha256(file.read_bytes()).hexdigest()
        assert facts == {"name": "own.py:Own", "sha256": expected, "strength": 2.0}


class TestWritten:
    def test_is_the_name_and_every_field(self):
        assert written(TET(lam=0.05)) == {"name": "tet", "label_smoothing": 0.0, "lam": 0.05, "target": 1.0}

    def test_survives_json(self):
        facts = written(KDSNN(pairs=(("a", "b"),)))
        assert json.loads(json.dumps(facts)) == facts and facts["pairs"] == [["a", "b"]]

    def test_of_a_sum_holds_its_parts_and_schedules(self):
        facts = written(Sum(((0.5, Direct()), (Ramp(power=3.0), TET()))))
        assert facts["name"] == "Sum"
        (half, direct), (ramp, tet) = facts["parts"]
        assert (half, direct["name"], tet["name"]) == (0.5, "direct", "tet")
        assert ramp == {"name": "Ramp", "start": 0.0, "end": 1.0, "power": 3.0}

    def test_of_a_class_in_a_program_names_its_file(self):
        @dataclass(frozen=True)
        class Mine(Objective):
            pass

        digest = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
        assert written(Mine())["name"].endswith("Mine") and written(Mine())["sha256"] == digest
