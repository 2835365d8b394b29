"""Training on rows, chats and several sources: what the loss counts, resuming to equal bytes, and what the command line says."""

import gzip
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import made_tokenizers
import numpy as np
import pytest
from command_line import TINY, call, contents, one_line, sets
from msgspec.structs import replace
from tiny_runs import NOUNS, VERBS, tiny, train, untimed, weights_of, write_text

import minimoe as mm
from minimoe.config import Config, DataConfig, SourceConfig
from minimoe.data.batches import IGNORE
from minimoe.errors import CheckpointError, Interrupted, UserError
from minimoe.pretrained.loading import open_model
from minimoe.study.evaluate import evaluate_run
from minimoe.training.listener import Listener
from minimoe.training.tasks import LanguageModelling, load_task
from minimoe.training.trainer import Trainer


def write_rows(folder: Path, count: int = 60) -> Path:
    rows = ({"id": n, "text": f"{NOUNS[n % 5]} {VERBS[n % 3]} {NOUNS[n % 4]}"} for n in range(count))
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_chats(folder: Path, count: int = 60) -> Path:
    path = folder / "chats.csv"
    path.write_text("prompt,completion\n" + "".join(f"{NOUNS[n % 5]}?,{VERBS[n % 3]}\n" for n in range(count)))
    return path

ANSWERS = set("".join(VERBS[:3]) + "\n")  # the characters that the assistant writes


def config_of(source: str | Path | DataConfig, **keys: Any) -> Config:
    data = source if isinstance(source, DataConfig) else DataConfig(source=str(source))
    return replace(tiny("-", **keys), data=data)


def mixed(folder: Path, **keys: Any) -> DataConfig:
    sources = [SourceConfig(source=str(write_rows(folder)), weight=0.3), SourceConfig(source=str(write_chats(folder)), weight=0.3)]
    return DataConfig(sources=(*sources, SourceConfig(source=str(write_text(folder)))), **keys)


DATA = {
    "rows": lambda folder: DataConfig(source=str(write_rows(folder)), within_documents=True),
    "chats": lambda folder: DataConfig(source=str(write_chats(folder))),
    "several": lambda folder: mixed(folder, within_documents=True),
}


# ---- batches -----------------------------------------------------------------------------------------------------------------------


def test_the_loss_counts_answers_alone_unless_all_is_asked_for(tmp_path: Path) -> None:
    source = str(write_chats(tmp_path))
    for loss_on in ("answers", "all"):
        task = load_task(config_of(DataConfig(source=source, loss_on=loss_on)))  # type: ignore[arg-type]
        assert isinstance(task, LanguageModelling)
        for batches in (map(task.batch, range(8), [0] * 8), task.held_out(), task.held_out(2)):
            text = task.tokenizer.decode(np.concatenate([targets[targets != IGNORE] for _, targets, *_ in batches]))
            assert text and (set(text) <= ANSWERS) == (loss_on == "answers")
        assert ("the loss counts" in task.read()[0]) == (loss_on == "answers")


def test_every_learned_token_of_the_held_out_split_is_measured_once(tmp_path: Path) -> None:
    task = load_task(config_of(write_chats(tmp_path)))
    assert isinstance(task, LanguageModelling) and task.val.learned is not None
    counted = sum(int((targets != IGNORE).sum()) for _, targets, *_ in task.held_out())
    assert counted == int(np.asarray(task.val.learned)[1:].sum())


def test_documents_that_are_kept_apart_do_not_predict_each_others_first_token(tmp_path: Path) -> None:
    task = load_task(config_of(DataConfig(source=str(write_rows(tmp_path)), within_documents=True)))
    assert isinstance(task, LanguageModelling)
    text = task.tokenizer.decode(task.train.tokens)
    first = {0, *(n + 2 for n in range(len(text)) if text[n : n + 2] == "\n\n")}  # of each document
    for step in range(8):
        tokens, targets, starts = task.batch(step, 0)
        for row, begin in enumerate(task._drawn(step, 0)[:, 0].tolist()):
            own = [n for n in range(len(tokens[row])) if n == 0 or begin + n in first]  # where documents begin in this row
            assert starts[row].tolist() == [max(one for one in own if one <= n) for n in range(len(tokens[row]))]
            expected = [IGNORE if begin + n + 1 in first else ord(text[begin + n + 1]) for n in range(len(tokens[row]))]
            assert targets[row].tolist() == expected
    for tokens, targets, valid, starts in task.held_out():
        assert tokens.shape == targets.shape == valid.shape == starts.shape and starts.max() > 0
    plain = load_task(config_of(write_rows(tmp_path)))
    assert len(plain.batch(0, 0)) == 2 and (plain.batch(0, 0)[1] != IGNORE).all()


def test_text_that_is_one_document_trains_as_without_the_key_and_says_so(tmp_path: Path) -> None:
    text = str(write_text(tmp_path))
    task = load_task(config_of(DataConfig(source=text, within_documents=True)))
    assert len(task.batch(0, 0)) == 2 and task.read() == [f"data.within_documents changes nothing: {text} is one document"]


def test_hidden_tokens_are_those_of_answers_and_attention_stays_within_documents(tmp_path: Path) -> None:
    model = {"causal": False, "head": "mlm"}
    task = load_task(config_of(DataConfig(source=str(write_chats(tmp_path)), within_documents=True), model=model))
    assert task.tokenizer is not None
    for batches in (list(map(task.batch, range(8), [0] * 8)), list(task.held_out())):
        text = task.tokenizer.decode(np.concatenate([targets[targets != IGNORE] for _, targets, *_ in batches]))
        assert text and set(text) <= ANSWERS
        assert max(batch[-1].max() for batch in batches) > 0


def test_answers_that_are_missing_in_a_split_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    rows = [{"messages": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b" * 900}]}]
    path.write_text(json.dumps(rows[0]))
    with pytest.raises(UserError, match=r"none of the \d+ tokens of the validation split are of answers"):
        load_task(config_of(path))


# ---- runs --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["numpy", "numba"])
@pytest.mark.parametrize("kind", DATA)
def test_a_resumed_run_ends_with_the_bytes_of_one_that_never_stopped(kind: str, backend: str, tmp_path: Path) -> None:
    config = config_of(DATA[kind](tmp_path), steps=6, eval_every=2, eval_batches=2, checkpoint_every=3, backend=backend, accumulate=2)
    whole = train(config, tmp_path / "whole")
    assert np.isfinite(whole.val_loss) and whole.config.data == config.data
    stopped = Stops()
    trainer = stopped.trainer = Trainer(config, listener=stopped)
    with pytest.raises(Interrupted):
        trainer.run(trainer.create(tmp_path / "stopped"))
    again = mm.resume(tmp_path / "stopped")
    assert weights_of(again.path, 6) == weights_of(whole.path, 6)
    assert untimed(again.metrics) == untimed(whole.metrics)


class Stops(Listener):
    """Asks for an end after the fourth step."""

    trainer: Trainer

    def stepped(self, step: int) -> None:
        if step == 4:
            self.trainer.stops.append(15)


@pytest.mark.parametrize("kind", DATA)
def test_a_source_that_changed_is_refused_and_nothing_is_lost(kind: str, tmp_path: Path) -> None:
    data = DATA[kind](tmp_path)
    run = train(config_of(data, steps=2), tmp_path / "runs")
    path = Path(data.parts[-1].source)
    path.write_text(path.read_text() + path.read_text().splitlines()[1] + "\n")
    before = contents(run.path)
    with pytest.raises(CheckpointError, match="have changed since the run began"):
        mm.resume(run.path, steps=4)
    assert contents(run.path) == before


def test_keys_on_which_the_tokens_depend_stay_and_others_may_change_with_a_message(tmp_path: Path) -> None:
    run = train(config_of(mixed(tmp_path), steps=2), tmp_path / "runs")
    path = run.path / "config.toml"
    before = path.read_text()
    path.write_text(before.replace('loss_on = "answers"', 'loss_on = "all"'))
    with pytest.raises(CheckpointError, match=r"its loss_on differs from .*data\.loss_on answers -> all"):
        mm.resume(run.path, steps=3)
    path.write_text(before.replace("within_documents = false", "within_documents = true").replace("weight = 0.3", "weight = 0.2"))
    with pytest.warns(Warning, match=r"data\.(within_documents|sources)") as said:
        mm.resume(run.path, steps=3)
    found = " ".join(str(one.message) for one in said)
    assert "data.within_documents false -> true" in found and '"weight": 0.2' in found


def test_chats_of_a_template_are_measured_after_training_as_they_were_in_it(tmp_path: Path) -> None:
    pytest.importorskip("jinja2")
    tokenizer = made_tokenizers.write("byte-level", tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}")
    data = DataConfig(source=str(write_chats(tmp_path, 200)), tokenizer=str(tokenizer), loss_on="all")
    run = train(config_of(data, steps=2), tmp_path / "runs")
    assert "<user>" in run.corpus.tokenizer.decode(run.corpus.val)
    found = evaluate_run(open_model(run.path), None)
    assert found["loss"] == pytest.approx(run.val_loss, rel=1e-6)
    assert evaluate_run(open_model(run.path), [data.source])["tokens"] > found["tokens"]


def test_a_run_that_began_with_the_raw_text_of_rows_goes_on_with_it(tmp_path: Path) -> None:
    rows = write_rows(tmp_path)
    text = tmp_path / "text.txt"
    text.write_bytes(rows.read_bytes())
    as_text = train(config_of(text, steps=2), tmp_path / "runs")  # what an earlier version did with rows.jsonl
    for name in ("config.toml", "env.json", "checkpoints/step-000002/config.json"):
        path = as_text.path / name
        path.write_text(path.read_text().replace("text.txt", "rows.jsonl"))
    manifest = as_text.path / "checkpoints/step-000002/MANIFEST.sha256"
    digest = hashlib.sha256((manifest.parent / "config.json").read_bytes()).hexdigest()
    lines = [f"{digest}  config.json" if line.endswith("config.json") else line for line in manifest.read_text().splitlines()]
    manifest.write_text("\n".join(lines) + "\n")
    resumed = mm.resume(as_text.path, steps=4)
    assert resumed.corpus.tokenizer.decode(resumed.corpus.train[:8]) == '{"id": 0'
    assert "as when the run began: rows of JSON" in resumed.corpus.notes[0]


# ---- the command line --------------------------------------------------------------------------------------------------------------


@pytest.fixture()
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_command_line_says_what_was_read_of_each_source(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(here), write_chats(here), write_text(here)
    (here / "rows.jsonl").write_text((here / "rows.jsonl").read_text() + '{"text": ""}\n\n')
    given = ["--data", "rows.jsonl:text=0.25", "--data", "chats.csv", "--data", "*.txt=0.5"]
    code, _, err = call(capsys, "train", *TINY, *given, "--steps", "2", *sets("data.within_documents=true"))
    assert code == 0
    assert f"{here}/rows.jsonl:text: 25.0% of the windows, 60 documents" in err
    assert f"warning: {here}/rows.jsonl:text: 1 document without text and 1 blank line left out" in err
    assert "chats.csv: 25.0% of the windows, 60 documents" in err and "the loss counts" in err
    code, out, _ = call(capsys, "eval", "--json")
    assert code == 0 and list(json.loads(out)["expert_load_by_domain"]) == ["rows.jsonl:text", "chats.csv", "*.txt"]
    code, out, err = call(capsys, "eval", "--data", "rows.jsonl:text", "--data", "chats.csv")
    assert code == 0 and "(all of it)" in out and "60 documents" in err
    code, _, err = call(capsys, "resume", "--steps", "3", "--quiet")
    assert code == 0, err
    code, out, _ = call(capsys, "train", *TINY, *given, "--dry-run")
    assert (code == 0 and "[[data.sources]]" in out) or "sources = [" in out


FAULTS = {
    "no JSON": ({"x.jsonl": '{"text": "a"}\nno\n'}, ["x.jsonl"], "x.jsonl, line 2: not JSON"),
    "a column": ({"x.csv": "a,b\nc,d\n"}, ["x.csv:z"], "x.csv, line 2: has no column 'z' (known: a, b)"),
    "which column": ({"x.csv": "a,b\nc,d\n"}, ["x.csv"], "x.csv: which column is its text? It has 'a', 'b'"),
    "a pattern": ({}, ["corpus/*.txt"], "corpus/*.txt' matches no file"),
    "a weight": ({"a.txt": "a", "b.txt": "b"}, ["a.txt", "b.txt=0"], "--data b.txt=0: a weight must be above 0"),
    "weights": ({"a.txt": "a", "b.txt": "b"}, ["a.txt", "b.txt=1.5"], "leave nothing for 'a.txt'"),
    "no role": ({"x.jsonl": '{"messages": [{"content": "a"}]}'}, ["x.jsonl"], "x.jsonl, line 1: message 1 of 'messages' has no role"),
    "empty": ({"x.tsv": ""}, ["x.tsv"], "x.tsv: has no rows"),
    "images": ({"a.txt": "a"}, ["a.txt", "digits"], "data.source = 'digits' is images"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_data_end_in_one_line_and_leave_nothing_behind(fault: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files, given, message = FAULTS[fault]
    for name, text in files.items():
        (here / name).write_text(text)
    code, out, err = call(capsys, "train", *TINY, *(part for source in given for part in ("--data", source)))
    assert (code, out) == (2, "") and message in one_line(err)
    assert not (here / "runs").exists()


def test_a_pipe_of_rows_and_one_among_several_sources_are_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(here / "x.jsonl")
    code, _, err = call(capsys, "train", *TINY, "--data", "x.jsonl")
    assert code == 2 and "a pipe of rows: save what it delivers to a file" in one_line(err)


def test_a_template_that_fails_is_named_with_the_row(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("jinja2")
    made_tokenizers.write("byte-level", here)
    (here / "chat_template.jinja").write_text("{{ raise_exception('Only user and assistant roles are supported!') }}")
    (here / "x.jsonl.gz").write_bytes(gzip.compress(b'{"messages": [{"role": "user", "content": "a"}]}'))
    code, _, err = call(capsys, "train", *TINY, "--data", "x.jsonl.gz", *sets("data.tokenizer=tokenizer.json"))
    message = one_line(err)
    assert code == 2 and "x.jsonl.gz, line 1: the chat template of" in message and "fails: Only user and assistant roles" in message
