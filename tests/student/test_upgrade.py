import json
from pathlib import Path

import pytest

from spikedistill.errors import ConfigError, RunError
from spikedistill.neuron.dynamics import PLIF
from spikedistill.student.conversion import INHERITED_NEURON, SCRATCH_NEURON
from spikedistill.student.upgrade import METHOD_FIELDS, conversion_from, upgrade

EXAMPLE = Path(__file__).parents[2] / "examples" / "resnet20_t4" / "recipe.json"
WHAT = {
    "temperature": 4.0,
    "alpha": 0.9,
    "feature_weight": 2.0,
    "pairs": [["a", "b"]],
    "adapt": None,
    "margin": True,
    "partial": False,
    "label_smoothing": 0.1,
    "lam": 0.5,
}


def old(method="kdsnn"):
    return {
        "kind": "distill",
        "who": {
            "teacher": "t",
            "teacher_network": "n",
            "teacher_width": 4,
            "teacher_mean": [0.1],
            "teacher_std": [0.2],
        },
        "student": {"student": "vgg9", "student_width": 8, "timesteps": 2},
        "what": {"method": method, **WHAT},
        "data": {"data": "digits", "crop": 4},
        "training": {"epochs": 3},
    }


def test_a_distillation_gets_its_new_names():
    new = upgrade(old())
    assert {name: new[name] for name in ("kind", "format", "teacher", "student", "data", "training")} == {
        "kind": "distill",
        "format": 2,
        "teacher": {"source": "t", "network": "n", "width": 4, "mean": [0.1], "std": [0.2]},
        "student": {"network": "vgg9", "width": 8, "timesteps": 2},
        "data": {"name": "digits", "crop": 4},
        "training": {"epochs": 3},
    }
    assert set(new) == {"kind", "format", "teacher", "student", "method", "data", "training"}


@pytest.mark.parametrize(
    "method, fields",
    [
        ("direct", {"label_smoothing": 0.1}),
        ("tet", {"label_smoothing": 0.1, "lam": 0.5, "target": 1.0}),
        ("kdsnn-response", {"temperature": 4.0, "alpha": 0.9, "label_smoothing": 0.1}),
        (
            "kdsnn-feature",
            {
                "pairs": [["a", "b"]],
                "weight": 2.0,
                "adapt": None,
                "margin": True,
                "partial": False,
                "label_smoothing": 0.1,
            },
        ),
        ("conversion-qcfs", {"label_smoothing": 0.1}),
        ("conversion-max", {}),
        ("conversion-percentile", {}),
        ("conversion-least-squares", {}),
    ],
)
def test_a_method_has_its_own_fields_alone(method, fields):
    assert upgrade(old(method))["method"] == {"name": method, **fields}


def test_kdsnn_has_both_and_no_method_is_forgotten():
    both = set(METHOD_FIELDS["kdsnn-response"]) | set(METHOD_FIELDS["kdsnn-feature"])
    assert set(METHOD_FIELDS["kdsnn"]) == both and len(METHOD_FIELDS) == 9


def test_a_second_time_changes_nothing():
    assert upgrade(upgrade(old())) == upgrade(old())


def test_a_recipe_without_kind_is_that_of_a_file_s_header():
    assert upgrade({name: part for name, part in old().items() if name != "kind"}) == upgrade(old())


def test_a_teacher_s_recipe_keeps_the_rest():
    recipe = {"kind": "teach", "network": "vgg9", "width": None, "data": {"data": "mnist"}, "training": {"lr": 0.1}}
    assert upgrade(recipe) == {**recipe, "format": 2, "data": {"name": "mnist"}}


def test_fields_that_very_old_recipes_lack_stay_out():
    recipe = old()
    del recipe["who"]["teacher_width"], recipe["what"]["margin"]
    assert "width" not in upgrade(recipe)["teacher"] and "margin" not in upgrade(recipe)["method"]


@pytest.mark.parametrize(
    "recipe, said",
    [
        ([], "The recipe is '\\[\\]'"),
        ({"kind": "energy"}, "has kind 'energy' and format 1"),
        ({**old(), "format": 3}, "has kind 'distill' and format 3: this version reads"),
        ({**old(), "who": None}, "part 'who' is 'None': expected fields"),
        ({**old(), "data": []}, "part 'data' is"),
    ],
)
def test_what_is_no_recipe_is_refused(recipe, said):
    with pytest.raises(RunError, match=said):
        upgrade(recipe)


def test_a_method_that_is_none_is_refused():
    with pytest.raises(ConfigError, match="no method 'kdsn'"):
        upgrade(old("kdsn"))


class TestConversionFrom:
    def test_the_shipped_recipe(self):
        conversion = conversion_from(upgrade(json.loads(EXAMPLE.read_text()))["student"])
        assert conversion.inherit and conversion.neuron_model.learn_threshold and conversion.timesteps == 4

    def test_what_is_not_said_is_usual(self):
        assert (
            conversion_from({}).neuron == INHERITED_NEURON
            and conversion_from({"network": "vgg9"}).neuron == SCRATCH_NEURON
        )
        assert conversion_from({"neuron": "plif"}).neuron_model.learn_leak == PLIF.learn_leak

    @pytest.mark.parametrize("field, value", [("timesteps", "x"), ("neuron", 3), ("leak", []), ("coding", {})])
    def test_values_of_another_kind_are_refused(self, field, value):
        with pytest.raises(Exception) as caught:
            conversion_from({"network": "same", "neuron": "lif", field: value})
        assert isinstance(caught.value, ConfigError) or "jaxtyping" in str(type(caught.value))
