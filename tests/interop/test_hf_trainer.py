"""transformers' own Trainer trains the models; it needs accelerate."""

import pytest
import torch
from hf_models import settings
from transformers import Trainer, TrainingArguments

from sparsemix.interop.hf import SparsemixConfig, SparsemixForCausalLM
from tiny import BLOCKS, T, V

pytestmark = pytest.mark.usefixtures("unchecked")

pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate: pip install sparsemix[hf]")
# Its name before transformers 5.24.
NEW = "activation_checkpointing" in TrainingArguments.__dataclass_fields__
CHECKPOINTING = "activation_checkpointing" if NEW else "gradient_checkpointing"
STATEFUL = [*BLOCKS["nested_threshold"][:2], BLOCKS["nested"][1] | {"anneal_steps": 6}, BLOCKS["nested_threshold"][2]]


def rows():
    """Counting by threes: what comes next is learnt in a few steps."""
    counts = [(torch.arange(T) * 3 + start) % V for start in range(40)]
    return [{"input_ids": count, "labels": count} for count in counts]


def trained(folder, steps, blocks, resume=None, accumulation=1, batch=4, **arguments):
    torch.manual_seed(0)
    model = SparsemixForCausalLM(SparsemixConfig(settings=settings("own", blocks=blocks)))
    told = {
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulation,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "constant",
        "save_steps": 5,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "seed": 3,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
    }
    told |= {"max_steps": steps} | arguments
    trainer = Trainer(model, TrainingArguments(str(folder), **told), train_dataset=rows())
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def losses(trainer):
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def test_ten_steps_are_five_and_five_after_a_resume(tmp_path):
    whole = trained(tmp_path / "a", 10, STATEFUL, accumulation=2, batch=2)
    trained(tmp_path / "b", 5, STATEFUL, accumulation=2, batch=2)
    checkpoint = str(tmp_path / "b" / "checkpoint-5")
    resumed = trained(tmp_path / "b", 10, STATEFUL, resume=checkpoint, accumulation=2, batch=2)
    wanted = whole.model.state_dict()
    for name, tensor in resumed.model.state_dict().items():
        assert torch.equal(tensor, wanted[name]), name
    counted = [int(t) for name, t in wanted.items() if name.endswith(("num_updates", "annealing.step"))]
    assert set(counted) == {10} and len(counted) == 5
    assert losses(whole)[-1] < losses(whole)[0] - 0.1


def test_accumulation_takes_the_same_steps(tmp_path):
    dense = BLOCKS["dense"]
    one, four = (trained(tmp_path / str(n), 4, dense, accumulation=n, batch=8 // n) for n in (1, 4))
    for (name, wanted), got in zip(one.model.named_parameters(), four.model.parameters(), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    torch.testing.assert_close(losses(four), losses(one), rtol=0, atol=2e-4)


def test_the_evaluation_is_the_causal_cross_entropy(tmp_path):
    trainer = trained(tmp_path, 2, STATEFUL, per_device_eval_batch_size=8)
    told = trainer.evaluate(rows()[:16])["eval_loss"]
    model, ids = trainer.model.eval(), torch.stack([row["input_ids"] for row in rows()[:16]])
    with torch.no_grad():
        assert told == pytest.approx(model(ids, labels=ids).loss.item(), rel=1e-5)
    # Logits are gathered, and neither caches nor auxiliary losses with them.
    assert trainer.predict(rows()[:16]).predictions.shape == (16, T, V)


def test_recomputed_blocks_end_with_the_same_bits(tmp_path):
    kept = trained(tmp_path / "a", 2, STATEFUL).model.state_dict()
    again = trained(tmp_path / "b", 2, STATEFUL, **{CHECKPOINTING: True}).model.state_dict()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in again.items())
