"""The manifest: untrusted, so each of its values is checked before anything is opened by it."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace

import numpy as np
import pytest

from megalite.data.folder import LocalFolder
from megalite.data.manifest import Manifest, TokenizerInfo, dump_manifest, load_manifest
from megalite.data.shards import Dataset
from megalite.errors import DataError

from .datasets import edit_manifest, random_documents, write
from .hostile import packed


def test_what_is_written_is_read_back(tmp_path):
    folder = tmp_path / "d"
    write(folder, random_documents([50] * 9), batch_tokens=100, shard_bytes=1000, spans=[[]] * 9)
    manifest = load_manifest(LocalFolder(folder))
    assert dump_manifest(manifest) == (folder / "manifest.json").read_bytes()
    assert manifest.has_loss_mask
    assert len(manifest.shards) > 2
    assert (manifest.documents, manifest.tokens) == (9, 450)
    assert manifest.digest == load_manifest(LocalFolder(folder)).digest
    assert manifest.digest == replace(manifest, file_crc32=None).digest  # whether written here or read
    edit_manifest(folder, lambda content: content.update(empty_documents=1))
    assert manifest.digest != load_manifest(LocalFolder(folder)).digest


@pytest.mark.parametrize(
    "name", ["../secret.arrow", "/etc/passwd", "a/b.arrow", "..", ".hidden", "", "c:\\x", "x\0y", "ü.arrow"]
)
def test_no_path_leaves_the_folder(tmp_path, name):
    folder = tmp_path / "d"
    write(folder, random_documents([50]))
    shutil.copy(folder / "shard_00000.arrow", tmp_path / "secret.arrow")
    edit_manifest(folder, lambda content: content["shards"][0].update(file=name))
    with pytest.raises(DataError, match=r"shards\[0\]\.file is .*; expected a plain file name"):
        Dataset(folder)


@pytest.mark.parametrize("name", ["shard_00000.arrow", "tokenizer.json", "manifest.json"])
def test_no_link_is_followed(tmp_path, name):
    folder = tmp_path / "d"
    write(folder, random_documents([50]))
    (folder / name).rename(tmp_path / "outside")
    (folder / name).symlink_to(tmp_path / "outside")
    with pytest.raises(DataError, match=rf"{name} is a link; put the file itself"):
        Dataset(folder).block(0)


def test_a_pipe_is_not_a_shard(tmp_path):
    folder = tmp_path / "d"
    write(folder, random_documents([50]))
    (folder / "shard_00000.arrow").unlink()
    os.mkfifo(folder / "shard_00000.arrow")
    with pytest.raises(DataError, match="not a regular file"):
        Dataset(folder).block(0)


def _set(*path_and_value):
    *path, key, value = path_and_value

    def change(content):
        for part in path:
            content = content[part]
        content[key] = value

    return change


def _column(key, *values):
    return _set("shards", 0, "batches", key, packed(key, *values))


def _record_batches(places):
    """The dataset's one document as several record batches at these (offset, bytes)."""
    offsets, sizes = zip(*places, strict=True)
    ones = [1] * len(places)
    columns = {"offset": offsets, "bytes": sizes, "crc32": ones, "documents": ones, "tokens": ones}
    return _set("shards", 0, "batches", {key: packed(key, *values) for key, values in columns.items()})


def _list_twice(content):
    content["shards"] *= 2
    content.update(documents=2, tokens=100)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("format", "other"), 'format is "other"'),
        (_set("version", 1), "version is 1; this megalite reads version 3: build it again"),
        (_set("dtype", "uint32"), 'dtype is "uint32" but its parts make uint16'),
        (_set("tokens", 49), "tokens is 49 but its parts make 50"),
        (_set("documents", True), "documents is true"),
        (_set("version", True), "version is true"),
        (_set("compression", "lzma"), 'compression is "lzma"'),
        (_set("shards", {}), "shards is {}; expected a list"),
        (_set("shards", []), "documents is 1 but its parts make 0"),
        (_set("shards", 0, 7), "shards.0. is 7"),
        (_set("shards", 0, "bytes", -1), r"shards\[0\].bytes is -1"),
        (_set("shards", 0, "bytes", "9"), r"shards\[0\].bytes is \"9\""),
        (_column("tokens", 1, 2), "columns of lengths"),
        (_column("tokens", 2**31), "out of range"),
        (_set("shards", 0, "batches", "tokens", [50]), "tokens is a list of 1; expected a string"),
        (_set("shards", 0, "batches", "tokens", "MgAAA"), 'tokens is "MgAAA"; expected base64 of 4-byte'),
        (_set("shards", 0, "batches", "tokens", "Mg=="), 'tokens is "Mg=="; expected base64 of 4-byte'),
        (_set("shards", 0, "batches", "tokens", "MgAA\n=="), "expected base64"),
        (_set("shards", 0, "batches", "tokens", "MgAAé"), "expected base64"),
        (_column("bytes"), "columns of lengths"),
        (_column("offset", 2**53), "offset holds 9007199254740992; expected integers in"),
        (_column("offset", 2**64 - 1), "offset holds 18446744073709551615"),
        (_column("offset", 2**52), "leave the file's"),
        (_column("bytes", 0), "are empty"),
        (_record_batches([(8, 100), (107, 50)]), "overlap"),
        (_set("shards", 0, "arrow_bytes", 1), "but arrow_bytes=1; it is not compressed"),
        (_set("loss_mask", 1), "loss_mask is 1; expected true or false"),
        (_set("loss_mask", None), "loss_mask is null"),
        (_set("empty_documents", -1), "empty_documents is -1"),
        (_set("shards", 0, "file", "x" * 300), "expected a plain file name"),
        (_column("documents", 51), "out of range"),
        (_set("tokenizer", "vocab_size", 200), "eos_id=256 is not below vocab_size=200"),
        (_set("tokenizer", "kind", None), "tokenizer.kind is null; expected a string"),
        (_set("tokenizer", "fingerprint", "0" * 64), "not the tokenizer of this dataset"),
        (_set("tokenizer", "eos_id", 255), "not the tokenizer of this dataset"),
        (lambda content: content.pop("tokenizer"), "key tokenizer is missing"),
        (lambda content: content["shards"].append(content["shards"][0]), "but its parts make"),
        (_list_twice, "a shard file is listed twice"),
    ],
)
def test_manifest_is_checked(tmp_path, change, message):
    folder = tmp_path / "d"
    write(folder, random_documents([50]))
    edit_manifest(folder, change)
    with pytest.raises(DataError, match=message):
        Dataset(folder)


@pytest.mark.parametrize(("vocab_size", "dtype"), [(1 << 16, np.uint16), ((1 << 16) + 1, np.uint32)])
def test_tokens_are_stored_as_narrow_as_their_ids_allow(vocab_size, dtype):
    assert Manifest(TokenizerInfo("byte", "", vocab_size, 0), None, ()).dtype == dtype


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "[" * 100_000, '{"format": NaN}', "\0", "9" * 5000])
def test_manifest_that_is_no_manifest(tmp_path, text):
    folder = tmp_path / "d"
    write(folder, random_documents([50]))
    (folder / "manifest.json").write_text(text)
    with pytest.raises(DataError, match=r"manifest\.json"):
        Dataset(folder)


def test_edited_manifest_without_new_crc(tmp_path):
    folder = tmp_path / "d"
    write(folder, random_documents([50]))
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"vocab_size": 257', '"vocab_size": 258'))
    with pytest.raises(DataError, match="changed after it was written"):
        Dataset(folder)


@pytest.mark.parametrize("cut", [1, 2, 5, 10])
def test_a_manifest_cut_at_its_end(tmp_path, cut):
    folder = tmp_path / "d"
    write(folder, random_documents([50]))
    path = folder / "manifest.json"
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(DataError, match=r"manifest\.json"):
        Dataset(folder)
