import inspect
import re

import pytest

from spikedistill import errors
from spikedistill.errors import SpikeDistillError, unknown

CLASSES = {
    name: kind
    for name, kind in vars(errors).items()
    if inspect.isclass(kind) and issubclass(kind, Exception) and kind.__module__ == errors.__name__
    if kind is not errors.Heard  # a mark on an error, never raised itself
}


def drawn():
    """The drawing in the docstring as (depth, name, meaning) of each line, from its branches."""
    lines = re.findall(r"^((?: [ │├└]?(?: {2}|──) ?)*)(\w+Error)(?: +(\S.*))?$", errors.__doc__, re.MULTILINE)
    return [(len(branch) // 4, name, meaning) for branch, name, meaning in lines]


def test_the_tree_of_the_docstring_is_the_tree_of_the_classes():
    above, tree = {}, {}
    for depth, name, _ in drawn():
        above[depth] = name
        tree[name] = above[depth - 1] if depth else "Exception"
    assert tree == {name: kind.__base__.__name__ for name, kind in CLASSES.items()}


def test_the_tree_says_of_each_class_what_its_own_docstring_says():
    for depth, name, meaning in drawn():
        if depth:
            assert CLASSES[name].__doc__.lower() == f"{meaning.lower()}."


@pytest.mark.parametrize("name", CLASSES)
def test_every_error_is_caught_as_the_one_kind_and_keeps_its_message(name):
    with pytest.raises(SpikeDistillError, match="what happened"):
        raise CLASSES[name]("what happened")


class TestUnknown:
    def test_names_what_was_asked_the_nearest_and_all_known_in_order(self):
        message = unknown("neuron", "iff", {"lif": 1, "if": 2})
        assert message == "There is no neuron 'iff'. Did you mean 'if'? Known: if, lif."

    def test_offers_nothing_where_nothing_is_near(self):
        assert unknown("neuron", "xyz", ["lif", "if"]) == "There is no neuron 'xyz'. Known: if, lif."

    def test_takes_what_is_not_a_name(self):
        assert unknown("neuron", 7, iter(["if"])) == "There is no neuron '7'. Known: if."
