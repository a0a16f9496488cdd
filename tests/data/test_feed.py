import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spikedistill.data.augment import Augment, alternating_flip
from spikedistill.data.feed import (
    Feed,
    Inputs,
    MemoryFeed,
    PairFeed,
    as_frames,
    calibration_inputs,
    epoch_order,
    step_seed,
    training_samples,
)
from spikedistill.data.images import ImageSet, split
from spikedistill.errors import ConfigError, DataError

AUGMENTS = [Augment(), Augment(crop=1, flip=True, cutout=2, noise=0.1), Augment(policy="trivial")]


def make_set(*size, count=48, classes=3, seed=0, name="own"):
    """A set of random bytes, every sample unlike all others."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count + classes, *size), generator=generator, dtype=torch.uint8)
    labels = torch.arange(count + classes) % classes
    names = tuple(map(str, range(classes)))
    return ImageSet(name, pixels[:count], labels[:count], pixels[count:], labels[count:], names)


IMAGES = make_set(3, 6, 5)
FRAMES = make_set(4, 2, 6, 5, seed=1, name="events")


def pair(paired=False, **fields):
    return PairFeed(MemoryFeed(FRAMES, **{"batch_size": 8, **fields}), make_set(3, 9, 7, count=60, seed=2), paired)


def tensors(inputs):
    return {name: value for name, value in vars(inputs).items() if value is not None}


def assert_same(first, second):
    first, second = list(first), list(second)
    assert len(first) == len(second) > 0
    for one, other in zip(first, second):
        assert tensors(one).keys() == tensors(other).keys()
        assert all(torch.equal(value, tensors(other)[name]) for name, value in tensors(one).items())


def differs(first, second):
    """Whether a batch of the first is not the second's."""
    pairs = zip(first, second, strict=True)
    return any(not torch.equal(one.student, other.student) for one, other in pairs)


def united(parts):
    """The rows of several processes as one batch."""
    return {name: torch.cat([tensors(part)[name] for part in parts], rows) for name, rows in rows_of(parts[0]).items()}


def rows_of(inputs):
    """Along which axis a tensor of a batch has its samples."""
    return {name: int(value.ndim == 5) for name, value in tensors(inputs).items()}


def make_feed(kind, batch_size, seed, views):
    """A feed of images with one of the augmentations, of event frames, or of both."""
    fields = {"batch_size": batch_size, "seed": seed, "views": views}
    if isinstance(kind, Augment):
        return MemoryFeed(IMAGES, augment=kind, **fields)
    if kind == "moved":
        return pair(True, augment=Augment(crop=1, flip=True), **fields)
    return MemoryFeed(FRAMES, **fields) if kind == "frames" else pair(kind == "paired", **fields)


kinds = st.sampled_from([*AUGMENTS, "frames", "by class", "paired", "moved"])
choices = st.tuples(kinds, st.sampled_from([4, 8]), st.integers(0, 99), st.integers(0, 3))


class TestEveryFeed:
    """What the loop relies on, of images, of event frames, and of both."""

    @settings(max_examples=15)
    @given(choice=choices, epoch=st.integers(1, 4), data=st.data())
    def test_resumed_in_mid_epoch_it_yields_what_the_uninterrupted_one_yields(self, choice, epoch, data):
        feed = make_feed(*choice)
        done = data.draw(st.integers(0, feed.steps - 1))
        whole = list(feed.batches(epoch))
        assert len(whole) == feed.steps
        torch.manual_seed(done)
        assert_same(replace(feed).batches(epoch, done), whole[done:])

    @settings(max_examples=15)
    @given(choice=choices, epoch=st.integers(1, 4), processes=st.sampled_from([2, 4]))
    def test_of_several_processes_the_rows_together_are_those_of_one(self, choice, epoch, processes):
        feed = make_feed(*choice)
        parts = [list(feed.shared(rank, processes).batches(epoch)) for rank in range(processes)]
        for *shares, whole in zip(*parts, feed.batches(epoch), strict=True):
            assert all(len(share.labels) == len(whole.labels) // processes for share in shares)
            together = united(shares)
            assert all(torch.equal(value, together[name]) for name, value in tensors(whole).items())

    @settings(max_examples=10)
    @given(choice=choices)
    def test_with_views_epochs_come_again_in_turn_and_never_without(self, choice):
        feed = make_feed(*choice)
        seen = {epoch: list(feed.batches(epoch)) for epoch in range(1, 5)}
        for first, second in itertools.combinations(seen, 2):
            again = feed.views > 0 and (second - first) % feed.views == 0
            assert (feed.view(first) == feed.view(second)) == again
            if again:
                assert_same(seen[first], seen[second])
            else:
                assert differs(seen[first], seen[second])

    @settings(max_examples=20)
    @given(choice=choices)
    def test_labels_and_sample_numbers_are_those_of_the_set_and_none_is_held_out(self, choice):
        feed = make_feed(*choice)
        stored = feed.events.images if isinstance(feed, PairFeed) else feed.images
        batches = list(feed.batches(1))
        seen = torch.cat([inputs.samples for inputs in batches])
        assert len(seen.unique()) == len(seen)
        assert torch.equal(torch.cat([inputs.labels for inputs in batches]), stored.train_labels[seen])
        held, labels = feed.held()
        trained, kept = split(stored.train_labels, 0.1, seed=0)
        assert not set(seen.tolist()) & set(kept.tolist()) and set(seen.tolist()) <= set(trained.tolist())
        assert torch.equal(held, stored.train_images[kept]) and torch.equal(labels, stored.train_labels[kept])

    @pytest.mark.parametrize(
        "feed", [MemoryFeed(IMAGES, 8), MemoryFeed(FRAMES, 8), pair()], ids=["images", "frames", "pair"]
    )
    def test_is_a_feed_and_a_value(self, feed):
        assert isinstance(feed, Feed) and feed.shared(0, 1) == feed
        with pytest.raises(AttributeError):
            feed.batch_size = 7


class TestMemoryFeed:
    @given(seed=st.integers(-(2**40), 2**62), epoch=st.integers(1, 50), augment=st.sampled_from(AUGMENTS))
    def test_order_and_augmentation_are_what_seed_epoch_and_step_say(self, seed, epoch, augment):
        """Computed again from the numbers alone."""
        mixed = (seed * 1_000_003 + epoch) % 2**63
        trained = split(IMAGES.train_labels, 0.1, seed=0)[0]
        order = trained[torch.randperm(len(trained), generator=torch.Generator().manual_seed(mixed))]
        for step, inputs in enumerate(MemoryFeed(IMAGES, 16, seed, augment).batches(epoch)):
            samples = order[16 * step :][:16]
            assert torch.equal(inputs.samples, samples)
            drawn = (mixed * 1_000_003 + step) % 2**63
            expected = augment(IMAGES.train_images[samples], drawn, alternating_flip(48, samples, epoch))
            assert torch.equal(inputs.student, expected)

    def test_without_augmentation_pixels_are_bytes_over_255(self):
        for inputs in MemoryFeed(IMAGES, 8).batches(3):
            assert torch.equal(inputs.student, IMAGES.train_images[inputs.samples] / 255)
            assert inputs.teacher is None and inputs.source is None
            assert inputs.shown_to_teacher is inputs.student

    def test_frames_come_out_with_time_in_front_and_their_counts(self):
        for inputs in MemoryFeed(FRAMES, 8).batches(1):
            assert inputs.student.shape == (4, 8, 2, 6, 5) and inputs.student.dtype == torch.float32
            for row, sample in enumerate(inputs.samples):
                assert torch.equal(inputs.student[:, row], FRAMES.train_images[sample].float())

    @given(batch_size=st.integers(1, 43), validation=st.sampled_from([0.0, 0.1, 0.25]))
    def test_a_last_batch_that_is_too_small_is_left_out(self, batch_size, validation):
        trained = {0.0: 48, 0.1: 43, 0.25: 36}[validation]
        if batch_size <= trained:
            feed = MemoryFeed(IMAGES, batch_size, validation=validation)
            assert feed.steps == trained // batch_size == len(list(feed.batches(1)))
            assert len(feed.held()[0]) == 48 - trained

    @pytest.mark.parametrize(
        "stored, size", [(IMAGES, (5, 3, 6, 5)), (FRAMES, (4, 5, 2, 6, 5))], ids=["images", "frames"]
    )
    def test_calibration_is_evenly_spaced_and_not_augmented(self, stored, size):
        augment = Augment() if stored.frames else AUGMENTS[1]
        found = MemoryFeed(stored, 8, augment=augment).calibration(5)
        assert found.shape == size
        rows = found.unbind(1) if stored.frames else (255 * found).unbind(0)
        for row, place in zip(rows, [0, 12, 24, 35, 47], strict=True):
            torch.testing.assert_close(row, stored.train_images[place].float())

    def test_of_few_samples_calibration_takes_all(self):
        torch.testing.assert_close(MemoryFeed(IMAGES, 8).calibration(1000), IMAGES.train_images / 255)

    @pytest.mark.parametrize(
        "changes",
        [
            {"batch_size": 4},
            {"seed": 1},
            {"augment": Augment(crop=1)},
            {"validation": 0.25},
            {"views": 2},
            {"rank": 1, "processes": 2},
            {"processes": 2},
            {"images": replace(IMAGES, name="other")},
            {"images": replace(IMAGES, train_images=IMAGES.train_images ^ 1)},
            {"images": replace(IMAGES, train_labels=IMAGES.train_labels.flip(0))},
        ],
        ids=lambda changes: "+".join(changes),
    )
    @pytest.mark.parametrize("validation", [0.0, 0.1])
    def test_its_fingerprint_changes_with_all_that_batches_depend_on(self, changes, validation):
        feed = MemoryFeed(IMAGES, 8, validation=validation)
        assert replace(feed, **changes).fingerprint() != feed.fingerprint() == replace(feed).fingerprint()

    @pytest.mark.parametrize("stored", [IMAGES, FRAMES], ids=["images", "frames"])
    def test_calibration_never_looks_at_test_images(self, stored):
        spoilt = replace(stored, test_images=stored.test_images ^ 255)
        assert torch.equal(MemoryFeed(stored, 8).calibration(9), MemoryFeed(spoilt, 8).calibration(9))
        assert torch.equal(calibration_inputs(stored, 9), calibration_inputs(spoilt, 9))

    def test_the_digest_of_training_samples_is_that_of_its_fingerprint(self):
        assert MemoryFeed(IMAGES, 8, validation=0.25).fingerprint()["samples"] == training_samples(IMAGES, 0.25)
        assert training_samples(IMAGES, 0.25) != training_samples(IMAGES, 0.1)

    def test_its_fingerprint_does_not_look_at_the_test_part(self):
        other = replace(IMAGES, test_images=IMAGES.test_images ^ 1)
        assert MemoryFeed(other, 8).fingerprint() == MemoryFeed(IMAGES, 8).fingerprint()

    @pytest.mark.parametrize("batch_size", [0, -1, 44, 1000])
    def test_a_batch_that_the_training_part_cannot_fill_is_refused(self, batch_size):
        with pytest.raises(ConfigError, match=rf"batch_size \(={batch_size}\) must be at most the 43 training samples"):
            MemoryFeed(IMAGES, batch_size)

    @pytest.mark.parametrize("batch_size, processes", [(2, 3), (16, 3), (8, 16)])
    def test_a_batch_that_processes_cannot_share_is_refused(self, batch_size, processes):
        with pytest.raises(
            ConfigError, match=rf"\(={batch_size}\) .* multiple of the number of processes, {processes}"
        ):
            MemoryFeed(IMAGES, batch_size).shared(0, processes)

    def test_a_held_out_part_of_everything_is_refused(self):
        with pytest.raises(ConfigError, match=r"validation \(=1\.0\)"):
            MemoryFeed(IMAGES, 8, validation=1.0)


class TestEpochOrder:
    indices = torch.arange(0, 200, 2)

    def test_is_a_permutation_without_the_short_batch(self):
        batches = epoch_order(self.indices, seed=3, epoch=1, batch_size=16)
        seen = torch.cat(batches)
        assert [len(batch) for batch in batches] == [16] * 6
        assert len(seen.unique()) == 96 and set(seen.tolist()) <= set(self.indices.tolist())
        assert seen.tolist() != sorted(seen.tolist())

    def test_leaves_none_out_where_batches_fit(self):
        seen = torch.cat(epoch_order(self.indices, seed=3, epoch=1, batch_size=20))
        assert torch.equal(seen.sort().values, self.indices)

    def test_depends_on_seed_and_epoch_alone(self):
        def order(seed, epoch):
            return torch.cat(epoch_order(self.indices, seed, epoch, 10)).tolist()

        first = order(3, 1)
        torch.manual_seed(99)
        assert order(3, 1) == first
        assert order(3, 2) != first and order(4, 1) != first

    @pytest.mark.parametrize("seed", [20260923, -(10**9), 2**62])
    def test_any_seed_can_be_given(self, seed):
        torch.Generator().manual_seed(step_seed(seed, 7, 11))
        assert len(epoch_order(torch.arange(8), seed, 7, 4)) == 2

    def test_the_seeds_of_steps_never_meet(self):
        seeds = [step_seed(seed, epoch, step) for seed in (0, 1) for epoch in (1, 2, 3) for step in range(500)]
        assert len(set(seeds)) == len(seeds)


class TestPairFeed:
    @pytest.mark.parametrize(
        "ours, theirs, message",
        [
            (("cat", "dog", "cow"), ("dog", "cat", "cow"), "'cat' is 0 and 1, 'dog' is 1 and 0"),
            (("cat", "dog", "cow"), ("cat", "dog", "yak"), "'cow' and 'yak'"),
            (("cat", "dog", "cow"), ("yak", "emu", "ant"), "'cat' and 'yak', 'dog' and 'emu', 'cow' and 'ant'"),
        ],
    )
    def test_classes_of_other_names_or_order_are_refused(self, ours, theirs, message):
        events, images = replace(FRAMES, class_names=ours), replace(IMAGES, class_names=theirs)
        with pytest.raises(DataError, match=f"their classes differ: {message}. Give both the same class_names"):
            PairFeed(MemoryFeed(events, 8), images)

    @pytest.mark.parametrize("theirs", [("Cat", "DOG", "sea_cow"), ("0", "1", "2"), ("cat", "dog", "sea cow")])
    def test_classes_of_the_same_names_or_of_mere_numbers_are_paired(self, theirs):
        events, images = replace(FRAMES, class_names=("cat", "dog", "sea-cow")), replace(IMAGES, class_names=theirs)
        assert PairFeed(MemoryFeed(events, 8), images).steps == 5

    @pytest.mark.parametrize("paired", [False, True])
    def test_image_and_recording_are_of_one_class_at_every_step(self, paired):
        feed = pair(paired)
        known = feed.images.train_images / 255
        for inputs in feed.batches(2):
            for row, label in enumerate(inputs.labels):
                (number,) = (known == inputs.teacher[row]).flatten(1).all(1).nonzero()[:, 0].tolist()
                assert feed.images.train_labels[number] == label
                assert not paired or number == inputs.samples[row]

    @pytest.mark.parametrize(
        "augment", [Augment(crop=2), Augment(flip=True), Augment(crop=2, flip=True, border="mirror")], ids=str
    )
    def test_a_paired_image_moves_and_turns_with_its_recording(self, augment):
        """Recordings are the images themselves, so both must stay equal."""
        shown = IMAGES.train_images.amax(1)
        frames = replace(FRAMES, train_images=shown[:, None, None].expand(-1, 4, 2, -1, -1).contiguous())
        grey = replace(IMAGES, train_images=shown[:, None].expand(-1, 3, -1, -1).contiguous())
        feed = PairFeed(MemoryFeed(frames, 8, augment=augment), grey, paired=True)
        moved = 0
        for epoch in (1, 2, 3):
            for inputs in feed.batches(epoch):
                torch.testing.assert_close(inputs.student[0, :, 0], 255 * inputs.teacher[:, 0])
                moved += int((inputs.teacher[:, 0] != shown[inputs.samples] / 255).flatten(1).any(1).sum())
            for ours, usual in zip(feed.batches(epoch), feed.events.batches(epoch), strict=True):
                assert torch.equal(ours.student, usual.student)
        assert moved > 30

    def test_a_paired_image_of_another_size_is_mirrored_as_its_recording_is(self):
        feed, seen = pair(True, augment=Augment(crop=2, flip=True)), []
        for inputs in feed.batches(1):
            turned = alternating_flip(48, inputs.samples, 1)
            expected = feed.images.train_images[inputs.samples] / 255
            expected[turned] = expected[turned].flip(-1)
            assert torch.equal(inputs.teacher, expected)
            seen.append(turned)
        assert 0 < torch.cat(seen).double().mean() < 1

    def test_an_image_drawn_by_class_is_left_as_it_is(self):
        plain, moved = pair(), pair(augment=Augment(crop=2, flip=True))
        for one, other in zip(plain.batches(1), moved.batches(1), strict=True):
            assert torch.equal(one.teacher, other.teacher) and not torch.equal(one.student, other.student)

    def test_answers_of_a_teacher_that_saw_paired_images_unmoved_are_not_used(self):
        """Before, such a feed had True here, and its images were not moved."""
        assert pair(True, augment=Augment(flip=True)).fingerprint()["paired"] == "moved alike"
        assert pair(True, augment=Augment(crop=1)).fingerprint()["paired"] is True  # another size: not moved
        assert pair(augment=Augment(flip=True)).fingerprint()["paired"] is False

    def test_both_streams_show_the_image_that_the_teacher_sees(self):
        for inputs in pair().batches(1):
            assert inputs.shown_to_teacher is inputs.teacher and inputs.teacher.shape == (8, 3, 9, 7)
            assert inputs.source.shape == inputs.student.shape == (4, 8, 2, 6, 5)
            assert torch.equal(inputs.source, as_frames(inputs.teacher, 4, 6, 5))

    def test_the_recordings_are_those_of_the_events_alone(self):
        for both, alone in zip(pair().batches(1), MemoryFeed(FRAMES, 8).batches(1), strict=True):
            assert torch.equal(both.student, alone.student) and torch.equal(both.samples, alone.samples)

    def test_images_depend_on_seed_epoch_and_step_alone(self):
        def images(seed, epoch):
            torch.manual_seed(epoch)
            return torch.cat([inputs.teacher for inputs in pair(seed=seed).batches(epoch)])

        assert torch.equal(images(3, 1), images(3, 1))
        assert not torch.equal(images(3, 1), images(3, 2)) and not torch.equal(images(3, 1), images(4, 1))

    def test_in_time_every_image_of_a_class_is_drawn(self):
        feed, seen = pair(), set()
        known = feed.images.train_images / 255
        for epoch in range(1, 13):
            for inputs in feed.batches(epoch):
                seen |= set((known[None] == inputs.teacher[:, None]).flatten(2).all(2).nonzero()[:, 1].tolist())
        assert seen == set(range(60))

    def test_the_held_out_part_calibration_and_steps_are_the_events(self):
        feed, events = pair(views=2), MemoryFeed(FRAMES, 8, views=2)
        assert (feed.steps, feed.views, feed.view(5)) == (events.steps, 2, 1)
        assert all(torch.equal(*both) for both in zip(feed.held(), events.held()))
        assert torch.equal(feed.calibration(5), events.calibration(5))

    @pytest.mark.parametrize(
        "changes",
        [
            {"paired": True},
            {"events": MemoryFeed(FRAMES, 8, seed=1)},
            {"events": MemoryFeed(replace(FRAMES, train_labels=FRAMES.train_labels.flip(0)), 8)},
            {"images": replace(pair().images, name="other")},
            {"images": replace(pair().images, train_images=pair().images.train_images ^ 1)},
            {"images": replace(pair().images, train_labels=pair().images.train_labels.flip(0))},
        ],
    )
    def test_its_fingerprint_changes_with_all_that_batches_depend_on(self, changes):
        assert replace(pair(), **changes).fingerprint() != pair().fingerprint() == replace(pair()).fingerprint()

    def test_classes_that_one_set_lacks_are_named(self):
        ours = ("Faces_easy", "sea-horse", "ant", "BACKGROUND_Google")
        theirs = ("Faces", "faces easy", "Sea_Horse", "ant", "bass")
        events = make_set(4, 2, 6, 5, classes=4, name="N-Caltech101")
        images = make_set(3, 6, 5, classes=5, name="Caltech101")
        message = (
            "'N-Caltech101' and 'Caltech101' cannot be paired: expected the same classes, found 4 and 5. Only"
            " 'N-Caltech101' has BACKGROUND_Google. Only 'Caltech101' has Faces, bass. Remove the classes that are not"
            " in both."
        )
        with pytest.raises(DataError) as caught:
            PairFeed(MemoryFeed(replace(events, class_names=ours), 8), replace(images, class_names=theirs))
        assert str(caught.value) == message

    @pytest.mark.parametrize(
        "events, images, message",
        [
            (
                FRAMES,
                make_set(3, 6, 5, classes=4),
                "expected the same classes, found 3 and 4. Only 'own' has 3. Remove",
            ),
            (IMAGES, IMAGES, "expected event frames and images"),
            (FRAMES, FRAMES, "expected event frames and images"),
            (
                FRAMES,
                replace(IMAGES, train_labels=IMAGES.train_labels % 2),
                r"'own' has no image of the classes \[2\] of",
            ),
        ],
    )
    def test_sets_that_do_not_go_together_are_refused(self, events, images, message):
        with pytest.raises(DataError, match=message):
            PairFeed(MemoryFeed(events, 8), images)

    @pytest.mark.parametrize(
        "images", [make_set(3, 6, 5, count=47), replace(IMAGES, train_labels=IMAGES.train_labels.flip(0))]
    )
    def test_sets_that_are_not_paired_are_refused_as_such_alone(self, images):
        with pytest.raises(DataError, match="are not paired sample by sample, their labels differ: leave --paired out"):
            PairFeed(MemoryFeed(FRAMES, 8), images, paired=True)
        assert PairFeed(MemoryFeed(FRAMES, 8), images).steps == 5


class TestSlidingReplacement:
    def feed(self, power, epochs=20, **fields):
        return replace(pair(**fields), replacement=power, epochs=epochs)

    def shares(self, power, epochs=20):
        """The share of replaced samples in each epoch; every sample of the second stream is one of both."""
        found = []
        for epoch in range(1, epochs + 1):
            gone = []
            for inputs in self.feed(power, epochs).batches(epoch):
                images = as_frames(inputs.teacher, 4, 6, 5)
                events, pictures = ((inputs.source == one).flatten(2).all(2).all(0) for one in (inputs.student, images))
                assert (events ^ pictures).all()
                gone.append(events)
            found.append(torch.cat(gone).double().mean())
        return torch.stack(found)

    def test_without_it_no_sample_is_replaced(self):
        assert_same(self.feed(0.0).batches(3), pair().batches(3))

    @pytest.mark.parametrize("power", [1.0, 3.0])
    def test_its_probability_is_a_power_of_progress(self, power):
        epochs = 200
        found = self.shares(power, epochs).view(10, -1).mean(1)
        steps = (torch.arange(epochs * 5).double() / (epochs * 5)) ** power
        torch.testing.assert_close(found, steps.view(10, -1).mean(1), atol=0.06, rtol=0)

    def test_the_teacher_sees_the_image_all_the_same(self):
        for ours, usual in zip(self.feed(1.0).batches(19), pair().batches(19), strict=True):
            assert torch.equal(ours.teacher, usual.teacher) and torch.equal(ours.student, usual.student)

    def test_processes_draw_the_same(self):
        whole = [inputs.source for inputs in self.feed(1.0).batches(11)]
        parts = [[inputs.source for inputs in self.feed(1.0).shared(rank, 2).batches(11)] for rank in (0, 1)]
        for one, *halves in zip(whole, *parts, strict=True):
            assert torch.equal(one, torch.cat(halves, 1))

    def test_a_resumed_epoch_goes_on_with_the_same(self):
        assert_same(self.feed(1.0).batches(11, 2), list(self.feed(1.0).batches(11))[2:])

    @pytest.mark.parametrize("fields", [{"replacement": -1.0}, {"replacement": 1.0, "epochs": 0}])
    def test_a_power_without_progress_is_refused(self, fields):
        with pytest.raises(ConfigError, match=r"replacement .* is a power of the progress"):
            replace(pair(), **fields)


class TestMovedEvents:
    def test_all_frames_of_a_recording_move_alike(self):
        one = torch.zeros(8, 4, 2, 6, 5, dtype=torch.uint8)
        one[..., 3, 2] = torch.arange(1, 9, dtype=torch.uint8)[:, None, None]
        feed = MemoryFeed(replace(FRAMES, train_images=one.repeat(6, 1, 1, 1, 1)), 8, augment=Augment(crop=2))
        places = set()
        for inputs in feed.batches(1):
            for sample in inputs.student.unbind(1):
                (rows, columns) = sample.nonzero()[:, 2:].T
                assert len(sample.nonzero()) == 8 and len(set(rows.tolist())) == len(set(columns.tolist())) == 1
                places.add((int(rows[0]), int(columns[0])))
        assert len(places) > 5 and all(1 <= row <= 5 and 0 <= column <= 4 for row, column in places)

    def test_each_recording_is_mirrored_every_other_epoch(self):
        feed = MemoryFeed(FRAMES, 8, augment=Augment(flip=True))
        seen = [
            {int(n): x for batch in feed.batches(e) for n, x in zip(batch.samples, batch.student.unbind(1))}
            for e in (1, 2)
        ]
        both = seen[0].keys() & seen[1].keys()
        assert len(both) > 20 and all(torch.equal(seen[0][n], seen[1][n].flip(-1)) for n in both)

    @pytest.mark.parametrize(
        "augment", [Augment(cutout=2), Augment(noise=0.1), Augment(policy="trivial"), Augment(zoom=0.5)]
    )
    def test_what_is_for_images_is_refused(self, augment):
        with pytest.raises(ConfigError, match=r"can be moved \(crop\) and mirrored \(flip\)"):
            MemoryFeed(FRAMES, 8, augment=augment)


class TestAsFrames:
    @pytest.mark.parametrize("size", [(9, 7), (4, 4), (1, 1)])
    def test_a_constant_image_is_its_brightest_channel_everywhere(self, size):
        colours = torch.tensor([[0.2, 0.5, 0.3], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
        frames = as_frames(colours[:, :, None, None].expand(3, 3, *size), 5, 6, 4)
        assert frames.shape == (5, 3, 2, 6, 4)
        expected = torch.tensor([0.5, 1.0, 0.0])[None, :, None, None, None].expand(frames.shape)
        torch.testing.assert_close(frames, expected, rtol=0, atol=1e-6)

    @pytest.mark.parametrize("channels", [1, 3])
    def test_an_image_of_the_sensors_size_is_its_brightness_in_both_polarities_at_every_step(self, channels):
        images = torch.rand(3, channels, 6, 4)
        for frame, polarity in itertools.product(as_frames(images, 5, 6, 4), (0, 1)):
            torch.testing.assert_close(frame[:, polarity], images.amax(1))

    def test_by_hand(self):
        """The brightest of red, green and blue, at every step and in both polarities."""
        image = torch.tensor([[[0.1, 0.9], [0.0, 0.3]], [[0.5, 0.2], [0.0, 0.4]], [[0.3, 0.7], [0.0, 0.8]]])
        expected = torch.tensor([[0.5, 0.9], [0.0, 0.8]])
        assert torch.equal(as_frames(image[None], 2, 2, 2), expected.expand(2, 1, 2, 2, 2))

    @given(height=st.integers(1, 12), width=st.integers(1, 12), seed=st.integers(0, 999))
    def test_frames_stay_between_0_and_1(self, height, width, seed):
        images = torch.rand(2, 3, 5, 7, generator=torch.Generator().manual_seed(seed)).round()
        frames = as_frames(images, 2, height, width)
        assert frames.shape == (2, 2, 2, height, width) and frames.min() >= 0 and frames.max() <= 1

    def test_half_the_size_weighs_four_neighbours_along_both_axes(self):
        image, weights = torch.rand(8, 8), torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        found = as_frames(image.expand(1, 3, 8, 8), 1, 4, 4)[0, 0, 0]
        around = image[1:, 1:].unfold(0, 4, 2).unfold(1, 4, 2)
        assert around.shape == (2, 2, 4, 4)
        torch.testing.assert_close(found[1:3, 1:3], torch.einsum("i,j,abij->ab", weights, weights, around))


class TestInputs:
    def test_move_with_images_in_an_order_of_memory_and_frames_as_they_are(self):
        for feed in (MemoryFeed(IMAGES, 8), pair()):
            inputs = next(feed.batches(1))
            moved = inputs.to(torch.device("cpu"), torch.channels_last)
            assert_same([moved], [inputs])
            for image in (moved.student, moved.teacher):
                assert image is None or image.ndim == 5 or image.is_contiguous(memory_format=torch.channels_last)

    def test_sample_numbers_stay_where_they_are(self):
        inputs = Inputs(torch.zeros(2, 3, 4, 4), torch.tensor([0, 1]), torch.tensor([5, 7]))
        moved = inputs.to(torch.device("meta"), torch.channels_last)
        assert moved.student.is_meta and moved.labels.is_meta and torch.equal(moved.samples, inputs.samples)
