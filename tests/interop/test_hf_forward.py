"""What a call of the wrapped model means: losses, running state, padding, packing, recomputation, refusals."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hf_models import MODELS, hf_model, padded, sequences, settings
from torch.nn import functional as F

from sparsemix import build_model, update
from sparsemix.interop.hf import SparsemixConfig, SparsemixForCausalLM
from sparsemix.layers import Ctx
from tiny import BLOCKS, T, V

pytestmark = pytest.mark.usefixtures("unchecked")


def fresh(name, **changes):
    torch.manual_seed(0)
    return SparsemixForCausalLM(SparsemixConfig(settings=settings(name, **changes))).double().train()


def tokens(B=4, seed=1):
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(seed))


def assert_equal(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-11)


def test_a_new_model_is_the_library_model_of_torchs_seed():
    torch.manual_seed(3)
    model = SparsemixForCausalLM(SparsemixConfig(settings=settings("nested")))
    wanted = build_model(settings("nested"), seed=3).state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in model.model.state_dict().items())


@pytest.mark.parametrize("name", MODELS)
def test_the_training_loss_is_the_librarys_with_auxiliary_losses_once(name):
    model, ids = fresh(name), tokens()
    targets = F.pad(ids, (0, 1), value=-100)[:, 1:]
    wanted = model.model.loss(ids, targets, Ctx())
    total = wanted.mean + sum(wanted.aux.losses.values())
    out = model(ids, labels=ids)
    assert_equal(out.loss, total)
    assert out.logits is None
    assert (out.aux_loss is None) == (not wanted.aux.losses) == (name in ("dense", "peer", "threshold", "untied"))
    # With the next tokens as labels, and with logits asked for. A new model: a balance bias has moved in the other.
    model = fresh(name)
    logits = model.model(ids, Ctx()).logits
    other = model(ids, shift_labels=targets, skip_logits=False)
    assert_equal(other.loss, total)
    assert_equal(other.logits, logits)


def test_the_evaluation_loss_is_causal_cross_entropy_alone():
    model, ids = hf_model("nested"), tokens()
    out = model(ids, labels=ids)
    assert_equal(out.loss, F.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))
    assert_equal(out.logits, model(ids).logits)
    assert out.aux_loss.item() > 0


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_accumulation_adds_up_to_the_whole_batch(micro):
    """Rows of unequal numbers of labels; the mean of means would weigh them wrongly."""
    model, ids = fresh("dense"), tokens()
    labels = ids.clone()
    for b in range(4):
        labels[b, : 3 * b] = -100
    count = (labels[:, 1:] != -100).sum()
    whole = model(ids, labels=labels, num_items_in_batch=count).loss
    parts = zip(ids.chunk(micro), labels.chunk(micro), strict=True)
    assert_equal(sum(model(i, labels=label, num_items_in_batch=count).loss for i, label in parts), whole)
    assert_equal(whole, model(ids, labels=labels).loss)


def test_auxiliary_losses_count_by_their_share_of_the_tokens():
    model, ids = fresh("moe"), tokens()
    count = ids[:, 1:].numel()
    parts = [model(i, labels=i, num_items_in_batch=count) for i in ids.chunk(2)]
    cross_entropies = [model.model.loss(i, F.pad(i, (0, 1), value=-100)[:, 1:], Ctx()).mean for i in ids.chunk(2)]
    added = sum(out.loss for out in parts) - sum(cross_entropies) / 2
    assert_equal(added, sum(out.aux_loss for out in parts) / 2)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_reaches_no_loss(side):
    model, several = fresh("dense"), [s for s in sequences() if len(s) > 1]
    ids, mask = padded(several, side)
    # Labels that a careless collator leaves on padding.
    loss = model(ids, attention_mask=mask, labels=ids).loss
    alone = [model(s[None], labels=s[None]).loss * (len(s) - 1) for s in several]
    assert_equal(loss, sum(alone) / sum(len(s) - 1 for s in several))


def test_positions_that_start_anew_are_documents_of_their_own():
    model, several = hf_model("nested"), [s for s in sequences() if len(s) > 1]
    packed, positions = torch.cat(several)[None], torch.cat([torch.arange(len(s)) for s in several])[None]
    logits = model(packed, position_ids=positions).logits[0].split([len(s) for s in several])
    for got, sequence in zip(logits, several, strict=True):
        assert_equal(got, model(sequence[None]).logits[0])


def test_logits_are_kept_where_asked():
    model, ids = hf_model("mod"), tokens()
    logits = model(ids).logits
    assert_equal(model(ids, logits_to_keep=3).logits, logits[:, -3:])
    assert_equal(model(ids, logits_to_keep=torch.tensor([0, 5])).logits, logits[:, [0, 5]])


def test_router_logits_are_those_of_their_own_call():
    model, lengths = hf_model("nested"), [2 + i % 5 for i in range(12)]
    wanted = {n: model(tokens()[:1, :n], output_router_logits=True).router_logits for n in set(lengths)}
    inner = []

    # A call within a call, as threads make them, but always at the same moment.
    def call_again(*_):
        handle.remove()
        inner.extend(model(tokens()[:1, :3], output_router_logits=True).router_logits)

    handle = model.model.blocks[1].register_forward_hook(call_again)
    outer = model(tokens()[:1, :6], output_router_logits=True).router_logits
    with ThreadPoolExecutor(4) as pool:
        calls = pool.map(lambda n: model(tokens()[:1, :n], output_router_logits=True).router_logits, lengths)
        for n, got in [(6, outer), (3, tuple(inner)), *zip(lengths, calls, strict=True)]:
            assert len(got) == len(wanted[n]) == 3
            for scores, want in zip(got, wanted[n], strict=True):
                assert_equal(scores, want)


def test_router_logits_carry_gradients_and_are_those_of_the_first_pass_of_recomputed_blocks():
    model = fresh("nested")
    model._set_gradient_checkpointing(True)
    out = model(tokens(), labels=tokens(), output_router_logits=True)
    assert len(out.router_logits) == 3
    sum(scores.square().mean() for scores in out.router_logits).backward()
    for name, parameter in model.named_parameters():
        if name.endswith("router.weight"):
            assert parameter.grad is not None and parameter.grad.any(), name


def test_router_logits_and_hidden_states_come_on_request():
    model, ids = hf_model("nested"), tokens()
    out = model(ids, output_router_logits=True, output_hidden_states=True)
    # MoE, Mixture-of-Depths, expert choice.
    assert [tuple(scores.shape) for scores in out.router_logits] == [(4 * T, 4), (4 * T, 1), (4 * T, 4)]
    assert len(out.hidden_states) == 4
    assert_equal(out.hidden_states[0], model.model.embed(ids))
    assert_equal(F.linear(out.hidden_states[-1], model.model.embed.weight), out.logits)
    assert model(ids).router_logits is None
    assert isinstance(model(ids, return_dict=False), tuple)


def buffers(model):
    """As a look at the model from outside shows them."""
    names = {name for name, _ in model.named_buffers()}
    return {name.removeprefix("model."): t.clone() for name, t in model.state_dict().items() if name in names}


def steps(model, order, micro, batches=3, looks=False):
    """Plain loops in the orders people write; the running state after each step. `looks`: also within steps."""
    optimizer, seen = torch.optim.SGD(model.parameters(), 0.05), []
    for step in range(batches):
        if order == "clear first":
            optimizer.zero_grad()
        for part in tokens(4, seed=step).chunk(micro):
            loss = model(part, labels=part).loss / micro
            if order == "clear late":
                optimizer.zero_grad()
            loss.backward()
            if looks:
                buffers(model)
        optimizer.step()
        if order == "clear last":
            optimizer.zero_grad()
        seen.append(buffers(model))
    return seen


def by_hand(model, micro, batches=3):
    """As the library's own loop: the state moves once, after the step, by the mean of its micro-batches."""
    optimizer, seen = torch.optim.SGD(model.parameters(), 0.05), []
    for step in range(batches):
        total = {}
        for part in tokens(4, seed=step).chunk(micro):
            said = model.loss(part, F.pad(part, (0, 1), value=-100)[:, 1:], Ctx())
            ((said.mean + sum(said.aux.losses.values())) / micro).backward()
            total = {name: total.get(name, 0) + value / micro for name, value in said.aux.stats.items()}
        optimizer.step()
        optimizer.zero_grad()
        update(model, total)
        seen.append(buffers(model))
    return seen


STATEFUL = [*BLOCKS["nested_threshold"][:2], BLOCKS["nested"][1] | {"anneal_steps": 2}, BLOCKS["nested_threshold"][2]]


@pytest.mark.parametrize("order", ["clear first", "clear last"])
@pytest.mark.parametrize("micro", [1, 2])
def test_running_state_moves_once_a_step(order, micro):
    got = steps(fresh("own", blocks=STATEFUL), order, micro)
    wanted = by_hand(fresh("own", blocks=STATEFUL).model, micro)
    for mine, theirs in zip(got, wanted, strict=True):
        assert mine.keys() == theirs.keys()
        for name, buffer in mine.items():
            torch.testing.assert_close(buffer, theirs[name], rtol=0, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")
    assert {int(b) for name, b in got[-1].items() if name.endswith(("num_updates", "annealing.step"))} == {3}


def test_running_state_moves_once_a_step_where_gradients_are_cleared_between_the_passes():
    got = steps(fresh("own", blocks=STATEFUL), "clear late", 1)
    wanted = steps(fresh("own", blocks=STATEFUL), "clear last", 1)
    assert all(torch.equal(got[-1][name], wanted[-1][name]) for name in got[-1])


def test_a_look_within_a_step_changes_nothing():
    quiet, looked = (steps(fresh("own", blocks=STATEFUL), "clear last", 2, looks=looks) for looks in (False, True))
    assert all(torch.equal(got[name], quiet[step][name]) for step, got in enumerate(looked) for name in got)


def test_frozen_or_gradless_calls_move_nothing():
    model, ids = fresh("nested"), tokens()
    before = buffers(model)
    with torch.no_grad():
        model(ids, labels=ids)
    assert all(torch.equal(buffer, before[name]) for name, buffer in buffers(model).items())
    # Observed once, evaluation leaves it there.
    model(ids, labels=ids)
    before = buffers(model)
    model.eval()(ids, labels=ids)
    assert all(torch.equal(buffer, before[name]) for name, buffer in buffers(model).items())


def checkpointing(model, **settings):
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(settings) if settings else enable()


@pytest.mark.parametrize("name", ["nested", "mod_mode"])
def test_recomputed_blocks_give_the_same_gradients_and_state(name):
    models = [fresh(name), fresh(name)]
    checkpointing(models[1])
    for model in models:
        torch.manual_seed(1)
        model(tokens(), labels=tokens()).loss.backward()
    for (key, wanted), got in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert (wanted.grad is None and got.grad is None) or torch.equal(wanted.grad, got.grad), key
    assert all(torch.equal(a, b) for a, b in zip(*(buffers(m).values() for m in models), strict=True))
    with pytest.raises(ValueError, match="needs use_reentrant=False"):
        checkpointing(models[1], use_reentrant=True)


def test_what_is_not_supported_is_refused():
    model, ids = hf_model("mod"), tokens()
    for told, call in {
        "pass input_ids": {"inputs_embeds": torch.zeros(1, 2, 16)},
        "attention weights are never formed": {"input_ids": ids, "output_attentions": True},
        r"shape \(4, 1, 16, 16\) must be \(4, 16\)": {"input_ids": ids, "attention_mask": torch.ones(4, 1, T, T)},
        r"shape \(4, 9\) must be \(4, 16\)": {"input_ids": ids, "attention_mask": torch.ones(4, 9)},
        "leave one of them out": {"input_ids": ids, "labels": ids, "past_key_values": model(ids).past_key_values},
    }.items():
        with pytest.raises(ValueError, match=told):
            model(**call)
    with pytest.raises(ValueError, match=r"^assistant_early_exit=1 needs a head after every block, .*; leave it out"):
        model.generate(ids, assistant_early_exit=1, max_new_tokens=2)


@pytest.mark.parametrize("name", ["peer", "pkm", "threshold"])
def test_a_training_call_without_labels_is_named_as_the_cause(name):
    model = fresh(name)
    with pytest.raises(RuntimeError, match=r"never observed: a training call without labels.*: pass labels"):
        model(tokens())
    with pytest.raises(RuntimeError, match="never observed: train first"):
        model.eval()(tokens())
    model.train()(tokens(), labels=tokens())
    assert model(tokens()).logits.isfinite().all()


@pytest.mark.parametrize("name", ["moe", "untied"])
def test_a_resized_vocabulary_is_one_everywhere(name, tmp_path):
    model, ids = hf_model(name), tokens()
    wanted = model(ids).logits
    model.resize_token_embeddings(V + 7, mean_resizing=False)
    assert model.config.vocab_size == model.model.config.vocab_size == V + 7
    assert_equal(model(ids).logits[..., :V], wanted)
    model.save_pretrained(tmp_path)
    assert SparsemixForCausalLM.from_pretrained(tmp_path)(ids).logits.shape[-1] == V + 7
