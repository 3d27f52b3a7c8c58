"""Use a finished run's adapter: write it as PEFT knows it, and try it beside its untuned base."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from fedllm.adapters import METHODS
from fedllm.adapters.export import load_state, require_loadable, save_with_base
from fedllm.adapters.layers import drop_empty_biases
from fedllm.aggregation import make_rule
from fedllm.data.encode import PromptEncoder
from fedllm.data.sources import default_instruction, public_labels
from fedllm.errors import ConfigError, RunError
from fedllm.evaluation.generation import end_tokens, greedy_tokens
from fedllm.federation.cards import run_card
from fedllm.models.gguf_file import QUANTIZATIONS, require_llama, write_gguf
from fedllm.models.load import load_base, load_tokenizer
from fedllm.models.load import load_config as load_model_config
from fedllm.models.quiet import quiet
from fedllm.runs.events import read_events
from fedllm.runs.folder import RunFolder, load_config, open_run, written_whole
from fedllm.runs.manifest import settings_of
from fedllm.settings import DataSettings


def export_adapter(folder: Path, target: Path, *, site: str = "") -> Path:
    """Write a finished run's adapter as a PEFT folder with a model card.

    Parameters
    ----------
    target : Path
        A new folder, or an empty one; it is whole, or as it was.
    site : str
        A simulated site whose personal adapter is meant (fedsa, local).

    Raises
    ------
    RunError
        If the run has no such adapter, or the target exists, is in the run folder or cannot be written.
    ModelError
        If the base is needed and cannot be loaded.
    """
    run = open_run(folder)
    _require_free(target, run)
    with written_whole(target) as fresh:
        write_adapter(folder, fresh, site=site)
        run_card(run, fresh, site=site)
    return target


def write_adapter(folder: Path, target: Path, *, site: str = "") -> Path:
    """Write a finished run's adapter as a PEFT folder; Hydra's and DoRA's read the base for it.

    Parameters
    ----------
    site : str
        A simulated site whose personal adapter is meant (fedsa, local).

    Raises
    ------
    RunError
        If the run has no such adapter, it is damaged, or the target cannot be written.
    ModelError
        If the base is needed and cannot be loaded.
    """
    run = open_run(folder)
    config, source = settings_of(run), _adapter_dir(run, site)
    if METHODS[config.adapter.method].export != "base":
        require_loadable(source)
        try:
            target.mkdir(parents=True, exist_ok=True)
            for file in source.iterdir():
                (target / file.name).write_bytes(file.read_bytes())
        except OSError as error:
            raise RunError(f"{target}: the adapter could not be copied ({error.strerror}).") from None
        return target
    state, _ = load_state(source)
    labels = max((out for out, _ in state.spec.head.values()), default=0)
    base = load_base(config.model, labels=labels)
    save_with_base(state, base, target, base_model=config.model.called)
    return target


def export_merged(folder: Path, target: Path, *, site: str = "") -> Path:
    """Write the base with a finished run's adapter merged into it: a model that needs no PEFT.

    Raises
    ------
    ConfigError
        From :func:`merged_model`.
    RunError
        If the run has no such adapter, or the target exists, is in the run folder or cannot be written.
    ModelError
        If the base cannot be loaded.
    """
    run = open_run(folder)
    config = settings_of(run)
    _require_free(target, run)
    with written_whole(target) as fresh:
        merged_model(folder, site=site).save_pretrained(fresh)
        load_tokenizer(config.model).save_pretrained(fresh)
        run_card(run, fresh, form="merged", site=site)
    return target


def export_gguf(folder: Path, target: Path, *, quantization: str = "f16", site: str = "") -> Path:
    """Write the base with a finished run's adapter merged into it as one GGUF file.

    Parameters
    ----------
    target : Path
        A folder; the file in it is named after model and quantisation.
    quantization : str
        How matrices are stored: f32, f16 or q8_0.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    ConfigError
        If the quantisation is unknown, the base is quantised, or the adapter is virtual tokens.
    RunError
        If the run has no such adapter, or the target exists, is in the run folder or cannot be written.
    ModelError
        If the base cannot be loaded, or is not of the Llama architecture.
    """
    if quantization not in QUANTIZATIONS:
        raise ConfigError(f"--quantization: '{quantization}' is not one of {', '.join(QUANTIZATIONS)}.")
    run = open_run(folder)
    config = settings_of(run)
    # said before minutes of merging
    require_llama(load_model_config(config.model))
    _require_free(target, run)
    name = config.model.called.rpartition("/")[2]
    file = f"{name}-{quantization}.gguf"
    with written_whole(target) as fresh:
        model, tokenizer = merged_model(folder, site=site), load_tokenizer(config.model)
        write_gguf(model, tokenizer, fresh / file, name=name, quantization=quantization)
        run_card(run, fresh, form="gguf", file=file, site=site)
    return target / file


def merged_model(folder: Path, *, site: str = "") -> PreTrainedModel:
    """Return the base with a finished run's adapter merged into it.

    Raises
    ------
    ConfigError
        If the base is quantised, the adapter is virtual tokens, or the head reads a mean.
    RunError
        If the run has no such adapter.
    ModelError
        If the base cannot be loaded.
    """
    config = settings_of(open_run(folder))
    if config.model.pooling == "mean":
        raise ConfigError(
            "model.pooling=mean: the merged model's own class would give its head another input; export the "
            "adapter, whose README.md shows how it is used."
        )
    if config.model.quantization != "none" or config.adapter.method == "prompt":
        raise ConfigError(
            "a quantised base, or an adapter of virtual tokens, cannot be merged; export the adapter alone."
        )
    tuned = tuned_model(folder, site=site)
    drop_empty_biases(tuned)
    merged: PreTrainedModel = tuned.merge_and_unload()
    if config.model.kind == "encoder":
        names = dict(enumerate(public_labels(config.data)))
        merged.config.id2label, merged.config.label2id = names, {name: row for row, name in names.items()}
    return merged


def tuned_model(folder: Path, *, site: str = "") -> PeftModel:
    """Return a finished run's base with its adapter, not merged, ready to score and write.

    Raises
    ------
    RunError
        If the run has no such adapter; said before the base is loaded.
    ModelError
        If the base cannot be loaded.
    """
    config = settings_of(open_run(folder))
    labels = len(public_labels(config.data)) if config.model.kind == "encoder" else 0
    with TemporaryDirectory() as scratch:
        adapter = write_adapter(folder, Path(scratch) / "adapter", site=site)
        base = load_base(config.model, labels=labels)
        with quiet():
            return PeftModel.from_pretrained(base, adapter).eval()


def require_pair(folder: Path, data: DataSettings, pair: str) -> None:
    """Refuse a second text that is missing or too much.

    Raises
    ------
    ConfigError
        Saying which.
    """
    if bool(pair) != bool(data.pair):
        what = f"has one text, data.pair is empty; leave out --pair {pair[:20]!r}"
        if data.pair:
            what = f"reads two texts; give the second one ('{data.pair}') with --pair"
        raise ConfigError(f"{folder}: the recipe {what}.")


def _require_free(target: Path, run: RunFolder) -> None:
    try:
        taken = target.is_file() or (target.is_dir() and any(target.iterdir()))
    except OSError as error:
        raise RunError(f"{target}: cannot be written ({error.strerror}); choose another folder.") from None
    if taken:
        raise RunError(f"{target}: exists already; choose another folder.")
    if target.resolve().is_relative_to(run.path.resolve()):
        raise RunError(f"{target}: is inside the run folder; choose another folder.")


def answer(
    folder: Path, prompt: str, *, max_new_tokens: int = 0, pair: str = "", site: str = ""
) -> tuple[str, str]:
    """Return the base's and the tuned model's greedy answers to a prompt, as an evaluation has them.

    Parameters
    ----------
    prompt, pair : str
        What stands for the record's text, and for its second one where the recipe has one (``data.pair``).
    max_new_tokens : int
        Longest answer; 0: the recipe's ``evaluation.max_new_tokens``.

    Raises
    ------
    ConfigError
        If the run's model is an encoder, which writes nothing, its questions have options, or a second
        text is missing or too much.
    RunError
        If the run has no finished adapter.
    ModelError
        If the base cannot be loaded.
    """
    run = open_run(folder)
    config = settings_of(run)
    if config.model.kind == "encoder":
        raise ConfigError(f"{run.path}: its model is an encoder; it classifies and writes no text.")
    if config.data.task == "choose":
        raise ConfigError(f"{run.path}: it learnt to choose among a question's options, which are not given.")
    require_pair(run.path, config.data, pair)
    tokenizer = load_tokenizer(config.model)
    encoder = PromptEncoder(
        tokenizer,
        instruction=default_instruction(config.data),
        prompt=config.data.prompt,
        max_length=config.train.max_length,
    )
    ids = encoder.prompt_ids(prompt, pair)
    model = tuned_model(folder, site=site)
    inner = model.get_base_model()
    assert isinstance(inner, PreTrainedModel), "PEFT wraps what was loaded"

    def written(prefix: Tensor | None) -> str:
        (tokens,) = greedy_tokens(
            inner,
            [ids],
            max_new_tokens=max_new_tokens or config.evaluation.max_new_tokens,
            pad_id=int(tokenizer.pad_token_id),
            stop=end_tokens(inner, tokenizer),
            prefix=prefix,
        )
        return str(tokenizer.decode(tokens, skip_special_tokens=True)).strip()

    tuned = written(model.get_prompt(batch_size=1)[0] if config.adapter.method == "prompt" else None)
    with model.disable_adapter():
        return written(None), tuned


def _adapter_dir(run: RunFolder, site: str) -> Path:
    config = load_config(run)
    if config.federation.mode == "base":
        raise RunError(f"{run.path}: the untuned base was measured and nothing trained; there is no adapter.")
    if not any(event["event"] == "run_finished" for event in read_events(run)):
        # what is there may be half written
        raise RunError(f"{run.path}: no finished adapter yet; go on with run.resume={run.path}")
    if not site and make_rule(config).about.personal:
        raise RunError(f"{run.path}: every site has an adapter of its own; name one with --site.")
    source = run.site_dir(site) / "adapter" if site else run.adapter_dir
    if not source.is_dir():
        what = f"no adapter of site '{site}'" if site else "the adapter is gone; restore it from a backup"
        raise RunError(f"{run.path}: {what}.")
    return source
