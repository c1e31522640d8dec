"""What a user's name of a model means, and what went wrong on the Hugging Face hub in one sentence."""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import errors

from simdiff_utils import SimDiffError

LEGAL_FILES = ["LICENSE*", "NOTICE*", "USE_POLICY*", "README.md"]  # an export passes the terms on
CHECKPOINT_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", *LEGAL_FILES]
CODE_FILES = ["*.py"]  # of a model that brings code of its own
SECOND_COPIES = ["consolidated*", "original/*"]  # of the same weights, in the vendors' own formats


def read_model_name(model: str) -> tuple[str, str]:
    """What a user's name of a model means, without looking further than at the local disk.

    Returns:
        kind and what it names: "embedded" or "shape" and the name behind the colon, "folder" or "gguf" and a
        path, "hub" and an id.

    Raises:
        SimDiffError: it is none of these. Nothing that cannot be a hub id is ever asked for there.
    """
    kind, colon, name = model.partition(":")
    if colon and kind in ("embedded", "shape"):
        return kind, name
    path = Path(model).expanduser()
    if model and path.is_dir():
        return "folder", str(path)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise SimDiffError(f"there is no file {model}; check the path.")
        return "gguf", str(path)
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", model) or ".." in model:
        raise SimDiffError(
            f"{model!r} is neither a local folder, a .gguf file, an embedded model nor a hub id; "
            "check the path, or write the hub id as organisation/name."
        )
    return "hub", model


@contextmanager
def hub_sentences(hub_id: str) -> Iterator[None]:
    """Whatever the hub's client raises in a `with` block, as a SimDiffError that says what to do."""
    try:
        yield
    except errors.GatedRepoError as error:
        raise SimDiffError(
            f"{hub_id} is gated: accept the licence on its page, then run `hf auth login`."
        ) from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise SimDiffError(
            f"the hub has no model {hub_id}; check the id (a private one needs `hf auth login`)."
        ) from error
    except errors.NotASafetensorsRepoError as error:
        raise SimDiffError(
            f"{hub_id} has no .safetensors weights, and pickled ones are not read; convert it with "
            "`save_pretrained` on a machine that trusts it."
        ) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise SimDiffError(
                f"the disk is too full for {hub_id}: make room where the hub's cache is (HF_HOME moves it)."
            ) from error
        raise _unreachable(hub_id) from error
    except Exception as error:  # a dozen kinds, of the hub's client and of what is below it
        raise _unreachable(hub_id) from error


def _unreachable(hub_id: str) -> SimDiffError:
    return SimDiffError(
        f"{hub_id} cannot be reached on the hub and is not in its cache; offline, name a local "
        "folder, a .gguf file or embedded:smollm2-135m-instruct."
    )
