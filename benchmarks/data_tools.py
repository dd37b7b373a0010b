"""Steps of a corpus beside the tools people use for them: the same text, one process and one thread each.

    python benchmarks/data_tools.py --text DIR --gpt2 DIR                      everything that is ours
    python benchmarks/data_tools.py … --peers PYTHON                           with the peers that PYTHON has
    python benchmarks/data_tools.py … --only 'near*' --mb 20 --rounds 1        some, on less text
    python benchmarks/data_tools.py … --out FILE    the figures as JSON; there, those not run anew stay

DIR of --text has *.jsonl with a "text" a line, DIR of --gpt2 GPT-2's encoder.json and vocab.bpe. The corpus
is --mb megabytes drawn from them by hash, and 2,400 duplicates of known similarity planted in it.

Each contender is a process of its own, start-up and imports included, rounds going around a task's
contenders. Counted are processor time of the process and its children (which a busy machine disturbs less
than time), time, and peak memory; figures are medians over rounds. Our loops are compiled before, and read
from disk as imports are. "then" is the rate after start-up: what a run on 300 documents takes, and those
documents, are taken off. Slow peers run once, most of them on a quarter or an eighth of the documents.

near       near-duplicates, 112 hashes in 14 bands of five-word shingles; removals are written or applied.
           Ours compares candidates exactly and removes from 0.8 on; the peers remove every candidate
filters    Gopher's, C4's and FineWeb's statistics of every document; dolma has no FineWeb rules
tokenize   GPT-2's ids; all streams are compared with tiktoken's
recipe     from the file to tokens. datatrove's has no language, exact dedup or repeated spans

Peers: datatrove and spacy, dolma, rensa, datasketch, tiktoken, tokenizers.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
OURS, PEERS, CORPUS = "data_tools_ours.py", "data_tools_peers.py", "data_tools_corpus.py"
WARM_DOCUMENTS = 300


class Contender(NamedTuple):
    """What is run: a function of a script, on a file of the corpus, a slow one once and not every round."""

    script: str
    function: str
    corpus: str = "all"
    once: bool = False


CONTENDERS = {
    "near megalite": Contender(OURS, "near_parts"),
    "near megalite from jsonl": Contender(OURS, "near_jsonl"),
    "near rensa": Contender(PEERS, "near_rensa"),
    "near datasketch": Contender(PEERS, "near_datasketch"),
    "near datatrove": Contender(PEERS, "near_datatrove", "quarter", once=True),
    "filters megalite": Contender(OURS, "filters_alone"),
    "filters megalite from jsonl": Contender(OURS, "filters_jsonl"),
    "filters datatrove": Contender(PEERS, "filters_datatrove", "eighth", once=True),
    "filters dolma": Contender(PEERS, "filters_dolma", "quarter", once=True),
    "tokenize megalite encoder": Contender(OURS, "tokenize_encoder"),
    "tokenize megalite step": Contender(OURS, "tokenize_parts"),
    "tokenize tiktoken": Contender(PEERS, "tokenize_tiktoken"),
    "tokenize tokenizers": Contender(PEERS, "tokenize_tokenizers", once=True),
    "recipe megalite": Contender(OURS, "recipe_default"),
    "recipe megalite, none filtered": Contender(OURS, "recipe_keeping", once=True),
    "recipe datatrove": Contender(PEERS, "recipe_datatrove", "eighth", once=True),
}
# What the peers of a task are compared with.
BASES = {
    "near": "near megalite from jsonl",
    "filters": "filters megalite from jsonl",
    "tokenize": "tokenize megalite encoder",
    "recipe": "recipe megalite",
}
HEADS = ("MB", "CPU-s", "MB/CPU-s", "then", "ours x", "MB/s", "peak MiB")
WIDTHS = (8, 9, 10, 8, 8, 8, 10)


class Bench:
    """The corpus in a folder, and processes that work on it."""

    def __init__(self, root: Path, gpt2: Path, peers: str | None) -> None:
        self.root, self._gpt2 = root, gpt2
        self._pythons = {OURS: sys.executable, CORPUS: sys.executable, PEERS: peers}
        threads = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS")
        self._environ = {
            **os.environ,
            **dict.fromkeys(threads, "1"),
            "TOKENIZERS_PARALLELISM": "false",
            "TOKENIZER": str(root / "gpt2.json"),
            "RANKS": str(root / "gpt2.tiktoken"),
        }

    def start(self, script: str, arguments: Iterable[Any], out: Any) -> subprocess.Popen[bytes]:
        """A script in a process of its own. Peers are kept from finding our package."""
        environ = dict(self._environ)
        if script != PEERS:
            environ["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), environ.get("PYTHONPATH", "")])
        # -P: data_tools.py must not hide the package of that name.
        command = [self._pythons[script], "-P", str(HERE / script), *map(str, arguments)]
        return subprocess.Popen(command, env=environ, stdout=out, stderr=subprocess.STDOUT)

    def ask(self, *arguments: Any) -> Any:
        """What the corpus's script has to say."""
        process = self.start(CORPUS, arguments, subprocess.PIPE)
        said, _ = process.communicate()
        if process.returncode:
            raise SystemExit(said.decode())
        return json.loads(said.splitlines()[-1]) if said else None

    def prepare(self, text: Path, megabytes: float) -> dict[str, float]:
        """Make the corpus, its parts, and our machine code; MB of text by file."""
        if not (self.root / "all.parts" / "report.json").exists():
            self.ask("prepare", self.root, text, self._gpt2, megabytes)
            with (self.root / "all.jsonl").open() as file, (self.root / "warm.jsonl").open("w") as out:
                out.writelines(line for _, line in zip(range(WARM_DOCUMENTS), file, strict=False))
            for name in ("warm", "all"):
                self.run(Contender(OURS, "ingest", name), self.root / f"{name}.parts")
        for contender in CONTENDERS.values():
            if contender.script == OURS:
                self.run(contender._replace(corpus="warm"), self.root / "out")
        return {name: self._text_mb(name) for name in ("warm", "all", "quarter", "eighth")}

    def run(self, contender: Contender, folder: Path) -> dict[str, float] | str:
        """What a contender took, or why it failed. What it made is in the folder."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        log = folder.with_suffix(".log")
        began = time.perf_counter()
        with log.open("wb") as out:
            corpus = self.root / f"{contender.corpus}.jsonl"
            process = self.start(contender.script, [contender.function, corpus, folder], out)
            _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        wall = time.perf_counter() - began
        if process.returncode:
            return (log.read_text(errors="replace").strip().splitlines() or ["no word"])[-1]
        cpu = usage.ru_utime + usage.ru_stime
        return {"wall_s": wall, "cpu_s": cpu, "peak_mib": usage.ru_maxrss / 1024}

    def _text_mb(self, name: str) -> float:
        with (self.root / f"{name}.jsonl").open(encoding="utf-8") as file:
            return sum(len(json.loads(line)["text"].encode()) for line in file) / 1e6


def measure(bench: Bench, names: list[str], rounds: int, megabytes: dict[str, float]) -> dict[str, Any]:
    """The figures of all contenders; those that fail are left out and said so."""
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    start: dict[str, float] = {}
    left_out: dict[str, str] = {}
    for task in dict.fromkeys(name.split()[0] for name in names):
        mine = [name for name in names if name.split()[0] == task]
        for name in mine:
            started = bench.run(CONTENDERS[name]._replace(corpus="warm"), bench.root / "out")
            if isinstance(started, str):
                left_out[name] = started
            else:
                start[name] = started["cpu_s"]
        for number in range(rounds):
            for name in mine:
                contender = CONTENDERS[name]
                if name in left_out or (number and contender.once):
                    continue
                print(f"round {number + 1}: {name}", file=sys.stderr, flush=True)
                result = bench.run(contender, bench.root / contender.function)
                if isinstance(result, str):
                    left_out[name] = result
                else:
                    taken[name].append(result)
    results: dict[str, Any] = {}
    for name, runs in taken.items():
        if not runs:
            continue
        size = megabytes[CONTENDERS[name].corpus]
        medians = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        results[name] = {
            "mb": round(size, 1),
            "mb_per_cpu_s": round(size / medians["cpu_s"], 2),
            "mb_per_cpu_s_after_start": round(
                (size - megabytes["warm"]) / (medians["cpu_s"] - start[name]), 2
            ),
            "mb_per_s": round(size / medians["wall_s"], 2),
            "cpu_s": round(medians["cpu_s"], 2),
            "start_cpu_s": round(start[name], 2),
            "wall_s": round(medians["wall_s"], 2),
            "peak_mib": round(medians["peak_mib"]),
            "rounds_cpu_s": [round(run["cpu_s"], 2) for run in runs],
        }
    return {"left_out": left_out, "contenders": results}


def judge(bench: Bench, names: Iterable[str], results: dict[str, Any]) -> None:
    """Add what each made: duplicates found and missed, ids that differ, what the steps of a recipe took."""
    by_corpus: dict[str, list[str]] = {}
    for name in names:
        contender = CONTENDERS[name]
        folder = bench.root / contender.function
        if (folder / "kept.txt").exists():
            by_corpus.setdefault(contender.corpus, []).append(name)
        other = bench.root / CONTENDERS["tokenize tiktoken"].function / "tokens.bin"
        if (folder / "tokens.bin").exists() and other.exists() and folder != other.parent:
            results[name]["documents_unlike_tiktoken"] = bench.ask("tokens", folder / "tokens.bin", other)
        if (folder / "steps.json").exists():
            steps = json.loads((folder / "steps.json").read_text())
            results[name]["steps"] = steps
            peak = max(step["peak_bytes"] for step in steps.values())  # counted anew by each step
            results[name]["peak_mib"] = max(results[name]["peak_mib"], round(peak / 2**20))
    for corpus, mine in by_corpus.items():
        files = [bench.root / CONTENDERS[name].function / "kept.txt" for name in mine]
        found = bench.ask("near", bench.root, bench.root / f"{corpus}.jsonl", *files)
        for name, file in zip(mine, files, strict=True):
            results[name]["found"] = found[str(file)]


def compare(results: dict[str, Any]) -> None:
    """Add how many times as fast ours is, start-up included; it too begins with the file of JSON lines."""
    for name, result in results.items():
        if ours := results.get(BASES[name.split()[0]]):
            result["ours_to_this"] = round(ours["mb_per_cpu_s"] / result["mb_per_cpu_s"], 2)


def table(results: dict[str, Any], left_out: dict[str, str]) -> None:
    """Print all."""
    print(" " * 31 + "".join(f"{head:>{width}}" for head, width in zip(HEADS, WIDTHS, strict=True)))
    for name, r in results.items():
        ratio = r.get("ours_to_this", "-")
        rates = (r["mb"], r["cpu_s"], r["mb_per_cpu_s"], r["mb_per_cpu_s_after_start"])
        columns = zip((*rates, ratio, r["mb_per_s"], r["peak_mib"]), WIDTHS, strict=True)
        print(f"{name:31}" + "".join(f"{value:>{width}}" for value, width in columns))
        if found := r.get("found"):
            recall = ", ".join(f"{key} {value:.3f}" for key, value in found["recall"].items())
            print(f"{'':31}  recall by Jaccard: {recall}")
            removed, alone = found["removed"], found["removed_like_nothing"]
            print(f"{'':31}  removed {removed}, of which like nothing else (< 0.5): {alone}")
        if (different := r.get("documents_unlike_tiktoken")) is not None:
            print(f"{'':31}  documents with other ids than tiktoken's: {different}")
    for name, reason in left_out.items():
        print(f"{name} left out: {reason[:110]}")


def processor() -> str:
    """The model, and how many cores there are."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    about = dict(line.split(":", 1) for line in lines if ":" in line)
    keys = {key.strip(): value.strip() for key, value in about.items()}
    name = keys.get("model name", platform.machine())
    return f"{name}, family {keys.get('cpu family')} model {keys.get('model')}, {os.cpu_count()} cores"


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, required=True, help="folder of *.jsonl")
    parser.add_argument("--gpt2", type=Path, required=True, help="folder of encoder.json and vocab.bpe")
    parser.add_argument("--peers", help="a Python that has the peers")
    parser.add_argument("--mb", type=float, default=100, help="of text that duplicates are added to")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="*", help="contenders, a shell pattern")
    parser.add_argument("--root", type=Path, help="keep the corpus here, for another run")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    names = [name for name in CONTENDERS if fnmatch.fnmatch(name, args.only)]
    names = [name for name in names if args.peers or CONTENDERS[name].script == OURS]
    with tempfile.TemporaryDirectory() as temporary:
        bench = Bench((args.root or Path(temporary)).resolve(), args.gpt2.resolve(), args.peers)
        bench.root.mkdir(exist_ok=True, parents=True)
        megabytes = bench.prepare(args.text.resolve(), args.mb)
        load = os.getloadavg()[0]
        measured = measure(bench, names, args.rounds, megabytes)
        results = measured["contenders"]
        judge(bench, results, results)
        compare(results)
    if args.out:
        machine = f"{processor()}, shared with other work (load {load:.1f} to {os.getloadavg()[0]:.1f})"
        head = {"machine": machine, "text_mb": {name: round(mb, 1) for name, mb in megabytes.items()}}
        before = json.loads(args.out.read_text()) if args.out.exists() else {}
        contenders = {**before.get("contenders", {}), **results}
        figures = {**head, "rounds": args.rounds, "left_out": measured["left_out"], "contenders": contenders}
        args.out.write_text(json.dumps(figures, indent=1) + "\n")
    table(results, measured["left_out"])


if __name__ == "__main__":
    main()
