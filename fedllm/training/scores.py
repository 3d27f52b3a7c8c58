"""What a prepared model scores on held-out records: labels by probability, or free text."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fedllm.config import Config
from fedllm.data.encode import Encoded
from fedllm.evaluation.answers import exact_match, final_number, rouge_l, token_f1
from fedllm.evaluation.calibration import (
    brier_score,
    calibration_bins,
    calibration_error,
    label_probabilities,
    reported_curve,
)
from fedllm.evaluation.metrics import Scores, accuracy, macro_f1, pair_hits, perplexity
from fedllm.models.load import load_tokenizer
from fedllm.training.forward import greedy_answers, label_scores, record_losses
from fedllm.training.preference import dpo_losses, margins
from fedllm.training.session import Session, SiteTokens
from fedllm.training.steps import micro_batches


def label_metrics(
    session: Session, site: SiteTokens, chosen: Sequence[Encoded], *, size: int, untuned: bool
) -> Scores:
    """Return loss, hits and calibration of the likeliest label, or letter among its own, of each record.

    Parameters
    ----------
    chosen : Sequence[Encoded]
        The first of the site's held-out records.
    size : int
        Records in one forward pass.
    untuned : bool
        Leave out what stands before the prompts.
    """
    scores = torch.cat(
        [
            label_scores(session, chosen[start : start + size], site.label_tokens, untuned=untuned)
            for start in range(0, len(chosen), size)
        ]
    )
    open_to = torch.tensor([record.options or len(site.labels) for record in chosen])
    scores = scores.masked_fill(torch.arange(len(site.labels)) >= open_to[:, None], -torch.inf)
    truth = site.heldout_labels[: len(chosen)]
    guess = [site.labels[int(index)] for index in scores.argmax(dim=1)]
    columns = [site.labels.index(label) for label in truth]
    loss = 0.0
    for row, column in enumerate(columns):
        tokens = len(site.label_tokens[column]) if site.label_tokens else 1
        loss -= float(scores[row, column]) / tokens
    probabilities = label_probabilities(scores.double().numpy())
    return Scores(
        records=len(chosen),
        loss=loss / len(chosen),
        accuracy=accuracy(truth, guess),
        macro_f1=macro_f1(truth, guess),
        brier=brier_score(probabilities, columns),
        ece=calibration_error(calibration_bins(probabilities, columns)),
        calibration=reported_curve(probabilities, columns),
        correct=tuple(float(t == g) for t, g in zip(truth, guess, strict=True)),
    )


def text_metrics(
    session: Session, site: SiteTokens, chosen: Sequence[Encoded], *, config: Config, untuned: bool
) -> Scores:
    """Return loss and perplexity of the reference answers and, where asked for, scores of written ones.

    Parameters are those of :func:`label_metrics`; ``evaluation.generate`` asks for written answers.
    """
    settings = config.evaluation
    with torch.no_grad():
        losses = [
            float(record_losses(session, chunk, untuned=untuned).sum())
            for chunk in micro_batches(chosen, settings.batch_size)
        ]
    loss = sum(losses) / len(chosen)
    if not settings.generate:
        return Scores(records=len(chosen), loss=loss, perplexity=perplexity(loss))
    answers, unended = greedy_answers(
        session,
        chosen,
        tokenizer=load_tokenizer(config.model),
        max_new_tokens=settings.max_new_tokens,
        size=settings.batch_size,
        untuned=untuned,
    )
    pairs = list(zip(site.heldout_labels[: len(chosen)], answers, strict=True))
    if settings.extract == "number":
        correct = tuple(float(final_number(truth) == final_number(guess)) for truth, guess in pairs)
    else:
        correct = tuple(exact_match(truth, guess) for truth, guess in pairs)
    shared = tuple(token_f1(truth, guess) for truth, guess in pairs)
    return Scores(
        records=len(chosen),
        loss=loss,
        perplexity=perplexity(loss),
        exact_match=sum(correct) / len(pairs),
        token_f1=sum(shared) / len(pairs),
        rouge_l=sum(rouge_l(truth, guess) for truth, guess in pairs) / len(pairs),
        unended=unended,
        correct=correct,
        token_f1s=shared if settings.extract == "none" else (),
    )


def preference_metrics(
    session: Session, chosen: Sequence[Encoded], *, beta: float, size: int, untuned: bool
) -> Scores:
    """Return loss and won pairs of answers; the untuned base is its own reference, so all margins are zero.

    Parameters are those of :func:`label_metrics`; beta is DPO's.
    """
    found = torch.zeros(len(chosen))
    if not untuned:
        with torch.no_grad():
            found = torch.cat([margins(session, chunk).cpu() for chunk in micro_batches(chosen, size)])
    hits = pair_hits(found.tolist())
    return Scores(
        records=len(chosen),
        loss=float(dpo_losses(found, beta=beta).mean()),
        accuracy=sum(hits) / len(hits),
        correct=hits,
    )
