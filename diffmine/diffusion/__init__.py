"""The model and the maths on tensors."""

import os

# diffusers' import makes transformers warn about image processors that diffmine does not use.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
