"""FrameCoding and pixels that are kept on disk are those that would be read, and never those of other files."""

import itertools
import os
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from spikedistill.data import feed as feed_module
from spikedistill.data import images as images_module
from spikedistill.data import kept, pictures, recordings
from spikedistill.data.feed import MemoryFeed, training_samples
from spikedistill.data.images import load_images, load_recordings
from spikedistill.data.recordings import Recordings
from spikedistill.errors import ConfigError, DataError


def write(file, seed, side=34):
    random = np.random.default_rng(seed)
    file.parent.mkdir(parents=True, exist_ok=True)
    arrays = {"t": np.sort(random.integers(0, 1000, 50)), "p": random.integers(0, 2, 50)}
    np.savez(file, x=random.integers(0, side, 50), y=random.integers(0, side, 50), **arrays)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(kept, "MANY", 12)
    for number in range(12):
        write(tmp_path / "events" / ("train", "train", "test")[number % 3] / "ab"[number % 2] / f"{number}.npz", number)
    return tmp_path / "events"


def load(folder, frames=3):
    return load_recordings(str(folder), Recordings(frames))


def equal(one, other):
    pairs = [(getattr(one, name), getattr(other, name)) for name in kept.ARRAYS]
    return all(torch.equal(*pair) for pair in pairs) and one.class_names == other.class_names


@pytest.fixture
def calls(monkeypatch):
    """The files that were read."""
    done = []
    reader = recordings.read_recording
    monkeypatch.setattr(recordings, "read_recording", lambda file: done.append(file) or reader(file))
    return done


def test_the_second_time_nothing_is_read(folder, calls, caplog):
    first = load(folder)
    assert len(calls) == 12 and "which may be deleted" in caplog.text
    second = load(folder)
    assert len(calls) == 12 and equal(first, second)
    assert second.notes == first.notes


@pytest.mark.parametrize("change", ["content", "another", "fewer", "frames"])
def test_other_files_and_other_frames_are_read_anew(folder, calls, change):
    first = load(folder)
    before, file = len(calls), folder / "train" / "a" / "0.npz"
    if change == "content":
        write(file, 99)
    elif change == "another":
        write(file.with_name("99.npz"), 99)
    elif change == "fewer":
        file.unlink()
        write(folder / "train" / "b" / "100.npz", 100)
    other = load(folder, 4 if change == "frames" else 3)
    assert len(calls) > before and not (other.frames == first.frames and equal(first, other))


@pytest.mark.parametrize("damage", ["cut", "flipped", "facts", "gone"])
def test_damage_is_noticed_and_mended(folder, calls, damage, caplog):
    first = load(folder)
    (place,) = (folder.parent / "cache" / "spikedistill").iterdir()
    file = place / ("facts.json" if damage == "facts" else "train_images.npy")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    changed = {"cut": content[:-7], "flipped": content, "facts": b"{}", "gone": b""}[damage]
    file.unlink() if damage == "gone" else file.write_bytes(changed)
    assert equal(load(folder), first) and len(calls) == 24
    assert "are damaged" in caplog.text
    assert equal(load(folder), first) and len(calls) == 24


def test_where_nothing_can_be_kept_it_is_said_and_read(folder, calls, monkeypatch, caplog):
    (folder.parent / "cache").write_text("a file")
    assert len(load(folder).train_images) == 8 and "could not be kept" in caplog.text
    assert len(load(folder).train_images) == 8 and len(calls) == 24


def test_few_recordings_are_not_kept(folder, monkeypatch):
    monkeypatch.setattr(kept, "MANY", 13)
    load(folder)
    assert not (folder.parent / "cache").exists()


def test_recordings_in_parts_are_those_read_at_once_and_a_later_one_may_need_a_larger_sensor(tmp_path, monkeypatch):
    for number in range(7):
        write(tmp_path / "events" / "ab"[number % 2] / f"{number}.npz", number, side=34 if number < 6 else 100)
    whole = load(tmp_path / "events")
    monkeypatch.setattr(recordings, "AT_ONCE", 2)
    parts = load(tmp_path / "events")
    assert whole.train_images.shape[-2:] == (100, 120) and equal(whole, parts)
    assert int(whole.train_images.sum() + whole.test_images.sum()) == 7 * 50


def test_files_behind_a_link_count_too(folder, tmp_path, calls):
    (folder / "train" / "a").rename(tmp_path / "elsewhere")
    (folder / "train" / "a").symlink_to(tmp_path / "elsewhere")
    before = load(folder)
    write(sorted((tmp_path / "elsewhere").iterdir())[0], seed=99)
    assert not equal(load(folder), before)


def test_an_empty_file_is_made_again(folder, tmp_path):
    before = load(folder)
    for file in (tmp_path / "cache").rglob("train_images.npy"):
        file.write_bytes(b"")
    assert equal(load(folder), before)


def test_a_name_that_is_no_utf8_is_read(folder):
    name = os.fsdecode(b"caf\xe9.npz")
    write(folder / "train" / "a" / name, seed=50)
    assert len(load(folder).train_images) == 9
    assert len(load(folder).train_images) == 9


class TestPixels:
    """Images of more bytes than ``LARGEST`` stay on disk; everything else is as for those in memory."""

    @pytest.fixture
    def photos(self, tmp_path, monkeypatch):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.setattr(kept, "BLOCK", 4)
        random = np.random.default_rng(0)
        for part, name, number in itertools.product(("train", "test"), ("cat", "dog"), range(7)):
            file = tmp_path / "photos" / part / name / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            height, width, colours = *random.integers(4, 9, 2), 3 + number % 2
            pixels = random.integers(0, 256, (height, width, colours), dtype=np.uint8)
            Image.fromarray(pixels).save(file)
        return tmp_path / "photos"

    def load(self, photos, monkeypatch, largest=0):
        with monkeypatch.context() as patch:
            patch.setattr(pictures, "LARGEST", largest)
            return load_images(str(photos), image_size=5)

    @pytest.fixture
    def opened(self, monkeypatch):
        """The files that were read."""
        done = []
        read = pictures._read_image

        def watched(file, size, tally):
            done.append(file)
            return read(file, size, tally)

        monkeypatch.setattr(pictures, "_read_image", watched)
        return done

    def test_they_are_those_in_memory(self, photos, monkeypatch, opened):
        expected = self.load(photos, monkeypatch, largest=10**9)
        assert not (photos.parent / "cache").exists()
        for _ in range(2):
            opened.clear()
            found = self.load(photos, monkeypatch)
            assert equal(found, expected)
            assert found.notes == expected.notes
            assert "transparent" in found.notes[0]
        assert len(opened) == 2  # one of each part, for its shape
        assert training_samples(found, 0.1) == training_samples(expected, 0.1)
        assert found.statistics() == expected.statistics()

    def test_an_interrupted_reading_goes_on(self, photos, monkeypatch, opened):
        expected = self.load(photos, monkeypatch, largest=10**9)
        bad = photos / "train" / "dog" / "4.png"  # in the third block
        whole = bad.read_bytes()
        state = bad.stat()
        bad.write_bytes(whole[:40] + bytes(len(whole) - 40))
        os.utime(bad, ns=(state.st_atime_ns, state.st_mtime_ns))
        with pytest.raises(DataError, match=r"dog/4\.png' cannot be read"):
            self.load(photos, monkeypatch)
        bad.write_bytes(whole)
        os.utime(bad, ns=(state.st_atime_ns, state.st_mtime_ns))
        opened.clear()
        assert equal(self.load(photos, monkeypatch), expected)
        assert not {photos / "train" / "cat" / f"{number}.png" for number in range(1, 7)} & set(opened)

    def test_a_cut_file_is_completed(self, photos, monkeypatch):
        expected = self.load(photos, monkeypatch)
        images = expected.train_images.clone()
        for file in (photos.parent / "cache").rglob("pixels.bin"):
            os.truncate(file, 5 * 75 + 3)
        assert torch.equal(self.load(photos, monkeypatch).train_images, images)

    @pytest.mark.parametrize(
        "text",
        [
            "[1",
            "[]",
            '{"images": "many"}',
            '{"images": -1, "tally": {}}',
            '{"images": 3}',
            '{"images": 3, "tally": []}',
        ],
    )
    def test_lost_facts_mean_reading_anew(self, photos, monkeypatch, text):
        images = self.load(photos, monkeypatch).train_images.clone()
        for file in (photos.parent / "cache").rglob("facts.json"):
            file.write_text(text)
        assert torch.equal(self.load(photos, monkeypatch).train_images, images)

    def test_a_changed_image_is_seen(self, photos, monkeypatch):
        before = self.load(photos, monkeypatch).train_images.clone()
        Image.new("RGB", (6, 6), (1, 2, 3)).save(photos / "train" / "cat" / "3.png")
        after = self.load(photos, monkeypatch).train_images
        assert [index for index in range(14) if not torch.equal(before[index], after[index])] == [3]

    def test_a_disk_that_is_too_small_is_named(self, photos, monkeypatch):
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
        with pytest.raises(DataError, match=r"photos.* kept in .*cache.* GiB are needed, 0.0 are free.*XDG_CACHE_HOME"):
            self.load(photos, monkeypatch)

    def test_a_place_that_cannot_be_written_to_is_named(self, photos, tmp_path, monkeypatch):
        (tmp_path / "cache").write_text("a file")
        with pytest.raises(DataError, match=r"photos.* kept in .*cache.* set XDG_CACHE_HOME"):
            self.load(photos, monkeypatch)

    def test_long_reading_says_how_far_it_is(self, photos, monkeypatch, caplog):
        monkeypatch.setattr(kept, "MINUTE", 1e-9)
        self.load(photos, monkeypatch)
        assert re.search(r"read 4 of 14 images, \d+ min left", caplog.text)

    def test_they_are_trained_on(self, photos, monkeypatch):
        found = self.load(photos, monkeypatch)
        memory = self.load(photos, monkeypatch, largest=10**9)
        batches = [list(MemoryFeed(one, 3, validation=0.2).batches(1)) for one in (found, memory)]
        assert all(torch.equal(one.student, other.student) for one, other in zip(*batches, strict=True))

    def test_no_test_part_is_drawn_from_them(self, photos, monkeypatch):
        monkeypatch.setattr(images_module, "LARGEST", 0)
        shutil.rmtree(photos / "test")
        for child in (photos / "train").iterdir():
            child.rename(photos / child.name)
        (photos / "train").rmdir()
        with pytest.raises(DataError, match=r"no test part.*train/CLASS/ and test/CLASS/"):
            self.load(photos, monkeypatch)

    def test_more_held_out_than_memory_should_hold_is_refused(self, photos, monkeypatch):
        found = self.load(photos, monkeypatch)
        monkeypatch.setattr(feed_module, "HELD", 2 * 75)
        with pytest.raises(ConfigError, match=r"validation \(=0\.5\) holds out 7 samples .* at most 0\.14"):
            MemoryFeed(found, 3, validation=0.5)
