import dataclasses
import json
import re
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spikedistill.errors import ConfigError
from spikedistill.neuron.dynamics import IF, LIF, NEURONS, PLIF, Neuron, Reset
from spikedistill.neuron.surrogate import SURROGATES, ATan, Triangle
from spikedistill.recipes.choices import StudentChoice
from spikedistill.student.coding import CODINGS, DirectCoding, FrameCoding, LatencyCoding, RateCoding
from spikedistill.student.conversion import INHERITED_NEURON, SCRATCH_NEURON, Conversion, Correct, neuron_from

positive = st.floats(1e-3, 1e3)
surrogates = st.one_of(st.builds(kind, positive) for kind in SURROGATES.values())
codings = st.one_of(
    st.sampled_from([DirectCoding(), FrameCoding(), LatencyCoding()]),
    st.builds(RateCoding, st.none() | st.integers(0, 2**40)),
)


@st.composite
def neurons(draw):
    leak = draw(st.floats(0.01, 1.0))
    forgets = leak < 1
    return Neuron(
        leak=leak,
        learn_leak=forgets and draw(st.booleans()),
        decay_input=forgets and draw(st.booleans()),
        reset=draw(st.sampled_from(Reset)),
        detach_reset=draw(st.booleans()),
        threshold=draw(positive),
        learn_threshold=draw(st.booleans()),
        initial=draw(st.floats(0, 0.99)),
        learn_initial=draw(st.booleans()),
        surrogate=draw(surrogates),
    )


@st.composite
def conversions(draw):
    inherit = draw(st.booleans())
    return Conversion(
        timesteps=draw(st.integers(1, 1000)),
        neuron=draw(st.none() | neurons()),
        inherit=inherit,
        rule=draw(st.sampled_from(["least-squares", "max", "percentile"])),
        percentile=draw(st.floats(0, 100)),
        per_channel=draw(st.booleans()),
        correct=draw(st.sampled_from(get_args(Correct))) if inherit else "nothing",
        max_pool=draw(st.sampled_from(["cumulative", "or", "average"])),
        coding=draw(codings),
    )


@settings(max_examples=100)
@given(conversions())
def test_facts_are_json_and_come_back(conversion):
    facts = json.loads(json.dumps(conversion.facts()))
    assert Conversion.from_facts(facts) == conversion.settled()
    assert facts == conversion.settled().facts()


def test_every_name_is_offered():
    assert set(CODINGS) == {"direct", "frames", "latency", "rate"}
    for kind in CODINGS.values():
        assert Conversion.from_facts(Conversion(coding=kind()).facts()).coding == kind()


@pytest.mark.parametrize("inherit, usual", [(True, INHERITED_NEURON), (False, SCRATCH_NEURON)])
def test_settled_closes_the_neuron(inherit, usual):
    assert Conversion(inherit=inherit).settled().neuron == usual
    assert Conversion(inherit=inherit, neuron=LIF).settled().neuron == LIF
    assert Conversion(inherit=inherit).settled().settled() == Conversion(inherit=inherit).settled()


FAULTS = [
    ({"timesteps": 0}, "timesteps (=0) must be 1 or more"),
    ({"percentile": 100.5}, "percentile (=100.5) must be between 0 and 100"),
    ({"percentile": float("nan")}, "percentile (=nan)"),
    ({"inherit": False, "correct": "biases"}, "correct (='biases') needs inherited weights"),
]


@pytest.mark.parametrize("fields, said", FAULTS, ids=lambda value: value if isinstance(value, str) else "")
def test_what_cannot_work_is_refused_at_once(fields, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        Conversion(**fields)


HOSTILE = [
    (None, "Conversion is written as None: expected the fields timesteps, neuron"),
    ([], "Conversion is written as []"),
    ({"timesteps": "4"}, "Conversion: timesteps (='4') has the wrong type: expected"),
    ({"timesteps": True}, "timesteps (='True') has the wrong type"),
    ({"timesteps": -1}, "timesteps (=-1) must be 1 or more"),
    (
        {"rule": "maximum"},
        "Conversion: rule (='maximum') has the wrong type: expected Literal['least-squares', 'max', 'percentile']",
    ),
    ({"rule": ["max"]}, "rule (=\"['max']\") has the wrong type"),
    ({"percentile": 10**400}, "percentile (="),
    ({"neuron": {"leak": 1.0}}, "Neuron is written as ['leak']: expected the fields leak, learn_leak"),
    ({"coding": "direct"}, "'direct' is none of direct, frames, latency, rate"),
    ({"coding": {"name": ["direct"]}}, "is none of direct"),
    ({"coding": {"name": "rate", "seed": 0.5}}, "RateCoding: seed (='0.5') has the wrong type"),
    ({"coding": {"name": "direct", "seed": 1}}, "DirectCoding is written as ['seed']: expected the fields none"),
    ({"more": 1}, "Conversion is written as"),
]


@pytest.mark.parametrize("change, said", HOSTILE)
def test_facts_of_another_kind_are_refused(change, said):
    facts = {**Conversion().facts(), **change} if isinstance(change, dict) else change
    with pytest.raises(ConfigError, match=re.escape(said)):
        Conversion.from_facts(facts)


def test_facts_that_lack_a_field_are_refused():
    for name in Conversion().facts():
        facts = {key: value for key, value in Conversion().facts().items() if key != name}
        with pytest.raises(ConfigError, match="The file is damaged or was written by another version"):
            Conversion.from_facts(facts)


@pytest.mark.parametrize(
    "change",
    [{"reset": "none"}, {"surrogate": {"name": "step"}}, {"leak": "1"}, {"leak": 0.0}, {"learn_leak": 1}],
    ids=str,
)
def test_a_neuron_of_another_kind_is_refused(change):
    facts = Conversion().facts()
    with pytest.raises(ConfigError):
        Conversion.from_facts({**facts, "neuron": {**facts["neuron"], **change}})


@dataclasses.dataclass(frozen=True)
class Own:
    def gradient(self, u):
        return u * 0

    def encode(self, images, timesteps):
        return images, timesteps

    def frame(self, images, t, timesteps):
        return images


@pytest.mark.parametrize(
    "fields", [{"neuron": Neuron(surrogate=Own())}, {"coding": Own()}], ids=["surrogate", "coding"]
)
def test_a_class_of_the_user_s_own_works_but_is_not_written(fields):
    with pytest.raises(ConfigError, match="Own is not part of this package and cannot be written to a file: use one"):
        Conversion(**fields).facts()


class TestNeuronFrom:
    def test_names_the_usual_ones(self):
        assert neuron_from("if", fresh=False) == INHERITED_NEURON and neuron_from("if", fresh=True) == SCRATCH_NEURON
        rounding = dataclasses.replace(PLIF, initial=0.5, surrogate=Triangle(), detach_reset=True)
        assert neuron_from("plif", fresh=True) == rounding
        assert not neuron_from("if", fresh=True, gradient="rate").detach_reset
        assert neuron_from(
            "lif", fresh=False, leak=0.25, reset="zero", surrogate="atan", initial=0.0
        ) == dataclasses.replace(LIF, leak=0.25, reset=Reset.ZERO, surrogate=ATan())
        assert set(NEURONS) == {"if", "lif", "plif"} and IF.threshold == 1.0

    def test_is_what_recipes_choose(self):
        choice = StudentChoice(neuron="lif", leak=0.3, threshold=2.0, inherit=False, learn_threshold=True)
        assert choice.make_neuron() == neuron_from("lif", fresh=True, leak=0.3, threshold=2.0, learn_threshold=True)

    @pytest.mark.parametrize(
        "fields", [{"name": "rif"}, {"name": "if", "reset": "no"}, {"name": "if", "surrogate": "x"}]
    )
    def test_refuses_other_names(self, fields):
        with pytest.raises(ConfigError, match="There is no"):
            neuron_from(**fields, fresh=False)
