"""A teacher that cannot teach is found out before it teaches, and one that can is not doubted."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from spikedistill.compute.place import choose_place
from spikedistill.data.images import ImageSet, split
from spikedistill.errors import ConfigError
from spikedistill.evaluate.examine import _at_most, examine_teacher

PLACE = choose_place("cpu", "fp32", convolutions="torch")
CLASSES = 5


class Says(nn.Module):
    """A network that knows the class of an image from its first pixel, and answers what a function makes of it."""

    def __init__(self, answer):
        super().__init__()
        self.answer, self.weight = answer, nn.Parameter(torch.zeros(1))

    def forward(self, images):
        known = (255 * images[:, 0, 0, 0]).round().long() // 20
        return self.answer(known)


def logits(classes, noise=0.0):
    generator = torch.Generator().manual_seed(len(classes))
    return 4 * torch.eye(CLASSES)[classes] - 1 + noise * torch.randn(len(classes), CLASSES, generator=generator)


def make_images(count, pattern=0.0, seed=0):
    """Noise whose first pixel alone tells the class, unless there is a pattern."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    images = 100 + 20 * torch.randn(count, 1, 6, 6, generator=generator)
    images[:, 0, 1] += pattern * labels[:, None]
    images[:, 0, 0, 0] = 20 * labels
    pixels = images.clamp(0, 255).to(torch.uint8)
    names = ("ant", "bee", "cat", "dog", "emu")
    return ImageSet("own", pixels, labels, pixels[:100], labels[:100], names)


IMAGES = make_images(1000)


def examine(answer, images=IMAGES, validation=0.2, **known):
    return examine_teacher(Says(answer), images, validation, PLACE, **known)


def doubts(*args, **known):
    return " | ".join(examine(*args, **known)["doubts"])


def swapped(shift):
    return lambda known: logits((known + shift) % CLASSES)


def sometimes(share, otherwise=1):
    """Right for that share of all images, drawn anew."""

    def answer(known):
        right = torch.rand(len(known), generator=torch.Generator().manual_seed(1)) < share
        wrong = torch.randint(0, CLASSES, known.shape, generator=torch.Generator().manual_seed(2))
        return logits(torch.where(right, known, wrong if otherwise else 0))

    return answer


class TestAGoodTeacher:
    def test_is_measured_on_held_out_images_alone_and_not_doubted(self):
        found = examine(logits)
        assert found == {"accuracy": 100.0, "images": 200, "held_out": True, "doubts": []}
        _, held = split(IMAGES.train_labels, 0.2, seed=0)
        others = IMAGES.train_images.clone()
        others[[number for number in range(1000) if number not in set(held.tolist())], 0, 0, 0] = 0
        spoilt = dataclasses.replace(IMAGES, train_images=others, test_images=IMAGES.test_images * 0)
        assert examine(logits, spoilt)["accuracy"] == 100.0

    def test_is_measured_on_training_images_where_none_are_held_out(self):
        found = examine(logits, validation=0.0)
        assert (found["images"], found["held_out"], found["doubts"]) == (1000, False, [])

    def test_is_measured_on_at_most_1000_images(self):
        assert examine(logits, make_images(6000), 0.5)["images"] == 1000

    @pytest.mark.parametrize("share", [0.5, 0.8, 0.95])
    def test_may_be_far_from_perfect(self, share):
        found = examine(sometimes(share))
        assert found["doubts"] == [] and abs(found["accuracy"] - 100 * (share + (1 - share) / CLASSES)) < 8

    def test_may_answer_logarithms_of_probabilities(self):
        assert examine(lambda known: logits(known).log_softmax(1))["doubts"] == []

    def test_may_be_a_little_worse_than_its_file_says(self):
        assert doubts(sometimes(0.85), stored=90.0) == ""

    def test_may_miss_a_few_where_its_file_says_all(self):
        few = dataclasses.replace(IMAGES, test_images=IMAGES.test_images[:20], test_labels=IMAGES.test_labels[:20])
        assert doubts(sometimes(0.95), few, stored=100.0) == ""

    def test_draws_nothing_of_what_training_draws(self):
        torch.manual_seed(3)
        expected = torch.rand(3)
        torch.manual_seed(3)
        examine(lambda known: logits(known) + 0 * torch.rand(1))
        assert torch.equal(torch.rand(3), expected)

    def test_is_not_doubted_for_chance_once_in_ten(self):
        guesses = [examine(sometimes(0.5), make_images(200, seed=seed), 0.2)["doubts"] for seed in range(10)]
        assert sum(bool(found) for found in guesses) <= 1


class TestABadTeacher:
    @pytest.mark.parametrize(
        "answer", [sometimes(0.0), sometimes(0.0, otherwise=0), lambda known: torch.zeros(len(known), CLASSES)]
    )
    def test_that_guesses_is_found_out(self, answer):
        assert "its accuracy is no better than that of a guess, 20.00 %" in doubts(answer)

    @pytest.mark.parametrize(("hits", "guessed"), [(3, True), (4, False)])
    def test_that_hits_as_often_as_a_guess_may_is_found_out(self, hits, guessed):
        # of five images in five classes a guess hits three or more in 5.8 % of cases, four or more in 0.7 %
        def answer(known):
            return logits((known + (torch.arange(len(known)) >= hits)) % CLASSES)

        assert ("no better than that of a guess" in doubts(answer, make_images(5), 0.0)) == guessed

    def test_that_names_the_most_frequent_class_is_found_out(self):
        rare = dataclasses.replace(IMAGES, train_labels=torch.where(torch.arange(1000) % 5 == 4, 4, 0))
        found = examine(lambda known: logits(known * 0), dataclasses.replace(rare, class_names=tuple("abcde")))
        assert found["accuracy"] == 80.0
        assert any("its accuracy is no better than that of a guess, 80.00 %" in doubt for doubt in found["doubts"])

    @pytest.mark.parametrize("shift", [1, 2, 4])
    def test_of_classes_in_another_order_is_found_out(self, shift):
        said = doubts(swapped(shift))
        assert "with its classes in another order it has 100.00 %" in said
        assert f"'{IMAGES.class_names[-shift % CLASSES]}' at 0" in said

    def test_of_two_classes_that_are_exchanged_is_found_out(self):
        order = torch.tensor([1, 0, 2, 3, 4])
        said = doubts(lambda known: logits(order[known]))
        assert "it has 100.00 %, for instance 'bee' at 0, 'ant' at 1: name" in said

    def test_that_is_poor_is_not_said_to_have_another_order(self):
        assert "order" not in doubts(sometimes(0.1)) + doubts(sometimes(0.0)) + doubts(sometimes(0.3, otherwise=0))

    def test_that_is_worse_than_class_means_is_found_out(self):
        said = doubts(sometimes(0.4), make_images(1000, pattern=40.0))
        assert "with the nearest mean image is better, 1" in said or "is better, 9" in said
        assert "nearest" not in doubts(sometimes(0.9))

    def test_that_is_far_worse_than_its_file_says_is_found_out(self):
        assert "its file reports 90.00 % on its test images" in doubts(sometimes(0.6), stored=90.0)

    @pytest.mark.parametrize("answer", [lambda known: logits(known).sigmoid(), lambda known: logits(known).softmax(1)])
    def test_that_answers_in_probabilities_is_found_out(self, answer):
        assert "as after a sigmoid or softmax: return what comes before" in doubts(answer)

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_that_answers_no_number_is_refused(self, value):
        with pytest.raises(ConfigError, match=r"logits of 200 images of 'own' hold NaN or infinity"):
            examine(lambda known: logits(known).index_fill(1, torch.tensor([2]), value))


def test_the_binomial_law_is_the_sum_over_all_outcomes():
    for share in (0.1, 0.5, 0.93):
        for hits in range(-1, 9):
            expected = sum(math.comb(8, k) * share**k * (1 - share) ** (8 - k) for k in range(hits + 1))
            assert _at_most(hits, 8, share) == pytest.approx(expected, abs=1e-12)
    assert _at_most(3, 8, 0.0) == 1.0 and _at_most(7, 8, 1.0) == 0.0 and _at_most(8, 8, 1.0) == 1.0
