"""A notebook with one of each fault that the tests in the browser are there to find; a test says what they found."""

import os
import time

import ipywidgets
from IPython.display import HTML, Javascript, display
from PIL import Image

# %% wide
display(HTML("<div style='width: 3000px'>wide</div>"))

# %% console
display(Javascript("console.error('spoken to the console'); new Image().src = 'http://192.0.2.1/picture.png'"))

# %% lab
picture = ipywidgets.Image(value=Image.new("RGB", (40, 40), "red")._repr_jpeg_(), format="jpeg")
dead, slow = ipywidgets.IntSlider(description="dead"), ipywidgets.Text(tooltip="slow", continuous_update=False)
unknown = ipywidgets.Checkbox(tooltip="unknown")


def answer(change):
    time.sleep(1)
    picture.value = Image.new("RGB", (40, 40), (9 * len(change["new"]), 0, 0))._repr_jpeg_()


slow.observe(answer, "value")
pale = ipywidgets.HTML("<span style='color: #aaa; background: #fff'>pale</span>")
ipywidgets.VBox([dead, slow, unknown, pale, picture])

# %% refusing
button, message = ipywidgets.Button(description="Refuse"), ipywidgets.Label()
button.on_click(lambda _: setattr(message, "value", "✘ no"))
ipywidgets.VBox([button, message])

# %% dying
button = ipywidgets.Button(description="Die")
button.on_click(lambda _: os._exit(1))
ipywidgets.VBox([button])

# %% failing
raise ValueError("as was to be shown")

# %% never
print("nobody comes here")
