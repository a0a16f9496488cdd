import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from spikedistill import files
from spikedistill.errors import RunError, WeightsError
from spikedistill.files import fingerprint, fingerprint_of, read_facts, read_tensors, write_tensors, write_text
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
        with pytest.raises(RunError, match="what was there before is untouched"):
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
