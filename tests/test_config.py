"""Configuration: what is read is what was written, and every mistake is named where it stands."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_tools.recipe import Recipe
from megalite.config import Config
from megalite.config.section import divisors
from megalite.config_file import build_config, changed_keys, describe_keys, load_config, to_toml
from megalite.errors import ConfigError
from megalite.model.flops import count_parameters
from megalite_kernels.linear_cross_entropy import _CHUNK_BYTES
from tests.trainer.runs import tiny

CONFIGS = Path(__file__).parent.parent / "configs"
TOML = """\
run_dir = "runs/x"

[model]
vocab_size = 100
hidden_size = 64
num_layers = 2
num_heads = 4
ffn_size = 96

[data]
seq_len = 32

[optim]
lr = 1e-3

[train]
steps = 10
global_batch_size = 8
micro_batch_size = 2
"""
MIXTURE = """\
[data]
seq_len = 32
sources = [{ path = "../web/train", weight = 0.7 }, { path = "s3://b/code" }, { path = "/books" }]
schedule = [{ tokens = 640, weights = [1, 2, 3] }]
validation = [{ path = "../web/valid" }]
"""
TWO = "data.sources=[{path='a'}, {path='b'}]"


def _load(tmp_path: Path, toml: str = TOML, *overrides: str) -> Config:
    path = tmp_path / "c.toml"
    path.write_text(toml)
    return load_config(path, overrides)


def _mistake(tmp_path: Path, toml: str = TOML, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        _load(tmp_path, toml, *overrides)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_derived_values_and_defaults(tmp_path: Path) -> None:
    config = _load(tmp_path)
    assert (config.model.num_kv_heads, config.model.head_dim) == (4, 16)
    assert config.tokens_per_step == 256
    assert [config.grad_accum_steps(dp) for dp in (1, 2, 4)] == [4, 2, 1]
    assert config.mesh.zero_stage == 1


@pytest.mark.parametrize("name", ["quickstart", "125m", "1b", "3b", "8b", "70b"])
def test_shipped_configs_load_and_survive_a_round_trip(name: str) -> None:
    config = load_config(CONFIGS / f"{name}.toml")
    assert build_config(tomllib.loads(to_toml(config))) == config


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("125m", 123_587_328),
        ("1b", 1_235_814_400),
        ("3b", 3_212_749_824),
        ("8b", 8_030_261_248),
        ("70b", 70_553_706_496),
    ],
)
def test_parameter_counts(name: str, parameters: int) -> None:
    """The Llama 3 family's published counts, to the last parameter."""
    assert count_parameters(load_config(CONFIGS / f"{name}.toml").model) == parameters


def test_a_list_on_the_command_line_that_is_none(tmp_path: Path) -> None:
    """As the shell leaves it when it took the quotes, and in words of TOML, not of pydantic."""
    unquoted = _mistake(tmp_path, TOML, "data.sources=[{path=data/train}]")
    assert "'data.sources=[{path=data/train}]' is not TOML" in unquoted
    assert "quote" in unquoted
    assert "data.sources='a': should be a list" in _mistake(tmp_path, TOML, "data.sources=a")
    inside = _mistake(tmp_path, TOML, "data.sources=['a']")
    assert "data.sources.0='a': should be a table" in inside
    assert "(command line)" in inside
    assert "did you mean data.sources.0.path? (command line)" in _mistake(
        tmp_path, TOML, "data.sources=[{pth='a'}]"
    )


def test_overrides_reach_nested_tables_lists_and_bare_words(tmp_path: Path) -> None:
    config = _load(
        tmp_path,
        TOML,
        "optim.lr=0.5",
        "train.precision=fp32",
        'data.sources=[{path="a", weight=2.0}, {path="b"}]',
        "model.rope_scaling={type='linear', factor=2.0}",
        "run_dir=/tmp/a b",
    )
    assert config.optim.lr == 0.5
    assert config.train.precision == "fp32"
    assert [(s.path, s.weight) for s in config.data.sources] == [("a", 2.0), ("b", 1.0)]
    assert config.model.rope_scaling is not None
    assert config.run_dir == "/tmp/a b"


MISTAKES = [
    (
        TOML.replace("hidden_size", "hiden_size"),
        [],
        ["model.hiden_size", "did you mean model.hidden_size", "c.toml:5"],
    ),
    (TOML.replace("[train]", "[trian]"), [], ["trian", "did you mean train", "c.toml:16"]),
    ("lr = 1\n" + TOML, [], ["unknown key lr", "did you mean optim.lr", "c.toml:1"]),
    (TOML, ["every_steps=3"], ["did you mean checkpoint.every_steps or log.every_steps?", "command line"]),
    (TOML.replace("steps = 10", 'steps = "10"'), [], ["train.steps='10'", "integer", "c.toml:17"]),
    (TOML.replace("steps = 10", "steps = 0"), [], ["train.steps=0", "greater than 0", "c.toml:17"]),
    (TOML.replace("steps = 10\n", ""), [], ["train.steps is required"]),
    (
        TOML,
        ["train.micro_batch_size=3"],
        ["micro_batch_size=3", "global_batch_size=8", "[1, 2, 4, 8]", "command line"],
    ),
    (TOML.replace("micro_batch_size = 2", "micro_batch_size = 3"), [], ["micro_batch_size=3", "c.toml:19"]),
    (TOML, ["model.num_kv_heads=3"], ["num_kv_heads=3", "num_heads=4", "[1, 2, 4]"]),
    (TOML, ["model.num_heads=5"], ["hidden_size=64", "num_heads=5"]),
    (TOML, ["model.head_dim=15"], ["head_dim=15", "even"]),
    (TOML, ["data.seq_len=9000"], ["data.seq_len=9000", "model.max_seq_len=8192"]),
    (TOML, ["trian.steps=3"], ["unknown key trian", "did you mean train?", "command line"]),
    (TOML, ["train.precision=fp8"], ["train.precision='fp8'", "'fp32', 'bf16' or 'fp16'"]),
    (TOML, ["mesh.zero_stage=4"], ["mesh.zero_stage=4", "0, 1, 2 or 3"]),
    (TOML, ["optim.warmup_steps=11"], ["= 11", "train.steps=10"]),
    (TOML, ["optim.schedule=wsd"], ["decay_steps=0", "wsd"]),
    (TOML, ["optim.decay_steps=3"], ["decay_steps=3", "cosine"]),
    (TOML, ["train.eval_every_steps=5"], ["train.eval_every_steps=5", "data.validation"]),
    (TOML, ["checkpoint.keep_best=2"], ["checkpoint.keep_best=2", "train.eval_every_steps=0"]),
    (
        TOML,
        ["model.position=learned", "model.rope_scaling={type='linear', factor=2}"],
        ["rope_scaling", "learned"],
    ),
    (
        TOML,
        ["model.rope_scaling={type='llama3', factor=8, low_freq_factor=4, high_freq_factor=1}"],
        ["high_freq_factor=1"],
    ),
    (TOML, ["data.sources=[{path=3}]"], ["data.sources.0.path=3", "string"]),
    (TOML, ["data.sources=[{path='a', weight=-1}]"], ["weight=-1", "greater than or equal to 0"]),
    (
        TOML,
        ["data.sources=[{path='a', weight=2}]", "data.temperature=3.0"],
        ["temperature=3.0", "one of the two"],
    ),
    (TOML, [TWO, "data.schedule=[{tokens=5}]"], ["schedule[0]", "weights or a temperature"]),
    (TOML, [TWO, "data.schedule=[{tokens=5, weights=[1]}]"], ["schedule[0].weights=[1.0]", "give 2 numbers"]),
    (TOML, [TWO, "data.schedule=[{tokens=5, weights=[0, 0]}]"], ["not all 0"]),
    (
        TOML,
        ["data.schedule=[{tokens=5, temperature=1}, {tokens=5, temperature=2}]"],
        ["schedule has tokens [5, 5]"],
    ),
    (
        TOML,
        ["data.seq_len_schedule=[{tokens=0, seq_len=12}]"],
        ["seq_len_schedule[0].seq_len=12", "seq_len=32"],
    ),
    (TOML, ["steps"], ["'steps'", "section.key=value"]),
    (TOML, ["run_dir.x=3"], ["run_dir is a value"]),
    (TOML, ["model=3"], ["model=3"]),
    (TOML + "[broken", [], ["c.toml is not valid TOML", "end of document"]),
]


@pytest.mark.parametrize(("toml", "overrides", "words"), MISTAKES, ids=lambda v: str(v)[-40:])
def test_mistakes(tmp_path: Path, toml: str, overrides: list[str], words: list[str]) -> None:
    text = _mistake(tmp_path, toml, *overrides)
    assert [word for word in words if word not in text] == [], text


def test_a_missing_or_unreadable_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config file .*nowhere\.toml; configs/ holds examples"):
        load_config(tmp_path / "nowhere.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(tmp_path / "binary.toml")
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(tmp_path)


def test_a_misspelt_key_is_one_mistake(tmp_path: Path) -> None:
    text = _mistake(tmp_path, TOML.replace("hidden_size", "hiden_size"))
    assert text.endswith("c.toml:5)")  # not also that the key it was meant for is missing
    assert _mistake(tmp_path, TOML.replace("hidden_size", "hiden_size"), "train.steps=0").endswith(
        "(and 1 more)"
    )


def test_a_file_that_an_editor_on_windows_wrote(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(TOML, encoding="utf-8-sig", newline="\r\n")
    assert load_config(path) == _load(tmp_path)


def test_toml_that_python_cannot_hold(tmp_path: Path) -> None:
    """Numbers of thousands of digits, lists within lists: one short line, not a traceback nor all of it."""
    for value in ("9" * 5000, "[" * 100_000):
        text = _mistake(tmp_path, f"seed = {value}\n{TOML}")
        assert "is not valid TOML" in text
        assert len(_mistake(tmp_path, TOML, f"seed={value}")) < 500


def test_a_value_of_the_wrong_shape(tmp_path: Path) -> None:
    assert "run_dir='': should have at least 1 character (where" in _mistake(tmp_path, TOML, 'run_dir=""')
    of_skips = "(ranges of global sample indices left out: [[first, after], ...]) (command line)"
    assert f"data.skip.0.1 is required {of_skips}" in _mistake(tmp_path, TOML, "data.skip=[[0]]")
    text = _mistake(tmp_path, TOML, "data.skip=[[0, 1, 2]]")
    assert "data.skip.0=[0, 1, 2]: should have at most 2 items" in text
    assert of_skips in text


def test_a_path_with_a_zero_byte(tmp_path: Path) -> None:
    """It is no path: pathlib and the system calls raise a ValueError of their own."""
    text = _mistake(tmp_path, TOML.replace("runs/x", r"runs/\u0000x"))
    assert f"run_dir: 'runs/\\x00x' has a zero byte, which no path and no text may have ({tmp_path}" in text
    assert "data.sources.0.path: 'a\\x00'" in _mistake(tmp_path, TOML, r'data.sources=[{path="a\u0000"}]')


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=30))
def test_any_path_survives_a_round_trip(path: str) -> None:
    values = tomllib.loads(TOML) | {"run_dir": path}
    values["data"]["sources"] = [{"path": path}]
    config = build_config(values)
    assert build_config(tomllib.loads(to_toml(config))) == config


def test_a_mixture_file_takes_the_place_of_its_keys(tmp_path: Path) -> None:
    (tmp_path / "mix").mkdir()
    path = tmp_path / "mix" / "data.toml"
    path.write_text(MIXTURE)
    data = _load(tmp_path, TOML, f"data.mixture={path}", "data.packing=best_fit").data
    paths = [str(tmp_path / "web/train"), "s3://b/code", "/books"]
    assert [(source.path, source.weight) for source in data.sources] == list(
        zip(paths, [0.7, 1, 1], strict=True)
    )
    assert data.validation[0].path == str(tmp_path / "web/valid")
    assert (data.schedule[0].tokens, data.packing, data.mixture) == (640, "best_fit", None)
    config = _load(tmp_path, TOML, f"data.mixture={path}")
    assert _load(tmp_path, to_toml(config)) == config
    for override, words in {
        TWO: ["data.sources=", "keep one of the two"],
        "data.seq_len=16": ["data.seq_len=16", "says 32"],
    }.items():
        text = _mistake(tmp_path, TOML, f"data.mixture={path}", override)
        assert all(word in text for word in [*words, f"data.mixture={path}"])
    path.write_text(MIXTURE.replace("weight =", "wieght ="))
    assert f"did you mean data.sources.0.weight? ({path}:3)" in _mistake(
        tmp_path, TOML, f"data.mixture={path}"
    )
    assert "data.mixture=gone.toml; `megalite data mix`" in _mistake(tmp_path, TOML, "data.mixture=gone.toml")
    assert "data.mixture=5" in _mistake(tmp_path, TOML, "data.mixture=5")


def test_a_batch_that_does_not_divide_by_the_processes(tmp_path: Path) -> None:
    config = _load(tmp_path)
    with pytest.raises(ConfigError, match=r"8 is not a multiple of train.micro_batch_size=2 × 8.*\[1\]"):
        config.grad_accum_steps(8)
    with pytest.raises(ConfigError, match="make train.global_batch_size a multiple of 3"):
        config.grad_accum_steps(3)


def test_every_key_is_described() -> None:
    text = describe_keys()
    assert "None\n" not in text
    rows = [line for line in text.splitlines() if line.startswith("  resilience.")]
    assert len({line.index(line.split(maxsplit=1)[1]) for line in rows}) == 1  # long keys keep the columns
    for key in ("model.rope_theta", "mesh.zero_stage", "train.loss_chunk_mib", "log.every_steps"):
        assert key in text
    of_loss = next(line for line in text.splitlines() if "train.loss_chunk_mib" in line)
    defaults = (size // 2**20 for size in (_CHUNK_BYTES["cuda"], _CHUNK_BYTES["cpu"]))
    assert "by default {} on a GPU, on CPU {}".format(*defaults) in of_loss


def test_keys_tell_what_a_value_may_be() -> None:
    rows = {line.split()[0]: line for line in describe_keys().splitlines() if line.startswith("  ")}
    assert rows["optim.schedule"].endswith('; one of "cosine", "linear", "wsd", "constant"')
    assert rows["model.rope_scaling.type"].endswith('; one of "linear", "llama3"')
    assert rows["mesh.zero_stage"].endswith("; one of 0, 1, 2, 3")
    recipe = describe_keys(Recipe)
    assert '(zstd-shard); one of "lz4", "zstd", "zstd-shard"' in recipe  # a choice, or none
    assert (
        '; one of "long_word", "no_terminal", "few_words", "javascript", "policy"' in recipe
    )  # a list of some


@pytest.mark.parametrize(
    "key",
    [
        "model.sliding_window",  # which attention would else take for another, smaller one
        "data.shuffle_chunks",
        "train.steps",
        "train.global_batch_size",
        "train.loss_scale",
        "train.loss_chunk_mib",
        "mesh.bucket_mib",
        "resilience.skip_steps",
    ],
)
def test_numbers_that_overflow_are_refused(tmp_path: Path, key: str) -> None:
    assert f"{key}=100000000000000000000: should be less than" in _mistake(tmp_path, TOML, f"{key}={10**20}")


def test_changed_keys_are_dotted() -> None:
    old = {"a": {"b": 1, "c": 2}, "d": 3}
    assert changed_keys(old, {"a": {"b": 1, "c": 5}, "d": 3}) == {"a.c": (2, 5)}


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["mesh.tp=3"], ["mesh.tp=3 does not divide model.num_heads=4", "[1, 2, 4]"]),
        (["mesh.tp=0"], ["mesh.tp=0"]),
        (["mesh.tp=2", "mesh.sequence_parallel=true", "data.seq_len=31"], ["data.seq_len=31", "[1]"]),
        (
            ["model.num_heads=6", "model.num_kv_heads=3", "model.head_dim=6", "mesh.tp=2"],
            ["mesh.tp=2 and model.num_kv_heads=3 must divide one the other", "[1, 3, 6]"],
        ),
        (["model.vocab_size=2", "mesh.tp=4"], ["mesh.tp=4 exceeds model.vocab_size=2", "[1, 2]"]),
    ],
)
def test_tensor_parallelism_that_does_not_divide(overrides: list[str], expected: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        tiny(Path("x"), "model.ffn_size=48", *overrides)
    assert all(part in str(caught.value) for part in expected), caught.value
    assert "\n" not in str(caught.value)


def test_processes_that_make_no_whole_groups() -> None:
    config = tiny(Path("x"), "mesh.tp=2")
    assert config.data_parallel_size(6) == 3
    with pytest.raises(
        ConfigError, match=r"mesh.tp=2 × mesh.pp=1 does not divide the number of processes, 3.*\[1, 3\]"
    ):
        config.data_parallel_size(3)
    assert [tiny(Path("x"), f"mesh.tp={tp}").kv_copies for tp in (1, 2, 4)] == [1, 1, 2]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["mesh.pp=3"], ["mesh.pp=3 × mesh.pp_chunks=1", "model.num_layers=2", "at most 2"]),
        (["mesh.pp_chunks=2"], ['mesh.pp_chunks=2 with mesh.pp_schedule="1f1b"', '"interleaved"']),
        (["mesh.pp_chunks=2", "mesh.pp_schedule=interleaved"], ["mesh.pp_chunks=2 with mesh.pp=1"]),
        (["mesh.pp=2", "mesh.pp_schedule=interleaved"], ["mesh.pp_chunks=1", "pp_chunks > 1"]),
        (["mesh.pp=2", "mesh.pp_layers=[2,1]"], ["mesh.pp_layers=[2, 1]", "2 numbers", "num_layers=2"]),
        (["mesh.pp=2", "mesh.pp_layers=[3,-1]"], ["mesh.pp_layers=[3, -1]"]),
        (["mesh.pp_schedule=zero_bubble", "train.compile=true"], ["zero_bubble", "train.compile=false"]),
        (["mesh.pp_schedule=dualpipe"], ["mesh.pp_schedule='dualpipe'", "zero_bubble"]),
    ],
)
def test_pipelines_that_cannot_be(overrides: list[str], expected: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        tiny(Path("x"), *overrides)
    assert all(part in str(caught.value) for part in expected), caught.value
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "key", ["optim.lr", "train.loss_scale", "mesh.bucket_mib", "resilience.comm_timeout_s"]
)
@pytest.mark.parametrize("value", ["inf", "nan"])
def test_numbers_that_are_none_are_refused(tmp_path: Path, key: str, value: str) -> None:
    assert f"{key}={value}" in _mistake(tmp_path, TOML, f"{key}={value}")


def test_words_of_the_command_line_that_no_file_could_hold(tmp_path: Path) -> None:
    assert "'run_dir=\\udcff' is not UTF-8" in _mistake(tmp_path, TOML, "run_dir=\udcff")
    assert "run_dir=''" in _mistake(tmp_path, TOML, "run_dir=")


def test_divisors_of_any_batch_size_are_listed_at_once() -> None:
    for n in range(1, 200):
        assert divisors(n) == [d for d in range(1, n + 1) if n % d == 0]
    assert divisors(4 * 10**9)[-2:] == [2 * 10**9, 4 * 10**9]


def test_layers_are_divided_among_stages() -> None:
    deep = ["model.num_layers=5", "mesh.pp=2"]
    assert tiny(Path("x"), *deep).stage_layers == [range(3), range(3, 5)]
    assert tiny(Path("x"), *deep, "mesh.pp_layers=[0,5]").stage_layers == [range(0), range(5)]
    interleaved = [*deep, "mesh.pp_schedule=interleaved", "mesh.pp_chunks=2"]
    assert tiny(Path("x"), *interleaved).stage_layers == [range(2), range(2, 3), range(3, 4), range(4, 5)]


def test_groups_of_shards_must_divide() -> None:
    config = tiny(Path("x"), "mesh.zero_shard_size=2")
    assert config.data_parallel_size(4) == 4
    with pytest.raises(
        ConfigError, match=r"mesh.zero_shard_size=2 .* size 3; use 0 \(all\) or one of \[1, 3\]"
    ):
        config.data_parallel_size(3)
