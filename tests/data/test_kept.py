"""Frames that are kept on disk are those that would be read, and never those of other files."""

import numpy as np
import pytest
import torch

from spikedistill.data import kept, recordings
from spikedistill.data.images import load_recordings
from spikedistill.data.recordings import Recordings


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
