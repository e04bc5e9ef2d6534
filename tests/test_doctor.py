"""What the doctor finds out about a machine."""

from __future__ import annotations

import json
import platform
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from moe_lens import __version__
from moe_lens.machine import doctor, facts
from moe_lens.machine.doctor import advice
from moe_lens.machine.facts import Device, Products
from moe_lens.machine.hub import Hub, cached_models, hub

CPU = Device(default="cpu", name="a processor", metal=False, cuda=False)
GPU = Device(default="gpu", name="a chip", metal=True, cuda=False)
REFERENCE = "/site-packages/mlx_cpu.libs/libblas-0.so.3"


def speed(mlx: float, numpy: float, *, blas: str | None = None) -> Products:
    reference = blas == REFERENCE
    return Products(size=512, mlx=mlx, numpy=numpy, error=0.0, blas=blas, reference=reference)


def test_versions() -> None:
    found = facts.versions()
    assert found["moe-lens"] == __version__
    assert found["python"] == platform.python_version()
    assert found["mlx"] == version("mlx")


def test_a_package_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts, "PACKAGES", ("no-such-package",))
    assert facts.versions()["no-such-package"] is None


def test_device() -> None:
    found = facts.device()
    assert found.default == ("gpu" if mx.default_device() == mx.gpu else "cpu")
    assert found.metal == mx.metal.is_available()


def test_memory() -> None:
    found = facts.memory()
    assert found.total is not None
    assert found.total > 2**28
    assert found.available is None or 0 < found.available <= found.total


def test_products_are_measured_and_right() -> None:
    found = facts.products()
    assert found.mlx > 0
    assert found.numpy > 0
    assert found.error < 1e-4


def test_a_preloaded_blas_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    library = tmp_path / "libopenblas.so.0"
    library.touch()
    carried = Path(REFERENCE)
    maps = "".join(f"7f00-7f01 r-xp 0 08:01 1 {path}\n" for path in (library, carried))
    monkeypatch.setattr(facts, "_read", lambda _: maps)
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    assert facts._blas() == str(carried)
    monkeypatch.setenv("LD_PRELOAD", f"libother.so:{library}")
    assert facts._blas() == str(library)


def test_advice_where_the_blas_is_slow() -> None:
    (found,) = advice(CPU, speed(5, 80, blas=REFERENCE))
    assert "16 times" in found.text
    assert found.commands[-1].startswith("export LD_PRELOAD=/usr/lib/")
    (found,) = advice(CPU, speed(5, 6, blas=REFERENCE))  # a busy machine measures little
    assert "times faster than" not in found.text
    (found,) = advice(CPU, speed(5, 80))
    assert found.commands == ()


def test_no_advice_where_nothing_is_slow() -> None:
    assert advice(CPU, speed(80, 80)) == ()
    assert advice(CPU, speed(30, 80, blas="/usr/lib/libopenblas.so.0")) == ()
    assert advice(GPU, speed(5, 80)) == ()
    assert advice(CPU, None) == ()


@contextmanager
def server(status: int) -> Iterator[str]:
    class Answer(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as listening:
        thread = threading.Thread(target=listening.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.server_port}"
        finally:
            listening.shutdown()
            thread.join()


@pytest.mark.parametrize(("status", "reachable"), [(200, True), (503, False)])
def test_hub(monkeypatch: pytest.MonkeyPatch, status: int, reachable: bool) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with server(status) as address:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        found = hub()
    assert (found.endpoint, found.reachable) == (address, reachable)
    assert str(status) in found.detail or reachable
    unreachable = hub(timeout=1)  # the server is gone
    assert unreachable.reachable is False
    assert unreachable.detail


def test_offline_asks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("urllib.request.urlopen", None)
    assert hub().reachable is None


def test_cached_models(tmp_path: Path) -> None:
    assert cached_models(tmp_path / "none") == ()
    for name, kind, size in (("some/moe", "qwen3_moe", 900), ("some/dense", "llama", 2000)):
        repository = tmp_path / f"models--{name.replace('/', '--')}"
        snapshot = repository / "snapshots" / "0123abc"
        snapshot.mkdir(parents=True)
        (snapshot / "config.json").write_text(json.dumps({"model_type": kind}))
        (snapshot / "weights").write_bytes(bytes(size))
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("0123abc")
    broken = tmp_path / "models--some--broken" / "snapshots" / "4567def"
    broken.mkdir(parents=True)
    (broken / "config.json").write_text("{")
    found = {each.name: each for each in cached_models(tmp_path)}
    assert next(iter(found)) == "some/dense"
    assert found["some/moe"].supported
    assert found["some/moe"].bytes > 900
    assert (found["some/dense"].model_type, found["some/dense"].supported) == ("llama", False)
    assert "some/broken" not in found or found["some/broken"].model_type is None


def test_a_machine_without_mlx(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Device:
        raise ImportError("libmlx.so: cannot open shared object file")

    monkeypatch.setattr(doctor, "device", fail)
    monkeypatch.setattr(doctor, "hub", lambda _: Hub("https://hub", None, "not asked"))
    found = doctor.examine()
    assert found.device is None
    assert found.products is None
    assert found.problems == (
        "MLX cannot be used (libmlx.so: cannot open shared object file): install it again with pip",
    )


def test_wrong_products_are_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = Products(512, 5.0, 5.0, error=float("nan"), blas=None, reference=False)
    monkeypatch.setattr(doctor, "products", lambda: wrong)
    monkeypatch.setattr(doctor, "hub", lambda _: Hub("https://hub", None, "not asked"))
    (problem,) = doctor.examine().problems
    assert "wrong" in problem
