"""A text continued by a trained model, told token by token: what `sparsemix generate` prints and draws."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from sparsemix import trained
from sparsemix.config import ConfigError
from sparsemix.data.detokenizer import Detokenizer
from sparsemix.data.tokenizer import encode_batch, end_of_text, start_ids
from sparsemix.evaluate.token_routing import routed_layers, token_routing
from sparsemix.generation import Sampling, Step, dense_cache_bytes, generate
from sparsemix.layers import Cache
from sparsemix.layers.mod import MoD
from sparsemix.report.numbers import percent, si


class Play:
    """One prompt, one text. With `routing`, every token is told once the model has read it, with its `blocks` and
    `layers` (evaluate/token_routing.py); without, as soon as it is drawn.

    Raises ConfigError: no model or tokenizer in the folder, no prompt, or one that fills the model's context."""

    def __init__(self, folder: Path, prompt: str, max_tokens: int, sampling: Sampling, routing: bool) -> None:
        self.folder, self.sampling, self.routing = folder, sampling, routing
        found = trained.load(folder)
        if found.tokenizer is None:
            raise ConfigError(f"{folder} holds no tokenizer; copy the tokenizer.json it was trained with into it")
        if not prompt:
            raise ConfigError("the prompt is empty; give --prompt some text to continue")
        self.model, self.tokenizer = found.model.eval(), found.tokenizer
        (encoded,) = encode_batch(self.tokenizer, [prompt])
        self.ids = [*start_ids(self.tokenizer), *encoded.tolist()]
        self.prompt_tokens, context = len(self.ids), self.model.config.seq_len
        if self.prompt_tokens >= context:
            raise ConfigError(
                f"the prompt has {self.prompt_tokens} tokens, its start included, and must be shorter than the model's "
                f"context, seq_len={context}; shorten it"
            )
        self.room = min(max_tokens, context - self.prompt_tokens)
        limit = f"max_tokens={max_tokens}" if self.room == max_tokens else f"the model's context, seq_len={context}"
        self.ended = limit
        self.pieces = Detokenizer(self.tokenizer)
        self.special = {i for i, token in self.tokenizer.get_added_tokens_decoder().items() if token.special}
        self.cache, self.told = Cache(1), list[dict[str, Any]]()
        self.routed = {name: 0 for name, module in self.model.named_modules() if isinstance(module, MoD)}
        self.tokens_read, self.steps, self.seconds = 0, 0, 0.0

    def tokens(self) -> Iterator[dict[str, Any]]:
        """Every token in the order of the text: `text` (what it completes), `name`, `id`, `prompt`, `logprob`."""
        if not self.routing:
            yield from (self._tell(token_id, None, {}) for token_id in self.ids)
        logprobs: list[float | None] = [None] * self.prompt_tokens
        stop = end_of_text(self.tokenizer)
        for step in self._timed(stop):
            self._count(step)
            for read in step.read if self.routing else ():
                ids = read.tokens[0].tolist()
                for token_id, said in zip(ids, token_routing(self.model, read.tokens, read.stats), strict=True):
                    yield self._tell(token_id, logprobs[len(self.told)], said)
            token_id = int(step.token_ids[0])
            if len(self.ids) - self.prompt_tokens == self.room:
                break
            if token_id == stop:
                self.ended = "the end of the text"
                break
            self.ids.append(token_id)
            logprobs.append(float(step.logprobs[0]))
            if not self.routing:
                yield self._tell(token_id, logprobs[-1], {})

    def rest(self) -> str:
        """Text that the last token left unfinished; it belongs to that token."""
        rest = self.pieces.rest()
        if self.told:
            self.told[-1]["text"] += rest
        return rest

    def _timed(self, stop: int) -> Iterator[Step]:
        device = self.model.embed.weight.device
        # The routing of the last token is known once it is read: one step more, whose token is not used.
        most, prompt = self.room + self.routing, torch.tensor([self.ids], device=device)
        steps = generate(self.model, prompt, most, self.sampling, [stop], cache=self.cache, picks=self.routing)
        for number in range(most):
            began = time.perf_counter()
            step = next(steps, None)
            if step is None:
                return
            if number:
                self.steps, self.seconds = self.steps + 1, self.seconds + time.perf_counter() - began
            yield step

    def _count(self, step: Step) -> None:
        for read in step.read:
            self.tokens_read += read.tokens.shape[1]
            for path in self.routed:
                # A layer inside one that took no token says nothing.
                if (mask := read.stats.get(f"{path}.routed")) is not None:
                    self.routed[path] += int(mask.sum())

    def _tell(self, token_id: int, logprob: float | None, said: dict[str, Any]) -> dict[str, Any]:
        prompt = len(self.told) < self.prompt_tokens
        name = self.tokenizer.id_to_token(token_id) if token_id in self.special else "part of a character"
        token = {"text": self.pieces.add(token_id), "name": name, "id": token_id, "prompt": prompt, "logprob": logprob}
        self.told.append(token | said)
        return self.told[-1]

    @property
    def written(self) -> int:
        """Tokens generated so far."""
        return len(self.ids) - self.prompt_tokens

    @property
    def tokens_per_s(self) -> float | None:
        """Steps a second once the prompt is read; None before there are any."""
        return self.steps / self.seconds if self.steps else None

    def summary(self) -> str:
        """Tokens, their rate, every routed layer's share of what was read, and what keys and values take."""
        speed = f", {si(self.tokens_per_s)} tokens/s" if self.tokens_per_s else ""
        shares = ", ".join(f"{path} {percent(count / max(1, self.tokens_read))}" for path, count in self.routed.items())
        routed = f"; routed: {shares}" if shares else ""
        held, dense = self.cache.bytes(), dense_cache_bytes(self.model, self.cache)
        kv = f"; keys and values {si(held, 'B')}, {percent(held / dense)} of a dense model's" if dense else ""
        return f"{self.written} tokens{speed}{routed}{kv}; ended by {self.ended}"

    @property
    def depths(self) -> tuple[int, int]:
        """The fewest blocks that can process a token, and the most."""
        return sum(not isinstance(block, MoD) for block in self.model.blocks), len(self.model.blocks)

    def record(self) -> dict[str, Any]:
        """What the page of this text is drawn from; numbers and text alone."""
        least, most = self.depths
        return {
            "run": self.folder.resolve().name,
            "settings": self.sampling.model_dump(),
            "least": least,
            "most": most,
            "layers": routed_layers(self.model),
            "tokens": self.told,
            "tokens_per_s": self.tokens_per_s,
            "kv_bytes": self.cache.bytes(),
            "kv_dense_bytes": dense_cache_bytes(self.model, self.cache),
            "ended": self.ended,
        }
