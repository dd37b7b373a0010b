"""The same weights give transformers' logits, losses and gradients, padded and packed (fp32, 1e-5)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megalite.convert import config_from_hf, config_to_hf, hf_names, weights_from_hf, weights_to_hf
from megalite.model.transformer import Transformer
from tests.model.references import (
    REFERENCES,
    assert_close,
    build_ours,
    build_reference,
    our_config,
    reference_gradients,
)

IGNORE = -100
SHAPES = [(3, 1), (2, 7), (2, 65), (1, 130), (1, 300)]


def _random_ids(shape: tuple[int, ...], vocab: int, seed: int = 0) -> Tensor:
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


def _check(
    reference: Any,
    ours: Transformer,
    labels: Tensor,
    expected: Tensor,
    tokens: Tensor,
    positions: Tensor | None = None,
    doc_starts: Tensor | None = None,
) -> None:
    """Compare logits and loss where labels are asked for, and the gradients of that loss."""
    valid = labels != IGNORE
    hidden = ours(tokens, positions, doc_starts)
    assert_close(ours.logits(hidden)[valid], expected[valid], "logits")
    loss = F.cross_entropy(expected[valid], labels[valid], reduction="sum")
    losses = ours.loss(tokens, labels, positions, doc_starts, chunk_bytes=20_000)
    assert_close(losses.total, loss, "loss", 1e-6)
    assert int(losses.tokens) == int(valid.sum())
    loss.backward()
    losses.total.backward()
    gradients = reference_gradients(reference, ours.config)
    assert gradients.keys() == dict(ours.named_parameters()).keys()
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None
        assert_close(parameter.grad, gradients[name], f"gradient of {name}")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", REFERENCES)
def test_logits_and_gradients(name: str, shape: tuple[int, int]) -> None:
    reference = build_reference(name)
    ours = build_ours(reference)
    tokens = _random_ids(shape, ours.config.vocab_size)
    labels = _random_ids(shape, ours.config.vocab_size, seed=1)
    _check(reference, ours, labels, reference(tokens).logits, tokens)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", REFERENCES)
def test_padded_batches(name: str, side: str) -> None:
    reference = build_reference(name, attention="eager")
    ours = build_ours(reference)
    seq, lengths = 83, torch.tensor([83, 1, 40])[:, None]
    place = torch.arange(seq).expand(3, seq)
    pad = seq - lengths if side == "left" else torch.zeros_like(lengths)
    valid = (place >= pad) & (place < pad + lengths)
    positions = (place - pad).clamp(min=0)
    tokens = _random_ids((3, seq), ours.config.vocab_size) * valid
    labels = _random_ids((3, seq), ours.config.vocab_size, seed=1).masked_fill(~valid, IGNORE)
    expected = reference(tokens, attention_mask=valid.long(), position_ids=positions).logits
    # A row's padding before its text is a document of its own.
    doc_starts = torch.where(place >= pad, pad, 0) if side == "left" else None
    _check(reference, ours, labels, expected, tokens, positions, doc_starts)


@pytest.mark.parametrize("name", REFERENCES)
def test_packed_documents_equal_documents_alone(name: str) -> None:
    reference = build_reference(name)
    ours = build_ours(reference)
    rows = [[1, 64, 5, 60], [30, 1, 1, 98], [130]]
    seq = 130
    tokens = _random_ids((len(rows), seq), ours.config.vocab_size)
    labels = _random_ids((len(rows), seq), ours.config.vocab_size, seed=1)
    expected = torch.empty(len(rows), seq, ours.config.vocab_size)
    doc_starts = torch.empty(len(rows), seq, dtype=torch.int32)
    for row, documents in enumerate(rows):
        start = 0
        for length in documents:
            part = slice(start, start + length)
            expected[row, part] = reference(tokens[row : row + 1, part]).logits[0]
            doc_starts[row, part] = start
            start += length
    positions = torch.arange(seq) - doc_starts.long()
    _check(reference, ours, labels, expected, tokens, positions, doc_starts)


@pytest.mark.parametrize("name", ["llama-gqa-tied", "gpt2"])
def test_mean_loss_equals_transformers_own(name: str) -> None:
    reference = build_reference(name)
    ours = build_ours(reference)
    tokens = _random_ids((2, 77), ours.config.vocab_size)
    theirs = tokens.masked_fill(torch.rand(tokens.shape) < 0.3, IGNORE)
    expected = reference(tokens, labels=theirs).loss  # shifts the labels itself
    labels = F.pad(theirs[:, 1:], (0, 1), value=IGNORE)
    losses = ours.loss(tokens, labels, chunk_bytes=20_000)
    assert_close(losses.total / losses.tokens, expected, "loss", 1e-6)


@pytest.mark.parametrize("name", REFERENCES)
def test_bf16_is_as_exact_as_transformers_in_bf16(name: str) -> None:
    reference = build_reference(name).bfloat16()
    ours = build_ours(reference).bfloat16()
    tokens = _random_ids((2, 65), ours.config.vocab_size)
    found, theirs = ours.logits(ours(tokens)), reference(tokens).logits
    exact = reference.float()(tokens).logits
    assert (found - exact).square().mean() <= 2 * (theirs - exact).square().mean()


@pytest.mark.parametrize("name", REFERENCES)
def test_names_and_configurations_round_trip(name: str) -> None:
    reference = build_reference(name)
    config = our_config(reference)
    assert config_from_hf(config_to_hf(config)) == config
    state = reference.state_dict()
    ours = dict(weights_from_hf(state.__getitem__, config))
    back = dict(weights_to_hf(ours.__getitem__, config))
    assert list(back) == hf_names(config)
    left_over = state.keys() - back.keys()
    assert left_over <= ({"lm_head.weight"} if config.tie_embeddings else set())
    for theirs, tensor in back.items():
        assert torch.equal(tensor, state[theirs])
        assert tensor.is_contiguous()
