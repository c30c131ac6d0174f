"""`rlhf-ray data check`: look at a data file before training on it."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from rlhf_ray.cli.app import CONFIG, app

data = typer.Typer(help="Check data before training on it.", no_args_is_help=True)
app.add_typer(data, name="data", rich_help_panel=CONFIG, epilog="Example: rlhf-ray data check pairs.jsonl")


@data.command(epilog="Example: rlhf-ray data check pairs.jsonl --model models/base --rows 5")
def check(
    path: Annotated[str, typer.Argument(help="JSONL, CSV or Parquet file, or the name of a hub data set")],
    format: Annotated[str, typer.Option(help="Row format; auto: by the keys of the first row")] = "auto",
    split: Annotated[str, typer.Option(help="Split of a hub data set")] = "train",
    subset: Annotated[str | None, typer.Option(help="Subset of a hub data set that has several")] = None,
    model: Annotated[
        str | None, typer.Option(help="Model folder: count tokens, and show rows as the model sees them")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="With --model: the limit in tokens, as data.max_dialogue_tokens")
    ] = None,
    against: Annotated[str | None, typer.Option(help="Another source; prompts that are in both are reported")] = None,
    against_split: Annotated[str, typer.Option(help="Split of the other source")] = "train",
    rows: Annotated[int, typer.Option(min=0, help="Rows to show")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of tables")] = False,
) -> None:
    """Print counts, lengths, duplicates, leaks, annotators, biases and the first rows. Exits with 1 if a line is malformed."""
    from typing import get_args

    from rlhf_ray.data.check import check as check_contents
    from rlhf_ray.data.check import count_tokens, load_for_counting, read_all
    from rlhf_ray.data.formats import Format
    from rlhf_ray.data.rows import DataError
    from rlhf_ray.data.tables import print_check, print_rows

    formats: dict[str, Format] = {name: name for name in get_args(Format)}
    if format not in formats:
        raise DataError(f"--format {format}: allowed are {', '.join(formats)}")
    tokenizer = load_for_counting(model) if model else None
    contents = read_all(path, formats[format], split, subset)
    other = read_all(against, "auto", against_split, subset) if against else None
    result = check_contents(contents, other)
    tokens = count_tokens(tokenizer, contents.records, limit) if tokenizer else None
    if as_json:
        print(json.dumps(asdict(result) | ({"tokens": asdict(tokens)} if tokens else {}), ensure_ascii=False))
    else:
        print_check(path, result, tokens)
        print_rows(contents.records[:rows], tokenizer)
    raise typer.Exit(1 if contents.malformed else 0)
