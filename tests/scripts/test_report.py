"""The command: where the page goes, what it refuses, and the address at which it follows a run."""

from __future__ import annotations

import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import HTTPError

import pytest

from nanorlhf.scripts import report
from nanorlhf.scripts.reporting.live import HOME, Server, stamp
from tests.scripts.made_up import write_run


def test_page_lies_in_the_run_or_where_it_is_wanted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", steps=2)
    assert report.main([str(run)]) == 0
    assert f"written to {run / 'report.html'}" in capsys.readouterr().out
    assert report.main([str(run), str(run), "--output", str(tmp_path / "two.html"), "--samples", "0"]) == 0
    one, two = (run / "report.html").read_text(), (tmp_path / "two.html").read_text()
    assert 'id="samples-0"' in one and 'id="samples-' not in two
    assert not list(tmp_path.rglob("*.draft"))


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", steps=1, tokens=False)
    for words, said in [
        ([str(tmp_path)], "no run directory"),
        ([str(run), "--samples", "-1"], "must not be negative"),
        ([str(run), "--output", str(tmp_path / "none" / "x.html")], "cannot be written: No such file"),
        ([str(tmp_path), "--serve", "--port", "0"], "no run directory"),
        ([str(run), "--serve", "--port", "70000"], "port"),
    ]:
        assert report.main(words) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1, error


@contextmanager
def serving(run: Path) -> Iterator[str]:
    server = Server(lambda: report.written([run], 100, stamp([run])), lambda: stamp([run]), 0)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://{HOME}:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def ask(url: str, **headers: str) -> str:
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers)) as answer:  # noqa: S310  our own server
        return answer.read().decode()


def test_served_page_is_renewed_when_the_run_goes_on(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=2)
    with serving(run) as url:
        page, mark = ask(url + "/"), ask(url + "/stamp")
        assert f'"stamp":"{mark}"' in page and "connect-src &#x27;self&#x27;" in page
        assert ask(url + "/") == page, "it is made once"
        with (run / "metrics.jsonl").open("a") as file:
            file.write('{"step": 3, "loss": 0.1259871, "time/step": 1.0}\n')
        assert ask(url + "/stamp") != mark
        assert "0.1259871" not in page and "0.1259871" in ask(url + "/")


def test_served_to_this_machine_alone(tmp_path: Path) -> None:
    with serving(write_run(tmp_path / "run", steps=1, tokens=False)) as url:
        assert url.startswith("http://127.0.0.1:")
        for path, host, code in [
            ("/", "evil.example", 403),
            ("/stamp", "evil.example:80", 403),
            ("/etc/passwd", "", 404),
        ]:
            with pytest.raises(HTTPError) as error:
                ask(url + path, **({"Host": host} if host else {}))
            assert error.value.code == code
            error.value.close()


def test_stamp_changes_with_every_file(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=1, tokens=False)
    seen = {stamp([run])}
    for name in ("config.yaml", "metrics.jsonl", "samples.jsonl"):
        with (run / name).open("a") as file:
            file.write("\n")
        seen.add(stamp([run]))
    assert len(seen) == 4
