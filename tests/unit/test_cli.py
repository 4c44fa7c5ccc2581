"""The command line: fast help, flags from the schema, one line for a person's error, JSON for machines."""

from __future__ import annotations

import json
import os
import pty
import signal
import socket
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from intarsia.app.cli import UsageError
from intarsia.app.cli_console import Console
from intarsia.app.settings import Home
from intarsia.app.studio import Studio
from intarsia.pipelines.errors import InputError
from intarsia.pipelines.events import Done, Progress
from intarsia.pipelines.options import describe
from intarsia.pipelines.requests import AdapterUse, GenerateRequest
from PIL import Image
from safetensors.numpy import save_file

Run = Callable[..., subprocess.CompletedProcess[str]]
COMMANDS = [
    [],
    ["ui"],
    ["generate"],
    ["train"],
    ["train", "lora"],
    ["train", "blora"],
    ["train", "lcm"],
    ["corpus"],
    ["corpus", "build"],
    ["evaluate"],
    *(["evaluate", name] for name in ("base", "composition", "judge", "separation")),
    ["adapters"],
    ["adapters", "import"],
    ["adapters", "list"],
    ["adapters", "inspect"],
    ["adapters", "remove"],
    ["models"],
    ["models", "list"],
    ["models", "info"],
    ["doctor"],
]


def intarsia(*arguments: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "intarsia.app", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def assert_refused(result: subprocess.CompletedProcess[str], *words: str) -> None:
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("error: ") and "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) <= 2, "one line, and what to do about it"
    for word in words:
        assert word in result.stderr


@pytest.fixture(scope="module")
def model(tiny: Callable[..., Path]) -> str:
    return str(tiny("sdxl", variant="vpred"))


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "cat.png"
    Image.linear_gradient("L").convert("RGB").save(path)
    return path


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_help_without_loading_anything_heavy(command: list[str]) -> None:
    code = (
        "import sys; from intarsia.app.cli import app\n"
        "app(sys.argv[1:], standalone_mode=False)\n"
        "heavy = {'torch', 'diffusers', 'gradio', 'numpy'} & {name.partition('.')[0] for name in sys.modules}\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, *command, "--help"], capture_output=True, text=True, timeout=30, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("Usage:")


def test_help_takes_less_than_half_a_second() -> None:
    before = os.times()
    for command in ([], ["generate"], ["train", "blora"], ["doctor"]):
        intarsia(*command, "--help")
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    assert used / 4 < 0.5, "seconds of a core, so that a busy machine does not fail this"


def test_generate_offers_every_option_of_the_request() -> None:
    shown = intarsia("generate", "--help").stdout
    for option in describe(GenerateRequest):
        if option.name not in ("kind", "adapters"):
            assert f"--{option.name.replace('_', '-')} " in shown


@pytest.mark.parametrize("name", list(Studio.recipes()))
def test_every_recipe_has_a_command_with_its_own_options(name: str) -> None:
    shown = intarsia("train", name, "--help").stdout
    for option in describe(Studio.recipes()[name].options):
        assert f"--{option.name.replace('_', '-')} " in shown


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cat", AdapterUse(adapter="cat")),
        ("cat:0.5", AdapterUse(adapter="cat", weight=0.5)),
        ("cat:-1", AdapterUse(adapter="cat", weight=-1)),
        ("./dir/cat.safetensors:2", AdapterUse(adapter="./dir/cat.safetensors", weight=2)),
        (r"C:\cat.safetensors", AdapterUse(adapter=r"C:\cat.safetensors")),
        ("0.5", AdapterUse(adapter="0.5")),
    ],
)
def test_adapters_are_named_with_an_optional_weight(text: str, expected: AdapterUse) -> None:
    assert AdapterUse.read(text) == expected


@pytest.mark.parametrize("text", ["cat:99", "cat:nan", "cat:inf"])
def test_a_weight_out_of_bounds_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="Weight"):
        AdapterUse.read(text)


REFUSED: list[tuple[list[str], str]] = [
    (["generate", "--steps", "0"], "Steps cannot be 0"),
    (["generate", "--steps", "many"], "many"),
    (["generate", "--nonsense"], "--nonsense"),
    (["nonsense"], "nonsense"),
    (["generate", "--model", "/no/such/model"], "/no/such/model"),
    (["generate", "--width", "65"], "Try 64 or 72"),
    (["generate", "--prompt", "x" * 10_000], "10,000 characters, at most 2,000"),
    (["generate", "--adapter", "cat:99"], "Weight cannot be 99"),
    (["generate", "--adapter", "nobody"], "nobody"),
    (["ui", "--port", "99999"], "Port 99999 does not exist"),
    (["--port", "many"], "Port many does not exist"),
    (["generate", "--out", "picture.jpg"], "picture.jpg"),
    (["generate", "--out", "/no/such/folder/a.png"], "/no/such/folder"),
    (["generate", "--scheduler", "magic"], "magic"),
    (["train", "blora", "--name", "cat"], "--image"),
    (["train", "blora", "--image", "/no/such/cat.png", "--name", "cat"], "/no/such/cat.png"),
    (["train", "lora", "--images", "/no/such/folder", "--name", "cat"], "/no/such/folder"),
    (["train", "lora", "--resume", "nobody"], "nobody"),
    (["adapters", "inspect", "/no/such/file.safetensors"], "/no/such/file.safetensors"),
    (["adapters", "remove", "nobody"], "nobody"),
    (["models", "info", "no-such-model"], "no-such-model"),
]


# what lies in the folder of bad files -> how it is refused
BAD_PICTURES = {
    "missing.png": "There is no picture",
    "empty.png": "empty.png is empty",
    "cut.png": "cut off or damaged",
    "text.png": "not a picture",
    "huge.png": "more than 64,000,000 pixels",
    "moving.gif": "an animation of 2 frames",
}
BAD_ZIPS = {
    "leaving.zip": "leads out of its folder",
    "bomb.zip": "times its size",
    "none.zip": "There are no pictures in none.zip",
    "text.zip": "not a usual zip",
}
BAD_ADAPTERS = {
    "missing.safetensors": "There is no file",
    "empty.safetensors": "is empty",
    "header.safetensors": "header of 104,857,600 bytes",
    "zip.safetensors": "a zip or PyTorch pickle",
    **{f"pickle.{ending}": "could run code when opened" for ending in ("ckpt", "pt", "bin")},
    "nan.safetensors": "holds NaN or infinity",
    "z-image.safetensors": "is an adapter for Z-Image",
}


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every kind of file that must be refused."""
    folder = tmp_path_factory.mktemp("bad")
    plain = Image.linear_gradient("L")
    plain.save(folder / "good.png")
    good = (folder / "good.png").read_bytes()
    (folder / "cut.png").write_bytes(good[: len(good) // 2])
    size = b"IHDR" + struct.pack(">IIBBBBB", 20_000, 10_000, 8, 0, 0, 0, 0)
    huge = good[:12] + size + struct.pack(">I", zlib.crc32(size)) + good[33:]
    (folder / "huge.png").write_bytes(huge)
    plain.save(folder / "moving.gif", save_all=True, append_images=[plain.rotate(90)])
    for name in ("empty.png", "empty.safetensors"):
        (folder / name).touch()
    for name in ("text.png", "text.zip"):
        (folder / name).write_text("hello")
    for name, inside, content in (
        ("leaving.zip", "../../evil.png", good),
        ("bomb.zip", "a.png", bytes(20_000_000)),
        ("none.zip", "a.doc", good),
        ("zip.safetensors", "data.pkl", b""),
    ):
        with zipfile.ZipFile(folder / name, "w", zipfile.ZIP_DEFLATED) as pack:
            pack.writestr(inside, content)
    for ending in ("ckpt", "pt", "bin"):
        (folder / f"pickle.{ending}").write_bytes(b"\x80\x02}q\x00.")
    (folder / "header.safetensors").write_bytes(struct.pack("<Q", 100 * 2**20) + b"{" + b" " * 100)
    down, up = np.full((2, 320), np.nan, np.float32), np.ones((320, 2), np.float32)
    layer = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    save_file({f"{layer}.lora_down.weight": down, f"{layer}.lora_up.weight": up}, folder / "nan.safetensors")
    layer = "diffusion_model.layers.0.attention.to_q"
    save_file({f"{layer}.lora_down.weight": up.T.copy(), f"{layer}.lora_up.weight": up}, folder / "z-image.safetensors")
    return folder


@pytest.mark.parametrize(("name", "said"), (BAD_PICTURES | BAD_ZIPS).items(), ids=lambda value: value)
def test_a_bad_picture_or_zip_is_refused_before_the_model_is_loaded(
    home: Home, bad_files: Path, name: str, said: str
) -> None:
    flag = "--images" if name.endswith(".zip") else "--image"
    assert_refused(intarsia("train", "lora", flag, str(bad_files / name), "--name", "cat"), name, said)
    left = [path for path in home.root.rglob("*") if path.is_file() and not path.name.startswith("studio.db")]
    assert left == [] and not (bad_files.parent / "evil.png").exists()
    with Studio(home) as studio:
        assert studio.jobs() == []


@pytest.mark.parametrize(("name", "said"), BAD_ADAPTERS.items(), ids=lambda value: value)
def test_a_bad_adapter_is_refused_and_not_kept(home: Home, bad_files: Path, name: str, said: str) -> None:
    assert_refused(intarsia("adapters", "import", str(bad_files / name)), name, said)
    with Studio(home) as studio:
        assert list(studio.shelf.entries()) == []
    left = [path for path in home.root.rglob("*") if path.is_file() and not path.name.startswith("studio.db")]
    assert left == []


def test_a_port_that_is_taken_is_named(home: Home) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert_refused(intarsia("ui", "--no-browser", "--port", str(port)), f"Port {port} is taken", "--port")


@pytest.mark.parametrize(("arguments", "named"), REFUSED, ids=lambda value: " ".join(value)[:60])
def test_a_persons_error_is_one_line_and_code_2(home: Home, arguments: list[str], named: str) -> None:
    assert_refused(intarsia(*arguments), named)


def test_with_json_a_refusal_is_an_object_too(home: Home) -> None:
    result = intarsia("generate", "--steps", "0", "--json")
    assert result.returncode == 2
    (outcome,) = lines(result.stdout)
    assert outcome["type"] == "result" and outcome["state"] == "failed" and outcome["code"] == "input"


def test_a_home_that_cannot_be_written_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTARSIA_HOME", "/proc/nowhere")
    assert_refused(intarsia("adapters", "list"), "/proc/nowhere")


def test_an_empty_library_lists_as_an_empty_array(home: Home) -> None:
    assert json.loads(intarsia("adapters", "list", "--json").stdout) == []
    assert "intarsia adapters import" in intarsia("adapters", "list").stdout


def test_generate_writes_numbered_pictures_and_one_result(home: Home, model: str, tmp_path: Path) -> None:
    out = tmp_path / "apple.png"
    arguments = ["--model", model, "--prompt", "a red apple", "--seed", "7", "--steps", "2", "--count", "2"]
    result = intarsia("generate", *arguments, "--width", "64", "--height", "64", "--out", str(out), "--json")
    assert result.returncode == 0, result.stderr
    events = lines(result.stdout)
    outcome = events[-1]
    assert [event["type"] for event in events[-2:]] == ["done", "result"]
    assert outcome["pictures"] == [str(tmp_path / "apple-1.png"), str(tmp_path / "apple-2.png")]
    assert outcome["seed"] == 7 and outcome["state"] == "done"
    assert all(Image.open(path).size == (64, 64) for path in outcome["pictures"])
    with Studio(home) as studio:
        assert studio.job(outcome["job"]).state == "done", "the page shows what the command line did"


def test_a_trained_pair_is_used_stopped_and_resumed_from_the_command_line(
    home: Home, model: str, picture: Path, tmp_path: Path
) -> None:
    small = ["--rank", "2", "--resolution", "64", "--sample-every", "0"]
    train = ["train", "blora", "--model", model, "--image", str(picture), "--name", "cat", *small]
    child = subprocess.Popen(
        [sys.executable, "-m", "intarsia.app", *train, "--steps", "9000", "--json"], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    events: list[dict[str, Any]] = []
    for line in child.stdout:
        events.append(json.loads(line))
        if (events[-1]["type"], events[-1].get("name"), events[-1].get("step")) == ("metric", "loss", 3):
            child.send_signal(signal.SIGINT)
    assert child.wait(30) == 130
    assert [event["type"] for event in events[-2:]] == ["stopped", "result"]
    stopped = events[-1]
    assert stopped["state"] == "stopped" and stopped["resumable"]

    resumed = intarsia("train", "blora", "--resume", stopped["job"], "--steps", "30", "--json")
    assert resumed.returncode == 0, resumed.stderr
    outcome = lines(resumed.stdout)[-1]
    assert [adapter["name"] for adapter in outcome["adapters"]] == ["cat-content", "cat-style"]
    metrics = [event["step"] for event in lines(resumed.stdout) if event["type"] == "metric"]
    assert min(metrics) > 1, "it went on instead of starting again"

    known = json.loads(intarsia("adapters", "list", "--json").stdout)
    assert {entry["role"] for entry in known} == {"content", "style"} and len({entry["group"] for entry in known}) == 1
    report = json.loads(intarsia("adapters", "inspect", known[0]["path"], "--model", model, "--json").stdout)
    assert report["family"] == "sdxl" and report["rank"] == 2 and report["matched"] == report["modules"] > 0
    assert {"algorithm", "trigger", "sha256"} <= set(report)

    out = tmp_path / "cat.png"
    arguments = ["--model", model, "--prompt", "x", "--steps", "2", "--width", "64", "--height", "64"]
    used = intarsia("generate", *arguments, "--adapter", "cat-content:0.8", "--adapter", "cat-style", "--out", str(out))
    assert used.returncode == 0, used.stderr
    assert used.stdout.strip() == str(out) and out.is_file()
    assert intarsia("adapters", "remove", "cat-style").returncode == 0
    assert len(json.loads(intarsia("adapters", "list", "--json").stdout)) == 1


def test_without_a_terminal_progress_is_told_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(machine=False)
    for step in range(1, 101):
        console.show(Progress(stage="denoise", step=step, total=100))
    console.show(Done(seconds=1.5))
    console.result({}, "/a.png")
    shown = capsys.readouterr()
    assert shown.out == "/a.png\n" and "\r" not in shown.err
    told = shown.err.splitlines()
    assert told[0] == "Drawing: step 1 of 100" and told[1].startswith("Drawing: step 100 of 100") and len(told) == 3


def test_the_progress_line_is_rewritten_on_a_terminal(home: Home, model: str) -> None:
    arguments = ["generate", "--model", model, "--prompt", "x", "--steps", "4", "--width", "64", "--height", "64"]
    ours, theirs = pty.openpty()
    child = subprocess.Popen([sys.executable, "-m", "intarsia.app", *arguments], stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # how Linux says that the other side is closed
            break
        if not part:
            break
        shown += part
    assert child.wait(30) == 0
    assert b"\r\x1b[K" in shown and b"step 4 of 4" in shown


def test_usage_errors_of_the_parser_are_caught() -> None:
    assert UsageError.__name__ == "ClickException"
    assert issubclass(typer.BadParameter, UsageError)


def test_doctor_lists_every_check(home: Home) -> None:
    result = intarsia("doctor", "--json", timeout=200)
    checks = {check["name"]: check for check in json.loads(result.stdout)}
    assert {"python", "torch", "memory", "disk", "home", "mini", "browser"} <= set(checks)
    assert checks["torch"]["state"] == "ok" and checks["home"]["text"] == str(home.root)
    bad = [check for check in checks.values() if check["state"] == "bad"]
    assert result.returncode == (2 if bad else 0)
    assert all(check["hint"] for check in bad), "every red line says what to do"
