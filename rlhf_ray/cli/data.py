"""`rlhf-ray data check`: look at a data file before training on it."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from rlhf_ray.cli.app import app

data = typer.Typer(help="Look at data before training on them.", no_args_is_help=True)
app.add_typer(data, name="data")


@data.command()
def check(
    path: Annotated[str, typer.Argument(help="JSONL, CSV or Parquet file, or a hub name")],
    format: Annotated[str, typer.Option(help="Row format, where the first row's keys do not say it")] = "auto",
    split: Annotated[str, typer.Option(help="Split of a hub data set")] = "train",
    subset: Annotated[str | None, typer.Option(help="Subset of a hub data set that has several")] = None,
    model: Annotated[
        str | None, typer.Option(help="Model folder: count tokens, and show rows as the model sees them")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="With --model: most tokens, as data.max_dialogue_tokens")] = None,
    against: Annotated[
        str | None, typer.Option(help="Another source that must not share prompts with this one")
    ] = None,
    against_split: Annotated[str, typer.Option(help="Split of the other source")] = "train",
    rows: Annotated[int, typer.Option(min=0, help="Rows to show")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of tables")] = False,
) -> None:
    """Counts, lengths, duplicates, leaks, annotators, biases and the first rows. Ends with 1 where a line is malformed."""
    from typing import get_args

    from rlhf_ray.data.check import check as check_contents
    from rlhf_ray.data.check import count_tokens, load_for_counting, read_all
    from rlhf_ray.data.formats import Format
    from rlhf_ray.data.rows import DataError
    from rlhf_ray.data.tables import print_check, print_rows

    if format not in get_args(Format):
        raise DataError(f"--format {format}: allowed are {', '.join(get_args(Format))}")
    tokenizer = load_for_counting(model) if model else None
    contents = read_all(path, format, split, subset)
    other = read_all(against, "auto", against_split, subset) if against else None
    result = check_contents(contents, other)
    tokens = count_tokens(tokenizer, contents.records, limit) if tokenizer else None
    if as_json:
        print(json.dumps(asdict(result) | ({"tokens": asdict(tokens)} if tokens else {}), ensure_ascii=False))
    else:
        print_check(path, result, tokens)
        print_rows(contents.records[:rows], tokenizer)
    raise typer.Exit(1 if contents.malformed else 0)
