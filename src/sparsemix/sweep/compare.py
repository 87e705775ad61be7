"""The main job: every kind trained at the same FLOP budget on the same text, with several seeds."""

import re
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from math import inf, isfinite
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, model_validator

from sparsemix.config import Config, ConfigError, config_hash, to_yaml
from sparsemix.data import Shards, prepare
from sparsemix.data.shards import DataConfig
from sparsemix.errors import TrainingError
from sparsemix.run import Run, read_plan, refuse_foreign, write_plan
from sparsemix.settings import RunConfig
from sparsemix.sweep import rates
from sparsemix.sweep.arms import Arm, backbone, refuse_decided, refuse_unknown_kinds, run_config
from sparsemix.sweep.jobs import Job, measured, probe_job
from sparsemix.sweep.launch import Launcher
from sparsemix.sweep.phase import working
from sparsemix.sweep.rounds import train_all
from sparsemix.sweep.texts import data_config, evaluated_tokens, prepared, tell
from sparsemix.sweep.watch import Watch

# What a comparison decides itself, and the option that it decides it by.
DECIDED = {"train.budget_flops": "--budget", "train.lr": "--lr", "seed": "--seeds", "data.text": "--text"}


class CompareConfig(Config):
    """What to compare; a folder holds one comparison."""

    text: tuple[str, ...] = ("stdlib",)
    kinds: tuple[str, ...] = ("dense", "moe", "peer", "mh_moe", "mod")
    budget: str = "auto:6min"
    seeds: int = Field(default=3, ge=1)
    lr: str = "rule"
    placement: Literal["every", "every-2", "middle"] = "middle"
    recipe: str = "tiny"
    overrides: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _rules(self) -> "CompareConfig":
        self.rule(len(set(self.kinds)) == len(self.kinds) > 0, "kinds", "must name each kind once")
        refuse_unknown_kinds(self.kinds)
        self.rule("dense" in self.kinds, "kinds", "must hold dense, which the others are compared with")
        if self.lr not in ("rule", "sweep"):
            self.rule(0 < _number(self.lr) < inf, "lr", "must be a positive number, rule, or sweep")
        if self.seconds is None:
            known = 0 < _number(self.budget) < inf
            self.rule(known, "budget", "must be FLOPs (such as 1e13) or auto:TIME (such as auto:6min)")
        elif not self.seconds > 0:
            self.rule(False, "budget", "must give a time above 0 (such as auto:6min)")
        refuse_decided(self.overrides, DECIDED)
        return self

    @property
    def seconds(self) -> float | None:
        """The time that an automatic budget has to fit, or None for a budget in FLOPs."""
        found = re.fullmatch(r"auto:([0-9]{1,9}(?:\.[0-9]{1,9})?)(s|m|min|h)", self.budget)
        return float(found[1]) * {"s": 1, "m": 60, "min": 60, "h": 3600}[found[2]] if found else None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return -1.0


def kind_config(settings: CompareConfig, kind: str, data: DataConfig, budget: float) -> RunConfig:
    """The run that stands for `kind`: the recipe's dense backbone with that kind in its place, at equal FLOPs.

    `kind@ternary` is the same run with every matrix ternary that can be (model.precision), `mod+kind` staged MoDE."""
    raw = backbone(settings.recipe, settings.overrides)
    lr = None if settings.lr in ("rule", "sweep") else float(settings.lr)
    return run_config(Arm(kind, kind, placement=settings.placement), raw, data, budget, raw.get("seed", 0), lr)


class Comparison:
    """A comparison folder: plan.yaml (settings, fingerprint, budget), data/, one folder per run."""

    def __init__(
        self,
        settings: CompareConfig,
        out: Path,
        say: Callable[[str], None],
        launcher: Launcher,
        progress: AbstractContextManager[Callable[[str, int, int | None], None]] | None = None,
    ) -> None:
        """`say` gets lines to print, `progress`, entered meanwhile, the stages of data preparation; the launcher trains
        the runs."""
        self.settings, self.out, self.say, self.progress, self.launcher = settings, out, say, progress, launcher
        self.began = time.monotonic()

    def run(self, dry: bool = False) -> dict[str, list[tuple[RunConfig, Path]]]:
        """Everything, or what is left of it: data, budget, learning rates, runs. Kind -> its runs, by seed; those
        that diverged in training are in `diverged`. A `dry` one says its plan and ends with the text prepared: no runs,
        and a folder for any comparison of it.
        Raises ConfigError; an interrupt leaves a folder that the same call continues."""
        plan = self._check_folder()
        with working(self.out) as self.phase:
            return self._run(plan, dry)

    def _run(self, plan: dict[str, Any], dry: bool) -> dict[str, list[tuple[RunConfig, Path]]]:
        budget = plan.get("budget_flops") or (1e30 if self.settings.seconds else float(self.settings.budget))
        for kind in self.settings.kinds:
            _ = kind_config(self.settings, kind, self._data_config(), budget).steps
        self.phase("preparing the text")
        self.shards = self._prepare()
        with self.launcher:
            self.data = self._data_config().replace(fingerprint=self.shards.manifest["fingerprint"])
            if "budget_flops" not in plan:
                budget = self._fit_budget() if self.settings.seconds else budget
                plan = {"settings": self.settings.model_dump(mode="json"), "budget_flops": budget}
                if not dry:
                    write_plan(self.out, plan)
            self.budget = plan["budget_flops"]
            configs = {kind: kind_config(self.settings, kind, self.data, self.budget) for kind in self.settings.kinds}
            self._describe(configs)
            if dry:
                return {}
            self.lr_sweep = self._sweep(configs) if self.settings.lr == "sweep" else {}
            jobs = {
                kind: [self._job(kind, config.replace(seed=seed)) for seed in range(self.settings.seeds)]
                for kind, config in configs.items()
            }
            failed = self._train([job for several in jobs.values() for job in several], "training")
            # One that diverged is a result; where all did there is nothing to report.
            self.diverged = [f"{folder.name}: {error}" for folder, error in failed.items()]
            if len(failed) == len({job.folder for several in jobs.values() for job in several}):
                raise TrainingError("; ".join(self.diverged))
        return {kind: [(job.config, job.folder) for job in several] for kind, several in jobs.items()}

    def _data_config(self) -> DataConfig:
        return data_config(self.settings.recipe, self.settings.overrides, self.settings.text)

    def _check_folder(self) -> dict[str, Any]:
        path = self.out / "plan.yaml"
        if not path.is_file():
            refuse_foreign(self.out, "comparison")
            return {}
        plan = read_plan(self.out)
        if not isinstance(plan.get("budget_flops"), (int, float)):
            raise ConfigError(f"{path} holds no comparison's plan; choose another folder, or delete it to begin anew")
        now, there = self.settings.model_dump(mode="json"), plan.get("settings", {})
        differ = [f"{name}={there.get(name)} there, {now[name]} asked" for name in now if there.get(name) != now[name]]
        if differ:
            raise ConfigError(f"out={self.out} holds another comparison ({'; '.join(differ)}); choose another folder")
        return plan

    def _prepare(self) -> Shards:
        dense = kind_config(self.settings, "dense", self._data_config(), 1e30)
        # Its bar ends here: training has bars of its own.
        with self.progress or nullcontext() as told:
            shards = prepared(self.out, lambda: prepare(dense.data, self.out / "data", told), dense)
        tell(shards, self.settings.text, self.say)
        return shards

    def _describe(self, configs: dict[str, RunConfig]) -> None:
        dense = configs["dense"].model.cost()
        width = max(8, *map(len, configs))
        for kind, config in configs.items():
            cost = config.model.cost()
            self.say(
                f"{kind:>{width}}: {cost.params / 1e6:.2f} M parameters, {cost.flops / dense.flops:.3f} x dense FLOPs "
                f"per token, {config.steps} steps of {config.batch_size} x {config.model.seq_len} tokens"
            )
        self.say(f"budget: {self.budget:.3g} training FLOPs a run, {self.launcher.workers} runs at a time")
        runs = len(configs) * self.settings.seeds
        more = " and those that try learning rates" if self.settings.lr == "sweep" else ""
        seeds = f"{self.settings.seeds} seed{'s' if self.settings.seeds > 1 else ''} a kind"
        self.say(f"{runs} run{'s' if runs > 1 else ''} ({seeds}), {runs * self.budget:.3g} training FLOPs{more}")

    def _job(self, kind: str, config: RunConfig) -> Job:
        # Where rates are tried, the name says which one this run has; folders of earlier versions keep theirs.
        rate = f"-lr{config.train.lr:.3g}" if self.settings.lr == "sweep" else ""
        seed, name = config.seed, config_hash(config)
        plain = self.out / f"{kind}-{seed}-{name}"
        return Job(config, plain if plain.exists() else self.out / f"{kind}{rate}-{seed}-{name}", self.out / "data")

    def _train(self, jobs: Sequence[Job], title: str) -> dict[Path, BaseException]:
        """Run the unfinished jobs; the folders whose losses stopped being finite, with the error. Raises TrainingError
        where one failed otherwise."""
        self.phase(title)
        with Watch([job.folder for job in jobs], title, self.say) as watch:
            failed = train_all(jobs, self.launcher, watch, self.say)
        if lost := [f"{f.name}: {error}" for f, error in failed.items() if not isinstance(error, TrainingError)]:
            raise TrainingError(f"{'; '.join(lost)}; what was done is saved, and the same command resumes")
        return failed

    def _sweep(self, configs: dict[str, RunConfig]) -> dict[str, list[dict[str, float]]]:
        """What each kind reaches on validation by learning rate; `configs` get the best."""

        def losses(pairs: Sequence[tuple[str, float]]) -> list[float]:
            jobs = [self._job(kind, _with_rate(configs[kind], rate)) for kind, rate in pairs]
            failed = self._train(jobs, "learning rates")
            results = [None if job.folder in failed else Run(job.folder).result for job in jobs]
            found = [result["validation_bpb"] if result else inf for result in results]
            # What is not a number is not the least of numbers.
            return [loss if isfinite(loss) else inf for loss in found]

        found = rates.sweep({kind: config.train.lr for kind, config in configs.items()}, losses)
        width = max(8, *map(len, configs))
        for kind, tried in found.items():
            configs[kind] = _with_rate(configs[kind], rates.best(tried))
            self.say(f"{kind:>{width}}: learning rate {rates.described(tried)}")
        return {
            kind: [{"lr": rate, "validation_bpb": tried[rate]} for rate in sorted(tried)]
            for kind, tried in found.items()
        }

    def _fit_budget(self) -> float:
        """FLOPs per run with which the whole comparison ends in time, from 20 steps of every kind."""
        assert self.settings.seconds is not None
        configs = [kind_config(self.settings, kind, self.data, 1e30) for kind in self.settings.kinds]
        self.phase("measuring 20 steps of each kind")
        self.say("measuring 20 steps of each kind")
        found: dict[int, tuple[float, float]] = {}
        for i, outcome in self.launcher.map(
            probe_job, [(config, self.out / "data", 20) for config in configs], lambda: None
        ):
            found[i] = measured(outcome, self.settings.kinds[i])
        per_kind = self.settings.seeds + (2.5 if self.settings.lr == "sweep" else 0)
        fixed = per_flop = 0.0
        for i, config in enumerate(configs):
            step_s, token_s = found[i]
            fixed += per_kind * (evaluated_tokens(config, self.shards) * token_s + 16 * step_s)
            per_flop += per_kind * step_s / config.step_flops
        left = 0.85 * self.settings.seconds - (time.monotonic() - self.began) - fixed / self.launcher.workers
        budget = left * self.launcher.workers / per_flop
        smallest = max(config.step_flops for config in configs)
        if budget < 10 * smallest:
            raise ConfigError(
                f"budget={self.settings.budget} is too short here for 10 steps of every kind and seed; give more time, "
                "fewer seeds or kinds, or a smaller recipe"
            )
        return float(f"{budget:.2g}")


def _with_rate(config: RunConfig, rate: float) -> RunConfig:
    return config.replace(train=config.train.replace(lr=rate))


def settings_text(settings: CompareConfig) -> dict[str, str]:
    """The settings as name -> text, for reports."""
    return {name: str(value) for name, value in yaml.safe_load(to_yaml(settings)).items()}
