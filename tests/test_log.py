"""The files a run writes of itself, line by line."""

from __future__ import annotations

import io
import json
import math
import re
import sys
from pathlib import Path

import pytest

from megalite.log import JsonLines, RunLog, read_json_lines


def test_numbers_that_json_does_not_know_become_null_wherever_they_are(tmp_path: Path) -> None:
    file = JsonLines(tmp_path / "lines")
    file.append({"loss": math.nan, "shares": [[(math.inf, 1.0)], [(2.0, -math.inf)]]})
    line = (tmp_path / "lines").read_text()
    record = json.loads(line, parse_constant=lambda name: name)
    assert record == {"loss": None, "shares": [[[None, 1.0]], [[2.0, None]]]}


def test_what_is_forgotten_is_cut_off_in_place(tmp_path: Path) -> None:
    """No other file is written, which a full disk would refuse; and a torn line is no line."""
    path = tmp_path / "lines"
    first = JsonLines(path)
    for step in range(1, 6):
        first.append({"step": step})
    whole, file = path.read_bytes(), path.stat().st_ino
    path.write_bytes(whole + b'{"step": 6, "lo')
    again = JsonLines(path)
    again.drop_after(5)
    assert (path.read_bytes(), path.stat().st_ino) == (whole, file)
    again.drop_after(3)
    again.append({"step": 4, "loss": 0.5})
    assert [record["step"] for record in read_json_lines(path)] == [1, 2, 3, 4]
    assert list(tmp_path.iterdir()) == [path]
    again.drop_after(0)
    assert path.read_bytes() == b""


def test_a_line_ends_where_a_line_of_the_file_does(tmp_path: Path) -> None:
    file = JsonLines(tmp_path / "lines")
    file.append({"reason": "a\u2028b\x85c"})
    assert read_json_lines(tmp_path / "lines") == [{"reason": "a\u2028b\x85c"}]


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_on_80_columns_tells_the_step_and_the_time_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"COLUMNS": "80", "TERM": "xterm"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stderr", shown := _Terminal())
    record = {"loss": 4.7537, "val_loss": 4.9983, "grad_norm": 0.35, "tokens_per_s": 126010.0, "mfu": 0.412}
    with RunLog(tmp_path, True, 240_000, 10) as log:
        log.step({"step": 12345, **record})
    last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.getvalue()).strip().splitlines()[-1]
    assert re.search(r"step 12345/240000 +(-:--:--|\d+:\d\d:\d\d) .*loss 4.7537", last), last
