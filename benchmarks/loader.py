"""How fast batches come out of the loader, beside peers: the same documents, one process, one epoch each.

    python benchmarks/loader.py                  everything, on 100 million tokens
    python benchmarks/loader.py --tokens 20e6    fewer
    python benchmarks/loader.py --only 'megalite*' 'numpy*' --rounds 9   contenders by name, shell patterns
    python benchmarks/loader.py --out FILE       the figures as JSON

Each contender runs in a process of its own, an epoch a round, rounds going around the contenders; what is
counted is tokens of whole batches ready for the model, state and collation included. Figures are medians
over rounds of tokens over wall time and over processor time; the latter a busy machine disturbs less.
Beside it stands the first round, in which we check every CRC; the memory of the process at the end (and
how much it grew over the last half of the epoch); and the time from an opened dataset to the first batch
at 75 % of an epoch, the median of several fresh processes. Figures of ours alone come last: looking up
samples among 10¹⁰, how far a blend's prefixes are from its weights, and the processor time from the manifest
of 10¹¹ tokens to a first batch.

A peer that is not installed is left out and said so: litdata, datasets, mosaicml-streaming, megatron-core.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

SEQ, BATCH, SEED = 2048, 8, 0
STARTS = 5  # processes whose first batch is timed
LONGEST_S = 12.0  # an epoch of a slower contender is cut off here
EOS, VOCAB = 50256, 50304
WIDTHS = (8, 11, 7, 11, 9, 6, 8, 8, 11)


def documents(tokens: int) -> Iterator[np.ndarray]:
    """Documents with the lengths of web text: log-normal, mean about 900 tokens, a few very long."""
    rng = np.random.default_rng(SEED)
    while tokens > 0:
        length = int(np.clip(rng.lognormal(6.2, 1.1), 2, 200_000))
        # Ids as skewed as those of words, so that compression has something to do.
        ids = (EOS * rng.random(min(length, tokens)) ** 3).astype(np.uint16)
        ids[-1] = EOS
        tokens -= len(ids)
        yield ids


def prepare(root: Path, tokens: int) -> None:
    """Every contender's files, of the same documents."""
    from megalite.data.tokenizer import ByteTokenizer
    from megalite.data.writer import ShardWriter

    class Tokenizer(ByteTokenizer):
        vocab_size, eos_id = VOCAB, EOS

    for name, compression in (("plain", None), ("zstd", "zstd")):
        with ShardWriter(root / name, Tokenizer(), compression=compression) as writer:
            for n, ids in enumerate(documents(tokens)):
                writer.write(f"doc{n}", "synthetic", ids)
    with (root / "tokens.bin").open("wb") as file:
        for ids in documents(tokens):
            file.write(ids.tobytes())


# --- contenders: each gives batches from a position of an epoch on, and the number of an epoch ------------

Opened = tuple[Callable[[int], Iterator[Any]], int]


def megalite(root: Path, folder: str = "plain", prefetch: int = 0, **settings: Any) -> Opened:
    """Ours; a step is a micro-batch."""
    from megalite.config import DataConfig
    from megalite.data.loader import DataLoader, Share, open_datasets

    path = str(root / folder)
    values = {"sources": [{"path": path}], "seq_len": SEQ, **settings}
    loader = DataLoader(DataConfig.model_validate(values), SEED, open_datasets([path]))

    def batches(start: int) -> Iterator[Any]:
        loader.state(start * BATCH)
        with loader.steps(start * BATCH, Share(BATCH, BATCH), prefetch) as steps:
            for (batch,) in steps:
                yield batch.tokens

    return batches, loader.samples[0] // BATCH


def memmap(root: Path) -> Opened:
    """What a short script does: a stored permutation, rows stacked and widened."""
    data = np.memmap(root / "tokens.bin", dtype=np.uint16, mode="r")
    samples = (len(data) - 1) // SEQ
    order = np.random.default_rng(SEED).permutation(samples)

    def batches(start: int) -> Iterator[Any]:
        for first in range(start * BATCH, samples - BATCH + 1, BATCH):
            rows = [data[k * SEQ : (k + 1) * SEQ] for k in order[first : first + BATCH].tolist()]
            yield np.stack(rows).astype(np.int64)

    return batches, samples // BATCH


def litdata(root: Path) -> Opened:
    """Chunks of a token stream, read by its StreamingDataset and StreamingDataLoader in this process."""
    import torch
    from litdata import StreamingDataLoader, StreamingDataset, TokensLoader
    from litdata.streaming.writer import BinaryWriter

    folder = root / "litdata"
    if not folder.exists():
        folder.mkdir()
        loader = TokensLoader(block_size=SEQ)
        writer = BinaryWriter(str(folder), chunk_bytes="64MB", item_loader=loader)
        data = np.fromfile(root / "tokens.bin", dtype=np.uint16)
        for n, start in enumerate(range(0, len(data), 1 << 20)):
            writer[n] = torch.from_numpy(data[start : start + (1 << 20)].astype(np.int32))
        writer.done()
        writer.merge()
    dataset = StreamingDataset(str(folder), item_loader=TokensLoader(block_size=SEQ), shuffle=True, seed=SEED)
    loader = StreamingDataLoader(dataset, batch_size=BATCH, num_workers=0)

    def batches(start: int) -> Iterator[Any]:
        if start:
            dataset.load_state_dict(dataset.state_dict(start * BATCH, 1, BATCH))
        return iter(loader)

    return batches, len(dataset) // BATCH


def hf_datasets(root: Path) -> Opened:
    """Rows of SEQ tokens in Arrow, as a map-style dataset with a permutation of indices."""
    import datasets
    import pyarrow as pa

    folder = root / "hf"
    if not folder.exists():
        data = np.fromfile(root / "tokens.bin", dtype=np.uint16)
        rows = data[: len(data) // SEQ * SEQ]
        table = pa.table({"tokens": pa.FixedSizeListArray.from_arrays(pa.array(rows), SEQ)})
        datasets.Dataset(table).save_to_disk(str(folder))
    dataset = datasets.load_from_disk(str(folder)).with_format("numpy")
    order = np.random.default_rng(SEED).permutation(len(dataset))

    def batches(start: int) -> Iterator[Any]:
        for first in range(start * BATCH, len(dataset) - BATCH + 1, BATCH):
            yield dataset[order[first : first + BATCH]]["tokens"].astype(np.int64)

    return batches, len(dataset) // BATCH


def megatron(root: Path, resets: bool = False) -> Opened:
    """GPTDataset of megatron-core and torch's collation; `resets` asks for positions by document."""
    import logging

    import torch
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
    from megatron.core.datasets.utils import Split
    from torch.utils.data import default_collate

    logging.disable(logging.WARNING)
    prefix = str(root / "megatron")
    if not Path(f"{prefix}.idx").exists():
        builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
        for ids in documents(os.path.getsize(root / "tokens.bin") // 2):
            builder.add_document(torch.from_numpy(ids.astype(np.int32)), [len(ids)])
        builder.finalize(f"{prefix}.idx")
    indexed = IndexedDataset(prefix)

    class Tokenizer:
        eod, pad, vocab_size, unique_identifiers = EOS, EOS, VOCAB, {"name": "synthetic"}

    config = GPTDatasetConfig(
        random_seed=SEED,
        sequence_length=SEQ,
        blend=([prefix], None),
        split="1,0,0",
        path_to_cache=str(root / "megatron_cache"),
        tokenizer=Tokenizer(),
        reset_position_ids=resets,
        reset_attention_mask=False,
        eod_mask_loss=resets,
        create_attention_mask=False,
    )
    indices = np.arange(len(indexed.document_indices) - 1, dtype=np.int32)
    dataset = GPTDataset(indexed, prefix, indices, None, Split.train, config)

    def batches(start: int) -> Iterator[Any]:
        for first in range(start * BATCH, len(dataset) - BATCH + 1, BATCH):
            yield default_collate([dataset[n] for n in range(first, first + BATCH)])["tokens"]

    return batches, len(dataset) // BATCH


def mds(root: Path) -> Opened:
    """MDS shards of mosaicml-streaming, a row a sample."""
    from streaming import MDSWriter, StreamingDataset
    from torch.utils.data import DataLoader

    folder = root / "mds"
    if not folder.exists():
        data = np.fromfile(root / "tokens.bin", dtype=np.uint16)
        with MDSWriter(out=str(folder), columns={"tokens": f"ndarray:uint16:{SEQ}"}) as writer:
            for start in range(0, len(data) // SEQ * SEQ, SEQ):
                writer.write({"tokens": data[start : start + SEQ]})
    dataset = StreamingDataset(local=str(folder), shuffle=True, shuffle_seed=SEED, batch_size=BATCH)

    def batches(start: int) -> Iterator[Any]:
        if start:
            dataset.load_state_dict(dataset.state_dict(start * BATCH, from_beginning=True))
        for batch in DataLoader(dataset, batch_size=BATCH, drop_last=True):
            yield batch["tokens"]

    return batches, len(dataset) // BATCH


CONTENDERS: dict[str, Callable[[Path], Opened]] = {
    "megalite plain": lambda root: megalite(root, document_mask=False),
    "megalite documents": lambda root: megalite(root),
    "megalite best fit": lambda root: megalite(root, packing="best_fit"),
    "megalite zstd plain": lambda root: megalite(root, "zstd", document_mask=False),
    "megalite zstd documents": lambda root: megalite(root, "zstd"),
    "megalite documents, thread": lambda root: megalite(root, prefetch=2),
    "numpy memmap": memmap,
    "litdata": litdata,
    "hf datasets": hf_datasets,
    "megatron-core": megatron,
    "megatron-core documents": lambda root: megatron(root, resets=True),
    "mds": mds,
}


# --- measuring -------------------------------------------------------------------------------------------


def rss_mib() -> float:
    """Resident memory of this process that is its own: pages of mapped files belong to the page cache."""
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) / 1024


def serve(name: str, root: Path) -> None:
    """A contender's process: an epoch for each line that comes in."""
    opened = time.perf_counter()
    batches, count = CONTENDERS[name](root)
    open_s = time.perf_counter() - opened
    resumes = []
    for _ in range(2):
        began, cpu = time.perf_counter(), time.process_time()
        next(iter(batches(count * 3 // 4)))
        resumes.append((time.perf_counter() - began, time.process_time() - cpu))
    print(json.dumps({"open_s": open_s, "resumes": resumes}), flush=True)
    for _ in sys.stdin:
        half = 0.0
        began, cpu = time.perf_counter(), time.process_time()
        done = 0
        for done, _batch in enumerate(batches(0), 1):
            if done == count // 2:
                half = rss_mib()
            if done == count or time.perf_counter() - began > LONGEST_S:
                break
        tokens = done * BATCH * SEQ
        wall, cpu = time.perf_counter() - began, time.process_time() - cpu
        figures = {"wall": tokens / wall / 1e6, "cpu": tokens / cpu / 1e6, "rss": rss_mib()}
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps(figures | {"grown": rss_mib() - half if half else 0.0, "peak": peak}), flush=True)


def arithmetic() -> dict[str, float]:
    """What order and mixture cost and keep, with no data at all."""
    from megalite.data.mixture import Mixture
    from megalite.data.order import EvenChunks, Order

    samples, rng, before = 10**10, np.random.default_rng(SEED), rss_mib()
    order = Order(EvenChunks(samples, 64, 48), SEED, "synthetic")
    took: dict[int, list[float]] = {1: [], 1024: []}
    for count, times in took.items():
        for start in rng.integers(0, samples - count, 200).tolist():
            began = time.perf_counter()
            order.sample(np.arange(start, start + count))
            times.append(time.perf_counter() - began)
    figures = {f"lookup_of_{count}_ms": round(statistics.median(t) * 1e3, 3) for count, t in took.items()}
    figures["lookup_mib"] = round(rss_mib() - before, 1)
    weights, draws = (0.55, 0.3, 0.15), 10**6
    source, _ = Mixture(weights).locate(np.arange(draws))
    due = np.arange(1, draws + 1)
    errors = [np.abs(np.cumsum(source == n) - due * weight).max() for n, weight in enumerate(weights)]
    return figures | {"blend_worst_error": round(float(max(errors)), 3)}


def first_batch_of_many(tokens: int = 10**11, shards: int = 1600) -> dict[str, float]:
    """Processor seconds to the first batch of a dataset all of whose shards but the first are elsewhere."""
    from megalite.config import DataConfig
    from megalite.data.loader import DataLoader, open_datasets
    from megalite.data.manifest import MANIFEST_FILE, Manifest, ShardInfo, dump_manifest
    from megalite.data.tokenizer import ByteTokenizer
    from megalite.data.writer import ShardWriter

    figures = {}
    for name, compression, size in (("plain", None, 1 << 18), ("zstd", "zstd", 1 << 16)):
        with tempfile.TemporaryDirectory() as root:
            path = Path(root) / "dataset"
            with ShardWriter(path, ByteTokenizer(), compression=compression) as writer:
                writer.write("doc", "synthetic", np.arange(size, dtype=np.uint16) % 256)
            (dataset,) = open_datasets([str(path)])
            (first,) = dataset.manifest.shards
            count = tokens // (shards * size) + 1
            batches = first.batches.repeat(count, axis=0)
            batches[:, 0] += np.arange(count) * batches[:, 1]
            length = int(batches[-1, :2].sum())
            others = [ShardInfo(f"other_{n}.arrow", length, 0, length, batches) for n in range(1, shards)]
            manifest = Manifest(dataset.tokenizer, compression, (first, *others))
            (path / MANIFEST_FILE).write_bytes(dump_manifest(manifest))
            taken = []
            for _ in range(STARTS):
                began = time.process_time()
                config = {"sources": [{"path": str(path)}], "seq_len": SEQ, "shuffle": False}
                loader = DataLoader(DataConfig.model_validate(config), SEED, open_datasets([str(path)]))
                loader.batch(range(BATCH))
                taken.append(time.process_time() - began)
            figures[f"first_of_{tokens:.0e}_{name}_cpu_s"] = round(statistics.median(taken), 3)
    return figures


def run(names: list[str], root: Path, rounds: int) -> dict[str, Any]:
    """All contenders' figures; those that do not start are left out."""
    results: dict[str, Any] = {"left_out": []}
    started = {}
    commands = {name: [sys.executable, __file__, "--serve", name, "--root", str(root)] for name in names}
    for name, command in commands.items():
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        first = process.stdout.readline()
        if not first:
            reason = process.stderr.read().strip().splitlines()[-1:] or ["no word"]
            print(f"{name} left out: {reason[0][:110]}")
            results["left_out"].append(f"{name}: {reason[0]}")
            process.wait()
            continue
        started[name] = process, [json.loads(first)], []
    for _ in range(STARTS - 1):
        for name, (_, firsts, _) in started.items():
            ended = subprocess.run(commands[name], input="", capture_output=True, text=True, check=True)
            firsts.append(json.loads(ended.stdout))
    for _ in range(rounds):
        for process, _, figures in started.values():
            process.stdin.write("go\n")
            process.stdin.flush()
            figures.append(json.loads(process.stdout.readline()))
    heads = ("Mtok/s", "per CPU-s", "first", "of memmap", "own MiB", "grown", "peak", "open s", "resume ms")
    print(" " * 28 + "".join(f"{head:>{width}}" for head, width in zip(heads, WIDTHS, strict=True)))
    base = started.get("numpy memmap")
    for name, (process, firsts, figures) in started.items():
        process.stdin.close()
        process.wait()
        medians = {key: round(statistics.median(f[key] for f in figures), 1) for key in figures[0]}
        ratios = [a["cpu"] / b["cpu"] for a, b in zip(figures, base[2], strict=True)] if base else [0.0]
        resumes = [
            [round(statistics.median(f["resumes"][n][m] for f in firsts) * 1e3, 2) for m in (0, 1)]
            for n in (0, 1)
        ]
        results[name] = {
            "mtok_per_s": medians["wall"],
            "mtok_per_cpu_s": medians["cpu"],
            "first_mtok_per_cpu_s": round(figures[0]["cpu"], 1),
            "ratio_to_memmap_cpu": round(statistics.median(ratios), 3),
            "own_mib": medians["rss"],
            "grown_mib": medians["grown"],
            "peak_rss_mib": medians["peak"],
            "open_s": round(statistics.median(f["open_s"] for f in firsts), 4),
            # Wall and processor time; then once more, with what was read checked already.
            "resume_ms": resumes,
            "rounds": [round(f["wall"], 1) for f in figures],
        }
        r = results[name]
        print(
            f"{name:28}{r['mtok_per_s']:8.0f}{r['mtok_per_cpu_s']:11.0f}{r['first_mtok_per_cpu_s']:7.0f}"
            f"{r['ratio_to_memmap_cpu']:11.2f}{r['own_mib']:9.0f}{r['grown_mib']:6.1f}{r['peak_rss_mib']:8.0f}"
            f"{r['open_s']:8.2f}{resumes[0][1]:11.1f}"
        )
    results["arithmetic"] = arithmetic() | first_batch_of_many()
    print(results["arithmetic"])
    return results


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=float, default=100e6)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", default=["*"], help="contenders, shell patterns")
    parser.add_argument("--root", type=Path, help="keep the data here, for another run")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve, args.root)
        return
    with tempfile.TemporaryDirectory() as temporary:
        root = args.root or Path(temporary)
        root.mkdir(exist_ok=True)
        if not (root / "tokens.bin").exists():
            prepare(root, int(args.tokens))
        names = [name for name in CONTENDERS if any(fnmatch.fnmatch(name, only) for only in args.only)]
        load_before = os.getloadavg()[2]
        results = run(names, root, args.rounds)
        if args.out:
            loads = "; ".join(f"{load:.1f}" for load in (load_before, os.getloadavg()[2]))
            machine = (
                f"{os.cpu_count()} shared cores, load before and after {loads} (15 minutes), page cache "
                "warm, one process a contender"
            )
            args.out.write_text(
                json.dumps({"machine": machine, "tokens": args.tokens, **results}, indent=1) + "\n"
            )


if __name__ == "__main__":
    main()
