"""Give the pictures of executed notebooks a palette of 256 colours: a third of the bytes, to the eye the
same.

    python .ci/shrink_pictures.py notebooks/*.ipynb
"""

import base64
import io
import sys
from pathlib import Path

import nbformat
from PIL import Image

from simdiff_utils.files import write_whole


def shrink(png: str) -> str:
    """Both base64; the picture as it was where it is smaller so."""
    with Image.open(io.BytesIO(base64.b64decode(png))) as picture, io.BytesIO() as small:
        # maximum coverage keeps the colours of thin lines, which a median cut gives to the greys
        coloured = picture.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        coloured.save(small, "png", optimize=True)
        return min(base64.b64encode(small.getvalue()).decode(), png, key=len)


for notebook in map(Path, sys.argv[1:]):
    content = nbformat.read(notebook, as_version=nbformat.NO_CONVERT)
    for output in (output for cell in content.cells for output in cell.get("outputs", [])):
        if "image/png" in output.get("data", {}):
            output["data"]["image/png"] = shrink(output["data"]["image/png"])
    with write_whole(notebook) as partial:
        nbformat.write(content, partial)
