"""Figures are shown by notebooks although pyplot is never imported."""

import io

from IPython.core.formatters import DisplayFormatter
from PIL import Image

from autoq.pictures import Picture


def test_a_notebook_shows_a_picture_of_its_size():
    figure = Picture(3.0, 2.0, dpi=50)
    figure.add_subplot().plot([0, 1], [0, 1])
    data, _ = DisplayFormatter().format(figure)
    assert Image.open(io.BytesIO(data["image/png"])).size == (150, 100)
