"""Models on huggingface.co: download ORG/NAME into the cache folder of huggingface_hub."""

import functools
import re
from pathlib import Path

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)
# never *.bin: unpickling a file can run any code
MODEL_FILES = ("config.json", "*.safetensors", "model.safetensors.index.json")


def is_model_name(name):
    """Return whether `name` means a model on huggingface.co: ORG/NAME, and no folder ORG here."""
    has_form = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name, re.ASCII)
    return has_form is not None and not Path(name).parent.exists()


def model_name(folder):
    """Return NAME for a folder called NAME, or for the cached folder of the model ORG/NAME."""
    folder = Path(folder).resolve()
    if folder.parent.name == "snapshots":  # models--ORG--NAME/snapshots/COMMIT
        return folder.parent.parent.name.split("--")[-1]
    return folder.name


@functools.cache  # otherwise a second call could get newer weights than the first
def fetch(name):
    """Return the local folder of the model ORG/NAME. Download it unless it is in the cache.

    A cached model needs no network. Raises ValueError if the model cannot be fetched.
    """
    import huggingface_hub
    from huggingface_hub import errors

    try:
        # ignore "*/*": folders inside hold copies of the weights in other formats
        wanted = [*MODEL_FILES, *TOKENIZER_FILES]
        folder = huggingface_hub.snapshot_download(
            name, allow_patterns=wanted, ignore_patterns=["*/*"]
        )
    except errors.GatedRepoError:
        page = f"https://huggingface.co/{name}"
        reason = f"is gated; accept its terms on {page}, then run: hf auth login"
    except errors.RepositoryNotFoundError:
        reason = "is neither a folder here nor a public model on huggingface.co; check the name"
    except errors.LocalEntryNotFoundError:
        constants = huggingface_hub.constants
        why = f"{constants.ENDPOINT} cannot be reached"
        if constants.HF_HUB_OFFLINE:
            why = "HF_HUB_OFFLINE is set"
        reason = (
            f"is neither a folder here nor in the local cache, and {why}; give a folder, or try "
            f"again with a network"
        )
    except Exception as error:  # versions differ in the types of their HTTP errors
        lines = str(error).splitlines() or [type(error).__name__]
        reason = f"cannot be fetched from huggingface.co ({lines[0]})"
    else:
        return Path(folder)
    raise ValueError(f"{name} {reason}")
