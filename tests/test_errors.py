"""How an error says what would be right."""

from __future__ import annotations

import pytest

from megalite.errors import first_line, nearest

MANY = [f"column_{number}" for number in range(13)]


@pytest.mark.parametrize(
    ("name", "known", "told"),
    [
        ("trian", ["train", "valid"], "did you mean 'train'?"),
        ("colunm_7", MANY, "did you mean 'column_7'?"),
        ("text", ["score", "body"], "there are body, score"),
        ("text", MANY[:12], f"there are {', '.join(sorted(MANY[:12]))}"),
        ("text", [], "there are none"),
    ],
)
def test_what_was_meant_or_what_there_is(name: str, known: list[str], told: str) -> None:
    assert nearest(name, known) == told


def test_of_many_names_some_of_the_nearest_are_told() -> None:
    told = nearest("llama", [*MANY, "all_names", "lines_max"])
    assert told.startswith("there are 15, such as all_names, ")
    assert len(told.removeprefix("there are 15, such as ").split(", ")) == 5


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("Connection closed by peer", "Connection closed by peer"),
        ("", "RuntimeError"),
        (
            "NCCL error in: NCCLUtils.cpp:93, invalid usage, NCCL version 2.28.9\n"
            "ncclInvalidUsage: This usually reflects invalid usage of NCCL library.\n"
            "Last error:\nDuplicate GPU detected : rank 1 and rank 0 both on CUDA device ac000\n"
            "Exception raised from getNCCLComm",
            "NCCL error in: NCCLUtils.cpp:93, invalid usage, NCCL version 2.28.9; "
            "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device ac000",
        ),
    ],
)
def test_a_backend_s_complaint_is_one_line_with_its_cause(said: str, told: str) -> None:
    assert first_line(RuntimeError(said)) == told
