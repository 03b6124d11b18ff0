"""The command line: bad input is one clear line and exit code 2, help is quick, every command runs."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from ws.algebra.direction import Direction
from ws.base import console
from ws.base.files import read_json
from ws.commands import cli
from ws.model import library
from ws.pocket import tiny


def run(*arguments: object) -> int:
    return cli._main([str(argument) for argument in arguments])


def one_line(captured: pytest.CaptureFixture[str]) -> str:
    """The single error line on stderr."""
    lines = [line for line in captured.readouterr().err.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ws: ")]
    assert len(errors) == 1 and "Traceback" not in "".join(lines), lines
    return errors[0]


QUICK = ("--topics", 2, "--personas", 1, "--samples", 2, "--rank", 2, "--control-seeds", 2, "--rows", 4, "--shown", 1,
         "--alphas", -1, 0, 1)  # fmt: skip


@pytest.fixture(scope="module")
def tiny_run(tiny_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Model folder and `--out` of a finished run."""
    out = tmp_path_factory.mktemp("cli")
    assert run("replicate", "--model", tiny_folders["qwen3"], "--out", out, *QUICK) == 0
    return tiny_folders["qwen3"], out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["replicate", "--model", "pockett"], "model 'pockett'"),
        (["replicate", "--model", "./nowhere"], "no model folder ./nowhere"),
        (["replicate", "--behaviour", "sycofancy"], "Did you mean sycophancy?"),
        (["replicate", "--behaviour", "mine.toml"], "unknown behaviour 'mine.toml'"),
        (["replicate", "--adapter", "lorra"], "unknown adapter family 'lorra'"),
        (["replicate", "--modle", "pocket"], "--modle"),
        (["replicate", "--seed", "one"], "one"),
        (["replicat"], "replicat"),
        (["eval", "dilemas"], "dilemas"),
        (["show", "nowhere"], "nowhere is not a run folder"),
        (["report", "nowhere"], "nowhere is not a run folder"),
        (["report"], "no run folder is given"),
        (["replicate", "--device", "tpu9"], "tpu9"),
        (["replicate", "--pairs", "none.jsonl"], "no pairs file none.jsonl"),
        (["behaviour", "check", "nothing.toml"], "unknown behaviour 'nothing.toml'"),
        (["diff", "--pos", "a"], "--pos and --neg go together"),
        (["sweep", "--seeds"], "the sweep has no cells"),
        (["sweep", "--families", "lorra"], "unknown adapter family 'lorra'"),
        (["compare", "--seeds"], "no family or no seed"),
        (["compare", "--families", "lora", "lorra"], "unknown adapter family 'lorra'"),
    ],
)
def test_bad_input_is_one_line_with_exit_code_2(
    arguments: list[str],
    expected: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == 2
    assert expected in one_line(capsys)
    assert not list(tmp_path.rglob("*.parquet"))


def test_a_folder_without_weights_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert run("replicate", "--model", tmp_path, "--out", tmp_path / "out") == 2
    assert "no safetensors weights" in one_line(capsys)


def test_a_tokenizer_that_cannot_say_yes_is_named(
    tiny_folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = Tokenizer(WordLevel({"<unk>": 0, "<end>": 1, "a": 2, "b": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path / "mute"
    folder.mkdir()
    for file in tiny_folders["qwen3"].iterdir():
        if "token" not in file.name and "jinja" not in file.name:
            (folder / file.name).write_bytes(file.read_bytes())
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<end>").save_pretrained(folder)
    pairs = [{"prompt": f"a {i}", "response_pos": "a", "response_neg": "b"} for i in range(4)]
    pairs += [{"prompt": "b", "response_pos": "b a", "response_neg": "b b"}]
    (tmp_path / "pairs.jsonl").write_text("\n".join(json.dumps(pair) for pair in pairs))
    assert run("replicate", "--model", folder, "--out", tmp_path / "out", "--pairs", tmp_path / "pairs.jsonl") == 2
    assert "cannot encode the answer 'Yes'" in one_line(capsys)


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("", "contains no pairs"),
        ('{"prompt": "a"}', "line 1: key 'response_pos'"),
        ('{"prompt": "a", "response_pos": "x", "response_neg": "x"}', "identical"),
        ("not json", "line 1: not valid JSON"),
    ],
)
def test_bad_pairs_are_named(
    tiny_folders: dict[str, Path], tmp_path: Path, lines: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pairs.jsonl").write_text(lines)
    arguments = ("--model", tiny_folders["qwen3"], "--out", tmp_path / "out", "--pairs", tmp_path / "pairs.jsonl")
    assert run("replicate", *arguments) == 2
    assert expected in one_line(capsys)


def test_a_behaviour_file_with_a_typo_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("behaviour", "new", "mine") == 0
    file = tmp_path / "mine.toml"
    file.write_text(file.read_text().replace("[personas]", "[persona]"))
    capsys.readouterr()
    assert run("behaviour", "check", "mine.toml") == 2
    line = one_line(capsys)
    assert "mine.toml" in line and "'persona'" in line and "Did you mean 'personas'?" in line


def test_an_existing_behaviour_file_is_not_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("behaviour", "new", "mine") == 0
    assert run("behaviour", "check", "mine.toml") == 0
    assert run("behaviour", "new", "mine") == 2
    assert "already exists" in one_line(capsys)


def test_an_out_folder_of_another_model_is_refused(
    tiny_run: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = tiny_run
    other = tmp_path / model.name
    tiny.make("qwen3", other, seed=5, layers=4)
    assert run("replicate", "--model", other, "--out", out, *QUICK) == 2
    assert "different fingerprint" in one_line(capsys)


def test_an_out_that_cannot_be_written_is_named(
    tiny_folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    assert run("replicate", "--model", tiny_folders["qwen3"], "--out", tmp_path / "file") == 2
    assert "cannot create the run folder" in one_line(capsys)


def test_a_full_disk_is_one_line_and_the_rerun_continues(
    tiny_folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = pl.DataFrame.write_parquet

    def full(self: pl.DataFrame, file: Path, *rest: object, **more: object) -> None:
        if "scores" in str(file) or "dilemmas" in str(file):
            raise OSError(errno.ENOSPC, "No space left on device", str(file))
        original(self, file, *rest, **more)  # type: ignore[arg-type]

    arguments = ("replicate", "--model", tiny_folders["qwen3"], "--out", tmp_path, *QUICK)
    with monkeypatch.context() as patch:
        patch.setattr(pl.DataFrame, "write_parquet", full)
        assert run(*arguments) == 2
    assert "No space left on device" in one_line(capsys)
    assert not list(tmp_path.rglob("*.tmp")) and not list(tmp_path.rglob("scores.parquet"))
    assert run(*arguments) == 0
    assert "done before" in capsys.readouterr().out


def test_ctrl_c_says_how_to_go_on(
    tiny_folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ws.fitting.data.make_pairs", interrupt)
    assert run("replicate", "--model", tiny_folders["qwen3"], "--out", tmp_path) == 130
    assert "again to continue" in one_line(capsys)


def test_replicate_ends_with_headline_and_paths(
    tiny_run: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = tiny_run
    assert run("replicate", "--model", model, "--out", out, *QUICK) == 0
    text = capsys.readouterr().out
    assert "Sycophancy on held-out claims (reply log-ratio): alpha -1" in text and "negative log-likelihood" in text
    assert "report.html" in text and "direction.safetensors" in text and "next" in text


def test_json_prints_the_summary_alone(tiny_run: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    model, out = tiny_run
    assert run("replicate", "--model", model, "--out", out, *QUICK, "--json") == 0
    text = capsys.readouterr().out
    assert json.loads(text)["adapter"] == "lora"


def test_a_command_after_json_speaks_again(tiny_run: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    _, out = tiny_run
    folder = next(out.rglob("summary.json")).parent
    assert run("show", folder, "--json") == 0
    assert run("show", folder / "nowhere", "--json") == 2
    capsys.readouterr()
    console.say("a line for people")
    assert capsys.readouterr().out == "a line for people\n"


def test_stages_run_one_by_one_with_the_settings_of_the_run(
    tiny_run: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = tiny_run
    for command in (["data"], ["train", "--sign", "neg"], ["diff"], ["subspace"]):
        assert run(*command, "--model", model, "--out", out) == 0
        text = capsys.readouterr().out
        assert "done before" in text and "rebuilding" not in text, command


@pytest.mark.parametrize("probe", ["sycophancy", "dilemmas", "feedback", "side-effects"])
def test_eval_scores_an_existing_run(
    tiny_run: tuple[Path, Path], probe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = tiny_run
    arguments = ("--model", model, "--out", out, "--rows", 2, "--json")
    assert run("eval", probe, "--alphas", -1, 0, 3, *arguments) == 0
    table = json.loads(capsys.readouterr().out)
    assert {row["alpha"] for row in table} == {-1.0, 0.0, 3.0}
    assert (out / "tiny-qwen3" / "sycophancy" / "lora" / "seed0" / f"scores-{probe}.parquet").is_file()


def test_eval_lets_the_model_think_and_takes_a_file(
    tiny_run: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = tiny_run
    file = tmp_path / "mine.jsonl"
    file.write_text('{"prompt": "Do cats like milk?", "label": 1}\n{"prompt": "Why?", "label": -1}\n')
    arguments = ("--model", model, "--out", out, "--alphas", 1, "--json")
    assert run("eval", file, "--think", 5, *arguments) == 0
    table = json.loads(capsys.readouterr().out)
    assert {row["metric"] for row in table} == {"logratio", "pmass", "forced"}
    assert {(row["probe"], row["alpha"], row["n"]) for row in table} == {("mine", 0.0, 2), ("mine", 1.0, 2)}
    assert (out / "tiny-qwen3" / "sycophancy" / "lora" / "seed0" / "scores-mine-guided.parquet").is_file()
    for wrong, expected in (
        (("eval", "side-effects", "--think", 5), "no choice probes"),
        (("eval", "--task", "hellaswag"), "lm-eval:NAME"),
        (("eval", tmp_path / "absent.jsonl"), "absent.jsonl"),
    ):
        assert run(*wrong, *arguments) == 2
        assert expected in one_line(capsys)


def test_eval_without_a_direction_says_what_to_do(
    tiny_folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("eval", "dilemmas", "--model", tiny_folders["qwen3"], "--out", tmp_path) == 2
    assert "has no direction yet" in one_line(capsys)


def test_show_and_report_work_on_a_finished_run(
    tiny_run: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_run[1] / "tiny-qwen3" / "sycophancy" / "lora" / "seed0"
    assert run("show", folder) == 0
    assert "Say hello in a friendly way." in capsys.readouterr().out
    assert run("report", folder) == 0
    assert run("show", folder, "--json") == 0
    capsys.readouterr()


def test_diff_of_any_two_adapter_folders(
    tiny_run: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = tiny_run
    folder = out / "tiny-qwen3" / "sycophancy" / "lora" / "seed0"
    target = tmp_path / "mine.safetensors"
    arguments = ("--model", model, "--pos", folder / "pos", "--neg", folder / "neg", "--out", target)
    assert run("diff", *arguments) == 0
    ours, theirs = Direction.load(target), Direction.load(folder / "direction.safetensors")
    assert (ours - theirs).norm() == pytest.approx(0, abs=1e-7)
    capsys.readouterr()
    assert run("diff", "--model", model, "--pos", tmp_path, "--neg", folder / "neg") == 2
    assert "neither a PEFT adapter nor a checkpoint" in one_line(capsys)


def test_the_pocket_model_that_is_not_built_says_how_to_build_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(library.POCKET_MODELS, "pocket", tmp_path)
    assert run("replicate", "--out", tmp_path / "out") == 2
    assert "ws pocket build" in one_line(capsys)


def test_help_imports_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "polars", "matplotlib")
    bare = {name: value for name, value in os.environ.items() if name != "BEARTYPE"}
    code = f"import sys; from ws.commands import cli; print([name for name in {heavy} if name in sys.modules])"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=bare)
    assert printed.stdout.strip() == "[]"


@pytest.mark.slow
def test_the_smoke_command_passes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ws", "smoke", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "smoke run passed" in done.stdout
    found = read_json(next((tmp_path / "out").rglob("summary.json")))
    assert found["direction_norm"] > 0
    del found["seconds"], found["model"]  # the only entries that differ between two runs
    assert_near(found, read_json(GOLDEN))


GOLDEN = Path(__file__).parent / "golden" / "smoke-summary.json"
"""Summary of the smoke run. Made again with: ws smoke --json; then without `seconds` and `model`."""
LOOSE = {"bands", "wordings", "dose_response", "sign_flip_p"}
"""Entries that are ratios of small numbers, or counts of resamples: rounding moves them more."""


def assert_near(found: object, golden: object, place: tuple[str, ...] = ()) -> None:
    """Equal keys, and numbers within what the rounding of another processor changes.

    Noise of 1e-6 of every weight, 16 times the rounding of fp32, moved them by at most 6e-6; the loose ones by 1.1e-4.
    """
    where = "/".join(place)
    if isinstance(golden, dict):
        assert isinstance(found, dict) and found.keys() == golden.keys(), where
        for name in golden:
            assert_near(found[name], golden[name], (*place, name))
    elif isinstance(golden, list):
        assert isinstance(found, list) and len(found) == len(golden), where
        for number, (one, other) in enumerate(zip(found, golden, strict=True)):
            assert_near(one, other, (*place, str(number)))
    elif isinstance(golden, float | int) and not isinstance(golden, bool):
        assert found == pytest.approx(golden, rel=1e-3, abs=2e-3 if LOOSE & set(place) else 1e-4), where
    elif not (isinstance(golden, str) and any(letter.isdigit() for letter in golden)):
        assert found == golden, where  # sentences hold the numbers, rounded


@pytest.mark.slow
def test_a_run_killed_outright_continues_to_the_same_result(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    def command(out: str) -> list[str]:
        flags = ["--model", tiny_folders["qwen3"], "--out", tmp_path / out, *QUICK]
        return [sys.executable, "-m", "ws", "replicate", *map(str, flags)]

    killed = subprocess.Popen(command("killed"), stdout=subprocess.PIPE, text=True)
    assert killed.stdout is not None
    for line in killed.stdout:
        if line.startswith("train pos"):
            killed.kill()
            break
    killed.wait()
    assert not list((tmp_path / "killed").rglob("summary.json"))
    again = subprocess.run(command("killed"), capture_output=True, text=True, check=True)
    assert again.stdout.count("done before") >= 2
    subprocess.run(command("whole"), capture_output=True, check=True)
    summaries = [read_json(next((tmp_path / out).rglob("summary.json"))) for out in ("killed", "whole")]
    for summary in summaries:
        del summary["seconds"]
    assert summaries[0] == summaries[1]


@pytest.mark.parametrize("module", ["data", "train", "diff", "replicate"])
def test_modules_are_aliases_of_their_commands(module: str) -> None:
    done = subprocess.run([sys.executable, "-m", f"ws.{module}", "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and f"ws {module}" in done.stdout


def test_showing_a_run_loads_no_model_library(tmp_path: Path) -> None:
    """`ws show` answers at once: what it imports says whether it can."""
    program = (
        "import sys; from ws.report import terminal; "
        "print([name for name in ('torch', 'transformers', 'scipy', 'peft', 'matplotlib') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert found.stdout.strip() == "[]"
