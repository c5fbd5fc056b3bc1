"""Datasets on S3, spoken to over HTTP: a server of its own process, and a network that fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from busigen.errors import OutputError
from busigen.runtime.storage.object_store import RetryingCaller, RetryPolicy, Store
from busigen.runtime.storage.url import Address
from tests.harness.command import CLI
from tests.harness.hashing import hashes
from tests.harness.processes import GUARD_SECONDS, ROOT, Hold, listening, read_until, wait_for
from tests.harness.stores import Line, refusing_server, s3_environment, s3_server
from tests.runtime.output.test_remote_output import started, swept

LOOK = """
import json, sys
from tests.harness.remote_crash_sweep import contents
print(json.dumps(contents(sys.argv[1])))
"""
MAKE = "import sys, s3fs; s3fs.S3FileSystem().mkdir(sys.argv[1])"


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with s3_server(tmp_path_factory.mktemp("s3") / "log") as port:
        environment = {**os.environ, **s3_environment(port)}
        subprocess.run([sys.executable, "-c", MAKE, "bucket"], env=environment, check=True)
        yield port


@pytest.fixture
def s3(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have this process's children find the server."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_REGION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in s3_environment(port).items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def line(port: int, s3: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Line]:
    """A line to the server, which children use."""
    line = Line(port)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{line.port}")
    yield line
    line.close()


@pytest.fixture
def url(request: pytest.FixtureRequest) -> str:
    return f"s3://bucket/{request.node.name}"


def contents(url: str) -> dict[str, str]:
    done = subprocess.run([sys.executable, "-c", LOOK, url], cwd=ROOT, capture_output=True, text=True, check=True)
    found: dict[str, str] = json.loads(done.stdout)
    return found


def finished(process: subprocess.Popen[str]) -> str:
    _, errors = process.communicate(timeout=GUARD_SECONDS)
    assert process.returncode == 0, errors
    return errors


def test_the_files_are_those_of_a_folder_whatever_publishes_them(
    s3: None, url: str, tmp_path: Path, pristine: Path
) -> None:
    finished(started(f"{url}/one", tmp_path / "spools"))
    finished(started(f"{url}/workers", tmp_path / "spools", "--workers", 2))
    assert contents(f"{url}/one") == contents(f"{url}/workers") == hashes(pristine)
    assert "already_complete=True" in finished(started(f"{url}/one", tmp_path / "spools"))
    assert not list((tmp_path / "spools").iterdir())
    done = subprocess.run([*CLI, "verify", f"{url}/one"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"{url}/one is sound: 8 samples in 3 shards read\n")


@pytest.mark.slow
def test_a_killed_run_continues_wherever_it_was_killed(s3: None, url: str, tmp_path: Path) -> None:
    tally = swept(url, tmp_path, 4)
    assert tally.pop("killed") >= 8
    assert not any(tally.values()), tally


@pytest.mark.slow
def test_a_killed_run_continues_from_every_change(s3: None, url: str, tmp_path: Path) -> None:
    tally = swept(url, tmp_path, 1)
    assert tally.pop("killed") >= 30
    assert not any(tally.values()), tally


@pytest.mark.slow
def test_a_network_that_comes_back_is_waited_for(line: Line, url: str, tmp_path: Path, pristine: Path) -> None:
    hold = Hold(tmp_path, 4)
    process = started(url, tmp_path / "spools", hold=hold)
    wait_for(process, hold.reached)
    line.cut()
    hold.release()
    read_until(process, "out of reach")
    line.mend()
    finished(process)
    assert contents(url) == hashes(pristine)


@pytest.mark.slow
def test_a_network_that_stays_away_ends_the_run_and_a_rerun_sends_what_the_spool_holds(
    line: Line, url: str, tmp_path: Path, pristine: Path
) -> None:
    hold = Hold(tmp_path, 4)
    process = started(url, tmp_path / "spools", "--retry", 2, hold=hold)
    wait_for(process, hold.reached)
    line.cut()
    hold.release()
    _, errors = process.communicate(timeout=GUARD_SECONDS)
    assert process.returncode == 4, errors
    assert f"{url} cannot be reached or used" in errors
    assert "run the same command again: what is complete is kept" in errors
    # What was drawn is not lost with the network.
    held = {path.stem for path in (tmp_path / "spools").rglob("shards/*.json")}
    assert held
    line.mend()
    before = {Path(name).stem for name in contents(url) if name.startswith("shards/") and name.endswith(".json")}
    assert f"written={3 - len(held | before)}," in finished(started(url, tmp_path / "spools"))
    assert contents(url) == hashes(pristine)
    assert not list((tmp_path / "spools").iterdir())


@pytest.mark.slow
def test_a_second_ctrl_c_ends_a_run_that_waits_for_its_network(line: Line, url: str, tmp_path: Path) -> None:
    hold = Hold(tmp_path, 4)
    process = started(url, tmp_path / "spools", "--retry", 2 * GUARD_SECONDS, hold=hold)
    wait_for(process, hold.reached)
    line.cut()
    hold.release()
    read_until(process, "out of reach")
    process.terminate()
    read_until(process, "finishing ")
    process.terminate()
    _, errors = process.communicate(timeout=GUARD_SECONDS)
    assert process.returncode == 143, errors
    # The latter where this machine has so much to do that the process is taken for stuck.
    assert "Terminated with" in errors or "Terminated while work was under way" in errors
    assert "Run the same command again to continue" in errors


def test_a_second_writer_is_refused(s3: None, url: str, tmp_path: Path, pristine: Path) -> None:
    first = started(url, tmp_path / "spools", "--seconds", GUARD_SECONDS, "--beat", 1)
    read_until(first, "generating")
    second = started(url, tmp_path / "elsewhere", "--beat", 1, "--dead", GUARD_SECONDS)
    _, errors = second.communicate(timeout=GUARD_SECONDS)
    assert second.returncode == 4, errors
    assert f"{url} is being written by process {first.pid} on " in errors
    first.kill()
    first.wait()
    finished(started(url, tmp_path / "spools"))
    assert contents(url) == hashes(pristine)


@pytest.mark.parametrize(
    ("place", "environment", "described"),
    [
        ("s3://nowhere/set", {}, "there is no 'nowhere'. Create it first"),
        ("s3://No_Bucket!/set", {}, "is no valid name"),
        ("s3://bucket/set", {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, "no credentials are found"),
    ],
)
def test_a_store_that_cannot_be_used_is_told_at_once(
    s3: None, tmp_path: Path, place: str, environment: dict[str, str], described: str
) -> None:
    arguments = ["generate", "--count", "2", "--out", place, "--spool", str(tmp_path)]
    done = subprocess.run(
        [*CLI, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
        preexec_fn=listening,
    )
    assert done.returncode == 4, done.stderr
    assert described in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("status", "code", "fix"),
    [
        (400, "XAmzContentSHA256Mismatch", "Set AWS_REQUEST_CHECKSUM_CALCULATION=WHEN_REQUIRED"),
        (501, "XAmzTrailerNotImplemented", "Set AWS_REQUEST_CHECKSUM_CALCULATION=WHEN_REQUIRED"),
        (400, "SomethingOfTheirs", "Check the URL, the endpoint and the store's settings"),
        (401, "Unauthorised", "Check that the credentials are valid"),
        (301, "PermanentRedirect", "Check the URL, the endpoint and the store's settings"),
    ],
)
def test_an_answer_that_cannot_change_ends_a_run_at_once(
    s3: None, monkeypatch: pytest.MonkeyPatch, status: int, code: str, fix: str
) -> None:
    described: list[str] = []
    with refusing_server(status, code) as port:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        store = Store(RetryingCaller(Address("s3://bucket/set"), notify=described.append))
        with pytest.raises(OutputError, match=code) as refused:
            store.write("run.json", b"{}")
    assert fix in refused.value.fix
    # It would have been told that the store is out of reach and tried again, for five minutes.
    assert described == []


@pytest.mark.parametrize(
    ("status", "code", "again"),
    [
        (429, "TooManyRequests", True),
        (503, "SlowDown", True),
        (500, "InternalError", True),
        (502, "", True),
        (400, "RequestTimeout", True),
        (400, "ThrottlingException", True),
        (403, "RequestTimeTooSkewed", True),
        (409, "OperationAborted", True),
        (403, "SignatureDoesNotMatch", False),
        (400, "BadDigest", False),
        (405, "MethodNotAllowed", False),
        (501, "NotImplemented", False),
    ],
)
def test_what_may_be_answered_otherwise_is_asked_again(status: int, code: str, again: bool) -> None:
    """Errors as s3fs raises them, which hides what the server said behind errors of the operating system."""
    from botocore.exceptions import ClientError
    from s3fs.errors import translate_boto_error

    answers = iter([{"Error": {"Code": code, "Message": code}, "ResponseMetadata": {"HTTPStatusCode": status}}])

    def ask() -> str:
        for answer in answers:
            raise translate_boto_error(ClientError(answer, "PutObject"))
        return "done"

    caller = RetryingCaller(Address("s3://bucket/set"), RetryPolicy(first=0.0))
    if again:
        assert caller.call(ask) == "done"
    else:
        with pytest.raises(OutputError, match=code):
            caller.call(ask)


@pytest.mark.parametrize(
    ("error", "fix"),
    [
        (OSError("Forbidden: https://storage.googleapis.com/x\nnot for you"), "Check that the credentials are valid"),
        (ValueError("Bad Request: https://storage.googleapis.com/x\ninvalid"), "Check the URL, the endpoint"),
    ],
)
def test_what_gcsfs_says_in_words_is_no_lost_network(error: Exception, fix: str) -> None:
    def ask() -> None:
        raise error

    with pytest.raises(OutputError) as refused:
        RetryingCaller(Address("gs://bucket/set"), RetryPolicy(total=0.0)).call(ask)
    assert fix in refused.value.fix


@pytest.mark.parametrize(
    ("variable", "value", "described"),
    [
        ("AWS_ENDPOINT_URL", "127.0.0.1:9000", "Invalid endpoint: 127.0.0.1:9000"),
        ("AWS_PROFILE", "nobody", r"The config profile \(nobody\) could not be found"),
    ],
)
def test_settings_that_cannot_work_are_told_at_once(
    s3: None, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, described: str
) -> None:
    monkeypatch.setenv(variable, value)
    lines: list[str] = []
    with pytest.raises(OutputError, match=described) as refused:
        Store(RetryingCaller(Address("s3://bucket/set"), notify=lines.append))
    assert "AWS_PROFILE and AWS_ENDPOINT_URL" in refused.value.fix
    assert lines == []


def test_large_files_are_read_back(s3: None, port: int, url: str, tmp_path: Path) -> None:
    """A file that is sent in parts has an ETag that is no MD5 of it."""
    store = Store(RetryingCaller(Address(url), RetryPolicy(total=0.0)))
    large = tmp_path / "large"
    large.write_bytes(os.urandom(1 << 20) * 101)
    store.put(large, "large")
    tag: Any = store._fs.info(store._path("large"))["ETag"]
    assert "-" in tag, "it was to be sent in parts"
    store.get("large", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == large.read_bytes()


READ = """
import sys
from torch.utils.data import DataLoader
from busigen import Dataset
from busigen.torch import PairDataset, PairStream
# So that the workers fork off a process with connections.
assert Dataset(sys.argv[1], check=True)[0].key == "000000000"
for data in (PairDataset(sys.argv[1]), PairStream(sys.argv[1])):
    loader = DataLoader(data, batch_size=2, num_workers=2, multiprocessing_context="fork")
    print(*sorted(key for batch in loader for key in batch["key"]))
"""


def test_workers_of_a_data_loader_read_from_it(s3: None, url: str, tmp_path: Path) -> None:
    finished(started(url, tmp_path / "spools"))
    done = subprocess.run(
        [sys.executable, "-c", READ, url], cwd=ROOT, capture_output=True, text=True, timeout=GUARD_SECONDS, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [" ".join(f"{index:09d}" for index in range(8))] * 2
