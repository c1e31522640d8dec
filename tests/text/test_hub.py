"""The hub's wrapper: names, an outage that is not waited for, one sentence. No network."""

import datasets
import huggingface_hub
import pytest
from huggingface_hub import constants

from simdiff_utils import SimDiffError
from simdiff_utils.text import hub


def test_names_of_data_sets():
    assert hub.split_name("org/name") == ("org/name", None)
    assert hub.split_name("org/some-data:en.v1") == ("org/some-data", "en.v1")
    assert [hub.split_name(name) for name in ("name", "a/b/c", "/b", "a/b:", "a b/c")] == [None] * 5


@pytest.mark.parametrize("answers", [True, False])
def test_a_hub_that_does_not_answer_is_not_waited_for(monkeypatch, answers):
    """One look with a short limit, then `datasets` and the hub's client know that they are offline."""
    seen = []

    class Session:
        def head(self, url, timeout):
            assert timeout <= 5
            if not answers:
                raise ConnectionError

    def load_dataset(*args, **options):
        seen.append((*args, options, datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE))

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # conftest sets both
    monkeypatch.setattr(huggingface_hub, "get_session", Session)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    hub._hub_answers.cache_clear()
    hub.load_hub("org/name", "config", split="train")
    hub._hub_answers.cache_clear()
    assert seen == [("org/name", "config", {"split": "train"}, not answers, not answers)]
    assert not datasets.config.HF_HUB_OFFLINE and not constants.HF_HUB_OFFLINE


GATED = datasets.exceptions.DatasetNotFoundError("a gated dataset")
OUTAGE = ConnectionError("Couldn't reach it\non the Hub")


@pytest.mark.parametrize(
    "error, hint, sentence",
    [
        (
            OUTAGE,
            "offline, name a file",
            r"org/name \(.* on the Hub\): check the name; offline, name a file\.$",
        ),
        (OUTAGE, "", r"^the hub does not give org/name \(Couldn't reach it on the Hub\)$"),
        (
            GATED,
            "offline, name a file",
            r"check the name; accept the licence on its page, then `hf auth login`\.$",
        ),
    ],
)
def test_a_hub_that_gives_nothing_is_one_sentence(monkeypatch, error, hint, sentence):
    def refuse(*_args, **_options):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(SimDiffError, match=sentence):
        hub.load_hub("org/name", hint=hint)
