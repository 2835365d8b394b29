"""`minimoe generate` and `minimoe eval`: a trained model writes text, or is measured."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

import click

from minimoe.cli.completion import completing, runs
from minimoe.cli.options import Count, Size, data_option, json_option, open_loaded, option, print_json
from minimoe.cli.streams import write, write_all
from minimoe.errors import UserError, notice

if TYPE_CHECKING:
    from minimoe.pretrained.loading import Loaded


@click.command()
@click.argument("run", required=False, metavar="[RUN|FOLDER]", shell_complete=completing(runs))
@option("--prompt", "prompts", multiple=True, metavar="TEXT", help="text to continue (default: a new line); several make one batch")
@option("--tokens", type=Count(1), default=300, metavar="N", show_default=True, help="tokens to generate")
@option("--temperature", type=float, default=0.8, metavar="T", show_default=True, help="0: always the most likely token")
@option("--top-k", type=int, default=0, metavar="K", help="sample from the K most likely tokens; 0: from all")
@option("--top-p", type=float, default=1.0, metavar="P", help="sample from the fewest tokens that hold this probability")
@option("--repetition-penalty", type=float, default=1.0, metavar="R", help="above 1: tokens already in the text become less likely")
@option("--stop", multiple=True, metavar="TEXT", help="end before this text; may be repeated")
@option("--seed", type=click.IntRange(0), default=0, metavar="N", show_default=True, help="seed of the sampling")
@option(
    "--max-memory", type=Size(), metavar="SIZE", help="memory limit for a folder's weights, such as 8GB: experts are evicted and read again"
)
def generate(
    run: str | None, prompts: tuple[str, ...], tokens: int, temperature: float, top_k: int, top_p: float, repetition_penalty: float,
    stop: tuple[str, ...], seed: int, max_memory: int | None,
) -> None:  # fmt: skip
    """Generate text with a trained model or a model folder.

    The newest run is the default. Text is shown as it is drawn or, with several prompts, when it is complete. What the tokenizer puts
    before a text is added to a prompt; a message says which part of a prompt the model does not read.
    """
    from minimoe.generation.generation import Sampling, default_prompt, generate_texts
    from minimoe.generation.generation import generate as generate_text

    sampling = Sampling(temperature, top_k, top_p, seed, repetition_penalty, stop)
    loaded = open_loaded(run, max_memory)
    head = loaded.model.config.head
    if head != "lm":  # it may have no tokenizer either
        raise UserError(f"{loaded.folder}: generation needs a causal language model: this one has head = {head!r}; eval measures it")
    tokenizer = loaded.text
    try:
        if len(prompts) > 1:
            for row, text in generate_texts(loaded.model, tokenizer, prompts, tokens, sampling):
                write(f"== prompt {row + 1} of {len(prompts)}\n{prompts[row]}{text}\n\n")
            return
        prompt = prompts[0] if prompts else default_prompt(tokenizer)
        write_all(chain(prompts, generate_text(loaded.model, tokenizer, prompt, tokens, sampling)))
        click.echo()
    finally:
        note_expert_usage(loaded)


def note_expert_usage(loaded: Loaded) -> None:
    """Keep for `inspect` which experts of a model folder were used."""
    from minimoe.pretrained.expert_usage import note

    note(loaded.folder, [loaded.model.backend.to_host(rows) for rows in loaded.model.expert_rows])


@click.command(name="eval")
@click.argument("run", required=False, shell_complete=completing(runs))
@data_option
@json_option
def evaluate(run: str | None, data: tuple[str, ...] | None, as_json: bool) -> None:
    """Measure a trained model on held-out data.

    By default on the whole validation split of its own text or images; with --data on all of another source.
    """
    from minimoe.study.evaluate import evaluate_run

    result = evaluate_run(open_loaded(run), data)
    summary = result.pop("summary")
    for text in (*result.pop("read"), *result.pop("notes")):
        notice(text)
    if as_json:
        print_json(result)
        return
    click.echo(summary)
    if any(result["expert_load_by_domain"].values()):
        from minimoe.study.tables import domains_table, show

        show(domains_table(result["expert_load_by_domain"]))
