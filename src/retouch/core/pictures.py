"""Small pictures inside of evidence and pages."""

import base64
import io
from typing import Any

import numpy as np


def png_address(image: Any, *, smallest: int = 64) -> str:
    """A PNG as a data address, which a page can show without another file.

    Args:
        image: PIL image, or array (h, w), (1, h, w) or (3, h, w) in 0 to 1.
        smallest: pictures with a shorter side are enlarged by a whole factor to at least this, without smoothing.
    """
    from PIL import Image

    if not isinstance(image, Image.Image):
        pixels = np.asarray(image, dtype=np.float32)
        if pixels.ndim == 3:
            pixels = pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)
        image = Image.fromarray((pixels.clip(0, 1) * 255).round().astype("uint8"))
    factor = max(1, -(-smallest // min(image.size)))
    image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
