"""`minimoe generate`, `fill` and `eval`: a trained model writes text, fills in blanks, or is measured."""

from __future__ import annotations

import sys
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import click

from minimoe.cli.completion import completing, runs
from minimoe.cli.options import Count, Size, data_option, json_option, open_loaded, option, print_json
from minimoe.cli.streams import tell, write, write_all
from minimoe.errors import UserError, notice

if TYPE_CHECKING:
    from minimoe.generation.sampling import Sampling
    from minimoe.pretrained.loading import Loaded


@click.command()
@click.argument("run", required=False, metavar="[RUN|FOLDER]", shell_complete=completing(runs))
@option("--prompt", "prompts", multiple=True, metavar="TEXT", help="text to continue (default: a new line), - for standard input; several "
        "make one batch")  # fmt: skip
@option("--prompt-file", "files", multiple=True, type=click.Path(path_type=Path), metavar="FILE", help="the same from a file or a pipe")
@option("--chat", is_flag=True, help="answer as in a chat, by the tokenizer's template; without --prompt a conversation")
@option("--system", metavar="TEXT", help="with --chat: the message that says how to answer")
@option("--interactive", is_flag=True, help="read prompts one after the other, each a line")
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
    run: str | None, prompts: tuple[str, ...], files: tuple[Path, ...], chat: bool, system: str | None, interactive: bool, tokens: int,
    temperature: float, top_k: int, top_p: float, repetition_penalty: float, stop: tuple[str, ...], seed: int, max_memory: int | None,
) -> None:  # fmt: skip
    """Generate text with a trained model or a model folder.

    The newest run is the default. Text is shown as it is drawn or, with several prompts, when it is complete. What the tokenizer puts
    before a text is added to a prompt; a message says which part of a prompt the model does not read. With --chat the prompts are the
    messages of one conversation. With --interactive, or --chat alone, prompts are read from the terminal (/help lists commands) or, if
    standard input is none, from its lines.
    """
    from minimoe.generation.generation import Sampling

    sampling = Sampling(temperature, top_k, top_p, seed, repetition_penalty, stop)
    if interactive and (prompts or files):
        raise click.UsageError("--interactive reads prompts itself: leave out --prompt and --prompt-file")
    if system is not None and not chat:
        raise click.UsageError("--system is a message of a chat: give --chat as well")
    texts = prompt_texts(prompts, files)
    loaded = open_loaded(run, max_memory)
    head = loaded.model.config.head
    if head != "lm":  # it may have no tokenizer either
        instead = "fill fills in blanks with it" if head == "mlm" else "eval measures it"
        raise UserError(f"{loaded.folder}: generation needs a causal language model: this one has head = {head!r}; {instead}")
    try:
        if chat or interactive:
            converse(loaded, chat, system, texts, tokens, sampling)
        else:
            continue_texts(loaded, texts, tokens, sampling)
    finally:
        note_expert_usage(loaded)


def prompt_texts(prompts: tuple[str, ...], files: tuple[Path, ...] = ()) -> list[str]:
    """Return the texts of --prompt and --prompt-file; "-" is standard input, which can be read once."""
    from minimoe.generation.prompts import prompt_of_file, prompt_of_input

    given = [*prompts, *(path if str(path) != "-" else "-" for path in files)]
    if given.count("-") > 1:
        raise click.UsageError("standard input (-) can be read once: give - for one prompt alone")
    if "-" in given and sys.stdin.isatty():
        tell("reading the text from the terminal: Ctrl-D at the beginning of a line ends it")
    return [prompt_of_file(text) if isinstance(text, Path) else prompt_of_input() if text == "-" else text for text in given]


def continue_texts(loaded: Loaded, texts: list[str], tokens: int, how: Sampling) -> None:
    """Show one text as it is drawn, several as they become complete."""
    from minimoe.generation.generation import default_prompt, generate_texts
    from minimoe.generation.generation import generate as generate_text

    tokenizer = loaded.text
    if len(texts) > 1:
        for row, text in generate_texts(loaded.model, tokenizer, texts, tokens, how):
            write(f"{heading(row, texts)}{text}\n\n")
        return
    prompt = texts[0] if texts else default_prompt(tokenizer)
    write_all(chain(texts, generate_text(loaded.model, tokenizer, prompt, tokens, how)))
    click.echo()


def heading(row: int, texts: list[str]) -> str:
    return f"== prompt {row + 1} of {len(texts)}\n{texts[row]}"


def converse(loaded: Loaded, chat: bool, system: str | None, texts: list[str], tokens: int, how: Sampling) -> None:
    """Answer the texts one after the other or, without any, what the user types."""
    from minimoe.cli.interactive import talk
    from minimoe.data.forms import chat_of
    from minimoe.generation.conversation import Continuations, Conversation

    if not chat:
        talk(Continuations(loaded.model, loaded.text, tokens, how), f"{loaded.folder}: each line is continued")
        return
    template = chat_of(loaded.config.data.tokenizer, None, loaded.text)
    if template.plain:
        notice(f"{loaded.folder}: its tokenizer has no chat template: messages are written in {template.name}")
    conversation = Conversation(loaded.model, loaded.text, template, tokens, how, system)
    for row, text in enumerate(texts):
        if len(texts) > 1:
            write(f"{heading(row, texts)}\n\n")
        write_all(conversation.ask(text))
        click.echo("\n" if len(texts) > 1 else "")
    if not texts:
        talk(conversation, f"{loaded.folder}: a conversation")


def note_expert_usage(loaded: Loaded) -> None:
    """Keep for `inspect` which experts of a model folder were used."""
    from minimoe.pretrained.expert_usage import note

    note(loaded.folder, [loaded.model.backend.to_host(rows) for rows in loaded.model.expert_rows])


@click.command()
@click.argument("words", nargs=-1, metavar="[RUN|FOLDER] TEXT", shell_complete=completing(runs))
@option("--top", type=Count(1), default=5, metavar="K", show_default=True, help="tokens to show for each blank")
@json_option
def fill(words: tuple[str, ...], top: int, as_json: bool) -> None:
    """Fill in the blanks of a text with a masked language model.

    Each [MASK] of the text, or of standard input with -, stands for one token: a byte or a character where the model reads those. All
    blanks are predicted together, each as if the others stayed hidden. The newest run is the default.
    """
    from minimoe.study.fill import EXAMPLE
    from minimoe.study.fill import fill as fill_text

    if not 1 <= len(words) <= 2:
        raise click.UsageError(f"fill takes a run or a model folder, and a text in quotes: minimoe fill runs/last {EXAMPLE}")
    (text,) = prompt_texts(words[-1:])
    loaded = open_loaded(words[0] if len(words) > 1 else None)
    try:
        if loaded.model.config.head == "mlm" and loaded.tokenizer is None:
            raise UserError(loaded.no_tokenizer or f"{loaded.folder}: has no tokenizer.json: text cannot be turned into its tokens")
        found = fill_text(loaded.model, text, top)
    except UserError as error:
        raise type(error)(f"{loaded.folder}: {error}") from None
    if as_json:
        masks = [[{"token": guess.token, "probability": guess.probability, "id": guess.id} for guess in mask] for mask in found.masks]
        print_json({"model": str(loaded.folder), "step": loaded.step, "text": found.text, "masks": masks})
        return
    from minimoe.study.tables import fill_table, show

    for number, guesses in enumerate(found.masks, 1):
        show(fill_table(guesses, f"blank {number} of {len(found.masks)}" if len(found.masks) > 1 else ""))
        click.echo()
    write(found.text, "\n")


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
