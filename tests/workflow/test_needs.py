"""What a grid needs, before it starts: every model's size without its weights, and sentences for what would
stop it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from simdiff_utils import SimDiffError
from simdiff_utils.engine.decoder import open_decoder
from simdiff_utils.engine.load import decoder_layers, load_model
from simdiff_utils.models.checkpoints import checkpoint_folder
from workflow import needs
from workflow.needs import ModelSize, check_grid, estimate_needs, look_up
from workflow.plan import plan_runs, read_config

FOLDER = Path(__file__).parents[2] / "notebooks"
LLAMA = ModelSize(8_030_261_248, 32, 1_050_677_248, 16_060_522_496, False)


def plan(**asked):
    return plan_runs(read_config(asked, {}), FOLDER)


def run_of(number, **asked):
    runs = plan(recovery=True, speed=True, comparison=True, **asked).values()
    return next(run for run in runs if run.notebook.startswith(number))


@pytest.mark.parametrize("name", ["llama", "gemma3", "mixtral", "gpt2"])
def test_a_folder_is_counted_without_loading_it(make_tiny, name, tmp_path):
    model = make_tiny(name)
    model.save_pretrained(tmp_path)
    size = look_up(str(tmp_path))
    layers = decoder_layers(model)
    inside = sum(p.numel() for p in layers.parameters())
    total = sum(p.numel() for p in model.parameters())
    assert (size.n_parameters, size.n_outside, size.n_layers) == (total, total - inside, len(layers))
    assert size.n_bytes == 4 * total and size.here


def test_an_embedded_model_a_shape_and_a_gguf_file_are_counted_alike():
    embedded = look_up("embedded:smollm2-135m-instruct")
    model = load_model(checkpoint_folder("embedded:smollm2-135m-instruct"), "float32")
    assert embedded.n_parameters == sum(p.numel() for p in model.parameters()) and embedded.n_layers == 30
    gguf = look_up(str(needs.assets.locate_model("smollm2-135m-instruct")[1]))
    assert (gguf.n_parameters, gguf.n_outside) == (embedded.n_parameters, embedded.n_outside)
    assert look_up("shape:llama3.1-8b") == LLAMA


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ("embedded:nothing", "there is no embedded model 'nothing'"),
        ("shape:x", "there is no shape 'x'"),
        ("no/file.gguf", "there is no file"),
        ("a model; rm -rf $(HOME)", "neither a local folder"),
        ("org/name", "org/name cannot be reached on the hub"),
    ],
)
def test_what_cannot_be_had_is_one_sentence(model, sentence, monkeypatch):
    def nothing_cached(*_, **__):
        raise FileNotFoundError

    monkeypatch.setattr(needs, "snapshot_download", nothing_cached)
    with pytest.raises(SimDiffError, match=sentence):
        look_up(model)


def test_a_folder_without_weights_is_one_sentence(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SimDiffError, match="no Hugging Face model folder with safetensors weights"):
        look_up(str(tmp_path))


def test_a_gguf_file_that_is_none_is_one_sentence(tmp_path):
    (tmp_path / "m.gguf").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(SimDiffError, match="m.gguf is no GGUF file that can be read"):
        look_up(str(tmp_path / "m.gguf"))


def test_a_count_of_layers_that_is_a_text_is_one_sentence(make_tiny, tmp_path):
    make_tiny("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": "six"}))
    with pytest.raises(SimDiffError, match="num_hidden_layers = 'six', which is no number"):
        look_up(str(tmp_path))


def test_needs_grow_with_the_model_and_gpus_are_counted_from_their_size():
    small = estimate_needs(run_of("03"), look_up("embedded:smollm2-135m-instruct"))
    large_run = run_of("03", dtype="bfloat16")
    large = {gpu_gib: estimate_needs(large_run, LLAMA, gpu_gib) for gpu_gib in (0, 24, 80)}
    assert small.memory_gib < 6
    assert 33 < large[0].memory_gib < 36 and large[0].least_gib < 6  # two of 15 GiB; streamed, much less
    assert [large[gpu_gib].n_gpus for gpu_gib in (0, 24, 80)] == [0, 2, 1]
    assert large[0].disk_bytes == int(LLAMA.n_bytes * (1 - 6 / 32))


@pytest.mark.parametrize("setting", [{"criterion": "taylor"}, {"criteria": ["cosine", "taylor"]}])
def test_a_criterion_that_takes_gradients_holds_them_beside_the_weights_and_streams_nothing(setting):
    plain, taylor = (estimate_needs(run_of("03", dtype="bfloat16", **s), LLAMA) for s in ({}, setting))
    assert taylor.memory_gib - plain.memory_gib == pytest.approx(2 * LLAMA.n_parameters / 2**30)
    assert taylor.least_gib > 45 > plain.memory_gib


def test_streaming_is_said_to_fit_where_it_does(make_tiny, tmp_path):
    """The least that is said to be needed is never more than the model whole."""
    make_tiny("llama").save_pretrained(tmp_path)
    size = look_up(str(tmp_path))
    for number in ("01", "02", "03", "06"):
        found = estimate_needs(run_of(number), size)
        assert found.least_gib <= found.memory_gib
    used = psutil.Process().memory_info().rss / 2**30  # by whatever ran before in this process
    open_decoder(tmp_path, "float32", used + 0.5, 16)  # and such a budget is enough


def test_a_grid_that_cannot_run_says_all_that_would_stop_it(tmp_path, monkeypatch):
    monkeypatch.setattr(needs, "look_up", lambda model: LLAMA if model == "large/one" else look_up(model))
    runs = plan(model=["large/one", "embedded:nothing"], recovery=True, dtype="bfloat16")
    monkeypatch.setattr(needs.psutil, "virtual_memory", lambda: type("Memory", (), {"total": 16 * 2**30}))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10**9}))
    problems = check_grid(runs, set(), tmp_path, True, 0)
    expected = [
        "embedded model 'nothing'",
        "04_lora_recovery of large/one needs about",
        "what this grid writes takes 26.1 GB",
        "fetching this grid's models takes 16.1 GB",
    ]
    assert len(problems) == 4 and not any("\n" in problem for problem in problems)
    assert all(words in problem for words, problem in zip(expected, problems, strict=True)), problems
    elsewhere = check_grid(runs, set(), tmp_path, False, 0)
    assert len(elsewhere) == 3  # the memory of another machine is not ours to know
    assert not check_grid(runs, set(runs), tmp_path, True, 0)  # what is there needs nothing


def test_nothing_heavy_is_loaded_before_a_grid_starts():
    code = (
        "import sys; import workflow.needs, workflow.report; "
        "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    root = FOLDER.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
