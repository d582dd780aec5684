import re
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sunfish_jax.workdir.config import record_config

ROOT = Path(__file__).parents[1]
NANO = f"--config={ROOT}/configs/nano.py"


def main(*arguments: str, folder: Path) -> subprocess.CompletedProcess:
    # From another folder, with nothing but the script's own way of finding its modules.
    return subprocess.run(
        [sys.executable, str(ROOT / "main.py"), *arguments], capture_output=True, text=True, cwd=folder
    )


@pytest.fixture
def run_without_checkpoint(tmp_path) -> Path:
    config = runpy.run_path(str(ROOT / "configs/nano.py"))["get_config"]()
    record_config(tmp_path / "workdir", config, step=0)
    return tmp_path


def test_help_names_the_flags(tmp_path):
    done = main("--help", folder=tmp_path)
    assert done.returncode == 0
    for flag in ("--prompt", "--prompts_file", "--text", "--checkpoint", "--split", "--guidance_scale", "--config"):
        assert f"{flag}:" in done.stdout


def test_what_help_imports_is_light():
    heavy = ("jax", "flax", "orbax", "transformers", "tensorflow", "torch", "numpy")
    code = f"import sys, main; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "[]\n"


# Arguments, and what the one line must say.
WRONG_ARGUMENTS = [
    ([], ["--config is missing"]),
    (["sample"], ["'sample' is not a flag"]),
    (["--mode=smaple"], ["--mode=smaple", "train, sample, infill, eval"]),
    (["--confg=x"], ["confg", "config"]),
    (["--config.model.width=3"], ["--config is missing"]),
    (["--config.model.width=3", "--mode=smaple"], ["--config is missing"]),
    (["--config.model.width=3", "--mode=eval"], ["--config.model.width means nothing with --mode=eval"]),
    (["--config=nowhere.py"], ["--config=nowhere.py", "no such file"]),
    (["--config=broken.py"], ["broken.py, line 2", "NameError"]),
    (["--config=unclosed.py"], ["unclosed.py", "SyntaxError"]),
    (["--config=empty.py"], ["empty.py", "get_config"]),
    (["--config=extra.py"], ["config.model.widht", "did you mean config.model.width?"]),
    ([NANO, "--config.model.widht=3"], ["config.model.widht", "did you mean config.model.width?"]),
    ([NANO, "--config.modle.width", "3"], ["config.modle.width", "did you mean config.model.width?"]),
    ([NANO, "--config.num_steps=3"], ["config.num_steps", "did you mean config.train.num_steps?"]),
    ([NANO, "--config.model.width=wide"], ["--config.model.width=wide"]),
    ([NANO, "--config.model.width=3.5"], ["--config.model.width=3.5"]),
    ([NANO, "--config.model=5"], ["--config.model=5"]),
    ([NANO, "--config.model.num_heads=7"], ["num_heads=7", "width=64"]),
    ([NANO, "--config.logging.sample_prompts=(1, 2)"], ["sample_prompts"]),
    ([NANO, "--workdir=blank.txt"], ["--workdir=blank.txt cannot be made a folder"]),
    ([NANO, "--num_steps=3"], ["--num_steps means nothing with --mode=train"]),
    (["--mode=sample", NANO], ["--config means nothing with --mode=sample"]),
    (["--mode=sample", "--text=a [MASK]"], ["--text means nothing with --mode=sample"]),
    (["--mode=eval", "--prompt=dogs"], ["--prompt means nothing with --mode=eval"]),
    (["--mode=sample", "--workdir=nowhere"], ["--workdir=nowhere", "no run"]),
    (["--mode=sample", "--workdir=~/nowhere"], [f"--workdir={Path.home()}/nowhere", "no run"]),
    (["--mode=sample", "--num_steps=0"], ["--num_steps=0", "at least 1"]),
    (["--mode=sample", "--seq_len=65"], ["--seq_len=65", "at most 64"]),
    (["--mode=infill", "--text=a [MASK]", "--seq_len=65"], ["--seq_len=65", "at most 64"]),
    (["--mode=sample", "--prompt=dogs", "--prompt="], ["--prompt is empty"]),
    (["--mode=sample", f"--prompt={'dog ' * 2500}"], ["10000 characters", "at most 2000"]),
    (["--mode=sample", f"--prompt={'🐕' * 20}"], ["no letter or digit"]),
    (["--mode=sample", "--prompts_file=blank.txt"], ["blank.txt is empty"]),
    (["--mode=sample", "--prompts_file=nowhere.txt"], ["nowhere.txt", "No such file"]),
    (["--mode=sample", "--prompt=a", "--prompts_file=blank.txt"], ["both"]),
    (["--mode=sample", "--temperature=0"], ["--temperature=0", "above 0"]),
    (["--mode=sample", "--guidance_scale=nan"], ["--guidance_scale=nan"]),
    (["--mode=sample", "--guidance_scale=much"], ["--guidance_scale=much"]),
    (["--mode=sample", "--scheduler=euler"], ["--scheduler=euler", "ddim, ddpm, dpmpp"]),
    (["--mode=sample", "--checkpoint=newest"], ["--checkpoint=newest", "latest, best"]),
    (["--mode=sample", "--seed=-1"], ["--seed=-1"]),
    (["--mode=sample", "--output=nowhere/out.jsonl"], ["nowhere"]),
    (["--mode=infill"], ["--text is missing"]),
    (["--mode=infill", "--text=no gap"], ["'no gap' has no gap", "[MASK]"]),
    (["--mode=eval", "--split=train"], ["--split=train", "validation or test"]),
]


def test_bad_input_is_one_line_and_code_2(run_without_checkpoint):
    folder = run_without_checkpoint
    (folder / "broken.py").write_text("def get_config():\n    return nothing\n")
    (folder / "unclosed.py").write_text("def get_config(:\n")
    (folder / "empty.py").write_text("")
    (folder / "extra.py").write_text(
        "import runpy\n\ndef get_config():\n"
        f"    config = runpy.run_path('{ROOT}/configs/nano.py')['get_config']()\n"
        "    config.model.widht = 3\n    return config\n"
    )
    (folder / "blank.txt").write_text("\n  \n")
    before = contents(folder)
    for arguments, words in WRONG_ARGUMENTS:
        assert_one_line(main(*arguments, folder=folder), words)
    assert contents(folder) == before


@pytest.mark.parametrize("mode", ["sample", "eval"])
def test_a_workdir_without_a_checkpoint(run_without_checkpoint, mode):
    before = contents(run_without_checkpoint)
    done = main(f"--mode={mode}", folder=run_without_checkpoint)
    assert_one_line(done, ["error: workdir has no checkpoint yet"])
    assert contents(run_without_checkpoint) == before


def assert_one_line(done: subprocess.CompletedProcess, words: list[str]):
    assert done.returncode == 2, done
    assert done.stdout == "" and re.fullmatch(r"error: .+\n", done.stderr), done
    for word in words:
        assert word in done.stderr, done


def contents(folder: Path) -> dict[Path, bytes]:
    ignored = "__pycache__"
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and ignored not in path.parts}


# An interrupt while C code keeps the main thread, as a compiled function does: no Python handler runs then.
INTERRUPTED = """
import hashlib, os, signal, sys, threading
import main
from sunfish_jax.unfinished import unfinished
def interrupt_myself(workdir):
    threading.Timer(0.2, os.kill, (os.getpid(), int(sys.argv[2]))).start()
    with unfinished(workdir / "folder") as folder, unfinished(workdir / "file") as file:
        folder.mkdir()
        for path in (file, folder / "part"):
            path.write_text("half")
        hashlib.pbkdf2_hmac("sha256", b"", b"", 10**8)
main.MODES["eval"] = interrupt_myself
app_arguments = ["main.py", "--mode=eval", "--workdir=" + sys.argv[1]]
main.app.run(main.main, argv=app_arguments, flags_parser=main.parse_flags)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupting_is_one_line_and_leaves_nothing_unfinished(tmp_path, number):
    # These tests may have been started to outlive their terminal.
    program = "import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL)" + INTERRUPTED
    command = [sys.executable, "-c", program, str(tmp_path), str(int(number))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=20)
    assert (done.returncode, done.stdout, done.stderr) == (128 + number, "", "interrupted\n")
    assert list(tmp_path.iterdir()) == []


# As one who may not write there; root may write anywhere.
NOT_WRITABLE = """
import os, sys
import main
main.os.access = lambda path, mode: False
main.app.run(main.main, argv=["main.py", *sys.argv[1:]], flags_parser=main.parse_flags)
"""


@pytest.mark.parametrize("arguments", [[NANO], ["--mode=eval"]])
def test_a_folder_that_may_not_be_written_to_is_one_line(run_without_checkpoint, arguments):
    command = [sys.executable, "-c", NOT_WRITABLE, *arguments, f"--workdir={run_without_checkpoint / 'workdir'}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert_one_line(done, ["--workdir=", "may not be written to"])


# As one who may not look into a folder.
NOT_READABLE = """
import errno, os, sys
import main
def look(workdir):
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/home/other/run")
main.load_config = look
main.app.run(main.main, argv=["main.py", "--mode=sample"], flags_parser=main.parse_flags)
"""


def test_a_folder_that_may_not_be_looked_into_is_one_line():
    done = subprocess.run([sys.executable, "-c", NOT_READABLE], capture_output=True, text=True, cwd=ROOT)
    assert_one_line(done, ["/home/other/run may not be opened (Permission denied)"])


def test_output_that_nobody_reads_is_no_traceback():
    code = "import sys, main; sys.argv = ['main.py', '--mode=sample']; "
    code += "main.MODES['sample'] = lambda workdir: [print('x' * 80, flush=True) for _ in range(10_000)]; "
    code += "main.app.run(main.main, flags_parser=main.parse_flags)"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    process.stdout.close()
    assert (process.stderr.read(), process.wait(20)) == ("", 1)


# A limit on the size of files is met where a full disk would be.
DISK_FULL = """
import json, resource, sys
import main
from sunfish_jax.workdir.json_file import write_json
def write_much(workdir):
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
    write_json(workdir / "eval.json", list(range(1000)))
main.MODES["eval"] = write_much
sys.argv = ["main.py", "--mode=eval", "--workdir=" + sys.argv[1]]
main.app.run(main.main, flags_parser=main.parse_flags)
"""


def test_a_full_disk_is_one_line_and_keeps_what_was_there(tmp_path):
    (tmp_path / "eval.json").write_text("{}")
    command = [sys.executable, "-c", DISK_FULL, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=20)
    assert_one_line(done, ["File too large", "make room"])
    assert (tmp_path / "eval.json").read_text() == "{}"
