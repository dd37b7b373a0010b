"""What a user would write with torch alone, as the oracle of what no layout tells from another.

AdamW all but forgives a wrong factor on every gradient, and a fault that all layouts share shows in no
comparison of two of them. With an ε as large as the gradients, a clip that only some steps need, and labels
left out that are not as many in every step, it does.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megalite.checkpoint.store import open_checkpoint
from megalite.config import Config
from megalite.data.batch import Batch
from megalite.model.init import initial_values
from megalite.model.transformer import Transformer, dropout_keys
from megalite.optim.lr import learning_rate
from megalite.parallel.mesh import Mesh
from megalite.trainer import Trainer
from tests.trainer.runs import apart, curve, losses, tiny, train


def _inputs(read: Batch) -> Iterable[Tensor]:
    assert read.doc_starts is not None
    return map(torch.from_numpy, (read.tokens, read.labels, read.positions, read.doc_starts))


def _plainly(config: Config, trainer: Trainer) -> tuple[list[list[float]], float, Transformer]:
    """Loss, z-loss and norm of every step, the validation loss at the end, and the model."""
    model, optim, batch = Transformer(config.model), config.optim, config.train.global_batch_size
    for name, p in model.named_parameters():
        p.data = initial_values(config.model, config.seed, name, 0, p.numel()).view_as(p)
    decayed, others = ([p for p in model.parameters() if (p.dim() > 1) == decays] for decays in (True, False))
    groups = [
        {"params": decayed, "weight_decay": optim.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, betas=(optim.beta1, optim.beta2), eps=optim.eps)
    steps = []
    for step in range(config.train.steps):
        read = trainer.loader.batch(range(step * batch, (step + 1) * batch))
        keys = dropout_keys(config.seed, torch.from_numpy(read.sample_ids))
        found = model.loss(*_inputs(read), dropout_keys=keys, z_loss=config.train.z_loss)
        adamw.zero_grad()
        (found.total / found.tokens).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), optim.grad_clip)
        for group in adamw.param_groups:
            group["lr"] = learning_rate(optim, step, config.train.steps)
        adamw.step()
        z_loss = found.z_loss / found.tokens
        steps.append([float(value.detach()) for value in (found.total / found.tokens - z_loss, z_loss, norm)])
    assert trainer.validation is not None
    read = trainer.validation.batch(range(config.train.eval_samples))
    with torch.no_grad():
        found = model.loss(*_inputs(read))
    return steps, float(found.total / found.tokens), model


def test_a_run_is_that_of_a_plain_loop(root: Path, alone: Mesh) -> None:
    keys = ["train.steps=8", "train.z_loss=1e-2", "model.dropout=0.1"]
    keys += ["train.eval_every_steps=8", "train.eval_samples=6", "optim.grad_clip=0.6"]
    keys += ["optim.eps=1e-2", "optim.weight_decay=0.5", "optim.beta1=0.8", "optim.beta2=0.9"]
    config = tiny(root, *keys)
    records = train(alone, config)
    steps, val_loss, model = _plainly(config, Trainer(config, alone))
    norms = [norm for _, _, norm in steps]
    assert min(norms) < config.optim.grad_clip < max(norms)
    ours = [[record[key] for key in ("loss", "z_loss", "grad_norm")] for record in records]
    assert torch.tensor(ours).allclose(torch.tensor(steps), rtol=1e-5, atol=0)
    assert records[-1]["val_loss"] == pytest.approx(val_loss, rel=1e-5)
    found = open_checkpoint(root / "run")
    for name, p in model.named_parameters():
        torch.testing.assert_close(found.read("weight", name).view_as(p), p.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_run_does_not_depend_on_the_loss_scale(root: Path, alone: Mesh) -> None:
    common = ["train.steps=6", "train.precision=fp16", "optim.eps=1e-2", "optim.warmup_steps=0"]
    one, other = (
        curve(train(alone, tiny(root, *common, f"train.loss_scale={scale}", f"run_dir={root}/{scale}")))
        for scale in (64.0, 4096.0)
    )
    assert one[-1][0] < one[0][0]
    assert math.isclose(one[0][1], other[0][1], rel_tol=1e-3)
    assert apart(losses(one), losses(other)) < 2**-11
