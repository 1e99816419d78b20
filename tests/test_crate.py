"""The tokenizer's crate: its own tests, its format, and no warnings."""
import shutil
import subprocess

import pytest
from conftest import REPO


def cargo(*arguments):
    return subprocess.run(["cargo", *arguments], cwd=REPO/"rustbpe", stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=800)


@pytest.fixture(autouse=True, scope="module")
def needs_cargo():
    if not shutil.which("cargo"): pytest.skip("cargo is not installed")


def needs(component):
    if cargo(component, "--version").returncode: pytest.skip(f"cargo has no component {component}")


def test_cargo_test():
    done = cargo("test", "--quiet", "--lib")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "test result: ok" in done.stdout


def test_format():
    needs("fmt")
    done = cargo("fmt", "--check")
    assert done.returncode == 0, done.stdout[-2000:]


def test_no_warnings():
    needs("clippy")
    done = cargo("clippy", "--quiet", "--all-targets", "--features", "python", "--", "-D", "warnings")
    assert done.returncode == 0, done.stderr[-4000:]
