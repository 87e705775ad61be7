"""torch.export of a whole model as transformers' class: one program for any batch and length, or one line that says
why there is none."""

import pytest
import torch
from hf_models import LENGTHS, hf_model, padded, sequences, settings
from torch.export import Dim, export

from sparsemix.interop.hf import SparsemixConfig, SparsemixForCausalLM
from tiny import V

pytestmark = pytest.mark.usefixtures("unchecked")


def exported(model, ids, **inputs):
    sizes = {0: Dim("B"), 1: Dim("T")}
    shapes = {"input_ids": sizes} | {name: sizes if torch.is_tensor(v) else None for name, v in inputs.items()}
    return export(model, (ids,), inputs, dynamic_shapes=shapes).module()


def test_an_exported_model_takes_padded_batches_of_any_length():
    model = hf_model("nested").requires_grad_(False)
    ids, mask = padded(sequences())
    program = exported(model, ids, attention_mask=mask)
    for several in (sequences(1), sequences(2)[:1], [sequences(3)[1]]):
        ids, mask = padded(several, "right")
        got, wanted = (run(ids, attention_mask=mask).logits[mask.bool()] for run in (program, model))
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-10)


def test_an_exported_model_keeps_packed_documents_apart():
    model = hf_model("dense").requires_grad_(False)
    program = exported(model, torch.zeros(2, 9, dtype=torch.long), position_ids=torch.arange(9).expand(2, 9))
    several = sequences()
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    got = program(torch.cat(several)[None], position_ids=positions).logits[0].split(LENGTHS)
    for ids, logits in zip(several, got, strict=True):
        torch.testing.assert_close(logits, model(ids[None]).logits[0], rtol=0, atol=1e-10)


def test_what_cannot_be_exported_says_so_in_one_line():
    ids = torch.randint(V, (2, 9))
    for name in ("mod", "expert_choice"):
        with pytest.raises(ValueError, match=r"^torch\.export: training takes a share of each row, .*; call eval\(\)"):
            exported(hf_model(name).train(), ids, labels=ids)
    with pytest.raises(ValueError, match=r"^use_cache=True: an exported program keeps no cache; leave it out"):
        exported(hf_model("dense"), ids, use_cache=True)
    program = exported(SparsemixForCausalLM(SparsemixConfig(settings=settings("peer"))).eval(), ids)
    with pytest.raises(RuntimeError, match=r"^query batch statistics were never observed: train first"):
        program(ids)
