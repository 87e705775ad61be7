"""EleutherAI's lm-evaluation-harness on the library's own models."""

# Its decorators hide the signatures of what they wrap.
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportAbstractUsage=false
# pyright: reportArgumentType=false, reportOptionalSubscript=false, reportTypedDictNotRequiredAccess=false

import contextlib
import logging
import os
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer

from sparsemix.config import ConfigError, nearest
from sparsemix.interop.hf import SparsemixForCausalLM, wrap_tokenizer
from sparsemix.model import LM


class HarnessLM(HFLM):
    """The harness's own Hugging Face backend around one of our models. A task that does not say how long an answer may
    be gets half the context at most: the backend's own 256 tokens may leave no room for the question."""

    def __init__(self, model: LM, tokenizer: Tokenizer, batch_size: int) -> None:
        seq_len = model.config.seq_len
        wrapped = wrap_tokenizer(tokenizer, seq_len)
        own = SparsemixForCausalLM.wrap(
            model,
            bos_token_id=wrapped.bos_token_id,
            eos_token_id=wrapped.eos_token_id,
            pad_token_id=wrapped.pad_token_id,
        )
        super().__init__(
            pretrained=own.eval(), backend="causal", tokenizer=wrapped, max_length=seq_len, batch_size=batch_size
        )

    @property
    def max_gen_toks(self) -> int:
        return min(256, max(1, self.max_length // 2))

    def _loglikelihood_tokens(self, requests: list[Any], *args: Any, **kwargs: Any) -> Any:
        self._check_room(max((len(answer) for _, _, answer in requests), default=0), self.max_length)
        return super()._loglikelihood_tokens(requests, *args, **kwargs)

    def generate_until(self, requests: list[Any], *args: Any, **kwargs: Any) -> Any:
        asked = (request.args[1].get("max_gen_toks", 0) for request in requests)
        # One token of the question must be left.
        self._check_room(max(asked, default=0), self.max_length - 1)
        return super().generate_until(requests, *args, **kwargs)

    def _check_room(self, longest: int, room: int) -> None:
        """Raises ConfigError for answers that the harness itself refuses without a word."""
        if longest > room:
            raise ConfigError(
                f"seq_len={self.max_length} has room for an answer of {room} tokens, and a task has one of {longest}; "
                "leave that task out, or train with a longer seq_len"
            )


def run_tasks(
    model: LM,
    tokenizer: Tokenizer,
    tasks: Sequence[str],
    include_path: Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
) -> dict[str, Any]:
    """The harness's results by task (groups included): each metric's value and standard error, the number of samples,
    the task's version and the examples shown before a question. Raises ConfigError for tasks that are not known or
    cannot be loaded."""
    # It tells of every default that it takes.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = _manager(tasks, include_path)
    backend = HarnessLM(model, tokenizer, max(1, min(64, 4096 // model.config.seq_len)))
    # Its pool for bootstrapped errors forks this process, whose other threads may hold locks: it can wait for ever.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    try:
        # Standard output holds the result alone.
        with contextlib.redirect_stdout(sys.stderr):
            found = simple_evaluate(
                backend,
                tasks=list(tasks),
                num_fewshot=num_fewshot,
                limit=limit,
                task_manager=manager,
                log_samples=False,
            )
    except ConfigError as error:
        raise ConfigError(f"tasks={','.join(tasks)}: {error}") from None
    # A task that cannot be had: its data set is not there, not reachable, or not what the task says.
    except (OSError, ValueError, KeyError, AssertionError) as error:
        said = " ".join(str(error).split())[:300] or type(error).__name__
        raise ConfigError(f"tasks={','.join(tasks)} cannot be run ({said}); check their data, or the network") from None
    return {name: _of_task(name, found) for name in found["results"]}


def _manager(tasks: Sequence[str], include_path: Path | None) -> Any:
    """Knows all the tasks. The harness's own are thousands of files, read only where one of them is named."""
    if include_path is not None and not include_path.is_dir():
        raise ConfigError(f"include_path={include_path} is no folder; name the folder that holds the tasks' YAML files")
    own = None if include_path is None else str(include_path)
    if own is not None:
        manager = TaskManager(include_path=own, include_defaults=False)
        if all(name in manager.all_tasks for name in tasks):
            return manager
    manager = TaskManager(include_path=own)
    for name in tasks:
        if name not in manager.all_tasks:
            near = nearest(name, manager.all_tasks)
            raise ConfigError(f"tasks={name} is no task of lm-evaluation-harness{near}; `lm_eval ls tasks` lists them")
    return manager


def _of_task(name: str, found: dict[str, Any]) -> dict[str, Any]:
    values = found["results"][name]
    metrics = {}
    for key, value in values.items():
        metric, comma, kind = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            error = values.get(f"{metric}_stderr,{kind}")
            called = metric if kind == "none" else f"{metric} ({kind})"
            metrics[called] = {"value": value, "error": error if isinstance(error, float) else None}
    return {
        "metrics": metrics,
        "samples": found["n-samples"].get(name, {}).get("effective"),
        "num_fewshot": found["n-shot"].get(name),
        "version": found["versions"].get(name),
        "harness": metadata.version("lm_eval"),
    }
