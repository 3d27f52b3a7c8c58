"""Every setting of a run, once: a frozen dataclass for each table of a recipe."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Scalar = str | int | float | bool

ADAPTERS = ("lora", "ffa", "fed-sb", "ravan", "hydra", "dora", "ia3", "prompt")
STRATEGIES = (
    "average",
    "fedit",
    "ffa",
    "rolora",
    "fed-sb",
    "ravan",
    "fedsa",
    "flora",
    "fedex",
    "flexlora",
    "florist",
    "raflora",
    "hetlora",
    "lora-fair",
    "fedrot",
    "fedsvd",
    "fedask",
)
TRACKERS = ("tensorboard", "mlflow", "wandb")
#: Settings that name files and folders of the machine that runs it.
PATHS = ("run.dir", "run.resume", "data.path", "model.path", "adapter.basis_path", "adapter.init")
DEFAULT_MODEL = "smollm2-135m-instruct"
SERVER_OPTIMIZERS = ("fedavgm", "fedadam", "fedyogi", "fedadagrad", "nesterov", "fedhyper")


def setting(
    default: Scalar,
    help: str,
    *,
    choices: tuple[str, ...] = (),
    minimum: float = -math.inf,
    maximum: float = math.inf,
) -> Any:
    """Declare a setting with its default, its help line and the values it allows."""
    return field(
        default=default,
        metadata={"help": help, "choices": choices, "minimum": minimum, "maximum": maximum},
    )


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Where a run lives and what makes it reproducible."""

    dir: str = setting("", "the run folder; empty: a new one under $FEDLLM_HOME/runs")
    resume: str = setting("", "continue the run in this folder at its next round")
    seed: int = setting(42, "seed of partition, adapter and batches (never of privacy noise)", minimum=0)
    tracking: str = setting(
        "", "also show rounds in these, separated by commas: tensorboard, mlflow, wandb; empty: none"
    )


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The base model, identical at every site."""

    name: str = setting(DEFAULT_MODEL, "an embedded model (fedllm models ls) or a Hugging Face name")
    path: str = setting("", "a folder with config.json, weights and tokenizer (air-gapped machines)")
    kind: str = setting(
        "causal",
        "causal: a language model; encoder: sequence classification with a trained head",
        choices=("causal", "encoder"),
    )
    pooling: str = setting(
        "model",
        "what an encoder's head reads; model: what its class gives it; mean: the mean of its tokens' states",
        choices=("model", "mean"),
    )
    dtype: str = setting(
        "auto",
        "number format of the base; auto: bfloat16 where the processor computes in it, else float32",
        choices=("auto", "bfloat16", "float32"),
    )
    quantization: str = setting("none", "bitsandbytes quantisation", choices=("none", "8bit", "4bit"))

    @property
    def called(self) -> str:
        """Return what the base is called: its name, or its folder's where ``path`` alone is given."""
        # a folder's config.json may name another model, the one that this one was fine-tuned from
        unnamed = self.path and self.name == DEFAULT_MODEL
        return Path(self.path).expanduser().resolve().name if unnamed else self.name


@dataclass(frozen=True, kw_only=True)
class AdapterSettings:
    """How the weight change is parametrised."""

    method: str = setting("fed-sb", "adapter method", choices=ADAPTERS)
    rank: int = setting(16, "rank r of every adapted matrix; prompt: number of virtual tokens", minimum=1)
    site_ranks: str = setting(
        "", "ranks of the simulated sites in turn, such as 16,8,4; empty: adapter.rank at every site"
    )
    alpha: float = setting(0.0, "the update is scaled by alpha/rank; 0 means alpha = rank", minimum=0)
    rslora: bool = setting(False, "rank-stabilised scaling: alpha/sqrt(rank); needs an alpha")
    heads: int = setting(4, "heads of ravan; each has rank adapter.rank", minimum=1)
    dropout: float = setting(0.0, "dropout on the adapter's input while training", minimum=0, maximum=0.9)
    targets: str = setting("all-linear", "all-linear, or module names separated by commas")
    layers: str = setting("", "adapt only these layers, such as 15-29 or 0,1,2; empty: all")
    basis: str = setting(
        "seeded",
        "where Fed-SB's frozen B and A come from: an 8-byte seed, the base weights' SVD, or one site's "
        "first gradients on public, private (not in private runs), or privately noised records",
        choices=("seeded", "public-svd", "public-gradient", "gradient", "dp-gradient"),
    )
    basis_path: str = setting("", "file of public records for basis=public-gradient (not at real sites)")
    basis_records: int = setting(64, "records (dp-gradient: expected number) for a gradient basis", minimum=1)
    basis_noise: float = setting(1.0, "noise multiplier of basis=dp-gradient", minimum=0.1)
    allow_private_basis: bool = setting(
        False, "yes, basis=gradient publishes singular vectors of private records' gradients"
    )
    init: str = setting("", "go on from this finished adapter folder (run/adapter)")


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Which records, how they become prompts, and how simulated sites share them."""

    source: str = setting("icd10", "icd10, mcc, file or hub", choices=("icd10", "mcc", "file", "hub"))
    path: str = setting("", "csv, jsonl or parquet file (source=file; local and simulated runs only)")
    name: str = setting("", "Hugging Face data set name (source=hub)")
    subset: str = setting("", "configuration of the Hugging Face data set, where it has several")
    split: str = setting("train", "split of the Hugging Face data set")
    text: str = setting("text", "column with the input text")
    pair: str = setting("", "column with a second input text, such as a hypothesis or a context")
    label: str = setting("label", "column with the answer (a label or a text); dpo: the preferred answer")
    rejected: str = setting("", "column with the answer that is not preferred (train.objective=dpo)")
    labels: str = setting("", "all label texts separated by |; empty: those found in the records")
    task: str = setting(
        "classify",
        "classify: score the labels; choose: the letters of each record's own options; generate: free text",
        choices=("classify", "choose", "generate"),
    )
    options: str = setting(
        "",
        "choose: column of lists (in text separated by |), or one column an option, separated by commas",
    )
    answers: str = setting(
        "letter",
        "choose: what data.label holds: a letter, an index (from 0), a number (from 1) or the option's text",
        choices=("letter", "index", "number", "text"),
    )
    site: str = setting("", "column that names a record's site (partition=column)")
    unit: str = setting("", "column of the privacy unit, such as patient or customer; empty: the record")
    instruction: str = setting("", "system message put before every record; empty: the source's own")
    prompt: str = setting(
        "{text}",
        "user message; {text} and {pair} stand for the record's texts, {options} for its lettered options "
        "(left out: they follow on lines of their own)",
    )
    max_per_label: int = setting(0, "keep at most this many records of a label; 0: all", minimum=0)
    min_per_label: int = setting(0, "drop labels with fewer records than this", minimum=0)
    partition: str = setting(
        "iid",
        "how simulated sites share the records, or the units where data.unit is set",
        choices=("iid", "dirichlet", "column"),
    )
    dirichlet_alpha: float = setting(0.5, "concentration of the label mix over sites", minimum=1e-3)
    heldout: float = setting(0.1, "share of each site's records kept for evaluation", minimum=0, maximum=0.9)
    heldout_public: bool = setting(
        False, "the held-out records are public: a private run may show metrics on them"
    )

    @property
    def labelled(self) -> bool:
        """Return whether answers are scored among given ones, labels or letters; nothing is written."""
        return self.task != "generate"


@dataclass(frozen=True, kw_only=True)
class FederationSettings:
    """Who takes part and how long anybody waits."""

    mode: str = setting(
        "federated",
        "federated; or a baseline: base (no training), local (each site alone, in every round), central "
        "(pooled records, with the steps of all sites that a round asks)",
        choices=("federated", "base", "local", "central"),
    )
    sites: int = setting(4, "number of sites", minimum=1)
    rounds: int = setting(5, "number of rounds", minimum=1)
    sites_per_round: int = setting(
        0,
        "sites that train in a round, drawn anew for each; 0: all (mode=local: all in any case)",
        minimum=0,
    )
    quorum: int = setting(
        0, "valid replies a round needs; 0: half of the sites that train in it, rounded up", minimum=0
    )
    deadline: float = setting(1800.0, "seconds a round waits for replies", minimum=1)
    join_wait: float = setting(60.0, "seconds to wait for all sites before starting with a quorum", minimum=0)
    parallel: int = setting(0, "sites simulated at once, one core each; 0: as many as cores", minimum=0)

    @property
    def drawn(self) -> int:
        """Return how many sites of the federation train in a round."""
        return self.sites_per_round or self.sites

    @property
    def asked(self) -> int:
        """Return how many sites train in a round of the run's mode."""
        # the central baseline trains once, on the pooled records; sites that train alone all go on
        return {"central": 1, "local": self.sites}.get(self.mode, self.drawn)

    @property
    def needed(self) -> int:
        """Return the valid replies a round needs."""
        if self.mode == "central":
            return 1
        return self.quorum or (self.asked + 1) // 2


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Local training of one round at one site."""

    objective: str = setting(
        "sft",
        "sft: the answer's likelihood; dpo: direct preference optimisation on pairs of answers",
        choices=("sft", "dpo"),
    )
    dpo_beta: float = setting(0.1, "dpo: how strongly the base holds the model back", minimum=1e-6)
    lr: float = setting(1e-2, "peak learning rate", minimum=0)
    optimizer: str = setting(
        "adamw",
        "adamw, plain sgd, or adam-bc: Adam with the noise's share of the second moment taken off",
        choices=("adamw", "sgd", "adam-bc"),
    )
    batch_size: int = setting(16, "records a step (expected number in private runs)", minimum=1)
    local_steps: int = setting(8, "optimiser steps a round", minimum=1)
    accumulation: int = setting(1, "batches summed before one optimiser step", minimum=1)
    micro_batch: int = setting(
        16, "records in one forward pass (dpo: two rows each); bounds memory", minimum=1
    )
    gradient_checkpointing: bool = setting(
        False,
        "compute layers again in the backward pass: less memory, more time",
    )
    max_length: int = setting(128, "tokens of prompt and answer; longer prompts lose their end", minimum=8)
    schedule: str = setting("cosine", "learning rate over the whole run", choices=("cosine", "constant"))
    warmup: float = setting(0.0, "share of all steps spent warming up", minimum=0, maximum=1)
    weight_decay: float = setting(0.0, "decoupled weight decay", minimum=0)
    fedhyper: str = setting(
        "none",
        "FedHyper's client-side learning rate, by cosines or by the paper's inner products",
        choices=("none", "cosine", "paper"),
    )
    threads: int = setting(0, "torch threads of a site; 0: its share of the cores", minimum=0)

    @property
    def beta(self) -> float | None:
        """Return DPO's beta, None where answers are learnt as they stand."""
        return self.dpo_beta if self.objective == "dpo" else None


@dataclass(frozen=True, kw_only=True)
class PrivacySettings:
    """Record-level differential privacy of what a site releases."""

    enabled: bool = setting(False, "train with DP-SGD")
    epsilon: float = setting(
        0.0, "budget over all rounds; give this or noise_multiplier", minimum=0, maximum=100
    )
    delta: float = setting(1e-5, "must be below 1/n at every site", minimum=0, maximum=1)
    clipping_norm: float = setting(
        1.0, "largest norm of one record's (or unit's) gradient", minimum=1e-9, maximum=1e9
    )
    noise_multiplier: float = setting(0.0, "noise deviation over clipping norm", minimum=0)
    relation: str = setting(
        "add-or-remove-one",
        "which data sets are neighbours; epsilon says how alike their outcomes are",
        choices=("add-or-remove-one", "zero-out-one", "replace-one"),
    )
    batch_cap: bool = setting(
        False, "bound batches where a draw exceeds the bound with probability delta/1000 (zero-out-one only)"
    )
    noise: str = setting(
        "gaussian",
        "discrete-gaussian: sum and noise are integers on a fine grid, against floating-point attacks",
        choices=("gaussian", "discrete-gaussian"),
    )
    engine: str = setting(
        "own", "what computes per-example gradients: own, or Opacus' hooks", choices=("own", "opacus")
    )
    adam_floor: float = setting(
        0.1, "adam-bc: least second moment, as a share of the noise's variance", minimum=1e-6
    )


@dataclass(frozen=True, kw_only=True)
class SitePrivacySettings:
    """Differential privacy of whole sites; a second, separate promise."""

    enabled: bool = setting(False, "clip each site's change and add noise to their mean")
    epsilon: float = setting(
        0.0, "budget over all rounds; give this or noise_multiplier", minimum=0, maximum=100
    )
    delta: float = setting(1e-5, "for whole sites", minimum=0, maximum=1)
    noise_multiplier: float = setting(0.0, "noise deviation over clipping norm", minimum=0)
    clipping_norm: float = setting(
        1.0, "largest norm of a site's change in a round", minimum=1e-9, maximum=1e9
    )
    quantile: float = setting(
        0.0, "adapt the clipping norm to this quantile of the changes' norms; 0: fixed", minimum=0, maximum=1
    )
    rate: float = setting(0.2, "how fast the clipping norm adapts", minimum=0)
    noise_at: str = setting(
        "coordinator",
        "who clips and adds the noise: the coordinator, or every site its share of it before it sends",
        choices=("coordinator", "sites"),
    )

    @property
    def at_sites(self) -> bool:
        """Return whether every site hides its own change before it sends it."""
        return self.enabled and self.noise_at == "sites"


@dataclass(frozen=True, kw_only=True)
class StrategySettings:
    """What the server does with the replies."""

    name: str = setting(
        "average", "aggregation rule: average, or a paper's method (fedllm methods)", choices=STRATEGIES
    )
    weighting: str = setting("uniform", "weight of a site in the mean", choices=("uniform", "examples"))
    server_optimizer: str = setting(
        "none", "what the server does with the mean change", choices=("none", *SERVER_OPTIMIZERS)
    )
    server_lr: float = setting(0.0, "learning rate of the server optimiser; 0: the method's own", minimum=0)
    server_form: str = setting(
        "cosine", "fedhyper on cosines or on the paper's raw inner products", choices=("cosine", "paper")
    )
    residual_cap: int = setting(
        256,
        "fedex, flora, florist: largest rank of what is folded into the base before it is recompressed",
        minimum=1,
    )
    energy: float = setting(
        0.99, "florist: share of the squared singular values kept", minimum=0.01, maximum=1
    )
    softness: float = setting(0.0, "fedrot: 0 aligns fully, 1 not at all", minimum=0, maximum=1)
    oversampling: int = setting(8, "fedask: columns of the sketch beyond the rank", minimum=0)
    diagnostics: bool = setting(True, "log aggregation error, rank energy and cosines of every round")


@dataclass(frozen=True, kw_only=True)
class WireSettings:
    """How adapter matrices become bytes."""

    codec: str = setting(
        "float32", "what sites send: float32, float16, bfloat16, int8, int4, topk:SHARE or topk:SHARE+int8"
    )
    codec_down: str = setting("float32", "what sites get, in the same terms")
    error_feedback: bool = setting(
        True, "a site adds to its next update what the codec left out of its last (rules of means and fedit)"
    )


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """What is measured on held-out records."""

    every: int = setting(
        1, "evaluate the received adapter every so many rounds; 0: only at the end", minimum=0
    )
    records: int = setting(0, "held-out records a site scores in a round; 0: all", minimum=0)
    final_records: int = setting(0, "held-out records scored for the final table; 0: all", minimum=0)
    batch_size: int = setting(8, "held-out records in one forward pass", minimum=1)
    fold: str = setting(
        "test", "which half of the held-out records is scored", choices=("test", "validation")
    )
    noise_multiplier: float = setting(
        0.0,
        "private runs: noise on the counts of right answers to private held-out records, relative to what "
        "one record changes; 0: nothing measured on them leaves",
        minimum=0.0,
    )
    generate: bool = setting(
        False, "free text: also write an answer to each held-out record and compare it with the reference"
    )
    max_new_tokens: int = setting(64, "longest written answer, in tokens", minimum=1)
    extract: str = setting(
        "none",
        "what has to match exactly: the whole answer, or number: the one after ####, else the last one",
        choices=("none", "number"),
    )
