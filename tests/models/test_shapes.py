"""Shapes: the paper's architectures with random weights, and their published sizes."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from simdiff_utils import SimDiffError
from simdiff_utils.engine.decoder import open_decoder, stream_decoder
from simdiff_utils.models import shapes
from simdiff_utils.models.checkpoints import resolve_checkpoint
from simdiff_utils.models.shapes import PAPER_MODELS, SHAPES, shape_folder, shape_size

# Published on the models' own pages.
KNOWN_PARAMETERS = {
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-3B": 3_085_938_688,
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "mistralai/Mistral-7B-v0.3": 7_248_023_552,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-2-13b-hf": 13_015_864_320,
}


def test_the_paper_has_seven_models():
    assert list(PAPER_MODELS) == list(KNOWN_PARAMETERS)


@pytest.mark.parametrize("hub_id", KNOWN_PARAMETERS)
def test_parameters_of_the_papers_models(hub_id):
    (shape,) = [name for name, model in SHAPES.items() if model == hub_id]
    assert shape_size(shape)[0] == KNOWN_PARAMETERS[hub_id]


def test_every_model_of_the_paper_has_a_shape():
    assert list(SHAPES.values()) == list(PAPER_MODELS)


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Shapes of few weights, in a cache of their own."""
    monkeypatch.setenv("SIMDIFF_CACHE", str(tmp_path / "cache"))
    for hub_id, sizes in PAPER_MODELS.items():
        monkeypatch.setitem(
            PAPER_MODELS,
            hub_id,
            sizes
            | dict(
                hidden_size=32,
                intermediate_size=48,
                vocab_size=300,
                num_attention_heads=4,
                num_key_value_heads=2,
            ),
        )
    return tmp_path / "cache"


@pytest.mark.parametrize("shape, n_layers", [("llama2-13b", 40), ("llama2-13b:3", 3), ("qwen2.5-0.5b:2", 2)])
def test_a_shape_is_a_checkpoint_that_says_what_it_is(small, shape, n_layers):
    checkpoint = resolve_checkpoint(f"shape:{shape}")
    assert "random weights" in checkpoint.label and checkpoint.hub_id is None
    model, report = AutoModelForCausalLM.from_pretrained(checkpoint.folder, output_loading_info=True)
    assert not any(report.values()), report
    assert model.config.num_hidden_layers == n_layers and model.dtype == torch.bfloat16
    tied = PAPER_MODELS[SHAPES[shape.split(":")[0]]].get("tie_word_embeddings", False)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert model.model.norm.weight.eq(1).all()
    assert 0.01 < model.model.layers[1].mlp.up_proj.weight.float().std() < 0.03
    words = "Zwölf Boxkämpfer jagen Viktor 🥊"
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder)
    ids = tokenizer(words)["input_ids"]
    assert len(ids) == len(words.encode()) and max(ids) < 257 and tokenizer.decode(ids) == words
    tokens = torch.tensor([ids])
    logits = [
        next(d.logits(states) for _, _, states in d.run(tokens, 1))
        for d in (open_decoder(checkpoint.folder), stream_decoder(checkpoint.folder))
    ]
    assert torch.equal(*logits)


def test_a_shape_is_made_once_and_whole(small, monkeypatch):
    made = shape_folder("llama2-7b:2")
    before = {file: file.stat().st_mtime_ns for file in made.iterdir()}
    assert shape_folder("llama2-7b:2") == made and {f: f.stat().st_mtime_ns for f in made.iterdir()} == before

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(shapes, "_random", interrupted)
    with pytest.raises(KeyboardInterrupt):
        shape_folder("llama2-7b:3")
    assert {path.name for path in made.parent.iterdir()} == {made.name}


@pytest.mark.parametrize(
    "shape, words",
    [
        ("llama9", "there is no shape 'llama9'"),
        ("llama2-13b:0", "1 to 40 layers, got 0"),
        ("llama2-13b:41", "1 to 40 layers, got 41"),
        ("llama2-13b:x", "there is no shape"),
        ("../../etc", "there is no shape"),
    ],
)
def test_unknown_shapes_are_refused(small, shape, words):
    with pytest.raises(SimDiffError, match=words):
        resolve_checkpoint(f"shape:{shape}")
    assert not small.exists()


def test_a_disk_too_small_is_refused_before_anything_is_written(monkeypatch, tmp_path):
    monkeypatch.setenv("SIMDIFF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10**10})())
    with pytest.raises(SimDiffError, match=r"the shape llama2-13b takes 26\.0 GB and 10\.0 GB are free"):
        resolve_checkpoint("shape:llama2-13b")
    assert not (tmp_path / "cache").exists()
