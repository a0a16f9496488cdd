import errno
import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from spikedistill import files
from spikedistill.compute.winograd import WinogradConv2d
from spikedistill.errors import RunError, WeightsError
from spikedistill.files import (
    ENVIRONMENT,
    fingerprint,
    fingerprint_of,
    home,
    read_facts,
    read_json,
    read_tensors,
    write_csv,
    write_json,
    write_tensors,
    write_text,
)
from spikedistill.teacher.load import Teacher

TENSORS = {
    "float": torch.randn(2, 3),
    "double": torch.randn(3, dtype=torch.float64),
    "half": torch.randn(4).bfloat16(),
    "count": torch.tensor(7),
    "truth": torch.tensor([True, False]),
    "bytes": torch.arange(5, dtype=torch.uint8),
    "empty": torch.zeros(0, 3),
    "turned": torch.arange(6.0).view(2, 3).T,
    "last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
    "learned": nn.Parameter(torch.ones(2)),
}
FACTS = {"kind": "teacher", "mean": [0.1, 0.2], "accuracy": 91.25, "none": None, "name": "Zürich", "deep": {"a": [1]}}


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def half_written(tensors, part, metadata):
    save_file(tensors, part, metadata=metadata)
    Path(part).write_bytes(Path(part).read_bytes()[:40])
    full()


class TestRoundTrip:
    def test_tensors_of_every_kind_and_facts_come_back(self, tmp_path):
        write_tensors(tmp_path / "a.safetensors", TENSORS, FACTS)
        tensors, facts = read_tensors(tmp_path / "a.safetensors")
        assert facts == FACTS
        assert tensors.keys() == TENSORS.keys()
        for name, tensor in TENSORS.items():
            assert tensors[name].dtype == tensor.dtype
            torch.testing.assert_close(tensors[name], tensor.detach(), rtol=0, atol=0)

    def test_weights_shared_by_two_names_come_back_under_both(self, tmp_path):
        shared = torch.randn(3)
        write_tensors(tmp_path / "a.safetensors", {"one": shared, "two": shared}, {})
        tensors, _ = read_tensors(tmp_path / "a.safetensors")
        torch.testing.assert_close(tensors, {"one": shared, "two": shared})

    def test_other_programs_can_read_the_file(self, tmp_path):
        write_tensors(tmp_path / "a.safetensors", {"one": torch.ones(2)}, FACTS)
        torch.testing.assert_close(load_file(tmp_path / "a.safetensors"), {"one": torch.ones(2)})

    def test_a_file_of_another_program_has_no_facts(self, tmp_path):
        save_file({"one": torch.ones(2)}, tmp_path / "a.safetensors", metadata={"format": "pt"})
        assert read_tensors(tmp_path / "a.safetensors")[1] == {}
        save_file({"one": torch.ones(2)}, tmp_path / "a.safetensors")
        assert read_tensors(tmp_path / "a.safetensors")[1] == {}

    def test_a_text_comes_back_in_utf_8(self, tmp_path):
        write_text(tmp_path / "a.json", json.dumps(FACTS, ensure_ascii=False))
        assert json.loads((tmp_path / "a.json").read_bytes().decode("utf-8")) == FACTS

    def test_missing_directories_are_made(self, tmp_path):
        write_text(tmp_path / "deep" / "down" / "a.txt", "here")
        assert (tmp_path / "deep" / "down" / "a.txt").read_text() == "here"

    def test_what_was_there_is_replaced_and_nothing_else_is_left(self, tmp_path):
        for text in ("old and long", "new"):
            write_text(tmp_path / "a.txt", text)
        assert (tmp_path / "a.txt").read_text() == "new"
        assert os.listdir(tmp_path) == ["a.txt"]


class TestAtomic:
    @pytest.mark.parametrize("step, failure", [("save_file", full), ("save_file", half_written), ("os.replace", full)])
    def test_a_full_disk_leaves_the_old_weights_and_says_what_to_do(self, tmp_path, monkeypatch, step, failure):
        path = tmp_path / "a.safetensors"
        write_tensors(path, {"one": torch.zeros(2)}, {"old": True})
        monkeypatch.setattr(f"spikedistill.files.{step}", failure)
        with pytest.raises(
            RunError, match=r"a\.safetensors' could not be written .*No space left.*free some disk space"
        ):
            write_tensors(path, {"one": torch.ones(2)}, {"old": False})
        tensors, facts = read_tensors(path)
        assert facts == {"old": True}
        torch.testing.assert_close(tensors, {"one": torch.zeros(2)})
        assert os.listdir(tmp_path) == ["a.safetensors"]

    @pytest.mark.parametrize("step", ["os.fsync", "os.replace"])
    def test_a_full_disk_leaves_the_old_text(self, tmp_path, monkeypatch, step):
        write_text(tmp_path / "a.txt", "old")
        monkeypatch.setattr(f"spikedistill.files.{step}", full)
        with pytest.raises(RunError, match="the file that was there before is untouched"):
            write_text(tmp_path / "a.txt", "new")
        assert (tmp_path / "a.txt").read_text() == "old"
        assert os.listdir(tmp_path) == ["a.txt"]

    def test_the_new_file_reaches_the_disk_before_it_takes_the_old_ones_place(self, tmp_path, monkeypatch):
        order = []
        for name in ("fsync", "replace"):
            real = getattr(os, name)
            monkeypatch.setattr(
                files.os, name, lambda *given, name=name, real=real: (order.append(name), real(*given))[1]
            )
        write_text(tmp_path / "a.txt", "new")
        assert order == ["fsync", "replace"]

    def test_facts_that_json_cannot_hold_leave_the_old_file(self, tmp_path):
        write_tensors(tmp_path / "a.safetensors", {"one": torch.zeros(2)}, {"old": True})
        with pytest.raises(TypeError, match="not JSON serializable"):
            write_tensors(tmp_path / "a.safetensors", {"one": torch.ones(2)}, {"path": tmp_path})
        assert read_tensors(tmp_path / "a.safetensors")[1] == {"old": True}

    def test_a_directory_that_is_a_file_is_reported(self, tmp_path):
        (tmp_path / "run").write_text("a file")
        with pytest.raises(RunError, match="could not be written"):
            write_text(tmp_path / "run" / "a.txt", "new")

    def test_a_place_taken_by_a_directory_is_reported_and_nothing_is_left(self, tmp_path):
        (tmp_path / "a.txt").mkdir()
        with pytest.raises(RunError, match="could not be written"):
            write_text(tmp_path / "a.txt", "new")
        assert os.listdir(tmp_path) == ["a.txt"]


class TestFacts:
    def test_are_read_without_the_tensors(self, tmp_path):
        write_tensors(tmp_path / "a.safetensors", TENSORS, FACTS)
        assert read_facts(tmp_path / "a.safetensors") == FACTS

    def test_there_are_none_where_the_file_is_missing_broken_or_another_s(self, tmp_path):
        (tmp_path / "broken.safetensors").write_text("hello world")
        save_file({"one": torch.ones(2)}, tmp_path / "bare.safetensors")
        for name, text in (("json", "{kind: teacher"), ("list", "[1, 2]")):
            save_file({"one": torch.ones(2)}, tmp_path / f"{name}.safetensors", metadata={files.FACTS: text})
        for name in ("absent", "broken", "bare", "json", "list"):
            assert read_facts(tmp_path / f"{name}.safetensors") == {}


class TestRefusals:
    @pytest.mark.parametrize("kept", [0, 5, 60, -1])
    def test_a_truncated_file_is_refused(self, tmp_path, kept):
        path = tmp_path / "a.safetensors"
        write_tensors(path, {"one": torch.ones(20)}, FACTS)
        path.write_bytes(path.read_bytes()[:kept])
        with pytest.raises(WeightsError, match=r"a\.safetensors' cannot be read as safetensors .*truncated"):
            read_tensors(path)

    def test_facts_that_are_not_json_are_refused(self, tmp_path):
        save_file({"one": torch.ones(2)}, tmp_path / "a.safetensors", metadata={files.FACTS: "{kind: teacher"})
        with pytest.raises(WeightsError, match="cannot be read as safetensors"):
            read_tensors(tmp_path / "a.safetensors")

    def test_a_missing_file_is_named(self, tmp_path):
        with pytest.raises(WeightsError, match=r"absent\.safetensors' does not exist: check the path"):
            read_tensors(tmp_path / "absent.safetensors")


def flipped(content):
    """The content with each of its bits flipped, one at a time."""
    for bit in range(8 * len(content)):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        yield bit, bytes(damaged)


def loaded(path, read, contents):
    """Of which of these contents a file is read without an error."""
    taken = []
    for number, content in contents:
        path.write_bytes(content)
        try:
            read(path)
        except (WeightsError, RunError):
            continue
        taken.append(number)
    return taken


class TestDamage:
    @pytest.fixture
    def small(self, tmp_path):
        path = tmp_path / "a.safetensors"
        write_tensors(path, {"checksum": torch.ones(2), "run": torch.ones(1, dtype=torch.uint8)}, {"run": "x"})
        return path

    def test_of_any_bit_of_a_file_of_tensors_is_noticed(self, small):
        content = small.read_bytes()
        assert loaded(small, read_tensors, flipped(content)) == [] and len(content) > 250
        assert loaded(small, read_tensors, [(0, content)]) == [0]

    def test_of_any_bit_of_a_file_of_json_is_noticed(self, tmp_path):
        path = tmp_path / "results.json"
        write_json(path, {"accuracy": 91.25, "lr": 1e-07, "name": "Zürich", "deep": {"run": [1, None, "mine"]}}, "mine")
        content = path.read_bytes()
        assert loaded(path, read_json, flipped(content)) == []
        assert loaded(path, read_json, ((n, content[:n]) for n in range(len(content)))) == []
        assert loaded(path, read_json, [(0, content.replace(b"\n", b"\r\n"))]) == [0]  # as git may write it elsewhere

    @given(data=st.data())
    def test_of_any_other_kind_is_noticed(self, tmp_path_factory, data):
        path = tmp_path_factory.mktemp("damage") / "a.safetensors"
        write_tensors(path, TENSORS, FACTS)
        content = path.read_bytes()
        start = data.draw(st.integers(0, len(content) - 1))
        length = data.draw(st.integers(1, len(content) - start))
        cut, zeros = content[:start] + content[start + length :], bytes(length)
        given = [cut, content + zeros, content[:start] + zeros + content[start:], content[:start]]
        given += [content[:start] + zeros + content[start + length :]]
        given += [content[:start] + data.draw(st.binary(min_size=length, max_size=length)) + content[start + length :]]
        assert loaded(path, read_tensors, enumerate(x for x in given if x != content)) == []

    @pytest.mark.parametrize("kept", ["checksum", "run"])
    def test_that_takes_one_entry_of_the_seal_does_not_make_a_file_of_before(self, small, kept):
        with safe_open(small, framework="pt") as file:
            entries = file.metadata()
        other = ({"checksum", "run"} - {kept}).pop()
        save_file(load_file(small), small, metadata={name: value for name, value in entries.items() if name != other})
        with pytest.raises(
            WeightsError, match=r"a\.safetensors' is damaged .*put a copy of it back, or make it again\."
        ):
            read_tensors(small)

    def test_is_named_with_what_to_do(self, small, tmp_path):
        content = small.read_bytes()
        small.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(
            WeightsError, match=r"a\.safetensors' is damaged \(its SHA-256 is not the checksum written into it"
        ):
            read_tensors(small)
        write_json(tmp_path / "recipe.json", {"lr": 0.1})
        write_text(tmp_path / "recipe.json", (tmp_path / "recipe.json").read_text().replace("0.1", "0.3"))
        with pytest.raises(
            RunError, match=r"recipe\.json' cannot be read \(it was changed after it was written; .*remove"
        ):
            read_json(tmp_path / "recipe.json")


class TestSeal:
    def test_is_the_sha_256_of_the_file_with_its_place_left_blank(self, tmp_path):
        write_tensors(tmp_path / "a.safetensors", TENSORS, FACTS)
        with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
            checksum = file.metadata()["checksum"]
        content = (tmp_path / "a.safetensors").read_bytes()
        blank = content.replace(checksum.encode(), b"0" * 64)
        assert hashlib.sha256(blank).hexdigest() == checksum and content.count(checksum.encode()) == 1

    def test_does_not_show_in_facts_or_values(self, tmp_path):
        write_json(tmp_path / "a.json", FACTS)
        assert read_json(tmp_path / "a.json") == FACTS
        held = json.loads((tmp_path / "a.json").read_text())
        assert {**held, **FACTS} == held and held.keys() - FACTS.keys() == {"run", "checksum"}

    def test_is_missing_in_files_of_before_which_are_read_with_a_note(self, tmp_path, caplog):
        old = {"one": torch.ones(2)}
        save_file(old, tmp_path / "a.safetensors", metadata={files.FACTS: json.dumps(FACTS), "format": "pt"})
        assert read_tensors(tmp_path / "a.safetensors")[1] == FACTS
        (said,) = caplog.messages
        assert re.fullmatch(r"note: '.*a\.safetensors' has no checksum, because an earlier version wrote it: .*", said)
        write_text(tmp_path / "a.json", json.dumps(FACTS))
        assert read_json(tmp_path / "a.json") == FACTS

    def test_is_not_asked_of_files_of_other_programs(self, tmp_path, caplog):
        save_file({"one": torch.ones(2)}, tmp_path / "a.safetensors", metadata={"format": "pt"})
        read_tensors(tmp_path / "a.safetensors")
        assert not caplog.messages


class TestAnotherRun:
    @pytest.fixture
    def homes(self, tmp_path):
        """Two run directories with a model and results each, and a folder that is none."""
        for name in ("one", "two"):
            write_json(tmp_path / name / ENVIRONMENT, {"cores": 2}, run=name)
            write_tensors(tmp_path / name / "model.safetensors", {"w": torch.ones(2)}, {})
            write_json(tmp_path / name / "results.json", {"accuracy": 90.0})
        (tmp_path / "none").mkdir()
        return tmp_path

    @pytest.mark.parametrize("name, read", [("model.safetensors", read_tensors), ("results.json", read_json)])
    def test_s_file_is_refused_and_read_where_no_run_is(self, homes, name, read):
        own = (homes / "two" / name).read_bytes()
        shutil.copy(homes / "one" / name, homes / "two")
        with pytest.raises(
            RunError, match=rf"two/{name}' was written by another run \(one\) .* of the run two: put the"
        ):
            read(homes / "two" / name)
        shutil.copy(homes / "one" / name, homes / "none")
        read(homes / "none" / name)
        (homes / "two" / name).write_bytes(own)
        read(homes / "two" / name)

    def test_s_name_comes_from_a_file_that_is_checked_too(self, homes):
        damaged = (homes / "one" / ENVIRONMENT).read_text().replace("2", "3", 1)
        (homes / "one" / ENVIRONMENT).write_text(damaged)
        with pytest.raises(RunError, match=r"one/environment\.json' cannot be read \(it was changed"):
            read_tensors(homes / "one" / "model.safetensors")

    def test_s_model_and_one_of_no_run_are_told_apart(self, homes):
        write_tensors(homes / "none" / "model.safetensors", {"w": torch.ones(2)}, {})
        shutil.copy(homes / "none" / "model.safetensors", homes / "one")
        with pytest.raises(RunError, match="was written by no run, or by an earlier version, and lies in"):
            read_tensors(homes / "one" / "model.safetensors")


class TestPrevious:
    @pytest.mark.parametrize("links", [True, False])
    def test_file_is_kept_whole(self, tmp_path, monkeypatch, links):
        if not links:
            monkeypatch.setattr(os, "link", full)
        path, before = tmp_path / "c.safetensors", tmp_path / "c.previous.safetensors"
        for number in range(3):
            write_tensors(path, {}, {"number": number}, before)
        assert [read_tensors(file)[1]["number"] for file in (path, before)] == [2, 1]
        assert sorted(os.listdir(tmp_path)) == [before.name, path.name]


class TestWhatOthersWrote:
    def test_is_not_replaced_by_a_table(self, tmp_path):
        path = tmp_path / "a.csv"
        write_csv(path, ("network", "value"), [("x", 1)])
        write_csv(path, ("network", "value", "more"), [("x", 1, 2)])
        assert path.read_text() == "network,value,more\nx,1,2\n"
        for text in ("", "my network,value\n", "%PDF", "value,network\n1,x\n"):
            path.write_text(text)
            with pytest.raises(RunError, match=r"a\.csv' exists and was not written by this command: name another"):
                write_csv(path, ("network", "value"), [])
            assert path.read_text() == text


class TestFingerprint:
    def network(self, slope=0.1):
        torch.manual_seed(3)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.LeakyReLU(slope), nn.Flatten(), nn.Linear(4, 2))

    def teacher(self, mean=(0.5,) * 3, **options):
        return Teacher(self.network(**options), mean, (0.2,) * 3)

    def test_is_the_same_for_the_same_teacher_in_any_order_of_memory(self):
        first = fingerprint_of(self.teacher())
        assert len(first) == 64
        assert first == fingerprint_of(self.teacher().to(memory_format=torch.channels_last))

    def test_changes_with_all_that_the_answer_depends_on(self):
        found = {fingerprint_of(self.teacher())}
        found.add(fingerprint_of(self.teacher(mean=(0.5, 0.5, 0.4))))
        found.add(fingerprint_of(self.teacher(slope=0.2)))
        found.add(fingerprint_of(self.teacher().double()))
        for name in ("network.0.weight", "network.1.running_var", "network.4.bias"):
            teacher = self.teacher()
            value = teacher.state_dict()[name].reshape(-1)
            value[0] = torch.nextafter(value[0], value[0] + 1)
            found.add(fingerprint_of(teacher))
        assert len(found) == 7

    def test_does_not_change_with_how_convolutions_are_computed(self):
        teacher = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU())
        before = fingerprint_of(teacher)
        teacher[0].__class__ = WinogradConv2d
        assert fingerprint_of(teacher) == before

    def test_changes_with_a_buffer_that_no_file_of_weights_holds(self):
        other = self.teacher()
        other.std += 1e-6
        assert "std" not in other.state_dict() and fingerprint_of(other) != fingerprint_of(self.teacher())

    def test_changes_with_the_text_beside_the_tensors(self):
        assert fingerprint({"a": torch.ones(2)}, "one") != fingerprint({"a": torch.ones(2)}, "two")

    def test_tells_names_shapes_and_formats_apart(self):
        one = torch.zeros(4)
        others = [{"b": one}, {"a": one.reshape(2, 2)}, {"a": one.int()}, {"a": one, "b": one}, {}]
        assert len({fingerprint({"a": one}), *map(fingerprint, others)}) == 6


@pytest.mark.parametrize("name", ["~nobody-of-this-name/data", "plain", "a/~/b"])
def test_a_home_that_is_not_known_stays_as_it_is(name):
    assert home(name) == Path(name)


def test_the_home_folder_is_known(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert home("~/data") == tmp_path / "data"
