"""Prints the results of `rlhf-ray data check`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from operator import itemgetter

from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from rlhf_ray.data.check import Check, Lengths, TokenCounts, dialogues
from rlhf_ray.data.records import Edit, Pair, Ranking, Record, Scored, answers_of, prompt_of
from rlhf_ray.data.tokenize import Dialogue
from rlhf_ray.telemetry.console import console

_MAX_LISTED = 8
"""Number of malformed lines and names that are listed; the rest are counted."""


def print_check(name: str, result: Check, tokens: TokenCounts | None) -> None:
    """Print a table of the results, and the malformed lines."""
    table = Table(title=name, title_justify="left", show_header=False)
    for label, value in _rows(result, tokens):
        table.add_row(label, value)
    console.print(table)
    for flaw in result.malformed[:_MAX_LISTED]:
        console.print(Text(f"{flaw.place}: {flaw.reason}", style="red"))
    if len(result.malformed) > _MAX_LISTED:
        console.print(f"… and {len(result.malformed) - _MAX_LISTED:,} more malformed; --json lists all")


def print_rows(records: Sequence[Record], tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Print records turn by turn. With a tokenizer print the decoded tokens, and highlight those that SFT would train on."""
    if tokenizer is not None and records:
        console.print(
            Text.assemble("as the model sees them; SFT trains on what is ", _highlighted("highlighted like this"))
        )
    for number, record in enumerate(records, start=1):
        console.rule(f"row {number}", align="left")
        names = _answer_names(record)
        if tokenizer is None:
            for name, turns in zip(("prompt", *names), (prompt_of(record), *answers_of(record)), strict=True):
                text = "\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)
                console.print(Text.assemble((f"[{name}] ", "bold"), text))
            continue
        for name, dialogue in zip(names or ("prompt",), dialogues(tokenizer, record), strict=True):
            console.print(Text.assemble((f"[{name}] ", "bold"), *_styled(tokenizer, dialogue)))


def _answer_names(record: Record) -> tuple[str, ...]:
    """A name for each answer in `answers_of`."""
    if isinstance(record, Pair):
        return ("tied", "tied") if record.preference == 0.5 else ("chosen", "rejected")
    if isinstance(record, Ranking):
        return tuple(f"place {rank}" for rank in record.ranks)
    if isinstance(record, Scored):
        return (", ".join(f"{aspect} {rating:g}" for aspect, rating in record.scores.items()),)
    return ("original", "edited") if isinstance(record, Edit) else ("answer",) * len(answers_of(record))


def _styled(tokenizer: PreTrainedTokenizerBase, dialogue: Dialogue) -> Iterator[tuple[str, str]]:
    """Text and style of consecutive tokens, decoded together because one letter can be several tokens."""
    for trained, run in groupby(zip(dialogue.token_ids.tolist(), dialogue.loss_mask, strict=True), itemgetter(1)):
        text = tokenizer.decode([token for token, _ in run])
        yield _highlighted(text) if trained else (text, "dim")


def _highlighted(text: str) -> tuple[str, str]:
    """Text with a style that marks it by colour, or by brackets without colours."""
    return (text, "underline green") if console.color_system else (f"⟦{text}⟧", "")


def _rows(result: Check, tokens: TokenCounts | None) -> list[tuple[str, str]]:
    rows = [
        ("format", f"{result.format}: {', '.join(result.kinds)}"),
        ("rows", f"{result.rows:,}" + (f", and {len(result.malformed):,} malformed" if result.malformed else "")),
        ("prompts, characters", _lengths(result.prompts)),
    ]
    if result.answers is not None:
        rows.append(("answers, characters", _lengths(result.answers)))
    if tokens is not None:
        rows += [
            ("prompts, tokens", _lengths(tokens.prompts)),
            ("dialogues, tokens", _lengths(tokens.dialogues)),
            ("tokens trained on", f"{tokens.learned:.1%}"),
        ]
        if tokens.too_long is not None:
            rows.append(("above the limit", f"{tokens.too_long:,}"))
    rows += [("repeated prompts", f"{result.repeated_prompts:,}"), ("repeated rows", f"{result.repeated_rows:,}")]
    if result.leaks is not None:
        leaks = f"{result.leaks.exact:,} identical, {result.leaks.normalised:,} except for case and punctuation"
        rows.append(("prompts also in the other source", leaks))
    for what, names in (("annotators", result.annotators), ("groups", result.groups)):
        if names:
            rows.append((f"{len(names)} {what}", _names(names)))
    if result.pairs is not None:
        pairs = result.pairs
        rows += [
            ("ties", f"{pairs.ties:,}"),
            ("soft labels", f"{pairs.soft:,}"),
            ("contradicted", f"{pairs.conflicting:,}"),
        ]
        if pairs.longer_chosen is not None:
            rows.append(("longer answer is chosen", f"{pairs.longer_chosen:.1%}"))
    return rows


def _lengths(values: Lengths) -> str:
    return f"median {values.median:,.0f}, 95 % below {values.p95:,.0f}, longest {values.longest:,}"


def _names(names: dict[str, int]) -> str:
    shown = ", ".join(f"{name} {count:,}" for name, count in list(names.items())[:_MAX_LISTED])
    return shown + (", …" if len(names) > _MAX_LISTED else "")
