"""MNIST's images of handwritten digits, from a file or downloaded once."""

import hashlib
import io
import urllib.request
from pathlib import Path

import numpy as np
import torch

from support.files import atomic_write, read_user_file

URLS = (
    "https://storage.googleapis.com/tensorflow/tf-keras-datasets/mnist.npz",
    "https://s3.amazonaws.com/img-datasets/mnist.npz",
)
SHA256 = "731c5ac602752760c8e48fbffcf8c3b850d9dc2a2aedcf2cc48468fc17b673d1"


def load_mnist(path=None):
    """Return training and test images, (60000, 784) and (10000, 784), from 0 to 1.

    path: an .npz file. By default out/mnist.npz, which is downloaded if it does not exist.
    """
    if path is None:
        path = Path("out", "mnist.npz")
        if not path.is_file():
            download_mnist(path)
    content = read_user_file(path, limit=2**30)
    try:
        with np.load(io.BytesIO(content)) as arrays:
            images = [arrays[name].reshape(-1, 784) for name in ("x_train", "x_test")]
        if any(x.dtype != np.uint8 or len(x) == 0 for x in images):
            raise TypeError
    except Exception:  # of many kinds: NumPy reads what any file may hold
        raise ValueError(
            f"{path} is not MNIST: give an .npz file with x_train and x_test, 28 x 28 bytes each"
        ) from None
    return [torch.from_numpy(x).float() / 255 for x in images]


def download_mnist(path):
    """Download MNIST to `path`, from the first address whose file has the right checksum."""
    for url in URLS:
        try:
            content = urllib.request.urlopen(url, timeout=10).read()
        except OSError:
            continue
        if hashlib.sha256(content).hexdigest() == SHA256:
            with atomic_write(path) as file:
                file.write(content)
            return
    raise ValueError(
        "MNIST cannot be fetched now; give --mnist FILE.npz with the arrays x_train and x_test"
    )
