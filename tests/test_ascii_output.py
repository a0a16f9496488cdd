"""Output in encodings that lack characters: nothing ends in a traceback."""

import io
import sys

import pytest

from spikedistill.cli.ascii_output import write_plainly

TEXT = "99.44 ± 0.48 %, 5.97 µJ │━╭ † 漢"


@pytest.mark.parametrize(
    "encoding, shown",
    [
        ("ascii", "99.44 +/- 0.48 %, 5.97 uJ |-+ * ?"),
        ("cp1252", "99.44 ± 0.48 %, 5.97 µJ |-+ † ?"),
        ("utf-8", TEXT),
    ],
)
def test_what_an_encoding_lacks_is_written_in_other_characters(monkeypatch, encoding, shown):
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding=encoding) for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    write_plainly()
    for stream in streams.values():
        stream.write(TEXT)
        stream.flush()
        assert stream.buffer.getvalue().decode(encoding) == shown


def test_a_stream_that_is_none_of_files_is_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    write_plainly()
    sys.stdout.write(TEXT)
    assert sys.stdout.getvalue() == TEXT


def test_a_stream_that_the_shell_closed_takes_what_is_written_and_keeps_nothing(monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    write_plainly()
    for stream in (sys.stdout, sys.stderr):
        assert stream.write(TEXT) == len(TEXT) and not stream.isatty()
        stream.close()
